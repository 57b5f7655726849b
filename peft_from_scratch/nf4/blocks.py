"""Blockwise quantization to four bits and back: spec.py, in the cache's pieces.

`quantize` and `dequantize` are what the library calls. The law between them and the
definition, for every tensor of finite values; tests hold it to the last bit:

    codes, absmax = spec_quantize(w, block, codebook)
    q = quantize(w, block, False, codebook)      q.codes() == codes, q.absmax == absmax
    dequantize(q, torch.float32) == spec_dequantize(codes, absmax, block, codebook)

Double quantization changes absmax alone: with q.constants() in its place the last line
holds as well. Four things make the fast way fast, and leave the results as they are:

    pieces     each operation works on a piece of the values that stays in the cache
    counting   fifteen comparisons in a row, each with all ratios of a piece, count the
               midpoints below a ratio; the spec makes fifteen results a ratio at once
    pairs      dequantize looks up a byte, and gets the values of both of its codes
    in place   it looks them up into the result itself, where that is in float32, and
               multiplies them there

The largest value of a block is exact (its ratio is 1 or -1, which every codebook has),
and zero is exact. The error of any other value is at most half of the gap between two
values, times absmax. So one outlier makes the 63 other weights of its block coarse, and
no weight of another block.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.check import one_of, require, whole
from .codes import CODES, book, pairs
from .double import CODEBOOKS, DoubleQuantized, double_quantize, scale
from .spec import pack, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Values worked on at a time. On a CPU: in its cache. To quantize, below the 32,768 from
# which on torch shares an operation out, whose threads would then meet thirty times a
# chunk. To dequantize, four operations a chunk: smaller ones would take less time than
# calling them. On a GPU: enough to keep it busy; its temporaries take 12 bytes a value
# at most, 50 MB in all.
CHUNK, LOOKUP_CHUNK, GPU_CHUNK = (1 << 15) - 1, 1 << 18, 1 << 22
TINY = 1e-37  # float32: 1 / absmax overflows below 3e-39


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor of n values in four bits.

    packed    (⌈n / 2⌉,) uint8, two codes a byte, the first in the high nibble
    absmax    the constants of the blocks: (⌈n / block⌉,) float32, or in eight bits
    shape     of the tensor
    dtype     of the tensor before; dequantize returns it unless asked for another one
    block     number of values that share a constant
    codebook  its name: "nf4", "fp4" or "int4"
    """

    packed: Tensor
    absmax: Tensor | DoubleQuantized
    shape: torch.Size
    dtype: torch.dtype
    block: int
    codebook: str

    @cached_property
    def numel(self) -> int:
        """Number of values of the tensor, not of stored bytes."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the constants."""
        return self.packed.nbytes + self.absmax.nbytes

    @property
    def bits_per_value(self) -> float:
        """8 · nbytes / n, without the codebooks, which all tensors share.

        Raises  ValueError  a tensor without values
        """
        if not self.numel:
            raise ValueError(f"a tensor of shape {tuple(self.shape)} holds no value")
        return 8 * self.nbytes / self.numel

    def constants(self) -> Tensor:
        """absmax of every block: (⌈n / block⌉,) float32."""
        absmax = self.absmax
        return absmax.dequantize() if isinstance(absmax, DoubleQuantized) else absmax

    def codes(self) -> Tensor:
        """The code of every value, unpacked: (n,) uint8, from 0 to 15."""
        return unpack(self.packed)[: self.numel]

    def to(self, device: torch.device | str) -> "Quantized":
        """The same on another device."""
        packed, absmax = self.packed.to(device), self.absmax.to(device)
        rest = self.shape, self.dtype, self.block, self.codebook
        return Quantized(packed, absmax, *rest)


