"""What an injection by preset leaves out, and the sentence that says so.

A preset looks for projections: matrices with an input and an output of their own. Four
things in a decoder layer may look alike and are none, or never learn:

    experts            of a mixture: one 3-D parameter for all of a layer's experts
    other projections  subclasses of Linear that return more than one tensor, as some
                       routers do (targets.py knows them by trying)
    cross-attention    of a decoder that stands alone: it runs beside an encoder only
    indexers           of sparse attention: choosing tokens passes no gradient on

Whoever adapts such a model should know how much of it stays as it is.
"""

import re
import warnings
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .counting import count
from .targets import (
    INDEXER,
    PRESETS,
    Targets,
    is_idle,
    layers_of,
    named_modules,
    projections,
    returns_a_tensor,
)

EXPERTS = "3-D parameters of experts, not projections"
UNUSUAL = "Linear modules that return no single tensor"
IDLE = "cross-attention, which runs beside an encoder only"
INDEXERS = "the indexer of sparse attention, which no gradient reaches"


def warn(model: nn.Module) -> None:
    """UserWarning that names what a preset does not adapt, with its share."""
    total = count(model).total
    parts = [
        f"{names}, {_percent(size / total)} of the parameters ({reason})"
        for reason, names, size in left_out(model)
    ]
    if parts:
        warnings.warn(f"not adapted: {'; '.join(parts)}", stacklevel=2)


def warn_of_preset(model: nn.Module, targets: Targets) -> None:
    """As warn(), where `targets` asks for all that there is."""
    if isinstance(targets, str) and targets in PRESETS:
        warn(model)


def left_out(model: nn.Module) -> list[tuple[str, str, int]]:
    """[(reason, names, number of parameters)] of what the presets do not look at."""
    layers = tuple(f"{name}." for name in layers_of(model))
    inside = [(n, m) for n, m in named_modules(model) if n.startswith(layers)]
    experts = {name: size for name, m in inside if (size := _values_in_3d(m))}
    linear = {n: m for n, m in projections(model).items() if n.startswith(layers)}
    idle = {n: _values(m) for n, m in linear.items() if is_idle(model, n)}
    indexers = {n: size for n, size in idle.items() if INDEXER.search(n)}
    crossing = {n: size for n, size in idle.items() if n not in indexers}
    unusual = {n: _values(m) for n, m in linear.items() if not returns_a_tensor(m)}
    groups = {EXPERTS: experts, UNUSUAL: unusual, IDLE: crossing, INDEXERS: indexers}
    return [
        (reason, _summary(sizes), sum(sizes.values()))
        for reason, sizes in groups.items()
        if sizes
    ]


def _percent(share: float) -> str:
    return "under 1 %" if share < 0.01 else f"{100 * share:.0f} %"


def _values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _values_in_3d(module: nn.Module) -> int:
    """Of its own parameters with three dimensions; 0 for a convolution."""
    if isinstance(module, _ConvNd):
        return 0
    own = module.parameters(recurse=False)
    return sum(parameter.numel() for parameter in own if parameter.dim() >= 3)


def _summary(names: Iterable[str]) -> str:
    """The names with * for the numbers of layers, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", n) for n in names))
