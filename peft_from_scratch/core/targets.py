"""Which modules of a model an adapter goes on, found by structure, not from a table.

A decoder layer is a `GradientCheckpointingLayer`: 167 of the 173 causal language models
of transformers 5.23 build theirs on it. A *projection* is an `nn.Linear`, a GPT-2
`Conv1D`, or a `Packed` one, whose weight is held in fewer bits. The presets look inside
decoder layers only, so that heads and embeddings are left alone unless somebody names
them:

    "attention"    every projection under a module whose class says Attention
    "mlp"          the layer's other projections
    "all-linear"   both

Experts of a mixture are 3-D parameters, not projections, and are not targeted; neither
are a Linear that returns no tensor, cross-attention without an encoder, and indexers.
left_out.py has the sentence that says so.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..common.check import shortened

PRESETS = ("attention", "mlp", "all-linear")
# Classes of a decoder that stands alone, and parts of names of its cross-attention.
ALONE = ("ForCausalLM", "LMHeadModel")
CROSS = re.compile(r"\b(encoder_attn|cross_?attn|cross_?attention)\b", re.IGNORECASE)
INDEXER = re.compile(r"\bindexer\b")  # of sparse attention
SIZES = {"in_features", "out_features", "nf", "nx"}  # of a Linear; of a Conv1D
ENDS = r"(?:.*\.)?(?:{})"  # a regex of the whole name, or of its end after a dot
Targets = str | Iterable[str] | Callable[[str, nn.Module], bool] | Mapping


# What other tools put around a model or a layer: the child in which they hold it,
INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# and classes that hold it as `.module`, a name that a model may have for a part.
AS_MODULE = {"AveragedModel", "DataParallel"}
# These took note of all parameters when they were made, to keep processes equal.
SYNCHRONIZED = {"DeepSpeedEngine", "DistributedDataParallel"}
SYNCHRONIZED |= {"FullyShardedDataParallel"}


class Wrapper(nn.Module):
    """A module that stands in the place of another one, which it holds as `.base`.

    What the base has and the wrapper has not is never written on the wrapper, where
    nothing would read it. It goes to the base where reads come from there, and is
    refused else.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def __setattr__(self, name: str, value) -> None:
        """Write an attribute where a read of it looks.

        Raises  AttributeError  a tensor or module of the base that the wrapper hides,
                unless it is the one that stands there already
        """
        base = vars(self).get("_modules", {}).get("base")
        if base is None or self._has(name):
            super().__setattr__(name, value)
        elif hasattr(self, name):  # a read reaches the base
            setattr(base, name, value)
        elif name not in {*base._parameters, *base._buffers, *base._modules}:
            super().__setattr__(name, value)
        elif value is not getattr(base, name):
            raise AttributeError(
                f"something writes .{name} of a wrapped {type(base).__name__}, for "
                "which the adapter was made. remove() the adapters first, or write "
                f".base.{name} where they fit the new one as well"
            )

    def _has(self, name: str) -> bool:
        """Whether the wrapper itself has this attribute, or its class."""
        own = vars(self), self._parameters, self._buffers, self._modules
        return any(name in names for names in own) or hasattr(type(self), name)


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
        raise NotImplementedError(f"{type(self).__name__} must define weight, in full")

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def values(self) -> int:
        return self.in_features * self.out_features

    def plain(self) -> nn.Module:
        """A Linear or Conv1D with the same weight, as a parameter."""
        raise NotImplementedError(f"{type(self).__name__} must define plain()")


def is_quantized(model: nn.Module) -> bool:
    """Whether a projection of the model, or of a part of it, is packed."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


PROJECTIONS = nn.Linear | Conv1D | QuantizedLinear


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(dotted name, module) of every module, named as if no tool had wrapped any."""
    names = _plain_names(model.named_modules())
    for name, module in model.named_modules():
        yield names[name], module


