"""The ledger as a page: every claim, what was measured, and what to make of it.

    python -m peft_from_scratch ledger --page      out/ledger.html
    python -m tools.ledger_page                    docs/ledger.md, with the same content

`Entry` is one claim in words, and `Account` is the whole; page.html and the tool only
arrange them. The words and the number line are those of the verdict cards.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from pathlib import Path

from matplotlib.figure import Figure

from ..common import atomic
from ..common.provenance import ROOT
from ..plotting import pages
from ..plotting.number_line import INCHES_WIDE
from ..plotting.theme import LIGHT, Theme
from . import history, more_runs, verdicts
from .claim import (
    COMPUTED,
    FAILS,
    HOLDS,
    HOLDS_WHEN,
    NOT_RUN,
    UNDECIDED,
    UNTESTABLE,
    Claim,
)
from .planned import LESSONS, PLANNED, Planned
from .verdict_card import (
    NAMED,
    VerdictCard,
    concerns_no_base,
    figure_of,
    sentence,
    unit_of,
)

FILE = Path("out", "ledger.html")
NARROW = 5.2  # inches; the number line's width on a phone
NOTEBOOKS = ROOT / "notebooks"
# verdict -> (the score's words for one claim and for more, the sign beside its word)
SCORE = {
    HOLDS: ("holds", "hold", "✓"),
    HOLDS_WHEN: ("holds under a condition", "hold under a condition", "◐"),
    FAILS: ("does not hold here", "do not hold here", "✗"),
    "wrong as stated": ("is wrong as stated", "are wrong as stated", "✗✗"),
    COMPUTED: ("is computed", "are computed", "="),
    UNDECIDED: ("is undecided", "are undecided", "?"),
    UNTESTABLE: ("cannot be tested here", "cannot be tested here", "–"),
    NOT_RUN: ("is not run yet", "are not run yet", "…"),
}
CHAPTER = "the textbook's chapter"
ABOUT = (
    "A textbook chapter on fine-tuning makes claims, and newer papers make more. Each "
    "is tried here by an experiment that a laptop can repeat. A rule is written before "
    "its runs, and decides by an interval of 95 %. Where a rule was replaced later, "
    "the former verdict is folded under the claim. Here means models of 1 and 135 "
    "million parameters. What no run could refute, a count or an identity, is called "
    "computed."
)
OLD_WORDS = (
    "The first verdicts had other words: confirmed is holds, confirmed with limits is "
    "holds when, and refuted here is does not hold here."
)


@dataclass(frozen=True)
class Entry:
    """A claim, as the page tells it; what is not known is "" or empty.

    id, statement, source  of the claim
    kind     its verdict, a key of SCORE; `verdict` is the same in words
    where    the base that it was measured on
    so, number, more       what to take away; the one number; how many runs would decide
    details  what is folded: (name, text)
    past     verdicts under former rules, a sentence each
    lesson   (name, path of the notebook from the project's folder, or "")
    """

    id: str
    statement: str
    source: str
    kind: str
    verdict: str
    lesson: tuple[str, str]
    where: str = ""
    so: str = ""
    number: str = ""
    more: str = ""
    details: tuple[tuple[str, str], ...] = ()
    past: tuple[str, ...] = ()
    card: VerdictCard | None = None

    @property
    def sign(self) -> str:
        """Beside the verdict's word, for those who do not see its color."""
        return SCORE[self.kind][-1]

    @property
    def alt(self) -> str:
        """The number line in words."""
        return f"Number line of {self.id}. {self.number} Verdict: {self.verdict}."

    def picture(
        self, theme: Theme = LIGHT, width: float = INCHES_WIDE
    ) -> Figure | None:
        """The number line; None where no interval was measured."""
        return self.card.picture(theme, width) if self.card else None


@dataclass(frozen=True)
class Account:
    """The page: introduction, score, chance, ids by verdict, entries in groups."""

    about: str
    score: str
    chance: str
    ids: dict[str, list[str]]
    groups: dict[str, list[Entry]]
    old_words: str


def account(rows: Sequence[dict], past: Sequence[dict]) -> Account:
    """What the page tells.

    Args
        rows  of data/ledger.json
        past  of data/ledger_history.json
    """
    row_of = {row["id"]: row for row in rows}
    claims = sorted([*verdicts.claims().values(), *PLANNED], key=verdicts.order)
    entries = [
        _entry(claim, row_of[claim.id], past) if claim.id in row_of else _waiting(claim)
        for claim in claims
    ]
    chapter = [entry for entry in entries if entry.source == CHAPTER]
    newer = [entry for entry in entries if entry.source != CHAPTER]
    waiting = {"verdict": NOT_RUN, "interval": None}
    old = {entry["verdict"] for entry in past} - set(SCORE)
    return Account(
        ABOUT,
        score(entries),
        verdicts.could_flip([row_of.get(claim.id, waiting) for claim in claims]),
        {kind: [entry.id for entry in entries if entry.kind == kind] for kind in SCORE},
        {"The chapter's claims": chapter, "Newer claims, and our own": newer},
        OLD_WORDS if old else "",
    )


def score(entries: Sequence[Entry]) -> str:
    """How many claims came to which verdict, in a sentence."""
    counted = Counter(entry.kind for entry in entries)
    parts = [
        f"{counted[kind]} {one if counted[kind] == 1 else more}"
        for kind, (one, more, _) in SCORE.items()
    ]
    return f"Of {len(entries)} claims, {', '.join(parts[:-1])}, and {parts[-1]}."


def _entry(claim: Claim, row: dict, past: Sequence[dict]) -> Entry:
    card = VerdictCard(claim, row)
    more = more_runs.in_words(claim.rule, row)
    return Entry(
        claim.id,
        claim.statement,
        claim.source or CHAPTER,
        row["verdict"],
        card.verdict,
        _lesson(claim.notebook),
        NAMED[row["scale"]] if card.where else "",
        row["so"] or "",
        sentence(card.number) if card.number else "",
        sentence(more) if more else "",
        tuple(_details(claim, row)),
        tuple(_former(each) for each in past if each["id"] == claim.id),
        card,
    )


def _waiting(planned: Planned | Claim) -> Entry:
    """The entry of a claim that has no experiment yet."""
    return Entry(
        planned.id,
        planned.statement,
        planned.source or CHAPTER,
        NOT_RUN,
        NOT_RUN,
        _lesson(planned.notebook),
    )


def _details(claim: Claim, row: dict) -> list[tuple[str, str]]:
    """(name, text) of what is folded under a claim."""
    known = {
        "Say instead": sentence(row["say_instead"] or ""),
        "Rule": sentence(row["rule"]),
        "Rule hash": row["rule_hash"],
        "Seeds": _seeds(row["seeds"]),
        "Runs": f"{len(row['runs'])}, in data/results/runs" if row["runs"] else "",
    }
    known |= {
        f"On {NAMED[base]}": _elsewhere(claim, at)
        for base, at in row["scales"].items()
        if base != row["scale"] and not concerns_no_base(row)
    }
    return [(name, text) for name, text in known.items() if text.strip(".")]


def _seeds(seeds: Sequence[int]) -> str:
    """All of them, or the first and the last of an unbroken row."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _elsewhere(claim: Claim, at: dict) -> str:
    """Verdict and number on another base than the row's own."""
    more = more_runs.in_words(claim.rule, at)
    parts = (at["verdict"], _number(at, unit_of(claim.rule)), more)
    return sentence("; ".join(filter(None, parts)))


def _number(at: dict, unit: str) -> str:
    """A measured value with its interval; "" where nothing was measured."""
    if at["measured"] is None:
        return ""
    text = f"{figure_of(at['measured'])} {unit}"
    low, high = at["interval"] or (0, 0)
    if low < high:
        text += f", 95 % interval {figure_of(low)} to {figure_of(high)}"
    return text


def _former(entry: dict) -> str:
    """A verdict under a rule that was replaced."""
    number = _number(entry, _unit_in(entry["rule"]))
    base = f" on {entry['scale']}" if entry["scale"] else ""
    verdict = ": ".join(filter(None, (f"{entry['verdict']}{base}", number)))
    return (
        f"Until {entry['until']}: {verdict}. The rule was: {sentence(entry['rule'])} "
        f"(hash {entry['rule_hash']}, replaced by {entry['replaced_by']})"
    )


def _unit_in(rule: str) -> str:
    """The unit that a rule's text names."""
    match = re.search(r"; up to [\d.,e+-]+ ([^:]*):|computed, in (.*)", rule)
    return (match[1] or match[2]) if match else ""


def _lesson(number: str) -> tuple[str, str]:
    """(name, path of the notebook, or "" where it is not written yet)."""
    for file in sorted(NOTEBOOKS.glob(f"{number}_*.ipynb")):
        topic = file.stem.partition("_")[2].replace("_", " ")
        return f"Lesson {number}, {topic}", f"notebooks/{file.name}"
    return f"Lesson {number}, {LESSONS[number]}", ""


def html(whole: Account) -> str:
    """The page as one HTML document that loads nothing from anywhere."""
    template = resources.files(__package__).joinpath("page.html")
    entries = chain.from_iterable(whole.groups.values())
    return pages.rendered(
        template.read_text("utf-8"),
        whole=whole,
        score=SCORE,
        pictures={
            entry.id: pages.in_four(entry.picture, INCHES_WIDE, NARROW, small=True)
            for entry in entries
            if entry.picture()
        },
    )


def write(rows: Sequence[dict], file: Path = FILE) -> Path:
    """Write the page of these rows; return its path."""
    text = html(account(rows, history.read(verdicts.FILE)))
    with atomic.new_file(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file
