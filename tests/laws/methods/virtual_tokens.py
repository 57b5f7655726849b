"""Laws of what stands before the tokens: prompts and prefixes, against plain tokens.

Started from token ids, both must equal the model that nobody touched, with these tokens
in front of its input. The reference never sees a mask, a cache of ours, or a shifted
position: it reads one row at a time, without padding.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from architectures import CONFIGS, VOCAB
from model_state import (
    gradients,
    largest,
    logits,
    loss,
    refused,
    tokens,
    train,
    values,
)

import peft_from_scratch as pfs
from laws.core.contract import original
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.core.decoder import positions
from peft_from_scratch.training.generation import generate

IDS = [7, 211, 64, 5]
N = len(IDS)
LENGTHS = (10, 4, 7)  # of the rows of a padded batch
CLOSE = 1e-5


def started(method, architecture, *, start=IDS, n=N, dtype=torch.float32, change=None):
    """(a model that starts from `start`, the untouched one), `change` made to both."""
    untouched = copy.deepcopy(original(architecture, dtype))
    if change:
        change(untouched)
    model = copy.deepcopy(untouched)
    method.inject(model, n=n, start=start)
    return model, untouched


def in_front(ids):
    return torch.cat([torch.tensor(IDS).expand(len(ids), -1), ids], dim=1)


@torch.no_grad()
def reference(untouched, ids, **asked):
    """The logits of `ids` (b, t), read behind IDS."""
    return untouched(in_front(ids), use_cache=False, **asked).logits[:, N:]


def padded(side, front=()):
    """(the rows, their batch, its mask); `front` stands before each row's first."""
    rows = [row[:n] for row, n in zip(tokens(), LENGTHS, strict=True)]
    whole = [torch.cat([torch.tensor(front, dtype=torch.long), row]) for row in rows]
    width = max(map(len, whole))
    batch = [_fill(row, width, side, 9) for row in whole]  # 9: any token may be padding
    mask = [_fill(torch.ones_like(row), width, side, 0) for row in whole]
    return rows, torch.stack(batch), torch.stack(mask)


def _fill(row, width, side, value):
    missing = width - len(row)
    return F.pad(row, (missing, 0) if side == "left" else (0, missing), value=value)


def logits_are_those_of_tokens_in_front(method, architecture, change=None):
    model, untouched = started(method, architecture, change=change)
    expected = reference(untouched, tokens())
    for use_cache in (False, True):
        with torch.no_grad():
            ours = model(tokens(), use_cache=use_cache).logits
        assert largest(ours, expected) < CLOSE
    assert largest(logits(untouched), expected) > 1e-2, "the tokens change nothing"


def padding_changes_no_logit(method, architecture, side="left", change=None):
    model, untouched = started(method, architecture, change=change)
    rows, batch, mask = padded(side)
    with torch.no_grad():
        together = model(batch, attention_mask=mask, use_cache=False).logits
    for row, found, real in zip(rows, together, mask.bool(), strict=True):
        assert largest(found[real], reference(untouched, row[None])[0]) < CLOSE


