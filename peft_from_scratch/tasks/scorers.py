"""Scorers: what counts as right on your own rows. You choose one by its name.

    "exact"     the answer is the completion, but for space around it
    "json"      both are the same JSON value: types exact, key order free
    "label"     both are the same label: first line, in small letters, without the
                punctuation behind it
    "rouge-l"   how much of the wording agrees, from 0 to 1: for summaries and other
                answers that can be put in more than one way
    "mine.py"   a Python file of yours with a function score(answer, completion), which
                returns True, False, or a number from 0 to 1 (score_file.py)

A scorer is called with the model's answer and the row's completion. Before anything is
trained, `refuse_unfit` asks it whether it suits the completions: a JSON scorer on text
that is not JSON would score every answer 0 and never say why.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.digest import digest
from . import orders
from .jsonl import in_order, refuse_bad
from .score_file import ScoreFile
from .templates import placed

MOST_LABELS = 200  # more different completions than that are no set of labels
WORD = re.compile(r"[^\W_]+")
Score = bool | float  # right or wrong, or from 0 to 1
Refused = Sequence[tuple[str, str]]  # the place of each row that does not suit, and why
Splits = Mapping[str, Sequence[Mapping[str, str]]]  # split: its rows


@dataclass(frozen=True)
class Scorer:
    """A way to score an answer, and what it asks of the completions.

    Args
        name      as on the command line
        title     what the number is called: "exact match on 20 test rows: …"
        meaning   for tables: what is counted, in a sentence
        many      scores of (answer, completion) pairs; the places of their rows, for
                  the messages of a file that cannot score one of them
        unfit     the rows that it cannot be used for; ValueError: for none of them
        identity  changes whenever scores may change
    """

    name: str
    title: str
    meaning: str
    many: Callable[[Sequence[tuple[str, str]], Sequence[str]], list[Score]]
    unfit: Callable[[Splits], Refused]
    identity: str

    def __call__(self, answer: str, completion: str) -> Score:
        return self.many([(answer, completion)], ["this row"])[0]


def scorer(name: str) -> Scorer:
    """The scorer called `name`, or the one in the Python file at that path.

    Raises  ValueError  no such scorer, or a file that holds none
            OSError     no such file
    """
    if name in SCORERS:
        return SCORERS[name]
    if not name.endswith(".py"):
        raise ValueError(
            f"scorer={name!r} is none of {', '.join(SCORERS)}, and no path of a Python "
            "file, which ends in .py"
        )
    file = ScoreFile(name, Path(name).read_bytes())
    return Scorer(
        name,
        f"score by {name}",
        f"Mean score of the answers by {name}.",
        file.scores,
        lambda splits: file.unfit(_sample(splits)),
        digest(name, file.source.hex()),
    )


def title(score: Callable[[str, str], Score]) -> str:
    """What the mean of its scores is called; a task's own function counts matches."""
    return score.title if isinstance(score, Scorer) else "exact match"


def identity(score: Callable[[str, str], Score]) -> str | None:
    """What changes with a scorer's scores; None for a task's own function."""
    return score.identity if isinstance(score, Scorer) else None


def score_all(
    score: Callable[[str, str], Score], answers: Sequence[str], rows
) -> list[Score]:
    """The score of each answer to its row, by a scorer or by a task's own function."""
    pairs = [(a, row["completion"]) for a, row in zip(answers, rows, strict=True)]
    if not isinstance(score, Scorer):
        return [score(answer, completion) for answer, completion in pairs]
    return score.many(pairs, [place for place, _ in placed(rows)])


def refuse_unfit(scorer: Scorer, splits: Splits, source: str) -> None:
    """ValueError with the rows, by place and reason, that the scorer cannot score.

    Or, where it suits none of them, with the reason for this.
    """
    if bad := scorer.unfit(splits):
        refuse_bad(in_order(bad), f"{source}, for the scorer {scorer.name},")


# ------------------------------------------------------------------- built-in scorers


def same_text(answer: str, completion: str) -> bool:
    """True where both are the same text, but for space around it."""
    return answer.strip() == completion.strip()


def same_label(answer: str, completion: str) -> bool:
    """True where both name the same label: "Positive.\\nIt says …" and "positive"."""
    return label(answer) == label(completion)


