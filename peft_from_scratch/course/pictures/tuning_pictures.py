"""Pictures of what a setting does: learning rates, sizes of updates, targets.

    rate_grid(counts, chosen, of=60, …)   every method at every learning rate
    panels({"title": series, …}, …)       one or two sets of curves
    target_rows(shapes, places, …)        where A and B lie in a layer, to scale
    forest(rows, …)                       differences with intervals, and a line at zero

No figure has a number of its own: all of them come from the caller.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from ...plotting.curves import marks
from ...plotting.draw import frame, legend, name_y, point
from ...plotting.theme import BLUE, LIGHT, ORANGE, SMALL, Theme, readable, style

FOOT = 0.55  # inches under the axes for the ticks and the name of the x axis
APART = 0.62  # inches between two panels, with the ticks of the second
ROW = 0.36  # inches, of the grid and of the forest
LOOKS = {"A": BLUE, "B": ORANGE}


# Learning rates -----------------------------------------------------------------------


def rate_grid(
    counts: Mapping[str, Mapping[float, int]],
    chosen: Mapping[str, float],
    *,
    of: int,
    shared: float,
    title: str,
    subtitle: str = "",
    width: float = 6.4,
    theme: Theme = LIGHT,
) -> Figure:
    """A row for each method, a column for each learning rate, the share right inside.

    Args
        counts  {method: {learning rate: rows right}}
        chosen  {method: its own best learning rate}: bold, with a star and a frame
        of      rows in all
        shared  a learning rate whose column has a dashed frame
    Raises   ValueError  a chosen rate at which its method has no run
    """
    for method, rate in chosen.items():
        if rate not in counts.get(method, {}):
            raise ValueError(f"{method} has no run at its chosen rate {rate}")
    rates = sorted({rate for by_rate in counts.values() for rate in by_rate})
    with style(theme):
        figure, axes = frame(title, subtitle, width, ROW * len(counts), FOOT, theme)
        _rows(axes, list(counts))
        axes.set(xlim=(-0.5, len(rates) - 0.5), xlabel="Learning rate")
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        for y, (method, by_rate) in enumerate(counts.items()):
            for x, rate in enumerate(rates):
                best = rate == chosen.get(method)
                share = by_rate[rate] / of if rate in by_rate else None
                _entry(axes, x, y, share, theme, best=best)
        column = rates.index(shared) - 0.5, -0.5
        dashes = {"fill": False, "edgecolor": theme.ink, "linestyle": (0, (3, 2))}
        box = Rectangle(column, 1, len(counts), linewidth=1.4, zorder=4, **dashes)
        box.set(clip_on=False, gid="shared")
        axes.add_patch(box)
        _widen_left(axes, list(counts))
    return figure


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", pad=4, labelsize=SMALL)


def _widen_left(axes: Axes, names: Sequence[str]) -> None:
    """Make room for the names of the rows."""
    axes.figure.canvas.draw()
    wide = max(tick.get_window_extent().width for tick in axes.get_yticklabels())
    box, inches = axes.get_position(), wide / axes.figure.dpi + 0.2
    left = inches / axes.figure.get_figwidth()
    axes.set_position((left, box.y0, box.x1 - left, box.height))


def _entry(
    axes: Axes, x: int, y: int, share: float | None, theme: Theme, *, best: bool
) -> None:
    """One cell: darker where more is right; empty where nothing was run."""
    shades = LinearSegmentedColormap.from_list("right", [theme.paper, BLUE])
    color = theme.paper if share is None else shades(0.85 * share**2)
    edge = theme.ink if best else theme.faint
    box = Rectangle((x - 0.47, y - 0.44), 0.94, 0.88, facecolor=color, edgecolor=edge)
    box.set(linewidth=1.8 if best else 0.8, zorder=3 if best else 2)
    box.set(gid="best" if best else "cell")
    axes.add_patch(box)
    words = "not run" if share is None else f"{100 * share:.0f} %{' ★' if best else ''}"
    ink = theme.muted if share is None else readable(_hex(color))
    look = {"color": ink, "weight": "bold" if best else "normal", "size": SMALL}
    axes.text(x, y, words, ha="center", va="center", zorder=5, **look)


def _hex(color) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in color[:3])


# Curves -------------------------------------------------------------------------------


def panels(
    sides: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    *,
    x: Sequence[str],
    y: Sequence[str],
    title: str,
    subtitle: str = "",
    control: Sequence[str] = (),
    log: Sequence[str] = ("x", "x"),
    same_y: bool = False,
    width: float = 6.4,
    height: float = 1.9,
    theme: Theme = LIGHT,
) -> Figure:
    """One or two sets of curves beside each other; equal labels have equal looks.

    Args
        sides    {title of the panel: {label: [(x, y) or (x, y, low, high), …]}}
        x, y     of each panel, what is on the axes, and its unit
        control  labels whose curves are grey and dashed
        log      of each panel: "", "x", "y" or "xy"; a linear y axis starts at zero
        same_y   both panels have the same limits of y
    """
    labels = list(dict.fromkeys(label for side in sides.values() for label in side))
    looks = marks(labels, control)
    dashes = {label: "--" if label in control else "-" for label in labels}
    with style(theme):
        handles = [
            point(looks[k], theme, label=k, linestyle=dashes[k], markersize=5)
            for k in labels
        ]
        room = legend(frame("", "", width, 1, FOOT, theme)[0], handles)
        page = frame(title, subtitle, width, height + 0.2, FOOT + room, theme)
        figure, both = page[0], _columns(page[1], len(sides))
        legend(figure, handles)
        for i, (axes, (name, side)) in enumerate(zip(both, sides.items(), strict=True)):
            _scales(axes, log[i], x[i], y[i], name)
            for label, rows in side.items():
                _curve(axes, rows, looks[label], dashes[label], theme)
            _finish(axes, log[i], side)
        if same_y:
            ends = [end for axes in both for end in axes.get_ylim()]
            for axes in both:
                axes.set_ylim(min(ends), max(ends))
    return figure


def _columns(axes: Axes, count: int) -> list[Axes]:
    """The axes cut into one or two, with the ticks of the second between them."""
    box, figure = axes.get_position(), axes.figure
    apart = APART / figure.get_figwidth() * (count - 1)
    wide, tall = (box.width - apart) / count, box.height - 0.2 / figure.get_figheight()
    axes.set_position((box.x0, box.y0, wide, tall))
    if count == 1:
        return [axes]
    return [axes, figure.add_axes((box.x0 + wide + apart, box.y0, wide, tall))]


def _scales(axes: Axes, log: str, x: str, y: str, name: str) -> None:
    axes.set_xscale("log" if "x" in log else "linear")
    axes.set_yscale("log" if "y" in log else "linear")
    axes.set_xlabel(x)
    name_y(axes, y)
    over = {"weight": "bold", "size": 9, "transform": axes.transAxes}
    axes.text(0, 1.13, name, **over)
    axes.grid(axis="y")


def _curve(axes: Axes, rows, mark, dash: str, theme: Theme) -> None:
    xs, ys, *ends = zip(*rows, strict=True)
    if ends:
        axes.vlines(xs, *ends, color=mark[0], linewidth=2.2, alpha=0.55, gid="range")
    axes.add_line(point(mark, theme, xs, ys, linestyle=dash, markersize=5))


def _finish(axes: Axes, log: str, side: Mapping) -> None:
    """Limits from the data, and ticks as plain numbers."""
    axes.autoscale_view()
    places = sorted({row[0] for rows in side.values() for row in rows})
    if "x" in log:
        _plain_ticks(axes.xaxis)
    if len(places) <= 8:
        axes.set_xticks(places, [f"{n:g}" for n in places])
    if "y" in log:
        _plain_ticks(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _plain_ticks(axis: Axis) -> None:
    """0.1, 0.3, 1, 3, … on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


