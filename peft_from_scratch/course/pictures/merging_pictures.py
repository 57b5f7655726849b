"""Merging and combining in pictures: one product for three, and cross terms.

    one_product()            a LoRA beside its projection, and the two as one weight
    errors(rows, …)          how far off models are, on a logarithmic axis
    products(…)              which B meets which A, added and stacked

Gray belongs to what is frozen and to controls; orange to what nobody wanted.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ...plotting.draw import box, frame, path, point
from ...plotting.theme import (
    BLUE,
    GREY,
    LIGHT,
    ORANGE,
    PURPLE,
    SMALL,
    Theme,
    look,
    readable,
    style,
)

FOOT, AXIS, ROW = 0.12, 0.55, 0.5  # inches: under a picture, under an axis, of a row
ACROSS, DOWN = 22.0, 5.4  # units of the picture of one product
MAIN, SIDE = 1.9, 4.1  # heights of the frozen path, and of the one that trained
BOXES, TALL = 24.0, 8.2  # units of the picture of products, across and down
CELL = 2.0  # units of a product's square
OWN = (BLUE, PURPLE)  # of the first adapter, and of the second
_box = partial(box, tall=1.2, wide=1.4)


# One product --------------------------------------------------------------------------


def one_product(*, width: float = 7.4, theme: Theme = LIGHT) -> Figure:
    """An unmerged LoRA takes three products and a sum, a merged one one product."""
    title = "Merging folds two thin products into the one that is there anyway"
    subtitle = "Gray: the frozen weight. Color: what was trained."
    with style(theme):
        height = (width - 0.6) * DOWN / ACROSS
        figure, axes = frame(title, subtitle, width, height, FOOT, theme)
        _blank(axes, ACROSS, DOWN)
        color = look("lora")[0]
        axes.text(0, 0.4, "Unmerged: three products", weight="bold", size=9)
        path(axes, [(0.6, MAIN), (8.6, MAIN)], theme, "$x$", "$h$")
        path(axes, [(1.4, MAIN), (1.4, SIDE), (6.8, SIDE), (6.8, MAIN + 0.4)], theme)
        _box(axes, 4.1, MAIN, "$W_0$", theme.faint, theme)
        _box(axes, 2.9, SIDE, "$A$", color, theme, tall=0.9)
        _box(axes, 5.1, SIDE, "$s B$", color, theme, tall=0.9)
        axes.text(6.8, MAIN, "+", size=11, ha="center", va="center", zorder=4, bbox={
            "boxstyle": "circle,pad=0.15", "fc": theme.paper, "ec": theme.ink,
        })  # fmt: skip
        axes.text(12, 0.4, "Merged: one product", weight="bold", size=9)
        path(axes, [(12.6, MAIN), (20.6, MAIN)], theme, "$x$", "$h$")
        _box(axes, 16.4, MAIN, "$W_0 + s B A$", color, theme, wide=4.6)
        words = "Same shape and bytes as W0,\nrounded once to its number format."
        axes.text(12.6, SIDE, words, size=SMALL, va="center")
    return figure


def _blank(axes: Axes, across: float, down: float) -> None:
    axes.set(xlim=(0, across), ylim=(down, 0), xticks=[], yticks=[])
    axes.set(aspect="equal", anchor="NW")
    for spine in axes.spines.values():
        spine.set_visible(False)


# How far off --------------------------------------------------------------------------


def errors(
    rows: Mapping[str, Sequence[float]],
    *,
    x: str,
    title: str,
    subtitle: str = "",
    control: Collection[str] = (),
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """A row for each model, a dot for each run, on a logarithmic axis.

    Args
        rows     {label: errors, in %, above 0}, from top to bottom
        x        the name of the axis
        control  labels whose dots are gray
    Raises   ValueError   no rows, a row without an error, or one that is not above 0
    """
    if not rows or not all(len(row) and min(row) > 0 for row in rows.values()):
        raise ValueError(
            f"rows {dict(rows)}: one is needed, and errors above 0 in each"
        )
    with style(theme):
        figure, axes = frame(title, subtitle, width, ROW * len(rows), AXIS, theme)
        every = [value for row in rows.values() for value in row]
        axes.set_xscale("log")
        axes.set_xlim(min(every) / 3, 2 * max(100.0, *every))
        axes.set(ylim=(len(rows) - 0.6, -0.7), yticks=[], xlabel=x)
        axes.axvline(100, color=theme.muted, linewidth=0.8, linestyle=":", gid="whole")
        for y, (label, row) in enumerate(rows.items()):
            mark = (GREY, "s") if label in control else (BLUE, "o")
            axes.axhline(y, color=theme.faint, linewidth=1, zorder=0)
            axes.add_line(point(mark, theme, row, [y] * len(row), gid=label))
            paper = {"facecolor": theme.paper, "edgecolor": "none", "pad": 0.5}
            place = axes.get_xlim()[0], y - 0.25
            axes.text(*place, label, size=SMALL, va="bottom", bbox=paper)
    return figure


def errors_in_words(rows: Mapping[str, Sequence[float]]) -> str:
    """ "label 0.86 %; …": the mean of each row."""
    means = {label: sum(row) / len(row) for label, row in rows.items()}
    texts = {n: f"{mean:.{2 if mean < 10 else 3}g}" for n, mean in means.items()}
    return "; ".join(f"{label} {text} %" for label, text in texts.items())


# Products -----------------------------------------------------------------------------


def products(*, width: float = 7.4, theme: Theme = LIGHT) -> Figure:
    """The products of two adapters: four where factors are added, two if stacked."""
    title = "Added factors meet each other's: the orange products belong to no task"
    subtitle = (
        "Rows: which B. Columns: which A. Blue and purple: the two updates that are "
        "wanted."
    )
    with style(theme):
        height = (width - 0.6) * TALL / BOXES
        figure, axes = frame(title, subtitle, width, height, FOOT, theme)
        _blank(axes, BOXES, TALL)
        head = dict(weight="bold", size=9)
        axes.text(0, 0.5, "Added: $(B_1 + B_2)(A_1 + A_2)$", **head)
        axes.text(13, 0.5, "Stacked: $[B_1\\ B_2]\\,[A_1;\\ A_2]$", **head)
        for left, cross in ((2.2, True), (15.2, False)):
            _grid(axes, left, theme, cross=cross)
        axes.text(7.4, 4.4, "rank $r$,\nfour products", size=SMALL, va="center")
        axes.text(20.4, 4.4, "rank $2r$,\ntwo products", size=SMALL, va="center")
    return figure


def _grid(axes: Axes, left: float, theme: Theme, *, cross: bool) -> None:
    """Two by two squares; the off-diagonal ones are empty if not `cross`."""
    top = 2.6
    for i in (0, 1):
        middle = (i + 0.5) * CELL
        column, row = f"$A_{i + 1}$", f"$B_{i + 1}$"
        axes.text(left + middle, top - 0.4, column, size=10, ha="center", va="bottom")
        axes.text(left - 0.4, top + middle, row, size=10, ha="right", va="center")
        for j in (0, 1):
            own = i == j
            color = OWN[i] if own else ORANGE if cross else theme.paper
            corner = left + j * CELL, top + i * CELL
            edge = {"edgecolor": theme.muted, "linewidth": 0.7}
            kind = "wanted" if own else "cross" if cross else "absent"
            square = Rectangle(corner, CELL, CELL, facecolor=color, gid=kind, **edge)
            axes.add_patch(square)
            name = f"$B_{i + 1}A_{j + 1}$" if own or cross else "0"
            place = corner[0] + CELL / 2, corner[1] + CELL / 2
            ink = readable(color) if own or cross else theme.muted
            axes.text(*place, name, size=10, ha="center", va="center", color=ink)
