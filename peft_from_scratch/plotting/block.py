"""The one picture: a transformer layer, and where each method works in it.

    python -m peft_from_scratch.plotting.block        draws data/block.svg again

The layer is Llama's: a residual stream, from which attention and MLP branch off and to
which they add. Grey belongs to the base model; color is what a method brings. The table
of methods says which of PARTS each method brings, and what is written of it: a method
whose parts are drawn already needs no code here. All places are in units of the page, U
of them across.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle

from ..common.atomic import new_file
from ..methods import METHODS, Method
from .theme import LIGHT, SMALL, Theme, look, readable, style, svg

FILE = Path(__file__).parents[2] / "data" / "block.svg"
U = 10.0  # units across the page; at 7.4 inches, one is 0.74 inches
TOP, STREAM = 4.0, 0.6  # heights: of the layer's frame, of the residual stream
LINE = 0.25  # between two lines of text
WIDE, OUT = 0.56, 1.2  # of a projection; its left to where its result is ready
PARTS = {  # what a method can bring, and how many shapes that is in one layer
    "weights": 7 + 2 + 2,  # projections, norms, embedding and head
    "low-rank": 2 * 7,
    "four bits": 4 * 7,
    "lengths": 7,  # after each projection: lengths of its rows
    "biases": 7,  # after each projection: vectors that are added
    "factors": 3,
    "bottlenecks": 2 * 2,
    "keys and values": 2,
    "embeddings": 3,
}


@dataclass
class Pen:
    """Draws on the page; knows what is lit."""

    axes: Axes
    theme: Theme
    lit: str | None
    scale: float  # of the page against 7.4 inches

    def color(self, part: str) -> str | None:
        """The color of one of PARTS: that of the first method that brings the part.

        Of a lit method's page: that method's color, and None for others' parts.
        """
        owners = [method.name for method in METHODS if part in method.parts]
        if self.lit is None:
            return look(owners[0])[0]
        return look(self.lit)[0] if self.lit in owners else None

    def letter(self, part: str) -> str:
        """The text inside a part: the letters of the method that it is drawn for."""
        lit = _method(self.lit) if self.lit else None
        first = next(method for method in METHODS if part in method.parts)
        return (lit or first).letters

    def text(self, x, y, words, *, size=SMALL, color=None, **more) -> None:
        centre = {"ha": "center", "va": "center"} | more
        color = color or self.theme.ink
        self.axes.text(x, y, words, size=size * self.scale, color=color, **centre)

    def line(self, *places, to=None, arrow=False, width=1.0) -> None:
        """A line through places, as faint as the part that it leads `to`."""
        xs, ys = zip(*places, strict=True)
        shown = to is None or self.color(to)
        color = self.theme.muted if shown else self.theme.faint
        width *= self.scale
        order = 2 if shown else 1
        self.axes.plot(xs, ys, color=color, linewidth=width, zorder=order)
        if arrow:
            self.axes.annotate(
                "",
                places[-1],
                places[-2],
                zorder=order,
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": color,
                    "linewidth": width,
                    "mutation_scale": (6 + 2 * width) * self.scale,
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
            )

    def part(self, patch, part, letter="", at=None, *, size=SMALL, **more) -> None:
        """A shape of one of PARTS: in its method's color, or empty without a letter."""
        color = self.color(part)
        patch.set(
            facecolor=color or self.theme.paper,
            edgecolor=self.theme.ink if color else self.theme.faint,
            linewidth=0.7 * self.scale,
            gid="lit" if color else "unlit",
            zorder=3,
        )
        self.axes.add_patch(patch)
        if color and letter:
            ink = readable(color)
            self.text(*at, letter, size=size, color=ink, weight="bold", **more)

    def base(self, x, y, width, height, name, *, frozen=False, **more) -> None:
        """A box of the base model, its lower left corner at (x, y)."""
        lit = None if frozen else self.color("weights")
        whole = lit if self.lit else None  # among all methods, an outline is enough
        self.axes.add_patch(
            FancyBboxPatch(
                (x, y),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=0.04",
                facecolor=whole or self.theme.faint,
                edgecolor=lit or self.theme.muted,
                linewidth=(1.4 if lit else 0.7) * self.scale,
                gid="lit" if lit else "base",
                zorder=3,
            )
        )
        color = readable(whole) if whole else self.theme.ink
        self.text(x + width / 2, y + height / 2, name, color=color, **more)


# Parts --------------------------------------------------------------------------------


