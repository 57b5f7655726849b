"""The kernels on four bits: bits against nf4.dequantize, products against float64."""

from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import law, planted, planted_kernel

from peft_from_scratch import kernels, nf4
from peft_from_scratch.kernels import language, lora
from peft_from_scratch.kernels import nf4 as on_codes
from peft_from_scratch.nf4.double import DoubleQuantized

pytestmark = pytest.mark.skipif(not language.INSTALLED, reason="Triton: Linux only")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RECIPES = (False, True, "fp8", "int8")
TRITON = {"backend": "triton"}


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


# ---------------------------------------------------------------------- Dequantization


def dequantized_bit_for_bit(shape, block=64, double=True, code="nf4", of=DTYPES):
    q = nf4.quantize(drawn(*shape), block, double, code)
    for dtype in of:
        found = kernels.nf4_dequantize(q, dtype, **TRITON)
        assert found.shape == q.shape and found.dtype == dtype
        assert torch.equal(bits(found), bits(nf4.dequantize(q, dtype))), dtype


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    block=st.sampled_from([1, 2, 3, 48, 64, 256]),
    double=st.sampled_from(RECIPES),
    code=st.sampled_from(sorted(nf4.CODES)),
)
def test_any_shape_is_dequantized_bit_for_bit(shape, block, double, code):
    dequantized_bit_for_bit(shape, block, double, code)


def test_more_blocks_than_share_a_unit_and_a_last_block_that_is_short():
    dequantized_bit_for_bit((300 * 64 + 37,))


def test_every_byte_and_every_constant_of_eight_bits():
    """Each of the 256 codes, beside each of the 256 constants."""
    codes = torch.arange(256, dtype=torch.uint8)
    for recipe in ("dynamic", "fp8", "int8"):
        known = len(nf4.double.book(recipe, torch.device("cpu")).values)
        absmax = DoubleQuantized(
            (codes.int() % known).to(torch.uint8), torch.rand(1), torch.rand(()), recipe
        )
        packed = codes.repeat(8)  # 4096 values, 16 a block
        shape, dtype = torch.Size((64, 64)), torch.float32
        q = nf4.Quantized(packed, absmax, shape, dtype, 16, "nf4")
        found = kernels.nf4_dequantize(q, **TRITON)
        assert torch.equal(bits(found), bits(nf4.dequantize(q)))


def test_bitsandbytes_dequantizes_to_the_same_bits():
    functional = pytest.importorskip("bitsandbytes.functional")
    w = drawn(37 * 192 + 5)
    for double in (False, True):
        codes, state = functional.quantize_4bit(
            w, blocksize=64, quant_type="nf4", compress_statistics=double
        )
        theirs = functional.dequantize_4bit(codes, state)
        ours = kernels.nf4_dequantize(nf4.quantize(w, 64, double), **TRITON)
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------------- The product


def close(found, exact, dtype, size, rounded, terms):
    """|error| <= u |exact|, and what sums of `terms` and a rounded factor may add.

    size     the sum of the terms' absolute values: each addition may lose 2^-24 of it
    rounded  the same of those terms that h or dh is a factor of: it is rounded to
             dtype, and so are A and B where they are float32
    """
    u = torch.finfo(dtype).eps
    bound = u * exact.abs() + 4 * u * rounded + terms * 2**-23 * size + 1e-30
    error = (found.double() - exact).abs()
    assert found.shape == exact.shape
    assert (error <= bound).all(), (error / bound).max()


