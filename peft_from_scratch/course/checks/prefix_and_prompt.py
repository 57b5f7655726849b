"""What the exercises of notebook 12, prefix and prompt tuning, are compared with.

A prompt is compared with methods/prompt.py in small models that are padded on either
side, and an attention head with the function that methods/prefix.py registers. Which
vectors stay is judged by what is demanded of them: every choice that meets it passes.

The library_… functions are the library's own answers, for a lesson to go on with.
"""

import copy
import itertools
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from ...core.adapter import adapters
from ...methods import prefix, prompt
from . import Wrong, close, judged, pulled, unchanged

VOCABULARY = 50
TOKENS = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0)
KEPT = "what the call before returned: something is kept from call to call"
BEFORE = "what was returned before"
SIDES = {"left": "padded on the left", "right": "padded on the right"}

# 12.1 ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Rows of different lengths before a frozen model, and a P for it."""

    name: str
    model: nn.Module
    P: Tensor  # (n, d)
    input_ids: Tensor  # (b, t)
    mask: Tensor  # (b, t)
    training: bool = False  # whether the model is in training, without any dropout

    @property
    def real(self) -> Tensor:
        return self.mask.bool()

    def __str__(self):
        b, t = self.input_ids.shape
        padded = "" if self.real.all() else f", {self._side()}"
        return f"n={len(self.P)} before {b} rows of {t} tokens{padded}, in {self.name}"

    def _side(self) -> str:
        return SIDES["right" if self.real[:, 0].all() else "left"]


def batches() -> Iterator[Batch]:
    """Random models and rows, the same at every call; the telling one comes first."""
    models = {"a GPT-2": _gpt2(), "a Llama": _llama()}
    draw = torch.Generator().manual_seed(11)
    for name, n, lengths, side in (
        ("a GPT-2", 3, (4, 7, 6), "left"),
        ("a Llama", 4, (3, 5), "left"),
        ("a Llama", 1, (6,), "left"),
        ("a GPT-2", 6, (5, 2, 5), "right"),
        ("a Llama", 9, (1, 12, 3, 7, 12, 2), "left"),
        ("a GPT-2", 2, (1, 1), "left"),
    ):
        t, model = max(lengths), models[name]
        ids = torch.randint(3, VOCABULARY, (len(lengths), t), generator=draw)
        fill = [(t - k, 0) if side == "left" else (0, t - k) for k in lengths]
        ones = [torch.ones(k, dtype=torch.long) for k in lengths]
        mask = torch.stack([F.pad(o, f) for o, f in zip(ones, fill, strict=True)])
        if len(lengths) > 2:  # some of the padding is pad tokens, and some real tokens
            ids[0, 0] = ids[0, -1] = ids[-1, t // 2] = TOKENS["pad_token_id"]
        d = model.get_input_embeddings().weight.shape[1]
        size = 20.0 if n == 9 else 1.0
        P = size * torch.randn(n, d, generator=draw)
        yield Batch(name, model, P, ids, mask)


def _gpt2() -> nn.Module:
    sizes = dict(n_embd=16, n_layer=2, n_head=4, n_positions=32)
    return _random(GPT2Config(**sizes, **TOKENS))


def _llama() -> nn.Module:
    return _random(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            **TOKENS,
        )
    )


