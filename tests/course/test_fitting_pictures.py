"""A followed step against the meter and the bill; what layers and ranks keep, drawn."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from architectures import build
from figure_overlaps import assert_apart
from matplotlib.patches import Rectangle
from planting import assert_caught

from peft_from_scratch import lora
from peft_from_scratch.core.adapter import trainable
from peft_from_scratch.course.pictures import fitting_pictures as pictures
from peft_from_scratch.memory import budget
from peft_from_scratch.memory.formulas import zero_bytes
from peft_from_scratch.memory.meter import measure_step
from peft_from_scratch.memory.setups import Setup
from peft_from_scratch.training.chunked_loss import summed_loss_in_chunks
from peft_from_scratch.training.loss import summed_loss

LENGTH = 24
LOSSES = {
    "whole": summed_loss,
    "in chunks": partial(summed_loss_in_chunks, chunk=5),
}


def model():
    torch.manual_seed(0)
    subject = build("llama")
    lora.inject(subject, r=4, alpha=8)
    return subject


@pytest.mark.parametrize("loss", LOSSES)
def test_a_followed_step_has_the_meters_peak(loss):
    seen = pictures.followed(model(), LOSSES[loss], LENGTH)
    subject = model()
    optimizer = torch.optim.AdamW(trainable(subject).values(), foreach=False)

    def step(length):
        LOSSES[loss](subject.train(), pictures.tokens(subject, length)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(pictures.FEW)
    counted = measure_step(subject, lambda: step(LENGTH))
    assert max(seen.peaks().values()) == pytest.approx(counted.peak, rel=1e-3)
    assert tuple(seen.starts) == tuple(pictures.MOMENTS)
    assert sorted(seen.starts.values()) == list(seen.starts.values())


def test_forward_and_loss_are_what_the_bill_predicts():
    subject = model()
    setup = Setup(method="lora", dtype="float32", length=LENGTH, options={"r": 4})
    moments = budget.bill(subject.config, setup).moments
    seen, bytes_ = (
        pictures.followed(subject, summed_loss, LENGTH),
        pictures.predicted(moments),
    )
    for name in ("forward", "loss"):
        assert bytes_[name] == pytest.approx(seen.peaks()[name], rel=0.05), name
    assert set(bytes_) == set(pictures.MOMENTS)
    words = pictures.table(seen, bytes_).splitlines()
    assert [line.split()[0] for line in words[1:]] == list(pictures.MOMENTS)


def test_chunks_shorten_the_loss_alone():
    whole, chunks = (
        pictures.followed(model(), loss, LENGTH).peaks() for loss in LOSSES.values()
    )
    assert chunks["loss"] < whole["loss"]
    assert chunks["update"] == whole["update"]


@pytest.fixture(scope="module")
def seen():
    """With the shape of a real step: a name needs room."""
    rise, flat = np.linspace(0, 1, 300), np.zeros(300)
    series = {
        "weights": np.full(900, 0.55e9),
        "optimizer": np.full(900, 0.04e9),
        "gradients": np.concatenate([flat, 0.02e9 * rise, flat + 0.02e9]),
        "activations": np.concatenate([0.6e9 * rise, 0.6e9 * (1 - rise), flat]),
    }
    starts = {"forward": 0, "loss": 290, "backward": 320, "update": 600}
    return pictures.Followed(series, starts)


def test_the_lines_are_what_was_predicted(seen):
    bytes_ = {"forward": 1.1e9, "loss": 1.3e9, "backward": 1.2e9, "update": 0.6e9}
    figure = pictures.over_time(seen, bytes_, title="A step", subtitle="Of a model.")
    axes = figure.axes[0]
    lines = [line for line in axes.lines if line.get_gid() == "predicted"]
    assert [line.get_ydata()[0] * 1e9 for line in lines] == pytest.approx(
        list(bytes_.values())
    )
    assert [line.get_xdata()[0] for line in lines] == [0, 1, 2, 3]
    at = pictures.places(seen)
    assert [at[start] for start in seen.starts.values()] == [0, 1, 2, 3]
    assert at[-1] == 4 and (np.diff(at) > 0).all()
    assert any(text.get_text() == "loss: the peak" for text in axes.texts)
    assert_apart(figure)


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
