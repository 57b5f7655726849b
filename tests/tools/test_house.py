"""The house in order: what the project's files say about each other holds."""

import ast
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import peft_from_scratch as pfs
from peft_from_scratch.tasks.task import GENERATED, load_task

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PACKAGE = "peft_from_scratch"
# Rooms whose files list themselves: the table of methods, experiments, checks, names.
LONG_LISTS = {PACKAGE, "checks", "experiments", "methods"}
LARGEST = 5_000_000  # bytes of a file in git
COMMAND = r"(?:`|^ {4,}|&& )make (?:\w+=\S+ )*(\w+)|^make (\w+)$"
TARGETS = {"compare", "test", "lab", "notebooks", "bench", "lint"}

# What `make lock` leaves out: only some platforms have these, or every one has.
NOT_PINNED = re.compile(r"(cuda-|nvidia-|setuptools$|pip$)")


def requirements(lines):
    """{canonical name: Requirement}"""
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in found}


def text(name):
    return (ROOT / name).read_text("utf-8")


CORE = requirements(PROJECT["dependencies"])
EXTRAS = {
    name: requirements(lines)
    for name, lines in PROJECT["optional-dependencies"].items()
}
DECLARED = [CORE, *EXTRAS.values()]
# Extras that stand in no environment of ours: DeepSpeed is built from source.
BY_HAND = {"deepspeed"}
# What the library imports where it is installed, and does without elsewhere.
WHERE_INSTALLED = {"triton", *EXTRAS["serve"], *EXTRAS["deepspeed"]}
PINS = requirements(
    line for line in text("constraints.txt").splitlines() if not line.startswith("#")
)


def in_git():
    """Every file that is in git, or would be after `git add .`; by its path."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this copy of the project is no git repository")
    names = set(done.stdout.decode().split("\0"))
    return sorted(name for name in names if name and (ROOT / name).is_file())


# ------------------------------------------------------------------------- Packages


def test_a_package_has_one_range_in_pyproject():
    for declared in DECLARED:
        for name, requirement in declared.items():
            ranges = {d[name].specifier for d in DECLARED if name in d}
            assert ranges == {requirement.specifier}, name


def test_environment_has_the_ranges_of_pyproject():
    environment = yaml.safe_load(text("environment.yml"))
    *conda, pip = environment["dependencies"]
    options = [line for line in pip["pip"] if line.startswith("-")]
    listed = requirements(line for line in pip["pip"] if not line.startswith("-"))

    assert environment["name"] == PROJECT["name"]
    assert f"python{PROJECT['requires-python']}" in conda
    assert options[0] == "--constraint constraints.txt"
    assert set(re.findall(r"\w+", options[1])) == {"editable", *EXTRAS} - BY_HAND
    assert {"torch", "transformers", "datasets", "bitsandbytes"} <= set(listed)
    assert {"jupyterlab", "matplotlib", "nbval"} <= set(listed)
    for name, requirement in listed.items():
        ranges = {d[name].specifier for d in DECLARED if name in d}
        assert ranges == {requirement.specifier}, name


def test_constraints_are_exact_and_inside_the_ranges():
    for name, pin in PINS.items():
        assert re.fullmatch(r"==[^+*,]+", str(pin.specifier)), pin
        version = str(pin.specifier).removeprefix("==")
        for declared in DECLARED:
            if name in declared:
                assert version in declared[name].specifier, pin


def test_constraints_hold_everything_that_gets_installed():
    """The declared packages, those that they require, and so on, on this platform."""
    listed = [CORE, *(EXTRAS[extra] for extra in EXTRAS if extra not in BY_HAND)]
    waiting = [(name, ()) for declared in listed for name in declared]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen or NOT_PINNED.match(name):
            continue
        seen.add((name, extras))
        assert name in PINS, f"{name} is not in constraints.txt: make lock"
        waiting += needed_by(name, extras)


def needed_by(name, extras):
    """(canonical name, extras) of what an installed package requires here."""
    try:
        lines = requires(name) or []
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed: this takes all extras")
    for requirement in map(Requirement, lines):
        settings = [{"extra": extra} for extra in ("", *extras)]
        marker = requirement.marker
        if marker is None or any(marker.evaluate(setting) for setting in settings):
            yield canonicalize_name(requirement.name), tuple(sorted(requirement.extras))


# ------------------------------------------------------------------------- Imports


def imported(folder):
    """{distribution: [file: where it is imported]}, our own modules left out."""
    providers = packages_distributions()
    folders = ("tests/**", "notebooks", "benchmarks")
    files = [path for folder in folders for path in ROOT.glob(f"{folder}/*.py")]
    ours = {path.stem for path in files} | {PACKAGE, "laws", "tools"}
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in modules(ast.parse(path.read_text("utf-8"))):
            if name not in ours | sys.stdlib_module_names:
                distribution = canonicalize_name(providers.get(name, [name])[0])
                found.setdefault(distribution, []).append(path.name)
    return found


def modules(tree):
    """The first part of the name of every module that is imported absolutely."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_the_library_imports_what_it_declares_and_declares_what_it_imports():
    found = imported("peft_from_scratch")
    undeclared = found.keys() - CORE.keys() - WHERE_INSTALLED
    assert not undeclared, {name: found[name] for name in undeclared}
    assert not CORE.keys() - found.keys()


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "notebooks"])
def test_other_imports_are_declared_by_an_extra(folder):
    found = imported(folder)
    undeclared = found.keys() - {name for declared in DECLARED for name in declared}
    assert not undeclared, {name: found[name] for name in undeclared}


