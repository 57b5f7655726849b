"""LoRA's sum in one step: the same numbers as the equation, in less time and memory.

`LoRA.forward` says y = W0 x + scale · B A x in three lines. Autograd on these lines
gives the right values and gradients. It also allocates the product B A x and its scaled
copy at every module, each as large as y, and keeps what it needs for the gradients of
both. `LowRankUpdate` adds into the base's output in place, and writes its gradients
out. It also computes the products that have r columns as their transposes, with r rows:
on a CPU the same numbers in less than half of the time (benchmarks/lora_step.py).

The law that ties both together is in tests/methods/test_lora.py: values and gradients
of the fast way equal those of the equation, to 1e-12 in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_safe(base: nn.Module) -> bool:
    """Whether y may be written into: not where a hook on the base may have kept it.

    A compiler fuses the equation itself, and gets that.
    """
    return not (torch.compiler.is_compiling() or base._forward_hooks)


class LowRankUpdate(torch.autograd.Function):
    """y += scale · (x Aᵀ) Bᵀ in place, with the gradients written out.

    Forward    h = x Aᵀ                     (tokens, r), kept
               y = y + scale · h Bᵀ         (tokens, d_out), over the base's output
    Backward   dh = scale · dy B            (tokens, r)
               dA = dhᵀ x                   (r, d_in)
               dB = scale · dyᵀ h           (d_out, r)
               dx = dh A                    (tokens, d_in), where x needs it
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


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])  # (…, d) -> (tokens, d)
