"""Blockwise quantization to four bits, and back.

    absmax_b = max |w_i|  over block b of `block` values in memory order
    code_i   = the number of the value nearest to  w_i · (1 / absmax_b)
    packed   = code_0 · 16 + code_1,  code_2 · 16 + code_3, …        high nibble first
    w'_i     = values[code_i] · absmax_b                             in float32

The nearest of sixteen rising values is found by counting: the number of a value is how
many of the fifteen midpoints between neighbours lie below it. Fifteen comparisons in a
row that stay in the cache are faster than a search for each weight.

The largest of a block is exact (its ratio is 1, or -1, which every code has), zero is
exact, and the error of any other is at most half the gap between two values times
absmax. One outlier therefore makes its 63 neighbours coarse, and no others.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.targets import shortened
from .codes import CODES, book, pairs
from .double import RECIPES, Doubled, double_quantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Values worked on at a time on a CPU: in its cache, and below the 32,768 from which on
# torch shares an operation out, whose threads would then meet thirty times a chunk.
CHUNK = (1 << 15) - 1
TINY = 1e-37  # below it 1 / absmax overflows


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor in four bits.

    packed  (⌈n / 2⌉,) uint8, two codes a byte, the first of a pair in the high nibble
    absmax  the constants of the blocks: (⌈n / block⌉,) float32, or quantized themselves
    shape   of the tensor
    dtype   that it had, and that dequantize gives unless asked for another one
    block   values that share a constant
    code    the name of the code book: "nf4", "fp4", "int4"
    """

    packed: Tensor
    absmax: Tensor | Doubled
    shape: torch.Size
    dtype: torch.dtype
    block: int
    code: str

    @cached_property
    def numel(self) -> int:
        """Values that this stands for; not the bytes that it takes."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held for this tensor: codes and constants."""
        return self.packed.nbytes + self.absmax.nbytes

    @property
    def bits_per_value(self) -> float:
        """8 · nbytes / n; the code books, which all tensors share, are not in it.

        Raises  ValueError  a tensor without values
        """
        if not self.numel:
            raise ValueError(f"a tensor of shape {tuple(self.shape)} holds no value")
        return 8 * self.nbytes / self.numel

    def constants(self) -> Tensor:
        """absmax of every block: (⌈n / block⌉,) float32."""
        held = self.absmax
        return held.restored() if isinstance(held, Doubled) else held

    def codes(self) -> Tensor:
        """The code of every value, unpacked: (n,) uint8, from 0 to 15."""
        return unpack(self.packed)[: self.numel]

    def to(self, device: torch.device | str) -> "Quantized":
        """The same on another device."""
        packed, absmax = self.packed.to(device), self.absmax.to(device)
        return Quantized(packed, absmax, self.shape, self.dtype, self.block, self.code)


