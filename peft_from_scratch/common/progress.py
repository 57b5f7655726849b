"""The bar of everything that takes long: how far it is, and the time left.

In a terminal or a notebook it is tqdm's. In a log file nobody sees a bar: there a line
appears every half minute, and none for what takes less.
"""

import sys
import time

from tqdm.auto import tqdm

EVERY = 30.0  # seconds between two lines of a log


class Lines:
    """What of tqdm's bar is used here, written as lines that stay."""

    def __init__(self, what: str, unit: str, total: int, done: int):
        self.what, self.unit, self.total = what, unit, total
        self.n = self.initial = done
        self.start = self.printed = time.monotonic()
        self.postfix = ""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Figures for the end of the next line."""
        self.postfix = text

    def update(self, n: int = 1) -> None:
        """Count n more units; write a line where half a minute has passed."""
        self.n += n
        now = time.monotonic()
        if now - self.printed >= EVERY:
            self.printed = now
            print(self._line(now - self.start), file=sys.stderr, flush=True)

    def _line(self, elapsed: float) -> str:
        return tqdm.format_meter(
            self.n,
            self.total,
            elapsed,
            ncols=0,  # no bar, figures alone
            prefix=self.what,
            unit=self.unit,
            initial=self.initial,
            postfix=self.postfix,
        )

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *exception) -> None:
        pass


def bar(
    what: str, unit: str, total: int, *, done: int = 0, shown: bool = True
) -> tqdm | Lines:
    """A bar in a terminal or a notebook; lines now and then in a log file.

    Args
        done   units that an earlier, interrupted call did
        shown  False for neither
    """
    if shown and not sys.stderr.isatty():
        return Lines(what, unit, total, done)
    return tqdm(
        desc=what,
        unit=unit,
        total=total,
        initial=done,
        dynamic_ncols=True,
        disable=not shown,
    )
