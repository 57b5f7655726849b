"""Which dtype holds what: the base in a fast one, what trains in float32.

In bfloat16 a product takes a quarter of the time, and a weight half of the bytes. But a
weight of 1 in bfloat16 cannot become 1.001: an update below half of its last bit is
rounded away. So whatever trains stays in float32, with its gradient and its moments:

    adapters            float32 beside a base in half precision (core.adapter.inject)
    the model's own     float32 *master* weights; autocast rounds a copy of them for
    weights             each product (arXiv:1710.03740, section 3.1)
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from ..methods import named
from .config import TrainConfig

HALF = ("bfloat16", "float16")


def loaded_in(method: str | None, dtype: str) -> str:
    """The dtype to load a base in that shall compute in `dtype`.

    Args
        method  of the table of methods; None where nothing trains
    """
    masters = method is not None and named(method).own_weights
    return "float32" if masters and dtype in HALF else dtype


def autocast_of(method: str, dtype: str) -> str | None:
    """`TrainConfig.autocast` of a method that shall compute in `dtype`.

    None in float16, too, whose gradients would need a scaled loss.
    """
    return dtype if named(method).own_weights and dtype == "bfloat16" else None


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass of this run."""
    if config.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, config.autocast))
