"""Exercises: read out of a notebook, made blank, copied to work/ and looked after.

A notebook in notebooks/ has the solutions, and is never edited by a learner. Their own
copies, with blanks, are in work/, which git ignores:

    python -m peft_from_scratch work                make those that are not there; list
    python -m peft_from_scratch work 04             only this one
    python -m peft_from_scratch work 04 --restore   make it anew, keep the old beside it

The conventions are nbgrader's. An exercise is a code cell with the tag `exercise-4.1`,
whose solution stands between two marks inside a function; its check is the next cell,
with the tags `check-4.1` and `points-2`, and perhaps hidden tests between marks.
"""

import copy
import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from ..common import atomic
from ..common.digest import digest
from ..common.provenance import ROOT

NOTEBOOKS, WORK = ROOT / "notebooks", ROOT / "work"
NAMES = "[0-9][0-9]_*.ipynb"
BLANK = 'raise NotImplementedError("exercise {}: your code here")'
RECORD = "peft_from_scratch"  # in a copy's metadata: what it was when it was made
SOLUTION, HIDDEN = (
    re.compile(
        rf"^(?P<indent>[ \t]*)### BEGIN {name}\n.*?^(?P=indent)### END {name}$",
        re.MULTILINE | re.DOTALL,
    )
    for name in ("SOLUTION", "HIDDEN TESTS")
)
MARK = re.compile(r"^\s*### (?:BEGIN|END) (?:SOLUTION|HIDDEN TESTS)", re.MULTILINE)
# A link within the folder; or code, in which `kernel[grid](x)` only looks like one.
LOCAL_LINK = re.compile(r"(`[^`\n]*`)|\]\((?![a-z]+:|[#/]|\.\./)([^)\s]+)\)")


@dataclass(frozen=True)
class Exercise:
    """An exercise of a notebook: the places of its cells, and their sources."""

    id: str  # "4.1"
    at: int
    code: str
    check_at: int | None  # of the cell that is tagged as its check, if any is
    check: str
    points: int


def exercises(notebook: NotebookNode) -> list[Exercise]:
    """The exercises of a notebook, in its order; by the tags of its code cells."""
    places = {tag: i for i, cell in enumerate(notebook.cells) for tag in tags(cell)}
    listed = []
    for tag, at in places.items():
        if not tag.startswith("exercise-"):
            continue
        id = tag.removeprefix("exercise-")
        check_at = places.get(f"check-{id}")
        check = None if check_at is None else notebook.cells[check_at]
        listed.append(
            Exercise(
                id,
                at,
                notebook.cells[at].source,
                check_at,
                check.source if check else "",
                int(numbered(check, "points") or 0) if check else 0,
            )
        )
    return sorted(listed, key=lambda exercise: exercise.at)


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def numbered(cell: NotebookNode, name: str) -> str | None:
    """What stands behind the dash of the tag `name-…`; None without such a tag."""
    numbers = [tag for tag in tags(cell) if tag.startswith(f"{name}-")]
    return numbers[0].partition("-")[2] if numbers else None


def grading(cell: NotebookNode) -> dict | None:
    """nbgrader's metadata of a cell, from its tags; None where it has no part in it."""
    exercise, check = numbered(cell, "exercise"), numbered(cell, "check")
    if not (exercise or check):
        return None
    kind, id = ("exercise", exercise) if exercise else ("check", check)
    metadata = {
        "grade": kind == "check",
        "grade_id": f"{kind}-{id}".replace(".", "-"),
        "locked": kind == "check",
        "schema_version": 3,
        "solution": kind == "exercise",
        "task": False,
    }
    if not check:
        return metadata
    return metadata | {"points": int(numbered(cell, "points") or 0)}


# ------------------------------------------------------------------------- Blanks


def blank(notebook: NotebookNode) -> NotebookNode:
    """A learner's copy: no outputs, no solutions, no hidden tests; links from work/.

    Raises  ValueError  a mark of a solution or of hidden tests without its partner
    """
    learners = copy.deepcopy(notebook)
    for cell in learners.cells:
        if cell.cell_type == "markdown":
            cell.source = LOCAL_LINK.sub(_from_work, cell.source)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.source = blanked(cell.source, numbered(cell, "exercise"))
    learners.metadata[RECORD] = {"blank": _digest(learners)}
    return learners


