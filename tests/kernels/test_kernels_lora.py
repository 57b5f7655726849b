"""The LoRA kernels, interpreted, against torch in float64; and bugs that are caught.

A bound follows from the arithmetic: half a unit in the last place for the result, one
and a half for the rounded factors of the update, float32's for each number of a sum.
"""

import math
import os
import subprocess
import sys
from functools import partial
from itertools import product as pairs
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import Bug, each_is_caught, law, planted_kernel
from torch.utils.checkpoint import checkpoint

from peft_from_scratch import nf4
from peft_from_scratch.kernels import (
    MissingTriton,
    choose,
    language,
    lora,
    lora_linear,
    nf4_lora_linear,
)
from peft_from_scratch.kernels.language import Tiles, matrix

pytestmark = pytest.mark.skipif(not language.INSTALLED, reason="Triton: Linux alone")
NAMES = ("x", "W", "A", "B", "bias")
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
few = settings(max_examples=25, deadline=None, derandomize=True)


def numbers(m, k, n, r, dtype=FLOAT, low_dtype=None):
    """x, W, A, B, bias: leaves with gradients, x W^T and the update of like size."""
    shapes = ((m, k), (n, k), (r, k), (n, r), (n,))
    low_dtype = low_dtype or dtype
    dtypes = (dtype, dtype, low_dtype, low_dtype, low_dtype)
    return {
        name: torch.randn(shape).to(each).requires_grad_()
        for name, shape, each in zip(NAMES, shapes, dtypes, strict=True)
    }


def unit(dtype):
    """The largest relative error of a rounding."""
    return torch.finfo(dtype).eps / 2


