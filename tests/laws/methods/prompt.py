"""Laws of prompt tuning: its start, its cache, its file."""

import copy

import pytest
import torch
from architectures import SHARED, build
from model_state import largest, logits, refused, tokens, train
from planting import law
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    DataCollatorWithFlattening,
    MambaConfig,
    OPTConfig,
    StaticCache,
)

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
from peft_from_scratch.training.generation import generate

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


@law
def whole_texts_with_a_cache_are_refused():
    """generate() would cut off as many tokens as the cache holds, N too many."""
    model, _ = started(prompt, "llama")
    asked = dict(do_sample=False, max_new_tokens=4, min_new_tokens=4)
    for rows, more in ((1, 10), (2, N + 1), (2, N)):
        ids = tokens(rows=rows)
        mask = torch.ones_like(ids)
        turn = model.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, **asked
        )
        talk = torch.cat([turn.sequences, tokens(rows, more, seed=2)], 1)
        for padding in (0, 1):
            mask = torch.ones_like(talk)
            mask[0, 0] -= padding  # transformers drops a mask without padding
            with refused(model, "the cache holds 13 tokens", "generate(ids[:, k:]"):
                model.generate(
                    talk,
                    attention_mask=mask,
                    past_key_values=copy.deepcopy(turn.past_key_values),
                    **asked,
                )


@law
def packed_rows_are_refused():
    """However they are packed: only the first row would see P."""
    model, _ = started(prompt, "llama")
    ids, places = tokens(rows=1), torch.tensor([[*range(4), *range(6)]])
    with refused(model, "position_ids without attention_mask", "packed"):
        model(ids, position_ids=places)
    rows = [{"input_ids": row.tolist()} for row in tokens()]
    batch = DataCollatorWithFlattening(return_tensors="pt")(rows)
    with refused(model, "packed", "Pad the rows"):
        model(**batch, use_cache=False)
    with refused(model, "cu_seq_lens_q"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 4, 10]))
    with refused(model, "seq_idx"):
        model(ids, seq_idx=torch.zeros_like(ids))


@law
def arguments_with_one_value_a_token_are_refused():
    """There is no such value for P: not the type of a segment, nor anything else."""
    model, _ = started(prompt, "gpt2")
    with refused(model, "token_type_ids", "each of the 10 tokens"):
        model(tokens(), token_type_ids=torch.zeros_like(tokens()))
    model, _ = started(prompt, "llama")
    with refused(model, "cache_position"):
        model(tokens(), cache_position=torch.arange(10))


@law
def a_cache_of_fixed_length_has_room_for_P():
    model, untouched = started(prompt, "llama")
    expected = logits(untouched, in_front(tokens()))[:, N:]
    roomy = StaticCache(model.config, max_cache_len=N + 10)
    with torch.no_grad():
        found = model(tokens(), past_key_values=roomy).logits
    assert largest(found, expected) < 1e-5
    with refused(model, "has 13 places", "takes 4", "tokens so far 10"):
        model(tokens(), past_key_values=StaticCache(model.config, max_cache_len=13))


@law
def a_state_that_counts_no_tokens_goes_on():
    """Mamba keeps one state, called cache_params; P enters it once."""
    model, untouched = state_space(), state_space()
    prompt.inject(model, n=N, start=IDS)
    expected = logits(untouched, in_front(tokens()))[:, N:]
    assert largest(logits(model), expected) < 1e-5
    with torch.no_grad():
        first = model(tokens()[:, :9], use_cache=True)
        last = model(tokens()[:, 9:], cache_params=first.cache_params, use_cache=True)
    together = torch.cat([first.logits, last.logits], 1)
    assert largest(together, expected) < 1e-5
    asked = dict(do_sample=False, max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
    ours = model.generate(tokens(), **asked)[:, 10:]
    assert torch.equal(
        ours, untouched.generate(in_front(tokens()), **asked)[:, 10 + N :]
    )
    with torch.no_grad():
        strange = untouched(tokens(), use_cache=True).cache_params
    with refused(model, "was not filled by this model"):
        model(tokens()[:, 9:], cache_params=strange)


@law
def a_model_without_heads_is_saved(folder):
    model, loaded = state_space(), state_space()
    prompt.inject(model, n=N, start=IDS)
    pfs.save(model, folder)
    pfs.load(loaded, folder)
    assert torch.equal(logits(loaded), logits(model))


@law
def pads_and_P_do_not_push_tokens_out_of_a_window():
    """A cached prefix, pads and P together are longer than the window."""
    model = build("gemma")
    prompt.inject(model, n=16)
    window = model.config.sliding_window
    common, new = tokens(1, window - 24)[0].tolist(), 6
    rows = [row.tolist() for row in (*tokens(2, 2), *tokens(2, 14, seed=2))]
    asked = dict(stop_id=2, max_new_tokens=new)
    together = generate(model, Numbers, rows, prefix=common, batch=4, **asked)
    alone = [generate(model, Numbers, [common + row], **asked)[0] for row in rows]
    assert together == alone and len(set(alone)) > 1


class Numbers:
    """A tokenizer whose text is the ids."""

    def decode(ids, skip_special_tokens):
        return " ".join(map(str, ids))


def state_space():
    torch.manual_seed(0)
    config = MambaConfig(
        hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=4, **SHARED
    )
    model = Auto.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


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
