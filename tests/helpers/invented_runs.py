"""Claims judged on runs that a test invents."""

import math
from collections.abc import Callable
from statistics import fmean

import numpy as np

from peft_from_scratch.ledger import runs
from peft_from_scratch.ledger.verdicts import claim, judge

Of = Callable[[dict], float]  # of a configuration


def judged(id: str, result_of: Callable[[dict], dict], scale: str = "tiny") -> object:
    """The judgement, with each run's result as `result_of(config)` gives it.

    Runs are written to the store until the claim asks for no more; so its searches, its
    queries and its rule are tested together. The test needs the fixture `store`.
    """
    while (judgement := judge(claim(id), scale)).missing:
        for config in judgement.missing:
            runs.write(config, result_of(config))
    return judgement


def valley(
    loss_of: Of,
    best_of: Of = lambda config: 1e-2,
    noise: float = 1e-3,
    rows: int = 4,
) -> Callable[[dict], dict]:
    """config -> a result: the loss grows away from the best rate, in squared decades.

    Args
        noise  between runs of one seed; what a seed's runs share is larger, and the
               same for all
    """

    def result_of(config: dict) -> dict:
        loss = loss_of(config) + math.log10(config["lr"] / best_of(config)) ** 2
        same = np.random.default_rng(config["seed"]).normal(scale=0.1)
        option = len(config["method"]), int(config.get("alpha", 0))
        rate = round(1e6 * config["lr"])
        own = np.random.default_rng([config["seed"], *option, rate])
        items = (loss + same + own.normal(scale=noise, size=rows)).tolist()
        return {
            "test_items": items,
            "test_loss": fmean(items),
            "validation_loss": loss + same,
            "diverged": None,
            "rows_digest": f"rows {config['seed']}",
        }

    return result_of


def diverging(
    result_of: Callable[[dict], dict], where: Callable[[dict], bool]
) -> Callable[[dict], dict]:
    """The same results, but for runs that diverge."""
    nothing = dict.fromkeys(("test_items", "test_loss", "validation_loss"))

    def result(config: dict) -> dict:
        lost = nothing | {"diverged": "the loss is nan"} if where(config) else {}
        return result_of(config) | lost

    return result
