"""The question that a prompt or a prefix asks of a model before it changes anything.

    adapter(x) = trunk([p; x])[n:]      p stands where the adapter's n positions are

Whoever takes the place of tokens has to do what tokens there do. A model can break this
equation in many ways, and most of them raise no error: a decoder that numbers its
positions itself reads every token n positions too early, another mixes the token's id
into each layer. No list of names could be complete. So the question is put to the model
itself, with n = 1 and three tokens: both sides must agree.

The tokens come in two pieces, through the cache, as in generation. The distance that is
judged is the smallest over the tokens: a fault of this kind moves them all, while in
half precision a router may send a single one to another expert.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Cache

from ..common import scoped
from .decoder import CACHES, DecoderAdapter, cache_length

PLACES = (3, 2, 5, 7)  # the tokens: a third, half, … of the way through the vocabulary
CLOSE, CLOSE_IN_HALF = 1e-3, 0.05  # of the largest value; rounding is far below


@torch.no_grad()
def refuse_unless_equal(
    trunk: nn.Module,
    name: str,
    make: Callable[[Tensor], DecoderAdapter],
    filled: Callable[[DecoderAdapter], Cache] | None = None,
) -> None:
    """ValueError unless the adapter does what tokens in front of the text do.

    Args
        name    what the adapter is, for the error: "soft prompt"
        make    id (1,) of the token in front -> an adapter of the trunk, with n = 1
        filled  adapter -> a cache that holds its position, from which the trunk reads
                on. Without it the trunk reads the token in front, as p
    """
    embedding = trunk.get_input_embeddings().weight
    if embedding.is_meta:
        return  # shapes without numbers, of which only bytes are counted
    ids = torch.tensor([len(embedding) // k for k in PLACES], device=embedding.device)
    try:
        with scoped.mode(trunk, training=False):
            detail = _difference(trunk, ids, make, filled)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        detail, cause = f"{type(error).__name__}: {error}", error
    else:
        cause = None
    if detail is not None:
        raise ValueError(
            f"a {name} on {type(trunk).__name__} would not do what tokens in front of "
            f"the text do, as a probe with three tokens shows ({detail}). Use LoRA "
            "with it"
        ) from cause


def _difference(trunk, ids, make, filled) -> str | None:
    """What differs between the adapter and tokens; None where nothing does."""
    front, first, rest = ids[:1], ids[1:3], ids[3:]
    adapter = make(front)
    if filled is None:
        expected = _read(trunk, None, torch.cat([front, first]), rest)[1:]
    else:
        expected = _read(trunk, filled(adapter), first, rest)
    shapes = _shapes(trunk, first)
    adapter.on_attach()
    try:
        tensors = _read(adapter, None, first, rest)
        for parameter in adapter.parameters(recurse=False):
            parameter *= 1.5  # training moves it: away from each row of a table
        moved = _shapes(adapter, first)
    finally:
        adapter.on_remove()
    others = [field for field, shape in moved.items() if shape != shapes[field]]
    if others:
        return f"{others[0]} of what it returns has another shape"
    bound = CLOSE if expected.dtype.itemsize >= 4 else CLOSE_IN_HALF
    for way, part in (("", slice(2)), (" through the cache", slice(2, None))):
        distance = _distance(tensors[part], expected[part])
        if not distance < bound:
            return f"what the model computes{way} differs by {distance:.2g}"
    return None


def _shapes(module: nn.Module, ids: Tensor) -> dict[str, torch.Size]:
    """{field: shape} of the tensors that a module returns for these tokens."""
    out = module(input_ids=ids[None], use_cache=False)
    named = enumerate(out) if isinstance(out, tuple) else out.items()
    return {str(k): value.shape for k, value in named if isinstance(value, Tensor)}


def _read(module: nn.Module, cache: Cache | None, *pieces: Tensor) -> Tensor:
    """(t, d): the last hidden states of pieces, one after the other through the cache.

    Later pieces come with their positions, as generate() gives them to who takes any. A
    model without a cache reads the first piece alone.
    """
    hidden, caches = [], {} if cache is None else {CACHES[0]: cache}
    numbered = "position_ids" in inspect.signature(module.forward).parameters
    read = cache_length(cache)
    for ids in pieces:
        given = {}
        if hidden and numbered:
            given["position_ids"] = (
                torch.arange(len(ids), device=ids.device)[None] + read
            )
        read += len(ids)
        if cache_length(next(iter(caches.values()), None)) is not None:
            given["attention_mask"] = ids.new_ones(1, read)
        out = module(input_ids=ids[None], use_cache=True, **given, **caches)
        hidden.append(out[0][0])
        named = {} if isinstance(out, tuple) else {n: out.get(n) for n in CACHES}
        caches = {n: cache for n, cache in named.items() if cache is not None}
        if not caches:
            break
    return torch.cat(hidden)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """The smallest over the tokens of max |ours - theirs| / max |theirs|, 0 if none."""
    if not len(theirs):
        return 0.0
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).min().item()
