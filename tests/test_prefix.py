"""A prefix is the keys and values of tokens: against these tokens, and its own laws."""

import copy

import pytest
import torch
from adapter_files import parsed
from architectures import CONFIGS, GATED, SHARED, build
from in_front import (
    EVERY_WAY,
    IDS,
    NUMBERS,
    ON_ALL,
    ON_BOTH_SIDES,
    ONCE,
    STARTS,
    N,
    by_name,
    checkpointing_trains_every_tensor,
    generated_is_what_tokens_in_front_generate,
    gradients_are_those_of_finite_differences,
    logits_are_those_of_tokens_in_front,
    padded,
    padding_changes_no_logit,
    pieces_through_the_cache_are_one_pass,
    started,
    the_only,
)
from laws import original
from observe import assert_same, largest, logits, refused, snapshot, tokens, train
from planting import law
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
)

import peft_from_scratch as pfs
from peft_from_scratch.methods import prefix

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def eager(model):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("law", by_name(ON_ALL))
@pytest.mark.parametrize("architecture", CONFIGS)
def test_law(law, architecture):
    law(prefix, architecture)


@pytest.mark.parametrize("law", by_name(ON_BOTH_SIDES))
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_law_with_padding(law, architecture, side):
    law(prefix, architecture, side)


@pytest.mark.parametrize("way, architecture", EVERY_WAY)
def test_generated(way, architecture):
    generated_is_what_tokens_in_front_generate(prefix, architecture, way)


@pytest.mark.parametrize("law", by_name(ONCE))
def test_once(law):
    law(prefix)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
@pytest.mark.parametrize("hidden", [None, 8])
def test_gradients(architecture, hidden):
    gradients_are_those_of_finite_differences(prefix, architecture, hidden=hidden)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_piece_that_ends_in_a_rows_padding(architecture):
    pieces_through_the_cache_are_one_pass(prefix, architecture, ends=(4, 5, 10))


def test_checkpointing_trains_the_mlp():
    checkpointing_trains_every_tensor(prefix, "llama", hidden=8)


@pytest.mark.parametrize("n", NUMBERS, ids=str)
def test_an_n_out_of_range_is_refused(n):
    model = build("gpt2")
    with refused(model, f"n={n!r}", "1 to 255"):
        prefix.inject(model, n=n)


@pytest.mark.parametrize("start", [*STARTS, "vocabulary"], ids=str)
def test_a_start_that_is_no_list_of_ids_is_refused(start):
    model = build("llama")
    with refused(model, f"start={start!r}"):
        prefix.inject(model, n=2, start=start)


@pytest.mark.parametrize("hidden", [0, -1, True, 2.0, "8"], ids=str)
def test_a_width_that_is_no_number_of_units_is_refused(hidden):
    model = build("llama")
    with refused(model, f"hidden={hidden!r}"):
        prefix.inject(model, hidden=hidden)


def test_start_and_hidden_exclude_each_other():
    model = build("llama")
    with refused(model, "exclude each other"):
        prefix.inject(model, n=2, start=[5, 6], hidden=8)


# What it is made of -------------------------------------------------------------------


@law
@pytest.mark.parametrize("architecture", CONFIGS)
def P_lies_by_token_layer_keys_and_values(architecture="llama"):
    """Row i: of each layer the keys of token i by heads, then its values."""
    model, untouched = started(prefix, architecture)
    with torch.no_grad():
        cache = untouched(torch.tensor([IDS]), use_cache=True).past_key_values
    row = [
        torch.cat([side[0, :, i].flatten() for side in (layer.keys, layer.values)])
        for i in range(N)
        for layer in cache.layers
    ]
    expected = torch.stack(row).view(N, -1)
    assert torch.equal(the_only(model).P, expected)


@law
def starts_near_zero_at_random():
    model = build("llama")
    prefix.inject(model, n=128)
    P = the_only(model).P.detach().double()
    assert abs(P.std() / 0.02 - 1) < 5 / (2 * P.numel()) ** 0.5
    assert abs(P.mean()) < 5 * 0.02 / P.numel() ** 0.5


