"""What fills memory during one optimizer step, moment by moment, and in total.

    seen = watched(model, "mixed", length=512)
    picture(seen, title=…)                 areas: who holds how much at which moment
    parts(count)                           the same holders of a bill, for curves.bars

A moment is a tensor that is allocated or freed. So the picture has the order of what
happens, and no times: it is the same on every machine.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from ...memory.meter import Meter
from ...memory.step_bill import optimizer_class
from ...methods import full
from ...plotting.curves import FOOT, HOLDERS
from ...plotting.draw import frame, name_y, point
from ...plotting.theme import AMBER, LIGHT, RED, SMALL, Theme, readable, style
from ...training.loss import accumulate_gradients

MASTER, MOMENTS, COPIES = "master copy", "m and v", "bfloat16 copies"
LAST = "activations, short-lived tensors"
KINDS = {  # {holder: color}, in the order of stacking; colors as in curves.bars
    "weights": HOLDERS["weights"],
    "gradients": HOLDERS["gradients"],
    MASTER: HOLDERS["master"],
    MOMENTS: HOLDERS["optimizer"],
    COPIES: AMBER,
    "activations": HOLDERS["activations"],
}
STATES = "master copy, m and v"
LAYERS = {  # of the picture: {kind of the meter: (name, color)}, from the bottom
    "weights": ("weights", HOLDERS["weights"]),
    "optimizer": (STATES, HOLDERS["optimizer"]),
    "gradients": ("gradients", HOLDERS["gradients"]),
    "activations": (LAST, HOLDERS["activations"]),
}
FEW = 4  # tokens of the step in which the optimizer allocates its states
HEIGHT = 2.8  # inches


class Watched(NamedTuple):
    """One optimizer step, in bytes.

    series  {kind of the meter: bytes after each moment}, (moments,) each
    phases  {name: its first moment}: "forward", "backward", "update"
    """

    series: dict[str, np.ndarray]
    phases: dict[str, int]

    @property
    def total(self) -> np.ndarray:
        return sum(self.series.values())

    @property
    def peak(self) -> int:
        return int(self.total.max())


def watched(model: nn.Module, recipe: str, length: int) -> Watched:
    """Follow every tensor of the second step of full fine-tuning, on random tokens.

    The first step is short, and only allocates the optimizer's states.

    Args
        model   not injected; in float32 for "fp32", else in bfloat16. Its weights move
        recipe  as for experiments.bill
    """
    full.inject(model)
    model.train()
    optimizer = optimizer_class(recipe)(model.parameters(), lr=1e-5)
    accumulate_gradients(model, [_tokens(model, FEW)])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    batch, phases = _tokens(model, length), {}
    with Meter(model) as meter:
        phases["forward"] = len(meter.events)
        loss = model(**batch, use_cache=False).loss
        phases["backward"] = len(meter.events)
        loss.backward()
        phases["update"] = len(meter.events)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Watched(replayed(meter), phases)


def _tokens(model: nn.Module, length: int) -> dict[str, torch.Tensor]:
    """A batch of one random example, all of it labels."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=draw)
    return {"input_ids": ids, "labels": ids}


def replayed(meter: Meter) -> dict[str, np.ndarray]:
    """{kind: bytes at the beginning and after each event}, (events + 1,) each."""
    series = {kind: np.zeros(len(meter.events) + 1, np.int64) for kind in LAYERS}
    for storage in meter.existing:
        series[meter.kind.get(storage, "activations")][0] += meter.size[storage]
    for moment, (storage, change) in enumerate(meter.events, 1):
        series[meter.kind.get(storage, "activations")][moment] += change
    return {kind: np.cumsum(changes) for kind, changes in series.items()}


def parts(count: Mapping, parameters: float | None = None) -> dict[str, float]:
    """{holder: bytes} of a counted bill, its activations left out.

    Args
        count       what experiments.bill.counted returns
        parameters  scale the bytes to so many; None: to those that were counted
    """
    scale = (parameters or count["parameters"]) / count["parameters"]
    shares = _holders(count["bytes"], count["state"].get("master", 0))
    return {holder: scale * size for holder, size in shares.items()}


def ghost_parts(bill: Mapping[str, int]) -> dict[str, float]:
    """{holder: bytes} of a bill in mixed precision that meta_model.bill counted.

    A third of the optimizer's bytes is the master copy: four of twelve per parameter.
    """
    holders = _holders(bill, bill["optimizer"] / 3)
    return holders | {"activations": bill["activations"]}


def _holders(bytes_: Mapping[str, int], master: float) -> dict[str, float]:
    return {
        "weights": bytes_["weights"],
        "gradients": bytes_["gradients"],
        MASTER: master,
        MOMENTS: bytes_["optimizer"] - master,
    }


def picture(
    seen: Watched,
    *,
    title: str,
    subtitle: str = "",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """Bytes against the moments of a step, stacked by who holds them."""
    with style(theme):
        figure, axes = frame(title, subtitle, width, HEIGHT, FOOT, theme)
        rows = [seen.series[kind] / 1e9 for kind in LAYERS]
        colors = [color for _, color in LAYERS.values()]
        edge = {"linewidth": 0}
        axes.stackplot(np.arange(len(rows[0])), *rows, colors=colors, **edge)
        axes.set_xlim(0, len(rows[0]) - 1)
        axes.set_ylim(0, 1.16 * seen.peak / 1e9)
        axes.set_xlabel("Moments: tensors allocated or freed so far, count")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        name_y(axes, "Memory, GB (10⁹ bytes)")
        _name_layers(axes, rows)
        _name_phases(axes, seen, theme)
        _mark_peak(axes, seen, theme)
    return figure


def _name_layers(axes: Axes, rows: list[np.ndarray]) -> None:
    """Each layer's name inside it, at the moment when the layer is thickest."""
    bottom = np.zeros_like(rows[0])
    for row, (name, color) in zip(rows, LAYERS.values(), strict=True):
        text = axes.text(0, 0, name, size=SMALL, va="center", color=readable(color))
        wide = text.get_window_extent().width / axes.bbox.width * len(row)
        at = _widest(row, int(wide) + 1)
        text.set_position((at, (bottom + row / 2)[at + int(wide / 2)]))
        bottom = bottom + row


def _widest(row: np.ndarray, moments: int) -> int:
    """Where a window of so many moments starts in which the row is nowhere thin.

    Of all starts where its smallest value is within 2 % of the best, the middle one.
    """
    windows = np.lib.stride_tricks.sliding_window_view(row, min(moments, len(row)))
    least = windows.min(axis=1)
    good = np.flatnonzero(least >= 0.98 * least.max())
    return int(good[len(good) // 2])


def _name_phases(axes: Axes, seen: Watched, theme: Theme) -> None:
    ends = [*seen.phases.values(), len(seen.total) - 1]
    for (name, start), end in zip(seen.phases.items(), ends[1:], strict=True):
        if start:
            axes.axvline(start, color=theme.ink, linewidth=0.9, gid="phase")
        top = axes.get_ylim()[1]
        axes.text((start + end) / 2, 0.96 * top, name, ha="center", va="top", size=9)


def _mark_peak(axes: Axes, seen: Watched, theme: Theme) -> None:
    moment, peak = int(seen.total.argmax()), seen.peak / 1e9
    axes.add_line(point((RED, "v"), theme, [moment], [peak], gid="peak"))
    room = 0.015 * len(seen.total)
    axes.text(
        moment + room,
        peak,
        f"peak, a brief spike: {peak:.2f} GB",
        size=SMALL,
        va="center",
    )
