"""LoRA's sum inside the base's product: rounded once, in less time and memory.

`LoRA.forward` says h = W0 x + scale · B A x in three lines. In bfloat16, the first line
rounds W0 x to 8 bits. An update below half a unit of the last bit is then lost; early
in training, that is most of it. `LowRankSum` computes the sum in another order:

    C = (x Aᵀ) Bᵀ               small, and rounded where it is small
    h = scale · C + x W0ᵀ       one product, which starts from C instead of from zero

BLAS accumulates bfloat16 and float16 products in float32, C included, and rounds the
sum once. What C adds is mostly below the last bit of h as well. But it decides which
way W0 x is rounded, whose low bits are still there, so that it survives on average. The
backward pass adds up the gradient of x in the same way. benchmarks/rounding.py measures
what is left of an update each way, and the time; on a GPU, where cuBLAS has the same
two terms, it is not measured.

In float32 and float64 the sum is the equation's, and takes one pass over h less.

With bfloat16, the small products are in bfloat16 too. That rounds an update by at most
1/256 of its own size, where a rounded W0 x would round it by 1/256 of h. float32 copies
of x and of C would take a quarter of the base's product and leave no more of the
update. float16 is too narrow for the gradients of an update near zero, so there the
small products have the dtype of A and B; as they have in any dtype where few rows make
them cheap.

The laws are in tests/laws/methods/lora.py: values and gradients of this way equal those
of the equation, to 1e-12 in float64. Those of rounding are in rounding.py there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as _modes
from transformers.pytorch_utils import Conv1D

from ..nf4 import NF4Linear
from ..nf4.linear import DequantMatmul

FEW = 64  # rows, below which a product with r columns costs the same in float32


def is_safe(base: nn.Module, x: Tensor) -> bool:
    """Whether the base is no more than x W0ᵀ + b here, and nobody looks at its output.

    Not safe are:

    - a base that is compiled, patched, or computes in a way that is not known here;
      bitsandbytes' Linear4bit is one, whose product comes rounded
    - a weight that trains, is a subclass of Tensor, or has another dtype than x
    - a module hook, which wants the base's output
    - torch.func, forward-mode AD, traces and dispatch modes, which follow each
      operator; but for modes that say that they keep nothing, as the meter of bytes
    - a subclass of Tensor, such as a DTensor, which has operators of its own

    Those get the equation as it is written, with its two roundings. So does a compiler,
    which fuses it.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(x) is not Tensor
        or type(base).forward not in KNOWN
        or "forward" in vars(base)
        or not _has_frozen_matrix(base, x)
        or _is_hooked(base)
        or _is_observed()
    )


# Each computes x W0ᵀ + b.
KNOWN = {nn.Linear.forward, Conv1D.forward, NF4Linear.forward}


def _has_frozen_matrix(base: nn.Module, x: Tensor) -> bool:
    """Whether W0 is plain numbers that do not train, and that can multiply x."""
    W = base._parameters.get("weight")
    if W is None:
        return isinstance(base, NF4Linear)
    return (
        type(W) is nn.Parameter
        and not W.requires_grad
        and (W.dtype == x.dtype or _is_autocast(x))
    )


def _is_hooked(base: nn.Module) -> bool:
    """Whether a hook runs at a call of the base, its own or one of all modules."""
    return bool(
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or base._compiled_call_impl
        or _has_any_global_hook()
    )


def _is_observed() -> bool:
    """Whether torch.func, forward-mode AD or a mode of torch follows each operator."""
    return bool(
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or not all(getattr(mode, "keeps_nothing", False) for mode in _modes())
        or torch._C._len_torch_function_stack()
    )


