"""The longest sequence that fits, and the change that makes the most room."""

import random

import pytest
from planting import Bug, each_is_caught, law

from peft_from_scratch.course import memory_plan
from peft_from_scratch.course.memory_plan import changed, fitting, line, plan

PARTS = {"weights": 36, "states": 8}


@law
def the_longest_is_the_last_that_fits():
    dice = random.Random(0)
    for _ in range(200):
        parts = {name: dice.randrange(50) for name in "abc"}
        a_token, budget = dice.randrange(1, 9), dice.randrange(200)
        tokens = fitting(parts, a_token, budget)
        fits = lambda n, p=parts, a=a_token: sum(p.values()) + n * a  # noqa: E731
        assert tokens == 0 or fits(tokens) <= budget
        assert fits(tokens + 1) > budget


@law
def the_best_change_depends_on_the_room():
    changes = {"page": {"states": 0}, "cheap": {"a token": 0.5}, "more": {"states": 2}}
    assert plan(PARTS, 2, 60, changes) == (8, "cheap", 16)
    assert plan(PARTS, 2, 48, changes) == (2, "page", 6)
    assert plan(PARTS, 2, 52, changes) == (4, "page", 8)  # a tie: the first


@law
def without_a_gain_there_is_no_best():
    assert plan(PARTS, 2, 60, {"more": {"states": 2}}) == (8, None, 8)
    assert plan(PARTS, 2, 20, {"page": {"states": 0}}) == (0, None, 0)
    assert plan(PARTS, 2, 60, {}) == (8, None, 8)


@law
def each_change_is_judged_alone():
    changes = {"page": {"states": 0}, "half": {"weights": 0.5}}
    assert plan(PARTS, 2, 60, changes) == (8, "half", 17)
    assert PARTS == {"weights": 36, "states": 8}


@law
def a_line_goes_through_both_points():
    slope, start = line(2048, 3_601, 4096, 7_697)
    assert slope == 2 and start + 2048 * slope == 3_601


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match="two bills of 7 tokens"):
        line(7, 1, 7, 2)
    with pytest.raises(ValueError, match=r"\['state'\]; the bill has weights, states"):
        changed(PARTS, 2, {"state": 0})


BUGS = {
    "rounded up": Bug(
        fitting, "math.floor", "math.ceil", the_longest_is_the_last_that_fits
    ),
    "the last of equal ones": Bug(
        plan,
        "longest > best_tokens",
        "longest >= best_tokens",
        the_best_change_depends_on_the_room,
    ),
    "a token costs the same": Bug(
        changed, "change.get(A_TOKEN, 1)", "1", the_best_change_depends_on_the_room
    ),
    "always a change": Bug(
        plan,
        "best = None",
        "best = next(iter(changes), None)",
        without_a_gain_there_is_no_best,
    ),
    "one on top of the other": Bug(
        plan,
        "longest = fitting(*changed(parts, a_token, change), budget)",
        "parts, a_token = changed(parts, a_token, change);"
        " longest = fitting(parts, a_token, budget)",
        each_change_is_judged_alone,
    ),
    "from the wrong end": Bug(
        memory_plan.line,
        "bytes_n - n * slope",
        "bytes_n - m * slope",
        a_line_goes_through_both_points,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
