"""Loads and stores of a kernel, element by element, as the interpreter runs it.

    with trace() as seen:
        lora_linear(x, W, A, B, scale, backend="triton")
    seen.bytes("load"), seen.bytes("load", distinct=True)

*Issued* bytes are those of every load and store that a mask lets through; a GPU fetches
less than that from its memory, where a cache still holds some. *Distinct* bytes count
each element once: what any program must move at least, were its caches endless.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch

from .language import INTERPRETED, observed


@dataclass(frozen=True)
class Access:
    """One load or store of one program."""

    kind: str  # "load" or "store"
    kernel: str
    program: tuple[int, int, int]
    tensor: str  # the kernel's name of it; "?" for one that is not known
    elements: np.ndarray = field(repr=False)  # positions in the tensor's memory
    itemsize: int  # bytes


@dataclass
class Trace:
    """All accesses, in their order."""

    accesses: list[Access] = field(default_factory=list)

    def of(self, kind: str | None = None, tensor: str | None = None) -> list[Access]:
        """The accesses of a kind ("load", "store") and of a tensor; None: of any."""
        return [
            a
            for a in self.accesses
            if kind in (None, a.kind) and tensor in (None, a.tensor)
        ]

    def bytes(
        self,
        kind: str | None = None,
        tensor: str | None = None,
        *,
        distinct: bool = False,
    ) -> int:
        """Bytes issued, or of distinct elements (once read, once written)."""
        accesses = self.of(kind, tensor)
        if not distinct:
            return sum(len(a.elements) * a.itemsize for a in accesses)
        groups: dict[tuple, list] = {}
        for a in accesses:
            groups.setdefault((a.kind, a.tensor, a.itemsize), []).append(a.elements)
        return sum(
            len(np.unique(np.concatenate(elements))) * key[2]
            for key, elements in groups.items()
        )

    @property
    def tensors(self) -> list[str]:
        """Their names, in the order of their first access."""
        return list(dict.fromkeys(a.tensor for a in self.accesses))


@contextmanager
def trace(**tensors: torch.Tensor) -> Iterator[Trace]:
    """Note each load and store of the kernels that are interpreted within.

    Args
        tensors   names for tensors of kernels that are not launched by `launch`, whose
                  arguments are known by name already
    Raises   RuntimeError   Triton compiles here instead of interpreting
    """
    if not INTERPRETED:
        raise RuntimeError(
            "trace() watches Triton's interpreter: set the environment variable "
            "TRITON_INTERPRET=1 before Python starts"
        )
    from triton.runtime.interpreter import InterpreterBuilder

    seen, known, current = Trace(), dict(tensors), ["?"]

    def note_launch(launch) -> None:
        current[0] = launch.kernel.fn.__name__
        known.update(_tensors(launch.arguments))

    def note(kind, builder, pointers, mask) -> None:
        dtype = pointers.get_element_ty()
        size = max(1, dtype.primitive_bitwidth // 8)
        at = pointers.data[mask.data.astype(bool)].astype(np.int64)
        name, start = _owner(known, at)
        program = tuple(builder.grid_idx)
        elements = (at - start) // size
        seen.accesses.append(Access(kind, current[0], program, name, elements, size))

    load, store = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def noted_load(self, pointers, mask, *rest):
        note("load", self, pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        note("store", self, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", noted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", noted_store),
        observed(note_launch),
    ):
        yield seen


def _tensors(arguments: dict) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in arguments.items():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, torch.Tensor):
                yield name, part


def _owner(known: dict[str, torch.Tensor], at: np.ndarray) -> tuple[str, int]:
    """(the name of the tensor whose memory these addresses are in, its first byte)."""
    if len(at):
        for name, tensor in reversed(known.items()):
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
            if start <= at[0] < start + storage.nbytes():
                return name, tensor.data_ptr()
    return "?", 0