def low_rank_sum(
    base: nn.Module, x: Tensor, dropped: Tensor, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """x W0ᵀ + b + scale · (x̃ Aᵀ) Bᵀ, rounded once.

    Args
        base     is_safe(base, x): a Linear, Conv1D or NF4Linear.  W0 (d_out, d_in)
        x        (…, d_in)
        dropped  x̃: x, or x with dropout
        A, B     (r, d_in) and (d_out, r)
    Returns  (…, d_out), in the dtype of the base's output. A product's dtype is x's;
             under autocast it is autocast's; an NF4Linear may have a dtype of its own
    """
    Wt, dtype, result = _operand(base, x)
    bias, later = base.bias, None
    if bias is not None and result != dtype:
        bias, later = None, bias.to(result)  # as an NF4Linear adds it
    if dropped is x:
        dropped = None
    terms = (x, dropped, A, B, bias, Wt, base, scale, dtype)
    if torch.is_grad_enabled():
        h = LowRankSum.apply(*terms)
        if Wt is None:
            base.release_if_last()
    else:  # apply costs as much as the small products of a decoding step
        h, _ = _sum(*terms)
    # The view is made here: a model may write into what it gets.
    h = _as(h, result).view(*x.shape[:-1], len(B))
    return h if later is None else h + later


def sum_with_product(base: nn.Module, x: Tensor, change: Tensor) -> Tensor:
    """x W0ᵀ + b + change, rounded once.

    Args
        base    is_safe(base, x)          W0 (d_out, d_in)
        x       (…, d_in)
        change  (…, d_out), in any dtype; rounded to that of the product first
    Returns  (…, d_out), in the dtype of the base's output
    """
    Wt, dtype, result = _operand(base, x)
    rounded = change.to(dtype, copy=True)  # written into
    h = SumWithProduct.apply(rounded, x, Wt, base, dtype)
    if Wt is None:
        base.release_if_last()
    h = _as(h, result)
    return h if base.bias is None else h + base.bias.to(result)


def rounds(base: nn.Module, x: Tensor) -> bool:
    """Whether the base's output is in half precision, where a sum may lose a change."""
    return is_safe(base, x) and _dtypes(base, x)[-1].itemsize == 2


class LowRankSum(torch.autograd.Function):
    """h = x W0ᵀ + scale · (x̃ Aᵀ) Bᵀ + b (tokens, d_out), its gradients written out.

    Forward    z = x̃ Aᵀ                     (tokens, r), kept
               C = z Bᵀ, rounded            (tokens, d_out)
               h = scale · C + b + x W0ᵀ    over C: BLAS adds in float32, rounds once
    Backward   dz = scale · dh B            (tokens, r)
               dA = dzᵀ x̃                   (r, d_in)
               dB = scale · dhᵀ z           (d_out, r)
               dx̃ = dz A                    (tokens, d_in), rounded
               dx = dx̃ + dh W0              in place, as above; where x needs it

    In half precision the bias b is added last: a rounded C that held a large bias would
    have lost the update.

    Products with r columns are computed as their transposes, with r rows: on a CPU the
    same numbers in less than half of the time (benchmarks/lora_step.py). An NF4Linear's
    W' is made for each product; nothing of it is kept.
    """

    @staticmethod
    def forward(ctx, x, dropped, A, B, bias, Wt, base, scale, dtype):
        h, z = _sum(x, dropped, A, B, bias, Wt, base, scale, dtype)
        ctx.save_for_backward(x if dropped is None else dropped, z, A, B, Wt)
        ctx.base, ctx.scale, ctx.dtype = base, scale, dtype
        ctx.has_dropout = dropped is not None
        return h

    @staticmethod
    def backward(ctx, dh):
        """Autograd converts each gradient to the dtype of what it belongs to."""
        x, z, A, B, Wt = ctx.saved_tensors
        dh = _as(_rows(dh), ctx.dtype)
        small = _small_dtype(ctx.dtype, len(dh), A)
        dh_s, x_s, A_s, B_s = (_as(t, small) for t in (dh, _rows(x), A, B))
        # A second derivative passes through z as well.
        z = F.linear(x_s, A_s) if torch.is_grad_enabled() else _as(z, small)
        dz = torch.mm(B_s.T, dh_s.T) * ctx.scale  # (r, tokens)
        dA = torch.mm(dz, x_s)
        dB = torch.mm(z.T, dh_s).T * ctx.scale
        needs_x, needs_dropped, _, _, needs_bias, *others = ctx.needs_input_grad
        dx = d_dropped = None
        if needs_x or needs_dropped:
            dx = _as(torch.mm(dz.T, A_s), ctx.dtype).view(x.shape)
        if ctx.has_dropout:
            dx, d_dropped = None, dx
        if needs_x:
            dx = _plus_dh_W0(dx, dh, Wt, ctx.base).view(x.shape)
        db = dh.sum(0) if needs_bias else None
        return dx, d_dropped, dA, dB, db, *(None for _ in others)


class SumWithProduct(torch.autograd.Function):
    """C + x W0ᵀ, over C; dC = dh and dx = dh W0."""

    @staticmethod
    def forward(ctx, C, x, Wt, base, dtype):
        ctx.save_for_backward(Wt)
        ctx.base, ctx.dtype = base, dtype
        ctx.mark_dirty(C)
        _add_product(C.view(-1, C.shape[-1]), _as(_rows(x), dtype), Wt, base)
        return C

    @staticmethod
    def backward(ctx, dh):
        (Wt,) = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[1]:
            dx = _plus_dh_W0(None, _as(_rows(dh), ctx.dtype), Wt, ctx.base)
            dx = dx.view(*dh.shape[:-1], -1)
        return dh, dx, None, None, None


def _sum(x, dropped, A, B, bias, Wt, base, scale, dtype) -> tuple[Tensor, Tensor]:
    """(h, z) of LowRankSum: h (tokens, d_out) in `dtype`, z (tokens, r)."""
    rows = _rows(x)
    small = _small_dtype(dtype, len(rows), A)
    inner = rows if dropped is None else _rows(dropped)
    z, Bt = F.linear(_as(inner, small), _as(A, small)), _as(B, small).T
    if bias is None or Wt is None or small != dtype or dtype.itemsize == 2:
        C = torch.mm(z, Bt)
    else:  # where a Linear adds it
        C, scale, bias = torch.addmm(bias, z, Bt, alpha=scale), 1, None
    if dtype == torch.float16:  # B could be beyond its range, scale · B is not
        C, scale = C * scale, 1
    C, rows = _as(C, dtype), _as(rows, dtype)
    _add_product(C, rows, Wt, base, scale)
    if bias is not None:
        C.add_(_as(bias, dtype))
    return C, z


def _add_product(C, rows, Wt, base, scale=1) -> None:
    """scale · C + rows W0ᵀ, over C."""
    if Wt is None:
        base.add_product(C, rows, scale)
    else:
        C.addmm_(rows, Wt, beta=scale)


def _plus_dh_W0(C: Tensor | None, dh: Tensor, Wt: Tensor | None, base) -> Tensor:
    """C + dh W0 (tokens, d_in), in the memory of C (…, d_in); without C, dh W0."""
    C = None if C is None else _rows(C)
    if Wt is not None:
        return torch.mm(dh, Wt.T) if C is None else C.addmm_(dh, Wt.T)
    if C is None or torch.is_grad_enabled():
        product = DequantMatmul.apply(dh, base, dh.dtype, False)
        return product if C is None else C + product
    with base.dequantized(dh.dtype) as W:
        return C.addmm_(dh, W)


def _operand(base, x) -> tuple[Tensor | None, torch.dtype, torch.dtype]:
    """(W0ᵀ (d_in, d_out), dtype of the product with x, dtype of the base's output).

    None is the weight of an NF4Linear, which is made for each product.
    """
    dtype, result = _dtypes(base, x)
    W = base._parameters.get("weight")
    if W is None:
        return None, dtype, result
    return _as(W if isinstance(base, Conv1D) else W.T, dtype), dtype, result


def _dtypes(base, x) -> tuple[torch.dtype, torch.dtype]:
    """Of the product with x, and of the base's output."""
    if base._parameters.get("weight") is None:
        return base.dtypes(x)
    return (_product_dtype(x),) * 2


def _small_dtype(dtype: torch.dtype, tokens: int, A: Tensor) -> torch.dtype:
    """Of the products with A and B, beside a product with W0 in `dtype`."""
    narrow = dtype == torch.bfloat16 and tokens >= FEW
    return torch.bfloat16 if narrow else A.dtype


def _product_dtype(x: Tensor) -> torch.dtype:
    """Of x W0ᵀ, as torch has it: autocast leaves float64 alone."""
    if x.dtype == torch.float64 or not _is_autocast(x):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def _is_autocast(x: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():
        return False
    device = x.device.type
    return is_autocast_available(device) and torch.is_autocast_enabled(device)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in that dtype; quicker than x.to(dtype) where it has it already."""
    return x if x.dtype == dtype else x.to(dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])  # (…, d) -> (tokens, d)
