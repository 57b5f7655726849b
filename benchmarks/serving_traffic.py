"""Tokens a second of the engine, by the number of adapters and the kind of traffic.

    python benchmarks/serving_traffic.py [--requests 96] [--adapters 1,10,100,1000]

LoRAs of rank 4 beside the attention's projections of SmolLM2, in float32, in folders.
Sixteen rows are written at once, and MEMORY adapters fit into the pool. Each request
reads PROMPT tokens and writes ANSWER. What varies:

    adapters   1, 10, 100, 1000 on disk
    traffic    uniform: each adapter as often; Zipf: the k-th as often as 1 / k
    thrash     twice as many adapters as fit, each as often

Beside each stands the base alone on the same requests, in turns, so that a machine that
slows down slows both. Then the switch: what it takes to acquire an adapter that is in
memory, and one that has to be read first.

side_by_side.py has the file of the result, and says when a machine is too busy.
"""

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import side_by_side
import torch
from torch import nn

from peft_from_scratch import AdapterPool, load_model, lora, remove, save
from peft_from_scratch.common.progress import bar
from peft_from_scratch.common.provenance import provenance
from peft_from_scratch.files.adapter_file import AdapterFile
from peft_from_scratch.serving.engine import Engine
from peft_from_scratch.serving.requests import Request

ROWS, PROMPT, ANSWER, SEED = 16, 24, 16, 0
MEMORY = 32  # adapters that fit
UNIFORM, ZIPF = "uniform", "Zipf"
COUNTS = (1, 10, 100, 1000)


def adapters(model: nn.Module, folder: Path, count: int) -> list[Path]:
    """Folders with LoRAs of random values."""
    lora.inject(model, r=4, targets="attention")
    save(model, folder / "first")
    remove(model)
    first = AdapterFile.read(folder / "first")
    dice = torch.Generator().manual_seed(SEED)
    folders = [folder / f"a{i}" for i in range(count)]
    with bar("write", "adapter", count) as shown:
        for path in folders:
            values = {
                key: 0.01 * torch.randn(tensor.shape, generator=dice)
                for key, tensor in first.tensors.items()
            }
            replace(first, tensors=values).write(path)
            shown.update(1)
    return folders


def traffic(names: Sequence[str], kind: str, many: int) -> list[str]:
    """The adapter of each request."""
    dice = random.Random(SEED)
    weights = [1 / (k + 1) if kind == ZIPF else 1 for k in range(len(names))]
    return dice.choices(names, weights, k=many)


def requests(model: nn.Module, wanted: Sequence[str | None]) -> list[Request]:
    dice = random.Random(SEED)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return [
        Request(tuple(dice.randrange(vocabulary) for _ in range(PROMPT)), name, ANSWER)
        for name in wanted
    ]


def answered(engine: Engine, asked: list[Request]) -> dict:
    """Seconds, tokens a second, and the median time to the first token."""
    began, first, ended = time.perf_counter(), {}, set()
    engine.queue = len(asked)

    def listener(i: int):
        def listen(piece) -> None:
            if piece.tokens:
                first.setdefault(i, time.perf_counter() - began)
            if piece.reason is not None:
                ended.add((i, piece.reason))

        return listen

    for i, request in enumerate(asked):
        engine.submit(request, listener(i))
    while len(ended) < len(asked):
        if not engine.turn():
            time.sleep(0.001)
    seconds = time.perf_counter() - began
    if {reason for _, reason in ended} != {"length"}:
        raise RuntimeError(f"not all requests were answered: {sorted(ended)[:3]}")
    return {
        "seconds": seconds,
        "tokens_a_second": len(asked) * ANSWER / seconds,
        "first_token": median(first.values()),
    }


