"""The contract: what every method of this library promises, written once.

Every method *wraps modules*. An `Adapter` is a module that holds a frozen module as
`.base` and adds something trainable beside it. From that one sentence follow the verbs:

    inject     put an adapter in front of every matching module; freeze the rest
    trainable  the parameters of the adapters that are not under `.base`
    merge      fold the adapters into the weights they stand beside, where possible
    remove     take them off again; the model is what it was, bit for bit

`save` and `load` (exchange.py) read the same definition. No name of a parameter is ever
searched for a substring.

Two declared exceptions train tensors that the model itself owns: full fine-tuning, and
the biases that `lora.inject(..., bias=...)` asks for. The injection lists them by name
as `own`, with the original values where `remove` shall be able to bring them back.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..common.check import is_finite, shortened  # noqa: F401 (is_finite: for others)
from .targets import (
    PROJECTIONS,
    QuantizedLinear,
    Targets,
    named_modules,
    resolve,
    uncompiled,
)


class CannotMerge(ValueError):
    """The adapters cannot be folded into the weights; the message says why."""


class Adapter(nn.Module):
    """A frozen module with something trainable beside it.

    Args
        base  the module to wrap; frozen here
    A subclass registers its own parameters, computes `forward`, names its tensors in
    saved files by `file_names`, and, where the mathematics allow, returns `merged`. One
    that must change the base while it stands before it does so in `attached`.
    """

    file_names: ClassVar[
        Mapping[str, str]
    ] = {}  # parameter -> its name in a saved file
    loraplus_parameters: ClassVar[
        tuple[str, ...]
    ] = ()  # those that LoRA+ gives a larger rate
    cannot_merge = "it has no equivalent weight to merge into"

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base.requires_grad_(False)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "base" and hasattr(self.base, name):
                raise AttributeError(
                    f"something reads .{name} of a wrapped {type(self.base).__name__}, "
                    "past the adapter, as the mixers of state-space models do: leave "
                    "this module out of the targets (exclude=…)"
                ) from None
            raise

    def merged(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """{name: tensor of the base, the adapter folded in}, computed in `dtype`."""
        raise CannotMerge(f"{type(self).__name__}: {self.cannot_merge}")

    def file_tensors(self) -> dict[str, Tensor]:
        """{name in a saved file: value}; the parameters, unless a subclass converts."""
        return {key: self.get_parameter(own) for own, key in self.file_names.items()}

    def on_attach(self) -> None:
        """Called when every adapter is in its place: change the base here, if need be.

        What this changes, `removed` puts back, bit for bit, and `merged` knows of.
        """

    def on_remove(self) -> None:
        """Called by remove(), before the adapter is taken off."""


@dataclass
class Injection:
    """What was done to a model, so that it can be undone and saved."""

    method: str  # the method's module: "lora", "full", …
    config: dict  # the arguments of its inject, as JSON can hold them
    requires_grad: dict[str, bool]  # each parameter's flag before
    vocabulary: int | None  # rows of the input embedding
    own: dict[str, Tensor | None] = field(
        default_factory=dict
    )  # name -> original, if kept


def inject(
    model: nn.Module,
    wrap: Callable[[nn.Module], Adapter],
    targets: Targets,
    *,
    method: str = "custom",
    config: Mapping | None = None,
    own: Iterable[str] = (),
    keep_own: bool = True,
) -> list[str]:
    """Freeze the model and put `wrap(module)` in the place of every target.

    Args
        wrap      called with each module, returns its Adapter
        targets   see targets.resolve; or a ready {name: module}
        method    the name of the method's module, which save() writes
        config    what that method needs to be injected again, as JSON can hold it
        own       names of the model's own parameters that train as well
        keep_own  keep a copy of those, so that remove() can bring them back
    Returns  the wrapped modules' names, in the model's order
    Raises   ValueError   nothing matches, or the model carries adapters already;
             the model is then as it was
    """
    model = unwrap_compiled(model)
    refuse_second(model)
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "inject() inside torch.inference_mode() would make parameters that can "
            "never train; call it outside"
        )
    modules = targets if isinstance(targets, Mapping) else resolve(model, targets)
    _refuse_strangers(model, modules)
    before = {uncompiled(n): p.requires_grad for n, p in model.named_parameters()}
    try:
        adapters = {m: wrap(m).train(m.training) for m in modules.values()}
        parameters = _own(model, own)
        kept = {
            n: p.detach().clone() if keep_own else None for n, p in parameters.items()
        }
        if not adapters and not kept:
            raise ValueError("targets is empty: the injection would train nothing")
        injection = Injection(
            method, dict(config or {}), before, vocabulary(model), kept
        )
    except BaseException:
        _set_flags(model, before)
        raise
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    replace_modules(model, adapters)
    model.pfs_injection = injection
    try:
        for adapter in adapters.values():
            adapter.on_attach()
    except BaseException:
        remove(model)
        raise
    return list(modules)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of the model by the name of the module that they wrap."""
    return {n: m for n, m in named_modules(model) if isinstance(m, Adapter)}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters that train, by their name before the injection."""
    own = injected(model).own if is_injected(model) else {}
    if not own:
        return {}
    now = original_names(model)
    return {now[n]: p for n, p in model.named_parameters() if now[n] in own}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that a training step may move, by name; empty without adapters.

    These are the parameters of an `Adapter` that are not under its `.base`, and the
    tensors of the model itself that the injection declared.
    """
    found = {
        f"{name}.{inner}": parameter
        for name, adapter in adapters(model).items()
        for inner, parameter in adapter.named_parameters()
        if not inner.startswith("base.")
    }
    return found | base_parameters(model)


