"""Whole steps of other phases, with real numbers: evaluation, sampling, DPO, groups.

Each is one step as its paper writes it, with nothing more than its memory needs: what
learns best is another question. The optimizer's states are there from the start.
"""

import copy
import itertools
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_from_scratch.core.adapter import disabled
from peft_from_scratch.memory.budget import Budget
from peft_from_scratch.memory.meter import Meter
from peft_from_scratch.memory.setups import GROUP, Setup
from peft_from_scratch.methods import named
from peft_from_scratch.tasks.templates import IGNORED
from peft_from_scratch.training.loss import token_losses

from .memory_cells import injected

BETA, CLIP = 0.1, 1.0  # of DPO; of the ratio, which is 1 in a first step


def cells() -> list[tuple[str, Setup]]:
    """(base, Setup) of every phase, at tiny's scale."""
    sizes = {
        "evaluate": (dict(batch=4, length=256),),
        "generate": (
            dict(batch=8, length=200, labels=100),
            dict(batch=32, length=200, labels=190),
        ),
        "dpo": (dict(batch=2, length=96), dict(batch=1, length=200)),
        "group": (
            dict(batch=1, length=160, labels=64, group=8),
            dict(batch=2, length=96, labels=48, group=4),
        ),
    }
    methods, dtypes = ("full", "lora", "qlora"), ("float32", "mixed")
    return [
        ("tiny", Setup(method=method, dtype=dtype, phase=phase, **size))
        for phase, every in sizes.items()
        for size, method, dtype in itertools.product(every, methods, dtypes)
    ]


def measured(base: str, setup: Setup) -> int:
    """The most bytes at one moment of a whole step of this phase."""
    model, optimizer = injected(base, setup)
    ids = torch.randint(3, model.config.vocab_size, (setup.batch, setup.length))
    step = {"evaluate": evaluate, "generate": generate, "dpo": dpo, "group": group}
    learns = setup.phase in ("dpo", "group")
    reference, own = None, named(setup.method).own_weights
    if learns:
        _allocate_states(model, optimizer)
        reference = copy.deepcopy(model).requires_grad_(False) if own else None
    asks = _reference(model, reference)
    del reference
    with Meter(model) as meter:
        step[setup.phase](model, ids, setup, optimizer, asks)
    return meter.memory().peak


def evaluate(model, ids: Tensor, setup: Setup, *_) -> None:
    """The losses of all rows, where nothing is kept for a gradient."""
    model.eval()
    with torch.no_grad():
        token_losses(model, _labelled(ids, setup))


def generate(model, ids: Tensor, setup: Setup, *_) -> Tensor:
    """Answers of `labels` tokens to the first tokens of the rows; none ends earlier."""
    model.eval()
    prompts = ids[:, : setup.prompt]
    with torch.no_grad():
        return model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            num_return_sequences=(setup.group or GROUP)
            if setup.phase == "group"
            else 1,
            max_new_tokens=setup.labels,
            min_new_tokens=setup.labels,
            pad_token_id=0,
        )


def dpo(model, ids: Tensor, setup: Setup, optimizer, asks: Callable) -> None:
    """-log sigmoid(β (log-ratio of the chosen answer - that of the rejected one))."""
    rows = torch.cat([ids, ids.flip(1)])  # chosen ones, then rejected ones
    batch = _labelled(rows, setup)
    reference = asks(batch).sum(1)
    model.train()
    ratios = reference - token_losses(model, batch)[0].sum(1)  # losses are -log p
    chosen, rejected = ratios.chunk(2)
    _update(-F.logsigmoid(BETA * (chosen - rejected)).mean(), optimizer)


def group(model, ids: Tensor, setup: Setup, optimizer, asks: Callable) -> None:
    """A policy's step on answers that it sampled, with the KL to its reference."""
    rows = generate(model, ids, setup)
    batch = _labelled(rows, setup)
    rewards = torch.arange(len(rows)).view(setup.batch, -1).float()
    spread = rewards - rewards.mean(1, keepdim=True)
    advantages = (spread / rewards.std(1, keepdim=True)).view(-1, 1)
    reference = -asks(batch)
    model.train()
    now = -token_losses(model, batch)[0]
    ratio = (now - now.detach()).exp().clamp(1 - CLIP, 1 + CLIP)
    divergence = (reference - now).exp() - (reference - now) - 1
    _update((BETA * divergence - ratio * advantages).mean(), optimizer)


def _labelled(rows: Tensor, setup: Setup) -> dict[str, Tensor]:
    """A batch whose rows have labels at their last tokens, or at all."""
    if not setup.labels:
        return {"input_ids": rows, "labels": rows}
    labels = rows.clone()
    labels[:, : setup.prompt] = IGNORED
    return {"input_ids": rows, "labels": labels}


def predicted(budget: Budget) -> int:
    """The bill's peak when the model is there: loading is no part of the step."""
    at = {name: sum(now.values()) for name, now in budget.moments.items()}
    return max(size for name, size in at.items() if name != "loading")


def _reference(model: nn.Module, reference: nn.Module | None) -> Callable:
    """batch -> losses of each label token, of the model as it was before training."""

    def asks(batch: dict) -> Tensor:
        with torch.no_grad(), disabled(model) if reference is None else nullcontext():
            asked = model if reference is None else reference
            asked.eval()
            return token_losses(asked, batch)[0]

    return asks


def _update(loss: Tensor, optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _allocate_states(model: nn.Module, optimizer) -> None:
    """A step on zero gradients, in which AdamW makes its moments."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
