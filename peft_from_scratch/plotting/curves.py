"""The figures that lessons are made of: curves, points, spectra, bytes.

    lines(series, …)      y against x, a band around each line
    points(series, …)     one point a method, with its interval
    spectrum(ranks, …)    how much of a matrix its first k singular values hold
    bars(rows, …)         bytes, stacked by what holds them

What is compared has a color and a marker, the control is grey. A method has the same
look as in every other figure; anything else takes looks that the methods beside it do
not have. Each axis names its unit. Names stand beside the lines and points where they
fit, else in a legend at the foot.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter

from ..methods import METHODS
from .draw import (
    frame,
    interval,
    legend,
    name_stacks,
    name_y,
    point,
    spread,
    stack,
)
from .labels import place_labels
from .theme import (
    AMBER,
    BLUE,
    BROWN,
    GREY,
    LIGHT,
    LOOKS,
    MARKERS,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    SMALL,
    Theme,
    look,
    style,
)

FOOT = 0.55  # inches under the axes for the ticks and the name of the x axis
OTHERS = (BLUE, ORANGE, PURPLE, AMBER, RED, BROWN, SKY)  # no grey: that is control's
DASHES = ("-", "--", "-.", ":")
LEADER = 0.16  # inches from a line's end to its name
BY_LABEL = {method.label: method.name for method in METHODS}
Mark = tuple[str, str]  # color, marker
HOLDERS = {  # of bytes, in the order in which they are stacked
    "weights": GREY,
    "gradients": ORANGE,
    "master": BROWN,
    "optimizer": PURPLE,
    "activations": SKY,
}


def marks(
    labels: Sequence[str],
    control: Collection[str] = (),
    keys: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Mark]:
    """Each label's (color, marker), no two the same.

    A label that is a method's name or label has that method's look; controls are grey.

    Args
        keys  {label: key of plotting.LOOKS} for other labels
    """
    for name in control:
        if name not in labels:
            raise ValueError(f"control {name!r} is no series: {', '.join(labels)}")
    chosen: dict[str, Mark] = {}
    for label in labels:
        key = keys.get(label) or BY_LABEL.get(label, label)
        if key in LOOKS and label not in control and look(key) not in chosen.values():
            chosen[label] = look(key)
    colors = [c for c in OTHERS if c not in {color for color, _ in chosen.values()}]
    shapes = [m for m in MARKERS if m not in {marker for _, marker in chosen.values()}]
    others = [label for label in labels if label not in chosen]
    for label in sorted(others, key=lambda label: label in control):
        place, grey = len(chosen), label in control
        color = GREY if grey else (colors or OTHERS)[place % len(colors or OTHERS)]
        chosen[label] = color, (shapes or MARKERS)[place % len(shapes or MARKERS)]
    return {label: chosen[label] for label in labels}


def lines(
    series: Mapping[str, Sequence[Sequence[float]]],
    *,
    x: str,
    y: str,
    title: str,
    subtitle: str = "",
    control: Collection[str] = (),
    keys: Mapping[str, str] = MappingProxyType({}),
    log: str = "",
    names: str = "ends",
    width: float = 7.4,
    height: float = 2.8,
    theme: Theme = LIGHT,
) -> Figure:
    """A line through each series, with a band where it has intervals.

    Args
        series   {label: [(x, y) or (x, y, low, high), …]}
        x, y     what is on the axes, and its unit: "Loss, nats per token"
        control  labels whose lines are grey and dashed
        keys     {label: key of plotting.LOOKS}, where the label is no method's
        log      "", "x", "y" or "xy"
        names    "ends": beside the lines' ends, where they fit; "foot": in a legend
        width    inches; 4.2 suits a phone
    Raises   ValueError   an axis without a unit, no points, a control not in series
    """

    _demand(series, x, y)
    looks = marks(list(series), control, keys)
    small = {"markersize": 5 if max(map(len, series.values())) < 40 else 0}
    styles = {
        label: {
            "linestyle": "--" if label in control else DASHES[i // len(OTHERS) % 4],
            "linewidth": 1.5,
            "label": label,
        }
        for i, label in enumerate(series)
    }

    def draw(axes: Axes) -> None:
        for label, rows in series.items():
            xs, ys, *ends = zip(*rows, strict=True)
            color = looks[label][0]
            if ends:
                axes.fill_between(xs, *ends, color=color, alpha=0.2, linewidth=0)
            more = styles[label] | small
            axes.add_line(point(looks[label], theme, xs, ys, **more))
        _scale(axes, [row[0] for rows in series.values() for row in rows])

    def name(axes: Axes) -> bool:
        return names == "ends" and _name_ends(axes, series, theme)

    with style(theme):
        handles = [point(looks[k], theme, **styles[k] | small) for k in series]
        page = _Page(title, subtitle, x, y, log, width, height, theme)
        return page.filled(handles, draw, name)


def points(
    series: Mapping[str, Sequence[float]],
    *,
    x: str,
    y: str,
    title: str,
    subtitle: str = "",
    control: Collection[str] = (),
    log: str = "x",
    width: float = 7.4,
    height: float = 2.8,
    theme: Theme = LIGHT,
) -> Figure:
    """A point for each label with its interval, e.g. quality against size.

    Args
        series   {label: (x, y, low, high)}
        others   as for `lines`
    """
    _demand({label: [row] for label, row in series.items()}, x, y)
    looks, covered = marks(list(series), control), {}

    def draw(axes: Axes) -> None:
        for place, _, low, high in series.values():
            axes.update_datalim([(place, low), (place, high)])
        axes.margins(0.18, 0.12)
        _scale(axes, [row[0] for row in series.values()], at_data=False)
        for label, row in series.items():
            covered[label] = interval(axes, *row, looks[label], theme)

    def name(axes: Axes) -> bool:
        return place_labels(axes, list(series), [covered[label] for label in series])

    with style(theme):
        page = _Page(title, subtitle, x, y, log, width, height, theme)
        handles = [point(mark, theme, label=k) for k, mark in looks.items()]
        return page.filled(handles, draw, name)


def spectrum(
    ranks: Sequence[int],
    energies: Mapping[str, Sequence],
    *,
    title: str,
    subtitle: str = "",
    control: Collection[str] = ("random",),
    mark_at: float | None = 0.9,
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """Energy of matrices against rank: what their best approximations of rank k hold.

    Args
        ranks     1, 2, 4, …
        energies  {label: shares of the squared norm at each rank, in [0, 1]; or three
                  such rows: low, middle, high}
        control   the grey ones
        mark_at   a share to mark with a line; None: none
    """
    series = {}
    for label, shares in energies.items():
        rows = [shares] if isinstance(shares[0], int | float) else shares
        middle = rows[len(rows) // 2]
        columns = [middle] if len(rows) == 1 else [middle, rows[0], rows[-1]]
        percents = [[100 * share for share in column] for column in columns]
        series[label] = list(zip(ranks, *percents, strict=True))
    figure = lines(
        series,
        x="Rank k, singular values kept",
        y="Energy, % of the squared norm",
        title=title,
        subtitle=subtitle,
        control=[label for label in control if label in series],
        log="x",
        names="foot",  # all lines end at 100 %
        width=width,
        theme=theme,
    )
    axes = figure.axes[0]
    axes.set_ylim(-3, 103)
    if mark_at is not None:
        dots = {"color": theme.muted, "linewidth": 0.8, "linestyle": ":", "zorder": 0}
        axes.axhline(100 * mark_at, gid="held", **dots)
    return figure


def bars(
    rows: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    subtitle: str = "",
    kinds: Mapping[str, str] = HOLDERS,
    unit: str | None = None,
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """A bar of bytes for each row, stacked by what holds them, its sum beside its name.

    Args
        rows   {label: {kind: bytes}}
        kinds  {kind: color}, in the order of stacking
        unit   "kB", "MB" or "GB"; None: the largest that leaves the largest sum over 1
    Raises   ValueError   a kind that `kinds` does not have
    """
    unknown = {kind for row in rows.values() for kind in row} - set(kinds)
    if unknown or not rows:
        raise ValueError(f"no rows, or kinds {unknown}; allowed are {', '.join(kinds)}")
    sums = {label: sum(row.values()) for label, row in rows.items()}
    powers = {"GB": 9, "MB": 6, "kB": 3}
    unit = unit or next((u for u, p in powers.items() if max(sums.values()) >= 10**p))
    size, raised = 10.0 ** powers[unit], str.maketrans("0369", "⁰³⁶⁹")
    used = {k: c for k, c in kinds.items() if any(row.get(k) for row in rows.values())}
    with style(theme):
        tall = 0.45 * len(rows) + 0.1
        figure, axes = frame(title, subtitle, width, tall, FOOT, theme)
        for i, (label, row) in enumerate(rows.items()):
            stack(axes, i, {k: n / size for k, n in row.items()}, used, theme)
            total = f"{label}: {sums[label] / size:,.3g} {unit}"
            axes.text(0, i - 0.26, total, size=SMALL)
        axes.set_ylim(len(rows) - 0.5, -0.65)
        axes.set_yticks([])
        axes.set_xlim(0, 1.03 * max(sums.values()) / size)  # room for the longest
        axes.set_xlabel(f"{unit} (10{str(powers[unit]).translate(raised)} bytes)")
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.grid(axis="x")
        name_stacks(axes, list(used))
    return figure


# How a page is filled -----------------------------------------------------------------


def _demand(series: Mapping[str, Sequence], x: str, y: str) -> None:
    """Refuse axes without a unit, and series without points or not finite."""
    for axis, name in (("x", x), ("y", y)):
        what, _, unit = name.partition(", ")
        if not (what.strip() and unit.strip()):
            raise ValueError(
                f"{axis}={name!r} names no unit: write it after a comma, as in "
                "'Loss, nats per token' or 'Steps, count'"
            )
    if not series:
        raise ValueError("no series to draw")
    for label, rows in series.items():
        if not len(rows) or not all(math.isfinite(n) for row in rows for n in row):
            raise ValueError(f"series {label!r} is empty or not finite: {list(rows)}")


@dataclass
class _Page:
    """Title, axes and their names; and where the names of the series go."""

    title: str
    subtitle: str
    x: str
    y: str
    log: str
    width: float
    height: float
    theme: Theme

    def filled(self, handles: Sequence[Line2D], draw: Callable, name: Callable):
        """The figure; the handles at its foot if `name` finds no room for the names."""
        figure, axes = self._empty(FOOT)
        draw(axes)
        if name(axes):
            return figure
        room = legend(figure, handles)
        figure, axes = self._empty(FOOT + room)
        draw(axes)
        legend(figure, handles)
        return figure

    def _empty(self, below: float) -> tuple[Figure, Axes]:
        figure, axes = frame(
            self.title, self.subtitle, self.width, self.height, below, self.theme
        )
        axes.set_xscale("log" if "x" in self.log else "linear")
        axes.set_yscale("log" if "y" in self.log else "linear")
        if "y" in self.log:  # "2", where little more than a decade is shown
            axes.yaxis.set_minor_formatter(LogFormatter())
        for side in "xy":
            if side not in self.log:  # "1e9" alone over the axis would be overlooked
                axes.ticklabel_format(axis=side, style="plain", useOffset=False)
        axes.set_xlabel(self.x)
        name_y(axes, self.y)
        axes.grid(axis="y")
        return figure, axes


def _scale(axes: Axes, xs: Collection[float], *, at_data: bool = True) -> None:
    """Limits from the data; room for the y ticks; x ticks that stay apart.

    A logarithmic axis with few places, such as a grid of rates, has its ticks there.
    """
    axes.autoscale_view()
    places = sorted(set(xs))
    if len(places) == 1:
        (x,), log = places, axes.get_xscale() == "log"
        axes.set_xlim((x / 4, x * 4) if log else (x - 1, x + 1))
    grid = at_data or places[-1] < 10 * places[0]  # else decades will do
    if grid and axes.get_xscale() == "log" and len(places) <= 16:
        axes.set_xticks(places, [_number(n) for n in places])
        axes.minorticks_off()
        apart, right = [], -math.inf
        for n, tick in zip(places, axes.get_xticklabels(), strict=True):
            box = tick.get_window_extent()
            if box.x0 > right + 8:
                apart, right = [*apart, n], box.x1
        axes.set_xticks(apart, [_number(n) for n in apart])
    axes.figure.canvas.draw()  # puts the ticks where they belong
    # Within one decade of a logarithmic axis, all labels may be those of minor ticks.
    boxes = [tick.get_window_extent() for tick in axes.get_yticklabels(which="both")]
    inside = (box.x0 for box in boxes if axes.bbox.y0 - 9 < box.y0 < axes.bbox.y1)
    left = min(inside, default=math.inf)
    lacking = max(0.0, 4 - left) / axes.figure.bbox.width
    box = axes.get_position()
    axes.set_position((box.x0 + lacking, box.y0, box.width - lacking, box.height))


def _number(number: float) -> str:
    if number >= 1000:
        return f"{number:,.0f}"
    if number >= 0.01:
        return f"{number:.3g}"
    digits, exponent = f"{number:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _name_ends(axes: Axes, series: Mapping[str, Sequence], theme: Theme) -> bool:
    """Write each label right of its line's end; False, and nothing done, if no room."""
    figure = axes.figure
    last = [rows[-1][:2] for rows in series.values()]
    texts = [figure.text(0, 0, label, size=SMALL, gid="label") for label in series]
    sizes = [text.get_window_extent() for text in texts]
    room = max(box.width for box in sizes) / figure.dpi + LEADER
    tall = 1.15 * max(box.height for box in sizes)
    fits = room < figure.get_figwidth() / 3 and tall * len(texts) < axes.bbox.height
    if not fits or len({x for x, _ in last}) > 1:
        for text in texts:
            text.remove()
        return False
    box, share = axes.get_position(), room / figure.get_figwidth()
    axes.set_position((box.x0, box.y0, box.width - share, box.height))
    ends = axes.transData.transform(last)
    start, end = ends[0][0] + 5, axes.bbox.x1 + LEADER * figure.dpi
    heights = spread([y for _, y in ends], tall)
    up = max(0.0, axes.bbox.y0 - min(heights)) or min(0.0, axes.bbox.y1 - max(heights))
    for text, (_, y), height in zip(texts, ends, heights, strict=True):
        at = [(start, y), (end - 3, height + up)]
        xs, ys = zip(*figure.dpi_scale_trans.inverted().transform(at), strict=True)
        inches = {"transform": figure.dpi_scale_trans, "gid": "leader"}
        figure.add_artist(Line2D(xs, ys, color=theme.muted, linewidth=0.6, **inches))
        text.set(transform=figure.dpi_scale_trans, va="center")
        text.set_position((xs[1] + 0.03, ys[1]))
    return True
