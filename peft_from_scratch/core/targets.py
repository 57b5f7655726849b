"""Which modules of a model an adapter goes on, found by structure, not from a table.

A decoder layer is a `GradientCheckpointingLayer`: 167 of the 173 causal language models
of transformers 5.23 build theirs on it. A *projection* is an `nn.Linear`, a GPT-2
`Conv1D`, or a `Packed` one, whose weight is held in fewer bits. The presets look inside
decoder layers only, so that heads and embeddings are left alone unless somebody names
them:

    "attention"    every projection under a module whose class says Attention
    "mlp"          the layer's other projections
    "all-linear"   both

Experts of a mixture are 3-D parameters, not projections, and are not targeted.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..common.check import shortened

PRESETS = ("attention", "mlp", "all-linear")
ENDS = r"(?:.*\.)?(?:{})"  # a regex of the whole name, or of its end after a dot
Targets = str | Iterable[str] | Callable[[str, nn.Module], bool] | Mapping


class Wrapper(nn.Module):
    """A module that stands in the place of another one, which it holds as `.base`."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base


class QuantizedLinear(nn.Module):
    """A frozen projection that holds its weight in fewer bits than a parameter does.

    weight      the weight in full, computed at each look; not a parameter
    transposed  whether the weight is (d_in, d_out), as in a Conv1D
    dtype       of the weight in full
    values      number of weights, not of stored bytes
    """

    in_features: int
    out_features: int
    transposed: bool
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} says nothing of its weight")

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def values(self) -> int:
        return self.in_features * self.out_features

    def plain(self) -> nn.Module:
        """A Linear or Conv1D with the same weight, as a parameter."""
        raise NotImplementedError(f"{type(self).__name__} says nothing of its weight")


def is_quantized(model: nn.Module) -> bool:
    """Whether a projection of the model, or of a part of it, is packed."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


PROJECTIONS = nn.Linear | Conv1D | QuantizedLinear


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(dotted name, module) of every module, named as if nothing were compiled."""
    for name, module in model.named_modules():
        yield uncompiled(name), module


def uncompiled(name: str) -> str:
    """The name without the parts that torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def refuse_second(model: nn.Module) -> None:
    """ValueError where the model, or a part of it, carries adapters already."""
    injection = getattr(model, "pfs_injection", None)
    if injection is not None:
        raise ValueError(
            f"this {type(model).__name__} carries {injection.method} adapters "
            "already; merge() or remove() them first"
        )
    for name, module in named_modules(model):
        if isinstance(module, Wrapper) or hasattr(module, "base_layer"):
            raise ValueError(
                f"{name} of this {type(model).__name__} is a {type(module).__name__} "
                "already, from an injection into a part of the model or from another "
                "library; remove it the way it came"
            )


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """Every projection of the model by its dotted name, heads included."""
    return {
        name: module
        for name, module in named_modules(model)
        if isinstance(module, PROJECTIONS)
    }


def kinds(model: nn.Module) -> dict[str, str]:
    """'attention' or 'mlp' for each projection inside a decoder layer; no other."""
    layers, attentions = [], []
    for name, module in named_modules(model):
        if isinstance(module, GradientCheckpointingLayer):
            layers.append(f"{name}.")
        elif "attention" in type(module).__name__.lower():
            attentions.append(f"{name}.")
    return {
        name: "attention" if name.startswith(tuple(attentions)) else "mlp"
        for name in projections(model)
        if name.startswith(tuple(layers))
    }


def layer_of(model: nn.Module, name: str) -> str:
    """The name of the decoder layer that holds the module of this name."""
    return next(
        layer
        for layer, module in named_modules(model)
        if isinstance(module, GradientCheckpointingLayer)
        and name.startswith(f"{layer}.")
    )


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that `pattern` is, is the end of after a dot, or a regex of either."""
    try:
        regex = re.compile(ENDS.format(pattern))
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regex: {error}") from None
    return [name for name in names if name == pattern or regex.fullmatch(name)]


def exact_regex(name: str) -> str:
    """A regex that matches this full name only, not longer names with the same end."""
    return f"^{re.escape(name)}$"


def refuse_no_mapping(field: str, pattern) -> None:
    """ValueError unless it is {name or regex: value}, or None."""
    if not isinstance(pattern, Mapping | None):
        raise ValueError(
            f"{field}={shortened(pattern)} is no mapping "
            "{module name or regex: value}"
        )


def per_module(
    field: str, pattern: Mapping | None, names: Iterable[str], default
) -> dict:
    """{name: value} of the first key of the pattern that matches it, else default."""
    refuse_no_mapping(field, pattern)
    values = {}
    for key, value in (pattern or {}).items():
        matches = matching(key, names)
        if not matches:
            raise ValueError(f"{field}: {key!r} matches none of the adapted modules")
        values = dict.fromkeys(matches, value) | values
    return dict.fromkeys(names, default) | values


def resolve(
    model: nn.Module, targets: Targets, exclude: Targets | None = None
) -> dict[str, nn.Module]:
    """The projections that `targets` names, minus those that `exclude` names.

    Args
        targets  a preset, a module name, its last part or a regex; a list of those;
                 or a function (name, module) -> bool
        exclude  the same forms, or None
    Returns  {dotted name: module}, in the model's order, never empty
    Raises   ValueError   a name that matches nothing, nothing left to wrap, or a model
             that carries adapters already
    """
    refuse_second(model)
    linear = projections(model)
    chosen = _choose(model, linear, targets, "targets")
    dropped = _choose(model, linear, exclude, "exclude") if exclude is not None else ()
    left = {
        name: module
        for name, module in linear.items()
        if name in chosen and name not in dropped
    }
    if not left:
        raise ValueError(
            f"{targets=} with {exclude=} leaves no module to adapt; {_offer(linear)}"
        )
    return left


def _choose(model, linear, targets, argument) -> set[str]:
    if callable(targets):
        return {name for name, module in linear.items() if targets(name, module)}
    if isinstance(targets, str):
        return _match(model, linear, targets, argument)
    return set().union(*(_match(model, linear, t, argument) for t in targets))


def _match(model, linear, pattern, argument) -> set[str]:
    if pattern in PRESETS:
        wanted = PRESETS[:2] if pattern == "all-linear" else (pattern,)
        matches = {name for name, kind in kinds(model).items() if kind in wanted}
    else:
        matches = set(matching(pattern, linear))
    if not matches:
        raise ValueError(f"{argument}={pattern!r} matches no module; {_offer(linear)}")
    return matches


def _offer(linear) -> str:
    if not linear:
        return "the model has no Linear and no Conv1D module"
    last = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    return (
        f"the model's linear modules are {', '.join(last)}; "
        f"presets, for what its decoder layers hold: {', '.join(PRESETS)}"
    )
