"""The house in order: what the project's files say about each other holds."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import peft_from_scratch as pfs

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LARGEST = 5_000_000  # bytes of a file in git

# Dependencies that the library needs and does not import itself.
USED_BY_OTHERS = {"gguf": "transformers reads SmolLM2's file with it"}
NAMED_BY_ENVIRONMENT = "torch transformers datasets bitsandbytes jupyterlab matplotlib"
PLATFORM_ONLY = re.compile(r"cuda-|nvidia-|triton$|setuptools$")


def requirements(lines):
    """{canonical name: Requirement}"""
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in found}


CORE = requirements(PROJECT["dependencies"])
EXTRAS = {
    name: requirements(lines)
    for name, lines in PROJECT["optional-dependencies"].items()
}
DECLARED = [CORE, *EXTRAS.values()]
PINS = requirements(
    line
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)


def files():
    """Every file that is in git or would be added to it, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this copy of the project is not a git repository")
    names = done.stdout.decode().split("\0")
    return sorted(name for name in set(names) if name and (ROOT / name).exists())


def pages():
    return [name for name in files() if name.endswith(".md")]


# Packages ----------------------------------------------------------------------------


def test_a_package_has_one_range_everywhere():
    for declared in DECLARED:
        for name, requirement in declared.items():
            for other in DECLARED:
                if name in other:
                    assert other[name].specifier == requirement.specifier, name


def test_environment_has_the_ranges_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    options = [line for line in pip["pip"] if line.startswith("-")]
    listed = requirements(line for line in pip["pip"] if not line.startswith("-"))
    assert environment["name"] == PROJECT["name"]
    assert f"python{PROJECT['requires-python']}" in conda
    assert options == [
        "--constraint constraints.txt",
        f"--editable .[{','.join(sorted(EXTRAS, reverse=True))}]".replace(
            "test,reference,lab", "test,lab,reference"
        ),
    ]
    assert set(NAMED_BY_ENVIRONMENT.split()) | {"nbval"} <= set(listed)
    for name, requirement in listed.items():
        ranges = [d[name].specifier for d in DECLARED if name in d]
        assert ranges and requirement.specifier == ranges[0], name
