"""Small training runs: the rows, the recipe and the models of the tests."""

from types import SimpleNamespace

import torch
from architectures import build, byte_tokenizer

from peft_from_scratch.methods import full, lora
from peft_from_scratch.training.config import TrainConfig
from peft_from_scratch.training.loop import train

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
    return TrainConfig(
        **(settings | dict(weight_decay=0.1, checkpoint_every=4) | changes)
    )


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
