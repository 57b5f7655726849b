"""The same search of the learning rate for every method, and when it does not count.

The best rate of a grid (common/grid.py) is the one with the lowest validation loss. If
it still is at an end after the grid has grown, the runs are invalid, whatever they say.

    search, tuned, at_best        on one seed, in half decades
    searched, chosen, at_own      on several seeds, in quarter decades: then the noise
                                  of the search is part of the interval
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations_with_replacement
from statistics import fmean

from ..common.grid import GROWTH, at_an_end, is_inside, rate_past
from .claim import Invalid
from .intervals import paired
from .runs import Run, stored

QUARTERS = 4  # rates in a decade of a search on several seeds
Table = Mapping[float, Sequence[float]]  # rate -> validation loss of each seed

# On one seed --------------------------------------------------------------------------


def best_inside(losses: Mapping[float, float | None]) -> float:
    """The learning rate with the lowest validation loss.

    Args
        losses  {rate: loss}; None where the run diverged
    Raises  Invalid  it is the lowest or the highest rate of the grid, or all diverged
    """
    best = _best(losses)
    if not is_inside(best, losses):
        raise Invalid(f"{at_an_end(best, losses)}: the optimum may lie outside")
    return best


def search(
    config_of: Callable[[float], dict],
    rates: Sequence[float],
    growth: int = GROWTH,
) -> tuple[list[dict], float | None]:
    """The configurations of a search as far as they are known, and the best rate.

    Args
        config_of  rate -> configuration of a run that has a validation_loss
        rates      to begin with
    Returns  (configurations, best rate); the rate is None while runs are missing
    Raises   Invalid  the best is at an end of the grid after `growth` more rates
    """
    rates = list(rates)
    while True:
        configs = [config_of(rate) for rate in rates]
        stored_runs = [stored(config) for config in configs]
        if None in stored_runs:
            return configs, None
        losses = [run.result["validation_loss"] for run in stored_runs]
        losses = dict(zip(rates, losses, strict=True))
        beyond = rate_past(_best(losses), losses)
        if beyond is None or growth == 0:
            return configs, best_inside(losses)
        rates.append(beyond)
        growth -= 1


def tuned(
    config_of: Callable[[float, int], dict],
    rates: Sequence[float],
    seeds: Sequence[int],
) -> tuple[list[dict], float | None]:
    """The search on the first seed, then every seed at the rate that it chose.

    Args
        config_of  rate, seed -> configuration
    Returns  as search
    """
    configs, best = search(lambda lr: config_of(lr, seeds[0]), rates)
    if best is None:
        return configs, None
    return configs + [config_of(best, seed) for seed in seeds[1:]], best


def at_best(all_runs: Sequence[Run]) -> list[Run]:
    """Of the runs of one `tuned`, those at the chosen rate; Invalid at a grid's end."""
    first = min(run.config["seed"] for run in all_runs)
    searched = [run for run in all_runs if run.config["seed"] == first]
    losses = {run.config["lr"]: run.result["validation_loss"] for run in searched}
    best = best_inside(losses)
    return [run for run in all_runs if run.config["lr"] == best]


def _best(losses: Mapping[float, float | None]) -> float:
    sound = {rate: loss for rate, loss in losses.items() if loss is not None}
    if not sound:
        raise Invalid(f"every rate of {sorted(losses)} diverged")
    return min(sound, key=lambda rate: (sound[rate], rate))


# On several seeds ---------------------------------------------------------------------


def searched(
    config_of: Callable[[float, int], dict],
    rates: Sequence[float],
    seeds: Sequence[int],
    growth: int = GROWTH,
) -> tuple[list[dict], Table | None]:
    """Every rate on every seed; the grid grows while a choice is at its end.

    Other seeds might have chosen another rate. So the choice is made once for each way
    to draw the seeds with replacement, and none of these may be at an end.

    Args
        config_of  rate, seed -> configuration
        rates      to begin with, a quarter of a decade apart
        growth     rates that may be added at either end
    Returns  (configurations known so far, table); no table while runs are missing
    Raises   Invalid  a choice is at an end of the grid after it has grown
    """
    rates = list(rates)
    while True:
        configs = [config_of(rate, seed) for rate in rates for seed in seeds]
        stored_runs = [stored(config) for config in configs]
        if None in stored_runs:
            return configs, None
        table = table_of(stored_runs)
        beyond = {rate_past(rate, rates, QUARTERS) for rate in choices(table)} - {None}
        if not beyond or growth == 0:
            _refuse_ends(table)
            return configs, table
        rates += sorted(beyond)
        growth -= 1


def table_of(all_runs: Sequence[Run]) -> Table:
    """{rate: validation loss of each seed, the lowest seed first}; inf if diverged."""
    table = {}
    for run in sorted(all_runs, key=lambda run: run.config["seed"]):
        loss = run.result["validation_loss"]
        losses = table.setdefault(run.config["lr"], [])
        losses.append(math.inf if loss is None else loss)
    return table


def resamples(n: int) -> list[tuple[int, ...]]:
    """The ways to draw n of n seeds with replacement, their order left out."""
    return list(combinations_with_replacement(range(n), n))


def chosen(table: Table, drawn: Sequence[int] | None = None) -> float:
    """The rate with the lowest mean loss over the drawn seeds; by default over all.

    Raises  Invalid  it is an end of the grid
    """
    rate = _choice(table, drawn or range(_seeds(table)))
    if not is_inside(rate, table):
        raise Invalid(f"{at_an_end(rate, table)}: the optimum may lie outside")
    return rate


def choices(table: Table) -> set[float]:
    """The rates that some resample of the seeds chooses."""
    return {_choice(table, drawn) for drawn in resamples(_seeds(table))}


def lowest(table: Table, drawn: Sequence[int]) -> float:
    """The mean loss over the drawn seeds at the rate that they choose."""
    rate = chosen(table, drawn)
    return fmean(table[rate][i] for i in drawn)


def at_own(
    sides: Callable[[Sequence[int]], tuple[Sequence[Run], Sequence[Run]]], seeds: int
) -> tuple[float, float, float]:
    """Test loss of one side minus that of the other, each as a search has chosen it.

        d ± √(p² + s²)     p  what `paired` gives, at the choices of all search seeds
                           s  how far d moves with the choices of a resample of them

    Two sources of noise that know nothing of each other add in squares. Of three seeds
    there are ten resamples; s is the farthest of them, on each side of d.

    Args
        sides  drawn search seeds -> runs of either side at what these seeds choose, on
               seeds that no search has seen
        seeds  of the search
    Raises   Invalid  see paired
    """
    mean, low, high = paired(*sides(range(seeds)))
    moved = [_difference(*sides(drawn)) - mean for drawn in resamples(seeds)]
    down, up = max(0.0, -min(moved)), max(0.0, max(moved))
    return mean, mean - math.hypot(mean - low, down), mean + math.hypot(high - mean, up)


def _difference(a: Sequence[Run], b: Sequence[Run]) -> float:
    """The mean of `paired`, without its interval."""
    ours, theirs = (fmean(fmean(r.result["test_items"]) for r in x) for x in (a, b))
    return ours - theirs


def _choice(table: Table, drawn: Sequence[int]) -> float:
    means = {rate: fmean(losses[i] for i in drawn) for rate, losses in table.items()}
    return min(sorted(means), key=means.get)


def _seeds(table: Table) -> int:
    (seeds,) = {len(losses) for losses in table.values()}
    return seeds


def _refuse_ends(table: Table) -> None:
    for drawn in resamples(_seeds(table)):
        chosen(table, drawn)