def product_and_gradients_are_those_of_float64(
    m=5,
    d_out=24,
    d_in=128,
    r=4,
    block=64,
    double=True,
    code="nf4",
    dtype=torch.float32,
    bias=True,
    scale=-0.75,
):
    q = nf4.quantize(drawn(d_out, d_in), block, double, code)
    x, dy = drawn(m, d_in, dtype=dtype), drawn(m, d_out, dtype=dtype)
    A = drawn(r, d_in, dtype=dtype) if r else torch.zeros(1, d_in, dtype=dtype)
    B = drawn(d_out, r, dtype=dtype) if r else torch.zeros(d_out, 1, dtype=dtype)
    b = drawn(d_out, dtype=dtype) if bias else torch.zeros(d_out, dtype=dtype)
    leaves = [leaf.requires_grad_() for leaf in (x, A, B, b)]
    y = kernels.nf4_lora_linear(
        x, q, *((A, B) if r else ()), scale=scale, bias=b if bias else None, **TRITON
    )
    wanted = [
        leaf for leaf, there in zip(leaves, (1, r, r, bias), strict=True) if there
    ]
    gradients = iter(torch.autograd.grad(y, wanted, dy))

    W = nf4.dequantize(q, dtype).double()
    x, A, B, b, dy = (t.detach().double() for t in (*leaves, dy))
    a, terms, s = torch.abs, d_in + d_out + m + r + 4, abs(scale)
    h, dh = scale * x @ A.T, scale * dy @ B
    high, dhigh = s * a(x) @ a(A).T, s * a(dy) @ a(B)
    held = partial(close, dtype=dtype, terms=terms)

    update = high @ a(B).T
    exact, size = x @ W.T + h @ B.T + b, a(x) @ a(W).T + update + a(b)
    held(y, exact, size=size, rounded=update)
    update = dhigh @ a(A)
    held(next(gradients), dy @ W + dh @ A, size=a(dy) @ a(W) + update, rounded=update)
    if r:
        size = dhigh.T @ a(x)
        held(next(gradients), dh.T @ x, size=size, rounded=size)
        size = a(dy).T @ high
        held(next(gradients), dy.T @ h, size=size, rounded=size)
    if bias:
        held(next(gradients), dy.sum(0), size=a(dy).sum(0), rounded=0 * dy.sum(0))


SIDES = st.sampled_from([1, 2, 7, 32, 48, 64, 65, 96, 130, 192])


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    m=st.sampled_from([0, 1, 5, 17, 66]),
    d_out=SIDES,
    d_in=SIDES,
    r=st.sampled_from([0, 1, 5, 16, 33, 65]),
    block=st.sampled_from([3, 32, 48, 64, 64, 64, 128]),
    double=st.sampled_from(RECIPES),
    code=st.sampled_from(sorted(nf4.CODES)),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    scale=st.sampled_from([0.0, 1.0, -0.75]),
)
def test_product_and_gradients_are_those_of_float64(**drawn_):
    product_and_gradients_are_those_of_float64(**drawn_)


@pytest.mark.parametrize("m", [16, 64, 65])
def test_large_enough_to_fill_blocks(m):
    """More rows, columns and terms than one tile; more blocks than share a unit."""
    for dtype in (torch.float32, torch.bfloat16):
        product_and_gradients_are_those_of_float64(m, 130, 256, dtype=dtype)


def test_x_may_have_any_leading_shape_and_strides():
    q, A, B = nf4.quantize(drawn(12, 64)), drawn(3, 64), drawn(12, 3)
    run = partial(kernels.nf4_lora_linear, q=q, A=A, B=B, scale=2.0, **TRITON)
    x = drawn(2, 3, 64)
    y = run(x)
    assert torch.equal(y.view(6, 12), run(x.view(6, 64)))
    assert torch.equal(y[0, 1], run(x[0, 1]))
    assert torch.equal(y, run(x.transpose(0, 2).contiguous().transpose(0, 2)))
    assert torch.equal(y[:, ::2], run(x[:, ::2]))


