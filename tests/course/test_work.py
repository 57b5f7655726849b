"""A learner's copies: made blank, never overwritten, restored one at a time."""

import contextlib
import os
import re
import shutil
import types
from pathlib import Path

import nbformat
import pytest
from planting import assert_caught

from peft_from_scratch.cli.command_line import main
from peft_from_scratch.common import atomic
from peft_from_scratch.course import exercises
from peft_from_scratch.course.exercises import blank, blanked, grading

HERE = Path(__file__).parents[1]
SAMPLE = HERE / "sample" / "90_sample.ipynb"
REAL = sorted((HERE.parent / "notebooks").glob(exercises.NAMES))
FUNCTION = """\
def f(x):
    y = 1
    ### BEGIN SOLUTION
    if x:
        y = 2
    ### END SOLUTION
    return y"""


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course of two notebooks, 07 and 90, and its empty work folder."""
    notebooks, work = tmp_path / "notebooks", tmp_path / "work"
    notebooks.mkdir()
    for name in ("90_sample.ipynb", "07_other.ipynb"):
        shutil.copy(SAMPLE, notebooks / name)
    monkeypatch.setattr(exercises, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(exercises, "WORK", work)
    return work


def said(capsys, *arguments):
    """(exit status, what was printed, what was complained of)"""
    status = main(["work", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def write_in(path, old, new):
    """What a learner does, as their editor saves it."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace(old, new)
    nbformat.write(notebook, path)


def begin(path, exercise="90.1"):
    old = f'raise NotImplementedError("exercise {exercise}: your code here")'
    write_in(path, old, "return x + x")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------- Blanks


def test_a_solution_becomes_a_reminder_at_its_indentation():
    assert blanked(FUNCTION, "1.2") == (
        "def f(x):\n    y = 1\n"
        '    raise NotImplementedError("exercise 1.2: your code here")\n'
        "    return y"
    )
    two = FUNCTION + "\n\n\n" + FUNCTION
    assert blanked(two, "1.2").count("raise") == 2
    assert blanked("x = 1", None) == "x = 1"


def test_hidden_tests_go():
    source = "f(1)\n### BEGIN HIDDEN TESTS\nassert 1\n### END HIDDEN TESTS\nf(2)"
    assert blanked(source, None) == "f(1)\n\nf(2)"
    assert blanked(source.removeprefix("f(1)\n").removesuffix("\nf(2)"), None) == ""


@pytest.mark.parametrize(
    "broken",
    [
        FUNCTION.replace("    ### END SOLUTION\n", ""),
        FUNCTION.replace("    ### BEGIN SOLUTION\n", ""),
        FUNCTION.replace("    ### END SOLUTION", "### END SOLUTION"),
        FUNCTION.replace("### END SOLUTION", "### END HIDDEN TESTS"),
        "### BEGIN HIDDEN TESTS\nassert True",
    ],
)
def test_a_mark_without_its_partner_gives_no_solution_away(broken):
    with pytest.raises(ValueError, match="has no partner"):
        blanked(broken, "1.2")


@pytest.mark.parametrize("path", [SAMPLE, *REAL], ids=lambda path: path.stem)
def test_a_blank_has_neither_solutions_nor_outputs(path):
    source = nbformat.read(path, as_version=4)
    copied = blank(source)
    text = nbformat.writes(copied)
    nbformat.validate(copied)
    assert "SOLUTION" not in text and "HIDDEN" not in text
    for exercise in exercises.exercises(source):
        for solution in exercises.SOLUTION.finditer(exercise.code):
            body = "\n".join(solution[0].splitlines()[1:-1])
            assert body not in copied.cells[exercise.at].source
    for cell in copied.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    graded = [exercise.check_at for exercise in exercises.exercises(source)]
    touched = {*graded, *(exercise.at for exercise in exercises.exercises(source))}
    for at, (before, after) in enumerate(zip(source.cells, copied.cells, strict=True)):
        if before.cell_type == "code" and at not in touched:
            assert after.source == before.source
        assert after.metadata == before.metadata
    assert source == nbformat.read(path, as_version=4), "the original was changed"


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_links_of_a_blank_lead_to_files_from_the_work_folder(path):
    copied = blank(nbformat.read(path, as_version=4))
    text = "\n".join(c.source for c in copied.cells if c.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", text):
        if not re.match(r"[a-z]+:", target):  # work/ need not be there
            assert Path(os.path.normpath(exercises.WORK / target)).exists(), target


def test_links_are_those_of_the_work_folder():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("")])
    notebook.cells[0].source = (
        "[a](04_lora.ipynb), [b\nc](a.png#x), [d](../README.md), [e](https://f.g/h), "
        "[i](#j), [k](mailto:l), ![m](n/o.svg), [`p`](q.py), `r[s](t)`"
    )
    assert blank(notebook).cells[0].source == (
        "[a](../notebooks/04_lora.ipynb), [b\nc](../notebooks/a.png#x), "
        "[d](../README.md), [e](https://f.g/h), [i](#j), [k](mailto:l), "
        "![m](../notebooks/n/o.svg), [`p`](../notebooks/q.py), `r[s](t)`"
    )


