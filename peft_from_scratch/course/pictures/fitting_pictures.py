"""What makes a training step fit: its moments, what layers keep, what ranks keep.

    seen = followed(model, loss_of, length=512)     one real step, by its moments
    over_time(seen, predicted, title=…)             bytes, with the prediction as lines
    kept_by_layers(6)                               what is there, with checkpointing
    stages(4)                                       what each rank keeps under ZeRO

Bytes have the colors of plotting.curves. What is not kept is an empty outline, so that
no color is needed to read the pictures.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor, nn

from ...core.adapter import trainable
from ...ledger.experiments.zero_ranks import by_paper
from ...memory.meter import Meter
from ...plotting.curves import FOOT, HOLDERS
from ...plotting.draw import frame, legend, name_y, point
from ...plotting.theme import LIGHT, RED, SMALL, Theme, style
from .step_picture import replayed

GB = 1e9
MOMENTS = {  # of a step that is followed: those of memory/timeline.py in each
    "forward": ("forward",),
    "loss": ("loss", "head's gradient"),
    "backward": ("backward begins", "first layer", "backward ends"),
    "update": ("optimizer step",),
}
LAYERS = {  # kinds of the meter, from the bottom: (name, color)
    "weights": ("weights", HOLDERS["weights"]),
    "optimizer": ("states", HOLDERS["optimizer"]),
    "gradients": ("gradients", HOLDERS["gradients"]),
    "activations": ("activations and logits", HOLDERS["activations"]),
}
FEW = 4  # tokens of the step in which the optimizer allocates its states
Batch = dict[str, Tensor]


class Followed(NamedTuple):
    """One optimizer step, in bytes.

    series  {kind of the meter: bytes after each event}
    starts  {moment: its first event}, of MOMENTS
    """

    series: dict[str, np.ndarray]
    starts: dict[str, int]

    @property
    def total(self) -> np.ndarray:
        return sum(self.series.values())

    def peaks(self) -> dict[str, int]:
        """{moment: the most bytes at one time in it}"""
        ends = [*list(self.starts.values())[1:], len(self.total) - 1]
        pairs = zip(self.starts.items(), ends, strict=True)
        return {name: int(self.total[a : b + 1].max()) for (name, a), b in pairs}


def followed(model: nn.Module, loss_of: Callable, length: int) -> Followed:
    """Follow every tensor of the second step of an injected model, on random tokens.

    The first step is short, and only allocates AdamW's states.

    Args
        model    Llama's form, with what trains in it. Its weights move
        loss_of  (model, batch) -> a scalar
    """
    model.train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-5, foreach=False)
    loss_of(model, tokens(model, FEW)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    batch, starts = tokens(model, length), {}
    with Meter(model) as meter:
        # The loss begins where the head is called, and backward where the last norm's
        # output has its gradient.
        starts["forward"] = 0
        note = lambda name: starts.setdefault(name, len(meter.events))  # noqa: E731
        head, norm = model.get_output_embeddings(), model.get_decoder().norm

        def end_of_loss(module, args, h) -> None:
            h.register_hook(lambda _: note("backward") and None)

        hooks = [
            head.register_forward_pre_hook(lambda *_: note("loss") and None),
            norm.register_forward_hook(end_of_loss),
        ]
        loss = loss_of(model, batch)
        loss.backward()
        note("update")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return Followed(replayed(meter), starts)


def tokens(model: nn.Module, length: int) -> Batch:
    """A batch of one random row, all of it labels."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=draw)
    ids = ids.to(next(model.parameters()).device)
    return {"input_ids": ids, "labels": ids}


