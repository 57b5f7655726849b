"""Attention of short sequences in bfloat16 on a CPU: written out, in place of fused.

torch's fused attention (transformers' "sdpa") keeps no scores, and so saves bytes. But
its backward pass in bfloat16 on a CPU is slow: forward and backward of a layer of
SmolLM2, on two groups of 222 tokens, took 15 ms of the CPU, and 5 ms written out
("eager"). A LoRA step on packed rows of the task orders went from 0.77 to 0.62 of the
padded step's time.

The price is h t² scores a layer, kept for the backward pass: 35 % more bytes of
activations there, growing with t². So no sequence may be longer than SHORT.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..core.targets import unwrapped
from .batch import Row
from .config import TrainConfig
from .packing import Packing

SHORT = 256  # tokens of a sequence


@contextmanager
def written_out(
    model: nn.Module,
    config: TrainConfig,
    packing: Packing,
    rows: Sequence[Row],
    first: Sequence[Sequence[Row]],
) -> Iterator[None]:
    """Inside, short sequences in bfloat16 on a CPU go through "eager" attention.

    A model that was given another attention than "sdpa" keeps it: a prefix has its own.

    Args
        rows   of the whole run
        first  the micro-batches of its first step, whose packs stand for all; with
               buckets they do not, and the longest rows do
    """
    if config.buckets > 1:
        size = config.batch // config.accumulate
        first = [*first, sorted(rows, key=lambda row: len(row[0]))[-size:]]
    base = unwrapped(model)
    before = getattr(base.config, "_attn_implementation", None)
    dtype = getattr(torch, config.autocast) if config.autocast else packing.dtype
    longest = max(*(len(ids) for ids, _ in rows), *map(packing.length, first))
    slow = packing.device.type == "cpu" and dtype == torch.bfloat16
    if not (slow and before == "sdpa" and longest <= SHORT):
        yield
        return
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(before)
