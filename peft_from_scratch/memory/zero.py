"""ZeRO: N ranks train one model, and each keeps a part of what all would keep.

In plain data parallelism every rank has all weights, gradients and AdamW's states, and
only the rows differ. N - 1 of the N copies are redundant. ZeRO (arXiv:1910.02054)
leaves them out, one row of the memory bill after the other. Every parameter is cut into
N equal parts, and rank r is the one that updates part r:

    stage 1   keeps the states of its parts only. A step: reduce-scatter the gradients,
              update the own parts, all-gather the weights
    stage 2   keeps the gradients of its parts only: each gradient is reduce-scattered
              as soon as backward has it, and dropped
    stage 3   keeps the weights of its parts only: a module's weights are gathered when
              it is called and when backward needs them, and dropped after each

                        bytes a rank keeps of Ψ parameters, of 4 bytes each
    stage 1             4 Ψ + 4 Ψ + 8 Ψ / N                 weights, gradients, states
    stage 2             4 Ψ + (4 + 8) Ψ / N
    stage 3             (4 + 4 + 8) Ψ / N
                        bytes it sends in a step
    stages 1 and 2      2 · 4 Ψ (N - 1) / N
    stage 3             3 · 4 Ψ (N - 1) / N             if backward reads all of them

Stage 3 gathers what is read: backward reads no bias and no embedding, and a weight that
two modules share is gathered for each. So the last line is exact for a chain of
products, and an estimate for a model.

formulas.zero_bytes and zero_traffic have the exact counts, with the padding: a part has
n = ceil(numel / N) values, and what is over at the end is zero. Half-precision weights
have float32 masters beside m and v: 12 bytes a parameter, as in mixed_adamw.py.

Stages 1 and 2 leave a frozen base whole on every rank, since it has neither gradients
nor states: for LoRA they save little. Stage 3 cuts the base too, and gathers it.

Each tensor is cut by itself, as FSDP2 does, and is a message of its own. FSDP2 and
DeepSpeed join tensors first: as many bytes, in fewer messages.
"""

import torch
from torch import Tensor

from ..common import check
from ..paged.states import check_settings
from .collectives import RankLost, Ring
from .shards import Shard, bytes_kept, shard, whole

__all__ = ["Optimizer", "RankLost", "bytes_kept", "shard", "whole"]


