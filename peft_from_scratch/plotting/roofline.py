"""The roofline as a figure: roofs of devices, and LoRA's product under one of them."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from ..kernels.roofline import (
    DEVICES,
    FUSED,
    IN_PLACE,
    PLACES,
    SHOWN,
    UNFUSED,
    Device,
    peak,
    places,
)
from .draw import frame, legend, name_y, point
from .theme import AMBER, BLUE, LIGHT, ORANGE, SMALL, Theme, style

LOOKS = {UNFUSED: (ORANGE, "D"), IN_PLACE: (AMBER, "s"), FUSED: (BLUE, "o")}
LABELS = {  # as the lesson says
    UNFUSED: "four kernels",
    IN_PLACE: "three kernels: the last one adds in place",
    FUSED: "fused",
}
BESIDE = {"MI300X": "bottom", "H100, H200 SXM": "top"}  # their roofs are close together


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
        handles = [point(LOOKS[k], theme, label=label) for k, label in LABELS.items()]
        page, axes = frame(
            "Fusing raises the speed limit most for narrow layers (b); with one row "
            "(d), all versions wait for W",
            f"The LoRA product of rank {r} on the {device.name} (thick line). Rows x "
            f"d_in → d_out: {'; '.join(shapes)}. FLOPs that a kernel repeats do not "
            "count as speed.",
            width,
            3.6,
            0.85,
            theme,
        )
        axes.set(xscale="log", yscale="log", xlim=(0.4, 3e3), ylim=(4e11, 5e15))
        axes.set_xlabel("Intensity, FLOPs per byte")
        name_y(axes, "Speed limit, TFLOP/s")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y / 1e12:,g}")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,g}")
        axes.grid(axis="both")
        box = axes.get_position()  # room for the devices' names
        axes.set_position((box.x0, box.y0, box.width - 0.85 / width, box.height))
        for one in devices:
            _roof(axes, one, peak(one, dtype), one == device, theme)
        for top in dict.fromkeys(peak(one, dtype) for one in devices):
            there = [one for one in devices if peak(one, dtype) == top]
            _name(axes, there, top, device in there, theme)
        for kind, look in LOOKS.items():
            places_of = zip(*shown[kind], strict=True)
            axes.add_line(point(look, theme, *places_of, gid=kind))
        for kind in (UNFUSED, FUSED):  # the third kind's places are between them
            for letter, place in zip(letters, shown[kind], strict=True):
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


def _name(axes, devices: Sequence[Device], top: float, thick: bool, theme) -> None:
    """The names of devices of one peak, at its right end."""
    first, *others = (device.name for device in devices)
    series = first.split()[0] if others else first
    name = ", ".join([series, *others])
    axes.annotate(
        name,
        (axes.get_xlim()[1], top),
        (3, -2),
        textcoords="offset points",
        size=SMALL - 1,
        color=theme.ink if thick else theme.muted,
        va=BESIDE.get(name, "center"),
    )


def alt(
    r: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    *,
    devices: Sequence[Device] = DEVICES,
    device: Device = SHOWN,
) -> str:
    """The figure in sentences, for readers who cannot see it."""
    shown, sentences = places(device, r, dtype), []
    for i, (m, d_in, d_out) in enumerate(PLACES):
        four, three, fused = (f"{shown[k][i][1] / 1e12:,.3g}" for k in LOOKS)
        many = "one row" if m == 1 else f"{m:,} rows"
        sentences.append(
            f"With {many} and a {d_out:,} x {d_in:,} weight, the limit is {four} "
            f"TFLOP/s for four kernels, {three} for three and {fused} for the fused "
            "one."
        )
    others = [one.name for one in devices if one != device]
    roofs = f" The other roofs are of {', '.join(others)}." if others else ""
    return (
        f"A roofline: the speed limit of the LoRA product of rank {r} on the "
        f"{device.name}. {' '.join(sentences)}{roofs}"
    )
