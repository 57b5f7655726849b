"""Encoded examples as tensors: padded on the right to train, on the left to generate.

A causal model sees to the left only. Padding on the right of an example is therefore
invisible to its tokens, and needs no attention mask while labels are -100 there. A
prompt that is to be continued must end at the last column, so its padding stands on the
left, where only a mask hides it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tasks.templates import IGNORED

Row = tuple[list[int], list[int]]  # input_ids, labels: as encode_row makes them
Batch = dict[str, Tensor]


def batch_of(rows: Sequence[Row], device: torch.device) -> Batch:
    """Encoded examples as one batch to train on, padded on the right to the longest.

    Returns  input_ids and labels, each (b, t) int64 on the device; -100 on padding
    """
    # Any token does for padding: no real token sees it, and it has no label. The first
    # token of a row is not the pad token, which transformers warns of without a mask.
    pad_id = rows[0][0][0]
    batch = {
        "input_ids": right_pad([ids for ids, _ in rows], pad_id),
        "labels": right_pad([labels for _, labels in rows], IGNORED),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """As `batch_of`, with the attention mask that transformers' own calls expect.

    Returns  input_ids, attention_mask, labels, each (b, t) int64; -100 on padding
    """
    return {
        "input_ids": right_pad([ids for ids, _ in rows], pad_id),
        "attention_mask": right_pad([[1] * len(ids) for ids, _ in rows], 0),
        "labels": right_pad([labels for _, labels in rows], IGNORED),
    }


def right_pad(lists: Sequence[list[int]], value: int) -> Tensor:
    """Lists as one tensor (b, t) int64, with `value` after the end of the shorter."""
    longest = max(map(len, lists))
    return torch.tensor([each + [value] * (longest - len(each)) for each in lists])


def left_pad(
    prompts: Sequence[list[int]], cached: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Prompts as one batch, padded on the left to the longest.

    Returns  ids (b, t) and mask (b, cached + t), int64: the mask is 1 on the `cached`
             tokens that stand before the batch, 0 on pads, 1 on the prompt
    """
    longest = max(map(len, prompts))
    ids = [[pad_id] * (longest - len(p)) + p for p in prompts]
    mask = [[1] * cached + [0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def label_tokens(batch: Batch) -> int:
    """Number of tokens that the loss of a batch is summed over.

    The first token of an example never counts: nothing stands before it to predict it.
    """
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def unpacked(values: Tensor, batch: Batch) -> Tensor:
    """Values of tokens 1, 2, … of each row, from those of a pack's columns 1, 2, ….

    Args
        values  one of each token but the first: (b, t - 1), or (g, t - 1) of a pack
    Returns  (b, t - 1) of the rows, 0 where there is none; a padded batch's as given
    """
    if "row" not in batch:
        return values
    row, position = batch["row"][:, 1:], batch["position_ids"][:, 1:]
    own = (row >= 0) & (position > 0)  # no value stands for the first token of a row
    rows, longest = int(batch["row"].max()) + 1, int(batch["position_ids"].max())
    result = values.new_zeros(rows, longest)
    result[row[own], position[own] - 1] = values[own]
    return result
