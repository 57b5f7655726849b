"""What the exercises of notebook 12, prefix and prompt tuning, are compared with.

A prompt is compared with methods/prompt.py in small models that are padded on either
side, an attention head with the function that methods/prefix.py registers, and a count
with the tensor that a model really gets.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from ...core.adapter import adapters
from ...ledger.experiments import counting
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


@judged
def prefix_share(my_share: Callable) -> None:
    """12.3: my_share(q, K, P_K): of each token's attention, what the prefix gets."""
    got = None
    for head in [*heads(), *extreme_heads()]:
        before = got
        q, K, P_K = head.q.clone(), head.K.clone(), head.P_K.clone()
        with unchanged(q=q, K=K, P_K=P_K, **{BEFORE: before}):
            got = my_share(q, K, P_K)
        # With ones for the prefix's values and zeros for the tokens', attention
        # returns the share itself.
        ones, zeros = torch.ones_like(head.P_V), torch.zeros_like(head.V)
        expected = attended(Head(head.q, head.K, zeros, head.P_K, ones))[:, 0]
        _demand_one_each(got, expected, head)
        close(
            got,
            expected,
            what=f"the prefix's share for each token, for {head}",
            mistakes={KEPT: before} | _wrong_shares(head),
            tolerance=1e-4 if head.loud else 1e-5,
        )


def _demand_one_each(got, expected: Tensor, head: Head) -> None:
    if not isinstance(got, Tensor) or got.shape == expected.shape:
        return
    (t, _), n = head.q.shape, len(head.P_K)
    likely = {
        (t, n): "a share for each of the n positions: add them up",
        (t, 1): "a column: sum(-1) without keepdim",
        (t, n + t): "the weights of all positions: add up the first n",
    }.get(tuple(got.shape), "one share for each of the t tokens is asked for")
    raise Wrong(
        f"for {head}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}. "
        f"Likely mistake: {likely}"
    )


def _wrong_shares(head: Head) -> dict[str, Tensor]:
    q, K, P_K = head.q, head.K, head.P_K
    (t, d), n = q.shape, len(P_K)
    keys, seen = torch.cat([P_K, K]), _seen(t, n)
    scores = q @ keys.T / d**0.5
    right = _softmax(scores, seen)[:, :n].sum(-1)
    masses = scores.exp() * seen
    linear = scores * seen
    shifted = (scores - scores.amax(1, keepdim=True)).exp() * seen
    counts = torch.arange(1.0, t + 1)
    return {
        "the tokens' share: 1 minus what is asked for": 1 - right,
        "no scale: the scores are divided by sqrt(d)": _softmax(q @ keys.T, seen)[
            :, :n
        ].sum(-1),
        "divided by d: the scores are divided by sqrt(d)": _softmax(
            scores / d**0.5, seen
        )[:, :n].sum(-1),
        "no causal mask: later tokens count": _softmax(scores)[:, :n].sum(-1),
        "the prefix is under the causal mask: every token sees all n": _softmax(
            scores, torch.ones_like(seen).tril()
        )[:, :n].sum(-1),
        "the number of positions, not their weight": n / (n + counts),
        "the number of positions, later tokens included": torch.full((t,), n / (n + t)),
        "the mean over the n positions: their sum": right / n,
        "the largest of the n positions alone: their sum": (
            _softmax(scores, seen)[:, :n].amax(-1)
        ),
        "the last n columns: the prefix stands in front": (
            _softmax(scores, seen)[:, -n:].sum(-1)
        ),
        "divided by sqrt(t): d is the size of the head": (
            _softmax(q @ keys.T / t**0.5, seen)[:, :n].sum(-1)
        ),
        "scores of zero were masked: a score may be zero": (
            _softmax(scores, seen & (scores != 0))[:, :n].sum(-1)
        ),
        "the first of the n positions alone": _softmax(scores, seen)[:, 0],
        "the ratio of the prefix to the tokens: divide by both": masses[:, :n].sum(-1)
        / masses[:, n:].sum(-1),
        "the mass of the prefix, not divided by the whole": masses[:, :n].sum(-1),
        "a bare exponential of large scores: torch.softmax takes the largest off": (
            masses[:, :n].sum(-1) / masses.sum(-1)
        ).nan_to_num(0.0),
        "the largest score was taken off, but of what the token does not see": (
            shifted[:, :n].sum(-1) / shifted.sum(-1)
        ).nan_to_num(0.0),
        "scores were added up, not their exponentials": linear[:, :n].sum(-1)
        / linear.sum(-1),
        "the mean over all tokens: one share for each": right.mean().expand(t),
        "the last token's share for all": right[-1].expand(t),
    }


