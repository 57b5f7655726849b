"""Pages on the move: what is watched is what was done, and what is drawn."""

import itertools
import random
from collections import Counter

import pytest
import torch
from matplotlib.transforms import Bbox
from planting import Bug, each_is_caught, law
from torch import nn

from peft_from_scratch.course.pictures import page_picture
from peft_from_scratch.course.pictures.page_picture import (
    AHEAD,
    FAULT,
    HIT,
    Moment,
    picture,
    watched,
)
from peft_from_scratch.paged import PagedAdamW
from peft_from_scratch.paged.pages import Pager


def run(slots: int, pages: int = 8, steps: int = 3):
    """(the optimizer, its moments)"""
    p = nn.Parameter(torch.zeros(8 * pages))
    optimizer = PagedAdamW([p], budget_bytes=64 * slots, page_bytes=64)
    with watched(optimizer) as moments:
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
    return optimizer, moments


@law
def faults_are_those_of_the_counters():
    for slots in (1, 2, 4, 8):
        optimizer, moments = run(slots)
        seen = Counter(moment.what for moment in moments)
        assert seen[FAULT] + seen[AHEAD] == optimizer.counters.faults
        assert seen[FAULT] + seen[HIT] == 8 * 3  # every use, ahead or not
        assert all(len(moment.resident) <= slots for moment in moments)
        assert all(moment.dirty <= moment.resident for moment in moments)
        assert all(moment.page in moment.resident for moment in moments)


@law
def moments_have_their_steps():
    _, moments = run(4)
    uses = [m for m in moments if m.what in (FAULT, HIT)]
    walks = [[m.page for m in uses if m.step == step] for step in (1, 2, 3)]
    assert [sorted(walk) for walk in walks] == [list(range(8))] * 3


@law
def dirty_is_what_was_updated():
    _, moments = run(8)
    assert moments[0].dirty == frozenset()
    assert moments[-1].dirty >= {0, 1, 2, 3}


def test_watching_ends_with_the_block_and_changes_nothing():
    p = nn.Parameter(torch.zeros(64))
    optimizer = PagedAdamW([p], budget_bytes=256, page_bytes=64)
    with pytest.raises(KeyError), watched(optimizer) as moments:
        p.grad = torch.ones(64)
        optimizer.step()
        raise KeyError
    seen = len(moments)
    optimizer.step()
    assert len(moments) == seen
    other, _ = run(4, steps=2)
    assert torch.equal(p, other.param_groups[0]["params"][0])
    assert optimizer.counters == other.counters


def by_last_use(slots, trace):
    """Another LRU: among the resident, the one whose last use is furthest back."""
    last, resident, count = {}, set(), 0
    for now, page in enumerate(trace):
        if page not in resident:
            count += 1
            if len(resident) == slots:
                resident.remove(min(resident, key=last.get))
            resident.add(page)
        last[page] = now
    return count


@law
def faults_are_those_of_another_lru():
    dice = random.Random(0)
    for slots in (1, 2, 3, 5):
        trace = [dice.randrange(7) for _ in range(200)]
        assert page_picture.faults(slots, trace) == by_last_use(slots, trace)


def test_a_walk_that_starts_over_never_hits():
    assert page_picture.faults(7, [*range(8)] * 5) == 40
    assert page_picture.faults(8, [*range(8)] * 5) == 8
    there_and_back = [*range(8), *reversed(range(8))] * 2
    assert page_picture.faults(4, there_and_back) == 8 + 3 * 4


@law
def back_and_forth_has_the_fewest_faults():
    for pages, slots, steps in (
        (8, 4, 3),
        (5, 1, 4),
        (4, 4, 3),
        (3, 5, 2),
        (16, 8, 20),
    ):
        order = page_picture.back_and_forth(pages, slots, steps)
        assert [sorted(walk) for walk in order] == [[*range(pages)]] * steps
        trace = [page for walk in order for page in walk]
        fewest = pages + (steps - 1) * max(pages - slots, 0)
        assert page_picture.faults(slots, trace) == fewest


MOMENTS = [
    Moment(1, 0, FAULT, frozenset({0}), frozenset()),
    Moment(1, 1, AHEAD, frozenset({0, 1}), frozenset({0})),
    Moment(2, 1, HIT, frozenset({0, 1}), frozenset({0})),
]


def places(figure) -> dict:
    return {
        line.get_gid(): sorted(zip(*map(list, line.get_data()), strict=True))
        for line in figure.axes[0].lines
        if line.get_gid() != "step"
    }


