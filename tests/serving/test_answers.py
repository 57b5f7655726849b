"""Answers over HTTP, whole and as events: what OpenAI's clients expect of them."""

import base64
import hashlib
import json
import re
import threading

import pytest
from fake_serving import FakeEngine, FakePool, wait_for
from fastapi.testclient import TestClient
from planting import each_is_caught, law
from transformers import AutoTokenizer

from peft_from_scratch.models import tiny
from peft_from_scratch.serving.http import answer, prompts, server
from peft_from_scratch.serving.http.metrics import NAMES, Metrics
from peft_from_scratch.serving.http.server import Options, application
from peft_from_scratch.serving.requests import Piece, Sampling, Token
from peft_from_scratch.tasks.templates import encode_prompt, stop_token

TOKENIZER = AutoTokenizer.from_pretrained(tiny.folder())
HELLO = [{"role": "user", "content": "hello"}]


def serving(*names, room=64, crashes=True, **options):
    """A client of a server with these adapters; its engine is `client.engine`."""
    pool = FakePool(*names)
    engine = FakeEngine(pool, room)
    app = application(engine, pool, TOKENIZER, Options("tiny", **options))
    client = TestClient(app, raise_server_exceptions=crashes)
    client.engine, client.pool = engine, pool
    return client


def completed(client, model="base", prompt="hello", **fields):
    body = {"model": model, "prompt": prompt, **fields}
    return client.post("/v1/completions", json=body)


def chatted(client, model="base", messages=HELLO, **fields):
    body = {"model": model, "messages": messages, **fields}
    return client.post("/v1/chat/completions", json=body)


def events(response):
    """The events of a stream, the last of which is [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def tokens_of(text):
    return len(TOKENIZER(text).input_ids)


@law
def a_name_is_answered_by_what_it_names_and_by_nothing_else():
    """base, the base's name, base:name; a name that is not there is 404."""
    with serving("a", "b") as client:
        for model, name in (
            *(("base", "base"), ("tiny", "base"), ("a", "a"), ("b", "b")),
            *(("base:a", "a"), ("tiny:b", "b")),
        ):
            for ask, field in ((completed, "text"), (chatted, "message")):
                got = ask(client, model)
                assert got.status_code == 200, got.text
                shown = got.json()["choices"][0][field]
                shown = shown if field == "text" else shown["content"]
                assert shown == " ".join([name] * 4)
                assert got.json()["model"] == model
        asked = len(client.engine.tickets)
        for model in ("c", "A", "base:", "base:c", "base:base:a", "tiny:tiny", "a:b"):
            for got in (
                completed(client, model),
                chatted(client, model),
                chatted(client, model, stream=True),
                client.get(f"/v1/models/{model}"),
            ):
                assert got.status_code == 404, (model, got.text)
                assert got.json()["error"]["code"] == "model_not_found"
        assert len(client.engine.tickets) == asked


@law
def usage_counts_every_token_once():
    with serving("a") as client:
        for n in (1, 3):
            got = completed(client, "a", ["hello", "a mug"], n=n).json()
            asked = tokens_of("hello") + tokens_of("a mug")
            assert got["usage"] == {
                "prompt_tokens": asked,
                "completion_tokens": 2 * n * 4,
                "total_tokens": asked + 2 * n * 4,
            }
            assert [c["index"] for c in got["choices"]] == list(range(2 * n))
        whole = chatted(client, max_tokens=3).json()["usage"]
        options = {"include_usage": True}
        *_, last = events(
            chatted(client, max_tokens=3, stream=True, stream_options=options)
        )
        assert last["usage"] == whole and last["choices"] == []
        ids = encode_prompt(TOKENIZER, "", HELLO, template="raw")
        assert (whole["prompt_tokens"], whole["completion_tokens"]) == (len(ids), 3)


@law
def a_stream_is_the_whole_answer_in_parts():
    with serving("a") as client:
        for ask, field in ((completed, None), (chatted, "delta")):
            got = events(ask(client, "a", n=2, stream=True))
            texts, ends = {0: "", 1: ""}, {0: [], 1: []}
            for event in got:
                (choice,) = event["choices"]
                part = choice[field]["content"] if field else choice["text"]
                texts[choice["index"]] += part
                ends[choice["index"]].append(choice["finish_reason"])
                assert "usage" not in event and event["id"] == got[0]["id"]
            assert texts == {0: "a a a a", 1: "a a a a"}
            assert ends == {i: [None, None, None, "stop"] for i in (0, 1)}
        roles = [event["choices"][0]["delta"].get("role") for event in got]
        assert roles.count("assistant") == 2 and roles[0] == "assistant"
        kinds = {event["object"] for event in got}
        assert kinds == {"chat.completion.chunk"}


