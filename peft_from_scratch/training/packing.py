"""Rows packed behind their shared prefix: no token of a batch is computed twice.

The rows of a task begin alike, with the same template and instruction, and end at
different lengths. A padded batch computes the shared prefix once a row, and padding for
nothing. Here the rows stand one after the other behind one copy of the prefix:

    padded       [p p p a a a]  12 places      packed    [p p p a a a b .]    8 places
                 [p p p b . .]                 position   0 1 2 3 4 5 3

                                                  p  p  p  a  a  a  b
    a token sees the prefix, its              p   x  .  .  .  .  .  .
    own row up to itself, and                 p   x  x  .  .  .  .  .
    nothing of another row: what              p   x  x  x  .  .  .  .
    it sees in a batch of its own             a   x  x  x  x  .  .  .
                                              a   x  x  x  x  x  .  .
                                              a   x  x  x  x  x  x  .
                                              b   x  x  x  .  .  .  x

So losses and gradients are those of separate rows, up to the order of sums. With
dropout, the rows of a pack share what it drops in the prefix: each row's expected loss
is the same, but the rows' noise is no longer independent.

Attention has a price: it compares every token of a pack with every other. The rows are
therefore divided into groups, each a row of the batch with the prefix in front. As many
groups are made as cost least; one row a group is the padded batch.

    work(g groups of t tokens) = g t (weights) + PAIR_COST g t² (2 · layers · width)

A model may ignore the mask or the positions: state-space layers and linear attention
carry a state from row to row, other attention numbers its tokens itself. No list of
names could be complete, so `packing_for` asks the model. Where its packed logits are
not those of separate rows, its batches are padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from heapq import heapreplace
from math import inf, prod
from os.path import commonprefix

import torch
from torch import Tensor, nn

from ..common import scoped
from ..core.adapter import sizes
from ..core.decoder_probe import CLOSE, CLOSE_IN_HALF
from ..core.targets import kinds, projections, unwrapped
from ..tasks.templates import IGNORED
from .batch import Batch, Row, batch_of, right_pad
from .loss import label_logits

PREFIX, PADDING = -1, -2  # in the place of a row's number
# Measured on a CPU with SmolLM2, forward and backward, in float32: a multiplication of
# attention takes as long as two to three of a projection.
PAIR_COST = 3
WINDOWS = ("sliding_window", "attention_chunk_size")  # a config's names for one


@dataclass(frozen=True)
class Packing:
    """How the rows of a step become a batch for one model.

    per_token  multiplications of the layers' projections, for a token
    per_pair   those of attention, for two tokens of a sequence, times PAIR_COST
    dtype      of the mask, which is added to attention's scores
    works      whether the model reads packed rows as it reads them alone
    """

    device: torch.device
    dtype: torch.dtype
    per_token: int = 0
    per_pair: int = 0
    works: bool = False

    def batch(self, rows: Sequence[Row]) -> Batch:
        """The rows as one batch: packed where that is less work, padded elsewhere."""
        groups = self.groups(rows)
        if len(groups) == len(rows):
            return batch_of(rows, self.device)
        return pack(rows, groups, self.dtype, self.device)

    def tokens(self, rows: Sequence[Row]) -> int:
        """Tokens that the model reads for these rows, padding included."""
        return len(self.groups(rows)) * self.length(rows)

    def length(self, rows: Sequence[Row]) -> int:
        """Tokens of each sequence that the model reads for these rows."""
        shared = shared_length(rows)
        return shared + longest_of(rows, self.groups(rows), shared)

    def described(self, micro_batches: Sequence[Sequence[Row]]) -> str:
        """What the model reads of a step, in words."""
        read = sum(map(self.tokens, micro_batches))
        padded = sum(
            len(rows) * max(len(ids) for ids, _ in rows) for rows in micro_batches
        )
        if read == padded:
            return f"padded: {padded} tokens in the first step"
        shared = min(map(shared_length, micro_batches))
        behind = f" behind {shared} shared tokens" if shared else ""
        return f"packed{behind}: {read} tokens in place of {padded} in the first step"

    def groups(self, rows: Sequence[Row]) -> list[list[int]]:
        """The numbers of the rows in each group; one row a group means padding."""
        shared = shared_length(rows)
        least = 1 if self.works else len(rows)
        counts = range(len(rows), least - 1, -1)
        return min(
            (divided(rows, shared, count) for count in counts),
            key=lambda groups: self.work(
                len(groups), shared + longest_of(rows, groups, shared)
            ),
        )

    def work(self, groups: int, tokens: int) -> int:
        """Multiplications of a forward pass over groups of so many tokens."""
        return groups * tokens * (self.per_token + tokens * self.per_pair)


def packing_for(model: nn.Module, rows: Sequence[Row]) -> Packing:
    """How batches of these rows, or of some of them, are made for this model.

    The model is asked with the longest and the shortest of the rows. Weights, flags and
    random generators are as before.

    Args
        rows  encoded examples, at least one
    """
    weight = unwrapped(model).get_input_embeddings().weight
    padded = Packing(weight.device, weight.dtype)
    by_length = sorted((ids for ids, _ in rows), key=len)
    work = None if weight.is_meta else work_of(model)
    if not work or len(by_length[0]) < 2 or len(by_length[-1]) > window(model):
        return padded
    works = reads_packed(model, by_length[-1], by_length[0])
    return replace(padded, per_token=work[0], per_pair=work[1], works=works)


def work_of(model: nn.Module) -> tuple[int, int] | None:
    """(per_token, per_pair) of a model, see Packing; None where it does not say."""
    config = unwrapped(model).config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None)
    width = getattr(config, "hidden_size", None)
    inside, modules = kinds(model), projections(model)
    weights = sum(prod(sizes(modules[name])) for name in inside)
    if not (layers and width and weights):
        return None
    return weights, PAIR_COST * 2 * layers * width


def window(model: nn.Module) -> float:
    """Tokens that the model's shortest attention window spans; inf without one."""
    config = unwrapped(model).config.get_text_config()
    named = (getattr(config, name, None) for name in WINDOWS)
    return min((size for size in named if size), default=inf)


