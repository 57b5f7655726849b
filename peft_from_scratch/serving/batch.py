"""A gathered batch: each row has an adapter of its own, or none, in one forward pass.

    h[i] = W0 x[i] + B[v(i)] A[v(i)] x[i]        v(i): the adapter of row i

A loop over the adapters would cut the batch into pieces, and make one small product
after another. Here the A and B of all rows are laid into two tensors when the batch is
put together, and each layer makes two products of all rows at once:

    z = bmm(x, Aᵀ)        (rows, tokens, r)        A (rows, r, d_in)
    h = W0 x + bmm(z, Bᵀ) (rows, tokens, d_out)    B (rows, d_out, r), scale included

Ranks differ. Padded to the largest, a row of rank 4 would pay for a neighbor of rank
64. So ranks are rounded up to a power of two, and the rows of each such class have
tensors and products of their own: a row pays at most for twice its rank. A row without
an adapter is in no class and costs nothing. Where all rows have one adapter, nothing is
gathered: the layer is then LoRA's own (methods/lora_fast.py).

Rows come and go between two decoding steps. One that comes copies its own adapter, and
one that goes leaves its place to the last row, so that no other row is copied.

Source  the same idea as a CUDA kernel: Punica, arXiv:2310.18547; S-LoRA, 2311.03285
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import replace_modules
from ..core.targets import Wrapper, named_modules
from ..methods import lora_fast


@dataclass(frozen=True, eq=False)
class Version:
    """The content of an adapter folder, as it was when it was read.

    Args
        name    under which it was added
        digest  of the folder's bytes: what the adapter is, whatever its name
        layers  {module: (A (r, d_in), B (d_out, r) with the scale in it)}
    """

    name: str
    digest: str
    layers: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """The largest of its layers' ranks."""
        return max(len(A) for A, _ in self.layers.values())

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for pair in self.layers.values() for t in pair)


class Batch:
    """The adapters of a batch, row by row.

    versions  of the rows; None for the base alone
    only      the adapter that all rows have; None where they differ
    modules   names of all that an adapter of the batch changes
    Memory    once two rows differ, a copy of each row's adapter, padded to its class
    """

    def __init__(self, versions: Sequence[Version | None] = ()):
        self.versions: list[Version | None] = []
        self.only: Version | None = None
        self.modules: set[str] = set()
        self.stacks: dict[int, Stack] = {}  # by class of rank; none while `only` is set
        self._gathered = False
        for version in versions:
            self.append(version)

    def __len__(self) -> int:
        return len(self.versions)

    def append(self, version: Version | None) -> None:
        """One row more, at the end."""
        self.versions.append(version)
        self.modules |= set(version.layers) if version else set()
        self._compare()
        if self._gathered:
            self._join(len(self) - 1, version)
        elif self.only is None:
            self._gathered = True
            for row, each in enumerate(self.versions):
                self._join(row, each)

    def drop(self, row: int) -> None:
        """One row less: the last row takes its place."""
        last = len(self) - 1
        if self._gathered:
            self._leave(row)
            moved = self.versions[last]
            if row != last and moved is not None:
                self.stacks[class_of(moved.rank)].rename(last, row)
        self.versions[row] = self.versions[last]
        self.versions.pop()
        self._compare()

    def _join(self, row: int, version: Version | None) -> None:
        if version is not None:
            rank = class_of(version.rank)
            self.stacks.setdefault(rank, Stack(rank)).append(row, version)

    def _leave(self, row: int) -> None:
        version = self.versions[row]
        if version is not None:
            rank = class_of(version.rank)
            self.stacks[rank].drop(row)
            if not self.stacks[rank].rows:
                del self.stacks[rank]

    def _compare(self) -> None:
        first = self.versions[0] if self.versions else None
        self.only = first if all(v is first for v in self.versions) else None


