"""The pictures of low rank: drawn to scale, from what was given, and nothing overlaps.

Sizes are checked against counts, pieces against torch's SVD, lines against the runs.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from figure_overlaps import assert_apart
from planting import assert_caught
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_from_scratch.course.pictures import low_rank
from peft_from_scratch.ledger.experiments import spectrum, starts

SHAPES = [(576, 576, 8), (192, 576, 8), (1536, 576, 64)]


def matrix() -> torch.Tensor:
    torch.manual_seed(0)
    return 3 * torch.outer(torch.randn(6), torch.randn(8)) + torch.randn(6, 8)


def texts(figure) -> str:
    both = [*figure.texts, *figure.axes[0].texts]
    return " | ".join(text.get_text() for text in both)


# ----------------------------------------------------------------- drawn to scale


def assert_to_scale():
    for d_out, d_in, r in SHAPES:
        figure = low_rank.thin_matrices(d_out, d_in, r)
        drawn = [(p.get_height(), p.get_width()) for p in figure.axes[0].patches]
        assert drawn == [(d_out, d_in), (d_out, r), (r, d_in)]
        trained = d_out * r + r * d_in
        assert f"{100 * trained / (d_out * d_in):.1f}" in texts(figure)
        for rows, columns in drawn:
            assert f"{rows} x {columns}\n{rows * columns:,} param" in texts(figure)


@pytest.mark.parametrize(
    "function, right, wrong",
    [
        (low_rank.thin_matrices, "(left, 0), d_out, r,", "(left, 0), d_out, 2 * r,"),
        (low_rank.thin_matrices, "(d_in + d_out)", "(d_in * d_out)"),
        (low_rank._name, "down * across", "down + across"),
        (low_rank._matrix, "spot, across, down", "spot, down, across"),
    ],
)
def test_matrices_are_drawn_to_scale(function, right, wrong):
    assert_to_scale()
    assert_caught(function, right, wrong, assert_to_scale)


@pytest.mark.parametrize("r", [0, 7, -1])
def test_a_rank_out_of_range_is_refused(r):
    with pytest.raises(ValueError, match=f"r={r}: allowed are 1 to 6"):
        low_rank.thin_matrices(6, 9, r)


# ------------------------------------------------------------ sum of outer products


def assert_sums_up():
    dW = matrix()
    figure = low_rank.outer_products(dW, pieces=2)
    drawn = [image.get_array().data for image in figure.axes[0].images]
    whole, first, u, v, second, *_, rest = drawn
    np.testing.assert_allclose(whole, dW)
    np.testing.assert_allclose(first + second + rest, dW, atol=1e-5)
    best = spectrum.truncated(dW, 1)
    np.testing.assert_allclose(first, best, atol=1e-5)
    largest = torch.linalg.svdvals(dW)[0].item()
    np.testing.assert_allclose(largest * u * v, best, atol=1e-5)
    one, two = 100 * spectrum.energy(dW)[:2]
    for words in (f":  {one:.1f} %", f":  {two - one:.1f} %", "W$:  100 %"):
        assert words in texts(figure)
    assert f"the rest:  {100 - two:.1f} %" in texts(figure)


@pytest.mark.parametrize(
    "function, right, wrong",
    [
        (low_rank.outer_products, "s[i] * np.outer", "np.outer"),
        (low_rank.outer_products, "100 * s**2", "100 * s"),
        (low_rank.outer_products, "- sum(parts)", "- parts[0]"),
        (low_rank.outer_products, "energies[pieces:]", "energies[1:]"),
    ],
)
def test_the_pieces_sum_up_to_the_matrix(function, right, wrong):
    assert_sums_up()
    assert_caught(function, right, wrong, assert_sums_up)


@pytest.mark.parametrize("pieces", [0, 6])
def test_too_many_pieces_are_refused(pieces):
    with pytest.raises(ValueError, match="allowed are 1 to 5"):
        low_rank.outer_products(matrix(), pieces=pieces)


# --------------------------------------------------------------------- orientations


BASES = [nn.Linear(16, 24), Conv1D(16, 16), Conv1D(24, 16), nn.Linear(8, 8)]


def assert_stored():
    figure = low_rank.orientations(BASES)
    drawn = [image.get_array().data for image in figure.axes[0].images]
    for base, weight, update in zip(BASES, drawn[::2], drawn[1::2], strict=True):
        assert weight.shape == tuple(base.weight.shape)
        outputs = weight.T if isinstance(base, Conv1D) else weight
        assert (outputs == update).all(), "an output has one shade in both"
        assert (update == np.arange(len(update))[:, None]).all()
    words = [text.get_text().split("\n") for text in figure.axes[0].texts]
    fits = [lines[2] for lines in words if len(lines) == 3]
    assert fits == ["fits", "fits, but transposed", "does not fit", "fits"]


@pytest.mark.parametrize(
    "function, right, wrong",
    [
        (low_rank._weight_and_update, "update.T if", "update if"),
        (low_rank._weight_and_update, "[:, None], d_in", "[::-1, None], d_in"),
        (low_rank._fit, "if stored != size", "if stored == size"),
        (low_rank._fit, "if is_transposed(base)", "if not is_transposed(base)"),
    ],
)
def test_an_output_has_one_shade_in_weight_and_update(function, right, wrong):
    assert_stored()
    assert_caught(function, right, wrong, assert_stored)


# ------------------------------------------------------------------- shipped runs


def measured(seed: int) -> SimpleNamespace:
    """A run of `spectrum`, invented; `kept` of rank k is 100 k / (k + 1 + seed) %."""
    ranks = [1, 2, 4, 8, 12]
    losses = {f"rank {k}": 1 - k / (k + 1 + seed) for k in ranks[:-1]}
    rows = [[q * (k + seed) / 20 for k in ranks] for q in (0.5, 0.8, 1.0)]
    energy = {"all": rows, "random": [[e / 2 for e in row] for row in rows]}
    function = {"nothing": 1.0, "update": 0.0, **losses}
    result = {"ranks": ranks, "energy": energy, "function": function}
    return SimpleNamespace(result=result)


def kept_figure():
    return low_rank.gain_and_energy([measured(s) for s in range(3)], title="Kept")


def assert_kept():
    gain, energy, random, wanted = kept_figure().axes[0].lines
    means = [sum(100 * k / (k + 1 + s) for s in range(3)) / 3 for k in (1, 2, 4, 8)]
    assert list(gain.get_xdata()) == [1, 2, 4, 8]
    assert list(gain.get_ydata()) == pytest.approx(means)
    middle = [100 * 0.8 * (k + 1) / 20 for k in (1, 2, 4, 8, 12)]
    assert list(energy.get_ydata()) == pytest.approx(middle)
    assert list(random.get_ydata()) == pytest.approx([y / 2 for y in middle])
    assert random.get_linestyle() == "--"
    assert set(wanted.get_ydata()) == {95}
    assert "of 3 seeds" in texts(kept_figure())


@pytest.mark.parametrize(
    "function, right, wrong",
    [
        (low_rank._energy_band, "100 * bands", "bands"),
        (low_rank._energy_band, "for run in runs", "for run in runs[:1]"),
        (low_rank.gain_and_energy, "fmean(u), min(u)", "max(u), min(u)"),
        (low_rank.gain_and_energy, '_energy_band(runs, "random")', "[(1, 1, 1, 1)]"),
    ],
)
def test_the_lines_are_the_runs(function, right, wrong):
    assert_kept()
    assert_caught(function, right, wrong, assert_kept)


def trained(start: str, seed: int) -> SimpleNamespace:
    high = starts.STARTS.index(start) + 1
    losses = [high + seed / 10 + 1 / i for i in range(1, 21)]
    return SimpleNamespace(result={"losses": losses})


def initializations(names=starts.STARTS):
    groups = {name: [trained(name, seed) for seed in range(3)] for name in names}
    return low_rank.initializations(groups, title="Three initializations")


def test_initializations_have_plain_names_and_controls_are_dashed():
    lines = initializations().axes[0].lines
    names = [line.get_label() for line in lines]
    assert names == ["A random, B zero", "both random", "both zero"]
    assert [line.get_linestyle() for line in lines] == ["-", "--", "--"]
    for i, line in enumerate(lines, 1):
        assert line.get_ydata()[0] == pytest.approx(i + 1.1)
    assert set(low_rank.NAMES) == set(starts.STARTS)


def test_the_findings_are_told_in_words():
    runs = [measured(seed) for seed in range(3)]
    gain, energy = 100 * 8 / (8 + 1 + 2), 100 * 0.8 * 9 / 20
    told = low_rank.kept_in_words(runs, rank=8)
    assert f"keep {energy:.0f} % of their energy, but {gain:.1f} % or more of" in told
    assert f"Random matrices keep {energy / 2:.0f} % of their energy." in told
    with pytest.raises(ValueError, match="rank=3: measured are 1, 2, 4, 8"):
        low_rank.kept_in_words(runs, rank=3)
    groups = {"both-zero": [trained("both-zero", seed) for seed in range(3)]}
    assert low_rank.losses_in_words(groups) == "both zero: 4.10 to 3.15"


def test_an_initialization_without_a_name_is_refused():
    runs = {"warm": [trained("both-zero", 0)]}
    with pytest.raises(ValueError, match=r"warm.*gaussian-zero"):
        low_rank.initializations(runs, title="None")


@pytest.mark.parametrize(
    "figure",
    [
        *(low_rank.thin_matrices(*shape) for shape in SHAPES),
        low_rank.outer_products(matrix()),
        low_rank.outer_products(matrix(), pieces=1),
        low_rank.orientations(BASES),
        low_rank.orientations(BASES[1:2]),
        kept_figure(),
        initializations(),
    ],
    ids=lambda figure: figure.texts[0].get_text(),
)
def test_nothing_overlaps(figure):
    assert_apart(figure)
