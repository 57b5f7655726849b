"""Small training runs, and the way to plant a bug in them."""

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from architectures import build, byte_tokenizer

from peft_from_scratch.methods import full, lora
from peft_from_scratch.recipe import Recipe
from peft_from_scratch.train import train

TOKENIZER = byte_tokenizer()
# Prompts and answers of very different lengths; 8 rows, so that steps span two epochs.
ROWS = [
    {"prompt": f"{i}" + "·" * (7 * i % 23), "completion": "ab" * (1 + i * i % 13)}
    for i in range(8)
]
# Half like training, half unlike: the loss on them falls first and rises later.
OTHERS = [{"prompt": f"{i}", "completion": "ab" * i + "yz" * i} for i in (1, 2, 5)]
TASK = SimpleNamespace(instruction="Say it.", train=ROWS, validation=OTHERS)


def recipe(**changes):
    """12 steps that use all there is: warm-up, decay, clipping, micro-batches."""
    settings = dict(
        steps=12, batch=6, accumulate=2, lr=1e-2, warmup=2, schedule="cosine", clip=0.5
    )
    return Recipe(**(settings | dict(weight_decay=0.1, checkpoint_every=4) | changes))


def adapted(method="lora", architecture="llama", *, dropout=0.1, dtype=torch.float32):
    """An injected random model with dropout; the same bits at every call."""
    model = build(architecture, dtype=dtype)
    torch.manual_seed(1)
    if method == "lora":
        lora.inject(model, r=4, alpha=8, dropout=dropout)
    else:
        full.inject(model)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
    return model


def run(model, settings, **options):
    return train(model, TOKENIZER, TASK, settings, progress=False, **options)


@contextmanager
def planted(function: Callable, right: str, wrong: str) -> Iterator[None]:
    """Inside, `function` runs with one piece of its source exchanged: a bug.

    The code object is exchanged, so that every module which imported the function has
    the bug. A piece that does not occur exactly once is an error: the bug would be
    planted nowhere.
    """
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{right!r} occurs {source.count(right)} times"
    made = {}
    exec(source.replace(right, wrong), dict(function.__globals__), made)
    sound = function.__code__
    function.__code__ = inspect.unwrap(made[function.__name__]).__code__
    try:
        yield
    finally:
        function.__code__ = sound
