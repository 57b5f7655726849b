"""The second wrap point: the trunk, the module that owns the list of layers.

A projection sees one activation; a soft prompt and a prefix see the whole sequence.
They wrap the trunk: `model` of a Llama, `transformer` of a GPT-2, `model.decoder` of an
OPT. Inside it they may widen the mask and move the positions. The prompt's positions
are removed from the output, so that loss and `generate` see the caller's length.

Not every model can be served. One may number its positions itself, another may mix a
token's id into every layer. decoder_probe.py compares the adapter with real tokens
before the model is changed, and refuses a model on which the two differ.

Both occupy the positions 0 … n-1, and the first real token is at n:

    mask        . . x x x x          (. padding on the left, x real)
    positions   – – n n+1 n+2 n+3    n + the number of real tokens before
"""

from collections.abc import Mapping, Sequence
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..common import check
from .adapter import Adapter, adapters
from .targets import named_modules, refuse_unfit, unwrapped

LARGEST_N = 4096  # positions that a prompt or a prefix may occupy
CACHES = ("past_key_values", "cache_params", "state")  # a trunk's names for its cache
MARK = "pfs_in_front"  # on a cache: which adapter stands before the tokens in it
OFFSET = 8  # rows that a table of positions may have for padding, at most
CUT = (
    "generate() takes the new tokens alone where a cache comes with them, and the mask "
    "of all: generate(ids[:, k:], attention_mask=mask, past_key_values=cache), k the "
    "tokens that the cache holds; of whole texts it cuts off n too many"
)


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
        self.mark = uuid4().bytes  # a copy of the model keeps it, and reads its caches
        self.table = table_of_positions(base)

    def __getattr__(self, name: str):
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    def begins(self, cache) -> bool:
        """Whether these are the first tokens of a sequence: the cache holds none yet.

        Raises  ValueError  a cache that was filled without this adapter
        """
        if is_empty(cache):
            return True
        if isinstance(cache, list):  # RWKV's bare tensors, which no mark can be put on
            return False
        if getattr(cache, MARK, None) != self.mark:
            raise ValueError(
                f"the cache ({type(cache).__name__}) was not filled by this model with "
                f"this {type(self).__name__.lower()} in front: its tokens have read "
                "other positions. Let the model read the whole text again, without it"
            )
        return False

    def sign(self, cache, out) -> None:
        """Note on the cache, given or new, that this adapter is before its tokens."""
        for each in (cache, cache_of(out)):
            if each is not None and not isinstance(each, list):
                setattr(each, MARK, self.mark)

    def refuse_lengths(self, attention_mask, past: int | None, t: int) -> None:
        """ValueError for a mask of another length, or tokens behind the last position.

        Args
            past  the caller's tokens in the cache; None where it does not count
            t     new tokens
        """
        if past is None or (attention_mask is not None and attention_mask.dim() == 4):
            return  # packed rows were judged by their positions
        columns = past + t if attention_mask is None else attention_mask.shape[1]
        if columns != past + t:
            raise ValueError(
                f"attention_mask has {columns} columns; the cache holds {past} tokens "
                f"of yours, and {t} are new. {CUT}"
            )
        self.refuse_beyond_table(past + t)

    def is_packed(self, attention_mask, position_ids, others: Mapping) -> bool:
        """Whether a call reads packed rows, with a mask and a position for each token.

        The mask is (b or 1, 1, t, t), and there is no cache. Where every token sees the
        n of this adapter, they stand in front of each row.

        Raises  ValueError  another mask that is not (b, t); a position that the model
                            has not
        """
        square = (
            isinstance(attention_mask, Tensor)
            and attention_mask.dim() == 4
            and attention_mask.shape[1] == 1
            and attention_mask.shape[2] == attention_mask.shape[3]
        )
        alone = others.get("use_cache") is False and cache_of(others) is None
        if not (square and alone and position_ids is not None):
            refuse_4d(attention_mask)
            return False
        self.refuse_beyond_table(int(position_ids.max()) + 1)
        return True

    def refuse_beyond_table(self, tokens: int) -> None:
        """ValueError for a text of more tokens than a table of positions has left."""
        if self.table is not None and self.n + tokens > self.table:
            raise ValueError(
                f"{tokens} tokens and {self.n} positions of the "
                f"{type(self).__name__.lower()} are {self.n + tokens}; the model has "
                f"{self.table}. Allowed are {self.table - self.n} tokens: shorten them"
            )

    def shifted_position_ids(
        self, position_ids, attention_mask, past: int, t: int, device: torch.device
    ) -> Tensor:
        """Positions of the `t` newest tokens, n further on.

        Args
            position_ids    (b, t) from the caller, or None
            attention_mask  (b, past + t), not 0 at real tokens, or None
        """
        if position_ids is None and attention_mask is not None:
            count = (attention_mask != 0).cumsum(-1)  # real tokens up to here
            position_ids = (count - 1).clamp(min=0)[:, -t:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + t, device=device)[None]
        return position_ids + self.n


