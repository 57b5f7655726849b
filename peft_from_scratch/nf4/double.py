"""Double quantization: the constants of the blocks, quantized themselves.

One float32 for each block of 64 is half a bit a weight. The constants are all positive
and much alike; what differs between them, after their mean is taken off, bears eight
bits:

    offset   = mean of all absmax                                  one float32 a tensor
    unit_B   = max |absmax_b - offset| over 256 blocks              one float32 a 256
    code_b   = the nearest of 256 values to (absmax_b - offset) / unit_B        8 bits
    absmax'_b = values[code_b] · unit_B + offset

8 / 64 + 32 / (64 · 256) = 0.127 bit a weight. Three recipes differ in the 256 values:

    bitsandbytes   a dynamic type, finest near zero: the mean block's constant is
                   restored almost exactly, and an outlier's to 1 %      double=True
    the paper      FP8, without saying which of the two kinds (section 3);
                   here E4M3, the one with more digits                   double="fp8"
    torchao        whole steps of 1/128, equally fine everywhere         double="int8"

All three take 256 constants a block. Before it looks for the nearest value, the CPU
code of bitsandbytes rounds the ratio to one of 65,536 even steps from -1 to 1, and so
does its recipe here: the codes are then the same to the last one. (Its GPU code looks
at the ratio itself; near zero, where the values lie closer than the steps, it may take
a neighbour.)

Source  [1] arXiv:2305.14314v1, section 3; bitsandbytes 0.50 functional.py;
        torchao 0.13 dtypes/nf4tensor.py
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .codes import book

BLOCK = 256  # constants that share a unit
STEPS = 65536
RECIPES = {True: "dynamic", "dynamic": "dynamic", "fp8": "fp8", "int8": "int8"}


@dataclass(frozen=True, eq=False)
class Doubled:
    """The constants of a quantized tensor, in eight bits.

    codes   (blocks,) uint8
    units   (⌈blocks / 256⌉,) float32
    offset  () float32, the mean of the constants
    code    the name of the code book
    """

    codes: Tensor
    units: Tensor
    offset: Tensor
    code: str

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.units.nbytes + self.offset.nbytes

    def restored(self) -> Tensor:
        """values[code] · unit + offset: (blocks,) float32."""
        values = book(self.code, self.codes.device).values[self.codes.int()]
        units = self.units.repeat_interleave(BLOCK)[: len(values)]
        return values * units + self.offset

    def to(self, device: torch.device | str) -> "Doubled":
        """The same on another device."""
        moved = (t.to(device) for t in (self.codes, self.units, self.offset))
        return Doubled(*moved, self.code)


def double_quantize(absmax: Tensor, code: str) -> Doubled:
    """Quantize the constants of a tensor's blocks.

    Args
        absmax  (blocks,) float32
        code    "dynamic", "fp8" or "int8"
    """
    offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
    rows = F.pad(absmax - offset, (0, -len(absmax) % BLOCK)).view(-1, BLOCK)
    units = rows.abs().amax(dim=1) if len(rows) else absmax.new_zeros(0)
    # A unit of 0: any code gives the offset, and bitsandbytes takes the lowest.
    ratios = (rows * (1 / units)[:, None]).nan_to_num(-1.0).flatten()[: len(absmax)]
    if code == "dynamic":
        ratios = _step(ratios)
    codes = torch.bucketize(ratios, book(code, absmax.device).midpoints)
    return Doubled(codes.to(torch.uint8), units, offset, code)


def _step(ratios: Tensor) -> Tensor:
    """The nearest of STEPS even steps from -1 to 1."""
    number = ((ratios.clamp(-1, 1) + 1) * 0.5 * (STEPS - 1) + 0.5).floor()
    return -1 + 2 * number / (STEPS - 1)