def _random(config) -> nn.Module:
    """A frozen model whose weights are large enough for every place to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def library_prompt(model: nn.Module, P: Tensor, input_ids, attention_mask) -> Tensor:
    """The logits (b, t, vocabulary) of the tokens after P, by methods/prompt.py.

    P comes after the padding on the left of a row. Gradients reach it.

    Args
        P               (n, d_model)
        input_ids       (b, t) int64
        attention_mask  (b, t) int64: 0 at padding
    """
    b, n = len(input_ids), len(P)
    E = model.get_input_embeddings()(input_ids)
    pads = prompt.left_padding(attention_mask, b, E.device)
    ones = attention_mask.new_ones(b, n)
    wide = prompt.insert_after_padding(pads, ones, attention_mask)
    out = model(
        inputs_embeds=prompt.insert_after_padding(pads, P.expand(b, -1, -1), E),
        attention_mask=wide,
        position_ids=(wide.cumsum(1) - 1).clamp(min=0),
    )
    return prompt.drop_prompt(pads, n, (out.logits,))[0]


@judged
def prompt_forward(my_prompt: Callable) -> None:
    """12.1: my_prompt(model, P, input_ids, attention_mask): logits behind P."""
    got = None
    for first in batches():
        # Again with other values in the same shapes: the model's own logits are reused.
        again = replace(
            first,
            P=first.P.flip(0) - first.P / 3,
            input_ids=first.input_ids.roll(1, 0).flip(1),
            mask=first.mask.roll(1, 0),
        )
        for which, batch in (("", first), (", a second time", again)):
            got = _judge_prompt(my_prompt, batch, which, before=got)
    _judge_two_prompts(my_prompt, first)
    second = next(batch for batch in batches() if "Llama" in batch.name)
    _judge_prompt(my_prompt, replace(second, training=True), ", in train()", None)


def _judge_prompt(my_prompt, batch: Batch, which: str, before) -> Tensor:
    kind = nn.Parameter if which else torch.Tensor
    P = kind(batch.P.clone()).requires_grad_()
    ids, mask = batch.input_ids.clone(), batch.mask.clone()
    lent = dict(P=P, input_ids=ids, attention_mask=mask)
    state = copy.deepcopy(batch.model.state_dict())
    config = batch.model.config.to_dict()
    batch.model.train(batch.training)
    with unchanged(**lent, **{BEFORE: before}):
        got = my_prompt(batch.model, P, ids, mask)
    _demand_same_model(batch, state, config)
    ours, ours_P = _library(batch)
    _demand_cut(got, ours, batch)
    old = before[batch.real] if before is not None and which else None
    mine, right = got[batch.real], ours.detach()[batch.real]
    alike = torch.allclose(mine.double(), right.double(), 0, 1e-5)
    close(
        mine,
        right,
        what=f"the logits at real tokens, for {batch}{which}",
        mistakes={} if alike else {KEPT: old} | _wrong_prompts(batch),
        tolerance=1e-4,
        kind=ours.dtype,
    )
    _same_gradient_of_P(got, P, ours, ours_P, batch)
    return got.detach()


def _judge_two_prompts(my_prompt, batch: Batch) -> None:
    """Two prompts of one model before one backward pass."""
    Ps = [(sign * batch.P).clone().requires_grad_() for sign in (1, -1)]
    got = [my_prompt(batch.model, P, batch.input_ids, batch.mask) for P in Ps]
    sum(logits[batch.real].square().sum() for logits in got).backward()
    for which, sign, P in (("first", 1, Ps[0]), ("second", -1, Ps[1])):
        ours, ours_P = _library(replace(batch, P=sign * batch.P))
        ours[batch.real].square().sum().backward()
        close(
            torch.zeros_like(P) if P.grad is None else P.grad,
            ours_P.grad,
            what=f"the gradient of the {which} P of two, for {batch}",
            mistakes={
                "P is kept in the function or outside, where the next call writes "
                "over it": 0 * P
            },
            tolerance=1e-3,
        )


def _library(batch: Batch) -> tuple[Tensor, nn.Parameter]:
    """(logits (b, t, vocabulary), P), by methods/prompt.py."""
    model = copy.deepcopy(batch.model)
    prompt.inject(model, n=len(batch.P), start="random")
    (adapter,) = adapters(model).values()
    with torch.no_grad():
        adapter.P.copy_(batch.P)
    out = model(batch.input_ids, attention_mask=batch.mask, use_cache=False)
    return out.logits, adapter.P


def _demand_same_model(batch: Batch, state: dict, config: dict) -> None:
    """Wrong where weights, mode, flags, hooks or configuration have changed."""
    model = batch.model
    now = model.state_dict()
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    changes = {
        "P was written into the table of embeddings": any(
            not torch.equal(now[name], state[name]) for name in state
        ),
        "the weights were set to train: only P does": any(
            parameter.requires_grad for parameter in model.parameters()
        ),
        "train() or eval() was called on it": model.training != batch.training,
        "a hook was left in it": bool(hooks),
        "its config was changed: pass an argument to the call": (
            model.config.to_dict() != config
        ),
    }
    for likely, so in changes.items():
        if so:
            raise Wrong(
                f"for {batch}: the model itself was changed; it is frozen. Likely "
                f"mistake: {likely}"
            )


def _demand_cut(got, ours: Tensor, batch: Batch) -> None:
    if not isinstance(got, Tensor) or got.shape == ours.shape:
        if not isinstance(got, Tensor):  # says what it is
            close(got, ours.detach(), what=f"the logits, for {batch}")
        return
    b, t, vocabulary = ours.shape
    shape, n = tuple(got.shape), len(batch.P)
    if shape == (b, n + t, vocabulary):
        likely = "the outputs of the n positions are still there: cut them off"
    elif shape[-1:] == (batch.P.shape[1],):
        likely = "hidden states or embeddings in the place of logits: out.logits"
    else:
        likely = "cut off n outputs, and only those"
    raise Wrong(
        f"for {batch}: expected logits of shape {(b, t, vocabulary)}, one for each of "
        f"the caller's tokens; got {shape}. Likely mistake: {likely}"
    )


@torch.no_grad()
def _wrong_prompts(batch: Batch) -> dict[str, Tensor]:
    """What each likely mistake gives at the real tokens."""
    model, P, mask = batch.model, batch.P, batch.mask
    n, (b, t) = len(P), mask.shape
    E = model.get_input_embeddings()(batch.input_ids)
    front = torch.cat([P.expand(b, -1, -1), E], 1)
    ones, zeros = mask.new_ones(b, n), mask.new_zeros(b, n)
    wide, behind = torch.cat([ones, mask], 1), torch.cat([mask, ones], 1)
    right = (wide.cumsum(1) - 1).clamp(min=0)
    own = (mask.cumsum(1) - 1).clamp(min=0)
    start = torch.arange(n).expand(b, -1)
    left = (torch.arange(t) - (1 - mask).sum(1, keepdim=True)).clamp(min=0)

    def logits(x, mask, positions=None, cut=slice(n, None)) -> Tensor:
        asked = dict(attention_mask=mask, position_ids=positions, use_cache=False)
        return model(inputs_embeds=x, **asked).logits[:, cut][batch.real]

    whole = logits(front, wide, right)
    every = torch.arange(n + t).expand(b, -1)
    wrong = {
        "P is missing, or stands behind the tokens, which then cannot see it": logits(
            E, mask, own, slice(None)
        ),
        "the positions count the padding too: count the real tokens, with a cumsum of "
        "the mask": logits(front, wide, every),
        "the tokens' positions start at 0 again: they start at n": logits(
            front, wide, torch.cat([start, own], 1)
        ),
        "the positions are one too many: the first is 0": logits(front, wide, right + 1)
        if "GPT" in batch.name
        else None,
        "the mask hides P: ones for its n positions": logits(
            front, torch.cat([zeros, mask], 1), right
        ),
        "the mask was not used: padding is seen": logits(
            front, torch.ones_like(wide), right
        ),
        "the mask was not used, and padding is counted and seen": logits(
            front, torch.ones_like(wide), every
        ),
        "the ones stand behind the mask, and P in front": logits(
            front, behind, (behind.cumsum(1) - 1).clamp(min=0)
        ),
        "the last n outputs were cut off, in the place of the first": logits(
            front, wide, right, slice(0, t)
        ),
        "probabilities: the logits are asked for, before any softmax": whole.softmax(
            -1
        ),
        "logarithms of probabilities: the logits are asked for": whole.log_softmax(-1),
        "the output before each token, as a loss wants it: cut off n": logits(
            front, wide, right, slice(n - 1, -1)
        ),
        "the embeddings were scaled by sqrt(d): they come from the table as they are": (
            logits(
                torch.cat([P.expand(b, -1, -1), E * P.shape[1] ** 0.5], 1), wide, right
            )
        ),
        "padding on the left was taken for granted": logits(
            front, wide, torch.cat([start, n + left], 1)
        ),
        "P was turned round": logits(
            torch.cat([P.flip(0).expand(b, -1, -1), E], 1), wide, right
        ),
        "one row of P in the place of all n": logits(
            torch.cat([P[:1].expand(b, n, -1), E], 1), wide, right
        ),
    }
    return {text: value for text, value in wrong.items() if value is not None}


def _same_gradient_of_P(got, P, ours, ours_P, batch: Batch) -> None:
    if not got.requires_grad:
        raise Wrong(
            f"for {batch}: the logits are right, but no gradient reaches P through "
            "them. Likely mistake: P.data, P.detach() or torch.no_grad()"
        )
    real = batch.real
    pulled(got[real], ours[real])
    if P.grad is None:
        raise Wrong(
            f"for {batch}: the logits are right, but no gradient reaches P. Likely "
            "mistake: a copy of P, as torch.tensor(P) makes one"
        )
    close(
        P.grad,
        ours_P.grad,
        what=f"the logits are right, but not the gradient of P, for {batch}",
        mistakes={"P is cut off in some of the rows": 0 * P.grad},
        tolerance=1e-3,
    )


# 12.2 and 12.3 ------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """One attention head, without a batch: t tokens behind a prefix of n."""

    q: Tensor  # (t, d)
    K: Tensor  # (t, d)
    V: Tensor  # (t, d)
    P_K: Tensor  # (n, d)
    P_V: Tensor  # (n, d)

    @property
    def loud(self) -> bool:
        """Whether scores are so large that exponentials overflow or vanish."""
        return bool((self.q @ torch.cat([self.P_K, self.K]).T).abs().max() > 80)

    def __str__(self):
        (t, d), n = self.q.shape, len(self.P_K)
        return f"{t} tokens and a prefix of {n}, d={d}"


def heads() -> Iterator[Head]:
    """Random heads, two of each size, the same at every call."""
    draw = torch.Generator().manual_seed(11)
    for t, n, d, size in (
        (5, 3, 4, 1.0),
        (6, 1, 9, 1.0),
        (1, 2, 3, 1.0),
        (4, 7, 2, 2.0),
        (14, 12, 20, 1.0),
        (3, 2, 4, 30.0),  # scores as large as hundreds
        (2, 3, 1, 0.01),
    ):
        for _ in range(2):
            q, K, V = (torch.randn(t, d, generator=draw) for _ in range(3))
            P_K, P_V = (torch.randn(n, d, generator=draw) for _ in range(2))
            yield Head(size * q, size * K, V, size * P_K, P_V)


def extreme_heads() -> Iterator[Head]:
    """Scores of hundreds on one side, or on both, or far below zero on both."""
    draw = torch.Generator().manual_seed(12)
    t, n, d = 4, 3, 4
    for own, front in ((25.0, 0.1), (0.1, 25.0), (-20.0, -20.0), (-20.0, 0.1)):
        q = 10 + torch.rand(t, d, generator=draw)
        K = own * (1 + 0.02 * torch.rand(t, d, generator=draw))
        P_K = front * (1 + 0.02 * torch.rand(n, d, generator=draw))
        V, P_V = torch.randn(t, d, generator=draw), torch.randn(n, d, generator=draw)
        yield Head(q, K, V, P_K, P_V)
    q = torch.tensor([[1.0, 0, 0, 0]] * 2)  # what the first token must not see is large
    K = torch.tensor([[0.0, 0, 0, 0], [700.0, 0, 0, 0]])
    yield Head(q, K, torch.ones(2, 4), 2 + 0 * K[:1], 3 * torch.ones(1, 4))


def attended(head: Head) -> Tensor:
    """softmax(q [P_K; K]ᵀ / sqrt(d)) [P_V; V], causal: by methods/prefix.py."""
    module = SimpleNamespace(
        layer_idx=0, is_causal=True, num_key_value_groups=1, training=False
    )
    P = head.P_K[:, None], head.P_V[:, None]  # (n, 1, d)
    q, K, V = (each[None, None] for each in (head.q, head.K, head.V))
    attend = prefix.with_prefix("sdpa")
    keyword = {prefix.KEYWORD: lambda layer: P}
    out, _ = attend(module, q, K, V, None, **keyword)  # (1, t, 1, d)
    return out[0, :, 0]


def library_attention(q: Tensor, K: Tensor, V: Tensor, P_K, P_V) -> Tensor:
    """(t, d): one causal head with a prefix, by methods/prefix.py."""
    return attended(Head(q, K, V, P_K, P_V))


NAMES = ("q", "K", "V", "P_K", "P_V")


@judged
def prefix_attention(my_attention: Callable) -> None:
    """12.2: my_attention(q, K, V, P_K, P_V): one causal head with a prefix."""
    got = None
    for head in [*heads(), *extreme_heads()]:
        got = _judge_head(my_attention, head, got)
    (first, *_) = heads()
    _judge_head(my_attention, first, got, names=NAMES[3:])
    _judge_head(my_attention, first, got, names=NAMES[:3])
    _judge_head(my_attention, replace(first, P_V=0 * first.P_V), got)
    _judge_two_heads(my_attention)


def _judge_head(my_attention, head: Head, before, names=NAMES) -> Tensor:
    """`names` are those that train: all, or some, as Parameters."""
    mine = {name: getattr(head, name).clone() for name in NAMES}
    theirs = {name: getattr(head, name).clone() for name in NAMES}
    for name in names:
        if names is not NAMES:
            mine[name] = nn.Parameter(mine[name])
        mine[name].requires_grad_()
        theirs[name].requires_grad_()
    with unchanged(**mine, **{BEFORE: before}):
        got = my_attention(*mine.values())
    expected = attended(Head(**theirs))
    some = "" if names is NAMES else f", where {', '.join(names)} alone train"
    where = f"{head}{some}"
    close(
        got,
        expected.detach(),
        what=f"what the head returns, for {where}",
        mistakes={KEPT: before} | _wrong_heads(head),
        tolerance=1e-4 if head.loud else 1e-5,
    )
    if not got.requires_grad:
        raise Wrong(
            "the values are right, but no gradient passes. Likely mistake: .data, "
            ".detach() or torch.no_grad()"
        )
    if head.loud:  # its gradients are zero, but for rounding errors
        return got.detach()
    pulled(got, expected)
    for name in names:
        if mine[name].grad is None:
            raise Wrong(
                f"the values are right, but no gradient reaches {name}, for {where}. "
                f"Likely mistake: {name}.data, {name}.detach() or a copy of it"
            )
        close(
            mine[name].grad,
            theirs[name].grad,
            what=f"right values, but another gradient of {name}, for {where}",
            tolerance=1e-4,
        )
    return got.detach()


def _judge_two_heads(my_attention) -> None:
    """Two heads of the same sizes before one backward pass."""
    one, two, *_ = heads()
    leaves = [
        [getattr(h, n).clone().requires_grad_() for n in NAMES] for h in (one, two)
    ]
    twins = [
        [getattr(h, n).clone().requires_grad_() for n in NAMES] for h in (one, two)
    ]
    got = torch.cat([my_attention(*each) for each in leaves])
    pulled(got, torch.cat([attended(Head(*each)) for each in twins]))
    for which, mine, theirs in zip(("first", "second"), leaves, twins, strict=True):
        for name, a, b in zip(NAMES, mine, theirs, strict=True):
            close(
                torch.zeros_like(a) if a.grad is None else a.grad,
                b.grad,
                what=f"the gradient of {name} of the {which} of two heads",
                mistakes={"something is kept in the function or outside": 0 * a},
                tolerance=1e-4,
            )


def _seen(t: int, n: int = 0) -> Tensor:
    """(t, n + t): what each token may see, the n in front included."""
    return torch.ones(t, n + t, dtype=torch.bool).tril(n)


def _softmax(scores: Tensor, seen: Tensor | None = None) -> Tensor:
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1)


def _wrong_heads(head: Head) -> dict[str, Tensor]:
    q, K, V, P_K, P_V = head.q, head.K, head.V, head.P_K, head.P_V
    (t, d), n = q.shape, len(P_K)
    keys, values = torch.cat([P_K, K]), torch.cat([P_V, V])
    scores, seen = q @ keys.T / d**0.5, _seen(t, n)
    own, front = scores[:, n:], scores[:, :n]
    plain = _softmax(own, _seen(t)) @ V
    alone = front.softmax(-1) @ P_V
    weights = _softmax(scores, seen)
    return {
        "the prefix is missing, or behind the tokens and so masked": plain,
        "the tokens are missing: the prefix alone": alone,
        "no scale: the scores are divided by sqrt(d)": _softmax(q @ keys.T, seen)
        @ values,
        "divided by d: the scores are divided by sqrt(d)": _softmax(
            scores / d**0.5, seen
        )
        @ values,
        "the prefix is under the causal mask: every token sees all n": _softmax(
            scores, torch.ones_like(seen).tril()
        )
        @ values,
        "no causal mask: tokens see later tokens": _softmax(scores) @ values,
        "two softmaxes, added up: one softmax goes over prefix and tokens": plain
        + alone,
        "two softmaxes, their mean: one softmax goes over prefix and tokens": (
            plain + alone
        )
        / 2,
        "the values of the prefix are forgotten: [P_V; V]": weights[:, n:] @ V,
        "the tokens' values are forgotten: [P_V; V]": weights[:, :n] @ P_V,
        "the keys of the prefix are forgotten: [P_K; K]": _softmax(
            torch.cat([0 * front, own], 1), seen
        )
        @ values,
        "P_K and P_V are swapped": _softmax(q @ torch.cat([P_V, K]).T / d**0.5, seen)
        @ torch.cat([P_K, V]),
        "K and V are swapped": _softmax(q @ torch.cat([P_V, V]).T / d**0.5, seen)
        @ keys,
        "the softmax goes over the queries: dim=-1": scores.masked_fill(
            ~seen, float("-inf")
        ).softmax(0)
        @ values,
        "divided by sqrt(t): d is the size of the head": _softmax(
            q @ keys.T / t**0.5, seen
        )
        @ values,
        "scores of zero were masked: a score may be zero": _softmax(
            scores, seen & (scores != 0)
        )
        @ values,
        "triu in the place of tril: what is left is the future": _softmax(
            scores, torch.ones_like(seen).triu(n)
        )
        @ values,
        "sigmoids: a softmax goes over each row": (
            scores.sigmoid() * seen / (scores.sigmoid() * seen).sum(-1, keepdim=True)
        )
        @ values,
        "masked after the softmax: the shares no longer add up to one": (
            scores.softmax(-1) * seen
        )
        @ values,
        "no softmax": (scores * seen) @ values,
    }


# 12.3 ---------------------------------------------------------------------------------


def library_split(q: Tensor, K: Tensor, P_K: Tensor) -> tuple[Tensor, Tensor]:
    """(share (t,), among (t, t)): a prefix's share, and attention among the tokens."""
    weights, n = library_weights(q, K, P_K), len(P_K)
    share, own = weights[:, :n].sum(1), weights[:, n:]
    return share, own / own.sum(1, keepdim=True)


