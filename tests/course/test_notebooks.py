"""Notebooks: both forms agree, were run, teach in the agreed form, and read by all.

`make test` runs them as well, and compares what the tag nbval-check-output marks. Here
stands what that cannot see: the rules of notebooks/rules.py. Every rule is also shown a
lesson that breaks it, made from the sample.
"""

import copy
from functools import lru_cache
from pathlib import Path

import build
import nbformat
import pytest
import rules
import sample_lesson

from peft_from_scratch.course import cards
from peft_from_scratch.course.exercises import exercises
from peft_from_scratch.ledger import verdicts

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))
SAMPLE = Path(__file__).parents[1] / "sample" / "90_sample.py"
LONGEST = 90  # seconds of a lesson, imports included, where its card was measured
TAGGED = "### BEGIN SOLUTION\n    return x + x"


@lru_cache
def text_form(path):
    return build.notebook_of(path)


@lru_cache
def stored(path):
    return nbformat.read(path.with_suffix(".ipynb"), as_version=4)


def test_every_notebook_has_its_text_form():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_notebook(name, rule):
    path = FOLDER / f"{name}.py"
    rule(stored(path), text_form(path))


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_has_a_cost_card_and_keeps_to_its_time(name):
    card = cards.read(cards.FILE).get(name[:2])
    assert card, "it has no card: make notebooks"
    assert card.seconds <= LONGEST
    assert card.threads == 1, "measured with other threads than make test has"
    start = stored(FOLDER / f"{name}.py").cells[1]
    assert str(card) in rules.printed(start.outputs), "the stored start has another one"


def test_no_card_is_left_of_a_lesson_that_went():
    assert set(cards.read(cards.FILE)) <= {name[:2] for name in NAMES}


# --------------------------------------------------------------------------- Faults


@pytest.fixture(autouse=True)
def sample_size(request, monkeypatch):
    """The sample keeps every rule, at its own size and with its own claim."""
    if request.node.originalname != "test_notebook":
        monkeypatch.setattr(verdicts, "CLAIMS", {"S1": sample_lesson.CLAIM})
        monkeypatch.setattr(rules, "CELLS", (12, 22))
        monkeypatch.setattr(rules, "WORDS", (100, 600))
        monkeypatch.setattr(rules, "WORDS_A_LINE", (3, 20))
        monkeypatch.setattr(rules, "EXERCISES", (2, 3))


def good():
    return copy.deepcopy(stored(SAMPLE))


def holding(notebook, text):
    """The place of the first cell that has this text; there must be one."""
    return next(i for i, cell in enumerate(notebook.cells) if text in cell.source)


def edit(old, new):
    def fault(notebook):
        cell = notebook.cells[holding(notebook, old)]
        cell.source = cell.source.replace(old, new, 1)

    return fault


def drop(text):
    return lambda notebook: notebook.cells.pop(holding(notebook, text))


def put(at, source, kind=nbformat.v4.new_code_cell):
    """A new cell behind the one that holds `at`."""
    return lambda n: n.cells.insert(holding(n, at) + 1, kind(source))


def marked(source):
    return nbformat.v4.new_code_cell(source, metadata={"tags": [rules.MARK]})


def change(text, **fields):
    return lambda notebook: notebook.cells[holding(notebook, text)].update(fields)


def tag(text, *tags):
    def fault(notebook):
        notebook.cells[holding(notebook, text)].metadata["tags"] = list(tags)

    return fault


def both(*faults):
    return lambda notebook: [fault(notebook) for fault in faults]


def reads(files):
    def fault(notebook):
        notebook.metadata["peft_from_scratch"] = {"reads": files}

    return fault


def output(**data):
    def fault(notebook):
        drawing(notebook).outputs.append(nbformat.from_dict(data))

    return fault


def drawing(notebook):
    return notebook.cells[holding(notebook, "lesson.show(")]


def image(notebook):
    return next(
        o for o in drawing(notebook).outputs if "image/png" in o.get("data", {})
    )


def last_hint(asked):
    start = asked.index("<details><summary>Hint three")
    return asked[start : asked.index("</details>", start) + len("</details>")]


def hint(more):
    """The hints of the first exercise, changed from outside their text."""

    def fault(notebook):
        cell = notebook.cells[holding(notebook, "Exercise 90.1:")]
        third = last_hint(cell.source)
        cell.source = cell.source.replace(third, more(third))

    return fault


