"""Laws of the attention in training, and bugs planted in attention.py."""

import pytest
import torch
from architectures import build
from model_state import assert_same, snapshot
from planting import Bug, each_is_caught, law
from small_runs import TASK, TOKENIZER, adapted, recipe, run

from peft_from_scratch.core import adapter
from peft_from_scratch.memory import meter
from peft_from_scratch.methods import prefix
from peft_from_scratch.training import attention
from peft_from_scratch.training.packing import Packing


class Stop(Exception):
    pass


def attention_of(model, settings=None):
    """The attention during the steps of a run; afterwards it is the caller's again."""
    seen, before = set(), model.config._attn_implementation
    run(
        model,
        settings or recipe(steps=3),
        on_step=lambda _: seen.add(model.config._attn_implementation),
    )
    assert model.config._attn_implementation == before
    (name,) = seen
    return name


@law
def short_sequences_in_bfloat16_are_written_out(monkeypatch):
    half = dict(dtype=torch.bfloat16)
    assert attention_of(adapted(**half)) == "eager"
    assert attention_of(adapted()) == "sdpa"
    with monkeypatch.context() as patch:
        patch.setattr(attention, "SHORT", 100)  # a pack of the first step has 120
        assert attention_of(adapted(**half)) == "sdpa"
    full = adapted("full", "gpt2")
    assert attention_of(full, recipe(steps=3, autocast="bfloat16")) == "eager"


@law
def it_ends_with_the_run():
    """By an error, too, and for the bytes of a step."""
    model = adapted(dtype=torch.bfloat16)
    before = snapshot(model)
    meter.measured_step(model, TOKENIZER, TASK, recipe())
    assert_same(snapshot(model), before)

    def stop(_):
        raise Stop

    with pytest.raises(Stop):
        run(model, recipe(), on_step=stop)
    assert model.config._attn_implementation == "sdpa"


@law
def the_bytes_are_those_of_the_run(monkeypatch):
    written = meter.measured_step(
        adapted(dtype=torch.bfloat16), TOKENIZER, TASK, recipe()
    )
    monkeypatch.setattr(attention, "SHORT", 0)
    fused = meter.measured_step(
        adapted(dtype=torch.bfloat16), TOKENIZER, TASK, recipe()
    )
    assert written.activations > fused.activations


def test_another_attention_stays():
    model = adapted(dtype=torch.bfloat16)
    model.set_attn_implementation("eager")
    assert attention_of(model) == "eager"
    model = build("llama", dtype=torch.bfloat16)
    prefix.inject(model, n=3)
    assert attention_of(model, recipe(steps=3, lr=0.1)) == prefix.NAMES["sdpa"]


def test_training_goes_the_same_way(monkeypatch):
    ends = []
    for longest in (256, 0):
        monkeypatch.setattr(attention, "SHORT", longest)
        model = adapted(dtype=torch.bfloat16, dropout=0)
        ends.append(run(model, recipe(steps=8)).loss)
    assert ends[0] == pytest.approx(ends[1], rel=0.02) and ends[0] != ends[1]
    assert all(p.dtype == torch.float32 for p in adapter.trainable(model).values())


WRITTEN = attention.written_out
LAW = short_sequences_in_bfloat16_are_written_out

BUGS = {
    "in float32": Bug(WRITTEN, "dtype == torch.bfloat16", "True", LAW),
    "masters forgotten": Bug(WRITTEN, "if config.autocast else", "if False else", LAW),
    "however long": Bug(WRITTEN, "longest <= SHORT", "True", LAW),
    "packs not looked at": Bug(Packing.length, "return shared +", "return 0 *", LAW),
    "never": Bug(WRITTEN, "not (slow and", "not (False and", LAW),
    "it stays": Bug(
        WRITTEN,
        "base.set_attn_implementation(before)",
        "pass",
        it_ends_with_the_run,
    ),
    "bytes of another step": Bug(
        meter.measured_step,
        "written_out(model, config, packing, [*rows, *validation], steps[0]),",
        "",
        the_bytes_are_those_of_the_run,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
