"""Pages on the move: what a paged optimizer's page table goes through, in a picture.

    with watched(optimizer) as moments:      a Moment for each page that is asked for
        optimizer.step()
    picture(moments, pages=8, title=…)       a row a page, a column a moment
    faults(slots, trace)                     what LRU makes of any order of uses

What a page is has a shape as well as a colour, so that the picture can be read without
the colours: hollow is clean, filled is dirty, a dot is not resident; a cross marks the
fault, a disc the hit, and a triangle a page that is asked for ahead of its use.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...paged import PagedAdamW
from ...plotting.draw import frame, legend, point
from ...plotting.theme import LIGHT, SMALL, Theme, look, style

FAULT, HIT, AHEAD = "fault", "use of one that is there", "fault, ahead of its use"
MARKS = {FAULT: "X", HIT: "o", AHEAD: ">"}
CELL = 0.2  # inches between two pages
FOOT = 0.5  # inches under the axes for the ticks and the name of the x axis


class Moment(NamedTuple):
    """A page was asked for; what the page table is right after."""

    step: int  # of the optimizer, from 1, counted from where the watching began
    page: int
    what: str  # FAULT, HIT or AHEAD
    resident: frozenset[int]
    dirty: frozenset[int]


@contextmanager
def watched(optimizer: PagedAdamW) -> Iterator[list[Moment]]:
    """Inside, every page that a step asks for is noted, in the order of asking.

    Pages are numbered as in optimizer.page_table(). A page that was asked for ahead is
    a fault then, and a hit when it is used.
    """
    pager, moments, steps = optimizer._pager, [], [0]
    number = {page: i for i, page in enumerate(pager.pages)}
    hook = optimizer.register_step_pre_hook(lambda *_: steps.append(len(steps)))

    def noted(ask, what):
        def asking(page) -> None:
            here = page.slot is not None
            ask(page)
            if here and what == AHEAD:
                return  # it is there already: nothing happens
            rows = list(enumerate(optimizer.page_table()))
            resident = frozenset(i for i, row in rows if row.resident)
            dirty = frozenset(i for i, row in rows if row.dirty)
            kind = what or (HIT if here else FAULT)
            moments.append(Moment(steps[-1], number[page], kind, resident, dirty))

        return asking

    pager.use, pager.prefetch = noted(pager.use, ""), noted(pager.prefetch, AHEAD)
    try:
        yield moments
    finally:
        hook.remove()
        del pager.use, pager.prefetch  # the class's own are seen again


def faults(slots: int, trace: Sequence[int]) -> int:
    """How many uses in a trace of page numbers are faults under LRU."""
    resident, count = OrderedDict(), 0  # the one used longest ago first
    for page in trace:
        count += page not in resident
        resident[page] = None
        resident.move_to_end(page)
        if len(resident) > slots:
            resident.popitem(last=False)
    return count


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
    """What each kind of place looks like."""
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
    """{kind of place: (moments, pages)}"""
    found = {}
    for x, moment in enumerate(moments, 1):
        for page in range(pages):
            kind = "in the store"
            if page in moment.resident:
                kind = f"resident, {'dirty' if page in moment.dirty else 'clean'}"
            xs, ys = found.setdefault(kind, ([], []))
            xs.append(x)
            ys.append(page)
        xs, ys = found.setdefault(moment.what, ([], []))
        xs.append(x)
        ys.append(moment.page)
    return found


def _name(axes, moments: Sequence[Moment], pages: int, theme: Theme) -> None:
    """Limits, names, and a line before each step."""
    axes.set_xlim(0.3, len(moments) + 0.7)
    axes.set_ylim(pages - 0.4, -0.6)
    axes.set_yticks(range(pages))
    axes.set_ylabel("page")
    axes.set_xlabel("Moments: a page is asked for")
    last = None
    for x, moment in enumerate(moments, 1):
        if moment.step != last:
            axes.axvline(x - 0.5, color=theme.muted, linewidth=0.8, gid="step")
            axes.text(x - 0.4, -0.75, f"step {moment.step}", size=SMALL, va="bottom")
        last = moment.step
