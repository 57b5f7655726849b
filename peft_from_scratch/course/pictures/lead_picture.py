"""Leads with their intervals, a row each: which method is ahead, and how surely.

    picture({"far, 1,600 examples": [0.08, 0.11, …], …}, x="Lead …, nats per token", …)

A small dot is one seed, the large mark is their mean, and the bar its interval. The
mark is filled where zero lies outside the interval, and hollow where it lies inside.
"""

from collections.abc import Collection, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...plotting.draw import frame, legend, point
from ...plotting.theme import BLUE, GREY, LIGHT, SMALL, Theme, style

ROW, FOOT = 0.4, 0.55  # inches of a row; under the axes, for ticks and their name
SEED = "one seed"
APART, UNDECIDED = "mean: interval excludes zero", "mean: interval contains zero"
DOT = {"markersize": 4, "markeredgewidth": 0}
Interval = tuple[float, float, float]  # mean, low, high


def picture(
    seeds: Mapping[str, Sequence[float]],
    intervals: Mapping[str, Interval],
    *,
    x: str,
    title: str,
    subtitle: str = "",
    control: Collection[str] = (),
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """A row for each comparison, from top to bottom.

    Args
        seeds      {label: the differences of the seeds}
        intervals  {label: (mean, low, high)} for the same labels
        x          what is on the axis, and its unit
        control    labels whose rows are grey
    Raises   ValueError   no rows, or labels that differ
    """
    if not seeds or list(seeds) != list(intervals):
        raise ValueError(
            f"seeds of {list(seeds)}, intervals of {list(intervals)}: the same rows "
            "are needed, and one at least"
        )
    handles = [point((theme.muted, "o"), theme, label=SEED, **DOT)]
    handles += [_mark(BLUE, theme, name) for name in (APART, UNDECIDED)]
    with style(theme):
        foot = FOOT + legend(frame("", "", width, 1, FOOT, theme)[0], handles)
        figure, axes = frame(title, subtitle, width, ROW * len(seeds), foot, theme)
        legend(figure, handles)
        _limit(axes, seeds, intervals)
        axes.axvline(0, color=theme.ink, linewidth=1, gid="zero")
        axes.grid(axis="x")
        for y, label in enumerate(seeds):
            color = GREY if label in control else BLUE
            _row(axes, y, label, (seeds[label], intervals[label]), color, theme)
        axes.set(ylim=(len(seeds) - 0.5, -0.75), yticks=[])
        axes.set_xlabel(x)
    return figure


def told_apart(interval: Interval) -> bool:
    """Whether zero lies outside the interval."""
    _, low, high = interval
    return low > 0 or high < 0


def words(intervals: Mapping[str, Interval]) -> str:
    """The picture in words, for readers who cannot see it."""
    rows = (
        f"{label} {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        for label, (mean, low, high) in intervals.items()
    )
    return "; ".join(rows)


def _mark(color: str, theme: Theme, name: str) -> Line2D:
    """A diamond: filled where zero lies outside, else hollow."""
    filled = color if name == APART else theme.paper
    edge = {"markeredgecolor": color, "markeredgewidth": 1.6}
    return point((filled, "D"), theme, label=name, markersize=6, **edge)


def _limit(axes: Axes, seeds: Mapping, intervals: Mapping) -> None:
    """Everything, and zero, with room on both sides."""
    places = [0.0, *(n for row in (*seeds.values(), *intervals.values()) for n in row)]
    room = 0.05 * (max(places) - min(places))
    axes.set_xlim(min(places) - room, max(places) + room)


def _row(axes: Axes, y: int, label: str, row: tuple, color: str, theme: Theme) -> None:
    values, (mean, low, high) = row
    paper = {"facecolor": theme.paper, "linewidth": 0, "pad": 1}
    left = axes.get_xlim()[0]
    axes.text(left, y - 0.26, label, size=SMALL, va="bottom", bbox=paper, zorder=2)
    axes.hlines(y, low, high, color=color, linewidth=2, gid="interval")
    name = APART if told_apart((mean, low, high)) else UNDECIDED
    mark = _mark(color, theme, name)
    mark.set_data([mean], [y])
    mark.set(gid="mean", zorder=3)
    axes.add_line(mark)
    below = [y + 0.2] * len(values)
    dots = point((theme.muted, "o"), theme, values, below, **DOT)
    dots.set(gid="seeds", zorder=2.5)
    axes.add_line(dots)