class Optimizer(torch.optim.Optimizer):
    """AdamW of which each rank keeps, and updates, one part in N.

        g = mean over the ranks of their gradients, this rank's part of it
        m = β1 m + (1 - β1) g              v = β2 v + (1 - β2) g²
        W = (1 - lr λ) W - lr m̂ / (√v̂ + ε)       for this rank's part; then all-gather

    The weights are those of torch.optim.AdamW on one rank, whose loss is the mean of
    the ranks' losses, but for the order of sums. So a loss that is a sum over label
    tokens is divided by (label tokens of all ranks) / N on each.

    Args
        params   as torch.optim takes them, each once and in the same order on every
                 rank; every rank must find a gradient for the same ones
        stage    1, 2 or 3; for 3 call zero.shard(model) before
        lr … weight_decay   as torch.optim.AdamW
        group, timeout      see Ring; in stage 3 those of zero.shard
    ring     counts the bytes that this rank sends, ring.sent
    Raises   ValueError   no process group, a stage that is not 1, 2 or 3, a parameter
                          twice, one that zero.shard has not cut, or for 1 and 2 has
             RankLost     in a step or a backward pass: another rank has failed
    Memory   formulas.zero_bytes; while a tensor is gathered, that one whole, and while
             a gradient is summed, that one twice
    Departs  stages 1 and 2 start from rank 0's values. A gradient is moved from .grad
             to `gradients`: clip with clip_grad_norm_ of this class. Of two optimizers
             of one parameter, the later one gets its gradients
    Source   ZeRO, arXiv:1910.02054; AdamW, arXiv:1711.05101
    """

    def __init__(
        self,
        params,
        stage: int = 1,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        group=None,
        timeout: float = 300.0,
    ):
        check.whole("stage", stage, 1, 3)
        self.stage, self.ring = stage, Ring(group, timeout)
        self.shards: dict[Tensor, Shard] = {}
        self.gradients: dict[Tensor, Tensor] = {}  # (n,) this rank's parts
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        check_settings(defaults | {"amsgrad": False})
        super().__init__(_checked(params, stage), defaults)

    def add_param_group(self, group: dict) -> None:
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            self._take(p)

    @torch.no_grad()
    def step(self, closure=None):
        """Update this rank's parts, and in stages 1 and 2 gather all; all ranks do."""
        with torch.enable_grad():
            loss = closure() if closure else None
        self._reduce_rest()
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.gradients:
                    self._update(p, group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, of either kind."""
        self.gradients.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scale the gradients to a common norm of at most `max_norm`; all ranks do.

        Returns  the norm before, of all ranks' parts, as torch's function does
        """
        self._reduce_rest()
        parts = [g.double().square().sum() for g in self.gradients.values()]
        device = next(iter(self.shards)).device
        squares = torch.zeros(self.ring.size, 1, dtype=torch.float64, device=device)
        squares[self.ring.rank] = sum(parts)
        self.ring.all_gather(squares, number=len(self.shards))
        norm = squares.sum().sqrt().item()
        for g in self.gradients.values():
            g.mul_(min(1.0, max_norm / (norm + 1e-6)))
        return norm

    def state_dict(self) -> dict:
        """The states in full, as torch.optim.AdamW has them; all ranks call it.

        Returns  on rank 0 what torch's AdamW, or a zero.Optimizer on another number of
                 ranks, can load; on other ranks the settings alone. "master" is there
                 for half-precision weights, and torch's AdamW leaves it alone
        """
        whole_states = {}
        for index, p in enumerate(self.shards):
            full = {
                name: self.shards[p].join(value).cpu() if value.dim() else value.clone()
                for name, value in self.state.get(p, {}).items()
            }
            if full and self.ring.rank == 0:
                whole_states[index] = full
        groups = super().state_dict()["param_groups"]
        return {"state": whole_states, "param_groups": groups, "rank": self.ring.rank}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Take this rank's parts of what rank 0 of any number of ranks has saved.

        Raises  ValueError  another rank's dict, other groups, or a state of another
                shape than its parameter's; the optimizer is then as it was
        """
        if state_dict.get("rank", 0) != 0:
            raise ValueError(
                f"this is the state dict of rank {state_dict['rank']}, which has no "
                "states: load on every rank the one that rank 0 saved"
            )
        parts = {}
        for index, p in enumerate(self.shards):
            for name, value in state_dict["state"].get(index, {}).items():
                if name != "step" and value.shape != p.shape:
                    raise ValueError(
                        f"{name!r} of parameter {index} in the state dict is "
                        f"{[*value.shape]}; the parameter is {[*p.shape]}"
                    )
                part = value.clone() if name == "step" else self._part(p, value)
                parts.setdefault(p, {})[name] = part
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(parts)

    def _take(self, p: Tensor) -> None:
        """Begin to look after a parameter; an optimizer that did so before stops."""
        number = len(self.shards)
        if self.stage == 3:
            self.shards[p] = p.zero_shard
            self.ring = p.zero_shard.ring
        else:
            self.shards[p] = Shard(p, number, self.ring)
            self.ring.broadcast(p.data, number)
        if hasattr(p, "zero_hook"):
            p.zero_hook.remove()
        if self.stage > 1:
            p.zero_hook = p.register_post_accumulate_grad_hook(self._reduce)

    @torch.no_grad()
    def _reduce(self, p: Tensor) -> None:
        """Of a whole gradient keep this rank's part of the mean, and drop the rest."""
        mean, p.grad = self.shards[p].mean(p.grad), None
        if p in self.gradients:
            self.gradients[p] += mean
        else:
            self.gradients[p] = mean

    def _reduce_rest(self) -> None:
        for p in self.shards:
            if p.grad is not None:
                self._reduce(p)

    def _update(self, p: Tensor, group: dict) -> None:
        part, state = self.shards[p], self.state[p]
        w = part.cut(p) if part.values is None else part.values  # (n,)
        if not state:
            _begin(state, w)
        state["step"] += 1
        m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"].item()
        (beta1, beta2), g = group["betas"], self.gradients[p].to(m.dtype)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
        W = state.get("master", w).mul_(1 - group["lr"] * group["weight_decay"])
        W.addcdiv_(m, root, value=-group["lr"] / (1 - beta1**t))
        w.copy_(W)  # rounds a master
        if part.values is None:
            p.copy_(part.join(w))

    def _part(self, p: Tensor, value: Tensor) -> Tensor:
        """This rank's part of a state, in the dtype and on the device of the states."""
        dtype = torch.promote_types(p.dtype, torch.float32)
        return self.shards[p].cut(value.to(p.device, dtype))


def _begin(state: dict, w: Tensor) -> None:
    """The states of a part before its first step, with torch's names."""
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    state["step"] = torch.zeros((), dtype=torch.float32)
    state["exp_avg"] = torch.zeros_like(wide)
    state["exp_avg_sq"] = torch.zeros_like(wide)
    if wide is not w:
        state["master"] = wide


def _checked(params, stage: int):
    """`params` as lists; ValueError for a parameter that cannot be taken."""
    if isinstance(params, Tensor):
        return params  # torch says what is wrong with it
    params = [
        {**each, "params": list(each["params"])} if isinstance(each, dict) else each
        for each in params
    ]
    tensors = [
        tensor[-1] if isinstance(tensor, tuple) else tensor
        for each in params
        for tensor in (each["params"] if isinstance(each, dict) else [each])
    ]
    places: dict[int, int] = {}
    for place, p in enumerate(tensors):
        first = places.setdefault(id(p), place)
        if first != place:
            raise ValueError(
                f"parameter {place} of {[*p.shape]} is parameter {first} once more; it "
                "would be updated twice a step. Pass each once, as model.parameters() "
                "does with tied weights"
            )
        if (stage == 3) != hasattr(p, "zero_shard"):
            before = "zero.shard(model) first" if stage == 3 else "stage=3"
            state = "is whole" if stage == 3 else "was cut by zero.shard"
            raise ValueError(
                f"{stage=}, and parameter {place} of {[*p.shape]} {state}: {before}"
            )
    return params
