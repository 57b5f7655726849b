"""How fast a kernel can be at best: the roofline.

    intensity = FLOPs / bytes           time >= max(FLOPs / peak, bytes / bandwidth)

Work with less than peak / bandwidth FLOPs a byte waits for memory, with more for the
multipliers. Several launches, one after another, take the sum of their bounds: while
one waits for memory, the multipliers do nothing.

A bound, not a time: launches, ragged waves of programs and caches are not in it.

Source   Williams, Waterman, Patterson, CACM 52(4), 2009
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure

from ..plotting.draw import frame, legend, name_y, point
from ..plotting.theme import BLUE, LIGHT, ORANGE, PURPLE, SMALL, Theme, style
from .count import LaunchCost, count, fused, unfused


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
BESIDE = {"MI300X": "bottom", "H100 SXM": "top"}  # their roofs are close together
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
UNCACHED = "fused, were there no cache"
KINDS = {UNFUSED: (ORANGE, "D"), FUSED: (BLUE, "o"), UNCACHED: (PURPLE, "^")}


def places(device: Device, r: int, dtype: torch.dtype) -> dict[str, list[tuple]]:
    """{kind: [(FLOPs/byte, FLOP/s at most), …]} for the figure's shapes.

    FLOPs are those that the product needs: work done twice does not count.
    """
    points: dict[str, list[tuple]] = {kind: [] for kind in KINDS}
    for shape in PLACES:
        ours, theirs = counts_of(shape, r, dtype), unfused(*shape, r, dtype)
        needed, issued = sum(c.needed for c in theirs), sum(c.issued for c in ours)
        for kind, counts in ((FUSED, ours), (UNFUSED, theirs)):
            moved = sum(cost.compulsory for cost in counts)
            rate = needed / bound(counts, device, dtype)
            points[kind].append((needed / moved, rate))
        top = min(peak(device, dtype), needed / issued * device.bandwidth)
        points[UNCACHED].append((needed / issued, top))
    return points


def figure(
    r: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    *,
    devices: Sequence[Device] = DEVICES,
    device: Device = SHOWN,
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """The devices' roofs, and the LoRA product under the roof of one, each way."""
    shown = places(device, r, dtype)
    letters = dict(zip("abcd", PLACES, strict=True))
    shapes = [f"{x}: {m:,} x {k:,} → {n:,}" for x, (m, k, n) in letters.items()]
    with style(theme):
        handles = [point(mark, theme, label=kind) for kind, mark in KINDS.items()]
        page, axes = frame(
            "Fusing lifts prompts and training steps; decoding waits for W either way",
            f"The LoRA product of rank {r}, rows x d_in → d_out, under the roof of the "
            f"{device.name} (thick). {'; '.join(shapes)}. FLOPs are those that the "
            "product needs.",
            width,
            3.6,
            0.85,
            theme,
        )
        axes.set(xscale="log", yscale="log", xlim=(0.4, 3e3), ylim=(4e11, 5e15))
        axes.set_xlabel("Intensity, FLOPs per byte that is moved")
        name_y(axes, "Reachable, TFLOP/s")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y / 1e12:,g}")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,g}")
        axes.grid(axis="both")
        box = axes.get_position()  # room for the devices' names
        axes.set_position((box.x0, box.y0, box.width - 0.85 / width, box.height))
        for one in devices:
            _roof(axes, one, peak(one, dtype), one == device, theme)
        for kind, rows in shown.items():
            axes.add_line(point(KINDS[kind], theme, *zip(*rows, strict=True), gid=kind))
        for kind, rows in shown.items():
            for letter, place in zip(letters, rows, strict=True):
                _letter(axes, letter, place, above=kind != UNFUSED)
        legend(page, handles)
    return page


def _letter(axes, letter: str, place: tuple, above: bool) -> None:
    """Beside its point: over the roof's line, or under it for the unfused."""
    offset = (-7, 6) if above else (7, -7)
    how = {"textcoords": "offset points", "ha": "center", "va": "center"}
    axes.annotate(letter, place, offset, size=SMALL, weight="bold", gid="letter", **how)


def _roof(axes, device: Device, top: float, thick: bool, theme: Theme) -> None:
    left, right = axes.get_xlim()
    xs = [left, top / device.bandwidth, right]
    ys = [left * device.bandwidth, top, top]
    colour = theme.ink if thick else theme.muted
    axes.plot(xs, ys, color=colour, linewidth=1.8 if thick else 0.7, gid="roof")
    axes.annotate(
        device.name,
        (right, top),
        (3, -2),
        textcoords="offset points",
        size=SMALL - 1,
        color=colour,
        va=BESIDE.get(device.name, "center"),
    )


def alt(r: int = 16, dtype: torch.dtype = torch.bfloat16, device=SHOWN) -> str:
    """The figure in words, for readers who cannot see it."""
    shown, parts = places(device, r, dtype), []
    for i, (m, d_in, d_out) in enumerate(PLACES):
        here = {kind: rows[i] for kind, rows in shown.items()}
        rates = [f"{kind} {rate / 1e12:,.3g}" for kind, (_, rate) in here.items()]
        many = "1 row" if m == 1 else f"{m:,} rows"
        parts.append(f"{many}, {d_in:,} to {d_out:,}: {', '.join(rates)} TFLOP/s")
    return (
        f"Roofline: reachable TFLOP/s against FLOPs per byte, both logarithmic, with "
        f"the roofs of {', '.join(d.name for d in DEVICES)}. The LoRA product of rank "
        f"{r} on the {device.name}. {'; '.join(parts)}"
    )
