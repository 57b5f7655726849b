"""LoRA's sum inside the base's product: rounded once, in less time and memory.

`LoRA.forward` says h = W0 x + scale · B A x in three lines. In bfloat16, the first line
rounds W0 x to 8 bits. An update below half a unit of the last bit is then lost: at the
start of training, that is most of it. `LowRankSum` computes the same sum in the other
order:

    C = scale · (x Aᵀ) Bᵀ       small, and rounded where it is small
    h = C + x W0ᵀ               one product, which starts from C instead of from zero

A BLAS accumulates bfloat16 and float16 products in float32, C included, and rounds the
sum once. Most of C is below the last bit of h as well. It survives on average, because
it decides which way W0 x, whose low bits are still there, is rounded. So the update
loses nothing but noise that the base's own rounding has anyway. The backward pass adds
up the gradient of x in the same way. On one pair of matrices, benchmarks/rounding.py
measures what is left of an update, and the time.

A float32 or float64 sum is the equation's, and needs one pass over h less.

In bfloat16, A, B and x take part in the small products as bfloat16: that rounds an
update by 1/512 of its own size, where the sum would round it by 1/512 of h. float32
copies of x and h would cost a quarter of the base's product, and change no loss
(benchmarks/rounding.py). float16 cannot hold the gradients of an update that is close
to zero, so there the small products are in the dtype of A and B. So they are where a
call has few rows, and no time is lost by it.

The law that ties both together is in tests/laws/methods/lora.py: values and gradients
of this way equal those of the equation, to 1e-12 in float64.
"""

import torch
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

    - a base that is compiled, patched, or computes in a way that is not known here
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
    if isinstance(base, NF4Linear):
        Wt, (dtype, result) = None, base.dtypes(x)
    else:
        Wt = base.weight if isinstance(base, Conv1D) else base.weight.T
        dtype = result = _product_dtype(x)
        Wt = Wt.to(dtype)
    bias, into_C = base.bias, None
    if bias is not None and Wt is not None and not _is_half(dtype):
        bias, into_C = None, bias  # as a float32 Linear adds it
    if dropped is x:
        dropped = None
    of_sum = (x, dropped, A, B, into_C, Wt, base, scale, dtype)
    if torch.is_grad_enabled():
        h = LowRankSum.apply(*of_sum)
    else:  # a decoding step feels what apply costs
        h, _ = _sum(*of_sum)
    h = h.to(result)
    if Wt is None:
        base.release_if_last()
    return h if bias is None else h + bias.to(result)


class LowRankSum(torch.autograd.Function):
    """h = x W0ᵀ + scale · (x̃ Aᵀ) Bᵀ + b, with the gradients written out.

    Forward    z  = scale · x̃ Aᵀ            (tokens, r), kept
               h  = z Bᵀ + b, rounded       (tokens, d_out)
               h += x W0ᵀ                   in place: BLAS adds in float32
    Backward   dz = scale · dh B            (tokens, r)
               dA = dzᵀ x̃                   (r, d_in)
               dB = dhᵀ z                   (d_out, r)
               dx̃ = dz A                    (tokens, d_in), rounded
               dx = dx̃ + dh W0              in place, as above; where x needs it

    b is the bias of a float32 or float64 base, else None: low_rank_sum adds a rounded
    one last. In C, it could be so much larger than the update that it hides it.

    Products with r columns are computed as their transposes, with r rows: on a CPU the
    same numbers in less than half of the time (benchmarks/lora_step.py). An NF4Linear's
    W' is made for each product; nothing of it is kept.
    """

    @staticmethod
    def forward(ctx, x, dropped, A, B, bias, Wt, base, scale, dtype):
        h, z = _sum(x, dropped, A, B, bias, Wt, base, scale, dtype)
        ctx.save_for_backward(x if dropped is None else dropped, z, A, B, Wt)
        ctx.base, ctx.scale, ctx.dtype = base, scale, dtype
        ctx.x_dtype, ctx.has_dropout = x.dtype, dropped is not None
        return h

    @staticmethod
    def backward(ctx, dh):
        x, z, A, B, Wt = ctx.saved_tensors
        needs_x, needs_dropped, _, _, needs_bias, *others = ctx.needs_input_grad
        dh = _rows(dh).to(ctx.dtype)
        small = _small_dtype(ctx.dtype, len(dh), A)
        dh_s, x_s, A_s, B_s = (t.to(small) for t in (dh, _rows(x), A, B))
        if torch.is_grad_enabled():  # a second derivative passes through z as well
            z = torch.mm(A_s, x_s.T).T * ctx.scale
        dz = torch.mm(B_s.T, dh_s.T) * ctx.scale  # (r, tokens)
        dA = torch.mm(dz, x_s).to(A.dtype)
        dB = torch.mm(z.T.to(small), dh_s).T.to(B.dtype)
        dx = dropped = None
        if needs_dropped or (needs_x and not ctx.has_dropout):
            dx = torch.mm(dz.T, A_s).to(ctx.dtype)
        if ctx.has_dropout:
            dropped = None if dx is None else dx.to(x.dtype).view(x.shape)
            dx = None
        if needs_x:
            dx = _plus_dh_W0(dx, dh, Wt, ctx.base)
            dx = dx.to(ctx.x_dtype).view(x.shape)
        db = dh.sum(0) if needs_bias else None
        return dx, dropped, dA, dB, db, *(None for _ in others)


def _sum(x, dropped, A, B, bias, Wt, base, scale, dtype) -> tuple[Tensor, Tensor]:
    """(h, z) of LowRankSum: h (…, d_out) in `dtype`, z (tokens, r)."""
    rows = _rows(x)
    small = _small_dtype(dtype, len(rows), A)
    inner = rows if dropped is None else _rows(dropped)
    z = torch.mm(A.to(small), inner.to(small).T).T * scale
    Bt = B.to(small).T
    C = torch.mm(z, Bt) if bias is None else torch.addmm(bias, z, Bt)
    C, rows = C.to(dtype), rows.to(dtype)
    h = base.add_product(C, rows) if Wt is None else C.addmm_(rows, Wt)
    return h.view(*x.shape[:-1], len(B)), z


def _plus_dh_W0(C: Tensor | None, dh: Tensor, Wt: Tensor | None, base) -> Tensor:
    """C + dh W0 (tokens, d_in), in the memory of C; without C, dh W0."""
    if Wt is not None:
        return torch.mm(dh, Wt.T) if C is None else C.addmm_(dh, Wt.T)
    if C is None or torch.is_grad_enabled():
        product = DequantMatmul.apply(dh, base, dh.dtype, False)
        return product if C is None else C + product
    with base.dequantized(dh.dtype) as W:
        return C.addmm_(dh, W)


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
    device = x.device.type
    return is_autocast_available(device) and torch.is_autocast_enabled(device)


def _is_half(dtype: torch.dtype) -> bool:
    return dtype.itemsize < 4


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])  # (…, d) -> (tokens, d)