def pieces_through_the_cache_are_one_pass(
    method, architecture, side="left", ends=(7, 8, 10)
):
    """Three pieces, one of them of a single token; rows of different lengths."""
    model, untouched = started(method, architecture)
    rows, batch, mask = padded(side)
    cache, found, first = None, [], 0
    for end in ends:
        with torch.no_grad():
            out = model(
                batch[:, first:end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
        cache, first = out.past_key_values, end
        found.append(out.logits)
    together = torch.cat(found, 1)
    for row, found, real in zip(rows, together, mask.bool(), strict=True):
        assert largest(found[real], reference(untouched, row[None])[0]) < CLOSE


def pieces_without_a_mask_are_one_pass(method, architecture):
    model, untouched = started(method, architecture)
    with torch.no_grad():
        first = model(tokens()[:, :4], use_cache=True)
        second = model(tokens()[:, 4:], past_key_values=first.past_key_values)
    together = torch.cat([first.logits, second.logits], 1)
    assert largest(together, reference(untouched, tokens())) < CLOSE


WAYS = {
    "greedy": dict(do_sample=False),
    "no cache": dict(do_sample=False, use_cache=False),
    "beams": dict(do_sample=False, num_beams=3),
    "drawn": dict(do_sample=True, top_k=20),
}


def generated_is_what_tokens_in_front_generate(method, architecture, way="greedy"):
    model, untouched = started(method, architecture)
    answers = []
    for which, front in ((model, ()), (untouched, IDS)):
        _, batch, mask = padded("left", front)
        torch.manual_seed(0)
        out = which.generate(
            batch, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, **WAYS[way]
        )
        answers.append(out[:, batch.shape[1] :])
    ours, theirs = answers
    assert ours.shape == (len(LENGTHS), 6) and torch.equal(ours, theirs)


def positions_from_the_caller_are_moved(method, architecture):
    """Every other position: a distance that rotary models see as well."""
    model, untouched = started(method, architecture)
    positions = 2 * torch.arange(10)[None]
    behind = torch.cat([torch.arange(N)[None], N + positions], 1)
    mask = torch.ones(3, N + 10)  # else transformers takes a gap for a packed row's end
    with torch.no_grad():
        ours = model(
            tokens(),
            attention_mask=mask[:, N:],
            position_ids=positions,
            use_cache=False,
        ).logits
    asked = dict(attention_mask=mask, position_ids=behind)
    assert largest(ours, reference(untouched, tokens(), **asked)) < CLOSE
    assert largest(ours, logits(model)) > 1e-3


def vectors_in_the_place_of_ids_are_the_same(method, architecture):
    model, untouched = started(method, architecture)
    vectors = untouched.get_input_embeddings()(tokens())
    with torch.no_grad():
        out = model(inputs_embeds=vectors, use_cache=False).logits
    assert torch.equal(out, logits(model))


def what_leaves_has_the_callers_length(method, architecture):
    """Hidden states, as a dict and as a tuple; some logits; and the loss by hand."""
    model, untouched = started(method, architecture)
    asked = dict(use_cache=False, output_hidden_states=True)
    with torch.no_grad():
        theirs = untouched(in_front(tokens()), **asked).hidden_states
        ours = model(tokens(), **asked)
        as_tuple = model(tokens(), return_dict=False, **asked)
        last = model(tokens(), logits_to_keep=3, use_cache=False).logits
    assert len(ours.hidden_states) == len(theirs)
    for found, expected in zip(ours.hidden_states, theirs, strict=True):
        assert largest(found, expected[:, N:]) < CLOSE
    assert torch.equal(as_tuple[0], ours.logits)
    assert all(map(torch.equal, as_tuple[1], ours.hidden_states))
    assert largest(last, ours.logits[:, -3:]) < CLOSE


def the_loss_is_that_of_the_callers_labels(method, architecture):
    model, untouched = started(method, architecture)
    labels = tokens().clone()
    labels[:, :4] = -100
    with torch.no_grad():
        ours = model(tokens(), labels=labels, use_cache=False).loss
    expected = F.cross_entropy(
        reference(untouched, tokens())[:, :-1].mT, labels[:, 1:], ignore_index=-100
    )
    assert abs(ours / expected - 1) < CLOSE


def gradients_are_those_of_finite_differences(method, architecture="gpt2", **how):
    """Along random directions, every trained tensor at once, in float64."""
    model = copy.deepcopy(original(architecture, torch.float64))
    method.inject(model, n=2, **how)
    parameters = list(pfs.trainable(model).values())
    _, batch, mask = padded("left")

    def f():
        out = model(batch, attention_mask=mask, use_cache=False).logits
        return (out * mask[..., None]).square().mean()

    grads = torch.autograd.grad(f(), parameters)
    for seed in range(4):
        torch.manual_seed(seed)
        way = [torch.randn_like(p) for p in parameters]
        step, ends = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, way, strict=True):
                    p += sign * step * d
                ends.append(f().item())
                for p, d in zip(parameters, way, strict=True):
                    p -= sign * step * d
        slope = sum((g * d).sum().item() for g, d in zip(grads, way, strict=True))
        assert abs((ends[0] - ends[1]) / (2 * step) - slope) < 1e-6 * abs(slope)


def checkpointing_trains_every_tensor(method, architecture, **how):
    """Frozen embeddings, recomputed layers: what trains must not stand still."""
    model = copy.deepcopy(original(architecture))
    method.inject(model, n=3, **how)
    model.gradient_checkpointing_enable()
    before = values(model)
    train(model, 2)
    for name, tensor in values(model).items():
        assert not torch.equal(tensor, before[name]), f"{name} did not move"


def masks_that_are_not_of_two_dimensions_are_refused(method, architecture):
    model, _ = started(method, architecture)
    with refused(model, "of 4 dimensions", "(batch, tokens)"):
        model(tokens(), attention_mask=torch.ones(3, 1, 10, 10))
    with refused(model, "a dict"):
        model(tokens(), attention_mask={"full_attention": torch.ones(3, 10)})


def ids_are_repeated_or_cut_to_n(method):
    """With n=3 [5, 6] is [5, 6, 5], and [5, 6, 5, 9] too; a tensor is a list."""
    found = []
    for start in ([5, 6], [5, 6, 5, 9], (5, 6, 5), torch.tensor([5, 6])):
        model, _ = started(method, "llama", start=start, n=3)
        found.append(next(iter(values(model).values())))
    assert all(torch.equal(P, found[0]) and len(P) == 3 for P in found)
    assert not torch.equal(found[0][0], found[0][1])


def half_precision_keeps_P_in_fp32(method):
    model = copy.deepcopy(original("llama", torch.bfloat16))
    method.inject(model, n=3)
    before = values(model)
    optimizer = torch.optim.Adam(pfs.trainable(model).values(), lr=1e-4)
    loss(model).backward()
    optimizer.step()
    assert logits(model).dtype == torch.bfloat16
    for name, parameter in pfs.trainable(model).items():
        assert parameter.dtype == torch.float32
        assert (parameter != before[name]).double().mean() > 0.9


def a_cache_filled_without_it_is_refused(method, architecture):
    """By the plain model, or by the same model with another adapter in front."""
    model, untouched = started(method, architecture)
    another, _ = started(method, architecture, start=[9], n=N)
    first, second = tokens()[:, :4], tokens()[:, 4:]
    for stranger in (untouched, another):
        with torch.no_grad():
            cache = stranger(first, use_cache=True).past_key_values
        with refused(model, "DynamicCache", "was not filled by this model"):
            model(second, past_key_values=cache)


def a_copied_cache_goes_on(method, architecture):
    """Read by a copy of the model, after the cache was reset and filled again."""
    model, untouched = started(method, architecture)
    with torch.no_grad():
        cache = model(tokens(seed=5)[:, :6], use_cache=True).past_key_values
        cache.reset()
        model(tokens()[:, :4], past_key_values=cache)
        out = copy.deepcopy(model)(
            tokens()[:, 4:], past_key_values=copy.deepcopy(cache)
        )
    assert largest(out.logits, reference(untouched, tokens())[:, 4:]) < CLOSE


def a_conversation_goes_on_from_its_cache(method, architecture):
    """The new tokens with the mask of all: what no cache answers."""
    model, _ = started(method, architecture)
    asked = dict(do_sample=False, max_new_tokens=4, min_new_tokens=4)
    ids = tokens(rows=1)
    turn = model.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **asked
    )
    talk = torch.cat([turn.sequences, tokens(rows=1, seed=2)], 1)
    asked |= dict(attention_mask=torch.ones_like(talk))
    known, cache = turn.sequences.shape[1] - 1, turn.past_key_values
    found = model.generate(talk[:, known:], past_key_values=cache, **asked)
    assert torch.equal(found[:, -4:], model.generate(talk, **asked)[:, -4:])


