"""A prefix alone; what it shares with a prompt is in test_virtual_tokens.py."""

import copy

import pytest
import torch
from architectures import CONFIGS, GATED, build
from laws.methods.prefix import SMALL, eager
from laws.methods.virtual_tokens import (
    IDS,
    N,
    checkpointing_trains_every_tensor,
    gradients_are_those_of_finite_differences,
    logits_are_those_of_tokens_in_front,
    padded,
    padding_changes_no_logit,
    pieces_through_the_cache_are_one_pass,
    reentrant_checkpointing_changes_no_gradient,
    started,
    the_only,
)
from model_state import largest, logits, refused, tokens, train
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
)

import peft_from_scratch as pfs
from peft_from_scratch.methods import prefix

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_gradients_of_the_mlp_are_those_of_finite_differences(architecture):
    gradients_are_those_of_finite_differences(prefix, architecture, hidden=8)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_piece_that_ends_in_a_rows_padding(architecture):
    pieces_through_the_cache_are_one_pass(prefix, architecture, ends=(4, 5, 10))


def test_checkpointing_trains_the_mlp():
    checkpointing_trains_every_tensor(prefix, "llama", hidden=8)
    reentrant_checkpointing_changes_no_gradient(prefix, hidden=8)


def test_a_start_of_prompts_is_none_of_prefixes():
    model = build("llama")
    with refused(model, "start='vocabulary'"):
        prefix.inject(model, n=2, start="vocabulary")


@pytest.mark.parametrize("hidden", [0, -1, True, 2.0, "8"], ids=str)
def test_a_width_that_is_no_number_of_units_is_refused(hidden):
    model = build("llama")
    with refused(model, f"hidden={hidden!r}"):
        prefix.inject(model, hidden=hidden)


def test_start_and_hidden_exclude_each_other():
    model = build("llama")
    with refused(model, "exclude each other"):
        prefix.inject(model, n=2, start=[5, 6], hidden=8)


# Attention implementations ------------------------------------------------------------


@pytest.mark.parametrize("architecture", CONFIGS)
def test_eager_attention(architecture):
    logits_are_those_of_tokens_in_front(prefix, architecture, eager)
    for side in ("left", "right"):
        padding_changes_no_logit(prefix, architecture, side, eager)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_eager_equals_sdpa(architecture):
    found = []
    for change in (eager, None):
        model, _ = started(prefix, architecture, change=change)
        train(model, 2)
        found.append(logits(model))
    assert largest(*found) < 1e-5


def test_an_unknown_attention_is_refused():
    model = build("llama")
    model.config._attn_implementation = "flex_attention"
    with refused(model, "flex_attention", "sdpa and eager"):
        prefix.inject(model)


def test_an_architecture_that_nobody_named_works():
    torch.manual_seed(0)
    config = GPTNeoXConfig(intermediate_size=48, **SMALL)
    untouched = AutoModelForCausalLM.from_config(config).eval()
    model = copy.deepcopy(untouched)
    prefix.inject(model, n=N, start=IDS)
    front = torch.tensor(IDS).expand(3, -1)
    expected = logits(untouched, torch.cat([front, tokens()], 1))[:, N:]
    assert largest(logits(model), expected) < 1e-5


# The MLP ------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [lambda m: None, prefix.inject, pfs.lora.inject])
def test_dropping_what_is_not_there_is_refused(before):
    model = build("llama")
    before(model)
    with refused(model, "drop_mlp()", "hidden"):
        prefix.drop_mlp(model)


def test_a_prefix_cannot_be_merged_and_says_why():
    model, _ = started(prefix, "llama")
    with refused(model, "prefix", "softmax", error=pfs.CannotMerge):
        pfs.merge(model)


def test_llama_with_as_many_key_heads_as_queries_and_half_precision():
    config = LlamaConfig(**GATED | dict(num_key_value_heads=4))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    prefix.inject(model, n=2)
    _, batch, mask = padded("left")
    out = model(batch, attention_mask=mask, use_cache=False).logits
    assert the_only(model).P.shape == (2, 2 * 2 * 4 * 8) and out.isfinite().all()