def test_on_a_cpu_the_spec_runs_and_is_the_dense_product():
    q, A, B = nf4.quantize(drawn(12, 64)), drawn(3, 64), drawn(12, 3)
    x, bias = drawn(5, 64), drawn(12)
    y = kernels.nf4_lora_linear(x, q, A, B, 2.0, bias)
    assert torch.equal(y, lora.spec(x, nf4.dequantize(q), A, B, 2.0, bias))
    y = kernels.nf4_lora_linear(x, q, scale=2.0, bias=bias)
    assert torch.equal(y, x @ nf4.dequantize(q).T + bias)
    assert torch.equal(kernels.nf4_dequantize(q), nf4.dequantize(q))


# ---------------------------------------------------------------------- What is read


@contextmanager
def counted_loads():
    """Within it `loads` gets the addresses that each load of a kernel asks for."""
    from triton.runtime.interpreter import InterpreterBuilder

    loads, real = [], InterpreterBuilder.create_masked_load

    def load(self, ptrs, mask, *others):
        loads.append(np.broadcast_to(ptrs.data, mask.data.shape)[mask.data])
        return real(self, ptrs, mask, *others)

    InterpreterBuilder.create_masked_load = load
    try:
        yield loads
    finally:
        InterpreterBuilder.create_masked_load = real


def asked_of(loads, tensor):
    """How many elements of a tensor the loads asked for."""
    first = tensor.data_ptr()
    last = first + tensor.nbytes
    return sum(int(((at >= first) & (at < last)).sum()) for at in loads)


@pytest.mark.parametrize("across", [False, True])
def test_a_weight_is_half_a_byte_and_a_64th_of_a_constant(across):
    d_out, d_in = 64, 256
    n = d_out * d_in
    for double in (False, True):
        q = nf4.quantize(drawn(d_out, d_in), 64, double)
        x = drawn(3, d_out if across else d_in, dtype=torch.bfloat16)
        with counted_loads() as loads:
            lora.product(x, **on_codes.reading(q, 3, x.dtype, across))
        assert asked_of(loads, q.packed) == n // 2
        if double:
            assert asked_of(loads, q.absmax.codes) == n // 64
            assert asked_of(loads, q.absmax.nested_absmax) == n // 64
        else:
            assert asked_of(loads, q.absmax) == n // 64


def test_the_weight_in_16_bits_is_nowhere():
    """No kernel of a step reads or writes a tensor of d_out d_in numbers."""
    with language.recorded() as log:
        absmax = torch.empty(256, device="meta")
        packed = torch.empty(128 * 64, dtype=torch.uint8, device="meta")
        shape = torch.Size((128, 128))
        q = nf4.Quantized(packed, absmax, shape, torch.bfloat16, 64, "nf4")
        x, A, B = (
            torch.empty(*size, device="meta", requires_grad=True)
            for size in ((5, 128), (4, 128), (128, 4))
        )
        y = kernels.nf4_lora_linear(x, q, A, B, **TRITON)
        y.backward(torch.empty_like(y))
    readers = [one.constants["LOAD"] for one in log if "LOAD" in one.constants]
    assert readers == [on_codes.unpacked, on_codes.unpacked_across]

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            for one in value:
                yield from tensors(one)

    found = [t for one in log for v in one.arguments.values() for t in tensors(v)]
    assert max(t.nbytes for t in found) == packed.nbytes


@law
@pytest.mark.parametrize("m, d_in", [(on_codes.DENSE_FROM, 64), (17, 68)])
def many_rows_take_a_weight_that_is_written_once(m=on_codes.DENSE_FROM, d_in=64):
    """The bits of the dense product with W', forward and backward."""
    q = nf4.quantize(drawn(24, d_in))
    x, A, B = (drawn(*s).requires_grad_() for s in ((m, d_in), (3, d_in), (24, 3)))
    with language.observed(lambda one: names.append(one.kernel.__name__)):
        names: list[str] = []
        y = kernels.nf4_lora_linear(x, q, A, B, 2.0, **TRITON)
        assert names == ["_dequantize", "_product"]
        grads = torch.autograd.grad(y.square().sum(), (x, A, B))
        assert names[2:4] == ["_dequantize", "_product"]
    dense = kernels.lora_linear(x, nf4.dequantize(q), A, B, 2.0, **TRITON)
    assert torch.equal(y, dense)
    theirs = torch.autograd.grad(dense.square().sum(), (x, A, B))
    assert all(torch.equal(a, b) for a, b in zip(grads, theirs, strict=True))


