"""The contract: what every method of this library promises, written once.

Every method *wraps modules*. An `Adapter` is a module that holds a frozen module as
`.base` and adds something trainable beside it. From that one sentence follow the verbs:

    plan       check everything, make the adapters, leave the model alone
    apply      put the planned adapters in front of their modules; freeze the rest
    inject     both
    trainable  the parameters of the adapters that are not under `.base`
    merge      fold the adapters into the weights they stand beside (merge.py)
    remove     take them off again; the model is what it was, bit for bit
    disabled   a with-block in which the model computes as if they were removed

`save` and `load` (files/) read the same definition. No name of a parameter is ever
searched for a substring.

Two declared exceptions train parameters of the model itself: full fine-tuning, and the
biases that `lora.inject(..., bias=...)` asks for. The injection lists these base
parameters by name, with their original values where `remove` shall bring them back.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .targets import (
    PROJECTIONS,
    SIZES,
    QuantizedLinear,
    Targets,
    Wrapper,
    named_modules,
    named_parameters,
    refuse_synchronized,
    refuse_unfit,
    resolve,
    unwrapped,
)


class CannotMerge(ValueError):
    """The adapters cannot be folded into the weights; the message says why."""


class Adapter(Wrapper):
    """A frozen module with something trainable beside it.

    Args
        base  the module to wrap; frozen here
    A subclass registers its own parameters, computes `forward`, and, where the
    mathematics allow, returns `merged`. One that edits the base while it wraps it does
    so in `attached`.
    """

    # Parameters that LoRA+ trains at a higher learning rate (LoRA's B).
    loraplus_parameters: ClassVar[tuple[str, ...]] = ()
    cannot_merge = "it has no equivalent weight to merge into"

    def __init__(self, base: nn.Module):
        super().__init__(base.requires_grad_(False))

    def __getattr__(self, name: str):
        """A parameter, buffer or submodule; else an AttributeError that helps.

        torch's own method comes last, for its words: to ask it first would make every
        read of A or B in a forward enter two functions.
        """
        for registry in ("_parameters", "_modules", "_buffers"):
            registered = self.__dict__.get(registry)
            if registered and name in registered:
                return registered[name]
        if name in SIZES and hasattr(self.base, name):
            return getattr(self.base, name)  # mere numbers, which the adapter keeps
        if name != "base" and hasattr(self.base, name):
            raise AttributeError(
                f"something reads .{name} of a wrapped {type(self.base).__name__}, "
                "past the adapter, as the mixers of state-space models do: leave "
                "this module out of the targets (exclude=…)"
            )
        return super().__getattr__(name)

    def merged(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """{name: tensor of the base, the adapter folded in}, computed in `dtype`."""
        raise CannotMerge(f"{type(self).__name__}: {self.cannot_merge}")

    def on_attach(self) -> None:
        """Called once after all adapters are in place.

        A method that edits the base (PiSSA) does so here and undoes it in `removed`,
        bit for bit.
        """

    def on_remove(self) -> None:
        """Called by remove(), before the adapter is taken off."""


@dataclass(frozen=True)
class Plan:
    """An injection that has been checked and not yet made; apply() makes it, once.

    method          name of the method's module, which save() writes: "lora", "full", …
    config          what that method needs to be injected again, as JSON can hold it
    adapters        {module name: Adapter}, ready, and not yet in the model
    base_params     names of the model's own parameters that train as well
    keep_originals  whether to keep a copy of those, so that remove() can restore them
    prepare         a function that changes the model first (QLoRA quantizes it), whole
                    or not at all; None for most methods
    """

    method: str
    config: dict
    adapters: dict[str, Adapter]
    base_params: tuple[str, ...] = ()
    keep_originals: bool = True
    prepare: Callable[[nn.Module], None] | None = None


@dataclass
class Injection:
    """What was done to a model, so that it can be undone and saved."""

    method: str  # the method's module: "lora", "full", …
    config: dict  # the arguments of its inject, as JSON can hold them
    requires_grad: dict[str, bool]  # each parameter's flag before
    vocabulary: int | None  # rows of the input embedding
    originals: dict[str, Tensor | None] = field(
        default_factory=dict
    )  # base parameter that trains -> its original value, if kept


def plan(
    model: nn.Module,
    wrap: Callable[[nn.Module], Adapter],
    targets: Targets,
    *,
    method: str = "custom",
    config: Mapping | None = None,
    base_params: Iterable[str] = (),
    keep_originals: bool = True,
) -> Plan:
    """Everything that an injection will do, checked, with the adapters already made.

    Each method has a `plan(model, …)` as well, with the arguments of its `inject`. The
    contract of both: a plan raises all that can be wrong, and the model is afterwards
    what it was, in every bit, flag, module and training mode. Only torch's random
    generators may have moved.

    Args
        wrap            called with each module, returns its Adapter
        targets         see targets.resolve; or a ready {name: module}
        method, config, base_params, keep_originals   see Plan
    Returns  a Plan, for apply() on this same model
    Raises   ValueError   nothing matches, or the model carries adapters already
             RuntimeError   inside torch.inference_mode()
    """
    refuse_synchronized(model)
    model = unwrapped(model)
    refuse_unfit(model)
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "inject() inside torch.inference_mode() would make parameters that can "
            "never train; call it outside"
        )
    modules = targets if isinstance(targets, Mapping) else resolve(model, targets)
    _refuse_strangers(model, modules)
    names = tuple(_named_parameters(model, base_params))
    flags = _flags(model)
    try:
        ready = {name: _in_mode(wrap(module)) for name, module in modules.items()}
    finally:
        _set_flags(model, flags)  # an Adapter freezes its base, a plan freezes nothing
    if not ready and not names:
        raise ValueError("targets is empty: the injection would train nothing")
    return Plan(method, dict(config or {}), ready, names, keep_originals)


def apply(model: nn.Module, plan: Plan) -> list[str]:
    """Carry out a plan: freeze the model, put the adapters in, let base_params train.

    Returns  names of the wrapped modules, in the model's order; of the base parameters
             that train, where no module is wrapped
    Raises   ValueError   the model is not the one that was planned, or not any more.
             The model is then as it was; so it is where an adapter cannot be attached,
             but for what `plan.prepare` has changed
    """
    refuse_synchronized(model)
    model = unwrapped(model)
    refuse_unfit(model)
    if plan.prepare is not None:
        plan.prepare(model)
    _refuse_another(model, plan)
    parameters = _named_parameters(model, plan.base_params)
    originals = {
        name: parameter.detach().clone() if plan.keep_originals else None
        for name, parameter in parameters.items()
    }
    model.pfs_injection = Injection(
        plan.method, plan.config, _flags(model), vocabulary(model), originals
    )
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    replace_modules(
        model, {adapter.base: adapter for adapter in plan.adapters.values()}
    )
    try:
        for adapter in plan.adapters.values():
            adapter.on_attach()
    except BaseException:
        remove(model)
        raise
    return list(plan.adapters or plan.base_params)


def inject(
    model: nn.Module,
    wrap: Callable[[nn.Module], Adapter],
    targets: Targets,
    **options,
) -> list[str]:
    """Freeze the model and put `wrap(module)` in the place of every target.

    Args     those of plan()
    Returns  the wrapped modules' names, in the model's order
    Raises   those of plan(), the model as it was
    """
    return apply(model, plan(model, wrap, targets, **options))


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of the model by the name of the module that they wrap."""
    return {n: m for n, m in named_modules(model) if isinstance(m, Adapter)}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters that train, by their name before the injection."""
    names = injected(model).originals if is_injected(model) else {}
    if not names:
        return {}
    model = unwrapped(model)
    before = original_names(model)
    return {before[n]: p for n, p in model.named_parameters() if before[n] in names}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that a training step may move, by name; empty without adapters.

    These are the parameters of an `Adapter` that are not under its `.base`, and the
    model's own parameters that the injection declared.
    """
    of_adapters = {
        f"{name}.{inner}": parameter
        for name, adapter in adapters(model).items()
        for inner, parameter in adapter.named_parameters()
        if not inner.startswith("base.")
    }
    return of_adapters | base_parameters(model)