def library_weights(q: Tensor, K: Tensor, P_K: Tensor) -> Tensor:
    """(t, n + t): the attention weights of a head, those of the prefix first.

    By methods/prefix.py, which returns no weights: with a one as the value of one
    position, and zeros for all others, its output is that position's weight.
    """
    (t, d), n = q.shape, len(P_K)
    values = F.pad(torch.eye(n + t, dtype=q.dtype), (0, -(n + t) % d))
    parts = values.split(d, dim=1)  # as many columns as a value has
    columns = [attended(Head(q, K, part[n:], P_K, part[:n])) for part in parts]
    return torch.cat(columns, dim=1)[:, : n + t]


@judged
def attention_split(my_split: Callable) -> None:
    """12.3: my_split(q, K, P_K): the prefix's share, and attention among tokens."""
    got = None
    for head in moderate_heads():
        before = got
        q, K, P_K = head.q.clone(), head.K.clone(), head.P_K.clone()
        with unchanged(q=q, K=K, P_K=P_K, **{BEFORE: before}):
            got = my_split(q, K, P_K)
        expected = library_split(head.q, head.K, head.P_K)
        mistakes = {KEPT: before} | _wrong_splits(head)
        _demand_two(got, expected, mistakes, head)
        got = tuple(got)
        for which, what in enumerate(SPLIT):
            close(
                got[which],
                expected[which],
                what=f"{what}, for {head}",
                mistakes={
                    text: pair[which]
                    for text, pair in mistakes.items()
                    if pair is not None and pair[which] is not None
                },
                tolerance=1e-4,
                kind=torch.float32,
            )


