"""Intervals of claims: over seeds, over items within seeds, and of paired runs."""

from collections.abc import Sequence
from math import comb
from statistics import fmean, median, stdev

import numpy as np

from .claim import Invalid
from .runs import Run

CONFIDENCE = 0.95
UNBOUNDED = 1000.0  # %, of a share whose interval has no ends


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """mean, low, high of one value a seed, by Student's t.

        mean ± t(0.975, n - 1) s / √n           n values, s their standard deviation

    Three seeds give ± 2.5 s: few of them decide little, and this says how little.

    Raises  Invalid  fewer than two seeds
    """
    if len(values) < 2:
        raise Invalid(f"{len(values)} seed has no interval: at least two are needed")
    n, mean = len(values), fmean(values)
    half = t_quantile((1 + CONFIDENCE) / 2, n - 1) * stdev(values) / n**0.5
    return mean, mean - half, mean + half


def t_quantile(p: float, df: int) -> float:
    """Quantile p > 1/2 of Student's t, by bisection of its distribution function.

    With t = √df tan θ, the density is proportional to cos(θ)^(df - 1): smooth, so that
    Gauss and Legendre's 64 points integrate it to rounding error for the df of seeds.
    """
    points, weights = np.polynomial.legendre.leggauss(64)

    def integral(angle):
        return angle / 2 * weights @ np.cos(angle / 2 * (points + 1)) ** (df - 1)

    low, high = 0.0, np.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        below = 0.5 + integral(middle) / (2 * integral(np.pi / 2)) < p
        low, high = (middle, high) if below else (low, middle)
    return float(df**0.5 * np.tan(low))


def nested_bootstrap(
    values: Sequence[Sequence[float]], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over seeds and items, with a percentile interval.

    Seeds are drawn with replacement, and within each drawn seed its items.

    Args
        values  (seeds, items); for a paired difference, the differences
    """
    table = np.asarray(values, dtype=float)
    generator = np.random.default_rng(seed)
    seeds, items = table.shape
    rows = generator.integers(seeds, size=(draws, seeds, 1))
    means = np.empty(draws)
    for i in range(draws):
        drawn = generator.integers(items, size=(seeds, items))
        means[i] = table[rows[i], drawn].mean()
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(table.mean()), float(low), float(high)


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


def mean_of(
    triples: Sequence[tuple[float, float, float]],
) -> tuple[float, float, float]:
    """The mean of several values, with the means of their ends: never too narrow."""
    return tuple(map(fmean, zip(*triples, strict=True)))


def share_of(
    parts: Sequence[Sequence[float]], wholes: Sequence[Sequence[float]]
) -> tuple[float, float, float]:
    """mean of parts / mean of wholes, in %, of paired values (seeds, items).

    The interval is the wider one at each end of two: Fieller's over seeds, which holds
    every c that a t-test of  part - c · whole  would not reject; and a bootstrap over
    items within seeds. Where the wholes cannot be told from zero, a share of them can
    be anything: the interval then has no ends, and is cut at ± UNBOUNDED.
    """
    parts, wholes = (np.asarray(v, dtype=float) for v in (parts, wholes))
    ends = [_fieller(parts.mean(1), wholes.mean(1)), _drawn_shares(parts, wholes)]
    share = parts.mean() / wholes.mean() if wholes.mean() > 0 else 0.0
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    cut = np.clip([100 * share, 100 * low, 100 * high], -UNBOUNDED, UNBOUNDED)
    return tuple(map(float, cut))


def _fieller(parts: np.ndarray, wholes: np.ndarray) -> tuple[float, float]:
    """The c with  (p - c w)² <= t² (s_pp - 2 c s_pw + c² s_ww) / n."""
    n = len(parts)
    if n < 2:
        raise Invalid(f"{n} seed has no interval: at least two are needed")
    t = t_quantile((1 + CONFIDENCE) / 2, n - 1)
    p, w, s = parts.mean(), wholes.mean(), t**2 * np.cov(parts, wholes) / n
    a, b, c = w**2 - s[1, 1], p * w - s[0, 1], p**2 - s[0, 0]
    if a <= 0 or w <= 0:  # some c, or every c, of any size is among them
        return -np.inf, np.inf
    half = max(b**2 - a * c, 0.0) ** 0.5
    return (b - half) / a, (b + half) / a


def _drawn_shares(
    parts: np.ndarray, wholes: np.ndarray, draws: int = 2000
) -> tuple[float, float]:
    """The percentiles of the share over drawn seeds and, within each, drawn items."""
    generator = np.random.default_rng(0)
    seeds, items = parts.shape
    found = np.empty((draws, 2))
    for i in range(draws):
        at = (
            generator.integers(seeds, size=(seeds, 1)),
            generator.integers(items, size=(seeds, items)),
        )
        found[i] = parts[at].mean(), wholes[at].mean()
    tail = (1 - CONFIDENCE) / 2
    if np.quantile(found[:, 1], tail) <= 0:
        return -np.inf, np.inf
    shares = found[found[:, 1] > 0]
    return tuple(np.quantile(shares[:, 0] / shares[:, 1], [tail, 1 - tail]))


def of_median(values: Sequence[float]) -> tuple[float, float, float]:
    """median, low, high: of sorted values those that hold the median at 95 %.

    How many of n values lie below the true median is binomial with p = 1/2, whatever
    they are: no bell curve is asked for, which times of a busy machine are not.

    Raises  Invalid  fewer than six values: even their extremes hold it too rarely
    """
    n, values = len(values), sorted(values)
    outside, k = 0.0, -1  # P(at most k of n values below the median), at both ends
    while outside + 2 * comb(n, k + 1) / 2**n <= 1 - CONFIDENCE:
        k += 1
        outside += 2 * comb(n, k) / 2**n
    if k < 0:
        raise Invalid(f"{n} values do not hold their median at {CONFIDENCE:.0%}")
    return median(values), values[k], values[n - 1 - k]


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