def run(tensors, scale, dy, backend="triton"):
    """y and the gradients by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = lora_linear(**leaves, scale=scale, backend=backend)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def exact(x, W, A, B, bias, scale, dy):
    """{name: (value, sum of absolute W terms, of absolute update terms)} in float64."""
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    x, W, A, B, bias, dy = (t.detach().double() for t in (x, W, A, B, bias, dy))
    none = torch.zeros(())

    def terms(x, W, A, B, bias, dy, s):
        h, dh = s * x @ A.T, s * dy @ B
        return {
            "y": (x @ W.T + bias, h @ B.T),
            "x": (dy @ W, dh @ A),
            "W": (dy.T @ x, none),
            "A": (none, dh.T @ x),
            "B": (none, dy.T @ h),
            "bias": (dy.sum(0), none),
        }

    values = terms(x, W, A, B, bias, dy, scale)
    sizes = terms(*(t.abs() for t in (x, W, A, B, bias, dy)), abs(scale))
    return {name: (sum(values[name]), *sizes[name]) for name in values}


def assert_close(tensors, scale, dy, found=None):
    """Every value within the bound of its rounding errors."""
    found = found or run(tensors, scale, dy)
    x = tensors["x"]
    half = unit(x.dtype)
    tiny = 2 * torch.finfo(x.dtype).smallest_normal * half if x.dtype == HALF else 0
    length = x.numel() // max(1, x.shape[-1]) + sum(tensors["W"].shape) + 256
    for name, (value, wide, low) in exact(**tensors, scale=scale, dy=dy).items():
        got = found[name].double().reshape(value.shape)
        mine = unit(found[name].dtype)
        bound = 1.1 * mine * value.abs() + 3.3 * half * low
        bound = bound + 2e-7 * length**0.5 * (wide + low) + 64 * tiny + 1e-30
        assert ((got - value).abs() <= bound).all(), name


def close(m=9, k=70, n=37, r=5, dtype=FLOAT, low_dtype=None, scale=0.5):
    torch.manual_seed(m + k + n + r)
    tensors = numbers(m, k, n, r, dtype, low_dtype)
    assert_close(tensors, scale, torch.randn(m, n).to(dtype))


# ------------------------------------------------------------------- Values, gradients


@few
@given(
    m=st.integers(0, 70),
    k=st.integers(1, 80),
    n=st.integers(1, 80),
    r=st.sampled_from([1, 3, 16, 17, 32, 33]),
    dtypes=st.sampled_from(
        [(FLOAT, FLOAT), (HALF, HALF), (BRAIN, BRAIN), (HALF, FLOAT), (BRAIN, FLOAT)]
    ),
    scale=st.sampled_from([0.5, -2.0, 0.0]),
)
def test_values_and_gradients_are_those_of_float64(m, k, n, r, dtypes, scale):
    close(m, k, n, r, *dtypes, scale)


@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (HALF, HALF), (BRAIN, FLOAT)])
@pytest.mark.parametrize("r", [32, 33, 64, 65, 128, 129, 256])
def test_every_rank_is_that_of_float64(r, dtypes):
    close(20, 40, 33, r, *dtypes)


@pytest.mark.parametrize("adapters", [(BRAIN, FLOAT), (FLOAT, BRAIN), (FLOAT, FLOAT)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_A_and_B_may_each_be_float32(adapters, backend):
    tensors = numbers(9, 24, 17, 3, BRAIN)
    for name, dtype in zip("AB", adapters, strict=True):
        tensors[name] = tensors[name].detach().to(dtype).requires_grad_()
    dy = torch.randn(9, 17).to(BRAIN)
    found = run(tensors, 0.5, dy, backend)
    exact_ones = exact(**tensors, scale=0.5, dy=dy)
    for name, (value, *_) in exact_ones.items():
        assert (found[name].double() - value).norm() < 0.02 * value.norm(), name


def test_the_spec_is_differentiable_in_float64():
    x, W, A, B, bias = (t.double().detach() for t in numbers(3, 8, 6, 2).values())
    leaves = [t.requires_grad_() for t in (x, W, A, B)]
    torch.autograd.gradcheck(lambda *t: lora_linear(*t, 0.7, bias), leaves)
    with pytest.raises(ValueError, match="float64"):
        lora_linear(*leaves, 0.7, backend="triton")


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0, 24), (2, 3, 4, 24)])
def test_any_leading_shape(shape):
    tensors = numbers(1, 24, 17, 3) | {"x": torch.randn(shape, requires_grad=True)}
    found = run(tensors, 0.5, torch.randn(*shape[:-1], 17))
    assert found["y"].shape == (*shape[:-1], 17) and found["x"].shape == shape
    assert_close(tensors, 0.5, dy := torch.randn(*shape[:-1], 17))
    bare = {name: t for name, t in tensors.items() if name != "bias"}
    without = run(bare, 0.5, dy)["y"]
    zero = run(tensors | {"bias": torch.zeros(17, requires_grad=True)}, 0.5, dy)["y"]
    assert torch.equal(without, zero)


def test_strides_change_no_bit():
    tensors = numbers(18, 24, 17, 3)
    dy = torch.randn(1, 17).expand(18, 17)  # stride 0
    want = run(tensors, 0.5, dy.contiguous())
    twice = torch.randn(36, 24)
    twice[::2] = tensors["x"].detach()
    for x in (tensors["x"].detach().T.contiguous().T, twice[::2]):
        strided = tensors | {"x": x, "W": tensors["W"].T.contiguous().T}
        found = run(strided, 0.5, dy)
        assert all(torch.equal(found[name], want[name]) for name in want)


@law
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN])
def a_strided_bias_is_read_where_it_is(dtype=FLOAT):
    """Every second number, one number for all, backwards in memory: never its own."""
    tensors = numbers(5, 24, 17, 3, dtype)
    wide, dy = torch.randn(34).to(dtype), torch.randn(5, 17).to(dtype)
    for bias in (wide[::2], wide[:1].expand(17), wide.view(17, 2)[:, 1]):
        assert_close(tensors | {"bias": bias}, 0.5, dy)


def test_two_runs_have_the_same_bits():
    tensors, dy = numbers(200, 40, 33, 5, BRAIN), torch.randn(200, 33).to(BRAIN)
    one, two = run(tensors, 0.5, dy), run(tensors, 0.5, dy)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_checkpointing_changes_nothing_and_twice_is_refused():
    tensors = list(numbers(5, 24, 17, 3).values())

    def product(x, W, A, B, bias):
        return lora_linear(x, W, A, B, 0.5, bias, backend="triton")

    plain = torch.autograd.grad(product(*tensors).square().sum(), tensors)
    again = checkpoint(product, *tensors, use_reentrant=False)
    again = torch.autograd.grad(again.square().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    (dx,) = torch.autograd.grad(
        product(*tensors).square().sum(), tensors[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# ------------------------------------------------------------------------- What is run


@pytest.mark.parametrize(
    ("needed", "products", "sums", "kept"),
    [("x", 2, 0, False), ("A", 2, 1, False), ("B", 1, 1, True), ("xAB", 2, 2, True)],
)
def test_work_that_no_gradient_needs_is_not_done(needed, products, sums, kept):
    tensors = numbers(5, 24, 17, 3)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in needed)
    with language.recorded() as log:
        y = lora_linear(**tensors, scale=0.5, backend="triton")
        y.backward(torch.ones_like(y))
    names = [each.kernel.__name__ for each in log]
    assert names.count("_product") == products and names.count("_over_rows") == sums
    assert log[0].constants["KEEP"] == kept


def each_block_once(down, along, group):
    seen = [
        tuple(int(i) for i in lora.grouped(program, down, along, group))
        for program in range(down * along)
    ]
    assert sorted(seen) == [(i, j) for i in range(down) for j in range(along)]


def shares_fit(m, r, width):
    count = lora.shares_of(m, r, width)
    assert 1 <= count <= max(1, -(-m // 64))
    assert count == 1 or count * r * width * 4 <= lora.PARTIALS_BYTES


@given(m=st.integers(1, 10**6), r=st.integers(1, 256), width=st.integers(1, 2**20))
def test_the_shares_of_a_sum_fit(m, r, width):
    shares_fit(m, r, width)


def sums_over_rows_are_exact(m=200, r=5, width=70):
    torch.manual_seed(0)
    U, V = (torch.randint(-4, 5, (m, size)).float() for size in (r, width))
    assert torch.equal(lora.over_rows(U, V, FLOAT), U.T @ V)  # integers: no rounding


@pytest.mark.parametrize("m", [1, 64, 65, 200, 300])
@pytest.mark.parametrize("programs", [1, 6, 264])
def test_each_row_is_in_one_share(m, programs, monkeypatch):
    monkeypatch.setattr(lora, "PROGRAMS", programs)
    sums_over_rows_are_exact(m)


def tiled(rows=50, columns=90, depth=24, r=3, **sizes):
    """A product of small integers in these tiles: exact, h too."""
    m, n, k = rows, columns, depth
    torch.manual_seed(0)
    x, W, A, B = (  # each inside a wider matrix, whose other columns must not count
        torch.randint(-2, 3, (height, width + 16)).float()[:, :width]
        for height, width in ((m, k), (n, k), (r, k), (n, r))
    )
    bias = torch.randint(-2, 3, (n,)).float()
    tiles = Tiles(**{"m": 16, "n": 16, "k": 16, **sizes})
    made = {"A": A, "B": B, "scale": 0.5, "bias": bias, "keep": True, "tiles": tiles}
    y, h = lora.product(x, matrix(W), n, **made)
    assert torch.equal(y, lora.spec(x, W, A, B, 0.5, bias))
    assert torch.equal(h, 0.5 * x @ A.T)


split = partial(tiled, rows=2, columns=40, depth=16 * 64 + 5)
LONG = 64 * 20 + 3  # columns of x, that some programs share for one row


@law
def shared_columns_are_summed():
    """Split-K, of the fused product and of a given h, forward and for dx."""
    with language.recorded() as log:
        lora_linear(*_operands(1, LONG, 40, 5), 0.5, backend="triton")
    assert log[0].constants["SPLIT"] and log[0].grid[1] > 1
    split()
    for dtype, r in ((FLOAT, 5), (BRAIN, 5), (BRAIN, 70)):
        close(1, LONG, 40, r, dtype)


def _operands(m, k, n, r):
    return (torch.randn(s) for s in ((m, k), (n, k), (r, k), (n, r)))


@law
def few_rows_still_occupy_a_gpu():
    """Decoding: two programs for each of 132 processors, or one for each 64 columns."""
    for dtype, size in pairs((FLOAT, HALF, BRAIN), (4096, 576)):
        for m in (1, 16):
            x, W, A, B = (t.to("meta", dtype) for t in _operands(m, size, size, 16))
            with language.recorded() as log:
                lora_linear(x, W, A, B, 0.5, backend="triton")
            tiles = lora.tiles_for(m, size, 16, dtype)
            blocks = math.ceil(size / tiles.n) * (size // 64)
            if size == 4096 or m == 1:
                assert math.prod(log[0].grid) >= min(0.95 * lora.PROGRAMS, blocks)


@given(m=st.integers(1, 10**5), n=st.integers(1, 10**5), k=st.integers(0, 10**5))
def test_the_shares_of_the_columns(m, n, k):
    """Whole blocks, which cover k; their sums take a sixteenth of W's bytes at most."""
    tiles = lora.tiles_for(m, n, 16, BRAIN)
    columns = lora.columns_of(m, n, k, tiles)
    count = math.ceil(k / columns)
    assert columns % tiles.k == 0 and (count - 1) * columns < max(k, 1)
    assert count <= 1 or 2 * count * m * n * 4 <= 2 * n * k / 16


