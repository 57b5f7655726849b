"""Prefix-Tuning: Optimizing Continuous Prompts for Generation. Li and Liang,
arXiv:2101.00190v1.

    head = softmax(Q [P_K; K]ᵀ / sqrt(d)) [P_V; V]      at every attention layer

n keys P_K and n values P_V of each layer train; the model is frozen. The tokens attend
to a context that no text could have made: a prompt's n positions, written anew in every
layer.

How it gets there: transformers lets a model name its attention function. The trunk
hands P down as a keyword; the function registered here joins it to the keys and values
and calls the one that the model had. Nothing is put into the cache, so that the prefix
survives gradient checkpointing, left padding, and every way to decode.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..common import check, scoped
from ..core import adapter
from ..core.adapter import Plan
from ..core.decoder import (
    DecoderAdapter,
    cache_length,
    find_decoder,
    refuse_4d,
    token_ids,
)

KEYWORD = "pfs_prefix"
NAMES = {"sdpa": "pfs_prefix_sdpa", "eager": "pfs_prefix_eager"}
STD = 0.02  # of the random start: keys and values near zero disturb little


class Prefix(DecoderAdapter):
    """The trunk with n trained keys and values before those of every layer.

        o = softmax(q [P_K; K]ᵀ / sqrt(d) + mask) [P_V; V]      [1] eq. (3), section 4.2

    Args
        base    the trunk, frozen here
        shape   (layers, h_kv, d): its layers, key-value heads, and their size
        n       trained positions, 1 <= n <= 4096
        start, hidden   see PrefixConfig
    Returns  what the trunk returns
    Raises   ValueError   a mask that is not (b, t); an attention implementation that
             was set after the injection, which would ignore P in silence
    Memory   n · 2 · layers · h_kv · d parameters; with the MLP, far more until drop_mlp
    Departs  [1] has P_K before the rotation of rotary models, which it does not know.
             Here P_K is not rotated, as in PEFT. A sliding window never hides P.
    Source   [1] arXiv:2101.00190v1
    """

    cannot_merge = (
        "a prefix is not a change of any weight. Its keys and values share a softmax "
        "with the tokens' own, which no weight matrix can imitate"
    )

    def __init__(
        self,
        base: nn.Module,
        shape: tuple[int, int, int],
        n: int = 16,
        start: str | Sequence[int] = "random",
        hidden: int | None = None,
    ):
        super().__init__(base, n)
        layers, heads, size = self.shape = shape
        width = layers * 2 * heads * size
        weight = next(base.parameters())
        dtype = adapter.trained_dtype(weight)
        like = dict(device=weight.device, dtype=dtype)
        if hidden is not None:
            self.mlp = Reparametrized(n, heads * size, hidden, width, **like)
        elif isinstance(start, str):
            self.P = nn.Parameter(STD * torch.randn(n, width, **like))
        else:
            ids = token_ids(start, n, len(base.get_input_embeddings().weight))
            self.P = nn.Parameter(activations(base, ids).to(dtype))
        self.implementation = base.config._attn_implementation

    def states(self) -> Tensor:
        """P as (n, layers, 2, h_kv, d): of each layer the keys, then the values."""
        layers, heads, size = self.shape
        return self._flat().view(self.n, layers, 2, heads, size)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        **others,
    ):
        refuse_4d(attention_mask)
        _refuse_another(self.base.config._attn_implementation, self.implementation)
        t = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        past = cache_length(past_key_values)
        position_ids = self.shifted_position_ids(position_ids, attention_mask, past, t)
        return self.base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **{KEYWORD: self.states()},
            **others,
        )

    def on_attach(self) -> None:
        self.base.config._attn_implementation = NAMES[self.implementation]

    def on_remove(self) -> None:
        self.base.config._attn_implementation = self.implementation

    def drop_mlp(self) -> None:
        """Keep the P that the MLP makes, and train that from here on."""
        P = self._flat().detach()
        del self.mlp
        self.P = nn.Parameter(P)

    def _flat(self) -> Tensor:
        return self.mlp() if "mlp" in self._modules else self.P


class Reparametrized(nn.Module):
    """P = MLP(E): the paper's way to a stable training, dropped when it is over.

    P = W2 tanh(W1 E + b1) + b2   E (n, d) W1 (hidden, d) W2 (2·layers·h_kv·d, hidden)
    """

    def __init__(self, n: int, d: int, hidden: int, width: int, **like):
        super().__init__()
        self.E = nn.Parameter(torch.randn(n, d, **like))
        self.mlp = nn.Sequential(
            nn.Linear(d, hidden, **like), nn.Tanh(), nn.Linear(hidden, width, **like)
        )

    def forward(self) -> Tensor:
        return self.mlp(self.E)  # (n, width)


@dataclass(frozen=True)
class PrefixConfig:
    """What a prefix is made of; checked here, as far as no model is needed for that.

    n       positions that train, 1 <= n <= 4096, and fewer than the model has
    start   "random": Gaussian, near zero; or token ids, which are repeated or cut to n:
            the keys and values that they have in this model. The model then starts as
            if it had read them: start=tokenizer(text).input_ids
    hidden  P = MLP(E) with this many hidden units, the paper's reparametrization.
            `drop_mlp` or save and load leave P alone. None trains P itself
    """

    n: int = 16
    start: str | Sequence[int] = "random"
    hidden: int | None = None

    def __post_init__(self):
        if isinstance(self.start, str):
            check.one_of("start", self.start, ("random",), ", or a list of token ids")
        if self.hidden is None:
            return
        units = check.is_whole(self.hidden, 1)
        allowed = "allowed is a whole number of units, or None"
        check.require(units, "hidden", self.hidden, allowed)
        if not isinstance(self.start, str):
            raise ValueError(
                "start and hidden exclude each other: the keys and values of given "
                "tokens are no output of an untrained MLP"
            )


def plan(model: nn.Module, **options) -> Plan:
    """The plan of inject, with its arguments; see adapter.plan."""
    name, trunk = find_decoder(adapter.unwrap_compiled(model))
    config = PrefixConfig(**options)
    shape = probe_kv_shape(trunk)
    return adapter.plan(
        model,
        lambda base: Prefix(base, shape, config.n, config.start, config.hidden),
        {name: trunk},
        method="prefix",
        config=dict(n=config.n, hidden=config.hidden),
    )


def inject(
    model: nn.Module,
    *,
    n: int = 16,
    start: str | Sequence[int] = "random",
    hidden: int | None = None,
) -> list[str]:
    """Freeze the model and put n trained keys and values before those of every layer.

    Args     see PrefixConfig
    Returns  [the name of the trunk]
    Raises   ValueError   an argument out of its range, a model that would ignore the
             prefix (its attention does not go through transformers' interface, or
             drops keywords); the model as it was
    """
    return adapter.apply(model, plan(model, n=n, start=start, hidden=hidden))


def drop_mlp(model: nn.Module) -> None:
    """After training with `hidden`: keep the prefix, drop the MLP that made it.

    Raises  ValueError  no prefix, or one without an MLP
    """
    wrapped = next(iter(adapter.adapters(model).values()), None)
    if not (isinstance(wrapped, Prefix) and "mlp" in wrapped._modules):
        raise ValueError(
            "drop_mlp() is for a model with a prefix that an MLP makes: "
            "prefix.inject(model, hidden=512)"
        )
    wrapped.drop_mlp()


@torch.no_grad()
def probe_kv_shape(trunk: nn.Module) -> tuple[int, int, int]:
    """(layers, key-value heads, head size), as a keyword on one token's way sees them.

    Raises  ValueError  some layer does not get it, and would silently ignore a prefix
    """
    config, before = trunk.config, trunk.config._attn_implementation
    if before not in NAMES:
        raise ValueError(
            f"attn_implementation={before!r}: a prefix is implemented for "
            f"{' and '.join(NAMES)}; model.set_attn_implementation('sdpa') first"
        )
    seen: dict[int, tuple[int, int]] = {}
    token = torch.zeros(1, 1, dtype=torch.long, device=trunk.device)
    try:
        config._attn_implementation = NAMES[before]
        with scoped.mode(trunk, training=False):
            trunk(input_ids=token, use_cache=False, **{KEYWORD: seen})
    except TypeError as error:
        raise ValueError(_ignores(trunk, error)) from None
    finally:
        config._attn_implementation = before
    sizes = set(seen.values())
    if len(seen) != config.num_hidden_layers or len(sizes) != 1:
        detail = f"{len(seen)} of {config.num_hidden_layers} layers saw it"
        if len(sizes) > 1:
            detail = f"its layers have keys of different shapes, {sorted(sizes)}"
        raise ValueError(_ignores(trunk, detail))
    return (len(seen), *sizes.pop())


@torch.no_grad()
def activations(trunk: nn.Module, ids: Tensor) -> Tensor:
    """(n, 2 · layers · h_kv · d): the keys and values of these tokens, at 0 … n-1.

    Keys as attention reads them, so that rotary models' are rotated.
    """
    cache = DynamicCache()  # without a config: no layer forgets behind its window
    with scoped.mode(trunk, training=False):
        trunk(
            input_ids=ids[None].to(trunk.device),
            past_key_values=cache,
            use_cache=True,
        )
    pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return torch.stack(pairs).permute(3, 0, 1, 2, 4).flatten(1)  # from (l, 2, h, n, d)


def with_prefix(original: str):
    """An attention function: the prefix before keys and values, then the `original`."""

    def attend(module, query, key, value, attention_mask, **others):
        prefix = others.pop(KEYWORD, None)
        if isinstance(prefix, dict):  # probe_kv_shape() asks which layers get it
            prefix[module.layer_idx] = (key.shape[1], key.shape[3])
        elif prefix is not None:
            attention_mask = _widen(attention_mask, query, key, len(prefix))
            P_K, P_V = prefix[:, module.layer_idx].unbind(1)  # (n, h_kv, d)
            key, value = _prepend(P_K, key), _prepend(P_V, value)
        attention = ALL_ATTENTION_FUNCTIONS.get(original) or _eager(module)
        return attention(module, query, key, value, attention_mask, **others)

    return attend


def _prepend(P: Tensor, states: Tensor) -> Tensor:
    """(b, h_kv, n + t, d): the same P (n, h_kv, d) before every row's own."""
    P = P.transpose(0, 1).to(states.dtype)  # (h_kv, n, d)
    return torch.cat([P.expand(len(states), -1, -1, -1), states], dim=2)


