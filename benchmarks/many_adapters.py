"""One decoding step of sixteen rows, each with its adapter: against the base and PEFT.

    python benchmarks/many_adapters.py [--rounds 9] [--threads N] [--record]

Sixteen rows behind 64 tokens each, SmolLM2 in float32, LoRA of rank 8 beside every
projection. A step decodes one token a row:

    the base                     no adapter
    ours, 1 / 4 / 16 adapters    a gathered batch (serving/batch.py)
    PEFT, 1 / 4 / 16 adapters    its mixed batch, adapter_names=[…]

Both sides must give the same logits before a clock runs. Then the rank tax: fifteen
rows of rank 4 beside one of rank 64, against sixteen of rank 4 and of rank 64. At last
one row alone, as a server's users notice it: the time to its first token, behind a
prompt of PROMPT tokens, and for each later one, with an adapter over without, minus 1.

side_by_side.py has the clocks and the ratios.
"""

import copy
import logging
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import side_by_side
import torch
from torch import nn

from peft_from_scratch import AdapterPool, load_model, lora, remove, save, trainable
from peft_from_scratch.common.provenance import package_version, provenance
from peft_from_scratch.serving.batch import Batch

ROWS, BEHIND, PROMPT, SEED = 16, 64, 256, 0
COUNTS = (1, 4, 16)  # adapters among the rows
BASE = "the base"
TARGET = 1.25  # of the base's time, at most, with sixteen adapters
CLOSE = 1e-4  # relative norm, of equal logits
BUDGET = 1 << 32
RANKS = {"16 of rank 4": (4,) * 16, "15 of rank 4, one of rank 64": (4,) * 15 + (64,)}
RANKS |= {"16 of rank 64": (64,) * 16}


def adapter(model: nn.Module, folder: Path, seed: int, r: int = 8) -> Path:
    """Save a LoRA with random values; the model is as before."""
    lora.inject(model, r=r)
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.01, generator=dice)
    save(model, folder)
    remove(model)
    return folder


def step_of(model: nn.Module, rows=ROWS, **options) -> Callable[[], torch.Tensor]:
    """A function that decodes one token a row, each behind the same BEHIND ones."""
    ids = _ids(model, rows, BEHIND + 1)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True, **options).past_key_values

    @torch.no_grad()
    def run() -> torch.Tensor:
        last = {"input_ids": ids[:, -1:], "past_key_values": cache, "use_cache": True}
        out = model(**last, **options)
        cache.crop(-1)
        return out.logits

    return run


def first_token_of(model: nn.Module) -> Callable[[], torch.Tensor]:
    """A function that reads one row's prompt, up to the logits of its first token."""
    ids = _ids(model, 1, PROMPT)

    @torch.no_grad()
    def run() -> torch.Tensor:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits

    return run


def _ids(model: nn.Module, rows: int, tokens: int) -> torch.Tensor:
    dice = torch.Generator().manual_seed(SEED)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (rows, tokens), generator=dice)


def ours(model, pool: AdapterPool, names: list[str], work=step_of) -> Callable:
    """Work of a gathered batch, which is put together once."""
    batch = Batch([pool.acquire(name) for name in names])
    with pool.slots.using(batch):
        step = work(model)

    def run() -> torch.Tensor:
        with pool.slots.using(batch):
            return step()

    return run


