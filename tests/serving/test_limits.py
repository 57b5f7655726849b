"""What clients may not do: each is refused in OpenAI's form, and the server lives."""

import asyncio
import json
import re

import pytest
from planting import Bug, each_is_caught, law
from test_answers import HELLO, chatted, completed, serving

from peft_from_scratch.serving.http import door, keys, protocol, server
from peft_from_scratch.serving.http.keys import Keys, read_keys
from peft_from_scratch.serving.requests import Closed

JSON = {"content-type": "application/json"}
SHOP, BANK, ADMIN = "shop-0123456789abcdef", "bank-0123456789abcdef", "root" * 5
TABLE = {
    SHOP: {"tenant": "shop", "adapters": ["a"]},
    BANK: {"tenant": "bank", "adapters": None, "admin": False},
    ADMIN: {"tenant": "admin", "adapters": [], "admin": True},
}
ASKED = b'{"model": "base", "prompt": "hello"'


def refused(response, status, *words):
    """The error of a response, which has OpenAI's form and names no place or line."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    for word in words:
        assert word in body["error"]["message"], body
    assert "Traceback" not in response.text and len(response.content) < 2000
    return body["error"]


def bearing(key):
    return {"authorization": f"Bearer {key}"}


# ------------------------------------------------------------------------ bodies

NO_JSON = {
    "no byte": b"",
    "cut off": ASKED,
    "not UTF-8": ASKED[:-1] + b"\xff\xfe" + b'"}',
    "UTF-16": (ASKED + b"}").decode().encode("utf-16"),
    "half a character": ASKED + b', "user": "\\ud800"}',
    "half a character in a name": ASKED + b', "\\udfff": null}',
    "not a number": ASKED + b', "temperature": NaN}',
    "infinite": ASKED + b', "temperature": Infinity}',
    "infinite by its exponent": ASKED + b', "metadata": 1e999}',
    "nested deeply": ASKED + b', "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "nested less deeply": ASKED + b', "x": ' + b'{"x":' * 5_000 + b"1" + b"}" * 5_001,
    "a number of 5,000 digits": ASKED + b', "seed": ' + b"1" * 5_000 + b"}",
    "a key twice": ASKED + b', "model": "a"}',
}


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize("name", NO_JSON)
def test_a_body_that_is_no_plain_json_is_refused(name, route):
    with serving("a") as client:
        got = client.post(f"/v1/{route}", content=NO_JSON[name], headers=JSON)
        refused(got, 400, "no plain JSON")
        assert not client.engine.tickets


WRONG_FIELDS = [
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": ["a"] * 17}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": [["a"]] * 10_000}, "prompt"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": 1.0}, "n"),
    ({"n": True}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": "x" * 65}, "stop"),
    ({"stop": ["x"] * 5}, "stop"),
    ({"stop": 4}, "stop"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 1}}, "stream_options"),
    ({"stream_options": []}, "stream_options"),
    ({"user": "x" * 257}, "user"),
    ({"best_of": 2}, "best_of"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"logit_bias": {"1": 5}}, "logit_bias"),
    ({"frequency_penalty": 0.1}, "frequency_penalty"),
    ({"presence_penalty": -1}, "presence_penalty"),
    ({"tools": [{}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"top_k": 5}, "top_k"),
    ({"x" * 5_000: 1}, "x" * 100),
]
WRONG_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": [7]}, "messages"),
    ({"messages": [7] * 900}, "messages"),
    ({"messages": HELLO * 1001}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{**HELLO[0], "name": "x"}]}, "name"),
    ({"logprobs": 3}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"prompt": "x"}, "prompt"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_field_is_named(stream):
    with serving("a") as client:
        for ask, rows in ((completed, WRONG_FIELDS), (chatted, WRONG_CHATS)):
            for fields, name in rows:
                if "stream" not in fields:
                    fields = {"stream": stream, **fields}
                error = refused(ask(client, **fields), 400)
                assert error["param"] == name, (fields, error)
        assert not client.engine.tickets


@law
def a_wish_that_is_not_fulfilled_is_refused():
    """And a field that asks for nothing is no reason to refuse."""
    nothing = {
        **{"tools": [], "logit_bias": {}, "functions": None, "tool_choice": "none"},
        **{
            "frequency_penalty": 0,
            "presence_penalty": 0.0,
            "best_of": 1,
            "echo": False,
        },
        **{"response_format": {"type": "text"}, "suffix": "", "store": False},
        **{"stop": None, "seed": None, "temperature": None, "max_tokens": None},
    }
    with serving("a") as client:
        assert completed(client, **nothing).status_code == 200
        assert chatted(client, **nothing).status_code == 200
        for fields in ({"tools": [{}]}, {"echo": True}, {"unheard_of": 1}):
            refused(completed(client, **fields), 400, "is not served here")
            refused(chatted(client, **fields), 400, "is not served here")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([*HELLO, *HELLO], "turn 2 is the user's"),
        ([{"role": "assistant", "content": "x"}], "turn 1 is the assistant's"),
        ([{"role": "system", "content": "x"}], "the user's is due"),
        ([{"role": "user", "content": " "}], "'content' is empty"),
        ([{"role": "user", "content": ""}], "'content' is empty"),
    ],
)
def test_a_conversation_out_of_order_is_refused(messages, words):
    with serving("a") as client:
        refused(chatted(client, messages=messages), 400, words)


@law
def no_more_than_the_limit_is_read_of_a_body():
    """A client that never stops sending is stopped."""
    read = []

    async def receive():
        read.append(1)
        assert len(read) < 100
        return {"type": "http.request", "body": b" " * 300, "more_body": True}

    scope = {
        **{"type": "http", "method": "POST", "path": "/v1/completions"},
        **{"headers": [(b"content-type", b"application/json")], "query_string": b""},
    }
    request = door.HttpRequest(scope, receive)
    with pytest.raises(protocol.Refused) as error:
        asyncio.run(door.body_of(request, 1000))
    assert error.value.status == 413 and len(read) == 4


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(door, "SECONDS", 0.05)

    async def receive():
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    scope = {
        **{"type": "http", "method": "POST", "path": "/v1/completions"},
        **{"headers": [(b"content-type", b"Application/JSON; charset=utf-8")]},
    }
    with pytest.raises(protocol.Refused) as error:
        asyncio.run(door.body_of(door.HttpRequest(scope, receive), 1000))
    assert error.value.status == 408


def test_a_body_of_the_limit_is_taken():
    body = json.dumps({"model": "base", "prompt": "hello"})
    with serving(body_bytes=len(body) + 1) as client:
        for more, status in (("", 200), (" ", 200), ("  ", 413)):
            got = client.post("/v1/completions", content=body + more, headers=JSON)
            assert got.status_code == status
        refused(got, 413, "longer than")


def test_a_form_or_plain_text_is_refused():
    """A page on another host can send these without asking; JSON it cannot."""
    with serving() as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            headers = {"content-type": kind}
            got = client.post("/v1/completions", content=b"{}", headers=headers)
            refused(got, 415, "application/json")


# ------------------------------------------------------------------------ numbers


def test_prompts_and_answers_have_limits():
    with serving("a", prompt_tokens=8, max_tokens=20, queue=5) as client:
        assert completed(client, prompt=[1] * 8, max_tokens=20).status_code == 200
        refused(completed(client, prompt=[1] * 9), 400, "9", "8 are allowed")
        refused(completed(client, prompt="hello " * 20), 400, "8 are allowed")
        refused(completed(client, max_tokens=21), 400, "max_tokens: 21", "20")
        refused(completed(client, prompt=["a", "b"], n=3), 400, "answers: 6", "5")
        refused(completed(client, prompt=[10**6]), 400, "token 1000000")
        refused(completed(client, prompt=""), 400, "no token")
        assert len(client.engine.tickets) == 1
        chatted(client, messages=[{"role": "user", "content": "a"}])
    with serving(positions=20) as client:
        chatted(client)
        request = client.engine.tickets[-1].request
        assert request.max_tokens + len(request.prompt) == 20


@law
def a_full_queue_is_said_and_leaves_nothing_behind():
    with serving("a", room=2) as client:
        client.engine.go.clear()
        for stream in (False, True):
            got = completed(client, "a", n=5, stream=stream)
            error = refused(got, 429, "ask again in 7 s")
            assert got.headers["retry-after"] == "7" and error["code"] == "queue_full"
            assert all(ticket.cancelled.is_set() for ticket in client.engine.tickets)


def test_a_closed_engine_and_a_bug_are_errors():
    with serving("a", crashes=False) as client:
        client.engine.closed = True
        refused(completed(client), 503, "takes no more")

        def broken(request, listener):
            raise RuntimeError("secret of the house")

        client.engine.submit = broken
        got = completed(client)
        refused(got, 500, "its log says more")
        assert "secret" not in got.text
        client.engine.submit = lambda request, listener: (_ for _ in ()).throw(
            KeyError("a")
        )
        assert refused(completed(client, "a"), 404)["code"] == "model_not_found"
        assert client.get("/health").status_code == 200
        client.engine.failed = "RuntimeError: out of memory"
        assert client.get("/health").status_code == 503
        assert client.get("/ready").status_code == 503


def test_other_routes_have_the_same_errors():
    with serving() as client:
        refused(client.get("/v1/nothing"), 404)
        refused(client.get("/v1/completions"), 405)
        refused(client.post("/v1/load_lora_adapter", json={}), 404)
    assert str(Closed("x")) == "x"


# --------------------------------------------------------------------------- keys


@law
def every_route_but_three_wants_a_key():
    loading = {"allow_loading": True, "adapters": "."}
    with serving("a", keys=Keys(TABLE), crashes=False, **loading) as client:
        for path in ("/", "/health", "/ready"):
            assert client.get(path).status_code == 200
        answers = completed, chatted
        for header in (None, "", SHOP, f"Basic {SHOP}", f"Bearer {SHOP}x", "Bearer "):
            client.headers = {} if header is None else {"authorization": header}
            for got in (
                *(ask(client, stream=stream) for ask in answers for stream in (0, 1)),
                client.get("/v1/models"),
                client.get("/v1/models/a"),
                client.get("/metrics"),
                client.post("/v1/load_lora_adapter", json={}),
                client.post("/v1/unload_lora_adapter", json={}),
            ):
                assert refused(got, 401)["code"] == "invalid_api_key"
        assert not client.engine.tickets
        for host in ("x/health#", "x/health?", "x/#", "x/health#@x"):
            client.headers = {"host": host}
            refused(client.get("/v1/models"), 401)
        client.headers = bearing(SHOP)
        assert completed(client, "a", user="bank").status_code == 200
        assert client.engine.tickets[0].request.tenant == "shop"


@law
def a_key_gets_its_adapters_and_learns_of_no_other():
    with serving("a", "b", keys=Keys(TABLE)) as client:
        for key, mine in ((SHOP, {"a"}), (BANK, {"a", "b"}), (ADMIN, set())):
            client.headers = bearing(key)
            listed = {card["id"] for card in client.get("/v1/models").json()["data"]}
            assert listed == {"tiny", *mine}
            assert completed(client).status_code == 200
            for name in ("a", "b", "c"):
                for got in (
                    completed(client, name),
                    completed(client, f"base:{name}"),
                    client.get(f"/v1/models/{name}"),
                ):
                    if name in mine:
                        assert got.status_code == 200
                    else:
                        error = refused(got, 404)
                        words = error["message"].replace(f"{name}'", "c'")
                        assert words.replace("base:", "").startswith(
                            "there is no model 'c'"
                        )


def test_metrics_take_an_admin_and_so_does_loading(tmp_path):
    options = {"allow_loading": True, "adapters": tmp_path}
    with serving("a", keys=Keys(TABLE), **options) as client:
        for key, status in ((SHOP, 403), (BANK, 403), (ADMIN, 200)):
            client.headers = bearing(key)
            assert client.get("/metrics").status_code == status
            got = client.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
            assert got.status_code == status
            body = {"lora_name": "z", "lora_path": "z"}
            got = client.post("/v1/load_lora_adapter", json=body)
            assert got.status_code == (404 if status == 200 else 403)


@law
def a_table_of_keys_is_read_strictly(folder):
    file = folder / "keys.json"
    file.write_text(json.dumps(TABLE))
    read = read_keys(file)
    assert read.of(f"bearer {SHOP}").tenant == "shop"
    assert read.of(f"Bearer {ADMIN}").admin and not read.of(f"Bearer {SHOP}").admin
    for table, words in (
        ([], "not an object"),
        ({}, "one key or more"),
        ({"short": {"tenant": "x"}}, "key 1=.*16 or more"),
        ({"with a space in the middle": {"tenant": "x"}}, "without spaces"),
        ({"é" * 20: {"tenant": "x"}}, "ASCII"),
        ({SHOP: {}}, "key 1: tenant"),
        ({SHOP: []}, "key 1: "),
        ({SHOP: {"tenant": ""}}, "tenant"),
        ({SHOP: {"tenant": 3}}, "tenant"),
        ({SHOP: {"tenant": "x", "adapters": "a"}}, "adapters"),
        ({SHOP: {"tenant": "x", "adapters": [1]}}, "adapters"),
        ({SHOP: {"tenant": "x", "admin": 1}}, "admin"),
        ({SHOP: {"tenant": "x", "admim": True}}, "admim"),
        ({**TABLE, BANK + "x": {"tenant": 1}}, "key 4"),
    ):
        file.write_text(json.dumps(table))
        error = refusal_of(file)
        assert error and str(file) in error and re.search(words, error), (table, error)
        assert not any(key in error for key in TABLE), error
    file.write_text('{"k": 1, "k": 2}')
    assert "stands twice" in refusal_of(file)


def refusal_of(file):
    """Why these keys are refused; None where they are not."""
    try:
        read_keys(file)
    except ValueError as error:
        return str(error)
    return None


# ------------------------------------------------------------------------ folders


def a_shelf(folder):
    """Adapters' folder: one whole, one without a file, links in and out."""
    shelf, outside = folder / "shelf", folder / "outside"
    for place in (shelf / "whole", shelf / "deep" / "er", outside):
        place.mkdir(parents=True)
        (place / "adapter_config.json").write_text("{}")
    (shelf / "empty").mkdir()
    (shelf / "file").write_text("")
    (shelf / "out").symlink_to(outside)
    (shelf / "in").symlink_to(shelf / "whole")
    (shelf / "loop").symlink_to(shelf / "loop")
    for name, target in (
        ("half", outside / "adapter_config.json"),
        ("passwords", "/etc/passwd"),
    ):
        (shelf / name).mkdir()
        (shelf / name / "adapter_config.json").write_text("{}")
        (shelf / name / "adapter_model.safetensors").symlink_to(target)
    return shelf


