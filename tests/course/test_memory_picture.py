"""Memory over time: what is drawn is what a meter saw; what a page fault moves."""

import itertools

import numpy as np
import pytest
import torch
from figure_overlaps import assert_apart
from matplotlib.transforms import Bbox
from planting import Bug, each_is_caught, law
from torch import nn

from peft_from_scratch.course.pictures import memory_picture
from peft_from_scratch.course.pictures.memory_picture import (
    Timeline,
    hierarchy,
    paged_out,
    picture,
    timeline,
)
from peft_from_scratch.course.pictures.page_picture import AHEAD, FAULT, Moment
from peft_from_scratch.memory.meter import Meter


def metered(rows=(4, 64, 4)):
    """(meter, timeline) of some optimizer steps of a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    updates, ends = [], []
    with Meter(model) as meter:
        for n in rows:
            model(torch.ones(n, 16)).square().sum().backward()
            updates.append(len(meter.events))
            optimizer.step()
            optimizer.zero_grad()
            ends.append(len(meter.events))
    return meter, timeline(meter, updates, ends)


@law
def the_maxima_are_the_meters():
    meter, times = metered()
    memory = meter.memory()
    for kind, values in times.bytes.items():
        assert values.max() == getattr(memory, kind), kind
    assert times.total.max() == memory.peak == max(times.peaks())
    assert len(times.peaks()) == 3 and times.peaks()[1] > times.peaks()[2]


def invented(states=4.0, spike=6.0) -> Timeline:
    """Two optimizer steps, the second with a spike; GB."""
    names = ("weights", "optimizer", "gradients", "activations")
    rows = [
        [2, states, 0, 0],
        [2, states, 0, 1],
        [2, states, 1, 0],  # update
        [2, states, 0, 0],  # end
        [2, states, 0, spike],
        [2, states, 1, 1],
        [2, states, 1, 0],  # update
        [2, states, 0, 0],  # end
    ]
    columns = np.array(rows).T * 1e9
    return Timeline(dict(zip(names, columns, strict=True)), (2, 6), (3, 7))


@law
def states_leave_as_far_as_they_must():
    paged = paged_out(invented(), 9e9)
    assert paged.total.max() == 9e9
    assert list(paged.bytes["optimizer"] / 1e9) == [4, 4, 4, 4, 1, 1, 4, 4]
    for kind in ("weights", "gradients", "activations"):
        assert (paged.bytes[kind] == invented().bytes[kind]).all()


@law
def no_more_than_the_states_can_leave():
    paged = paged_out(invented(states=4, spike=20), 9e9)
    assert paged.bytes["optimizer"].min() == 0
    assert max(invented(4, 20).peaks()) - max(paged.peaks()) == 4e9


@law
def an_overshoot_is_hatched_and_nothing_else():
    (axes,) = picture(invented(), ["a", "b"], limit=9e9, title="Too much").axes
    (over,) = [c for c in axes.collections if c.get_gid() == "over"]
    heights = over.get_paths()[0].vertices[:, 1]
    assert heights.max() == 12 and heights.min() == 9
    assert over.get_hatch()
    (line,) = [li for li in axes.lines if li.get_gid() == "limit"]
    assert set(line.get_ydata()) == {9}
    paged = paged_out(invented(), 9e9)
    (axes,) = picture(paged, ["a", "b"], limit=9e9, title="Fits").axes
    (over,) = [c for c in axes.collections if c.get_gid() == "over"]
    assert over.get_paths()[0].vertices[:, 1].max() == 9


@law
def a_short_peak_is_drawn():
    values = np.ones(5_000)
    values[3_210] = 7
    flat = dict.fromkeys(memory_picture.KINDS, np.zeros(5_000))
    times = Timeline(flat | {"activations": values * 1e9}, (4_000,), (4_999,))
    places, sizes = memory_picture._drawn(times)
    assert sizes.sum(0).max() == 7 and len(places) == memory_picture.POINTS
    assert places[sizes.sum(0).argmax()] == pytest.approx(0.5 + 3210 / 4999, abs=0.01)


@law
def the_axis_starts_at_zero_and_has_all_steps():
    (axes,) = picture(invented(), ["a", "b"], title="Two steps").axes
    assert axes.get_ylim()[0] == 0 and axes.get_xlim() == (0.5, 2.5)
    assert [text.get_text() for text in axes.texts if len(text.get_text()) == 1] == [
        "a",
        "b",
    ]


@pytest.mark.parametrize("width", [6.4, 7.4])
def test_nothing_overlaps(width):
    labels, more = ["64 tokens", "768 tokens"], {"width": width, "limit": 9e9}
    for figure in (
        picture(invented(), labels, title="A spike of 6 GB", **more),
        picture(
            paged_out(invented(), 9e9), labels, before=invented(), title="Gone", **more
        ),
    ):
        assert_apart(figure)


@pytest.mark.parametrize(
    ("updates", "ends"), [([], []), ([2], [1]), ([1, 2], [3]), ([1], [1])]
)
def test_borders_that_do_not_rise_are_refused(updates, ends):
    meter, _ = metered()
    with pytest.raises(ValueError, match="one update is needed before each end"):
        timeline(meter, updates, ends)


def test_each_step_needs_a_label():
    with pytest.raises(ValueError, match="1 labels for 2 optimizer steps"):
        picture(invented(), ["a"], title="No")


BEFORE = Moment(1, 3, AHEAD, frozenset({0, 1, 2, 3}), frozenset({0, 1}))
AFTER = Moment(1, 4, FAULT, frozenset({1, 2, 3, 4}), frozenset({1}))
CLEAN = Moment(1, 3, AHEAD, frozenset({0, 1, 2, 3}), frozenset())


def words(figure) -> list[str]:
    return [" ".join(text.get_text().split()) for text in figure.axes[0].texts]


@law
def what_moves_is_named():
    drawn = words(hierarchy(BEFORE, AFTER, pages=8, title="A fault"))
    assert "first: write back page 0" in drawn and "then: copy in page 4" in drawn
    after = AFTER._replace(dirty=frozenset())
    assert "first: drop (clean) page 0" in words(
        hierarchy(CLEAN, after, pages=8, title="A fault")
    )
    start = Moment(1, 0, FAULT, frozenset(), frozenset())
    first = Moment(1, 0, FAULT, frozenset({0}), frozenset())
    drawn = words(hierarchy(start, first, pages=8, title="A fault"))
    assert "then: copy in page 0" in drawn
    assert not [each for each in drawn if each.startswith("first")]


@law
def every_page_has_its_place():
    drawn = words(hierarchy(BEFORE, AFTER, pages=8, title="A fault"))
    numbers = [int(each) for each in drawn if each.isdigit()]
    assert sorted(numbers) == sorted([*range(8), 1, 2, 3, 4])


def test_the_hierarchy_does_not_overlap():
    figure = hierarchy(BEFORE, AFTER, pages=8, title="A fault", subtitle="Of eight.")
    figure.canvas.draw()
    texts = [*figure.texts, *figure.axes[0].texts]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    for one, other in itertools.combinations(boxes, 2):
        shared = Bbox.intersection(one, other)
        assert shared is None or min(shared.size) < 0.5
    assert all(figure.bbox.contains(*box.max) for box in boxes)


def test_a_hit_is_no_fault():
    with pytest.raises(ValueError, match="page 3 is resident before"):
        hierarchy(BEFORE, BEFORE, pages=8, title="No")


BUGS = {
    "deaths not seen": Bug(
        timeline, "+= change", "+= max(change, 0)", the_maxima_are_the_meters
    ),
    "what was there is forgotten": Bug(
        timeline, "+= meter.size[storage]", "+= 0", the_maxima_are_the_meters
    ),
    "a peak of the whole run": Bug(
        Timeline.peaks, "[start : end + 1]", "[:]", the_maxima_are_the_meters
    ),
    "all states leave": Bug(
        paged_out,
        "np.minimum(states, room)",
        "np.minimum(0 * states, room)",
        states_leave_as_far_as_they_must,
    ),
    "states come back at once": Bug(
        paged_out,
        "np.minimum.accumulate(resident[learning])",
        "resident[learning]",
        states_leave_as_far_as_they_must,
    ),
    "less than nothing": Bug(
        paged_out,
        "np.maximum(limit - (times.total - states), 0)",
        "limit - (times.total - states)",
        no_more_than_the_states_can_leave,
    ),
    "hatched from zero": Bug(
        memory_picture._mark_limit,
        "places, limit, over",
        "places, 0, over",
        an_overshoot_is_hatched_and_nothing_else,
    ),
    "the first moment of a piece": Bug(
        memory_picture._drawn,
        "total[piece].argmax()",
        "0",
        a_short_peak_is_drawn,
    ),
    "an axis from the weights": Bug(
        memory_picture._mark_steps,
        "axes.set_ylim(0,",
        "axes.set_ylim(2,",
        the_axis_starts_at_zero_and_has_all_steps,
    ),
    "a clean page is written": Bug(
        hierarchy, "left & before.dirty", "left", what_moves_is_named
    ),
    "a page too few": Bug(
        memory_picture._places_of,
        "zip(range(pages), _grid(box, pages, 1.85), strict=True)",
        "zip(range(pages - 1), _grid(box, pages, 1.85))",
        every_page_has_its_place,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
