"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning. Lester et
al., arXiv:2104.08691v2.

    h = f([P; E(x)])        P (n, d) trains, all of f is frozen

A prompt is a row of tokens, and a token is a row of the embedding table. So why stay
with rows that exist? P holds n rows that no token has, placed in front of the real
ones, and gradient descent writes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common import check
from ..core import adapter
from ..core.adapter import Plan
from ..core.decoder import (
    DecoderAdapter,
    cache_length,
    find_decoder,
    refuse_4d,
    token_ids,
)

STARTS = ("random", "vocabulary")
STD = 0.5  # the paper draws from the uniform distribution on [-0.5, 0.5]


class Prompt(DecoderAdapter):
    """The trunk with n trained embeddings before the tokens' own.

        h = f([P; E(x)])[n:]                             [1] section 2

    Args
        base   the trunk, frozen here
        n      trained positions, 1 <= n <= 4096
        start  "random", "vocabulary", or token ids; see PromptConfig
    Returns  what the trunk returns, without the n positions
    Raises   ValueError   n or start out of range; a mask that is not (b, t); a row
             of padding alone, with a cache
    Memory   n d parameters, and activations for n more tokens in every row
    Departs  [1] places P before everything. Here it comes after the padding on the
             left, so that a row's answer does not depend on its neighbours' lengths.
    Source   [1] arXiv:2104.08691v2
    """

    cannot_merge = (
        "a soft prompt is not a change of any weight. It adds positions to the "
        "sequence, whose keys and values depend on the position and the layer"
    )

    def __init__(
        self, base: nn.Module, n: int = 16, start: str | Sequence[int] = "vocabulary"
    ):
        super().__init__(base, n)
        embedding = base.get_input_embeddings()
        table = embedding.weight  # (vocabulary, d)
        dtype = adapter.trained_dtype(table)
        if isinstance(start, str) and start == "random":
            P = torch.rand(n, table.shape[1], device=table.device, dtype=dtype) - STD
        else:
            ids = initial_ids(start, n, len(table))
            with torch.no_grad():
                P = embedding(ids.to(table.device)).to(dtype)
        self.P = nn.Parameter(P)

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
        embedding = self.base.get_input_embeddings()
        E = embedding(input_ids) if inputs_embeds is None else inputs_embeds
        b, t, _ = E.shape
        first = cache_length(past_key_values) == 0
        pads = left_padding(attention_mask, b, E.device)  # (b,)
        if (
            first
            and attention_mask is not None
            and others.get("use_cache") is not False
        ):
            _refuse_padding_alone(pads, t)
        if position_ids is not None or attention_mask is not None:
            position_ids = self.shifted_position_ids(position_ids, attention_mask, 0, t)
        if attention_mask is not None:
            ones = attention_mask.new_ones(b, self.n)
            attention_mask = insert_after_padding(pads, ones, attention_mask)
        if first:
            E = insert_after_padding(pads, self.P.to(E.dtype).expand(b, -1, -1), E)
            if position_ids is not None:
                of_P = torch.arange(self.n, device=E.device).expand(b, -1)
                position_ids = insert_after_padding(
                    pads, of_P, position_ids.expand(b, -1)
                )
        out = self.base(
            inputs_embeds=E,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **others,
        )
        return drop_prompt(pads, self.n, out) if first else out


@dataclass(frozen=True)
class PromptConfig:
    """What a prompt is made of; checked here, as far as no model is needed for that.

    n      positions that train, 1 <= n <= 4096, and fewer than the model has
    start  "vocabulary": the embeddings of tokens drawn at random; "random": uniform in
           [-0.5, 0.5]; or token ids, those of an instruction for example, which are
           repeated or cut to n: start=tokenizer(text).input_ids
    """

    n: int = 16
    start: str | Sequence[int] = "vocabulary"

    def __post_init__(self):
        if isinstance(self.start, str):
            check.one_of("start", self.start, STARTS, ", or a list of token ids")


def plan(model: nn.Module, **options) -> Plan:
    """The plan of inject, with its arguments; see adapter.plan."""
    config = PromptConfig(**options)
    name, trunk = find_decoder(adapter.unwrap_compiled(model))
    return adapter.plan(
        model,
        lambda base: Prompt(base, config.n, config.start),
        {name: trunk},
        method="prompt",
        config=dict(n=config.n),
    )


def inject(
    model: nn.Module, *, n: int = 16, start: str | Sequence[int] = "vocabulary"
) -> list[str]:
    """Freeze the model and put n trained embeddings before every sequence.

    Args     see PromptConfig
    Returns  [the name of the trunk]
    Raises   ValueError   an argument out of its range, no trunk; the model as it was
    """
    return adapter.apply(model, plan(model, n=n, start=start))


def initial_ids(start, n: int, vocabulary: int) -> Tensor:
    """n token ids: drawn at random, or the given ones."""
    if isinstance(start, str):
        check.one_of("start", start, STARTS, ", or a list of token ids")
        return torch.randint(vocabulary, (n,))
    return token_ids(start, n, vocabulary)


def left_padding(attention_mask, b: int, device) -> Tensor:
    """The number of padding tokens on the left of each row: (b,)."""
    if attention_mask is None:
        return torch.zeros(b, dtype=torch.long, device=device)
    return (attention_mask.long().cumsum(-1) == 0).sum(-1)


def _refuse_padding_alone(pads: Tensor, t: int) -> None:
    """ValueError for a piece that ends within a row's padding: P comes after that."""
    if (pads >= t).any():
        raise ValueError(
            f"row {pads.argmax().item()} has {t} tokens of padding and no other yet, "
            "and no place for its prompt: let the first piece of a prefill "
            "reach into every row (prefill_chunk_size), or sort rows by length"
        )


def insert_after_padding(pads: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Each row of `old` (b, t, …), with `new` (b, n, …) after its first `pads`."""
    n, t = new.shape[1], old.shape[1]
    j = torch.arange(n + t, device=old.device).expand(len(old), -1)
    p = pads[:, None]
    # place j of the result is: padding j, or new j - p, or token j - n
    source = torch.where(j < p, n + j, torch.where(j < p + n, j - p, j))
    return gather_rows(torch.cat([new, old], 1), source)


def drop_prompt(pads: Tensor, n: int, out):
    """The trunk's output without the n positions after each row's padding."""

    def cut(h: Tensor) -> Tensor:
        j = torch.arange(h.shape[1] - n, device=h.device).expand(len(h), -1)
        return gather_rows(h, torch.where(j < pads[:, None], j, j + n))

    if isinstance(out, tuple):
        return (cut(out[0]), *out[1:])
    out.last_hidden_state = cut(out.last_hidden_state)
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(map(cut, out.hidden_states))
    return out


def gather_rows(x: Tensor, places: Tensor) -> Tensor:
    """x[i, places[i]] of every row i."""
    index = places.reshape(*places.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(*places.shape, *x.shape[2:]))
