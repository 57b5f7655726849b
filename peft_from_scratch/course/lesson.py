"""What all lessons share: start, guesses, figures with words, verdicts, the receipt.

    from peft_from_scratch.course.lesson import start
    lesson = start("04")

A lesson runs on its base model: SmolLM2, unless start(…, model=…) or the environment's
PFS_MODEL names another one. Nothing here installs, logs in, downloads or asks.
"""

import logging
import math
import os
import random
import textwrap
import warnings
from dataclasses import replace
from io import BytesIO

import datasets
import numpy
import torch
from IPython.display import Image, display
from matplotlib.figure import Figure
from PIL import Image as pillow

from ..comparison import estimate
from ..ledger import verdicts
from ..ledger.claim import BASES, HOLDS_WHEN, NOT_RUN, UNDECIDED
from ..ledger.verdict_card import (
    NAMED,
    WIDTH,
    VerdictCard,
    concerns_no_base,
    figure_of,
    sentence,
    unit_of,
)
from ..models import load
from . import cards, checks, guesses
from .guesses import Guess

BASE, VARIABLE = "smollm2", "PFS_MODEL"
GUESS = (
    "Put two numbers in place of None, the ends of a range that you are nine tenths "
    "sure of, and run this cell again ({unit})"
)
# Said once in a lesson, where the reader meets the word first.
OF_CONTROLS = (
    "(A control is what must be so if a measurement means anything. One that fails "
    "stops the lesson.)"
)
OF_SHIPPED = (
    "(Shipped runs were made earlier and come with the course. The verdict rests on "
    "them alone. Brackets hold an interval.)"
)
EQUAL = 0.01  # relative difference of a count that another machine may make
LATE, LARGE, SLACK = 2, 1.25, 100_000_000  # times the card's seconds; bytes, and more
DPI = 100
COLORS = 256  # of a picture: its file is a third as large as with all of them

current: "Lesson | None" = None  # the build asks it for its card


