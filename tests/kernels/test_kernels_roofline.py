"""The bound on a kernel's time, its figure, and what K1 makes of it."""

import pytest
import torch
from planting import assert_caught, each_is_caught, law

from peft_from_scratch.kernels import roofline
from peft_from_scratch.kernels.count import LaunchCost
from peft_from_scratch.kernels.roofline import DEVICES, FUSED, UNFUSED
from peft_from_scratch.ledger import verdicts
from peft_from_scratch.ledger.experiments import fusing
from peft_from_scratch.ledger.runs import Run
from peft_from_scratch.plotting import roofline as picture

BF16 = torch.bfloat16
H100 = roofline.SHOWN
TINY = roofline.Device("none", matrix=100.0, plain=10.0, bandwidth=5.0, source="")


@law
def the_slower_of_two_bounds():
    waits = LaunchCost(compulsory=50, flops=100)  # 10 s for bytes, 1 s for FLOPs
    works = LaunchCost(compulsory=50, flops=5000)
    assert roofline.seconds(waits, TINY, BF16) == 10
    assert roofline.seconds(works, TINY, BF16) == 50
    assert roofline.seconds(works, TINY, torch.float32) == 500
    assert roofline.bound([waits, works], TINY, BF16) == 60


@law
def intensities_are_the_closed_form():
    """FLOPs over the bytes of each operand once, by hand."""
    r, found = 16, roofline.places(H100, 16, BF16)
    for (m, k, n), (x, rate) in zip(roofline.PLACES, found[FUSED], strict=True):
        flops = 2 * (m * n * k + m * r * k + m * n * r) + 2 * m * n
        moved = 2 * (m * k + n * k + r * k + n * r + m * n)
        shares = {16: 4, 1: 5}.get(m, 0)  # of k, in float32: written, then read
        moved += 2 * 4 * shares * m * (n + r)
        assert x == pytest.approx(flops / moved)
        assert rate <= min(H100.matrix, x * H100.bandwidth) * (1 + 1e-9)
    for kind in found:
        for x, rate in found[kind]:
            assert rate <= x * H100.bandwidth * (1 + 1e-9)


BUGS = {
    "the faster of the two": (
        *(roofline.seconds, "max(for_flops", "min(for_flops"),
        the_slower_of_two_bounds,
    ),
    "bytes per FLOP": (
        *(roofline.places, "(needed / moved, rate)", "(moved / needed, rate)"),
        intensities_are_the_closed_form,
    ),
    "the bf16 peak for float32": (
        *(roofline.peak, "device.plain if", "device.matrix if"),
        the_slower_of_two_bounds,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)


def test_datasheets_are_dense_and_ordered():
    """A figure with sparsity, twice the dense one, would fall out of these ranges."""
    for device in DEVICES:
        assert 1e12 < device.bandwidth < 1e13 and device.source
        assert 2 <= device.matrix / device.plain <= 29
        assert 100 < device.matrix / device.bandwidth < 300


def test_the_figure_shows_what_its_title_says():
    found = roofline.places(H100, 16, BF16)
    for rival in (UNFUSED, roofline.IN_PLACE):
        pairs = zip(found[FUSED], found[rival], strict=True)
        wide, narrow, *decoding = [ours[1] / theirs[1] for ours, theirs in pairs]
        assert 1.05 < wide < narrow / 1.5
        assert all(1 <= gain < 1.05 for gain in decoding)


def test_the_figure_has_a_roof_a_device_and_points_of_each_kind():
    page = picture.figure()
    (axes,) = page.axes
    roofs = [line for line in axes.lines if line.get_gid() == "roof"]
    assert len(roofs) == len(DEVICES)
    drawn = {line.get_gid(): line for line in axes.lines if line not in roofs}
    assert set(drawn) == {UNFUSED, roofline.IN_PLACE, FUSED}
    found = roofline.places(H100, 16, BF16)
    for kind, line in drawn.items():
        assert list(zip(*line.get_data(), strict=True)) == found[kind]
    assert "FLOPs per byte" in axes.get_xlabel()
    words = picture.alt()
    assert words.count("the limit is") == len(roofline.PLACES) and words.endswith(".")
    assert all(device.name in words for device in DEVICES)
    assert f"{found[FUSED][0][1] / 1e12:,.3g}" in words


def test_one_device_has_one_roof_and_is_the_only_one_in_words():
    (axes,) = picture.figure(devices=(H100,)).axes
    assert [line.get_gid() for line in axes.lines].count("roof") == 1
    words = picture.alt(devices=(H100,))
    assert H100.name in words and "other roofs" not in words


# ---------------------------------------------------------------------------------- K1


def a_run(saving: float) -> Run:
    config = {"shapes": [[4096, 8, 8], [16, 8, 8], [1, 8, 8]]}
    every = [[[saving] * 4 + [0.0]] for _ in range(3)]
    return Run("fusing-0", config, {"in_four": every, "in_three": every}, {})


@pytest.mark.parametrize(
    "saving, value, verdict",
    [(4.9, 0, "does not hold here"), (5.0, 80, "holds when")],
)
def test_k1_is_the_share_of_worthwhile_cases(saving, value, verdict):
    measured = fusing.measured([a_run(saving)])
    assert measured.value == pytest.approx(value)
    ends = measured.value, measured.low, measured.high
    assert verdicts.verdict_of("K1", *ends) == verdict
    fusing.BOUNDS.format(**measured.figures)


def a_saving_is_of_the_rivals_bound():
    found = fusing.saved(
        (4096, 576, 576), 16, lambda *case: [LaunchCost(flops=10**12)], TINY
    )
    ours = roofline.bound(roofline.counts_of((4096, 576, 576), 16, BF16), TINY, BF16)
    assert found == pytest.approx(100 * (1 - ours / 1e10), abs=1e-2)


def test_a_saving_is_of_the_rivals_bound():
    a_saving_is_of_the_rivals_bound()
    right = "ours / bound(rival(*shape, r, dtype), device, dtype)"
    wrong = "bound(rival(*shape, r, dtype), device, dtype) / ours"
    assert_caught(fusing.saved, right, wrong, a_saving_is_of_the_rivals_bound)
