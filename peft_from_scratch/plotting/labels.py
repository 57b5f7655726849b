"""Labels beside points, where all of them fit; a figure without room uses a legend.

A label covers neither another label nor a point.
"""

import math
import textwrap
from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from .theme import SMALL

GAP = 0.05  # inches between a label and any point; sideways to another point, twice


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
