"""The same search of the learning rate for every method, and when it does not count.

The best rate of a grid (common/grid.py) is the one with the lowest validation loss. If
it still is at an end after the grid has grown, the runs are invalid, whatever they say.
"""

from collections.abc import Callable, Mapping, Sequence

from ..common.grid import GROWTH, at_an_end, is_inside, rate_past
from .claim import Invalid
from .runs import Run, stored


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