ERROR = dict(output_type="error", ename="E", evalue="", traceback=[])
STDERR = dict(output_type="stream", name="stderr", text="warning")
DRAWN = dict(output_type="display_data", data={rules.WIDGET: {}}, metadata={})
PATH = dict(output_type="stream", name="stdout", text="/home/me/x")
VERDICT = 'lesson.verdict("S1", guess="90.1")'
LIVE = 'lesson.live("S1", 6, 6, 6)'
STATED = "Difficulty one of five, importance one of five, about one minute."
OPENING = "# A sample lesson"
OPTION = (
    "\n<details><summary>Three</summary>\n\nNo. That is three times one.\n\n</details>"
)
FAULTS = {
    "another source": (rules.agrees, edit("print(2 * x)", "print(3 * x)")),
    "a cell too many": (rules.agrees, lambda n: n.cells.append(n.cells[0])),
    "a tag too many": (rules.agrees, tag(VERDICT, "skip")),
    "a lost tag": (rules.agrees, tag(TAGGED)),
    "other points": (
        rules.agrees,
        lambda n: n.cells[8].metadata.nbgrader.update(points=9),
    ),
    "no grading data": (rules.agrees, lambda n: n.cells[8].metadata.pop("nbgrader")),
    "another cell id": (rules.agrees, change(VERDICT, id="other")),
    "not run": (rules.was_run, change("print(2 * x)", execution_count=None)),
    "run twice": (rules.was_run, change("print(2 * x)", execution_count=12)),
    "an error": (rules.was_run, output(**ERROR)),
    "a warning": (rules.was_run, output(**STDERR)),
    "widget state": (rules.has_no_widget, lambda n: n.metadata.update(widgets={})),
    "a widget": (rules.has_no_widget, output(**DRAWN)),
    "large": (rules.is_small, edit(OPENING, OPENING + "x" * rules.LARGEST)),
    "nothing to compare": (rules.compares_words, change(VERDICT, outputs=[])),
    "a mute image": (
        rules.has_words_for_images,
        lambda n: image(n).update(metadata={}),
    ),
    "no words after": (
        rules.has_words_for_images,
        lambda n: drawing(n).outputs.pop(),
    ),
    "a mute link": (rules.has_words_for_images, edit("## Idea", "## Idea\n![](a.png)")),
    "a mute picture": (
        rules.has_words_for_images,
        edit("## Idea", '<img src="a.png">'),
    ),
    "a path in code": (
        rules.names_no_private_path,
        edit("print(2 * x)", "open('/home/me/x')"),
    ),
    "a path printed": (rules.names_no_private_path, output(**PATH)),
    "a stale number": (
        rules.states_only_numbers_that_cells_show,
        edit("Twice three is 6, as", "Twice three is 6.5, as"),
    ),
    "a stale number in a hint": (
        rules.states_only_numbers_that_cells_show,
        edit("What is added to what?", "What is added to 17?"),
    ),
    "a stale number after another's id": (
        rules.states_only_numbers_that_cells_show,
        edit("Do exercise 90.1.", "Do exercise 90.7."),
    ),
    "not compared": (rules.is_compared, tag(VERDICT)),
    "a mark for all to see": (
        rules.is_compared,
        edit("print(2 * x)", "# NBVAL_CHECK_OUTPUT"),
    ),
    "two titles": (rules.has_ordered_headings, edit("## Receipt", "# Receipt")),
    "a skipped level": (rules.has_ordered_headings, edit("## Receipt", "#### Receipt")),
    "a long line": (rules.has_short_code, edit("print(2 * x)", "x" * 89)),
    "a long cell": (rules.has_short_code, edit("print(2 * x)", "x\n" * 25)),
    "much code": (
        rules.has_short_code,
        both(*[put(VERDICT, "x\n" * 20)] * 18),
    ),
    "needs unsaid": (rules.opens_with_its_aims, edit("**You need**", "You need")),
    "three aims": (rules.opens_with_its_aims, edit("- open a hint.", "")),
    "seven aims": (
        rules.opens_with_its_aims,
        edit("- open a hint.", "- a\n- b\n- c\n- d"),
    ),
    "no ten-minute path": (
        rules.opens_with_its_aims,
        edit("ten minutes", "little time"),
    ),
    "a title that comes late": (
        rules.opens_with_its_aims,
        lambda n: n.cells.insert(0, nbformat.v4.new_markdown_cell("Hello")),
    ),
    "a late start": (rules.starts_and_ends, put(OPENING, "import torch")),
    "no start": (rules.starts_and_ends, edit('start("90", model="tiny")', "None")),
    "two starts": (rules.starts_and_ends, put(VERDICT, 'lesson = start("90")')),
    "no receipt": (rules.starts_and_ends, drop("lesson.receipt()")),
    "code after the receipt": (rules.starts_and_ends, put("lesson.receipt()", "x")),
    "a question": (rules.starts_and_ends, edit("print(2 * x)", "input('?')")),
    "pip": (rules.starts_and_ends, edit("print(2 * x)", "%pip install x")),
    "a shell": (rules.starts_and_ends, edit("print(2 * x)", "!ls")),
    "few cells": (
        rules.has_lesson_size,
        lambda n: n.cells.__delitem__(slice(3, 12)),
    ),
    "many words": (rules.has_lesson_size, edit("## Idea", "## Idea\n" + "word " * 900)),
    "few words": (rules.has_lesson_size, both(drop("## Quiz"), drop("Exercise 90.1:"))),
    "little prose": (rules.has_lesson_size, put(VERDICT, "x\n" * 99)),
    "few exercises": (rules.has_lesson_size, tag(TAGGED)),
    "not measured": (
        rules.guesses_before_it_measures,
        edit('lesson.measured("90.1", 6)', "6"),
    ),
    "no guess": (rules.guesses_before_it_measures, drop("lesson.predict(")),
    "a late guess": (
        rules.guesses_before_it_measures,
        both(
            drop("lesson.predict("),
            put(VERDICT, 'lesson.predict("90.1", low=None, high=None)'),
        ),
    ),
    "a guess of ours": (rules.guesses_before_it_measures, edit("low=None", "low=3")),
    "a guess in the cell that tells": (
        rules.guesses_before_it_measures,
        edit(
            'lesson.predict("90.1"', 'lesson.measured("90.1", 6)\nlesson.predict("90.1"'
        ),
    ),
    "nothing guessed at all": (
        rules.guesses_before_it_measures,
        both(drop("lesson.predict("), edit('lesson.measured("90.1", 6)', "6")),
    ),
    "results that have changed": (
        rules.has_read_what_is_there,
        reads({"data/results/compare.json": "0" * 16}),
    ),
    "results that have gone": (
        rules.has_read_what_is_there,
        reads({"data/results/none.json": "0" * 16}),
    ),
    "no record of results": (
        rules.has_read_what_is_there,
        lambda n: n.metadata.pop("peft_from_scratch"),
    ),
    "no verdict": (rules.tries_its_claims, drop(VERDICT)),
    "another's verdict": (
        rules.tries_its_claims,
        put(LIVE, 'lesson.verdict("L1")', marked),
    ),
    "a verdict that is not compared": (
        rules.tries_its_claims,
        tag(VERDICT),
    ),
    "more than a verdict": (
        rules.tries_its_claims,
        edit(VERDICT, f"{VERDICT}\nprint()"),
    ),
    "not live": (rules.tries_its_claims, edit(LIVE, "6")),
    "live too early": (rules.tries_its_claims, put(LIVE, "print()")),
    "another one live": (rules.tries_its_claims, edit(LIVE, LIVE.replace("S1", "L1"))),
    "no difficulty": (rules.has_sound_exercises, edit(STATED, "")),
    "a digit": (rules.has_sound_exercises, edit("about one minute", "about 1 minute")),
    "difficulty six": (
        rules.has_sound_exercises,
        edit("Difficulty one", "Difficulty six"),
    ),
    "no importance": (rules.has_sound_exercises, edit("importance one of five, ", "")),
    "no heading": (rules.has_sound_exercises, edit("Exercise 90.1: twice", "Twice")),
    "two hints": (rules.has_sound_exercises, hint(lambda third: "")),
    "four hints": (rules.has_sound_exercises, hint(lambda third: f"{third}\n{third}")),
    "a hint in the open": (
        rules.has_sound_exercises,
        hint(lambda third: "Hint three: `return x + …`"),
    ),
    "hints in disorder": (
        rules.has_sound_exercises,
        both(edit("Hint one:", "Hint 1:"), edit("Hint two:", "Hint one:")),
    ),
    "nothing above it": (rules.has_sound_exercises, drop("Exercise 90.1:")),
    "its check far below": (rules.has_sound_exercises, put(TAGGED, "print()")),
    "no check": (rules.has_sound_exercises, drop("checks.twice(")),
    "a check without its tag": (rules.has_sound_exercises, tag("checks.twice(")),
    "no points": (
        rules.has_sound_exercises,
        tag("checks.twice(", "check-90.1"),
    ),
    "a check of nothing": (
        rules.has_sound_exercises,
        edit("checks.twice(my_twice)", "my_twice(1)"),
    ),
    "a check too many": (
        rules.has_sound_exercises,
        tag(VERDICT, "check-90.9", "points-1"),
    ),
    "no solution": (
        rules.has_sound_exercises,
        edit("    ### BEGIN SOLUTION\n    return x + x\n    ### END SOLUTION", ""),
    ),
    "a mark alone": (rules.has_sound_exercises, edit("    ### END SOLUTION", "")),
    "a solution outside of a function": (
        rules.has_sound_exercises,
        edit(
            "    ### BEGIN SOLUTION\n    return x + x\n    ### END SOLUTION",
            "### BEGIN SOLUTION\nx = 1\n### END SOLUTION",
        ),
    ),
    "a solution without its tag": (
        rules.has_sound_exercises,
        put(VERDICT, "def f():\n    ### BEGIN SOLUTION\n    ### END SOLUTION"),
    ),
    "a long stub": (
        rules.has_sound_exercises,
        edit('"""x + x, in the shape of x."""', "x\n    " * 20),
    ),
    "another lesson's exercise": (
        rules.has_sound_exercises,
        both(
            tag(TAGGED, "exercise-4.1"), tag("checks.twice(", "check-4.1", "points-1")
        ),
    ),
    "no exercise": (rules.has_sound_exercises, both(tag(TAGGED), tag("class MyPower"))),
    "a cell that needs an answer": (
        rules.needs_no_answer_to_go_on,
        edit("lesson.live(", "my_twice(3)\nlesson.live("),
    ),
    "a cell that needs a class": (
        rules.needs_no_answer_to_go_on,
        put(VERDICT, "def f():\n    return [MyPower(2)]"),
    ),
    "a cell that gives the answer away": (
        rules.needs_no_answer_to_go_on,
        put(VERDICT, "def my_twice(x):\n    return x"),
    ),
    "four questions": (rules.has_a_quiz, edit("**5. And a control?**", "")),
    "no quiz": (rules.has_a_quiz, drop("## Quiz")),
    "two that are right": (
        rules.has_a_quiz,
        edit("No. That is once one", "Right. So it is"),
    ),
    "none that is right": (
        rules.has_a_quiz,
        edit("Right. One and one", "No. One and one"),
    ),
    "neither right nor wrong": (
        rules.has_a_quiz,
        edit("No. That is once", "That is once"),
    ),
    "two options": (rules.has_a_quiz, edit(OPTION, "")),
    "no why": (rules.has_a_quiz, edit("No. That is three times one.", "No.")),
    "a block left open": (
        rules.has_whole_details,
        hint(lambda third: third.removesuffix("</details>")),
    ),
    "a block without a blank line": (
        rules.has_whole_details,
        edit("question</summary>\n\n", "question</summary>\n"),
    ),
}


def test_a_good_lesson_keeps_every_rule():
    assert rules.broken(rules.RULES, good(), text_form(SAMPLE)) == []


@pytest.mark.parametrize("rule, fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_seen(rule, fault):
    bad = good()
    fault(bad)
    with pytest.raises(AssertionError):
        rule(bad, text_form(SAMPLE))


def test_every_rule_is_shown_a_fault():
    assert {rule for rule, _ in FAULTS.values()} == set(rules.RULES)


def test_what_code_and_mathematics_say_is_no_number_in_prose():
    notebook = good()
    said = (
        "`17`, $17 x$, [issue 17](http://a/17), notebooks 17 and\n18, arXiv:17.17, F17"
    )
    edit("## Idea", f"## Idea\n\n{said}\n\n1. One.\n")(notebook)
    rules.states_only_numbers_that_cells_show(notebook, notebook)


def test_the_sample_has_two_exercises_with_their_checks():
    first, second = exercises(good())
    assert (first.id, first.points, second.id, second.points) == ("90.1", 1, "90.2", 2)
    assert "checks.twice(my_twice)" in first.check and "class MyPower" in second.code
