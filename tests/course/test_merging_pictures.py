"""Pictures of merging and combining: every mark where its number is, nothing hidden."""

import pytest
from figure_overlaps import assert_apart
from planting import each_is_caught, law

from peft_from_scratch.course.pictures import merging_pictures as pictures
from peft_from_scratch.plotting.theme import BLUE, GREY

ROWS = {
    "float32": [5e-5, 6e-5],
    "bfloat16": [0.9, 1.1, 1.3],
    "a random update (control)": [100.0, 130.0],
}
NAMES = dict(x="Error, %", title="Errors", control=["a random update (control)"])


@law
def every_error_is_drawn_at_its_place():
    axes = pictures.errors(ROWS, **NAMES).axes[0]
    for y, (label, row) in enumerate(ROWS.items()):
        (line,) = (each for each in axes.lines if each.get_gid() == label)
        assert list(line.get_xdata()) == row
        assert set(line.get_ydata()) == {y}
        assert line.get_color() == (GREY if "control" in label else BLUE)
        low, high = axes.get_xlim()
        assert low < min(row) and max(row) < high
    assert axes.get_xscale() == "log"
    (whole,) = (line for line in axes.lines if line.get_gid() == "whole")
    assert set(whole.get_xdata()) == {100}


@law
def the_words_have_the_means():
    words = pictures.errors_in_words(ROWS)
    control = "a random update (control) 115 %"
    assert words == f"float32 5.5e-05 %; bfloat16 1.1 %; {control}"


@law
def only_added_factors_have_cross_terms():
    axes = pictures.products().axes[0]
    kinds = [patch.get_gid() for patch in axes.patches]
    assert kinds.count("wanted") == 4
    assert kinds.count("cross") == kinds.count("absent") == 2
    names = [text.get_text() for text in axes.texts]
    for name in ("$B_1A_2$", "$B_2A_1$"):
        assert names.count(name) == 1
    for name in ("$B_1A_1$", "$B_2A_2$"):
        assert names.count(name) == 2
    left = [p for p in axes.patches if p.get_gid() == "cross"]
    assert max(p.get_x() for p in left) < pictures.BOXES / 2


@law
def three_products_become_one():
    axes = pictures.one_product().axes[0]
    half = pictures.ACROSS / 2
    middles = [patch.get_x() + patch.get_width() / 2 for patch in axes.patches]
    assert sum(x < half for x in middles) == 3
    assert sum(x > half for x in middles) == 1


@pytest.mark.parametrize("width", [5.6, 7.4])
def test_nothing_overlaps(width):
    assert_apart(pictures.errors(ROWS, **NAMES, width=width))


@pytest.mark.parametrize("rows", [{}, {"a": []}, {"a": [1.0], "b": [0.0]}])
def test_what_a_logarithm_cannot_show_is_refused(rows):
    with pytest.raises(ValueError, match="above 0"):
        pictures.errors(rows, x="Error", title="Nothing")


test_a_planted_bug_is_caught = each_is_caught(
    {
        "all in one row": (
            pictures.errors,
            "[y] * len(row)",
            "[0] * len(row)",
            every_error_is_drawn_at_its_place,
        ),
        "the control in color": (
            pictures.errors,
            "if label in control",
            "if label not in control",
            every_error_is_drawn_at_its_place,
        ),
        "the sum for the mean": (
            pictures.errors_in_words,
            "sum(row) / len(row)",
            "sum(row)",
            the_words_have_the_means,
        ),
        "cross terms where factors are stacked": (
            pictures.products,
            "(15.2, False)",
            "(15.2, True)",
            only_added_factors_have_cross_terms,
        ),
    }
)
