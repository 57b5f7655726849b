"""NF4 in one sitting: quantize, pack, unpack and dequantize, each under its equation.

Each block of 64 weights, in memory order, stores its own scale: its largest absolute
value, absmax. Each weight stores a code: the number of the nearest of sixteen values.

    absmax_b = max |w_i|                            over the weights of block b
    code_i   = argmin_k | w_i / absmax_b - values[k] |                      [1] eq. (1)
    w'_i     = values[code_i] · absmax_b

A code takes 4 bits, and 64 weights share 32 bits of absmax: 4 + 32 / 64 = 4.5 bits per
value. For example, the block (-2.0, 0.5) has absmax 2, ratios (-1, 0.25) and codes
(0, 10). It comes back as (-2.0, 0.4922), because values[10] is 0.2461.

The functions below are the definition. The library runs blocks.py, which gives the same
bits faster: in pieces that stay in the CPU's cache, without a tensor 15 times w's size.

Source  [1] arXiv:2305.14314v1, section 3
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .codes import CODES

TINY = 1e-37  # float32: 1 / absmax overflows below 3e-39


def spec_quantize(w: Tensor, block: int, codebook: str) -> tuple[Tensor, Tensor]:
    """Codes (n,) from 0 to 15 and absmax (⌈n / block⌉,) float32 of n finite values."""
    n = w.numel()
    # w in blocks, one a row, with zeros after the last value
    rows = F.pad(w.float().flatten(), (0, -n % block)).view(-1, block)
    # absmax_b = max |w_i|
    absmax = rows.abs().amax(dim=1)
    # ratio_i = w_i / absmax_b, by the inverse; tiny and short blocks divide; 0 / 0 is 0
    ratios, divided = rows * (1 / absmax)[:, None], absmax < TINY
    divided[n // block :] = True
    ratios[divided] = (rows[divided] / absmax[divided, None]).nan_to_num(0.0)
    # rank of the nearest value = number of midpoints between values below the ratio
    values, order = torch.tensor(CODES[codebook]).sort()
    midpoints = (values[:-1] + values[1:]) / 2
    ranks = (ratios.flatten()[:n, None] > midpoints).sum(dim=1)
    return order[ranks], absmax


def spec_dequantize(codes: Tensor, absmax: Tensor, block: int, codebook: str) -> Tensor:
    """w'_i = values[code_i] · absmax_b: (n,) float32."""
    values = torch.tensor(CODES[codebook])[codes]
    return values * absmax.repeat_interleave(block)[: len(codes)]


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the high nibble: (n,) -> (n / 2,), n even."""
    return (codes[::2] << 4) | codes[1::2]


def unpack(packed: Tensor) -> Tensor:
    """The inverse of pack: (n / 2,) -> (n,)."""
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()
