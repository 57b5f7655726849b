"""Bottleneck pictures: what was given is drawn, controls are gray, nothing overlaps."""

import pytest
from figure_overlaps import assert_apart
from planting import assert_caught

from peft_from_scratch.course.pictures import bottleneck_pictures as pictures

ROWS = {
    "base, timed again": {"one": (1.0, 0.99, 1.01), "eight": (1.0, 0.98, 1.02)},
    "bottlenecks": {"one": (1.09, 1.08, 1.11), "eight": (1.08, 1.07, 1.1)},
    "LoRA": {"one": (1.17, 1.17, 1.19), "eight": (1.16, 1.15, 1.2)},
}


def figure(rows=ROWS, width=7.4):
    return pictures.ratios(
        rows, title="Times", control=["base, timed again"], width=width
    )


def of(figure, name):
    return [line for line in figure.axes[0].lines if line.get_gid() == name]


def assert_drawn():
    drawn, spans = figure(), [span for row in ROWS.values() for span in row.values()]
    marks = of(drawn, "ratio")
    assert [line.get_xdata()[0] for line in marks] == [value for value, _, _ in spans]
    bars = [c for c in drawn.axes[0].collections if c.get_gid() == "interval"]
    ends = [tuple(bar.get_segments()[0][:, 0]) for bar in bars]
    assert ends == [(low, high) for _, low, high in spans]
    edges = [line.get_markeredgecolor() for line in marks]
    assert edges == [pictures.GREY] * 2 + [pictures.BLUE] * 4
    faces = [line.get_markerfacecolor() for line in marks]
    assert faces[1::2] == [pictures.LIGHT.paper] * 3
    assert of(drawn, "base")[0].get_xdata()[0] == 1
    left, right = drawn.axes[0].get_xlim()
    assert left < 0.98 and right > 1.2


def test_ratios_and_intervals_are_the_data():
    assert_drawn()


@pytest.mark.parametrize(
    "function, right, wrong",
    [
        (pictures._row, "low, high, color", "value, high, color"),
        (pictures._row, "[value]", "[low]"),
        (pictures._mark, "color if filled", "color if not filled"),
        (pictures.ratios, "GREY if label in", "GREY if label not in"),
        (pictures.ratios, "axvline(1,", "axvline(0,"),
    ],
)
def test_a_planted_bug_is_caught(function, right, wrong):
    assert_caught(function, right, wrong, assert_drawn)


@pytest.mark.parametrize("width", [5.2, 7.4])
def test_nothing_overlaps(width):
    assert_apart(figure(width=width))


def test_the_words_have_every_row():
    row = {"LoRA": {"one": (1.17, 1.16, 1.19), "eight": (1.1, 1.0, 1.2)}}
    text = pictures.ratios_in_words(row)
    assert text == "LoRA 1.17 [1.16, 1.19] and 1.10 [1.00, 1.20]"


@pytest.mark.parametrize("rows", [{}, {"a": {}}, ROWS | {"b": {"one": (1, 1, 1)}}])
def test_rows_that_differ_are_refused(rows):
    with pytest.raises(ValueError, match="the same"):
        pictures.ratios(rows, title="None")


def test_both_halves_of_a_projection_name_their_matrices():
    drawn = pictures.at_projection()
    texts = [text.get_text() for text in drawn.axes[0].texts]
    letters = [text for text in texts if text in ("$A$", "$B$", "$D$", "$U$", "$W_0$")]
    assert sorted(letters) == ["$A$", "$B$", "$D$", "$U$", "$W_0$", "$W_0$"]
    assert_apart(drawn)