def moderate_heads() -> Iterator[Head]:
    """Heads whose shares stay below 0.99, so that 1 - share keeps its digits."""
    draw = torch.Generator().manual_seed(13)
    q, K, V, P_K, P_V = (torch.randn(4, 6, generator=draw) for _ in range(5))
    for head in [*heads(), Head(q, K, V, P_K[:2], P_V[:2])]:
        if _share(head).max() < 0.99:
            yield head
    yield Head(q, 0 * K, V, 0 * P_K, P_V)  # scores of zero


def _share(head: Head) -> Tensor:
    return library_split(head.q, head.K, head.P_K)[0]


SPLIT = ("share, the prefix's share of each query", "among, attention among tokens")


def _demand_two(got, expected: tuple, mistakes: dict, head: Head) -> None:
    """Wrong where it is no pair, or a part has another shape."""
    if isinstance(got, Tensor) or not isinstance(got, tuple | list) or len(got) != 2:
        close(got, expected, what=f"(share, among), for {head}", mistakes=mistakes)
        raise Wrong(f"for {head}: two tensors are asked for, (share, among)")
    (t, _), n = head.q.shape, len(head.P_K)
    if isinstance(got[0], Tensor) and got[0].shape == (t, t) != (t,):
        raise Wrong(
            f"for {head}: the first value has shape {(t, t)}. Likely mistake: share "
            "and among are swapped"
        )
    likely = {
        (t, n): "a share for each of the n positions: add them up",
        (t, 1): "a column: sum(-1) without keepdim",
        (t, n + t): "the columns of the prefix are still there: cut off the first n",
    }
    for value, right, what in zip(got, expected, SPLIT, strict=True):
        if isinstance(value, Tensor) and value.shape != right.shape:
            shape = tuple(value.shape)
            raise Wrong(
                f"{what}, for {head}: expected shape {tuple(right.shape)}, got {shape}."
                f" Likely mistake: {likely.get(shape, 'another sum or another slice')}"
            )


