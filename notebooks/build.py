"""Build notebooks from their text form: run them, keep the outputs, strip the noise.

    python notebooks/build.py [START …]     all, or those whose names start so
    python notebooks/build.py --check       which differ from their text; runs nothing
    python notebooks/build.py --draft 04    write it though it breaks a rule (rules.py)

The text (`NN_topic.py`, jupytext's percent format) is what is written and reviewed. The
notebook beside it appears whole or not at all: one that fails, or that breaks a rule,
leaves the old one and its cost card. Times, random cell names and widget state are left
out, so that a new build of the same text differs only where the outputs do.

The cost card is measured in the kernel that ran the notebook. start() has spoken before
that: its cell is run once more, in a fresh kernel, and the receipt's in the same one.
"""

import argparse
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
from rules import RULES, START, TEXT_RULES, WIDGET, agrees, broken, cells

from peft_from_scratch.common.atomic import new_file
from peft_from_scratch.common.digest import digest
from peft_from_scratch.course import cards, exercises

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
print(_j.dumps(_l.current and _d.asdict(_l.current.bill())))
"""
TELL = "_l.current.card = _c.Card(**_j.loads({!r}))\n"


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Build, or check; the exit status is 1 where something is wrong."""
    options = parser().parse_args(arguments)
    wanted = tuple(options.starts) or ("",)
    texts = [p for p in sorted(folder.glob(TEXTS)) if p.name.startswith(wanted)]
    if not texts:
        raise SystemExit(f"no {TEXTS} in {folder.name}/ starts with {wanted}")
    one = check if options.check else build
    return int(not all([one(text, draft=options.draft) for text in texts]))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Build notebooks from their text form.")
    made.add_argument("starts", nargs="*", metavar="START", help="of their names: 04")
    made.add_argument(
        "--check", action="store_true", help="run nothing; tell what is stale or wrong"
    )
    made.add_argument(
        "--draft", action="store_true", help="write it though it breaks a rule"
    )
    return made


def check(text: Path, draft: bool = False) -> bool:
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


def build(text: Path, draft: bool = False) -> bool:
    """Run a text form, and write its notebook and cost card if it keeps the rules."""
    begun = time.perf_counter()
    notebook = notebook_of(text)
    try:
        card = run(notebook, text.parent)
    except CellExecutionError as error:
        print(f"{text.stem}: not written, a cell failed\n{error}")
        return False
    wrong = broken(RULES, notebook, notebook_of(text))
    if wrong and not draft:
        tell(f"{text.stem}: not written, it breaks rules", wrong)
        return False
    with new_file(text.with_suffix(".ipynb")) as new:
        nbformat.write(notebook, new)
    if card is not None:
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


def run(notebook: NotebookNode, folder: Path) -> dict[str, cards.Card] | None:
    """Execute a notebook in `folder`; {its number: its cost card} of a lesson."""
    starts = [at for at, cell in enumerate(notebook.cells) if START.search(cell.source)]
    with running(notebook, folder) as client:
        for at, cell in enumerate(notebook.cells):
            client.execute_cell(cell, at)
        found = _ask(client, ASK) if starts else None
        if found is not None:
            _again(client, notebook, found)
    if found is not None:
        number = START.search(notebook.cells[starts[0]].source)[1]
        found = {number: cards.Card(**found)}
        _start_again(notebook, starts[0], folder, cards.read() | found)
    _strip(notebook)
    return found


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


def _again(client: NotebookClient, notebook: NotebookNode, card: dict) -> None:
    """Have the receipt compare with the card that was just measured."""
    _ask(client, TELL.format(json.dumps(card)))
    for at, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and cell.source == "lesson.receipt()":
            count = cell.execution_count
            client.execute_cell(cell, at)
            cell.execution_count = count


def _start_again(notebook: NotebookNode, at: int, folder: Path, known: dict) -> None:
    """Give the cell that calls start() the words that it has with the new card."""
    opening = nbformat.from_dict({**notebook, "cells": notebook.cells[: at + 1]})
    again = nbformat.from_dict(json.loads(json.dumps(opening)))
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, cards.FILE.name)
        cards.write(known, file)
        with (
            _environment(**{cards.OVERRIDE: str(file)}),
            running(again, folder) as client,
        ):
            for i, cell in enumerate(again.cells):
                client.execute_cell(cell, i)
    notebook.cells[at].outputs = again.cells[at].outputs


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