def cell(model, tokenizer, pool: AdapterPool, names, kind: str, many: int) -> dict:
    """One kind of traffic, between two passes of the base alone on the same prompts."""
    plain = requests(model, [None] * many)
    engine = Engine(model, tokenizer, pool, rows=ROWS, patience=1.0)
    counters = replace(pool.counters)
    base = [answered(engine, plain)]
    mine = answered(engine, requests(model, traffic(names, kind, many)))
    base.append(answered(engine, plain))
    engine.close(0)
    hits = pool.counters.hits - counters.hits
    alone = [run["tokens_a_second"] for run in base]
    return mine | {
        "adapters": len(names),
        "traffic": kind,
        "requests": many,
        "hit_rate": hits / many,
        "loads": pool.counters.loads - counters.loads,
        "base_tokens_a_second": alone,
        "ratio": 2 * mine["tokens_a_second"] / sum(alone),
    }


def switches(pool: AdapterPool, names: Sequence[str], rounds: int = 20) -> dict:
    """Median seconds to acquire an adapter in memory, and one on disk."""
    times = {"in memory": [], "on disk": []}
    for i in range(rounds):
        name = names[i % len(names)]
        for entry in pool.cards():
            if entry.name == name:
                entry.content = None
        for place in ("on disk", "in memory"):
            began = time.perf_counter()
            pool.release(pool.acquire(name))
            times[place].append(time.perf_counter() - began)
    return {place: median(values) for place, values in times.items()}


def measure(base: str, counts: Sequence[int], many: int, folder: Path) -> dict:
    """All of the benchmark, as JSON can hold it."""
    model, tokenizer = load_model(base, device="cpu", dtype="float32")
    folders = adapters(model, folder, max(*counts, 2 * MEMORY))
    size = _size(model, folders[0])
    pool = AdapterPool(model, budget_bytes=MEMORY * size + 1)
    with bar("add", "adapter", len(folders)) as shown:
        for path in folders:
            pool.add(path.name, path)
            shown.update(1)
    names = [path.name for path in folders]
    plan = [(count, kind) for count in counts for kind in (UNIFORM, ZIPF)]
    plan = [p for p in plan if p != (1, ZIPF)] + [(2 * MEMORY, UNIFORM)]
    cells = []
    for count, kind in plan:
        cells.append(cell(model, tokenizer, pool, names[:count], kind, many))
        print(line(cells[-1]), flush=True)
    pool.slots.remove()
    return {
        "benchmark": "serving_traffic",
        "base": base,
        "dtype": "float32",
        "rows": ROWS,
        "prompt": PROMPT,
        "answer": ANSWER,
        "in_memory": MEMORY,
        "adapter_bytes": size,
        "cells": cells,
        "switch": switches(pool, names[:5]),
        "provenance": provenance(seed=SEED, device=torch.device("cpu")),
    }


def _size(model: nn.Module, folder: Path) -> int:
    pool = AdapterPool(model, budget_bytes=1 << 40)
    pool.add("x", folder)
    return pool.bytes


def line(row: dict) -> str:
    """A cell as a line for a terminal."""
    return (
        f"{row['adapters']:5} adapters, {row['traffic']:8}"
        f"{row['tokens_a_second']:8.1f} tokens/s, {row['ratio']:5.2f} of the base; "
        f"first token {row['first_token']:6.2f} s; {row['hit_rate']:4.0%} in memory, "
        f"{row['loads']} read"
    )


def report(result: dict) -> str:
    switch = result["switch"]
    return (
        f"{result['in_memory']} adapters of {result['adapter_bytes'] / 1e6:.2f} MB "
        f"fit; to acquire one takes {1e6 * switch['in memory']:.0f} µs in memory, "
        f"{1e3 * switch['on disk']:.1f} ms from disk"
    )


def main(arguments: list[str]) -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", default="smollm2", help="as load_model takes it")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--adapters", default=",".join(map(str, COUNTS)))
    asked = side_by_side.parsed(parser, arguments)
    counts = [int(text) for text in asked.adapters.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        result = measure(asked.model, counts, asked.requests, Path(folder))
    written = side_by_side.write(result, asked.record, out=asked.out)
    print(report(result), written, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