def _projection(pen: Pen, x: float, y: float, name: str) -> None:
    """W with what may stand beside it; h leaves at x + OUT."""
    lift = 0.05 if pen.color("four bits") else 0  # the name makes room for the cells
    solid = pen.color("weights") if pen.lit else None
    pen.base(x, y - 0.21, WIDE, 0.42, "")
    middle = x + WIDE / 2
    pen.text(middle, y + lift, name, color=readable(solid) if solid else None, size=9)
    if pen.color("four bits"):
        for i in range(4):
            cell = Rectangle((middle - 0.18 + 0.09 * i, y - 0.17), 0.09, 0.07)
            pen.part(cell, "four bits")
    pen.line((x - 0.12, y), (x + OUT, y))
    _low_rank(pen, x, y, y - 0.39)
    magnitude = Rectangle((x + 0.74, y - 0.16), 0.2, 0.32)
    at = x + 0.84, y - 0.005
    pen.part(magnitude, "lengths", pen.letter("lengths"), at, size=8)
    bias = Rectangle((x + 0.98, y - 0.1), 0.16, 0.2)
    pen.part(bias, "biases", pen.letter("biases"), (x + 1.06, y - 0.005))


def _low_rank(pen: Pen, x: float, y: float, middle: float) -> None:
    """A and B under a W whose line is at y, and the way through them."""
    pen.line((x - 0.12, y), (x - 0.12, middle), (x, middle), to="low-rank")
    end, back = x + WIDE, x + WIDE + 0.1
    pen.line((end, middle), (back, middle), (back, y), to="low-rank")
    for letter, side in (("A", 0), ("B", 1)):
        wide, narrow = x + WIDE * side, x + WIDE / 2
        corners = [(wide, 0.15), (narrow, 0.09), (narrow, -0.09), (wide, -0.15)]
        shape = Polygon([(a, middle + b) for a, b in corners])
        at = (narrow + 0.26 * WIDE * (2 * side - 1), middle - 0.005)
        pen.part(shape, "low-rank", letter, at)


def _factor(pen: Pen, x: float, y: float) -> None:
    pen.part(Circle((x, y), 0.1), "factors", pen.letter("factors"), (x, y))


def _bottleneck(pen: Pen, x: float, y: float) -> None:
    """Down and up on a branch that runs down at x, and the way around them."""
    around = [(x, y + 0.35), (x - 0.36, y + 0.35), (x - 0.36, y - 0.35), (x, y - 0.35)]
    pen.line(*around, to="bottlenecks")
    for name, side in (("down", 1), ("up", -1)):
        corners = [(-0.28, 0.29), (0.28, 0.29), (0.18, 0), (-0.18, 0)]
        shape = Polygon([(x + a, y + side * b) for a, b in corners])
        at = (x, y + side * 0.15)
        pen.part(shape, "bottlenecks", name, at, size=7.5)


def _sum(pen: Pen, x: float, y: float, sign: str) -> None:
    circle = Circle((x, y), 0.11, zorder=3)
    circle.set(facecolor=pen.theme.paper, edgecolor=pen.theme.muted)
    circle.set(linewidth=0.9 * pen.scale)
    pen.axes.add_patch(circle)
    pen.text(x, y - 0.01, sign, zorder=4)


def _branch(pen: Pen, x: float, top: float) -> None:
    """From the stream through a norm up to the projections."""
    pen.line((x, STREAM), (x, top))
    pen.base(x - 0.26, 0.95, 0.52, 0.24, "norm")


def _attention(pen: Pen) -> None:
    q, k, v = 3.45, 2.65, 1.85
    _branch(pen, 1.38, q)
    for name, y in (("q", q), ("k", k), ("v", v)):
        pen.line((1.38, y), (1.6, y))
        _projection(pen, 1.62, y, f"$W_{name}$")
        pen.line((1.62 + OUT, y), (3.45, y), arrow=True)
    for y, letter in ((k, "K"), (v, "V")):
        _factor(pen, 2.92, y)
        into = (3.22, y + 0.26), (3.45, y + 0.26)
        pen.line(*into, to="keys and values", arrow=True)
        # Among all methods one letter has room; alone, it is told from the tokens' own.
        name = f"$P_{letter}$" if pen.lit == "prefix" else letter
        prefix = Rectangle((3.0, y + 0.16), 0.22, 0.2)
        pen.part(prefix, "keys and values", name, (3.11, y + 0.255))
    pen.base(3.45, 1.6, 0.3, 2.1, "attention", frozen=True, rotation=90)
    pen.line((3.75, k), (3.95, k))
    _projection(pen, 3.95, k, "$W_o$")
    _back(pen, 3.95 + OUT + 0.1, k)


def _mlp(pen: Pen) -> None:
    gate, up = 3.3, 2.25
    middle = (gate + up) / 2
    _branch(pen, 5.8, gate)
    for name, y in (("gate", gate), ("up", up)):
        pen.line((5.8, y), (5.95, y))
        _projection(pen, 5.95, y, rf"$W_{{\mathrm{{{name}}}}}$")
        pen.line((5.95 + OUT, y), (7.22, y), (7.22, middle))
    pen.base(7.02, 2.96, 0.4, 0.2, "SiLU", frozen=True, size=7.5)
    _sum(pen, 7.22, middle, r"$\times$")
    pen.line((7.22, middle), (7.6, middle))
    _factor(pen, 7.46, middle)
    _projection(pen, 7.7, middle, r"$W_{\mathrm{down}}$")
    _back(pen, 7.7 + OUT + 0.1, middle)