@torch.no_grad()
def merge(model: nn.Module) -> dict[str, float]:
    """Fold every adapter into the weights that it stands beside, and take it off.

    Computed in float64 (float32 on MPS, which has no float64) and rounded once to the
    weight's dtype. All or nothing: every merged weight is ready and checked before the
    first one is written. A projection in four bits leaves them: a sum of codes and an
    update is no code, and a plain one with the exact sum takes its place.

    Returns  {module name: rounding error}, dimensionless: the norm of what rounding to
             the weight's dtype lost, over the norm of the change. Keep a copy of the
             base if it is needed again: subtracting does not restore the bits.
    Raises   CannotMerge  with the reason, the model untouched
    Memory   one copy of the wrapped weights while it runs
    """
    injected(model)
    model = unwrap_compiled(model)
    ready, errors, unpacked = [], {}, {}
    for name, adapter in adapters(model).items():
        lost = changed = 0.0
        base = adapter.base
        if isinstance(base, QuantizedLinear):
            base = unpacked[adapter] = base.plain()
        for inner, exact in adapter.merged(_wide(base)).items():
            parameter = base.get_parameter(inner)
            _refuse_tied(model, f"{name}.{inner}", parameter)
            rounded = exact.to(parameter.dtype)
            if not rounded.isfinite().all():
                raise CannotMerge(
                    f"{name}.{inner} would hold values that {parameter.dtype} cannot; "
                    "look for NaN in the adapter, or merge in a wider dtype"
                )
            lost += (rounded.to(exact.dtype) - exact).square().sum().item()
            changed += (exact - parameter.to(exact.dtype)).square().sum().item()
            ready.append((parameter, rounded))
        errors[name] = (lost / changed) ** 0.5 if changed else 0.0
    for parameter, rounded in ready:
        parameter.copy_(rounded)
    for adapter, base in unpacked.items():
        adapter.base = base
    unwrap_adapters(model)
    return errors


@torch.no_grad()
def remove(model: nn.Module) -> None:
    """Undo inject: the model is what it was before, bit for bit.

    Raises  ValueError  full fine-tuning without `keep_original=True`: the original
            weights are gone, and nothing is touched
    """
    lost = [name for name, original in injected(model).own.items() if original is None]
    if lost:
        raise ValueError(
            f"remove() cannot restore {lost[0]} ({len(lost)} such tensors): their "
            "originals were not kept. Inject with keep_original=True, or load the base "
            "model again; merge() keeps the trained weights"
        )
    for name, parameter in base_parameters(model).items():
        parameter.copy_(injected(model).own[name])
    for adapter in adapters(model).values():
        adapter.on_remove()
    unwrap_adapters(model)


def unwrap_adapters(model: nn.Module) -> None:
    """Unwrap every adapter and put the flags back; the weights stay as they are.

    For what has been merged, or has lost its originals; else remove() is meant.
    """
    model = unwrap_compiled(model)
    replace_modules(
        model, {adapter: adapter.base for adapter in adapters(model).values()}
    )
    _set_flags(model, injected(model).requires_grad)
    del model.pfs_injection


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """The model itself, where torch.compile has wrapped it."""
    return getattr(model, "_orig_mod", model)


def is_injected(model: nn.Module) -> bool:
    return hasattr(model, "pfs_injection")


def injected(model: nn.Module) -> Injection:
    """The record of the injection; ValueError where there is none."""
    if not is_injected(model):
        raise ValueError(
            f"this {type(model).__name__} carries no adapter; inject or load one first"
        )
    return model.pfs_injection


def refuse_second(model: nn.Module) -> None:
    """ValueError where the model, or a part of it, carries adapters already."""
    if is_injected(model):
        raise ValueError(
            f"this {type(model).__name__} carries {injected(model).method} adapters "
            "already; merge() or remove() them first"
        )
    for name, module in named_modules(model):
        if isinstance(module, Adapter) or hasattr(module, "base_layer"):
            raise ValueError(
                f"{name} of this {type(model).__name__} is a {type(module).__name__} "
                "already, from an injection into a part of the model or from another "
                "library; remove it the way it came"
            )


