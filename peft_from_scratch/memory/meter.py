"""The bill of a training step: parameters and bytes, by formula and by measurement.

Resident memory of the process is not a measurement of a step on a CPU: it depends on
the allocator, on what ran before and on when the system takes pages back. So the bytes
are *counted*: every tensor storage that the step allocates is followed from birth to
death, and sorted by what it was for. The count is the same on every device and in
every run. It leaves out what no tensor holds: workspaces inside a kernel, the
allocator's rounding (512 bytes a tensor on CUDA) and the Python process.

torch.distributed._tools.MemTracker does this for training a whole model; it stops at
the first frozen parameter and at the second forward pass of a step, and the methods
here have both.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..core.adapter import trainable
from ..core.targets import QuantizedLinear
from ..paged import PagedAdamW

ELSEWHERE = "elsewhere"  # a paged optimizer's file: no memory of ours
STEP_BYTES = 4  # torch's AdamW counts the steps of each tensor in a float32 scalar


class Count(NamedTuple):
    """Numbers of parameters; a tied weight counts once."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        """The trainable part of the total, in [0, 1]."""
        return self.trainable / self.total


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step, each the largest at any moment of the step.

    weights      parameters and buffers, the frozen ones included
    gradients    what `.grad` of the trainable parameters holds
    optimizer    the optimizer's state: two moments and a step count for AdamW; of a
                 paged one what is resident, and not its file
    activations  all else: what autograd keeps for backward, and every temporary
    peak         the largest sum at one moment; less than the sum of the rows, since
                 activations are highest when the gradients are not there yet
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


def count(model: nn.Module) -> Count:
    """How many parameters train, and how many there are, adapters included.

    A weight in four bits counts all its values, not the bytes that hold them.
    """
    packed = (m.values for m in model.modules() if isinstance(m, QuantizedLinear))
    return Count(
        trainable=sum(p.numel() for p in trainable(model).values()),
        total=sum(map(_values, model.parameters())) + sum(packed),
    )


def _values(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for: bitsandbytes' have two of them in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def lora_parameters(shapes: Iterable[tuple[int, int]], r: int) -> int:
    """Parameters of a LoRA on projections of the given (d_out, d_in).

    sum over the projections of  r (d_in + d_out)
    """
    return sum(r * (d_in + d_out) for d_out, d_in in shapes)


def adamw_bytes(parameters: int, tensors: int, itemsize: int = 4) -> int:
    """Bytes of AdamW's state: two moments a parameter and a step count a tensor.

    2 · parameters · itemsize + 4 · tensors
    """
    return 2 * parameters * itemsize + STEP_BYTES * tensors


def measure_step(model: nn.Module, step: Callable[[], object]) -> Memory:
    """Count the bytes of one training step.

    Args
        step  runs forward, backward and optimizer step on `model`; it is called once.
              The first step of a fresh optimizer allocates its state, later ones find
              it: both are counted
    Returns  Memory, in bytes, on the model's device
    """
    with Meter(model) as meter:
        step()
    return meter.memory()


class Meter(TorchDispatchMode):
    """Follows every tensor storage that lives on the model's device during a block.

    Each operation passes through `__torch_dispatch__`. A storage met among its results
    is born there; one met among its arguments, and unknown, was there before the block.
    A weak reference tells when a storage dies. What a storage was *for* is often known
    only later (a matrix product becomes a gradient when autograd hands it over), so
    the block only keeps a diary, and `memory` reads it with the kinds filled in.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.device = next(model.parameters()).device
        self.existing: list[int] = []  # storages that were there before the block
        self.diary: list[tuple[int, int]] = []  # (storage, bytes born or -bytes dead)
        self.size: dict[int, int] = {}
        self.kind: dict[int, str] = {}
        self._alive: dict[int, tuple[int, weakref.ref]] = {}
        self._hooks = []

    def __enter__(self):
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            self._label(tensor, "weights")
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                self._label_gradient(parameter)
                self._hooks.append(
                    parameter.register_post_accumulate_grad_hook(self._label_gradient)
                )
        self._hooks.append(register_optimizer_step_post_hook(self._label_state))
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()
        self._alive.clear()  # drops the weak references: later deaths are not ours

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, born=False)
        result = operation(*args, **kwargs)
        for tensor in tree_leaves(result):
            self._meet(tensor, born=True)
        return result

    def memory(self) -> Memory:
        """Replay the diary: the largest bytes of each kind, and of their sum."""
        kinds = ("weights", "gradients", "optimizer", "activations", ELSEWHERE)
        now = dict.fromkeys(kinds, 0)
        for storage in self.existing:
            kind = self.kind.get(storage, "activations")
            now[kind] += self.size[storage] if kind != ELSEWHERE else 0
        most, peak = dict(now), sum(now.values())
        for storage, change in self.diary:
            kind = self.kind.get(storage, "activations")
            now[kind] += change
            most[kind] = max(most[kind], now[kind])
            peak = max(peak, sum(now.values()))
        del most[ELSEWHERE]
        return Memory(**most, peak=peak)

    def _meet(self, tensor, born: bool) -> int | None:
        if not isinstance(tensor, Tensor) or tensor.device != self.device:
            return None
        held = tensor.untyped_storage()
        address = held._cdata
        if address not in self._alive:
            storage = len(self.size)
            self.size[storage] = held.nbytes()
            if born:
                self.diary.append((storage, self.size[storage]))
            else:
                self.existing.append(storage)
            death = weakref.ref(held, lambda _: self._bury(address))
            self._alive[address] = storage, death
        return self._alive[address][0]

    def _bury(self, address) -> None:
        storage, _ = self._alive.pop(address)
        self.diary.append((storage, -self.size[storage]))

    def _label(self, tensor: Tensor, kind: str) -> None:
        storage = self._meet(tensor, born=False)
        if storage is not None:
            self.kind[storage] = kind

    def _label_gradient(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self._label(parameter.grad, "gradients")

    def _label_state(self, optimizer, args, kwargs) -> None:
        for state in optimizer.state.values():
            for tensor in state.values():
                if isinstance(tensor, Tensor):
                    self._label(tensor, "optimizer")
        if isinstance(optimizer, PagedAdamW):
            self._label(optimizer.arena, "optimizer")
            for tensor in optimizer.stores:
                self._label(tensor, ELSEWHERE)
