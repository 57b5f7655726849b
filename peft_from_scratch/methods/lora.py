"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., arXiv:2106.09685v2.

    h = W0 x + scale · B A x        scale = alpha / r   (rsLoRA: alpha / sqrt(r))

W0 (d_out, d_in) is frozen. A (r, d_in) starts Gaussian and B (d_out, r) zero, so that
the model starts from exactly the pretrained weights. r (d_in + d_out) parameters train
in the place of d_in · d_out.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..common import check
from ..core import adapter
from ..core import targets as targeting
from ..core.adapter import (
    Adapter,
    as_matrix,
    as_stored,
    factory_kwargs,
    refuse_unimplemented,
    sizes,
)
from ..core.targets import Targets
from ..files import patterns

PATTERNS = {"rank_pattern": "r", "alpha_pattern": "alpha"}  # -> where none matches
BIASES = ("none", "lora_only", "all")
DEFAULTS = dict(
    r=8,
    alpha=16,
    rslora=False,
    dropout=0.0,
    bias="none",
    rank_pattern=None,
    alpha_pattern=None,
)
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
TINIEST, LARGEST = 1e-30, 1e30  # of alpha: its scale and products stay in float32
PEFT_ALPHA = 8  # LoraConfig's default, for a file that leaves lora_alpha out
# How an adapter of PEFT may have been initialised without changing the base model.
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")


class LowRankUpdate(torch.autograd.Function):
    """y += scale · (x Aᵀ) Bᵀ in place, with the gradients written out.

    Forward    h = x Aᵀ                     (tokens, r), kept
               y = y + scale · h Bᵀ         (tokens, d_out), over the base's output
    Backward   dh = scale · dy B            (tokens, r)
               dA = dhᵀ x                   (r, d_in)
               dB = scale · dyᵀ h           (d_out, r)
               dx = dh A                    (tokens, d_in), where x needs it

    Autograd on the plain expression gives the same values; it also allocates the
    product and its scaled copy, each as large as y, at every module. And the products
    that have r columns are computed as their transposes, with r rows: on a CPU the same
    numbers in less than half of the time (benchmarks/lora_step.py).
    """

    @staticmethod
    def forward(ctx, y, x, A, B, scale):
        h = F.linear(x.to(A.dtype), A)
        if y.dtype == h.dtype == B.dtype:
            y.view(-1, y.shape[-1]).addmm_(_rows(h), B.T, alpha=scale)
        else:  # half-precision base or autocast: add in the wider of both dtypes
            y.copy_(torch.add(y, F.linear(h, B), alpha=scale))
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, h, A, B)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):
        x, h, A, B = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative passes through h as well
            h = F.linear(x.to(A.dtype), A)
        dy_rows = _rows(dy).to(B.dtype)
        dh = torch.mm(B.T, dy_rows.T).T * ctx.scale
        dA = torch.mm(dh.T, _rows(x).to(A.dtype))
        dB = torch.mm(_rows(h).T.to(B.dtype), dy_rows).T * ctx.scale
        dx = (
            torch.mm(dh, A).view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[1]
            else None
        )
        return dy, dx, dA, dB, None


