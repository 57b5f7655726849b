"""Pictures of rounding: one block on a number line, and where NF4's values come from.

block_on_line(w, values, …)         each weight of a block, and the value it goes to
quantiles_on_curve(values, …)       even shares of a distribution, and their ends
"""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...plotting.draw import frame, name_y, point
from ...plotting.theme import BLUE, LIGHT, ORANGE, RED, SMALL, Theme, style

FOOT = 0.55  # inches under the axes for the ticks and the name of the x axis
MARGIN = 0.07  # of absmax, beyond the ends of the line
CENTERED = {"ha": "center", "size": SMALL}


def nearest(w: Sequence[float], values: Sequence[float]) -> np.ndarray:
    """The code of each weight: the position of the value nearest to w / absmax."""
    w, values = np.asarray(w, float), np.asarray(values, float)
    return np.abs(w[:, None] / np.abs(w).max() - values).argmin(axis=1)


def block_on_line(
    w: Sequence[float],
    values: Sequence[float],
    *,
    title: str | None = None,
    subtitle: str = "The largest weight of a block sets the scale of all values.",
    width: float = 6.6,
    theme: Theme = LIGHT,
) -> Figure:
    """The weights of one block, over the values times absmax that they are rounded to.

    Args
        w       weights of the block, not all of them zero
        values  code book, rising from -1 to 1
        title   None: how many of the values are used
    Raises   ValueError   no weights, or only zeros
    """
    w = np.asarray(w, float)
    if not w.any():
        raise ValueError(f"{len(w)} weights, all zero: a block needs an absmax above 0")
    absmax = np.abs(w).max()
    places, codes = absmax * np.asarray(values, float), nearest(w, values)
    count = len(set(codes.tolist()))
    title = title or f"{len(w)} weights use {count} of {len(values)} values"
    with style(theme):
        figure, axes = frame(title, subtitle, width, 1.6, FOOT, theme)
        for weight, code in zip(w, codes, strict=True):
            ends = [weight, places[code]], [1, 0]
            axes.plot(*ends, color=theme.muted, linewidth=0.6, gid="rounding")
        used = np.isin(np.arange(len(places)), codes)
        _row(axes, places[used], 0, (ORANGE, "s"), theme)
        _row(axes, places[~used], 0, (theme.paper, "s"), theme)
        _row(axes, w, 1, (BLUE, "o"), theme)
        _label_line(axes, w, places, theme)
        axes.set_xlim(-absmax * (1 + MARGIN), absmax * (1 + MARGIN))
        axes.set(ylim=(-0.42, 1.75), yticks=[])
        axes.set_xlabel("Weight, in the unit of the matrix")
    return figure


def _row(axes: Axes, xs: np.ndarray, y: float, mark: tuple, theme: Theme) -> None:
    axes.add_line(point(mark, theme, xs, [y] * len(xs), markersize=5.5, zorder=3))


def _label_line(axes: Axes, w: np.ndarray, places: np.ndarray, theme: Theme) -> None:
    """Name both rows, the code of each value, and absmax."""
    absmax, largest = np.abs(w).max(), w[np.abs(w).argmax()]
    for code, place in enumerate(places):
        axes.text(place, -0.16, str(code), va="top", **CENTERED)
    side = "left" if largest < 0 else "right"
    axes.text(largest, 1.14, f"absmax = {absmax:.2f}", ha=side, size=SMALL, color=RED)
    look = {"markersize": 10, "markerfacecolor": "none", "markeredgecolor": RED}
    ring = point((RED, "o"), theme, [largest], [1], zorder=4, gid="absmax", **look)
    axes.add_line(ring)
    name = f"{len(w)} weights (circles), and the {len(places)} values times absmax"
    axes.text(0, 1.72, f"{name} (squares, with their codes)", va="top", **CENTERED)


def quantiles_on_curve(
    values: Sequence[float],
    cumulative: Callable[[float], float],
    last: float,
    *,
    title: str = "The values are quantiles at evenly spaced shares p",
    subtitle: str = "Dashed: the negative half. Solid: zero and the positive half.",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """The share below x against x, and on that curve the quantiles times each value.

    Args
        values      code book, rising from -1 to 1
        cumulative  share of the distribution below x, x in its own unit
        last        quantile that the value 1 stands for, in that unit
    """
    span = 1.25 * last
    curve = np.linspace(-span, span, 201)
    with style(theme):
        figure, axes = frame(title, subtitle, width, 2.4, FOOT, theme)
        shares = [cumulative(x) for x in curve]
        axes.plot(curve, shares, color=theme.ink, linewidth=1.5, gid="curve")
        for value in values:
            x, low = last * value, value < 0
            y, color = cumulative(x), BLUE if low else ORANGE
            line = {"color": color, "linewidth": 0.8, "linestyle": "--" if low else "-"}
            axes.plot([-span, x, x], [y, y, 0], gid="share", **line)
            mark = color, "v" if low else "^"
            axes.add_line(point(mark, theme, [x], [0], markersize=5.5, clip_on=False))
        axes.set(xlim=(-span, span), ylim=(0, 1))
        axes.set_xlabel("Weight, standard deviations")
        name_y(axes, "Share of the weights below it, p")
    return figure
