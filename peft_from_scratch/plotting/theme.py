"""The vocabulary that all our figures are drawn with.

A method looks the same in every figure: colour and marker hang on its key, not on its
place in a list. The colours are petroff10's, made to be told apart with every kind of
colour vision [1]; the marker tells the method a second time, and an outline keeps pale
colours visible. Labels stand beside their points where all of them fit, else a legend
holds them: nothing covers anything.

Source   [1] Petroff, arXiv:2107.02270
"""

import io
import math
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

BLUE, AMBER, RED, GREY, PURPLE = "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"
BROWN, ORANGE, TAN, ASH, SKY = "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"
PALETTE = (BLUE, AMBER, RED, GREY, PURPLE, BROWN, ORANGE, TAN, ASH, SKY)
MARKERS = "osD^vPXhp<>"
LOOKS = {  # a method that is not listed gets a look from its key's checksum
    "zero-shot": (GREY, "o"),
    "few-shot": (ASH, "s"),
    "full": (RED, "D"),
    "lora-attention": (SKY, "^"),
    "lora": (BLUE, "o"),
    "dora": (PURPLE, "v"),
    "pissa": (BROWN, "P"),
    "qlora": (ORANGE, "h"),
    "houlsby": (AMBER, "s"),
    "prefix": (TAN, "X"),
    "prompt": (TAN, "^"),
    "ia3": (AMBER, "p"),
    "bitfit": (RED, "<"),
}
GAP = 0.05  # inches between a label and any point; sideways to another point, twice
APART = 0.15  # inches between two points that would otherwise cover each other
SMALL = 8.5  # points


class Theme(NamedTuple):
    """The colours that are not data."""

    ink: str
    muted: str
    faint: str
    paper: str


LIGHT = Theme(ink="#1b1e23", muted="#565d66", faint="#e1e4e8", paper="#ffffff")
DARK = Theme(ink="#e8e8e4", muted="#a7aeb7", faint="#363b42", paper="#15171a")


def look(key: str) -> tuple[str, str]:
    """(colour, marker) of a method: always the same ones."""
    number = zlib.crc32(key.encode())
    unlisted = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
    return LOOKS.get(key, unlisted)


def readable(colour: str) -> str:
    """The ink, black or white, that stands out more on a colour."""

    def against(ink: str) -> float:  # WCAG 2's contrast ratio
        low, high = sorted((_luminance(ink), _luminance(colour)))
        return (high + 0.05) / (low + 0.05)

    return max((LIGHT.ink, LIGHT.paper), key=against)


def _luminance(colour: str) -> float:
    """Relative luminance of sRGB, in [0, 1]."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in to_rgb(colour)
    ]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@contextmanager
def style(theme: Theme = LIGHT) -> Iterator[None]:
    """Matplotlib's settings for this project's figures, inside the block only."""
    settings = {
        "font.family": "DejaVu Sans",  # matplotlib brings it: the same on every machine
        "font.size": 9,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": SMALL,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "figure.facecolor": theme.paper,
        "grid.color": theme.faint,
        "legend.frameon": False,
        "legend.fontsize": SMALL,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "ytick.major.size": 0,
        "svg.hashsalt": "peft_from_scratch",  # equal figures make equal files
    }
    with matplotlib.rc_context(settings):
        yield


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


def interval(
    axes: Axes,
    x: float,
    y: float,
    low: float,
    high: float,
    mark: tuple[str, str],
    theme: Theme,
) -> Bbox:
    """Draw a point, of this (colour, marker), with its interval.

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


def point(
    mark: tuple[str, str], theme: Theme, x: Sequence = (), y: Sequence = (), **more
) -> Line2D:
    """Points of this (colour, marker); with a line through them if `linestyle` says."""
    colour, marker = mark
    settings = {
        "linestyle": "",
        "marker": marker,
        "color": colour,
        "markersize": 7,
        "markeredgecolor": theme.ink,
        "markeredgewidth": 0.7,
    }
    return Line2D(x, y, **settings | more)


def name_y(axes: Axes, name: str) -> None:
    """The name of the y axis, over it: read without turning the head."""
    axes.text(0, 1.03, name, transform=axes.transAxes, size=SMALL)


def stack(axes: Axes, y: float, sizes: dict[str, float], looks: dict, theme: Theme):
    """A bar at height y, stacked from sizes by name; `looks` has their colours."""
    left, edge = 0.0, {"edgecolor": theme.ink, "linewidth": 0.5}
    for name, colour in looks.items():
        size = sizes.get(name) or 0
        axes.barh(y, size, 0.38, left=left, color=colour, **edge)
        left += size


def name_stacks(axes: Axes, names: Sequence[str]) -> None:
    """The legend of what bars are stacked from, over them, in a line if it fits."""
    for columns in range(len(names), 0, -1):
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


def place_labels(axes: Axes, labels: Sequence[str], points: Sequence[Bbox]) -> bool:
    """Write each label beside its point; False, and nothing written, if not all fit.

    The label with the fewest free spots goes first and takes the best of them.
    """
    figure = axes.figure
    texts = [
        figure.text(
            0,
            0,
            textwrap.fill(label, 18, break_on_hyphens=False),
            size=SMALL,
            gid="label",
        )
        for label in labels
    ]
    free = {
        i: [spot for spot in _spots(text, points[i]) if _clear(spot, axes, points, i)]
        for i, text in enumerate(texts)
    }
    while free:
        i = min(free, key=lambda i: len(free[i]))
        if not free[i]:
            for text in texts:
                text.remove()
            return False
        spot = free.pop(i)[0]
        texts[i].set(
            transform=figure.dpi_scale_trans,  # inches, right at any resolution
            position=spot.min / figure.dpi,
            verticalalignment="bottom",
            multialignment="right" if spot.x1 < points[i].x0 else "left",
        )
        taken = spot.padded(2 * GAP * figure.dpi, 0)
        for j, spots in free.items():
            free[j] = [other for other in spots if not other.overlaps(taken)]
    return True


def _spots(text: Text, point: Bbox) -> Iterator[Bbox]:
    """Where a label may stand, best first: right and left of the bar, over, under."""
    width, height = text.get_window_extent().size
    gap = GAP * text.figure.dpi
    middle = (point.y0 + point.y1 - height) / 2
    steps = math.ceil(2 * point.height / height) + 2
    for step in sorted(range(-steps, steps + 1), key=abs):
        for x in (point.x1 + gap, point.x0 - gap - width):
            yield Bbox.from_bounds(x, middle + step * height / 4, width, height)
    for y in (point.y1 + gap, point.y0 - gap - height):
        yield Bbox.from_bounds((point.x0 + point.x1 - width) / 2, y, width, height)


def _clear(spot: Bbox, axes: Axes, points: Sequence[Bbox], own: int) -> bool:
    """Whether a spot is inside the axes and well away from every other point."""
    area, gap = axes.bbox, GAP * axes.figure.dpi
    inside = Bbox.intersection(spot, area)
    if inside is None or (inside.size < spot.size - 1e-6).any():
        return False
    others = [point for i, point in enumerate(points) if i != own]
    return not spot.padded(2 * gap, gap).count_overlaps(others) and not spot.overlaps(
        points[own]
    )


def svg(figure: Figure) -> str:
    """The figure as SVG text; equal figures give equal text."""
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
