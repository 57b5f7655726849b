"""A claim of the textbook on trial: a query over runs, and the rule that decides it.

The rule is written, and committed, before the runs that it judges. It is a number line
cut into bands, each with its verdict; the measured interval decides only where one
band holds the whole of it:

    ──── confirmed ────┤── confirmed with limits ──┤──── refuted here ────
            [low   high]                                  decided: confirmed
                   [low     high]                         undecided
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..common.digest import digest
from .runs import Run

OF_BANDS = ("confirmed", "confirmed with limits", "refuted here", "wrong as stated")
UNDECIDED, NOT_RUN = "undecided", "not run yet"
UNTESTABLE = "not testable at this scale"
VERDICTS = (*OF_BANDS, UNDECIDED, UNTESTABLE, NOT_RUN)
SCALES = ("tiny", "smollm2")  # the base models, the smaller one first


class Invalid(ValueError):
    """These runs cannot decide the claim, whatever they say; the message says why."""


@dataclass(frozen=True)
class Rule:
    """What is measured, and which values of it mean what.

    Args
        words     what is measured, over what, in a sentence
        unit      of the measured value: "%", "nats", "parameters"
        verdicts  one for each band, from the smallest values to the largest
        edges     between them, rising; an edge belongs to the band below it
    Raises   ValueError   edges that do not rise or do not fit, a verdict of no band
    """

    words: str
    unit: str
    verdicts: tuple[str, ...]
    edges: tuple[float, ...]

    def __post_init__(self):
        rising = all(a < b for a, b in pairwise(self.edges))
        finite = all(map(math.isfinite, self.edges))
        if len(self.verdicts) != len(self.edges) + 1 or not (rising and finite):
            raise ValueError(
                f"edges={self.edges} between verdicts={self.verdicts}: one verdict "
                "more than edges is needed, and finite edges that rise"
            )
        for verdict in self.verdicts:
            if verdict not in OF_BANDS:
                raise ValueError(
                    f"{verdict!r} is no verdict of a band: {', '.join(OF_BANDS)}"
                )

    def band(self, value: float) -> int:
        """Which band holds the value, counted from 0: exactly one does."""
        return sum(value > edge for edge in self.edges)

    def verdict(self, value: float, low: float, high: float) -> str:
        """The verdict of the bands that hold the whole of [low, high], or "undecided".

        Raises  ValueError  not low <= value <= high, as finite numbers
        """
        if not (all(map(math.isfinite, (value, low, high))) and low <= value <= high):
            raise ValueError(
                f"measured {value} in [{low}, {high}]: three finite numbers are "
                "needed, low <= measured <= high"
            )
        held = set(self.verdicts[self.band(low) : self.band(high) + 1])
        return held.pop() if len(held) == 1 else UNDECIDED

    def __str__(self):
        ends = [f"{edge:,.10g} {self.unit}" for edge in self.edges]
        starts = ["up to", *["to"] * (len(ends) - 1)]
        below = [
            f"{s} {e}: {v}"
            for s, e, v in zip(starts, ends, self.verdicts, strict=False)
        ]
        return f"{self.words}; {', '.join(below)}, above: {self.verdicts[-1]}"


@dataclass(frozen=True)
class Measured:
    """What a claim's query makes of its runs.

    value, low, high  in the rule's unit, with a 95 % interval; equal for a count
    seeds             that it rests on
    figures           texts that the claim's say_instead names in braces
    """

    value: float
    low: float
    high: float
    seeds: tuple[int, ...]
    figures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """One claim.

    id, notebook  "L1", "04"
    statement     what the textbook says, in our words
    rule          decides on the measured value
    configs       scale -> the configurations of every run that it needs. Where the
                  next ones depend on results (a search), those known so far
    measured      those runs, in that order -> Measured; or raises Invalid
    measuring     other functions that make the measured value: part of the rule's hash
    say_instead   verdict -> what to say in the place of the claim
    untestable    scale -> why it cannot be tested there
    """

    id: str
    notebook: str
    statement: str
    rule: Rule
    configs: Callable[[str], list[dict]]
    measured: Callable[[Sequence[Run]], Measured]
    measuring: tuple[Callable, ...] = ()
    say_instead: Mapping[str, str] = field(default_factory=dict)
    untestable: Mapping[str, str] = field(default_factory=dict)

    @property
    def rule_hash(self) -> str:
        """Another one as soon as words, bands or the measuring code change."""
        rule = self.rule
        code = [inspect.getsource(f) for f in (self.measured, *self.measuring)]
        return digest(rule.words, rule.unit, rule.verdicts, rule.edges, code)