def label(text: str) -> str:
    """The first line in small letters, without punctuation behind it, spaces single.

    A line of nothing but punctuation stays: ":-)" may be a label.
    """
    lines = unicodedata.normalize("NFKC", text).strip().splitlines()
    line = " ".join(lines[0].casefold().split()) if lines else ""
    return line.rstrip(string.punctuation + "…。！？ ") or line


def rouge_l(answer: str, completion: str) -> float:
    """The F-measure of the longest common subsequence of words, from 0 to 1.

        P = LCS / words of the answer       R = LCS / words of the completion
        F = 2 P R / (P + R)                                                    [1]

    A word is a run of letters and digits, in small letters; nothing is stemmed. On
    ASCII text these are the words of the package rouge-score without its stemmer. The
    package drops all other letters; here they count. A script that puts no spaces
    between words, such as Chinese, has runs as long as a phrase: score those with a
    file of your own.

    Source  [1] Lin, ROUGE: A Package for Automatic Evaluation of Summaries (2004), 3.1
    """
    ours, theirs = words(answer), words(completion)
    common = longest_common(ours, theirs)
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def words(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest sequence that both contain, in order, gaps allowed.

    L(i, j) = L(i-1, j-1) + 1            where a_i = b_j
              max(L(i-1, j), L(i, j-1))  elsewhere
    """
    row = [0] * (len(b) + 1)  # L(i, ·)
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1]


# ------------------------------------------------------------ what a scorer refuses


def _none_refused(splits: Splits) -> Refused:
    return []


def _not_json(splits: Splits) -> Refused:
    return _each(splits, _reason_against_json)


def _reason_against_json(completion: str) -> str | None:
    try:
        orders.canonical(completion)
    except (ValueError, RecursionError) as error:
        return f"the completion is not JSON: {error}"
    return None


def _no_words(splits: Splits) -> Refused:
    return _each(
        splits,
        lambda completion: None if words(completion) else "the completion has no word",
    )


def _no_labels(splits: Splits) -> Refused:
    """The rows whose completions have lines; ValueError where they are no labels.

    Labels are few: from two to MOST_LABELS, each in two rows on average.
    """
    rows = [row for split in splits.values() for row in split]
    counts = Counter(label(row["completion"]) for row in rows)
    if len(counts) < 2 or len(counts) > min(MOST_LABELS, len(rows) / 2):
        some = ", ".join(repr(text[:30]) for text, _ in counts.most_common(3))
        raise ValueError(
            f"{len(counts)} different completions in {len(rows)} rows ({some} …) are "
            f"no labels, of which there are 2 to {MOST_LABELS}, each in two rows on "
            "average: choose another scorer than label"
        )
    return _each(splits, _reason_against_label)


def _reason_against_label(completion: str) -> str | None:
    if len(completion.strip().splitlines()) == 1:
        return None
    return "the completion has several lines, and only the first would count"


def _each(splits: Splits, reason: Callable[[str], str | None]) -> Refused:
    """(place, reason) of each row whose completion has a reason against it."""
    return [
        (place, why)
        for rows in splits.values()
        for place, row in placed(rows)
        if (why := reason(row["completion"]))
    ]


def _sample(splits: Splits) -> Sequence[Mapping[str, str]]:
    """The rows that a user's file is tried on: test rows, since these are scored."""
    return list(splits["test"])[:TRIED]


TRIED = 50  # a user's scorer may take a second a row


def _built_in(name, title, meaning, score, unfit) -> Scorer:
    def many(pairs, places):
        return [score(answer, completion) for answer, completion in pairs]

    return Scorer(name, title, meaning, many, unfit, name)


SCORERS = {
    each.name: each
    for each in (
        _built_in(
            "exact",
            "exact match",
            "Share of the test rows that the method answers exactly right.",
            same_text,
            _none_refused,
        ),
        _built_in(
            "json",
            "same JSON value",
            "Share of the test rows whose answer is the same JSON value.",
            orders.score,
            _not_json,
        ),
        _built_in(
            "label",
            "right label",
            "Share of the test rows whose answer names the right label.",
            same_label,
            _no_labels,
        ),
        _built_in(
            "rouge-l",
            "ROUGE-L",
            "Mean ROUGE-L of the answers: how much of the wording agrees, 0 to 1.",
            rouge_l,
            _no_words,
        ),
    )
}
