"""Notebook 13's checks: what the common mistakes are told, and what else is right."""

import build
import pytest
from exercise_checks import checked
from try_answers import lesson

from peft_from_scratch.course.checks import many_adapters as checks

LESSON = lesson(build.FOLDER / "13_many_adapters.py")

TOLD = {  # exercise: {mutant: what its learner must read}
    "13.1": {
        "the base alone": "only the base",
        "no base": "W0 x is missing",
        "the base twice": "W0 x is there twice",
        "adapter 0 for all": "all rows have adapter 0",
        "the first row's adapter for all": "the adapter of the first one",
        "None is adapter 0": "None means no adapter, not adapter 0",
        "None is the last adapter": "not the last one",
        "cut to the smallest rank": "pad the smaller ones with zeros",
        "subtracted": "wrong sign",
        "in the order of the adapters": "in the order of their adapters",
        "a loop over the rows": "8 are enough for any batch",
        "a loop over the adapters": "8 are enough for any batch",
        "x is changed": "x itself was changed",
    },
    "13.2": {
        "the most rows": "rows take memory from the pool",
        "the most slots": "slots take memory from the rows",
        "every request is a load": "is a hit",
        "each adapter is loaded once": "is loaded again",
        "no loads": "the loads from disk were left out",
        "the loads alone": "the seconds of the groups were left out",
        "groups are rounded down": "round up",
        "one slot is enough": "slots >= rows",
        "rows take no memory": "the memory of the rows was forgotten",
        "never None": "no plan fits, so the answer is None",
        "the worst plan": "slots take memory from the rows",
        "the time alone": "three values are needed",
    },
    "13.3": {
        "the name is the key": "the name is the key: its content is new",
        "name and digest are the key": "the same content under another name",
        "no adapter in the key": "its content is new",
        "the shortest": "the longest one",
        "the whole prompt": "must be left to read",
        "the first is kept": "replaces the old",
        "shared by all": "",
        "the cache alone": "two values",
        "the set of tokens is the key": "in the same order",
        "the list itself": "belongs to the caller",
    },
}
RIGHT = {  # exercise: {name: another right answer}
    "13.1": {
        "the lesson's": "my_gather = checks.our_gather",
        "classes of rank": """\
def my_gather(x, W0, A, B, v):
    h = x @ W0.T
    classes = {}
    for i, a in enumerate(v):
        if a is not None:
            r = 4 if len(A[a]) <= 4 else 1 << (len(A[a]) - 1).bit_length()
            classes.setdefault(r, []).append(i)
    for r, rows in classes.items():
        own = [v[i] for i in rows]
        wide_A = torch.stack([F.pad(A[a], (0, 0, 0, r - len(A[a]))) for a in own])
        wide_B = torch.stack([F.pad(B[a], (0, r - len(A[a]))) for a in own])
        h[rows] += torch.bmm(torch.bmm(x[rows], wide_A.mT), wide_B.mT)
    return h
""",
    },
    "13.2": {"the lesson's": "my_plan = checks.our_plan"},
    "13.3": {
        "the lesson's": "MyPrefixCache = checks.OurPrefixCache",
        "all that begins the prompt": """\
class MyPrefixCache:
    def __init__(self):
        self.kept = {}
    def keep(self, version, tokens, cache):
        key = None if version is None else version.digest
        self.kept[(key, *tokens)] = cache
    def find(self, version, prompt):
        key = None if version is None else version.digest
        whole = (key, *prompt)
        fits = [k for k in self.kept if len(k) < len(whole) and whole[:len(k)] == k]
        best = max(fits, key=len, default=None)
        return (len(best) - 1, self.kept[best]) if best else (0, None)
""",
    },
}


(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)


@pytest.mark.parametrize("traffic", list(checks._traffics()), ids=str)
def test_a_plan_is_the_best_of_all(traffic):
    """Against every number of rows and slots that fits, one by one."""
    plans = [
        traffic.time(rows, slots)
        for rows in traffic.seconds
        for slots in range(rows, traffic.memory // traffic.adapter + 1)
        if rows * traffic.row + slots * traffic.adapter <= traffic.memory
    ]
    plan = checks.our_plan(**traffic.given())
    assert (plan is None) == (not plans)
    if plans:
        assert plan[2] == min(plans)
