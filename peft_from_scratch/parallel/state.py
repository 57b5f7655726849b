"""What the training loop asks, answered by one rank of several.

The rows of a micro-batch are cut in N equal parts, one a rank, in the order in which
one process would read them. So the step has the rows, and by the sums in total() the
label tokens and the loss, of one process's step.

Dropout is drawn anew for each step from (seed, step, rank). With one seed for all, the
ranks would drop the same units of different rows; drawn on and on, a resumed run would
need a generator of every rank.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..common import check
from ..training.batch import Row
from ..training.config import TrainConfig
from ..training.state import TrainState
from .group import Group


@dataclass
class RankState(TrainState):
    """TrainState on one of the group's ranks. An engine's own says what it keeps where.

    Memory  weights() and moments() pass through every rank tensor by tensor, and all
            of them together are on rank 0's CPU only
    """

    group: Group = field(kw_only=True)

    def __post_init__(self):
        self.rank, self.ranks = self.group.rank, self.group.ranks

    def share(self, micro_batches: list[list[Row]]) -> list[list[Row]]:
        shares = []
        for rows in micro_batches:
            size = len(rows) // self.ranks
            shares.append(rows[self.rank * size : (self.rank + 1) * size])
        return shares

    def begin_step(self, config: TrainConfig) -> None:
        entropy = config.seed, self.history.steps, self.rank
        drawn = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        torch.manual_seed(int(drawn[0]))

    def total(self, value):
        return self.group.total(value)

    def backward(self, part: Tensor) -> None:
        """The engine averages over the ranks: N times the part makes the mean a sum."""
        (part * self.ranks).backward()

    def rank_0_first(self) -> AbstractContextManager[None]:
        return self.group.rank_0_first()

    def whole(self, name: str) -> Tensor:
        """A trainable weight by its name, whole; all ranks ask for it together."""
        return self.trainable[name].detach()

    def weights(self) -> dict[str, Tensor]:
        return self._gathered(keep=self.rank == 0)

    def copies(self) -> dict[str, Tensor]:
        return self._gathered(keep=True)

    def _gathered(self, keep: bool) -> dict[str, Tensor]:
        gathered = {}
        for name in self.trainable:
            whole = self.whole(name)
            if keep:
                gathered[name] = whole.to("cpu", copy=True)
        return gathered


def refuse_recipe(config: TrainConfig, ranks: int) -> None:
    """ValueError for a recipe that cannot be divided among so many ranks."""
    parts = config.accumulate * ranks
    check.require(
        config.batch % parts == 0,
        "batch",
        config.batch,
        f"allowed is a multiple of {parts}, of accumulate={config.accumulate} times "
        f"{ranks} ranks, so that each has equally many rows of each micro-batch",
    )
    check.require(
        config.paged is None,
        "paged",
        config.paged,
        "an engine cuts the optimizer's states itself; leave paged out",
    )


def refuse_chunks(config: TrainConfig, engine: str) -> None:
    """ValueError for a loss in chunks, where weights are gathered for each call.

    A rank with more label tokens has more chunks, and reads the head more often: the
    others would not be there to give their parts of it.
    """
    check.require(
        config.chunk is None,
        "chunk",
        config.chunk,
        f"{engine} gathers the head for each chunk, and ranks have unequally many; "
        "leave chunk out, or use --engine zero with --stage 1 or 2",
    )