def _wrong_splits(head: Head) -> dict[str, tuple]:
    """{mistake: (share, among)}; None where the mistake concerns the other alone."""
    q, K, P_K = head.q, head.K, head.P_K
    (t, d), n = q.shape, len(P_K)
    scores, seen = q @ torch.cat([P_K, K]).T / d**0.5, _seen(t, n)

    def split(weights: Tensor) -> tuple[Tensor, Tensor]:
        own = weights[:, n:]
        return weights[:, :n].sum(-1), own / own.sum(-1, keepdim=True)

    weights = _softmax(scores, seen)
    share, among = split(weights)
    ranks = torch.arange(1.0, t + 1)
    last = weights[:, -n:].sum(-1), weights[:, :t]
    return {
        "among is not divided by its own sum: each row must add up to 1": (
            None,
            weights[:, n:],
        ),
        "the tokens' share: 1 minus what is asked for": (1 - share, None),
        "divided by share: the tokens' sum is 1 - share": (
            None,
            weights[:, n:] / share[:, None],
        ),
        "multiplied by 1 - share: the weights are divided by it": (
            None,
            weights[:, n:] * (1 - share)[:, None],
        ),
        "no scale: the scores are divided by sqrt(d)": split(
            _softmax(scores * d**0.5, seen)
        ),
        "divided by d: the scores are divided by sqrt(d)": split(
            _softmax(scores / d**0.5, seen)
        ),
        "no causal mask: tokens see later tokens": split(_softmax(scores)),
        "the prefix is under the causal mask: every token sees all n": split(
            _softmax(scores, torch.ones_like(seen).tril())
        ),
        "the last n columns: the prefix comes first": last,
        "the mean over the n positions: their sum": (share / n, None),
        "the number of positions, not their weight": (n / (n + ranks), None),
        "the ratio of the prefix to the tokens: divide by both": (
            share / (1 - share),
            None,
        ),
        "the softmax goes over the queries: dim=-1": split(
            scores.masked_fill(~seen, float("-inf")).softmax(0)
        ),
        "divided by the sum of a column: each row must add up to 1": (
            None,
            weights[:, n:] / weights[:, n:].sum(0),
        ),
        "the mean over all queries: one share for each": (
            share.mean().expand(t),
            None,
        ),
        "among is transposed: rows are queries": (None, among.T),
    }


