"""LoRA's sum in one step: the same numbers as the equation, in less time and memory.

`LoRA.forward` says h = W0 x + scale · B A x in three lines. Autograd on these lines
gives the right values and gradients. It also allocates the product B A x and its scaled
copy at every module, each as large as h, and keeps what it needs for the gradients of
both. `LowRankUpdate` adds into the base's output in place, and writes its gradients
out. It also computes the products that have r columns as their transposes, with r rows:
on a CPU the same numbers in less than half of the time (benchmarks/lora_step.py).

The law that ties both together is in tests/methods/test_lora.py: values and gradients
of the fast way equal those of the equation, to 1e-12 in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as _modes
from transformers.pytorch_utils import Conv1D

from ..nf4 import NF4Linear


def is_safe(base: nn.Module, W0x: Tensor) -> bool:
    """Whether W0 x may be written into: nothing else holds it, or looks at it.

    Not safe are:

    - a base that is compiled, patched, or computes in a way that is not known here: the
      base may keep its output, and some operations need their output for the gradient
    - a module hook, which may keep the output. A full backward hook makes it a view
    - torch.func, forward-mode AD, traces and dispatch modes, which follow each
      operator; but for modes that say that they keep nothing, as the meter of bytes
    - a subclass of Tensor, such as a DTensor, which has operators of its own

    Those get the equation as it is written. So does a compiler, which fuses it.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(W0x) is not Tensor
        or type(base).forward not in FRESH
        or "forward" in vars(base)
        or _is_hooked(base)
        or _is_observed()
    )


# These return new memory, which nobody keeps.
FRESH = {nn.Linear.forward, Conv1D.forward, NF4Linear.forward}


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


class LowRankUpdate(torch.autograd.Function):
    """h = W0 x + scale · (x Aᵀ) Bᵀ, over W0 x, with the gradients written out.

    Forward    z = x Aᵀ                     (tokens, r), kept
               h = W0x + scale · z Bᵀ       (tokens, d_out), in the memory of W0x
    Backward   dz = scale · dh B            (tokens, r)
               dA = dzᵀ x                   (r, d_in)
               dB = scale · dhᵀ z           (d_out, r)
               dx = dz A                    (tokens, d_in), where x needs it
    """

    @staticmethod
    def forward(ctx, W0x, x, A, B, scale):
        z, h = F.linear(x.to(A.dtype), A), W0x
        if h.dtype == z.dtype == B.dtype:
            h.view(-1, h.shape[-1]).addmm_(_rows(z), B.T, alpha=scale)
        else:  # half-precision base or autocast: add in the wider of both dtypes
            h.copy_(torch.add(h, F.linear(z, B), alpha=scale))
        ctx.mark_dirty(h)
        ctx.save_for_backward(x, z, A, B)
        ctx.scale = scale
        return h

    @staticmethod
    def backward(ctx, dh):
        x, z, A, B = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative passes through z as well
            z = F.linear(x.to(A.dtype), A)
        dh_rows = _rows(dh).to(B.dtype)
        dz = torch.mm(B.T, dh_rows.T).T * ctx.scale
        dA = torch.mm(dz.T, _rows(x).to(A.dtype))
        dB = torch.mm(_rows(z).T.to(B.dtype), dh_rows).T * ctx.scale
        dx = (
            torch.mm(dz, A).view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[1]
            else None
        )
        return dh, dx, dA, dB, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])  # (…, d) -> (tokens, d)
