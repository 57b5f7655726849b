"""docs/memory_budget.md says what was measured, and the goals it was measured for."""

import json

import pytest
from planting import Bug, each_is_caught, law

from peft_from_scratch.memory import activations, pieces
from tools import memory_page
from tools.memory_page import PAGE, RESULT, ROWS, cells, tables

GOALS = dict.fromkeys(ROWS[:3], 5.0) | dict.fromkeys(ROWS[3:], 10.0)  # %


def stored():
    return json.loads(RESULT.read_text("utf-8"))


@law
def bills_are_within_their_goals_of_what_was_measured(bases=None):
    result = stored()
    assert len(result["cells"]) == len(cells())
    for cell in result["cells"]:
        if bases is None or cell["base"] in bases:
            row = memory_page._compared(cell)
            for name, most in GOALS.items():
                assert abs(row["errors"][name]) <= most, (cell, name)


def real_models_are_within_their_goals():
    bills_are_within_their_goals_of_what_was_measured(("smollm2",))


def test_the_page_has_the_tables():
    result = stored()
    page = PAGE.read_text("utf-8")
    assert memory_page.between_marks(page, tables(result)) == page


def test_a_stored_cell_is_measured_again():
    base, setup = "tiny", memory_page.Setup(method="lora", batch=4, length=64)
    cell = next(
        c
        for c in stored()["cells"]
        if (c["base"], memory_page.Setup(**c["setup"])) == (base, setup)
    )
    assert memory_page.measured(base, setup) == pytest.approx(cell["measured"])


BUGS = {
    "logits forgotten": Bug(
        pieces.pieces_of,
        "logits=LOGITS * scores",
        "logits=0",
        real_models_are_within_their_goals,
    ),
    "no float32 in RMSNorm": Bug(
        activations._llama, "4 * d + 4", "0", real_models_are_within_their_goals
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS)