def _widen(mask: Tensor | None, query: Tensor, key: Tensor, n: int) -> Tensor | None:
    """The mask (…, t_q, n + t) that lets every query see the n of the prefix."""
    t_q, t = query.shape[2], key.shape[2]
    if mask is None and t_q == 1:
        return None  # one query, which sees all
    if mask is None:  # causal, which the original would take from the shapes
        mask = torch.ones(t_q, t, dtype=torch.bool, device=query.device)
        mask = mask.tril(t - t_q)[None, None]
    return F.pad(mask, (n, 0), value=True if mask.dtype == torch.bool else 0.0)


def _eager(module):
    """The eager attention of the file in which this attention module is written."""
    return sys.modules[type(module).__module__].eager_attention_forward


def _refuse_another(now: str, before: str) -> None:
    if now != NAMES[before]:
        raise ValueError(
            f"attn_implementation={now!r} was set after the injection and knows "
            "nothing of the prefix. Save the prefix, remove() it, set the "
            "implementation, and load the prefix again"
        )


def _ignores(trunk, detail) -> str:
    return (
        f"{type(trunk).__name__} would ignore a prefix in silence: its attention does "
        f"not hand keywords to transformers' attention interface ({detail}). Use "
        "prompt tuning or LoRA with it"
    )


for _original, _name in NAMES.items():
    AttentionInterface.register(_name, with_prefix(_original))
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_original])
