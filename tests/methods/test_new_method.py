"""CONTRIBUTING's "Adding a method", followed to the letter in a copy of the project.

The page names four places and shows what goes there. Nothing else is changed by hand,
and what the page then tells to compute is computed. In that copy the method has to keep
the laws, be known to the command line, the picture, the comparison and the experiments,
and come back from a file.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("peft_from_scratch", "tests", "tools", "notebooks", "benchmarks")
PAGES = ("README.md", "CONTRIBUTING.md", "pyproject.toml", "constraints.txt")
PLACE = re.compile(
    r"^### \d\. [^`\n]*?(?:`(?P<table>\w+)` in )?`(?P<path>[\w/.]+)`\n\n"
    r"```python\n(?P<code>.*?)^```\n",
    re.MULTILINE | re.DOTALL,
)
COMMANDS = re.compile(r"^ {4}\.venv/bin/python (-m \S+)$", re.MULTILINE)
# Of the tests of everything that lists methods, those that a new one could fail.
CHECKS = {
    "methods/test_contract": "(shift-llama or shift-gpt2) and not fp64",
    "plotting/test_block": "shift or None-light or shipped or look or named",
    "tools/test_readme": "tables",
    "cli/test_commands": "parser or heavy or saved or left_open",
    "comparison/test_compare": "settings_before or in_their_order or as_many_rates",
}
SCRIPT = """
import sys, tempfile
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "tests/helpers")
import architectures, torch
import peft_from_scratch as pfs
from peft_from_scratch.comparison.adapt import adapt
from peft_from_scratch.comparison.candidates import CANDIDATES
from peft_from_scratch.comparison.plan import Plan
from peft_from_scratch.comparison.setup import load_setup
from peft_from_scratch.ledger.experiments.finetune import config, compute

model = architectures.build("llama")
ids = torch.arange(8)[None] + 70
pfs.shift.inject(model)
for parameter in pfs.trainable(model).values():
    torch.nn.init.normal_(parameter)
with tempfile.TemporaryDirectory() as folder:
    pfs.save(model, folder)
    again = architectures.build("llama")
    pfs.load(again, folder)
assert torch.equal(model(ids).logits, again(ids).logits)

(candidate,) = [each for each in CANDIDATES if each.key == "shift"]
plan = Plan(base="tiny", task="orders", methods=("shift",), steps=2, batch=2, rows=2)
setting = dict(template="raw", lr=1e-2)
with tempfile.TemporaryDirectory() as folder:
    shifted = adapt(candidate, load_setup(replace(plan, out=folder)), setting, 0)
assert shifted.history.steps == 2 and len(pfs.trainable(shifted.model)) > 0

run = config(base="tiny", task="gap-1", method="shift", lr=1e-2, n=8, steps=2, batch=4,
             test=2, validation=2)
result = compute(run)
assert result["trainable"] > 0 and result["test_loss"] > 0 and not result["diverged"]
"""


def steps() -> list[re.Match]:
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    return list(PLACE.finditer(section(page)))


def section(page: str) -> str:
    return page[page.index("## Adding a method") : page.index("## Adding a kernel")]


def followed(folder: Path, places: list[re.Match]) -> None:
    """The code of each place, as a new file or as a row at the end of a table."""
    for place in places:
        file, code = folder / place["path"], place["code"]
        if place["table"]:
            file.write_text(with_row(file.read_text("utf-8"), place["table"], code))
        else:
            assert not file.exists()
            file.write_text(code)


def with_row(source: str, table: str, row: str) -> str:
    """The source with a row before the closing bracket of a table."""
    (node,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and node.targets[0].id == table
    ]
    lines = source.splitlines(keepends=True)
    lines.insert(node.end_lineno - 1, textwrap.indent(f"{row.rstrip()},\n", " " * 4))
    return "".join(lines)


def copy_of_the_project(folder: Path) -> Path:
    """The package, tests and pages; of the data links, but for the picture."""
    ignore = shutil.ignore_patterns("__pycache__", "*.ipynb")
    for name in filter(lambda name: (ROOT / name).is_dir(), COPIED):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in PAGES:
        shutil.copy(ROOT / name, folder)
    (folder / "data").mkdir()
    for path in (ROOT / "data").iterdir():
        if path.name == "block.svg":
            shutil.copy(path, folder / "data")
        else:
            (folder / "data" / path.name).symlink_to(path)
    return folder


def ran(folder: Path, *arguments: str) -> str:
    """What Python said in that folder; an AssertionError with it where it failed."""
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def text_files(folder: Path) -> dict[str, str]:
    """{path: content} of what a contributor could edit."""
    return {
        str(file.relative_to(folder)): file.read_text("utf-8", errors="replace")
        for file in [
            *folder.rglob("*.py"),
            *folder.glob("*.md"),
            folder / "data/block.svg",
        ]
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(folder, its files before) of a copy in which CONTRIBUTING was followed."""
    folder = copy_of_the_project(tmp_path_factory.mktemp("project"))
    before = text_files(folder)
    followed(folder, steps())
    for command in COMMANDS.findall(section((ROOT / "CONTRIBUTING.md").read_text())):
        ran(folder, *shlex.split(command))
    return folder, before


def test_a_method_of_fifty_lines_is_added_in_four_places():
    places = steps()
    assert len(places) == 4
    assert [bool(place["table"]) for place in places] == [False, True, True, True]
    assert places[0]["code"].count("\n") <= 60


def test_nothing_else_is_changed_by_hand(project):
    folder, before = project
    changed = {
        path for path, text in text_files(folder).items() if before.get(path) != text
    }
    computed = {"README.md", "data/block.svg"}
    assert changed == {place["path"] for place in steps()} | computed
    assert "`pfs.shift` | a vector added" in (folder / "README.md").read_text("utf-8")


def test_the_new_method_keeps_the_laws_and_every_table_knows_it(project):
    folder, _ = project
    chosen = [f"{Path(file).name} and ({tests})" for file, tests in CHECKS.items()]
    told = ran(
        folder,
        *("-m", "pytest", "-v", "-x", "-p", "no:cacheprovider"),
        *(f"tests/{file}.py" for file in CHECKS),
        *("-k", " or ".join(f"({tests})" for tests in chosen)),
    )
    passed = re.findall(r"^tests/(\w+/test_\w+)\.py::(\S+) PASSED", told, re.MULTILINE)
    assert {file for file, _ in passed} == set(CHECKS)
    of_shift = [file for file, test in passed if "shift" in test]
    assert of_shift.count("methods/test_contract") >= 30  # laws, on two architectures
    assert of_shift.count("plotting/test_block") >= 4
    assert of_shift.count("comparison/test_compare") == 1


def test_the_new_method_is_saved_compared_and_run_as_an_experiment(project):
    folder, _ = project
    ran(folder, "-c", SCRIPT)


def test_a_row_left_out_is_noticed(tmp_path):
    """The checks above are no formality: without the file's format, they fail."""
    folder = copy_of_the_project(tmp_path)
    followed(folder, [place for place in steps() if "formats" not in place["path"]])
    with pytest.raises(AssertionError, match="no file format"):
        ran(folder, "-c", SCRIPT)