def test_grading_data_follow_the_tags():
    def cell(*tags):
        return nbformat.v4.new_code_cell(metadata={"tags": list(tags)})

    assert grading(cell()) is None and grading(cell("other")) is None
    answer, check = (
        grading(cell("exercise-4.1")),
        grading(cell("check-4.1", "points-3")),
    )
    assert (answer["solution"], answer["grade"], answer["locked"]) == (
        True,
        False,
        False,
    )
    assert (check["solution"], check["grade"], check["locked"]) == (False, True, True)
    assert check["points"] == 3 and "points" not in answer
    assert answer["grade_id"] == "exercise-4-1" and check["grade_id"] == "check-4-1"
    assert all(re.fullmatch(r"[\w-]+", each["grade_id"]) for each in (answer, check))


# ---------------------------------------------------------------------------- Copies


def test_all_copies_are_made_or_one(course, capsys):
    status, out, _ = said(capsys, "7")
    assert status == 0 and set(files(course)) == {"07_other.ipynb"}
    status, out, _ = said(capsys)
    assert set(files(course)) == {"07_other.ipynb", "90_sample.ipynb"}
    assert re.search(r"07_other.ipynb +untouched\n", out)
    assert re.search(r"90_sample.ipynb +made now\n", out)


def test_what_a_learner_wrote_is_told_and_never_overwritten(course, capsys):
    said(capsys)
    begin(course / "90_sample.ipynb")
    before = files(course)
    for arguments in ((), ("90",), ("07",)):
        status, out, _ = said(capsys, *arguments)
        assert status == 0 and files(course) == before
    _, out, _ = said(capsys)
    assert re.search(r"07_other.ipynb +untouched\n", out)
    assert re.search(r"90_sample.ipynb +yours: 1 of 2 exercises begun\n", out)


def test_running_a_copy_or_making_notes_is_told_apart(course, capsys):
    """Outputs are no change of the learner's; a note is, with no exercise begun."""
    said(capsys)
    mine = course / "90_sample.ipynb"
    notebook = nbformat.read(mine, as_version=4)
    notebook.cells[1].execution_count = 1
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="x")]
    nbformat.write(notebook, mine)
    assert "90_sample.ipynb                    untouched" in said(capsys)[1]
    notebook.cells.append(nbformat.v4.new_markdown_cell("A note"))
    nbformat.write(notebook, mine)
    assert "yours: 0 of 2 exercises begun" in said(capsys)[1]


def test_restoring_one_keeps_the_old_beside_it_and_touches_no_other(course, capsys):
    said(capsys)
    for name in ("07_other.ipynb", "90_sample.ipynb"):
        begin(course / name)
    before = files(course)
    status, out, _ = said(capsys, "90", "--restore")
    after = files(course)
    (kept,) = set(after) - set(before)
    assert re.fullmatch(r"90_sample\.\d{4}-\d\d-\d\d-\d{6}\.ipynb", kept)
    assert after[kept] == before["90_sample.ipynb"]
    assert after["07_other.ipynb"] == before["07_other.ipynb"]
    assert b"your code here" in after["90_sample.ipynb"]
    assert after["90_sample.ipynb"] != before["90_sample.ipynb"]
    assert status == 0 and kept in out
    assert "yours" not in said(capsys, "90")[1]


def test_restoring_twice_in_a_second_keeps_both(course, capsys, monkeypatch):
    class Stopped(exercises.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 11, 24)

    monkeypatch.setattr(exercises, "datetime", Stopped)
    said(capsys, "90")
    for answer in range(3):
        write_in(course / "90_sample.ipynb", "## Idea", f"## Idea {answer}")
        said(capsys, "90", "--restore")
    kept = [name for name in files(course) if "2026" in name]
    assert len(kept) == 3
    notes = [b"Idea 0", b"Idea 1", b"Idea 2"]
    assert all(any(n in files(course)[k] for k in kept) for n in notes)


def test_restoring_what_is_not_there_makes_it(course, capsys):
    assert said(capsys, "90", "--restore")[0] == 0
    assert set(files(course)) == {"90_sample.ipynb"}


