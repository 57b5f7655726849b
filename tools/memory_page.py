"""docs/memory_budget.md: predicted bills beside measured ones, never typed.

    python -m tools.memory_page --measure    takes the steps again (a minute)
    python -m tools.memory_page              writes the page from what was measured

A measured cell is one real step on a CPU, which memory/meter.py follows tensor by
tensor: forward, backward and the optimizer's update, with the states already there.
accelerate's estimator gets the same models; it is asked as `accelerate estimate-memory`
asks it.
"""

import argparse
import itertools
import json
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

from peft_from_scratch.common import atomic, provenance
from peft_from_scratch.common.marks import between_marks, markdown
from peft_from_scratch.common.quiet import quiet_transformers
from peft_from_scratch.common.units import megabytes
from peft_from_scratch.memory import timeline
from peft_from_scratch.memory.budget import Budget, bill
from peft_from_scratch.memory.meta_model import ghost
from peft_from_scratch.memory.meter import Meter
from peft_from_scratch.memory.mixed_adamw import MixedAdamW
from peft_from_scratch.memory.setups import RECIPES, Setup
from peft_from_scratch.memory.shapes import read_config
from peft_from_scratch.memory.step_bill import step_bill
from peft_from_scratch.methods import named
from peft_from_scratch.models.load import load_model
from peft_from_scratch.training.loss import accumulate_gradients

PAGE = provenance.ROOT / "docs" / "memory_budget.md"
RESULT = provenance.ROOT / "data" / "results" / "memory_budget.json"
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
ESTIMATED = {  # what accelerate's estimator is asked about: a bill of the same model
    "smollm2, full": Setup(method="full", batch=2, length=128),
    "Llama-7B, full": Setup(method="full", batch=1, length=2048),
    "Llama-7B, QLoRA": Setup(method="qlora", batch=1, length=2048),
}
SEVEN = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32_000,
)


def cells() -> list[tuple[str, Setup]]:
    """(base, Setup) of every measurement."""
    tiny = [
        Setup(method=method, dtype=dtype, batch=4, length=length, **way)
        for method, dtype, length, way in itertools.product(
            METHODS, ("float32", "mixed"), (64, 256), WAYS
        )
    ]
    for dtype in ("autocast", "bf16-pure"):
        tiny.append(Setup(method="full", dtype=dtype, batch=4, length=256))
    real = [Setup(method=m, batch=2, length=128) for m in ("full", "lora", "qlora")]
    others = [Setup(method=m, batch=4, length=128) for m in ("full", "lora")]
    return [
        *(("tiny", setup) for setup in tiny),
        *(("smollm2", setup) for setup in real),
        *((name, setup) for name in RANDOM for setup in others),
    ]


def measured(base: str, setup: Setup) -> dict[str, int]:
    """Bytes of one real step: weights, gradients, optimizer, activations, peak."""
    torch.manual_seed(0)
    recipe = RECIPES[setup.dtype]
    model = built(base, recipe.base, setup.attention)
    with quiet_transformers():
        named(setup.method).module.inject(model, **setup.options)
        if setup.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    masters = recipe.master and named(setup.method).own_weights
    optimizer = (MixedAdamW if masters else torch.optim.AdamW)(trained, lr=1e-5)
    ids = torch.randint(3, model.config.vocab_size, (setup.batch, setup.length))
    half = torch.autocast("cpu", torch.bfloat16)
    model.train()

    def learn():
        with half if setup.dtype == "autocast" else nullcontext():
            accumulate_gradients(model, [{"input_ids": ids, "labels": ids}])

    step = step_bill(model, learn, optimizer)
    with Meter(model) as updating:  # again, now that the states are there
        optimizer.step()
    step["peak"] = max(step["peak"], updating.memory().peak)
    return {row: step[row] for row in ROWS}


def built(base: str, dtype: str, attention: str) -> nn.Module:
    """A model with numbers: a named base, or a random one of RANDOM."""
    if base in RANDOM:
        return AutoModelForCausalLM.from_config(
            RANDOM[base], dtype=getattr(torch, dtype), attn_implementation=attention
        )
    model, _ = load_model(base, device="cpu", dtype=dtype)
    model.set_attn_implementation(attention)
    return model


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


