"""Pictures of a GPU: what is drawn is what was asked for, and no text is covered."""

import pytest
from figure_overlaps import assert_apart
from matplotlib.patches import Rectangle
from planting import Bug, each_is_caught, law

from peft_from_scratch.course.pictures import gpu_pictures as pictures

SUM = ("g B", "x", "gradient of A"), "A sum in shares"


def boxes(figure, gid):
    found = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    return [box for box in found if box.get_gid() == gid]


def words(figure):
    return [text.get_text() for text in figure.axes[0].texts]


@law
def a_mask_is_true_for_the_elements_that_exist():
    for size, tile, past in ((100, 64, 28), (128, 64, 0), (65, 64, 63), (5, 16, 11)):
        figure = pictures.masked(size, tile, "A mask")
        there = sum(box.get_width() for box in boxes(figure, "there"))
        hidden = sum(box.get_width() for box in boxes(figure, "past"))
        whole = size + past
        assert there == pytest.approx(100 * size / whole)
        assert hidden == pytest.approx(100 * past / whole)
        said = f"{size} to {whole - 1}: mask false"
        assert (said in words(figure)) == (past > 0)


@law
def every_row_is_in_one_share():
    for rows, shares in ((192, 3), (100, 4), (7, 1)):
        figure = pictures.split_sum(rows, shares, *SUM)
        bands = boxes(figure, "rows")
        assert len(bands) == 2 * shares and len(boxes(figure, "partial")) == shares
        tall = sum(box.get_height() for box in bands) / 2
        assert tall == pytest.approx(36)
        said = [line for text in words(figure) for line in text.splitlines()]
        ends = [line.split()[1::2] for line in said if line.startswith("rows ")]
        covered = [row for a, b in ends for row in range(int(a), int(b) + 1)]
        assert covered == list(range(rows))


@law
def shares_look_different_without_color():
    figure = pictures.split_sum(192, 5, *SUM)
    hatches = [box.get_hatch() or "" for box in boxes(figure, "partial")]
    assert len(set(hatches)) == 5


@law
def each_processor_has_two_memories_of_its_own():
    figure = pictures.memory("The memories of a GPU")
    processors, memories = boxes(figure, "processor"), boxes(figure, "memory")
    assert len(memories) == 2 * len(processors) + 2
    for processor in processors:
        (left, top), wide = processor.get_xy(), processor.get_width()
        inside = [
            box
            for box in memories
            if left <= box.get_x() and box.get_x() + box.get_width() <= left + wide
            and top < box.get_y() < top + processor.get_height()
        ]  # fmt: skip
        assert len(inside) == 2
    said = " ".join(words(figure))
    assert all(size in said for size in ("256 KiB", "227 KiB", "50 MB", "80 GB"))
    assert f"multiprocessor {pictures.PROCESSORS}" in said and "3.35 TB/s" in said


@pytest.mark.parametrize(
    "figure",
    [
        lambda: pictures.memory("The memories of a GPU", "Of one GPU."),
        lambda: pictures.masked(100, 64, "A mask"),
        lambda: pictures.masked(300, 64, "A mask"),
        lambda: pictures.split_sum(192, 3, *SUM),
        lambda: pictures.split_sum(192, 5, *SUM),
    ],
)
def test_no_text_lies_over_another(figure):
    assert_apart(figure())


@pytest.mark.parametrize("size, tile", [(0, 64), (100, 0)])
def test_no_tile_is_refused(size, tile):
    with pytest.raises(ValueError, match=f"size {size}, tile {tile}: both must"):
        pictures.masked(size, tile, "No")


@pytest.mark.parametrize("rows, shares", [(192, 0), (2, 3), (192, 6)])
def test_shares_that_cannot_be_drawn_are_refused(rows, shares):
    with pytest.raises(ValueError, match=f"{shares} shares of {rows} rows: 1 to"):
        pictures.split_sum(rows, shares, *SUM)


BUGS = {
    "the mask of the whole tile": Bug(
        pictures.masked,
        "min(first + tile, size), first + tile",
        "first + tile, first + tile",
        a_mask_is_true_for_the_elements_that_exist,
    ),
    "a program too few": Bug(
        pictures.masked,
        "math.ceil(size / tile)",
        "max(1, size // tile)",
        a_mask_is_true_for_the_elements_that_exist,
    ),
    "the last rows left out": Bug(
        pictures.split_sum,
        "math.ceil(rows / shares)",
        "rows // (shares + 1)",
        every_row_is_in_one_share,
    ),
    "told by color alone": Bug(
        pictures._share,
        "SHARES[share], HATCHES[share]",
        "SHARES[share], ''",
        shares_look_different_without_color,
    ),
    "outside of its processor": Bug(
        pictures._processor,
        "left + 0.6 + i * 12.6",
        "left + 0.6 + i * 22.6",
        each_processor_has_two_memories_of_its_own,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
