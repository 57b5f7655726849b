"""Pictures of which program reads what, drawn from a trace of a real run.

    with trace() as seen:
        product(x, matrix(W), n, A=A, B=B)
    picture(seen, dict(x=x, W=W, A=A, B=B, y=y), program=1, title=…)
    order_picture({"row by row": seen, …}, y, window=8, title=…)

The tensors of y = x W^T + h B^T lie as in a multiplication table: x left of y, W^T
above it, A^T above h, B^T under y, so that a program's rows and columns meet in its
block of y. The darker an element, the more often it is read (y: written); how often
also stands beside the name, and what one program touches is outlined and hatched.
"""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ...kernels.trace import Access, Trace
from ...plotting.draw import frame
from ...plotting.theme import BLUE, LIGHT, SMALL, Theme, readable, style

BESIDE = 0.16  # of the longest side: the room between two tensors
FOOT = 0.1  # inches under the axes
MARGIN = 1  # elements, so that no edge is cut
PLACES = {  # (column, row) in the table, and whether it is drawn transposed
    "x": (0, 1, False),
    "W": (1, 0, True),
    "y": (1, 1, False),
    "A": (2, 0, True),
    "B": (1, 2, True),
}


def counts(
    seen: Trace, name: str, tensor: torch.Tensor, program: int | None = None
) -> np.ndarray:
    """The number of reads of each element, or of writes if none was ever read.

    Args
        tensor   the tensor of that name, a matrix of any strides
        program  count the accesses of this program alone; None: of all programs
    Returns  whole numbers, of the tensor's shape
    """
    accesses = seen.of("load", name) or seen.of("store", name)
    accesses = [a for a in accesses if program in (None, a.program[0])]
    return _count(accesses, tensor)


def _count(accesses: list[Access], tensor: torch.Tensor) -> np.ndarray:
    places = positions(tensor)
    total = np.zeros(places.max() + 1, np.int64)
    for access in accesses:
        np.add.at(total, access.elements, 1)
    return total[places]


def positions(tensor: torch.Tensor) -> np.ndarray:
    """The place of each element, in elements from the tensor's first."""
    down, along = (np.arange(size) for size in tensor.shape)
    return down[:, None] * tensor.stride(0) + along[None, :] * tensor.stride(1)


def order(seen: Trace, y: torch.Tensor) -> np.ndarray:
    """The number of the program that wrote each element of y; of y's shape."""
    owner = np.full(positions(y).max() + 1, -1)
    for access in seen.of("store", "y"):
        owner[access.elements] = access.program[0]
    return owner[positions(y)]


def window_bytes(seen: Trace, window: int) -> float:
    """Bytes that `window` programs in a row read, each element once; the mean.

    The nearest thing to a cache that holds what these programs share.
    """
    loads = seen.of("load")
    last = max(access.program[0] for access in loads)
    firsts = range(0, last + 1, window)
    parts = [
        Trace([a for a in loads if first <= a.program[0] < first + window])
        for first in firsts
    ]
    return sum(part.bytes(distinct=True) for part in parts) / len(parts)


# The pictures -------------------------------------------------------------------------


