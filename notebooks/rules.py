"""The rules of the house for notebooks, as functions that raise AssertionError.

    rule(notebook, text)    the stored notebook, and what its text form makes of it

build.py writes no notebook that breaks one; test_notebooks.py holds every stored
notebook to them, and shows every rule a notebook that breaks it. TEXT_RULES need no
outputs: they also judge a text form that has not been run.
"""

import ast
import re
from itertools import pairwise
from pathlib import Path

import nbformat

from peft_from_scratch.common.digest import digest
from peft_from_scratch.common.provenance import ROOT
from peft_from_scratch.course.exercises import (
    RECORD,
    SOLUTION,
    blanked,
    exercises,
    tags,
)
from peft_from_scratch.ledger import verdicts as ledger

RESULTS = ROOT / "data" / "results"
LARGEST = 500_000  # bytes
LONGEST_LINE, LONGEST_CELL, MOST_CODE = 88, 25, 360  # characters, lines, lines
CELLS, FIRST_CELLS = (45, 70), (25, 80)  # least, most; in the lesson that starts
WORDS, FIRST_WORDS = (1_600, 3_400), (900, 3_600)
WORDS_A_LINE = (5, 14)  # of code
EXERCISES, STUB = (3, 5), (2, 20)  # in a lesson; lines
MARK = "nbval-check-output"  # a tag of cells whose printed words nbval compares
WIDGET = "application/vnd.jupyter.widget-view+json"
NUMBER = r"(?:\d[\d.,]*\d|\d)"
PRIVATE = re.compile(r"(?<![\w.:/~])/(?:work|tmp|home|root|opt|Users)/|\b[A-Z]:\\")
NOTEBOOKS = re.compile(r"\b[Nn]otebooks?\s+\d\d(?:(?:,|,?\s+and|\s+to)\s+\d\d)*")
START = re.compile(r'^lesson = start\("(\d\d)"', re.MULTILINE)
DETAILS = re.compile(
    r"<details>\s*<summary>(?P<said>.*?)</summary>(?P<body>.*?)</details>", re.DOTALL
)
VERDICT = r"lesson\.verdict\(\"(\w+)\""
PREDICTION = r"lesson\.predict\(\s*\"([\d.]+)\",\s*(.*?,.*?,)"
COUNTED = "one two three four five".split()
STATED = re.compile(
    r"Difficulty (one|two|three|four|five) of five, "
    r"importance (one|two|three|four|five) of five,\s+about [a-z -]+ minutes?\."
)


# --------------------------------------------------------------------- What is where


def cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def outputs(notebook):
    return [output for cell in cells(notebook, "code") for output in cell.outputs]


