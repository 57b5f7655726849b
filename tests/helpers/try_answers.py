"""Wrong answers to every exercise, and whether its check refuses each.

    python tests/helpers/try_answers.py [START …]   of notebooks whose names start so
    python tests/helpers/try_answers.py --write     all; and notebooks/EXERCISES.md

tests/wrong_answers/<name>.py has, for the exercises of notebooks/NN_<name>.py,

    MUTANTS    {"4.1": {"no division by r": source of the exercise's cell, …}, …}
    PREAMBLE   source that runs before it, if the cells need more than NAMES (optional)
    ATTACKS    {"4.1": {class of input: {name: source or Attack} or why there is none}}
    ALSO_RIGHT the same, for answers that must pass (both optional; see attacks.py)

The right answer is the notebook's own. Some wrong ones are made here, for every
exercise: the solution left out, and, of a function, its first argument back.
"""

import ast
import importlib.util
import linecache
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, as in conftest.py
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "notebooks")] * (__name__ == "__main__")

import build
from attacks import CLASSES

import peft_from_scratch as pfs
from peft_from_scratch.common.atomic import new_file
from peft_from_scratch.course.checks import NotDone, Wrong
from peft_from_scratch.course.exercises import (
    HIDDEN,
    SOLUTION,
    Exercise,
    blanked,
    exercises,
)

TABLE = ROOT / "notebooks" / "EXERCISES.md"
NAMES = dict(torch=torch, math=math, nn=nn, F=F, np=np, pfs=pfs)
FEWEST = 4  # wrong answers that an exercise's author has thought of
ZEROS = "all zeros"
NOTHING, INPUT = "nothing at all", "its first argument back"


@dataclass(frozen=True)
class Lesson:
    """A notebook with exercises, and the wrong answers to them."""

    text: Path
    mutants: Path
    checks: ModuleType
    exercises: tuple[Exercise, ...]
    titles: dict[str, str]
    wrong: dict[str, dict[str, str]]  # exercise -> name -> source of its cell
    preamble: str = field(repr=False)
    attacks: dict = field(repr=False, default_factory=dict)  # exercise -> class -> …
    right: dict = field(repr=False, default_factory=dict)  # … name -> source, or why

    def run(self, exercise: Exercise, source: str, check: str) -> None:
        """The source of an exercise's cell, then that of its check, on their own."""
        names = dict(NAMES, checks=self.checks, __name__="__main__")
        exec(_compiled(self.preamble, "preamble"), names)
        exec(_compiled(source, f"answer to {exercise.id}"), names)
        exec(_compiled(check, f"check of {exercise.id}"), names)

    def judge(self, exercise: Exercise, source: str) -> Wrong | None:
        """What the check says of an answer, its hidden tests left out."""
        try:
            self.run(exercise, source, HIDDEN.sub("", exercise.check))
        except Wrong as wrong:
            return wrong
        return None

    def untouched(self, exercise: Exercise) -> NotDone | None:
        """What the check says of the blank."""
        try:
            self.run(exercise, blanked(exercise.code, exercise.id), exercise.check)
        except NotDone as reminder:
            return reminder
        return None


def _compiled(source: str, name: str):
    """Compiled as a cell is, whose source can be asked for: Triton reads a kernel's."""
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    return compile(source, name, "exec")


@lru_cache
def lesson(text: Path, mutants: Path | None = None) -> Lesson:
    """The lesson of a text form, with the wrong answers of the same name."""
    name = text.stem[3:]
    mutants = mutants or ROOT / "tests" / "wrong_answers" / f"{name}.py"
    module = load(mutants)
    notebook = build.notebook_of(text)
    all_exercises = tuple(exercises(notebook))
    titles = {e.id: title(notebook.cells[e.at - 1].source, e.id) for e in all_exercises}
    given = module.MUTANTS
    attacks, right = (
        {e.id: by_class(e, getattr(module, name, {})) for e in all_exercises}
        for name in ("ATTACKS", "ALSO_RIGHT")
    )
    wrong = {
        e.id: {**given.get(e.id, {}), **flat(attacks[e.id]), **common(e)}
        for e in all_exercises
    }
    assert set(given) <= set(wrong), f"{mutants.name}: {set(given) - set(wrong)}?"
    preamble = getattr(module, "PREAMBLE", "")
    return Lesson(
        text,
        mutants,
        module.checks,
        all_exercises,
        titles,
        wrong,
        preamble,
        attacks,
        right,
    )


def by_class(exercise: Exercise, table: dict) -> dict:
    """{class of input: {name: source of the cell}, or why there is none}"""
    return {
        kind: answers
        if isinstance(answers, str)
        else {
            name: answer if isinstance(answer, str) else answer(exercise.code)
            for name, answer in answers.items()
        }
        for kind, answers in table.get(exercise.id, {}).items()
    }


def flat(classes: dict) -> dict[str, str]:
    """The answers of all classes, by name."""
    tables = [answers for answers in classes.values() if not isinstance(answers, str)]
    names = [name for answers in tables for name in answers]
    assert len(set(names)) == len(names), f"two of one name: {sorted(names)}"
    return {name: source for answers in tables for name, source in answers.items()}


