"""How sure a comparison is: intervals over test rows and seeds, and pairs told apart.

A score is a mean over test rows, and over seeds for a method that trains. Both are
samples: other rows and other seeds would give another mean. Its variance has two parts:

    variance = (variance between rows) / rows + luck · p (1 - p) / seeds       p: mean

The luck is the variance between the means of single seeds, as a share of p (1 - p). Two
or three seeds of one method say little about it, so all trained methods are pooled. A
method whose own luck is larger keeps its own. Both parts hold some of the same noise,
which makes intervals a little too wide. They are known to be too narrow in one case: if
the seeds of one method of five vary four times as much as the others', its interval
holds the true score in 87 % of simulated comparisons.

Rows can come in clusters that are right or wrong together, such as all rows with a word
that training lacks. Then the clusters are the sample, and not the rows:

    variance of the rows = G / (G - 1) · sum of (d_g)² / rows²      G: how many clusters
    d_g = sum over the rows of cluster g of (score - mean)

With a row a cluster, that is the variance between rows divided by their number.

A bootstrap over rows and seeds was tried and dropped: three seeds can be drawn in ten
ways only, and its 95 % intervals held the true difference in 84 to 92 % of simulated
comparisons. tests/helpers/simulated_comparisons.py repeats the simulation.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from ..common.statistics import CONFIDENCE, t_quantile, t_tail, wilson

Scores = Mapping[str, np.ndarray]  # {method: (seeds, rows)}, each between 0 and 1
Clusters = Sequence[object] | None  # (rows,) of names; None: each row is one


@dataclass(frozen=True)
class Luck:
    """What seeds change: a variance as a share of p (1 - p), estimated with df."""

    share: float
    df: int


@dataclass(frozen=True)
class Pair:
    """Two methods on the same rows: the score of `of` minus that of `over`.

    Args
        low, high  ends of the 95 % interval of this difference alone
        p          P(a difference so large) between methods that do not differ
        least      the smallest difference that would have been told apart
        apart      told apart, by Holm's rule over all pairs
    """

    of: str
    over: str
    difference: float
    low: float
    high: float
    p: float
    least: float
    apart: bool


def seeds_luck(scores: Scores) -> Luck | None:
    """The luck of the seeds, pooled over the methods that have several of them.

        luck = sum of s² / sum of p (1 - p)     s²: variance of a method's seed means

    Returns  None where no method has two seeds: seeds are then not counted
    """
    means = [table.mean(1) for table in scores.values() if len(table) > 1]
    if not means:
        return None
    possible = sum(_possible(m.mean()) for m in means)
    varied = sum(m.var(ddof=1) for m in means)
    share = varied / possible if possible else 0.0
    return Luck(float(share), sum(len(m) - 1 for m in means))


def interval(
    table: np.ndarray, luck: Luck | None, clusters: Clusters = None
) -> tuple[float, float]:
    """The 95 % interval of a method's mean score.

    Wilson's interval for the number of independent rows that would have the same
    variance, with Student's t for z [1]; plain Wilson for one seed of right and wrong
    whose rows are no clusters.

    Args
        table     (seeds, rows)
        clusters  a name for each row; rows of one name are right or wrong together
    Source   [1] Kish, Survey Sampling (1965), section 8.2: the effective sample size
    """
    seeds, rows = table.shape
    sizes = _sizes(clusters, rows)
    if seeds == 1 and len(sizes) == rows and np.isin(table, (0, 1)).all():
        return wilson(int(table.sum()), rows)
    p = float(table.mean())
    rows_df = _rows_df(sizes)
    spread = _rows_variance(table.mean(0), clusters)
    by_row = spread / _possible(p) if spread else 1 / (rows_df + 1)
    by_seed = _share(table, luck) / seeds if seeds > 1 else 0.0
    df = _df(by_row, max(rows_df, 1), by_seed, luck)
    t = t_quantile((1 + CONFIDENCE) / 2, df)
    square = t * t * (by_row + by_seed)  # t² / effective rows
    middle = (p + square / 2) / (1 + square)
    half = (square * _possible(p) + square * square / 4) ** 0.5 / (1 + square)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def pairs(scores: Scores, clusters: Clusters = None) -> list[Pair]:
    """Every two methods, in the order of `scores`, and which are told apart.

    Each difference is taken on the same rows. Two rows are added, one won by each
    method, as Bonett and Price do [1]. Without them, two methods that are right on the
    same rows would differ by exactly 0, with no interval. With so many pairs, some
    would differ by chance. Holm's rule [2] allows one such error in twenty comparisons,
    all their pairs together.

    Args
        clusters  a name for each row, as in `interval`
    Raises   ValueError   methods were scored on different numbers of rows
    Source   [1] Bonett and Price, J. Educ. Behav. Stat. 37 (2012) 479-488
             [2] Holm, Scand. J. Statist. 6 (1979) 65-70
    """
    counts = {key: table.shape[1] for key, table in scores.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"test rows differ, {counts}: give every method the same rows")
    luck = seeds_luck(scores)
    every = [
        (a, b, *_difference(scores[a], scores[b], luck, clusters))
        for a, b in combinations(scores, 2)
    ]
    level = holm([p for *_, p in every])
    return [
        Pair(a, b, difference, *ends, p, _least(level, *spread), p <= level)
        for a, b, difference, ends, spread, p in every
    ]


def turned(pair: Pair) -> Pair:
    """The same pair, seen from the other side."""
    return replace(
        pair,
        of=pair.over,
        over=pair.of,
        difference=-pair.difference,
        low=-pair.high,
        high=-pair.low,
    )


def holm(values: list[float]) -> float:
    """The p-value up to which differences are told apart, by Holm's rule.

    The smallest of m values is told apart below 0.05 / m, the next below
    0.05 / (m - 1), and so on until one is not. All that are told apart, and no others,
    are at most 0.05 / (m - how many they are).
    """
    m = len(values)
    for smaller, p in enumerate(sorted(values)):
        if p > (1 - CONFIDENCE) / (m - smaller):
            return (1 - CONFIDENCE) / (m - smaller)
    return 1 - CONFIDENCE


def _difference(
    a: np.ndarray, b: np.ndarray, luck: Luck | None, clusters: Clusters
) -> tuple:
    """(difference, its ends, (standard error, df, rows), p) of two methods."""
    by_item = a.mean(0) - b.mean(0)
    rows = len(by_item)
    with_two = np.append(by_item, [1.0, -1.0])
    # A name of its own for each of the two: no row has a tuple for a name.
    also = None if clusters is None else [*clusters, ("first",), ("second",)]
    by_row = _rows_variance(with_two, also)
    by_seed = sum(
        _share(table, luck) * _possible((rows * table.mean() + 1) / (rows + 2)) / seeds
        for table in (a, b)
        if (seeds := len(table)) > 1
    )
    middle, error = float(with_two.mean()), float((by_row + by_seed) ** 0.5)
    df = _df(by_row, _rows_df(_sizes(also, rows + 2)), by_seed, luck)
    half = t_quantile((1 + CONFIDENCE) / 2, df) * error
    ends = max(-1.0, middle - half), min(1.0, middle + half)
    p = t_tail(abs(middle) / error, df)
    return float(by_item.mean()), ends, (error, df, rows), p


def _least(level: float, error: float, df: float, rows: int) -> float:
    """The smallest difference on the rows themselves whose p is at most `level`."""
    return t_quantile(1 - level / 2, df) * error * (rows + 2) / rows


def _sizes(clusters: Clusters, rows: int) -> np.ndarray:
    """How many rows each cluster has."""
    return np.array(list(Counter(clusters or range(rows)).values()))


def _rows_variance(values: np.ndarray, clusters: Clusters) -> float:
    """Variance of the mean of values whose rows come in clusters; 0 for one cluster."""
    place = {name: i for i, name in enumerate(dict.fromkeys(clusters or ()))}
    index = [place[name] for name in clusters] if place else range(len(values))
    sums = np.bincount(index, values - values.mean())
    if len(sums) == 1:
        return 0.0
    return len(sums) / (len(sums) - 1) * float(sums @ sums) / len(values) ** 2


def _rows_df(sizes: np.ndarray) -> float:
    """Degrees of freedom of that variance, for clusters of wholly equal rows.

        (sum of n_g²)² / sum of n_g⁴ - 1          n_g: rows of cluster g

    One less than the clusters where all are of one size.
    """
    squares = sizes.astype(float) ** 2
    return float(squares.sum() ** 2 / (squares @ squares) - 1)


def _share(table: np.ndarray, luck: Luck) -> float:
    """The luck that counts for a method: the pooled one, or its own if larger."""
    means = table.mean(1)
    possible = _possible(means.mean())
    own = means.var(ddof=1) / possible if possible else 0.0
    return float(max(luck.share, own))


def _possible(p: float) -> float:
    """p (1 - p): no score between 0 and 1 of mean p has a larger variance."""
    return float(p * (1 - p))


def _df(by_row: float, rows_df: int, by_seed: float, luck: Luck | None) -> float:
    """Degrees of freedom of the sum of two estimated variances (Satterthwaite 1946)."""
    if not by_seed:
        return rows_df
    return (by_row + by_seed) ** 2 / (by_row**2 / rows_df + by_seed**2 / luck.df)
