"""M1: whether a merged LoRA takes the time of the base model.

    W = W0 + scale · B A        one product, where the unmerged LoRA takes three

Four copies of one model take turns within each round: the base, the base again, the
base with a LoRA at every projection, and the same LoRA merged. The base timed again
says how far the clock is off by itself, and the unmerged LoRA that the clock can see
two thin products at all.
"""

from collections.abc import Sequence
from copy import deepcopy
from statistics import median

import torch
from torch import nn

from ...common.statistics import over_seeds
from ...comparison.timing import step_seconds
from ...core.merge import merge
from ...methods import lora
from ...models.load import load_model
from .. import runs
from ..claim import FAILS, HOLDS, UNDECIDED, Claim, Invalid, Measured, Rule
from ..runs import Run
from .finetune import randomize

SEEDS = {"tiny": (0, 1, 2, 3, 4), "smollm2": (0, 1, 2)}
ROUNDS = {"tiny": 31, "smollm2": 9}
TOKENS, PROMPT = 12, 32  # decoded in a round, after a prompt
CLOCK, SEEN = 0.02, 1.05  # error allowed to the clock; ratio of what it must see


def config(base: str, seed: int, rounds: int | None = None) -> dict:
    return {
        "experiment": "merged_time",
        "base": base,
        "base_digest": runs.base_digest(base),
        "r": 8,
        "alpha": 16,
        "rounds": ROUNDS[base] if rounds is None else rounds,
        "tokens": TOKENS,
        "prompt": PROMPT,
        "seed": seed,
    }


def configs(scale: str) -> list[dict]:
    return [config(scale, seed) for seed in SEEDS[scale]]


def compute(config: dict) -> dict:
    """Milliseconds of a decoding step, for each candidate and round.

    Returns  {"base": […], "again": […], "unmerged": […], "merged": […]}
    """
    torch.manual_seed(config["seed"])
    models = candidates(config)
    vocabulary = models["base"].config.vocab_size
    prompt = torch.randint(3, vocabulary, (config["prompt"],)).tolist()
    seconds = step_seconds(
        {name: (model.eval(), prompt) for name, model in models.items()},
        tokens=config["tokens"],
        rounds=config["rounds"],
    )
    return {name: [round(1e3 * s, 4) for s in row] for name, row in seconds.items()}


def candidates(config: dict) -> dict[str, nn.Module]:
    """The four models of a round; A and B are random, since time does not read them."""
    base, _ = load_model(config["base"], device=config.get("device", "cpu"))
    models = {name: deepcopy(base) for name in ("base", "again", "unmerged")}
    lora.inject(models["unmerged"], r=config["r"], alpha=config["alpha"])
    randomize(models["unmerged"])
    models["merged"] = deepcopy(models["unmerged"])
    merge(models["merged"])
    return models


def ratio(all_runs: Sequence[Run], name: str) -> tuple[float, float, float]:
    """Time of a candidate over the base's: the median of a run's rounds, over runs.

    The rounds of a run share where its models lie in memory and what else the machine
    does, so that the interval counts runs, and not rounds.
    """
    return over_seeds(
        [
            median(
                mine / base
                for mine, base in zip(run.result[name], run.result["base"], strict=True)
            )
            for run in all_runs
        ]
    )


def measured(all_runs: Sequence[Run]) -> Measured:
    """Merged over base; Invalid where the clock is off, or too blunt to see a LoRA."""
    again, unmerged = ratio(all_runs, "again"), ratio(all_runs, "unmerged")
    if abs(again[0] - 1) > CLOCK:
        raise Invalid(f"the base timed again takes {again[0]:.3f} times: no clock")
    if unmerged[1] <= SEEN:
        raise Invalid(f"an unmerged LoRA takes {unmerged[0]:.3f} times: it is not seen")
    merged = ratio(all_runs, "merged")
    ms = median(time for run in all_runs for time in run.result["base"])
    figures = {
        "merged": f"{merged[0]:.2f}",
        "unmerged": f"{unmerged[0]:.2f}",
        "again": f"{again[0]:.2f}",
        "ms": f"{ms:.1f}",
    }
    seeds = tuple(run.config["seed"] for run in all_runs)
    return Measured(*merged, seeds, figures)


INSTEAD = (
    "A decoding step takes {merged} times the base model's {ms} ms with a merged LoRA, "
    "and {unmerged} times with the same LoRA unmerged, at every projection and for one "
    "sequence. The base model, timed again, takes {again} times"
)
CLAIMS = (
    Claim(
        id="M1",
        notebook="06",
        statement="Merging a LoRA into the weights adds zero inference latency",
        rule=Rule(
            words=(
                "Time of a decoding step with a merged LoRA of rank 8 at every "
                "projection, divided by the base model's in the same round; one "
                "sequence, the order of the models drawn anew in each round; median of "
                "the rounds of a run, mean over runs, each with models loaded anew; "
                "valid only if the base timed again is within 2 % of itself, and the "
                "same LoRA unmerged takes at least 5 % longer than the base"
            ),
            unit="x",
            verdicts=(HOLDS, FAILS),
            edges=(1.02,),
        ),
        configs=configs,
        measured=measured,
        number="decoding time with a merged LoRA over the base model's",
        so={
            HOLDS: (
                "A merged LoRA takes {merged} times the base's time, an unmerged one "
                "{unmerged} times. Merge before you serve one adapter."
            ),
            FAILS: (
                "A merged LoRA takes {merged} times the base's time here, and the base "
                "timed again {again} times."
            ),
            UNDECIDED: (
                "A merged LoRA takes {merged} times the base's time, an unmerged one "
                "{unmerged}. This clock cannot decide about two percent."
            ),
        },
        say_instead=dict.fromkeys((HOLDS, FAILS, UNDECIDED), INSTEAD),
    ),
)
