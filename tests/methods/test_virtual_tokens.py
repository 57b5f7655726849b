"""Prompts and prefixes are tokens in front: the laws that both keep, on both."""

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
)
from model_state import refused

from peft_from_scratch.methods import prefix, prompt

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.parametrize("method", [prompt, prefix], ids=["prompt", "prefix"]),
]


@pytest.mark.parametrize("law", by_name(ON_ALL))
@pytest.mark.parametrize("architecture", CONFIGS)
def test_each_law_holds(method, law, architecture):
    law(method, architecture)


@pytest.mark.parametrize("law", by_name(ON_BOTH_SIDES))
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_law_holds_with_padding(method, law, architecture, side):
    law(method, architecture, side)


@pytest.mark.parametrize("way, architecture", EVERY_WAY)
def test_what_is_generated(method, way, architecture):
    generated_is_what_tokens_in_front_generate(method, architecture, way)


@pytest.mark.parametrize("law", by_name(ONCE))
def test_each_law_of_one_model_holds(method, law):
    law(method)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_gradients_are_those_of_finite_differences(method, architecture):
    gradients_are_those_of_finite_differences(method, architecture)


@pytest.mark.parametrize("n", NUMBERS, ids=str)
def test_an_n_out_of_range_is_refused(method, n):
    model = build("gpt2")
    with refused(model, f"n={n!r}", "1 to 255"):
        method.inject(model, n=n)


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_a_start_that_is_no_list_of_ids_is_refused(method, start):
    model = build("llama")
    with refused(model, f"start={start!r}"):
        method.inject(model, n=2, start=start)
