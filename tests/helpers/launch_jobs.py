"""Small jobs for the tests of launch: they import little, as each starts a process."""

import os
import signal

from peft_from_scratch.parallel.group import join


def dies(rank, how):
    """A rank that ends early; the other one waits for it."""
    with join(30) as group:
        if group.rank == rank:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("r=0: allowed is a whole number from 1 on")
        return group.total(1)


def shares(values):
    with join(30) as group:
        return group.rank, group.total(values[group.rank])
