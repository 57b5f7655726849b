"""Numbers of parameters: how many a model has, and how many of them train."""

import math
from typing import NamedTuple

from torch import nn

from .adapter import trainable
from .targets import QuantizedLinear


class Count(NamedTuple):
    """Numbers of parameters; a tied weight counts once."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        """The trainable part of the total, in [0, 1]."""
        return self.trainable / self.total


def count(model: nn.Module) -> Count:
    """How many parameters train, and how many there are, adapters included.

    A weight in four bits counts all its values, not the bytes that hold them.
    """
    packed = (m.values for m in model.modules() if isinstance(m, QuantizedLinear))
    return Count(
        trainable=sum(p.numel() for p in trainable(model).values()),
        total=sum(map(_values, model.parameters())) + sum(packed),
    )


def _values(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for: bitsandbytes' have two of them in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)
