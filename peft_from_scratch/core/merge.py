"""Merging: every adapter folded into the weight that it stands beside.

    W' = W0 + ΔW        exact in float64, then rounded once to the dtype of W0

A method says what its ΔW is, in `Adapter.merged`; this file does the rest, for all of
them: the rounding, the checks, and "all or nothing".
"""

from itertools import chain

import torch
from torch import nn

from .adapter import (
    CannotMerge,
    adapters,
    injected,
    modules_sharing,
    unwrap_adapters,
)
from .targets import QuantizedLinear, unwrapped


@torch.no_grad()
def merge(model: nn.Module) -> dict[str, float]:
    """Fold every adapter into the weights that it stands beside, and take it off.

    Computed in float64 (float32 on MPS, which has no float64) and rounded once to the
    weight's dtype. All or nothing: every merged weight is ready and checked before the
    first one is written. A 4-bit projection becomes a full-precision one, because base
    plus update has no exact 4-bit form.

    Returns  {module name: rounding error}, dimensionless: the norm of what rounding to
             the weight's dtype lost, over the norm of the change. Keep a copy of the
             base if it is needed again: subtracting does not restore the bits.
    Raises   CannotMerge  with the reason, the model untouched
    Memory   one copy of the wrapped weights while it runs
    """
    injected(model)
    model = unwrapped(model)
    ready, errors, unpacked = [], {}, {}
    for name, adapter in adapters(model).items():
        lost = changed = 0.0
        base = adapter.base
        if isinstance(base, QuantizedLinear):
            base = unpacked[adapter] = base.plain()
        for inner, exact in adapter.merged(_wide(base)).items():
            parameter = base.get_parameter(inner)
            _refuse_tied(model, f"{name}.{inner}", parameter)
            if exact.is_meta:
                raise CannotMerge(
                    f"{name}.{inner} is offloaded (on meta): take accelerate's hooks "
                    "off with remove_hook_from_submodules(model), then merge"
                )
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


def _wide(base: nn.Module) -> torch.dtype:
    first = next(chain(base.parameters(), base.buffers()))
    return torch.float32 if first.device.type == "mps" else torch.float64


def _refuse_tied(model, name, parameter) -> None:
    sharing = modules_sharing(model, parameter)
    if len(sharing) > 1:
        raise CannotMerge(
            f"{name} is one tensor with {sharing[0]}.weight: merging would change "
            "both. Untie them first, or leave this module out of the targets"
        )