@law
def a_request_asks_the_engine_for_what_it_says():
    fields = {"n": 2, "seed": 5, "temperature": 0.5, "top_p": 0.25, "max_tokens": 7}
    with serving("a", timeout=9.0) as client:
        fields |= {"stop": "end", "user": "shop", "logprobs": True, "top_logprobs": 2}
        chatted(client, "a", **fields)
        completed(client, "a", [[1, 2], [3]], stop=["x", "y"], logprobs=0)
        completed(client)
        chatted(client, max_completion_tokens=3, max_tokens=9)
        chatted(client)
        asked = [ticket.request for ticket in client.engine.tickets]
    first, second, third, fourth, base, limited, free = asked
    assert first.prompt == tuple(encode_prompt(TOKENIZER, "", HELLO, template="raw"))
    assert first.sampling == Sampling(0.5, 0.25, 5, 2)
    assert second.sampling == Sampling(0.5, 0.25, 6, 2)
    assert (first.adapter, first.max_tokens, first.stop) == ("a", 7, ("end",))
    assert (first.tenant, first.deadline) == ("shop", 9.0)
    assert first.stop_ids == (stop_token(TOKENIZER, "raw"),)
    assert (third.prompt, fourth.prompt) == ((1, 2), (3,))
    assert third.stop == ("x", "y") and third.sampling == Sampling(1.0, logprobs=0)
    assert base.adapter is None and base.sampling == Sampling(1.0)
    assert (base.max_tokens, limited.max_tokens, free.max_tokens) == (16, 3, 256)


@law
def letters_that_spell_a_control_token_stay_letters():
    end = TOKENIZER.eos_token
    with serving("a") as client:
        completed(client, prompt=end)
        chatted(client, messages=[{"role": "user", "content": end}])
        for ticket in client.engine.tickets:
            assert TOKENIZER.eos_token_id not in ticket.request.prompt
            assert end in TOKENIZER.decode(ticket.request.prompt)


@law
def an_adapter_is_spoken_to_as_in_training(folder):
    record = {"recipe": {"template": "raw"}, "instruction": "Say it."}
    own = [{"role": "system", "content": "Sing."}, *HELLO]
    parts = {"role": "developer", "content": [{"type": "text", "text": "Sing."}]}
    (folder / "training.json").write_text(json.dumps(record))
    with serving("a", "b", crashes=False) as client:
        client.pool.table["a"].folder = folder
        for model, messages, instruction in (
            *(("a", HELLO, "Say it."), ("a", own, "Sing."), ("b", HELLO, "")),
            *(("base", HELLO, ""), ("a", [parts, *HELLO], "Sing.")),
        ):
            assert chatted(client, model, messages).status_code == 200
            got = client.engine.tickets[-1].request.prompt
            ids = encode_prompt(TOKENIZER, instruction, HELLO, template="raw")
            assert got == tuple(ids), (model, messages)
        (folder / "training.json").write_text("{}")
        got = chatted(client, "a")
        assert got.status_code == 500 and str(folder) not in got.text
        assert "does not say how to speak to it" in got.text


@law
def a_client_that_goes_away_cancels_its_requests():
    """Both while it streams and while it waits for a whole answer."""
    for stream in (False, True):
        with serving("a") as client:
            client.engine.go.clear()
            gone = threading.Event()
            asking = threading.Thread(target=leave_early, args=(client, stream, gone))
            asking.start()
            assert wait_for(lambda: len(client.engine.tickets) == 2)
            first, second = client.engine.tickets
            assert not first.cancelled.is_set() and not second.cancelled.is_set()
            gone.set()
            asking.join(10)
            assert not asking.is_alive()
            assert first.cancelled.is_set() and second.cancelled.is_set()


def leave_early(client, stream, gone):
    """Ask for two choices as a server would hand it over, then go away."""
    import asyncio

    body = {"model": "a", "prompt": "hello", "n": 2, "stream": stream}
    messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive():
        if messages:
            return messages.pop()
        while not gone.is_set():
            await asyncio.sleep(0.005)
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    asyncio.run(client.app(scope, receive, send))