def lessons() -> list[Lesson]:
    """Every notebook whose exercises have mutants."""
    names = {path.stem for path in (ROOT / "tests" / "wrong_answers").glob("*.py")}
    texts = sorted(build.FOLDER.glob(build.TEXTS))
    return [lesson(text) for text in texts if text.stem[3:] in names]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mutants_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def title(asked: str, id: str) -> str:
    start = f"Exercise {id}: "
    titles = [line.partition(start)[2] for line in asked.splitlines() if start in line]
    return titles[-1] if titles else "?"


def common(exercise: Exercise) -> dict[str, str]:
    """Wrong answers that need no author."""
    answers = {NOTHING: SOLUTION.sub(r"\g<indent>pass", exercise.code)}
    solved = [
        node
        for node in ast.walk(ast.parse(answers[NOTHING]))
        if isinstance(node, ast.FunctionDef)
        and isinstance(node.body[-1], ast.Pass | ast.Return)
    ]
    if len(solved) == 1 and len(SOLUTION.findall(exercise.code)) == 1:
        arguments = [a.arg for a in solved[0].args.args if a.arg != "self"]
        if arguments:
            back = rf"\g<indent>return {arguments[0]}"
            answers[INPUT] = SOLUTION.sub(back, exercise.code)
    return answers


def survivors(lesson: Lesson) -> Iterator[str]:
    """What is wrong with a lesson's checks and mutants, a line each."""
    for exercise in lesson.exercises:
        wrong = lesson.wrong[exercise.id]
        where = f"{lesson.text.name}, exercise {exercise.id}"
        refusal = lesson.judge(exercise, exercise.code)
        if refusal is not None:
            yield f"{where}: its own solution is refused\n{refusal}"
        for name, source in wrong.items():
            if lesson.judge(exercise, source) is None:
                yield f"{where}: {name!r} passes"
        for name, source in flat(lesson.right[exercise.id]).items():
            refusal = lesson.judge(exercise, source)
            if refusal is not None:
                yield f"{where}: {name!r} is right, and refused\n{refusal}"
        if len(set(wrong) - {NOTHING, INPUT}) < FEWEST or ZEROS not in wrong:
            yield f"{where}: at least {FEWEST} are needed, one of them {ZEROS!r}"


def table(lessons: list[Lesson]) -> str:
    """Every exercise, its check and the wrong answers that it refuses, as Markdown."""
    rows = [
        f"| {e.id} {each.titles[e.id]} | {checked(e)} | {', '.join(each.wrong[e.id])} |"
        for each in lessons
        for e in each.exercises
    ]
    wrong = sum(len(w) for each in lessons for w in each.wrong.values())
    return "\n".join(
        [
            "# Exercises and their mutants",
            "",
            "A check that passes wrong answers teaches them. So every exercise has",
            "named wrong answers, *mutants*, and `make test` demands that its check",
            "refuses each of them and passes the solution.",
            "Written by `.venv/bin/python tests/helpers/try_answers.py --write`.",
            "",
            f"{len(rows)} exercises, {wrong} mutants, all refused.",
            "",
            "| exercise | its check | mutants, each refused |",
            "|---|---|---|",
            *rows,
            "",
            "## By class of input",
            "",
            "`peft_from_scratch/course/checks/CHECKLIST.md` says what the classes are.",
            "In each place: mutants, all refused / other right answers, all passed.",
            "",
            *class_table(lessons),
            "",
        ]
    )


def class_table(lessons: list[Lesson]) -> list[str]:
    """Exercises x classes of input: mutants refused, right answers passed; Markdown."""
    rows, reasons = [], []
    for each in lessons:
        for e in each.exercises if any(each.attacks.values()) else ():
            counts = []
            for kind in CLASSES:
                wrong = each.attacks[e.id][kind]
                if isinstance(wrong, str):
                    counts.append("none")
                    reasons.append(f"- {e.id}, {kind}: {wrong}")
                else:
                    counts.append(f"{len(wrong)} / {len(each.right[e.id][kind])}")
            rows.append(f"| {e.id} | {' | '.join(counts)} |")
    return [
        f"| exercise | {' | '.join(CLASSES)} |",
        f"|---|{'---|' * len(CLASSES)}",
        *rows,
        "",
        "Where a class does not apply, and why:",
        "",
        *reasons,
    ]


def checked(exercise: Exercise) -> str:
    """The functions that its check cell calls."""
    return ", ".join(f"`{name}`" for name in called(exercise.check))


def called(check: str) -> list[str]:
    """The names of `checks` that a check cell calls."""
    nodes = [n.func for n in ast.walk(ast.parse(check)) if isinstance(n, ast.Call)]
    attributes = [n for n in nodes if isinstance(n, ast.Attribute)]
    return [a.attr for a in attributes if getattr(a.value, "id", None) == "checks"]


def main(arguments: list[str]) -> int:
    write = "--write" in arguments
    starts = tuple(a for a in arguments if not a.startswith("-")) or ("",)
    chosen = [each for each in lessons() if each.text.name.startswith(starts)]
    faults = [line for each in chosen for line in survivors(each)]
    for each in chosen:
        count = sum(map(len, each.wrong.values()))
        print(f"{each.text.name}: {len(each.exercises)} exercises, {count} mutants")
    print(*faults, sep="\n")
    if write and not faults:
        with new_file(TABLE) as new:
            new.write_text(table(lessons()), "utf-8")
    return int(bool(faults))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
