"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., arXiv:2106.09685v2.

    h = W0 x + scale · B A x        scale = alpha / r   (rsLoRA: alpha / sqrt(r))

W0 (d_out, d_in) is frozen. A (r, d_in) starts Gaussian and B (d_out, r) zero, so that
the model starts from exactly the pretrained weights. r (d_in + d_out) parameters train
in the place of d_in · d_out.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import adapter
from ..core.adapter import Adapter, Plan, as_matrix, as_stored, factory_kwargs, sizes
from ..core.targets import Targets
from . import lora_fast
from .lora_config import LoRAConfig, plan_layers


class LoRA(Adapter):
    """A frozen projection with a low-rank update beside it.

        h = W0 x + scale · B A x                   [1] eq. (3), alpha/r from section 4.1

    Args
        base   nn.Linear, or GPT-2's Conv1D, which stores W0 as (d_in, d_out)
        r      rank, at least 1; dimensionless. Useful up to min(d_in, d_out)
        alpha, rslora, dropout   see LoRAConfig
    Returns  (…, d_out), dtype of the base's output. Half precision rounds the sum once;
             where something watches the base, twice (lora_fast.py)
    Raises   ValueError   r, alpha or dropout out of range: the message holds the bound
    Memory   r (d_in + d_out) parameters, in the base's dtype; in float32 beside a base
             in half precision, where small updates would be rounded away
    Departs  [1] says "random Gaussian" without a variance. Here it is 1 / (3 d_in), the
             variance of the authors' uniform start: learning rates carry over.
    Source   [1] arXiv:2106.09685v2
    """

    # LoRA+ (arXiv:2402.12354) trains these at a higher learning rate: training/.
    loraplus_parameters: ClassVar = ("B",)

    def __init__(
        self,
        base: nn.Module,
        r: int = 8,
        alpha: float = 16,
        *,
        rslora: bool = False,
        dropout: float = 0.0,
    ):
        d_out, d_in = sizes(base)
        LoRAConfig(r, alpha, rslora, dropout)  # refuses what is out of range
        super().__init__(base)  # freezes it
        like = factory_kwargs(base)  # its device, and float32 for half precision
        self.A = nn.Parameter(torch.randn(r, d_in, **like) / math.sqrt(3 * d_in))
        self.B = nn.Parameter(torch.zeros(d_out, r, **like))
        self.alpha = alpha
        self.scale = alpha / (math.sqrt(r) if rslora else r)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        base, dropped = self.base, self.dropout(x)
        if lora_fast.is_safe(base, x):  # the lines below in one step, rounded once
            return lora_fast.low_rank_sum(base, x, dropped, self.A, self.B, self.scale)
        W0x = base(x)
        Ax = F.linear(dropped.to(self.A.dtype), self.A)
        h = W0x + self.scale * F.linear(Ax, self.B)
        return h.to(W0x.dtype)

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """scale · B A, the update of the weight: (d_out, d_in).

        dtype  to compute it in; None: the dtype of A and B
        """
        return self.scale * (self.B.to(dtype) @ self.A.to(dtype))

    def merged(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """W0 + scale · B A, in the orientation in which the base stores its weight."""
        W = as_matrix(self.base).to(dtype) + self.delta(dtype)
        return {"weight": as_stored(self.base, W)}


def plan(
    model: nn.Module,
    *,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    **options,
) -> Plan:
    """All that inject would do with these arguments, checked and not yet done.

    Args     those of inject
    Returns  the Plan, for adapter.apply(model, plan)
    """
    return plan_layers(model, LoRA, "lora", targets, exclude, options)


def inject(
    model: nn.Module,
    *,
    r: int = 8,
    alpha: float = 16,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    **options,
) -> list[str]:
    """Freeze the model and put a LoRA beside every target.

    Args
        r, alpha, options   see LoRAConfig
        targets, exclude    see targets.resolve
    Returns  the names of the wrapped modules
    Raises   ValueError   an argument out of its range, or no match; the model is then
             untouched
    """
    options |= {"r": r, "alpha": alpha}
    planned = plan(model, targets=targets, exclude=exclude, **options)
    return adapter.apply(model, planned)