# 12.4 ---------------------------------------------------------------------------------


@dataclass
class Losses:
    """A loss of the vectors that are kept, which counts its calls.

        loss = base + costs of what is gone + extras of groups that are gone together

    Args
        name    what is special about it: told where an answer fails
        n       vectors
        costs   of each one's removal, nats
        groups  {vectors: nats more where all of them are gone}
        most    nats that may be added
    """

    name: str
    n: int
    costs: Sequence[float]
    groups: dict[tuple[int, ...], float] = field(default_factory=dict)
    most: float = 0.25
    base: float = 1.0
    calls: int = 0

    @property
    def allowed(self) -> int:
        return self.n * (self.n + 1)

    @property
    def limit(self) -> float:
        return self.of(range(self.n)) + self.most

    def of(self, keep) -> float:
        gone = set(range(self.n)) - set(keep)
        extra = sum(more for group, more in self.groups.items() if gone >= set(group))
        return self.base + sum(self.costs[i] for i in gone) + extra

    def __call__(self, keep) -> float:
        """What the learner's code calls; Wrong for a list that is no choice."""
        self.calls += 1
        if self.calls > self.allowed:
            raise Wrong(
                f"with n={self.n}, loss was called more than {self.allowed} times. "
                "Likely mistake: all subsets are tried; remove one vector at a time"
            )
        chosen = _whole_list(keep, "loss was called with", self.n)
        if not chosen:
            raise Wrong(
                f"with n={self.n}, loss was called with an empty list. Likely mistake: "
                "the last vector was removed too; at least one stays"
            )
        return self.of(chosen)

    def __str__(self):
        return f"{self.name} (n={self.n}, most={self.most:g})"


