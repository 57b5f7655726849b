"""Build notebooks from their text form: run them, keep the outputs, strip the noise.

    python notebooks/build.py [START …]        all, or those whose names start so

The text (`NN_topic.py`, jupytext's percent format) is what is written and reviewed.
The notebook beside it appears whole or not at all: one that fails leaves the old one.
Times, random cell names and widget state are left out, so that a new build of the same
text differs only where the outputs do.
"""

import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

from peft_from_scratch.atomic import new_file

FOLDER = Path(__file__).parent
TEXTS = "[0-9][0-9]_*.py"


def main(starts: list[str]) -> None:
    wanted = tuple(starts) or ("",)
    texts = [p for p in sorted(FOLDER.glob(TEXTS)) if p.name.startswith(wanted)]
    if not texts:
        raise SystemExit(f"no {TEXTS} in notebooks/ starts with {', '.join(wanted)}")
    for text in texts:
        start = time.perf_counter()
        notebook, built = run(text), text.with_suffix(".ipynb")
        with new_file(built) as new:
            nbformat.write(notebook, new)
        print(f"{built.name}: {time.perf_counter() - start:.0f} s")


def run(text: Path) -> nbformat.NotebookNode:
    """The executed notebook of a text form."""
    notebook = jupytext.read(text)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, record_timing=False, resources=place).execute()
    # Code hosts refuse to draw a notebook that lists widgets without their state.
    notebook.metadata.pop("widgets", None)
    return notebook


if __name__ == "__main__":
    main(sys.argv[1:])
