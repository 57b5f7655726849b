"""A followed step against the meter and the bill, and who holds the bytes of a bill."""

from functools import partial

import numpy as np
import pytest
import torch
from architectures import build
from figure_overlaps import assert_apart
from planting import assert_caught

from peft_from_scratch import full, lora
from peft_from_scratch.core.adapter import trainable
from peft_from_scratch.course.pictures import step_picture as pictures
from peft_from_scratch.ledger.experiments import bill
from peft_from_scratch.memory import budget
from peft_from_scratch.memory.meter import measure_step
from peft_from_scratch.memory.setups import Setup
from peft_from_scratch.training.chunked_loss import summed_loss_in_chunks
from peft_from_scratch.training.loss import summed_loss

LENGTH = 24
LOSSES = {
    "whole": summed_loss,
    "in chunks": partial(summed_loss_in_chunks, chunk=5),
}


RECIPES = ("float32", "mixed", "bf16-pure")


def model():
    torch.manual_seed(0)
    subject = build("llama")
    lora.inject(subject, r=4, alpha=8)
    return subject


def plain(recipe):
    torch.manual_seed(0)
    half = recipe in ("mixed", "bf16-pure")
    return build("llama", dtype=torch.bfloat16 if half else torch.float32)


def whole(recipe="mixed"):
    """A model of which everything trains."""
    subject = plain(recipe)
    full.inject(subject)
    return subject


def counted(recipe):
    return bill.counted(plain(recipe), pictures.COUNTED_AS[recipe], length=LENGTH)


def predicted(recipe):
    setup = Setup(method="full", dtype=recipe, length=LENGTH)
    return budget.bill(plain(recipe).config, setup)


# A followed step


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


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_of_each_recipe_has_the_bytes_of_its_bill(recipe):
    bytes_ = counted(recipe)["bytes"]
    seen = pictures.followed(whole(recipe), summed_loss, LENGTH, recipe)
    for kind in ("weights", "gradients", "optimizer"):
        assert seen.series[kind].max() == bytes_[kind], kind
    assert max(seen.peaks().values()) == pytest.approx(bytes_["peak"], rel=0.02)
    expected = pictures.predicted(predicted(recipe).moments)
    assert expected["loss"] == pytest.approx(seen.peaks()["loss"], rel=0.05)


def test_a_step_begins_and_ends_with_weights_and_states_alone():
    seen = pictures.followed(whole(), summed_loss, LENGTH, "mixed")
    for moment in (0, -1):
        assert seen.series["gradients"][moment] == 0
        assert seen.series["optimizer"][moment] == seen.series["optimizer"].max()
    most = seen.series["gradients"].max()
    assert seen.series["gradients"][seen.starts["loss"]] == 0
    assert seen.series["gradients"][seen.starts["update"]] == most


def assert_replayed():
    """A meter's own maxima, from the series."""
    subject = whole()
    with pictures.Meter(subject) as meter:
        loss = subject(**pictures.tokens(subject, LENGTH)).loss
        loss.backward()
    series, memory = pictures.replayed(meter), meter.memory()
    for kind in ("weights", "gradients", "activations"):
        assert series[kind].max() == getattr(memory, kind), kind
    assert sum(series.values()).max() == memory.peak


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("[moment] += change", "[moment] = 0"),
        ("[0] += meter.size", "[0] -= meter.size"),
        ("np.cumsum(changes)", "changes"),
    ],
)
def test_the_series_is_the_meters(right, wrong):
    assert_replayed()
    assert_caught(pictures.replayed, right, wrong, assert_replayed)


def test_chunks_shorten_the_loss_alone():
    at_once, chunks = (
        pictures.followed(model(), loss, LENGTH).peaks() for loss in LOSSES.values()
    )
    assert chunks["loss"] < at_once["loss"]
    assert chunks["update"] == at_once["update"]


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


# Who holds the bytes of a bill


def holders_are_those_of_the_step():
    for recipe in RECIPES:
        parts, count = predicted(recipe).parts, counted(recipe)
        expected, own = pictures.holders(parts), pictures.counted(count, 1e6)
        scale = 1e6 / count["parameters"]
        for holder, size in own.items():
            assert size == pytest.approx(scale * expected[holder], rel=0.02), holder
        assert sum(expected.values()) == sum(parts.values())
        assert bool(own[pictures.MASTER]) == (recipe == "mixed")
        size = {"float32": 16, "mixed": 16, "bf16-pure": 8}[recipe]
        assert sum(own.values()) == pytest.approx(size * 1e6, rel=0.01)


def both_bills_stand_side_by_side():
    sizes = {"float32": (4, 4, 8), "mixed": (2, 2, 12), "bf16-pure": (2, 2, 4)}
    for recipe, rows in sizes.items():
        pairs = pictures.beside(predicted(recipe), counted(recipe))
        for pair, size in zip(pairs, rows, strict=True):
            assert pair == pytest.approx((size, size), rel=0.01)


HOLDERS, BESIDE = holders_are_those_of_the_step, both_bills_stand_side_by_side


@pytest.mark.parametrize(
    "function, right, wrong, law",
    [
        (pictures.holders, 'MASTER: parts["master"]', "MASTER: 0", HOLDERS),
        (pictures.counted, '(bytes_["optimizer"] - master)', "master", HOLDERS),
        (pictures.counted, 'parameters / count["parameters"]', "1", HOLDERS),
        (pictures.beside, 'parts["master"] + ', "", BESIDE),
        (pictures.beside, 'parts["gradients"], states', "states, states", BESIDE),
    ],
)
def test_who_holds_the_bytes(function, right, wrong, law):
    law()
    assert_caught(function, right, wrong, law)


def test_every_holder_has_a_color():
    shown = {*pictures.holders(predicted("mixed").parts), pictures.COPIES}
    assert set(pictures.KINDS) == shown
    assert len(set(pictures.KINDS.values())) == len(pictures.KINDS)
