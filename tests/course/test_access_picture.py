"""Who reads what: counts against formulas, and pictures against the counts."""

import math

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from planting import Bug, each_is_caught, law

from peft_from_scratch.course.pictures import access_picture as pictures
from peft_from_scratch.kernels.language import Tiles, matrix
from peft_from_scratch.kernels.lora import product
from peft_from_scratch.kernels.trace import trace

M, N, K, R = 40, 90, 50, 5
TEXTS = {"title": "Who reads what", "subtitle": "Times each element is read."}


def traced(sweep=2, group=1, turn=False):
    """(a trace of the fused product in blocks of 16, its tensors)"""
    shapes = {"x": (M, K), "W": (N, K), "A": (R, K), "B": (N, R), "y": (M, N)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    if turn:
        tensors |= {n: tensors[n].T.contiguous().T for n in "xW"}
    x, W, A, B, y = tensors.values()
    tiles = Tiles(m=16, n=16, k=16, sweep=sweep, group=group)
    with trace() as seen:
        product(x, matrix(W), N, A=A, B=B, out=y, tiles=tiles)
    return seen, tensors


@law
def each_element_is_counted_as_often_as_its_blocks():
    for sweep, turn in ((1, False), (2, True)):
        seen, tensors = traced(sweep, turn=turn)
        down, across = math.ceil(M / 16), math.ceil(N / 16)
        expected = {
            "x": across,
            "W": down,
            "A": down * math.ceil(across / sweep),
            "B": down,
            "y": 1,
        }
        for name, times in expected.items():
            count = pictures.counts(seen, name, tensors[name])
            assert count.shape == tensors[name].shape
            assert (count == times).all(), name
        said = pictures.words(seen, {"x": tensors["x"], "y": tensors["y"]})
        assert said == (
            f"Each element is read: x {across} times; is written: y 1 time."
        )


@law
def a_footprint_is_what_the_program_needs():
    seen, tensors = traced(sweep=2)
    one = {n: pictures.counts(seen, n, t, program=1) for n, t in tensors.items()}
    assert (one["x"][:16] == 2).all() and not one["x"][16:].any()
    assert (one["W"][32:64] == 1).all() and one["W"].sum() == 32 * K
    assert (one["y"][:16, 32:64] == 1).all() and one["y"].sum() == 16 * 32
    assert (one["A"] == 1).all()


@law
def programs_go_in_the_order_of_their_group():
    for group in (1, 2):
        seen, tensors = traced(sweep=1, group=group)
        found = pictures.order(seen, tensors["y"])[::16, ::16]
        rows = [[0, 1, 2], [6, 7, 8]] if group == 1 else [[0, 2, 4], [1, 3, 5]]
        assert found[:2, :3].tolist() == rows
        assert sorted(found.flat) == list(range(18))


@law
def a_window_counts_what_it_shares_once():
    seen, tensors = traced(sweep=1)
    whole = 4 * sum(tensors[name].numel() for name in "xWAB")
    assert pictures.window_bytes(seen, 18) == whole
    alone = pictures.window_bytes(seen, 1)
    assert alone == seen.bytes("load") / 18
    assert whole < 18 * pictures.window_bytes(seen, 6) / 6 < 18 * alone


def boxes(figure):
    return [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]


def lies_in(box, extent):
    left, right, bottom, top = extent
    (x, y), across, down = box.get_xy(), box.get_width(), box.get_height()
    return left <= x and x + across <= right and top <= y and y + down <= bottom


@law
def the_picture_outlines_the_footprint():
    seen, tensors = traced()
    figure = pictures.picture(seen, tensors, program=1, **TEXTS)
    marked = [box for box in boxes(figure) if box.get_gid() == "footprint"]
    sizes = sorted((box.get_width(), box.get_height()) for box in marked)
    assert sizes == sorted([(K, 16), (32, K), (R, K), (32, R), (32, 16)])
    panels = [image.get_extent() for image in figure.axes[0].images]
    assert all(any(lies_in(box, panel) for panel in panels) for box in marked)
    labels = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert all(
        said in labels
        for said in ("x: 6 times", "Wᵀ: 3 times", "Aᵀ: 9 times", "y: 1 time")
    )
    plain = {name: tensors[name] for name in "xWy"}
    assert len(pictures.picture(seen, plain, program=0, **TEXTS).axes[0].images) == 3


BUGS = {
    "an element twice in a block counts once": Bug(
        pictures._count,
        "np.add.at(total, access.elements, 1)",
        "total[:] = 1",
        each_element_is_counted_as_often_as_its_blocks,
    ),
    "rows for columns": Bug(
        pictures.positions,
        "tensor.stride(0)",
        "tensor.shape[1]",
        each_element_is_counted_as_often_as_its_blocks,
    ),
    "every program's": Bug(
        pictures.counts,
        "a.program[0]",
        "program",
        a_footprint_is_what_the_program_needs,
    ),
    "stores for loads": Bug(
        pictures.counts,
        'seen.of("load", name) or ',
        "",
        each_element_is_counted_as_often_as_its_blocks,
    ),
    "the other axis": Bug(
        pictures.order,
        "program[0]",
        "program[1]",
        programs_go_in_the_order_of_their_group,
    ),
    "a window one too long": Bug(
        pictures.window_bytes,
        "< first + window",
        "<= first + window",
        a_window_counts_what_it_shares_once,
    ),
    "each read counted": Bug(
        pictures.window_bytes, "distinct=True", "", a_window_counts_what_it_shares_once
    ),
    "the last row left out": Bug(
        pictures._outline,
        "np.ptp(rows) + 1",
        "np.ptp(rows)",
        the_picture_outlines_the_footprint,
    ),
    "outside its tensor": Bug(
        pictures._outline,
        "spot[0] + columns[0]",
        "columns[0]",
        the_picture_outlines_the_footprint,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)


def test_orders_stand_side_by_side():
    traces = {str(group): traced(sweep=1, group=group)[0] for group in (1, 2)}
    y = torch.empty(M, N)
    figure = pictures.order_picture(traces, y, window=6, **TEXTS)
    assert len(boxes(figure)) == 2 * 18
    blue = [
        box
        for box in boxes(figure)
        if box.get_facecolor()[2] > 0.8 > box.get_facecolor()[0]
    ]
    assert len(blue) == 2 * 6
    area = sum(box.get_width() * box.get_height() for box in boxes(figure))
    assert area == 2 * M * N
    edge = max(box.get_x() + box.get_width() for box in boxes(figure))
    assert edge <= figure.axes[0].get_xlim()[1]


def test_a_tensor_without_a_place_is_refused():
    seen, tensors = traced()
    with pytest.raises(ValueError, match=r"\['h'\] have no place; x, W, y, A, B have"):
        pictures.picture(seen, {"h": tensors["x"]}, program=0, **TEXTS)


def test_ranges_are_told():
    assert pictures.often(np.array([[1, 4]])) == "1 to 4 times"