# Targets ------------------------------------------------------------------------------


def target_rows(
    shapes: Mapping[str, tuple[int, int]],
    places: Mapping[str, tuple[Sequence[str], int]],
    *,
    title: str,
    subtitle: str = "",
    width: float = 6.4,
    theme: Theme = LIGHT,
) -> Figure:
    """The projections of a layer once for each choice, with A and B on the targets.

    All sides are to scale, so equal colored areas are equal numbers of parameters. The
    longer side of a projection lies across; A lies along d_in, B along d_out.

    Args
        shapes  {projection: (d_out, d_in)}
        places  {label: (targets, rank)}
    Raises   ValueError  a target that is no projection
    """
    known = [set(targets) - set(shapes) for targets, _ in places.values()]
    if unknown := set().union(*known):
        raise ValueError(f"{sorted(unknown)} are none of {', '.join(shapes)}")
    long = [max(shape) for shape in shapes.values()]
    tall = max(min(shape) for shape in shapes.values())
    thick = max(r for _, r in places.values())
    gap, line = 3.2 * thick, 0.62 * tall
    across, down = sum(long) + gap * len(long), tall + 2 * line
    with style(theme):
        handles = _handles(theme)
        inches = (width - 0.6) * down * len(places) / across
        room = legend(frame("", "", width, 1, 0.1, theme)[0], handles) + 0.05
        figure, axes = frame(title, subtitle, width, inches, room, theme)
        legend(figure, handles)
        axes.set(xlim=(-gap / 2, across - gap / 2), ylim=(down * len(places), 0))
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.spines["bottom"].set_visible(False)
        for row, (label, (targets, r)) in enumerate(places.items()):
            top = row * down + line
            axes.text(0, top - 0.3 * line - thick, label, size=SMALL, weight="bold")
            _layer(axes, top, shapes, targets, r, gap, theme)
        _name_weights(axes, line, shapes, gap)
    return figure


