"""The README's tables, made from what they speak of and never typed.

    python -m tools.readme       writes them anew

The results come from the shipped run, the methods from the table of methods, and the
claims of each notebook from the experiments. A test holds the page to all three.
"""

import itertools
import json
import re
from collections.abc import Iterable

from peft_from_scratch.common import atomic
from peft_from_scratch.common.marks import between_marks
from peft_from_scratch.common.provenance import ROOT
from peft_from_scratch.comparison import background, findings
from peft_from_scratch.comparison.columns import ABSENT, COLUMNS, LETTERS
from peft_from_scratch.ledger import verdicts
from peft_from_scratch.methods import METHODS

RESULT = ROOT / "data" / "results" / "compare.json"
PAGE = ROOT / "README.md"
SHOWN = (
    "Exact match",
    "Letters",
    "Over few-shot",
    "Forgetting",
    "Trainable",
    "Peak",
    "Train",
    "Disk",
)
# | [NN Title](notebooks/…) | what it shows | claims |
LESSON = re.compile(r"^(\| \[(\d\d) [^|]*\|[^|]*\|)[^|\n]*\|$", re.MULTILINE)


def renewed(page: str, result: dict) -> str:
    """The page with all its tables made new, `result` being that of the shipped run."""
    page = between_marks(page, results(result))
    return with_claims(between_marks(page, methods(), "methods"))


def results(result: dict) -> str:
    """The finding, the main columns as a Markdown table, and where they come from.

    A column in which no row has a value is left out.
    """
    columns = [
        column
        for name in SHOWN
        for column in COLUMNS
        if column.name == name
        and any(column.cell(row) != ABSENT for row in result["rows"])
    ]
    heads = ["Method", *(", ".join(filter(None, (c.name, c.unit))) for c in columns)]
    lines = [heads, ["---", *("---:" for _ in columns)]]
    for row in result["rows"]:
        lines.append([row["label"], *(column.cell(row) for column in columns)])
    notes = [background.clock(result), result["wall"]["sentence"]]
    if result.get("pairs"):
        notes = [LETTERS, *background.resolution(result), *notes]
    return f"**{findings.headline(result)}.**\n\n{_table(lines)}\n\n{' '.join(notes)}\n"


def methods() -> str:
    """What trains, whether it merges, whether PEFT reads the file: a row a method."""
    lines = [["", "what trains", "mergeable", "PEFT's file"], ["---"] * 4]
    for method in METHODS:
        name = f"`pfs.{method.name}`"
        lines.append([name, method.trains, method.mergeable, method.peft_file])
    return f"{_table(lines)}\n"


def with_claims(page: str) -> str:
    """The page with the claims of each notebook in the last column of its lessons."""
    claims = {
        notebook: [claim.id for claim in group]
        for notebook, group in itertools.groupby(
            verdicts.CLAIMS.values(), key=lambda claim: claim.notebook
        )
    }

    def line(match: re.Match) -> str:
        spoken = in_short(claims.get(match[2], []))
        return f"{match[1]} {spoken} |" if spoken else f"{match[1]} |"

    return LESSON.sub(line, page)


def in_short(ids: Iterable[str]) -> str:
    """ "L3, L5 to L8" for L3, L5, L6, L7, L8: three or more in a row are a range."""
    runs: list[list[str]] = []
    for id in ids:
        letter, number = id[0], id[1:]
        follows = number.isdigit() and f"{letter}{int(number) - 1}"
        if runs and runs[-1][-1] == follows:
            runs[-1].append(id)
        else:
            runs.append([id])
    return ", ".join(
        f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs
    )


def _table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    page = renewed(PAGE.read_text("utf-8"), json.loads(RESULT.read_text("utf-8")))
    with atomic.new_file(PAGE) as partial:
        partial.write_text(page, encoding="utf-8")
