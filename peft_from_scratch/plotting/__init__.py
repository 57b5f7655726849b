"""Figures: one look for every method, names that cover nothing, units on every axis.

Reading order: theme.py (colors and the look of each method), draw.py (the parts of a
figure), labels.py (names beside points), curves.py (the figures that lessons are made
of), block.py (the picture of a transformer layer with every method at its place).
"""

from .draw import (
    APART,
    frame,
    interval,
    legend,
    name_stacks,
    name_y,
    point,
    spread,
    stack,
)
from .labels import GAP, place_labels
from .theme import (
    AMBER,
    ASH,
    BLUE,
    BROWN,
    COLORS,
    DARK,
    GREY,
    LIGHT,
    LOOKS,
    MARKERS,
    ORANGE,
    PALETTE,
    PURPLE,
    RED,
    SKY,
    SMALL,
    TAN,
    Theme,
    look,
    readable,
    style,
    svg,
)

__all__ = [
    "AMBER",
    "APART",
    "ASH",
    "BLUE",
    "BROWN",
    "COLORS",
    "DARK",
    "GAP",
    "GREY",
    "LIGHT",
    "LOOKS",
    "MARKERS",
    "ORANGE",
    "PALETTE",
    "PURPLE",
    "RED",
    "SKY",
    "SMALL",
    "TAN",
    "Theme",
    "frame",
    "interval",
    "legend",
    "look",
    "name_stacks",
    "name_y",
    "place_labels",
    "point",
    "readable",
    "spread",
    "stack",
    "style",
    "svg",
]