class Stack:
    """The adapters of those rows of a batch that are in one class of rank.

    rank  to which all are padded with zeros
    rows  the batch's row of each place in the tensors
    A, B  {module: (places, rank, d_in)} and {module: (places, d_out, rank)}; places
          beyond the rows are unused
    """

    def __init__(self, rank: int):
        self.rank = rank
        self.rows: list[int] = []
        self.A: dict[str, Tensor] = {}
        self.B: dict[str, Tensor] = {}
        self._index: Tensor | None = None  # the rows as a tensor, made when asked for

    def append(self, row: int, version: Version) -> None:
        place = len(self.rows)
        for name in version.layers.keys() | self.A.keys():
            layer = version.layers.get(name)
            for tensors, which in ((self.A, 0), (self.B, 1)):
                value = None if layer is None else layer[which]
                self._put(tensors, name, place, value)
        self.rows.append(row)
        self._index = None

    def _put(self, tensors, name: str, place: int, value: Tensor | None) -> None:
        """Write an adapter's A or B, or zeros for a layer that it leaves alone."""
        here = tensors.get(name)
        if here is None or place >= len(here):
            like = value if here is None else here[0]
            side = self.rank if tensors is self.A else like.shape[0]
            other = like.shape[1] if tensors is self.A else self.rank
            more = like.new_zeros(max(4, 2 * place), side, other)
            if here is not None:
                more[:place] = here[:place]
            tensors[name] = here = more
        here[place].zero_()
        if value is not None:
            rows, columns = value.shape
            here[place, :rows, :columns] = value

    def drop(self, row: int) -> None:
        """Forget a row: the last place moves into its place."""
        place, last = self.rows.index(row), len(self.rows) - 1
        if place != last:
            for tensors in (self.A, self.B):
                for tensor in tensors.values():
                    tensor[place] = tensor[last]
        self.rows[place] = self.rows[last]
        self.rows.pop()
        self._index = None

    def rename(self, old: int, new: int) -> None:
        self.rows[self.rows.index(old)] = new
        self._index = None

    def add_change(self, name: str, x: Tensor, h: Tensor) -> None:
        """Add B A x to h, in place, for the rows that are here.

        Args
            x  (rows, tokens, d_in) and h (rows, tokens, d_out), all rows of the batch
        """
        if name not in self.A:
            return
        places = len(self.rows)
        At = self.A[name][:places].transpose(1, 2)
        Bt = self.B[name][:places].transpose(1, 2)
        if self._index is None:
            self._index = torch.tensor(self.rows, device=x.device)
            self._in_order = self.rows == list(range(places))
        if self._in_order and places == len(x):
            h.baddbmm_(torch.bmm(x.to(At.dtype), At), Bt)
        else:
            own = x.index_select(0, self._index).to(At.dtype)
            h.index_add_(0, self._index, torch.bmm(torch.bmm(own, At), Bt))


class Slot(Wrapper):
    """A projection whose rows may have an adapter each, those of the present batch.

        h[i] = W0 x[i] + B[v(i)] A[v(i)] x[i]

    Args
        base   the projection; frozen, and not changed
        slots  where the present batch stands
        name   of the module, as in Version.layers
    Returns  (rows, tokens, d_out), in the dtype of the base's output; half precision
             rounds the sum once
    """

    def __init__(self, base: nn.Module, slots: "Slots", name: str):
        super().__init__(base)
        self.slots, self.name = slots, name

    def forward(self, x: Tensor) -> Tensor:
        batch = self.slots.batch
        if batch.only is not None:
            return self._with_one(x, batch.only)
        stacks = [s for s in batch.stacks.values() if self.name in s.A]
        return self._with_each(x, stacks) if stacks else self.base(x)

    def _with_one(self, x: Tensor, version: Version) -> Tensor:
        """All rows have this adapter: LoRA's own forward."""
        layer = version.layers.get(self.name)
        if layer is None:
            return self.base(x)
        A, B = layer
        if lora_fast.is_safe(self.base, x):
            return lora_fast.low_rank_sum(self.base, x, x, A, B, 1.0)
        W0x = self.base(x)
        return (W0x + F.linear(F.linear(x.to(A.dtype), A), B)).to(W0x.dtype)

    def _with_each(self, x: Tensor, stacks: list[Stack]) -> Tensor:
        by_row, B = self.slots.by_row(x), stacks[0].B[self.name]
        safe = lora_fast.is_safe(self.base, x)
        if safe and lora_fast.rounds(self.base, x):
            change = x.new_zeros(*by_row.shape[:-1], B.shape[1], dtype=B.dtype)
            for stack in stacks:
                stack.add_change(self.name, by_row, change)
            change = change.view(*x.shape[:-1], -1)
            return lora_fast.sum_with_product(self.base, x, change)
        W0x = self.base(x)
        h = W0x.to(B.dtype, copy=not safe)  # a base that is watched keeps its output
        for stack in stacks:
            stack.add_change(self.name, by_row, h.view(*by_row.shape[:-1], -1))
        return h.to(W0x.dtype)


