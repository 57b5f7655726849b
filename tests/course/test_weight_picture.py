"""When a dequantized weight exists: what was traced is what was done, and is drawn."""

import pytest
import torch
from figure_overlaps import assert_apart
from planting import Bug, each_is_caught, law
from torch import nn

import peft_from_scratch as pfs
from peft_from_scratch.course import bit_costs
from peft_from_scratch.course.pictures import weight_picture
from peft_from_scratch.course.pictures.weight_picture import (
    most_alive,
    picture,
    spans,
    traced,
)

ORDER = "layers.0.q layers.0.up layers.1.q layers.1.q layers.0.up".split()


def run():
    return bit_costs.Steps("tiny", pfs.qlora, "gap-1", template="raw", rows=2)


@law
def a_trace_has_every_product_in_its_order():
    small = run()
    calls = traced(small.model, small.step)
    packed = [
        name.removesuffix(".base")
        for name, module in small.model.named_modules()
        if isinstance(module, pfs.nf4.NF4Linear)
    ]
    forward, backward = calls[: len(packed)], calls[len(packed) :]
    assert forward == packed
    assert sorted(backward) == sorted(packed[3:])  # but q, k and v of the first layer
    layers = [name.split(".")[2] for name in backward]
    assert layers == sorted(layers, reverse=True)


def test_tracing_ends_with_the_step():
    model = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError):
        traced(model, lambda: 1 / 0)
    assert not pfs.nf4.NF4Linear.on_dequantize


@law
def spans_go_from_the_first_call_to_the_last():
    assert spans(ORDER) == {
        "layers.0.q": (1, 1),
        "layers.0.up": (2, 5),
        "layers.1.q": (3, 4),
    }
    assert list(spans(ORDER)) == ORDER[:3]


@law
def all_that_autograd_keeps_counts_at_its_height():
    assert most_alive(ORDER) == 2
    assert most_alive(["a"]) == 1
    assert most_alive(["a", "b", "c", "c", "b", "a"]) == 3
    assert most_alive(["a", "a", "b", "b"]) == 1


@law
def every_call_and_every_span_is_drawn():
    axes = picture(ORDER, title="When").axes[0]
    squares = [p for p in axes.patches if p.get_gid() == "product"]
    bars = [p for p in axes.patches if p.get_gid() == "between"]
    rows = list(spans(ORDER))
    centers = [(p.get_x() + 0.5, p.get_y() + 0.5) for p in squares]
    assert centers == [(i, rows.index(name)) for i, name in enumerate(ORDER, 1)]
    ends = [(p.get_x() + 0.5, p.get_x() + p.get_width() - 0.5) for p in bars]
    assert ends == list(spans(ORDER).values())
    (turn,) = [line for line in axes.lines if line.get_gid() == "turn"]
    assert turn.get_xdata()[0] == 3.5
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "1"]


@pytest.mark.parametrize("width", [5.0, 7.4])
def test_nothing_overlaps(width):
    small = run()
    calls = traced(small.model, small.step)
    assert_apart(picture(calls, title="When a weight exists", width=width))


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="no calls"):
        picture([], title="When")


def counting_ends_with_the_step():
    try:
        traced(nn.Identity(), lambda: None)
        assert not pfs.nf4.NF4Linear.on_dequantize
    finally:
        pfs.nf4.NF4Linear.on_dequantize.clear()


def test_a_step_dequantizes_twice_but_below_where_nothing_learns():
    small = run()
    layers = sum(isinstance(m, pfs.nf4.NF4Linear) for m in small.model.modules())
    calls = traced(small.model, small.step)
    assert len(calls) == 2 * layers - 3  # q, k, v of the first
    assert traced(small.model, lambda: None) == []
    counting_ends_with_the_step()
    whole = pfs.nf4.NF4Linear(pfs.nf4.quantize(torch.eye(8)))
    assert torch.equal(whole(torch.eye(8)), torch.eye(8))


BUGS = {
    "dequantizations are counted for ever": Bug(
        weight_picture.traced,
        "NF4Linear.on_dequantize.remove(layers.append)",
        "pass",
        counting_ends_with_the_step,
    ),
    "the wrong name": Bug(
        weight_picture.traced,
        '.removesuffix(".base")',
        "",
        a_trace_has_every_product_in_its_order,
    ),
    "the last call is forgotten": Bug(
        weight_picture.spans,
        "ends[name] = first, place",
        "ends.setdefault(name, (first, place))",
        spans_go_from_the_first_call_to_the_last,
    ),
    "an end does not count": Bug(
        weight_picture.most_alive,
        "first <= place <= last",
        "first < place < last",
        all_that_autograd_keeps_counts_at_its_height,
    ),
    "squares in the order of the calls": Bug(
        weight_picture.picture,
        "list(ends).index(name)",
        "place",
        every_call_and_every_span_is_drawn,
    ),
    "a bar too short": Bug(
        weight_picture._bar,
        "last - first + 1",
        "last - first",
        every_call_and_every_span_is_drawn,
    ),
}
test_a_planted_bug_is_caught = each_is_caught(BUGS)
