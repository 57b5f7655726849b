"""Adapters by the thousand on disk, some of them in memory, within a budget of bytes.

    add      read a folder, check it against the model, note its digest
    acquire  the content, pinned while in use; read again where it had to leave
    release  no longer in use: it may leave when the bytes are needed
    remove   forget the name; its bytes are free once nobody uses them

A name stands for the folder's content at the time of `add`. The content has a digest,
and all that is kept for an adapter anywhere, keys and values above all, is kept under
this digest, never under the name. A second `add` under a name makes a new version:
those who use the old one go on with it, those who come get the new one. A folder whose
bytes changed after `add` is refused, until it is added again.

Of those that nobody uses, the least recently used leaves first.
"""

import hashlib
import re
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..common.check import shortened, whole
from ..core.adapter import refuse_unfit
from ..files import base_notes, exchange
from ..files.adapter_file import CONFIG, WEIGHTS, AdapterFile
from .batch import Batch, Slots, Version
from .skeleton import skeleton

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
CHUNK = 1 << 20  # bytes of a file that are read at once


class PoolFull(RuntimeError):
    """All adapters in memory are in use, and another one does not fit beside them."""


@dataclass(eq=False)
class Entry:
    """What the pool knows of a version of a name.

    content  None while it is not in memory
    added    when, in seconds since 1970
    users    that have acquired it and not released it yet
    used     when it was last acquired, in acquisitions of the whole pool
    digest, rank, bytes   of the content, whether it is in memory or not
    """

    name: str
    folder: Path
    content: Version | None
    added: float
    users: int = 0
    used: int = 0

    def __post_init__(self):
        self.digest = self.content.digest
        self.rank, self.bytes = self.content.rank, self.content.bytes

    @property
    def resident(self) -> bool:
        return self.content is not None


