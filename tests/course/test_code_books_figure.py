"""The figure of code books: what was given is drawn, and nothing overlaps."""

import pytest
import torch
from figure_overlaps import assert_apart
from planting import assert_caught

from peft_from_scratch import nf4
from peft_from_scratch.course.pictures import code_books
from peft_from_scratch.course.pictures.code_books import BINS

BOOKS = {"NF4": nf4.CODES["nf4"], "FP4": nf4.CODES["fp4"], "three": [-1.0, 0.0, 1.0]}


def ratios() -> list[float]:
    torch.manual_seed(0)
    return (torch.randn(1000) / 3).clamp(-1, 1).tolist()


def figure(width=7.4, **books):
    books = books or BOOKS
    return code_books.code_books(ratios(), books, title="Where they lie", width=width)


def assert_drawn():
    axes = figure().axes[0]
    for (name, values), line in zip(BOOKS.items(), axes.lines, strict=True):
        assert line.get_label() == name
        assert list(line.get_xdata()) == list(values)
    heights = [bar.get_height() for bar in axes.patches]
    counted = torch.histc(torch.tensor(ratios()), BINS, -1, 1) / 10  # % of 1000
    assert heights == pytest.approx(counted.tolist(), abs=0.11)
    assert sum(heights) == pytest.approx(100)


@pytest.mark.parametrize(
    "function, right, wrong",
    [
        (code_books._shares, "100 * count", "50 * count"),
        (code_books._shares, "+ 1) / 2 * BINS", "+ 1) / 3 * BINS"),
        (code_books.code_books, "list(values)", "list(values)[::-1]"),
        (code_books.code_books, "label=name", "label=None"),
    ],
)
def test_the_books_and_the_histogram_are_the_data(function, right, wrong):
    assert_drawn()
    assert_caught(function, right, wrong, assert_drawn)


@pytest.mark.parametrize("width", [4.2, 7.4])
def test_nothing_overlaps(width):
    assert_apart(figure(width))


def test_books_look_different_and_names_are_there():
    axes = figure().axes[0]
    looks = {(line.get_color(), line.get_marker()) for line in axes.lines}
    assert len(looks) == len(BOOKS)
    assert [text.get_text() for text in axes.texts][: len(BOOKS)] == list(BOOKS)


@pytest.mark.parametrize("values", [[], [0.0, 1.5], [-2.0]])
def test_what_lies_outside_is_refused(values):
    with pytest.raises(ValueError, match="'wide'"):
        figure(wide=values)
