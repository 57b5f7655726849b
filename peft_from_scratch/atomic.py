"""Files and folders that appear whole or not at all.

Each is made under a temporary name beside its final place and renamed: a reader, a full
disk or a SIGKILL never leaves half a file under the real name.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
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


def sweep(folder: Path) -> None:
    """Delete what killed writes left in `folder`."""
    for leftover in Path(folder).glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _finish(file: Path) -> None:
    """Bytes on the disk, and readable by others: safetensors writes mode 0600."""
    if file.is_file():
        file.chmod(0o644)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
