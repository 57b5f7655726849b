"""Pictures of rounding: each weight goes to its nearest value, and nothing overlaps."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from figure_overlaps import assert_apart
from planting import assert_caught

from peft_from_scratch import nf4
from peft_from_scratch.course.pictures import rounding_pictures as pictures

VALUES = nf4.CODES["nf4"]
LAST = 1 - (1 / 30 + 1 / 32) / 2


def weights(n=64) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


def lines_of(figure, gid: str) -> list:
    return [line for line in figure.axes[0].lines if line.get_gid() == gid]


def every_weight_goes_where_the_library_puts_it():
    w = weights()
    figure = pictures.block_on_line(w.tolist(), VALUES)
    restored = nf4.dequantize(nf4.quantize(w, 64, double=False))
    moves = [line.get_xdata() for line in lines_of(figure, "rounding")]
    assert np.allclose(moves, torch.stack([w, restored], dim=1).numpy(), atol=1e-6)
    (ring,) = lines_of(figure, "absmax")
    assert abs(ring.get_xdata()[0]) == pytest.approx(w.abs().max().item())


def the_title_counts_the_values_in_use():
    figure = pictures.block_on_line([1.0, 0.0, 0.01], VALUES)
    assert "3 weights use 2 of 16 values" in figure.texts[0].get_text()
    drawn = [
        line.get_xdata() for line in figure.axes[0].lines if line.get_gid() is None
    ]
    assert [len(xs) for xs in drawn] == [2, 14, 3]


def each_value_stands_under_its_share():
    cdf, last = NormalDist().cdf, NormalDist().inv_cdf(LAST)
    figure = pictures.quantiles_on_curve(VALUES, cdf, last)
    for value, line in zip(VALUES, lines_of(figure, "share"), strict=True):
        (_, left), (x, share), (place, foot) = line.get_xydata()
        assert left == share == pytest.approx(cdf(value * last))
        assert x == place == pytest.approx(value * last) and foot == 0
    shares = [line.get_ydata()[0] for line in lines_of(figure, "share")]
    assert np.diff(shares[7:]) == pytest.approx([(LAST - 0.5) / 8] * 8, abs=1e-6)


LAWS = (
    every_weight_goes_where_the_library_puts_it,
    the_title_counts_the_values_in_use,
    each_value_stands_under_its_share,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_pictures_of_rounding(law):
    law()


@pytest.mark.parametrize(
    "function, right, wrong, law",
    [
        (pictures.nearest, "argmin", "argmax", LAWS[0]),
        (pictures.nearest, "/ np.abs(w).max()", "", LAWS[0]),
        (pictures.block_on_line, "places[~used]", "places[used]", LAWS[1]),
        (pictures.quantiles_on_curve, "last * value, value", "value, value", LAWS[2]),
    ],
)
def test_bugs_are_caught(function, right, wrong, law):
    assert_caught(function, right, wrong, law)


@pytest.mark.parametrize("width", [6.4, 7.4])
@pytest.mark.parametrize("largest", [3.5, -3.5])
def test_nothing_overlaps(width, largest):
    w = [*weights().clamp(-2, 2).tolist(), largest]
    assert_apart(pictures.block_on_line(w, VALUES, width=width))
    cdf, last = NormalDist().cdf, NormalDist().inv_cdf(LAST)
    assert_apart(pictures.quantiles_on_curve(VALUES, cdf, last, width=width))


@pytest.mark.parametrize("w", [[], [0.0, 0.0]])
def test_a_block_without_an_absmax_is_refused(w):
    with pytest.raises(ValueError, match="absmax"):
        pictures.block_on_line(w, VALUES)
