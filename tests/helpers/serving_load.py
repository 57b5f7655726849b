"""Many clients, many adapters, churn and faults, against a real server on loopback.

    python tests/helpers/serving_load.py --minutes 10 --clients 64 --adapters 200

On tiny. Every answer is compared with that of its version computed alone, token by
token: equal, or within 1e-3 of the largest logit where it first differs. Two quiet
phases come first, of the base and of one adapter. Then adapters are reloaded with other
weights, removed and added while clients ask, and strangers send what they should not.
"""

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import quantiles

import httpx
import torch

sys.path.insert(0, str(Path(__file__).parent))

from loopback import listening
from served import adapter_folder

from peft_from_scratch import load, load_model, remove
from peft_from_scratch.files.adapter_file import WEIGHTS, AdapterFile
from peft_from_scratch.serving.engine import Engine
from peft_from_scratch.serving.http.keys import Keys
from peft_from_scratch.serving.http.server import Options, application
from peft_from_scratch.serving.pool import AdapterPool, digest_of

NEAR = 1e-3  # of the largest logit: a token that rounding may choose
ADMIN, SHOP, OTHER = ("admin" * 4, "shop" * 5, "other" * 4)
PROMPTS, TOKENS = 12, 12
QUIET = "only-for-other"  # an adapter that SHOP may not use
BROKEN = "broken"  # its file is cut while the server runs


@dataclass
class Report:
    """What came of a load.

    statuses  of all answers, by what was asked
    wrong     answers that no version of their adapter gives, each in a sentence
    seconds   to the whole answer, by phase
    over      by how many bytes the pool exceeded its budget at most
    near      answers that differ from the reference at a near-tie only
    """

    statuses: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    over: int = 0
    near: int = 0
    tokens: int = 0
    lost: int = 0
    wall: float = 0.0

    def lines(self) -> list[str]:
        counts = ", ".join(f"{k} {n}" for k, n in sorted(self.statuses.items()))
        return [
            f"{self.wall:.0f} s, {self.tokens} tokens, {self.tokens / self.wall:.0f} a "
            f"second; {self.near} answers differ at a near-tie, {len(self.wrong)} are "
            f"wrong, {self.lost} were lost; budget exceeded by {self.over} bytes",
            counts,
            *(_latency(name, values) for name, values in self.seconds.items()),
            *self.wrong[:5],
        ]


def _latency(name: str, values: list[float]) -> str:
    cuts = quantiles(values, n=20) if len(values) > 1 else values * 19
    return f"{name}: {len(values)} answers, p50 {cuts[9]:.3f} s, p95 {cuts[18]:.3f} s"


class Reference:
    """What each version answers alone, on a model that the server never sees."""

    def __init__(self):
        self.model, self.tokenizer = load_model("tiny", device="cpu", dtype="float32")
        self.model.eval()
        self.files: dict[str | None, AdapterFile | None] = {None: None}
        self._answers: dict[tuple, tuple[list[int], list[float]]] = {}
        self._folder = Path(tempfile.mkdtemp())

    def note(self, folder: Path) -> str:
        """Remember the content of a folder under its digest."""
        digest = digest_of(folder)
        file = AdapterFile.read(folder)
        tensors = {key: tensor.clone() for key, tensor in file.tensors.items()}
        self.files[digest] = replace(file, tensors=tensors)
        return digest

    @torch.no_grad()
    def answer(self, digest: str | None, prompt: tuple[int, ...]) -> tuple:
        """(tokens, by how much each led, of the largest logit)"""
        key = digest, prompt
        if key not in self._answers:
            if digest is not None:
                self.files[digest].write(self._folder)
                load(self.model, self._folder)
            ids, leads, cache = torch.tensor([prompt]), [], None
            tokens = []
            for _ in range(TOKENS):
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                (first, second), chosen = out.logits[0, -1].topk(2)
                leads.append(float((first - second) / first.abs()))
                if int(chosen[0]) == self.tokenizer.eos_token_id:
                    break
                tokens.append(int(chosen[0]))
                ids = chosen[:1][None]
            if digest is not None:
                remove(self.model)
            self._answers[key] = tokens, leads
        return self._answers[key]

    def judge(self, digest, prompt, text: str, report: Report) -> None:
        """Note an answer that is not the version's own."""
        if digest is not None and digest not in self.files:
            report.wrong.append(f"an unknown version {digest[:8]}")
            return
        tokens, leads = self.answer(digest, prompt)
        expected = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if text == expected:
            return
        if any(lead < NEAR for lead in leads):
            report.near += 1
        else:
            report.wrong.append(f"{digest and digest[:8]}: {text!r}, not {expected!r}")