class Slots:
    """The slots of a model, and the batch that they read.

    Args
        model  without adapters
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.batch = Batch()
        self._standing: dict[str, Slot] = {}
        self._trained: list[nn.Parameter] = []  # that asked for a gradient before
        self._called_with: tuple[int, int] | None = None  # rows, tokens
        self._hook = None

    @contextmanager
    def using(self, batch: Batch) -> Iterator[None]:
        """Inside, the model's rows have the adapters of this batch."""
        before, self.batch = self.batch, batch
        self._stand(batch.modules)
        try:
            yield
        finally:
            self.batch = before

    def _stand(self, names: set[str]) -> None:
        """Put a slot in front of each of these modules that has none."""
        missing = names - self._standing.keys()
        if not missing:
            return
        modules = {n: m for n, m in named_modules(self.model) if n in missing}
        new = {name: Slot(base, self, name) for name, base in modules.items()}
        replace_modules(self.model, {slot.base: slot for slot in new.values()})
        self._standing |= new
        for parameter in chain(*(slot.base.parameters() for slot in new.values())):
            if parameter.requires_grad:  # a weight that trains has no sum in one step
                self._trained.append(parameter.requires_grad_(False))
        if self._hook is None:
            note = self._note_shape
            self._hook = self.model.register_forward_pre_hook(note, with_kwargs=True)

    def remove(self) -> None:
        """Take all slots away: the model is what it was, bit for bit."""
        slots = self._standing.values()
        replace_modules(self.model, {slot: slot.base for slot in slots})
        self._standing = {}
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._trained = []
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _note_shape(self, model, args, kwargs) -> None:
        """Compare the rows of a call with those of the batch.

        Raises  ValueError  the model is called with another number of rows
        """
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if self.batch.modules and len(tokens) != len(self.batch):
            raise ValueError(
                f"the batch names adapters for {len(self.batch)} rows, and the model "
                f"is called with {len(tokens)}: name one for each row, None for the "
                "base; of beams or of several answers a prompt, each is a row"
            )
        self._called_with = tuple(tokens.shape[:2])

    def by_row(self, x: Tensor) -> Tensor:
        """x as (rows, tokens, d): some layers get it as (rows · tokens, d).

        Raises  ValueError  a layer that gets some of the tokens only, as an expert does
        """
        rows, tokens = self._called_with
        if x.dim() == 3 and len(x) == rows:
            return x
        if x.dim() == 2 and len(x) == rows * tokens:
            return x.view(rows, tokens, -1)
        raise ValueError(
            f"a layer of {rows} rows of {tokens} tokens got a tensor of shape "
            f"{tuple(x.shape)}: which token belongs to which row is not known, so that "
            "it cannot have an adapter for each"
        )


def class_of(rank: int) -> int:
    """The rank to which this one is padded: the next power of two, at least 4."""
    return max(4, 1 << (rank - 1).bit_length())
