"""A claim of the textbook on trial: a query over runs, and the rule that decides it.

The rule is written, and committed, before the runs that it judges. It is a number line
cut into bands, each with its verdict; the measured interval decides only where one
band holds the whole of it:

    ───── holds ─────┤─── holds when … ───┤───── does not hold here ─────
        [low  high]                               decided: holds
             [low  high]                          undecided

A count or an identity could not have come out otherwise. Its rule has one band, called
"computed", and no interval: arithmetic on show, and no verdict of an experiment.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..common.digest import digest
from ..common.statistics import Invalid  # noqa: F401
from .rule_hash import content_hash
from .runs import Run

HOLDS, HOLDS_WHEN, FAILS = "holds", "holds when", "does not hold here"
OF_BANDS = (HOLDS, HOLDS_WHEN, FAILS, "wrong as stated")
SMALL_HOLDS = (HOLDS, HOLDS_WHEN, FAILS)  # small values speak for the claim
LARGE_HOLDS = SMALL_HOLDS[::-1]
COMPUTED = "computed"
UNDECIDED, NOT_RUN = "undecided", "not run yet"
UNTESTABLE = "cannot be tested here"
VERDICTS = (*OF_BANDS, COMPUTED, UNDECIDED, UNTESTABLE, NOT_RUN)
BASES = ("tiny", "smollm2")  # the base models, the smaller one first


@dataclass(frozen=True)
class Rule:
    """The measured quantity, and the verdict for each band of its values.

    Args
        words     what is measured, over what, in a sentence
        unit      of the measured value: "%", "nats", "parameters"
        verdicts  one for each band, from the smallest values to the largest; or the
                  one "computed"
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
        for verdict in () if self.computed else self.verdicts:
            if verdict not in OF_BANDS:
                raise ValueError(
                    f"{verdict!r} is no verdict of a band: {', '.join(OF_BANDS)}"
                )

    @property
    def computed(self) -> bool:
        """Whether this is arithmetic, which no value could refute."""
        return self.verdicts == (COMPUTED,)

    def band(self, value: float) -> int:
        """Number of the one band that holds the value, counted from 0."""
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
        verdicts = set(self.verdicts[self.band(low) : self.band(high) + 1])
        return verdicts.pop() if len(verdicts) == 1 else UNDECIDED

    def __str__(self):
        if self.computed:
            return f"{self.words}; {COMPUTED}, in {self.unit}"
        ends = [f"{edge:,.10g} {self.unit}" for edge in self.edges]
        starts = ["up to", *["to"] * (len(ends) - 1)]
        below = [
            f"{s} {e}: {v}"
            for s, e, v in zip(starts, ends, self.verdicts, strict=False)
        ]
        return f"{self.words}; {', '.join(below)}, above: {self.verdicts[-1]}"


@dataclass(frozen=True)
class Measured:
    """The value that a claim's runs come to, with its interval.

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
    """One claim of the textbook, the rule that judges it, and its query over runs.

    id, notebook  "L1", "04"
    statement     what the textbook says, in our words
    rule          decides on the measured value
    configs       scale -> the configurations of every run that the claim needs. Where
                  later ones depend on results (a search), it reads the run store and
                  returns those known so far
    measured      those runs, in that order -> Measured; or raises Invalid
    number        what the one number of its verdict card is, in a few words
    condition     what "holds when" stands before: when it holds, in a sentence's end
    so            verdict -> the sentence to take away, of 25 words at most
    say_instead   verdict -> what to say in the place of the claim, at length
    untestable    scale -> why it cannot be tested there
    source        a paper, or "ours"; empty for what the textbook's chapter says
    The four before `source` may name figures in braces.
    """

    id: str
    notebook: str
    statement: str
    rule: Rule
    configs: Callable[[str], list[dict]]
    measured: Callable[[Sequence[Run]], Measured]
    number: str = ""
    condition: str = ""
    so: Mapping[str, str] = field(default_factory=dict)
    say_instead: Mapping[str, str] = field(default_factory=dict)
    untestable: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    @property
    def rule_hash(self) -> str:
        """Sixteen digits that change with what the rule computes (rule_hash.py).

        They cover the rule's words, unit and bands, the grid of configurations, the
        experiment, and all that makes a verdict of its runs. Scales on which the claim
        is untestable count, and the reasons for that do not: like say_instead and the
        statement they are text.
        """
        rule = self.rule
        bands = rule.verdicts, rule.edges, sorted(self.untestable)
        code = content_hash(self.configs, self.measured, Rule.verdict, Rule.band)
        return digest(rule.words, rule.unit, *bands, code)
