"""The columns of the comparison's table, each with its unit and its meaning.

The terminal table and the page both walk this list: a figure that is added here appears
in both, said the same way.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..common.units import MB

ABSENT = "—"  # what stands where nothing was measured
LETTERS = "Methods that share a letter cannot be told apart: undecided, not equal."
EXACT = "Share of the test rows that the method answers exactly right."
DOES = {  # by scorer: what a method does; any other "scores …"
    "exact": "answers {} of the test rows exactly",
    "json": "answers {} of the test rows with the same JSON value",
    "label": "labels {} of the test rows right",
}


@dataclass(frozen=True)
class Column:
    """One column: `cell` turns a row of the result into the text that stands there."""

    group: str
    name: str
    unit: str
    meaning: str
    cell: Callable[[dict], str]


def found(row: dict, *path: str):
    """The value at row[path[0]][path[1]]…; None where a part of it is absent."""
    for name in path:
        row = row.get(name) if row else None
    return row


def significant(value: float | None) -> str:
    """At least two significant digits, and never an exponent: 0.0068, 9.8, 2,852."""
    if value is None:
        return ABSENT
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:,.{max(0, 1 - math.floor(math.log10(abs(value))))}f}"


def megabytes(count: int | None) -> str:
    """Bytes in MB of 10^6 bytes."""
    return ABSENT if count is None else significant(count / MB)


def parameter_share(row: dict) -> str:
    """Trainable parameters in percent of all."""
    share = row.get("share")
    return ABSENT if share is None else significant(100 * share)


def percent(row: dict, share: float, sign: str = "") -> str:
    """A share in percent, no finer than the row's answers can tell."""
    answers = (found(row, "exact", "n") or 0) * len(row.get("per_seed") or [0])
    text = f"{100 * share:{sign}.{0 if answers <= 100 else 1}f}"
    return text if float(text) else text.lstrip("+-")  # zero has no sign


def exact_match(row: dict) -> str:
    """The mean score in percent: rate [95 % interval]."""
    ends = (found(row, "exact", end) for end in ("rate", "low", "high"))
    return _ranged(*ends, lambda share: percent(row, share))


def score_words(result: dict) -> tuple[str, str, str]:
    """What the score of this result is called, what methods do, and what it means.

    Rows of the user's own have a scorer, which says so; a task counts exact matches.
    """
    data = result.get("data")
    if not data:
        return "Exact match", DOES["exact"], EXACT
    title = data.get("title") or "score"
    does = DOES.get(data.get("scorer"), "scores {}")
    return title[0].upper() + title[1:], does, data.get("meaning") or ""


def columns_of(result: dict) -> tuple[Column, ...]:
    """COLUMNS, with the score named as this result's scorer has it."""
    name, _, meaning = score_words(result)
    score, *others = COLUMNS
    return replace(score, name=name, meaning=meaning), *others


def _over(reference: str) -> Column:
    """Percentage points more than the reference: difference [95 % interval]."""

    def cell(row: dict) -> str:
        names = ("difference", "low", "high")
        ends = (found(row, "against", reference, name) for name in names)
        return _ranged(*ends, lambda share: percent(row, share, "+"))

    return Column(
        "Quality",
        f"Over {reference}",
        "points [95 %]",
        f"The score minus that of {reference} prompting, on the same rows.",
        cell,
    )


def decode_time(row: dict) -> str:
    """Time of a decoding step as a multiple of the base model's: median [range]."""
    ends = (found(row, "decode", end) for end in ("ratio", "low", "high"))
    return _ranged(*ends, "{:.2f}".format)


def forgetting(row: dict) -> str:
    """Change of the loss on general text: nats a token [95 % interval]."""
    ends = (found(row, "forgetting", end) for end in ("change", "low", "high"))
    return _ranged(*ends, "{:+.2f}".format)


def _ranged(value, low, high, say: Callable[[float], str]) -> str:
    if value is None:
        return ABSENT
    if low is None or high is None:
        return say(value)
    return f"{say(value)} [{say(low)}, {say(high)}]"


def _fixed(form: str, *path: str) -> Callable[[dict], str]:
    """A cell that writes the value at `path` in a fixed form."""

    def cell(row: dict) -> str:
        value = found(row, *path)
        return ABSENT if value is None else format(value, form)

    return cell


def _mergeable(row: dict) -> str:
    return {True: "yes", False: "no", None: ABSENT}[found(row, "merge", "possible")]


def _memory(kind: str, meaning: str) -> Column:
    return Column(
        "Memory",
        kind.capitalize(),
        "MB",
        meaning,
        lambda row: megabytes(found(row, "memory", kind)),
    )


COLUMNS = (
    Column(
        "Quality",
        "Exact match",
        "% [95 %]",
        EXACT,
        exact_match,
    ),
    Column(
        "Quality",
        "Letters",
        "",
        LETTERS,
        lambda row: row.get("letters") or ABSENT,
    ),
    _over("zero-shot"),
    _over("few-shot"),
    Column(
        "Quality",
        "Forgetting",
        "nats/token [95 %]",
        "Loss on general prose, after minus before: +0.1 nats make each token there "
        "about 10 % less probable to the model.",
        forgetting,
    ),
    Column(
        "Size and time",
        "Trainable",
        "% of all",
        "Share of the parameters that training may change.",
        parameter_share,
    ),
    Column(
        "Size and time",
        "Steps",
        "",
        "Optimizer steps of the training; prompt tuning needs more of them.",
        _fixed(",d", "steps"),
    ),
    Column(
        "Size and time",
        "Train",
        "s",
        "Seconds that training took.",
        _fixed(",.0f", "seconds", "train"),
    ),
    Column(
        "Size and time",
        "Answer",
        "s",
        "Seconds that answering all test rows took, in batches.",
        _fixed(",.0f", "seconds", "answer"),
    ),
    Column(
        "Size and time",
        "Disk",
        "MB",
        "What has to be stored besides the base model.",
        lambda row: megabytes(row.get("disk_bytes")),
    ),
    Column(
        "Inference",
        "Decode step",
        "× base [range]",
        "Time to produce one token, as a multiple of the untouched base model's time "
        "in the same minutes; 1 is no overhead. Weights in four bits are kept "
        "dequantized meanwhile, which takes as many bytes as the base's.",
        decode_time,
    ),
    Column(
        "Inference",
        "Merged",
        "× base",
        "The same, after the adapter was added into the weights.",
        _fixed(".2f", "decode", "merged", "ratio"),
    ),
    Column(
        "Inference",
        "Mergeable",
        "",
        "Whether the adapter can be added into the weights, to leave no overhead.",
        _mergeable,
    ),
    Column(
        "Inference",
        "Merge error",
        "logits",
        "Largest change of any output score (logit) that merging causes by rounding.",
        lambda row: significant(found(row, "merge", "logit_error")),
    ),
    _memory("weights", "Parameters and buffers, the frozen ones included."),
    _memory("gradients", "One number for each parameter that trains."),
    _memory("optimizer", "What AdamW remembers: two numbers for each such parameter."),
    _memory(
        "activations", "Everything else: what the backward pass needs, temporaries."
    ),
    _memory("peak", "The most bytes held at any one moment."),
)