def shared_length(rows: Sequence[Row]) -> int:
    """How many tokens all rows begin with, before the one that predicts a label.

    The token in front of a row's first label stays in the row's own part, so that each
    logit that the loss reads is computed at one place, in one row.
    """
    common = len(commonprefix([ids for ids, _ in rows]))
    return max(0, min(common, *(_first_label(labels) - 1 for _, labels in rows)))


def _first_label(labels: list[int]) -> int:
    """The place of the first label that counts; len(labels) without any."""
    places = range(1, len(labels))
    return next((i for i in places if labels[i] != IGNORED), len(labels))


def divided(rows: Sequence[Row], shared: int, count: int) -> list[list[int]]:
    """The rows' numbers in `count` groups of about equal length, in order in each.

    The longest row goes first, each to the group that is the shortest by then.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    groups: list[list[int]] = [[] for _ in range(count)]
    shortest = [(0, number) for number in range(count)]  # a heap
    for i in order:
        length, number = shortest[0]
        groups[number].append(i)
        heapreplace(shortest, (length + len(rows[i][0]) - shared, number))
    return [sorted(group) for group in groups]


def longest_of(rows: Sequence[Row], groups: list[list[int]], shared: int) -> int:
    """Tokens of the longest group, without the shared prefix."""
    return max(sum(len(rows[i][0]) - shared for i in group) for group in groups)


def pack(
    rows: Sequence[Row],
    groups: list[list[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Batch:
    """Rows as one batch, each group of them behind a copy of the shared prefix.

    Returns  with g groups of t tokens, padded on the right, on the device
             input_ids       (g, t) int64
             labels          (g, t) int64; -100 where there is none, and on padding
             position_ids    (g, t) int64, as in the row alone
             attention_mask  (g, 1, t, t) of `dtype`: 0 where a token sees another, the
                             lowest number elsewhere
             row             (g, t) int64: the row of each token; -1 in the prefix, -2
                             on padding
    """
    shared = shared_length(rows)
    front = rows[0][0][:shared]
    parts = [[_own_part(rows[i], i, shared) for i in group] for group in groups]
    columns = {
        "input_ids": [[*front, *_joined(group, 0)] for group in parts],
        "labels": [[*[IGNORED] * shared, *_joined(group, 1)] for group in parts],
        "position_ids": [[*range(shared), *_joined(group, 2)] for group in parts],
        "row": [[*[PREFIX] * shared, *_joined(group, 3)] for group in parts],
    }
    fill = dict(input_ids=rows[0][0][0], labels=IGNORED, position_ids=0, row=PADDING)
    batch = {
        name: right_pad(lists, fill[name]).to(device) for name, lists in columns.items()
    }
    hidden = ~visible(batch["row"])[:, None]  # (g, 1, t, t)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    batch["attention_mask"] = mask.masked_fill_(hidden, torch.finfo(dtype).min)
    return batch


def _own_part(row: Row, number: int, shared: int) -> tuple[list[int], ...]:
    """(ids, labels, positions, row) of a row behind the shared prefix.

    Its first token has no label: at the start of a row nothing predicts it.
    """
    ids, labels = row
    positions = range(shared, len(ids))
    return (
        ids[shared:],
        [IGNORED, *labels[shared + 1 :]],
        [*positions],
        [number] * len(positions),
    )


def _joined(parts: list[tuple[list[int], ...]], which: int) -> list[int]:
    return [value for part in parts for value in part[which]]


def visible(row: Tensor) -> Tensor:
    """Which tokens each token of a pack sees: (g, t, t) bool, by rows of the result.

    Those up to itself that are the prefix's or its own row's. Padding sees itself.
    """
    seen_from, seen = row[:, :, None], row[:, None, :]
    return ((seen == seen_from) | (seen == PREFIX)).tril()


@torch.no_grad()
def reads_packed(model: nn.Module, long: list[int], short: list[int]) -> bool:
    """Whether the model has the same logits for packed rows as for the rows alone.

    The last logits of both rows are compared, and those of the short row again beside
    a long row with other tokens.
    """
    other = long[:2] + long[:1:-1]
    probe = partial(_last_logits, model)
    try:
        with scoped.mode(model, training=False):
            alone = [probe([row])[0] for row in (long, other, short)]
            together, beside = probe([long, short]), probe([other, short])
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever it is: the model takes no such mask, or no positions
        return False
    packed = torch.cat([together, beside]).double()
    expected = torch.stack([alone[i] for i in (0, 2, 1, 2)]).double()
    distance = (packed - expected).abs().amax(-1) / expected.abs().amax(-1)
    bound = CLOSE if together.dtype.itemsize >= 4 else CLOSE_IN_HALF
    return bool((distance < bound).all())


def _last_logits(model: nn.Module, rows: list[list[int]]) -> Tensor:
    """(rows, vocabulary): what predicts each row's last token, the rows in one pack."""
    weight = unwrapped(model).get_input_embeddings().weight
    labelled = [(ids, [IGNORED] * (len(ids) - 1) + ids[-1:]) for ids in rows]
    batch = batch_of(labelled, weight.device)
    if len(rows) > 1:
        batch = pack(labelled, [[*range(len(rows))]], weight.dtype, weight.device)
    return label_logits(model, batch)[0]
