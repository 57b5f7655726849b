"""How fast a kernel can be at best: the roofline.

    intensity = FLOPs / bytes           time >= max(FLOPs / peak, bytes / bandwidth)

Work with less than peak / bandwidth FLOPs a byte waits for memory, with more for the
multipliers. Several launches, one after another, take the sum of their bounds: while
one waits for memory, the multipliers do nothing.

A bound, not a time: launches, ragged waves of programs and caches are not in it.

Source   Williams, Waterman, Patterson, CACM 52(4), 2009
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .count import LaunchCost, count, fused, in_three, unfused


@dataclass(frozen=True)
class Device:
    """What a datasheet promises at most. FLOP/s are dense: no sparsity counted.

    matrix      FLOP/s of bf16 and fp16 matrices with sums in float32
    plain       FLOP/s of float32
    bandwidth   of its memory, bytes/s
    """

    name: str
    matrix: float
    plain: float
    bandwidth: float
    source: str


DEVICES = (
    Device(
        name="A100 80GB SXM",
        matrix=312e12,
        plain=19.5e12,
        bandwidth=2.039e12,
        source="NVIDIA A100 Tensor Core GPU datasheet, 2021",
    ),
    Device(
        name="H100 SXM",
        matrix=989.4e12,
        plain=66.9e12,
        bandwidth=3.35e12,
        source="NVIDIA H100 Tensor Core GPU Architecture white paper and datasheet, "
        "2023; the datasheet's 1,979 TFLOP/s are with sparsity",
    ),
    Device(
        name="H200 SXM",
        matrix=989.4e12,
        plain=66.9e12,
        bandwidth=4.8e12,
        source="NVIDIA H200 Tensor Core GPU datasheet, 2024: the H100's processors, "
        "faster memory",
    ),
    Device(
        name="B200",
        matrix=2250e12,
        plain=80e12,
        bandwidth=8.0e12,
        source="NVIDIA Blackwell Architecture Technical Brief, 2024: HGX B200; its "
        "4.5 PFLOP/s are with sparsity",
    ),
    Device(
        name="MI300X",
        matrix=1307.4e12,
        plain=163.4e12,
        bandwidth=5.3e12,
        source="AMD Instinct MI300X Accelerator data sheet, 2023",
    ),
    Device(
        name="RTX 4090",
        matrix=165.2e12,
        plain=82.6e12,
        bandwidth=1.008e12,
        source="NVIDIA Ada GPU Architecture white paper, 2023: fp16 with sums in "
        "float32",
    ),
)
SHOWN = DEVICES[1]  # the device whose roof the figure's points are on


def peak(device: Device, dtype: torch.dtype) -> float:
    """FLOP/s. Products of float32 keep all 24 bits: TF32's matrix units do not."""
    return device.plain if dtype == torch.float32 else device.matrix


def seconds(cost: LaunchCost, device: Device, dtype: torch.dtype) -> float:
    """The bound of one launch, with each operand read once."""
    for_flops = cost.flops / peak(device, dtype)
    return max(for_flops, cost.compulsory / device.bandwidth)


def bound(counts: Iterable[LaunchCost], device: Device, dtype: torch.dtype) -> float:
    """The bound of launches in a row, seconds."""
    return sum(seconds(cost, device, dtype) for cost in counts)


def counts_of(shape: tuple, r: int, dtype: torch.dtype) -> list[LaunchCost]:
    """The cost of each launch of lora_linear."""
    return [count(launch) for launch in fused(*shape, r, dtype)]


# The figure ---------------------------------------------------------------------------

PLACES = ((4096, 4096, 4096), (4096, 576, 576), (16, 4096, 4096), (1, 4096, 4096))
FUSED, UNFUSED = "fused", "unfused, in four steps"
IN_PLACE = "unfused, in three: added in place"
UNCACHED = "fused, were there no cache"
KINDS = (UNFUSED, IN_PLACE, FUSED, UNCACHED)


def places(device: Device, r: int, dtype: torch.dtype) -> dict[str, list[tuple]]:
    """{kind: [(FLOPs/byte, FLOP/s at most), …]} for the figure's shapes.

    FLOPs are those that the product needs: work done twice does not count.
    """
    points: dict[str, list[tuple]] = {kind: [] for kind in KINDS}
    for shape in PLACES:
        ours, theirs = counts_of(shape, r, dtype), unfused(*shape, r, dtype)
        three = in_three(*shape, r, dtype)
        needed, issued = sum(c.needed for c in theirs), sum(c.issued for c in ours)
        for kind, counts in ((FUSED, ours), (UNFUSED, theirs), (IN_PLACE, three)):
            moved = sum(cost.compulsory for cost in counts)
            rate = needed / bound(counts, device, dtype)
            points[kind].append((needed / moved, rate))
        top = min(peak(device, dtype), needed / issued * device.bandwidth)
        points[UNCACHED].append((needed / issued, top))
    return points