def config_of(base: str) -> PretrainedConfig:
    name = base.partition(",")[0]
    return SEVEN if name == "Llama-7B" else RANDOM.get(base) or read_config(name)


def estimated(base: str) -> dict[str, int]:
    """accelerate's figures for training in bfloat16, from its own functions."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    size, _ = calculate_maximum_sizes(ghost(config_of(base), "float32"))
    return estimate_training_usage(size, "bfloat16")


def measure() -> dict:
    """All cells, with where they were measured."""
    return {
        "provenance": provenance.provenance(seed=0),
        "cells": [
            {"base": base, "setup": vars(setup), "measured": measured(base, setup)}
            for base, setup in cells()
        ],
        "accelerate": {base: estimated(base) for base in ESTIMATED},
    }


def tables(result: dict) -> str:
    """All that is between the marks."""
    rows = [_compared(cell) for cell in result["cells"]]
    torch_version = result["provenance"]["packages"]["torch"]
    parts = (
        f"{len(rows)} steps, torch {torch_version}. The largest error of all: "
        f"{worst(rows)}.",
        "### SmolLM2 and random models",
        "Predicted bytes in MB, and the error against the measured step in %:",
        _detailed([row for row in rows if row["base"] != "tiny"]),
        "### tiny",
        "The largest error of each group, in %; 4 rows of 64 and of 256 tokens:",
        _grouped([row for row in rows if row["base"] == "tiny"]),
        "### Beside accelerate's estimator",
        _beside(result["accelerate"]),
    )
    return "\n\n".join(parts) + "\n"


def _compared(cell: dict) -> dict:
    """A cell with the bill of today's formulas, and its errors in %."""
    setup = Setup(**cell["setup"])
    budget = bill(config_of(cell["base"]), setup)
    figures = predicted(budget)
    errors = {r: 100 * (figures[r] / cell["measured"][r] - 1) for r in ROWS}
    about = {"base": cell["base"], "setup": setup, "way": budget.way}
    return about | {"figures": figures, "errors": errors}


def worst(rows: list[dict]) -> str:
    """The largest error of each row of the bill."""
    most = {r: max((row["errors"][r] for row in rows), key=abs) for r in ROWS}
    return ", ".join(f"{name} {most[name]:+.1f} %" for name in ROWS)


def _detailed(rows: list[dict]) -> str:
    lines = [
        [
            *(row["base"], row["setup"].method, row["way"]),
            *(
                f"{megabytes(row['figures'][r])} ({row['errors'][r]:+.1f})"
                for r in ROWS
            ),
        ]
        for row in rows
    ]
    return markdown(("base", "method", "activations by", *ROWS), lines)


def _grouped(rows: list[dict]) -> str:
    """By method, dtype and way: the largest error of each row of the bill."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        s = row["setup"]
        way = "checkpointing" if s.checkpointing else s.attention
        groups.setdefault((s.method, s.dtype, way), []).append(row["errors"])
    lines = [
        [*key, *(f"{max((e[r] for e in errors), key=abs):+.1f}" for r in ROWS)]
        for key, errors in groups.items()
    ]
    return markdown(("method", "dtype", "way", *ROWS), lines)


def _beside(estimates: dict) -> str:
    lines = []
    for name, setup in ESTIMATED.items():
        budget = bill(config_of(name), setup)
        kept = sum(budget.parts[p] for p in ("activations", "logits"))
        words = f"{name}, {setup.batch} x {setup.length} tokens"
        theirs = max(estimates[name].values())
        figures = (theirs, budget.peak, kept)
        lines.append([words, *(f"{megabytes(n, ',.0f')}" for n in figures)])
    heads = ("accelerate, bf16: largest", "our peak", "of it activations and logits")
    return markdown(("model", *(f"{head}, MB" for head in heads)), lines)


def write(result: dict) -> None:
    page = between_marks(PAGE.read_text("utf-8"), tables(result))
    with atomic.new_file(PAGE) as partial:
        partial.write_text(page, encoding="utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--measure", action="store_true", help="take the steps again")
    if options.parse_args().measure:
        with atomic.new_file(RESULT) as partial:
            partial.write_text(json.dumps(measure(), indent=1) + "\n")
    write(json.loads(RESULT.read_text("utf-8")))


if __name__ == "__main__":
    main()
