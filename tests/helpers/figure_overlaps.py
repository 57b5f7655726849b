"""What every figure keeps: no text lies over another."""

import itertools

from matplotlib.transforms import Bbox


def boxes(figure) -> list[Bbox]:
    """What must not overlap, and must be on the page."""
    figure.canvas.draw()
    axes = figure.axes[0]
    texts = [*figure.texts, *axes.texts, axes.xaxis.label]
    texts += [axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        texts += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    found = [text.get_window_extent() for text in texts if text.get_text()]
    boxes = [*figure.legends, axes.get_legend()]
    return found + [box.get_window_extent() for box in boxes if box]


def assert_apart(figure, kept: dict | None = None) -> None:
    """No two boxes share a pixel, and none leaves the page; `kept` instead of boxes."""
    named = kept or dict(enumerate(boxes(figure)))
    whole = figure.bbox.padded(0.5)
    for (a, one), (b, other) in itertools.combinations(named.items(), 2):
        shared = Bbox.intersection(one, other)
        assert shared is None or min(shared.size) < 0.5, (a, b)
    for name, box in named.items():
        assert whole.contains(*box.min) and whole.contains(*box.max), name