def losses() -> Iterator[Losses]:
    """Cases with exact binary fractions, so that limits are met exactly."""
    yield Losses("vectors whose costs add up", 4, (0.125, 0.5, 0.0625, 1.0))
    yield Losses("two vectors that do the same work", 3, (0, 0, 1.0), {(0, 1): 2.0})
    yield Losses("costs that are small one by one", 6, (0.125,) * 6)
    yield Losses("a removal that costs exactly `most`", 3, (0.25, 0.5, 0.5))
    yield Losses("one vector", 1, (0.0,))
    yield Losses("no vector that can go", 3, (0.5, 1.0, 0.75))
    yield Losses("vectors without any effect", 12, (0.0,) * 12)
    yield Losses("most = 0", 4, (0.0, 0.125, 0.0, 0.5), {(0, 2): 0.25}, most=0.0)
    # Vector 0 disturbs: with vector 2 gone too, it can go as well.
    yield Losses(
        "a vector that can go only after another", 3, (0.5, 1.0, 0.125), {(0, 2): -0.5}
    )
    yield Losses("a vector that does harm", 4, (0.25, -0.5, 0.25, 0.75), most=0.125)
    yield Losses(
        "a pair among many", 9, (0.0, 1, 1, 0.0625, 1, 1, 0, 1, 1), {(0, 6): 1.0}
    )
    yield Losses("a larger loss", 4, (2.0, 8.0, 1.0, 4.0), most=3.0, base=64.0)
    yield Losses("many vectors", 16, [(15 - i) / 64 for i in range(16)], most=0.5)
    yield Losses("small vectors at the end", 5, (1.0, 1.0, 0.5, 0.125, 0.0625))


