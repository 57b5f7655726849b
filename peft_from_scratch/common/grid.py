"""Grids of learning rates, half a decade apart, that grow where the best is at an end.

An optimum at an end of the grid may lie outside of it. So a search tries up to GROWTH
more rates past that end; if the best still is at an end, the search does not count.
"""

import math
from collections.abc import Collection

GROWTH = 3  # rates that a grid may grow by


def is_inside(best: float, rates: Collection[float]) -> bool:
    """Whether the best rate has a smaller and a larger one beside it."""
    return min(rates) < best < max(rates)


def rate_past(best: float, rates: Collection[float]) -> float | None:
    """The rate half a decade past the end that the best is at; None inside."""
    if is_inside(best, rates):
        return None
    halves = round(2 * math.log10(best)) + (1 if best == max(rates) else -1)
    return float(f"{10 ** (halves / 2):.0e}")


def at_an_end(best: float, rates: Collection[float]) -> str:
    """What an error says of a best rate that is not inside."""
    tried = ", ".join(f"{rate:g}" for rate in sorted(rates))
    return f"the best learning rate {best:g} is an end of the grid {tried}"
