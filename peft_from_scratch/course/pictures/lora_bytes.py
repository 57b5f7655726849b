"""Figures of what LoRA costs beside the plain product: bytes, and the bound on time.

    ratios(widths, m=4096, r=16)   bytes of each version over those of x W^T
    curves(ratios, …)              these bytes against k, issued and distinct
    grid(savings, …)               a number for each width and rank, in a shaded cell

The bytes are counted by kernels/count.py from the launches of the library's kernels.
"""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from ...kernels.count import LaunchCost, fused, in_three, plain, total, unfused
from ...plotting.draw import frame, legend, name_y, point
from ...plotting.theme import (
    AMBER,
    BLUE,
    LIGHT,
    ORANGE,
    SMALL,
    Theme,
    readable,
    style,
)

FOUR, THREE, FUSED = "four kernels", "three kernels", "fused"
LOOKS = {FOUR: (ORANGE, "D"), THREE: (AMBER, "s"), FUSED: (BLUE, "o")}
KINDS = {"issued": "--", "distinct": "-"}
FOOT = 0.5  # inches under the axes for the ticks and the name of the x axis
ROW = 0.34  # inches, of the grid
Ratios = dict[str, dict[str, list[float]]]


def ratios(
    widths: Sequence[int], m: int, r: int, dtype: torch.dtype = torch.bfloat16
) -> Ratios:
    """{version: {"issued": […], "distinct": […]}}: bytes over those of x W^T alone.

    Args
        widths   n and k of W, which is square: one entry for each
        m, r     rows of x, rank
    """
    table: Ratios = {version: {kind: [] for kind in KINDS} for version in LOOKS}
    for k in widths:
        launches = fused(m, k, k, r, dtype)
        alone = total(plain(launches))
        versions = {
            FOUR: sum(unfused(m, k, k, r, dtype), LaunchCost()),
            THREE: sum(in_three(m, k, k, r, dtype), LaunchCost()),
            FUSED: total(launches),
        }
        for version, cost in versions.items():
            entry = table[version]
            entry["issued"].append(cost.issued / alone.issued)
            entry["distinct"].append(cost.compulsory / alone.compulsory)
    return table


def curves(
    widths: Sequence[int],
    table: Ratios,
    *,
    title: str,
    subtitle: str = "",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """Each version's bytes against k: distinct ones as lines, issued ones dashed."""
    with style(theme):
        handles = [point(mark, theme, label=name) for name, mark in LOOKS.items()]
        for kind, dash in KINDS.items():
            look = {"linestyle": dash, "label": kind, "markersize": 0}
            handles.append(point((theme.muted, ""), theme, **look))
        figure, axes = frame(title, subtitle, width, 2.4, FOOT + 0.45, theme)
        for name, kinds in table.items():
            for kind, values in kinds.items():
                look = {"linestyle": KINDS[kind], "gid": f"{name}, {kind}"}
                axes.add_line(point(LOOKS[name], theme, widths, values, **look))
        most = max(max(v) for kinds in table.values() for v in kinds.values())
        axes.set(xscale="log", ylim=(0.8, most + 0.3))
        axes.set_xlim(widths[0] / 1.1, widths[-1] * 1.1)
        axes.set_xlabel("n = k, rows and columns of W")
        axes.set_xticks(widths, [f"{k:,}" for k in widths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axhline(1, color=theme.muted, linewidth=0.8, gid="plain")
        name_y(axes, "Bytes, times those of x Wᵀ alone")
        axes.grid(axis="y")
        legend(figure, handles)
    return figure


def words(widths: Sequence[int], table: Ratios) -> str:
    """The curves' ends in sentences, for readers who cannot see them."""
    first, last = widths[0], widths[-1]
    sentences = []
    for kind in KINDS:
        parts = [
            f"{name} {kinds[kind][0]:.2f} to {kinds[kind][-1]:.2f}"
            for name, kinds in table.items()
        ]
        sentences.append(f"{kind.capitalize()} bytes: {', '.join(parts)}.")
    return (
        f"Times the bytes of x W^T alone, from n = k = {first:,} to {last:,}. "
        + " ".join(sentences)
    )


# A grid of savings --------------------------------------------------------------------


def grid(
    savings: Mapping[int, Mapping[int, float]],
    *,
    worth: float,
    title: str,
    subtitle: str = "",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """A row for each rank, a column for each width: what fusing saves, in percent.

    Args
        savings  {rank: {width: percent}}
        worth    from which saving on a cell is framed and its number bold
    """
    columns = sorted({k for by_width in savings.values() for k in by_width})
    with style(theme):
        height = ROW * len(savings)
        figure, axes = frame(title, subtitle, width, height, FOOT, theme)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(savings) - 0.5, -0.5))
        axes.set_xticks(range(len(columns)), [f"{k:,}" for k in columns])
        axes.set_yticks(range(len(savings)), [f"{r}" for r in savings])
        axes.set_xlabel("n = k, rows and columns of W")
        name_y(axes, "Rank r; in each cell, % of the rival's bound that fusing saves")
        for y, by_width in enumerate(savings.values()):
            for x, k in enumerate(columns):
                _cell(axes, x, y, by_width[k], by_width[k] >= worth, theme)
    return figure


def _cell(axes: Axes, x: int, y: int, saving: float, enough: bool, theme) -> None:
    """Blue where fusing saves, orange where it costs; framed where it is worth it."""
    ends = (theme.paper, BLUE) if saving >= 0 else (theme.paper, ORANGE)
    shades = LinearSegmentedColormap.from_list("saving", ends)
    color = to_hex(shades(min(1.0, abs(saving) / 50)))
    edge = theme.ink if enough else theme.faint
    box = Rectangle((x - 0.47, y - 0.42), 0.94, 0.84, facecolor=color, edgecolor=edge)
    box.set(linewidth=1.6 if enough else 0.8, gid="worth" if enough else "cell")
    axes.add_patch(box)
    weight = "bold" if enough else "normal"
    look = {"color": readable(color), "weight": weight, "size": SMALL}
    axes.text(x, y, f"{saving:+.0f}", ha="center", va="center", **look)
