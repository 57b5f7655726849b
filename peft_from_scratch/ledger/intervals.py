"""The difference between paired runs, with its interval.

Intervals of plain numbers come from common/statistics.py; lessons import them here.
"""

from collections.abc import Sequence

import numpy as np

from ..common.statistics import (
    Invalid,
    mean_of,
    nested_bootstrap,
    of_median,
    over_seeds,
    share_of,
    t_quantile,
)
from .runs import Run

__all__ = [
    "mean_of",
    "nested_bootstrap",
    "of_median",
    "over_seeds",
    "paired",
    "share_of",
    "t_quantile",
]


def paired(a: Sequence[Run], b: Sequence[Run]) -> tuple[float, float, float]:
    """Test loss of a minus that of b, nats per label token: same seeds, rows, order.

    The interval is the wider one at each end of two: over seeds, by t, which knows that
    they are few; and over items within seeds, which knows that other test rows would
    have given another mean.

    Raises  Invalid  runs that do not pair, or one that diverged
    """
    a, b = (sorted(runs, key=lambda run: run.config["seed"]) for runs in (a, b))
    _refuse_unpaired(a, b)
    differences = [
        np.subtract(x.result["test_items"], y.result["test_items"])
        for x, y in zip(a, b, strict=True)
    ]
    mean, *seeds = over_seeds([float(d.mean()) for d in differences])
    _, *items = nested_bootstrap(differences)
    return mean, min(seeds[0], items[0]), max(seeds[1], items[1])


def _refuse_unpaired(a: Sequence[Run], b: Sequence[Run]) -> None:
    for run in (*a, *b):
        if run.result["diverged"]:
            raise Invalid(f"{run.key} diverged: {run.result['diverged']}")
    for name in ("seed", "test", "n", "task", "base_digest"):
        ours, theirs = ([run.config[name] for run in runs] for runs in (a, b))
        if ours != theirs:
            raise Invalid(f"runs with {name} {ours} do not pair with {theirs}")
    ours, theirs = ([run.result["rows_digest"] for run in runs] for runs in (a, b))
    if ours != theirs:
        raise Invalid("runs of one seed were trained or tested on different rows")
