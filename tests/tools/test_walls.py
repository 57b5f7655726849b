"""The walls between rooms: a wrong import is named, with the wall that it breaks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = "Rooms are layers: no import runs up"
NO_REFERENCE = "The library needs no reference library and no tool"
PLANTED = {  # name: (file, line of code, the wall, what the report names)
    "a room imports one above": (
        "core/targets.py",
        "from ..training import loop",
        LAYERS,
        "peft_from_scratch.core.targets -> peft_from_scratch.training.loop",
    ),
    "two rooms of a layer": (
        "nf4/codes.py",
        "from ..paged import pages",
        LAYERS,
        "peft_from_scratch.nf4.codes -> peft_from_scratch.paged.pages",
    ),
    "an import inside a function": (
        "common/atomic.py",
        "def late():\n    from ..cli import doctor",
        LAYERS,
        "peft_from_scratch.common.atomic -> peft_from_scratch.cli.doctor",
    ),
    "a room without a place": ("attic/__init__.py", "", LAYERS, "attic"),
    "a reference library": (
        "methods/lora.py",
        "import peft",
        NO_REFERENCE,
        "peft_from_scratch.methods.lora -> peft",
    ),
    "a tool": (
        "kernels/count.py",
        "from tools import readme",
        NO_REFERENCE,
        "peft_from_scratch.kernels.count -> tools.readme",
    ),
}


def lint(folder):
    """(exit status, report) of the walls' check, as `make lint` runs it."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def house(tmp_path):
    """A copy of the code, to plant imports in."""
    only_code = shutil.ignore_patterns("__pycache__", "*.html", "*.md")
    for folder in ("peft_from_scratch", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=only_code)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_walls_stand(house):
    status, report = lint(house)
    assert status == 0, report


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_import_is_named_with_its_wall(house, name):
    file, code, wall, named = PLANTED[name]
    path = house / "peft_from_scratch" / file
    path.parent.mkdir(exist_ok=True)
    sound = path.read_text("utf-8") if path.exists() else ""
    path.write_text(f"{sound}\n{code}\n", "utf-8")
    status, report = lint(house)
    assert status != 0
    assert f"{wall} BROKEN" in report or wall in report.split("Broken contracts")[-1]
    assert named in report
