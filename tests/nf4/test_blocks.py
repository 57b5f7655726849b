"""Code books and blocks: against their derivations, and by brute force in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws.nf4.blocks import (
    EPS,
    HALF,
    assert_equal_to_the_spec,
    drawn,
    every_code_is_the_nearest,
    per_value,
    pieces_on_the_way_are_not_seen,
    tensors_of,
    values,
)

import peft_from_scratch as pfs
from peft_from_scratch import nf4
from peft_from_scratch.nf4 import blocks, codes
from peft_from_scratch.nf4.double import double_quantize

# ---------------------------------------------------------------------- Code books


def test_nf4_holds_zero_and_both_ends_and_leans_to_the_positive_side():
    table = values("nf4")
    assert table[0] == -1 and table[7] == 0 and table[15] == 1
    assert (table.diff() > 0).all()
    assert (table > 0).sum() == 8 and (table < 0).sum() == 7


def test_fp4_is_a_sign_two_bits_of_exponent_and_one_of_mantissa():
    """(1 + m/2) 2^(4 - e) twelfths; where e is 0, the subnormal 0.0625 m."""
    for bits, value in enumerate(nf4.CODES["fp4"]):
        sign, e, m = -1 if bits & 8 else 1, bits >> 1 & 3, bits & 1
        twelfths = (1 + m / 2) * 2 ** (4 - e) if e else 0.0625 * m
        assert value == sign * twelfths / 12
    assert sorted(abs(v) for v in nf4.CODES["fp4"])[-1] == 1


def test_affine_keeps_a_constant_block_and_a_shape():
    w = torch.full((3, 32), -1.25)
    w[1] = torch.linspace(0, 15, 32).round()
    affine = nf4.Affine.of(w, 32)
    assert torch.equal(affine.dequantize(), w)


# ------------------------------------------------------------- Definition and library


@pytest.mark.parametrize("code", nf4.CODES)
def test_all_weights_of_tiny_have_the_bits_of_the_definition(code):
    model, _ = pfs.load_model("tiny", device="cpu")
    weights = list(model.parameters())
    assert len(weights) > 20
    for w in weights:
        assert_equal_to_the_spec(w.detach(), 64, code)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    block=st.integers(1, 130),
    seed=st.integers(0, 2**32),
    exponent=st.integers(-42, 4),
    code=st.sampled_from(list(nf4.CODES)),
    dtype=st.sampled_from(HALF),
)
def test_any_shape_has_the_bits_of_the_definition(
    shape, block, seed, exponent, code, dtype
):
    w = drawn(*shape, seed=seed).double() * 10.0**exponent
    assert_equal_to_the_spec(w.clamp(-6e4, 6e4).to(dtype), block, code)


# -------------------------------------------------------------------------- Blocks


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("block", [1, 3, 64, 4096])
@pytest.mark.parametrize("code", nf4.CODES)
def test_every_code_is_the_nearest(code, block, dtype):
    every_code_is_the_nearest(code, 2001, block, dtype)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 400),
    block=st.integers(1, 130),
    seed=st.integers(0, 2**32),
    code=st.sampled_from(list(nf4.CODES)),
)
def test_the_error_is_at_most_half_a_gap_of_the_block(n, block, seed, code):
    w = drawn(n, seed=seed)
    q = nf4.quantize(w, block, False, code)
    table = values(code).sort().values
    inside = table[(table >= -1) & (table <= 1)]
    bound = per_value(q, q.absmax.double()) * inside.diff().max() / 2
    assert ((nf4.dequantize(q) - w).abs() <= bound * (1 + 4 * EPS)).all()


def test_an_outlier_makes_its_own_block_coarse_and_no_other():
    w = drawn(64 * 4)
    before = nf4.dequantize(nf4.quantize(w, 64, False))
    w[70] = 100.0
    after = nf4.dequantize(nf4.quantize(w, 64, False))
    same = (before == after).view(4, 64).all(1)
    assert same.tolist() == [True, False, True, True]
    others = [i for i in range(64, 128) if i != 70]
    assert (after[others] == 0).all()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    "shape", [(), (0,), (0, 4), (4, 0), (1,), (7,), (3, 5), (2, 3, 4), (1, 1, 1)]
)
def test_shapes(shape, double):
    w = drawn(*shape)
    q = nf4.quantize(w, 4, double)
    assert q.shape == w.shape and q.numel == w.numel()
    assert q.packed.shape == (-(-w.numel() // 2),)
    assert len(q.constants()) == -(-w.numel() // 4)
    restored = nf4.dequantize(q)
    assert restored.shape == w.shape and restored.dtype == w.dtype
    assert len(q.codes()) == w.numel()
    assert w.numel() == 0 or (restored - w).abs().max() < w.abs().max() / 2


def test_a_tensor_without_values_has_no_bits_a_value():
    with pytest.raises(ValueError, match=r"\(0, 4\) holds no value"):
        _ = nf4.quantize(torch.empty(0, 4)).bits_per_value


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.int8, torch.uint8, torch.bool, torch.complex64],
)
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(ValueError, match=f"{dtype} cannot be quantized: use float32"):
        nf4.quantize(torch.zeros(4, dtype=dtype))


@pytest.mark.parametrize(
    "argument, value, allowed",
    [
        ("block", 0, "a whole number from 1 on"),
        ("block", -64, "a whole number from 1 on"),
        ("block", 64.0, "a whole number from 1 on"),
        ("block", True, "a whole number from 1 on"),
        ("block", "64", "a whole number from 1 on"),
        ("code", "nf5", "nf4, fp4, int4"),
        ("double", "nf4", "False, True, 'dynamic', 'fp8', 'int8'"),
    ],
)
def test_arguments_out_of_range_are_refused(argument, value, allowed):
    with pytest.raises(ValueError, match=f"^{argument}=.*: allowed (is|are) {allowed}"):
        nf4.quantize(torch.zeros(4), **{argument: value})


def test_large_scales_lose_nothing():
    """Up to the largest number that there is; the scale is a power of two."""
    w = drawn(640).clamp(-1, 1)
    w[::64] = 1.0
    for dtype, exponent in ((torch.float32, 127), (torch.bfloat16, 127)):
        large = w.to(dtype) * 2.0**exponent
        q, expected = (nf4.quantize(t, 64, False) for t in (large, w.to(dtype)))
        assert torch.equal(q.packed, expected.packed)
        assert torch.equal(nf4.dequantize(q), nf4.dequantize(expected) * 2.0**exponent)
    q = nf4.quantize(torch.tensor([65504.0, -1.0], dtype=torch.float16))
    assert nf4.dequantize(q)[0] == 65504


def test_pieces_on_the_way_are_not_seen():
    pieces_on_the_way_are_not_seen()
    every_code_is_the_nearest(n=blocks.CHUNK + 65)


@pytest.mark.parametrize("double", [False, True, "fp8", "int8"])
def test_to_moves_every_tensor(double):
    q = nf4.quantize(drawn(130), 64, double)
    for device in ("cpu", "meta"):
        moved = q.to(device)
        assert {t.device.type for t in tensors_of(moved)} == {device}
        assert [t.shape for t in tensors_of(moved)] == [t.shape for t in tensors_of(q)]
        for name in ("shape", "dtype", "block", "codebook"):
            assert getattr(moved, name) == getattr(q, name)
    assert torch.equal(nf4.dequantize(q.to("cpu")), nf4.dequantize(q))


# --------------------------------------------------------------------------- Bits


@pytest.mark.parametrize(
    "n, double, held",
    [
        (1, False, 1 + 4),
        (1, True, 1 + 1 + 4 + 4),
        (65, False, 33 + 8),
        (65, True, 33 + 2 + 4 + 4),
        (64 * 256, True, 8192 + 256 + 4 + 4),
        (64 * 256 + 1, True, 8193 + 257 + 8 + 4),
    ],
)
def test_short_blocks_take_whole_bytes_and_constants(n, double, held):
    assert nf4.quantize(drawn(n), double=double).bits_per_value == 8 * held / n


# ---------------------------------------------------------------- Double quantization


def test_doubling_costs_little_beside_four_bits():
    w = drawn(64 * 256 * 8)
    once, twice = (
        (nf4.dequantize(nf4.quantize(w, double=double)) - w).norm().item()
        for double in (False, True)
    )
    assert once < twice < 1.01 * once


@pytest.mark.parametrize("code", ["dynamic", "fp8", "int8"])
def test_equal_constants_are_restored_exactly(code):
    for count in (1, 256, 257):
        absmax = torch.full((count,), 0.8125)
        doubled = double_quantize(absmax, code)
        assert torch.equal(doubled.dequantize(), absmax)
        assert (doubled.nested_absmax == 0).all()


def test_dynamic_values_are_decades_cut_into_equal_parts():
    """Seven powers of ten of 1 to 64 parts each, both signs, 0 and 1."""
    table = codes.dynamic()
    assert len(table) == 256 and (table.diff() > 0).all()
    assert table[-1] == 1 and (table == 0).sum() == 1
    assert (table < 0).sum() == 127
    for zeros in range(7):
        low, high = 10.0 ** (-zeros - 1), 10.0**-zeros
        inside = table[(table > low) & (table < high)]
        assert len(inside) == 2 ** (6 - zeros)
        width = (high - low) / len(inside)
        middles = low + width * (torch.arange(len(inside)) + 0.5)
        assert torch.allclose(inside, middles, rtol=1e-5)
