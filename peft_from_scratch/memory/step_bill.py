"""The memory bill of one training step: which tensors it needs, and how many bytes.

A step is followed twice by a Meter: while it learns (forward and backward), and while
the optimizer updates the weights. The optimizer's states appear in that first update;
in every later step they are there from the beginning, and so the bill's peak has them,
in learning and in updating.

The first update alone would say too little. MixedAdamW makes the states of a parameter
when it comes to it, and a model's largest parameter, the embedding, comes first: its
temporaries are gone before the other states are there. In the second update they meet.
"""

from collections.abc import Callable

import torch
from torch import nn

from .meter import Meter
from .mixed_adamw import MixedAdamW

RECIPES = ("fp32", "bf16", "mixed")


def optimizer_class(recipe: str) -> type[torch.optim.Optimizer]:
    """The AdamW of a recipe: MixedAdamW for "mixed", torch's own for the others.

    Raises  ValueError  no such recipe
    """
    if recipe not in RECIPES:
        raise ValueError(f"{recipe=}: allowed are {', '.join(RECIPES)}")
    return MixedAdamW if recipe == "mixed" else torch.optim.AdamW


def step_bill(
    model: nn.Module, learn: Callable[[], object], optimizer: torch.optim.Optimizer
) -> dict[str, int]:
    """Bytes of a step of a model whose optimizer has no states yet.

    Args
        learn  forward and backward: it leaves gradients on the model
    Returns  {weights, gradients, optimizer, activations, temporaries, peak}:
             activations of forward and backward; temporaries of the optimizer's step;
             the peak of a step that finds the optimizer's states there
    """
    with Meter(model) as learning:
        learn()
    with Meter(model) as updating:
        optimizer.step()
    learning, updating = learning.memory(), updating.memory()
    lasting = updating.weights + updating.gradients + updating.optimizer
    return {
        "weights": learning.weights,
        "gradients": learning.gradients,
        "optimizer": updating.optimizer,
        "activations": learning.activations,
        "temporaries": updating.activations,
        "peak": max(learning.peak + updating.optimizer, lasting + updating.activations),
    }
