"""Where a bottleneck and a LoRA compute, and what a decoding step costs with them.

    at_projection()                        LoRA and bottleneck at one projection
    ratios({"LoRA": {"one sequence": (1.17, 1.16, 1.19), …}, …}, …)   times of a step
    ratios_in_words(…)                     the same in words

Gray belongs to the frozen model and to controls; color is what trains.
"""

from collections.abc import Collection, Mapping
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from ...plotting.draw import box, frame, legend, path, point
from ...plotting.theme import BLUE, GREY, LIGHT, SMALL, Theme, look, style

FOOT, AXIS, ROW = 0.1, 0.55, 0.52  # inches: under a picture, under an axis, of a row
ACROSS, DOWN = 21.0, 6.6  # units of the picture of a projection
RIGHT = 11.0  # where its second half begins
MAIN, SIDE = 1.9, 4.2  # heights of the frozen path and of the path that trains
Interval = tuple[float, float, float]  # value, low, high
_path = partial(path, gap=0.1, size=9)
_box = partial(box, tall=1.1, wide=1.1)


# At one projection --------------------------------------------------------------------


def at_projection(*, width: float = 7.4, theme: Theme = LIGHT) -> Figure:
    """LoRA reads the input x of a projection; a bottleneck reads its output y."""
    title = "LoRA computes from the input x, a bottleneck from the output y"
    subtitle = (
        "Gray: the frozen projection. Color: what trains. Plus signs add what comes in."
    )
    with style(theme):
        height = (width - 0.6) * DOWN / ACROSS
        figure, axes = frame(title, subtitle, width, height, FOOT, theme)
        axes.set(xlim=(0, ACROSS), ylim=(DOWN, 0), xticks=[], yticks=[])
        axes.set(aspect="equal", anchor="NW")
        axes.spines["bottom"].set_visible(False)
        _lora(axes, theme)
        _bottleneck(axes, theme)
    return figure


def _lora(axes: Axes, theme: Theme) -> None:
    color = look("lora")[0]
    axes.text(0, 0.4, "LoRA: in parallel", weight="bold", size=9, va="center")
    _path(axes, [(0.6, MAIN), (8.0, MAIN)], theme, "$x$", "$W_0 x + s\\,B A x$")
    _path(axes, [(1.3, MAIN), (1.3, SIDE), (6.3, SIDE), (6.3, MAIN + 0.35)], theme)
    _box(axes, 3.6, MAIN, "$W_0$", theme.faint, theme)
    _box(axes, 2.7, SIDE, "$A$", color, theme, tall=0.8)
    _box(axes, 4.7, SIDE, "$B$", color, theme, tall=0.8)
    _plus(axes, 6.3, theme)
    words = "Both paths start from x.\nMerged: B A is added to the weight."
    axes.text(0, 5.2, words, size=SMALL, va="top")


def _bottleneck(axes: Axes, theme: Theme) -> None:
    color, left = look("houlsby")[0], RIGHT
    axes.text(left, 0.4, "Bottleneck: after", weight="bold", size=9, va="center")
    _path(axes, [(left + 0.6, MAIN), (left + 9.2, MAIN)], theme, "$x$", "$h$")
    turn = [(left + 3.2, MAIN), (left + 3.2, SIDE), (left + 8.2, SIDE)]
    _path(axes, [*turn, (left + 8.2, MAIN + 0.35)], theme)
    _box(axes, left + 1.9, MAIN, "$W_0$", theme.faint, theme)
    _name(axes, left + 3.2, "$y$")
    _box(axes, left + 4.3, SIDE, "$D$", color, theme, tall=0.8)
    _box(axes, left + 5.8, SIDE, "$\\sigma$", theme.paper, theme, tall=0.8, wide=0.8)
    _box(axes, left + 7.3, SIDE, "$U$", color, theme, tall=0.8)
    _plus(axes, left + 8.2, theme)
    words = (
        "D waits until y is there.\nThe bend in \N{GREEK SMALL LETTER SIGMA} prevents"
    )
    axes.text(left, 5.2, words + " merging.", size=SMALL, va="top")


