"""What all lessons share: start, guesses, figures with words, verdicts, the receipt.

    from peft_from_scratch.course.lesson import start
    lesson = start("04")

A lesson runs on its base model: SmolLM2, unless start(…, model=…) or the environment's
PFS_MODEL names another one. Nothing here installs, logs in, downloads or asks.
"""

import json
import logging
import os
import random
import warnings
from io import BytesIO
from pathlib import Path

import datasets
import numpy
import torch
from filelock import FileLock
from IPython.display import Image, display
from matplotlib.figure import Figure

from ..common import atomic, records
from ..comparison import estimate
from ..ledger import verdicts
from ..ledger.claim import BASES, UNDECIDED
from ..models import load
from . import cards
from .exercises import WORK

BASE, VARIABLE = "smollm2", "PFS_MODEL"
GUESSES = "predictions.json"  # in work/
LATE, LARGE, SLACK = 2, 1.25, 100_000_000  # times the card's seconds; bytes, and more
DPI = 100

current: "Lesson | None" = None  # the build asks it for its card


def start(number: str, model: str | None = None, seed: int = 0) -> "Lesson":
    """Begin lesson `number`: fix the seeds, say what it will use and what it costs.

    Args
        number  the notebook's: "04"
        model   base model: a short name, a hub id or a folder; None: PFS_MODEL of the
                environment, else smollm2
        seed    of torch, NumPy and random
    """
    global current
    _be_quiet()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    current = Lesson(number, model or os.environ.get(VARIABLE) or BASE, seed)
    print(current)
    return current


