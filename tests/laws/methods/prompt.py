"""Laws of prompt tuning: its start, its cache, its file."""

import pytest
import torch
from architectures import SHARED, build
from model_state import largest, logits, refused, tokens, train
from planting import law
from transformers import AutoModelForCausalLM as Auto
from transformers import OPTConfig

import peft_from_scratch as pfs
from laws.methods.virtual_tokens import (
    IDS,
    N,
    in_front,
    padded,
    started,
    the_only,
)
from peft_from_scratch.methods import prompt

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@law
def a_piece_that_ends_in_a_rows_padding_is_refused():
    """Its prompt would stand in front of padding that the next piece brings."""
    model, _ = started(prompt, "llama")
    _, batch, mask = padded("left")
    with refused(model, "row 1 has 4 tokens of padding"):
        model(batch[:, :4], attention_mask=mask[:, :4])
    asked = dict(attention_mask=mask, max_new_tokens=2, min_new_tokens=2)
    with refused(model, "prefill_chunk_size"):
        model.generate(batch, **asked, prefill_chunk_size=4)
    one_piece = model.generate(batch, **asked, do_sample=False)
    pieces = model.generate(batch, **asked, do_sample=False, prefill_chunk_size=7)
    assert torch.equal(pieces, one_piece)


@law
def the_cache_holds_n_and_the_tokens():
    model, _ = started(prompt, "llama")
    cache = model(tokens(), use_cache=True).past_key_values
    assert cache.get_seq_length() == N + 10
    cache = model(tokens()[:, :1], past_key_values=cache).past_key_values
    assert cache.get_seq_length() == N + 11


@law
def starts_uniform_between_minus_and_plus_one_half():
    model = build("llama")
    prompt.inject(model, n=128, start="random")
    P = the_only(model).P.detach().double()
    assert 0.49 < P.max() <= 0.5 and -0.5 <= P.min() < -0.49
    assert abs(P.mean()) < 5 * (1 / 12) ** 0.5 / P.numel() ** 0.5
    assert abs(P.var() * 12 - 1) < 5 * (0.8 / P.numel()) ** 0.5  # kurtosis 1.8, less 1


@law
def starts_from_rows_of_the_table():
    model = build("gpt2")
    table = model.get_input_embeddings().weight.detach().clone()
    prompt.inject(model, n=40)
    equal = (the_only(model).P[:, None] == table).all(-1)  # (n, vocabulary)
    assert equal.any(-1).all() and len(equal.nonzero()[:, 1].unique()) > 25


def narrow():
    """An OPT whose embeddings are narrower than its layers."""
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        dropout=0.0,
        **SHARED,
    )
    model = Auto.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@law
def embeddings_narrower_than_the_layers(folder):
    model, untouched, loaded = narrow(), narrow(), narrow()
    prompt.inject(model, n=N, start=IDS)
    with torch.no_grad():
        expected = untouched(in_front(tokens())).logits[:, N:]
    assert the_only(model).P.shape == (N, 16)
    assert largest(logits(model), expected) < 1e-5
    train(model, 1)
    pfs.save(model, folder)
    pfs.load(loaded, folder)
    assert torch.equal(logits(loaded), logits(model))
