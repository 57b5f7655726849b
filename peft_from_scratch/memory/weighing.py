"""What a method trains in a model of any size, counted on the meta device.

The model is built without numbers and the method's own `inject` runs on it: so what
trains is counted by the code that trains, for every method and architecture. Three
methods read values when they are injected, which a model without numbers has not:

    qlora   injected as lora; its frozen projections weigh what NF4 takes (formulas.py)
    dora    injected as lora, with d_out lengths a projection
    prefix  counted by its formula: n keys and n values in every layer
"""

import inspect
import re
import warnings
from dataclasses import dataclass, field

from torch import nn
from transformers import PretrainedConfig

from ..common import check
from ..core import adapter
from ..core.targets import kinds, layers_of, projections
from ..methods import named
from .formulas import nf4_bytes
from .meta_model import ATTENTION, ghost
from .steps import NAMES

OPTIONS = ("r", "m", "n", "targets")  # of the methods' inject
AS_LORA = ("qlora", "dora", "pissa")
EXPERTS_CHOSEN = ("num_experts_per_tok", "moe_topk", "num_experts_per_token")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Weighed:
    """Bytes and numbers of a model with a method injected. Units: bytes, values.

    frozen        bytes of what does not train, buffers included
    own           values of the base that train; own_tensors, how many tensors
    added         values of adapters; added_tensors
    largest       values of the largest trained tensor
    projection    values of the largest projection
    projections   values of all projections of the layers
    layer         bytes of the largest layer
    tensor        bytes of the largest tensor, as it is loaded
    table         values of the embedding; head_trains, whether the head's weight does;
                  tied, whether it is the embedding's
    total, active parameters, and those that one token uses (fewer in a mixture)
    adapted       {projection: (d_out, d_in)} of one layer; None where layers differ
    widths        (d_out, d_in) of all that has an adapter, summed up
    options       r, m, n as they are
    """

    frozen: int
    own: int
    own_tensors: int
    added: int
    added_tensors: int
    largest: int
    projection: int
    projections: int
    layer: int
    tensor: int
    table: int
    tied: bool
    head_trains: bool
    total: int
    active: int
    adapted: dict[str, tuple[int, int]] | None
    widths: tuple[int, int] = (0, 0)
    options: dict[str, int] = field(default_factory=dict)


def weigh(
    config: PretrainedConfig,
    method: str,
    options: dict,
    dtype: str,
    attention: str = "sdpa",
) -> tuple[Weighed, nn.Module]:
    """Count what a method trains and what it leaves frozen.

    Args
        options  of OPTIONS, those that are given
        dtype    of the base's weights: "float32" or "bfloat16"
    Returns  Weighed, and the model without numbers
    Raises   ValueError  an option that the method does not have, or out of its range
    """
    check_options(method, options)
    model, taken = _built(config, dtype, attention), _taken(method, options)
    every = projections(model)
    sizes = [adapter.sizes(every[name]) for name in kinds(model)]
    counts = [d_out * d_in for d_out, d_in in sizes]
    layer = _largest_layer(model)
    _inject(model, method, options)
    wrapped, own = adapter.adapters(model), adapter.base_parameters(model)
    added = [p for n, p in adapter.trainable(model).items() if n not in own]
    apart = {id(p) for p in [*own.values(), *added]}
    rest = [p for p in model.parameters() if id(p) not in apart]
    frozen = sum(tensor.nbytes for tensor in [*rest, *model.buffers()])
    if method == "qlora":
        item = model.dtype.itemsize
        frozen += sum(nf4_bytes(n) - n * item for n in counts)
    trained = [p.numel() for p in added]
    if method == "dora":
        trained += [adapter.sizes(module.base)[0] for module in wrapped.values()]
    if method == "prefix":
        trained = [prefix_values(config, taken["n"])]
    if method == "pissa":
        frozen += 4 * sum(trained)  # A and B as they started
    base, table = [*rest, *own.values()], model.get_input_embeddings().weight
    head = getattr(model.get_output_embeddings(), "weight", None)
    total = sum(p.numel() for p in base)
    return Weighed(
        frozen=frozen,
        own=sum(p.numel() for p in own.values()),
        own_tensors=len(own),
        added=sum(trained),
        added_tensors=len(trained),
        largest=max([*trained, *(p.numel() for p in own.values())]),
        projection=max(counts, default=0),
        projections=sum(counts),
        layer=layer,
        tensor=max(p.nbytes for p in base),
        table=table.numel(),
        tied=head is table,
        head_trains=head is not None and head.requires_grad,
        total=total,
        active=total - _idle_experts(model, config),
        adapted=_of_one_layer(model, wrapped),
        widths=_widths(wrapped),
        options=taken,
    ), model


