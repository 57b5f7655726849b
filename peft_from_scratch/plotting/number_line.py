"""A rule as a number line: its bands, and the interval that was measured on it.

    number_line(edges, names, measured, unit, guess=…)

Each band is named on the line. Where one band holds the whole interval, that band's
name is the verdict. A reader's guess, a range, stands under the line.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .theme import AMBER, BLUE, LIGHT, RED, SKY, SMALL, Theme, style

INCHES_WIDE = 7.2  # of the line, where nothing else is said
INCHES = 0.56  # of one unit of height
BAND, FAINT = 0.42, 0.3  # height of the bands, in the axes' units; their opacity
OUTER = 0.26  # least width of a band at an end, as a share of the line
COLORS = {
    "holds": BLUE,
    "holds when": SKY,
    "does not hold here": AMBER,
    "wrong as stated": RED,
}
ABOVE, UNDER = 0.72, -0.62  # heights of a narrow band's name, and of the guess
NARROW = 0.17  # a band below this share of the line has its name above it


def number_line(
    edges: Sequence[float],
    names: Sequence[str],
    measured: tuple[float, float, float],
    unit: str,
    guess: tuple[float, float] | None = None,
    theme: Theme = LIGHT,
    width: float = INCHES_WIDE,
) -> Figure:
    """Bands with an interval on them.

    Args
        edges     between the bands, rising
        names     of the bands, one more than edges: verdicts
        measured  (value, low, high)
        unit      of all of them
        guess     (low, high) of the reader, where there is one
        width     of the line, in inches
    """
    with style(theme):
        bottom = -0.95 if guess else -0.35
        height, foot = INCHES * (1 - bottom), 0.22
        figure = Figure(figsize=(width, height + foot))
        FigureCanvasAgg(figure)
        share = foot / (height + foot)
        axes = figure.add_axes((0.02, share, 0.96, 1 - share))
        left, right = _ends(edges, measured)
        axes.set(xlim=(left, right), ylim=(bottom, 1.0), xticks=[], yticks=[])
        _bands(axes, (left, *edges, right), names, theme)
        _interval(axes, *measured, theme)
        if guess:
            _guess(axes, guess, theme)
        for edge in edges:
            number = f"{edge:,.6g}"
            axes.text(edge, -0.06, number, ha="center", va="top", color=theme.muted)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel(unit, labelpad=1)
    return figure


def _ends(edges: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Of the line: what was measured lies on it, and either end band can be read."""
    low, high = min(*edges, *measured), max(*edges, *measured)
    span = high - low or abs(high) or 1.0
    outer = OUTER / (1 - 2 * OUTER) * span
    return min(low - 0.06 * span, edges[0] - outer), max(
        high + 0.06 * span, edges[-1] + outer
    )


def _bands(
    axes: Axes, places: Sequence[float], names: Sequence[str], theme: Theme
) -> None:
    line = places[-1] - places[0]
    for left, right, name in zip(places, places[1:], names, strict=False):
        axes.barh(
            BAND / 2,
            right - left,
            BAND,
            left,
            color=COLORS[name],
            alpha=FAINT,
            edgecolor=theme.paper,
        )
        narrow = right - left < NARROW * line
        axes.text(
            (left + right) / 2,
            ABOVE if narrow else BAND + 0.08,
            name + (" …" if name.endswith("when") else ""),
            ha="center",
            va="bottom",
            size=SMALL,
        )
        if narrow:
            axes.vlines((left + right) / 2, BAND, ABOVE, color=theme.muted, lw=0.6)


def _interval(axes: Axes, value: float, low: float, high: float, theme: Theme) -> None:
    middle = BAND / 2
    axes.hlines(middle, low, high, color=theme.ink, linewidth=2.5, gid="interval")
    axes.plot(value, middle, "o", color=theme.ink, markersize=7, gid="measured")


def _guess(axes: Axes, guess: tuple[float, float], theme: Theme) -> None:
    """A bracket under the line; cut, with an arrow, where it leaves the line."""
    left, right = axes.get_xlim()
    low, high = (min(max(end, left), right) for end in guess)
    axes.plot(
        [low, low, high, high],
        [UNDER + 0.14, UNDER, UNDER, UNDER + 0.14],
        color=theme.muted,
        linewidth=1.2,
        gid="guess",
    )
    outside = "← " if guess[1] < left else "→ " if guess[0] > right else ""
    middle = min(max((low + high) / 2, left), right)
    place = "left" if middle - left < 0.1 * (right - left) else "center"
    place = "right" if right - middle < 0.1 * (right - left) else place
    axes.text(
        middle,
        UNDER - 0.05,
        f"{outside}your guess",
        ha=place,
        va="top",
        size=SMALL,
        color=theme.muted,
    )
