"""Laws of NF4's code books and blocks: derivations, and brute force in float64."""

import math
from dataclasses import fields
from unittest import mock

import pytest
import torch
from planting import law
from torch import nn

from peft_from_scratch import nf4
from peft_from_scratch.memory.meter import Meter
from peft_from_scratch.nf4 import blocks, codes
from peft_from_scratch.nf4.double import BLOCK, DoubleQuantized, double_quantize
from peft_from_scratch.nf4.spec import spec_dequantize, spec_quantize

CPU = torch.device("cpu")
EPS = 2**-23
HALF = (torch.float32, torch.bfloat16, torch.float16)


def values(code):
    return torch.tensor(nf4.CODES[code], dtype=torch.float64)


def drawn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def per_value(q, constants):
    """Each value's constant: (n,)."""
    return constants.repeat_interleave(q.block)[: q.numel]


@law
def the_published_table_is_its_derivation():
    """Quantiles by torch's own inverse: another program than the library's."""
    quantile = torch.special.ndtri
    tail = 1 - codes.OFFSET
    negative = quantile(torch.linspace(tail, 0.5, 8, dtype=torch.float64))[:-1]
    positive = quantile(torch.linspace(0.5, 1 - tail, 9, dtype=torch.float64))[1:]
    zero = torch.zeros(1, dtype=torch.float64)
    derived = torch.cat([negative, zero, positive])
    derived = derived / derived.max()
    assert (derived - values("nf4")).abs().max() < 2e-7
    assert (nf4.normal_float() - values("nf4")).abs().max() < 2e-7
    assert (derived - nf4.normal_float()).abs().max() < 1e-14


@law
def the_offset_is_the_one_that_the_table_was_made_with():
    """0.9677083 is nowhere in the paper: of all offsets it alone gives its table.

    It is the mean of two: 1 - 1/30, beyond which lies half of a fifteenth, and
    1 - 1/32, beyond which lies half of a sixteenth. Neither gives the table by itself.
    """
    mean = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    assert abs(codes.OFFSET - mean) < 1e-15
    assert round(codes.OFFSET, 7) == 0.9677083

    def off(offset):
        return (nf4.normal_float(offset) - values("nf4")).abs().max().item()

    assert min(off(1 - 1 / 30), off(1 - 1 / 32)) > 1e-4
    grid = [codes.OFFSET + k * 1e-6 for k in range(-300, 301)]
    assert min(grid, key=off) == pytest.approx(codes.OFFSET, abs=1.5e-6)


@law
def int4_rounds_to_sevenths_of_the_largest():
    w = drawn(640)
    q = nf4.quantize(w, 64, False, "int4")
    unit = per_value(q, w.view(-1, 64).abs().amax(1)).double() / 7
    k = (w.double() / unit).round()
    assert torch.equal(q.codes().double() - 8, k)
    assert k.min() == -7 and k.max() == 7
    assert (nf4.dequantize(q) - k * unit).abs().max() < 4 * EPS


