"""What makes a training step fit: what layers keep, and what ranks keep.

    kept_by_layers(6)     what is there during a step, with checkpointing and without
    stages(4)             what each rank keeps under ZeRO

Bytes have the colors of plotting.curves. What is not kept is an empty outline, so that
no color is needed to read the pictures. step_picture.py draws a whole step.
"""

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ...ledger.experiments.zero_ranks import by_paper
from ...plotting.curves import FOOT, HOLDERS
from ...plotting.draw import frame, legend, name_y
from ...plotting.theme import LIGHT, SMALL, Theme, style

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