@law
@pytest.mark.parametrize("m, d_in", [(on_codes.DENSE_FROM - 1, 64), (16, 68)])
def fewer_rows_unpack_it_on_the_way(m=16, d_in=68):
    q, x = nf4.quantize(drawn(24, d_in)), drawn(m, d_in)
    with language.recorded() as log:
        kernels.nf4_lora_linear(x, q, **TRITON)
    assert [one.constants["LOAD"] for one in log] == [on_codes.unpacked]


def test_frozen_inputs_cost_no_launch():
    q, A, B = nf4.quantize(drawn(12, 64)), drawn(3, 64), drawn(12, 3)
    A.requires_grad_()
    with language.recorded() as log:
        y = kernels.nf4_lora_linear(drawn(5, 64), q, A, B, **TRITON)
        y.backward(torch.empty_like(y))
    names = [one.kernel.__name__ for one in log]
    assert names == ["_product", "_product", "_over_rows"]
    assert log[1].constants["LOAD"] is lora.dense  # dh alone: W' is not looked at


# ---------------------------------------------------------------------- Refusals


def refused(**changes):
    q = changes.pop("q", None) or nf4.quantize(drawn(12, 64))
    given = {"x": drawn(5, 64), "A": drawn(3, 64), "B": drawn(12, 3)} | changes
    return partial(kernels.nf4_lora_linear, q=q, **given)