def refuse_unimplemented(config: dict, implemented: set[str]) -> None:
    """ValueError naming the first field that asks for something this library lacks."""
    for name, value in config.items():
        default = value is False or value in (None, "", [], {})  # 0 is a layer's index
        if name not in implemented and not default:
            raise ValueError(
                f"adapter_config.json sets {name[:99]}={shortened(value)}, which is not "
                "implemented here; loading without it would give another model"
            )


def original_names(model: nn.Module) -> dict[str, str]:
    """Each parameter's name now -> its name before adapters stood in between."""
    deepest_first = sorted(adapters(model), key=len, reverse=True)
    before = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        before[name] = uncompiled(name)
        for wrapped in deepest_first:
            if before[name].startswith(f"{wrapped}.base."):
                before[name] = wrapped + before[name].removeprefix(f"{wrapped}.base")
    return before


def vocabulary(model: nn.Module) -> int | None:
    """Rows of the input embedding; None for a model without one."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return None if embedding is None else embedding.weight.shape[0]


def as_matrix(base: nn.Module) -> Tensor:
    """The base's weight as (d_out, d_in): Conv1D stores the transpose.

    Raises  CannotMerge  another library's packed weight, which holds no numbers
    """
    if not base.weight.is_floating_point():
        raise CannotMerge(
            f"the weight of a {type(base).__name__} is packed ({base.weight.dtype}), "
            "in a form that only its library can read: dequantize it there"
        )
    return base.weight.T if is_transposed(base) else base.weight


def as_stored(base: nn.Module, W: Tensor) -> Tensor:
    """A matrix (d_out, d_in) in the orientation in which the base stores its weight."""
    return W.T if is_transposed(base) else W


def is_transposed(base: nn.Module) -> bool:
    """Whether the base stores its weight as (d_in, d_out)."""
    return isinstance(base, Conv1D) or getattr(base, "transposed", False)


def trained_dtype(weight: Tensor | QuantizedLinear) -> torch.dtype:
    """Of what trains beside a weight: its own, but float32 where that is a half one.

    In half precision, updates of 1e-4 would be rounded away.
    """
    return weight.dtype if weight.dtype.itemsize >= 4 else torch.float32


def factory_kwargs(base: nn.Module) -> dict:
    """{"device": …, "dtype": …} of what trains beside a projection."""
    weight = base if isinstance(base, QuantizedLinear) else base.weight
    return {"device": weight.device, "dtype": trained_dtype(weight)}


def sizes(base: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a projection; ValueError for any other module.

    Not the shape of its weight: one in four bits has another.
    """
    if isinstance(base, Conv1D):
        return tuple(base.weight.T.shape)
    if not isinstance(base, PROJECTIONS):
        raise ValueError(
            f"a {type(base).__name__} cannot be adapted here: only Linear and Conv1D"
        )
    return base.out_features, base.in_features


def _wide(base: nn.Module) -> torch.dtype:
    first = next(chain(base.parameters(), base.buffers()))
    return torch.float32 if first.device.type == "mps" else torch.float64


def modules_sharing(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    """The modules that hold this tensor: several where it is tied between them.

    A module that stands in the tree twice holds it once: it computes the same in both.
    """
    return [
        name
        for name, module in model.named_modules()
        if any(p is parameter for p in module.parameters(recurse=False))
    ]


def _refuse_tied(model, name, parameter) -> None:
    held = modules_sharing(model, parameter)
    if len(held) > 1:
        raise CannotMerge(
            f"{name} is one tensor with {held[0]}.weight: merging would change "
            "both. Untie them first, or leave this module out of the targets"
        )


def replace_modules(
    model: nn.Module, old_to_new: Mapping[nn.Module, nn.Module]
) -> None:
    """Put each new module in the place of the old one, wherever that stands."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in old_to_new:
                setattr(parent, name, old_to_new[child])


def _set_flags(model, flags) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(uncompiled(name), parameter.requires_grad))


def _own(model, names) -> dict[str, nn.Parameter]:
    here = model.named_parameters(remove_duplicate=False)
    here = {uncompiled(name): parameter for name, parameter in here}
    names = [uncompiled(name) for name in names]
    for name in names:
        if name not in here:
            raise AttributeError(f"{type(model).__name__} has no parameter {name!r}")
    return {name: here[name] for name in names}


def _refuse_strangers(model, modules) -> None:
    """ValueError where a ready {name: module} names a module of another model."""
    here = dict(named_modules(model))
    for name, module in modules.items():
        if here.get(name) is not module:
            raise ValueError(
                f"targets gives {name!r} a {type(module).__name__} that is not the "
                f"module of that name in this {type(model).__name__}"
            )
