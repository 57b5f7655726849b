"""The ranks of a run: sums over them, and waiting for one another.

torchrun and launch.py start N processes and tell each in its environment who it is:
RANK, WORLD_SIZE, LOCAL_RANK (on its machine), MASTER_ADDR and MASTER_PORT. `join` makes
a process group of them. Messages between CPU tensors go through gloo, and those between
CUDA tensors through NCCL, which was not run here.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ..common import check

PATIENCE = timedelta(hours=12)  # for rank 0's answers, before and after training


def is_rank() -> bool:
    """Whether this process was started as one of several, by torchrun for example."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ


@contextmanager
def join(timeout: float = 300.0) -> Iterator["Group"]:
    """Inside, this process is a rank of the group that its environment names.

    Args
        timeout  seconds that a collective waits for another rank before it is an error
    """
    check.number("timeout", timeout, "a number of seconds above 0", above=0)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout)
    )
    try:
        yield Group()
    finally:
        dist.destroy_process_group()


class Group:
    """This process among the ranks; dist.init_process_group, or join(), comes before.

    rank, ranks   0 … N - 1, and N
    Raises   ValueError   there is no process group
    """

    def __init__(self):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "an engine of several ranks needs a process group, and there is none: "
                "start the ranks with torchrun or with parallel.launch, and make it in "
                "each with parallel.group.join()"
            )
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._patient = None

    def total(self, value):
        """The sum of all ranks' values, of the type of `value` and equal on each.

        Added up in the order of the ranks, in float64, on every rank.
        """
        mine = torch.tensor([value], dtype=torch.float64)
        values = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(values, mine)
        total = sum(each.item() for each in values)
        return total if isinstance(value, float) else int(total)

    @contextmanager
    def rank_0_first(self) -> Iterator[None]:
        """Rank 0 runs the block, with or without an error, and then the others do."""
        if self.rank > 0:
            self.total(0)
        try:
            yield
        finally:
            if self.rank == 0:
                self.total(0)

    def meet(self) -> None:
        """Wait until all ranks are here, for hours if need be."""
        if self._patient is None:
            self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        dist.barrier(group=self._patient)