def _plus(axes: Axes, x: float, theme: Theme) -> None:
    look = {"facecolor": theme.paper, "edgecolor": theme.ink, "linewidth": 0.9}
    axes.add_patch(Circle((x, MAIN), 0.35, zorder=3, **look))
    axes.text(x, MAIN, "+", size=10, ha="center", va="center", zorder=4)


def _name(axes: Axes, x: float, name: str) -> None:
    axes.text(x + 0.1, MAIN - 0.2, name, size=10, ha="left", va="bottom")


# Times of a decoding step -------------------------------------------------------------


def ratios(
    rows: Mapping[str, Mapping[str, Interval]],
    *,
    title: str,
    subtitle: str = "",
    control: Collection[str] = (),
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """Times divided by the base model's, a row for each method, with intervals.

    Args
        rows     {label: {condition: (ratio, low, high)}}, the same conditions, two at
                 most: the first has a filled mark, the second a hollow one
        control  labels whose rows are gray
    Raises   ValueError   no rows, other conditions in a row, or more than two
    """
    conditions = list(next(iter(rows.values()), {}))
    if not 1 <= len(conditions) <= 2 or any(
        list(r) != conditions for r in rows.values()
    ):
        raise ValueError(
            f"rows have {[list(row) for row in rows.values()]}: each needs the same "
            "one or two conditions"
        )
    handles = [
        _mark(BLUE, theme, filled=i == 0, label=name)
        for i, name in enumerate(conditions)
    ]
    with style(theme):
        foot = AXIS + legend(frame("", "", width, 1, AXIS, theme)[0], handles)
        figure, axes = frame(title, subtitle, width, ROW * len(rows), foot, theme)
        legend(figure, handles)
        ends = [n for row in rows.values() for span in row.values() for n in span]
        room = 0.06 * (max(*ends, 1) - min(*ends, 1))
        axes.set_xlim(min(*ends, 1) - room, max(*ends, 1) + room)
        axes.axvline(1, color=theme.ink, linewidth=1, gid="base")
        axes.grid(axis="x")
        for y, (label, row) in enumerate(rows.items()):
            color = GREY if label in control else BLUE
            _row(axes, y, label, list(row.values()), color, theme)
        axes.set(ylim=(len(rows) - 0.5, -0.75), yticks=[])
        axes.set_xlabel("Time of a decoding step, times the base model's (line: 1)")
    return figure


def ratios_in_words(rows: Mapping[str, Mapping[str, Interval]]) -> str:
    """The picture in words: "LoRA 1.17 [1.16, 1.19] and 1.16 [1.15, 1.17]; …"."""

    def spans(row: Mapping[str, Interval]) -> str:
        texts = ("{:.2f} [{:.2f}, {:.2f}]".format(*span) for span in row.values())
        return " and ".join(texts)

    return "; ".join(f"{label} {spans(row)}" for label, row in rows.items())


def _mark(color: str, theme: Theme, *, filled: bool, label: str = "", at=((), ())):
    face = color if filled else theme.paper
    edge = {"markeredgecolor": color, "markeredgewidth": 1.6, "markersize": 6.5}
    shape = "o" if filled else "s"
    return point((face, shape), theme, *at, label=label, **edge)


def _row(axes: Axes, y: int, label: str, spans: list, color: str, theme: Theme) -> None:
    paper = {"facecolor": theme.paper, "linewidth": 0, "pad": 1}
    left = axes.get_xlim()[0]
    axes.text(left, y - 0.24, label, size=SMALL, va="bottom", bbox=paper, zorder=2)
    for i, (value, low, high) in enumerate(spans):
        level = y + 0.24 * i
        axes.hlines(level, low, high, color=color, linewidth=2, gid="interval")
        mark = _mark(color, theme, filled=i == 0, at=([value], [level]))
        mark.set(gid="ratio", zorder=3)
        axes.add_line(mark)
