"""Two optimizers on equal parameters, fed equal gradients; and a count of storages."""

import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_from_scratch import PagedAdamW

PAGE = 256  # bytes: small, so that small tensors have many pages
OPTIONS = {
    "as it comes": {},
    "amsgrad": dict(amsgrad=True),
    "maximize": dict(maximize=True),
    "no decay": dict(weight_decay=0),
    "strong decay": dict(weight_decay=0.5, eps=1e-3, betas=(0.5, 0.9)),
    "lr is a tensor": dict(lr=torch.tensor(3e-2)),
    "lr is a tensor (1,)": dict(lr=torch.tensor([3e-2], dtype=torch.float64)),
    "all": dict(amsgrad=True, maximize=True, weight_decay=0.1, lr=torch.tensor(1e-2)),
}
SHAPES = ((17, 9), (40,), (), (0, 3), (1,), (8, 4, 5))


def parameters(dtype=torch.float32, shapes=SHAPES):
    """Contiguous ones, then a transposed one, and two with gaps in their memory."""
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    odd = (drawn(9, 13).t(), drawn(9, 10)[:, ::2], drawn(4, 6, 7)[:, 1:3].mT)
    return [nn.Parameter(t) for t in (*(drawn(*shape) for shape in shapes), *odd)]


def feed(sides, generator, skip=0.2):
    """The same gradients to every side; some parameters get none."""
    for twins in zip(*sides, strict=True):
        gradient = torch.randn(twins[0].shape, generator=generator)
        gradient = gradient.to(twins[0].dtype)
        if gradient.dim() == 2 and torch.rand((), generator=generator) < 0.5:
            gradient = gradient.t().contiguous().t()  # other strides
        without = torch.rand((), generator=generator) < skip
        for twin in twins:
            twin.grad = None if without else gradient.clone()


def step_together(sides, optimizers, steps):
    """So many steps of each optimizer on its own side; a paged one stays sound."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        feed(sides, generator)
        for optimizer in optimizers:
            optimizer.step()
            if isinstance(optimizer, PagedAdamW):
                assert_sound(optimizer)


def torchs(sides, options):
    """torch's plain loop on the parameters."""
    return torch.optim.AdamW(sides, foreach=False, fused=False, **options)


def pages_of(ps, states=2, page_bytes=PAGE):
    """How many pages the states take: the formula, not the table."""
    return sum(-(-p.numel() // (page_bytes // (states * p.itemsize))) for p in ps)


def paged(ps, pages=None, *, page_bytes=PAGE, **options):
    """PagedAdamW with a budget of so many pages; None for all."""
    states = 3 if options.get("amsgrad") else 2
    pages = pages_of(ps, states, page_bytes) + 1 if pages is None else pages
    return PagedAdamW(
        ps, budget_bytes=pages * page_bytes, page_bytes=page_bytes, **options
    )


def assert_equal_bits(ours, theirs):
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), f"parameter {index}: {a.dtype}, {tuple(a.shape)}"


def assert_equal_states(ours, theirs):
    """Two state dicts, tensor by tensor."""
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        assert ours["state"][key].keys() == state.keys()
        for name, tensor in state.items():
            found = ours["state"][key][name]
            assert found.dtype == tensor.dtype, (key, name)
            assert torch.equal(found, tensor), (key, name)


def assert_sound(optimizer):
    """No slot is given twice, none lies outside of the budget, the lists agree."""
    pager = optimizer.pager
    held = [row.slot for row in optimizer.page_table() if row.resident]
    assert len(held) == len(set(held)) == len(pager.resident)
    assert sorted(held + pager.free) == list(range(pager.slots))
    if pager.arena is not None:
        assert pager.arena.untyped_storage().nbytes() <= optimizer.budget_bytes


class Births(TorchDispatchMode):
    """Bytes of the storages that operations in the block made: alive now, and most.

    Views make none, and a file in shared mapping is no operation's result.
    """

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        known = {self._key(t) for t in tree_leaves((args, kwargs)) if self._is(t)}
        result = operation(*args, **(kwargs or {}))
        for tensor in filter(self._is, tree_leaves(result)):
            key = self._key(tensor)
            if key not in known and key not in self.alive:
                self._born(key, tensor.untyped_storage())
        return result

    def _is(self, leaf):
        return isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"

    def _key(self, tensor):
        return tensor.untyped_storage()._cdata

    def _born(self, key, storage):
        size = storage.nbytes()
        self.alive[key] = weakref.ref(storage, lambda _: self._dead(key, size))
        self.now += size
        self.most = max(self.most, self.now)

    def _dead(self, key, size):
        del self.alive[key]
        self.now -= size
