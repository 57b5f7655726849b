"""Double quantization: the constants of the blocks, quantized themselves.

One float32 for each block of 64 is half a bit per weight. The constants are all
positive and much alike, so their differences from the mean can be rounded to 8 bits:

    offset    = mean of all absmax                            one float32 for a tensor
    nested_B  = max |absmax_b - offset| over 256 blocks       one float32 for 256 blocks
    code_b    = the nearest of 256 values to (absmax_b - offset) / nested_B       8 bits
    absmax'_b = values[code_b] · nested_B + offset

8 / 64 + 32 / (64 · 256) = 0.127 bits per weight. Three codebooks are in use for the
256 values:

    bitsandbytes   a dynamic type, finest near zero: the mean block's constant is
                   restored almost exactly, and an outlier's to 1 %      double=True
    the paper      FP8, without saying which of the two kinds (section 3);
                   here E4M3, the one with more digits                   double="fp8"
    torchao        whole steps of 1/128, equally fine everywhere         double="int8"

All three take 256 constants a block. Before it looks for the nearest value, the CPU
code of bitsandbytes rounds the ratio to one of 65,536 even steps from -1 to 1. With
"dynamic" this file does the same, so that all codes are equal. (Its GPU code looks at
the ratio itself; near zero, where the values lie closer than the steps, it may take a
neighbour.)

Source  [1] arXiv:2305.14314v1, section 3; bitsandbytes 0.50 functional.py;
        torchao 0.13 dtypes/nf4tensor.py
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .codes import book

BLOCK = 256  # constants that share a nested absmax
STEPS = 65536
CODEBOOKS = {True: "dynamic", "dynamic": "dynamic", "fp8": "fp8", "int8": "int8"}


@dataclass(frozen=True, eq=False)
class DoubleQuantized:
    """The constants of a quantized tensor, in eight bits.

    codes          (blocks,) uint8
    nested_absmax  (⌈blocks / 256⌉,) float32, the scales of the constants
    offset         () float32, the mean of the constants
    codebook       its name: "dynamic", "fp8" or "int8"
    """

    codes: Tensor
    nested_absmax: Tensor
    offset: Tensor
    codebook: str

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.nested_absmax.nbytes + self.offset.nbytes

    def dequantize(self) -> Tensor:
        """values[code] · nested_absmax + offset: (blocks,) float32."""
        values = book(self.codebook, self.codes.device).values
        constants = values.index_select(0, self.codes.int())
        scale(constants, self.nested_absmax, BLOCK)
        return constants.add_(self.offset)

    def to(self, device: torch.device | str) -> "DoubleQuantized":
        """The same on another device."""
        tensors = (self.codes, self.nested_absmax, self.offset)
        return DoubleQuantized(*(t.to(device) for t in tensors), self.codebook)


def scale(values: Tensor, constants: Tensor, block: int) -> None:
    """Multiply the values of each block by its constant, in place."""
    whole = len(values) // block * block
    values[:whole].view(-1, block).mul_(constants[: whole // block, None])
    if whole < len(values):
        values[whole:].mul_(constants[-1])


def double_quantize(
    absmax: Tensor, codebook: str, dtype: torch.dtype = torch.float32
) -> DoubleQuantized:
    """Quantize the constants of a tensor's blocks.

    Args
        absmax    (blocks,) float32
        codebook  "dynamic", "fp8" or "int8"
        dtype     of the tensor: constants that it can hold come back as such. Where the
                  nearest value is beyond its range, the one below is taken
    """
    offset = _mean(absmax)
    rows = F.pad(absmax - offset, (0, -len(absmax) % BLOCK)).view(-1, BLOCK)
    nested = rows.abs().amax(dim=1) if len(rows) else absmax.new_zeros(0)
    # Where all 256 are equal, any code gives the offset: bitsandbytes takes the lowest.
    ratios = (rows * (1 / nested)[:, None]).nan_to_num(-1.0).flatten()[: len(absmax)]
    if codebook == "dynamic":
        ratios = _step(ratios)
    codes = torch.bucketize(ratios, book(codebook, absmax.device).midpoints)
    codes = codes.to(torch.uint8)
    for _ in range(2):  # the next value below the nearest one, or below its even step
        doubled = DoubleQuantized(codes, nested, offset, codebook)
        beyond = ~doubled.dequantize().to(dtype).isfinite()
        codes = codes - beyond.to(torch.uint8)
    return replace(doubled, codes=codes)


def _mean(absmax: Tensor) -> Tensor:
    """The mean, as bitsandbytes computes it; summed by shares where a sum overflows."""
    if not len(absmax):
        return absmax.new_zeros(())
    mean, largest = absmax.mean(), absmax.max()
    shares = (absmax / len(absmax)).sum().clamp(max=largest)
    return torch.where(mean.isfinite(), mean, shares)


def _step(ratios: Tensor) -> Tensor:
    """The nearest of STEPS even steps from -1 to 1."""
    number = ((ratios.clamp(-1, 1) + 1) * 0.5 * (STEPS - 1) + 0.5).floor()
    return -1 + 2 * number / (STEPS - 1)