def _back(pen: Pen, x: float, y: float) -> None:
    """Down to the stream, through a bottleneck, and into the sum."""
    pen.line((x - 0.1, y), (x, y), (x, STREAM + 0.1), arrow=True)
    _bottleneck(pen, x, 1.55)
    _sum(pen, x, STREAM, "+")


def _stream(pen: Pen) -> None:
    """Embedding, prompt, the stream itself, head; and the frame around the layer."""
    pen.axes.add_patch(
        FancyBboxPatch(
            (1.05, 0.2),
            U - 1.05 - 0.55,
            TOP - 0.2,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor="none",
            edgecolor=pen.theme.muted,
            linestyle=(0, (2, 3)),
            linewidth=0.8 * pen.scale,
        )
    )
    pen.text(1.17, TOP - 0.15, "one layer of many", color=pen.theme.muted, ha="left")
    pen.line((0.4, STREAM), (U - 0.45, STREAM), arrow=True, width=2.4)
    pen.text(3.2, STREAM - 0.17, "residual stream", color=pen.theme.muted)
    pen.base(0.1, 0.1, 0.3, 1.0, "embedding", rotation=90)
    pen.base(U - 0.4, 0.1, 0.3, 1.0, "head", rotation=90)
    pen.line((0.75, 1.2), (0.75, STREAM + 0.03), to="embeddings", arrow=True)
    for i in range(3):
        cell = Rectangle((0.65, 1.2 + 0.2 * i), 0.2, 0.2)
        at = 0.75, 1.295 + 0.2 * i
        pen.part(cell, "embeddings", pen.letter("embeddings"), at)


# The page -----------------------------------------------------------------------------


def block_picture(
    lit: str | None = None, *, width: float = 7.4, theme: Theme = LIGHT
) -> Figure:
    """A transformer layer with every method at its place.

    Args
        lit    a method's name: its part alone has color; its equation stands below;
               None: all parts are colored, and named below
        width  inches; the page is scaled as a whole
    Raises   ValueError   no such method: the message holds the names
    """
    lines = _legend_lines() if lit is None else 1.2 * len(_method(lit).lines)
    foot, head = LINE * lines + 0.2, 0.45
    height = TOP + foot + head
    with style(theme):
        figure = Figure(figsize=(width, width * height / U))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, U)
        axes.set_ylim(-foot, TOP + head)
        pen = Pen(axes, theme, lit, width / 7.4)
        left = {"ha": "left", "weight": "bold", "size": 10.5}
        pen.text(0.1, TOP + head - 0.2, _title(lit), **left)
        for draw in (_stream, _attention, _mlp, _legend if lit is None else _lines):
            draw(pen)
    return figure


def _title(lit: str | None) -> str:
    if lit is None:
        return "A transformer layer, and where each method works in it"
    return f"{_method(lit).label}: {_method(lit).place}"


def _method(name: str) -> Method:
    for method in METHODS:
        if method.name == name:
            return method
    known = ", ".join(method.name for method in METHODS)
    raise ValueError(f"lit={name!r} is no method of the picture; it knows {known}")


def _lines(pen: Pen) -> None:
    for i, line in enumerate(_method(pen.lit).lines):
        size = 9 if i else 11  # the equation is the first
        pen.text(0.1, -0.15 - 1.2 * LINE * i, line, ha="left", size=size)


def _legend_lines() -> int:
    """Lines of the legend, which has two columns."""
    return math.ceil(len(METHODS) / 2)


def _legend(pen: Pen) -> None:
    for i, method in enumerate(METHODS):
        column, line = divmod(i, _legend_lines())
        x, y = 0.1 + (U / 2 - 0.15) * column, -0.1 - LINE * line
        color = look(method.name)[0]
        swatch = Rectangle((x, y - 0.09), 0.75, 0.2)
        swatch.set(facecolor=color, edgecolor=pen.theme.ink, linewidth=0.7 * pen.scale)
        pen.axes.add_patch(swatch)
        inside = {"size": 7, "weight": "bold", "color": readable(color)}
        pen.text(x + 0.375, y, method.letters, **inside)
        pen.text(x + 0.87, y, f"{method.label}: {method.place}", ha="left", size=7.5)


def in_words(lit: str | None = None) -> str:
    """The picture as text, for those who cannot see it."""
    layer = (
        "A transformer layer: attention with W_q, W_k, W_v and W_o, then an MLP with "
        "W_gate, W_up and W_down, each after a norm and each added to the residual "
        "stream."
    )
    shown = METHODS if lit is None else [_method(lit)]
    places = (f"{method.label}: {method.place}." for method in shown)
    return " ".join([layer, *places])


def main() -> None:
    """Write data/block.svg."""
    with new_file(FILE) as new:
        new.write_text(svg(block_picture()), "utf-8")


if __name__ == "__main__":
    main()