def remove(model: nn.Module) -> None:
    """Undo inject: the model is what it was before, bit for bit.

    Raises  ValueError  full fine-tuning without `keep_original=True`: the original
            weights are gone, and nothing is touched
    """
    _restore_base(model)
    unwrap_adapters(model)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it did before the injection, bit for bit.

    Afterwards the adapters are back with all that they have learned, after an error
    as well. For a look at the base, as DPO's reference for example; not to train in.

    Raises  ValueError  as remove()
    """
    model = unwrapped(model)
    wrapped = list(adapters(model).values())
    base_params = base_parameters(model)
    trained = {name: p.detach().clone() for name, p in base_params.items()}
    _restore_base(model)
    replace_modules(model, {adapter: adapter.base for adapter in wrapped})
    try:
        yield
    finally:
        replace_modules(model, {adapter.base: adapter for adapter in wrapped})
        with torch.no_grad():
            for name, parameter in base_params.items():
                parameter.copy_(trained[name])
        for adapter in wrapped:
            adapter.on_attach()


@torch.no_grad()
def _restore_base(model: nn.Module) -> None:
    """Give the base the values of before the injection; ValueError where they are lost.

    The adapters stay in place.
    """
    originals = injected(model).originals
    lost = [name for name, original in originals.items() if original is None]
    if lost:
        raise ValueError(
            f"remove() cannot restore {lost[0]} ({len(lost)} such tensors): their "
            "originals were not kept. Inject with keep_original=True, or load the base "
            "model again; merge() keeps the trained weights"
        )
    for name, parameter in base_parameters(model).items():
        parameter.copy_(originals[name])
    for adapter in adapters(model).values():
        adapter.on_remove()


def unwrap_adapters(model: nn.Module) -> None:
    """Unwrap every adapter and put the flags back; the weights stay as they are.

    For what has been merged, or has lost its originals; else remove() is meant.
    """
    model = unwrapped(model)
    replace_modules(
        model, {adapter: adapter.base for adapter in adapters(model).values()}
    )
    _set_flags(model, injected(model).requires_grad)
    del model.pfs_injection


def is_injected(model: nn.Module) -> bool:
    return hasattr(unwrapped(model), "pfs_injection")


def injected(model: nn.Module) -> Injection:
    """The record of the injection; ValueError where there is none."""
    if not is_injected(model):
        raise ValueError(
            f"this {type(model).__name__} carries no adapter; inject or load one first"
        )
    return unwrapped(model).pfs_injection


def original_names(model: nn.Module) -> dict[str, str]:
    """Each parameter's name now -> its name before adapters stood in between."""
    deepest_first = sorted(adapters(model), key=len, reverse=True)
    now = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    plain = [name for name, _ in named_parameters(model, remove_duplicate=False)]
    before = dict(zip(now, plain, strict=True))
    for name in now:
        for wrapped in deepest_first:
            if before[name].startswith(f"{wrapped}.base."):
                before[name] = wrapped + before[name].removeprefix(f"{wrapped}.base")
    return before


