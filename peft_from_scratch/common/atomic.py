"""Files and folders that appear, and disappear, whole or not at all.

Each is made under a temporary name beside its final place and renamed, and goes the
same way: a reader, a full disk or a SIGKILL never leaves half of one under its name.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".partial-"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_folder_beside(path) as folder:
        yield folder / path.name
        _finish(folder / path.name)
        os.replace(folder / path.name, path)


@contextmanager
def new_files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A temporary folder to fill with files of these names: `folder` gets all or none.

    Where one cannot be put in its place, the files of before come back. The first name
    goes first and comes last, so that a kill in between leaves a folder without it, and
    never an old file beside a new one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with new_folder_beside(folder / names[0]) as work:
        yield work
        for name in names:
            _finish(work / name)
        before = work / "before"
        before.mkdir()
        try:
            for name in names:
                if (folder / name).is_file():
                    os.replace(folder / name, before / name)
            for name in reversed(names):
                os.replace(work / name, folder / name)
        except BaseException:
            for name in reversed(names):
                _bring_back(before / name, folder / name, work / name)
            raise


def _bring_back(old: Path, place: Path, new: Path) -> None:
    """Undo a replacement, as far as it came: `new` is gone where it took its place."""
    if old.is_file():
        os.replace(old, place)
    elif not new.exists():
        place.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, renamed at the end to `path`, which must be new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_folder_beside(path) as folder:
        yield folder
        for file in folder.rglob("*"):
            _finish(file)
        os.replace(folder, path)


@contextmanager
def new_folder_beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the same disk as `path`, gone when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
    folder.chmod(0o755)  # mkdtemp keeps others out; a shared course folder must not
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder; a kill on the way leaves a temporary name for `sweep`."""
    with new_folder_beside(path) as bin:
        os.replace(path, bin / path.name)


def sweep(folder: Path) -> None:
    """Delete what killed writes and removals left in `folder`."""
    for leftover in Path(folder).glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _finish(file: Path) -> None:
    """Bytes on the disk, and readable by others: safetensors writes mode 0600."""
    if file.is_file():
        file.chmod(0o644)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