@law
def every_cell_is_drawn_once():
    found = places(picture(MOMENTS, pages=3, title="Three pages"))
    assert found == {
        "resident, clean": [(1, 0), (2, 1), (3, 1)],
        "resident, dirty": [(2, 0), (3, 0)],
        "in the store": [(1, 1), (1, 2), (2, 2), (3, 2)],
        FAULT: [(1, 0)],
        AHEAD: [(2, 1)],
        HIT: [(3, 1)],
    }


@law
def looks_differ_without_colour():
    figure = picture(MOMENTS, pages=3, title="Three pages")
    lines = [li for li in figure.axes[0].lines if li.get_gid() != "step"]
    shapes = [
        (li.get_marker(), li.get_markersize(), li.get_markerfacecolor() == "#ffffff")
        for li in lines
    ]
    assert len(set(shapes)) == len(lines) == 6


@law
def steps_are_marked():
    figure = picture(MOMENTS, pages=3, title="Three pages")
    marks = [li.get_xdata()[0] for li in figure.axes[0].lines if li.get_gid() == "step"]
    assert marks == [0.5, 2.5]
    assert [t.get_text() for t in figure.axes[0].texts] == ["step 1", "step 2"]


@pytest.mark.parametrize("width", [5.5, 7.4])
def test_nothing_overlaps_and_nothing_is_cut(width):
    _, moments = run(4)
    figure = picture(moments, pages=8, title="Eight pages, four slots", width=width)
    figure.canvas.draw()
    axes = figure.axes[0]
    texts = [*figure.texts, *axes.texts, axes.xaxis.label, axes.yaxis.label]
    boxes = [t.get_window_extent() for t in texts if t.get_text()]
    boxes += [t.get_window_extent() for t in axes.get_yticklabels()]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    for one, other in itertools.combinations(boxes, 2):
        shared = Bbox.intersection(one, other)
        assert shared is None or min(shared.size) < 0.5, (one, other)
    assert all(figure.bbox.contains(*b.min) and figure.bbox.contains(*b.max)
               for b in boxes)  # fmt: skip


@pytest.mark.parametrize("moments, pages", [([], 3), (MOMENTS, 1)])
def test_what_cannot_be_drawn_is_refused(moments, pages):
    with pytest.raises(ValueError, match=f"{len(moments)} moments on {pages} pages"):
        picture(moments, pages=pages, title="No")


BUGS = {
    "uses are not seen": Bug(
        Pager.use,
        "self._tell(page, event)",
        "pass",
        faults_are_those_of_the_counters,
    ),
    "a page that is there is asked for ahead": Bug(
        Pager.prefetch,
        "self._touch(page)\n        return",
        "self._touch(page)\n        return self._tell(page, PREFETCH)",
        faults_are_those_of_the_counters,
    ),
    "looked at before, not after": Bug(
        Pager.use,
        "event = FAULT if page.slot is None else HIT\n"
        "    if page.slot is None:\n"
        "        self._bring(page)\n",
        "if page.slot is None:\n"
        "        self._bring(page)\n"
        "    event = FAULT if page.slot is None else HIT\n"
        "    if False:\n"
        "        pass\n",
        faults_are_those_of_the_counters,
    ),
    "steps not counted": Bug(
        watched,
        "moments.append(Moment(steps[-1]",
        "moments.append(Moment(1",
        moments_have_their_steps,
    ),
    "clean and dirty are one": Bug(
        watched, "if entry.dirty", "if entry.resident", dirty_is_what_was_updated
    ),
    "the one used last leaves": Bug(
        page_picture.faults, "last=False", "last=True", faults_are_those_of_another_lru
    ),
    "a hit is no use": Bug(
        page_picture.faults,
        "        resident.move_to_end(page)\n",
        "",
        faults_are_those_of_another_lru,
    ),
    "always forward": Bug(
        page_picture.back_and_forth,
        "if step % 2",
        "if False",
        back_and_forth_has_the_fewest_faults,
    ),
    "a slot too many": Bug(
        page_picture.faults,
        "len(resident) > slots",
        "len(resident) > slots + 1",
        faults_are_those_of_another_lru,
    ),
    "dirty drawn as clean": Bug(
        page_picture._places,
        "if page in moment.dirty",
        "if False",
        every_cell_is_drawn_once,
    ),
    "a page too few": Bug(
        page_picture._places,
        "range(pages)",
        "range(pages - 1)",
        every_cell_is_drawn_once,
    ),
    "told by colour alone": Bug(
        page_picture._handles,
        '"in the store": (theme.muted, {"marker": "o", "markersize": 1.5})',
        '"in the store": (theme.paper, square)',
        looks_differ_without_colour,
    ),
    "steps not marked": Bug(
        page_picture._name, "moment.step != last", "last is None", steps_are_marked
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
