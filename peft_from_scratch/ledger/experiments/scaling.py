"""L3: what alpha / r does to the size of an update, and to the loss at one rate.

One task far from the pretraining, one model, LoRA on every projection. What alpha and
the rank cost at rates of their own: own_rates.py.
"""

from collections.abc import Sequence
from statistics import fmean

import numpy as np
import torch

from ...common.statistics import over_seeds
from ...core.adapter import adapters
from ...tasks.task import load_task
from ...tasks.templates import encode_rows
from ...training.batch import batch_of
from ..claim import FAILS, HOLDS_WHEN, LARGE_HOLDS, Claim, Measured, Rule
from ..runs import Run, matches
from . import finetune

TASK, N, STEPS, BATCH = "gap-3", 1000, 100, 16
SEEDS = (0, 1, 2, 3, 4)
SIZED, SIZED_AT = (1, 2, 4, 8, 16, 32, 64), 3e-3  # L3: ranks, one rate for all
ALPHA = {"lora": 16, "rslora": 8}  # the same scale, 4, at rank 4
ROWS = 32  # validation rows that an update's size is measured on


def config(method: str, r: int, alpha: float, lr: float, seed: int) -> dict:
    return finetune.config(
        base="tiny",
        task=TASK,
        method=method,
        r=r,
        alpha=alpha,
        lr=lr,
        seed=seed,
        n=N,
        steps=STEPS,
        batch=BATCH,
    )


# ------------------------------------------------------------------- L3: the size


def size_configs(scale: str) -> list[dict]:
    if scale != "tiny":
        return []
    return [
        config(method, r, ALPHA[method], SIZED_AT, seed) | {"experiment": "scaling"}
        for method in ALPHA
        for r in SIZED
        for seed in SEEDS
    ]


def compute(config: dict) -> dict:
    """Fine-tune, then compare each module's update with its base on validation rows.

    Returns  {"ratio": rms(scale · B A x) / rms(W0 x), the mean over modules,
              "test_loss": …}
    """
    model, tokenizer, result = finetune.fine_tuned(config)
    rows = load_task(config["task"]).validation.select(range(ROWS))
    encoded = encode_rows(tokenizer, "", rows, template=config["template"])
    ratios = update_ratios(model, batch_of(encoded, next(model.parameters()).device))
    return {"ratio": fmean(ratios.values()), "test_loss": result["test_loss"]}


@torch.no_grad()
def update_ratios(model, batch) -> dict[str, float]:
    """{module: rms of what its LoRA adds / rms of what its base gives}."""
    ratios, hooks = {}, []
    for name, module in adapters(model).items():

        def note(module, inputs, output, name=name):
            (x,) = inputs
            added = module.scale * (x @ module.A.T @ module.B.T)
            # The base's output by itself: `output` holds the update as well.
            ratios[name] = (_rms(added) / _rms(output - added)).item()

        hooks.append(module.register_forward_hook(note))
    try:
        model(batch["input_ids"], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return ratios


def _rms(x) -> torch.Tensor:
    return x.square().mean().sqrt()


def exponents(all_runs: Sequence[Run], method: str) -> list[float]:
    """For each seed the p of ratio ∝ r^p, by least squares on logarithms."""
    slopes = []
    for seed in SEEDS:
        own = [r for r in all_runs if matches(r, method=method, seed=seed)]
        ranks, ratios = zip(
            *((r.config["r"], r.result["ratio"]) for r in own), strict=True
        )
        slopes.append(float(np.polyfit(np.log(ranks), np.log(ratios), 1)[0]))
    return slopes


def size_measured(all_runs: Sequence[Run]) -> Measured:
    value, low, high = over_seeds(exponents(all_runs, "lora"))
    other, *_ = over_seeds(exponents(all_runs, "rslora"))
    ends = {
        r: fmean(x.result["ratio"] for x in all_runs if matches(x, method="lora", r=r))
        for r in (SIZED[0], SIZED[-1])
    }
    figures = {
        "exponent": f"{value:+.2f}",
        "rslora": f"{other:+.2f}",
        "smallest": f"{ends[SIZED[0]]:.2f}",
        "largest": f"{ends[SIZED[-1]]:.2f}",
    }
    return Measured(value, low, high, SEEDS, figures)


SIZE = (
    "After training at one learning rate, the update's size goes with the rank to the "
    "power {exponent} under alpha / r, from {smallest} of the layer's output at rank 1 "
    "to {largest} at rank 64; under alpha / sqrt(r), to the power {rslora}"
)
CLAIMS = (
    Claim(
        id="L3",
        notebook="05",
        statement="alpha / r makes the size of the update independent of the rank",
        rule=Rule(
            words=(
                "The exponent p of rms(scale B A x) / rms(W0 x) ~ r^p over ranks 1 to "
                "64, after 100 steps at one learning rate with alpha = 16; mean over "
                "modules, then over seeds"
            ),
            unit="(exponent)",
            verdicts=(*LARGE_HOLDS, HOLDS_WHEN, FAILS),
            edges=(-0.25, -0.1, 0.1, 0.25),
        ),
        configs=size_configs,
        measured=size_measured,
        say_instead={"does not hold here": SIZE, "holds when": SIZE},
        number="exponent p of the update's size, r^p",
        condition=(
            "the rank changes little: from rank 1 to 64 the update shrinks from "
            "{smallest} to {largest} of the output"
        ),
        so={
            "holds when": (
                "With alpha / r, a larger rank learns a smaller update at the same "
                "learning rate. Search the rate again when the rank changes much."
            ),
        },
    ),
)
