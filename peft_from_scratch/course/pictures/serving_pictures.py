"""Many adapters on one base: how a batch is computed, and what is in memory when.

    three_ways("abac")                       loop, masked product and gather of a batch
    rank_classes([4, 4, 64])                 what each row is padded to
    over_time({"…": [Span(…), …]}, …)        who has a place of the batch at which step
    pool([Use("a", {"a"}, True), …], …)      which adapters are in memory when
    strips({"…": [Token("Lima", "b"), …]})   who read each token, and what that changed

Adapters have a letter and a color, so that no picture needs the color. Gray belongs to
the frozen base, hatching to what is computed or kept for nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from ...plotting.draw import frame, legend
from ...plotting.theme import (
    AMBER,
    BLUE,
    GREY,
    LIGHT,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    SMALL,
    Theme,
    readable,
    style,
)
from ...serving.batch import class_of

NEW_LINE = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
COLORS = (BLUE, ORANGE, PURPLE, AMBER, SKY, RED)
FOOT, AXIS = 0.1, 0.5  # inches under a picture, and under an axis
WASTE = {"hatch": "////", "facecolor": "none", "linewidth": 0}


@dataclass(frozen=True)
class Span:
    """A request has a place of the batch from one decoding step to another."""

    adapter: str
    place: int
    start: int  # the first decoding step
    stop: int  # the first one after it has left


@dataclass(frozen=True)
class Use:
    """A request for an adapter, and what is in memory after it."""

    adapter: str
    resident: frozenset[str]
    loaded: bool  # it had to be read from disk


@dataclass(frozen=True)
class Token:
    """A token, who read it (None: nobody yet), and whether it should be another."""

    text: str
    reader: str | None
    changed: bool = False


def color_of(adapter: str | None, names: Sequence[str]) -> str:
    """The color of an adapter among these; gray for the base, None."""
    return GREY if adapter is None else COLORS[names.index(adapter) % len(COLORS)]


def _blank(title, subtitle, width, height, theme) -> tuple[Figure, Axes]:
    """A page whose axes count in inches from the top left, and show no scale."""
    figure, axes = frame(title, subtitle, width, height, FOOT, theme)
    axes.set(xlim=(0, width - 0.6), ylim=(height, 0), xticks=[], yticks=[])
    axes.spines["bottom"].set_visible(False)
    return figure, axes


def _cell(axes, x, y, w, h, text, color, theme, **more) -> None:
    edge = {"edgecolor": theme.ink, "linewidth": 0.7, "zorder": 2} | more
    axes.add_patch(Rectangle((x, y), w, h, facecolor=color, **edge))
    spot = {"ha": "center", "va": "center", "size": SMALL, "color": readable(color)}
    axes.text(x + w / 2, y + h / 2, text, zorder=5, **spot)


# Three ways to compute a batch --------------------------------------------------------

SIDE, GAP = 0.24, 0.06  # inches: a cell, and between two of them


def three_ways(
    rows: Sequence[str], *, width: float = 7.4, theme: Theme = LIGHT
) -> Figure:
    """Loop, masked product and gather of the same rows; a letter names its adapter.

    Raises  ValueError  no rows
    """
    if not rows:
        raise ValueError("no rows: give the letter of an adapter for each")
    names = list(dict.fromkeys(rows))
    title = "A loop makes a pass for each adapter; a gather makes one pass for all rows"
    subtitle = (
        "Each row of the batch has the letter of its adapter. Hatched: products that "
        "are computed and then set to zero."
    )
    high = len(rows) * (SIDE + GAP) + (len(names) - 1) * 0.12
    with style(theme):
        figure, axes = _blank(title, subtitle, width, high + 0.75, theme)
        third = (width - 0.6) / 3
        for i, way in enumerate((_loop, _masked, _gather)):
            way(axes, i * third + 0.05, rows, names, theme)
    return figure


def _head(axes: Axes, x: float, name: str, words: str, theme: Theme) -> None:
    axes.text(x, 0.1, name, weight="bold", size=9, va="center")
    axes.text(x, 0.35, words, size=SMALL, color=theme.muted, va="center")


def _loop(axes: Axes, x: float, rows, names, theme: Theme) -> None:
    passes = "pass" if len(names) == 1 else "passes"
    _head(axes, x, "Loop", f"{len(names)} {passes} through the model", theme)
    y = 0.6
    for name in names:
        own = [row for row in rows if row == name]
        top, color = y, color_of(name, names)
        for row in own:
            _cell(axes, x, y, SIDE, SIDE, row, color, theme, gid="loop")
            y += SIDE + GAP
        box = {"gid": "pass", "linewidth": 1.2}
        tall = y - GAP - top
        _cell(axes, x + 0.5, top, 0.62, tall, "$W_0$", theme.faint, theme, **box)
        _cell(axes, x + 1.17, top, 0.5, tall, f"$B_{name}A_{name}$", color, theme)
        y += 0.12


def _masked(axes: Axes, x: float, rows, names, theme: Theme) -> None:
    _head(axes, x, "Masked product", "one pass, every row times every A", theme)
    for i, row in enumerate(rows):
        y = 0.6 + i * (SIDE + GAP)
        _cell(axes, x, y, SIDE, SIDE, row, color_of(row, names), theme)
        _cell(axes, x + 0.4, y, 0.45, SIDE, "$W_0$", theme.faint, theme)
        for j, name in enumerate(names):
            left = x + 0.95 + j * (SIDE + 0.02)
            if name == row:
                color = color_of(name, names)
                _cell(axes, left, y, SIDE, SIDE, name, color, theme, gid="product")
            else:
                edge = {"edgecolor": theme.muted, "gid": "masked"}
                axes.add_patch(Rectangle((left, y), SIDE, SIDE, **WASTE | edge))


def _gather(axes: Axes, x: float, rows, names, theme: Theme) -> None:
    _head(axes, x, "Gather", "one pass, each row times its own A", theme)
    for i, row in enumerate(rows):
        y, color = 0.6 + i * (SIDE + GAP), color_of(row, names)
        _cell(axes, x, y, SIDE, SIDE, row, color, theme)
        _cell(axes, x + 0.4, y, 0.45, SIDE, "$W_0$", theme.faint, theme)
        _cell(axes, x + 0.95, y, 0.36, SIDE, f"$A_{row}$", color, theme, gid="own")
        _cell(axes, x + 1.33, y, 0.36, SIDE, f"$B_{row}$", color, theme)


# Ranks of different size --------------------------------------------------------------


def rank_classes(
    ranks: Sequence[int], *, width: float = 7.4, theme: Theme = LIGHT
) -> Figure:
    """Own rank of each row, what its class adds, and what the largest rank would add.

    Raises  ValueError  no ranks, or one below one
    """
    if not ranks or min(ranks) < 1:
        raise ValueError(f"ranks={list(ranks)}: at least one is needed, each above 0")
    most = max(map(class_of, ranks))
    title = "In classes of powers of two, no row pays for its neighbor's rank"
    subtitle = (
        "Each row of the batch has an adapter of its own. Ranks below 4 count as 4."
    )
    edge = {"edgecolor": theme.ink, "linewidth": 0.6}
    handles = [
        Patch(facecolor=BLUE, label="its own rank", **edge),
        Patch(label="added by its class", **WASTE | {"edgecolor": BLUE}),
        Patch(facecolor=theme.faint, label="added by the largest rank", linewidth=0),
    ]
    with style(theme):
        room = legend(frame("", "", width, 1, AXIS, theme)[0], handles)
        high = 0.26 * len(ranks)
        figure, axes = frame(title, subtitle, width, high, AXIS + room, theme)
        legend(figure, handles)
        for i, rank in enumerate(ranks):
            padded = class_of(rank)
            axes.barh(i, most, 0.7, color=theme.faint, gid="largest")
            axes.barh(i, padded, 0.7, color=theme.paper)
            look = WASTE | {"edgecolor": BLUE, "gid": "class"}
            axes.barh(i, padded, 0.7, **look)
            axes.barh(i, rank, 0.7, color=BLUE, gid="own", **edge)
        axes.set(xlim=(0, most), ylim=(len(ranks) - 0.4, -0.6))
        axes.set_yticks(range(len(ranks)), [f"row {i}" for i in range(len(ranks))])
        axes.set_xlabel("Rank that is multiplied, count")
    return figure


# A batch over time --------------------------------------------------------------------


def over_time(
    ways: Mapping[str, Sequence[Span]],
    *,
    title: str,
    subtitle: str = "",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """Places of the batch against decoding steps, one group of places for each way.

    A hatched place is empty while other rows are decoded.

    Raises  ValueError  no spans in a way, or two in one place at one step
    """
    for name, spans in ways.items():
        _refuse_overlaps(name, spans)
    last = max(span.stop for spans in ways.values() for span in spans)
    adapters = sorted({span.adapter for spans in ways.values() for span in spans})
    high = [1 + max(span.place for span in spans) for spans in ways.values()]
    with style(theme):
        tall = 0.27 * sum(high) + 0.34 * len(ways)
        figure, axes = frame(title, subtitle, width, tall, AXIS, theme)
        axes.set(xlim=(0, last), ylim=(tall, 0), yticks=[])
        axes.set_xlabel("Decoding steps, count")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        y = 0.0
        for (name, spans), places in zip(ways.items(), high, strict=True):
            axes.text(0, y + 0.2, name, weight="bold", size=SMALL, va="center")
            _places(axes, y + 0.34, spans, places, adapters, theme)
            y += 0.34 + 0.27 * places
    return figure


def placed(requests: Sequence[tuple[str, int, int]]) -> list[Span]:
    """Each request at the lowest place that is free: (adapter, start, stop) of each."""
    spans: list[Span] = []
    for adapter, start, stop in sorted(requests, key=lambda request: request[1]):
        taken = {span.place for span in spans if span.stop > start}
        place = next(i for i in range(len(spans) + 1) if i not in taken)
        spans.append(Span(adapter, place, start, stop))
    return spans


def in_groups(requests: Sequence[tuple[str, int]], rows: int) -> list[Span]:
    """Fixed groups, each of which waits for its longest: (adapter, steps) of each."""
    spans, start = [], 0
    for first in range(0, len(requests), rows):
        group = requests[first : first + rows]
        for place, (adapter, steps) in enumerate(group):
            spans.append(Span(adapter, place, start, start + steps))
        start += max(steps for _, steps in group)
    return spans


def both_ways(
    adapters: Sequence[str], steps: Sequence[Sequence[int]], rows: int
) -> dict[str, list[Span]]:
    """{way: spans} of requests as they were served, and of the same in fixed groups.

    Args
        adapters  of each request
        steps     at which each request got a token
    """
    ends = [(own[0], own[-1] + 1) for own in steps]
    pairs = list(zip(adapters, ends, strict=True))
    return {
        "Fixed groups": in_groups(
            [(a, end - start) for a, (start, end) in pairs], rows
        ),
        "Continuous batching": placed([(a, *both) for a, both in pairs]),
    }


def _refuse_overlaps(name: str, spans: Sequence[Span]) -> None:
    taken = [(s.place, step) for s in spans for step in range(s.start, s.stop)]
    if not taken or len(set(taken)) < len(taken):
        raise ValueError(
            f"{name!r}: spans are needed, and one request in a place at a time"
        )


def _places(axes: Axes, top: float, spans, places, adapters, theme: Theme) -> None:
    end = max(span.stop for span in spans)
    for place in range(places):
        y = top + 0.27 * place
        look = WASTE | {"edgecolor": theme.muted, "gid": "empty", "alpha": 0.6}
        axes.add_patch(Rectangle((0, y), end, 0.23, **look))
    for span in spans:
        y, across = top + 0.27 * span.place, span.stop - span.start
        color = color_of(span.adapter, adapters)
        more = {"gid": "span", "zorder": 3}
        _cell(axes, span.start, y, across, 0.23, span.adapter, color, theme, **more)


# The pool -----------------------------------------------------------------------------


def pool(
    uses: Sequence[Use],
    *,
    title: str,
    subtitle: str = "",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """A row for each adapter, a column for each request; a cross is a load from disk.

    Raises  ValueError  no uses, or an adapter that is not in memory after its use
    """
    if not uses or any(use.adapter not in use.resident for use in uses):
        raise ValueError(
            f"{len(uses)} uses: one at least, and whoever is used is in memory"
        )
    names = list(dict.fromkeys(use.adapter for use in uses))
    edge = {"edgecolor": theme.ink, "linewidth": 0.6}
    handles = [
        Patch(facecolor=theme.faint, label="in memory", **edge),
        Patch(facecolor=BLUE, label="used (o), or loaded and used (x)", **edge),
    ]
    with style(theme):
        room = legend(frame("", "", width, 1, AXIS, theme)[0], handles)
        high = 0.27 * len(names)
        figure, axes = frame(title, subtitle, width, high, AXIS + room, theme)
        legend(figure, handles)
        axes.set(xlim=(0.4, len(uses) + 0.6), ylim=(len(names) - 0.4, -0.6))
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("Requests, count")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for x, use in enumerate(uses, 1):
            for y, name in enumerate(names):
                if name in use.resident:
                    _in_memory(axes, x, y, use, name, theme)
    return figure


def _in_memory(axes: Axes, x: int, y: int, use: Use, name: str, theme: Theme) -> None:
    used = name == use.adapter
    color, mark = (BLUE, "x" if use.loaded else "o") if used else (theme.faint, "")
    place, size = (x - 0.45, y - 0.4), (0.9, 0.8)
    _cell(axes, *place, *size, mark, color, theme, gid="used" if used else "kept")


# Who read a token ---------------------------------------------------------------------


def strips(
    rows: Mapping[str, Sequence[Token]],
    *,
    title: str,
    subtitle: str = "",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """Tokens from left to right, in the color of who read them; changed ones in red.

    Raises  ValueError  no rows, or one without tokens
    """
    if not rows or not all(rows.values()):
        raise ValueError("no tokens: each row needs at least one")
    readers = sorted({t.reader for row in rows.values() for t in row if t.reader})
    handles = [
        Patch(facecolor=color_of(name, readers), label=f"read under {name}")
        for name in readers
    ]
    handles.append(
        Patch(facecolor=theme.paper, edgecolor=RED, linewidth=2, label="changed token")
    )
    with style(theme):
        lines = [_wrapped(row, width - 0.6) for row in rows.values()]
        tall = sum(0.28 + 0.3 * len(each) for each in lines)
        room = legend(frame("", "", width, 1, FOOT, theme)[0], handles)
        figure, axes = frame(title, subtitle, width, tall, FOOT + room, theme)
        axes.set(xlim=(0, width - 0.6), ylim=(tall, 0), xticks=[], yticks=[])
        axes.spines["bottom"].set_visible(False)
        legend(figure, handles)
        y = 0.0
        for label, each in zip(rows, lines, strict=True):
            axes.text(0, y + 0.15, label, weight="bold", size=SMALL, va="center")
            y += 0.28
            for line in each:
                _strip(axes, y, line, readers, theme)
                y += 0.3
    return figure


def tokens(
    prompt: Sequence[str],
    answer: Sequence[str],
    right: Sequence[str],
    kept: int,
    readers: tuple[str, str],
) -> list[Token]:
    """A prompt, read first by one and then by the other, and the answer, compared.

    Args
        answer, right  the words that were chosen, and those that should have been
        kept           words of the prompt that the first of the readers has read
    """
    first, second = readers
    read = [Token(w, first if i < kept else second) for i, w in enumerate(prompt)]
    pairs = zip(answer, right, strict=True)
    return read + [Token(word, None, word != other) for word, other in pairs]


def words_of(tokenizer) -> Callable[[Sequence[int]], list[str]]:
    """A function (token ids) -> their texts, with a sign for the end of a line."""

    def words(ids: Sequence[int]) -> list[str]:
        return [tokenizer.decode([i]).strip() or NEW_LINE for i in ids]

    return words


def _across(token: Token) -> float:
    """Inches of a token's cell."""
    return 0.16 + 0.085 * len(token.text)


def _wrapped(tokens: Sequence[Token], room: float) -> list[list[Token]]:
    """The tokens in lines that fit."""
    lines, used = [[]], 0.0
    for token in tokens:
        if lines[-1] and used + _across(token) > room:
            lines.append([])
            used = 0.0
        lines[-1].append(token)
        used += _across(token)
    return lines


def _strip(axes: Axes, y: float, tokens, readers, theme: Theme) -> None:
    x = 0.0
    for token in tokens:
        color = theme.paper
        if token.reader is not None:
            color = color_of(token.reader, readers)
        edge = {"edgecolor": RED, "linewidth": 2.2, "zorder": 4, "gid": "changed"}
        more = edge if token.changed else {"gid": "token"}
        width = _across(token) - 0.03
        _cell(axes, x, y, width, 0.24, token.text, color, theme, **more)
        x += _across(token)