REFUSALS = {
    "q has shape (64,)": lambda: refused(q=nf4.quantize(drawn(64))),
    "A is given and B is None": lambda: refused(B=None),
    "B is given and A is None": lambda: refused(A=None),
    "x ends in (63,)": lambda: refused(x=drawn(5, 63)),
    "A ends in (3, 63)": lambda: refused(A=drawn(3, 63)),
    "x is torch.float64": lambda: refused(x=drawn(5, 64).double()),
    "bias is torch.float16": lambda: refused(bias=drawn(12).half()),
    "scale=inf": lambda: refused(scale=float("inf")),
    "W is on meta, x on cpu": lambda: refused(q=nf4.quantize(drawn(12, 64)).to("meta")),
    "backend='cuda'": lambda: refused(backend="cuda"),
    "dtype=torch.int8": lambda: partial(
        kernels.nf4_dequantize, nf4.quantize(drawn(64)), torch.int8
    ),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_does_not_fit_is_refused_by_name(message):
    call = REFUSALS[message]()
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


# ---------------------------------------------------------------------- Planted bugs

ODD = partial(product_and_gradients_are_those_of_float64, d_in=65)
EVEN = product_and_gradients_are_those_of_float64
MANY = partial(dequantized_bit_for_bit, (300 * 64 + 37,))
SHARED = partial(product_and_gradients_are_those_of_float64, d_in=96)
HALF = partial(product_and_gradients_are_those_of_float64, dtype=torch.bfloat16, r=0)

KERNEL_BUGS = {
    "the low nibble is the first": (
        (
            "values_of",
            "tl.join(first_of(pair), second_of(pair))",
            "tl.join(second_of(pair), first_of(pair))",
        ),
        EVEN,
    ),
    "the low nibble is the first of an odd row": (
        ("values_of", "at % 2 == 0, first", "at % 2 == 1, first"),
        ODD,
    ),
    "an odd row starts with a byte": (
        ("unpacked", "BN, BK, RUN > 1)", "BN, BK, True)"),
        ODD,
    ),
    "the table is shifted": (
        ("values_of", "tl.load(pairs + tl.load(", "tl.load(pairs + 1 + tl.load("),
        EVEN,
    ),
    "the second value for the first": (
        ("first_of", "pair.to(tl.int32)", "(pair >> 32).to(tl.int32)"),
        EVEN,
    ),
    "the second absmax is forgotten": (
        ("constant", "tl.fma(ratio, unit, 0.0)", "ratio"),
        EVEN,
    ),
    "the offset is forgotten": (("constant", " + tl.load(absmax[2])", ""), EVEN),
    "one unit for all blocks": (("constant", "block // UNIT", "block * 0"), MANY),
    "a unit too far": (("constant", "block // UNIT", "(block + 1) // UNIT"), MANY),
    "the block before": (
        ("unpacked", "+ runs) // BLOCK", "+ runs) // BLOCK - (runs > 0)"),
        EVEN,
    ),
    "blocks start anew with each row": (
        ("unpacked", "rows.to(tl.int64) * k_size + runs", "rows * 0 + runs"),
        EVEN,
    ),
    "the transpose is not transposed": (
        (
            "unpacked_across",
            "unpacked(W, k, n, k_size, n_size, BK, BN)",
            "unpacked(W, n, k, n_size, k_size, BK, BN)",
        ),
        EVEN,
    ),
    "each program dequantizes the first piece": (
        ("_dequantize", ".to(tl.int64) * CHUNK", ".to(tl.int64) * 0"),
        MANY,
    ),
    "dequantized values are cut off": (
        ("_dequantize", "rounded(values, out.dtype.element_ty)", "values"),
        MANY,
    ),
}
IN_THE_PRODUCT = {
    "the scale is forgotten": ("high = low * scale", "high = low"),
    "the weight is not rounded": ("tl.trans(rounded(wide, dtype))", "tl.trans(wide)"),
}
ON_THE_WAY = {
    "runs as long as a block": (
        (on_codes.step_of, "math.gcd(q.block, width)", "q.block"),
        SHARED,
    ),
    "dx with W for its transpose": (
        (on_codes.reading, "unpacked_across if across", "unpacked if across"),
        EVEN,
    ),
    "dx of W's height": ((on_codes.reading, "d_in if across", "d_out if across"), EVEN),
    "W' transposed once more": (
        (on_codes.reading, "W.T if across else W)", "W if across else W.T)"),
        many_rows_take_a_weight_that_is_written_once,
    ),
    "W' unpacked for each block of rows": (
        (on_codes.dequantizes, "DENSE_FROM if", "1000 * DENSE_FROM if"),
        many_rows_take_a_weight_that_is_written_once,
    ),
    "W' written for any number of rows": (
        (on_codes.dequantizes, "else 17", "else 1"),
        fewer_rows_unpack_it_on_the_way,
    ),
    "the bias is forgotten": (
        (on_codes.NF4Product.forward, "bias=bias, keep", "keep"),
        EVEN,
    ),
    "scale without an update": (
        (on_codes.nf4_lora_linear, "1.0 if A is None else float(scale)", "scale"),
        HALF,
    ),
}
CAUGHT = (
    AssertionError,
    RuntimeError,
    KeyError,
)  # torch refuses a gradient of another shape


@pytest.mark.parametrize("name", KERNEL_BUGS)
def test_a_bug_in_a_kernel_is_caught(name):
    change, law = KERNEL_BUGS[name]
    law()
    with planted_kernel(on_codes, *change), pytest.raises(AssertionError):
        law()


@pytest.mark.parametrize("name", IN_THE_PRODUCT)
def test_a_bug_in_the_product_is_caught(name):
    law = HALF if "rounded" in name else EVEN
    law()
    bug = planted_kernel(lora, "_product", *IN_THE_PRODUCT[name])
    with bug, pytest.raises(AssertionError):
        law()


@pytest.mark.parametrize("name", ON_THE_WAY)
def test_a_bug_on_the_way_to_a_kernel_is_caught(name):
    change, law = ON_THE_WAY[name]
    law()
    with planted(*change), pytest.raises(CAUGHT):
        law()
