"""Zero: the ranks train by our own ZeRO, memory/zero.py.

    stage 1   optimizer states cut in N parts
    stage 2   and gradients
    stage 3   and weights, frozen ones too

Every message passes the ring of memory/collectives.py and is counted there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common import check
from ..memory import zero
from ..training.config import TrainConfig
from ..training.state import TrainState, new_state
from . import twin
from .group import Group
from .state import RankState, refuse_chunks, refuse_recipe


class ZeroState(RankState):
    """A rank whose parameters are whole, and in stage 3 its parts of them."""

    def clip(self, max_norm: float) -> float:
        return self.optimizer.clip_grad_norm_(max_norm)

    def whole(self, name: str) -> Tensor:
        return whole(self.trainable[name])

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.trainable.items():
            if hasattr(p, "zero_shard"):
                shard, values = p.zero_shard, p.zero_shard.values
                values.copy_(shard.cut(weights[name].to(values)))
            else:
                p.copy_(weights[name])


@dataclass(frozen=True)
class Zero:
    """The engine: `train(model, …, engine=Zero(stage=2))` on every rank.

    Args
        stage    1, 2 or 3
        timeout  seconds to wait for another rank's message
    Raises   ValueError  in train(): a batch that cannot be divided, paged states; in
                         stage 3 packed weights
             RankLost    another rank has failed
    """

    stage: int = 1
    timeout: float = 300.0

    def __post_init__(self):
        check.whole("stage", self.stage, 1, 3)

    @contextmanager
    def __call__(
        self, model: nn.Module, state: TrainState, config: TrainConfig
    ) -> Iterator[tuple[nn.Module, ZeroState]]:
        group = Group()
        refuse_recipe(config, group.ranks)
        theirs = twin.twin(model)
        if self.stage == 3:
            refuse_chunks(config, "ZeRO's stage 3")
            twin.refuse_packed(model, "ZeRO's stage 3")
            twin.lend(model)
            zero.shard(theirs, timeout=self.timeout)
        yield (
            theirs,
            new_state(theirs, config, self._optimizer, ZeroState, group=group),
        )
        twin.give_back(model, map(whole, theirs.parameters()))

    def _optimizer(self, groups: list[dict], config: TrainConfig) -> zero.Optimizer:
        return zero.Optimizer(
            groups,
            self.stage,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            timeout=self.timeout,
        )


def whole(p: nn.Parameter) -> Tensor:
    """The values of a parameter that may be cut; all ranks ask for it together."""
    shard = getattr(p, "zero_shard", None)
    return p.detach() if shard is None else shard.join(shard.values)