@law
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def affine_is_fifteen_steps_from_the_lowest_to_the_highest(block=32):
    for n in (block * 8, block * 8 + 5, block - 1):
        w = drawn(n) + 0.7
        affine = nf4.Affine.of(w, block)
        exact = torch.empty(n, dtype=torch.float64)
        for start in range(0, n, block):
            part = w[start : start + block].double()
            step = (part.max() - part.min()) / 15
            code = ((part - part.min()) / step).round()
            exact[start : start + block] = part.min() + code * step
        assert (affine.dequantize() - exact).abs().max() < 8 * EPS
        count = -(-n // block)
        assert affine.bits_per_value == 8 * (-(-n // 2) + 8 * count) / n
    assert nf4.Affine.of(drawn(block * 8), block).bits_per_value == 4 + 64 / block


def assert_equal_to_the_spec(w, block=64, code="nf4"):
    """quantize and dequantize give the spec's bits; a zero's sign counts too."""
    codes_, absmax = spec_quantize(w, block, code)
    exact = spec_dequantize(codes_, absmax, block, code)
    q = nf4.quantize(w, block, False, code)
    assert torch.equal(q.codes().long(), codes_)
    assert same_bits(q.absmax, absmax)
    assert same_bits(nf4.dequantize(q, torch.float32), exact.view(w.shape))
    assert torch.equal(nf4.dequantize(q), exact.view(w.shape).to(w.dtype))
    doubled = nf4.quantize(w, block, True, code)
    exact = spec_dequantize(codes_, doubled.constants(), block, code)
    assert torch.equal(doubled.packed, q.packed)
    assert same_bits(nf4.dequantize(doubled, torch.float32), exact.view(w.shape))


def same_bits(ours, expected):
    assert ours.dtype == expected.dtype == torch.float32
    return torch.equal(ours.view(torch.int32), expected.view(torch.int32))


def of_one_kind():
    """Tensors whose blocks are ordinary, short, zero, tiny, huge or on a midpoint."""
    ordinary, w = drawn(5, 7, 11), drawn(640)
    yield from (ordinary, drawn(64 * 6), drawn(1), torch.empty(0), torch.tensor(-3.0))
    yield from (torch.zeros(130), torch.cat([drawn(64), torch.zeros(70)]))
    for exponent in (-44, -40, -38, -37, -36, 0, 37):
        yield w.double().mul(10.0**exponent).float()
        yield torch.cat([w, w.double().mul(10.0**exponent).float()[:100]])
    absmax = drawn(48, 1).abs() + 0.1
    for code in nf4.CODES:
        _, midpoints, _ = codes.book(code, CPU)
        on_midpoints = torch.cat([midpoints, torch.ones(1)])
        yield on_midpoints.repeat(8)
        # Here w / absmax and w · (1 / absmax) are often on two sides of a midpoint.
        yield absmax * on_midpoints
        yield from absmax[:12] * on_midpoints


@law
@pytest.mark.parametrize("dtype", HALF)
def the_definition_and_the_library_are_bit_equal(dtype=torch.float32):
    for w in of_one_kind():
        w = w.to(dtype)
        for block in (1, 3, 16, 64, 100) if w.isfinite().all() else ():
            for code in nf4.CODES:
                assert_equal_to_the_spec(w, block, code)


def every_code_is_the_nearest(code="nf4", n=3000, block=64, dtype=torch.float32):
    w = drawn(n, dtype=dtype)
    q = nf4.quantize(w, block, False, code)
    absmax = per_value(q, q.absmax.double())
    distance = (w.double()[:, None] - values(code) * absmax[:, None]).abs()
    chosen = distance.gather(1, q.codes().long()[:, None])[:, 0]
    assert (chosen <= distance.amin(1) + 4 * EPS * absmax).all()
    restored = values(code)[q.codes().long()] * absmax
    found = nf4.dequantize(q, torch.float32)
    assert (found - restored).abs().max() <= EPS * restored.abs().max()


@law
def blocks_are_runs_of_values_in_memory_order():
    """absmax of each, by a loop; each block's largest and every zero are exact."""
    w = drawn(5, 7, 11)
    w[w.abs() < 0.3] = 0
    for block in (3, 16, 64, 1000):
        q = nf4.quantize(w, block, False)
        flat, restored = w.flatten(), nf4.dequantize(q).flatten()
        largest = [max(map(abs, part.tolist())) for part in flat.split(block)]
        assert q.absmax.tolist() == largest
        at_end = flat.abs() == per_value(q, q.absmax)
        assert at_end.sum() >= len(largest)
        assert torch.equal(restored[at_end], flat[at_end])
        assert (restored[flat == 0] == 0).all()
        assert q.absmax.min() > 0 or block == 3


@law
def the_first_of_a_pair_is_in_the_high_nibble():
    w = torch.tensor([-1.0, 1.0, 0.0, -1.0, 1.0])
    q = nf4.quantize(w, 64, False)
    assert q.packed.tolist() == [0x0F, 0x70, 0xF7]  # the odd one out with a zero
    assert q.codes().tolist() == [0, 15, 7, 0, 15]
    assert torch.equal(nf4.dequantize(q), w)


@law
def views_are_taken_as_they_read(block=8):
    w = drawn(6, 10)
    for view in (w.T, w[:, ::2], w[1:, 3:], w.expand(2, 6, 10), w.flip(0)):
        ours = nf4.quantize(view, block, False)
        of_copy = nf4.quantize(view.clone(memory_format=torch.contiguous_format), block)
        assert torch.equal(ours.packed, of_copy.packed) and ours.shape == view.shape
        restored = nf4.dequantize(ours)
        assert restored.is_contiguous() and (restored - view).abs().max() < 0.5
    parameter = torch.nn.Parameter(w.clone())
    assert not nf4.dequantize(nf4.quantize(parameter)).requires_grad
    assert torch.equal(parameter, w)


@law
def what_is_not_finite_is_refused_with_its_place():
    for dtype in HALF:
        for value in (math.nan, math.inf, -math.inf):
            for at in ((0, 0), (2, 5), (4, 6)):  # the last is in the short block
                w = drawn(5, 7, dtype=dtype)
                w[at] = value
                w[4, 6] = value
                with pytest.raises(ValueError) as caught:
                    nf4.quantize(w, 16)
                assert f"w[{at[0]}, {at[1]}] is {value}" in str(caught.value)
    with pytest.raises(ValueError, match=r"w\[\] is nan"):
        nf4.quantize(torch.tensor(math.nan))


@law
def a_nan_is_not_quantized():
    try:
        nf4.quantize(torch.tensor([1.0, math.nan]))
    except ValueError:
        return
    raise AssertionError("NaN was quantized")


@law
def scales_below_1e_37_lose_nothing():
    """Whole multiples of the smallest float32: the codes are those of the multiples.

    1 / absmax is beyond float32 there, so that these blocks are divided.
    """
    k = torch.randint(-127, 128, (640,), generator=torch.Generator().manual_seed(0))
    k[::64] = 127
    for exponent in (-149, -142, -131, -125):
        tiny = torch.ldexp(k.double(), torch.tensor(exponent)).float()
        assert 0 < tiny.abs().max() < 1e-35
        for n in (640, 639, 40):  # a short block too, and it alone
            q, expected = (nf4.quantize(w[:n], 64, False) for w in (tiny, k.float()))
            assert torch.equal(q.packed, expected.packed)
            assert torch.equal(q.absmax[:1], tiny[:1].abs())


def pieces_on_the_way_are_not_seen(chunk=256):
    """Lengths around a chunk's end: the same bits as in one piece."""
    whole, parts = in_pieces_of(1 << 30), in_pieces_of(chunk)
    for block in (1, 3, 64, 100, 512):
        for n in (chunk - 1, chunk, chunk + 1, 2 * chunk - 1, 3 * chunk + 5):
            w = drawn(n)
            with whole:
                expected = nf4.quantize(w, block, False)
                restored = nf4.dequantize(expected)
            with parts:
                q = nf4.quantize(w, block, False)
                assert torch.equal(q.packed, expected.packed)
                assert torch.equal(q.absmax, expected.absmax)
                assert same_bits(nf4.dequantize(q), restored)


def in_pieces_of(chunk):
    return mock.patch.multiple(blocks, CHUNK=chunk, LOOKUP_CHUNK=chunk)


@law
def threads_and_places_are_not_seen():
    """One thread or three; a result in pairs, beside pairs, of odd length, in bf16."""
    before = torch.get_num_threads()
    try:
        for n in (6 * 64, 6 * 64 + 1, 6 * 64 + 2, 6 * 64 + 7, 1):
            q = nf4.quantize(drawn(n), 64, False)
            codes_ = q.codes()
            exact = spec_dequantize(codes_, q.absmax, 64, "nf4")
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for start in (0, 1, 2):
                    room = torch.full((n + 3,), 7.0)
                    found = nf4.dequantize(q, out=room[start : start + n])
                    assert same_bits(found, exact)
                    outside = torch.cat([room[:start], room[start + n :]])
                    assert (outside == 7).all()
                half = nf4.dequantize(q, torch.bfloat16)
                assert torch.equal(half, exact.to(torch.bfloat16))
    finally:
        torch.set_num_threads(before)


@law
def temporaries_on_a_gpu_are_of_a_piece():
    """At most 12 bytes a value of a piece, however large the weight; and equal bits."""
    w, piece = drawn(1 << 18), 1 << 14
    expected = nf4.quantize(w, 64, False)
    out, nothing = torch.empty_like(w), nn.Linear(1, 1)
    on_a_gpu = mock.Mock(type="cuda")
    chunks = blocks._chunks

    def chunks_there(n, block, device, most):
        return chunks(n, block, on_a_gpu, most)

    with (
        mock.patch.object(blocks, "GPU_CHUNK", piece),
        mock.patch.object(blocks, "_chunks", chunks_there),
    ):
        with Meter(nothing) as quantizing:
            q = nf4.quantize(w, 64, False)
        with Meter(nothing) as dequantizing:
            nf4.dequantize(q, out=out)
    assert torch.equal(q.packed, expected.packed)
    assert torch.equal(out, nf4.dequantize(expected))
    lasting = w.nbytes + q.packed.nbytes + q.absmax.nbytes
    for meter in (quantizing, dequantizing):
        assert 0 < meter.memory().peak - lasting < 13 * piece


@law
def out_is_written_to_and_its_dtype_counts():
    q = nf4.quantize(drawn(6, 50), 64)
    exact = nf4.dequantize(q)
    for dtype in (*HALF, torch.float64):
        for shape in ((300,), (50, 6), (6, 50)):
            out = torch.full(shape, 7.0, dtype=dtype)
            found = nf4.dequantize(q, out=out)
            assert found.data_ptr() == out.data_ptr() and found.shape == q.shape
            assert torch.equal(found, exact.to(dtype))
        assert torch.equal(nf4.dequantize(q, dtype), exact.to(dtype))
    for out in (torch.empty(299), torch.empty(50, 6).T, torch.empty(600)[::2]):
        with pytest.raises(ValueError, match="a contiguous one of 300 values"):
            nf4.dequantize(q, out=out)


def tensors_of(q):
    found = [getattr(q, f.name) for f in fields(q)]
    found += (
        [getattr(q.absmax, f.name) for f in fields(q.absmax)] if q_is_double(q) else []
    )
    return [value for value in found if isinstance(value, torch.Tensor)]


def q_is_double(q):
    return isinstance(q.absmax, DoubleQuantized)


@law
def bits_a_value_are_counted_from_the_tensors():
    """4.5, and 4.127 with the constants in eight bits: here of 2¹⁸ values."""
    w = drawn(2**18)
    for double, block in (
        (False, 64),
        (False, 32),
        (True, 64),
        (True, 32),
        ("fp8", 64),
    ):
        q = nf4.quantize(w, block, double)
        held = sum(t.numel() * t.element_size() for t in tensors_of(q))
        assert q.bits_per_value == 8 * held / w.numel() and q.nbytes == held
        extra = 8 / block + 32 / (block * BLOCK) + 32 / w.numel()
        assert q.bits_per_value == 4 + (extra if double else 32 / block)
    assert nf4.quantize(w, double=False).bits_per_value == 4.5
    # The offset, one number a tensor, is what is left to the limit.
    at_4096 = nf4.quantize(w).bits_per_value - 32 / 2**18 + 32 / 4096**2
    assert round(at_4096, 3) == 4.127


def constants(blocks_, seed=0, block=64):
    """Those of normal weights."""
    return drawn(blocks_, block, seed=seed).abs().amax(1)


def torchao(absmax):
    """Its NF4Tensor: the mean off, whole steps of the block's largest over 128."""
    mean = absmax.double().mean()
    rows = torch.nn.functional.pad(absmax - mean, (0, -len(absmax) % 256))
    rows = rows.view(-1, 256).double()
    factor = 128 / rows.abs().amax(1, keepdim=True)
    steps = (rows * factor).round().clamp(-128, 127)
    return (steps / factor).flatten()[: len(absmax)] + mean


def in_fp8(absmax):
    """The paper's: torch's own E4M3, of which 448 is the largest number."""
    mean = absmax.double().mean()
    rows = torch.nn.functional.pad(absmax - mean, (0, -len(absmax) % 256))
    rows = rows.view(-1, 256).double()
    unit = rows.abs().amax(1, keepdim=True)
    eight = (rows / unit * 448).float().to(torch.float8_e4m3fn).double()
    return (eight / 448 * unit).flatten()[: len(absmax)] + mean


REFERENCES = {"int8": torchao, "fp8": in_fp8}


@law
@pytest.mark.parametrize("code", REFERENCES)
def doubled_constants_are_those_of(code):
    for count in (256 * 8, 256 * 3 + 17, 300):
        absmax = constants(count)
        doubled = double_quantize(absmax, code)
        assert doubled.codes.dtype == torch.uint8 and len(doubled.nested_absmax) == -(
            -count // 256
        )
        expected = REFERENCES[code](absmax)
        off = (doubled.dequantize() - expected).abs()
        # Where a ratio lies in the middle of two, float32 may take the other one.
        assert (off < 1e-6).double().mean() > 0.995
        assert off.max() < 0.07 * doubled.nested_absmax.max()


@law
@pytest.mark.parametrize("code", ["dynamic", "fp8", "int8"])
def doubled_constants_are_close_to_their_own(code="dynamic"):
    """Within half of the coarsest step of the code book, and the mean block exactly."""
    absmax = constants(256 * 5 + 3)
    doubled = double_quantize(absmax, code)
    table = codes.book(code, CPU).values
    gap = table.diff().max() / 2 + 1 / 65535
    bound = gap * doubled.nested_absmax.repeat_interleave(256)[: len(absmax)]
    at_the_end = doubled.codes == (table.numel() - 1)
    off = (doubled.dequantize() - absmax).abs()
    assert (off <= bound * 1.001 + 1e-6)[~at_the_end].all()
    assert doubled.offset == pytest.approx(absmax.mean().item(), rel=1e-6)
    rows = torch.nn.functional.pad(absmax - absmax.mean(), (0, 253)).view(-1, 256)
    assert torch.allclose(doubled.nested_absmax, rows.abs().amax(1), rtol=1e-6)


@law
def whole_steps_restore_normal_constants_best():
    """The three recipes on constants of normal weights, in each of five seeds."""
    for seed in range(5):
        absmax = constants(256 * 16, seed)

        def off(code, absmax=absmax):
            restored = double_quantize(absmax, code).dequantize()
            return ((restored - absmax).norm() / absmax.norm()).item()

        errors = {code: off(code) for code in ("dynamic", "fp8", "int8")}
        assert errors["int8"] < errors["dynamic"] < errors["fp8"] < 0.01, errors


def large(kind, dtype):
    """Finite weights of 300 blocks, their constants at the end of a dtype's range."""
    torch.manual_seed(0)
    end = torch.finfo(dtype).max
    w = (torch.randn(300, 64).clamp(-1, 1) * torch.rand(300, 1) * end).to(dtype)
    if kind == "a sum that overflows":
        return w.flatten() / 128
    w[: 200 if kind == "most at the end" else 300, 0] = end
    return w.flatten()


@law
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind", ["most at the end", "all at the end", "a sum that overflows"]
)
def what_is_finite_comes_back_finite(kind="most at the end", dtype=torch.float32):
    """Within what the constants' eight bits lose of the largest one."""
    w = large(kind, dtype)
    single = nf4.dequantize(nf4.quantize(w)).double()
    for double in (True, "fp8", "int8"):
        back = nf4.dequantize(nf4.quantize(w, double=double))
        assert back.isfinite().all(), double
        assert (back.double() - single).abs().max() < 0.04 * w.double().abs().max()
