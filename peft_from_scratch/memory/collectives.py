"""What ZeRO says to the other ranks: pieces of a tensor, sent around a ring.

N processes, called ranks, each have a tensor cut in N parts of n values. Each rank
sends to the next one and receives from the one before, N - 1 times, one part a time:

    reduce-scatter   rank r ends with the sum of everybody's part r. Part c sets out at
                     rank c + 1; whoever gets it adds its own part and passes it on

        hop 1, N = 3     rank 0 -- part 2 --> 1 -- part 0 --> 2 -- part 1 --> 0
        hop 2            rank 0 -- part 1 --> 1 -- part 2 --> 2 -- part 0 --> 0

    all-gather       rank r starts with part r alone, and ends with all N parts

    bytes that a rank sends in either          (N - 1) n itemsize = (N - 1) / N of all

No rank can send less, and none is a bottleneck. torch.distributed has both collectives;
here they are written out on its sends and receives (gloo or NCCL), so that every byte
passes one line, which counts it. NCCL takes the same ring for large tensors.

Source   Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
         workstations", 2009
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..common import check

SCATTER, GATHER, COPY = range(3)  # what a message is part of; its tag says so
WORDS = ("adding up gradients", "gathering", "copying rank 0's values")


class RankLost(RuntimeError):
    """Another rank has failed or does not answer; the training must start again."""


class Ring:
    """This rank's place among the ranks of a process group.

    Args
        group    of torch.distributed; None for all ranks
        timeout  seconds to wait for a message before RankLost is raised
    sent     bytes that this rank has sent so far
    Raises   ValueError   no process group, this rank is not in it, or a timeout that is
             no number above 0
    """

    def __init__(self, group=None, timeout: float = 300.0):
        check.number("timeout", timeout, "a number of seconds above 0", above=0)
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "ZeRO needs a process group, and there is none: start the ranks with "
                "torchrun and call torch.distributed.init_process_group('gloo') in "
                "each, or 'nccl' on GPUs. A group of one rank is enough"
            )
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(
                f"group={group!r}: rank {dist.get_rank()} is not in it; call this on "
                "the ranks of the group only"
            )
        self.timeout = timedelta(seconds=timeout)
        self.sent = 0

    def reduce_scatter(self, parts: Tensor, number: int) -> Tensor:
        """The sum over the ranks of each one's part of this rank; writes into `parts`.

        Args
            parts   (N, n), contiguous
            number  of the tensor, the same on every rank: a rank that is at another
                    tensor is not listened to, and the wait for it ends in RankLost
        Returns  (n,), a view of `parts`
        """
        received = torch.empty_like(parts[0])
        for hop in range(1, self.size):
            away, here = parts[self.rank - hop], parts[self.rank - hop - 1]
            self._exchange(away, received, number, SCATTER)
            here.add_(received)
        return parts[self.rank]

    def all_gather(self, parts: Tensor, number: int) -> Tensor:
        """All parts, of which `parts` (N, n) holds this rank's; the others are filled.

        Returns  `parts`
        """
        for hop in range(1, self.size):
            known, new = parts[self.rank - hop + 1], parts[self.rank - hop]
            self._exchange(known, new, number, GATHER)
        return parts

    def broadcast(self, values: Tensor, number: int) -> None:
        """Rank 0's values on every rank, in place: passed on from rank to rank.

        Args
            values  contiguous
        """
        if self.rank > 0:
            self._exchange(None, values, number, COPY)
        if self.rank < self.size - 1:
            self._exchange(values, None, number, COPY)

    def _exchange(
        self, away: Tensor | None, here: Tensor | None, number: int, what: int
    ) -> None:
        """Send `away` to the next rank and receive `here` from the one before."""
        operations = []
        for tensor, operation, step in ((away, dist.isend, 1), (here, dist.irecv, -1)):
            if tensor is not None:
                peer = dist.get_global_rank(self.group, (self.rank + step) % self.size)
                tag = len(WORDS) * number + what
                operations.append(
                    dist.P2POp(operation, tensor, peer, self.group, tag=tag)
                )
        try:
            for message in dist.batch_isend_irecv(operations):
                message.wait(self.timeout)
        except RuntimeError as error:
            raise RankLost(
                f"rank {self.rank} of {self.size} lost a neighbour while {WORDS[what]} "
                f"(tensor {number}): it has failed, is at another tensor, or did not "
                f"answer within {self.timeout.total_seconds():g} s. End all ranks and "
                "start them again from the last checkpoint"
            ) from error
        self.sent += 0 if away is None else away.nbytes
