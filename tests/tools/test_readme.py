"""The README's tables: the shipped run's figures, the methods, the claims."""

import json
import re

from invented_comparisons import comparison

from peft_from_scratch.common.marks import block_pattern
from peft_from_scratch.ledger import verdicts
from tools import readme


def test_the_tables_are_those_of_the_run_the_methods_and_the_claims():
    page = readme.PAGE.read_text("utf-8")
    assert all(block_pattern(name).search(page) for name in ("results", "methods"))
    assert readme.renewed(page, json.loads(readme.RESULT.read_text("utf-8"))) == page


def test_a_typed_figure_is_noticed():
    result = json.loads(readme.RESULT.read_text("utf-8"))
    shown = readme.results(result)
    row = result["rows"][-1]
    row["exact"]["rate"] -= 0.01
    assert readme.results(result) != shown


def test_letters_are_shown_and_a_column_without_values_is_not():
    result = comparison()
    shown = readme.results(result)
    assert "| Letters |" in shown and "Methods that share a letter" in shown
    assert "This run (1 seed, 100 test rows)" in shown
    for row in result["rows"]:
        del row["letters"]
    assert "Letters" not in readme.results(result).partition("\n\nMethods")[0]
    assert "other programs 0.1 cores at most" in shown


def test_every_claim_of_a_listed_notebook_is_listed_beside_it():
    lines = readme.LESSON.findall(readme.PAGE.read_text("utf-8"))
    assert len(lines) == len({number for _, number in lines}) >= 9
    bare = readme.LESSON.sub(r"\1 typed |", readme.PAGE.read_text("utf-8"))
    assert readme.with_claims(bare) == readme.PAGE.read_text("utf-8")
    for claim in verdicts.CLAIMS.values():
        (line,) = re.findall(rf"^\| \[{claim.notebook} .*$", bare, re.MULTILINE)
        assert line.endswith("| typed |")


def test_claims_in_a_row_are_a_range():
    ids = ["L3", "L5", "L6", "L7", "L8", "Q4", "Q4b", "Q5"]
    assert readme.in_short(ids) == "L3, L5 to L8, Q4, Q4b, Q5"
    assert readme.in_short([]) == ""
