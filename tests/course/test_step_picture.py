"""Who holds memory during an optimizer step: against the bill, and in the picture."""

import numpy as np
import pytest
import torch
from architectures import build as small
from figure_overlaps import assert_apart
from planting import assert_caught

from peft_from_scratch.course.pictures import step_picture as pictures
from peft_from_scratch.ledger.experiments import bill
from peft_from_scratch.memory import meta_model
from peft_from_scratch.methods import full

LENGTH = 16


def model(recipe="mixed"):
    torch.manual_seed(0)
    return small("llama", dtype=torch.float32 if recipe == "fp32" else torch.bfloat16)


@pytest.fixture(scope="module")
def seen():
    return pictures.watched(model(), "mixed", LENGTH)


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "mixed"])
def test_the_maxima_are_those_of_the_bill(recipe):
    counted = bill.counted(model(recipe), recipe, length=LENGTH)["bytes"]
    seen = pictures.watched(model(recipe), recipe, LENGTH)
    for kind in ("weights", "gradients", "optimizer"):
        assert seen.series[kind].max() == counted[kind], kind
    assert seen.peak == pytest.approx(counted["peak"], rel=0.02)


def assert_replayed():
    """A meter's own maxima, from the series."""
    subject = model()
    with pictures.Meter(subject) as meter:
        loss = subject(**pictures._tokens(subject, LENGTH)).loss
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


def test_a_step_begins_and_ends_with_weights_and_states_alone(seen):
    for moment in (0, -1):
        assert seen.series["gradients"][moment] == 0
        assert seen.series["optimizer"][moment] == seen.series["optimizer"].max()
    assert seen.phases["forward"] == 0
    assert 0 < seen.phases["backward"] < seen.phases["update"] < len(seen.total)
    assert seen.series["gradients"][seen.phases["backward"]] == 0
    assert (
        seen.series["gradients"][seen.phases["update"]]
        == seen.series["gradients"].max()
    )


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "mixed"])
def test_the_parts_of_a_bill_add_up(recipe):
    counted = bill.counted(model(recipe), recipe, length=LENGTH)
    parts = pictures.parts(counted)
    whole = sum(counted["bytes"][kind] for kind in bill.ROWS)
    assert sum(parts.values()) == pytest.approx(whole)
    scaled = pictures.parts(counted, 7e9)
    size = {"fp32": 16, "bf16": 8, "mixed": 16}[recipe]
    assert sum(scaled.values()) == pytest.approx(7e9 * size, rel=0.01)
    assert bool(parts[pictures.MASTER]) == (recipe == "mixed")


def test_a_ghosts_parts_are_those_of_the_real_model():
    real = model()
    ghost = meta_model.ghost(real.config)
    full.inject(ghost)
    parts = pictures.ghost_parts(meta_model.bill(ghost, "mixed", length=LENGTH))
    expected = pictures.parts(bill.counted(real, "mixed", length=LENGTH))
    for holder, size in expected.items():
        assert parts[holder] == pytest.approx(size, rel=0.02), holder


def test_every_holder_has_a_color():
    assert set(pictures.KINDS) > {"activations", pictures.MASTER, pictures.MOMENTS}
    assert len(set(pictures.KINDS.values())) == len(pictures.KINDS)


def test_the_picture_stacks_to_the_total(seen):
    axes = pictures.picture(seen, title="One step").axes[0]
    top = axes.collections[-1].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(seen.peak / 1e9)
    (mark,) = (line for line in axes.lines if line.get_gid() == "peak")
    assert mark.get_xdata()[0] == int(np.argmax(seen.total))
    names = [text.get_text() for text in axes.texts]
    for name in ("forward", "backward", "update", "weights", "gradients"):
        assert name in names


def test_nothing_overlaps():
    # A layer's name needs a layer as thick as it: these shares are those of a model.
    rise = np.linspace(0, 1, 500)
    series = {
        "weights": np.full(1500, 0.3e9),
        "optimizer": np.full(1500, 1.6e9),
        "gradients": np.concatenate([0 * rise, 0.6e9 * rise, 0.6e9 + 0 * rise]),
        "activations": np.concatenate([0.7e9 * rise, 0.7e9 * (1 - rise), 0 * rise]),
    }
    phases = {"forward": 0, "backward": 500, "update": 1000}
    assert_apart(pictures.picture(pictures.Watched(series, phases), title="One step"))
