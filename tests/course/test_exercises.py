"""Exercises: every check kills its mutants; blanks fail at the graded cells only.

The notebooks' own, and the sample's, with which the machinery itself is tried.
"""

import copy
import inspect
import os
import pkgutil
import warnings
from pathlib import Path

import build
import nbformat
import pytest
import run_blank
import try_answers
from try_answers import FEWEST, INPUT, NOTHING, TABLE, ZEROS, Lesson, called, lesson

from peft_from_scratch.course import checks
from peft_from_scratch.course.checks import judged
from peft_from_scratch.course.exercises import blank, exercises

HERE = Path(__file__).parents[1]
NOTEBOOKS = sorted(HERE.parent.glob("notebooks/[0-9]*.ipynb"))
TEXTS = sorted(HERE.parent.glob("notebooks/[0-9]*.py"))
SAMPLE = HERE / "sample" / "90_sample.py"
LESSONS = try_answers.lessons()
sample = lesson(SAMPLE, HERE / "sample" / "sample_wrong_answers.py")
ANSWERS = [
    (each, exercise) for each in [*LESSONS, sample] for exercise in each.exercises
]
WRONG = [
    pytest.param(each, exercise, source, id=f"{exercise.id}-{name}")
    for each, exercise in ANSWERS
    for name, source in each.wrong[exercise.id].items()
]
by_id = pytest.mark.parametrize(
    "found, exercise", ANSWERS, ids=[exercise.id for _, exercise in ANSWERS]
)


# --------------------------------------------------------------------------- Mutants


@by_id
def test_the_solution_passes_its_check(found: Lesson, exercise):
    found.run(exercise, exercise.code, exercise.check)


@pytest.mark.parametrize("found, exercise, source", WRONG)
def test_the_check_kills(found: Lesson, exercise, source):
    said = found.judge(exercise, source)
    assert said is not None, "it passes"
    shown = "\n".join(said._render_traceback_()).splitlines()
    assert 1 <= len(shown) <= 24, "a message is one screen at most"


@by_id
def test_enough_wrong_answers_were_thought_of(found: Lesson, exercise):
    wrong = found.wrong[exercise.id]
    assert len(set(wrong) - {NOTHING, INPUT}) >= FEWEST
    assert ZEROS in wrong
    assert len(set(wrong.values())) == len(wrong), "two of them are the same"
    assert exercise.code not in wrong.values()


@by_id
def test_an_exercise_that_nobody_began_says_so(found: Lesson, exercise):
    assert found.untouched(exercise) is not None


@by_id
def test_a_check_cell_calls_checks_only(found: Lesson, exercise):
    names = called(exercise.check)
    assert names
    for name in names:
        assert name in judging(found.checks), f"{name} is not @judged"


@pytest.mark.parametrize("found", LESSONS, ids=lambda each: each.text.stem)
def test_every_check_has_an_exercise(found: Lesson):
    used = {name for exercise in found.exercises for name in called(exercise.check)}
    assert used == set(judging(found.checks))


def test_checks_and_mutants_belong_to_a_lesson():
    modules = {module.name for module in pkgutil.iter_modules(checks.__path__)}
    mutants = {path.stem for path in (HERE / "wrong_answers").glob("*.py")}
    texts = {text.stem[3:]: text.read_text("utf-8") for text in TEXTS}
    assert modules == mutants == {n for n in texts if "# %% tags=" in texts[n]}


def test_the_table_of_exercises_is_current():
    assert TABLE.read_text("utf-8") == try_answers.table(LESSONS), (
        "write it again: python tests/helpers/try_answers.py --write"
    )


def judging(module):
    """The names of a module's checks: functions that @judged has wrapped."""
    wrapper = judged(lambda: None).__code__
    functions = inspect.getmembers(module, inspect.isfunction)
    return [name for name, function in functions if function.__code__ is wrapper]


# ---------------------------------------------------------------------------- Blanks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_blank_fails_at_exactly_the_graded_cells(path, tmp_path, offline):
    copied = run_blank.run(blank(nbformat.read(path, as_version=4)), tmp_path)
    assert run_blank.failed(copied) == run_blank.graded(copied)
    for late in run_blank.warnings(copied):
        warnings.warn(late, stacklevel=1)


@pytest.fixture
def offline(monkeypatch):
    for name, value in build.SETTINGS.items():
        monkeypatch.setenv(name, value)


# ----------------------------------------------------- The machinery, with the sample


def test_a_check_that_passes_everything_is_seen(monkeypatch):
    monkeypatch.setattr(sample.checks, "twice", judged(lambda my_twice: None))
    said = "\n".join(try_answers.survivors(sample))
    for name in (*sample.wrong["90.1"],):
        assert f"90.1: {name!r} passes" in said
    assert "90.2" not in said


def test_a_check_that_refuses_the_solution_is_seen(monkeypatch):
    @judged
    def never(my_twice):
        checks.close(1, 2, what="one")

    monkeypatch.setattr(sample.checks, "twice", never)
    assert ["its own solution is refused" in s for s in try_answers.survivors(sample)]


def test_sound_checks_leave_no_survivor():
    assert list(try_answers.survivors(sample)) == []


def test_a_check_that_breaks_down_kills_nothing(monkeypatch):
    """Only Wrong counts: else a check with a bug would kill all its mutants."""
    monkeypatch.setattr(sample.checks, "twice", lambda my_twice: 1 / 0)
    (exercise, _) = sample.exercises
    with pytest.raises(ZeroDivisionError):
        sample.judge(exercise, exercise.code)


def test_wrong_answers_that_need_no_author():
    assert {NOTHING, INPUT} <= set(sample.wrong["90.1"])
    assert NOTHING in sample.wrong["90.2"] and INPUT not in sample.wrong["90.2"]
    assert "return x\n" in sample.wrong["90.1"][INPUT] + "\n"


def test_the_table_names_every_exercise_check_and_mutant():
    table = try_answers.table([sample])
    assert "| 90.1 twice | `twice` | all zeros, once, the square, " in table
    count = sum(map(len, sample.wrong.values()))
    assert f"2 exercises, {count} mutants" in table


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(SAMPLE.with_suffix(".ipynb"), as_version=4)


def ran(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SAMPLE.parent), prepend=os.pathsep)
    return run_blank.failed(run_blank.run(notebook, tmp_path))


def test_the_blank_sample_fails_where_it_must(stored, tmp_path, monkeypatch, offline):
    copied = blank(stored)
    one, two = (exercise.check_at for exercise in exercises(stored))
    assert run_blank.graded(copied) == {one: "NotDone", two: "NotDone"}
    assert ran(copied, tmp_path, monkeypatch) == run_blank.graded(copied)


def test_a_blank_that_keeps_its_promise_badly_is_seen(
    stored, tmp_path, monkeypatch, offline
):
    """A later cell that needs an answer; a check that no blank could fail."""
    bad = copy.deepcopy(stored)
    one, two = (exercise.check_at for exercise in exercises(bad))
    bad.cells[one].source = "print()"
    bad.cells[-1].source += "\nmy_twice(1)"
    found = ran(blank(bad), tmp_path, monkeypatch)
    assert found == {two: "NotDone", len(bad.cells) - 1: "NotImplementedError"}
    assert found != run_blank.graded(bad)
