"""Memory over the time of some optimizer steps, and what a page fault moves.

    with Meter(model) as meter:
        for … : forward, backward;  updates.append(len(meter.events))
                optimizer.step();   ends.append(len(meter.events))
    times = timeline(meter, updates, ends)
    picture(times, ["64 tokens", …], limit=2.5e9, title=…)
    picture(paged_out(times, 2.5e9), …, before=times)
    hierarchy(before, after, pages=8, title=…)     one fault of page_picture.watched

Bytes are stacked by what holds them, in the colors of plotting.curves. Labels stand in
the bands that are wide enough, and an overshoot is hatched, so that no color is needed
to read the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from ...memory.meter import Meter
from ...plotting.curves import FOOT, HOLDERS
from ...plotting.draw import frame, legend, name_y
from ...plotting.theme import LIGHT, RED, SMALL, Theme, look, readable, style
from .page_picture import Moment

KINDS = {  # from the bottom of the picture to its top, and their names in words
    "weights": "weights",
    "optimizer": "AdamW's states",
    "gradients": "gradients",
    "activations": "activations, short-lived tensors",
}
POINTS = 240  # drawn for each optimizer step
GB = 1e9


@dataclass(frozen=True)
class Timeline:
    """Bytes of each kind after each event: a tensor that is made or freed.

    bytes    {kind: (events + 1,)}
    updates  the event at which each optimizer step's update begins
    ends     the event at which each optimizer step ends
    """

    bytes: dict[str, np.ndarray]
    updates: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def total(self) -> np.ndarray:
        return sum(self.bytes.values())

    def peaks(self) -> list[float]:
        """The most bytes at one moment of each optimizer step."""
        starts = (0, *self.ends[:-1])
        pairs = zip(starts, self.ends, strict=True)
        return [float(self.total[start : end + 1].max()) for start, end in pairs]


def timeline(meter: Meter, updates: Sequence[int], ends: Sequence[int]) -> Timeline:
    """What a meter saw, moment by moment.

    Args
        updates, ends  len(meter.events) before each update, and after it
    Raises   ValueError  not one update before each end, or ends that do not rise
    """
    borders = [place for pair in zip(updates, ends, strict=False) for place in pair]
    if not ends or len(updates) != len(ends) or borders != sorted(set(borders)):
        raise ValueError(
            f"updates={list(updates)}, ends={list(ends)}: one update is needed before "
            "each end, and places that rise"
        )
    now = dict.fromkeys(KINDS, 0)
    kind_of = lambda storage: meter.kind.get(storage, "activations")  # noqa: E731
    for storage in meter.existing:
        if kind_of(storage) in now:
            now[kind_of(storage)] += meter.size[storage]
    rows = [list(now.values())]
    for storage, change in meter.events:
        if kind_of(storage) in now:
            now[kind_of(storage)] += change
        rows.append(list(now.values()))
    columns = np.array(rows, float).T
    return Timeline(dict(zip(KINDS, columns, strict=True)), (*updates,), (*ends,))


def paged_out(times: Timeline, limit: float) -> Timeline:
    """The same steps where AdamW's states leave, as far as they must, to fit.

    A page that has left comes back in the next update, and not before.

    Args
        limit  bytes of the fast memory
    """
    states = times.bytes["optimizer"]
    room = np.maximum(limit - (times.total - states), 0)
    resident = np.minimum(states, room)
    for start, update in zip((0, *times.ends[:-1]), times.updates, strict=True):
        learning = slice(start, update)
        resident[learning] = np.minimum.accumulate(resident[learning])
    return replace(times, bytes=times.bytes | {"optimizer": resident})


# Memory over time ---------------------------------------------------------------------


def picture(
    times: Timeline,
    labels: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    limit: float | None = None,
    before: Timeline | None = None,
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """Bytes stacked by what holds them; each optimizer step has the same width.

    Args
        labels  of the optimizer steps: "64 tokens"
        limit   bytes of the fast memory: a line, and what is above it hatched
        before  another timeline of the same steps: its sum as a dashed line
    Raises   ValueError  not one label for each optimizer step
    """
    if len(labels) != len(times.ends):
        raise ValueError(f"{len(labels)} labels for {len(times.ends)} optimizer steps")
    places, sizes = _drawn(times)
    with style(theme):
        handles = _handles(limit, before, theme)
        room = legend(frame("", "", width, 1, FOOT, theme)[0], handles)
        figure, axes = frame(title, subtitle, width, 2.6, FOOT + room, theme)
        legend(figure, handles)
        colors = [HOLDERS[kind] for kind in KINDS]
        axes.stackplot(places, sizes, colors=colors, linewidth=0)
        if before is not None:
            old_places, old = _drawn(before)
            axes.plot(old_places, old.sum(0), **_dashed(theme))
        top = max(sizes.sum(0).max(), before.total.max() / GB if before else 0)
        _mark_steps(axes, labels, top, theme)
        _name_bands(axes, places, sizes, theme)
        if limit is not None:
            _mark_limit(axes, places, sizes.sum(0), limit / GB, theme)
    return figure


def _drawn(times: Timeline) -> tuple[np.ndarray, np.ndarray]:
    """(places along the axis, GB (kinds, places)): each piece at its highest moment."""
    places, chosen, total = [], [], times.total
    starts = (0, *times.ends[:-1])
    for step, (start, end) in enumerate(zip(starts, times.ends, strict=True)):
        for piece in np.array_split(np.arange(start, end + 1), POINTS):
            if len(piece):
                best = piece[total[piece].argmax()]
                chosen.append(best)
                places.append(step + 0.5 + (piece.mean() - start) / (end - start))
    sizes = np.array([values[chosen] for values in times.bytes.values()]) / GB
    return np.array(places), sizes


def _dashed(theme: Theme) -> dict:
    return {"color": theme.ink, "linewidth": 1.1, "linestyle": (0, (4, 2))}


def _over(theme: Theme) -> dict:
    return {"facecolor": "none", "edgecolor": RED, "hatch": "////", "linewidth": 0}


def _handles(limit: float | None, before: Timeline | None, theme: Theme) -> list:
    edge = {"edgecolor": theme.ink, "linewidth": 0.5}
    handles = [
        Patch(facecolor=HOLDERS[kind], label=name, **edge)
        for kind, name in KINDS.items()
    ]
    if limit is not None:
        handles.append(Patch(label="does not fit", **_over(theme)))
    if before is not None:
        line = Axes.plot(frame("", "", 2, 1, 0, theme)[1], [], [], **_dashed(theme))[0]
        line.set_label("sum without paging")
        handles.append(line)
    return handles


def _mark_steps(axes: Axes, labels: Sequence[str], top: float, theme: Theme) -> None:
    """Limits, names of the axes, and a label over each optimizer step."""
    axes.set_xlim(0.5, len(labels) + 0.5)
    axes.set_ylim(0, 1.16 * top)
    axes.set_xticks(range(1, len(labels) + 1))
    axes.set_xlabel("Optimizer step, count (within a step: tensors made and freed)")
    name_y(axes, "Memory, GB")
    for step, label in enumerate(labels, 1):
        if step > 1:
            axes.axvline(step - 0.5, color=theme.muted, linewidth=0.6, linestyle=":")
        spot = {"ha": "center", "va": "top", "size": SMALL, "color": theme.muted}
        axes.text(step, 1.14 * top, label, **spot)


def _name_bands(axes: Axes, places: np.ndarray, sizes: np.ndarray, theme: Theme):
    """The names of weights and states inside their bands, in the last step."""
    last = np.abs(places - places.max() + 0.5).argmin()
    heights = np.cumsum(sizes[:, last])
    for row, (kind, name) in enumerate(list(KINDS.items())[:2]):
        middle = heights[row] - sizes[row, last] / 2
        ink = readable(HOLDERS[kind])
        spot = {"ha": "center", "va": "center", "size": SMALL, "color": ink}
        axes.text(places[last], middle, name, **spot)


def _mark_limit(axes: Axes, places, total, limit: float, theme: Theme) -> None:
    axes.axhline(limit, color=RED, linewidth=1.4, gid="limit")
    axes.text(0.54, limit, f"memory of the GPU: {limit:g} GB", va="bottom", size=SMALL)
    over = np.maximum(total, limit)
    axes.fill_between(places, limit, over, gid="over", **_over(theme))


# The memory hierarchy -----------------------------------------------------------------


LEVELS = (  # name, what it is like
    ("GPU memory", "small and fast"),
    ("host memory", "larger, behind a slow link"),
    ("disk", "largest and slowest"),
)
CELL = 0.42  # side of a page, in the picture's own units: inches


def hierarchy(
    before: Moment,
    after: Moment,
    *,
    pages: int,
    title: str,
    subtitle: str = "",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """What one page fault moves: a page in, and before it a dirty one back.

    Args
        before, after  the page table before and after the fault
        pages          how many there are
    Raises   ValueError  no page came in between the two moments
    """
    if after.page in before.resident:
        raise ValueError(f"page {after.page} is resident before: that is no fault")
    left = before.resident - after.resident
    with style(theme):
        figure, axes = frame(title, subtitle, width, 2.5, 0.1, theme)
        axes.set(xlim=(0, width - 0.6), ylim=(0, 2.5), xticks=[], yticks=[])
        axes.spines["bottom"].set_visible(False)
        boxes = _boxes(axes, width - 0.6, theme)
        _slots(axes, boxes[0], before, after, theme)
        _places_of(axes, boxes[1], pages, after.page, left, theme)
        _disk(axes, boxes[2], theme)
        _moves(axes, boxes, after.page, left, left & before.dirty, theme)
    return figure


def _boxes(axes: Axes, width: float, theme: Theme) -> list[tuple[float, float]]:
    """(left, width) of each level, drawn with its name."""
    gap = 1.45
    wide = (width - gap - 0.35) / 2.75
    spots = [(0.02, wide * 0.95), (wide * 0.95 + gap, wide)]
    spots.append((sum(spots[1]) + 0.35, width - sum(spots[1]) - 0.37))
    for (left, across), (name, like) in zip(spots, LEVELS, strict=True):
        box = FancyBboxPatch(
            (left, 0.05),
            across,
            1.95,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=theme.paper,
            edgecolor=theme.muted,
        )
        axes.add_patch(box)
        axes.text(left + 0.02, 2.27, name, weight="bold", va="bottom")
        axes.text(left + 0.02, 2.06, like, size=SMALL, color=theme.muted, va="bottom")
    return spots


def _page(axes: Axes, x: float, y: float, text: str, fill: str, theme: Theme, **more):
    edge = {"edgecolor": theme.ink, "linewidth": 0.9} | more
    axes.add_patch(Rectangle((x, y), CELL, CELL, facecolor=fill, **edge))
    spot = {"ha": "center", "va": "center", "size": SMALL, "color": readable(fill)}
    axes.text(x + CELL / 2, y + CELL / 2, text, **spot)


def _grid(box: tuple[float, float], count: int, top: float):
    """The corners of `count` pages, in rows inside a box, from its top."""
    left, across = box
    columns = min(count, int((across - 0.2) / (CELL + 0.06)))
    start = left + (across - columns * (CELL + 0.06) + 0.06) / 2
    for i in range(count):
        row, column = divmod(i, columns)
        yield start + column * (CELL + 0.06), top - CELL - row * (CELL + 0.06)


def _slots(axes: Axes, box, before: Moment, after: Moment, theme: Theme) -> None:
    """The slots after the fault; the page that came in has a thick edge."""
    color, _ = look("qlora")
    shown = [*sorted(after.resident)]
    spots = list(_grid(box, len(shown), 1.85))
    for page, (x, y) in zip(shown, spots, strict=True):
        dirty, new = page in after.dirty, page == after.page
        fill = color if dirty else theme.paper
        thick = {"linewidth": 2.4} if new else {}
        _page(axes, x, y, str(page), fill, theme, **thick)
    text = "slots: filled is updated (dirty),\nhollow is as in the store (clean)"
    spot = {"size": SMALL - 1, "color": theme.muted, "va": "bottom"}
    axes.text(box[0] + 0.08, 0.12, text, **spot)


def _places_of(axes: Axes, box, pages: int, coming: int, left, theme: Theme) -> None:
    """The store: a place for every page; those that move have a thick edge."""
    for page, (x, y) in zip(range(pages), _grid(box, pages, 1.85), strict=True):
        moves = page == coming or page in left
        thick = {"linewidth": 2.4} if moves else {"edgecolor": theme.muted}
        _page(axes, x, y, str(page), theme.faint, theme, **thick)
    text = "store: a place for every page"
    spot = {"size": SMALL - 1, "color": theme.muted, "va": "bottom"}
    axes.text(box[0] + 0.08, 0.12, text, **spot)


def _disk(axes: Axes, box, theme: Theme) -> None:
    text = "the next level,\nwhere host\nmemory ends\n(in this lesson,\n"
    text += "the store is\na file here)"
    spot = {"size": SMALL - 1, "color": theme.muted, "ha": "center", "va": "center"}
    axes.text(box[0] + box[1] / 2, 1.1, text, **spot)


def _moves(axes: Axes, boxes, coming: int, left, dirty, theme: Theme) -> None:
    """The arrows between GPU and host, with what they carry."""
    inner, outer = sum(boxes[0]) + 0.05, boxes[1][0] - 0.05
    rows = []
    if left:
        (page,) = left
        words = "first: write back" if dirty else "first: drop (clean)"
        rows.append((1.35, (inner, outer), f"{words}\npage {page}", bool(dirty)))
    rows.append((0.6, (outer, inner), f"then: copy in\npage {coming}", True))
    for height, (start, end), words, is_copied in rows:
        arrow = FancyArrowPatch(
            (start, height),
            (end, height),
            arrowstyle="-|>",
            mutation_scale=13,
            linewidth=1.6,
            linestyle="-" if is_copied else ":",
            color=theme.ink,
            shrinkA=0,
            shrinkB=0,
        )
        axes.add_patch(arrow)
        spot = {"ha": "center", "va": "bottom", "size": SMALL}
        axes.text((start + end) / 2, height + 0.06, words, **spot)
