"""How many runs would decide what is undecided: an estimate.

An interval over n seeds narrows like 1 / sqrt(n). It decides once its half width w is
smaller than the distance d between the value and the nearest edge of the rule:

    n_needed = n (w / d)²      rounded up

The value stays where it is in this sum, which it will not quite do, so the text says
"about". With three seeds a t interval is wide for its n, and the sum asks for too many.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

from .claim import UNDECIDED, Rule


def factor(rule: Rule, value: float, low: float, high: float) -> float:
    """How many times as many runs would decide; infinite for a value on an edge."""
    bands = zip(rule.edges, pairwise(rule.verdicts), strict=True)
    edges = [edge for edge, (below, above) in bands if below != above]
    distance = min(abs(value - edge) for edge in edges)
    return ((high - low) / 2 / distance) ** 2 if distance else math.inf


def needed(rule: Rule, at: Mapping) -> int | None:
    """About how many seeds would decide.

    Args
        at  a judgement's row: measured, interval, seeds
    Returns  None  no number would: the value is on an edge, or the interval is not one
                   over seeds
    """
    seeds = len(at["seeds"])
    times = factor(rule, at["measured"], *at["interval"])
    if seeds < 2 or math.isinf(times):
        return None
    return math.ceil(seeds * times)


def in_words(rule: Rule, at: Mapping) -> str:
    """The estimate in a sentence; "" where the row is not undecided."""
    if at["verdict"] != UNDECIDED:
        return ""
    seeds, runs = len(at["seeds"]), len(at["runs"])
    if seeds < 2:
        return "no number of runs would decide it: its interval is not one over seeds"
    enough = needed(rule, at)
    if enough is None:
        return "no number of runs would decide it: the value is on an edge of the rule"
    text = f"about {enough:,} seeds would decide it, where it has {seeds}"
    if runs > seeds:
        text += (
            f" (about {math.ceil(enough * runs / seeds):,} runs, where it has {runs})"
        )
    return text
