"""What requantizing keeps of an update: measured by a definition, drawn as given."""

from itertools import pairwise

import pytest
import torch
from figure_overlaps import assert_apart
from planting import Bug, each_is_caught, law

from peft_from_scratch.course.pictures import merge_picture
from peft_from_scratch.course.pictures.merge_picture import (
    BACK,
    FROM,
    TO,
    half_kept,
    kept,
    losses,
    nearest,
    rounding,
    shares,
)
from peft_from_scratch.nf4 import CODES, dequantize, quantize

VALUES = sorted(map(float, CODES["nf4"]))[7:12]
MOVES = {
    "A small update is rounded back.": (VALUES[1], 0.02),
    "A large update passes the middle.": (VALUES[1], 0.06),
    "A negative one.": (VALUES[2], -0.05),
}
LOSSES = {"untrained": [2.0], "trained": [0.1, 0.2], "merged": [1.3, 1.2]}
LINES = {
    "rounded": [(0.1, 0.0, 0, 1), (1, 2, 1, 3), (10, 80, 70, 90), (100, 99, 98, 100)],
    "control": [(0.1, 101.0, 90, 110), (100, 100, 99, 101)],
    "trained": [(36.0, 98.0)],
}


@law
def a_share_is_the_projection_on_the_update():
    torch.manual_seed(0)
    W, update = torch.randn(5, 7), torch.randn(5, 7)
    across = torch.randn(5, 7)
    across -= (across * update).sum() / update.square().sum() * update
    for share in (0.0, 0.25, 1.0, -2.0):
        after = W + share * update + across
        assert kept(W, after, update) == pytest.approx(share, abs=1e-5)
    assert kept(W, W, update) == 0.0


@law
def half_is_kept_at_the_threshold():
    torch.manual_seed(0)
    for scale in (1.0, 1e-3):
        q = quantize(scale * torch.randn(96, 128))
        A, B = torch.randn(4, 128), 10 * torch.randn(96, 4)
        W, t = dequantize(q), half_kept(q, A, B)
        for ratio, low, high in (
            (t, 0.45, 0.55),
            (t / 3, -0.1, 0.2),
            (3 * t, 0.9, 1.1),
        ):
            update = ratio * W.norm() * (B @ A) / (B @ A).norm()
            after = dequantize(quantize(W + update))
            assert low < kept(W, after, update) < high


@law
def rounding_goes_to_the_nearest_value():
    codebook = sorted(map(float, CODES["nf4"]))
    for number in torch.linspace(-1, 1, 41).tolist():
        w = torch.tensor([1.0, number])
        rounded = dequantize(quantize(w, double=False))[1].item()
        assert nearest(codebook, number) == pytest.approx(rounded, abs=1e-6)
    assert nearest([0.0, 1.0], 0.5) == 0.0


@law
def a_move_is_drawn_with_its_rounding():
    axes = rounding(VALUES, MOVES, title="Rounding").axes[0]
    places = {
        name: [line.get_xdata()[0] for line in axes.lines if line.get_gid() == name]
        for name in (FROM, TO, BACK)
    }
    moved = [weight + update for weight, update in MOVES.values()]
    assert places[FROM] == [weight for weight, _ in MOVES.values()]
    assert places[TO] == pytest.approx(moved)
    assert places[BACK] == [VALUES[1], VALUES[2], VALUES[1]]
    middles = [li.get_xdata()[0] for li in axes.lines if li.get_gid() == "middle"]
    assert middles == [(a + b) / 2 for a, b in pairwise(VALUES)]
    assert [text.get_text() for text in axes.texts if text.get_text()] == list(MOVES)


@law
def a_bar_has_the_mean_and_a_dot_each_loss():
    axes = losses(LOSSES, title="Losses").axes[0]
    bars = [bar.get_width() for bar in axes.patches]
    assert bars == pytest.approx([2.0, 0.15, 1.25])
    assert [list(line.get_xdata()) for line in axes.lines] == list(LOSSES.values())
    assert axes.get_xlim()[0] == 0
    assert "trained: 0.15" in [text.get_text() for text in axes.texts]


@law
def the_curves_are_the_data_and_the_control_is_grey():
    axes = shares(LINES, control="control", title="Shares").axes[0]
    drawn = [line for line in axes.lines if line.get_gid() != "half"]
    for line, rows in zip(drawn, LINES.values(), strict=True):
        assert list(zip(*line.get_data(), strict=True)) == [row[:2] for row in rows]
    assert drawn[1].get_linestyle() == "--"
    assert list(axes.get_xticks()) == [0.1, 1, 10, 100]


@pytest.mark.parametrize("width", [5.5, 7.4])
def test_nothing_overlaps(width):
    assert_apart(rounding(VALUES, MOVES, title="Rounding", subtitle="a", width=width))
    assert_apart(losses(LOSSES, title="Losses", width=width))
    assert_apart(shares(LINES, control="control", title="Shares", width=width))


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="two values are needed"):
        rounding(VALUES[:1], MOVES, title="Rounding")
    with pytest.raises(ValueError, match="two values are needed"):
        rounding(VALUES, {}, title="Rounding")
    with pytest.raises(ValueError, match="a loss in each"):
        losses({"untrained": []}, title="Losses")


BUGS = {
    "a ratio of norms": Bug(
        merge_picture.kept,
        "(after - before) * update",
        "(after - before) * (after - before)",
        a_share_is_the_projection_on_the_update,
    ),
    "not by the square": Bug(
        merge_picture.kept,
        "update.square().sum()",
        "update.norm()",
        a_share_is_the_projection_on_the_update,
    ),
    "the search goes to the wrong side": Bug(
        merge_picture.half_kept, "< 0.5", "> 0.5", half_is_kept_at_the_threshold
    ),
    "the update is not measured by the weight": Bug(
        merge_picture.half_kept,
        "W.norm() / direction.norm()",
        "1 / direction.norm()",
        half_is_kept_at_the_threshold,
    ),
    "rounded up": Bug(
        merge_picture.nearest,
        "abs(value - number)",
        "abs(value - number - 0.04)",
        rounding_goes_to_the_nearest_value,
    ),
    "rounded from where it began": Bug(
        merge_picture._move,
        "nearest(values, moved)",
        "nearest(values, weight)",
        a_move_is_drawn_with_its_rounding,
    ),
    "the sum of the losses": Bug(
        merge_picture.losses,
        "/ len(row)",
        "/ 1",
        a_bar_has_the_mean_and_a_dot_each_loss,
    ),
    "no control": Bug(
        merge_picture.shares,
        "control=[control]",
        "control=[]",
        the_curves_are_the_data_and_the_control_is_grey,
    ),
}
test_a_planted_bug_is_caught = each_is_caught(BUGS)