def start(
    number: str, model: str | None = None, seed: int = 0, quick: bool = False
) -> "Lesson":
    """Begin lesson `number`: fix the seeds, say what it will use and what it costs.

    Args
        number  the notebook's: "04"
        model   base model: a short name, a hub id or a folder; None: PFS_MODEL of the
                environment, else smollm2
        seed    of torch, NumPy and random
        quick   pass over exercises that are still blank, so that "run all" runs all
    """
    global current
    _be_quiet()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    checks.pass_over_blanks(quick)
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
        self.guesses: dict[str, Guess] = {}
        self._explained: set[str] = set()

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

    def predict(
        self, id: str, low: float | None, high: float | None, unit: str = ""
    ) -> None:
        """Keep a guess, a range, to be shown beside what is measured.

        In a learner's copy (in work/) it is kept in work/predictions.json.

        Args
            low, high  None, None: no guess yet, and the lesson goes on without one
        Raises  ValueError  no range of two numbers
        """
        guess = Guess(low, high, unit)
        self._keep(id, guess)
        if guess.made:
            print(f"{id}: your guess is {guess} {unit}".rstrip())
        else:
            print(f"{id}: no guess yet. {GUESS.format(unit=unit or 'a number')}")

    def measured(self, id: str, value) -> None:
        """Show what was measured beside the guess; KeyError where none was asked."""
        if id not in self.guesses:
            asked = ", ".join(self.guesses) or "none so far"
            raise KeyError(
                f"no guess {id!r} was asked for in this run; asked for were: {asked}. "
                f"Run the cell with lesson.predict({id!r}, …) first"
            )
        value = value.item() if hasattr(value, "item") else value
        guess = replace(self.guesses[id], measured=value)
        self._keep(id, guess)
        measured = f"{id}: measured {figure_of(value)} {guess.unit}".rstrip()
        if not guess.made:
            print(measured)
        elif guess.hit:
            print(f"{measured}. Your range, {guess}, holds it.")
        else:
            print(f"{measured}. Your range was {guess}.")

    def _keep(self, id: str, guess: Guess) -> None:
        self.guesses[id] = guess
        guesses.keep(self.number, id, guess)

    def calibration(self) -> None:
        """Show how many of this run's guesses held what was measured."""
        judged = {
            id: guess
            for id, guess in self.guesses.items()
            if guess.made and guess.measured is not None
        }
        if judged:
            self.show(guesses.calibration(judged), guesses.words(judged))
        else:
            print("You made no guess in this run, so there is nothing to compare.")

    # ------------------------------------------------------- the learner's own code

    def mine(self, answer, otherwise):
        """The learner's answer to an exercise if its check passed, else the lesson's.

            Layer = lesson.mine(MyLoRA, HandLoRA)

        Args
            answer     what the learner wrote: a class or a function
            otherwise  the lesson's, which does the same
        """
        passed = checks.has_passed(answer)
        name = getattr(answer, "__name__", "answer")
        if passed:
            print(f"{name} has passed its check: the lesson uses it from here on.")
        else:
            print(f"{name} has not passed its check: the lesson uses its own one.")
        return answer if passed else otherwise

    # ------------------------------------------------------------------- figures

    def show(self, figure: Figure, finding: str) -> None:
        """Show a figure, its finding as alternative text; then print the finding."""
        self._image(figure, finding)
        print(textwrap.fill(finding, WIDTH))

    def _image(self, figure: Figure, alt: str) -> None:
        drawn, picture = BytesIO(), BytesIO()
        figure.savefig(drawn, format="png", dpi=DPI)
        few = pillow.open(drawn).convert("RGB").quantize(COLORS)
        few.save(picture, format="png", optimize=True)
        display(Image(picture.getvalue(), format="png", alt=alt))

    # -------------------------------------------------------------------- claims

    def control(self, words: str, holds: bool) -> None:
        """Say that a control holds; the first time also what a control is.

        Args
            words  what must be so if the measurement means anything: a sentence
        Raises  AssertionError  it is not so: the measurement is void
        """
        assert bool(holds), (
            f"a control failed, so this measurement is void: {words} That is not so in "
            "this run. Restart the kernel and run all cells; if it fails again, the "
            "lesson or the library is broken here"
        )
        print(f"Control: {words} So it is.")
        self._explain(OF_CONTROLS)

    def live(
        self, id: str, measured: float, low: float, high: float, scale=None
    ) -> None:
        """Show what was measured here beside what the shipped runs came to.

        It says no verdict: a few seeds decide nothing.

        Args
            low, high  the interval of `measured`; all three equal for a count
            scale      base that it was measured on; None: the lesson's
        Raises   AssertionError  a count that is not the shipped one; or both intervals
                                 decide, for different verdicts
        """
        scale = scale or self.base
        measured, low, high = float(measured), float(low), float(high)
        rule = verdicts.claim(id).rule
        verdict, unit = rule.verdict(measured, low, high), unit_of(rule)
        row = self._shipped(id)
        where = "" if concerns_no_base(row) else f", on {scale}"
        print(f"{id} in this run{where}: {_between(measured, low, high)} {unit}")
        if scale not in BASES:
            print(f"  Shipped runs are of {' and '.join(BASES)}: nothing to compare.")
            return
        shipped = row["scales"][scale]
        if shipped["measured"] is None:
            print(f"  Shipped runs: {shipped['verdict']}")
            assert shipped["verdict"] != NOT_RUN, f"{id} was not run on {scale}"
            return
        ends = shipped["interval"] or [shipped["measured"]] * 2
        print(f"  Shipped runs: {_between(shipped['measured'], *ends)} {unit}")
        if where and row["scale"] != scale:
            print(f"  The verdict rests on the shipped runs of {NAMED[row['scale']]}.")
        self._explain(OF_SHIPPED)
        decided = {verdict, shipped["verdict"]} - {UNDECIDED}
        same = len(decided) <= 1
        if rule.computed:
            same = math.isclose(measured, shipped["measured"], rel_tol=EQUAL)
        assert same, (
            f"{id} on {scale}: this run says {verdict!r} ({figure_of(measured)}), the "
            f"shipped runs say {shipped['verdict']!r}. Either this run is broken or "
            "they are; look before you go on. "
            f"(python -m peft_from_scratch ledger {id} shows what the verdict rests on)"
        )

    def rule(self, id: str) -> None:
        """Print the rule of a claim: its one number, and the verdict for each band.

        The rule's whole wording is folded under the verdict card: it has to be exact,
        and a reader who meets the claim first needs what it comes to.
        """
        claim = verdicts.claim(id)
        rule, unit = claim.rule, unit_of(claim.rule)
        print(f"{id}, the rule, written before the runs; the card below has all of it.")
        print(_filled(f"Its number: {sentence(claim.number)}"))
        if rule.computed:
            print(f"It is arithmetic, counted in {unit}: the verdict is just computed.")
            return
        print("The verdict is that of the band that holds the whole interval:")
        ends = [f"{edge:,.10g}" for edge in rule.edges]
        places = [f"up to {ends[0]}", *map("{} to {}".format, ends, ends[1:])]
        places.append(f"above {ends[-1]}")
        for place, verdict in zip(places, rule.verdicts, strict=True):
            more = " …, under a condition that the card names"
            print(f"- {place} {unit}: {verdict}{more if verdict == HOLDS_WHEN else ''}")
        print(f"- where no band does: {UNDECIDED}")

    def verdict(self, id: str, guess: str | None = None) -> None:
        """Show a claim's verdict card (verdict_card.py).

        Args
            guess  of a prediction in the rule's unit: its range is put on the card
        """
        range_ = self.guesses.get(guess)
        ends = (range_.low, range_.high) if range_ and range_.made else None
        card = VerdictCard(verdicts.claim(id), self._shipped(id), ends)
        head, body = card.plain()
        _markdown(card.headline(), head)
        picture = card.picture()
        if picture:
            self._image(picture, f"The rule of {id} as a number line. {card.number}.")
        _markdown(card.body(), body)

    def _shipped(self, id: str) -> dict:
        claim = verdicts.claim(id)
        rows = {row["id"]: row for row in verdicts.read()}
        if id not in rows:
            raise LookupError(
                f"data/ledger.json has no row for {claim.id}; write it with: "
                f"python -m peft_from_scratch ledger {claim.id} --run"
            )
        return rows[id]

    def _explain(self, words: str) -> None:
        """Print an explanation, the first time that it is needed."""
        if words not in self._explained:
            print(_filled(words, indent="  "))
            self._explained.add(words)

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


def _between(measured: float, low: float, high: float) -> str:
    between = "" if low == high else f" [{figure_of(low)}, {figure_of(high)}]"
    return figure_of(measured) + between


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent or "  "
    )


def _markdown(text: str, plain: str) -> None:
    """Show markdown, and in its place the plain text where no markdown is shown."""
    display({"text/markdown": text, "text/plain": plain}, raw=True)