def test_restoring_without_a_number_says_what_to_do_and_does_nothing(course, capsys):
    said(capsys)
    begin(course / "90_sample.ipynb")
    before = files(course)
    status, _, complaint = said(capsys, "--restore")
    assert status == 1 and "work 04 --restore" in complaint
    assert files(course) == before


def test_an_unknown_number_is_said(course, capsys):
    for wrong in ("08", "0", "x", "90_sample/.."):
        status, _, complaint = said(capsys, wrong)
        assert status == 1 and "there are 07, 90" in complaint
    assert not course.exists()


def test_a_newer_notebook_is_told_and_the_copy_left_alone(course, capsys):
    said(capsys)
    before = files(course)
    write_in(exercises.NOTEBOOKS / "90_sample.ipynb", "## Idea", "## A better idea")
    _, out, _ = said(capsys)
    assert "untouched; the course has a newer one: work 90 --restore" in out
    begin(course / "90_sample.ipynb")
    assert "1 of 2 exercises begun; the course has a newer one" in said(capsys)[1]
    assert files(course)["07_other.ipynb"] == before["07_other.ipynb"]


def test_outputs_of_a_rebuilt_notebook_are_nothing_newer(course, capsys):
    said(capsys)
    original = exercises.NOTEBOOKS / "90_sample.ipynb"
    notebook = nbformat.read(original, as_version=4)
    notebook.cells[1].outputs = []
    nbformat.write(notebook, original)
    assert "newer" not in said(capsys)[1]


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_a_copy_that_cannot_be_read_is_left_alone(course, capsys, broken):
    course.mkdir()
    (course / "90_sample.ipynb").write_bytes(broken)
    status, out, _ = said(capsys)
    assert status == 0 and "left alone" in out
    assert files(course)["90_sample.ipynb"] == broken
    said(capsys, "90", "--restore")
    assert broken in files(course).values()


def test_a_disk_that_is_full_leaves_everything_as_it_was(course, capsys, monkeypatch):
    said(capsys)
    begin(course / "90_sample.ipynb")
    before = files(course)

    def full(notebook, path, **_):
        Path(path).write_text("half a not")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exercises.nbformat, "write", full)
    assert said(capsys, "90", "--restore")[0] == 1
    after = files(course)
    assert {name: after[name] for name in before} == before
    assert set(after.values()) == set(before.values())


def test_a_copy_of_somebody_else_is_no_copy(course, capsys):
    """Other files in work/ are nobody's business."""
    course.mkdir()
    (course / "notes.ipynb").write_text("mine")
    (course / "90_sample.2026-01-01-000000.ipynb").write_text("old")
    before = files(course)
    said(capsys)
    assert {name: files(course)[name] for name in before} == before


def test_without_the_repository_it_says_so(course, capsys, monkeypatch):
    monkeypatch.setattr(exercises, "NOTEBOOKS", course / "nowhere")
    status, _, complaint = said(capsys)
    assert status == 1 and "repository" in complaint


# --------------------------------------------------------------------------- planted


def test_planted_a_copy_is_made_anew(course, capsys):
    law = test_what_a_learner_wrote_is_told_and_never_overwritten
    right, wrong = "kept is not None or not mine.exists()", "True"
    assert_caught(exercises.work, right, wrong, lambda: law(course, capsys))


def test_planted_the_old_one_is_lost(course, capsys):
    law = test_restoring_one_keeps_the_old_beside_it_and_touches_no_other
    assert_caught(
        exercises._keep,
        "shutil.copyfile(mine, partial)",
        "partial.touch()",
        lambda: law(course, capsys),
    )


def test_planted_all_are_restored(course, capsys):
    law = test_restoring_without_a_number_says_what_to_do_and_does_nothing
    right, wrong = "if restore and number is None:", "if False:"
    assert_caught(exercises.work, right, wrong, lambda: law(course, capsys))


def test_planted_a_half_written_copy(course, capsys, monkeypatch):
    in_place = contextlib.nullcontext  # the file is written where it is
    bad = types.SimpleNamespace(new_file=in_place, sweep=atomic.sweep)
    course.mkdir()
    monkeypatch.setattr(exercises, "atomic", bad)
    law = test_a_disk_that_is_full_leaves_everything_as_it_was
    with pytest.raises(AssertionError):
        law(course, capsys, monkeypatch)


def test_planted_solutions_stay(course):
    assert_caught(
        exercises.blanked,
        'source = SOLUTION.sub(lambda m: m["indent"] + BLANK.format(id), source)',
        "pass",
        test_a_solution_becomes_a_reminder_at_its_indentation,
        errors=(AssertionError, ValueError),
    )
