"""AdamW on slices of a parameter: as torch's plain loop, or by torch's fused kernel.

Loshchilov and Hutter, "Decoupled weight decay regularization" [1], Algorithm 2; with
amsgrad, Reddi, Kale and Kumar [2]. All of it is elementwise: a slice of the parameter
needs the same slice of g, m and v, and nothing else.

The letters are [1]'s, but for γ, which is torch's lr: [1]'s schedule times its α. Torch
decays by γ λ where [1] decays by the schedule times λ, and corrects the bias of the
largest v as it does that of v, where [2] corrects none.

Equal mathematics are not equal bits. torch.optim.AdamW(foreach=False) rounds after each
of the operations below, in this order, and so does SlicedAdamW. Fewer temporaries are
allowed: a square root in a scratch buffer has the same bits as one in a new tensor.

torch.optim.AdamW(fused=True) makes one pass over p, g, m and v, several values at a
time, and rounds in other places. What is left at the end of a tensor, fewer values than
a vector register takes, it rounds in yet another way. So FusedAdamW has torch's bits on
slices that begin at a whole register, and its pages begin there (layout.py).

    [1] arXiv:1711.05101    [2] arXiv:1904.09237
"""

import torch
from torch import Tensor

from .layout import in_order


class Sliced:
    """A parameter and its gradient, in the order of the parameter's memory: (n,)."""

    def __init__(self, p: Tensor):
        self.parameter, self.p, self.g = p, in_order(p, p), in_order(p.grad, p)

    def finish(self) -> None:
        """Write a parameter with gaps in its memory back from the copy it was in."""
        if self.p.data_ptr() != self.parameter.data_ptr():
            self.parameter.copy_(self.p.view(self.parameter.shape))


class SlicedAdamW(Sliced):
    """The step number `t` of one parameter; called with each slice, finished once.

    Args
        p        the parameter, with its gradient
        group    its settings
        t        1 in the first step
        scratch  int64, as many bytes as the largest slice has at least
    """

    def __init__(self, p: Tensor, group: dict, t: float, scratch: Tensor):
        super().__init__(p)
        lr, (self.beta1, self.beta2) = group["lr"], group["betas"]
        if isinstance(lr, Tensor):
            lr = lr.squeeze()
        decays = group["weight_decay"] != 0
        self.decay = 1 - lr * group["weight_decay"] if decays else None
        self.step_size = lr / (1 - self.beta1**t)
        self.sqrt_bias2 = (1 - self.beta2**t) ** 0.5
        self.eps = group["eps"]
        self.scratch, self.maximize = scratch.view(p.dtype), group["maximize"]

    def __call__(
        self, start: int, stop: int, m: Tensor, v: Tensor, v_max: Tensor | None = None
    ) -> None:
        """Update the values start … stop of the parameter, and their states.

        Args
            m, v   (pages, values of a page), or () for a scalar: with a learning rate
                   that is a tensor, a scalar has another dtype than a single value
            v_max  the largest v so far, with amsgrad
        """
        shape = m.shape
        p, g = (t[start:stop].view(shape) for t in (self.p, self.g))
        denominator = self.scratch[: stop - start].view(shape)
        # g ← −g to maximize; the scratch is free until g was used for the last time
        if self.maximize:
            g = torch.neg(g, out=denominator)
        # θ ← θ − γ λ θ                                             [1] line 12, its end
        if self.decay is not None:
            p.mul_(self.decay)
        # m ← β1 m + (1 − β1) g                                     [1] line 7
        m.lerp_(g, 1 - self.beta1)
        # v ← β2 v + (1 − β2) g²                                    [1] line 8
        v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        # v_max ← max(v_max, v), in the place of v from here on     [2] Algorithm 2
        if v_max is not None:
            v = torch.maximum(v_max, v, out=v_max)
        # denominator = √v / √(1 − β2^t) + ε                        [1] lines 10 and 12
        torch.sqrt(v, out=denominator).div_(self.sqrt_bias2).add_(self.eps)
        # θ ← θ − γ / (1 − β1^t) · m / denominator                  [1] lines 9 and 12
        p.addcdiv_(m, denominator, value=-self.step_size)


class FusedAdamW(Sliced):
    """As SlicedAdamW, by torch's fused kernel: one pass over p, g, m and v.

    That kernel takes values as they lie in memory, one after the other, whatever the
    strides. So they are brought in order first: the gradient, and where the parameter
    has gaps, the parameter as well.
    """

    def __init__(self, p: Tensor, group: dict, t: float, scratch: Tensor):
        super().__init__(p)
        self.p, self.g = self.p.contiguous(), self.g.contiguous()
        lr, (beta1, beta2) = group["lr"], group["betas"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            lr = lr.to(p.device)
        self.step = torch.full((), t, dtype=torch.float32, device=p.device)
        names = ("weight_decay", "eps", "maximize", "amsgrad")
        self.settings = {name: group[name] for name in names}
        self.settings |= {"lr": lr, "beta1": beta1, "beta2": beta2}

    def __call__(
        self, start: int, stop: int, m: Tensor, v: Tensor, v_max: Tensor | None = None
    ) -> None:
        """Update the values start … stop of the parameter, and their states."""
        p, g = (t[start:stop].view(m.shape) for t in (self.p, self.g))
        tensors = (p, g, m, v) if v_max is None else (p, g, m, v, v_max)
        lists = [[*t.unbind()] if t.dim() else [t] for t in tensors]  # a page each
        v_maxs = [] if v_max is None else lists[4]
        steps = [self.step] * len(lists[0])
        torch._fused_adamw_(*lists[:4], v_maxs, steps, **self.settings)