# 12.4 ---------------------------------------------------------------------------------

SHAPES = (  # layers, query heads, key-value heads, head size, hidden size, n
    (3, 6, 2, 4, 42, 5),  # grouped queries, and heads that do not add up to the width
    (2, 4, 4, 8, 32, 16),
    (1, 6, 3, 4, 24, 1),
    (14, 8, 1, 16, 96, 100),  # one head for all queries
    (2, 4, 4, 8, 32, 3),  # as the second, with another n
    (14, 8, 4, 16, 96, 100),
    (40, 8, 7, 1022, 8176, 4093),  # more than float32 counts
)


@judged
def soft_counts(my_counts: Callable) -> None:
    """12.4: my_counts(config, n): (parameters of a prefix, parameters of a prompt)."""
    for layers, heads, kv_heads, size, hidden, n in SHAPES:
        config = LlamaConfig(
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=size,
            hidden_size=hidden,
            intermediate_size=8,
            max_position_embeddings=8192,
            **TOKENS,
        )
        with torch.device("meta"):
            trunk = AutoModelForCausalLM.from_config(config).model
            counted = [
                soft(trunk, config, n).P.numel() for soft in counting.SOFT.values()
            ]
        before = config.to_dict()
        got = my_counts(config, n)
        if config.to_dict() != before:
            raise Wrong(
                "the configuration was changed; it belongs to the caller. Likely "
                "mistake: config.… = …; give the number a name of its own"
            )
        shape = (
            f"{layers} layers, {heads} heads of size {size}, {kv_heads} of them with "
            f"keys and values, hidden size {hidden}"
        )
        close(
            got,
            tuple(counted),
            what=f"(prefix, prompt) for n={n} on {shape}",
            mistakes=_wrong_counts(config, n, *counted),
            tolerance=0.0,
            kind=int,
        )


def _wrong_counts(config, n: int, prefix: int, prompt: int) -> dict[str, tuple]:
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv_heads, size, d = config.num_key_value_heads, config.head_dim, config.hidden_size
    narrow = d // heads
    return {
        "a prefix has keys and values: times 2": (prefix // 2, prompt // 2),
        "every head was counted: only key-value heads have keys": (
            n * 2 * layers * heads * size,
            n * heads * size,
        ),
        "the hidden size was taken for h_kv d": (n * 2 * layers * d, None),
        "the size of a head is config.head_dim, not hidden size / heads": (
            n * 2 * layers * kv_heads * narrow,
            n * heads * narrow,
        ),
        "the layers are forgotten: a prefix stands in each": (
            n * 2 * kv_heads * size,
            n * 2 * d,
        ),
        "a prompt stands at the input alone, not in every layer": (
            n * 2 * layers,
            n * layers * d,
        ),
        "one layer too many: the layers alone have keys": (
            prefix + n * 2 * kv_heads * size,
            None,
        ),
        "heads over key-value heads: h_kv itself is meant": (
            n * 2 * layers * (heads // kv_heads) * size,
            None,
        ),
        "the width of the MLP: a prompt has that of the embeddings": (
            None,
            n * config.intermediate_size,
        ),
        "n is forgotten": (2 * layers * kv_heads * size, d),
        "prefix and prompt are swapped": (prompt, prefix),
        "one head's keys were counted: times h_kv": (n * 2 * layers * size, n * size),
        "the whole vocabulary was counted": (
            n * config.vocab_size,
            config.vocab_size * d,
        ),
        "bytes; parameters are asked for": (4 * prefix, 4 * prompt),
        "a prompt has the width of the keys: it has that of the embeddings": (
            prefix + prompt,
            n * kv_heads * size,
        ),
    }
