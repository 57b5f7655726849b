"""Build notebooks from their text form: run them, keep the outputs, strip the noise.

    python notebooks/build.py [START …]     all, or those whose names start so
    python notebooks/build.py --check       which differ from their text; runs nothing
    python notebooks/build.py --draft 04    write it though it breaks a rule (rules.py)
    python notebooks/build.py --cards 04    measure its cost card anew

The text (`NN_topic.py`, jupytext's percent format) is what is written and reviewed. The
notebook beside it appears whole or not at all: one that fails, or that breaks a rule,
leaves the old one and its cost card. Times, random cell names and widget state are left
out, so that a new build of the same text differs only where the outputs do.

The cost card is measured in the kernel that ran the notebook. A lesson that has none is
run twice: the first run makes the card, and the second, which is stored, is compared
with it. A notebook's metadata hold the digests of the results that it read, so that
stored outputs are known to be stale once those change.
"""

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from rules import (
    RULES,
    START,
    TEXT_RULES,
    WIDGET,
    agrees,
    broken,
    cells,
    digests,
)

from peft_from_scratch.common.atomic import new_file
from peft_from_scratch.common.digest import digest
from peft_from_scratch.course import cards, exercises
from peft_from_scratch.course.exercises import RECORD

FOLDER = Path(__file__).parent
TEXTS = "[0-9][0-9]_*.py"
LONGEST = 900  # seconds of a cell
# One thread and no hub, as in the tests: outputs and cards are then comparable.
SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LANGUAGE = {  # without the version, which differs between machines
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
ASK = """\
import dataclasses as _d, json as _j
from peft_from_scratch.course import cards as _c, lesson as _l
print(_j.dumps(_d.asdict(_l.current.bill())))
"""
OPENED = "import json as _j; print(_j.dumps(sorted(_opened)))"
LISTEN = """\
import sys as _s
_opened = set()
_s.addaudithook(lambda event, about: event == "open" and _opened.add(str(about[0])))
"""


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Build, or check; the exit status is 1 where something is wrong."""
    options = parser().parse_args(arguments)
    wanted = tuple(options.starts) or ("",)
    texts = [p for p in sorted(folder.glob(TEXTS)) if p.name.startswith(wanted)]
    if not texts:
        raise SystemExit(f"no {TEXTS} in {folder.name}/ starts with {wanted}")
    if options.check:
        return int(not all([check(text) for text in texts]))
    ways = {"draft": options.draft, "anew": options.cards}
    return int(not all([build(text, **ways) for text in texts]))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Build notebooks from their text form.")
    made.add_argument("starts", nargs="*", metavar="START", help="of their names: 04")
    made.add_argument(
        "--check", action="store_true", help="run nothing; tell what is stale or wrong"
    )
    made.add_argument(
        "--draft", action="store_true", help="write it though it breaks a rule"
    )
    made.add_argument("--cards", action="store_true", help="measure cost cards anew")
    return made


def check(text: Path) -> bool:
    """Tell whether a stored notebook is that of its text, and which rules it breaks."""
    new, built = notebook_of(text), text.with_suffix(".ipynb")
    if not built.exists():
        state, wrong = "not built yet", broken(TEXT_RULES, new, new)
    elif broken((agrees,), stored := nbformat.read(built, as_version=4), new):
        state, wrong = "stale", broken(TEXT_RULES, new, new)
    else:
        state, wrong = "up to date", broken(RULES, stored, new)
    tell(f"{text.stem}: {state}", wrong)
    return state == "up to date" and not wrong


def build(text: Path, draft: bool = False, anew: bool = False) -> bool:
    """Run a text form, and write its notebook and cost card if it keeps the rules.

    Args
        draft  write it though it breaks a rule
        anew   measure the cost card anew
    """
    begun = time.perf_counter()
    notebook = notebook_of(text)
    try:
        card = run(notebook, text.parent, anew)
    except CellExecutionError as error:
        print(f"{text.stem}: not written, a cell failed\n{error}")
        return False
    wrong = broken(RULES, notebook, notebook_of(text))
    if wrong and not draft:
        tell(f"{text.stem}: not written, it breaks rules", wrong)
        return False
    with new_file(text.with_suffix(".ipynb")) as new:
        nbformat.write(notebook, new)
    if card:
        cards.write(cards.read() | card)
    tell(f"{text.stem}: built in {time.perf_counter() - begun:.0f} s", wrong)
    return not wrong


def tell(headline: str, wrong: Sequence[str]) -> None:
    print(headline, *wrong, sep="\n    ", flush=True)


def notebook_of(text: Path) -> NotebookNode:
    """What a text form says, not run: cells with lasting names, and nbgrader's data."""
    notebook = jupytext.read(text)
    notebook.metadata["language_info"] = dict(LANGUAGE)
    seen = set()
    for cell in notebook.cells:
        graded = exercises.grading(cell)
        if graded:
            cell.metadata["nbgrader"] = graded
        cell.id = _name(cell, seen)
    return notebook


def _name(cell: NotebookNode, taken: set[str]) -> str:
    """By its content: a cell that is put in above does not rename those below."""
    base = name = f"cell-{digest(cell.cell_type, cell.source)[:8]}"
    while name in taken:
        name = f"{base}-{len(taken)}"
    taken.add(name)
    return name


def run(
    notebook: NotebookNode, folder: Path, anew: bool = False
) -> dict[str, cards.Card]:
    """Execute a notebook in `folder`; {its number: its cost card} if that is new."""
    number, known = _number(notebook), cards.read()
    if number is None or (number in known and not anew):
        execute(notebook, folder)
        return {}
    card = {number: execute(copy.deepcopy(notebook), folder)}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, cards.FILE.name)
        cards.write(known | card, file)
        with _environment(**{cards.OVERRIDE: str(file)}):
            execute(notebook, folder)
    return card


