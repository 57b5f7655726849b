"""The steps that the memory bill is held to: which they are, taken and predicted.

A measured cell is one real step on a CPU, which memory/meter.py follows tensor by
tensor: forward, backward and the optimizer's update, with the states already there.
"""

import itertools
from contextlib import nullcontext

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from peft_from_scratch.common.quiet import quiet_transformers
from peft_from_scratch.memory import timeline
from peft_from_scratch.memory.budget import Budget
from peft_from_scratch.memory.mixed_adamw import MixedAdamW
from peft_from_scratch.memory.setups import RECIPES, Setup
from peft_from_scratch.memory.shapes import read_config
from peft_from_scratch.memory.step_bill import step_bill
from peft_from_scratch.methods import named
from peft_from_scratch.models.load import load_model
from peft_from_scratch.training.loss import accumulate_gradients

from . import memory_held_out

ROWS = ("weights", "gradients", "optimizer", "activations", "peak")
METHODS = ("full", "lora", "dora", "qlora", "houlsby", "prefix", "prompt", "ia3")
WAYS = ({}, dict(checkpointing=True), dict(attention="eager"))
SMALL = dict(vocab_size=5000, bos_token_id=1, eos_token_id=2)
RANDOM: dict[str, PretrainedConfig] = {
    "GPT-2 (4 layers, random)": GPT2Config(
        **SMALL,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "Qwen3 (4 layers, random)": Qwen3Config(
        **SMALL,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
    ),
}
SEVEN = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32_000,
)


def cells() -> list[tuple[str, Setup]]:
    """(base, Setup) of every step that formulas were written beside."""
    tiny = [
        Setup(method=method, dtype=dtype, batch=4, length=length, **way)
        for method, dtype, length, way in itertools.product(
            METHODS, ("float32", "mixed"), (64, 256), WAYS
        )
    ]
    for dtype in ("autocast", "bf16-pure"):
        tiny.append(Setup(method="full", dtype=dtype, batch=4, length=256))
    real = [
        Setup(method=method, dtype=dtype, batch=batch, length=length)
        for dtype in ("mixed", "float32")
        for batch, length in ((2, 128), (1, 512))
        for method in ("full", "lora", "qlora")
    ]
    others = [Setup(method=m, batch=4, length=128) for m in ("full", "lora")]
    return [
        *(("tiny", setup) for setup in tiny),
        *(("smollm2", setup) for setup in real),
        *((name, setup) for name in RANDOM for setup in others),
    ]


def config_of(base: str) -> PretrainedConfig:
    """The configuration of a base by its name in these cells."""
    if base == "Llama-7B":
        return SEVEN
    return (RANDOM | memory_held_out.models()).get(base) or read_config(base)


def measured(base: str, setup: Setup) -> dict[str, int]:
    """Bytes of one real step: weights, gradients, optimizer, activations, peak."""
    model, optimizer = injected(base, setup)
    ids = torch.randint(3, model.config.vocab_size, (setup.batch, setup.length))
    half = torch.autocast("cpu", torch.bfloat16)
    model.train()

    def learn():
        with half if setup.dtype == "autocast" else nullcontext():
            accumulate_gradients(model, [{"input_ids": ids, "labels": ids}])

    step = step_bill(model, learn, optimizer)
    return {row: step[row] for row in ROWS}


def injected(base: str, setup: Setup) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model with its method, and the optimizer of what trains."""
    torch.manual_seed(0)
    recipe = RECIPES[setup.dtype]
    model = built(base, recipe.base, setup.attention)
    with quiet_transformers():
        named(setup.method).module.inject(model, **setup.options)
        if setup.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    masters = recipe.master and named(setup.method).own_weights
    return model, (MixedAdamW if masters else torch.optim.AdamW)(trained, lr=1e-5)


def built(base: str, dtype: str, attention: str) -> nn.Module:
    """A model with numbers: a named base, or a random one."""
    if base in ("tiny", "smollm2"):
        model, _ = load_model(base, device="cpu", dtype=dtype)
        model.set_attn_implementation(attention)
        return model
    return AutoModelForCausalLM.from_config(
        config_of(base), dtype=getattr(torch, dtype), attn_implementation=attention
    )


def predicted(budget: Budget) -> dict[str, int]:
    """The bill's figures as meter.Memory counts them."""
    lasting = budget.moments["optimizer step"]
    return {
        "weights": lasting["weights"] + lasting["adapter"],
        "gradients": budget.parts["gradients"],
        "optimizer": lasting["optimizer"] + lasting["master"],
        "activations": timeline.activations(budget.moments),
        "peak": budget.peak,
    }