class Shelf:
    """The folders of the adapters, which change while they are served."""

    def __init__(self, root: Path, reference: Reference, count: int):
        self.root, self.reference = root, reference
        self.names = [f"a{i}" for i in range(count)]
        self.folders: dict[str, str] = {}  # of names that were reloaded
        self.model = reference.model
        first = adapter_folder(self.model, root / "first", r=4)
        self.first = AdapterFile.read(first)
        self.tensors = {k: t.clone() for k, t in self.first.tensors.items()}
        for i, name in enumerate([*self.names, QUIET, BROKEN]):
            self.write(name, seed=i)

    def drop(self, name: str, folder: str) -> None:
        """The name has another folder from now on: delete the one before."""
        shutil.rmtree(self.root / self.folders.get(name, name))
        self.folders[name] = folder

    def write(self, name: str, seed: int) -> str:
        """New weights in a folder; noted before anybody can ask for them."""
        dice = torch.Generator().manual_seed(seed)
        tensors = {
            key: 0.05 * torch.randn(tensor.shape, generator=dice)
            for key, tensor in self.tensors.items()
        }
        folder = self.root / name
        replace(self.first, tensors=tensors).write(folder)
        return self.reference.note(folder)


class Load:
    """Clients that ask until a time, and what they note."""

    def __init__(self, client, shelf: Shelf, pool: AdapterPool, seed: int):
        self.client, self.shelf, self.pool, self.seed = client, shelf, pool, seed
        self.report, self.until = Report(), 0.0
        dice = random.Random(seed)
        self.prompts = [
            tuple(dice.randrange(3, 200) for _ in range(dice.randint(1, 40)))
            for _ in range(PROMPTS)
        ]
        self.answers: list[tuple] = []  # (digest, prompt, text), judged afterwards

    async def phase(self, name: str, seconds: float, clients: list) -> None:
        self.report.seconds[name] = self.now = []
        self.until = time.monotonic() + seconds
        await asyncio.gather(*clients)

    async def asking(self, number: int, names: list[str | None]) -> None:
        """A client that asks for one adapter after the other, streaming or not."""
        dice = random.Random(f"{self.seed} {number}")
        while time.monotonic() < self.until:
            name, prompt = dice.choice(names), dice.choice(self.prompts)
            await self.ask(name, prompt, stream=dice.random() < 0.3)

    async def ask(self, name, prompt, *, stream=False) -> None:
        began = time.monotonic()
        body = {"model": name or "base", "prompt": list(prompt), "temperature": 0}
        body |= {"max_tokens": TOKENS, "stream": stream}
        status, text, digest = await self._post(body, stream)
        self.report.statuses[f"answer {status}"] += 1
        if status == 200 and text is None:
            self.report.lost += 1
        elif status == 200:
            if (digest is None) != (name is None):
                self.report.wrong.append(f"{name} was answered by {digest}")
            self.now.append(time.monotonic() - began)
            self.report.tokens += TOKENS
            self.answers.append((digest, prompt, text))
        over = self.pool.bytes - self.pool.budget_bytes
        self.report.over = max(self.report.over, over)

    async def _post(self, body: dict, stream: bool):
        """(status, text, digest of the version); None for a text without an end."""
        headers = {"Authorization": f"Bearer {SHOP}"}
        if not stream:
            got = await self.client.post("/v1/completions", json=body, headers=headers)
            if got.status_code != 200:
                return got.status_code, "", None
            answer = got.json()
            text = answer["choices"][0]["text"]
            return 200, text, answer["system_fingerprint"]
        text, digest, ended = "", None, False
        where = self.client.stream(
            "POST", "/v1/completions", json=body, headers=headers
        )
        async with where as got:
            if got.status_code != 200:
                return got.status_code, "", None
            async for line in got.aiter_lines():
                if line == "data: [DONE]":
                    break
                if line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:  # its status was sent before
                        code = event["error"]["code"]
                        return {"removed": 404}.get(code, 500), "", None
                    text += event["choices"][0]["text"]
                    ended |= event["choices"][0]["finish_reason"] is not None
                    digest = event["system_fingerprint"]
        return 200, text if ended else None, digest

    def _streaming(self, body: dict, headers: dict):
        how = {"json": body, "headers": headers}
        return self.client.stream("POST", "/v1/completions", **how)

    async def churning(self) -> None:
        """Reload adapters with other weights, remove some and add them again."""
        dice, seed = random.Random(self.seed), 10_000
        headers = {"Authorization": f"Bearer {ADMIN}"}
        while time.monotonic() < self.until:
            name = dice.choice(self.shelf.names)
            seed, folder = seed + 1, f"{name}-{seed}"
            await asyncio.to_thread(self.shelf.write, folder, seed)
            if dice.random() < 0.3:
                gone = {"lora_name": name}
                url = "/v1/unload_lora_adapter"
                got = await self.client.post(url, json=gone, headers=headers)
                self.report.statuses[f"unload {got.status_code}"] += 1
            body = {"lora_name": name, "lora_path": folder, "load_inplace": True}
            url = "/v1/load_lora_adapter"
            got = await self.client.post(url, json=body, headers=headers)
            self.report.statuses[f"load {got.status_code}"] += 1
            if got.status_code == 200:  # what is in use does not need its folder
                await asyncio.to_thread(self.shelf.drop, name, folder)
            await asyncio.sleep(0.05)

    async def misbehaving(self) -> None:
        """What no client should send; each is refused, and nothing else suffers."""
        path, shop = "/v1/completions", {"Authorization": f"Bearer {SHOP}"}
        admin = {"Authorization": f"Bearer {ADMIN}"}
        as_json = {"Content-Type": "application/json"}
        hello = {"model": "base", "prompt": "hello", "max_tokens": 2}
        await asyncio.to_thread(self._cut, self.shelf.root / BROKEN / WEIGHTS)
        while time.monotonic() < self.until:
            for what, call in {
                "malformed": dict(content=b'{"model": ', headers=shop | as_json),
                "bad UTF-8": dict(content=b'{"model": "\xff"}', headers=shop | as_json),
                "10 MB": dict(json=hello | {"prompt": "x" * 10_000_000}, headers=shop),
                "no key": dict(json=hello),
                "wrong key": dict(json=hello, headers={"Authorization": "Bearer no"}),
                "another's": dict(json=hello | {"model": QUIET}, headers=shop),
                "unknown": dict(json=hello | {"model": "nobody"}, headers=shop),
                "broken": dict(json=hello | {"model": BROKEN}, headers=admin),
            }.items():
                try:
                    got = await self.client.post(path, **call)
                    self.report.statuses[f"{what} {got.status_code}"] += 1
                except httpx.TransportError:  # it hung up before all was sent
                    self.report.statuses[f"{what} refused"] += 1
            for folder in ("../first", "/etc", "nowhere"):
                body = {"lora_name": "x", "lora_path": folder}
                url = "/v1/load_lora_adapter"
                got = await self.client.post(url, json=body, headers=admin)
                self.report.statuses[f"{folder} {got.status_code}"] += 1
            await self._vanish(hello | {"max_tokens": 200, "stream": True}, shop)
            await asyncio.sleep(0.2)

    async def _vanish(self, body: dict, headers: dict) -> None:
        """Hang up after the first piece."""
        where = self.client.stream(
            "POST", "/v1/completions", json=body, headers=headers
        )
        async with where as got:
            async for _ in got.aiter_lines():
                break
        self.report.statuses["vanished 200"] += 1

    @staticmethod
    def _cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:100])