# ------------------------------------------------------------------------- Pages


def test_the_makefile_has_every_target_that_is_spoken_of():
    phony = re.search(r"^\.PHONY: (.*)$", text("Makefile"), re.MULTILINE)[1].split()
    assert set(phony) >= TARGETS
    assert set(phony) == set(re.findall(r"^(\w+):.* ## ", text("Makefile"), re.M))
    pages = [name for name in in_git() if name.endswith((".md", ".ipynb"))]
    for page in [*pages, ".ci/run"]:
        spoken_of = re.findall(COMMAND, text(page), re.MULTILINE)
        assert set(filter(None, itertools.chain(*spoken_of))) <= set(phony), page


def test_readme_shows_every_room_once():
    """Rooms of the package and folders of the project that hold files in git."""
    found = {Path(name).parts for name in in_git()}
    rooms = {parts[1] for parts in found if parts[0] == PACKAGE and len(parts) > 2}
    folders = {parts[0] for parts in found if len(parts) > 1 and parts[0][0] != "."}
    listed = re.findall(r"^(?:  )?(\w+)/(?: {2,}\S|$)", tree(text("README.md")), re.M)
    assert sorted(listed) == sorted(rooms | folders)


def test_readme_is_read_in_one_sitting():
    assert len(text("README.md").splitlines()) <= 200


def test_every_room_says_what_is_in_it():
    """Its `__init__` opens with an essay that names each of its files, and ends there.

    What else it may hold are names: an import, a table of names, `__getattr__`.
    """
    for room in sorted((ROOT / PACKAGE).rglob("__init__.py")):
        essay = ast.get_docstring(ast.parse(room.read_text("utf-8"))) or ""
        files = [path for path in room.parent.glob("*.py") if path != room]
        named = [path.name for path in files if path.stem in essay]
        assert len(essay) > 50, room
        if room.parent.name not in LONG_LISTS:
            assert len(named) == len(files), (room, set(map(str, files)) - set(named))


def tree(page):
    """The README's fenced block of rooms and folders."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if f"{PACKAGE}/" in block.splitlines()]
    return block


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_task_is_the_one_that_the_data_page_describes(name):
    task = load_task(name)
    later = () if task.search is task.validation else ("search", "final")
    for split in ("train", "validation", "test", *later):
        rows = list(getattr(task, split))
        lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        digest = hashlib.sha256(lines.encode()).hexdigest()[:16]
        row = f"| `{name}` | {split} | {len(rows)} | `{digest}` |"
        assert row in text("data/DATA.md").splitlines()


def test_one_version():
    changelog = re.search(r"^## \[?(\d[^\]\s]*)", text("CHANGELOG.md"), re.MULTILINE)
    assert PROJECT["version"] == pfs.__version__ == changelog[1]


def test_no_file_is_large_or_names_a_private_path():
    private = re.compile(rb"(?<![\w.:/~$}-])/(work|tmp|root)/\w")
    for name in in_git():
        data = (ROOT / name).read_bytes()
        assert len(data) <= LARGEST, f"{name}: {len(data)} bytes"
        found = private.search(data)
        assert not found, f"{name}: {data[found.start() :][:60]}"


def test_no_two_test_files_share_a_name():
    """pytest imports them by name alone, and refuses the second one."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_every_test_that_the_gotchas_name_exists():
    written = {
        found
        for path in (ROOT / "tests").rglob("*.py")
        for found in re.findall(r"^def (\w+)\(", path.read_text("utf-8"), re.MULTILINE)
    }
    rows = re.findall(r"^\|.*\|$", text("tests/GOTCHAS.md"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([a-zA-Z]\w*_\w+)`", row)}
    assert len(named) > 40 and not named - written


# Participles say that something happened to a value, and not what it is.
EMPTY_NAMES = {"found", "made", "held", "told", "said"}


def names_of_values(tree):
    """The names of all arguments and local variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


@pytest.mark.parametrize("folder", [PACKAGE, "tools"])
def test_values_are_named_for_what_they_are(folder):
    for path in (ROOT / folder).rglob("*.py"):
        names = set(names_of_values(ast.parse(path.read_text("utf-8"))))
        empty = names & EMPTY_NAMES
        assert not empty, f"{path.relative_to(ROOT)} calls a value {empty}"
