"""Pictures of low rank: thin matrices, sums of outer products, what a cut keeps.

    thin_matrices(576, 576, 8)       W0, B and A drawn to scale, with their parameters
    outer_products(dW, pieces=2)     dW = s1 u1 v1ᵀ + s2 u2 v2ᵀ + the rest
    orientations([nn.Linear(16, 24), Conv1D(16, 16)])   how weights lie, and B A
    gain_and_energy(runs)            what updates keep, cut to rank k, in shipped runs
    initializations(runs)            training losses from three initializations
    kept_in_words, losses_in_words   the findings of the last two

In the first two, one unit of length is one row or column of a matrix.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from ...core.adapter import is_transposed, sizes
from ...ledger.experiments import spectrum, starts
from ...ledger.runs import Run
from ...plotting import curves
from ...plotting.draw import frame
from ...plotting.theme import BLUE, LIGHT, ORANGE, PURPLE, SMALL, Theme, style

FOOT = 0.1  # inches under the axes
WANTED = 95  # % of the gain that is marked in the figure of shipped runs
NAMES = {  # of the initializations, by starts.STARTS
    "gaussian-zero": "A random, B zero",
    "both-random": "both random",
    "both-zero": "both zero",
}


# Drawn to scale -----------------------------------------------------------------------


def thin_matrices(
    d_out: int, d_in: int, r: int, *, width: float = 7.4, theme: Theme = LIGHT
) -> Figure:
    """W0 (d_out, d_in), B (d_out, r) and A (r, d_in), drawn to scale.

    Args
        width  of the figure, inches
    Raises   ValueError   r out of range: the message holds r and the bounds
    """
    if not 1 <= r <= min(d_out, d_in):
        raise ValueError(f"{r=}: allowed are 1 to {min(d_out, d_in)}")
    share = 100 * r * (d_in + d_out) / (d_in * d_out)
    title = f"With rank {r}, A and B hold {share:.1f} % as many parameters as W"
    subtitle = "Drawn to scale: gray is frozen, blue trains. The update is B times A."
    room = 0.14 * max(d_out, d_in)
    across = d_in + 2.2 * room + r + d_in
    with style(theme):
        down = d_out + 1.6 * room
        height = (width - 0.6) * down / across
        figure, axes = frame(title, subtitle, width, height, FOOT, theme)
        _bare(axes, across, down)
        _matrix(axes, (0, 0), d_out, d_in, theme.faint, theme)
        _name(axes, (d_in / 2, d_out / 2), "$W_0$", d_out, d_in, va="center")
        _sign(axes, d_in + 0.6 * room, d_out / 2, "+")
        left = d_in + 1.2 * room
        _matrix(axes, (left, 0), d_out, r, BLUE, theme)
        right = left + r + room
        _sign(axes, left + r + room / 2, d_out / 2, "\N{MULTIPLICATION SIGN}")
        _name(axes, (left + r / 2, d_out + 0.2 * room), "$B$", d_out, r, va="top")
        _matrix(axes, (right, d_out / 2 - r / 2), r, d_in, BLUE, theme)
        middle = right + d_in / 2, d_out / 2 + r / 2 + 0.2 * room
        _name(axes, middle, "$A$", r, d_in, va="top")
    return figure


def _bare(axes: Axes, across: float, down: float) -> None:
    """No ticks and no spines: the axes are only room, with y downwards."""
    edge = 0.01 * across  # so that no outline is cut
    axes.set(xlim=(-edge, across + edge), ylim=(down, -edge), aspect="equal")
    axes.set(xticks=[], yticks=[], anchor="NW")
    axes.spines["bottom"].set_visible(False)


def _matrix(axes: Axes, spot: tuple, down: float, across: float, color, theme) -> None:
    look = {"facecolor": color, "edgecolor": theme.ink, "linewidth": 0.6}
    axes.add_patch(Rectangle(spot, across, down, **look))


def _sign(axes: Axes, x: float, y: float, sign: str) -> None:
    axes.text(x, y, sign, size=14, ha="center", va="center")


def _name(axes: Axes, at: tuple, name: str, down: int, across: int, va: str) -> None:
    words = f"{name}: {down} x {across}\n{down * across:,} parameters"
    axes.text(*at, words, ha="center", va=va, size=SMALL)


# A sum of outer products --------------------------------------------------------------


def outer_products(
    dW: Tensor,
    *,
    pieces: int = 2,
    title: str = "A matrix is a sum of columns times rows",
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """dW, its largest rank-one pieces s u vᵀ with their u and v, and what is left.

    Args
        dW      (d_out, d_in), small enough that each entry can be seen
        pieces  how many are drawn on their own, below the full rank
    Raises   ValueError   so many pieces leave no rest: the message holds the bound
    """
    if not 1 <= pieces < min(dW.shape):
        raise ValueError(f"{pieces=}: allowed are 1 to {min(dW.shape) - 1}")
    U, s, Vt = (part.numpy() for part in torch.linalg.svd(dW.double(), False))
    parts = [s[i] * np.outer(U[:, i], Vt[i]) for i in range(pieces)]
    rest = dW.double().numpy() - sum(parts)
    energies = 100 * s**2 / (s**2).sum()
    d_out, d_in = dW.shape
    apart, middle = d_in + 4, 2 + d_out / 2
    subtitle = (
        "Purple is positive, orange negative. Percent: share of the energy. The rest: "
        f"{len(s) - pieces} pieces."
    )
    across, down = apart * (pieces + 2) - 3, d_out + 4
    limit = dW.abs().max().item()
    with style(theme):
        height = (width - 0.6) * down / across
        figure, axes = frame(title, subtitle, width, height, FOOT, theme)
        _bare(axes, across, down)
        _cells(axes, (0, 2), dW.numpy(), limit, theme)
        _caption(axes, d_in / 2, d_out, r"$\Delta W$", energies.sum())
        for i, part in enumerate(parts):
            left = apart * (i + 1)
            _sign(axes, left - 2.6, middle, "+" if i else "=")
            _cells(axes, (left, 2), part, limit, theme)
            u, v = U[:, [i]], Vt[[i]]
            _cells(axes, (left - 1.4, 2), u, abs(u).max(), theme)
            _cells(axes, (left, 0.6), v, abs(v).max(), theme)
            name = rf"$s_{i + 1}\,u_{i + 1}v_{i + 1}^T$"
            _caption(axes, left + d_in / 2, d_out, name, energies[i])
        left = apart * (pieces + 1)
        _sign(axes, left - 2, middle, "+")
        _cells(axes, (left, 2), rest, limit, theme)
        _caption(axes, left + d_in / 2, d_out, "the rest", energies[pieces:].sum())
    return figure


def _cells(axes: Axes, spot: tuple, values: np.ndarray, limit: float, theme) -> None:
    (left, top), (down, across) = spot, values.shape
    shades = LinearSegmentedColormap.from_list("signs", [ORANGE, theme.paper, PURPLE])
    axes.imshow(
        values,
        cmap=shades,
        vmin=-limit,
        vmax=limit,
        extent=(left, left + across, top + down, top),
        interpolation="nearest",
    )
    edge = {"edgecolor": theme.muted, "linewidth": 0.6, "fill": False}
    axes.add_patch(Rectangle(spot, across, down, **edge))


def _caption(axes: Axes, x: float, d_out: int, name: str, energy: float) -> None:
    words = f"{name}:  {energy:.1f}".removesuffix(".0") + " %"
    axes.text(x, d_out + 2.5, words, ha="center", va="top", size=9)


# How weights are stored ---------------------------------------------------------------


def orientations(
    bases: Sequence[nn.Module], *, width: float = 7.4, theme: Theme = LIGHT
) -> Figure:
    """Each base's weight as it is stored, and the update B A that a merge adds to it.

    A shade is one output of the layer: a row of B A (d_out, d_in), and of the weight a
    row too, or a column where the base stores it as (d_in, d_out).
    """
    longest = max(max(base.weight.shape) for base in bases)
    room = 0.4 * longest
    breadths = [base.weight.shape[1] + room + sizes(base)[1] for base in bases]
    apart = 2.2 * room
    across, down = sum(breadths) + apart * (len(bases) - 1), 1.8 * longest
    with style(theme):
        height = (width - 0.6) * down / across
        title = "Conv1D stores its weight transposed; if it is square, B A still fits"
        subtitle = (
            "Each shade of blue is one output of the layer: a row in B A and in "
            "Linear, but a column in Conv1D."
        )
        figure, axes = frame(title, subtitle, width, height, FOOT, theme)
        _bare(axes, across, down)
        left = 0.0
        for base, breadth in zip(bases, breadths, strict=True):
            _weight_and_update(axes, left, base, room, longest / 2, theme)
            at = left + breadth / 2, 1.05 * longest
            axes.text(*at, _fit(base), ha="center", va="top", size=SMALL)
            left += breadth + apart
    return figure


def _weight_and_update(
    axes: Axes, left: float, base: nn.Module, room: float, middle: float, theme: Theme
) -> None:
    """The stored weight, a plus at the height `middle`, and B A."""
    stored, (d_out, d_in) = base.weight.shape, sizes(base)
    update = np.tile(np.arange(d_out)[:, None], d_in)
    _shades(axes, (left, 0), update.T if is_transposed(base) else update, theme)
    _sign(axes, left + stored[1] + room / 2, middle, "+")
    _shades(axes, (left + stored[1] + room, 0), update, theme)


def _fit(base: nn.Module) -> str:
    """What happens if B A is added to the weight as it is stored."""
    stored, size = tuple(base.weight.shape), tuple(sizes(base))
    words = "fits, but transposed" if is_transposed(base) else "fits"
    if stored != size:
        words = "does not fit"
    weight, update = ("{} x {}".format(*shape) for shape in (stored, size))
    return f"{type(base).__name__}: {weight}\n$B\\,A$: {update}\n{words}"


def _shades(axes: Axes, spot: tuple, values: np.ndarray, theme: Theme) -> None:
    (left, top), (down, across) = spot, values.shape
    axes.imshow(
        values,
        cmap=LinearSegmentedColormap.from_list("outputs", [theme.paper, BLUE]),
        extent=(left, left + across, top + down, top),
        interpolation="nearest",
    )
    edge = {"edgecolor": theme.ink, "linewidth": 0.8, "fill": False}
    axes.add_patch(Rectangle(spot, across, down, **edge))


# Shipped runs -------------------------------------------------------------------------


def gain_and_energy(runs: Sequence[Run], *, title: str, width: float = 7.4) -> Figure:
    """What SmolLM2's updates keep when they are cut to rank k: gain and energy.

    Args
        runs  of the experiment `spectrum`, the same but for their seeds
    """
    first = runs[0].result
    full_rank = max(first["ranks"])
    ranks = [k for k in spectrum.RANKS if f"rank {k}" in first["function"]]
    use = {k: [spectrum.kept(run, k) for run in runs] for k in ranks}
    series = {
        "gain in test loss": [(k, fmean(u), min(u), max(u)) for k, u in use.items()],
        "energy of the updates": _energy_band(runs, "all"),
        "energy, random matrices": _energy_band(runs, "random"),
    }
    figure = curves.lines(
        series,
        x=f"Singular values kept, k of at most {full_rank}",
        y="Kept, % of what the whole updates have",
        title=title,
        subtitle=f"Gain: mean and range of {len(runs)} seeds. Energy: the median "
        f"matrix, with a band for the middle 80 %. Dotted: {WANTED} %.",
        control=("energy, random matrices",),
        log="x",
        names="foot",
        width=width,
    )
    dots = {"color": LIGHT.muted, "linewidth": 0.8, "linestyle": ":", "zorder": 0}
    figure.axes[0].axhline(WANTED, gid="wanted", **dots)
    figure.axes[0].set_ylim(-3, 103)
    return figure


def _energy_band(runs: Sequence[Run], kind: str) -> list[tuple]:
    """(rank, median, low, high) in %: quantiles over matrices, means over runs."""
    bands = np.mean([run.result["energy"][kind] for run in runs], axis=0)
    low, middle, high = 100 * bands
    return list(zip(runs[0].result["ranks"], middle, low, high, strict=True))


def initializations(
    runs: Mapping[str, Sequence[Run]], *, title: str, width: float = 7.4
) -> Figure:
    """Training losses from each initialization; all but LoRA's own are controls.

    Args
        runs  of the experiment `starts`, by one of starts.STARTS
    Raises   ValueError   an initialization that has no name here
    """
    if unknown := set(runs) - set(NAMES):
        raise ValueError(f"{sorted(unknown)}: allowed are {', '.join(starts.STARTS)}")
    series = {}
    for start, group in runs.items():
        steps = zip(*(run.result["losses"] for run in group), strict=True)
        rows = [(i, fmean(s), min(s), max(s)) for i, s in enumerate(steps, 1)]
        series[NAMES[start]] = rows
    count = len(next(iter(runs.values())))
    figure = curves.lines(
        series,
        x="Optimizer step, count",
        y="Training loss, nats per token",
        title=title,
        subtitle=f"Mean of {count} seeds; the band is their range. Controls in gray.",
        control=[NAMES[s] for s in runs if s != "gaussian-zero"],
        width=width,
    )
    figure.axes[0].set_xticks([1, 5, 10, 15, 20])
    figure.axes[0].set_ylim(bottom=0)
    return figure


# In words -----------------------------------------------------------------------------


def kept_in_words(runs: Sequence[Run], rank: int) -> str:
    """The finding of `gain_and_energy` at one of the ranks.

    Raises   ValueError   a rank whose gain or energy was not measured
    """
    measured = [k for k in spectrum.RANKS if k in runs[0].result["ranks"]]
    if rank not in measured:
        raise ValueError(f"{rank=}: measured are {', '.join(map(str, measured))}")
    gain = min(spectrum.kept(run, rank) for run in runs)
    energy, by_chance = (
        next(middle for k, middle, *_ in _energy_band(runs, kind) if k == rank)
        for kind in ("all", "random")
    )
    return (
        f"Cut to rank {rank}, the updates keep {energy:.0f} % of their energy, but "
        f"{gain:.1f} % or more of their gain. Random matrices keep {by_chance:.0f} % "
        "of their energy."
    )


def losses_in_words(runs: Mapping[str, Sequence[Run]]) -> str:
    """The finding of `initializations`: mean losses of the first and the last step."""
    ends = {
        NAMES[start]: [fmean(run.result["losses"][i] for run in group) for i in (0, -1)]
        for start, group in runs.items()
    }
    return "; ".join(f"{name}: {a:.2f} to {b:.2f}" for name, (a, b) in ends.items())
