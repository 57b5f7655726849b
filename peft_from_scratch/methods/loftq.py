"""LoftQ: LoRA-Fine-Tuning-Aware Quantization. Li et al., arXiv:2310.08659.

    W' = NF4(W0)        scale · B A = the best rank-r part of W0 - W', to start with

QLoRA starts beside W', which differs from W0, and A and B have to learn that away.
LoftQ starts them there: with B = 0 the model is NF4(W0), with LoftQ it is as close to
W0 as a rank of r allows. LoftQ changes only the initialization: training, saving and
merging are QLoRA's.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..core import adapter
from ..core.adapter import Plan, as_matrix
from ..core.matrices import svd_halves
from ..core.targets import QuantizedLinear, is_quantized, unwrapped
from ..nf4 import dequantize
from . import qlora
from .lora import LoRA


def plan(model: nn.Module, **arguments) -> Plan:
    """The plan of inject, with its arguments; see adapter.plan."""
    if is_quantized(unwrapped(model)):
        raise ValueError(
            "the model is in four bits already, and what that lost is gone: load the "
            "base again"
        )
    planned = qlora.plan(model, **arguments)
    return replace(planned, prepare=partial(_quantize, planned))


def inject(model: nn.Module, **arguments) -> list[str]:
    """Put a model into four bits, and initialize its adapters at what that lost.

        U S Vᵀ = W0 - W'                                       [1] algorithm 1, T = 1
        A = S_r^½ V_rᵀ / scale^½      B = U_r S_r^½ / scale^½

    Args     those of qlora.inject
    Returns  the names of the wrapped modules
    Raises   ValueError   as qlora.inject; a model that is in four bits already has
             lost its W0
    Memory   the targets' weights in full, beside their codes, while it runs
    Departs  [1] goes on alternating, W' anew for W0 - scale · B A; here once, so that
             the codes are those of any QLoRA on this base, and a file of it is too
    Source   [1] arXiv:2310.08659
    """
    return adapter.apply(model, plan(model, **arguments))


def _quantize(planned: Plan, model: nn.Module) -> None:
    """Quantize as QLoRA does, and set A and B by what that changed."""
    W0 = {name: as_matrix(layer.base) for name, layer in planned.adapters.items()}
    planned.prepare(model)
    start(planned.adapters, W0)


@torch.no_grad()
def start(adapters: dict[str, LoRA], original: dict[str, Tensor]) -> None:
    """Set A and B beside every weight in four bits to the best rank-r part of W0 - W'.

    Args
        original  {module name: W0 (d_out, d_in)}
    """
    for name, module in adapters.items():
        if not isinstance(module.base, QuantizedLinear):  # skip=…: it lost nothing
            continue
        lost = original[name].float() - dequantize(module.base.quantized).float()
        A, B = svd_halves(lost, len(module.A), module.scale)
        # Where the weight has fewer directions than r, the others start as LoRA's do.
        module.A[: len(A)].copy_(A)
        module.B[:, : len(A)].copy_(B)