def named_parameters(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """(dotted name, parameter) of every one, named as if no tool had wrapped any."""
    names = _plain_names(model.named_modules(remove_duplicate=False))
    # Not the model's own method: a wrapper's may leave out its part of the names.
    for name, parameter in nn.Module.named_parameters(
        model, remove_duplicate=remove_duplicate
    ):
        owner, _, last = name.rpartition(".")
        yield ".".join(filter(None, (names[owner], last))), parameter


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of what other tools have put around it."""
    while (name := _inside(model)) is not None:
        model = model._modules[name]
    return model


def refuse_synchronized(model: nn.Module) -> None:
    """ValueError where a tool around the model would not know of new parameters."""
    while (name := _inside(model)) is not None:
        if kind := SYNCHRONIZED & _class_names(model):
            raise ValueError(
                f"this model is inside a {kind.pop()}, which keeps those parameters "
                "equal between processes that it found when it was made; new adapters "
                "would drift apart. Inject into the model itself, then wrap it"
            )
        model = model._modules[name]


def hidden_size(model: nn.Module) -> int:
    """Numbers in a token's activation between layers, of a model of transformers.

    Raises  ValueError  a model that does not say
    """
    config = getattr(unwrapped(model), "config", None)
    text = getattr(config, "get_text_config", lambda: config)()  # of several, one
    size = getattr(text, "hidden_size", None)
    if size is None:
        raise ValueError(
            f"this {type(model).__name__} has no config that says its hidden_size, by "
            "which a layer's last projection is found: name the modules, targets="
        )
    return size


def _plain_names(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    """{name of a module: its name without the parts that other tools put into it}"""
    names, inside = {}, {}
    for name, module in modules:
        inside[name] = _inside(module)
        owner, _, last = name.rpartition(".")
        if not name or inside[owner] == last:
            names[name] = names.get(owner, "")
        else:
            names[name] = ".".join(filter(None, (names[owner], last)))
    return names


def _inside(module: nn.Module) -> str | None:
    """The child that this is wrapped around, for a module of another tool; or None."""
    for name in INSIDE:
        if name in module._modules:
            return name
    holds_module = _class_names(module) & (AS_MODULE | SYNCHRONIZED)
    return "module" if holds_module and "module" in module._modules else None


def _class_names(instance: object) -> set[str]:
    return {kind.__name__ for kind in type(instance).__mro__}


def refuse_unfit(model: nn.Module) -> None:
    """ValueError where nothing can be put beside the model's weights.

    The model, or a part of it, carries adapters already, or its weights are elsewhere.
    """
    _refuse_elsewhere(model)
    injection = getattr(unwrapped(model), "pfs_injection", None)
    if injection is not None:
        raise ValueError(
            f"this {type(model).__name__} carries {injection.method} adapters "
            "already; merge() or remove() them first"
        )
    for name, module in named_modules(model):
        if isinstance(module, Wrapper) or hasattr(module, "adapter_layer_names"):
            raise ValueError(
                f"{name} of this {type(model).__name__} is a {type(module).__name__} "
                "already, from an injection into a part of the model or from another "
                "library; remove it the way it came"
            )


def _refuse_elsewhere(model: nn.Module) -> None:
    """ValueError where weights are offloaded, or sharded between processes.

    A model that is on meta as a whole has no weights, but sizes, and passes.
    """
    parameters = dict(named_parameters(model))
    away = [name for name, parameter in parameters.items() if parameter.is_meta]
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if away and (hooked or len(away) < len(parameters)):
        raise ValueError(
            f"{away[0]} is offloaded ({len(away)} such tensors, on meta): adapters "
            "would be made beside a weight that is not there. Load the model whole, "
            "without device_map or cpu_offload; where memory is short, in four bits"
        )
    for name, parameter in parameters.items():
        if "DTensor" in _class_names(parameter):
            raise ValueError(
                f"{name} is sharded between processes (a DTensor): the parameters of "
                "new adapters would drift apart. Inject first, then shard the model"
            )


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """Every projection of the model by its dotted name, heads included."""
    return {
        name: module
        for name, module in named_modules(model)
        if isinstance(module, PROJECTIONS)
    }


def kinds(model: nn.Module) -> dict[str, str]:
    """'attention' or 'mlp' for each projection inside a decoder layer; no other.

    Nor one that returns no tensor, as some routers do, or that cannot learn.
    """
    attentions = [
        f"{name}."
        for name, module in named_modules(model)
        if "attention" in type(module).__name__.lower()
    ]
    layers = tuple(f"{name}." for name in layers_of(model))
    return {
        name: "attention" if name.startswith(tuple(attentions)) else "mlp"
        for name, module in projections(model).items()
        if name.startswith(layers)
        and not is_idle(model, name)
        and returns_a_tensor(module)
    }


def layers_of(model: nn.Module) -> list[str]:
    """The names of the decoder layers."""
    return [
        name
        for name, module in named_modules(model)
        if isinstance(module, GradientCheckpointingLayer)
    ]


def is_idle(model: nn.Module, name: str) -> bool:
    """Whether no training step can move this module, by its name.

    It is in the cross-attention of a decoder without an encoder, or in an indexer,
    whose choice of tokens passes no gradient on.
    """
    alone = type(unwrapped(model)).__name__.endswith(ALONE)
    return bool(INDEXER.search(name) or (alone and CROSS.search(name)))


@torch.no_grad()
def returns_a_tensor(projection: nn.Module) -> bool:
    """Whether it returns one tensor (…, d_out), as a projection does.

    A subclass of Linear with a forward of its own is tried on a zero. One whose weight
    another library has packed is believed.
    """
    if type(projection).forward in {nn.Linear.forward, Conv1D.forward}:
        return True
    if isinstance(projection, QuantizedLinear):
        return True
    if not projection.weight.is_floating_point():
        return True
    d_out, d_in = projection.out_features, projection.in_features
    before = dict(vars(projection))
    try:
        y = type(projection).forward(projection, projection.weight.new_zeros(1, d_in))
    except Exception:  # whatever it is: no call with one tensor, as a projection has
        return False
    finally:
        vars(projection).clear()
        vars(projection).update(before)
    return isinstance(y, Tensor) and y.shape == (1, d_out)


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
    refuse_unfit(model)
    linear = projections(model)
    chosen = _choose(model, linear, targets, "targets")
    dropped = _choose(model, linear, exclude, "exclude") if exclude is not None else ()
    left = {
        name: module
        for name, module in linear.items()
        if name in chosen and name not in dropped
    }
    for name, module in left.items():
        if not returns_a_tensor(module):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which returns no single tensor "
                "as a projection does: leave it out (exclude=…)"
            )
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
