"""How busy other programs kept the processor while something was timed.

A step that took 2 s beside a compiler says little about a step. The system's load
average counts our own threads as well; so the busy time of all processors is taken, and
that of this process subtracted.
"""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")  # Linux; elsewhere nothing is known
IDLE, WAITING = 3, 4  # columns of its first line, in ticks


class OtherPrograms:
    """Counts from its making on."""

    def __init__(self):
        self.start, self.before = time.monotonic(), _busy_elsewhere()

    def cores(self) -> float | None:
        """Cores that others kept busy on average; None where the system hides it."""
        now, elapsed = _busy_elsewhere(), time.monotonic() - self.start
        if now is None or self.before is None or elapsed <= 0:
            return None
        return max(0.0, (now - self.before) / elapsed)


def _busy_elsewhere() -> float | None:
    """Seconds that processors worked for other processes since the system's start."""
    try:
        ticks = [int(n) for n in STAT.read_text().split("\n", 1)[0].split()[1:]]
        # Guests' time, from column 8 on, is in the first columns already.
        busy = sum(ticks[:8]) - ticks[IDLE] - ticks[WAITING]
        return busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])
    except (OSError, ValueError, AttributeError, IndexError):
        return None
