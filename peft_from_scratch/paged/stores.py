"""Stores: where the pages of an optimizer are when they are not in its arena.

    CPU     `FileStore`, a file in shared mapping. The system keeps as much of it in
            memory as it can spare and takes it back when it cannot, so the states may
            be larger than memory
    CUDA    `PinnedStore`, page-locked host memory. Copies run on two streams of their
            own, in and out, in parallel with kernels; an event says when a page has
            arrived

Both hold `words`, a flat int64 tensor, and have the verbs read, write, wait_for and
synchronize.
"""

import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

WORD = 8  # bytes; pages are copied as int64, and start where every dtype may start
CHUNK = bytes(1 << 20)
NOT_HERE = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}  # cannot reserve blocks


class FileStore:
    """A file without a name, mapped into the address space; copies are immediate.

    The file is deleted before it is used, so that no end of the process leaves it
    behind. Its blocks are reserved now: on a disk that fills up later, a write to the
    mapping would end the process with SIGBUS.

    Args
        words      size, in words of 8 bytes
        directory  where; None for tempfile.gettempdir()
    Raises   OSError   no room, with the bytes wanted and the bytes free
    """

    def __init__(self, words: int, directory: str | os.PathLike | None = None):
        size = WORD * max(words, 1)
        directory = tempfile.gettempdir() if directory is None else directory
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                reserve(file, size)
                mapping = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: the states need a file of {size} bytes in "
                f"{os.fspath(directory)!r}{_free(directory)}; name another folder with "
                "directory=…",
            ) from error
        self.words = torch.frombuffer(mapping, dtype=torch.int64)

    def read(self, page, slot: Tensor) -> None:
        """Copy a page into its slot; zeros where it was never written."""
        if page.stored:
            slot.copy_(self.place(page), non_blocking=True)  # only CUDA cares
        else:
            slot.zero_()

    def write(self, page, slot: Tensor) -> None:
        """Copy a slot to the page's place."""
        self.place(page).copy_(slot, non_blocking=True)

    def wait_for(self, page) -> None:
        """Make later work of the device wait until the page is in its slot."""

    def synchronize(self) -> None:
        """Wait until every copy is made."""

    def place(self, page) -> Tensor:
        return self.words[page.place : page.place + page.words]


class PinnedStore(FileStore):
    """Page-locked host memory; copies run on two side streams, one each way.

    A copy starts when the kernels asked for so far are done, for they may still use the
    slot. A page comes in when all pages that left before it are out: one of them may
    have had its slot, or be the page itself. Kernels asked for after `wait_for` wait
    for the page.

    torch rounds page-locked memory up to a power of two, and keeps it for later use:
    5 GB of states lock 8 GiB.
    """

    def __init__(self, words: int, device: torch.device):
        self.words = torch.empty(words, dtype=torch.int64, pin_memory=True)
        self.device = device
        self.inward, self.outward = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.last_out = None  # the event of the last page that left

    def read(self, page, slot: Tensor) -> None:
        if self.last_out is not None:
            self.inward.wait_event(self.last_out)
        page.copied = self._on(self.inward, super().read, page, slot)

    def write(self, page, slot: Tensor) -> None:
        self.last_out = self._on(self.outward, super().write, page, slot)

    def wait_for(self, page) -> None:
        torch.cuda.current_stream(self.device).wait_event(page.copied)

    def synchronize(self) -> None:
        self.inward.synchronize()
        self.outward.synchronize()

    def _on(self, stream, copy: Callable, page, slot: Tensor):
        """Ask for the copy on this stream; the event of its end."""
        stream.wait_stream(torch.cuda.current_stream(self.device))
        if slot.is_cuda:
            slot.record_stream(stream)  # an arena that is dropped waits for its copies
        with torch.cuda.stream(stream):
            copy(page, slot)
            return stream.record_event()


def reserve(file, size: int) -> None:
    """Blocks on the disk for `size` bytes of zeros, or an OSError."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
    for start in range(0, size, len(CHUNK)):  # macOS, Windows, some file systems
        file.write(CHUNK[: size - start])
    file.flush()


def _free(directory) -> str:
    try:
        return f", which has {shutil.disk_usage(directory).free} bytes free"
    except OSError:
        return ""