@law
def only_folders_inside_are_loaded(folder):
    shelf = a_shelf(folder)
    with serving("a", adapters=shelf, allow_loading=True, crashes=False) as client:
        for path, status in {
            **{"whole": 200, "deep/er": 200, "in": 200, "./whole": 200},
            **{"empty": 404, "nowhere": 404, "file": 404, "whole/none": 404},
            **{"out": 400, "half": 400, "passwords": 400, "loop": (400, 404)},
            **{"..": 400, "../outside": 400, "whole/../whole": 400, ".": 400},
            **{str(folder / "outside"): 400, str(shelf / "whole"): 400, "/": 400},
            **{"": 400, "\0": 400, "x" * 400: 400, "out/../whole": 400},
        }.items():
            body = {"lora_name": "new", "lora_path": path, "load_inplace": True}
            got = client.post("/v1/load_lora_adapter", json=body)
            fine = status if isinstance(status, tuple) else (status,)
            assert got.status_code in fine, (path, got.text)
            if got.status_code != 200:
                refused(got, got.status_code)
            assert str(shelf) not in got.text, got.text
        assert client.pool.table.keys() == {"a", "new"}
        assert client.pool.table["new"].folder.is_relative_to(shelf)


def test_loading_has_the_codes_of_vllm(tmp_path):
    shelf = a_shelf(tmp_path)
    with serving("a", adapters=shelf, allow_loading=True) as client:

        def load(**fields):
            body = {"lora_name": "new", "lora_path": "whole", **fields}
            return client.post("/v1/load_lora_adapter", json=body)

        def unload(**fields):
            return client.post("/v1/unload_lora_adapter", json=fields)

        assert load().status_code == 200
        card = client.get("/v1/models/new").json()
        assert (card["root"], card["parent"]) == ("whole", "tiny")
        assert str(tmp_path) not in client.get("/v1/models").text
        refused(load(), 400, "is there")
        assert load(load_inplace=True).status_code == 200
        refused(load(lora_name="base"), 400, "is the base")
        refused(load(lora_name="tiny"), 400, "is the base")
        refused(load(lora_name=""), 400, "lora_name")
        refused(load(lora_path=None), 400, "lora_path")
        client.pool.wrong = ValueError(f"{shelf}/whole/x is broken")
        refused(load(lora_name="c"), 400, "whole/x is broken")
        client.pool.wrong = RuntimeError("all adapters are in use")
        refused(load(lora_name="c"), 503, "in use")
        client.pool.wrong = None
        (shelf / "whole" / "training.json").write_text("{}")
        refused(load(lora_name="c"), 400, "whole/training.json=None: allowed")
        assert unload(lora_name="new").status_code == 200
        assert refused(unload(lora_name="new"), 404)["code"] == "model_not_found"
        refused(unload(), 400, "lora_name")


