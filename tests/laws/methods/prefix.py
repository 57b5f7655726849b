"""Laws of prefix tuning: keys and values that stand before the tokens'."""

import copy

import pytest
import torch
from adapter_files import parsed
from architectures import CONFIGS, GATED, SHARED, build
from model_state import assert_same, largest, logits, refused, snapshot, tokens, train
from planting import law
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DataCollatorWithFlattening,
    FalconConfig,
    GPTJConfig,
    MistralConfig,
)

import peft_from_scratch as pfs
from laws.core.contract import original
from laws.methods.virtual_tokens import (
    IDS,
    N,
    reference,
    started,
    the_only,
)
from peft_from_scratch.methods import prefix

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def eager(model):
    model.set_attn_implementation("eager")


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


@law
def packed_rows_each_see_it():
    """The loss of rows that are packed by position_ids is that of the rows alone."""
    model, untouched = started(prefix, "llama")
    rows = [row[:n] for row, n in zip(tokens(), (10, 4, 7), strict=True)]
    packed = DataCollatorWithFlattening(return_tensors="pt")(
        [{"input_ids": row.tolist()} for row in rows]
    )
    with torch.no_grad():
        found = model(**packed, use_cache=False).logits[0]
    expected = [reference(untouched, row[None])[0] for row in rows]
    assert largest(found, torch.cat(expected)) < 1e-5


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