def _be_quiet() -> None:
    """No noise of libraries in a lesson's outputs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft's use of others
    # At import it asks for a package that would fetch kernels from a hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class Lesson:
    """A running lesson; make it with start()."""

    def __init__(self, number: str, base: str, seed: int):
        self.number, self.base, self.seed = number, base, seed
        self.device = load.pick_device()
        self.clock = cards.Clock()
        self.card = cards.read().get(number)
        self.product = cards.product_seconds(self.device)
        self.guesses: dict[str, dict] = {}

    def __str__(self):
        threads = cards.threads(torch.get_num_threads())
        uses = f"{self.base}, {self.device}, float32, {threads}"
        return f"Lesson {self.number}: {uses}, seed {self.seed}.\n{self._cost()}"

    def _cost(self) -> str:
        if self.card is None:
            return "What it costs has not been measured yet: it has no card."
        seconds = estimate.duration(self.card.here(self.product))
        return (
            f"Its cells take about {seconds} here, and download nothing.\n"
            f"Measured: {self.card}."
        )

    def load_model(self):
        """(model, tokenizer): the lesson's base, fresh, on its device."""
        model, tokenizer = load.load_model(self.base, device=self.device)
        print(load.describe(model))
        return model, tokenizer

    # ------------------------------------------------------------------- guesses

    def predict(self, id: str, guess, unit: str = "") -> None:
        """Keep a guess, to be shown beside what is measured.

        In a learner's copy (in work/) it is kept in work/predictions.json.
        """
        self._keep(id, {"guess": guess, "unit": unit})
        print(f"{id}: your guess is {_number(guess)} {unit}".rstrip())

    def measured(self, id: str, value) -> None:
        """Show what was measured beside the guess; KeyError where there was none."""
        if id not in self.guesses:
            guess_of = ", ".join(self.guesses) or "none so far"
            raise KeyError(
                f"no guess {id!r} was made in this run; made were: {guess_of}. Run the "
                f"cell with lesson.predict({id!r}, …) first"
            )
        guess_of = self.guesses[id]
        value = value.item() if hasattr(value, "item") else value
        self._keep(id, {**guess_of, "measured": value})
        unit = f" {guess_of['unit']}" if guess_of["unit"] else ""
        guess = f"you guessed {_number(guess_of['guess'])}{unit}"
        print(f"{id}: {guess}, measured {_number(value)}{unit}")

    def _keep(self, id: str, guess: dict) -> None:
        self.guesses[id] = guess
        file = _guesses_file()
        if file is None:
            return
        with FileLock(file.with_suffix(".lock")):
            kept = _read_guesses(file)
            kept.setdefault(self.number, {})[id] = guess
            with atomic.new_file(file) as partial:
                partial.write_text(json.dumps(kept, indent=1, default=str) + "\n")

    # ------------------------------------------------------------------- figures

    def show(self, figure: Figure, finding: str) -> None:
        """Show a figure, its finding as alternative text; then print the finding."""
        picture = BytesIO()
        figure.savefig(picture, format="png", dpi=DPI)
        display(Image(picture.getvalue(), format="png", alt=finding))
        print(finding)

    # -------------------------------------------------------------------- claims

    def live(
        self, id: str, measured: float, low: float, high: float, scale=None
    ) -> None:
        """Judge what was measured here by the claim's rule, beside the shipped verdict.

        Args
            low, high  the interval of `measured`; all three equal for a count
            scale      base that it was measured on; None: the lesson's
        Raises   AssertionError  both verdicts are decided, and they differ
        """
        scale = scale or self.base
        measured, low, high = float(measured), float(low), float(high)
        verdict = verdicts.verdict_of(id, measured, low, high)
        unit = verdicts.claim(id).rule.unit
        between = "" if low == high else f" [{_number(low)}, {_number(high)}]"
        print(f"{id}, live on {scale}: {_number(measured)}{between} {unit}: {verdict}")
        if scale not in BASES:
            print(f"  Shipped verdicts are for {' and '.join(BASES)}; not compared.")
            return
        shipped = self._shipped(id)["scales"][scale]["verdict"]
        print(f"  shipped for {scale}: {shipped}")
        assert verdict in (shipped, UNDECIDED) or shipped == UNDECIDED, (
            f"{id} on {scale}: live is {verdict!r}, shipped is {shipped!r}. Either "
            "this run is broken or the shipped one is; look before you go on. "
            f"(python -m peft_from_scratch ledger {id} shows what the verdict rests on)"
        )

    def verdict(self, id: str) -> None:
        """Print a claim's shipped verdict, in words that are the same everywhere."""
        row = self._shipped(id)
        scale = f" ({row['scale']})" if row["scale"] else ""
        print(f"{id}: {row['verdict']}{scale}")
        if row["say_instead"]:
            print(f"Say instead: {row['say_instead']}")

    def _shipped(self, id: str) -> dict:
        claim = verdicts.claim(id)
        rows = {row["id"]: row for row in verdicts.read()}
        if id not in rows:
            raise LookupError(
                f"data/ledger.json has no row for {claim.id}; write it with: "
                f"python -m peft_from_scratch ledger {claim.id} --run"
            )
        return rows[id]

    # ------------------------------------------------------------------- receipt

    def bill(self) -> cards.Card:
        """The cost card of this run so far."""
        return cards.measure(self.clock, self.base, self.device, self.product)

    def receipt(self) -> None:
        """What the card predicted beside what this run took, up to here.

        Raises  AssertionError  in CI only: far more memory than on the card
        """
        took = self.bill()
        memory = cards.gigabytes(took.peak_bytes)
        if self.card is None or self.card.base != self.base:
            print(f"This run: {estimate.duration(took.seconds)}, {memory} at most.")
            return
        card, here = self.card, self.card.here(self.product)
        seconds = estimate.duration(here)
        print(f"time:   predicted {seconds}, took {estimate.duration(took.seconds)}")
        print(f"memory: predicted {cards.gigabytes(card.peak_bytes)}, took {memory}")
        if not os.environ.get("CI"):
            return
        if took.seconds > LATE * here:
            warnings.warn(
                f"lesson {self.number} took {took.seconds:.0f} s, more than {LATE} "
                f"times the {here:.0f} s that its card predicts here",
                stacklevel=2,
            )
        assert took.peak_bytes <= LARGE * card.peak_bytes + SLACK, (
            f"lesson {self.number} took {memory}, more than {LARGE} times the "
            f"{cards.gigabytes(card.peak_bytes)} of its card: build it again"
        )


def _number(value) -> str:
    """Three digits, and no exponent where a reader does without."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value == round(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _guesses_file() -> Path | None:
    """Where a learner's guesses are kept; None outside work/."""
    return WORK / GUESSES if Path.cwd().is_relative_to(WORK) else None


def _read_guesses(file: Path) -> dict:
    try:
        return records.read_object(file) if file.exists() else {}
    except ValueError as error:
        raise ValueError(
            f"{file} is not what a lesson writes ({error}): move it away, a new one "
            "will be made"
        ) from None