def test_log_probabilities_of_a_chat_and_of_a_completion():
    texts = [TOKENIZER.decode([i]) for i in (300, 301, 400)]
    with serving("a") as client:
        got = completed(client, "a", max_tokens=2, logprobs=1).json()
        assert got["choices"][0]["logprobs"] == {
            "tokens": texts[:2],
            "token_logprobs": [-0.5, -0.5],
            "top_logprobs": [{texts[2]: -1.0}] * 2,
            "text_offset": [0, len(texts[0])],
        }
        parts = events(completed(client, "a", max_tokens=2, logprobs=1, stream=True))
        offsets = [part["choices"][0]["logprobs"]["text_offset"] for part in parts]
        assert offsets == [[0], [len(texts[0])]]
        got = chatted(client, "a", max_tokens=2, logprobs=True, top_logprobs=1).json()
        first, _ = got["choices"][0]["logprobs"]["content"]
        assert first["token"] == texts[0] and first["logprob"] == -0.5
        assert bytes(first["bytes"]).decode() == texts[0]
        (top,) = first["top_logprobs"]
        assert (top["token"], top["logprob"]) == (texts[2], -1.0)
        got = chatted(client, "a", logprobs=True).json()
        assert got["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
        assert chatted(client, "a").json()["choices"][0]["logprobs"] is None


def test_what_json_cannot_say_is_said_otherwise():
    """A probability of 0, and a token that is a part of a character."""
    part = TOKENIZER("é", add_special_tokens=False).input_ids[0]
    sure = Token(part, float("-inf"), ((part, float("-inf")),))
    with serving() as client:
        client.engine.pieces = lambda request: [Piece("é", (sure,), "stop")]
        got = chatted(client, logprobs=True, top_logprobs=1).json()
        (entry,) = got["choices"][0]["logprobs"]["content"]
        assert entry["logprob"] == -9999.0
        assert entry["bytes"] is None or bytes(entry["bytes"]).decode() == "é"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("piece", "status", "words"),
    [
        (Piece(reason="error", error="boom\nTraceback"), 500, "answer: boom"),
        (Piece(reason="cancelled"), 503, "about to stop"),
        (Piece(reason="deadline"), 504, "over before it began"),
    ],
)
def test_an_answer_that_failed_is_an_error_and_the_server_lives(
    piece, status, words, stream
):
    with serving("a") as client:
        client.engine.pieces = lambda request: [piece]
        got = chatted(client, "a", n=2, stream=stream)
        body = events(got)[-1] if stream else got.json()
        assert got.status_code == (200 if stream else status)
        assert words in body["error"]["message"]
        assert "Traceback" not in got.text
        assert all(ticket.cancelled.is_set() for ticket in client.engine.tickets)
        assert client.get("/health").status_code == 200


def test_a_token_without_text_is_counted_and_no_event_unless_it_is_reported():
    pieces = [
        Piece(tokens=(Token(300, -1.0),)),
        Piece("ab", (Token(301, -2.0),), "stop"),
    ]
    with serving() as client:
        client.engine.pieces = lambda request: pieces
        for logprobs, count in ((None, 1), (0, 2)):
            got = events(completed(client, stream=True, logprobs=logprobs))
            assert len(got) == count
        assert completed(client).json()["usage"]["completion_tokens"] == 2


def test_a_deadline_cuts_what_is_there():
    pieces = [Piece("half", (Token(300),)), Piece(reason="deadline")]
    with serving() as client:
        client.engine.pieces = lambda request: pieces
        choice = completed(client).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("half", "length")