def _built(config: PretrainedConfig, dtype: str, attention: str) -> nn.Module:
    """The model without numbers; ValueError where its sizes do not go together."""
    try:
        return ghost(config, dtype, attention)
    except KeyError as error:
        if ATTENTION not in str(error):
            raise
        raise ValueError(
            f"{config.model_type} has its kinds of attention inside the model, and in "
            "one kernel it cannot run without numbers: --attention eager can"
        ) from None
    except Exception as error:  # whatever a configuration's sizes lead to
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"transformers cannot build this {config.model_type}: {why[0]:.200}"
        ) from None


def _inject(model: nn.Module, method: str, options: dict) -> None:
    """Inject the method, or what stands for it: see the head of this file."""
    if method == "prefix":
        check.whole("n", _taken(method, options)["n"], 1, of="positions")
        model.requires_grad_(False)
        return
    stand_in = "lora" if method in AS_LORA else method
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experts: the bill says how many are active
        named(stand_in).module.inject(model, **options)


def check_options(method: str, options: dict) -> None:
    """ValueError naming an option that this method does not have."""
    taken = inspect.signature(named(method).module.inject).parameters
    for name in options:
        if name not in taken:
            has = [f"--{option}" for option in OPTIONS if option in taken]
            raise ValueError(
                f"--{name} is no option of --method {method}, which has "
                f"{', '.join(has) or 'none'}"
            )


def _taken(method: str, options: dict) -> dict[str, int]:
    """r, m and n as inject gets them."""
    defaults = {name: _default(method, name) for name in ("r", "m", "n")}
    return {k: options.get(k, v) for k, v in defaults.items() if v is not None}


def _default(method: str, name: str) -> int | None:
    parameter = inspect.signature(named(method).module.inject).parameters.get(name)
    return None if parameter is None else parameter.default


def prefix_values(config: PretrainedConfig, n: int) -> int:
    """n · layers · 2 · kv heads · head size."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None)
    size = size or config.hidden_size // config.num_attention_heads
    return n * config.num_hidden_layers * 2 * heads * size


def _largest_layer(model: nn.Module) -> int:
    layers = [model.get_submodule(name) for name in layers_of(model)]
    return max((sum(p.nbytes for p in m.parameters()) for m in layers), default=0)


def _idle_experts(model: nn.Module, config: PretrainedConfig) -> int:
    """Parameters of the experts that a token does not use."""
    chosen, experts = (
        next((getattr(config, n) for n in names if getattr(config, n, None)), None)
        for names in (EXPERTS_CHOSEN, EXPERTS)
    )
    if not chosen or not experts or chosen >= experts:
        return 0
    of_experts = [
        p.numel()
        for name, p in model.named_parameters()
        if re.search(r"\bexperts\.\d+\.", name)  # a module each, or stacked
        or (p.dim() == 3 and len(p) == experts and "experts" in name)
    ]
    return sum(of_experts) * (experts - chosen) // experts


def _widths(wrapped: dict) -> tuple[int, int]:
    bases = [getattr(module, "base", None) for module in wrapped.values()]
    shapes = [adapter.sizes(base) for base in bases if hasattr(base, "weight")]
    return sum(d_out for d_out, _ in shapes), sum(d_in for _, d_in in shapes)


def _of_one_layer(model: nn.Module, wrapped: dict) -> dict | None:
    """{projection: (d_out, d_in)} of a layer; None where not all layers are alike."""
    places = []
    for layer in layers_of(model):
        inner = {}
        for name, module in wrapped.items():
            if name.startswith(f"{layer}."):
                place = next((known for known in NAMES if name.endswith(known)), None)
                if place is None:
                    return None
                inner[place] = adapter.sizes(module.base)
        places.append(inner)
    return places[0] if places and all(p == places[0] for p in places) else None