def vocabulary(model: nn.Module) -> int | None:
    """Rows of the input embedding; None for a model that shows none."""
    try:
        embedding = getattr(unwrapped(model), "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # transformers', of a trunk that is wrapped or unusual
        return None
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


def modules_sharing(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    """The modules that hold this tensor: several where it is tied between them.

    A module that stands in the tree twice holds it once: it computes the same in both.
    """
    return [
        name
        for name, module in model.named_modules()
        if any(p is parameter for p in module.parameters(recurse=False))
    ]


def replace_modules(
    model: nn.Module, old_to_new: Mapping[nn.Module, nn.Module]
) -> None:
    """Put each new module in the place of the old one, wherever that stands."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in old_to_new:
                setattr(parent, name, old_to_new[child])


def _flags(model) -> dict[str, bool]:
    """{parameter: whether it asks for a gradient}"""
    return {name: p.requires_grad for name, p in named_parameters(model)}


def _set_flags(model, flags) -> None:
    for name, parameter in named_parameters(model):
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))


def _in_mode(adapter: Adapter) -> Adapter:
    """The adapter, its own modules in the training mode of the one that it wraps."""
    of_base = set(adapter.base.modules())
    for module in adapter.modules():
        if module not in of_base:
            module.training = adapter.base.training
    return adapter


def _named_parameters(model, names) -> dict[str, nn.Parameter]:
    """{name: parameter}; AttributeError for a name that the model has not."""
    here = dict(named_parameters(model, remove_duplicate=False))
    names = list(names)
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


def _refuse_another(model, plan: Plan) -> None:
    """ValueError where an adapter was planned around a module that is not here."""
    here = dict(named_modules(model))
    for name, adapter in plan.adapters.items():
        if here.get(name) is not adapter.base:
            raise ValueError(
                f"{name} of this {type(model).__name__} is not the module that was "
                "planned for: plan() again, on the model as it is now"
            )
