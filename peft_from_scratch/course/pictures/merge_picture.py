"""What requantizing keeps of an update: the threshold, measured and drawn.

    kept(before, after, update)     the share of an update between two weights
    half_kept(q, A, B)              the norm ratio at which half of it survives
    rounding(values, moves, …)      updates on a number line, and their rounding
    shares(series, …)               the share kept against the update's norm
    losses(rows, …)                 a bar for each model

An update survives where it carries a weight beyond the middle between two values of the
codebook. A smaller one is rounded back.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ...nf4 import Quantized, dequantize, quantize
from ...plotting.curves import lines
from ...plotting.draw import frame, legend, point
from ...plotting.theme import BLUE, GREY, LIGHT, ORANGE, PURPLE, SMALL, Theme, style

FOOT = 0.5  # inches under the axes for the ticks and the name of the x axis
ROW = 0.62  # inches from a move to the next, and from a bar to the next
LOWEST, HIGHEST, HALVINGS = 1e-3, 10.0, 12  # of norm ratios in half_kept
FROM, TO, BACK = "before", "after the update", "after rounding"
MARKS = {FROM: (BLUE, "o"), TO: (ORANGE, "D"), BACK: (PURPLE, "s")}


# The measurement ----------------------------------------------------------------------


def kept(before: Tensor, after: Tensor, update: Tensor) -> float:
    """The share of an update that lies between two weights.

        <after - before, update> / ‖update‖²

    Args
        before, after, update  of one shape; update is not zero
    Returns  1 where after = before + update, 0 where after = before
    """
    return (((after - before) * update).sum() / update.square().sum()).item()


def half_kept(q: Quantized, A: Tensor, B: Tensor) -> float:
    """The norm ratio at which requantizing keeps half of an update, by bisection.

        t with kept(W', NF4(W' + ΔW), ΔW) = 1/2,   ΔW = t ‖W'‖ B A / ‖B A‖

    Args
        q     codes of W' (d_out, d_in), with the defaults of nf4.quantize
        A, B  (r, d_in), (d_out, r): the direction of the update
    Returns  t = ‖ΔW‖ / ‖W'‖, between LOWEST and HIGHEST
    """
    W, direction = dequantize(q), B @ A
    direction = direction * (W.norm() / direction.norm())
    low, high = LOWEST, HIGHEST
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        after = dequantize(quantize(W + middle * direction))
        if kept(W, after, middle * direction) < 0.5:
            low = middle
        else:
            high = middle
    return (low * high) ** 0.5


# The pictures -------------------------------------------------------------------------


def rounding(
    values: Sequence[float],
    moves: Mapping[str, tuple[float, float]],
    *,
    title: str,
    subtitle: str = "",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """A row for each move: where a weight is, where an update carries it, its rounding.

    Args
        values  of the codebook, rising: solid lines; the middles are dotted
        moves   {text: (weight, update)}
    Raises   ValueError   fewer than two values, or no moves
    """
    if len(values) < 2 or not moves:
        raise ValueError(
            f"{len(values)} values and {len(moves)} moves: two values are needed, and "
            "one move at least"
        )
    handles = [point(mark, theme, label=name) for name, mark in MARKS.items()]
    with style(theme):
        room = legend(frame("", "", width, 1, FOOT, theme)[0], handles)
        height = ROW * len(moves)
        figure, axes = frame(title, subtitle, width, height, FOOT + room, theme)
        legend(figure, handles)
        _cells(axes, values, len(moves), theme)
        for row, (text, (weight, update)) in enumerate(moves.items()):
            _move(axes, row, text, weight, update, values, theme)
    return figure


def nearest(values: Sequence[float], number: float) -> float:
    """The value that rounding gives; of two equally near ones the lower."""
    return min(values, key=lambda value: (abs(value - number), value))


def _cells(axes: Axes, values: Sequence[float], rows: int, theme: Theme) -> None:
    """A line at each value, and a dotted one in the middle between two."""
    edge = 0.35 * (values[-1] - values[0]) / (len(values) - 1)
    axes.set(xlim=(values[0] - edge, values[-1] + edge), ylim=(rows - 0.35, -0.65))
    axes.set(yticks=[], xlabel="Weight, in units of its block's absmax")
    axes.set_xticks(values, [f"{value:.3g}" for value in values])
    for value in values:
        axes.axvline(value, color=theme.ink, linewidth=1, zorder=0, gid="value")
    for low, high in pairwise(values):
        dots = {"color": theme.muted, "linewidth": 0.9, "linestyle": ":", "zorder": 0}
        axes.axvline((low + high) / 2, gid="middle", **dots)


def _move(axes: Axes, row: int, text: str, weight, update, values, theme) -> None:
    """The text, over three marks and the two arrows between them."""
    moved = weight + update
    end = nearest(values, moved)
    _arrow(axes, weight, moved, row, theme.ink, "-")
    _arrow(axes, moved, end, row + 0.2, theme.muted, "--")
    for x, y, name in ((weight, row, FROM), (moved, row, TO), (end, row + 0.2, BACK)):
        axes.add_line(point(MARKS[name], theme, [x], [y], gid=name, zorder=3))
    box = {"facecolor": theme.paper, "edgecolor": "none", "pad": 1}
    place = {"ha": "left", "va": "center", "size": SMALL, "bbox": box, "zorder": 2}
    axes.text(axes.get_xlim()[0], row - 0.36, text, **place)


def _arrow(axes: Axes, start: float, end: float, y: float, color: str, dash: str):
    look = {"arrowstyle": "->", "color": color, "linestyle": dash, "linewidth": 1.3}
    axes.annotate("", (end, y), (start, y), arrowprops=look, zorder=1)


def shares(
    series: Mapping[str, Sequence[Sequence[float]]],
    *,
    control: str,
    title: str,
    subtitle: str = "",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """The share of the update that is kept, against the update's norm.

    Args
        series   {label: [(norm, share) or (norm, share, low, high), …]}, both in %
        control  the label that is grey
    """
    figure = lines(
        series,
        x="Norm of the update, % of the weight's norm",
        y="Share of the update that is kept, %",
        title=title,
        subtitle=subtitle,
        control=[control],
        log="x",
        names="foot",
        width=width,
        theme=theme,
    )
    axes = figure.axes[0]
    axes.axhline(50, color=theme.muted, linewidth=0.8, linestyle=":", gid="half")
    axes.set_yticks(range(0, 101, 25))
    axes.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    return figure


def losses(
    rows: Mapping[str, Sequence[float]],
    *,
    title: str,
    subtitle: str = "",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """A bar for each model, from zero to the mean of its losses; a dot for each loss.

    Args
        rows  {label: losses, nats per token}
    Raises   ValueError   no rows, or a row without a loss
    """
    if not rows or not all(len(row) for row in rows.values()):
        raise ValueError(f"rows {dict(rows)}: one is needed, and a loss in each")
    with style(theme):
        figure, axes = frame(title, subtitle, width, 0.5 * len(rows), FOOT, theme)
        for y, (label, row) in enumerate(rows.items()):
            mean = sum(row) / len(row)
            axes.barh(y, mean, 0.36, color=GREY, edgecolor=theme.ink, linewidth=0.5)
            axes.add_line(point((BLUE, "o"), theme, row, [y] * len(row), markersize=4))
            axes.text(0, y - 0.24, f"{label}: {mean:.2f}", size=SMALL, va="bottom")
        axes.set(ylim=(len(rows) - 0.6, -0.75), yticks=[])
        axes.set_xlabel("Test loss, nats per token")
        axes.set_xlim(0, 1.05 * max(max(row) for row in rows.values()))
    return figure
