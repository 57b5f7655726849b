"""AdamW as mixed-precision training runs it: half-precision weights, a float32 copy."""

import torch
from torch import Tensor


class MixedAdamW(torch.optim.Optimizer):
    """AdamW in mixed precision: half-precision weights with a float32 master copy.

        g  = float32(gradient)
        m  = β1 m + (1 - β1) g             v = β2 v + (1 - β2) g²
        W  = (1 - lr λ) W - lr m̂ / (√v̂ + ε)         all in float32
        weight = round(W)                            the half-precision copy

    A rate of 1e-5 changes a weight by less than bfloat16 can hold; the master copy adds
    up what one step alone would lose.

    Memory   12 bytes a parameter: master, m and v
    """

    def __init__(
        self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            master = parameter.detach().float()
            state["master"] = master.clone() if master is parameter else master
            state["exp_avg"] = torch.zeros_like(master)
            state["exp_avg_sq"] = torch.zeros_like(master)
            state["step"] = torch.zeros((), dtype=torch.float32)
        state["step"] += 1
        g, t = parameter.grad.float(), state["step"].item()
        (beta1, beta2), m, v = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
        W = state["master"].mul_(1 - group["lr"] * group["weight_decay"])
        W.addcdiv_(m, root, value=-group["lr"] / (1 - beta1**t))
        parameter.copy_(W)