class LoRA(Adapter):
    """A frozen projection with a low-rank update beside it.

        h = W0 x + scale · B A x                   [1] eq. (3), alpha/r from section 4.1

    Args
        base     nn.Linear or Conv1D, frozen here.     W0 (d_out, d_in)
        r        rank, 1 <= r <= min(d_in, d_out); dimensionless
        alpha    > 0, dimensionless; scale = alpha / r
        rslora   scale = alpha / sqrt(r) instead, [2] section 3
        dropout  probability in [0, 1) on the input of A, in training only
    Returns  (…, d_out), dtype of the base's output
    Raises   ValueError   r, alpha or dropout out of range: the message holds the bound
    Memory   r (d_in + d_out) parameters: in the base's dtype, but in float32 on a half-
             precision base, where updates of 1e-4 would be rounded away
    Departs  [1] says "random Gaussian" without a variance. Here 1 / (3 d_in), that of
             the uniform draw in the paper's own code, so that rates carry over.
    Source   [1] arXiv:2106.09685v2   [2] arXiv:2312.03732
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
        _check(r, alpha, rslora, dropout, d_out, d_in)
        super().__init__(base)
        like = factory_kwargs(base)
        self.A = nn.Parameter(torch.randn(r, d_in, **like) / math.sqrt(3 * d_in))
        self.B = nn.Parameter(torch.zeros(d_out, r, **like))
        self.alpha = alpha
        self.scale = alpha / (math.sqrt(r) if rslora else r)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.base(x), self.dropout(x)
        # A compiler fuses this itself; and what a hook on the base has kept is not ours
        # to write into.
        if torch.compiler.is_compiling() or self.base._forward_hooks:
            h = F.linear(x.to(self.A.dtype), self.A)
            return (y + self.scale * F.linear(h, self.B)).to(y.dtype)
        return LowRankUpdate.apply(y, x, self.A, self.B, self.scale)

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """The update of the weight, scale · B A: (d_out, d_in), computed in `dtype`."""
        return self.scale * (self.B.to(dtype) @ self.A.to(dtype))

    def merged(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """W0 + scale · B A, in the orientation in which the base stores its weight."""
        W = as_matrix(self.base).to(dtype) + self.delta(dtype)
        return {"weight": as_stored(self.base, W)}


def inject(
    model: nn.Module,
    *,
    r: int = 8,
    alpha: float = 16,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    bias: str = "none",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> list[str]:
    """Freeze the model and put a LoRA beside every target.

    Args
        r, alpha, rslora, dropout   see LoRA
        targets, exclude            see targets.resolve; or a ready {name: module}
                                    without exclude
        bias           "none"; "lora_only" also trains the biases of the wrapped
                       modules; "all" every bias of the model
        rank_pattern   {module name, its end, or a regex: rank} where it is not r; the
                       first that matches a module decides
        alpha_pattern  the same for alpha
    Returns  the names of the wrapped modules
    Raises   ValueError   an argument out of its range, or no match; the model as it was
    """
    arguments = dict(
        r=r,
        alpha=alpha,
        rslora=rslora,
        dropout=dropout,
        bias=bias,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )
    return wrap_all(model, LoRA, "lora", targets, exclude, arguments)


def wrap_all(
    model: nn.Module,
    layer: type[LoRA],
    method: str,
    targets: Targets,
    exclude: Targets | None,
    arguments: dict,
) -> list[str]:
    """Put a `layer`, LoRA or a descendant, beside every target; see inject.

    Args
        arguments  those of inject, but for the targets, by name
    """
    bias = arguments["bias"]
    check.one_of("bias", bias, BIASES)
    adapter.refuse_second(model)
    if not isinstance(targets, Mapping):
        targets = targeting.resolve(model, targets, exclude)
    elif exclude is not None:
        raise ValueError(
            "exclude and a ready {name: module}: leave it out of the latter"
        )
    ranks, alphas = (
        targeting.per_module(pattern, arguments[pattern], targets, arguments[usual])
        for pattern, usual in PATTERNS.items()
    )
    names = {module: name for name, module in targets.items()}
    options = {name: arguments[name] for name in ("rslora", "dropout")}

    def wrap(base: nn.Module) -> LoRA:
        r, alpha = ranks[names[base]], alphas[names[base]]
        try:
            return layer(base, r, alpha, **options)
        except ValueError as error:
            raise ValueError(f"{names[base]}: {error}") from None

    return adapter.inject(
        model,
        wrap,
        targets,
        method=method,
        config=arguments | {name: dict(arguments[name] or {}) for name in PATTERNS},
        own=_biases(model, bias, targets),
    )


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


def _check(r, alpha, rslora, dropout, d_out, d_in) -> None:
    check.whole(
        "r",
        r,
        1,
        min(d_out, d_in),
        must="the rank must be",
        why=f"the smaller side of a weight of {d_out} x {d_in}",
    )
    number = "a number above 0 that float32 can hold"
    check.number("alpha", alpha, number, above=TINIEST, below=LARGEST)
    check.number("dropout", dropout, "a probability in [0, 1)", least=0, below=1)
    check.flag("rslora", rslora)


def _biases(model, bias, targets) -> list[str]:
    every = [targeting.uncompiled(name) for name, _ in model.named_parameters()]
    names = [name for name in every if name.rpartition(".")[2] == "bias"]
    if bias == "lora_only":
        names = [n for n in names if n.rpartition(".")[0] in targets]
    return names if bias != "none" else []


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])  # (…, d) -> (tokens, d)
