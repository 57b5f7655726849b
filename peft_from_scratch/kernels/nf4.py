"""The LoRA product on a weight in four bits: unpacked in registers, never written.

    W' = values[code] · absmax of its block            nf4/blocks.py, arXiv:2305.14314v1

    y  = x W'^T + scale (x A^T) B^T + bias                                       eq. (5)
    dx = dy W' + scale (dy B) A                      W' is unpacked anew, transposed
    dA, dB as in lora.py; the codes have no gradient

The kernel is lora.py's `_product` with another reader of W: `unpacked` gives a block of
W', `unpacked_across` one of its transpose. A weight is half a byte, and 64 of them have
a constant: four bytes, or one where it is in eight bits itself, with one float32 more
for 256 constants. From memory that is

    0.5 + 4 / 64 = 0.5625    or    0.5 + 1 / 64 + 4 / 16384 = 0.5159    bytes a weight

where bf16 takes 2. A tile narrower than a block asks for the constant again, and one in
eight bits for its float32 and an entry of a table of 256: all of that is in the cache.

A byte is looked up whole, in a table of 256 entries that hold the values of both codes:
fifteen selects a weight, which come to mind first, take twice the instructions. Even so
a weight costs ten to fifteen instructions in the loop where a dense one costs about
three, and each block of rows of x unpacks W' anew. Whether a product of few rows waits
for memory or for instructions was not measured. From DENSE_FROM rows on W' is written
once and multiplied by the dense kernel, forward and backward.

W' is rounded to x's dtype exactly as nf4.dequantize does it: the result is that of the
dense product with that weight.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..nf4 import Quantized, dequantize
from ..nf4.codes import book, pairs
from ..nf4.double import BLOCK as CONSTANTS_OF_A_BLOCK
from ..nf4.double import DoubleQuantized
from .language import Tiles, as_autocast, choose, launch, matrix, rounded, tl, triton
from .lora import ONE_PASS, check, gradients, product, spec

UNIT = tl.constexpr(CONSTANTS_OF_A_BLOCK)
CHUNK = 1024  # values that one program dequantizes
DENSE_FROM = 256  # rows of x from which on W' is written, and multiplied as it is
SHORTEST = 8  # weights in a row with one constant, below which unpacking is slow


# The spec -----------------------------------------------------------------------------


def nf4_spec(x, q, A, B, scale, bias=None) -> Tensor:
    """What the kernels compute, in torch: for autograd, for any device."""
    W = dequantize(q, x.dtype)
    return F.linear(x, W, bias) if A is None else spec(x, W, A, B, scale, bias)


# The readers --------------------------------------------------------------------------


@triton.jit
def first_of(pair):
    """The value of a byte's first code, from the int64 of both."""
    return pair.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def second_of(pair):
    """The value of a byte's second code."""
    return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def constant(absmax, block, keep):
    """The constant of each block; 0 where `keep` is false."""
    stored = tl.load(absmax[0] + block, mask=keep, other=0)
    if absmax[1] is not None:
        unit = tl.load(absmax[1] + block // UNIT, mask=keep, other=0.0)
        ratio = tl.load(absmax[3] + stored.to(tl.int32), mask=keep, other=0.0)
        # Compiled, a b + c becomes one fma, rounded once; torch rounds twice. And
        # fma(a, b, 0) is a b, rounded: nothing is left to be joined with the sum.
        return tl.where(keep, tl.fma(ratio, unit, 0.0) + tl.load(absmax[2]), 0.0)
    else:
        return stored


@triton.jit
def values_of(
    packed,
    pairs,
    n,
    k,
    n_size,
    k_size,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PAIRS: tl.constexpr,  # rows start with a byte, and each is read once
):
    """values[code] (BN, BK) of the weights from (n, k) on, in float32.

    A byte is looked up whole: `pairs` has the values of both its codes as an int64.
    """
    rows = n + tl.arange(0, BN)[:, None]
    if PAIRS:
        bytes_ = k // 2 + tl.arange(0, BK // 2)[None, :]
        width = k_size - k_size // 2  # bytes; of an only row the last may be half used
        at = rows.to(tl.int64) * width + bytes_
        keep = (rows < n_size) & (bytes_ < width)
        pair = tl.load(pairs + tl.load(packed + at, mask=keep, other=0).to(tl.int32))
        return tl.reshape(tl.join(first_of(pair), second_of(pair)), (BN, BK))
    else:
        columns = k + tl.arange(0, BK)[None, :]
        at = rows.to(tl.int64) * k_size + columns
        keep = (rows < n_size) & (columns < k_size)
        byte = tl.load(packed + at // 2, mask=keep, other=0).to(tl.int32)
        pair = tl.load(pairs + byte)
        return tl.where(at % 2 == 0, first_of(pair), second_of(pair))


@triton.jit
def unpacked(W, n, k, n_size, k_size, BN: tl.constexpr, BK: tl.constexpr):
    """W'[n:, k:] (BN, BK) in float32, of W = operand(q).

    STEP, a power of two, is how many weights from a multiple of it on surely lie in one
    block: of d_in = 96 with blocks of 64 it is 32.
    """
    BLOCK: tl.constexpr = W[3]
    STEP: tl.constexpr = W[4]
    RUN: tl.constexpr = STEP if STEP < BK else BK
    values = values_of(W[0], W[2], n, k, n_size, k_size, BN, BK, RUN > 1)
    rows = n + tl.arange(0, BN)[:, None]
    runs = k + tl.arange(0, BK // RUN)[None, :] * RUN
    keep = (rows < n_size) & (runs < k_size)
    scale = constant(W[1], (rows.to(tl.int64) * k_size + runs) // BLOCK, keep)
    values = tl.reshape(values, (BN, BK // RUN, RUN))
    return tl.reshape(values * scale[:, :, None], (BN, BK))


@triton.jit
def unpacked_across(W, n, k, n_size, k_size, BN: tl.constexpr, BK: tl.constexpr):
    """The same of W'^T: the bytes run along n."""
    return tl.trans(unpacked(W, k, n, k_size, n_size, BK, BN))


@triton.jit
def _dequantize(W, out, size, CHUNK: tl.constexpr):
    """out = W' as one row of `size` weights; this program's are the next CHUNK."""
    first = tl.program_id(0).to(tl.int64) * CHUNK
    values = tl.reshape(unpacked(W, 0, first, 1, size, 1, CHUNK), (CHUNK,))
    at = first + tl.arange(0, CHUNK)
    tl.store(out + at, rounded(values, out.dtype.element_ty), mask=at < size)


# How they are launched ----------------------------------------------------------------


def operand(q: Quantized, width: int) -> tuple:
    """A quantized weight as the readers take it, cut in rows of `width` weights."""
    absmax = (q.absmax, None, None, None)
    if isinstance(q.absmax, DoubleQuantized):
        table = book(q.absmax.codebook, q.packed.device).values
        absmax = (q.absmax.codes, q.absmax.nested_absmax, q.absmax.offset, table)
    constants = map(tl.constexpr, (q.block, step_of(q, width)))
    return (q.packed, absmax, pairs(q.codebook, q.packed.device), *constants)


def step_of(q: Quantized, width: int) -> int:
    """How many weights of a row surely share a constant: a power of two."""
    common = math.gcd(q.block, width)
    return common & -common


def dequantizes(m: int, step: int) -> bool:
    """Whether W' is written once for m rows, not unpacked for each block of them.

    Unpacking costs instructions for each block of rows, writing W' costs them once and
    2 bytes a weight: from the second block of 128 rows on there is nothing to gain. A
    weight whose runs are short takes several times the instructions: one block is all.
    """
    return m >= (DENSE_FROM if step >= SHORTEST else 17)


def tiles_for_packed(m: int, dtype: torch.dtype, step: int) -> Tiles:
    """The blocks of a product with m rows, of weights that share constants by `step`.

    Unpacking takes registers too, so they are smaller than a dense product's: of those
    that spill none on sm_80, sm_90 and sm_100 for any r in one pass, and share at most
    99 KiB, which is what sm_86, sm_89 and sm_120 have.
    """
    if dtype == torch.float32:
        if m <= 16:
            return Tiles(m=16, n=64, k=16, warps=4, stages=2)
        return Tiles(m=32, n=64, k=16, warps=8, stages=2)
    if step < SHORTEST:
        return Tiles(m=16, n=32, k=32, warps=4, stages=2)
    if m <= 16:
        return Tiles(m=16, n=64, k=64, warps=4, stages=4)
    if m <= 64:
        return Tiles(m=64, n=64, k=64, warps=8, stages=3)
    return Tiles(m=128, n=128, k=32, warps=8, stages=3)


def reading(q: Quantized, m: int, dtype: torch.dtype, across=False) -> dict:
    """What `product` needs to multiply m rows with W', or with W'^T where `across`."""
    d_out, d_in = q.shape
    n, step = d_in if across else d_out, step_of(q, d_in)
    if dequantizes(m, step):
        W = nf4_dequantize(q, dtype, "triton")
        return {"W": matrix(W.T if across else W), "n": n}
    return {
        "W": operand(q, d_in),
        "n": n,
        "reader": unpacked_across if across else unpacked,
        "tiles": tiles_for_packed(m, dtype, step),
    }


class NF4Product(torch.autograd.Function):
    """The kernels under autograd; x and y are matrices here."""

    @staticmethod
    def forward(ctx, x, q, A, B, scale, bias, grad):
        ctx.read = partial(reading, q, len(x), x.dtype)
        ctx.scale = scale
        keep = grad and ctx.needs_input_grad[3]  # only dB takes h
        y, h = product(x, A=A, B=B, scale=scale, bias=bias, keep=keep, **ctx.read())
        ctx.save_for_backward(x, A, B, h, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        for_x, _, for_A, for_B, _, for_bias, _ = ctx.needs_input_grad
        dx, dA, dB, dbias = gradients(
            (for_x, for_A, for_B, for_bias),
            dy,
            *ctx.saved_tensors,
            ctx.scale,
            ctx.read(across=True) if for_x else {},
        )
        return dx, None, dA, dB, None, dbias, None


# The checked wrappers -----------------------------------------------------------------


def nf4_dequantize(
    q: Quantized, dtype: torch.dtype | None = None, backend: str | None = None
) -> Tensor:
    """The weight that the codes stand for, W' = values[code] · absmax, by one kernel.

    Args
        q        any shape, block and codebooks
        dtype    float32, float16 or bfloat16; None for the dtype before quantizing
        backend  None: Triton on CUDA, nf4.dequantize elsewhere; or "torch", "triton"
    Returns  the tensor, with the bits of nf4.dequantize
    Raises   ValueError     a dtype, device or backend that is not allowed, named
             MissingTriton  backend="triton" where Triton is not installed
    Memory   the result; nothing else is written
    """
    dtype = dtype or q.dtype
    if dtype not in ONE_PASS:
        raise ValueError(f"dtype={dtype}: allowed are float32, float16 and bfloat16")
    if choose(q.packed.device, backend) == "torch":
        return dequantize(q, dtype)
    out = torch.empty(q.shape, dtype=dtype, device=q.packed.device)
    if q.numel:
        arguments = {"W": operand(q, q.block), "out": out, "size": q.numel}
        grid = (math.ceil(q.numel / CHUNK),)
        launch(_dequantize, grid, arguments, {"CHUNK": CHUNK}, 4, 1)
    return out


@torch.compiler.disable
def nf4_lora_linear(
    x: Tensor,
    q: Quantized,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A projection in four bits with its low-rank update, in one pass over x.

        y = x W'^T + scale (x A^T) B^T + bias                                [1] eq. (5)

    Args
        x        (…, d_in), float32, float16 or bfloat16; any strides
        q        W (d_out, d_in), quantized: any block and codebooks. Fast where d_in is
                 even and a multiple of the block
        A, B     (r, d_in), (d_out, r), 1 <= r <= 256; x's dtype or float32, which the
                 kernel rounds to x's dtype when it reads it. Both None: no update
        scale    a number, alpha / r
        bias     (d_out,), x's dtype or float32
        backend  None: Triton on CUDA, the torch spec elsewhere; or "torch", "triton"
    Returns  (…, d_out), x's dtype; W' rounded to it as nf4.dequantize does, summed in
             float32. Differentiable once, by x, A, B and bias
    Raises   ValueError     a shape, dtype, device or backend that does not fit, named
             MissingTriton  backend="triton" where Triton is not installed
    Memory   h: (rows of x) r numbers, kept for the gradient of B. W' is not in memory
             below 256 rows of x; from there on it is made in x's dtype, forward and
             again backward, and so does the torch spec for any number of rows. Where
             fewer than 8 weights in a row share a constant, the 256 are 17
    Source   [1] arXiv:2305.14314v1
    """
    x, A, B, bias = as_autocast(x.device, x, A, B, bias)
    _check(x, q, A, B, scale, bias)
    if choose(x.device, backend) == "torch":
        return nf4_spec(x, q, A, B, scale, bias)
    rows = x.reshape(-1, x.shape[-1])
    scale = 1.0 if A is None else float(scale)
    y = NF4Product.apply(rows, q, A, B, scale, bias, torch.is_grad_enabled())
    return y.view(*x.shape[:-1], q.shape[0])


def _check(x, q, A, B, scale, bias) -> None:
    """As for a dense W of x's dtype, which stands in for q: it takes no memory."""
    if len(q.shape) != 2:
        raise ValueError(f"q has shape {tuple(q.shape)}; 2 dimensions wanted")
    if (A is None) != (B is None):
        given, missing = ("B", "A") if A is None else ("A", "B")
        raise ValueError(f"{given} is given and {missing} is None: both, or neither")
    one = torch.empty(1, 1, dtype=x.dtype, device=q.packed.device)
    if A is None:
        A, B = one.expand(1, q.shape[1]), one.expand(q.shape[0], 1)
    check(x, one.expand(q.shape), A, B, scale, bias)