def test_the_metrics_are_those_of_engine_pool_and_answers():
    with serving("a", "b") as client:
        completed(client, "a", n=2)
        client.engine.go.clear()
        asking = threading.Thread(target=completed, args=(client, "b"))
        asking.start()
        assert wait_for(lambda: client.engine.adapters()[1])
        waiting = client.get("/metrics").text
        client.engine.go.set()
        asking.join(10)
        text = client.get("/metrics").text
    for line in (
        "peft_requests_running 0.0",
        "vllm:num_requests_waiting 0.0",
        "peft_pool_resident 2.0",
        "peft_pool_bytes 2000.0",
        "peft_pool_budget_bytes 8000.0",
        "peft_pool_hits_total 5.0",
        "peft_pool_misses_total 4.0",
        "peft_pool_evictions_total 3.0",
        "peft_pool_loads_total 2.0",
        'peft_adapter_tokens_total{adapter="a"} 8.0',
        'peft_adapter_tokens_total{adapter="b"} 4.0',
        "peft_time_to_first_token_seconds_count 3.0",
        "peft_time_per_output_token_seconds_count 3.0",
    ):
        assert line in text.splitlines(), line
    info = 'vllm:lora_requests_info{max_lora="8",running_lora_adapters="",'
    assert f'{info}waiting_lora_adapters="b"}}' in waiting
    assert f'{info}waiting_lora_adapters=""}}' in text


def test_the_page_runs_its_own_script_only():
    """Its policy holds the digest of the script that it has, and nothing is fetched."""
    with serving() as client:
        got = client.get("/")
    assert got.headers["x-frame-options"] == "DENY"
    (script,) = re.findall(r"<script>(.*?)</script>", got.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in got.text, "write this one into the page"
    assert "default-src 'none'" in got.text
    assert not re.search(
        r"innerHTML|insertAdjacent|document\.write|localStorage", script
    )
    assert not re.search(r"https?://|<link|<img|@import", got.text)
    labels = set(re.findall(r'<label for="(\w+)"', got.text))
    fields = set(re.findall(r'<(?:input|select|textarea) id="(\w+)"', got.text))
    assert labels == fields


def test_labels_of_adapters_are_few():
    pool = FakePool()
    metrics = Metrics(FakeEngine(pool), pool)
    for i in range(3 * NAMES):
        metrics.count(f"a{i}", 1)
    text = metrics.text().decode()
    assert text.count("peft_adapter_tokens_total{") == NAMES + 1
    assert f'adapter="(others)"}} {2.0 * NAMES}' in text


test_a_planted_bug_is_caught = each_is_caught(
    {
        "an unknown name is answered by the base": (
            server.Service.adapter,
            "refuse_model(model)",
            "return None",
            a_name_is_answered_by_what_it_names_and_by_nothing_else,
        ),
        "whatever stands before a colon is passed over": (
            server.Service.adapter,
            'rest if first in ("base", self.options.base) else model',
            "rest or model",
            a_name_is_answered_by_what_it_names_and_by_nothing_else,
        ),
        "the adapter is forgotten on the way": (
            server.Service.submit,
            "Request(tuple(ids), answer.adapter,",
            "Request(tuple(ids), None,",
            a_name_is_answered_by_what_it_names_and_by_nothing_else,
        ),
        "the prompt counts once a choice": (
            server.Service.submit,
            "answer.prompt_tokens += len(ids)",
            "answer.prompt_tokens += len(ids) * body.n",
            usage_counts_every_token_once,
        ),
        "the tokens of one choice count": (
            answer.Answer._usage,
            "for c in self.choices",
            "for c in self.choices[:1]",
            usage_counts_every_token_once,
        ),
        "every event has the first choice's number": (
            answer.Answer._choice,
            '"index": i',
            '"index": 0',
            a_stream_is_the_whole_answer_in_parts,
        ),
        "the last piece's text is lost": (
            answer.Answer._pieces,
            "yield i, piece",
            "yield i, piece if piece.reason is None else Piece(reason=piece.reason)",
            a_stream_is_the_whole_answer_in_parts,
        ),
        "all choices have one seed": (
            server.Service.submit,
            "body.sampling(i)",
            "body.sampling(0)",
            a_request_asks_the_engine_for_what_it_says,
        ),
        "text becomes a control token": (
            prompts.Prompts.encoded,
            'plain(reader, asked, "raw")',
            "reader(asked).input_ids",
            letters_that_spell_a_control_token_stay_letters,
        ),
        "the adapter's instruction is left out": (
            prompts.Prompts.manner,
            'words or ""',
            '""',
            an_adapter_is_spoken_to_as_in_training,
        ),
        "a cancelled ticket is forgotten": (
            answer.Answer.end,
            "ticket.cancel()",
            "pass",
            a_client_that_goes_away_cancels_its_requests,
        ),
        "a stream that breaks off goes on": (
            answer.Events.__call__,
            "self.answer.end()",
            "pass",
            a_client_that_goes_away_cancels_its_requests,
        ),
    }
)
