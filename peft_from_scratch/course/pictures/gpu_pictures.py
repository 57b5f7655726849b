"""Pictures of a GPU at work: its memories, tiles with a mask, a sum in shares.

    memory()                              registers, shared memory, L2 and HBM
    masked(size=100, tile=64, …)          which elements of the last tile exist
    split_sum(rows=192, shares=3, …)      split-K: partial sums, and then their sum

The sizes of the memories are those of SHOWN, an NVIDIA H100 SXM.

Source   NVIDIA H100 Tensor Core GPU Architecture, white paper, 2023: registers, L2 and
         HBM; NVIDIA CUDA C++ Programming Guide, compute capability 9.0: shared memory
"""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ...kernels.gpu_targets import LARGEST
from ...kernels.roofline import SHOWN
from ...plotting.draw import frame
from ...plotting.theme import (
    AMBER,
    BLUE,
    GREY,
    LIGHT,
    ORANGE,
    SKY,
    SMALL,
    TAN,
    Theme,
    readable,
    style,
)

PROCESSORS = 132  # multiprocessors of an H100 SXM
REGISTERS, SHARED = "256 KiB", f"{LARGEST['sm_90']} KiB"  # of a multiprocessor
L2, HBM = "50 MB", "80 GB"
FOOT = 0.1  # inches under the axes
SHARES = (BLUE, AMBER, SKY, ORANGE, TAN)  # of a sum, one color for each program
HATCHES = ("", "//", "..", "\\\\", "xx")


