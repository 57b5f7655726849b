"""Formats as they are stored: what constants cost, and where two curves meet."""

import pytest
import torch
from planting import assert_caught

from peft_from_scratch.ledger.experiments import formats
from peft_from_scratch.nf4 import dequantize, quantize
from peft_from_scratch.nf4.double import double_quantize

NAMES = [(name, width) for name in ("NF4", "affine int4") for width in (16, 8)]


def weights(n=1 << 16) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


def bits_are_those_of_what_is_held():
    for block in formats.STORED_BLOCKS:
        priced = {
            name: bits
            for name, (bits, _) in formats.as_stored(weights(), block).items()
        }
        priced = {name: priced[formats.label(*name)] for name in NAMES}
        assert priced["NF4", 8] == quantize(weights(), block).bits_per_value
        assert priced["NF4", 16] == 4 + 16 / block
        assert priced["affine int4", 16] == 4 + 20 / block
        assert priced["affine int4", 8] == pytest.approx(priced["NF4", 8] + 4 / block)


def errors_are_those_of_the_library_but_for_the_constants():
    w = weights()
    priced = formats.as_stored(w, 64)
    exact = formats.error(w, dequantize(quantize(w, 64, double=False)))
    assert priced["NF4, 16-bit constants"][1] == pytest.approx(exact, rel=1e-3)
    assert priced["NF4, 8-bit constants"][1] == pytest.approx(exact, rel=1e-2)
    affine = formats.error(w, formats.Affine.of(w, 64).dequantize())
    assert (
        affine < priced["affine int4, 16-bit constants"][1] < 1.05 * affine
    )  # a zero point costs a little


def what_lies_on_the_grid_of_a_zero_point_comes_back():
    step = torch.tensor([0.5, 2.0])
    for zero in (0, 4, 15):
        codes = torch.arange(16.0).expand(2, 16)
        rows = (codes - zero) * step[:, None]
        assert torch.equal(formats.with_zero_point(rows, step), rows)
    assert not formats.with_zero_point(torch.zeros(2, 16), torch.zeros(2)).any()
    assert not formats.in_nf4(torch.zeros(2, 16), torch.zeros(2)).any()


def constants_in_eight_bits_are_those_of_double_quantization():
    absmax = 1 + torch.rand(300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(formats.as_kept(absmax, 16), absmax.half().float())
    expected = double_quantize(absmax, "dynamic").dequantize()
    assert torch.equal(formats.as_kept(absmax, 8), expected)


def curves_meet_where_their_lines_do():
    falling = [(4.125, 10.0), (4.5, 8.0)]  # 10 - log2(bits - 4) - 3
    level = [(4.0625, 9.0), (5.0, 9.0)]
    assert formats.crossing(falling, level) == pytest.approx(4.25, abs=1e-3)
    assert formats.crossing(level, falling) == pytest.approx(4.25, abs=1e-3)
    assert formats.crossing(falling, [(4.0625, 20.0), (5.0, 20.0)]) is None
    assert formats.crossing(falling, [(4.6, 9.0), (5.0, 8.0)]) is None


def curves_are_over_all_blocks():
    curves = formats.stored_curves(weights())
    assert set(curves) == {formats.label(*name) for name in NAMES}
    for at, block in enumerate(formats.STORED_BLOCKS):
        priced = formats.as_stored(weights(), block)
        assert {name: curve[at] for name, curve in curves.items()} == priced
    meet = formats.crossings(curves)
    for width in (16, 8):
        pair = (
            curves[formats.label("NF4", width)],
            curves[formats.label("affine int4", width)],
        )
        assert 4.1 < meet[width] == formats.crossing(*pair) < 4.6


LAWS = (
    bits_are_those_of_what_is_held,
    errors_are_those_of_the_library_but_for_the_constants,
    what_lies_on_the_grid_of_a_zero_point_comes_back,
    constants_in_eight_bits_are_those_of_double_quantization,
    curves_meet_where_their_lines_do,
    curves_are_over_all_blocks,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_formats_as_stored(law):
    law()


@pytest.mark.parametrize(
    "function, right, wrong, law",
    [
        (formats.as_stored, "ZERO_BITS / block", "0", LAWS[0]),
        (formats.constant_bits, "+ 32 / n", "", LAWS[0]),
        (formats.constant_bits, "width / block", "32 / block", LAWS[0]),
        (formats.as_stored, "span / 15", "span / 16", LAWS[1]),
        (formats.with_zero_point, "(codes - zero)", "codes", LAWS[2]),
        (formats.as_kept, "constants.half().float()", "constants", LAWS[3]),
        (formats.crossing, "np.log(bits - 4)", "bits", LAWS[4]),
    ],
)
def test_bugs_are_caught(function, right, wrong, law):
    assert_caught(function, right, wrong, law)