def _number(notebook: NotebookNode) -> str | None:
    """The lesson's number; None for a notebook that is no lesson."""
    starts = [START.search(cell.source) for cell in cells(notebook, "code")]
    return next((start[1] for start in starts if start), None)


def execute(notebook: NotebookNode, folder: Path) -> cards.Card | None:
    """Run all cells; the cost card of the run, of a lesson."""
    is_lesson = _number(notebook) is not None
    with running(notebook, folder) as client:
        client.kc.execute(LISTEN, silent=True, store_history=False)
        for at, cell in enumerate(notebook.cells):
            client.execute_cell(cell, at)
        card = cards.Card(**_ask(client, ASK)) if is_lesson else None
        opened = _ask(client, OPENED)
    _strip(notebook)
    notebook.metadata[RECORD] = {"reads": digests(opened)}
    return card


@contextmanager
def running(
    notebook: NotebookNode, folder: Path, **options
) -> Iterator[NotebookClient]:
    """A client with a kernel that was started in `folder`, gone when the block ends."""
    client = NotebookClient(
        notebook,
        record_timing=False,
        timeout=LONGEST,
        resources={"metadata": {"path": str(folder)}},
        **options,
    )
    with client.setup_kernel(env={**os.environ, **SETTINGS}):
        yield client


def _ask(client: NotebookClient, source: str):
    """What an extra cell prints, read as JSON; the notebook keeps nothing of it."""
    extra = nbformat.v4.new_code_cell(source)
    client.nb.cells.append(extra)
    try:
        client.execute_cell(extra, len(client.nb.cells) - 1)
    finally:
        client.nb.cells.pop()
    said = "".join(output.get("text", "") for output in extra.outputs)
    return json.loads(said) if said.strip() else None


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _strip(notebook: NotebookNode) -> None:
    """What differs from run to run goes: widgets, and how a stream came in pieces.

    Code hosts draw no notebook that lists widgets without their state.
    """
    notebook.metadata.pop("widgets", None)
    for cell in cells(notebook, "code"):
        kept = []
        for output in cell.outputs:
            if kept and _stream(output) and _stream(output) == _stream(kept[-1]):
                kept[-1].text += output.text
            elif WIDGET not in output.get("data", {}):
                kept.append(output)
        cell.outputs = kept


def _stream(output: NotebookNode) -> str | None:
    return output.get("name") if output.output_type == "stream" else None


if __name__ == "__main__":
    raise SystemExit(main())
