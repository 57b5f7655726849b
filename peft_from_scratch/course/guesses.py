"""A reader's guesses: ranges, made before anything is measured, and how good they were.

A guess is a range that the reader believes to hold the value nine times in ten. So a
single guess is never right or wrong by itself, and many of them are well calibrated, or
too narrow, or too wide. There is no default: a range of ours would anchor the reader's.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock
from matplotlib.figure import Figure

from ..common import atomic, records
from ..ledger.verdict_card import figure_of
from ..plotting.draw import frame
from ..plotting.theme import AMBER, BLUE, LIGHT, SMALL, Theme, style
from .exercises import WORK

FILE = "predictions.json"  # in work/
SURE = 9  # of ten ranges are meant to hold what is measured
FAR = 3.0  # half widths of a range: values further away are drawn there
ROW = 0.28  # inches


@dataclass(frozen=True)
class Guess:
    """A range for one number, and the number once it was measured.

    Args
        low, high  None where the reader has not guessed
    """

    low: float | None = None
    high: float | None = None
    unit: str = ""
    measured: float | None = None

    def __post_init__(self):
        ends = self.low, self.high
        if ends == (None, None):
            return
        if not all(_is_number(end) for end in ends) or self.low > self.high:
            raise ValueError(
                f"low={self.low!r}, high={self.high!r}: a guess is a range of two "
                "numbers, the lower one first, such as low=2, high=5"
            )

    @property
    def made(self) -> bool:
        return self.low is not None

    @property
    def hit(self) -> bool:
        """Whether what was measured lies in the range."""
        return self.low <= self.measured <= self.high

    @property
    def place(self) -> float:
        """Of what was measured: -1 and 1 are the ends of the range, 0 its middle."""
        half = (self.high - self.low) / 2
        away = self.measured - (self.low + self.high) / 2
        if half == 0:
            return 0.0 if away == 0 else math.copysign(FAR, away)
        return max(-FAR, min(FAR, away / half))

    def __str__(self):
        ends = dict.fromkeys(map(figure_of, (self.low, self.high)))
        return " to ".join(ends)


def _is_number(value) -> bool:
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and math.isfinite(value)


def keep(number: str, id: str, guess: Guess) -> None:
    """Write a learner's guess to work/predictions.json; elsewhere keep none."""
    file = guesses_file()
    if file is None:
        return
    with FileLock(file.with_suffix(".lock")):
        kept = _read(file)
        kept.setdefault(number, {})[id] = asdict(guess)
        with atomic.new_file(file) as partial:
            partial.write_text(json.dumps(kept, indent=1) + "\n")


def guesses_file() -> Path | None:
    """Where a learner's guesses are kept; None outside work/."""
    return WORK / FILE if Path.cwd().is_relative_to(WORK) else None


def _read(file: Path) -> dict:
    try:
        return records.read_object(file) if file.exists() else {}
    except ValueError as error:
        raise ValueError(
            f"{file} is not what a lesson writes ({error}): move it away, a new one "
            "will be made"
        ) from None


def calibration(guesses: dict[str, Guess], theme: Theme = LIGHT) -> Figure:
    """Each range as a bar of the same width, and where the measured value fell."""
    with style(theme):
        figure, axes = frame(
            words(guesses),
            "Every bar is one of your ranges. A point is what was measured.",
            6.4,
            ROW * len(guesses) + 0.1,
            0.35,
            theme,
        )
        for y, (id, guess) in enumerate(reversed(guesses.items())):
            axes.barh(y, 2, 0.5, -1, color=BLUE, alpha=0.3)
            axes.plot(guess.place, y, "o" if guess.hit else "X", markersize=8,
                      color=theme.ink if guess.hit else AMBER,
                      markeredgecolor=theme.ink, markeredgewidth=0.7)  # fmt: skip
            axes.text(-FAR - 0.3, y, id, va="center", ha="right", size=SMALL)
        axes.set(xlim=(-FAR - 0.2, FAR + 0.2), yticks=[])
        axes.set_xticks([-1, 0, 1], ["low", "middle", "high"])
    return figure


def words(guesses: dict[str, Guess]) -> str:
    """How many ranges held what was measured, and what that says."""
    hits, n = sum(guess.hit for guess in guesses.values()), len(guesses)
    count = f"{hits} of your {n} ranges held what was measured."
    meant = n * SURE / 10
    spread = 2 * math.sqrt(n * SURE / 10 * (1 - SURE / 10))
    if hits < meant - spread:
        return f"{count} Nine of ten were meant to: your ranges are too narrow."
    return f"{count} Nine of ten were meant to."
