"""A soft prompt is tokens in front: against the same tokens, and its own start."""

import pytest
from architectures import CONFIGS, build
from laws.methods.virtual_tokens import (
    EVERY_WAY,
    NUMBERS,
    ON_ALL,
    ON_BOTH_SIDES,
    ONCE,
    STARTS,
    by_name,
    generated_is_what_tokens_in_front_generate,
    gradients_are_those_of_finite_differences,
    started,
)
from model_state import refused

import peft_from_scratch as pfs
from peft_from_scratch.methods import prompt

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("law", by_name(ON_ALL))
@pytest.mark.parametrize("architecture", CONFIGS)
def test_each_law_holds(law, architecture):
    law(prompt, architecture)


@pytest.mark.parametrize("law", by_name(ON_BOTH_SIDES))
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_law_holds_with_padding(law, architecture, side):
    law(prompt, architecture, side)


@pytest.mark.parametrize("way, architecture", EVERY_WAY)
def test_what_is_generated(way, architecture):
    generated_is_what_tokens_in_front_generate(prompt, architecture, way)


@pytest.mark.parametrize("law", by_name(ONCE))
def test_each_law_of_one_model_holds(law):
    law(prompt)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_gradients_are_those_of_finite_differences(architecture):
    gradients_are_those_of_finite_differences(prompt, architecture)


@pytest.mark.parametrize("n", NUMBERS, ids=str)
def test_an_n_out_of_range_is_refused(n):
    model = build("gpt2")
    with refused(model, f"n={n!r}", "1 to 255"):
        prompt.inject(model, n=n)


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_a_start_that_is_no_list_of_ids_is_refused(start):
    model = build("llama")
    with refused(model, f"start={start!r}"):
        prompt.inject(model, n=2, start=start)


def test_a_prompt_cannot_be_merged_and_says_why():
    model, _ = started(prompt, "llama")
    with refused(model, "soft prompt", "positions", error=pfs.CannotMerge):
        pfs.merge(model)
