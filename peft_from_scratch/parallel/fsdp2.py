"""FSDP2: the ranks train by torch's own fully_shard.

It cuts what ZeRO's stage 3 cuts: weights, gradients and optimizer states. A tensor is
cut by rows, ceil(rows / N) a rank, and is a DTensor from then on. The parameters of a
decoder layer are gathered in one message when the layer is called, and once more for
its backward pass; those outside of the layers form a last group, the model's own.

A base in four bits (--method qlora) consists of buffers here. fully_shard leaves
buffers alone, so the adapter is cut and the base stays whole on every rank. Another
library's packed weights are parameters, and are refused.

Source   torch.distributed.fsdp.fully_shard, torch 2.6 and later
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..core.targets import layers_of, unwrapped
from ..training.config import TrainConfig
from ..training.state import TrainState, new_state
from . import twin
from .group import Group
from .state import RankState, refuse_chunks, refuse_recipe


class FSDP2State(RankState):
    """A rank whose parameters and optimizer states are DTensors."""

    def clip(self, max_norm: float) -> float:
        parameters = list(self.trainable.values())
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def whole(self, name: str) -> Tensor:
        return whole(self.trainable[name])

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.trainable.items():
            p.copy_(cut_like(p, weights[name]))

    def moments(self) -> dict[str, dict[str, Tensor]]:
        moments = {}
        for name, p in self.trainable.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                full = whole(value)
                if self.rank == 0:
                    moments.setdefault(name, {})[key] = full.cpu()
        return moments

    def load_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        for name, values in moments.items():
            p = self.trainable[name]
            self.optimizer.state[p] = {
                key: cut_like(p, value) if value.dim() else value.clone()
                for key, value in values.items()
            }


@dataclass(frozen=True)
class FSDP2:
    """The engine: `train(model, …, engine=FSDP2())` on every rank.

    Raises   ValueError  in train(): packed weights of another library
    Departs  messages wait as long as the process group's timeout says
    """

    @contextmanager
    def __call__(
        self, model: nn.Module, state: TrainState, config: TrainConfig
    ) -> Iterator[tuple[nn.Module, FSDP2State]]:
        twin.refuse_packed(model, "FSDP2")
        group = Group()
        refuse_recipe(config, group.ranks)
        refuse_chunks(config, "FSDP2")
        theirs = twin.twin(model)
        for p in theirs.parameters():
            dist.broadcast(p.data, src=0)
        cut(theirs)
        twin.lend(model)
        yield (
            theirs,
            new_state(theirs, config, _optimizer, FSDP2State, group=group),
        )
        twin.give_back(model, map(whole, theirs.parameters()))


def cut(model: nn.Module) -> None:
    """fully_shard on each decoder layer, and on the model for what is outside of them.

    Each is cut again after its forward, the model too, so that a forward pass without a
    backward pass leaves nothing whole behind.
    """
    model = unwrapped(model)
    for name in layers_of(model):
        fully_shard(model.get_submodule(name), reshard_after_forward=True)
    fully_shard(model, reshard_after_forward=True)


def whole(tensor: Tensor) -> Tensor:
    """The values of a tensor that may be cut; all ranks ask for it together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(p: Tensor, value: Tensor) -> Tensor:
    """This rank's rows of a whole tensor, as those of p: nothing is sent."""
    if not isinstance(p, DTensor):
        return value
    value = value.to(p.device)
    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def _optimizer(groups: list[dict], config: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