async def _run(address: str, shelf: Shelf, pool, seconds, clients, seed) -> Load:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=120) as http:
        load_ = Load(http, shelf, pool, seed)
        quiet, few = seconds * 0.15, max(1, clients // 4)
        ask, names = load_.asking, shelf.names
        await load_.phase(
            "quiet, the base", quiet, [ask(i, [None]) for i in range(few)]
        )
        one = [ask(i, names[:1]) for i in range(few)]
        await load_.phase("quiet, one adapter", quiet, one)
        all_ = [ask(i, [None, *names]) for i in range(clients)]
        rest = [*all_, load_.churning(), load_.misbehaving()]
        await load_.phase("churn", seconds - 2 * quiet, rest)
        return load_


def run(
    folder: Path, *, seconds: float, clients: int, adapters: int, fit: int, seed=0
) -> Report:
    """Put a server under load for so many seconds.

    Args
        fit  how many adapters have room in memory
    """
    reference = Reference()
    shelf = Shelf(folder, reference, adapters)
    model, tokenizer = load_model("tiny", device="cpu", dtype="float32")
    size = sum(4 * t.numel() for t in shelf.tensors.values())
    pool = AdapterPool(model, budget_bytes=fit * size, root=folder)
    for name in [BROKEN, QUIET, *shelf.names]:
        pool.add(name, name)
    engine = Engine(model, tokenizer, pool, rows=16, queue=clients + 16)
    mine = {"tenant": "shop", "adapters": shelf.names}
    others = {"tenant": "other", "adapters": [QUIET]}
    admin = {"tenant": "admin", "admin": True}
    keys = Keys({SHOP: mine, OTHER: others, ADMIN: admin})
    options = Options("tiny", folder, allow_loading=True, keys=keys)
    began = time.monotonic()
    with listening(application(engine, pool, tokenizer, options)) as address:
        load_ = asyncio.run(_run(address, shelf, pool, seconds, clients, seed))
    report = load_.report
    report.wall = time.monotonic() - began
    report.lost += engine.running + engine.waiting
    report.lost += sum(card.users for card in pool.cards())
    for digest, prompt, text in load_.answers:
        reference.judge(digest, prompt, text, report)
    if engine.failed:
        report.wrong.append(engine.failed)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--fit", type=int, default=40)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        made = run(
            Path(place),
            seconds=60 * asked.minutes,
            clients=asked.clients,
            adapters=asked.adapters,
            fit=asked.fit,
        )
    print(*made.lines(), sep="\n")
