"""PiSSA: Principal Singular Values and Singular Vectors Adaptation. Meng et al.,
arXiv:2404.02948v4.

    W0 = U S Vᵀ       scale · B A = U_r S_r V_rᵀ       W_res = W0 - scale · B A

LoRA starts from noise and zero, and trains beside the whole weight. PiSSA starts A and
B as the weight's own largest r singular directions, and freezes what is left of it. The
model starts from the pretrained weights as well, up to rounding.
"""

from collections.abc import Mapping

import torch
from torch import nn

from ..core import adapter, left_out
from ..core.adapter import Plan, as_matrix, sizes
from ..core.matrices import svd_halves
from ..core.targets import QuantizedLinear, Targets, resolve
from .lora import LoRA
from .lora_config import LoRAConfig, plan_layers


class PiSSA(LoRA):
    """A projection whose principal part trains, while the rest of it is frozen.

        h = W_res x + scale · B A x                                  [1] eqs. (2) to (4)
        A = S_r^½ V_rᵀ / scale^½      B = U_r S_r^½ / scale^½

    Args     r and alpha of LoRA. A weight with fewer than r singular values gives all
    Returns  (…, d_out), dtype of the base's output
    Memory   those of LoRA; the start of A and B, for saving; and the original weight,
             so that remove() restores it bit for bit
    Departs  In a file it is a LoRA of rank 2r on the original weight: the difference
             scale (B A - B0 A0). W_res is then not needed, and any program reads it.
    Source   [1] arXiv:2404.02948v4
    """

    def __init__(self, base: nn.Module, r: int = 8, alpha: float = 16, **options):
        LoRAConfig(r, alpha)  # refuses what is out of range
        directions = min(r, *sizes(base))
        super().__init__(base, directions, alpha * directions / r, **options)
        W0 = as_matrix(base).detach().to(self.A.dtype)
        A, B = svd_halves(W0, directions, self.scale)
        # LAPACK's columns: what is loaded beside them, moments for one, is by rows.
        self.A.data, self.B.data = A.contiguous(), B.contiguous()
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    @torch.no_grad()
    def on_attach(self) -> None:
        """Take the principal part out of the base, which keeps the residual."""
        self.original = self.base.weight.detach().clone()
        W = as_matrix(self.base)  # a view of the weight
        W.copy_(W.to(self.A0.dtype) - self.scale * (self.B0 @ self.A0))

    @torch.no_grad()
    def on_remove(self) -> None:
        if "original" in vars(self):  # not where an injection failed before this one
            self.base.weight.copy_(self.original)


def plan(
    model: nn.Module,
    *,
    r: int = 8,
    alpha: float = 16,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
) -> Plan:
    """The plan of inject, with its arguments; see adapter.plan."""
    if not isinstance(targets, Mapping):
        left_out.warn_of_preset(model, targets)
        targets, exclude = resolve(model, targets, exclude), None
    _refuse_packed(targets)
    _refuse_tied(model, targets)
    options = dict(r=r, alpha=alpha)
    return plan_layers(model, PiSSA, "pissa", targets, exclude, options)


def inject(
    model: nn.Module,
    *,
    r: int = 8,
    alpha: float = 16,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
) -> list[str]:
    """Split every target into a principal part, which trains, and a frozen residual.

    Takes a singular value decomposition of each weight: seconds for a small model.

    Args     r, alpha, targets, exclude: those of lora.inject
    Returns  the names of the wrapped modules
    Raises   ValueError   an argument out of its range, no match, a tied weight, or one
             in four bits; the model as it was
    """
    options = dict(r=r, alpha=alpha, targets=targets, exclude=exclude)
    return adapter.apply(model, plan(model, **options))


def _refuse_packed(targets) -> None:
    """ValueError where a weight is held as codes: the residual is none of those."""
    for name, module in targets.items():
        if isinstance(module, QuantizedLinear):
            raise ValueError(
                f"{name} is a {type(module).__name__}: PiSSA changes the weight that "
                "it stands beside, and codes cannot be changed. Leave it out of the "
                "targets, or use LoRA"
            )


def _refuse_tied(model, targets) -> None:
    """ValueError where the residual in one module would change another one too."""
    for name, module in targets.items():
        sharing = adapter.modules_sharing(model, getattr(module, "weight", None))
        if len(sharing) > 1:
            raise ValueError(
                f"{sharing[-1]}.weight is one tensor with {sharing[0]}.weight: taking "
                f"the principal part out of {name} would change both. Leave it out of "
                "the targets, or use LoRA"
            )