@torch.no_grad()
def quantize(
    w: Tensor, block: int = 64, double: bool | str = True, code: str = "nf4"
) -> Quantized:
    """Codes and constants of a tensor: each value is rounded to one of sixteen.

        code_i = argmin_k | w_i / absmax_b - values[k] |                     [1] eq. (1)

    Args
        w       any shape, also empty; float32, bfloat16 or float16. Blocks run on in
                memory order: a row's end may share a block with the next row's start
        block   number of values that share a constant: any whole number from 1 on. The
                last block may be short
        double  how the constants are quantized: True for bitsandbytes' way, "fp8" for
                the paper's, "int8" for torchao's; False to keep them in float32
        code    the codebook: "nf4"; for comparison "fp4", and "int4", the symmetric one
    Returns  Quantized: 4 + 32 / block bits a value, with double 4 + 8 / block + 32 /
             (256 · block), and what rounding up to whole bytes and blocks adds
    Raises   ValueError   NaN or infinity in w, with the index of the first; a dtype, a
             block, a code or a `double` that is not allowed
    Departs  where absmax < 1e-37, bitsandbytes multiplies with an inverse that has
             overflowed; here such blocks are divided by absmax
    Source   [1] arXiv:2305.14314v1
    """
    check_dtype(w)
    check_options(block, double, code)
    flat, device = w.detach().reshape(-1), w.device
    packed = torch.empty(-(-len(flat) // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-len(flat) // block), dtype=torch.float32, device=device)
    for start, stop in _chunks(len(flat), block, device, CHUNK):
        constants = absmax[start // block : -(-stop // block)]
        ratios = _ratios(flat[start:stop].float(), block, constants)
        ratios = F.pad(ratios, (0, len(ratios) % 2))  # a byte's second code is of 0
        packed[start // 2 : -(-stop // 2)] = pack(nearest(ratios, code))
    if not absmax.isfinite().all():
        refuse_not_finite(w)
    if double:
        absmax = double_quantize(absmax, CODEBOOKS[double], w.dtype)
    return Quantized(packed, absmax, w.shape, w.dtype, block, code)


@torch.no_grad()
def dequantize(
    q: Quantized, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """The tensor that the codes stand for:  w'_i = values[code_i] · absmax_b.

    Args
        dtype  of the result; None for the dtype before quantizing. The product is
               computed in float32 and rounded once
        out    a contiguous tensor of n values to write to instead; its dtype counts
    Returns  w', in the shape that was quantized
    Raises   ValueError   an `out` that does not fit
    """
    if out is None:
        out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.packed.device)
    elif out.numel() != q.numel or not out.is_contiguous():
        raise ValueError(
            f"out has shape {tuple(out.shape)}, contiguous: {out.is_contiguous()}; "
            f"needed is a contiguous one of {q.numel} values"
        )
    flat, absmax = out.view(-1), q.constants()
    table = pairs(q.codebook, q.packed.device)
    for start, stop in _chunks(q.numel, q.block, out.device, LOOKUP_CHUNK):
        part, bytes_ = flat[start:stop], q.packed[start // 2 : -(-stop // 2)]
        constants = absmax[start // q.block : -(-stop // q.block)]
        if _holds_pairs(part):
            _look_up(table, bytes_, part.view(torch.int64))
            scale(part, constants, q.block)
        else:
            both = torch.empty(len(bytes_), dtype=torch.int64, device=out.device)
            _look_up(table, bytes_, both)
            values = both.view(torch.float32)[: stop - start]
            scale(values, constants, q.block)
            part.copy_(values)
    return out.view(q.shape)


def nearest(ratios: Tensor, codebook: str) -> Tensor:
    """Codes of the values nearest to the ratios: uint8, in their shape.

    rank = number of midpoints below the ratio          (on a midpoint: the lower)
    """
    _, midpoints, order = book(codebook, ratios.device)
    rank = torch.zeros(ratios.shape, dtype=torch.uint8, device=ratios.device)
    above = torch.empty(ratios.shape, dtype=torch.bool, device=ratios.device)
    for midpoint in midpoints:
        torch.gt(ratios, midpoint, out=above)
        rank += above.view(torch.uint8)
    return rank if order is None else order[rank.int()].to(torch.uint8)


def _ratios(values: Tensor, block: int, absmax: Tensor) -> Tensor:
    """Values over the absmax of their block; `absmax` is written to on the way."""
    whole = len(values) // block * block
    rows = values[:whole].view(-1, block)
    torch.amax(rows.abs(), dim=1, out=absmax[: len(rows)])
    ratios = rows * (1 / absmax[: len(rows)].clamp(min=TINY))[:, None]
    if (absmax[: len(rows)] < TINY).any():
        tiny = absmax[: len(rows)] < TINY
        ratios[tiny] = (rows[tiny] / absmax[: len(rows)][tiny, None]).nan_to_num(0.0)
    if whole == len(values):
        return ratios.view(-1)
    # The short block: divided, not multiplied with the inverse, as bitsandbytes does.
    absmax[-1] = values[whole:].abs().amax()
    last = (values[whole:] / absmax[-1]).nan_to_num(0.0)
    return torch.cat([ratios.view(-1), last])


def _holds_pairs(part: Tensor) -> bool:
    """Whether these values can be written two at a time, as float32."""
    pairs_fit = part.storage_offset() % 2 == len(part) % 2 == 0
    return part.dtype == torch.float32 and pairs_fit


def _look_up(table: Tensor, bytes_: Tensor, out: Tensor) -> None:
    """out = table[bytes_].

    A lookup of one row is the work of one thread; so each thread gets a row.
    """
    threads = torch.get_num_threads() if out.device.type == "cpu" else 1
    if threads == 1 or len(out) % threads:
        torch.index_select(table, 0, bytes_.int(), out=out)
    else:
        rows = bytes_.view(threads, -1).long()
        torch.gather(table.expand(threads, -1), 1, rows, out=out.view(threads, -1))


def _chunks(
    n: int, block: int, device: torch.device, most: int
) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces of whole blocks and bytes; on a CPU of `most` values."""
    most = most if device.type == "cpu" else GPU_CHUNK
    size = 2 * block * max(1, most // (2 * block))
    for start in range(0, n, size):
        yield start, min(start + size, n)


def check_dtype(w: Tensor) -> None:
    """ValueError for a tensor whose dtype cannot be quantized."""
    if w.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"a tensor of {w.dtype} cannot be quantized: use {allowed}")


def check_options(block: int, double: bool | str, code: str) -> None:
    """ValueError for options that `quantize` does not allow."""
    whole("block", block, 1)
    one_of("code", code, CODES)
    names = ", ".join(map(repr, CODEBOOKS))
    known = not double or double in CODEBOOKS
    require(known, "double", double, f"allowed are False, {names}")


def refuse_not_finite(w: Tensor) -> None:
    """ValueError with the index of the first value that is NaN or infinite."""
    first = (~w.detach().isfinite()).nonzero()[0].tolist()
    value = w[tuple(first)].item()
    raise ValueError(
        f"w{first} is {value}: a block's unit is its largest value, and this one would "
        "make all of its block NaN or zero. Mend the weight before quantizing it"
    )
