"""What bfloat16 keeps of an update: a weight between its neighbors on a number line.

    rows = {"one update of 0.001": moved(0.05, 1e-3), …}
    picture(0.05, rows, title=…)          a row for each way to update

The gray lines are all the values that bfloat16 has there. Whatever lands in the shaded
band, which reaches half a gap to either side of the weight, is rounded back to it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...plotting.draw import frame, legend, point
from ...plotting.theme import AMBER, BLUE, LIGHT, SMALL, Theme, style

ROW, FOOT = 0.42, 0.55  # inches of a row; under the axes, for ticks and their name
ROOM = 0.12  # of the span: free space left and right of what is drawn
BEFORE, EXACT, AFTER = "before", "exact result", "after rounding"


class Move(NamedTuple):
    """Where a weight goes: in exact arithmetic, where it is stored, and from where."""

    exact: float
    stored: float
    start: float


def moved(weight: float, update: float, times: int = 1, master: bool = False) -> Move:
    """Subtract an update from a weight `times` times.

        W = bfloat16(W - update)                 each time; or, with a master copy,
        M = M - update,  W = bfloat16(M)         M in float32

    Args
        weight  is rounded to bfloat16 first
        master  a float32 copy adds up the updates
    """
    W = start = rounded(weight)
    M = torch.tensor(start, dtype=torch.float32)
    for _ in range(times):
        M = M - update
        W = rounded(W - update)
    return Move(start - times * update, rounded(M.item()) if master else W, start)


def rounded(number: float) -> float:
    """The bfloat16 value nearest to a number."""
    return torch.tensor(number, dtype=torch.bfloat16).item()


def neighbors(low: float, high: float) -> list[float]:
    """Every bfloat16 value from low to high.

    Positive bfloat16 values have the order of their bit patterns.

    Raises  ValueError  not 0 < low <= high
    """
    if not 0 < low <= high:
        raise ValueError(f"{low=}, {high=}: 0 < low <= high is needed")
    ends = torch.tensor([low, high], dtype=torch.bfloat16).view(torch.int16)
    bits = torch.arange(int(ends[0]) - 1, int(ends[1]) + 2, dtype=torch.int16)
    values = bits.view(torch.bfloat16).tolist()
    return [value for value in values if low <= value <= high]


def half_gaps(weight: float) -> tuple[float, float]:
    """The numbers halfway to the bfloat16 values below and above a positive weight."""
    W = rounded(weight)
    around = neighbors(W * 0.98, W * 1.02)
    at = around.index(W)
    return (around[at - 1] + W) / 2, (around[at + 1] + W) / 2


def picture(
    weight: float,
    rows: Mapping[str, Move],
    *,
    title: str,
    subtitle: str = "",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """The bfloat16 values around a weight, and in each row one way to update it.

    Args
        weight  positive
        rows    {label: Move}, from top to bottom
    Raises   ValueError   no rows, or a weight that is not positive
    """
    if not rows or weight <= 0:
        raise ValueError(
            f"{len(rows)} rows, {weight=}: one row at least and a weight above 0 are "
            "needed"
        )
    W, handles = rounded(weight), _handles(theme)
    with style(theme):
        foot = FOOT + legend(frame("", "", width, 1, FOOT, theme)[0], handles)
        figure, axes = frame(title, subtitle, width, ROW * len(rows), foot, theme)
        legend(figure, handles)
        _lines(axes, W, _limits(W, rows), theme)
        for y, (label, move) in enumerate(rows.items()):
            _row(axes, y, label, move, theme)
        axes.set(ylim=(len(rows) - 0.4, -0.75), yticks=[])
        axes.set_xlabel("Weight, value")
    return figure


def words(rows: Mapping[str, Move], weight: float) -> str:
    """The picture in words: "one update of 0.001: -0.00098 from the old weight; …"."""
    W = rounded(weight)
    ends = {
        label: (
            "at the old weight"
            if move.stored == W
            else f"{move.stored - W:+.6f} from the old weight"
        )
        for label, move in rows.items()
    }
    return "; ".join(f"{label}: {end}" for label, end in ends.items())


def _handles(theme: Theme) -> list:
    looks = {BEFORE: (theme.paper, "o"), EXACT: (theme.ink, "|"), AFTER: (BLUE, "o")}
    sizes = {
        BEFORE: {"markersize": 10},
        EXACT: {"markersize": 12, "markeredgewidth": 1.6},
        AFTER: {"markersize": 5.5},  # inside the ring where nothing has changed
    }
    return [
        point(mark, theme, label=name, **sizes[name]) for name, mark in looks.items()
    ]


def _limits(W: float, rows: Mapping[str, Move]) -> tuple[float, float]:
    places = [W, *half_gaps(W), *(place for move in rows.values() for place in move)]
    room = ROOM * (max(places) - min(places))
    return min(places) - room, max(places) + room


def _lines(axes: Axes, W: float, limits: tuple[float, float], theme: Theme) -> None:
    """A line for each bfloat16 value, and the band that is rounded to the weight."""
    low, high = half_gaps(W)
    axes.axvspan(low, high, color=AMBER, alpha=0.25, linewidth=0, gid="band")
    values = neighbors(*limits)
    for value in values:
        axes.axvline(value, color=theme.muted, linewidth=0.7, alpha=0.6, gid="value")
    axes.set_xlim(limits)
    ticks = values[values.index(W) % 2 :: 2]
    axes.set_xticks(ticks, [f"{tick:.5f}" for tick in ticks])


def _row(axes: Axes, y: int, label: str, move: Move, theme: Theme) -> None:
    before, exact, after = _handles(theme)
    paper = {"facecolor": theme.paper, "linewidth": 0, "pad": 1}
    left = axes.get_xlim()[0]
    axes.text(left, y - 0.28, label, size=SMALL, va="bottom", bbox=paper, zorder=2)
    axes.hlines(y, move.exact, move.start, color=theme.ink, linewidth=1.2)
    places = move.start, move.exact, move.stored
    for handle, x in zip((before, exact, after), places, strict=True):
        line = point((handle.get_color(), handle.get_marker()), theme, [x], [y])
        line.update_from(handle)
        line.set(gid=handle.get_label(), zorder=3)
        axes.add_line(line)
