"""Every check against every class of input that CHECKLIST.md lists.

That each mutant is refused is tested in test_exercises.py, with all others. Here: no
class is left out in silence, and the right answers of each class pass.
"""

import re

import pytest
import try_answers
from attacks import CLASSES, afterwards, every_time_but, remembered, stale
from try_answers import lesson

from peft_from_scratch.course import checks

LESSONS = [each for each in try_answers.lessons() if any(each.attacks.values())]
ROWS = [(each, exercise) for each in LESSONS for exercise in each.exercises]
RIGHT = [
    pytest.param(each, exercise, source, id=f"{exercise.id}-{kind}-{name}")
    for each, exercise in ROWS
    for kind, answers in each.right[exercise.id].items()
    for name, source in answers.items()
]
by_id = pytest.mark.parametrize(
    "found, exercise", ROWS, ids=[exercise.id for _, exercise in ROWS]
)


@by_id
def test_a_class_is_tried_or_does_not_apply_for_a_reason(found, exercise):
    attacks, right = found.attacks[exercise.id], found.right[exercise.id]
    assert tuple(attacks) == CLASSES
    applied = {kind for kind in CLASSES if not isinstance(attacks[kind], str)}
    assert set(right) == applied, "each class has mutants and right answers, or neither"
    assert all(attacks[kind] for kind in CLASSES)
    assert all(right.values())


@pytest.mark.parametrize("found, exercise, source", RIGHT)
def test_a_right_answer_of_each_class_passes(found, exercise, source):
    refusal = found.judge(exercise, source)
    assert refusal is None, str(refusal)


def test_the_checklist_explains_every_class():
    text = (checks.HERE / "CHECKLIST.md").read_text("utf-8")
    assert tuple(re.findall(r"^## (\w+)$", text, re.MULTILINE)) == CLASSES


def test_the_table_has_a_place_for_each_class(capsys):
    table = try_answers.class_table(LESSONS)
    print("\n".join(table))
    rows = [line.split(" | ") for line in table if re.match(r"\| \d", line)]
    assert len(rows) == len(ROWS)
    assert all(len(row) == len(CLASSES) + 1 for row in rows)


CODE = """\
def my_sum(x, y=1):
    return x + y
"""
CLASS = """\
class MySum:
    def __init__(self, y):
        self.y = y

    def forward(self, x):
        return x + self.y
"""


def names_of(source):
    names = {}
    exec(source, names)
    return names


def test_an_attack_keeps_the_name_and_the_signature():
    my_sum = names_of(stale("x")(CODE))["my_sum"]
    assert [my_sum(1), my_sum(5), my_sum(x=5, y=2)] == [2, 2, 3]
    my_sum = names_of(remembered("y")(CODE))["my_sum"]
    assert [my_sum(1), my_sum(5), my_sum(5, 2)] == [2, 2, 7]
    my_sum = names_of(every_time_but(2, "None")(CODE))["my_sum"]
    assert [my_sum(1), my_sum(1)] == [2, None]
    my_sum = names_of(afterwards("x.append(0)")(CODE))["my_sum"]
    lent = [1]
    assert my_sum(lent, [2]) == [1, 2] and lent == [1, 0]


def test_an_attack_on_a_class_changes_one_method():
    MySum = names_of(stale("y", "__init__")(CLASS))["MySum"]
    assert [MySum(1).forward(1), MySum(5).forward(1), MySum(5).forward(3)] == [2, 2, 4]
    MySum = names_of(stale("x", "forward")(CLASS))["MySum"]
    assert [MySum(1).forward(1), MySum(5).forward(2)] == [2, 6]


def test_one_of_several_functions_is_attacked():
    other = CODE.replace("my_sum", "my_other")
    names = names_of(stale("x", "my_sum")(CODE + other))
    assert [names["my_sum"](1), names["my_sum"](5), names["my_other"](5)] == [2, 2, 6]


def test_a_lesson_without_attacks_takes_no_part():
    sample = try_answers.ROOT / "tests" / "sample"
    found = lesson(sample / "90_sample.py", sample / "sample_wrong_answers.py")
    assert found.attacks == {"90.1": {}, "90.2": {}}