def test_without_permission_nothing_is_loaded(tmp_path):
    shelf = a_shelf(tmp_path)
    with serving("a", adapters=shelf) as client:
        body = {"lora_name": "new", "lora_path": "whole"}
        refused(client.post("/v1/load_lora_adapter", json=body), 404)
        refused(client.post("/v1/unload_lora_adapter", json={"lora_name": "a"}), 404)
        assert client.pool.table.keys() == {"a"}


test_a_planted_bug_is_caught = each_is_caught(
    {
        "the check of the key is dropped": Bug(
            door.key_of,
            "if key is None:",
            "if False:",
            every_route_but_three_wants_a_key,
        ),
        "every key matches": Bug(
            keys.Keys.of,
            "if compare_digest(digest, given):",
            "if True:",
            every_route_but_three_wants_a_key,
        ),
        "any scheme will do": Bug(
            keys.Keys.of,
            'if scheme.lower() == "bearer" else None',
            "",
            every_route_but_three_wants_a_key,
        ),
        "the client names the tenant": Bug(
            server.Service.answer,
            "key.tenant or body.user",
            "body.user or key.tenant",
            every_route_but_three_wants_a_key,
        ),
        "every key may use every adapter": Bug(
            server.Service.adapter,
            "or not key.may_use(name)",
            "",
            a_key_gets_its_adapters_and_learns_of_no_other,
        ),
        "every key sees every adapter": Bug(
            server.Service.cards,
            "if key.may_use(card.name) else []",
            "",
            a_key_gets_its_adapters_and_learns_of_no_other,
        ),
        "no adapters are all adapters": Bug(
            keys.Key.may_use,
            "self.adapters is None",
            "not self.adapters",
            a_key_gets_its_adapters_and_learns_of_no_other,
        ),
        "a short key is a key": Bug(
            keys._checked, "len(key) >= 16 and", "", a_table_of_keys_is_read_strictly
        ),
        "a path may lead up": Bug(
            door.inside, '".." in asked.parts or', "", only_folders_inside_are_loaded
        ),
        "a path may begin at the root": Bug(
            door.inside, "asked.is_absolute() or", "", only_folders_inside_are_loaded
        ),
        "links may lead out": Bug(
            door.inside,
            "if not all(place.is_relative_to(root) for place in places):",
            "if False:",
            only_folders_inside_are_loaded,
        ),
        "links in a folder may lead out": Bug(
            door.inside,
            '*(file.resolve() for file in folder.rglob("*"))',
            "",
            only_folders_inside_are_loaded,
        ),
        "a body is read to its end": Bug(
            door.body_of,
            "if len(body) > most:",
            "if False:",
            no_more_than_the_limit_is_read_of_a_body,
        ),
        "a full queue leaves the first choices behind": Bug(
            server.Service.submit,
            "answer.end()",
            "pass",
            a_full_queue_is_said_and_leaves_nothing_behind,
        ),
        "unknown fields are passed over": Bug(
            protocol.Fields.only_what_is_served.__func__,
            "!= NOTHING.get(name)",
            "is None",
            a_wish_that_is_not_fulfilled_is_refused,
        ),
    }
)
