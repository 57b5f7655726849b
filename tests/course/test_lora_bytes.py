"""What LoRA costs in bytes: ratios against closed forms, figures against the ratios."""

import pytest
from figure_overlaps import assert_apart
from matplotlib.patches import Rectangle
from planting import Bug, each_is_caught, law

from peft_from_scratch.course.pictures import lora_bytes as pictures
from peft_from_scratch.course.pictures.lora_bytes import FOUR, FUSED, THREE

WIDTHS, M, R = (256, 576, 4096), 4096, 16
TABLE = pictures.ratios(WIDTHS, M, R)
SAVINGS = {16: {576: 56.3, 4096: 4.9}, 64: {576: 5.0, 4096: -3.7}}


@law
def distinct_bytes_are_the_closed_form():
    """Every operand of each launch once, by hand."""
    table = pictures.ratios(WIDTHS, M, R)
    for i, k in enumerate(WIDTHS):
        x, W, A, B, h, y = M * k, k * k, R * k, k * R, M * R, M * k
        plain, low = x + W + y, x + A + h
        expected = {
            FOUR: plain + low + (h + B + y) + 3 * y,
            THREE: plain + low + (h + B + 2 * y),
            FUSED: x + W + A + B + y,
        }
        for version, elements in expected.items():
            ratio = table[version]["distinct"][i]
            assert ratio == pytest.approx(elements / plain), version


@law
def issued_bytes_are_those_of_the_tiles():
    """Tiles of 128 x 128: x and A are read for each tile column, W for each row."""
    table = pictures.ratios(WIDTHS, M, R)
    for i, k in enumerate(WIDTHS):
        columns, rows = -(-k // 128), M // 128
        plain = columns * M * k + rows * k * k + M * k
        more = columns * rows * R * k + rows * k * R
        assert table[FUSED]["issued"][i] == pytest.approx(1 + more / plain)


@law
def every_ratio_is_drawn():
    figure = pictures.curves(WIDTHS, TABLE, title="Bytes")
    drawn = {line.get_gid(): line for line in figure.axes[0].lines}
    for version, kinds in TABLE.items():
        for kind, values in kinds.items():
            line = drawn[f"{version}, {kind}"]
            assert list(line.get_xdata()) == list(WIDTHS)
            assert list(line.get_ydata()) == values
    dashes = {drawn[f"{FUSED}, {kind}"].get_linestyle() for kind in pictures.KINDS}
    assert len(dashes) == 2
    low, high = figure.axes[0].get_ylim()
    assert low < 1 and high > max(TABLE[FOUR]["distinct"])


@law
def cells_that_are_worth_it_are_framed():
    figure = pictures.grid(SAVINGS, worth=5, title="Savings")
    axes = figure.axes[0]
    framed = {
        (round(box.get_x() + 0.47), round(box.get_y() + 0.42))
        for box in axes.patches
        if isinstance(box, Rectangle) and box.get_gid() == "worth"
    }
    assert framed == {(0, 0), (0, 1)}
    numbers = {(round(t.get_position()[0]), t.get_position()[1]): t for t in axes.texts}
    assert numbers[1, 1].get_text() == "-4" and numbers[0, 0].get_text() == "+56"


@law
def the_words_have_both_ends():
    said = pictures.words(WIDTHS, TABLE)
    for kinds in TABLE.values():
        for values in kinds.values():
            assert f"{values[0]:.2f} to {values[-1]:.2f}" in said


def test_no_text_lies_over_another():
    assert_apart(pictures.curves(WIDTHS, TABLE, title="Bytes", subtitle="Of a product"))
    assert_apart(pictures.grid(SAVINGS, worth=5, title="Savings"))


BUGS = {
    "issued for distinct": Bug(
        pictures.ratios,
        "cost.compulsory / alone.compulsory",
        "cost.issued / alone.issued",
        distinct_bytes_are_the_closed_form,
    ),
    "over the fused product": Bug(
        pictures.ratios,
        "alone = total(plain(launches))",
        "alone = total(launches)",
        issued_bytes_are_those_of_the_tiles,
    ),
    "one line for both": Bug(
        pictures.curves, "KINDS[kind]", "'-'", every_ratio_is_drawn
    ),
    "all is framed": Bug(
        pictures.grid,
        "by_width[k] >= worth",
        "True",
        cells_that_are_worth_it_are_framed,
    ),
    "the start twice": Bug(
        pictures.words,
        "kinds[kind][-1]:.2f",
        "kinds[kind][0]:.2f",
        the_words_have_both_ends,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
