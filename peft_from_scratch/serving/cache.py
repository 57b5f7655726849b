"""Keys and values of rows of different lengths, side by side, without padding.

transformers' own cache has one length for all rows: short ones are padded on the left,
and a row that joins or leaves copies the whole cache. Here each row begins at position
0 of a place of its own and has its own length; what lies behind its end is masked.

    place 0   [k k k k k k . . ]     a row that is being decoded: length 6
    place 1   [k k k . . . . . ]                                  length 3
    place 2   [k k . . . . . . ]     a row whose prompt is being read

A row that leaves is overwritten by the last one, so that the others lie next to each
other and no step copies them.

A model can ignore the mask or the positions, and remember in other ways than keys and
values: `refuse_unfit` asks it, by comparing its logits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ..common import scoped
from ..core.decoder_probe import CLOSE, CLOSE_IN_HALF
from ..training.loss import can_choose_logits

LEAST = 64  # tokens for which a cache has room at first


class RowsLayer(CacheLayerMixin):
    """The keys and values of one layer: (places, heads, capacity, size) each."""

    is_sliding = False

    def __init__(self, rows: "RowCache"):
        super().__init__()
        self.rows = rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.rows.places, key_states.shape[1], self.rows.capacity)
        self.keys = key_states.new_zeros(*shape, key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Write (rows, heads, tokens, size) at the rows' ends; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = self.rows
        places = torch.arange(rows.first, rows.first + len(key_states))[:, None]
        both = []
        for name, new in (("keys", key_states), ("values", value_states)):
            kept = self._grown(name)
            kept[places, :, rows.positions] = new.transpose(1, 2)
            both.append(kept[rows.first : rows.first + len(new), :, : rows.longest])
        return both

    def _grown(self, name: str) -> Tensor:
        kept = getattr(self, name)
        missing = self.rows.capacity - kept.shape[2]
        if missing > 0:
            kept = nn.functional.pad(kept, (0, 0, 0, missing))
            setattr(self, name, kept)
        return kept

    def move(self, source: int, target: int) -> None:
        """Copy a place over another."""
        if self.is_initialized:
            self.keys[target] = self.keys[source]
            self.values[target] = self.values[source]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.rows.longest, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):
    """The keys and values of up to `places` rows, each of a length of its own.

    Memory  2 · layers · places · heads · size of a head · capacity numbers; capacity is
            the longest row's length, rounded up to a power of two
    """

    def __init__(self, layers: int, places: int):
        super().__init__(layers=[RowsLayer(self) for _ in range(layers)])
        self.places, self.capacity = places, LEAST
        self.lengths = [0] * places
        self.first, self.longest = 0, 0
        self.positions = torch.zeros(1, 0, dtype=torch.long)

    @torch.no_grad()
    def forward(self, model: nn.Module, first: int, tokens: Sequence[Sequence[int]]):
        """The logits of the rows' next tokens: (rows, vocabulary), float32.

        Args
            first   the place of the first of the rows, which lie next to each other
            tokens  of each row, equally many: they continue what the cache has of it
        """
        weight = model.get_input_embeddings().weight
        ids = torch.tensor(tokens, device=weight.device)
        self._aim(first, *ids.shape)
        last = {"logits_to_keep": 1} if can_choose_logits(model) else {}
        out = model(
            input_ids=ids,
            attention_mask=self._mask(weight.dtype, weight.device),
            position_ids=self.positions.to(weight.device),
            past_key_values=self,
            use_cache=True,
            **last,
        )
        for row in range(first, first + len(tokens)):
            self.lengths[row] += ids.shape[1]
        return out.logits[:, -1].float()

    def _aim(self, first: int, rows: int, tokens: int) -> None:
        """Note where the next keys and values belong, and make room for them."""
        starts = torch.tensor(self.lengths[first : first + rows])
        self.first, self.positions = first, starts[:, None] + torch.arange(tokens)
        self.longest = int(starts.max()) + tokens
        while self.capacity < self.longest:
            self.capacity *= 2

    def _mask(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(rows, 1, tokens, longest): 0 up to a token's own position, lowest beyond."""
        hidden = torch.arange(self.longest) > self.positions[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=dtype)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min).to(device)

    def move(self, source: int, target: int) -> None:
        """Put the row of one place over that of another."""
        if source != target:
            for layer in self.layers:
                layer.move(source, target)
            self.lengths[target] = self.lengths[source]
        self.lengths[source] = 0


def layers_of(model: nn.Module) -> int:
    """How many layers have keys and values."""
    return model.config.get_text_config().num_hidden_layers


@torch.no_grad()
def refuse_unfit(model: nn.Module) -> None:
    """ValueError for a model that a RowCache gives other logits than none does.

    Two rows of different lengths are read in pieces, then continued together.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    long, short = ([i * 7 % vocabulary for i in range(3, n)] for n in (12, 8))
    try:
        with scoped.mode(model, training=False):
            alone = [_last_logits(model, row) for row in (long, short)]
            cache = RowCache(layers_of(model), 2)
            for place, row in enumerate((long, short)):
                for piece in (row[:3], row[3:-1]):
                    cache.forward(model, place, [piece])
            together = cache.forward(model, 0, [long[-1:], short[-1:]])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is: the model takes no such cache or mask
        raise ValueError(_unfit(model, str(error))) from error
    expected = torch.stack(alone).double()
    distance = (together.double() - expected).abs().amax(-1)
    half = model.get_input_embeddings().weight.dtype.itemsize < 4
    if (distance > (CLOSE_IN_HALF if half else CLOSE) * expected.abs().amax(-1)).any():
        raise ValueError(_unfit(model, "its logits then differ"))


def _last_logits(model: nn.Module, row: list[int]) -> Tensor:
    ids = torch.tensor([row], device=model.get_input_embeddings().weight.device)
    return model(input_ids=ids).logits[0, -1].float()


def _unfit(model: nn.Module, reason: str) -> str:
    return (
        f"{type(model).__name__} cannot be served: it does not read rows of different "
        f"lengths with a mask, positions and a cache of keys and values ({reason})"
    )
