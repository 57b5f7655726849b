"""The figures of a comparison: quality against size, and memory by what holds it."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from ..plotting import curves
from ..plotting.draw import (
    APART,
    frame,
    interval,
    legend,
    name_stacks,
    name_y,
    point,
    spread,
    stack,
)
from ..plotting.labels import place_labels
from ..plotting.theme import (
    BLUE,
    GREY,
    LIGHT,
    ORANGE,
    PURPLE,
    SKY,
    SMALL,
    Theme,
    look,
    style,
)
from ..training.config import History
from . import apart, findings
from .columns import megabytes, score_words

KINDS = {"weights": GREY, "gradients": ORANGE, "optimizer": PURPLE, "activations": SKY}
FOOT = 0.55  # inches under the axes for the ticks and the name of the x axis
END = 0.2  # inches between the ends of the parameter axis and what stands on it


def quality_against_parameters(
    result: dict, *, width: float = 7.4, theme: Theme = LIGHT
) -> Figure:
    """Exact match with 95 % intervals, against trainable parameters.

    Rows that train nothing stand at 0, left of a break in the logarithmic axis. Labels
    stand beside the points, or in a legend if they do not all fit.

    Args
        result  of compare.compare
        width   inches; 4.2 suits a phone
    """
    rows = [r for r in apart.measured(result) if r.get("trainable") is not None]
    with style(theme):
        figure, axes, points = _quality(result, rows, width, FOOT, theme)
        if place_labels(axes, [_lettered(row) for row in rows], points):
            return figure
        handles = [point(look(row["key"]), theme, label=_lettered(row)) for row in rows]
        room = legend(figure, handles)
        figure, *_ = _quality(result, rows, width, FOOT + room, theme)
        legend(figure, handles)
        return figure


def _lettered(row: dict) -> str:
    """The row's name, and the letters that it shares with what is not told apart."""
    return f"{row['label']} ({row['letters']})" if row.get("letters") else row["label"]


def _quality(
    result: dict, rows: Sequence[dict], width: float, below: float, theme: Theme
) -> tuple[Figure, Axes, list[Bbox]]:
    """The figure without its labels, and the pixels that each point covers."""
    few_shot = apart.reference(result)
    band = " Grey band: few-shot's." if few_shot else ""
    lettered = any(row.get("letters") for row in rows)
    letters = " A shared letter: not told apart." if lettered else ""
    figure, axes = frame(
        findings.best(result),
        f"Bars: 95 % intervals.{band}{letters} Coinciding points stand side by side.",
        width,
        3.4,
        below,
        theme,
    )
    _percent_axis(axes, score_words(result)[0])
    if few_shot:
        _, low, high = _percents(few_shot)
        axes.axhspan(low, high, color=theme.faint, alpha=0.6, linewidth=0, zorder=0)
    places = _parameter_axis(axes, [row["trainable"] for row in rows], theme)
    points = [
        interval(axes, x, *_percents(row), look(row["key"]), theme)
        for x, row in zip(_side_by_side(places, rows), rows, strict=True)
    ]
    return figure, axes, points


def _percents(row: dict) -> list[float]:
    return [100 * row["exact"][end] for end in ("rate", "low", "high")]


def _percent_axis(axes: Axes, name: str) -> None:
    axes.set_ylim(-4, 104)  # whole markers at 0 and at 100
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y")
    name_y(axes, f"{name}, %")


def _parameter_axis(axes: Axes, counts: Sequence[int], theme: Theme) -> list[float]:
    """Draw the axis of trainable parameters; return each count's place, in inches."""
    width = axes.bbox.width / axes.figure.dpi
    logs = [math.log10(count) for count in counts if count]
    first, last = math.floor(min(logs, default=0)), math.ceil(max(logs, default=0))
    decades = range(first, max(last, first + 1) + 1) if logs else range(0)
    zero = (0.5 + APART * counts.count(0)) / 2 if logs else width / 2
    start = 2 * zero + END if 0 in counts else END
    decade = (width - start - END) / max(1, len(decades) - 1)
    ticks = {zero: "0"} if 0 in counts else {}
    ticks |= {start + (n - first) * decade: _count(10**n) for n in decades}
    axes.set_xlim(0, width)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel("Trainable parameters")
    if logs and 0 in counts:
        _break(axes, 2 * zero, theme)
    return [start + (math.log10(n) - first) * decade if n else zero for n in counts]


