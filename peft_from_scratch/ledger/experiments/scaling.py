"""L3, L7, L8: what alpha / r does to an update, to the choice of alpha, and the rate.

One task far from the pretraining, one model, LoRA on every projection. Each question
has its own cut through the same space of rank, alpha, scaling and learning rate; the
store keeps each run once.
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
from ..claim import FAILS, HOLDS_WHEN, LARGE_HOLDS, SMALL_HOLDS, Claim, Measured, Rule
from ..intervals import paired
from ..rates import at_best, tuned
from ..runs import Run, matches
from . import finetune

TASK, N, STEPS, BATCH = "gap-3", 1000, 100, 16
SEEDS = (0, 1, 2, 3, 4)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SIZED, SIZED_AT = (1, 2, 4, 8, 16, 32, 64), 3e-3  # L3: ranks, one rate for all
ALPHAS, RANK = (2, 8, 16, 64), 8  # L7: a quarter of the rank, it, twice it, eight times
USUAL = (RANK, 2 * RANK)
RANKS, REFERENCE = (1, 4, 16, 64), 4  # L8
ALPHA = {"lora": 16, "rslora": 8}  # the same scale, 4, at the reference's rank
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


# ------------------------------------------------------------------ L7: the alpha


def alpha_configs(scale: str) -> list[dict]:
    if scale != "tiny":
        return []
    known = []
    for alpha in ALPHAS:
        cell, _ = tuned(
            lambda lr, seed, alpha=alpha: config("lora", RANK, alpha, lr, seed),
            RATES,
            SEEDS,
        )
        known += cell
    return known


def alpha_measured(all_runs: Sequence[Run]) -> Measured:
    """Test loss of the usual alphas over that of the best one, where it is largest."""
    cells = {a: at_best([r for r in all_runs if matches(r, alpha=a)]) for a in ALPHAS}
    best = min(ALPHAS, key=lambda a: _validation(cells[a]))
    excess = {a: paired(cells[a], cells[best]) for a in USUAL}
    worst = max(USUAL, key=lambda a: excess[a][0])
    rates = ", ".join(f"{a}: {cells[a][0].config['lr']:g}" for a in ALPHAS)
    figures = {
        "best": f"{best:g}",
        "excess": f"{excess[worst][0]:+.3f}",
        "rates": rates,
    }
    return Measured(*excess[worst], SEEDS, figures)


# ------------------------------------------------------------------- L8: the rate


def transfer_configs(scale: str) -> list[dict]:
    """Each rank's own search; then all seeds at its rate and at the reference's."""
    if scale != "tiny":
        return []
    known, best = [], {}
    for method in ALPHA:
        for r in RANKS:
            cell, best[method, r] = tuned(_of(method, r), RATES, SEEDS)
            known += cell
    if None in best.values():
        return known
    for method, r in best:
        lr = best[method, REFERENCE]
        known += [_of(method, r)(lr, seed) for seed in SEEDS]
    return list({str(each): each for each in known}.values())


def _of(method, r):
    return lambda lr, seed: config(method, r, ALPHA[method], lr, seed)


def transfer_costs(all_runs: Sequence[Run], method: str) -> dict[int, tuple]:
    """{rank: test loss at the reference's rate minus that at its own, paired}."""
    own = {r: [x for x in all_runs if matches(x, method=method, r=r)] for r in RANKS}
    rate = {r: _searched_rate(own[r]) for r in RANKS}
    at = {
        (r, lr): [x for x in own[r] if matches(x, lr=lr)]
        for r in RANKS
        for lr in (rate[r], rate[REFERENCE])
    }
    return {
        r: paired(at[r, rate[REFERENCE]], at[r, rate[r]])
        for r in RANKS
        if r != REFERENCE
    }


def _searched_rate(all_runs: Sequence[Run]) -> float:
    return at_best(all_runs)[0].config["lr"]


def transfer_measured(all_runs: Sequence[Run]) -> Measured:
    costs = {method: transfer_costs(all_runs, method) for method in ALPHA}
    worst = {
        m: max(by_rank, key=lambda r, c=by_rank: c[r][0])
        for m, by_rank in costs.items()
    }
    figures = {
        "worst": str(worst["lora"]),
        "cost": f"{costs['lora'][worst['lora']][0]:+.3f}",
        "rslora": f"{costs['rslora'][worst['rslora']][0]:+.3f}",
    }
    return Measured(*costs["lora"][worst["lora"]], SEEDS, figures)


def _validation(all_runs: Sequence[Run]) -> float:
    return fmean(run.result["validation_loss"] for run in all_runs)


SIZE = (
    "After training at one learning rate, the update's size goes with the rank to the "
    "power {exponent} under alpha / r, from {smallest} of the layer's output at rank 1 "
    "to {largest} at rank 64; under alpha / sqrt(r), to the power {rslora}"
)
ALPHA_INSTEAD = (
    "At rank 8 the best alpha is {best}; the usual ones cost {excess} nats at the most "
    "once the learning rate is searched for each. Best rates by alpha: {rates}"
)
TRANSFER = (
    "The rates that were tried are half a decade apart. A rate searched at rank 4 "
    "costs {cost} nats where it fits worst, at rank {worst}, and {rslora} nats under "
    "alpha / sqrt(r): where all ranks choose the same rate, the cost is zero whatever "
    "is true"
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
    Claim(
        id="L7",
        notebook="05",
        statement="alpha is typically the rank or twice the rank",
        rule=Rule(
            words=(
                "Test loss at alpha = r and alpha = 2r, the larger one, minus that of "
                "the best alpha of r/4, r, 2r, 8r, chosen on validation; r = 8, the "
                "learning rate searched for each alpha with the same budget, paired "
                "over seeds and rows"
            ),
            unit="nats per token",
            verdicts=SMALL_HOLDS,
            edges=(0.02, 0.1),
        ),
        configs=alpha_configs,
        measured=alpha_measured,
        say_instead={
            "does not hold here": ALPHA_INSTEAD,
            "holds when": ALPHA_INSTEAD,
        },
        number="loss of the usual alphas above that of the best",
        so={
            "undecided": (
                "Search the learning rate for the alpha that you use. These runs "
                "cannot tell the usual alphas from the best one."
            ),
        },
    ),
    Claim(
        id="L8",
        notebook="05",
        statement="Thanks to alpha / r, hyperparameters transfer across ranks",
        rule=Rule(
            words=(
                "What a learning rate searched at rank 4 costs at ranks 1, 16 and 64, "
                "where it costs most: test loss at that rate minus that at the rank's "
                "own searched rate; alpha = 16, paired over seeds and rows"
            ),
            unit="nats per token",
            verdicts=SMALL_HOLDS,
            edges=(0.02, 0.1),
        ),
        configs=transfer_configs,
        measured=transfer_measured,
        untestable={"tiny": TRANSFER},
        number="loss at another rank's learning rate above that at one's own",
        so={
            "cannot be tested here": (
                "The grid is too coarse: search the learning rate again when you "
                "change the rank."
            ),
        },
    ),
)
