"""Where a number came from: code, packages, machine, seed. Result files say it."""

import ast
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .digest import digest

PACKAGES = ("torch", "transformers", "datasets", "safetensors", "peft-from-scratch")
PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent  # of the repository, where there is one


def provenance(*, seed: int, device: torch.device | str = "cpu") -> dict:
    """What a reader needs to judge or repeat a result, as JSON can hold it."""
    commit, changed = git_commit()
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "changed": changed,
        "machine": f"{processor()}, {os.cpu_count()} cores, {memory_gib():.0f} GiB",
        "device": device_name(torch.device(device)),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def code_digest(starts: Iterable[Path]) -> str:
    """The digest of these files of the package and of all that they import from it."""
    return digest(*(file.read_text("utf-8") for file in sorted(imported(starts))))


def imported(starts: Iterable[Path]) -> set[Path]:
    """These files and those of the package that they import, directly or not.

    Imports inside functions count, and so does the `__init__` of every folder on the
    way. The package's own does not: it only names what other files hold.
    """
    closure, waiting = set(), {Path(start).resolve() for start in starts}
    while waiting:
        file = waiting.pop()
        closure.add(file)
        waiting |= set(_imports(file)) - closure
    return closure


def _imports(file: Path) -> Iterator[Path]:
    """The files of the package that a file imports itself, by relative imports."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = file.parents[node.level - 1]
            names = node.module.split(".") if node.module else []
            yield from _files(base, names)
            for alias in node.names:
                yield from _files(base, [*names, alias.name])


def _files(base: Path, names: Sequence[str]) -> Iterator[Path]:
    """The files of the module `names` below the folder `base`: itself, its `__init__`s.

    Nothing for a name that is no module, but something in one.
    """
    place = base.joinpath(*names)
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file() and path.parent != PACKAGE.parent:
            folders = [folder for folder in path.parents if PACKAGE in folder.parents]
            yield from (folder / "__init__.py" for folder in folders)
            if path != PACKAGE / "__init__.py":
                yield path


def git_commit() -> tuple[str | None, bool | None]:
    """(commit, whether files differ from it); (None, None) outside a git checkout."""
    try:
        return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_gib() -> float:
    """The machine's memory in GiB; NaN where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return float("nan")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU (MPS)" if device.type == "mps" else device.type


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(
        command,
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},  # only looked at: nothing written
        capture_output=True,
        text=True,
        errors="replace",  # a name of a file, where the locale is not the file system's
        check=True,
        timeout=10,
    )
    return done.stdout.strip()
