"""Laws of `nf4.unpacked`: weights that stay dequantized while a model answers."""

import copy
import pickle
import time
import weakref
from contextlib import contextmanager, suppress
from unittest import mock

import pytest
import torch
from architectures import build
from model_state import gradients, largest, logits, loss, train
from planting import law
from torch import nn

import peft_from_scratch as pfs
from laws.nf4.linear import (
    as_if_with_streams,
    drawn,
    in_four_bits,
    layer,
    packed,
    two_threads_on,
)
from peft_from_scratch import nf4
from peft_from_scratch.core.counting import count
from peft_from_scratch.memory.meter import Meter
from peft_from_scratch.nf4 import NF4Linear, keeping, linear

ALL = 1 << 40  # bytes: more than any model here needs
HALF = torch.bfloat16


@contextmanager
def dequantizations():
    """The layers that dequantize inside the block, one entry each time."""
    seen = []
    NF4Linear.on_dequantize.append(seen.append)
    try:
        yield seen
    finally:
        NF4Linear.on_dequantize.remove(seen.append)


@contextmanager
def slow_dequantizations():
    """So that two threads that do not wait for each other meet in one."""

    def wait(layer):
        time.sleep(5e-3)

    NF4Linear.on_dequantize.append(wait)
    try:
        yield
    finally:
        NF4Linear.on_dequantize.remove(wait)


def in_full(model, dtype=torch.float32):
    """Bytes of all weights in four bits, each in this dtype."""
    return sum(m.values for m in packed(model).values()) * dtype.itemsize


@law
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def kept_weights_answer_with_the_same_bits(architecture="llama"):
    for dtype in (torch.float32, HALF):
        model = in_four_bits(architecture, of=dtype)
        layers = list(packed(model).values())
        expected = logits(model)
        with nf4.unpacked(model, budget_bytes=ALL) as kept, dequantizations() as seen:
            for _ in range(3):
                assert torch.equal(logits(model), expected)
            assert kept.nbytes == in_full(model, dtype)
        assert sorted(map(id, seen)) == sorted(map(id, layers))  # each of them once
        assert torch.equal(logits(model), expected)


@law
def autocast_and_its_end_are_seen_inside():
    """A weight of another dtype is made anew, and no bytes are counted twice."""
    model = in_four_bits()
    plain = logits(model)
    with torch.autocast("cpu", HALF):
        half = logits(model)
    with nf4.unpacked(model, budget_bytes=in_full(model)) as kept:
        for _ in range(2):
            assert torch.equal(logits(model), plain)
            assert kept.nbytes == in_full(model)
            with torch.autocast("cpu", HALF):
                assert torch.equal(logits(model), half)
                assert kept.nbytes == in_full(model, HALF)
    assert kept.nbytes == 0


@law
def the_budget_is_never_exceeded():
    """Weights are kept in the order of use; a smaller one may fit where one did not."""
    model = in_four_bits()
    expected, layers = logits(model), list(packed(model).values())
    sizes = [4 * module.values for module in layers]
    budgets = (0, min(sizes) - 1, min(sizes), sum(sizes[:5]), sum(sizes) - 1, ALL)
    for budget in budgets:
        fits, left = set(), budget
        for module, size in zip(layers, sizes, strict=True):
            if size <= left:
                fits.add(module)
                left -= size
        with nf4.unpacked(model, budget_bytes=budget) as kept:
            logits(model)
            assert kept.nbytes == budget - left <= budget
            with dequantizations() as seen:
                assert torch.equal(logits(model), expected)
            assert set(seen) == set(layers) - fits


@law
def the_meter_counts_what_is_kept():
    """Two layers need one buffer; kept, each needs its own weight in full."""
    model, x = nn.Sequential(layer(256, 256), layer(256, 256)), drawn(1, 256)
    peaks = []
    for budget in (0, ALL):
        nf4.share_buffer(model)
        with (
            torch.no_grad(),
            Meter(model) as meter,
            nf4.unpacked(model, budget_bytes=budget),
        ):
            model(x)
        peaks.append(meter.memory().peak)
    assert peaks[1] - peaks[0] == 4 * 256 * 256


def weights_of(kept):
    """Weak references to what it keeps."""
    return [weakref.ref(W) for W, *_ in kept._weights.values()]


@law
def all_is_freed_at_the_end_also_after_an_error():
    model = in_four_bits()
    for error in (None, ValueError, KeyboardInterrupt):
        with (
            suppress(ValueError, KeyboardInterrupt),
            nf4.unpacked(model, budget_bytes=ALL) as kept,
        ):
            logits(model)
            weights = weights_of(kept)
            assert len(weights) == len(packed(model))
            if error:
                raise error
        assert kept.nbytes == 0
        assert [w() for w in weights] == [None] * len(weights)
        assert {m.unpacked for m in packed(model).values()} == {None}