@torch.no_grad()
def quantize(
    w: Tensor, block: int = 64, double: bool | str = True, code: str = "nf4"
) -> Quantized:
    """Round every value of a tensor to one of sixteen, in units of its block's largest.

        code_i = argmin_k | w_i / absmax_b - values[k] |                     [1] eq. (1)

    Args
        w       any shape, also empty; float32, bfloat16 or float16; in memory order, so
                that a row's end may share a block with the next row's start
        block   values that share a constant; any whole number from 1 on. The last block
                may be short
        double  quantize the constants too: True for bitsandbytes' recipe, "fp8" for the
                paper's, "int8" for torchao's; False to keep them in float32
        code    "nf4"; for comparison "fp4" and "int4", the symmetric one
    Returns  Quantized: 4 + 32 / block bits a value, with double 4 + 8 / block + 32 /
             (256 · block), and what rounding up to whole bytes and blocks adds
    Raises   ValueError   NaN or infinity in w, with the index of the first; a dtype, a
             block, a code or a recipe that is not allowed
    Departs  where absmax < 1e-37, bitsandbytes multiplies with an inverse that has
             overflowed; here such blocks are divided
    Source   [1] arXiv:2305.14314v1
    """
    _check(w, block, double, code)
    flat, device = w.detach().reshape(-1), w.device
    packed = torch.empty(-(-len(flat) // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-len(flat) // block), dtype=torch.float32, device=device)
    for start, stop in _chunks(len(flat), block, device):
        constants = absmax[start // block : -(-stop // block)]
        ratios = _ratios(flat[start:stop].float(), block, constants)
        ratios = F.pad(ratios, (0, len(ratios) % 2))  # a byte's second code is of 0
        packed[start // 2 : -(-stop // 2)] = pack(nearest(ratios, code))
    if not absmax.isfinite().all():
        _refuse_not_finite(w)
    if double:
        absmax = double_quantize(absmax, RECIPES[double])
    return Quantized(packed, absmax, w.shape, w.dtype, block, code)


@torch.no_grad()
def dequantize(
    q: Quantized, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """What the codes stand for:  w'_i = values[code_i] · absmax_b.

    Args
        dtype  of the result; None for that of the tensor that was quantized. The
               product is computed in float32 and rounded once
        out    write there instead: n values, contiguous; its dtype counts
    Returns  the tensor, of the shape that was quantized
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
    table = pairs(q.code, q.packed.device)
    for start, stop in _chunks(q.numel, q.block, out.device):
        bytes_ = q.packed[start // 2 : -(-stop // 2)].int()
        values = table.index_select(0, bytes_).view(torch.float32)
        constants = absmax[start // q.block : -(-stop // q.block)]
        _scale(values[: stop - start], constants, q.block, flat[start:stop])
    return out.view(q.shape)


def nearest(ratios: Tensor, code: str) -> Tensor:
    """The code of the value nearest to each ratio: uint8, of the same shape.

    rank = number of midpoints below the ratio          (on a midpoint: the lower)
    """
    _, midpoints, order = book(code, ratios.device)
    rank = torch.zeros(ratios.shape, dtype=torch.uint8, device=ratios.device)
    above = torch.empty(ratios.shape, dtype=torch.bool, device=ratios.device)
    for midpoint in midpoints:
        torch.gt(ratios, midpoint, out=above)
        rank += above.view(torch.uint8)
    return rank if order is None else order[rank.int()].to(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the high nibble: (n,) -> (n / 2,), n even."""
    return (codes[::2] << 4) | codes[1::2]


def unpack(packed: Tensor) -> Tensor:
    """The codes of each byte, that of the high nibble first: (n / 2,) -> (n,)."""
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()


def _ratios(values: Tensor, block: int, absmax: Tensor) -> Tensor:
    """values / absmax of their block, which is written to `absmax` on the way."""
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


def _scale(values: Tensor, absmax: Tensor, block: int, out: Tensor) -> None:
    """out = values · absmax of their block."""
    whole = len(values) // block * block
    rows, constants = values[:whole].view(-1, block), absmax[: whole // block, None]
    torch.mul(rows, constants, out=out[:whole].view(-1, block))
    if whole < len(values):
        torch.mul(values[whole:], absmax[-1], out=out[whole:])


def _chunks(n: int, block: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces that hold whole blocks and whole bytes; one on a GPU."""
    size = 2 * block * max(1, CHUNK // (2 * block)) if device.type == "cpu" else n
    for start in range(0, n, size or 1):
        yield start, min(start + size, n)


def _check(w: Tensor, block: int, double: bool | str, code: str) -> None:
    if w.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"a tensor of {w.dtype} cannot be quantized: use {allowed}")
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(
            f"block={shortened(block)}: allowed is a whole number from 1 on"
        )
    if code not in CODES:
        raise ValueError(f"code={shortened(code)}: allowed are {', '.join(CODES)}")
    if double and double not in RECIPES:
        names = ", ".join(repr(name) for name in RECIPES)
        raise ValueError(f"double={shortened(double)}: allowed are False, {names}")


def _refuse_not_finite(w: Tensor) -> None:
    first = (~w.detach().isfinite()).nonzero()[0].tolist()
    value = w[tuple(first)].item()
    raise ValueError(
        f"w{first} is {value}: a block's unit is its largest value, and this one would "
        "make all of its block NaN or zero. Mend the weight before quantizing it"
    )