def _handles(theme: Theme) -> list[Patch]:
    base = Patch(facecolor=theme.faint, edgecolor=theme.muted, label="frozen weight")
    names = {"A": "A, along the input side", "B": "B, along the output side"}
    own = [
        Patch(facecolor=color, edgecolor=theme.ink, label=names[name])
        for name, color in LOOKS.items()
    ]
    return [base, *own]


def _layer(axes: Axes, top: float, shapes, targets, r: int, gap: float, theme) -> None:
    """One copy of the layer: all weights in grey, and A and B on those of `targets`."""
    left = 0.0
    for name, (d_out, d_in) in shapes.items():
        wide, tall = max(d_out, d_in), min(d_out, d_in)
        frozen = {"facecolor": theme.faint, "edgecolor": theme.muted, "linewidth": 0.7}
        axes.add_patch(Rectangle((left, top), wide, tall, gid="frozen", **frozen))
        if name in targets:
            lies, stands = ("A", "B") if d_in >= d_out else ("B", "A")
            _strip(axes, lies, (left, top - r), wide, r, theme)
            _strip(axes, stands, (left - r, top), r, tall, theme)
        left += wide + gap


def _name_weights(axes: Axes, top: float, shapes: Mapping, gap: float) -> None:
    """The names of the projections, in the first copy of the layer."""
    left = 0.0
    for name, shape in shapes.items():
        middle = left + max(shape) / 2, top + min(shape) / 2
        axes.text(*middle, name, ha="center", va="center", size=7.5)
        left += max(shape) + gap


def _strip(axes: Axes, name: str, corner, wide: float, tall: float, theme) -> None:
    look = {"facecolor": LOOKS[name], "edgecolor": theme.ink, "linewidth": 0.3}
    axes.add_patch(Rectangle(corner, wide, tall, gid=name, **look))


# Differences --------------------------------------------------------------------------


def forest(
    rows: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    x: str,
    sides: tuple[str, str],
    title: str,
    subtitle: str = "",
    width: float = 6.4,
    theme: Theme = LIGHT,
) -> Figure:
    """Differences with their intervals, a row for each group, and a grey line at zero.

    Args
        rows   {group: {series: (difference, low, high)}}
        x      what is on the axis, and its unit
        sides  what a place left of zero means, and one right of it
    """
    names = list(dict.fromkeys(name for group in rows.values() for name in group))
    looks = marks(names)
    with style(theme):
        handles = [point(looks[name], theme, label=name) for name in names]
        room = legend(frame("", "", width, 1, FOOT, theme)[0], handles)
        tall = ROW * len(rows) * max(1, 0.6 * len(names))
        figure, axes = frame(title, subtitle, width, tall, FOOT + room, theme)
        legend(figure, handles)
        _rows(axes, list(rows))
        axes.axvline(0, color=theme.muted, linestyle="--", linewidth=1, gid="zero")
        lifts = np.linspace(-0.2, 0.2, len(names)) if len(names) > 1 else [0.0]
        for y, group in enumerate(rows.values()):
            for name, lift in zip(names, lifts, strict=True):
                if name in group:
                    _dot(axes, y + lift, group[name], looks[name], theme)
        axes.set_xlabel(x)
        axes.autoscale_view(scaley=False)
        axes.grid(axis="x")
        for side, place in zip(sides, (0, 1), strict=True):
            where = {"transform": axes.transAxes, "color": theme.muted, "size": SMALL}
            axes.text(place, 1.02, side, ha=("left", "right")[place], **where)
        _widen_left(axes, list(rows))
    return figure


def _dot(axes: Axes, y: float, values: Sequence[float], mark, theme: Theme) -> None:
    value, low, high = values
    axes.hlines(y, low, high, color=theme.muted, linewidth=1.5, gid="interval")
    axes.add_line(point(mark, theme, [value], [y], clip_on=False))
