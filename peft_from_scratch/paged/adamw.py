"""AdamW on slices of a parameter, in the order of operations of torch's plain loop.

Loshchilov and Hutter, "Decoupled weight decay regularization" [1], Algorithm 2; with
amsgrad, Reddi, Kale and Kumar [2]. All of it is elementwise: a slice of the parameter
needs the same slice of g, m and v, and nothing else.

The letters are [1]'s, but for γ, which is torch's lr: [1]'s schedule times its α. Torch
decays by γ λ where [1] decays by the schedule times λ, and corrects the bias of the
largest v as it does that of v, where [2] corrects none.

Equal mathematics are not equal bits. torch.optim.AdamW(foreach=False) rounds after each
of the operations below, in this order, and so do we. Fewer temporaries are allowed: a
square root that goes to a scratch buffer has the same bits as one in a new tensor.

    [1] arXiv:1711.05101    [2] arXiv:1904.09237
"""

import torch
from torch import Tensor

from .cuts import in_order


class SlicedAdamW:
    """The step number `t` of one parameter; called with each slice, finished once.

    Args
        p        the parameter, with its gradient
        group    its settings
        t        1 in the first step
        scratch  int64, as many bytes as the largest slice has at least
    """

    def __init__(self, p: Tensor, group: dict, t: float, scratch: Tensor):
        lr, (self.beta1, self.beta2) = group["lr"], group["betas"]
        if isinstance(lr, Tensor):
            lr = lr.squeeze()
        decays = group["weight_decay"] != 0
        self.decay = 1 - lr * group["weight_decay"] if decays else None
        self.size = lr / (1 - self.beta1**t)
        self.root = (1 - self.beta2**t) ** 0.5
        self.eps = group["eps"]
        self.whole, self.p, self.g = p, in_order(p, p), in_order(p.grad, p)
        self.scratch, self.maximize = scratch.view(p.dtype), group["maximize"]

    def __call__(
        self, start: int, stop: int, m: Tensor, v: Tensor, top: Tensor | None = None
    ) -> None:
        """Update the values start … stop of the parameter, and their states.

        Args
            m, v, top  (pages, values of a page), or () for a scalar, which has another
                       type than one value beside a learning rate that is a tensor;
                       top is the largest v, with amsgrad
        """
        shape = m.shape
        p, g = (t[start:stop].view(shape) for t in (self.p, self.g))
        h = self.scratch[: stop - start].view(shape)
        # g ← −g, where the objective is maximized; h is not needed before g is used up
        if self.maximize:
            g = torch.neg(g, out=h)
        # θ ← θ − γ λ θ                                             [1] line 12, its end
        if self.decay is not None:
            p.mul_(self.decay)
        # m ← β1 m + (1 − β1) g                                     [1] line 7
        m.lerp_(g, 1 - self.beta1)
        # v ← β2 v + (1 − β2) g²                                    [1] line 8
        v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        # top ← max(top, v), in the place of v from here on         [2] Algorithm 2
        if top is not None:
            v = torch.maximum(top, v, out=top)
        # h = √v / √(1 − β2^t) + ε                                  [1] lines 10 and 12
        torch.sqrt(v, out=h).div_(self.root).add_(self.eps)
        # θ ← θ − γ / (1 − β1^t) · m / h                            [1] lines 9 and 12
        p.addcdiv_(m, h, value=-self.size)

    def finish(self) -> None:
        """A parameter with gaps in its memory was worked on in a copy: take it."""
        if self.p.data_ptr() != self.whole.data_ptr():
            self.whole.copy_(self.p.view(self.whole.shape))