@law
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def inference_keeps_no_h(mode=torch.no_grad):
    tensors = numbers(5, 24, 17, 3)
    with language.recorded() as log, mode():
        lora_linear(**tensors, scale=0.5, backend="triton")
        q = nf4.quantize(tensors["W"].detach())
        adapter = tensors["A"], tensors["B"]
        nf4_lora_linear(tensors["x"], q, *adapter, backend="triton")
    assert [one.constants["KEEP"] for one in log] == [False, False]


@law
def what_backward_cannot_read_is_refused_before():
    """W with over 2^31 elements: W^T would be walked along rows in 32 bits."""
    size, m = 50_000, 50_000
    x, W, A, B = (
        torch.empty(shape, device="meta")
        for shape in ((1, size), (size, size), (3, size), (size, 3))
    )
    many = x.expand(m, -1)
    for pair in ((x.clone().requires_grad_(), W), (many, W.clone().requires_grad_())):
        with language.recorded(), torch.no_grad():
            lora_linear(*pair, A, B, 0.5, backend="triton")
        with (
            language.recorded(),
            pytest.raises(ValueError, match=r"over 2\^31 elements"),
        ):
            lora_linear(*pair, A, B, 0.5, backend="triton")


@few
@given(
    m=st.integers(1, 100),
    n=st.integers(1, 100),
    sweep=st.sampled_from([1, 2, 4]),
    group=st.integers(1, 8),
)
def test_sweeps_and_groups_compute_each_block(m, n, sweep, group):
    tiled(m, n, sweep=sweep, group=group)


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN])
@pytest.mark.parametrize("m", [16, 64, 128])
@pytest.mark.parametrize("r", [8, 32, 64])
def test_all_tiles_that_are_chosen(m, r, dtype):
    tiles = lora.tiles_for(m, 4096, r, dtype)
    sizes = {name: getattr(tiles, name) for name in ("m", "n", "k", "sweep", "group")}
    tiled(17, 33, 24, r, **sizes)


