"""The copy of a model that an engine takes apart.

An engine puts hooks on modules, changes their classes, cuts parameters. None of them
has a way back. So it gets a twin: other modules, which hold the same tensors. The model
itself lends its tensors, and reads as NaN while a part of them is elsewhere. At the end
it gets them back, trained, and is a model like any other.
"""

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..core import adapter


def twin(model: nn.Module) -> nn.Module:
    """A copy of the model, whose parameters and buffers share the model's storages."""
    memo: dict[int, object] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.data, requires_grad=p.requires_grad)
    kept = adapter.injected(model).originals.values()
    for tensor in [*model.buffers(), *(t for t in kept if t is not None)]:
        memo[id(tensor)] = tensor
    return copy.deepcopy(model, memo)


def lend(model: nn.Module) -> None:
    """Give the storages of all parameters away; what reads them reads NaN."""
    for p in model.parameters():
        p.data = p.data.new_full((), math.nan).expand(p.shape)


def give_back(model: nn.Module, values: Iterable[Tensor]) -> None:
    """Set every parameter of the model, in its order."""
    for p, value in zip(model.parameters(), values, strict=True):
        p.data = value


def refuse_packed(model: nn.Module, engine: str) -> None:
    """ValueError for a parameter that is no number: another library's packed weight.

    Our own four-bit projections hold buffers, which an engine leaves whole.
    """
    for name, p in model.named_parameters():
        if not torch.is_floating_point(p):
            raise ValueError(
                f"{name} is packed ({p.dtype}), and {engine} would cut it where its "
                "own library does not expect it: quantize with --method qlora, whose "
                "four-bit base stays whole on every rank, or use --engine zero with "
                "--stage 1 or 2"
            )
