"""What layers and ranks keep, drawn: against what must be there, and the formula."""

from itertools import pairwise

import pytest
from figure_overlaps import assert_apart
from matplotlib.patches import Rectangle
from planting import assert_caught

from peft_from_scratch.course.pictures import fitting_pictures as pictures
from peft_from_scratch.memory.formulas import zero_bytes

# What layers keep


def ways_keep_what_they_must():
    for name, columns in pictures.ways(5).items():
        assert len(columns) == 10
        most = max(len(whole) for _, whole, _ in columns)
        assert most == (1 if name == "Checkpointed" else 5)
        for column, whole, inputs in columns:
            now = column if column < 5 else 9 - column
            assert now in whole and not whole & inputs
            assert whole | inputs == set(range(now + 1))


def test_what_layers_keep():
    ways_keep_what_they_must()
    planted = ("set(range(now)))", "set(range(now + 1)))")
    assert_caught(pictures.ways, *planted, ways_keep_what_they_must)


def test_cells_are_those_of_the_ways():
    figure = pictures.kept_by_layers(4)
    cells = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    whole = sum(cell.get_gid() == "whole" for cell in cells)
    inputs = sum(cell.get_gid() == "input" for cell in cells)
    assert (whole, inputs) == (2 * (1 + 2 + 3 + 4) + 8, 2 * (0 + 1 + 2 + 3))
    right = max(cell.get_x() + cell.get_width() for cell in cells)
    assert right <= figure.axes[0].get_xlim()[1]
    assert_apart(figure)
    with pytest.raises(ValueError, match="at least two"):
        pictures.kept_by_layers(1)


# What ranks keep


@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_the_bands_have_the_bytes_of_the_formula(ranks):
    figure = pictures.stages(ranks)
    for stage in (1, 2, 3):
        bands = [
            patch
            for patch in figure.axes[0].patches
            if (patch.get_gid() or "").startswith(f"{stage} ")
        ]
        counted = sum(patch.get_height() for patch in bands) / ranks
        numel = 10**6 * ranks
        bill = zero_bytes([numel], ranks=ranks, stage=stage, itemsize=2)
        assert counted == pytest.approx(sum(bill.values()) / numel, rel=1e-3)
    assert_apart(figure)


def test_the_parts_of_all_ranks_fill_a_row():
    figure = pictures.stages(4)
    parts = [p for p in figure.axes[0].patches if p.get_gid() == "3 optimizer"]
    places = sorted((p.get_y(), p.get_y() + p.get_height()) for p in parts)
    assert places[0][0] == 4 and places[-1][1] == 16
    assert all(a[1] == b[0] for a, b in pairwise(places))
    with pytest.raises(ValueError, match="among two"):
        pictures.stages(1)
