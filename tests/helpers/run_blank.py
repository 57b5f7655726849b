"""The promise of the blanks: of a learner's copy, run from top to bottom with nothing
filled in, exactly the graded cells fail.

    python tests/helpers/run_blank.py 04 …    by hand, outside notebooks/
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "notebooks")] * (__name__ == "__main__")

import build

from peft_from_scratch.course.exercises import blank, exercises, find

LATE = "times the"  # of the receipt's warning, in CI


def run(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Execute a copy to its end, in `folder`, whatever fails."""
    with build.running(notebook, folder, allow_errors=True) as client:
        for at, cell in enumerate(notebook.cells):
            client.execute_cell(cell, at)
    return notebook


def failed(notebook: NotebookNode) -> dict[int, str]:
    """{place of a cell that failed: name of its error}"""
    return {
        at: output.ename
        for at, cell in enumerate(notebook.cells)
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    }


def graded(notebook: NotebookNode) -> dict[int, str]:
    """The same, as it is promised."""
    return {exercise.check_at: "NotDone" for exercise in exercises(notebook)}


def warnings(notebook: NotebookNode) -> list[str]:
    """What the receipt says where a lesson took far longer than on its card."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    errors = [o.text for o in outputs if o.get("name") == "stderr"]
    return [text for text in errors if LATE in text]


def main(numbers: list[str]) -> int:
    os.environ.update(build.SETTINGS)
    right = True
    for number in numbers:
        begun = time.perf_counter()
        source = find(number)
        copied = blank(nbformat.read(source, as_version=4))
        with tempfile.TemporaryDirectory() as folder:
            run(copied, Path(folder))
        wrong = set(failed(copied).items()) ^ set(graded(copied).items())
        seconds = time.perf_counter() - begun
        print(f"{source.name}: {len(graded(copied))} graded cells, {seconds:.0f} s")
        for at, name in sorted(wrong):
            said = "failed" if at in failed(copied) else "did not fail"
            print(f"    cell {at} {said} ({name}):\n{copied.cells[at].source}")
        right = right and not wrong
    return int(not right)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
