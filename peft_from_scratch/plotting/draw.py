"""The parts that all figures are made of: a titled page, points, bars, legends.

Lengths are in inches where nothing else is said; places on the axes are in the axes'
own units.
"""

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from .theme import SMALL, Theme, readable

APART = 0.15  # inches between two points that would otherwise cover each other


def frame(
    title: str, subtitle: str, width: float, height: float, below: float, theme: Theme
) -> tuple[Figure, Axes]:
    """A figure with its title, wrapped, on top and its axes under it.

    Args
        width          of the figure, inches
        height, below  of the axes, and of what stands under them, inches
    """
    edge, left, right = 0.1, 0.45, 0.15
    figure = Figure(figsize=(width, 1))
    FigureCanvasAgg(figure)  # texts are measured before anything is saved
    texts = (
        _wrapped(figure, title, width - 2 * edge, size=10.5, weight="bold"),
        _wrapped(figure, subtitle, width - 2 * edge, size=SMALL, color=theme.muted),
    )
    heights = [text.get_window_extent().height / figure.dpi for text in texts]
    total = edge + sum(heights) + 0.45 + height + below
    figure.set_size_inches(width, total)
    top = total - edge
    for text, size in zip(texts, heights, strict=True):
        text.set_position((edge / width, top / total))
        top -= size + 0.08
    box = left / width, below / total, 1 - (left + right) / width, height / total
    return figure, figure.add_axes(box)


def _wrapped(figure: Figure, text: str, room: float, **font) -> Text:
    """Text in lines of at most `room` inches, none of which starts with a unit."""
    text = text.replace(" %", "\N{NO-BREAK SPACE}%")
    written = figure.text(0, 0, text, va="top", **font)
    columns = len(text)
    while written.get_window_extent().width > room * figure.dpi and columns > 1:
        columns -= 1
        lines = textwrap.fill(text, columns, break_on_hyphens=False)
        written.set_text(lines)
    return written


def point(
    mark: tuple[str, str], theme: Theme, x: Sequence = (), y: Sequence = (), **more
) -> Line2D:
    """Points of this (color, marker); with a line through them if `linestyle` says."""
    color, marker = mark
    settings = {
        "linestyle": "",
        "marker": marker,
        "color": color,
        "markersize": 7,
        "markeredgecolor": theme.ink,
        "markeredgewidth": 0.7,
    }
    return Line2D(x, y, **settings | more)


def interval(
    axes: Axes,
    x: float,
    y: float,
    low: float,
    high: float,
    mark: tuple[str, str],
    theme: Theme,
) -> Bbox:
    """Draw a point, of this (color, marker), with its interval.

    Returns  the pixels that they cover
    """
    axes.vlines(x, low, high, color=theme.muted, linewidth=1.5, gid="interval")
    axes.add_line(point(mark, theme, [x], [y], clip_on=False))
    half = 4.5 / 72 * axes.figure.dpi
    (left, bottom), (_, top), (_, middle) = axes.transData.transform(
        [(x, low), (x, high), (x, y)]
    )
    return Bbox.from_extents(
        left - half, min(bottom, middle - half), left + half, max(top, middle + half)
    )


def legend(figure: Figure, handles: Sequence[Line2D]) -> float:
    """Name the handles at the foot of the figure; return the height, inches."""
    for columns in (4, 3, 2, 1):
        box = figure.legend(handles=handles, loc="lower left", ncols=columns)
        size = box.get_window_extent()
        if columns == 1 or size.width <= figure.bbox.width:
            break
        box.remove()
    return size.height / figure.dpi


def name_y(axes: Axes, name: str) -> None:
    """The name of the y axis, over it: read without turning the head."""
    axes.text(0, 1.03, name, transform=axes.transAxes, size=SMALL)


def stack(axes: Axes, y: float, sizes: dict[str, float], looks: dict, theme: Theme):
    """A bar at height y, stacked from sizes by name; `looks` has their colors."""
    left, edge = 0.0, {"edgecolor": theme.ink, "linewidth": 0.5}
    for name, color in looks.items():
        size = sizes.get(name) or 0
        axes.barh(y, size, 0.38, left=left, color=color, **edge)
        left += size


def name_stacks(axes: Axes, names: Sequence[str]) -> None:
    """The legend of what bars are stacked from, over them, in a line if it fits."""
    even = (-(-len(names) // lines) for lines in range(1, len(names) + 1))
    for columns in even:  # in two lines, half of them each
        box = axes.legend(
            handles=axes.containers[: len(names)],
            labels=list(names),
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=columns,
            borderpad=0.3,
            borderaxespad=0,
            handlelength=1,
            handletextpad=0.5,
            labelspacing=0.3,
            columnspacing=1.2,
        )
        if box.get_window_extent().x1 <= axes.figure.bbox.x1:
            break


def spread(places: Sequence[float], apart: float) -> list[float]:
    """Places moved as little as possible until neighbours are `apart`.

    Minimises the sum of squared moves: the isotonic regression of place_i - i · apart,
    by pooling adjacent violators.
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    pools: list[tuple[float, int]] = []  # (mean, members)
    for i, index in enumerate(order):
        mean, members = places[index] - i * apart, 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean = (mean * members + other * more) / (members + more)
            members += more
        pools.append((mean, members))
    means = [mean for mean, members in pools for _ in range(members)]
    moved = {index: means[i] + i * apart for i, index in enumerate(order)}
    return [moved[index] for index in range(len(places))]


# Parts of a diagram -------------------------------------------------------------------


def path(
    axes: Axes,
    places: Sequence[tuple[float, float]],
    theme: Theme,
    first: str = "",
    last: str = "",
    *,
    gap: float = 0.15,
    size: float = 10,
) -> None:
    """Lines through places, an arrow at the end, names at both ends.

    Args
        gap, size  of the last name: its distance from the arrow, and its font
    """
    xs, ys = zip(*places, strict=True)
    axes.plot(xs[:-1], ys[:-1], color=theme.muted, linewidth=1.2, zorder=1)
    arrow = {"arrowstyle": "-|>", "color": theme.muted, "linewidth": 1.2}
    arrow |= {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 10}
    axes.annotate("", places[-1], places[-2], arrowprops=arrow, zorder=1)
    (x, y), (end, level) = places[0], places[-1]
    axes.text(x - 0.15, y, first, size=10, ha="right", va="center")
    axes.text(end + gap, level, last, size=size, ha="left", va="center")


def box(
    axes: Axes,
    x: float,
    y: float,
    name: str,
    color: str,
    theme: Theme,
    *,
    tall: float,
    wide: float,
) -> None:
    """A box with rounded corners around (x, y), its name inside."""
    edge = {"facecolor": color, "edgecolor": theme.ink, "linewidth": 0.7, "zorder": 3}
    shape = "round,pad=0,rounding_size=0.1"
    corner = x - wide / 2, y - tall / 2
    axes.add_patch(FancyBboxPatch(corner, wide, tall, boxstyle=shape, **edge))
    ink = readable(color)
    axes.text(x, y, name, size=10, ha="center", va="center", color=ink, zorder=4)
