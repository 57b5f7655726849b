"""HTTP, engine and pool together, on tiny: each adapter writes what it writes alone."""

from concurrent.futures import ThreadPoolExecutor

from fastapi.testclient import TestClient
from planting import each_is_caught, law
from served import adapter_folder, asking, greedy

from peft_from_scratch import load_model
from peft_from_scratch.serving.engine import Engine
from peft_from_scratch.serving.http import server
from peft_from_scratch.serving.http.server import Options, application
from peft_from_scratch.serving.pool import AdapterPool

PROMPT = [300, 17, 512, 44, 90]


@law
def over_http_each_adapter_writes_what_it_writes_alone(folder):
    model, tokenizer = load_model("tiny", device="cpu")
    folders = {None: None}
    for seed, name in enumerate(("a", "b")):
        folders[name] = adapter_folder(model, folder / name, seed=seed, r=2 + seed)
    alone = {
        name: tokenizer.decode(greedy(model, place, asking(PROMPT, max_tokens=8)))
        for name, place in folders.items()
    }
    assert len(set(alone.values())) == 3
    pool = AdapterPool(model, budget_bytes=10**7, root=folder)
    engine = Engine(model, tokenizer, pool, rows=4)
    options = Options("tiny", folder, allow_loading=True, positions=engine.limit)
    app = application(engine, pool, tokenizer, options)
    with TestClient(app) as client, ThreadPoolExecutor(8) as together:
        for name in ("a", "b"):
            body = {"lora_name": name, "lora_path": name}
            assert client.post("/v1/load_lora_adapter", json=body).status_code == 200

        def ask(name):
            body = {"model": name or "base", "prompt": PROMPT, "temperature": 0}
            got = client.post("/v1/completions", json={**body, "max_tokens": 8})
            assert got.status_code == 200, got.text
            return got.json()

        names = [None, "a", "b", "a", "b", None, "a", "b"]
        for name, got in zip(names, together.map(ask, names), strict=True):
            assert got["choices"][0]["text"] == alone[name], name
            assert got["usage"]["completion_tokens"] == 8
            digests = {card.name: card.digest for card in pool.cards()}
            assert got["system_fingerprint"] == digests.get(name)
        assert client.get("/metrics").status_code == 200
        body = {"model": "a", "prompt": PROMPT, "max_tokens": engine.limit}
        got = client.post("/v1/completions", json=body)
        assert got.status_code == 400 and "shorten" in got.text
        client.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
        got = client.post("/v1/completions", json={"model": "a", "prompt": PROMPT})
        assert got.status_code == 404
    assert not engine.running and not engine.waiting


test_a_planted_bug_is_caught = each_is_caught(
    {
        "the adapter is forgotten on the way": (
            server.Service.submit,
            "Request(tuple(ids), answer.adapter,",
            "Request(tuple(ids), None,",
            over_http_each_adapter_writes_what_it_writes_alone,
        )
    }
)
