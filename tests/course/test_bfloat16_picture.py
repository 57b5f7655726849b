"""What bfloat16 keeps of an update: neighbors, gaps, and the picture of them."""

import pytest
import torch
from figure_overlaps import assert_apart
from planting import assert_caught

from peft_from_scratch.course.pictures import bfloat16_picture as pictures
from peft_from_scratch.course.pictures.bfloat16_picture import (
    AFTER,
    BEFORE,
    EXACT,
    moved,
)

WEIGHT = 0.05
ROWS = {
    "one update of 0.001": moved(WEIGHT, 1e-3),
    "and back": moved(moved(WEIGHT, 1e-3).stored, -1e-3),
    "one update of 0.00001": moved(WEIGHT, 1e-5),
    "100 updates, in bfloat16": moved(WEIGHT, 1e-5, 100),
    "100 updates, in a master copy": moved(WEIGHT, 1e-5, 100, master=True),
}


def figure(width=7.4):
    return pictures.picture(WEIGHT, ROWS, title="What is rounded away", width=width)


def assert_moves_as_an_optimizer_does():
    """Against torch's own subtraction in bfloat16 and float32."""
    for update in (1e-3, 1e-4, 1e-5):
        W = torch.tensor(WEIGHT, dtype=torch.bfloat16)
        master, start = W.float(), W.item()
        for _ in range(30):
            W, master = (W.float() - update).bfloat16(), master - update
        alone, with_master = (moved(WEIGHT, update, 30, kept) for kept in (False, True))
        assert alone.stored == W.item()
        assert with_master.stored == master.bfloat16().item()
        assert alone.exact == with_master.exact == pytest.approx(start - 30 * update)


def test_a_weight_moves_as_an_optimizer_moves_it():
    assert_moves_as_an_optimizer_does()


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("W = rounded(W - update)", "W = W - update"),
        ("M = M - update\n", "M = (M - update).bfloat16()\n"),
        ("start - times * update", "start - update"),
        ("rounded(M.item()) if master", "M.item() if master"),
    ],
)
def test_a_planted_bug_is_caught(right, wrong):
    assert_caught(moved, right, wrong, assert_moves_as_an_optimizer_does)


@pytest.mark.parametrize("low, high", [(0.03, 0.04), (0.9, 1.1), (1e-3, 1.1e-3)])
def test_neighbors_are_all_values_and_no_others(low, high):
    every = torch.arange(0, 2**15 - 2**7, dtype=torch.int16).view(torch.bfloat16)
    expected = [value for value in every.tolist() if low <= value <= high]
    assert pictures.neighbors(low, high) == expected
    assert len(expected) > 1


@pytest.mark.parametrize("weight", [0.05, 1.0, 0.0013, 3.7])
def test_just_inside_half_a_gap_is_rounded_back_and_just_outside_is_not(weight):
    W = pictures.rounded(weight)
    low, high = pictures.half_gaps(weight)
    for end, near in ((low, W - low), (high, high - W)):
        inside, outside = (end + side * 0.01 * near for side in (1, -1))
        if end == high:
            inside, outside = outside, inside
        assert pictures.rounded(inside) == W
        assert pictures.rounded(outside) != W


def test_the_picture_has_every_value_and_where_each_row_ends():
    axes = figure().axes[0]
    lines = [line for line in axes.lines if line.get_gid() == "value"]
    places = [line.get_xdata()[0] for line in lines]
    assert places == pictures.neighbors(*axes.get_xlim())
    fields = {BEFORE: "start", EXACT: "exact", AFTER: "stored"}
    for name, field in fields.items():
        ends = [line.get_xdata()[0] for line in axes.lines if line.get_gid() == name]
        assert ends == [getattr(move, field) for move in ROWS.values()]
    (band,) = (patch for patch in axes.patches if patch.get_gid() == "band")
    left, right = band.get_x(), band.get_x() + band.get_width()
    assert (left, right) == pytest.approx(pictures.half_gaps(WEIGHT))


def test_the_words_say_what_moved():
    words = pictures.words(ROWS, WEIGHT)
    assert "one update of 0.001: -0.000977 from the old weight" in words
    assert "100 updates, in bfloat16: at the old weight" in words


@pytest.mark.parametrize("width", [5.2, 7.4])
def test_nothing_overlaps(width):
    assert_apart(figure(width))


@pytest.mark.parametrize("weight, rows", [(0.05, {}), (0.0, ROWS), (-1.0, ROWS)])
def test_what_cannot_be_drawn_is_refused(weight, rows):
    with pytest.raises(ValueError, match="above 0"):
        pictures.picture(weight, rows, title="Nothing")


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (2.0, 1.0)])
def test_no_neighbors_where_the_order_of_bits_is_another(low, high):
    with pytest.raises(ValueError, match="needed"):
        pictures.neighbors(low, high)
