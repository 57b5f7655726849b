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
from transformers.pytorch_utils import Conv1D

from ..core import adapter
from ..core import targets as targeting
from ..core.adapter import (
    Adapter,
    Plan,
    as_matrix,
    as_stored,
    factory_kwargs,
    refuse_unimplemented,
    sizes,
)
from ..core.targets import Targets
from ..files import patterns
from . import lora_fast
from .lora_config import LoRAConfig, plan_layers

PEFT_TYPE = "LORA"
FILE_SUFFIXES = ("lora_A.weight", "lora_B.weight")
# inject's arguments -> the fields of PEFT's LoraConfig
FIELDS = dict(
    r="r",
    alpha="lora_alpha",
    rslora="use_rslora",
    dropout="lora_dropout",
    bias="bias",
    rank_pattern="rank_pattern",
    alpha_pattern="alpha_pattern",
)
# Fields of a saved file that change nothing in it: the keys name the modules, the layer
# knows its own orientation, and the rest qualifies options that are refused.
INERT = {"target_modules", "exclude_modules", "fan_in_fan_out", "init_lora_weights"}
INERT |= {"eva_config", "megatron_core", "qalora_group_size"}
PEFT_ALPHA = 8  # LoraConfig's default, for a file that leaves lora_alpha out
# How an adapter of PEFT may have been initialised without changing the base model.
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")


class LoRA(Adapter):
    """A frozen projection with a low-rank update beside it.

        h = W0 x + scale · B A x                   [1] eq. (3), alpha/r from section 4.1

    Args
        base   nn.Linear or Conv1D, frozen here.     W0 (d_out, d_in)
        r      rank, 1 <= r <= min(d_in, d_out); dimensionless
        alpha, rslora, dropout   see LoRAConfig
    Returns  (…, d_out), dtype of the base's output
    Raises   ValueError   r, alpha or dropout out of range: the message holds the bound
    Memory   r (d_in + d_out) parameters: in the base's dtype, but in float32 on a half-
             precision base, where updates of 1e-4 would be rounded away
    Departs  [1] says "random Gaussian" without a variance. Here 1 / (3 d_in), that of
             the uniform draw in the paper's own code, so that rates carry over.
    Source   [1] arXiv:2106.09685v2
    """

    file_names: ClassVar = dict(zip("AB", FILE_SUFFIXES, strict=True))
    loraplus_parameters: ClassVar = ("B",)  # LoRA+, arXiv:2402.12354: recipe.py

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
        LoRAConfig(r, alpha, rslora, dropout).check_rank(d_out, d_in)
        super().__init__(base)
        like = factory_kwargs(base)
        self.A = nn.Parameter(torch.randn(r, d_in, **like) / math.sqrt(3 * d_in))
        self.B = nn.Parameter(torch.zeros(d_out, r, **like))
        self.alpha = alpha
        self.scale = alpha / (math.sqrt(r) if rslora else r)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.base(x), self.dropout(x)  # y = W0 x
        if lora_fast.is_safe(self.base):  # the two lines below in one step, and faster
            return lora_fast.LowRankUpdate.apply(y, x, self.A, self.B, self.scale)
        h = F.linear(x.to(self.A.dtype), self.A)  # h = A x (…, r)
        return (y + self.scale * F.linear(h, self.B)).to(y.dtype)  # W0 x + scale · B h

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """The update of the weight, scale · B A: (d_out, d_in), computed in `dtype`."""
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
    """The plan of inject, with its arguments; see adapter.plan."""
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
        targets, exclude    see targets.resolve; or a ready {name: module}, no exclude
    Returns  the names of the wrapped modules
    Raises   ValueError   an argument out of its range, or no match; the model as it was
    """
    options |= dict(r=r, alpha=alpha, targets=targets, exclude=exclude)
    return adapter.apply(model, plan(model, **options))


def to_peft(model: nn.Module) -> dict:
    """The injected model's configuration in PEFT's field names.

    Ranks and alphas that differ from the default are written by full module name, since
    the order of overlapping patterns does not survive a JSON file.
    """
    ours = adapter.injected(model).config
    wrapped = adapter.adapters(model)
    ranks = {patterns.alone(n, wrapped): m.A.shape[0] for n, m in wrapped.items()}
    alphas = {patterns.alone(n, wrapped): m.alpha for n, m in wrapped.items()}
    return {
        "r": ours["r"],
        "lora_alpha": ours["alpha"],
        "use_rslora": ours["rslora"],
        "lora_dropout": ours["dropout"],
        "bias": ours["bias"],
        "rank_pattern": {n: r for n, r in ranks.items() if r != ours["r"]},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != ours["alpha"]},
        "fan_in_fan_out": any(isinstance(m.base, Conv1D) for m in wrapped.values()),
        "target_modules": patterns.shortest(model, wrapped),
    }


def from_peft(config: dict, names: list[str]) -> dict:
    """The arguments of inject, but for the targets, for PEFT's LoRA config.

    Args
        names  the modules that the file adapts
    Raises   ValueError   what this library lacks, or a pattern that cannot be used
    """
    start = config.get("init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        raise ValueError(
            f"init_lora_weights={targeting.shortened(start)} changed the base model, which "
            "this file does not hold; convert it to a plain LoRA with PEFT first"
        )
    refuse_unimplemented(config, INERT | set(FIELDS.values()))
    given = {
        ours: config[theirs] for ours, theirs in FIELDS.items() if theirs in config
    }
    for field in ("rank_pattern", "alpha_pattern"):
        given[field] = patterns.resolved(field, given.get(field), names)
    return {"alpha": PEFT_ALPHA, **given}