def picture(
    seen: Trace,
    tensors: Mapping[str, torch.Tensor],
    *,
    program: int,
    title: str,
    subtitle: str,
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """The tensors of a product, each element as dark as it is often read.

    Args
        tensors  of x, W, A, B and y those that are to be drawn
        program  whose footprint is outlined
    Raises   ValueError  a tensor that has no place in the table
    """
    if unknown := set(tensors) - set(PLACES):
        raise ValueError(f"{sorted(unknown)} have no place; {', '.join(PLACES)} have")
    reads = {name: counts(seen, name, tensor) for name, tensor in tensors.items()}
    spots, across, down = _layout({n: reads[n].shape for n in reads})
    most = max(count.max() for count in reads.values())
    with style(theme):
        height = (width - 0.6) * down / across
        figure, axes = frame(title, subtitle, width, height, FOOT, theme)
        _bare(axes, across, down)
        for name, count in reads.items():
            own = counts(seen, name, tensors[name], program) > 0
            turned = PLACES[name][2]
            _draw(axes, spots[name], count.T if turned else count, most, theme)
            _outline(axes, spots[name], own.T if turned else own, theme)
            _name(axes, spots[name], name, count)
    return figure


def _layout(shapes: Mapping[str, tuple]) -> tuple[dict, float, float]:
    """({name: (left, top)}, width, height) of the table, in elements."""
    sizes = {
        name: shape[::-1] if not PLACES[name][2] else shape
        for name, shape in shapes.items()
    }  # (across, down) as drawn
    room = BESIDE * max(max(size) for size in sizes.values())
    widths, heights = [0, 0, 0], [0, 0, 0]
    for name, (across, down) in sizes.items():
        column, row, _ = PLACES[name]
        widths[column] = max(widths[column], across)
        heights[row] = max(heights[row], down)
    lefts = _starts(widths, room)
    tops = [top + 0.6 * room for top in _starts(heights, room)]  # names stand above
    spots = {n: (lefts[PLACES[n][0]], tops[PLACES[n][1]]) for n in shapes}
    across = max(spots[n][0] + sizes[n][0] for n in shapes)
    down = max(spots[n][1] + sizes[n][1] for n in shapes)
    return spots, across + room, down + MARGIN


def _starts(sizes: list[float], room: float) -> list[float]:
    return [sum(s + room for s in sizes[:i] if s) for i in range(len(sizes))]


def _bare(axes: Axes, across: float, down: float) -> None:
    """No ticks and no spines: the axes are only room, with y downwards."""
    axes.set(xlim=(-MARGIN, across + MARGIN), ylim=(down, 0), aspect="equal")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _shades(theme: Theme) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list("reads", [theme.paper, BLUE, theme.ink])


def _draw(axes: Axes, spot: tuple, count: np.ndarray, most: int, theme: Theme) -> None:
    (left, top), (down, across) = spot, count.shape
    axes.imshow(
        count,
        cmap=_shades(theme),
        vmin=0,
        vmax=1.6 * most,  # so that an outline in ink is seen on the darkest
        extent=(left, left + across, top + down, top),
        interpolation="nearest",
    )
    edge = {"edgecolor": theme.muted, "linewidth": 0.6, "fill": False}
    axes.add_patch(Rectangle(spot, across, down, **edge))


def _outline(axes: Axes, spot: tuple, own: np.ndarray, theme: Theme) -> None:
    """A box around what one program touches; nothing where it touches nothing."""
    if not own.any():
        return
    rows, columns = (np.flatnonzero(own.any(axis)) for axis in (1, 0))
    corner = spot[0] + columns[0], spot[1] + rows[0]
    sides = np.ptp(columns) + 1, np.ptp(rows) + 1
    look = {"edgecolor": theme.ink, "linewidth": 2, "hatch": "///", "fill": False}
    axes.add_patch(Rectangle(corner, *sides, gid="footprint", **look))


def _name(axes: Axes, spot: tuple, name: str, count: np.ndarray) -> None:
    left, top = spot
    turned = "ᵀ" if PLACES[name][2] else ""
    axes.text(left, top - 1, f"{name}{turned}: {often(count)}", size=SMALL, va="bottom")


def words(seen: Trace, tensors: Mapping[str, torch.Tensor]) -> str:
    """The picture in words: "Each element is read: x 6 times, W 3 times; is written …".

    For readers who cannot see it.
    """
    parts = {}
    for name, tensor in tensors.items():
        times = often(counts(seen, name, tensor))
        kind = "read" if seen.of("load", name) else "written"
        parts.setdefault(kind, []).append(f"{name} {times}")
    sentences = [f"is {kind}: {', '.join(each)}" for kind, each in parts.items()]
    return f"Each element {'; '.join(sentences)}."


def often(count: np.ndarray) -> str:
    """ "1 time", "4 times", or "1 to 4 times"."""
    low, high = int(count.min()), int(count.max())
    unit = "time" if high == 1 else "times"
    return f"{high} {unit}" if low == high else f"{low} to {high} {unit}"


def order_picture(
    traces: Mapping[str, Trace],
    y: torch.Tensor,
    *,
    window: int,
    title: str,
    subtitle: str,
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """Which program writes which block of y; the first `window` of them are dark."""
    m, n = y.shape
    room = BESIDE * n
    with style(theme):
        across, down = len(traces) * (n + room) - room, m + room / 2 + MARGIN
        height = (width - 0.6) * down / across
        figure, axes = frame(title, subtitle, width, height, FOOT, theme)
        _bare(axes, across, down)
        for at, (name, seen) in enumerate(traces.items()):
            left = at * (n + room)
            axes.text(left, room / 2 - 1, name, size=SMALL, va="bottom")
            _blocks(axes, order(seen, y), (left, room / 2), window, theme)
    return figure


def _blocks(axes: Axes, owner: np.ndarray, spot: tuple, window: int, theme) -> None:
    """A box with the number of its program for each block."""
    for program in range(owner.max() + 1):
        rows, columns = np.nonzero(owner == program)
        corner = spot[0] + columns.min(), spot[1] + rows.min()
        across, down = np.ptp(columns) + 1, np.ptp(rows) + 1
        colour = BLUE if program < window else theme.paper
        edge = {"facecolor": colour, "edgecolor": theme.muted, "linewidth": 0.8}
        axes.add_patch(Rectangle(corner, across, down, **edge))
        middle = corner[0] + across / 2, corner[1] + down / 2
        ink = readable(colour)
        centred = {"ha": "center", "va": "center", "size": SMALL, "color": ink}
        axes.text(*middle, str(program), **centred)
