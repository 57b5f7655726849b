"""Intervals: of a share, of paired differences, over seeds and over their items.

    wilson              k successes of n
    of_scores           the mean of scores: right and wrong, or from 0 to 1
    paired_bootstrap    two methods on the same items
    over_seeds          one value a seed, by Student's t
    t_tail              how rare a value of Student's t is
    nested_bootstrap    items within seeds
    share_of            a part of a whole, both measured
    of_median           the middle of values of whatever distribution

All intervals of claims are at CONFIDENCE.
"""

from collections.abc import Sequence
from math import atan, comb, lgamma, pi, sqrt
from statistics import NormalDist, fmean, median, stdev

import numpy as np

CONFIDENCE = 0.95
UNBOUNDED = 1000.0  # %, of a share whose interval has no ends


class Invalid(ValueError):
    """These numbers cannot decide the question, whatever they say; the message why."""


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for k successes in n trials.

        (p + z²/2n ± z sqrt(p (1 - p)/n + z²/4n²)) / (1 + z²/n),      p = k/n    [1]

    Unlike p ± z sqrt(p (1 - p)/n) it stays within [0, 1], and has a width at 0 and n.

    Returns  (low, high), shares between 0 and 1
    Raises   ValueError   not 0 <= k <= n, n >= 1
    Source   [1] Wilson, JASA 22 (1927) 209-212
    """
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"{k} of {n}: 0 <= k <= n and n >= 1 are needed")
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), k / n
    middle = p + z * z / (2 * n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return (0.0 if k == 0 else low), (1.0 if k == n else high)


def of_scores(scores: Sequence[float]) -> tuple[float, float, float]:
    """mean, low, high of scores: Wilson's interval where each is 0 or 1.

    Wilson's is of counts. For scores between, items are drawn with replacement, and the
    interval holds the middle 95 % of their means.
    """
    if are_counts(scores):
        low, high = wilson(int(sum(scores)), len(scores))
        return sum(scores) / len(scores), low, high
    return paired_bootstrap(scores, [0.0] * len(scores))


def are_counts(scores: Sequence[float]) -> bool:
    """Whether each of them is 0 or 1: right or wrong, and nothing between."""
    return all(score in (0, 1) for score in scores)


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    *,
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """mean(a) - mean(b) of two methods on the same items, with a percentile interval.

    Items are drawn with replacement, both methods' results together: what is hard for
    both cancels, and the interval is narrower than that of two separate samples.

    Args
        a, b   one number per item, in the same order: 0 or 1, or any score
        draws  resamples, each as large as the sample
    Returns  (difference, low, high)
    Raises   ValueError   no items, or not equally many
    Memory   16 draws len(a) bytes: the drawn places, and the differences there
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(
            f"{len(a)} and {len(b)} items cannot be paired; give both the same"
        )
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(difference), size=(draws, len(difference)))
    means = difference[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return difference.mean().item(), low.item(), high.item()


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


def t_tail(t: float, df: float) -> float:
    """P(|T| > t) of Student's t, for t >= 0: t_quantile's inverse, on both sides.

    The same density, from the angle of t to π/2; the whole integral has a closed form.
    """
    points, weights = np.polynomial.legendre.leggauss(64)
    start = atan(t / sqrt(df))
    half = (pi / 2 - start) / 2
    inside = half * weights @ np.cos(start + half * (points + 1)) ** (df - 1)
    whole = sqrt(pi) / 2 * np.exp(lgamma(df / 2) - lgamma((df + 1) / 2))
    return float(inside / whole)


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
    means = np.empty((draws, 2))
    for i in range(draws):
        at = (
            generator.integers(seeds, size=(seeds, 1)),
            generator.integers(items, size=(seeds, items)),
        )
        means[i] = parts[at].mean(), wholes[at].mean()
    tail = (1 - CONFIDENCE) / 2
    if np.quantile(means[:, 1], tail) <= 0:
        return -np.inf, np.inf
    shares = means[means[:, 1] > 0]
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
