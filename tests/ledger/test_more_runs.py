"""The estimate of the runs that would decide, by cases that can be done by hand."""

import math

import pytest
from planting import assert_caught, law

from peft_from_scratch.ledger import more_runs, verdicts
from peft_from_scratch.ledger.claim import Rule

RULE = Rule("w", "%", ("holds", "holds when", "does not hold here"), (10, 100))


def at(value, low, high, seeds=4, runs=4, verdict="undecided"):
    return {
        "verdict": verdict,
        "measured": value,
        "interval": [low, high],
        "seeds": list(range(seeds)),
        "runs": [f"z-{i}" for i in range(runs)],
    }


@law
def four_times_as_many_halve_an_interval():
    """Half width 4 at a distance of 2 from the edge: 4 x (4 / 2)² = 16 seeds."""
    assert more_runs.needed(RULE, at(12, 8, 16)) == 16
    assert more_runs.needed(RULE, at(8, 4, 12)) == 16
    assert more_runs.needed(RULE, at(12, 8, 16, seeds=5)) == 20
    assert more_runs.needed(RULE, at(97, 92, 102)) == math.ceil(4 * (5 / 3) ** 2)


@pytest.mark.parametrize(
    ("function", "right", "wrong"),
    [
        (more_runs.factor, "/ 2 / distance", "/ distance"),
        (more_runs.factor, "** 2", "** 1"),
        (more_runs.factor, "min(abs", "max(abs"),
        (more_runs.needed, "math.ceil", "math.floor"),
    ],
)
def test_a_planted_error_of_the_estimate_is_caught(function, right, wrong):
    assert_caught(function, right, wrong, four_times_as_many_halve_an_interval)


def test_an_edge_between_equal_verdicts_decides_nothing():
    rule = Rule("w", "%", ("holds", "does not hold here", "does not hold here"), (0, 9))
    assert more_runs.factor(rule, 10, -10, 30) == 4


def test_a_value_on_the_edge_is_decided_by_no_number_of_runs():
    assert more_runs.needed(RULE, at(10, 8, 12)) is None
    assert "on an edge" in more_runs.in_words(RULE, at(10, 8, 12))
    assert "not one over seeds" in more_runs.in_words(RULE, at(12, 8, 16, seeds=1))


def test_the_words_name_seeds_and_runs():
    assert more_runs.in_words(RULE, at(12, 8, 16)) == (
        "about 16 seeds would decide it, where it has 4"
    )
    more = more_runs.in_words(RULE, at(12, 8, 16, runs=40))
    assert more.endswith("4 (about 160 runs, where it has 40)")
    assert more_runs.in_words(RULE, at(12, 11, 13, verdict="holds when")) == ""


def test_the_table_says_it_where_a_row_is_undecided():
    rows = [row for row in verdicts.read() if row["id"] in ("M2", "L2")]
    lines = {line.split()[0]: line for line in verdicts.table(rows).splitlines()[:2]}
    assert "L2" in lines and "about" not in lines["L2"]
    table = verdicts.table(rows)
    assert f"undecided *: {more_runs.in_words(verdicts.claim('M2').rule, rows[1])}" in (
        table
    )
