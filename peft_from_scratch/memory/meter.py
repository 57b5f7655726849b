"""The bytes of a training step, counted tensor by tensor.

Every tensor storage that the step allocates is followed from birth to death, and sorted
by what it was for. The count leaves out what no tensor holds: workspaces inside a
kernel, the allocator's rounding (512 bytes a tensor on CUDA) and the Python process.

torch.distributed._tools.MemTracker does this for training a whole model; it stops at
the first frozen parameter and at the second forward pass of a step, and the methods
here have both.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..common import scoped
from ..paged import PagedAdamW
from ..training.attention import written_out
from ..training.batch import Row
from ..training.config import TrainConfig
from ..training.gradient_checkpointing import recomputed
from ..training.loop import encode_splits, micro_batches, optimizer_steps
from ..training.packing import Packing, packing_for
from ..training.state import TrainState, new_state

ELSEWHERE = "elsewhere"  # a paged optimizer's file: no memory of ours


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


def measured_step(model: nn.Module, tokenizer, task, config: TrainConfig) -> Memory:
    """Count the bytes of a run's largest step, the one that reads the most tokens.

    The optimizer's state is there from the start, as in every step but the first.
    Weights, flags and random generators are as before when it returns.
    """
    state = new_state(model, config)
    rows, validation = encode_splits(tokenizer, task, config)
    before = state.copies()
    steps = [micro_batches(rows, config, step) for step in range(config.steps)]
    packing = packing_for(model, [*rows, *validation])
    largest = max(steps, key=partial(_most_tokens, packing))
    try:
        with (
            written_out(model, config, packing, [*rows, *validation], steps[0]),
            recomputed(model, config.checkpointing),
            scoped.mode(model, training=True),
            scoped.seeded(config.seed, state.device),
            state.without_gradients(),
        ):
            _allocate_moments(state)
            loop = optimizer_steps(model, state, config, lambda _: largest, packing)
            return measure_step(model, lambda: next(loop))
    finally:
        state.load_weights(before)


def _most_tokens(packing: Packing, micro_batches: list[list[Row]]) -> int:
    """Tokens of a step's largest micro-batch, as the model reads it."""
    return max(map(packing.tokens, micro_batches))


def _allocate_moments(state: TrainState) -> None:
    """Take a step on zero gradients, in which AdamW allocates its moments."""
    for parameter in state.trainable.values():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)


class Meter(TorchDispatchMode):
    """Follows every tensor storage that lives on the model's device during a block.

    Each operation passes through `__torch_dispatch__`. A storage among its results is
    born there; an unknown storage among its arguments existed before the block. A weak
    reference reports when a storage dies. What a storage is *for* is often known only
    later (a matrix product becomes a gradient when autograd hands it over). So the
    block only lists events, and `memory` replays them once the kinds are known.
    """

    keeps_nothing = True  # of a tensor's values: a sum in place is as good as any

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.device = next(model.parameters()).device
        self.existing: list[int] = []  # storages that were there before the block
        self.events: list[tuple[int, int]] = []  # (storage, bytes born or -bytes dead)
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
        """Replay the events: the largest bytes of each kind, and of their sum."""
        kinds = ("weights", "gradients", "optimizer", "activations", ELSEWHERE)
        now = dict.fromkeys(kinds, 0)
        for storage in self.existing:
            kind = self.kind.get(storage, "activations")
            now[kind] += self.size[storage] if kind != ELSEWHERE else 0
        most, peak = dict(now), sum(now.values())
        for storage, change in self.events:
            kind = self.kind.get(storage, "activations")
            now[kind] += change
            most[kind] = max(most[kind], now[kind])
            peak = max(peak, sum(now.values()))
        del most[ELSEWHERE]
        return Memory(**most, peak=peak)

    def _meet(self, tensor, born: bool) -> int | None:
        if not isinstance(tensor, Tensor) or tensor.device != self.device:
            return None
        untyped = tensor.untyped_storage()
        address = untyped._cdata
        if address not in self._alive:
            storage = len(self.size)
            self.size[storage] = untyped.nbytes()
            if born:
                self.events.append((storage, self.size[storage]))
            else:
                self.existing.append(storage)
            death = weakref.ref(untyped, lambda _: self._bury(address))
            self._alive[address] = storage, death
        return self._alive[address][0]

    def _bury(self, address) -> None:
        storage, _ = self._alive.pop(address)
        self.events.append((storage, -self.size[storage]))

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