def find_decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """(name, module) of the trunk; ValueError where there is none, or more than one.

    It is the smallest module around the layers that embeds token ids. A model that
    carries adapters already is refused as well.
    """
    refuse_unfit(model)
    lists = [
        (name.rpartition(".")[0], layers)
        for name, layers in named_modules(model)
        if isinstance(layers, nn.ModuleList)
        and any(isinstance(unwrapped(x), GradientCheckpointingLayer) for x in layers)
    ]
    modules = dict(named_modules(model))
    name = lists[0][0] if len(lists) == 1 else ""
    while name and not _embeds_ids(modules[name]):
        name = name.rpartition(".")[0]
    if not name:
        raise ValueError(
            f"this {type(model).__name__} has {len(lists)} lists of decoder layers, in "
            f"{', '.join(name or 'the model itself' for name, _ in lists) or 'none'}; "
            "prompts and prefixes need a causal language model with one, inside a "
            "module of its own that embeds token ids"
        )
    return name, modules[name]


def _embeds_ids(module: nn.Module) -> bool:
    try:
        return module.get_input_embeddings() is not None
    except (AttributeError, NotImplementedError):
        return False


def in_front(model: nn.Module) -> int:
    """The positions that a prompt or a prefix takes from the model's; 0 without one."""
    wrapped = adapters(model).values()
    return sum(each.n for each in wrapped if isinstance(each, DecoderAdapter))


def positions(model: nn.Module) -> int | None:
    """How many tokens the model can read at once; None where it does not say.

    Those of a prompt or a prefix are taken off.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return None if limit is None else limit - in_front(model)


def positions_in_words(model: nn.Module) -> str:
    """positions(model) for an error, with what was taken off."""
    n = in_front(model)
    taken = f" left, since {n} are those of a soft prompt or a prefix" if n else ""
    return f"{positions(model)} positions{taken}"


def table_of_positions(trunk: nn.Module) -> int | None:
    """The positions that a model looks up in a table, which ends; None for others.

    Rotary models compute theirs, and read on behind the last that they were trained on.
    """
    limit = getattr(getattr(trunk, "config", None), "max_position_embeddings", None)
    if limit is None:
        return None
    tokens = trunk.get_input_embeddings()
    lengths = [
        module.num_embeddings
        for module in trunk.modules()
        if isinstance(module, nn.Embedding) and module is not tokens
    ]
    lengths += [len(buffer) for buffer in trunk.buffers() if buffer.dim() == 2]
    tables = [length for length in lengths if limit <= length <= limit + OFFSET]
    return limit if tables else None


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
            "(batch, tokens), 1 at real tokens (static caches make others), or that of "
            "packed rows, (batch, 1, tokens, tokens) with position_ids and "
            "use_cache=False"
        )


def cache_of(output):
    """The cache in a call's arguments, or in what a trunk returns; None without one."""
    if isinstance(output, tuple):
        return next((each for each in output if isinstance(each, Cache)), None)
    caches = (output.get(name) for name in CACHES)
    return next((cache for cache in caches if cache is not None), None)


def cache_length(cache) -> int | None:
    """Positions that the cache holds: 0 without one, None for one that does not count.

    A state-space model keeps a state of one size, however long the text.
    """
    if cache is None:
        return 0
    try:
        return cache.get_seq_length()
    except (AttributeError, ValueError):
        return None


def is_empty(cache) -> bool:
    """Whether no token was read into the cache yet."""
    length = cache_length(cache)
    if length is None:
        return isinstance(cache, Cache) and not cache.has_previous_state()
    return bool(length == 0)


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