@dataclass
class Counters:
    """Of acquired adapters, those in memory (hits) and those that had to be read first
    (misses); loads from disk; evictions for want of bytes."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0


class AdapterPool:
    """The adapters that a model can answer with, by name.

    Args
        model         without adapters; it is not changed, but inside `batch`
        budget_bytes  that adapters in memory may take together; a gathered batch takes
                      a copy of its rows' adapters besides
        root          a folder: adapters outside of it are refused, those that a
                      symbolic link leads to as well; None: any folder
    Raises   ValueError   a model that carries adapters; no positive number of bytes
    Threads  may call any method at any time, but for `batch`, which is for one
    """

    def __init__(
        self, model: nn.Module, *, budget_bytes: int, root: str | Path | None = None
    ):
        whole("budget_bytes", budget_bytes, 1, of="bytes")
        refuse_unfit(model)
        self.model = model
        self.budget_bytes = budget_bytes
        self.root = None if root is None else Path(root).resolve(strict=True)
        self.counters = Counters()
        self.slots = Slots(model)
        self._skeleton = skeleton(model)
        self._bits = base_notes.base_bits(model)
        self._entries: dict[str, Entry] = {}
        self._old: list[Entry] = []  # replaced or removed, and still in use
        self._clock = 0
        self._lock = threading.RLock()
        self._reading = threading.Lock()  # one folder is read at a time

    # ------------------------------------------------------------- What there is

    @property
    def bytes(self) -> int:
        """Bytes of all adapters in memory, old versions that are in use included."""
        with self._lock:
            return sum(entry.bytes for entry in self._resident())

    def cards(self) -> list[Entry]:
        """All that have a name, in the order in which they were added."""
        with self._lock:
            return list(self._entries.values())

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def is_resident(self, name: str) -> bool:
        """Whether acquiring it would read no file. KeyError for an unknown name."""
        with self._lock:
            return self._entry(name).resident

    # ------------------------------------------------------------- Add and remove

    def add(self, name: str, folder: str | Path) -> str:
        """Read a folder, ours or PEFT's, and have it under this name from now on.

        Returns  the digest of its bytes
        Warns    UserWarning   an adapter that changes nothing, an untrained one
        Raises   ValueError   a name that could be a path; a folder outside of `root`; a
                 file that is broken, does not fit the model, holds more than a batch
                 can mix (the message says what), or is larger than the budget
                 FileNotFoundError   one of the two files is not there
                 PoolFull   no room beside those in use
                 The pool is then as it was, but for adapters that made room
        """
        _refuse_bad_name(name)
        folder = self._inside(folder)
        with self._reading:
            version = self._read(name, folder, digest_of(folder))
            if _changes_nothing(version):
                text = f"the adapter from {folder} changes nothing: it is untrained"
                warnings.warn(text, stacklevel=2)
            self._install(Entry(name, folder, version, time.time()))
        return version.digest

    def _install(self, entry: Entry) -> None:
        """Put a new version in the place of the one of its name."""
        with self._lock:
            old = self._entries.get(entry.name)
            leaving = 0 if old is None or old.users else old.bytes * old.resident
            self._make_room(entry, leaving)
            self._forget(entry.name)
            self._entries[entry.name] = entry
            self.counters.loads += 1
            self._touch(entry)

    def remove(self, name: str) -> None:
        """Forget a name. Its bytes are free at once, or when nobody uses it any more.

        Raises  KeyError  an unknown name, also one that was removed before
        """
        with self._lock:
            self._entry(name)
            self._forget(name)

    def _forget(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None and entry.users:
            self._old.append(entry)
        elif entry is not None:
            entry.content = None

    # ------------------------------------------------------------- Use

    def acquire(self, name: str, *, fetched: bool = False) -> Version:
        """The present version of a name, in memory until it is released.

        Args
            fetched  it was read for this use: counted as a miss, though it is here now
        Raises  KeyError    an unknown name
                ValueError  a name that could be a path; a folder that has changed or
                broken since it was added
                FileNotFoundError   a folder that is gone
                PoolFull    no room beside those in use
        """
        _refuse_bad_name(name)
        with self._lock:
            entry = self._entry(name)
            if entry.resident:
                self.counters.hits += not fetched
                self.counters.misses += fetched
                return self._pin(entry)
        version = self._loaded(name)
        self.counters.misses += 1
        return version

    def fetch(self, name: str) -> None:
        """Have a name's content in memory, as far as nobody needs the room.

        Raises  as acquire()
        """
        self.release(self._loaded(name))

    def _loaded(self, name: str) -> Version:
        """The present version, read if need be, and pinned."""
        with self._reading:
            with self._lock:
                entry = self._entry(name)
                if entry.resident:  # another thread has just read it
                    return self._pin(entry)
            digest = digest_of(self._inside(entry.folder))
            _refuse_changed(entry, digest)  # before another one leaves for it
            with self._lock:
                self._make_room(entry)
            return self._read_again(name, entry)

    def _read_again(self, name: str, entry: Entry) -> Version:
        version = self._read(name, entry.folder, entry.digest)
        with self._lock:
            if self._entries.get(name) is not entry:
                raise KeyError(f"{name!r} was removed while it was read")
            entry.content = version
            self.counters.loads += 1
            return self._pin(entry)

    def release(self, version: Version) -> None:
        """What `acquire` gave is no longer in use.

        Raises  ValueError  it was not acquired, or was released before
        """
        with self._lock:
            entry = self._holder(version)
            if entry is None or not entry.users:
                raise ValueError(f"{version.name!r} is not in use: released twice?")
            entry.users -= 1
            if not entry.users and entry in self._old:
                self._old.remove(entry)
                entry.content = None

    @contextmanager
    def batch(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, row i of the model's batch is answered with the adapter names[i].

        None is the base alone. For `model(...)` and `model.generate(...)`, with as many
        rows as names. Afterwards the model is what it was.

        Raises  KeyError    an unknown name
                ValueError  a name that could be a path, no names, or the model is
                called with another number of rows
                PoolFull    more adapters than fit the budget
        """
        if isinstance(names, str) or not names:
            raise ValueError(f"names={names!r}: a list of one name a row, or None")
        with ExitStack() as stack:
            versions = {None: None}
            for name in dict.fromkeys(names):
                if name is not None:
                    versions[name] = self.acquire(name)
                    stack.callback(self.release, versions[name])
            with self.slots.using(Batch([versions[name] for name in names])):
                try:
                    yield
                finally:
                    self.slots.remove()

    # ------------------------------------------------------------- Within the lock

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise KeyError(f"no adapter is called {shortened(name)}")
        return self._entries[name]

    def _resident(self) -> list[Entry]:
        return [e for e in (*self._entries.values(), *self._old) if e.resident]

    def _holder(self, version: Version) -> Entry | None:
        return next((e for e in self._resident() if e.content is version), None)

    def _pin(self, entry: Entry) -> Version:
        entry.users += 1
        self._touch(entry)
        return entry.content

    def _touch(self, entry: Entry) -> None:
        self._clock += 1
        entry.used = self._clock

    def _make_room(self, entry: Entry, leaving: int = 0) -> None:
        """Let adapters that nobody uses leave until this one fits, or none of them.

        Args
            leaving  bytes of the version that it will replace
        """
        if entry.bytes > self.budget_bytes:
            raise ValueError(
                f"{entry.name!r} takes {entry.bytes} bytes, more than budget_bytes = "
                f"{self.budget_bytes}: raise the budget"
            )
        over = self.bytes - leaving + entry.bytes - self.budget_bytes
        idle = [e for e in self._resident() if not e.users and e.name != entry.name]
        going = []
        for other in sorted(idle, key=lambda e: e.used):
            if over <= 0:
                break
            going.append(other)
            over -= other.bytes
        if over > 0:
            raise PoolFull(
                f"{entry.name!r} needs {entry.bytes} of {self.budget_bytes} bytes, and "
                "the adapters in use leave too few: release some, or raise the budget"
            )
        for other in going:
            other.content = None
            self.counters.evictions += 1

    # ------------------------------------------------------------- From disk

    def _inside(self, folder: str | Path) -> Path:
        """The folder, if it and its two files are in `root`; else a ValueError."""
        folder = Path(folder)
        if self.root is None:
            return folder
        folder = self.root / folder
        for path in (folder, folder / CONFIG, folder / WEIGHTS):
            if not path.resolve().is_relative_to(self.root):
                raise ValueError(
                    f"{shortened(str(folder))} is not inside {self.root}: only folders "
                    "there can be added, and no links that lead elsewhere"
                )
        return folder

    def _read(self, name: str, folder: Path, digest: str) -> Version:
        """A folder's content, checked against the model.

        Args
            digest  of the folder just before
        """
        self._refuse_large(folder / WEIGHTS)
        file = AdapterFile.read(folder)
        if digest_of(folder) != digest:
            raise ValueError(f"{folder} was written to while it was read: add it again")
        if text := base_notes.other_bits(self._bits, file.notes, folder):
            warnings.warn(text, stacklevel=3)
        return Version(name, digest, self._layers(file))

    def _refuse_large(self, file: Path) -> None:
        """ValueError for a file whose content cannot fit, before it is in memory.

        Halved, since a file in float64 becomes half as many bytes.
        """
        size = file.stat().st_size
        if size // 2 > self.budget_bytes:
            raise ValueError(
                f"{file} has {size} bytes, which cannot fit into budget_bytes = "
                f"{self.budget_bytes}"
            )

    def _layers(self, file: AdapterFile) -> dict:
        """{module: (A, B)} for Version; ValueError for what no batch can mix."""
        if file.format.method != "lora":
            raise ValueError(
                f"{file.folder} is a {file.format.method} adapter: the rows of a batch "
                "can have plain LoRAs of their own, and nothing else. "
                f"{REASONS.get(file.format.method, REASONS[None])}"
            )
        file, plan = exchange.fitting(self._skeleton, file)
        if plan.base_params:
            raise ValueError(
                f"{file.folder} trained {plan.base_params[0]} of the base as well "
                f"(bias={file.config.get('bias')!r}): all rows of a batch share it"
            )
        device = next(self.model.parameters()).device
        layers = {}
        for module, layer in plan.adapters.items():
            keys = file.format.tensors
            A, B = (file.tensors[file.format.key(module, keys[n])] for n in "AB")
            # Copies: a file's tensors are its pages, fatal to read once it is cut.
            as_served = {"device": device, "dtype": layer.A.dtype, "copy": True}
            layers[module] = A.to(**as_served), layer.scale * B.to(**as_served)
        return layers


