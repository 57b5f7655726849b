"""Bills of evaluation, sampling, DPO and groups: identities, and real steps."""

from dataclasses import replace

import pytest
from planting import Bug, each_is_caught, law
from transformers import LlamaConfig

from peft_from_scratch.memory import phases, pieces
from peft_from_scratch.memory.budget import bill
from peft_from_scratch.memory.setups import Setup
from tools import memory_phases
from tools.memory_cells import config_of

CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
DPO = Setup(phase="dpo", batch=2, length=60)
GROUP = Setup(phase="group", group=6, batch=2, length=60, labels=20)


def learning(setup):
    """The moments of a plain step on as many rows, and those of this phase."""
    plain = replace(setup, phase="train", group=None, batch=setup.rows)
    return bill(CONFIG, plain).moments, bill(CONFIG, setup).moments


@law
def a_step_learns_from_all_rows_of_its_phase():
    """A pair is 2 rows, a group G; what comes before does not change the step."""
    for setup, rows in ((DPO, 4), (GROUP, 12)):
        assert setup.rows == rows
        plain, phase = learning(setup)
        first = [name for name in phase if name not in plain]
        assert first and list(phase)[1 : 1 + len(first)] == first
        for name, at in plain.items():
            assert sum(phase[name].values()) == sum(at.values())


@law
def an_adapter_needs_no_second_model():
    """The reference is the model with its adapters off; else what trains, twice."""
    for setup in (DPO, GROUP):
        assert "reference" not in bill(CONFIG, setup).parts
        one = bill(CONFIG, replace(setup, method="full"))
        assert one.parts.get("reference") == 2 * one.weighed.total
        assert one.low <= one.peak - one.parts["reference"]


@law
def keys_and_values_are_those_of_all_answers():
    """2 · layers · kv heads · head size · 2 bytes, for each place of each answer."""
    a_place = 2 * 3 * 2 * 16 * 2
    made = bill(CONFIG, GROUP)
    assert made.parts["keys_and_values"] == 2 * 6 * 60 * a_place
    assert made.moments["prompts"]["keys_and_values"] == 2 * 6 * 40 * a_place
    assert "keys_and_values" not in made.moments["reference"]


@law
def logits_are_those_of_labels():
    for phase, part in (("train", 12), ("dpo", 12), ("evaluate", 10)):
        setup = Setup(phase=phase, batch=3, length=60, labels=20)
        assert bill(CONFIG, setup).parts["logits"] == part * 20 * setup.rows * 1000
    whole = bill(CONFIG, Setup(batch=3, length=60)).parts["logits"]
    assert whole == 12 * 59 * 3 * 1000


@pytest.mark.parametrize("base", ["llama, untied", "gpt2, gelu"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_real_step_peaks_where_its_bill_says(base, method):
    alone = (replace(GROUP, phase=p, group=None) for p in ("evaluate", "generate"))
    for setup in (DPO, GROUP, *alone):
        setup = replace(setup, method=method)
        real = memory_phases.measured(base, setup)
        made = memory_phases.predicted(bill(config_of(base), setup))
        assert made == pytest.approx(real, rel=0.1), setup


def test_what_it_refuses():
    with pytest.raises(ValueError, match="group=3 is for --phase group"):
        Setup(group=3)
    with pytest.raises(ValueError, match="labels=60: allowed is a whole number"):
        Setup(length=60, labels=60)
    with pytest.raises(ValueError, match="phase='ppo'"):
        Setup(phase="ppo")
    with pytest.raises(ValueError, match="has formulas for layers like Llama's"):
        bill(config_of("olmo2"), DPO)


BUGS = {
    "a whole reference beside adapters": Bug(
        pieces.lasting_bytes,
        "recipe.weights * w.own if reads",
        "recipe.weights * w.total if reads",
        an_adapter_needs_no_second_model,
    ),
    "no reference": Bug(
        pieces.lasting_bytes,
        "shared(reference, setup, 3)",
        "0",
        an_adapter_needs_no_second_model,
    ),
    "keys and values of one answer": Bug(
        phases._sampled,
        "a_place = setup.rows",
        "a_place = setup.batch",
        keys_and_values_are_those_of_all_answers,
    ),
    "logits of all tokens": Bug(
        pieces.pieces_of,
        "labels = setup.label_tokens",
        "labels = setup.rows * (setup.length - 1)",
        logits_are_those_of_labels,
    ),
    "half of a pair learns": Bug(
        pieces.step_of,
        "setup.rows,",
        "setup.batch,",
        a_step_learns_from_all_rows_of_its_phase,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS)
