"""Pages on the move: a picture of a paged optimizer's page table, use by use.

    with watched(optimizer) as moments:      a Moment for each page that is asked for
        optimizer.step()
    picture(moments, pages=8, title=…)       a row for a page, a column for a moment
    faults(slots, trace)                     the number of faults of any trace under LRU
    back_and_forth(pages, slots, steps)      the order of pages with the fewest faults

Shapes carry the meaning as well as colors, so that the picture can be read without
them: hollow is clean, filled is dirty, a dot is not resident; a cross marks a fault, a
disc a hit, and a triangle a page that is asked for ahead of its use.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...paged import PagedAdamW, pages
from ...plotting.draw import frame, legend, point
from ...plotting.theme import LIGHT, SMALL, Theme, look, style

FAULT, HIT, AHEAD = "fault", "use of a page that is there", "fault, ahead of its use"
MARKS = {FAULT: "X", HIT: "o", AHEAD: ">"}
KINDS = {pages.FAULT: FAULT, pages.HIT: HIT, pages.PREFETCH: AHEAD}
CELL = 0.2  # inches between two pages
FOOT = 0.5  # inches under the axes for the ticks and the name of the x axis


class Moment(NamedTuple):
    """The page table right after a page was asked for."""

    step: int  # of the optimizer, from 1, counted from where the watching began
    page: int
    what: str  # FAULT, HIT or AHEAD
    resident: frozenset[int]
    dirty: frozenset[int]


@contextmanager
def watched(optimizer: PagedAdamW) -> Iterator[list[Moment]]:
    """Record every page that a step asks for inside, in the order of asking.

    Pages are numbered as in optimizer.page_table(). A page that was asked for ahead is
    a fault then, and a hit when it is used.
    """
    pager, moments, steps = optimizer.pager, [], [0]
    number = {page: i for i, page in enumerate(pager.pages)}

    def record(page, event: str) -> None:
        entries = list(enumerate(optimizer.page_table()))
        resident = frozenset(i for i, entry in entries if entry.resident)
        dirty = frozenset(i for i, entry in entries if entry.dirty)
        moments.append(Moment(steps[-1], number[page], KINDS[event], resident, dirty))

    hook = optimizer.register_step_pre_hook(lambda *_: steps.append(len(steps)))
    pager.on_use.append(record)
    try:
        yield moments
    finally:
        pager.on_use.remove(record)
        hook.remove()


def faults(slots: int, trace: Sequence[int]) -> int:
    """The number of faults under LRU, in a trace of page numbers."""
    resident, count = OrderedDict(), 0  # the one used longest ago first
    for page in trace:
        count += page not in resident
        resident[page] = None
        resident.move_to_end(page)
        if len(resident) > slots:
            resident.popitem(last=False)
    return count


def back_and_forth(pages: int, slots: int, steps: int) -> list[list[int]]:
    """The order of the pages in each optimizer step that has the fewest faults.

    Every second step goes backward, so that each begins with the pages in the slots:
    pages + (steps - 1) (pages - slots) faults under LRU, for at most `pages` slots.
    """
    forward = [*range(pages)]
    return [forward[::-1] if step % 2 else forward for step in range(steps)]


def picture(
    moments: Sequence[Moment],
    *,
    pages: int,
    title: str,
    subtitle: str = "Each column is the page table right after a page was asked for.",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """A row for each page, a column for each moment.

    Raises  ValueError  no moments, or a page that is not among `pages`
    """
    if not moments or max(moment.page for moment in moments) >= pages:
        raise ValueError(
            f"{len(moments)} moments on {pages} pages: at least one moment is needed, "
            f"and pages from 0 to {pages - 1}"
        )
    handles = _handles(theme)
    with style(theme):
        room = legend(frame("", "", width, 1, FOOT, theme)[0], list(handles.values()))
        height, below = CELL * pages, FOOT + room
        figure, axes = frame(title, subtitle, width, height, below, theme)
        legend(figure, list(handles.values()))
        for name, (xs, ys) in _places(moments, pages).items():
            line = Line2D(xs, ys)
            line.update_from(handles[name])
            axes.add_line(line)
            line.set(gid=name, zorder=3 if name in MARKS else 2)
        _name(axes, moments, pages, theme)
    return figure


def _handles(theme: Theme) -> dict[str, Line2D]:
    """The look of each kind of mark."""
    colour, _ = look("qlora")
    square = {"marker": "s", "markersize": 9, "markeredgecolor": theme.ink}
    small = {"markersize": 4.5, "markeredgewidth": 0}
    kinds = {
        "resident, clean": (theme.paper, square),
        "resident, dirty": (colour, square),
        "in the store": (theme.muted, {"marker": "o", "markersize": 1.5}),
        **{name: (theme.ink, small | {"marker": m}) for name, m in MARKS.items()},
    }
    return {
        name: point((shade, more["marker"]), theme, label=name, **more)
        for name, (shade, more) in kinds.items()
    }


def _places(moments: Sequence[Moment], pages: int) -> dict[str, tuple[list, list]]:
    """{kind of mark: (moments, pages)}"""
    places = {}
    for x, moment in enumerate(moments, 1):
        for page in range(pages):
            kind = "in the store"
            if page in moment.resident:
                kind = f"resident, {'dirty' if page in moment.dirty else 'clean'}"
            xs, ys = places.setdefault(kind, ([], []))
            xs.append(x)
            ys.append(page)
        xs, ys = places.setdefault(moment.what, ([], []))
        xs.append(x)
        ys.append(moment.page)
    return places


def _name(axes, moments: Sequence[Moment], pages: int, theme: Theme) -> None:
    """Set limits and labels, and draw a line before each step."""
    axes.set_xlim(0.3, len(moments) + 0.7)
    axes.set_ylim(pages - 0.4, -0.6)
    axes.set_yticks(range(pages))
    axes.set_ylabel("Page, number")
    axes.set_xlabel("Requests for a page, count")
    last = None
    for x, moment in enumerate(moments, 1):
        if moment.step != last:
            axes.axvline(x - 0.5, color=theme.muted, linewidth=0.8, gid="step")
            axes.text(x - 0.4, -0.75, f"step {moment.step}", size=SMALL, va="bottom")
        last = moment.step