def pefts(model: nn.Module, folders: dict[str, Path]) -> nn.Module:
    """PEFT's model with all of these adapters."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import PeftModel

    first, *others = folders
    wrapped = PeftModel.from_pretrained(model, folders[first], adapter_name=first)
    for name in others:
        wrapped.load_adapter(folders[name], adapter_name=name)
    return wrapped.eval()


def assigned(names: list[str]) -> list[str]:
    """An adapter for each row, in turn."""
    return [names[i % len(names)] for i in range(ROWS)]


def check_equal(steps: dict[str, Callable]) -> float:
    """RuntimeError unless both sides have the same logits; how far they are apart."""
    apart = 0.0
    for count in COUNTS:
        mine, theirs = (steps[f"{side}, {_adapters(count)}"]() for side in SIDES)
        apart = max(apart, ((mine - theirs).norm() / theirs.norm()).item())
    if not apart <= CLOSE:
        raise RuntimeError(
            f"logits differ by {apart:.2g} of their norm; allowed {CLOSE}"
        )
    return apart


SIDES = ("ours", "PEFT")


def _adapters(count: int) -> str:
    return f"{count} adapter{'s' * (count > 1)}"


def measure(base: str, rounds: int, folder: Path) -> dict:
    """All of the benchmark, as JSON can hold it."""
    model = load_model(base, device="cpu", dtype="float32")[0].eval()
    plain = copy.deepcopy(model)  # no slots will stand in it
    folders = {f"a{i}": adapter(plain, folder / f"a{i}", i) for i in range(max(COUNTS))}
    pool = AdapterPool(model, budget_bytes=BUDGET)
    for name, path in folders.items():
        pool.add(name, path)
    theirs, steps = pefts(copy.deepcopy(model), folders), {BASE: step_of(plain)}
    for count in COUNTS:
        rows = assigned(list(folders)[:count])
        steps[f"ours, {_adapters(count)}"] = ours(model, pool, rows)
        steps[f"PEFT, {_adapters(count)}"] = step_of(theirs, adapter_names=rows)
    apart, turns = check_equal(steps), side_by_side.take_turns
    take = partial(turns, rounds=rounds, device=torch.device("cpu"))
    times = take(steps)
    del steps, theirs
    alone = {
        name: take(_alone(model, plain, pool, work)) for name, work in USERS.items()
    }
    taxed = take(_of_ranks(model, plain, pool, folder))
    return {
        "benchmark": "many_adapters",
        "base": base,
        "dtype": "float32",
        "rows": ROWS,
        "behind": BEHIND,
        "rounds": rounds,
        "apart": apart,
        "steps": side_by_side.table(times, BASE),
        "ranks": side_by_side.table(taxed, next(iter(RANKS))),
        "alone": {
            name: side_by_side.table(times, BASE) for name, times in alone.items()
        },
        "peft": package_version("peft"),
        "provenance": provenance(seed=SEED, device=torch.device("cpu")),
    }


USERS = {"first token": first_token_of, "later token": partial(step_of, rows=1)}
ONE = "one adapter"


def _alone(model, plain, pool: AdapterPool, work: Callable) -> dict[str, Callable]:
    """One row's work without an adapter and with one."""
    return {BASE: work(plain), ONE: ours(model, pool, ["a0"], work)}


def _of_ranks(model, plain, pool: AdapterPool, folder: Path) -> dict[str, Callable]:
    """A step for each list of ranks, every row with an adapter of its own."""
    steps = {}
    for label, ranks in RANKS.items():
        names = [f"r{r}-{i}" for i, r in enumerate(ranks)]
        for i, (name, r) in enumerate(zip(names, ranks, strict=True)):
            if name not in pool:
                pool.add(name, adapter(plain, folder / name, i, r))
        steps[label] = ours(model, pool, names)
    return steps


def report(result: dict) -> str:
    """The result as text, for a terminal."""
    most = f"ours, {_adapters(max(COUNTS))}"
    ratio = next(row["ratio"] for row in result["steps"] if row["name"] == most)
    return "\n".join(
        [
            f"{result['base']}: one token for {ROWS} rows behind {BEHIND}, r=8, "
            f"{result['provenance']['threads']} threads; both sides' logits differ by "
            f"{result['apart']:.1g} of their norm",
            *side_by_side.lines(result["steps"], result["rounds"]),
            f"{most}: {side_by_side.verdict(ratio, TARGET)}",
            "",
            *side_by_side.lines(result["ranks"], result["rounds"]),
            "",
            *(_slowdown(name, rows) for name, rows in result["alone"].items()),
        ]
    )


def _slowdown(name: str, rows: list[dict]) -> str:
    (row,) = [row for row in rows if row["name"] == ONE]
    low, middle, high = (row[key] - 1 for key in ("low", "ratio", "high"))
    return (
        f"one row, {name}: slower by {middle:.0%} with an adapter "
        f"({low:.0%} to {high:.0%})"
    )


def main(arguments: list[str]) -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", default="smollm2", help="as load_model takes it")
    asked = side_by_side.parsed(parser, arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(asked.model, asked.rounds, Path(folder))
    written = side_by_side.write(result, asked.record, out=asked.out)
    print(report(result), written, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