# ------------------------------------------------------------------ Backends, refusals


def test_on_a_cpu_none_is_torch():
    tensors, dy = numbers(5, 24, 17, 3), torch.randn(5, 17)
    one, two = run(tensors, 0.5, dy, None), run(tensors, 0.5, dy, "torch")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_which_backend_is_chosen():
    assert choose("cpu") == choose("mps") == choose("cuda", "torch") == "torch"
    assert choose("cuda") == choose("cpu", "triton") == "triton"  # interpreted
    with pytest.raises(ValueError, match="backend='jax' is not one of"):
        choose("cpu", "jax")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"W": torch.randn(17)}, "W has shape .17,.: 2 dimensions fit"),
        ({"bias": torch.randn(1, 17)}, "bias has shape .* 1 dimensions fit"),
        ({"A": torch.randn(3, 24, device="meta")}, "A is on meta, x on cpu"),
        ({"x": torch.randn(5, 23)}, r"x ends in \(23,\); \(24,\) fits"),
        ({"A": torch.randn(3, 23)}, r"A ends in \(3, 23\)"),
        ({"B": torch.randn(17, 4)}, r"B ends in \(17, 4\)"),
        ({"bias": torch.randn(16)}, r"bias ends in \(16,\)"),
        ({"A": torch.randn(257, 24), "B": torch.randn(17, 257)}, "r = 257.*1 to 256"),
        ({"A": torch.randn(0, 24), "B": torch.randn(17, 0)}, "A has r = 0"),
        ({"W": torch.randn(17, 24).to(BRAIN)}, "must be the same one"),
        ({"x": torch.randn(5, 24).double()}, "must be the same one"),
        ({"B": torch.randn(17, 3).to(HALF)}, "B is torch.float16: x's dtype"),
        ({"scale": float("inf")}, "scale=inf is not a finite number"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_does_not_fit_is_refused_by_name(wrong, said, backend):
    with pytest.raises(ValueError, match=said):
        lora_linear(
            **({**numbers(5, 24, 17, 3), "scale": 0.5} | wrong), backend=backend
        )


USE = """
import sys, torch
{first}
from peft_from_scratch.kernels import lora_linear
t = [torch.ones(s) for s in ((2, 4), (3, 4), (1, 4), (3, 1))]
assert torch.equal(lora_linear(*t, 1.0), lora_linear(*t, 1.0, backend="torch"))
try:
    lora_linear(*t, 1.0, backend="triton")
except Exception as error:
    print(type(error).__name__, error)
"""
BLOCK = """
class Block:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "triton":
            raise ImportError(name)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize(
    ("first", "error", "remedy"),
    [
        (BLOCK, MissingTriton, "backend='torch'"),
        ("", ValueError, "TRITON_INTERPRET=1"),
    ],
    ids=["without Triton", "without its interpreter"],
)
def test_a_process_without(first, error, remedy):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "-c", USE.format(first=first)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    ).stdout
    assert said.startswith(error.__name__) and remedy in said


# ------------------------------------------------------------------------ Planted bugs

KERNEL = {
    "no mask in k": (  # of both factors: one alone multiplies by zero
        "_product",
        "            part = load(x, m, k, within(m, k, m_size, k_size))  # (BM, BK)\n"
        "            wide = LOAD(W, first, start, n_size, k_size, BN, BK)",
        "            part = load(x, m, k, within(m, k, m_size, k_size + BK))\n"
        "            wide = LOAD(W, first, start, n_size, k_size + BK, BN, BK)",
        tiled,
    ),
    "a share reads the next one's rows": (
        "_over_rows",
        "last = min((share + 1) * rows, m_size)",
        "last = min((share + 1) * rows + 1, m_size)",
        sums_over_rows_are_exact,
    ),
    "no mask in the last share": (
        "_over_rows",
        "v = load(V, m, at, within(m, at, last, width))",
        "v = load(V, m * 0, at, within(m * 0, at, last, width)) + 0 * rows",
        sums_over_rows_are_exact,
    ),
    "summed in x's dtype": (
        "_product",
        "total = dot(part, tl.trans(rounded(wide, dtype)), total)",
        "total = dot(part, tl.trans(wide), total).to(dtype).to(tl.float32)",
        partial(close, k=300, dtype=BRAIN),
    ),
    "no scale": ("_product", "high = low * scale", "high = low", close),
    "bias twice": (
        "finished",
        "total += tl.load(bias + n, mask=n < n_size, other=0.0)[None, :]",
        "total += 2 * tl.load(bias + n, mask=n < n_size, other=0.0)[None, :]",
        partial(tiled, sweep=2),
    ),
    "h without scale": (
        "_product",
        "store(h, below + m, rank, low * scale,",
        "store(h, below + m, rank, low,",
        tiled,
    ),
    "each share sums all columns": (
        "_product",
        "begin = tl.program_id(1) * columns",
        "begin = tl.program_id(1) * 0",
        split,
    ),
    "a share sums the next one's columns": (
        "_product",
        "min(begin + columns, k_size)",
        "min(begin + 2 * columns, k_size)",
        split,
    ),
    "shares over each other": (
        "_product",
        "below, end = tl.program_id(1) * m_size",
        "below, end = tl.program_id(1) * 0",
        split,
    ),
    "the last share of y is left out": (
        "_finish",
        "range(count)",
        "range(count - 1)",
        split,
    ),
    "the last share of h counts for all": (
        "_finish",
        "low += load(lows",
        "low = load(lows",
        split,
    ),
    "h of every block of columns": (
        "_finish",
        "if KEEP and tl.program_id(1) == 0:",
        "if KEEP and tl.program_id(1) == 1000:",
        split,
    ),
    "h again for each sweep": (
        "_product",
        'UPDATE == "fused" and step == 0:',
        'UPDATE == "fused":',
        partial(tiled, sweep=2),
    ),
    "h lost after the first sweep": (
        "_product",
        "        total = tl.zeros((BM, BN), tl.float32)\n",
        "        total = tl.zeros((BM, BN), tl.float32)\n"
        "        low = low * (step < 2)\n",
        partial(tiled, sweep=4),
    ),
    "A by W's strides": (
        "_product",
        "a = rounded(load(A, rank, k,",
        "a = rounded(load((A[0], A[1] - 1, A[2]), rank, k,",
        close,
    ),
    "the last group is as high as the others": (
        "grouped",
        "height = min(down - first, GROUP)",
        "height = GROUP + 0 * down",
        partial(each_block_once, 5, 3, 2),
    ),
    "the last share is left out": (
        "_add_up",
        "range(count)",
        "range(count - 1)",
        sums_over_rows_are_exact,
    ),
}


@pytest.mark.parametrize("bug", KERNEL)
def test_a_bug_in_a_kernel_is_caught(bug):
    name, right, wrong, law = KERNEL[bug]
    law()
    with planted_kernel(lora, name, right, wrong), pytest.raises(AssertionError):
        law()


def test_a_bias_taken_for_contiguous_is_caught():
    as_it_is = mock.patch.object(torch.Tensor, "contiguous", lambda self: self)
    with as_it_is, pytest.raises(AssertionError):
        a_strided_bias_is_read_where_it_is()


ON_THE_WAY = {
    "one program for all of k": Bug(
        lora.columns_of, "math.ceil(PROGRAMS / programs)", "1",
        few_rows_still_occupy_a_gpu,
    ),
    "h is kept for no gradient": Bug(
        lora.LoRAProduct.forward, "grad and needed", "needed",
        inference_keeps_no_h,
    ),
    "W^T is looked at in backward": Bug(
        lora.LoRAProduct.forward, "for_x * [W.T]", "[]",
        what_backward_cannot_read_is_refused_before,
    ),
    "x^T and dy^T are looked at in backward": Bug(
        lora.LoRAProduct.forward, "for_W * [x.T, y.T]", "[]",
        what_backward_cannot_read_is_refused_before,
    ),
}  # fmt: skip
test_a_bug_on_the_way_is_caught = each_is_caught(
    ON_THE_WAY, (AssertionError, pytest.fail.Exception)
)


def test_an_unscaled_dx_is_caught():
    right = lora.product

    def without(x, W, n, *, scale=1.0, keep=False, bias=None, **given):
        backward = bias is None and given.get("A") is not None
        scale = 1.0 if backward else scale
        return right(x, W, n, scale=scale, keep=keep, bias=bias, **given)

    with mock.patch.object(lora, "product", without), pytest.raises(AssertionError):
        close()
