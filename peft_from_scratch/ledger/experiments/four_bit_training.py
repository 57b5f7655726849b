"""Runs of QLoRA that also merge what they trained, in the ways of methods/qlora.py.

Each task has a rate of its own, searched in half decades on one seed. four_bit_merging
judges the merges (M4, Q5). On SmolLM2, four_bit_cost.py (Q4) reads these runs as well;
on tiny it has a finer search, and runs of its own.
"""

from collections.abc import Sequence
from copy import deepcopy
from statistics import fmean, median

from torch import nn

from ...core.adapter import trainable
from ...methods import qlora
from ...models.load import load_model
from ...nf4 import NF4Linear
from ...tasks.task import load_task
from ...tasks.templates import encode_rows
from ..rates import search
from ..runs import Run
from . import finetune

SEEDS = {"tiny": (0, 1, 2, 3, 4), "smollm2": (0, 1, 2)}
TASKS = {"tiny": ("gap-1", "gap-2", "gap-3"), "smollm2": ("orders",)}
SETTINGS = {
    "tiny": dict(n=1000, steps=100, batch=16),
    "smollm2": dict(n=600, steps=50, batch=8, validation=20),
}
RATES = (3e-3, 1e-2, 3e-2)  # tiny, for each method and task; the search may grow
RATE = 3e-3  # smollm2: LoRA's in data/results/tuning.json, for all
UNTRAINED = ("base", "nf4-base", "qlora-frozen")


def config(scale: str, method: str, task: str, lr: float, seed: int) -> dict:
    return finetune.config(
        base=scale,
        task=task,
        method=method,
        lr=lr,
        seed=seed,
        **SETTINGS[scale],
        **({} if method in UNTRAINED[:2] else dict(r=8, alpha=16)),
    )


def merged_config(scale: str, task: str, lr: float, seed: int) -> dict:
    """A QLoRA run that also merges."""
    return config(scale, "qlora", task, lr, seed) | {"experiment": "four_bit_training"}


def compute(config: dict) -> dict:
    """Train a QLoRA, and merge it in three ways.

    Returns  what finetune.compute returns, and
        bytes    of the weights, adapters not counted
        merges   {onto: {test_items, test_loss, bytes, weight, update}}: the last two
                 are MergeErrors, the median over modules
    """
    model, tokenizer, result = finetune.fine_tuned(config)
    if result["diverged"]:
        return result
    base, _ = load_model(config["base"], device="cpu")
    rows = finetune.chosen_rows(load_task(config["task"]), config)["test"]
    instruction = load_task(config["task"]).instruction
    rows = encode_rows(tokenizer, instruction, rows, template=config["template"])
    merges = {}
    for onto in qlora.ONTO:
        merged = deepcopy(model)
        errors = qlora.merge(merged, onto, base if onto == "original" else None)
        losses = finetune.item_losses(merged, rows)
        merges[onto] = {
            "test_items": [round(loss, 5) for loss in losses],
            "test_loss": round(fmean(losses), 6),
            "bytes": weight_bytes(merged),
            "weight": median(error.weight for error in errors.values()),
            "update": median(error.update for error in errors.values()),
        }
    return result | {"bytes": weight_bytes(model), "merges": merges}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's own weights: packed ones with constants, no adapters."""
    added = {id(parameter) for parameter in trainable(model).values()}
    own = [p for p in model.parameters() if id(p) not in added]
    packed = [m for m in model.modules() if isinstance(m, NF4Linear)]
    buffers = [b for m in packed for b in m.buffers(recurse=False)]
    return sum(tensor.nbytes for tensor in [*own, *buffers])


# ------------------------------------------------------------------------- The runs


def rate(scale: str, method: str, task: str) -> tuple[list[dict], float | None]:
    """(configurations of the search, the rate it chose)."""
    if scale != "tiny":
        return [], RATE
    seed = SEEDS[scale][0]
    return search(lambda lr: config(scale, method, task, lr, seed), RATES)


def tasks_of(all_runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.config["task"] for run in all_runs))