def _from_work(match: re.Match) -> str:
    code, target = match.groups()
    return code or f"](../{NOTEBOOKS.name}/{target})"


def blanked(source: str, id: str | None) -> str:
    """A cell's source without its solution and its hidden tests."""
    source = SOLUTION.sub(lambda m: m["indent"] + BLANK.format(id), source)
    source = HIDDEN.sub("", source).strip("\n")
    if MARK.search(source):
        raise ValueError(
            "a mark (### BEGIN … or ### END …) has no partner at the same indentation, "
            f"in the cell:\n{source}"
        )
    return source


def _digest(notebook: NotebookNode) -> str:
    return digest([[cell.cell_type, cell.source] for cell in notebook.cells])


# ------------------------------------------------------------------------- Copies


def work(number: str | None = None, *, restore: bool = False) -> None:
    """Make the copies that are not there, or this one; tell what is in work/.

    Args
        number   of a notebook: "04"; None: all
        restore  make this one anew; the old one stays beside it, under a dated name
    Raises   ValueError  no such notebook; restore without a number
             OSError     nothing can be written there, or there are no notebooks
    """
    if restore and number is None:
        raise ValueError(
            "--restore needs the number of one notebook, such as: work 04 --restore. "
            "Only that one is made anew; the others stay as they are"
        )
    atomic.sweep(WORK)
    for source in [find(number)] if number else originals():
        mine, kept = WORK / source.name, None
        if restore and mine.exists():
            kept = _keep(mine)
        is_new = kept is not None or not mine.exists()
        if is_new:
            with atomic.new_file(mine) as partial:
                nbformat.write(blank(_read(source)), partial)
        state = "made now" if is_new else state_of(mine, source)
        print(f"{WORK.name}/{source.name:34} {state}")
        if kept:
            print(f"{WORK.name}/{kept.name}  is what it was before")


def originals() -> list[Path]:
    """The notebooks of the course, in order."""
    notebooks = sorted(NOTEBOOKS.glob(NAMES))
    if not notebooks:
        raise FileNotFoundError(
            f"{NOTEBOOKS} holds no notebooks: this command needs the course's "
            "repository, a clone of which has them"
        )
    return notebooks


def find(number: str) -> Path:
    """The notebook of this number: "04", or "4"."""
    matching = [p for p in originals() if p.name.startswith(f"{number.zfill(2)}_")]
    if not matching:
        numbers = ", ".join(path.name[:2] for path in originals())
        raise ValueError(f"there is no notebook {number!r}; there are {numbers}")
    return matching[0]


def state_of(mine: Path, source: Path) -> str:
    """What became of a learner's copy, in a few words."""
    try:
        learners = _read(mine)
    except (
        Exception
    ):  # nbformat raises what its parsers do: another kind for each fault
        return "is no notebook that can be read; left alone"
    new = blank(_read(source))
    was = learners.metadata.get(RECORD, {}).get("blank", _digest(new))
    if _digest(learners) == was:
        state = "untouched"
    else:
        ids = [exercise.id for exercise in exercises(new)]
        begun = [
            i
            for i in ids
            if not any(BLANK.format(i) in c.source for c in learners.cells)
        ]
        state = f"yours: {len(begun)} of {len(ids)} exercises begun"
    if was != _digest(new):
        state += f"; the course has a newer one: work {source.name[:2]} --restore"
    return state


def _keep(mine: Path) -> Path:
    """A copy of a learner's notebook beside it, under a dated name that is new."""
    stem = f"{mine.stem}.{datetime.now():%Y-%m-%d-%H%M%S}"
    names = [
        f"{stem}{more}{mine.suffix}" for more in ("", *map("-{}".format, range(2, 99)))
    ]
    kept = next(mine.with_name(n) for n in names if not mine.with_name(n).exists())
    with atomic.new_file(kept) as partial:
        shutil.copyfile(mine, partial)
    return kept


def _read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)
