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
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..common import check, scoped
from ..core import adapter
from ..core.adapter import Plan
from ..core.decoder import (
    DecoderAdapter,
    cache_length,
    cache_of,
    find_decoder,
    token_ids,
)
from ..core.decoder_probe import refuse_unless_equal

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
    Raises   ValueError   a mask that is not (b, t), nor of packed rows; a cache that
             was filled without P; more tokens than the table of positions has places
             left; an attention implementation that was set after the injection, and
             would ignore P
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

    def of_layer(self, i: int) -> tuple[Tensor, Tensor]:
        """P_K and P_V of layer i, each (n, h_kv, d).

        Each layer asks for its own, and an MLP makes no others: a checkpointed layer,
        which runs again in backward, needs a graph that no other layer has freed.
        """
        _, heads, size = self.shape
        width = 2 * heads * size
        rows = slice(i * width, (i + 1) * width)
        flat = self.mlp(rows) if "mlp" in self._modules else self.P[:, rows]
        return flat.view(self.n, 2, heads, size).unbind(1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **others,
    ):
        self.is_packed(attention_mask, position_ids, others)
        _refuse_another(self.base.config._attn_implementation, self.implementation)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        t, cache = tokens.shape[1], cache_of(others)
        past = 0 if self.begins(cache) else cache_length(cache)
        self.refuse_lengths(attention_mask, past, t)
        position_ids = self.shifted_position_ids(
            position_ids, attention_mask, past, t, tokens.device
        )
        out = self.base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{KEYWORD: self.of_layer},
            **others,
        )
        self.sign(cache, out)
        return out

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

    def forward(self, rows: slice = slice(None)) -> Tensor:
        """(n, width), or those columns of it that `rows` of W2 make."""
        first, tanh, second = self.mlp
        return F.linear(tanh(first(self.E)), second.weight[rows], second.bias[rows])


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
    name, trunk = find_decoder(adapter.unwrapped(model))
    config = PrefixConfig(**options)
    shape = probe_kv_shape(trunk)

    def wrap(base: nn.Module) -> Prefix:
        refuse_unless_equal(base, "prefix", lambda ids: _large(base, shape), _cached)
        return Prefix(base, shape, config.n, config.start, config.hidden)

    return adapter.plan(
        model,
        wrap,
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
             drops keywords) or read it otherwise than its own cache (it numbers its
             positions itself, has keys and values of two sizes, …); the model as it was
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

    Raises  ValueError  some layer does not get it, and would silently ignore a prefix;
                        keys and values, or two layers, have different shapes
    """
    config, before = trunk.config, trunk.config._attn_implementation
    if before not in NAMES:
        raise ValueError(
            f"attn_implementation={before!r}: a prefix is implemented for "
            f"{' and '.join(NAMES)}; model.set_attn_implementation('sdpa') first"
        )
    seen: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}
    device = trunk.get_input_embeddings().weight.device
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    try:
        config._attn_implementation = NAMES[before]
        with scoped.mode(trunk, training=False):
            trunk(input_ids=token, use_cache=False, **{KEYWORD: seen})
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(_ignores(trunk, f"{type(error).__name__}: {error}")) from error
    finally:
        config._attn_implementation = before
    if len(seen) != config.num_hidden_layers:
        detail = f"{len(seen)} of {config.num_hidden_layers} layers saw it"
        raise ValueError(_ignores(trunk, detail))
    shapes = {shape for both in seen.values() for shape in both}
    if len(shapes) > 1:
        raise ValueError(
            f"{type(trunk).__name__} has keys and values of different shapes, (heads, "
            f"size) {sorted(shapes)}; a prefix holds one shape for all, so that a file "
            "of it means the same everywhere. Use prompt tuning or LoRA with it"
        )
    return (len(seen), *shapes.pop())


@torch.no_grad()
def activations(trunk: nn.Module, ids: Tensor) -> Tensor:
    """(n, 2 · layers · h_kv · d): the keys and values of these tokens, at 0 … n-1.

    Keys as attention reads them, so that rotary models' are rotated.

    Raises  ValueError  a layer that remembers tokens by more than keys and values
    """
    cache = DynamicCache()  # without a config: no layer forgets behind its window
    own = DynamicCache(config=trunk.config)
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in own.layers):
        raise ValueError(
            f"start: {type(trunk).__name__} keeps a recurrent state beside keys and "
            "values, and a prefix cannot start from the one that tokens leave: use "
            "start='random'"
        )
    with scoped.mode(trunk, training=False):
        trunk(
            input_ids=ids[None].to(trunk.device),
            past_key_values=cache,
            use_cache=True,
        )
    pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return torch.stack(pairs).permute(3, 0, 1, 2, 4).flatten(1)  # from (l, 2, h, n, d)


def _large(trunk: nn.Module, shape: tuple[int, int, int]) -> Prefix:
    """A prefix of n = 1 for the probe, as large as tokens' keys and values are."""
    with scoped.seeded(0, next(trunk.parameters()).device):
        prefix = Prefix(trunk, shape, 1)
    prefix.P /= STD
    return prefix


def _cached(prefix: Prefix) -> DynamicCache:
    """The prefix where a model has tokens it has read: in its own kind of cache."""
    cache = DynamicCache(config=prefix.base.config)
    dtype = prefix.base.get_input_embeddings().weight.dtype
    for i in range(prefix.shape[0]):
        P_K, P_V = (P.transpose(0, 1)[None].to(dtype) for P in prefix.of_layer(i))
        cache.update(P_K, P_V, i)  # (1, h_kv, n, d)
    return cache


def with_prefix(original: str):
    """An attention function: the prefix before keys and values, then the `original`."""

    def attend(module, query, key, value, attention_mask, **others):
        prefix = others.pop(KEYWORD, None)
        if isinstance(prefix, dict):  # probe_kv_shape() asks which layers get it
            shapes = (key.shape[1], key.shape[3]), (value.shape[1], value.shape[3])
            prefix[module.layer_idx] = shapes
        elif prefix is not None:
            P_K, P_V = prefix(module.layer_idx)  # (n, h_kv, d)
            attention_mask = _widen(attention_mask, query, key, len(P_K))
            key, value = _prepend(P_K, key), _prepend(P_V, value)
        attention = ALL_ATTENTION_FUNCTIONS.get(original) or _eager(module)
        return attention(module, query, key, value, attention_mask, **others)

    return attend


def _prepend(P: Tensor, states: Tensor) -> Tensor:
    """(b, h_kv, n + t, d): the same P (n, h_kv, d) before every row's own."""
    P = P.transpose(0, 1).to(states)  # (h_kv, n, d), of the layer's dtype and device
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
