"""QLoRA: Efficient Finetuning of Quantized LLMs. Dettmers et al., arXiv:2305.14314v1.

    h = W' x + scale · B A x      W' = dequantize(NF4 of W0), for this product only

LoRA on a base whose projections are in four bits (nf4/). The gradient of A and B passes
through W', which is dequantized again for it; the codes never train. What is left after
remove() is the quantized model: the weights of before are gone.

Merging has no answer that keeps everything. The update was trained beside W', and a sum
of sixteen values and an update is not one of sixteen values:

    onto            result          in four bits    what it computes
    "dequantized"   W' + ΔW         no              exactly the trained model
    "original"      W0 + ΔW         no              off by what quantizing changed
    "requantized"   NF4(W' + ΔW)    yes             off by rounding once more
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..common import check
from ..core import adapter
from ..core.adapter import CannotMerge, Plan, as_matrix, as_stored, replace_modules
from ..core.matrices import relative_error
from ..core.targets import Targets, is_quantized, named_modules, projections, unwrapped
from ..nf4 import (
    NF4Linear,
    dequantize,
    quantize,
    quantize_model,
    share_buffer,
)
from ..nf4.linear import quantizable
from .lora import LoRA
from .lora_config import ARGUMENTS, plan_layers

ADAPTER_DTYPES = (torch.float32, torch.bfloat16)
ONTO = ("dequantized", "original", "requantized")


class MergeError(NamedTuple):
    """How far a merged weight W is from the trained one, W' + ΔW. Dimensionless.

    weight  ‖W - (W' + ΔW)‖ / ‖W' + ΔW‖
    update  ‖W - (W' + ΔW)‖ / ‖ΔW‖: above 1, the error is larger than the whole update
    """

    weight: float
    update: float


def plan(
    model: nn.Module,
    *,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    block: int | None = None,
    double: bool | str | None = None,
    skip: Targets | None = None,
    compute_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    **options,
) -> Plan:
    """The plan of inject, with its arguments; see adapter.plan.

    The adapters are made beside the model as it is. apply() quantizes the model first,
    and moves each adapter to the quantized module of the same name.
    """
    asked = dict(block=block, double=double, skip=skip, compute_dtype=compute_dtype)
    check.known("qlora.inject()", options, (*ARGUMENTS, *asked, "dtype"))
    allowed = f"allowed are None, {ADAPTER_DTYPES}"
    check.require(dtype in (None, *ADAPTER_DTYPES), "dtype", dtype, allowed)
    model, bits = unwrapped(model), None
    if not is_quantized(model):
        bits = dict(
            block=64 if block is None else block,
            double=True if double is None else double,
            exclude=skip,
            compute_dtype=compute_dtype,
        )
        quantizable(model, **bits)
    elif any(value is not None for value in asked.values()):
        raise ValueError(
            f"the model is in four bits already, so that {asked} cannot be had: leave "
            "them out, or load the base again"
        )
    planned = plan_layers(model, LoRA, "qlora", targets, exclude, options)
    for layer in planned.adapters.values():
        for parameter in (layer.A, layer.B):
            parameter.data = parameter.data.to(dtype or parameter.dtype)
    if bits is None:
        return planned
    return replace(planned, prepare=partial(_quantize, planned.adapters, bits))


def _quantize(adapters: dict[str, LoRA], bits: dict, model: nn.Module) -> None:
    """Quantize the model, and move each adapter to the quantized module of its name."""
    for layer in adapters.values():
        layer.base = nn.Identity()  # else its full weight would outlive its codes
    quantize_model(model, **bits)
    modules = dict(named_modules(model))
    for name, layer in adapters.items():
        layer.base = modules[name]


def inject(
    model: nn.Module,
    *,
    r: int = 8,
    alpha: float = 16,
    targets: Targets = "all-linear",
    **options,
) -> list[str]:
    """Put every projection of the layers into four bits, and a LoRA beside the targets.

        h = W' x + scale · B A x                                       [1] eqs. (5), (6)

    A model that is in four bits already (nf4.quantize_model, nf4.load) keeps its codes.

    Args
        r, alpha, targets, exclude, rslora, …   those of lora.inject
        block, double   of the codes: None for 64 and True; see nf4.quantize
        skip            projections that stay as they are. Heads, embeddings and norms
                        do anyway
        compute_dtype   of W' and its product: None for that of what comes in
        dtype           of A and B: float32 (None) or bfloat16, as in [1]. The latter
                        rounds away every update below 1/512 of a value, and some of
                        those up to 1/256
    Returns  the names of the wrapped modules
    Raises   ValueError   an argument out of its range, no match; codes asked for where
             the model has some already. The model is then as it was, not quantized
    Memory   4.127 bits for each weight of a projection, and LoRA's parameters
    Departs  the paper's models are in bfloat16; here A and B are float32 by default, as
             all that trains
    Source   [1] arXiv:2305.14314v1
    """
    options |= dict(r=r, alpha=alpha, targets=targets)
    return adapter.apply(model, plan(model, **options))


@torch.no_grad()
def merge(
    model: nn.Module,
    onto: str = "dequantized",
    original: nn.Module | Mapping[str, Tensor] | None = None,
) -> dict[str, MergeError]:
    """Fold the adapters into one of three weights, and say what that costs.

    Args
        onto      see the head of this file; "dequantized" is what merge(model) does
        original  for "original": the base model before it was quantized, or its
                  {module name: weight (d_out, d_in)}
    Returns  {module name: MergeError}: 0 for "dequantized", up to rounding
    Raises   ValueError   another `onto`, no original
             CannotMerge  an adapter that is no LoRA beside four bits; the original has
             not the weight; values that its dtype cannot hold. The model is as it was
    Memory   the merged weights, beside the model, while it runs
    """
    check.one_of("onto", onto, ONTO)
    adapter.injected(model)
    model = unwrapped(model)
    wrapped = adapter.adapters(model)
    for name, module in wrapped.items():
        if not (isinstance(module, LoRA) and isinstance(module.base, NF4Linear)):
            raise CannotMerge(
                f"{name} is a {type(module).__name__} on a "
                f"{type(module.base).__name__}: only a LoRA beside four bits has the "
                "three merges; peft_from_scratch.merge() knows the others"
            )
    weights = _weights(original, wrapped) if onto == "original" else {}
    ready, errors = {}, {}
    for name, module in wrapped.items():
        base, update = module.base, module.delta(torch.float64)
        trained = dequantize(base.quantized).double() + update
        W = weights[name].double() + update if onto == "original" else trained
        if not W.to(base.dtype).isfinite().all():
            raise CannotMerge(
                f"{name}.weight would hold values that {base.dtype} cannot; look for "
                "NaN in the adapter or in the original"
            )
        if onto == "requantized":
            merged = _requantized(base, W)
        else:
            merged = base.plain()
            merged.weight.copy_(as_stored(base, W))
        lost = (as_matrix(merged).double() - trained).norm()
        ready[module] = merged
        errors[name] = MergeError(
            relative_error(lost.item(), trained.norm().item()),
            relative_error(lost.item(), update.norm().item()),
        )
    replace_modules(model, ready)
    adapter.unwrap_adapters(model)
    share_buffer(model)
    return errors


def _requantized(base: NF4Linear, W: Tensor) -> NF4Linear:
    """The same projection with the codes of another weight."""
    q = quantize(
        W.to(base.dtype), base.block, base.constant_codebook or False, base.codebook
    )
    return NF4Linear(
        q,
        base.bias,
        compute_dtype=base.compute_dtype,
        transposed=base.transposed,
    ).train(base.training)


def _weights(original, wrapped) -> dict[str, Tensor]:
    """{name: W0 (d_out, d_in)} of every wrapped module, of the original base."""
    if original is None:
        raise ValueError("onto='original' needs the base as it was: original=…")
    if isinstance(original, nn.Module):
        modules = projections(original)
        original = {
            name: as_matrix(module).detach() for name, module in modules.items()
        }
    for name, module in wrapped.items():
        W = original.get(name)
        if W is None or tuple(W.shape) != adapter.sizes(module.base):
            raise CannotMerge(
                f"the original has no weight of {adapter.sizes(module.base)} for {name}"
            )
    return original
