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

Each row of blocks of y reads and unpacks W' anew, at fifteen selects a weight and more.
With few rows of x, as in decoding, bytes are what a product waits for. With thousands
it may be faster to dequantize once and multiply with the dense kernel: not measured.

W' is rounded to x's dtype exactly as nf4.dequantize does it: the result is that of the
dense product with that weight.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..nf4 import Quantized, dequantize
from ..nf4.codes import book
from ..nf4.double import BLOCK as CONSTANTS_OF_A_BLOCK
from ..nf4.double import DoubleQuantized
from .language import Tiles, as_autocast, choose, launch, rounded, tl, triton
from .lora import ONE_PASS, check, gradients, product, spec

UNIT = tl.constexpr(CONSTANTS_OF_A_BLOCK)
CHUNK = 1024  # values that one program dequantizes


# The spec -----------------------------------------------------------------------------


def nf4_spec(x, q, A, B, scale, bias=None) -> Tensor:
    """What the kernels compute, in torch: for autograd, for any device."""
    W = dequantize(q, x.dtype)
    return F.linear(x, W, bias) if A is None else spec(x, W, A, B, scale, bias)


# The readers --------------------------------------------------------------------------


@triton.jit
def chosen(code, BITS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """BITS[FIRST + code] for code < COUNT: a tree of selects, no load from memory."""
    if COUNT == 1:
        return tl.full(code.shape, BITS[FIRST], tl.int32)
    else:
        HALF: tl.constexpr = COUNT // 2
        low = chosen(code, BITS, FIRST, HALF)
        high = chosen(code, BITS, FIRST + HALF, HALF)
        return tl.where((code & HALF) != 0, high, low)


@triton.jit
def constant(absmax, block, keep):
    """The constant of each block; 0 where `keep` is false."""
    found = tl.load(absmax[0] + block, mask=keep, other=0)
    if absmax[1] is not None:
        unit = tl.load(absmax[1] + block // UNIT, mask=keep, other=0.0)
        ratio = tl.load(absmax[3] + found.to(tl.int32), mask=keep, other=0.0)
        # Compiled, a b + c becomes one fma, rounded once; torch rounds twice. And
        # fma(a, b, 0) is a b, rounded: nothing is left to be joined with the sum.
        found = tl.where(keep, tl.fma(ratio, unit, 0.0) + tl.load(absmax[2]), 0.0)
    return found


@triton.jit
def codes_of(
    packed,
    n,
    k,
    n_size,
    k_size,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PAIRS: tl.constexpr,  # rows start with a byte, and each is read once
):
    """The codes of (BN, BK) weights from (n, k) on: int32, the high nibble's first."""
    rows = n + tl.arange(0, BN)[:, None]
    if PAIRS:
        bytes_ = k // 2 + tl.arange(0, BK // 2)[None, :]
        width = k_size - k_size // 2  # bytes; of an only row the last may be half used
        at = rows.to(tl.int64) * width + bytes_
        keep = (rows < n_size) & (bytes_ < width)
        pair = tl.load(packed + at, mask=keep, other=0).to(tl.int32)
        code = tl.reshape(tl.join(pair >> 4, pair & 15), (BN, BK))
    else:
        columns = k + tl.arange(0, BK)[None, :]
        at = rows.to(tl.int64) * k_size + columns
        keep = (rows < n_size) & (columns < k_size)
        pair = tl.load(packed + at // 2, mask=keep, other=0).to(tl.int32)
        code = tl.where(at % 2 == 0, pair >> 4, pair & 15)
    return code


@triton.jit
def unpacked(W, n, k, n_size, k_size, BN: tl.constexpr, BK: tl.constexpr):
    """W'[n:, k:] (BN, BK) in float32, of W = operand(q).

    STEP, a power of two, is how many weights from a multiple of it on surely lie in one
    block: of d_in = 96 with blocks of 64 it is 32.
    """
    BITS: tl.constexpr = W[2]
    BLOCK: tl.constexpr = W[3]
    STEP: tl.constexpr = W[4]
    RUN: tl.constexpr = STEP if STEP < BK else BK
    code = codes_of(W[0], n, k, n_size, k_size, BN, BK, RUN > 1)
    rows = n + tl.arange(0, BN)[:, None]
    runs = k + tl.arange(0, BK // RUN)[None, :] * RUN
    keep = (rows < n_size) & (runs < k_size)
    scale = constant(W[1], (rows.to(tl.int64) * k_size + runs) // BLOCK, keep)
    values = chosen(code, BITS, 0, 16).to(tl.float32, bitcast=True)
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
    values = book(q.codebook, torch.device("cpu")).values
    bits = tuple(values.view(torch.int32).tolist())  # FP4 has -0: a constant would be 0
    common = math.gcd(q.block, width)
    constants = (bits, q.block, common & -common)
    return (q.packed, absmax, *map(tl.constexpr, constants))


def tiles_for_packed(m: int, dtype: torch.dtype) -> Tiles:
    """The blocks of a product with m rows.

    Unpacking takes registers too, so they are smaller than a dense product's: of those
    that spill none on sm_80, sm_90 and sm_100 for any r in one pass.
    """
    if dtype == torch.float32:
        if m <= 16:
            return Tiles(m=16, n=64, k=16, warps=4, stages=2)
        return Tiles(m=32, n=64, k=16, warps=8, stages=2)
    if m <= 16:
        return Tiles(m=16, n=64, k=64, warps=4, stages=4)
    if m <= 64:
        return Tiles(m=64, n=32, k=64, warps=8, stages=3)
    return Tiles(m=128, n=128, k=32, warps=8, stages=3)


def reading(q: Quantized, m: int, dtype: torch.dtype, across=False) -> dict:
    """What `product` needs to multiply m rows with W', or with W'^T where `across`."""
    d_out, d_in = q.shape
    return {
        "W": operand(q, d_in),
        "n": d_in if across else d_out,
        "reader": unpacked_across if across else unpacked,
        "tiles": tiles_for_packed(m, dtype),
    }


class NF4Product(torch.autograd.Function):
    """The kernels under autograd; x and y are matrices here."""

    @staticmethod
    def forward(ctx, x, q, A, B, scale, bias):
        ctx.read = partial(reading, q, len(x), x.dtype)
        ctx.scale = scale
        keep = ctx.needs_input_grad[3]  # only dB takes h
        y, h = product(x, A=A, B=B, scale=scale, bias=bias, keep=keep, **ctx.read())
        ctx.save_for_backward(x, A, B, h, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        for_x, _, for_A, for_B, _, for_bias = ctx.needs_input_grad
        dx, dA, dB, dbias = gradients(
            (for_x, for_A, for_B, for_bias),
            dy,
            *ctx.saved_tensors,
            ctx.scale,
            ctx.read(across=True),
        )
        return dx, None, dA, dB, None, dbias


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
        A, B     (r, d_in), (d_out, r), 1 <= r <= 256; x's dtype or float32. Both None:
                 no update
        scale    a number, alpha / r
        bias     (d_out,), x's dtype or float32
        backend  None: Triton on CUDA, the torch spec elsewhere; or "torch", "triton"
    Returns  (…, d_out), x's dtype; W' rounded to it as nf4.dequantize does, summed in
             float32. Differentiable once, by x, A, B and bias
    Raises   ValueError     a shape, dtype, device or backend that does not fit, named
             MissingTriton  backend="triton" where Triton is not installed
    Memory   h: (rows of x) r numbers, kept for the gradient of B; W' is never in memory
             (but the torch spec makes it)
    Source   [1] arXiv:2305.14314v1
    """
    x, A, B, bias = as_autocast(x.device, x, A, B, bias)
    _check(x, q, A, B, scale, bias)
    if choose(x.device, backend) == "torch":
        return nf4_spec(x, q, A, B, scale, bias)
    rows = x.reshape(-1, x.shape[-1])
    scale = 1.0 if A is None else float(scale)
    y = NF4Product.apply(rows, q, A, B, scale, bias)
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
