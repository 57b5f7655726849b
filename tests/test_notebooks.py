"""Notebooks: both forms agree, were run, are small, and can be read by all.

`make test` runs them as well, and compares what NBVAL_CHECK_OUTPUT marks. Here stands
what that cannot see. Every rule is also shown a notebook that breaks it.
"""

import copy
import re
from itertools import pairwise
from pathlib import Path

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))
LARGEST = 500_000  # bytes
LONGEST_LINE, LONGEST_CELL, MOST_CODE = 88, 25, 350  # characters, lines, lines
MARK = "# NBVAL_CHECK_OUTPUT"
WIDGET = "application/vnd.jupyter.widget-view+json"
NUMBER = r"(?:\d[\d.,]*\d|\d)"
PRIVATE = re.compile(r"(?<![\w.:/~])/(?:work|tmp|home|root|opt|Users)/|\b[A-Z]:\\")


def text_form(name):
    return jupytext.read(FOLDER / f"{name}.py")


def stored(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


# --------------------------------------------------------------------------- Rules


def cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def outputs(notebook):
    return [output for cell in cells(notebook, "code") for output in cell.outputs]


def printed(outputs):
    """What the outputs say in words."""
    texts = [output.get("text", "") for output in outputs]
    texts += [output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join(texts)


def prose(notebook):
    """The markdown without code, equations and the targets of links."""
    text = "\n\n".join(cell.source for cell in cells(notebook, "markdown"))
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`|\$\$?[^$]*\$\$?|\]\([^)]*\)", " ", text)


def agrees(notebook, text):
    """The stored cells are those of the text form."""

    def seen(book):
        return [(c.cell_type, c.source, c.metadata.get("tags")) for c in book.cells]

    assert seen(notebook) == seen(text), "build it again: make notebooks"


def was_run(notebook, text):
    """Every code cell once, in order, without an error."""
    counts = [cell.execution_count for cell in cells(notebook, "code")]
    assert counts == list(range(1, len(counts) + 1))
    assert all(output.output_type != "error" for output in outputs(notebook))
    assert all(output.get("name") != "stderr" for output in outputs(notebook))


def has_no_widget(notebook, text):
    """Code hosts do not draw a notebook that has a widget's name without its state."""
    assert "widgets" not in notebook.metadata
    assert not any(WIDGET in output.get("data", {}) for output in outputs(notebook))


def is_small(notebook, text):
    assert len(nbformat.writes(notebook).encode()) < LARGEST


def is_compared(notebook, text):
    """At least one cell is held to its stored words, and each such cell has some."""
    marked = [c for c in cells(notebook, "code") if c.source.startswith(MARK)]
    assert marked
    assert all(printed(cell.outputs).strip() for cell in marked)
    assert notebook_code(notebook).count(MARK[2:]) == len(marked), "a mark that is late"


def has_ordered_headings(notebook, text):
    headings = re.findall(r"^(#+) \S", prose(notebook), re.MULTILINE)
    levels = [len(marks) for marks in headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


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


def has_short_code(notebook, text):
    sources = [cell.source.splitlines() for cell in cells(notebook, "code")]
    assert all(len(line) <= LONGEST_LINE for lines in sources for line in lines)
    assert max(map(len, sources)) <= LONGEST_CELL
    assert sum(map(len, sources)) <= MOST_CODE


def names_no_private_path(notebook, text):
    said = [cell.source for cell in notebook.cells] + [printed(outputs(notebook))]
    assert not PRIVATE.search("\n".join(said))
    assert "path" not in notebook.metadata.get("kernelspec", {})


def states_only_numbers_that_cells_show(notebook, text):
    """A number in prose stands in code or was printed, or it could go stale."""
    shown = notebook_code(notebook) + printed(outputs(notebook))
    stated = set(re.findall(rf"(?<![\w.-]){NUMBER}(?![\w-])", prose(notebook)))
    assert not stated - set(re.findall(NUMBER, shown))


def notebook_code(notebook):
    return "\n".join(cell.source for cell in cells(notebook, "code"))


RULES = (
    agrees,
    was_run,
    has_no_widget,
    is_small,
    is_compared,
    has_ordered_headings,
    has_words_for_images,
    has_short_code,
    names_no_private_path,
    states_only_numbers_that_cells_show,
)


def test_every_notebook_has_its_text_form():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_notebook(name, rule):
    rule(stored(name), text_form(name))


# --------------------------------------------------------------------------- Faults


def good():
    """A small notebook that keeps every rule."""
    new = nbformat.v4
    image = new.new_output("display_data", {"image/png": "aGk="})
    image.metadata = {"image/png": {"alt": "A line that falls."}}
    words = new.new_output("stream", name="stdout", text="It falls to 3.\n")
    return new.new_notebook(
        cells=[
            new.new_markdown_cell("# Title\n\n## Part\n\nIt falls to 3."),
            new.new_code_cell(
                f"{MARK}\nshow()", outputs=[image, words], execution_count=1
            ),
            new.new_markdown_cell("## Next"),
        ]
    )


def code(notebook):
    return notebook.cells[1]


def append(index, text):
    def fault(notebook):
        notebook.cells[index].source += text

    return fault


def output(**data):
    def fault(notebook):
        code(notebook).outputs.append(nbformat.from_dict(data))

    return fault


ERROR = dict(output_type="error", ename="E", evalue="", traceback=[])
STDERR = dict(output_type="stream", name="stderr", text="warning")
DRAWN = dict(output_type="display_data", data={WIDGET: {}}, metadata={})
PATH = dict(output_type="stream", name="stdout", text="/home/me/x")
FAULTS = {
    "another source": (agrees, append(1, "\n")),
    "a cell too many": (agrees, lambda n: n.cells.append(n.cells[0])),
    "not run": (was_run, lambda n: code(n).update(execution_count=None)),
    "run twice": (was_run, lambda n: code(n).update(execution_count=2)),
    "an error": (was_run, output(**ERROR)),
    "a warning": (was_run, output(**STDERR)),
    "widget state": (has_no_widget, lambda n: n.metadata.update(widgets={})),
    "a widget": (has_no_widget, output(**DRAWN)),
    "large": (is_small, append(0, "x" * LARGEST)),
    "not compared": (is_compared, lambda n: code(n).update(source="show()")),
    "nothing to compare": (is_compared, lambda n: code(n).update(outputs=[])),
    "a late mark": (is_compared, append(1, f"\n{MARK}")),
    "two titles": (has_ordered_headings, append(2, "\n\n# Title")),
    "a skipped level": (has_ordered_headings, append(2, "\n\n#### Deep")),
    "a mute image": (
        has_words_for_images,
        lambda n: code(n).outputs[0].update(metadata={}),
    ),
    "no words after": (has_words_for_images, lambda n: code(n).outputs.pop()),
    "a mute link": (has_words_for_images, append(0, "\n![](a.png)")),
    "a long line": (has_short_code, append(1, "\n" + "x" * (LONGEST_LINE + 1))),
    "a long cell": (has_short_code, append(1, "\nx" * LONGEST_CELL)),
    "a path in code": (names_no_private_path, append(1, "\nopen('/home/me/x')")),
    "a path printed": (names_no_private_path, output(**PATH)),
    "a stale number": (states_only_numbers_that_cells_show, append(0, " Or to 2.")),
}


def test_a_good_notebook_keeps_every_rule():
    for rule in RULES:
        rule(good(), good())


@pytest.mark.parametrize("rule, fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_seen(rule, fault):
    broken = copy.deepcopy(good())
    fault(broken)
    with pytest.raises(AssertionError):
        rule(broken, good())


def test_every_rule_is_shown_a_fault():
    assert {rule for rule, _ in FAULTS.values()} == set(RULES)