def masks_of_another_length_are_refused(method, architecture):
    model, _ = started(method, architecture)
    with refused(model, "12 columns", "0 tokens", "10 are new"):
        model(tokens(), attention_mask=torch.ones(3, 12))
    with torch.no_grad():
        cache = model(tokens()[:, :6], use_cache=True).past_key_values
    with refused(model, "4 columns", "6 tokens", "4 are new", "past_key_values"):
        model(tokens()[:, 6:], attention_mask=torch.ones(3, 4), past_key_values=cache)


def any_number_but_zero_is_a_real_token(method, architecture):
    """transformers reads masks so; some collators number their rows there."""
    model, _ = started(method, architecture)
    _, batch, mask = padded("left")
    with torch.no_grad():
        found = [
            model(batch, attention_mask=each, use_cache=False).logits[mask == 1]
            for each in (mask, 2 * mask, mask.bool(), mask.float())
        ]
    assert all(torch.equal(each, found[0]) for each in found)


def a_full_length_counts_n(method):
    """A table of 256 positions holds N and 252 tokens, and no 253rd."""
    model, untouched = started(method, "gpt2")
    ids = tokens(1, 253)
    with torch.no_grad():
        whole = model(ids[:, :252], use_cache=True)
    assert largest(whole.logits, reference(untouched, ids[:, :252])) < CLOSE
    message = ("253 tokens and 4 positions", "are 257", "has 256", "252 tokens")
    with refused(model, *message):
        model(ids)
    with refused(model, *message):
        model(ids[:, 252:], past_key_values=whole.past_key_values)
    with refused(model, "has 252 positions", "4 are those of"):
        generate(model, None, [[7] * 240], stop_id=2, max_new_tokens=13)
    assert positions(model) == 252 and positions(untouched) == 256


