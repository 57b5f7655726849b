"""Greedy answers in batches, with a common prefix computed once.

Three things make a batch answer as its rows would alone:

    padding    on the left, so that the last token of every row is its own, and masked
    positions  counted over real tokens, so that a pad shifts nothing
    the prefix the tokens that all prompts begin with (instruction, few-shot examples)
               go through the model once; every batch starts from a copy of their keys
               and values, never from the ones that an earlier batch has appended to

A batch then looks like this, and its mask covers what is in the cache as well:

    in the cache          in the batch
    [prefix prefix prefix][pad pad row row row]
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import Cache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..common import scoped
from ..common.progress import bar
from ..core.decoder import in_front, positions, positions_in_words
from ..nf4.keeping import unpacked
from .batch import left_pad
from .loss import can_choose_logits

LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)  # caches of keys and values alone


def generate(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    stop_id: int,
    max_new_tokens: int = 96,
    batch: int = 32,
    prefix: Sequence[int] = (),
    progress: bool = False,
    unpacked_bytes: int = 0,
) -> list[str]:
    """The greedy continuation of `prefix + prompt` for each prompt.

    In float32 this equals, token for token, one row at a time with no cached prefix and
    no padding; in lower precisions near-ties may fall differently.

    Args
        prompts         token ids without the prefix, none empty
        stop_id         the token that ends an answer; not part of it
        max_new_tokens  where an answer that does not end is cut
        batch           rows at once; similar lengths are put together
        prefix          token ids that all prompts begin with
        progress        show a bar with the time left, in a terminal or a notebook
        unpacked_bytes  that weights in four bits may take besides, dequantized once for
                        all tokens (nf4.unpacked): the same answers, sooner; 0 for none
    Returns  the answers as text, in the order of the prompts, special tokens left out
    Raises   ValueError   an empty prompt, or more tokens than the model has positions
    Memory   the keys and values of prefix, prompt and answer, batch times; at most
             unpacked_bytes
    """
    if not all(prompts):
        raise ValueError("a prompt is empty: leave its last token out of the prefix")
    prompts, prefix = [list(prompt) for prompt in prompts], list(prefix)
    most = len(prefix) + max(map(len, prompts), default=0) + max_new_tokens
    _check_length(model, most)
    answers = [""] * len(prompts)
    with (
        scoped.mode(model, training=False),
        unpacked(model, budget_bytes=unpacked_bytes),
        _greedy(model, stop_id, max_new_tokens),
        bar("answer", "row", len(prompts), shown=progress) as shown,
    ):
        slides = _slides(model, in_front(model) + most)
        cache = None if slides else _read(model, prefix)
        if cache is None:
            prompts, prefix = [prefix + prompt for prompt in prompts], []
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            new = _continue(model, cache, prefix, [prompts[i] for i in chosen], stop_id)
            for i, tokens in zip(chosen, new, strict=True):
                answers[i] = tokenizer.decode(tokens, skip_special_tokens=True)
            shown.update(len(chosen))
    return answers


def _continue(model, cache, prefix, prompts, stop_id) -> list[list[int]]:
    """The new tokens of one batch, each row up to its stop token."""
    # After its stop token a row is filled with pads; that this is the same token does
    # no harm, because the first one ends the answer.
    ids, mask = left_pad(prompts, len(prefix), stop_id)
    written = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        past_key_values=_repeat(cache, len(prompts)),
        generation_config=model.generation_config,
    )
    new = written[:, ids.shape[1] :].tolist()
    return [row[: row.index(stop_id)] if stop_id in row else row for row in new]


@torch.no_grad()
def _read(model, prefix) -> Cache | None:
    """The prefix's keys and values, for one row; None where it is empty.

    None also for a model that remembers by other means: the state of a state-space
    mixer is not repeated for a batch here, and the prefix computed with each row.
    """
    if not prefix:
        return None
    last = {"logits_to_keep": 1} if can_choose_logits(model) else {}
    out = model(torch.tensor([prefix], device=model.device), use_cache=True, **last)
    cache = getattr(out, "past_key_values", None)
    plain = isinstance(cache, Cache) and all(type(x) in LAYERS for x in cache.layers)
    return cache if plain else None


def _repeat(cache, rows) -> Cache | None:
    """A copy for `rows` rows: generation appends to the copy, the original stays."""
    if cache is None:
        return None
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(rows)
    return repeated


@contextmanager
def _greedy(model, stop_id, max_new_tokens) -> Iterator[None]:
    """Plain argmax inside; afterwards the model's own generation config is back.

    Passing a config is not enough: what it leaves open (penalties, forced tokens) would
    be filled from the model's own.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_id,
        pad_token_id=stop_id,
    )
    try:
        yield
    finally:
        model.generation_config = before


def _check_length(model, tokens) -> None:
    limit = positions(model)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"prefix, longest row and max_new_tokens are {tokens} tokens; the model "
            f"has {positions_in_words(model)}: give fewer examples, shorter rows, a "
            "smaller limit"
        )


def _slides(model, tokens) -> bool:
    """True where attention slides over fewer than `tokens` positions.

    A sliding window counts the pads between prefix and row, though they are masked: the
    prefix is then computed again for each row, to its left.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return window is not None and tokens > window
