"""Pictures of storage: two codes in a byte, constants of constants, bits per weight.

byte(first, second, …)      two codes, bit by bit, in one byte
levels(n, …)                codes, constants, scales and offset of a tensor
bit_bars(rows, …)           bits per weight, stacked by what holds them
"""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ...nf4.double import BLOCK as GROUP
from ...plotting.draw import frame, name_stacks, stack
from ...plotting.theme import (
    AMBER,
    BLUE,
    GREY,
    LIGHT,
    ORANGE,
    PURPLE,
    SKY,
    SMALL,
    Theme,
    readable,
    style,
)

FOOT = 0.55  # inches under the axes for the ticks and the name of the x axis
PARTS = {  # of a weight's bits, in the order of stacking
    "weights as numbers": GREY,
    "codes": SKY,
    "constants": ORANGE,
    "scales of the constants": PURPLE,
}
CENTERED = {"ha": "center", "va": "center"}


def _bare(axes: Axes, across: float, down: float) -> None:
    """No ticks and no spines: the axes are only room, with y downwards."""
    axes.set(xlim=(0, across), ylim=(down, 0), xticks=[], yticks=[])
    axes.spines["bottom"].set_visible(False)


def _box(axes: Axes, corner, sides, color: str, text: str, theme: Theme) -> None:
    edge = {"facecolor": color, "edgecolor": theme.ink, "linewidth": 0.8}
    axes.add_patch(Rectangle(corner, *sides, **edge))
    middle = corner[0] + sides[0] / 2, corner[1] + sides[1] / 2
    axes.text(*middle, text, color=readable(color), size=SMALL, **CENTERED)


# Two codes in a byte ------------------------------------------------------------------


def byte(
    first: int,
    second: int,
    *,
    title: str = "Two codes share a byte",
    subtitle: str = "The first takes the four high bits, the second the four low bits.",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """Two codes bit by bit: the first in the high half of a byte.

    Raises  ValueError  a code that does not fit in four bits
    """
    if not (0 <= first < 16 and 0 <= second < 16):
        raise ValueError(f"codes {first} and {second}: from 0 to 15 are allowed")
    whole = 16 * first + second
    with style(theme):
        figure, axes = frame(title, subtitle, width, 1.35, 0.1, theme)
        _bare(axes, 12, 3.2)
        halves = (first, "first code", BLUE), (second, "second code", ORANGE)
        for half, (code, name, color) in enumerate(halves):
            left = 0.2 + 4 * half
            axes.text(left + 2, 0.45, f"{name}: {code}", size=SMALL, **CENTERED)
            for i, bit in enumerate(f"{code:04b}"):
                _box(axes, (left + i, 0.9), (1, 1), color, bit, theme)
                worth = str(2 ** (7 - 4 * half - i))
                at = left + i + 0.5, 2.3
                axes.text(*at, worth, size=SMALL, color=theme.muted, **CENTERED)
        axes.text(8.4, 1.4, f"= 16 · {first} + {second} = {whole}", va="center")
        foot = "what a one in this place is worth"
        axes.text(4.2, 2.9, foot, size=SMALL, color=theme.muted, **CENTERED)
    return figure


# Constants of constants ---------------------------------------------------------------


def level_rows(n: int, block: int = 64) -> list[tuple[str, int, int]]:
    """(what, how many, bits of each) of n weights with double quantization."""
    blocks = -(-n // block)
    return [
        ("offset", 1, 32),
        ("scales", -(-blocks // GROUP), 32),
        ("constants", blocks, 8),
        ("codes", n, 4),
    ]


def levels(
    n: int,
    block: int = 64,
    *,
    title: str = "Four levels: codes, constants, scales of the constants, an offset",
    subtitle: str = "A box is one number. The first of a row opens into the row below.",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """What a tensor of n weights holds, level by level, and the bits per weight of it.

    The first box of a level opens into the level below. Only a few boxes are drawn.
    """
    colors = {"offset": AMBER, "scales": PURPLE, "constants": ORANGE, "codes": SKY}
    names = {
        "offset": "one offset for the tensor",
        "scales": f"one scale for {GROUP} constants",
        "constants": f"one constant for {block} weights",
        "codes": "one code for each weight",
    }
    with style(theme):
        figure, axes = frame(title, subtitle, width, 2.5, 0.1, theme)
        _bare(axes, 12, 8.2)
        for at, (what, count, bits) in enumerate(level_rows(n, block)):
            top = 0.55 + 2.05 * at
            drawn, side = (1, 6.3) if what == "offset" else (min(count, 6), 0.9)
            for i in range(drawn):
                corner, sides = (0.1 + i * (side + 0.12), top), (side, 0.8)
                text = f"{bits} bits" if drawn == 1 else str(bits)
                _box(axes, corner, sides, colors[what], text, theme)
            if count > drawn:
                axes.text(6.3, top + 0.4, "…", size=SMALL, **CENTERED)
            if what != "codes":
                _open(axes, top + 0.8, 0.9 if what != "offset" else 6.3, theme)
            each = f"{count:,} × {bits} bits = {count * bits / n:.3g} bits per weight"
            axes.text(6.75, top + 0.18, names[what], size=SMALL, va="center")
            look = {"size": SMALL, "va": "center", "color": theme.muted}
            axes.text(6.75, top + 0.68, each, **look)
    return figure


def _open(axes: Axes, y: float, side: float, theme: Theme) -> None:
    """Lines from the sides of a box at height y to the sides of the level below."""
    for top, bottom in ((0.1, 0.1), (0.1 + side, 6.4)):
        look = {"color": theme.muted, "linewidth": 0.8, "gid": "opens"}
        axes.plot([top, bottom], [y, y + 1.25], **look)


# Bits per weight ----------------------------------------------------------------------


def bit_bars(
    rows: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    subtitle: str = "",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """A bar of bits per weight for each row, its sum beside its name.

    Args
        rows  {label: {part: bits}}, parts as in PARTS
    Raises   ValueError   no rows, or an unknown part
    """
    unknown = {part for row in rows.values() for part in row} - set(PARTS)
    if unknown or not rows:
        raise ValueError(f"no rows, or parts {unknown}; allowed are {', '.join(PARTS)}")
    used = {p: c for p, c in PARTS.items() if any(row.get(p) for row in rows.values())}
    with style(theme):
        figure, axes = frame(
            title, subtitle, width, 0.45 * len(rows) + 0.1, FOOT, theme
        )
        for i, (label, row) in enumerate(rows.items()):
            stack(axes, i, dict(row), used, theme)
            total = f"{label}: {sum(row.values()):.4g} bits"
            axes.text(0, i - 0.26, total, size=SMALL)
        axes.set(ylim=(len(rows) - 0.5, -0.65), yticks=[])
        axes.set_xlim(0, 1.02 * max(sum(row.values()) for row in rows.values()))
        axes.set_xlabel("Bits per weight")
        axes.grid(axis="x")
        name_stacks(axes, list(used))
    return figure
