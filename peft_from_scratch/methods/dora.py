"""DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al., arXiv:2402.09353v6.

    h = m ⊙ (V x) / ‖V‖        V = W0 + scale · B A        m, ‖V‖ (d_out)

A weight's row has a length and a direction. LoRA changes both with the same numbers;
DoRA trains the lengths m by themselves, and leaves the directions to A and B. m starts
as ‖W0‖, so that the model starts from the pretrained weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import adapter
from ..core.adapter import Plan, as_matrix, as_stored
from ..core.targets import Targets
from . import lora_fast
from .lora import LoRA
from .lora_config import plan_layers


class DoRA(LoRA):
    """A frozen projection whose rows get a low-rank update of direction, and a length.

        h = m / ‖V‖ ⊙ (W0 x + scale · B A x) + b         [1] eq. (5), ‖·‖ of each row

    Args     those of LoRA
    Returns  (…, d_out), dtype of the base's output
    Raises   ValueError   those of LoRA; a row of W0 that is zero
    Memory   d_out parameters more than LoRA, and V itself for a moment in each forward
    Time     in half precision a second product with W0: the first one is rounded, and
             would hide a change of m by less than 1/512 (bfloat16)
    Departs  [1] writes W as (d_in, d_out) and takes norms of columns: these rows. As in
             its section 4.3, ‖V‖ is a constant of the backward pass. With dropout, the
             part of W0 x that m changes sees the dropped input, as in PEFT.
    Source   [1] arXiv:2402.09353v6
    """

    def __init__(self, base: nn.Module, r: int = 8, alpha: float = 16, **options):
        super().__init__(base, r, alpha, **options)
        self.m = nn.Parameter(self.norm())
        if not self.m.all():
            raise ValueError(
                f"row {self.m.argmin().item()} of the weight is zero and has no "
                "direction: DoRA would divide by its length. Leave this module out of "
                "the targets (exclude=…), or use LoRA"
            )

    def forward(self, x: Tensor) -> Tensor:
        y, W0 = self.base(x), as_matrix(self.base)
        dropped = self.dropout(x)
        unbiased = F.linear(dropped, W0) if dropped is not x else y  # W0 x
        if self.base.bias is not None and dropped is x:
            unbiased = unbiased - self.base.bias
        low_rank = F.linear(F.linear(dropped.to(self.A.dtype), self.A), self.B)
        g = self.m / self.norm()  # m / ‖V‖: (d_out)
        change = (g - 1) * unbiased + g * self.scale * low_rank  # g V x - W0 x
        if lora_fast.rounds(self.base, x):  # and y is rounded: another product
            return lora_fast.sum_with_product(self.base, x, change)
        return (y + change).to(y.dtype)  # W0 x + b + change

    @torch.no_grad()
    def norm(self, dtype: torch.dtype | None = None) -> Tensor:
        """‖W0 + scale · B A‖ of each row: (d_out), without a gradient."""
        dtype = dtype or self.A.dtype
        return (as_matrix(self.base).to(dtype) + self.delta(dtype)).norm(dim=1)

    def merged(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """m / ‖V‖ ⊙ V, in the orientation in which the base stores its weight."""
        V = as_matrix(self.base).to(dtype) + self.delta(dtype)
        W = (self.m.to(dtype) / self.norm(dtype))[:, None] * V
        return {"weight": as_stored(self.base, W)}


def plan(
    model: nn.Module,
    *,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    **options,
) -> Plan:
    """The plan of inject, with its arguments; see adapter.plan."""
    return plan_layers(model, DoRA, "dora", targets, exclude, options)


def inject(
    model: nn.Module,
    *,
    r: int = 8,
    alpha: float = 16,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    **options,
) -> list[str]:
    """Freeze the model and put a DoRA beside every target.

    Args     those of lora.inject, rslora, dropout, bias and the patterns included
    Returns  the names of the wrapped modules
    Raises   ValueError   an argument out of its range, or no match; the model as it was
    """
    options |= dict(r=r, alpha=alpha, targets=targets, exclude=exclude)
    return adapter.apply(model, plan(model, **options))
