"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning. Lester et
al., arXiv:2104.08691v2.

    h = f([P; E(x)])        P (n, d) trains, all of f is frozen

A prompt is a row of tokens, and a token is a row of the embedding table. So why stay
with rows that exist? P holds n rows that no token has, placed in front of the real
ones, and gradient descent writes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from ..common import check
from ..core import adapter
from ..core.adapter import Plan
from ..core.decoder import (
    CUT,
    DecoderAdapter,
    cache_length,
    cache_of,
    find_decoder,
    token_ids,
)
from ..core.decoder_probe import refuse_unless_equal

STARTS = ("random", "vocabulary")
STD = 0.5  # the paper draws from the uniform distribution on [-0.5, 0.5]
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # where packed rows begin


class Prompt(DecoderAdapter):
    """The trunk with n trained embeddings before the tokens' own.

        h = f([P; E(x)])[n:]                             [1] section 2

    Args
        base   the trunk, frozen here
        n      trained positions, 1 <= n <= 4096
        start  "random", "vocabulary", or token ids; see PromptConfig
    Returns  what the trunk returns, without the n positions
    Raises   ValueError   n or start out of range; a mask that is not (b, t), nor of
             packed rows; a row of padding alone, with a cache; a cache that was filled
             without P, or has no room for it; rows that are packed into one without a
             mask; an argument with one value a token, which P has not; more tokens than
             the model has positions left
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
        inputs_embeds: Tensor | None = None,
        **others,
    ):
        packed = self.is_packed(attention_mask, position_ids, others)
        embedding = self.base.get_input_embeddings()
        E = embedding(input_ids) if inputs_embeds is None else inputs_embeds
        b, t, _ = E.shape
        cache = cache_of(others)
        first = self.begins(cache)
        pads = left_padding(None if packed else attention_mask, b, E.device)  # (b,)
        self._refuse_misread(pads, t, attention_mask, position_ids, others, first)
        if position_ids is not None or attention_mask is not None:
            position_ids = self.shifted_position_ids(
                position_ids, attention_mask, 0, t, E.device
            )
        if packed:
            attention_mask = in_front_of_square(attention_mask, self.n)
        elif attention_mask is not None:
            ones = attention_mask.new_ones(b, self.n)
            attention_mask = insert_after_padding(pads, ones, attention_mask)
        if first:
            E = insert_after_padding(pads, self.P.to(E).expand(b, -1, -1), E)
            if position_ids is not None:
                of_P = torch.arange(self.n, device=E.device).expand(b, -1)
                position_ids = insert_after_padding(
                    pads, of_P, position_ids.expand(b, -1)
                )
        out = self.base(
            inputs_embeds=E,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **others,
        )
        self.sign(cache, out)
        return drop_prompt(pads, self.n, out) if first else out

    def _refuse_misread(
        self, pads: Tensor, t: int, attention_mask, position_ids, others, first: bool
    ) -> None:
        """ValueError for a call of which the model would read another text."""
        cache = cache_of(others)
        length = cache_length(cache)
        past = 0 if first else None if length is None else length - self.n
        self.refuse_lengths(attention_mask, past, t)
        if past is not None:
            _refuse_full(cache, self.n, past + t)
        if not first:
            if attention_mask is None and position_ids is not None:
                _refuse_cut(position_ids, past)
            return
        _refuse_packed(position_ids, attention_mask, others)
        _refuse_one_a_token(others, len(pads), t)
        if attention_mask is not None and others.get("use_cache") is not False:
            _refuse_padding_alone(pads, t)


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
    name, trunk = find_decoder(adapter.unwrapped(model))

    def wrap(base: nn.Module) -> Prompt:
        refuse_unless_equal(base, "soft prompt", lambda ids: Prompt(base, 1, ids))
        return Prompt(base, config.n, config.start)

    return adapter.plan(
        model,
        wrap,
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
    Raises   ValueError   an argument out of its range, no trunk, or one that does not
             treat P as it treats tokens (it needs their ids in every layer, …); the
             model as it was
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
    return ((attention_mask != 0).cumsum(-1) == 0).sum(-1)


def _refuse_cut(position_ids: Tensor, past: int | None) -> None:
    """ValueError for positions that do not go on where the cache ends."""
    begin = position_ids.min()
    if past is not None and begin != past:
        raise ValueError(
            f"position_ids begin at {begin}; the cache holds {past} tokens of yours. "
            f"{CUT}. Give attention_mask with positions of your own"
        )


def _refuse_full(cache, n: int, most: int) -> None:
    """ValueError for a cache of fixed length without room for P and `most` tokens."""
    fixed = isinstance(cache, Cache) and len(cache) and not any(cache.is_sliding)
    length = cache.get_max_length() if fixed else -1
    if 0 < length < n + most:
        raise ValueError(
            f"the cache has {length} places; a soft prompt takes {n} of them, and the "
            f"tokens so far {most}. Use a cache that grows, as generate() does by "
            "default"
        )


def _refuse_packed(position_ids, attention_mask, others: Mapping) -> None:
    """ValueError for rows that are packed into one: only the first would see P."""
    restarts = (
        position_ids is not None
        and attention_mask is None
        and (position_ids.diff(dim=-1) != 1).any()
    )
    named = [name for name in PACKED if others.get(name) is not None]
    if named or restarts:
        what = ", ".join(named) or "position_ids without attention_mask that restart"
        raise ValueError(
            f"{what}: several rows are packed into one, and a soft prompt would stand "
            "before the first alone. Pad the rows instead, train a prefix, which every "
            "packed row sees, or give attention_mask (batch, 1, tokens, tokens)"
        )


def _refuse_one_a_token(others: Mapping, b: int, t: int) -> None:
    """ValueError for an argument with one value a token: there is none for P."""
    for name, value in others.items():
        if not isinstance(value, Tensor) or name.startswith("encoder_"):
            continue
        if value.shape[:2] == (b, t) or value.shape == (t,):
            raise ValueError(
                f"{name} has one value for each of the {t} tokens, and there is none "
                "for the positions of a soft prompt: leave it out, or use LoRA"
            )


def _refuse_padding_alone(pads: Tensor, t: int) -> None:
    """ValueError for a piece that ends within a row's padding: P comes after that."""
    if (pads >= t).any():
        raise ValueError(
            f"row {pads.argmax().item()} has {t} tokens of padding and no other yet, "
            "and no place for its prompt: let the first piece of a prefill "
            "reach into every row (prefill_chunk_size), or sort rows by length"
        )


def in_front_of_square(mask: Tensor, n: int) -> Tensor:
    """The mask (b, 1, n + t, n + t) of packed rows (b, 1, t, t), with P in front.

    Every token sees all of P, and P sees of itself what stands before.
    """
    true = mask.dtype == torch.bool
    shown, hidden = (True, False) if true else (0.0, torch.finfo(mask.dtype).min)
    wide = F.pad(mask, (n, 0, n, 0), value=shown)
    later = torch.ones(n, wide.shape[-1], dtype=torch.bool, device=mask.device).triu(1)
    wide[..., :n, :].masked_fill_(later, hidden)
    return wide


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
