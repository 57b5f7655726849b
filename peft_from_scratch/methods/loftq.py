"""LoftQ: LoRA-Fine-Tuning-Aware Quantization. Li et al., arXiv:2310.08659.

    W' = NF4(W0)        scale · B A = the best rank-r part of W0 - W', to start with

QLoRA starts beside W', which differs from W0, and A and B have to learn that away.
LoftQ starts them there: with B = 0 the model is NF4(W0), with LoftQ it is as close to
W0 as a rank of r allows. It is a start and no other method: what trains, is saved and
is merged is a QLoRA.
"""

import torch
from torch import Tensor, nn

from ..core import adapter
from ..core.adapter import as_matrix
from ..core.targets import QuantizedLinear, is_quantized, projections
from ..nf4 import dequantize
from . import qlora


def inject(model: nn.Module, **arguments) -> list[str]:
    """Put a model into four bits, and start its adapters at what that lost.

        U S Vᵀ = W0 - W'                                       [1] algorithm 1, T = 1
        A = S_r^½ V_rᵀ / scale^½      B = U_r S_r^½ / scale^½

    Args     those of qlora.inject
    Returns  the names of the wrapped modules
    Raises   ValueError   as qlora.inject; a model that is in four bits already has
             lost its W0
    Memory   a copy of the projections' weights while it runs
    Departs  [1] goes on alternating, W' anew for W0 - scale · B A; here once, so that
             the codes are those of any QLoRA on this base, and a file of it is too
    Source   [1] arXiv:2310.08659
    """
    found = projections(adapter.unwrap_compiled(model))
    if is_quantized(adapter.unwrap_compiled(model)):
        raise ValueError(
            "the model is in four bits already, and what that lost is gone: load the "
            "base again"
        )
    original = {
        name: as_matrix(module).detach().clone() for name, module in found.items()
    }
    names = qlora.inject(model, **arguments)
    start(model, original)
    return names


@torch.no_grad()
def start(model: nn.Module, original: dict[str, Tensor]) -> None:
    """Set A and B beside every weight in four bits to the best rank-r part of W0 - W'.

    Args
        original  {module name: W0 (d_out, d_in)}
    """
    for name, module in adapter.adapters(model).items():
        if not isinstance(module.base, QuantizedLinear):  # skip=…: it lost nothing
            continue
        lost = original[name].float() - dequantize(module.base.quantized).float()
        U, S, Vt = torch.linalg.svd(lost, full_matrices=False)
        r = len(module.A)
        root = (S[:r] / module.scale).sqrt()
        module.A.copy_(root[:, None] * Vt[:r])
        module.B.copy_(U[:, :r] * root)