def _break(axes: Axes, x: float, theme: Theme) -> None:
    """Two strokes across the x axis: another scale begins."""
    for left in (x - 0.06, x):
        axes.plot(
            [left, left + 0.06],
            [-0.015, 0.015],
            color=theme.muted,
            linewidth=0.8,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )


def _count(number: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number // size:,} {letter}"
    return str(number)


def _side_by_side(places: Sequence[float], rows: Sequence[dict]) -> list[float]:
    """Places moved apart, only among rows whose intervals share some height."""
    moved = list(places)
    for group in _overlapping([_percents(row) for row in rows]):
        apart = spread([places[i] for i in sorted(group)], APART)
        for i, place in zip(sorted(group), apart, strict=True):
            moved[i] = place
    return moved


def _overlapping(percents: Sequence[Sequence[float]]) -> list[list[int]]:
    """Indices in groups: no interval of one group reaches into another group's."""
    groups, top = [], -math.inf
    marker = 3  # half the height of a point, in percent
    for i in sorted(range(len(percents)), key=lambda i: min(percents[i])):
        if min(percents[i]) - marker > top:
            groups.append([])
        groups[-1].append(i)
        top = max(top, *(end + marker for end in percents[i]))
    return groups


def memory_by_kind(result: dict, *, width: float = 7.4, theme: Theme = LIGHT) -> Figure:
    """Bytes of one step by what holds them, a bar a row, with the peak marked."""
    rows = [row for row in result["rows"] if row.get("memory")]
    with style(theme):
        figure, axes = frame(
            findings.peak_memory(result),
            "Each kind at its own highest moment. Line: the highest sum at one moment.",
            width,
            0.45 * len(rows) + 0.1,
            FOOT,
            theme,
        )
        for i, row in enumerate(rows):
            _bar(axes, i, row, theme)
        axes.set_ylim(len(rows) - 0.5, -0.65)
        axes.set_yticks([])
        axes.set_xlim(left=0)
        axes.set_xlabel("MB (10⁶ bytes)")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(axis="x")
        name_stacks(axes, list(KINDS))
    return figure


def _bar(axes: Axes, i: int, row: dict, theme: Theme) -> None:
    memory = row["memory"]
    sizes = {kind: (memory.get(kind) or 0) / 1e6 for kind in KINDS}
    stack(axes, i, sizes, KINDS, theme)
    if memory.get("peak"):
        axes.vlines(memory["peak"] / 1e6, i - 0.19, i + 0.3, theme.ink, linewidth=2)
    label = f"{row['label']}, {memory['when']}: {megabytes(memory.get('peak'))} MB"
    axes.text(0, i - 0.26, label, size=SMALL)


def loss_against_seconds(
    result: dict, *, width: float = 7.4, theme: Theme = LIGHT
) -> Figure:
    """The training loss of every method, against the seconds that it had trained."""
    series = findings.loss_by_second(result)
    return curves.lines(
        series,
        x="Seconds of training, s",
        y="Training loss, nats per label token",
        title=findings.final_losses(result),
        subtitle=f"Mean of {findings.SMOOTHED} steps, on a logarithmic scale.",
        keys={row["label"]: row["key"] for row in result["rows"]},
        log="y",
        width=width,
        theme=theme,
    )


def training_curve(
    history: History, *, width: float = 7.4, theme: Theme = LIGHT
) -> Figure:
    """Loss at every step, and on the validation rows where they were looked at."""
    validated = " Points: the validation rows." if history.validation else ""
    with style(theme):
        figure, axes = frame(
            findings.training(history),
            "Line: the rows of each optimizer step." + validated,
            width,
            2.6,
            FOOT,
            theme,
        )
        steps = range(1, history.steps + 1)
        axes.plot(steps, history.loss, color=BLUE, linewidth=1)
        if history.validation:
            axes.plot(*zip(*history.validation, strict=True), "o-", color=theme.ink)
        axes.set_ylim(bottom=0)
        name_y(axes, "Loss, nats per label token")
        axes.set_xlabel("Optimizer steps")
        axes.grid(axis="y")
    return figure
