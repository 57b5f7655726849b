"""Parameters in N parts, one a rank: what ZeRO cuts, and how stage 3 lives with it.

In stages 1 and 2 a rank has every parameter whole, and updates its part of each. In
stage 3 its part is all that it has. A module's parameters are gathered when it is
called, and dropped when it returns:

    forward     gather W      h = W x       drop W       autograd notes "W", no values
    backward    gather W      dx = Wᵀ dh    drop W
                              dW = dh xᵀ    reduce-scatter dW, drop it

Nothing decides when backward is done with W: the gathered tensor belongs to the one
node of the graph that asked for it, and goes when that node has run. So a weight that
is read twice needs no code of its own. Of a layer that gradient checkpointing computes
again, the weights stay until its backward pass is done.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..training.gradient_checkpointing import checkpoint
from .collectives import Ring


class Shard:
    """A parameter in N equal parts, and which of them is this rank's.

    n        values of a part: ceil(numel / N); the last parts end in zeros
    values   (n,), this rank's part, in stage 3; None where the parameter is whole
    """

    def __init__(self, parameter: nn.Parameter, number: int, ring: Ring):
        self.parameter, self.number, self.ring = parameter, number, ring
        self.shape, self.numel = parameter.shape, parameter.numel()
        self.n = -(-self.numel // ring.size)
        self.values: Tensor | None = None
        self.users = 0  # modules that read the gathered parameter at the moment

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of the parameter's shape: (n,), a copy."""
        mine, start = whole.new_zeros(self.n), self.ring.rank * self.n
        part = whole.reshape(-1)[start : start + self.n]
        mine[: len(part)] = part
        return mine

    def join(self, mine: Tensor) -> Tensor:
        """The tensor of which every rank has given its part; all ranks call it."""
        parts = mine.new_empty(self.ring.size, self.n)
        parts[self.ring.rank] = mine
        self.ring.all_gather(parts, self.number)
        return parts.view(-1)[: self.numel].view(self.shape)

    def mean(self, gradient: Tensor) -> Tensor:
        """This rank's part of the mean of all ranks' gradients; all ranks call it."""
        parts = gradient.new_zeros(self.ring.size * self.n)
        parts[: self.numel] = gradient.reshape(-1)
        total = self.ring.reduce_scatter(parts.view(-1, self.n), self.number)
        return total / self.ring.size

    def gather(self) -> None:
        """Make the parameter whole, for one more user."""
        self.users += 1
        if self.users == 1:
            self.parameter.data = self.join(self.values)

    def release(self) -> None:
        """One user less; without any the parameter keeps its shape, and reads as NaN.

        So code that reads it past its module gets no wrong number, but none at all.
        """
        self.users -= 1
        if self.users == 0:
            nothing = math.nan if self.values.is_floating_point() else 0
            self.parameter.data = self.values.new_full((), nothing).expand(self.shape)


