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
from model_state import largest, logits, loss, refused, tokens, train, values

import peft_from_scratch as pfs
from laws.core.contract import original
from peft_from_scratch.core.adapter import adapters

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


ON_ALL = [  # (method, architecture)
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
ONCE = [ids_are_repeated_or_cut_to_n, half_precision_keeps_P_in_fp32]
NUMBERS = [0, -1, True, None, 2.0, "4", 256, 4097, 10**30]  # n; 256 positions in all
STARTS = [[], [-1], [VOCAB], [1.5], [True], [[1, 2]], [[1, 2], [3]], ["a"], [10**30]]
STARTS += ["words", 5, None, {"a": 1}, torch.tensor([[1]])]


def by_name(rows):
    return [pytest.param(row, id=row.__name__) for row in rows]


def the_only(model):
    (adapter,) = adapters(model).values()
    return adapter