def library_keep(loss: Callable, n: int, most: float) -> list[int]:
    """Remove the cheapest vector, again and again, while the loss stays in the limit.

    Args     as of the exercise: loss(keep) -> nats, n vectors, `most` nats more
    Returns  the indices of the vectors that stay, rising
    """
    keep, limit = list(range(n)), loss(list(range(n))) + most
    while len(keep) > 1:
        trials = [[j for j in keep if j != i] for i in keep]
        lowest = [loss(trial) for trial in trials]
        if min(lowest) > limit:
            break
        keep = trials[lowest.index(min(lowest))]
    return keep


@judged
def kept_vectors(my_keep: Callable) -> None:
    """12.4: my_keep(loss, n, most): the vectors of a soft prompt that stay."""
    for case in losses():
        got = my_keep(case, case.n, case.most)
        _judge_choice(got, case)
    again = Losses("the first costs in another order", 4, (1.0, 0.0625, 0.5, 0.125))
    strict = replace(again, most=0.0)
    _judge_choice(my_keep(again, again.n, again.most), again)
    _judge_choice(my_keep(loss=strict, n=strict.n, most=strict.most), strict)


def _judge_choice(got, case: Losses) -> None:
    got = _whole_list(got, f"for {case}, my_keep returned", case.n)
    if not got:
        raise Wrong(
            f"for {case}: no vector is left. Likely mistake: at least one stays, even "
            "where all of them could go"
        )
    loss, limit = case.of(got), case.limit
    if loss > limit:
        raise Wrong(
            f"for {case}: with {got} the loss is {loss:g}; at most {limit:g} is "
            f"allowed. Likely mistake: {_too_few(got, case)}"
        )
    for i in got if len(got) > 1 else ():
        rest = [j for j in got if j != i]
        if case.of(rest) <= limit:
            raise Wrong(
                f"for {case}: {got} stay, but vector {i} could go too: the loss would "
                f"be {case.of(rest):g}, and {limit:g} is allowed. Likely mistake: "
                f"{_too_many(got, rest, case)}"
            )


def _whole_list(value, what: str, n: int) -> list[int]:
    """The list of rising indices below n; Wrong where it is none."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        raise Wrong(f"{what} None. Likely mistake: `return` is missing")
    if not isinstance(value, list | tuple | range):
        raise Wrong(
            f"{what} a {type(value).__name__}; a list of int is needed. Likely "
            "mistake: wrap it in sorted(…) or list(…)"
        )
    if not all(isinstance(i, numbers.Integral) for i in value) or any(
        isinstance(i, bool) for i in value
    ):
        raise Wrong(
            f"{what} {_short(value)}; a list of int is needed. Likely mistake: "
            "True and False, floats or vectors in the place of indices"
        )
    if any(not 0 <= i < n for i in value) or any(
        a >= b for a, b in itertools.pairwise(value)
    ):
        raise Wrong(
            f"{what} {_short(value)}; indices from 0 to {n - 1} in rising order are "
            "needed, each once, since the vectors keep their order. Likely mistake: "
            "an index of the shortened list in the place of one of the whole prompt"
        )
    return list(value)


def _short(value) -> str:
    text = str(list(value))
    return text if len(text) < 60 else f"{text[:56]} …]"


def _too_few(got: list[int], case: Losses) -> str:
    """Why a choice exceeds the limit."""
    every = range(case.n)
    alone = {i: case.of([j for j in every if j != i]) for i in every}
    if got == [i for i in every if alone[i] > case.limit] or (
        case.n > 1 and got == [i for i in every if alone[i] >= case.limit]
    ):
        return (
            "every vector that can go alone was removed. Two that do the same work can "
            "each go, not both: measure again after each removal"
        )
    gone = [i for i in every if i not in got]
    if all(alone[i] <= case.limit for i in gone):
        return (
            "the loss was compared with the one before; compare with the loss of all "
            "n vectors, or small losses add up"
        )
    if gone and case.of(gone) <= case.limit:
        return "the vectors that go were returned, in the place of those that stay"
    return "one removal too many; the limit is the loss of all n vectors, plus most"


def _too_many(got: list[int], rest: list[int], case: Losses) -> str:
    """Why a choice stops too early."""
    if len(got) == case.n:
        if case.of(rest) == case.limit:
            return "`<` for `<=`: exactly `most` is allowed"
        return "nothing was removed, or the removal of one vector alone was tried"
    if case.of(rest) == case.limit:
        return "`<` for `<=`: exactly `most` is allowed; or one removal too few"
    return (
        "the search ended too early. After each removal, try all that are left again: "
        "a vector that had to stay at first may go now"
    )