@law
def no_graph_holds_a_kept_weight():
    """A loss made inside, and differentiated after the end: the same gradients.

    Through layers with a LoRA in front, and through plain ones.
    """
    model = in_four_bits()
    pfs.lora.inject(model, r=2, targets="attention")
    train(model, 1)
    expected = gradients(model)
    with nf4.unpacked(model, budget_bytes=ALL) as kept:
        assert largest(gradients(model), expected) == 0
        model.zero_grad()
        late = loss(model)
        weights = weights_of(kept)
        assert len(weights) == len(packed(model))
    assert [w() for w in weights] == [None] * len(weights)
    late.backward()
    found = {name: p.grad for name, p in pfs.trainable(model).items()}
    assert all(torch.equal(found[name], g) for name, g in expected.items())


def loaded(model):
    other = build("llama", seed=1)
    nf4.quantize_model(other)
    model.load_state_dict(other.state_dict())


def written_by_hand(model):
    for module in packed(model).values():
        module.packed.bitwise_not_()


def other_constants(model):
    for module in packed(model).values():
        module.absmax_offset.mul_(2)


def another_tensor(model):
    for module in packed(model).values():
        other = ~module.packed
        while other._version < module.packed._version:
            other.add_(0)
        module.packed = other


CHANGES = (loaded, written_by_hand, other_constants, another_tensor, nn.Module.double)


@law
def a_change_inside_is_seen():
    for change in CHANGES:
        model = in_four_bits()
        before, twin = logits(model), copy.deepcopy(model)
        change(twin)
        with nf4.unpacked(model, budget_bytes=ALL) as kept:
            assert torch.equal(logits(model), before)
            change(model)
            assert torch.equal(logits(model), logits(twin)), change.__name__
            assert not torch.equal(logits(model), before.to(logits(twin).dtype))
            dtype = torch.float64 if change is nn.Module.double else torch.float32
            assert kept.nbytes == in_full(model, dtype)


@law
def inference_first_and_training_afterwards_in_one_block():
    model = in_four_bits()
    pfs.lora.inject(model, r=2)
    expected = gradients(model)
    with nf4.unpacked(model, budget_bytes=ALL):
        with torch.inference_mode():
            model(torch.arange(3, 9)[None])
        assert largest(gradients(model), expected) == 0


@law
def a_block_in_a_block_leaves_the_outer_one_its_weights():
    model = in_four_bits()
    expected = logits(model)
    with nf4.unpacked(model, budget_bytes=ALL) as outer:
        logits(model)
        with nf4.unpacked(model, budget_bytes=ALL) as inner, dequantizations() as seen:
            assert torch.equal(logits(model), expected)
            assert inner.nbytes == 0 and not seen
        assert outer.nbytes == in_full(model)
        with dequantizations() as seen:
            assert torch.equal(logits(model), expected)
        assert not seen


@law
def a_copy_made_inside_keeps_nothing():
    model = in_four_bits()
    expected = logits(model)
    with nf4.unpacked(model, budget_bytes=ALL) as kept:
        logits(model)
        before = kept.nbytes
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert {m.unpacked for m in packed(other).values()} == {None}
            assert torch.equal(logits(other), expected)
        assert kept.nbytes == before
        assert count(model) == count(other)
        assert model.state_dict().keys() == other.state_dict().keys()


@law
def two_threads_in_one_block_dequantize_once():
    model = in_four_bits()
    ask = two_threads_on(model)
    with (
        nf4.unpacked(model, budget_bytes=ALL) as kept,
        dequantizations() as seen,
        slow_dequantizations(),
    ):
        wrong = ask()
        assert kept.nbytes == in_full(model)
    assert not wrong and len(seen) == len(packed(model))


@law
def a_stream_does_not_read_what_another_one_writes():
    model, x = layer(), drawn(2, 40)
    expected, streams = model(x), iter((1, 2, 1, 2))
    with (
        as_if_with_streams(),
        mock.patch.object(linear, "_stream", lambda device: (device, next(streams))),
        nf4.unpacked(model, budget_bytes=ALL) as kept,
        dequantizations() as seen,
    ):
        for _ in range(4):
            with torch.no_grad():
                assert torch.equal(model(x), expected)
        assert len(seen) == 2 and kept.nbytes == 2 * 4 * model.values


@law
def an_error_while_a_weight_is_made_counts_no_bytes():
    model, x = layer(), drawn(2, 40)
    expected = model(x)

    def no_memory(out):
        raise RuntimeError("not enough memory")

    with nf4.unpacked(model, budget_bytes=4 * model.values) as kept:
        with (
            mock.patch.object(model, "dequantize_into", no_memory),
            pytest.raises(RuntimeError, match="not enough memory"),
        ):
            model(x)
        assert kept.nbytes == 0
        assert torch.equal(model(x), expected) and kept.nbytes == 4 * model.values


@law
def a_budget_that_is_none_is_refused():
    model = in_four_bits()
    for budget in (-1, 1.5, "1 GB", None, True):
        with (
            pytest.raises(ValueError, match="budget_bytes"),
            keeping.unpacked(model, budget_bytes=budget),
        ):
            raise AssertionError("inside")
        assert {m.unpacked for m in packed(model).values()} == {None}
    with nf4.unpacked(build("llama"), budget_bytes=ALL) as kept:
        assert kept.nbytes == 0  # a model in full has nothing to keep
