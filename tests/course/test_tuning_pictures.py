"""Pictures of settings: what is drawn against what was given, to scale and in place."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from planting import Bug, each_is_caught, law

from peft_from_scratch.course.pictures import tuning_pictures as pictures

TEXTS = {"title": "A finding", "subtitle": "What was drawn."}
COUNTS = {"first": {0.1: 5, 0.3: 10, 1.0: 0}, "second": {0.3: 4, 1.0: 9}}
OWN = {"first": 0.3, "second": 1.0}
SHAPES = {"wide": (6, 20), "tall": (30, 10), "square": (12, 12)}
PLACES = {"two": (("wide", "tall"), 3), "all": (tuple(SHAPES), 2)}


def patches(axes, name):
    return [p for p in axes.patches if p.get_gid() == name]


def grid():
    return pictures.rate_grid(COUNTS, OWN, of=10, shared=0.3, **TEXTS).axes[0]


@law
def each_cell_has_its_share():
    axes = grid()
    said = {text.get_position(): text.get_text() for text in axes.texts}
    shown = [[said[x, y] for x in range(3)] for y in range(2)]
    assert shown == [["50 %", "100 % ★", "0 %"], ["not run", "40 %", "90 % ★"]]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(COUNTS)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.1", "0.3", "1"]


@law
def the_best_are_framed_and_the_shared_column_is_dashed():
    axes = grid()
    best = {(round(p.get_x()), round(p.get_y())) for p in patches(axes, "best")}
    assert best == {(1, 0), (2, 1)}
    (shared,) = patches(axes, "shared")
    assert shared.get_x() == 0.5 and shared.get_width() == 1
    assert shared.get_height() == 2 and shared.get_linestyle() != "solid"


@law
def more_right_is_darker():
    light = {
        text.get_text(): sum(p.get_facecolor()[:3])
        for text in grid().texts
        for p in grid().patches
        if p.get_gid() != "shared" and p.contains_point(_pixel(p, text))
    }
    assert light["100 % ★"] < light["50 %"] < light["0 %"]


def _pixel(patch, text):
    return patch.axes.transData.transform(text.get_position())


def test_a_chosen_rate_without_a_run_is_refused():
    with pytest.raises(ValueError, match=r"second has no run at its chosen rate 0\.1"):
        pictures.rate_grid(COUNTS, {"second": 0.1}, of=10, shared=0.3, **TEXTS)


SIDES = {
    "left": {"a": [(1, 2.0), (4, 3.0)], "b": [(1, 1.0, 0.5, 1.5), (4, 2.0, 1, 4)]},
    "right": {"b": [(1, 7.0), (4, 9.0)]},
}


def both(**more):
    names = {"x": ("Rank, count",) * 2, "y": ("Loss, nats", "Size, share")}
    return pictures.panels(SIDES, **names, **TEXTS, **more)


@law
def curves_are_where_their_rows_are():
    for axes, side in zip(both().axes, SIDES.values(), strict=True):
        drawn = [line.get_xydata().tolist() for line in axes.lines]
        assert drawn == [[list(row[:2]) for row in rows] for rows in side.values()]
    left = both().axes[0]
    (bars,) = [c for c in left.collections if c.get_gid() == "range"]
    assert [s[:, 1].tolist() for s in bars.get_segments()] == [[0.5, 1.5], [1, 4]]


@law
def equal_labels_look_the_same():
    left, right = both().axes
    assert left.lines[1].get_color() == right.lines[0].get_color()
    assert left.lines[0].get_color() != left.lines[1].get_color()
    grey = both(control=("a",)).axes[0].lines[0]
    assert grey.get_linestyle() == "--"


@law
def axes_start_where_they_should():
    left, right = both().axes
    assert left.get_ylim()[0] == right.get_ylim()[0] == 0
    assert left.get_ylim()[1] < 5 < right.get_ylim()[1]
    left, right = both(same_y=True).axes
    assert left.get_ylim() == right.get_ylim()
    left, _ = both(log=("xy", "x")).axes
    assert left.get_yscale() == "log" and left.get_ylim()[0] > 0
    ticks = [tick.get_text() for tick in left.get_xticklabels()]
    assert ticks == ["1", "4"]
    apart = both().axes
    assert apart[0].get_position().x1 < apart[1].get_position().x0


def layers():
    return pictures.target_rows(SHAPES, PLACES, **TEXTS).axes[0]


def area(patch):
    return patch.get_width() * patch.get_height()


@law
def colored_areas_are_numbers_of_parameters():
    axes = layers()
    pairs = [(t, r) for targets, r in PLACES.values() for t in targets]
    for name, side in (("A", 1), ("B", 0)):
        wanted = [r * SHAPES[target][side] for target, r in pairs]
        assert sorted(map(area, patches(axes, name))) == sorted(wanted)
    frozen = sorted(map(area, patches(axes, "frozen")))
    assert frozen == sorted(2 * [o * i for o, i in SHAPES.values()])


@law
def a_strip_lies_along_its_side():
    axes = layers()
    sides = {o * i: (o, i) for o, i in SHAPES.values()}
    for name, side in (("A", 1), ("B", 0)):
        for strip in patches(axes, name):
            weights = [w for w in patches(axes, "frozen") if _touch(strip, w)]
            assert len(weights) == 1
            shape = sides[round(area(weights[0]))]
            assert max(strip.get_width(), strip.get_height()) == shape[side]


def _ends(patch):
    (x, y), wide, tall = patch.get_xy(), patch.get_width(), patch.get_height()
    return np.array([[x, x + wide], [y, y + tall]])


def _touch(a, b):
    """Two rectangles share a whole side of `a`."""
    (xa, ya), (xb, yb) = _ends(a), _ends(b)
    over = np.allclose(xa, xb) and np.isclose(ya[1], yb[0])
    beside = np.allclose(ya, yb) and np.isclose(xa[1], xb[0])
    return over or beside


def _lap(a, b):
    (xa, ya), (xb, yb) = _ends(a), _ends(b)
    inside = (
        min(xa[1], xb[1]) - max(xa[0], xb[0]),
        min(ya[1], yb[1]) - max(ya[0], yb[0]),
    )
    return min(inside) > 1e-9


@law
def nothing_overlaps():
    drawn = [p for p in layers().patches if isinstance(p, Rectangle)]
    assert not any(_lap(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match=r"\['q'\] are none of wide, tall, square"):
        pictures.target_rows(SHAPES, {"one": (("q", "wide"), 1)}, **TEXTS)


GROUPS = {
    "near": {"one": (0.5, 0.2, 0.9), "two": (-0.1, -0.4, 0.2)},
    "far": {"one": (-2.0, -2.5, -1.0)},
}


@law
def differences_stand_in_their_rows():
    figure = pictures.forest(GROUPS, x="Loss, nats", sides=("worse", "better"), **TEXTS)
    axes = figure.axes[0]
    spans = [c.get_segments()[0] for c in axes.collections if c.get_gid() == "interval"]
    rows = [row for group in GROUPS.values() for row in group.values()]
    assert [s[:, 0].tolist() for s in spans] == [list(row[1:]) for row in rows]
    dots = [line for line in axes.lines if line.get_gid() != "zero"]
    assert [dot.get_xdata()[0] for dot in dots] == [row[0] for row in rows]
    assert [round(dot.get_ydata()[0]) for dot in dots] == [0, 0, 1]
    assert len({to_hex(dot.get_color()) for dot in dots}) == 2
    (zero,) = [line for line in axes.lines if line.get_gid() == "zero"]
    assert set(zero.get_xdata()) == {0}
    left, right = axes.get_xlim()
    assert left <= -2.5 and right >= 0.9


BUGS = {
    "the share of the next": Bug(
        pictures.rate_grid,
        "by_rate[rate] / of",
        "by_rate[rate] / 5",
        each_cell_has_its_share,
    ),
    "no star": Bug(pictures._entry, " ★", "", each_cell_has_its_share),
    "the wrong column": Bug(
        pictures.rate_grid,
        "rates.index(shared) - 0.5",
        "rates.index(shared) + 0.5",
        the_best_are_framed_and_the_shared_column_is_dashed,
    ),
    "the best are not framed": Bug(
        pictures._entry,
        'gid="best" if best else "cell"',
        'gid="cell"',
        the_best_are_framed_and_the_shared_column_is_dashed,
    ),
    "more right is lighter": Bug(
        pictures._entry, "share**2", "(1 - share)", more_right_is_darker
    ),
    "the ends of one bar": Bug(
        pictures._curve,
        "xs, *ends",
        "xs, ends[0], ends[0]",
        curves_are_where_their_rows_are,
    ),
    "each panel has its own looks": Bug(
        pictures.panels, "looks[label]", "looks[labels[0]]", equal_labels_look_the_same
    ),
    "a linear axis that starts anywhere": Bug(
        pictures._finish,
        "axes.set_ylim(bottom=0)",
        "pass",
        axes_start_where_they_should,
    ),
    "each its own limits": Bug(
        pictures.panels, "if same_y:", "if False:", axes_start_where_they_should
    ),
    "A and B swapped": Bug(
        pictures._layer,
        '("A", "B") if d_in >= d_out',
        '("A", "B") if d_in < d_out',
        colored_areas_are_numbers_of_parameters,
    ),
    "a strip on its weight": Bug(
        pictures._layer, "(left, top - r), wide", "(left, top), wide", nothing_overlaps
    ),
    "weights close together": Bug(
        pictures._layer, "left += wide + gap", "left += wide", nothing_overlaps
    ),
    "a strip that stands apart": Bug(
        pictures._layer,
        "(left - r, top), r",
        "(left - 2 * r, top), r",
        a_strip_lies_along_its_side,
    ),
    "low and high swapped": Bug(
        pictures._dot,
        "value, low, high = values",
        "value, high, low = values",
        differences_stand_in_their_rows,
    ),
    "no line at zero": Bug(
        pictures.forest,
        "axes.axvline(0,",
        "axes.axvline(1,",
        differences_stand_in_their_rows,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS)
