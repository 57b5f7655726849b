"""Files and folders that appear, and disappear, whole or not at all.

Each is made under a temporary name beside its final place and renamed, and goes the
same way: a reader, a full disk or a SIGKILL never leaves half of one under its name.

A disk that takes no more is one kind of error here, an OSError that names the final
place and says what is there now. The libraries that write raise others: safetensors a
SafetensorError, tokenizers a bare Exception.
"""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".partial-"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
OF_RUST = re.compile(r"([^:]+) \(os error (\d+)\)")  # how libraries in Rust say it


@contextmanager
def clear_about_disk(path: Path) -> Iterator[None]:
    """OSError that names `path` and what is there now, where the disk takes no more."""
    path = Path(path)
    left = "is as it was" if path.exists() else "was not made"
    try:
        yield
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        number, reason = refusal
        raise OSError(
            number,
            f"{reason}: {path} cannot be written and {left}; make room, or name "
            "another place",
        ) from error


def _refusal(error: Exception) -> tuple[int, str] | None:
    """(errno, the system's words) of an error in writing; None for any other."""
    if isinstance(error, OSError):
        if error.errno not in FULL or error.__cause__:  # with a cause, it is clear
            return None
        return error.errno, os.strerror(error.errno)
    match = OF_RUST.search(str(error))
    if match is None:
        return None
    number = int(match[2])
    if os.name == "nt":  # Windows' number of the error, of which Python knows the errno
        number = OSError(0, "", None, number).errno
    return number, match[1].strip()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` when the block ends well."""
    path = Path(path)
    with clear_about_disk(path), _beside(path) as folder:
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
    with clear_about_disk(folder), _beside(folder / names[0]) as work:
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
    with clear_about_disk(path), _beside(path) as folder:
        yield folder
        for file in folder.rglob("*"):
            _finish(file)
        os.replace(folder, path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """new_folder_beside; folders above are made, and go again where the block fails."""
    missing = [each for each in path.parents if not each.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with new_folder_beside(path) as folder:
            yield folder
    except BaseException:
        for each in missing:
            with suppress(OSError):  # somebody else has put something there
                each.rmdir()
        raise


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
