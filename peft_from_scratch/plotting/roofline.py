"""The roofline as a figure: roofs of devices, and LoRA's product under one of them."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from ..kernels.roofline import (
    DEVICES,
    FUSED,
    PLACES,
    SHOWN,
    UNCACHED,
    UNFUSED,
    Device,
    peak,
    places,
)
from .draw import frame, legend, name_y, point
from .theme import BLUE, LIGHT, ORANGE, PURPLE, SMALL, Theme, style

LOOKS = {UNFUSED: (ORANGE, "D"), FUSED: (BLUE, "o"), UNCACHED: (PURPLE, "^")}
BESIDE = {"MI300X": "bottom", "H100 SXM": "top"}  # their roofs are close together


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
        handles = [point(mark, theme, label=kind) for kind, mark in LOOKS.items()]
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
            axes.add_line(point(LOOKS[kind], theme, *zip(*rows, strict=True), gid=kind))
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
    """The figure in words, for who does not see it."""
    shown, sentences = places(device, r, dtype), []
    for i, (m, d_in, d_out) in enumerate(PLACES):
        here = {kind: rows[i] for kind, rows in shown.items()}
        rates = [f"{kind} {rate / 1e12:,.3g}" for kind, (_, rate) in here.items()]
        many = "1 row" if m == 1 else f"{m:,} rows"
        sentences.append(f"{many}, {d_in:,} to {d_out:,}: {', '.join(rates)} TFLOP/s")
    return (
        f"Roofline: reachable TFLOP/s against FLOPs per byte, both logarithmic, with "
        f"the roofs of {', '.join(d.name for d in DEVICES)}. The LoRA product of rank "
        f"{r} on the {device.name}. {'; '.join(sentences)}"
    )