def rotary_positions_do_not_end(method):
    """A model that computes its positions reads on, as it does without an adapter."""
    model, untouched = started(method, "llama")
    ids = tokens(1, 256)
    assert largest(logits(model, ids), reference(untouched, ids)) < CLOSE


def guessed_tokens_change_no_answer(method):
    """Assisted decoding puts wrong guesses into the cache and takes them out again."""
    model, _ = started(method, "llama")
    ids = tokens(1, 4).repeat(1, 3)
    asked = dict(attention_mask=torch.ones_like(ids), do_sample=False)
    asked |= dict(max_new_tokens=8, min_new_tokens=8)
    guessed = model.generate(ids, prompt_lookup_num_tokens=3, **asked)
    assert torch.equal(guessed, model.generate(ids, **asked))


def reentrant_checkpointing_changes_no_gradient(method, **how):
    """A layer that runs again in backward finds nothing that another has freed."""
    found = []
    for reentrant in (None, False, True):
        model = copy.deepcopy(original("llama"))
        torch.manual_seed(0)
        method.inject(model, n=3, **how)
        model.enable_input_require_grads()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found.append(gradients(model.train()))
    assert all(largest(each, found[0]) < CLOSE for each in found)
    assert all(gradient.any() for gradient in found[0].values())


def a_replica_equals_the_model(method):
    """What DataParallel runs on each device: no parameters, tensors in their place."""
    model, _ = started(method, "llama")
    _, batch, mask = padded("left")
    copied = replica(model)
    assert not list(copied.parameters())
    for asked in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            found = copied(batch, use_cache=False, **asked).logits
            assert torch.equal(found, model(batch, use_cache=False, **asked).logits)


def replica(model):
    """The model as torch.nn.parallel.replicate leaves it, on the same device."""
    copies = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module, copied in copies.items():
        for name, child in module._modules.items():
            setattr(copied, name, copies.get(child))
        for name, p in module._parameters.items():
            setattr(copied, name, p if p is None else p.clone())
        copied._buffers = dict(module._buffers)
    return copies[model]


def compiled_pieces_equal_eager_ones(method):
    model, _ = started(method, "llama")
    _, batch, mask = padded("left")
    torch._dynamo.reset()
    compiled, found = torch.compile(model, backend="eager"), []
    for which in (model, compiled):
        cache, outs = None, []
        for part in (slice(0, 8), slice(8, 10)):
            with torch.no_grad():
                out = which(
                    batch[:, part],
                    attention_mask=mask[:, : part.stop],
                    past_key_values=cache,
                    use_cache=True,
                )
            cache = out.past_key_values
            outs.append(out.logits)
        found.append(torch.cat(outs, 1))
    assert largest(*found) < CLOSE


ON_ALL = [  # (method, architecture)
    a_cache_filled_without_it_is_refused,
    a_copied_cache_goes_on,
    a_conversation_goes_on_from_its_cache,
    masks_of_another_length_are_refused,
    any_number_but_zero_is_a_real_token,
    logits_are_those_of_tokens_in_front,
    pieces_without_a_mask_are_one_pass,
    positions_from_the_caller_are_moved,
    vectors_in_the_place_of_ids_are_the_same,
    what_leaves_has_the_callers_length,
    the_loss_is_that_of_the_callers_labels,
    checkpointing_trains_every_tensor,
    masks_that_are_not_of_two_dimensions_are_refused,
]
ON_BOTH_SIDES = [padding_changes_no_logit, pieces_through_the_cache_are_one_pass]
EVERY_WAY = [("greedy", architecture) for architecture in CONFIGS]
EVERY_WAY += [
    (way, name) for way in WAYS if way != "greedy" for name in ("llama", "opt")
]
ONCE = [
    ids_are_repeated_or_cut_to_n,
    half_precision_keeps_P_in_fp32,
    a_full_length_counts_n,
    rotary_positions_do_not_end,
    guessed_tokens_change_no_answer,
    reentrant_checkpointing_changes_no_gradient,
    a_replica_equals_the_model,
    compiled_pieces_equal_eager_ones,
]
NUMBERS = [0, -1, True, None, 2.0, "4", 256, 4097, 10**30]  # n; 256 positions in all
STARTS = [[], [-1], [VOCAB], [1.5], [True], [[1, 2]], [[1, 2], [3]], ["a"], [10**30]]
STARTS += ["words", 5, None, {"a": 1}, torch.tensor([[1]])]


def by_name(rows):
    return [pytest.param(row, id=row.__name__) for row in rows]


def the_only(model):
    (adapter,) = adapters(model).values()
    return adapter