def shard(model: nn.Module, group=None, timeout: float = 300.0) -> None:
    """Stage 3: leave each rank its parts of all parameters, trainable or frozen.

        zero.shard(model)
        optimizer = zero.Optimizer(pfs.trainable(model).values(), stage=3, lr=1e-3)

    Rank 0's weights are those that are cut. From then on a module's own parameters are
    whole while its forward runs, and those of a wrapped projection while its adapter's
    does. All ranks must call the model equally often. What backward reads of a weight
    is not kept from forward: it is gathered again, and gone when it was read.

    Args
        model    with its adapters; inject, load and move it first
        group, timeout   see Ring
    Raises   ValueError   no process group, or the model is cut already
    Departs  buffers stay whole: so does a base in four bits. Read and save parameters
             within `whole(model)`; elsewhere they read as NaN. To merge or remove
             adapters, load them into a model that was not cut
    """
    ring = Ring(group, timeout)
    parameters = list(model.parameters())
    if any(hasattr(p, "zero_shard") for p in parameters):
        raise ValueError("zero.shard() has cut this model already: call it once")
    for number, p in enumerate(parameters):
        p.data = p.data.contiguous()
        ring.broadcast(p.data, number)
        p.zero_shard = Shard(p, number, ring)
        p.zero_shard.values = p.zero_shard.cut(p.data)
        p.zero_shard.users = 1
        p.zero_shard.release()
    for module in model.modules():
        shards = [p.zero_shard for p in _read_by(module)]
        if shards:
            module.register_forward_pre_hook(partial(_gather, shards))
            module.register_forward_hook(partial(_release, shards), always_call=True)
    saving = _Saving([p.zero_shard for p in parameters])
    model.register_forward_pre_hook(_refuse_foreign_checkpointing)
    model.register_forward_pre_hook(saving.begin)
    model.register_forward_hook(saving.end, always_call=True)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Every parameter of a cut model is whole inside, and may be written.

    All ranks enter and leave it together, and write the same.
    """
    shards = [p.zero_shard for p in model.parameters() if hasattr(p, "zero_shard")]
    for each in shards:
        each.gather()
    try:
        yield
    finally:
        for each in shards:
            each.values.copy_(each.cut(each.parameter.data))
            each.release()


def bytes_kept(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """What this rank keeps, by its tensors' storages: formulas.zero_bytes, measured.

    Or formulas.fsdp2_bytes, of a model that torch's fully_shard has cut.

    Returns  {"weights", "gradients", "optimizer"} in bytes, buffers left out
    """
    parameters = list(model.parameters())
    parts = [p.zero_shard.values for p in parameters if hasattr(p, "zero_shard")]
    gradients = [p.grad for p in parameters if p.grad is not None]
    gradients += getattr(optimizer, "gradients", {}).values()
    states = [t for state in optimizer.state.values() for t in state.values()]
    kinds = zip(
        ("weights", "gradients", "optimizer"),
        (parameters + parts, gradients, states),
        strict=True,
    )
    return {kind: _bytes(map(_local, tensors)) for kind, tensors in kinds}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({_address(t): t.untyped_storage().nbytes() for t in tensors}.values())


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, as FSDP2 has them; else the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _read_by(module: nn.Module) -> list[nn.Parameter]:
    """What a module reads in its forward: its own parameters.

    An adapter's are all that it does not wrap, and those of a projection that it wraps,
    whose weight it may read itself.
    """
    if not isinstance(module, Adapter):
        return list(module.parameters(recurse=False))
    around = not list(module.base.children())
    named = module.named_parameters()
    return [p for name, p in named if around or not name.startswith("base.")]


def _gather(shards: list[Shard], *_) -> None:
    for each in shards:
        each.gather()


def _release(shards: list[Shard], *_) -> None:
    for each in shards:
        each.release()


def _refuse_foreign_checkpointing(model: nn.Module, *_) -> None:
    """ValueError for checkpointing that hooks each tensor which autograd saves."""
    for name, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", checkpoint)
        if getattr(module, "gradient_checkpointing", False) and (
            function is not checkpoint
        ):
            raise ValueError(
                f"transformers' own gradient checkpointing is on in {name!r}: in stage "
                "3 it would read weights that are gone. Switch it off, and use "
                "training.gradient_checkpointing.checkpointed(model)"
            )


class _Saving:
    """Of a gathered weight autograd keeps which one it was, and not its values."""

    def __init__(self, shards: list[Shard]):
        self.shards = shards
        self.hooks: list = []

    def begin(self, *_) -> None:
        hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        hooks.__enter__()
        self.hooks.append(hooks)

    def end(self, *_) -> None:
        if self.hooks:  # none where an earlier hook has failed
            self.hooks.pop().__exit__()

    def pack(self, tensor: Tensor):
        address = _address(tensor)
        for each in self.shards:
            if each.users and _address(each.parameter) == address:
                view = tensor.shape, tensor.stride(), tensor.storage_offset()
                return each, view
        return tensor

    def unpack(self, packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        each, view = packed
        return each.join(each.values).as_strided(*view)