def predicted(moments: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """{moment of a followed step: bytes} of the moments that a bill predicts."""
    sums = {name: sum(parts.values()) for name, parts in moments.items()}
    return {name: max(sums[each] for each in own) for name, own in MOMENTS.items()}


def over_time(
    seen: Followed,
    bytes_: Mapping[str, int],
    *,
    title: str,
    subtitle: str = "",
    top: float | None = None,
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """Bytes during a step, stacked by who holds them, and what was predicted.

    The four moments are equally wide, since the loss, a spike, has few events.

    Args
        bytes_  {moment: predicted bytes}, drawn as a dashed line over the moment
        top     bytes at the upper end of the axis; None: as the step needs
    """
    edge = {"edgecolor": theme.ink, "linewidth": 0.5}
    handles = [Patch(facecolor=c, label=name, **edge) for name, c in LAYERS.values()]
    with style(theme):
        room = legend(frame("", "", width, 1, FOOT, theme)[0], handles)
        figure, axes = frame(title, subtitle, width, 2.6, FOOT + room, theme)
        legend(figure, handles)
        rows = [seen.series[kind] / GB for kind in LAYERS]
        colors = [color for _, color in LAYERS.values()]
        axes.stackplot(places(seen), *rows, colors=colors, linewidth=0)
        top = top or 1.2 * max(seen.total.max(), *bytes_.values())
        axes.set(xlim=(0, len(MOMENTS)), ylim=(0, top / GB), xticks=[])
        axes.set_xlabel("Order in which tensors are allocated and freed, no scale")
        name_y(axes, "Memory, GB (10⁹ bytes)")
        _name_moments(axes, seen, bytes_, theme)
    return figure


def places(seen: Followed) -> np.ndarray:
    """Where each event is drawn: moment i is between i and i + 1."""
    starts = [*seen.starts.values(), len(seen.total) - 1]
    return np.interp(np.arange(len(seen.total)), starts, np.arange(len(starts)))


def _name_moments(axes: Axes, seen: Followed, bytes_: Mapping, theme: Theme) -> None:
    """A border between two moments, their names on top, and the predicted lines."""
    high, most = axes.get_ylim()[1], max(seen.peaks(), key=seen.peaks().get)
    for i, name in enumerate(seen.starts):
        if i:
            axes.axvline(i, color=theme.muted, linewidth=0.8, gid="moment")
        weight = "bold" if name == most else "normal"
        spot = {"ha": "center", "va": "top", "size": SMALL, "weight": weight}
        words = f"{name}: the peak" if name == most else name
        axes.text(i + 0.5, 0.97 * high, words, **spot)
        level = [bytes_[name] / GB] * 2
        dashed = {"linestyle": "--", "linewidth": 1.6, "gid": "predicted"}
        axes.add_line(point((RED, ""), theme, [i, i + 1], level, **dashed))


def table(seen: Followed, bytes_: Mapping[str, int]) -> str:
    """Each moment's bytes, measured and predicted, a line each."""
    lines = [f"{'moment':10}{'predicted':>12}{'measured':>12}"]
    for name, most in seen.peaks().items():
        lines.append(f"{name:10}{bytes_[name] / GB:9.3f} GB{most / GB:9.3f} GB")
    return "\n".join(lines)


# What layers keep ---------------------------------------------------------------------

CELL, GAP, ASIDE = 0.22, 0.02, 0.45  # inches: a cell, between cells, between panels


def kept_by_layers(layers: int = 6, *, width: float = 7.4, theme: Theme = LIGHT):
    """Which layers' activations are there, during forward and backward, both ways.

    A column is a moment: a layer's forward or backward. With checkpointing, an input
    alone stays of each layer, and one layer's activations are made again.

    Raises  ValueError  less than two layers
    """
    if layers < 2:
        raise ValueError(f"layers={layers}: at least two are needed")
    title = "Checkpointed, a layer's activations are there while it runs, and no longer"
    subtitle = (
        f"{layers} layers. Columns: forward from left to right, then backward. Full "
        "cells: all that a layer keeps; small ones: its input alone."
    )
    edge = {"edgecolor": theme.ink, "linewidth": 0.5}
    sky = HOLDERS["activations"]
    with style(theme):
        tall = layers * (CELL + GAP)
        figure, axes = frame(title, subtitle, width, tall + 0.75, 0.1, theme)
        axes.set(xlim=(0, width - 0.6), ylim=(tall + 0.75, 0), xticks=[], yticks=[])
        axes.spines["bottom"].set_visible(False)
        panel = 2 * layers * (CELL + GAP)
        for i, (name, kept) in enumerate(ways(layers).items()):
            left = 0.35 + i * (panel + ASIDE)
            axes.text(left, 0.1, name, size=9, weight="bold", va="center")
            for column, whole, inputs in kept:
                x = left + column * (CELL + GAP)
                for layer in range(layers):
                    y = 0.3 + (layers - 1 - layer) * (CELL + GAP)
                    grid = {"facecolor": "none", "edgecolor": theme.faint}
                    axes.add_patch(Rectangle((x, y), CELL, CELL, **grid, linewidth=0.6))
                    if layer in whole:
                        full = {"facecolor": sky, "gid": "whole", **edge}
                        axes.add_patch(Rectangle((x, y), CELL, CELL, **full))
                    elif layer in inputs:
                        small = {"facecolor": sky, "gid": "input", **edge}
                        spot = x + CELL / 3, y + CELL / 3
                        axes.add_patch(Rectangle(spot, CELL / 3, CELL / 3, **small))
            half, low = panel / 2, 0.3 + tall + 0.1
            words = {"ha": "center", "va": "top", "size": SMALL, "color": theme.muted}
            axes.text(left + half / 2, low, "forward", **words)
            axes.text(left + 1.5 * half, low, "backward", **words)
        axes.text(0.05, 0.3 + tall - CELL / 2, "first", size=SMALL, va="center")
        axes.text(0.05, 0.3 + CELL / 2, "last", size=SMALL, va="center")
    return figure


def ways(layers: int) -> dict[str, list[tuple[int, set[int], set[int]]]]:
    """{name: [(column, layers kept whole, layers of which the input is kept), …]}"""
    plain, checkpointed = [], []
    for column in range(2 * layers):
        forward = column < layers
        now = column if forward else 2 * layers - 1 - column
        plain.append((column, set(range(now + 1)), set()))
        checkpointed.append((column, {now}, set(range(now))))
    return {"Without checkpointing": plain, "Checkpointed": checkpointed}


# What ranks keep ----------------------------------------------------------------------

ROWS = {"weights": 2, "gradients": 2, "optimizer": 12}  # bytes a parameter
NAMES = {"weights": "weights", "gradients": "gradients", "optimizer": "states"}
KINDS = {name: HOLDERS[kind] for kind, name in NAMES.items()}  # for curves.bars
CUT = {"weights": 3, "gradients": 2, "optimizer": 1}  # the stage that begins to cut


def stages(ranks: int = 4, *, width: float = 7.4, theme: Theme = LIGHT) -> Figure:
    """What each rank keeps of weights, gradients and states, stage by stage.

    Raises  ValueError  less than two ranks
    """
    if ranks < 2:
        raise ValueError(f"ranks={ranks}: ZeRO divides among two at least")
    title = "Each stage of ZeRO cuts one more row of the bill"
    subtitle = (
        f"{ranks} ranks, a column each, in mixed precision. Full: what the rank keeps. "
        "Empty: what other ranks keep for it."
    )
    edge = {"edgecolor": theme.ink, "linewidth": 0.5}
    handles = [Patch(facecolor=HOLDERS[n], label=NAMES[n], **edge) for n in ROWS]
    with style(theme):
        room = legend(frame("", "", width, 1, FOOT, theme)[0], handles)
        figure, axes = frame(title, subtitle, width, 2.5, 0.3 + room, theme)
        legend(figure, handles)
        for stage in range(4):
            for rank in range(ranks):
                x = stage * (ranks + 1.2) + rank
                bottom = 0.0
                for name, size in ROWS.items():
                    _band(axes, x, bottom, size, name, stage, rank, ranks, theme)
                    bottom += size
            kept = by_paper(1, ranks, stage) if stage else 16
            middle = stage * (ranks + 1.2) + ranks / 2 - 0.1
            head = "without" if stage == 0 else f"stage {stage}"
            words = f"{head}: {kept:g} bytes"
            axes.text(middle, 16.6, words, ha="center", va="bottom", size=SMALL)
        axes.set(xlim=(-0.2, 4 * (ranks + 1.2) - 1.2), ylim=(0, 18.4), xticks=[])
        axes.set_yticks([0, 4, 8, 12, 16])
        name_y(axes, "Memory of a rank, bytes a parameter")
    return figure


def _band(axes, x, bottom, size, name, stage, rank, ranks, theme) -> None:
    """A row of a rank: an outline of all of it, and what the rank keeps."""
    outline = {"facecolor": "none", "edgecolor": theme.faint, "linewidth": 0.7}
    axes.add_patch(Rectangle((x, bottom), 0.8, size, **outline))
    high = size / ranks if stage >= CUT[name] else size
    start = bottom + (rank * high if stage >= CUT[name] else 0)
    look = {"facecolor": HOLDERS[name], "edgecolor": theme.ink, "linewidth": 0.5}
    axes.add_patch(Rectangle((x, start), 0.8, high, gid=f"{stage} {name}", **look))
