"""Leads with intervals: what was given is drawn, and undecided looks different."""

import pytest
from figure_overlaps import assert_apart
from planting import assert_caught

from peft_from_scratch.common.statistics import over_seeds
from peft_from_scratch.course.pictures import lead_picture as pictures

SEEDS = {
    "far, 1,600 examples": [0.08, 0.11, 0.28, 0.35, 0.22],
    "near, 100 examples": [-0.03, 0.0, -0.01, -0.01, 0.0],
    "near, 400 examples": [-0.3, -0.2, -0.25, -0.28, -0.22],
}
SPANS = {label: over_seeds(values) for label, values in SEEDS.items()}
AXIS = "Lead of full fine-tuning, nats per token"


def figure(width=7.4, **options):
    return pictures.picture(
        SEEDS, SPANS, x=AXIS, title="Who leads", width=width, **options
    )


def of(figure, name):
    return [line for line in figure.axes[0].lines if line.get_gid() == name]


def assert_drawn():
    drawn = figure()
    for line, values in zip(of(drawn, "seeds"), SEEDS.values(), strict=True):
        assert list(line.get_xdata()) == values
    means = [line.get_xdata()[0] for line in of(drawn, "mean")]
    assert means == [mean for mean, _, _ in SPANS.values()]
    bars = [c for c in drawn.axes[0].collections if c.get_gid() == "interval"]
    ends = [tuple(bar.get_segments()[0][:, 0]) for bar in bars]
    assert ends == [pytest.approx((low, high)) for _, low, high in SPANS.values()]
    fills = [line.get_markerfacecolor() for line in of(drawn, "mean")]
    assert fills == [pictures.BLUE, pictures.LIGHT.paper, pictures.BLUE]


def test_seeds_means_and_intervals_are_the_data():
    assert_drawn()


@pytest.mark.parametrize(
    "function, right, wrong",
    [
        (pictures.told_apart, "low > 0 or high < 0", "low > 0"),
        (pictures.told_apart, "low > 0", "low < 0"),
        (pictures._row, "low, high, color", "low, mean, color"),
        (pictures._row, "[mean], [y]", "[low], [y]"),
        (pictures._mark, "name == APART", "name != APART"),
    ],
)
def test_a_planted_bug_is_caught(function, right, wrong):
    assert_caught(function, right, wrong, assert_drawn)


def test_zero_is_marked_and_everything_is_inside():
    drawn = figure()
    left, right = drawn.axes[0].get_xlim()
    assert of(drawn, "zero")[0].get_xdata()[0] == 0
    places = [n for row in (*SEEDS.values(), *SPANS.values()) for n in row]
    assert left < min(*places, 0) and max(*places, 0) < right


def test_a_control_is_grey():
    drawn = figure(control=["near, 100 examples"])
    edges = [line.get_markeredgecolor() for line in of(drawn, "mean")]
    assert edges == [pictures.BLUE, pictures.GREY, pictures.BLUE]


def test_a_row_may_have_no_seeds():
    drawn = pictures.picture({"a": []}, {"a": (0.1, 0.0, 0.2)}, x=AXIS, title="One")
    assert len(of(drawn, "mean")) == 1


def test_the_words_have_every_row():
    assert pictures.words({"a": (0.1, -0.2, 0.4)}) == "a +0.100 [-0.200, +0.400]"


@pytest.mark.parametrize("width", [5.2, 7.4])
def test_nothing_overlaps(width):
    assert_apart(figure(width))


@pytest.mark.parametrize("seeds", [{}, {"other": [0.1]}])
def test_rows_that_differ_are_refused(seeds):
    with pytest.raises(ValueError, match="the same rows"):
        pictures.picture(seeds, SPANS, x=AXIS, title="None")