def _page(title: str, subtitle: str, across: float, down: float, width, theme) -> tuple:
    """A figure whose axes are only room, (0, 0) at the top left, in equal units."""
    height = (width - 0.6) * down / across
    figure, axes = frame(title, subtitle, width, height, FOOT, theme)
    axes.set(xlim=(0, across), ylim=(down, 0), aspect="equal", xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _box(axes: Axes, spot: tuple, size: tuple, color: str, theme: Theme, **more):
    """A filled box, its left top corner at `spot`."""
    look = {"facecolor": color, "edgecolor": theme.ink, "linewidth": 0.8} | more
    axes.add_patch(Rectangle(spot, *size, **look))


def _write(axes: Axes, x: float, y: float, words: str, theme: Theme, **more) -> None:
    look = {"ha": "center", "va": "center", "size": SMALL, "color": theme.ink}
    axes.text(x, y, words, **look | more)


def _arrow(axes: Axes, start: tuple, end: tuple, theme: Theme, both=False) -> None:
    kind = "<->" if both else "->"
    arrow = {"arrowstyle": kind, "color": theme.muted, "linewidth": 1.4}
    axes.annotate("", end, start, arrowprops=arrow)


# The memories -------------------------------------------------------------------------


def memory(
    title: str, subtitle: str = "", *, width: float = 7.4, theme: Theme = LIGHT
) -> Figure:
    """The memories of a GPU, the fastest on top, and what a product keeps in each."""
    with style(theme):
        figure, axes = _page(title, subtitle, 100, 50, width, theme)
        names = ("multiprocessor 1", "multiprocessor 2", f"multiprocessor {PROCESSORS}")
        for left, name in zip((9, 36.5, 72), names, strict=True):
            _processor(axes, left, name, theme)
        _write(axes, 67.7, 11, "…", theme, size=16)
        _store(axes, 27, f"L2 cache, {L2}: copies of recent reads", SKY, theme)
        _store(axes, 41, f"HBM, {HBM}: x, W, A, B and y", TAN, theme)
        for x in (22, 49.5, 85):
            _arrow(axes, (x, 27), (x, 21), theme, both=True)
        _arrow(axes, (54, 41), (54, 34), theme, both=True)
        speed = f"{SHOWN.bandwidth / 1e12:g} TB/s at most"
        _write(axes, 56, 37.5, speed, theme, ha="left")
        _arrow(axes, (4, 10), (4, 42), theme)
        _write(axes, 4, 7, "fast,\nsmall", theme)
        _write(axes, 4, 45, "slow,\nlarge", theme)
    return figure


def _processor(axes: Axes, left: float, name: str, theme: Theme) -> None:
    """A multiprocessor with its own two memories."""
    wide = 26
    _box(axes, (left, 4), (wide, 17), theme.paper, theme, gid="processor")
    _write(axes, left + wide / 2, 6, name, theme)
    parts = {
        f"registers\n{REGISTERS}\ntotal of a tile": BLUE,
        f"shared memory\n{SHARED}\ntiles of x, W": AMBER,
    }
    for i, (words, color) in enumerate(parts.items()):
        spot = left + 0.6 + i * 12.6, 8.2
        _box(axes, spot, (12.2, 12.2), color, theme, gid="memory")
        middle = spot[0] + 6.1, spot[1] + 6.1
        _write(axes, *middle, words, theme, color=readable(color), size=SMALL - 1.5)


def _store(axes: Axes, top: float, words: str, color: str, theme: Theme) -> None:
    _box(axes, (9, top), (89, 7), color, theme, gid="memory")
    _write(axes, 53.5, top + 3.5, words, theme, color=readable(color))


# A mask -------------------------------------------------------------------------------


def masked(
    size: int,
    tile: int,
    title: str,
    subtitle: str = "",
    *,
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """A vector of `size` elements in tiles: where the mask is true, and where false.

    Raises   ValueError  no elements, or no tile
    """
    if size < 1 or tile < 1:
        raise ValueError(f"size {size}, tile {tile}: both must be at least 1")
    programs = math.ceil(size / tile)
    scale = 100 / (programs * tile)  # units for each element
    with style(theme):
        figure, axes = _page(title, subtitle, 102, 18, width, theme)
        for program in range(programs):
            first = program * tile
            last, end = min(first + tile, size), first + tile
            spot = 1 + first * scale
            _box(axes, (spot, 6), (tile * scale, 7), theme.paper, theme, linewidth=2)
            there = (last - first) * scale
            _box(axes, (spot, 6), (there, 7), BLUE, theme, gid="there")
            _write(axes, spot + tile * scale / 2, 3, f"program {program}", theme)
            words = f"{first} to {last - 1}"
            _write(axes, spot + there / 2, 9.5, words, theme, color=readable(BLUE))
            if end > last:
                past = (spot + there, 6), ((end - last) * scale, 7)
                look = {"hatch": "///", "gid": "past"}
                _box(axes, *past, theme.faint, theme, **look)
                words = f"{last} to {end - 1}: mask false"
                _write(axes, spot + tile * scale, 16, words, theme, ha="right")
        _write(axes, 1, 16, f"mask true: {size} elements", theme, ha="left")
    return figure


# A sum in shares ----------------------------------------------------------------------


def split_sum(
    rows: int,
    shares: int,
    names: tuple[str, str, str],
    title: str,
    subtitle: str = "",
    *,
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """Split-K for U^T V: each program sums over its rows, and then the sums are added.

    Args
        rows    of U and of V, cut into `shares` equal parts
        names   of U, of V and of the result, as they are written
    Raises   ValueError  no shares, or more than there are rows or colors
    """
    if not 1 <= shares <= min(rows, len(SHARES)):
        raise ValueError(
            f"{shares} shares of {rows} rows: 1 to {min(rows, len(SHARES))} can be "
            "drawn"
        )
    tall, each = 36, math.ceil(rows / shares)
    with style(theme):
        figure, axes = _page(title, subtitle, 100, 46, width, theme)
        for x, words in zip((5.5, 22, 86), names, strict=True):
            _write(axes, x, 3, words, theme, weight="bold")
        _write(axes, 58, 3, "partial sums", theme, weight="bold")
        for share in range(shares):
            top, high = 6 + tall * share / shares, tall / shares
            last = min(rows, (share + 1) * each) - 1
            _share(axes, share, top, high, f"rows {share * each} to {last}", theme)
        middle = 6 + tall / 2
        _box(axes, (76, middle - 4), (20, 8), GREY, theme, gid="sum")
        words = "their sum"
        _write(axes, 86, middle, words, theme, color=readable(GREY))
        _write(axes, 58, 44.5, "first kernel", theme, color=theme.muted)
        _write(axes, 86, 44.5, "second kernel", theme, color=theme.muted)
    return figure


def _share(axes: Axes, share: int, top: float, high: float, rows: str, theme) -> None:
    """The rows of one program, its partial sum, and the arrow to the sum of all."""
    color, hatch = SHARES[share], HATCHES[share]
    look = {"hatch": hatch, "gid": "rows"}
    _box(axes, (3, top), (5, high), color, theme, **look)
    _box(axes, (12, top), (20, high), color, theme, **look)
    middle = top + high / 2
    _arrow(axes, (33, middle), (47, middle), theme)
    words = f"program {share}\n{rows}"
    _write(axes, 40, middle - 2.6, words, theme, size=SMALL - 1)
    _box(axes, (48, middle - 4), (20, 8), color, theme, hatch=hatch, gid="partial")
    _arrow(axes, (69, middle), (75.5, 24), theme)
