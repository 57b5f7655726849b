"""The README's table of results, made from the shipped run and never typed.

    python -m tools.readme       writes it between the two marks

A test holds the page to the result file.
"""

import json
import re

from peft_from_scratch.common import atomic
from peft_from_scratch.common.provenance import ROOT
from peft_from_scratch.comparison import findings
from peft_from_scratch.comparison.columns import COLUMNS

RESULT = ROOT / "data" / "results" / "compare.json"
PAGE = ROOT / "README.md"
SHOWN = (
    "Exact match",
    "Over few-shot",
    "Forgetting",
    "Trainable",
    "Peak",
    "Train",
    "Disk",
)
BLOCK = re.compile(r"(<!-- results: .*? -->\n).*?(<!-- end of results -->)", re.DOTALL)


def results(result: dict) -> str:
    """The finding, the main columns as a Markdown table, and where they come from."""
    columns = [column for name in SHOWN for column in COLUMNS if column.name == name]
    heads = ["Method", *(f"{c.name}, {c.unit}" for c in columns)]
    lines = [heads, ["---", *("---:" for _ in columns)]]
    for row in result["rows"]:
        lines.append([row["label"], *(column.cell(row) for column in columns)])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    machine = result["provenance"]["machine"]
    wall = result["wall"]["sentence"]
    return f"**{findings.headline(result)}.**\n\n{table}\n\n{machine}. {wall}\n"


def with_results(page: str, result: dict) -> str:
    """The page with the block between the marks made new."""
    return between_marks(page, results(result))


def between_marks(page: str, block: str) -> str:
    """The page with this block, which ends in a new line, between the marks."""
    return BLOCK.sub(lambda marks: f"{marks[1]}\n{block}\n{marks[2]}", page)


if __name__ == "__main__":
    page = with_results(PAGE.read_text("utf-8"), json.loads(RESULT.read_text("utf-8")))
    with atomic.new_file(PAGE) as partial:
        partial.write_text(page, encoding="utf-8")
