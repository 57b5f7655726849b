"""A figure of code books: where their values lie, under the numbers to be rounded.

code_books(ratios, {"NF4": values, …}, …)
"""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from ...plotting.curves import FOOT, marks
from ...plotting.draw import frame, name_y, point
from ...plotting.theme import GREY, LIGHT, SMALL, Theme, style

BINS = 40  # from -1 to 1
ROW, OVER = 0.3, 0.11  # of the histogram's height: from book to book, name over ticks


def code_books(
    ratios: Sequence[float],
    books: Mapping[str, Sequence[float]],
    *,
    title: str,
    subtitle: str = "",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """A histogram of ratios in [-1, 1], and under it a row of marks for each book.

    Args
        ratios  weights over their block's absmax
        books   {name: values of the code book}, from top to bottom
    Raises   ValueError   no ratios or no books, or something outside of [-1, 1]
    """
    everything = {"ratios": ratios, **books}
    for name, values in everything.items():
        inside = len(values) and min(values) >= -1 and max(values) <= 1
        if not inside or not books:
            raise ValueError(
                f"{name!r}, of the books {', '.join(books)}: values from -1 to 1 are "
                "needed, as ratios and in each book, and one book at least"
            )
    shares, step = _shares(ratios), 2 / BINS
    high, looks = max(shares), marks(list(books))
    with style(theme):
        tall = 1.5 * (1 + ROW * (len(books) + 0.5))
        figure, axes = frame(title, subtitle, width, tall, FOOT, theme)
        places = [-1 + step * (i + 0.5) for i in range(BINS)]
        axes.bar(places, shares, step, color=GREY, edgecolor=theme.paper, linewidth=0.5)
        for i, (name, values) in enumerate(books.items(), 1):
            y = -high * ROW * i
            line = point(
                looks[name], theme, list(values), [y] * len(values), label=name
            )
            line.set_markersize(5)
            axes.add_line(line)
            axes.text(-1.04, y + high * OVER, name, size=SMALL, va="center")
        axes.set_xlim(-1.06, 1.06)
        axes.set_ylim(-high * ROW * (len(books) + 0.5), high * 1.05)
        ticks = [t for t in axes.get_yticks() if 0 <= t <= high]
        axes.set_yticks(ticks)
        axes.set_xlabel("Weight over the absmax of its block, ratio")
        name_y(axes, f"Weights, % in each bin of width {step:g}")
    return figure


def _shares(ratios: Sequence[float]) -> list[float]:
    """Percent of the ratios in each bin."""
    counts = [0] * BINS
    for ratio in ratios:
        counts[min(int((float(ratio) + 1) / 2 * BINS), BINS - 1)] += 1
    return [100 * count / len(ratios) for count in counts]
