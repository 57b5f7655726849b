"""When a dequantized weight exists: one optimizer step, product by product.

    calls = traced(model, step)     the projection's name for each dequantization
    picture(calls, title=…)         a row for a projection, a column for a call
    most_alive(calls)               weights that plain autograd keeps at once

A dark square is a product: the dequantized weight exists while it is computed. A pale
bar goes from a projection's first product to its last: plain autograd keeps the weight
for all of this time.
"""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import nn

from ...nf4 import NF4Linear
from ...plotting.draw import frame, legend, name_y
from ...plotting.theme import BLUE, LIGHT, ORANGE, SMALL, Theme, style

ROW = 0.085  # inches from a projection to the next
FOOT = 0.5  # inches under the axes for the ticks and the name of the x axis
INSIDE, BETWEEN = "W' exists: a product", "plain autograd would keep W' here, too"
PALE = 0.35  # opacity of the bars between


def traced(model: nn.Module, step: Callable[[], object]) -> list[str]:
    """The names of the projections in four bits, in the order of their use in a step.

    Args
        step  runs forward, backward and optimizer step on `model`; called once
    Returns  a name for each time that a weight is dequantized
    """
    layers: list[NF4Linear] = []
    NF4Linear.on_dequantize.append(layers.append)
    try:
        step()
    finally:
        NF4Linear.on_dequantize.remove(layers.append)
    names = {module: name for name, module in model.named_modules()}
    return [names[layer].removesuffix(".base") for layer in layers]


def spans(calls: Sequence[str]) -> dict[str, tuple[int, int]]:
    """{name: (first, last) of its calls, counted from 1}, in the order of the first."""
    ends: dict[str, tuple[int, int]] = {}
    for place, name in enumerate(calls, 1):
        first, _ = ends.get(name, (place, place))
        ends[name] = first, place
    return ends


def most_alive(calls: Sequence[str]) -> int:
    """The largest number of dequantized weights at a time under plain autograd.

    It keeps each one from the forward product to the backward product. Code that
    dequantizes for each product has one at a time.
    """
    ends = spans(calls).values()
    return max(
        sum(first <= place <= last for first, last in ends)
        for place in range(1, len(calls) + 1)
    )


def picture(
    calls: Sequence[str],
    *,
    title: str,
    subtitle: str = "One optimizer step. A row is a projection, a column is a product.",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """A square for each call, a bar between the first and the last call of a row.

    Raises  ValueError  no calls
    """
    if not calls:
        raise ValueError("no calls: the step dequantized nothing, so nothing is drawn")
    ends = spans(calls)
    handles = [
        Patch(facecolor=BLUE, edgecolor=theme.ink, label=INSIDE),
        Patch(facecolor=ORANGE, alpha=PALE, label=BETWEEN),
    ]
    with style(theme):
        room = legend(frame("", "", width, 1, FOOT, theme)[0], handles)
        height = ROW * (len(ends) + 1)
        figure, axes = frame(title, subtitle, width, height, FOOT + room, theme)
        legend(figure, handles)
        for row, (first, last) in enumerate(ends.values()):
            _bar(axes, row, first, last)
        for place, name in enumerate(calls, 1):
            _square(axes, place, list(ends).index(name), theme)
        _name(axes, list(ends), len(calls), theme)
        _mark_turn(axes, max(first for first, _ in ends.values()), theme)
    return figure


def _bar(axes: Axes, row: int, first: int, last: int) -> None:
    corner = first - 0.5, row - 0.5
    look = {"facecolor": ORANGE, "alpha": PALE, "linewidth": 0, "gid": "between"}
    axes.add_patch(Rectangle(corner, last - first + 1, 1, **look))


def _square(axes: Axes, place: int, row: int, theme: Theme) -> None:
    look = {"facecolor": BLUE, "edgecolor": theme.ink, "linewidth": 0.6}
    axes.add_patch(Rectangle((place - 0.5, row - 0.5), 1, 1, gid="product", **look))


def _name(axes: Axes, names: list[str], calls: int, theme: Theme) -> None:
    """Name each layer beside its first projection; a line above it."""
    axes.set(xlim=(0.3, calls + 0.7), ylim=(len(names) - 0.4, -0.6))
    layers = [name.partition("layers.")[2].partition(".")[0] for name in names]
    firsts = [row for row, layer in enumerate(layers) if layer not in layers[:row]]
    ends = [*firsts[1:], len(names)]
    middles = [(a + b - 1) / 2 for a, b in zip(firsts, ends, strict=True)]
    axes.set_yticks(middles, [layers[row] for row in firsts])
    name_y(axes, "Layer")
    for row in firsts[1:]:
        axes.axhline(row - 0.5, color=theme.faint, linewidth=0.8, zorder=0)
    axes.set_xlabel("Products with a dequantized weight, in their order")


def _mark_turn(axes: Axes, last_forward: int, theme: Theme) -> None:
    """A line between the forward and the backward pass, and their names."""
    line = Line2D([last_forward + 0.5] * 2, axes.get_ylim(), gid="turn")
    line.set(color=theme.muted, linewidth=0.8, linestyle=":")
    axes.add_line(line)
    low, high = axes.get_xlim()
    for left, right, text in (
        (low, last_forward + 0.5, "forward pass"),
        (last_forward + 0.5, high, "backward pass"),
    ):
        axes.text((left + right) / 2, -0.9, text, size=SMALL, ha="center", va="bottom")
