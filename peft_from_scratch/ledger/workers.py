"""N workers, on one machine or on many, make the missing runs of the ledger together.

    python -m peft_from_scratch ledger --run --shard 0/8        and 1/8, 2/8, … 7/8

A run is a file named by the hash of its configuration (runs.py). So nobody hands out
work: worker i takes the configurations whose hash is i modulo N. No two workers take
the same one, in whatever order they start, and a worker that was killed starts again
with the runs that it lacks. All write to one folder, over a shared disk, or each to its
own: files of different names, to be copied together.

A search asks for more runs once others are there, and these may be another worker's.
Start the workers again until the ledger says that nothing is missing.
"""

import re
from collections.abc import Callable

from . import runs


def part_of(shard: str) -> Callable[[dict], bool]:
    """Whether a configuration is worker i's of N, for "i/N".

    Raises  ValueError  no two whole numbers, or i is not below N
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(
            f"--shard {shard}: allowed is i/N, worker i of N, such as 0/8 and up to "
            "7/8 for eight workers"
        )
    index, workers = int(match[1]), int(match[2])

    def is_mine(config: dict) -> bool:
        return int(runs.key(config).rpartition("-")[2], 16) % workers == index

    return is_mine
