"""The second wrap point: the trunk, the module that owns the list of layers.

A projection sees one activation; a soft prompt and a prefix see the whole sequence.
They wrap the trunk: `model` of a Llama, `transformer` of a GPT-2, `model.decoder` of an
OPT. Inside it they may widen the mask and move the positions. The prompt's positions
are removed from the output, so that loss and `generate` see the caller's length.

Both occupy the positions 0 … n-1, and the first real token is at n:

    mask        . . x x x x          (. padding on the left, x real)
    positions   – – n n+1 n+2 n+3    n + the number of real tokens before
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..common import check
from .adapter import Adapter
from .targets import named_modules, refuse_second

LARGEST_N = 4096  # positions that a prompt or a prefix may occupy


class DecoderAdapter(Adapter):
    """An adapter of the whole stack of layers; there is one in a model.

    What it lacks itself it takes from the trunk, since transformers asks a trunk for
    much.
    """

    def __init__(self, base: nn.Module, n: int):
        config = getattr(base, "config", None)
        positions = getattr(config, "max_position_embeddings", None) or LARGEST_N + 1
        largest = min(LARGEST_N, positions - 1)  # one is left for a token
        check.whole("n", n, 1, largest, of="positions")
        super().__init__(base)
        self.n = n

    def __getattr__(self, name: str):
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    def shifted_position_ids(
        self, position_ids, attention_mask, past: int, t: int
    ) -> Tensor:
        """Positions of the `t` newest tokens, n further on.

        Args
            position_ids    (b, t) from the caller, or None
            attention_mask  (b, past + t), 1 at real tokens, or None
        """
        if position_ids is None and attention_mask is not None:
            count = attention_mask.long().cumsum(-1)  # real tokens up to here
            position_ids = (count - 1).clamp(min=0)[:, -t:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + t, device=self.device)[None]
        return position_ids + self.n


def find_decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """(name, module) of the trunk; ValueError where there is none, or more than one.

    A model that carries adapters already is refused as well.
    """
    refuse_second(model)
    lists = [
        (name.rpartition(".")[0], layers)
        for name, layers in named_modules(model)
        if isinstance(layers, nn.ModuleList)
        and any(isinstance(layer, GradientCheckpointingLayer) for layer in layers)
    ]
    if len(lists) != 1 or not lists[0][0]:
        raise ValueError(
            f"this {type(model).__name__} has {len(lists)} lists of decoder layers, in "
            f"{', '.join(name or 'the model itself' for name, _ in lists) or 'none'}; "
            "prompts and prefixes need a causal language model with one, inside a "
            "module of its own"
        )
    name = lists[0][0]
    return name, dict(named_modules(model))[name]


def positions(model: nn.Module) -> int | None:
    """How many tokens the model can read at once; None where it does not say."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def refuse_4d(attention_mask) -> None:
    """ValueError for a mask that is not (b, t): there is no telling what is padding."""
    if attention_mask is not None and not (
        isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
    ):
        kind = (
            f"of {attention_mask.dim()} dimensions"
            if isinstance(attention_mask, Tensor)
            else f"a {type(attention_mask).__name__}"
        )
        raise ValueError(
            f"attention_mask is {kind}: with a soft prompt or a prefix it must be "
            "(batch, tokens), 1 at real tokens (static caches make others)"
        )


def cache_length(past_key_values) -> int:
    """Tokens that the cache holds; 0 without one."""
    return 0 if past_key_values is None else past_key_values.get_seq_length()


def token_ids(start, n: int, vocabulary: int) -> Tensor:
    """The n ids of an initialization, repeated or cut, as PEFT does with a text.

    Raises  ValueError  no list of whole numbers below the vocabulary's
    """
    ids = start.tolist() if hasattr(start, "tolist") else start
    most = vocabulary - 1
    check.require(
        isinstance(ids, Sequence)
        and len(ids) > 0
        and all(check.is_whole(i, 0, most) for i in ids),
        "start",
        start,
        f"allowed are whole token ids from 0 to {most}, at least one, in one list",
    )
    return torch.tensor((list(ids) * -(-n // len(ids)))[:n])
