"""Invented scores of which the truth is known: how often do the intervals hold it?

A method answers a row right with a probability that depends on the method, on the row
and on the seed. A row is hard for all methods, and more so for some. The true score is
the mean over all rows and seeds there could be.

    python tests/helpers/simulated_comparisons.py 500       the table, in minutes
"""

import sys
from collections.abc import Sequence

import numpy as np

from peft_from_scratch.comparison import intervals

ROW, OWN, CELL = 2.0, 1.0, 0.5  # standard deviations, in logits
SETTINGS = {  # name: (logits of the methods, seeds, rows, luck of each seed in logits)
    "no luck of seeds": ((1.5, 2.0, 2.0, 0.5, 0.0), 3, 100, 0.0),
    "seeds differ by 4 points": ((1.5, 2.0, 2.0, 0.5, 0.0), 3, 300, 0.3),
    "seeds differ by 9 points": ((1.5, 2.0, 2.0, 0.5, 0.0), 3, 100, 0.8),
    "one method of five is unsteady": ((1.5, 2.0, 2.0, 0.5, 0.0), 3, 300, (1, 4)),
    "near the ceiling": ((5.5, 6.0, 6.0, 4.5, 4.0), 3, 100, 0.5),
    "two methods": ((1.5, 2.0), 3, 300, 0.5),
    "one seed, rows alone": ((1.5, 2.0, 2.0, 0.5, 0.0), 1, 100, 0.0),
    "all methods equal": ((1.0,) * 6, 3, 100, 0.4),
    "rows share words": ((1.5, 2.0, 2.0, 0.5, 0.0), 3, 300, 0.3),
}
# The rows of each cluster, which share what is hard; the other rows are alone.
SHARED = {"rows share words": (30, 24, 20, 20, 16, 16, 12, 12, 12, 10, 8, 8, 6, 6)}


def clusters_of(name: str) -> list[int]:
    """A number for each row of the setting, the same for rows of one cluster."""
    sizes, rows = SHARED.get(name, ()), SETTINGS[name][2]
    sizes = [*sizes, *[1] * (rows - sum(sizes))]
    return [cluster for cluster, size in enumerate(sizes) for _ in range(size)]


def scores(
    logits: Sequence[float],
    seeds: int,
    rows: int,
    luck,
    dice: np.random.Generator,
    clusters: Sequence[int],
) -> tuple[dict[str, np.ndarray], list[float]]:
    """{method: (seeds, rows)} of right and wrong answers, and the true scores."""
    many = len(logits)
    lucks = (
        np.full(many, luck[0] * 0.2) if isinstance(luck, tuple) else np.full(many, luck)
    )
    if isinstance(luck, tuple):
        lucks[0] *= luck[1]
    hard = dice.normal(0, ROW, rows) + dice.normal(0, OWN, (many, 1, rows))
    hard = hard[..., clusters]  # that of a cluster's first rows, for all its rows
    noise = dice.normal(0, 1, (many, seeds, 1)) * lucks[:, None, None]
    noise = noise + dice.normal(0, CELL, (many, seeds, rows))
    chance = _right(np.reshape(logits, (-1, 1, 1)) + hard + noise)
    answered = (dice.random((many, seeds, rows)) < chance).astype(float)
    spread = np.sqrt(ROW**2 + OWN**2 + CELL**2 + lucks**2)
    truth = [_mean_right(logit, s) for logit, s in zip(logits, spread, strict=True)]
    return {f"m{i}": answered[i] for i in range(many)}, truth


def coverage(
    name: str, times: int, *, seed: int = 0, clustered: bool = True
) -> dict[str, float]:
    """How often intervals hold the true score and difference, and Holm's rule errs.

    Args
        clustered  False: the intervals are not told of the clusters
    """
    dice, clusters = np.random.default_rng(seed), clusters_of(name)
    known = clusters if clustered else None
    held, paired, boot, errors = [], [], [], []
    for _ in range(times):
        drawn, truth = scores(*SETTINGS[name], dice, clusters)
        true = dict(zip(drawn, truth, strict=True))
        luck = intervals.seeds_luck(drawn)
        for key, table in drawn.items():
            low, high = intervals.interval(table, luck, known)
            held.append(low <= true[key] <= high)
        compared = intervals.pairs(drawn, known)
        for pair in compared:
            difference = true[pair.of] - true[pair.over]
            paired.append(pair.low <= difference <= pair.high)
            low, high = _bootstrap(drawn[pair.of] - drawn[pair.over], dice)
            boot.append(low <= difference <= high)
        errors.append(
            any(p.apart for p in compared if abs(true[p.of] - true[p.over]) < 1e-9)
        )
    return {
        "score": np.mean(held),
        "difference": np.mean(paired),
        "bootstrap": np.mean(boot),
        "family error": np.mean(errors),
    }


def _bootstrap(table: np.ndarray, dice: np.random.Generator) -> np.ndarray:
    """The interval that was dropped: rows and seeds drawn with replacement."""
    seeds, rows = table.shape
    drawn = dice.multinomial(rows, [1 / rows] * rows, 200)
    lots = dice.multinomial(seeds, [1 / seeds] * seeds, 200)
    means = ((lots @ table) * drawn).sum(1) / (seeds * rows)
    return np.quantile(means, [0.025, 0.975])


def _right(logit):
    return 1 / (1 + np.exp(-logit))


def _mean_right(logit: float, spread: float) -> float:
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    return float(weights @ _right(logit + spread * points) / weights.sum())


if __name__ == "__main__":
    for setting in SETTINGS:
        shares = coverage(setting, int(sys.argv[1]))
        told = ", ".join(f"{kind} {share:.3f}" for kind, share in shares.items())
        print(f"{setting}: {told}", flush=True)
