"""The looks of all figures: colors, the method's own marks, light and dark.

A method looks the same in every figure: its color and its marker are those of its row
in the table of methods. The colors are petroff10's, made to be told apart with every
kind of color vision [1]; the marker tells a method a second time, and an outline keeps
pale colors visible.

Source   [1] Petroff, arXiv:2107.02270
"""

import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ..methods import METHODS

COLORS = {
    "blue": "#3f90da",
    "amber": "#ffa90e",
    "red": "#bd1f01",
    "grey": "#94a4a2",
    "purple": "#832db6",
    "brown": "#a96b59",
    "orange": "#e76300",
    "tan": "#b9ac70",
    "ash": "#717581",
    "sky": "#92dadd",
}
PALETTE = tuple(COLORS.values())
BLUE, AMBER, RED, GREY, PURPLE, BROWN, ORANGE, TAN, ASH, SKY = PALETTE
MARKERS = "osD^vPXhp<>"
# (color, marker). What is not listed gets a look from its name's checksum.
LOOKS = {
    "zero-shot": (GREY, "o"),
    "few-shot": (ASH, "s"),
    "lora-attention": (SKY, "^"),
} | {method.name: (COLORS[method.color], method.marker) for method in METHODS}
SMALL = 8.5  # points
FONT = "'DejaVu Sans'"  # as SVG has it


class Theme(NamedTuple):
    """The colors that are not data."""

    ink: str
    muted: str
    faint: str
    paper: str


LIGHT = Theme(ink="#1b1e23", muted="#565d66", faint="#e1e4e8", paper="#ffffff")
DARK = Theme(ink="#e8e8e4", muted="#a7aeb7", faint="#363b42", paper="#15171a")


def look(key: str) -> tuple[str, str]:
    """(color, marker) of a method or a variant: always the same ones."""
    number = zlib.crc32(key.encode())
    unlisted = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
    return LOOKS.get(key, unlisted)


def readable(color: str) -> str:
    """The ink, black or white, that stands out more on a color."""

    def against(ink: str) -> float:  # WCAG 2's contrast ratio
        low, high = sorted((_luminance(ink), _luminance(color)))
        return (high + 0.05) / (low + 0.05)

    return max((LIGHT.ink, LIGHT.paper), key=against)


def _luminance(color: str) -> float:
    """Relative luminance of sRGB, in [0, 1]."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in to_rgb(color)
    ]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@contextmanager
def style(theme: Theme = LIGHT) -> Iterator[None]:
    """Matplotlib's settings for this project's figures, inside the block only."""
    settings = {
        "font.family": "DejaVu Sans",  # matplotlib brings it: the same on every machine
        "font.size": 9,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": SMALL,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "figure.facecolor": theme.paper,
        "grid.color": theme.faint,
        "legend.frameon": False,
        "legend.fontsize": SMALL,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "ytick.major.size": 0,
        "svg.hashsalt": "peft_from_scratch",  # equal figures make equal files
    }
    with matplotlib.rc_context(settings):
        yield


def svg(figure: Figure, small: bool = False) -> str:
    """The figure as SVG text; equal figures give equal text.

    Args
        small  a quarter of the bytes: letters are text, in the reader's own font where
               there is no DejaVu, and not drawn
    """
    text, metadata = io.StringIO(), {"Date": None}
    if small:
        metadata |= dict.fromkeys(("Creator", "Format", "Type"))
    with style(), matplotlib.rc_context({"svg.fonttype": "none" if small else "path"}):
        figure.savefig(text, format="svg", metadata=metadata)
    if not small:
        return text.getvalue()
    named = text.getvalue().replace(FONT, f"{FONT}, Verdana, Arial, sans-serif")
    return re.sub(r"\s*\n\s*", "\n", named)
