"""The verdict card: what a claim came to, on one screen.

    claim      "Verdict card", its id, and what the textbook says
    verdict    in the words of ledger/claim.py
    picture    the rule's bands, with the interval on them, and the reader's guess
    number     one, with its interval
    so         the sentence to take away
    folded     the rule in words, seeds, runs, the other base, and more to say

Everything comes from the claim's row of the ledger. A card prints as plain text too,
for those who read a notebook without markdown, and for nbval.
"""

import textwrap
from dataclasses import dataclass

from matplotlib.figure import Figure

from ..plotting.number_line import INCHES_WIDE, number_line
from ..plotting.theme import LIGHT, Theme
from .claim import (
    BASES,
    COMPUTED,
    HOLDS_WHEN,
    NOT_RUN,
    UNDECIDED,
    UNTESTABLE,
    Claim,
    Rule,
)

WIDTH = 88  # characters of a line
UNITS = {"x": "times"}  # those of rules that a reader would not read as meant
NAMED = {"tiny": "tiny, of one million parameters", "smollm2": "SmolLM2-135M"}


@dataclass(frozen=True)
class VerdictCard:
    """A claim with its row of data/ledger.json.

    Args
        guess  the reader's (low, high), in the rule's unit; None without one
    """

    claim: Claim
    row: dict
    guess: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        """In words, with the condition where there is one."""
        verdict = self.row["verdict"]
        if verdict == HOLDS_WHEN:
            return f"holds when {self.row['condition']}"
        return verdict

    @property
    def number(self) -> str | None:
        """The one number, with its interval and unit; None without a measurement."""
        row, rule = self.row, self.claim.rule
        if row["measured"] is None:
            return None
        text = f"{self.claim.number}: {figure_of(row['measured'])} {unit_of(rule)}"
        low, high = row["interval"] or (0, 0)
        if low < high:
            text += f", 95 % interval {figure_of(low)} to {figure_of(high)}"
        return text

    @property
    def where(self) -> str:
        """The base that it was measured on; "" for what concerns none."""
        if self.row["verdict"] == NOT_RUN or concerns_no_base(self.row):
            return ""
        return f" (measured on {NAMED[self.row['scale']]})"

    def picture(
        self, theme: Theme = LIGHT, width: float = INCHES_WIDE
    ) -> Figure | None:
        """The number line; None where there is no interval to put on it."""
        row, rule = self.row, self.claim.rule
        if row["interval"] is None or rule.computed:
            return None
        measured = row["measured"], *row["interval"]
        unit = unit_of(rule)
        return number_line(
            rule.edges, rule.verdicts, measured, unit, self.guess, theme, width
        )

    def headline(self) -> str:
        """Claim and verdict, in markdown."""
        return (
            f"**Verdict card · {self.claim.id} · {self.claim.statement}**\n\n"
            f"Verdict: **{self.verdict}**{self.where}"
        )

    def body(self) -> str:
        """Number, sentence to take away and what is folded, in markdown."""
        parts = [sentence(self.number)] if self.number else []
        if self.row["so"]:
            parts.append(f"**So:** {self.row['so']}")
        folded = "\n".join(f"- {line}" for line in self.folded())
        parts.append(
            "<details><summary>The rule, the runs and the details</summary>\n\n"
            f"{folded}\n\n</details>"
        )
        return "\n\n".join(parts)

    def folded(self) -> list[str]:
        """What stands under the card."""
        row = self.row
        lines = [f"Rule, written before the runs: {row['rule']}."]
        if row["verdict"] == UNDECIDED:
            lines.append(
                "Undecided means that the interval lies in more than one band of the "
                "rule. It does not mean that there is no difference."
            )
        if row["say_instead"]:
            lines.append(sentence(row["say_instead"]))
        if row["seeds"]:
            lines.append(f"Seeds: {', '.join(map(str, row['seeds']))}.")
        lines += [
            f"On {NAMED[base]}: {other['verdict']}."
            for base, other in row["scales"].items()
            if base != row["scale"] and self.where
        ]
        if row["runs"]:
            lines.append(
                f"Runs: {len(row['runs'])}, in data/results/runs; "
                f"`python -m peft_from_scratch ledger {self.claim.id}` lists them."
            )
        return lines

    def plain(self) -> tuple[str, str]:
        """(headline, body) as text."""
        head = f"{self.claim.id}: {self.verdict}{self.where}"
        body = [sentence(self.number)] if self.number else []
        body += [f"So: {self.row['so']}"] if self.row["so"] else []
        return _wrapped([head]), _wrapped(body)

    def __str__(self):
        return "\n".join(filter(None, self.plain()))


def _wrapped(lines: list[str]) -> str:
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines
    )


def concerns_no_base(row: dict) -> bool:
    """Whether the same runs, or none, count for every base: then none was used."""
    runs = {str(row["scales"][base]["runs"]) for base in BASES}
    return len(runs) == 1 or row["verdict"] in (COMPUTED, UNTESTABLE)


def unit_of(rule: Rule) -> str:
    """The unit of a rule's number, as it is printed."""
    return UNITS.get(rule.unit, rule.unit)


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def figure_of(value) -> str:
    """Three digits, and no exponent where a reader does without."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value == round(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
