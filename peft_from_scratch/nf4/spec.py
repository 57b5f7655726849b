"""NF4 in one sitting: quantize, pack, unpack and dequantize, each under its equation.

Each block of 64 weights, in memory order, has a scale: its largest absolute value,
absmax. Each weight has a code of 4 bits: the number of the nearest of sixteen values.

    absmax_b = max |w_i|                            over the weights of block b
    code_i   = argmin_k | w_i / absmax_b - values[k] |                      [1] eq. (1)
    w'_i     = values[code_i] · absmax_b

4 + 32 / 64 = 4.5 bits per value, with absmax in float32. For example, the block
(-2.0, 0.5) has absmax 2, ratios (-1, 0.25) and codes (0, 10). It comes back as
(-2.0, 0.4922), because values[10] is 0.2461. The library runs blocks.py: the same bits,
faster, in less memory.                        [1] arXiv:2305.14314v1, section 3
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .codes import CODES


def spec_quantize(w: Tensor, block: int, codebook: str) -> tuple[Tensor, Tensor]:
    """n finite values -> codes (n,) uint8, 0 to 15; absmax (⌈n / block⌉,) float32."""
    n = w.numel()
    # w in blocks, one a row, with zeros after the last value
    rows = F.pad(w.float().flatten(), (0, -n % block)).view(-1, block)
    absmax = rows.abs().amax(dim=1)
    ratios = ratios_of(rows, absmax, n // block).flatten()[:n]
    # nearest value: count the midpoints that a ratio exceeds (on one: the lower value)
    values, order = torch.tensor(CODES[codebook], device=w.device).sort()
    midpoints = (values[:-1] + values[1:]) / 2
    ranks = (ratios[:, None] > midpoints).sum(dim=1)
    return order[ranks].byte(), absmax


def ratios_of(rows: Tensor, absmax: Tensor, whole: int) -> Tensor:
    """w_i / absmax_b, and 0 for 0 / 0, rounded to the last bit as in bitsandbytes."""
    # That multiplies by 1 / absmax, and divides in a short last block, after the whole
    # ones. Small blocks divide here as well: 1 / absmax overflows below 3e-39.
    numbers = torch.arange(len(absmax), device=absmax.device)
    divides = (absmax < 1e-37) | (numbers >= whole)
    quotients = (rows / absmax[:, None]).nan_to_num(0.0)
    return torch.where(divides[:, None], quotients, rows * (1 / absmax)[:, None])


def spec_dequantize(codes: Tensor, absmax: Tensor, block: int, codebook: str) -> Tensor:
    """w'_i = values[code_i] · absmax_b: (n,) float32."""
    values = torch.tensor(CODES[codebook], device=codes.device)[codes.long()]
    return values * absmax.repeat_interleave(block)[: len(codes)]


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the high nibble: (n,) uint8 -> (n / 2,)."""
    return (codes[::2] << 4) | codes[1::2]


def unpack(packed: Tensor) -> Tensor:
    """The inverse of pack: (n / 2,) -> (n,)."""
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()
