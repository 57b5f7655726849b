"""The codebooks: sixteen values for weights in four bits, 256 for constants in eight.

NF4 takes the quantiles of the normal distribution: if weights are normal, each of its
values is used about equally often. Zero has to be among the values, so that a zero
weight stays zero, and both ends, so that the largest weight of a block stays exact. So
there are eight values from -1 to 0 and nine from 0 to 1, which share the zero:

    offset  = 1 - (1/30 + 1/32) / 2                                        = 0.9677083
    negative  Φ⁻¹ at 8 even steps from 1 - offset to 1/2, the last left out, and 0
    positive  Φ⁻¹ at 9 even steps from 1/2 to offset
    all of it divided by Φ⁻¹(offset)

An offset is needed because Φ⁻¹(1) is infinite. It is the mean of two outermost
probabilities, of 15 and of 16 values: half of 1/30 and of 1/32 lie beyond the ends.
Which Φ⁻¹ computed the published table, and in which precision, is not known; today's
gives it to 2e-7. A file that says "nf4" means the published table, so the table counts
here, and a test ties it to the derivation.

Source  NF4: [1] arXiv:2305.14314v1, section 3, values of appendix E. FP4 and DYNAMIC as
        bitsandbytes has them, the latter from [2] arXiv:2110.02861v2, section 2.1.
"""

from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# One sign bit, two of exponent, one of mantissa, in the order of the bit patterns. In
# twelfths: 0.0625 is the one subnormal value.
FP4_HALF = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(s * v / 12 for s in (1, -1) for v in FP4_HALF)
# Symmetric: absmax is 7, and -8 is never the nearest.
INT4 = tuple(k / 7 for k in range(-8, 8))
CODES = {"nf4": NF4, "fp4": FP4, "int4": INT4}
OFFSET = 1 - (1 / 30 + 1 / 32) / 2


def normal_float(offset: float = OFFSET) -> Tensor:
    """The sixteen values of NF4, derived: (16,) float64, rising from -1 to 1.

    Equal to the published ones within 2e-7.
    """
    quantile, last = NormalDist().inv_cdf, NormalDist().inv_cdf(offset)
    step = offset - 0.5
    negative = [-quantile(offset - step * k / 7) / last for k in range(7)]
    positive = [quantile(offset - step * k / 8) / last for k in range(8)]
    return torch.tensor([*negative, 0.0, *reversed(positive)], dtype=torch.float64)


def dynamic() -> Tensor:
    """The 256 values of bitsandbytes' 8-bit type for constants: float32, rising.

    A byte is a sign, some zeros that give the power of ten, a one, and the remaining
    bits. These cut the decade from 0.1 to 1 into equal parts, whose middles are the
    values. So values near 0 have more powers of ten, and values near 1 more digits. The
    values 0 and 1 come on top.
    """
    values = [0.0, 1.0]
    for zeros in range(7):
        ends = torch.linspace(0.1, 1, 2 ** (6 - zeros) + 1, dtype=torch.float32)
        middles = (ends[:-1] + ends[1:]) / 2.0
        for sign in (1, -1):
            values += (sign * 10**-zeros * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def float8() -> Tensor:
    """The values of FP8 (E4M3) over the largest, 448: float32, rising; see [1]."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return every[every.isfinite()].unique() / 448


def integer8() -> Tensor:
    """k / 128 for k from -128 to 127: float32; what torchao takes."""
    return torch.arange(-128, 128, dtype=torch.float32) / 128


CODES_OF_CONSTANTS = {"dynamic": dynamic, "fp8": float8, "int8": integer8}


class Book(NamedTuple):
    """A codebook as tensors on a device."""

    values: Tensor  # (k,) float32; values[code] is what a code stands for
    midpoints: Tensor  # (k - 1,) float32, between neighbours in rising order
    order: Tensor | None  # rank in rising order -> code; None where both are equal


@cache
def book(name: str, device: torch.device) -> Book:
    """The codebook of this name, made once for each device."""
    if name in CODES:
        values = torch.tensor(CODES[name], dtype=torch.float32)
    else:
        values = CODES_OF_CONSTANTS[name]()
    order = torch.argsort(values)
    rising = values[order]
    midpoints = (rising[:-1] + rising[1:]) / 2
    same = torch.equal(rising, values)
    return Book(
        values.to(device), midpoints.to(device), None if same else order.to(device)
    )


@cache
def pairs(name: str, device: torch.device) -> Tensor:
    """For each byte the two float32 values of its codes, as one int64: (256,).

    Looking up a byte moves both values at once.
    """
    values = book(name, torch.device("cpu")).values
    both = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
    return both.contiguous().view(torch.int64).flatten().to(device)
