"""Rows of similar length in a step: less padding, and the longest rows together.

A micro-batch is as long as its longest row, and what the others lack is padding, which
costs time like text. So the rows are sorted by length and divided into buckets; within
a bucket, and among the steps, the order stays random:

    an epoch, shuffled     [5 9 2 7 3 8 1 6]     steps of 2: 9, 7, 8 and 6 long
    sorted, in 2 buckets   [1 2 3 5][6 7 8 9]
    shuffled in each       [3 1 5 2][8 6 9 7]    steps: 3, 5, 8 and 9 long
    the steps shuffled     [8 6][3 1][9 7][5 2]

The price: a step's rows are less of a random draw than before. The loss divides by a
step's own label tokens, so that a token counts more where all rows of a step are short.
And the step of the longest rows is the run's largest: the peak of memory does not fall.

Packed rows (packing.py) have hardly any padding to begin with. There, buckets are for
what is left: micro-batches that a step is split into.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from .batch import Row
from .packing import Packing, shared_length

LOOKED_AT = 50  # steps whose padding is counted


def in_buckets(
    order: np.ndarray,
    lengths: Sequence[int],
    generator: np.random.Generator,
    *,
    buckets: int,
    batch: int,
    first: int,
) -> np.ndarray:
    """An epoch's rows, rearranged so that each step reads rows of similar length.

    A step that spans two epochs gets the shortest bucket's rows of both.

    Args
        order      a permutation of all rows
        lengths    tokens of each row
        generator  shuffles each bucket, and then the steps
        buckets    groups of about as many rows, by length; more than rows are as many
        batch      rows of a step
        first      rows at the beginning that end a step of the epoch before
    Returns  another permutation
    """
    by_length = order[np.argsort(np.asarray(lengths)[order], kind="stable")]
    parts = np.array_split(by_length, min(buckets, len(order)))
    near = np.concatenate([generator.permutation(part) for part in parts])
    if len(near) < first:
        return near
    ends = first + (len(near) - first) % batch
    steps = generator.permutation(near[ends:].reshape(-1, batch))
    return np.concatenate([near[:first], steps.ravel(), near[first:ends]])


def saved_padding(packing: Packing, config, micro_batches: Callable) -> str:
    """What the buckets of a recipe save, in words; nothing without buckets.

    Args
        micro_batches  of a recipe and a step, as in loop.py
    """
    if config.buckets == 1:
        return ""
    steps = range(min(config.steps, LOOKED_AT))
    within, without = (
        padded_share(packing, [p for s in steps for p in micro_batches(recipe, s)])
        for recipe in (config, replace(config, buckets=1))
    )
    return (
        f"; {within:.1%} of the first {len(steps)} steps' tokens are padding, "
        f"{without:.1%} in one bucket"
    )


def padded_share(packing: Packing, micro_batches: Iterable[Sequence[Row]]) -> float:
    """Of the tokens that the model reads for these micro-batches, those of no row."""
    read = own = 0
    for rows in micro_batches:
        shared = shared_length(rows)
        read += packing.tokens(rows)
        own += len(packing.groups(rows)) * shared
        own += sum(len(ids) - shared for ids, _ in rows)
    return (read - own) / read
