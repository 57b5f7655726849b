"""Pictures of soft prompts and prefixes, drawn from a lesson's own tensors.

    padded_rows(mask, n, {"right": positions, …}, title=…)   P before a padded batch
    score_tables(plain, prefixed, query=2, pair=(0, 1), …)   attention and its ratios
    shares({"prefix": {model: %}}, {"prefix": %}, …)         size against length
    leave_one_out(costs, together, limit=0.1, …)             what each vector is worth
    by_size({"LoRA": runs of each task, …}, …)               loss against size

Shapes and words carry the meaning as well as colors: padding is hollow, a position of
the prefix is named P, and vectors under the limit are hatched.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator
from torch import Tensor

from ...ledger.runs import Run
from ...plotting.curves import FOOT, points
from ...plotting.draw import frame, name_y
from ...plotting.theme import (
    BLUE,
    GREY,
    LIGHT,
    ORANGE,
    PURPLE,
    SKY,
    SMALL,
    Theme,
    look,
    readable,
    style,
)

SOFT = look("prompt")[0]  # the color of what is trained, in all pictures of this file
CELL = 0.42  # inches, the side of a cell of padded_rows
HIGH = 0.34  # inches, a cell of score_tables
WIDEST = 0.52  # inches, its width where there is room
BETWEEN, LABELS = 1.2, 1.6  # cells: between two tables, and for the names of the rows
HUES = (BLUE, ORANGE, PURPLE)  # of models
TIGHT = 0.35  # cells of padded_rows that the page leaves free anyway
HATCH = "////"
POSITIONS = (
    "P: soft prompt. x: token. (): padding. The number in a cell is its position."
)
ROWS = "Attention weights of one head. Each row adds up to 1. Empty cells: the future."
LAST = "The number at a line: the longest prefix or prompt within the bound."
REMOVED = "Each bar: the loss without these vectors, minus the loss with all of them."
CENTERED = {"ha": "center", "va": "center"}
RIGHT = {"ha": "right", "va": "center"}


def padded_rows(
    mask: Tensor,
    n: int,
    positions: Mapping[str, Tensor],
    *,
    title: str,
    subtitle: str = POSITIONS,
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """A row of cells for each row of a batch: n of P, then tokens and padding.

    Args
        mask       (b, t) int64: 1 at tokens, 0 at padding
        positions  {what they are: (b, n + t) int64}; each is written in its cell
    Raises   ValueError   positions of another shape than (b, n + t)
    """
    b, t = mask.shape
    for name, wide in positions.items():
        if wide.shape != (b, n + t):
            raise ValueError(
                f"positions {name!r} have shape {tuple(wide.shape)}; {(b, n + t)} is "
                "needed, one for each of the n vectors and the t places of a row"
            )
    kinds = [["P"] * n + ["x" if one else "." for one in row] for row in mask.tolist()]
    rows = len(positions) * (b + 1)
    with style(theme):
        height = CELL * (rows - TIGHT)
        figure, axes = frame(title, subtitle, width, height, 0.1, theme)
        _bare(axes, (width - 0.6) / CELL, rows, TIGHT)
        for at, (name, numbers) in enumerate(positions.items()):
            top = at * (b + 1)
            axes.text(0, top + 0.85, name, size=SMALL, va="bottom", weight="bold")
            for i, row in enumerate(kinds):
                _cells(axes, top + 1 + i, row, numbers[i].tolist(), theme)
                axes.text(
                    n + t + 0.3, top + 1.5 + i, _row_words(row), size=SMALL, va="center"
                )
    return figure


def _row_words(row: Sequence[str]) -> str:
    """What a row holds: "2 vectors of P, 2 of padding, 2 tokens"."""
    counts = {kind: row.count(kind) for kind in "P.x"}
    padding = f", {counts['.']} places of padding" if counts["."] else ""
    return f"{counts['P']} vectors of P{padding}, {counts['x']} tokens"


def _cells(axes: Axes, top: float, row: Sequence[str], numbers, theme: Theme) -> None:
    """One cell for each place, with its position in it; padding is hollow."""
    colors = {"P": SOFT, "x": SKY, ".": theme.paper}
    for at, (kind, number) in enumerate(zip(row, numbers, strict=True)):
        color = colors[kind]
        edge = {"edgecolor": theme.muted, "linewidth": 0.8, "gid": kind}
        axes.add_patch(Rectangle((at + 0.04, top + 0.04), 0.92, 0.92, fc=color, **edge))
        ink = theme.muted if kind == "." else readable(color)
        text = f"{kind} {number}" if kind != "." else f"({number})"
        axes.text(at + 0.5, top + 0.5, text, size=SMALL, color=ink, **CENTERED)


def _bare(axes: Axes, across: float, down: float, top: float) -> None:
    """No ticks, no spines: the axes are only room, with y downwards."""
    axes.set(xlim=(-0.05, across), ylim=(down, top), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


# ------------------------------------------------------------------ The score tables


def score_tables(
    plain: Tensor,
    prefixed: Tensor,
    *,
    query: int,
    pair: tuple[int, int],
    title: str,
    subtitle: str = ROWS,
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """Attention weights of one head without and with a prefix, side by side.

    Under each table stands the ratio of two tokens' weights, for one query.

    Args
        plain     (t, t): rows are queries, columns are tokens
        prefixed  (t, n + t): the columns of the prefix come first
        query     the row whose ratio is shown
        pair      the two tokens, columns of `plain`; both are before the query or at it
    Raises   ValueError   a pair of which the query does not see both
    """
    if not 0 <= min(pair) <= max(pair) <= query < len(plain):
        raise ValueError(
            f"query={query} does not see both tokens of {pair=}: a query of "
            f"{len(plain)} sees itself and the tokens before it"
        )
    t, n = len(plain), prefixed.shape[1] - len(plain)
    with style(theme):
        across, down = LABELS + 2 * t + n + BETWEEN + 0.05, t + 3.2
        across = max(across, (width - 0.6) / WIDEST)
        figure, axes = frame(title, subtitle, width, HIGH * down, 0.05, theme)
        _bare(axes, across, down, 0)
        for weights, left, count in (
            (plain, LABELS, 0),
            (prefixed, LABELS + t + BETWEEN, n),
        ):
            _table(axes, weights, left, count, theme)
            _ratio(axes, weights, left, count, query, pair, theme)
        for i in range(t):
            axes.text(LABELS - 0.2, 2.5 + i, f"query {i + 1}", size=SMALL, **RIGHT)
    return figure


def _table(axes: Axes, weights: Tensor, left: float, n: int, theme: Theme) -> None:
    """A cell for each weight; what a query may not see stays empty."""
    head = f"with a prefix of {n}" if n else "without a prefix"
    axes.text(left, 0.4, head, size=SMALL, weight="bold", va="center")
    for i, row in enumerate(weights.tolist()):
        for j, weight in enumerate(row):
            if j > i + n:
                continue
            color = SOFT if j < n else BLUE
            spot = (left + j, 2 + i)
            axes.add_patch(Rectangle(spot, 1, 1, fc=color, alpha=weight, ec="none"))
            edge = {"fill": False, "edgecolor": theme.muted, "linewidth": 0.6}
            axes.add_patch(Rectangle(spot, 1, 1, gid="weight", **edge))
            text = f"{weight:.2f}"
            axes.text(spot[0] + 0.5, spot[1] + 0.5, text, size=SMALL, **CENTERED)
    for j in range(weights.shape[1]):
        name = f"P{j + 1}" if j < n else f"x{j - n + 1}"
        axes.text(left + j + 0.5, 1.45, name, size=SMALL, **CENTERED)


def _ratio(axes: Axes, weights, left: float, n: int, query: int, pair, theme) -> None:
    """Outline two weights of a query, and write their ratio under the table."""
    one, other = (weights[query, n + j].item() for j in pair)
    for j in pair:
        spot = (left + n + j, 2 + query)
        look = {"fill": False, "edgecolor": theme.ink, "linewidth": 2, "zorder": 4}
        axes.add_patch(Rectangle(spot, 1, 1, gid="pair", **look))
    names = " / ".join(f"x{j + 1}" for j in pair)
    line = f"{names} = {one:.3f} / {other:.3f} = {one / other:.3f}"
    axes.text(left, 2.7 + len(weights), line, size=9.5, va="center", weight="bold")


# ---------------------------------------------------------------------- Leave one out


def leave_one_out(
    costs: Sequence[float],
    together: float,
    *,
    limit: float,
    title: str,
    subtitle: str = REMOVED,
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """A bar for each vector: the loss that its removal adds; and one for several.

    Args
        costs     loss without vector i, minus the loss with all
        together  loss without every vector whose own cost is at most `limit`, minus
                  the loss with all: the last bar
        limit     in the same unit, nats per token; a grey line
    """
    small = [i for i, cost in enumerate(costs) if cost <= limit]
    names = [str(i) for i in range(len(costs))]
    names.append("all\nhatched\nones")
    heights, places = [*costs, together], [*range(len(costs)), len(costs) + 0.8]
    with style(theme):
        figure, axes = frame(title, subtitle, width, 2.2, FOOT + 0.35, theme)
        for i, (x, height) in enumerate(zip(places, heights, strict=True)):
            last = i == len(costs)
            hatch = HATCH if i in small or last else ""
            color = BLUE if last else SOFT
            edge = {"edgecolor": theme.ink, "linewidth": 0.6}
            axes.bar(x, height, 0.72, color=color, hatch=hatch, **edge)
        axes.axhline(limit, color=GREY, linestyle="--", linewidth=1.4, gid="limit")
        axes.set_xticks(places, names)
        axes.set_xlabel("Vector that is removed, index")
        axes.set_xlim(-0.7, places[-1] + 0.7)
        name_y(axes, f"Loss added, nats per token (dashed: the limit, {limit:g})")
    return figure


# ------------------------------------------------------------------ Shares and bounds


def shares(
    slopes: Mapping[str, Mapping[str, float]],
    bounds: Mapping[str, float],
    *,
    longest: int,
    title: str,
    subtitle: str = LAST,
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """Trained share against length, a panel for each method; both axes are log scales.

    Where a line meets the bound of its method, the largest length within the bound is
    written.

    Args
        slopes   {method: {model: % of all parameters in one position}}
        bounds   {method: %}; a grey line in its panel
        longest  length at the right end of the lines, positions
    """
    values = [slope for models in slopes.values() for slope in models.values()]
    with style(theme):
        figure, axes = frame(title, subtitle, width, 2.6, FOOT + 0.25, theme)
        box = axes.get_position()
        left, room, gap = box.x0 + 0.04, box.width - 0.04, 0.05
        wide = (room - gap) / len(slopes)
        for at, (method, models) in enumerate(slopes.items()):
            panel = axes if at == 0 else figure.add_axes(box, sharey=axes)
            panel.set_position((left + at * (wide + gap), box.y0, wide, box.height))
            panel.set(xscale="log", yscale="log", xlim=(0.8, 1.25 * longest))
            panel.grid(axis="y")
            panel.tick_params(labelleft=at == 0)
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_formatter(lambda x, _: f"{x:f}".rstrip("0").rstrip("."))
                axis.set_minor_locator(NullLocator())
            name_y(panel, method if at else f"{method}: trained, % of all parameters")
            panel.set_xlabel("Length, positions")
            _lines(panel, models, bounds[method], longest, theme)
        axes.set_ylim(min(values) / 2, 2 * longest * max(values))
        _name_models(figure, axes)
    return figure


def _lines(panel: Axes, models: Mapping, bound: float, longest: int, theme) -> None:
    """A line for each model, the bound, and the last length within it."""
    panel.axhline(bound, color=GREY, linestyle="--", linewidth=1.4, gid="bound")
    below = {"va": "top", "size": SMALL, "color": theme.muted}
    panel.text(0.9, 0.88 * bound, f"bound: {bound:g} %", **below)
    for (model, slope), color, mark in zip(models.items(), HUES, "osD", strict=False):
        ends = [1, longest], [slope, slope * longest]
        panel.plot(*ends, color=color, linewidth=1.5, gid="line")
        last = int(bound / slope)
        edge = {"markeredgecolor": theme.ink, "markeredgewidth": 0.7}
        panel.plot([last], [last * slope], mark, color=color, label=model, **edge)
        spot = {"textcoords": "offset points", "xytext": (2, 6), "ha": "right"}
        spot["bbox"] = {"facecolor": theme.paper, "edgecolor": "none", "pad": 0.6}
        panel.annotate(f"{last}", (last, last * slope), size=SMALL, **spot)


def _name_models(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="lower left", ncols=len(names))


# ---------------------------------------------------------------- Runs, by their size


def by_size(
    cells: Mapping[str, Sequence[Sequence[Run]]], *, title: str, subtitle: str = ""
) -> Figure:
    """Mean test loss of several tasks against trained parameters, a point a method.

    Args
        cells  {method: for each task, its runs, one for each seed}; bars span the seeds
    """
    return points(
        _sizes(cells),
        x="Trained parameters, count",
        y="Test loss, nats per token",
        title=title,
        subtitle=subtitle,
    )


def by_size_words(cells: Mapping[str, Sequence[Sequence[Run]]]) -> str:
    """The picture in words: "LoRA: 81,920 trained, 0.38; …"."""
    sizes = _sizes(cells).items()
    parts = (f"{name}: {n:,} trained, {loss:.2f}" for name, (n, loss, *_) in sizes)
    return "; ".join(parts)


def _sizes(cells: Mapping) -> dict[str, tuple[int, float, float, float]]:
    """{method: (trained parameters, mean test loss, lowest seed, highest seed)}"""
    series = {}
    for name, tasks in cells.items():
        by_seed = zip(*tasks, strict=True)
        losses = [fmean(run.result["test_loss"] for run in runs) for runs in by_seed]
        size = tasks[0][0].result["trainable"]
        series[name] = size, fmean(losses), min(losses), max(losses)
    return series
