"""Grids of learning rates that grow where the best is at an end.

An optimum at an end of the grid may lie outside of it. So a search tries up to GROWTH
more rates past that end; if the best still is at an end, the search does not count.
Rates are half a decade apart, 1e-3 3e-3 1e-2, or a quarter: 1e-3 2e-3 3e-3 6e-3 1e-2.
"""

import math
from collections.abc import Callable, Collection, Iterable

GROWTH = 3  # rates that a grid may grow by


def is_inside(best: float, rates: Collection[float]) -> bool:
    """Whether the best rate has a smaller and a larger one beside it."""
    return min(rates) < best < max(rates)


def rate_past(best: float, rates: Collection[float], parts: int = 2) -> float | None:
    """The next rate past the end that the best is at; None inside.

    Args
        parts  how many rates there are in a decade: 2 or 4
    """
    if is_inside(best, rates):
        return None
    return neighbor(best, 1 if best == max(rates) else -1, parts)


def neighbor(rate: float, away: int, parts: int = 2) -> float:
    """The rate so many places further, or with away < 0 before; of one digit."""
    place = round(parts * math.log10(rate)) + away
    return float(f"{10 ** (place / parts):.0e}")


def grown(
    score: Callable[[float], object], rates: Iterable[float], parts: int = 2
) -> list[float]:
    """The rates, and up to GROWTH more past the end that the best one is at.

    Args
        score  of a rate: the highest is the best. Asked again for a rate
        parts  of a decade: see rate_past
    """
    rates = list(rates)
    for _ in range(GROWTH):
        beyond = rate_past(max(rates, key=score), rates, parts)
        if beyond is None:
            break
        rates.append(beyond)
    return rates


def at_an_end(best: float, rates: Collection[float]) -> str:
    """What an error says of a best rate that is not inside."""
    tried = ", ".join(f"{rate:g}" for rate in sorted(rates))
    return f"the best learning rate {best:g} is an end of the grid {tried}"
