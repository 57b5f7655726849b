"""A1: how much time an adapter adds to a decoding step, merged or not.

The same frozen model in five copies: untouched, untouched again as the control, with
LoRA in parallel with every projection, with that LoRA merged, and with bottlenecks
after each sublayer. They take turns within each round, so that a machine that slows
down slows all of them.
"""

from collections.abc import Sequence
from copy import deepcopy
from statistics import median

import torch

from ... import merge
from ...common.statistics import of_median
from ...comparison.timing import step_seconds
from ...methods import houlsby, lora
from ...models.load import load_model
from .. import runs
from ..claim import LARGE_HOLDS, Claim, Measured, Rule
from ..runs import Run
from .finetune import randomize

SEEDS = (0, 1, 2)  # the whole measurement, again
BATCHES = (1, 8)
ROUNDS, TOKENS, PROMPT = 7, 12, 32
# As many parameters, LoRA's first: in a layer of SmolLM2 81,408 and 81,862, in one of
# tiny 20,480 and 20,302.
SIZES = {
    "smollm2": dict(r=8, m=35),
    "tiny": dict(r=8, m=39),
}


def config(base: str, batch: int, seed: int) -> dict:
    return {
        "experiment": "latency",
        "base": base,
        "base_digest": runs.base_digest(base),
        **SIZES[base],
        "batch": batch,
        "rounds": ROUNDS,
        "tokens": TOKENS,
        "prompt": PROMPT,
        "seed": seed,
    }


def configs(scale: str) -> list[dict]:
    return [config(scale, batch, seed) for batch in BATCHES for seed in SEEDS]


def compute(config: dict) -> dict:
    """Milliseconds of a decoding step, for each candidate and round.

    Returns  {"base": […], "again": […], "lora": […], "merged": […], "houlsby": […],
              "trainable": {"lora": …, "houlsby": …}}
    """
    torch.manual_seed(config["seed"])
    models = candidates(config)
    tokens = torch.randint(
        3, models["base"].config.vocab_size, (config["prompt"],)
    ).tolist()
    seconds = step_seconds(
        {name: (model.eval(), tokens) for name, model in models.items()},
        tokens=config["tokens"],
        rounds=config["rounds"],
        batch=config["batch"],
    )
    return {
        **{name: [round(1e3 * s, 4) for s in times] for name, times in seconds.items()},
        "trainable": {
            name: sum(p.numel() for p in models[name].parameters() if p.requires_grad)
            for name in ("lora", "houlsby")
        },
    }


def candidates(config: dict) -> dict[str, torch.nn.Module]:
    """The five models of a round; the first is what the others are measured against."""

    def fresh():
        return load_model(config["base"], device=config.get("device", "cpu"))[0]

    models = {name: fresh() for name in ("base", "again", "lora", "houlsby")}
    lora.inject(models["lora"], r=config["r"], targets="all-linear")
    randomize(models["lora"])
    models["merged"] = deepcopy(models["lora"])
    merge(models["merged"])
    houlsby.inject(models["houlsby"], m=config["m"])
    return models


def ratio(
    all_runs: Sequence[Run], name: str, other: str, batch: int
) -> tuple[float, float, float]:
    """Time of one candidate in units of another's, in the same round: the median."""
    return of_median(
        [
            mine / theirs
            for run in all_runs
            if run.config["batch"] == batch
            for mine, theirs in zip(run.result[name], run.result[other], strict=True)
        ]
    )


def measured(all_runs: Sequence[Run]) -> Measured:
    figures = {
        f"{name}_{batch}": f"{ratio(all_runs, name, 'base', batch)[0]:.2f}"
        for name in ("again", "lora", "merged", "houlsby")
        for batch in BATCHES
    }
    ms = median(time for run in all_runs for time in run.result["base"])
    return Measured(
        *ratio(all_runs, "houlsby", "lora", BATCHES[0]),
        SEEDS,
        figures | {"ms": f"{ms:.1f}"},
    )


INSTEAD = (
    "A decoding step of one sequence takes {houlsby_1} times the base model's time "
    "with bottlenecks, and {lora_1} times with an unmerged LoRA at every projection. "
    "For eight sequences, it takes {houlsby_8} and {lora_8} times. With a merged LoRA, "
    "one sequence takes {merged_1} times. The base model, timed again, takes {again_1} "
    "times"
)
CLAIMS = (
    Claim(
        id="A1",
        notebook="11",
        statement=(
            "Adapters compute in sequence and add latency, unlike LoRA, which is "
            "parallel"
        ),
        rule=Rule(
            words=(
                "Time of a decoding step with bottleneck adapters, divided by the time "
                "with an unmerged LoRA of as many parameters at every projection; one "
                "sequence, median of the rounds"
            ),
            unit="x",
            verdicts=LARGE_HOLDS,
            edges=(1.0, 1.1),
        ),
        configs=configs,
        measured=measured,
        say_instead={"does not hold here": INSTEAD, "holds when": INSTEAD},
        number="decoding time with bottlenecks over that with an unmerged LoRA",
        so={
            "does not hold here": (
                "Both cost time: {houlsby_1} times the base's with bottlenecks, "
                "{lora_1} with an unmerged LoRA at seven places. A merged LoRA takes "
                "{merged_1}."
            ),
        },
    ),
)