def printed(outputs):
    """What the outputs say in words."""
    texts = [output.get("text", "") for output in outputs]
    texts += [output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join(texts)


def markdown(notebook):
    return "\n\n".join(cell.source for cell in cells(notebook, "markdown"))


def prose(notebook):
    """The markdown without code, equations, links and what only counts things."""
    text = re.sub(r"^```.*?^```", "", markdown(notebook), flags=re.M | re.DOTALL)
    text = re.sub(r"`[^`]*`|\$\$[^$]*\$\$|\$[^$]*\$", " ", text)
    text = re.sub(r"<[^>]*>|\[[^][]*\]\([^)]*\)|arXiv:\S+", " ", text)
    return re.sub(r"^\**\d+\.(?= )", "", text, flags=re.MULTILINE)


def source(notebook):
    return "\n".join(cell.source for cell in cells(notebook, "code"))


def number(notebook):
    """The lesson's number, as its start cell has it."""
    found = START.findall(source(notebook))
    assert len(found) == 1, 'one cell says lesson = start("04")'
    return found[0]


def section(notebook, title):
    """The markdown under a heading, up to the next of its level or above."""
    found = re.search(
        rf"^(?P<marks>#+) {title}\b.*?(?=^#{{1,6}} |\Z)",
        markdown(notebook),
        re.M | re.S,
    )
    return found[0] if found else ""


# ---------------------------------------------------------------------- What was run


def agrees(notebook, text):
    """The stored cells are those of the text form, with what its tags say."""

    def seen(book):
        return [
            (c.cell_type, c.source, tags(c), c.metadata.get("nbgrader"), c.id)
            for c in book.cells
        ]

    assert seen(notebook) == seen(text), "build it again: make notebooks"


def was_run(notebook, text):
    """Every code cell once, in order, without an error."""
    counts = [cell.execution_count for cell in cells(notebook, "code")]
    assert counts == list(range(1, len(counts) + 1)), counts
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text


def has_no_widget(notebook, text):
    """Code hosts do not draw a notebook that has a widget's name without its state."""
    assert "widgets" not in notebook.metadata
    assert not any(WIDGET in output.get("data", {}) for output in outputs(notebook))


def digests(paths):
    """{path from the top folder: digest} of the results files among these paths."""
    resolved = {Path(path).resolve() for path in paths}
    files = sorted(f for f in resolved if f.is_relative_to(RESULTS) and f.is_file())
    return {
        file.relative_to(ROOT).as_posix(): digest(file.read_bytes().hex())
        for file in files
    }


def has_read_what_is_there(notebook, text):
    """The results that its stored outputs were made from have not changed since."""
    reads = notebook.metadata.get(RECORD, {}).get("reads")
    assert reads is not None, "no record of what it read: build it again"
    now = digests(ROOT / name for name in reads)
    stale = [name for name, known in reads.items() if now.get(name) != known]
    assert not stale, f"{', '.join(stale)} changed: build it again"


def is_small(notebook, text):
    size = len(nbformat.writes(notebook).encode())
    assert size < LARGEST, f"{size} bytes"


def is_marked(cell):
    """Whether nbval compares what the cell prints with what is stored."""
    return MARK in cell.metadata.get("tags", [])


def compares_words(notebook, text):
    """Every cell that is held to its stored words has some."""
    marked = filter(is_marked, cells(notebook, "code"))
    assert all(printed(cell.outputs).strip() for cell in marked)


def has_words_for_images(notebook, text):
    """Alternative text on every image, and its finding printed after it."""
    for cell in cells(notebook, "markdown"):
        assert not re.search(r"!\[\s*\]\(|<img(?![^>]*alt=\"[^\"])", cell.source)
    for cell in cells(notebook, "code"):
        for i, output in enumerate(cell.outputs):
            for kind in output.get("data", {}):
                if kind.startswith("image/"):
                    assert output.metadata.get(kind, {}).get("alt"), cell.source
                    assert printed(cell.outputs[i + 1 :]).strip(), cell.source


def names_no_private_path(notebook, text):
    said = [cell.source for cell in notebook.cells] + [printed(outputs(notebook))]
    found = PRIVATE.search("\n".join(said))
    assert not found, found
    assert "path" not in notebook.metadata.get("kernelspec", {})


def states_only_numbers_that_cells_show(notebook, text):
    """A number in prose stands in code or was printed, or it could go stale."""
    known = {exercise.id for exercise in exercises(notebook)}
    shown = source(notebook) + printed(outputs(notebook))
    words = NOTEBOOKS.sub("", prose(notebook))
    stated = set(re.findall(rf"(?<![\w.-]){NUMBER}(?![\w-])", words))
    stale = stated - set(re.findall(NUMBER, shown)) - known
    assert not stale, f"{sorted(stale)}: print them, write them as words or as `code`"


# -------------------------------------------------------------------- How it is written


def is_compared(notebook, text):
    """At least one cell is held to its stored words, by its tag."""
    assert any(map(is_marked, cells(notebook, "code")))
    assert "NBVAL_" not in source(notebook), f"use the tag {MARK}, which readers skip"


def has_ordered_headings(notebook, text):
    headings = re.findall(r"^(#+) \S", prose(notebook), re.MULTILINE)
    levels = [len(marks) for marks in headings]
    assert levels[:1] == [1] and levels.count(1) == 1, levels
    assert all(b <= a + 1 for a, b in pairwise(levels))


def has_short_code(notebook, text):
    sources = [cell.source.splitlines() for cell in cells(notebook, "code")]
    for line in (line for lines in sources for line in lines):
        assert len(line) <= LONGEST_LINE, line
    for lines in sources:
        assert len(lines) <= LONGEST_CELL, f"{len(lines)} lines:\n{lines[0]}"
    assert sum(map(len, sources)) <= MOST_CODE, sum(map(len, sources))


def opens_with_its_aims(notebook, text):
    """The title cell says what is needed, four to six aims, and the ten-minute path."""
    opening = notebook.cells[0]
    assert opening.cell_type == "markdown" and opening.source.startswith("# ")
    assert "**You need**" in opening.source
    assert re.search(r"\bten[ -]minutes?\b", opening.source)
    _, _, after = opening.source.partition("**At the end you can**")
    aims = re.findall(r"^[-*] ", after, re.MULTILINE)
    assert 4 <= len(aims) <= 6, f"{len(aims)} aims"


def starts_and_ends(notebook, text):
    """start() is the second cell, and the last code is the receipt; nothing asks."""
    number(notebook)
    assert START.search(notebook.cells[1].source), "the second cell calls start()"
    assert cells(notebook, "code")[-1].source == "lesson.receipt()"
    asking = r"\binput\(|\bpip install|^\s*[%!]|\blogin\("
    assert not re.search(asking, source(notebook), re.MULTILINE)


def has_lesson_size(notebook, text):
    first = number(notebook) == "00"
    words = len(prose(notebook).split())
    lines = len(source(notebook).splitlines())
    sizes = {
        "cells": (len(notebook.cells), FIRST_CELLS if first else CELLS),
        "words": (words, FIRST_WORDS if first else WORDS),
        "words for a line of code": (words / lines, WORDS_A_LINE),
        "exercises": (len(exercises(notebook)), EXERCISES),
    }
    wrong = [
        f"{count:.4g} {what} ({least} to {most} are allowed)"
        for what, (count, (least, most)) in sizes.items()
        if not least <= count <= most
    ]
    assert not wrong, ", ".join(wrong)


def guesses_before_it_measures(notebook, text):
    """A guess has no default, and is followed by its measurement in another cell."""
    said = re.findall(r"lesson\.(predict|measured)\(\s*\"([\d.]+)\"", source(notebook))
    assert said, "no lesson.predict"
    for id in {id for _, id in said}:
        order = [verb for verb, name in said if name == id]
        assert order == ["predict", "measured"], f"{id}: {order}"
    for cell in cells(notebook, "code"):
        for id, ends in re.findall(PREDICTION, cell.source):
            assert ends.split() == ["low=None,", "high=None,"], f"{id} has a default"
            assert ".measured(" not in cell.source, (
                f"{id} is measured where it is guessed"
            )


def tries_its_claims(notebook, text):
    """A verdict cell for each claim of this notebook, judged live in the cell above."""
    code = cells(notebook, "code")
    claims = {c.id for c in ledger.CLAIMS.values() if c.notebook == number(notebook)}
    verdicts = re.findall(VERDICT, source(notebook))
    assert sorted(verdicts) == sorted(claims), f"{verdicts} of the claims {claims}"
    for before, cell in pairwise(code):
        for id in re.findall(VERDICT, cell.source):
            alone = re.fullmatch(rf"{VERDICT}(, guess=\"[\d.]+\")?\)", cell.source)
            assert alone and is_marked(cell), cell.source
            assert f'lesson.live("{id}"' in before.source, f"{id}: not live just before"


# -------------------------------------------------------------------------- Exercises


def has_sound_exercises(notebook, text):
    """Each exercise: what is asked, three hints, a stub, its check right below."""
    found = exercises(notebook)
    assert found, "no exercise"
    for exercise in found:
        about, cell = notebook.cells[exercise.at - 1], notebook.cells[exercise.at]
        told = f"exercise {exercise.id}"
        assert exercise.id.partition(".")[0] == str(int(number(notebook))), told
        assert about.cell_type == "markdown" and cell.cell_type == "code", told
        asked = section_of(about, exercise.id)
        assert len(STATED.findall(" ".join(asked.split()))) == 1, f"{told}: {STATED}"
        assert hints(asked) == ["one", "two", "three"], f"{told}: {hints(asked)}"
        assert exercise.check_at == exercise.at + 1, f"{told}: its check is not below"
        assert exercise.points > 0, f"{told}: no points"
        assert re.search(r"\bchecks\.\w+\(", exercise.check), f"{told}: checks nothing"
        assert SOLUTION.search(exercise.code), f"{told}: no solution between marks"
        for solution in SOLUTION.finditer(exercise.code):
            assert solution["indent"], f"{told}: the solution is not in a function"
        stub = blanked(exercise.code, exercise.id).strip().splitlines()
        assert STUB[0] <= len(stub) <= STUB[1], f"{told}: {len(stub)} lines of stub"
    marked = [i for i, c in enumerate(notebook.cells) if "### BEGIN SOL" in c.source]
    assert marked == [exercise.at for exercise in found], "a solution without a tag"
    checked = [i for i, c in enumerate(notebook.cells) if _tagged(c, "check-")]
    assert checked == [exercise.check_at for exercise in found], "a check too many"


def section_of(cell, id):
    """What follows the exercise's own heading in its markdown cell."""
    parts = re.split(rf"^#+ Exercise {re.escape(id)}: .*$", cell.source, flags=re.M)
    assert len(parts) == 2, f"exercise {id}: no heading `Exercise {id}: …` above it"
    return parts[1]


def hints(asked):
    """Which hints there are, in order: "one", "two", …"""
    found = [
        re.match(r"Hint (\w+)\b", m["said"].strip()) for m in DETAILS.finditer(asked)
    ]
    return [match[1] for match in found if match]


def needs_no_answer_to_go_on(notebook, text):
    """No later cell uses what an exercise defines, but for its own check.

    lesson.mine(answer, otherwise) may ask for it: it does without.
    """
    for exercise in exercises(notebook):
        made = names(exercise.code)[0]
        for at, cell in enumerate(notebook.cells):
            if cell.cell_type == "code" and at not in (exercise.at, exercise.check_at):
                code = re.sub(r"lesson\.mine\(\w+, ", "lesson.mine(", cell.source)
                used = made & (names(code)[1] | names(code)[0])
                assert not used, f"{sorted(used)} of exercise {exercise.id} in another"


def names(code):
    """(what a cell defines at its top, every name that it uses)"""
    tree = ast.parse(
        "\n".join(re.sub(r"^\s*[%!].*", "", li) for li in code.split("\n"))
    )
    made = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            made |= {n.id for n in ast.walk(statement) if _is_stored(n)}
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    return made, used - made


def has_a_quiz(notebook, text):
    """Five questions, each with options of which exactly one is right."""
    quiz = section(notebook, "Quiz")
    questions = re.split(r"^\*\*(\d)\. ", quiz, flags=re.MULTILINE)[1:]
    assert questions[::2] == list("12345"), f"questions {questions[::2]}"
    for which, question in zip(questions[::2], questions[1::2], strict=True):
        said = [match["body"].strip() for match in DETAILS.finditer(question)]
        right = [body for body in said if body.startswith("Right.")]
        others = [body for body in said if body.startswith("No.")]
        assert len(right) == 1, f"question {which}: {len(right)} are right"
        assert len(said) >= 3, f"question {which}: {len(said)} options"
        assert len(others) == len(said) - 1, f"question {which}: neither Right. nor No."
        assert all(len(body.split()) > 3 for body in said), f"question {which}: no why"


def has_whole_details(notebook, text):
    """Every block that opens also closes, and has a blank line before its markdown."""
    for cell in cells(notebook, "markdown"):
        opened, closed = cell.source.count("<details>"), cell.source.count("</details>")
        assert opened == closed == len(DETAILS.findall(cell.source)), cell.source
        for block in DETAILS.finditer(cell.source):
            whole = block["body"].startswith("\n\n") and block["body"].endswith("\n\n")
            assert whole, f"no blank line around the body of {block['said']!r}"


def _tagged(cell, start):
    return any(tag.startswith(start) for tag in tags(cell))


def _is_stored(node):
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


TEXT_RULES = (
    is_compared,
    has_ordered_headings,
    has_short_code,
    opens_with_its_aims,
    starts_and_ends,
    has_lesson_size,
    guesses_before_it_measures,
    tries_its_claims,
    has_sound_exercises,
    needs_no_answer_to_go_on,
    has_a_quiz,
    has_whole_details,
)
RULES = (
    agrees,
    was_run,
    has_no_widget,
    has_read_what_is_there,
    is_small,
    compares_words,
    has_words_for_images,
    names_no_private_path,
    states_only_numbers_that_cells_show,
    *TEXT_RULES,
)


def broken(rules, notebook, text):
    """What the rules say against a notebook, a line each."""
    said = []
    for rule in rules:
        try:
            rule(notebook, text)
        except AssertionError as error:
            why = str(error).partition("\nassert")[0] or (rule.__doc__ or "")
            said.append(f"{rule.__name__}: {why}".splitlines()[0])
        except (LookupError, ArithmeticError, SyntaxError) as error:
            said.append(f"{rule.__name__}: cannot even be judged, {error!r}")
    return said
