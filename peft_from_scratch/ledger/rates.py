"""The same search of the learning rate for every method, and when it does not count.

Rates are half a decade apart. The best is the one with the lowest validation loss. At
an end of the grid it may lie outside: the grid grows by GROWTH rates at most, and if
the best is still at an end, the runs are invalid, whatever they say.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from .claim import Invalid
from .runs import Run, stored

GROWTH = 3


def best_inside(losses: Mapping[float, float | None]) -> float:
    """The learning rate with the lowest validation loss.

    Args
        losses  {rate: loss}; None where the run diverged
    Raises  Invalid  it is the lowest or the highest rate of the grid, or all diverged
    """
    best = _best(losses)
    if not min(losses) < best < max(losses):
        tried = ", ".join(f"{rate:g}" for rate in sorted(losses))
        raise Invalid(
            f"the best learning rate {best:g} is an end of the grid {tried}: the "
            "optimum may lie outside"
        )
    return best


def search(
    config_of: Callable[[float], dict], rates: Sequence[float], growth: int = GROWTH
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
        found = [stored(config) for config in configs]
        if None in found:
            return configs, None
        losses = [run.result["validation_loss"] for run in found]
        losses = dict(zip(rates, losses, strict=True))
        beyond = _beyond(losses)
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
    found, best = search(lambda lr: config_of(lr, seeds[0]), rates)
    if best is None:
        return found, None
    return found + [config_of(best, seed) for seed in seeds[1:]], best


def at_best(found: Sequence[Run]) -> list[Run]:
    """Of the runs of one `tuned`, those at the chosen rate; Invalid at a grid's end."""
    first = min(run.config["seed"] for run in found)
    searched = [run for run in found if run.config["seed"] == first]
    losses = {run.config["lr"]: run.result["validation_loss"] for run in searched}
    best = best_inside(losses)
    return [run for run in found if run.config["lr"] == best]


def _best(losses: Mapping[float, float | None]) -> float:
    sound = {rate: loss for rate, loss in losses.items() if loss is not None}
    if not sound:
        raise Invalid(f"every rate of {sorted(losses)} diverged")
    return min(sound, key=lambda rate: (sound[rate], rate))


def _beyond(losses: Mapping[float, float | None]) -> float | None:
    """The rate half a decade past the end that the best is at; None inside."""
    best = _best(losses)
    if min(losses) < best < max(losses):
        return None
    halves = round(2 * math.log10(best)) + (1 if best == max(losses) else -1)
    return float(f"{10 ** (halves / 2):.0e}")