@law
def the_cache_holds_the_tokens_alone():
    model, _ = started(prefix, "llama")
    cache = model(tokens(), use_cache=True).past_key_values
    assert cache.get_seq_length() == 10
    assert all(layer.keys.shape[2] == 10 for layer in cache.layers)


@law
def a_sliding_window_never_hides_P():
    """One layer, a window of 4: the 20th token reads P there or not at all."""
    torch.manual_seed(0)
    config = MistralConfig(**GATED | dict(num_hidden_layers=1, sliding_window=4))
    model = AutoModelForCausalLM.from_config(config).eval()
    prefix.inject(model, n=2)
    model(tokens(1, 20), use_cache=False).logits[0, -1].sum().backward()
    assert the_only(model).P.grad.abs().min() > 0


@law
def a_start_may_be_longer_than_the_window():
    """A cache of that model would forget the first of these tokens."""
    config = MistralConfig(**GATED | dict(sliding_window=4))
    model = AutoModelForCausalLM.from_config(config).eval()
    prefix.inject(model, n=7, start=list(range(10, 17)))
    assert len(the_only(model).P) == 7
    assert logits(model).isfinite().all()


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


@law
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def remove_restores_the_attention(implementation):
    model = build("gpt2")
    model.set_attn_implementation(implementation)
    before, expected = snapshot(model), logits(model)
    prefix.inject(model, n=2)
    pfs.remove(model)
    assert model.config._attn_implementation == implementation
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model), expected)


@law
def another_attention_after_the_injection_is_noticed():
    """It takes no prefix, and would answer as if there were none."""
    model, _ = started(prefix, "llama")
    expected = logits(model)
    model.set_attn_implementation("eager")
    with refused(model, "'eager' was set after", "remove()"):
        logits(model)
    pfs.remove(model)
    prefix.inject(model, n=N, start=IDS)
    assert largest(logits(model), expected) < 1e-5


def test_an_unknown_attention_is_refused():
    model = build("llama")
    model.config._attn_implementation = "flex_attention"
    with refused(model, "flex_attention", "sdpa and eager"):
        prefix.inject(model)


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **SHARED)
DEAF = {
    "gptj": GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **SHARED),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SHARED),
    "falcon": FalconConfig(**SMALL),
}


@law
@pytest.mark.parametrize("name", DEAF)
def a_model_that_would_ignore_it_is_refused(name="bloom"):
    config = copy.deepcopy(DEAF[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    trunk = type(model.transformer).__name__
    with refused(model, trunk, "in silence", "0 of 2 layers"):
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


@law
def the_mlp_is_its_equation():
    """P = W2 tanh(W1 E + b1) + b2"""
    model = copy.deepcopy(original("opt"))
    prefix.inject(model, n=3, hidden=8)
    train(model, 1)
    p = {name.rpartition("mlp.")[2]: t for name, t in pfs.trainable(model).items()}
    E = p.pop("E")
    W1, b1, W2, b2 = p.values()
    P = torch.tanh(E @ W1.T + b1) @ W2.T + b2
    assert largest(the_only(model).states().flatten(1), P) < 1e-6


@law
def dropping_the_mlp_keeps_what_it_made(folder):
    model = copy.deepcopy(original("llama"))
    prefix.inject(model, n=3, hidden=8)
    train(model, 2)
    expected = logits(model)
    pfs.save(model, folder)
    tensors, _, config = parsed(folder)
    states = the_only(model).states().detach().flatten(1)
    assert_same(tensors, {"prompt_embeddings": states})
    assert config["prefix_projection"] is False
    loaded = copy.deepcopy(original("llama"))
    pfs.load(loaded, folder)
    assert torch.equal(logits(loaded), expected)
    prefix.drop_mlp(model)
    assert torch.equal(logits(model), expected)
    assert_same({"P": the_only(model).P.detach()}, {"P": states})
    assert len(pfs.trainable(model)) == 1
    train(model, 1)
    assert largest(logits(model), expected) > 1e-3


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