REASONS = {  # method: why its adapters cannot be mixed within a batch
    "dora": "DoRA rescales W0 + B A as a whole: merge it into a base of its own",
    "prefix": "A prefix adds keys and values of its own to each layer",
    "prompt": "A prompt adds positions of its own to the sequence",
    "full": "It holds a whole base: serve that",
    None: "It changes more than the products with W0",
}


def digest_of(folder: Path) -> str:
    """The sha256 of an adapter's two files, each with its length before it."""
    total = hashlib.sha256()
    for path in (folder / CONFIG, folder / WEIGHTS):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist as a file: an adapter's folder holds {CONFIG} "
                f"and {WEIGHTS}"
            )
        total.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(CHUNK):
                total.update(block)
    return total.hexdigest()


@torch.no_grad()
def _changes_nothing(version: Version) -> bool:
    """Whether B A x is zero at every layer, for a random x."""
    for A, B in version.layers.values():
        dice = torch.Generator().manual_seed(0)
        x = torch.randn(A.shape[1], generator=dice).to(A)
        if (B @ (A @ x)).any():
            return False
    return True


def _refuse_changed(entry: Entry, digest: str) -> None:
    """ValueError where a folder's bytes are not those that were added."""
    if digest != entry.digest:
        raise ValueError(
            f"{entry.folder} has changed since {entry.name!r} was added: add it again"
        )


def _refuse_bad_name(name: object) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"{shortened(name)} is no name of an adapter: allowed are letters, digits, "
            "'.', '_' and '-', at most 100, and no path"
        )
