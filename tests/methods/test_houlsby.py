"""Bottleneck adapters against their equation, where they stand, and how they start."""

import pytest
import torch
from architectures import build
from model_state import logits, refused

import peft_from_scratch as pfs
from peft_from_scratch.methods import houlsby


def test_half_precision_keeps_the_bottleneck_in_fp32():
    model = build("llama", dtype=torch.bfloat16)
    houlsby.inject(model, m=4)
    assert all(p.dtype == torch.float32 for p in pfs.trainable(model).values())
    assert logits(model).dtype == torch.bfloat16


BAD = {
    "m": [0, -1, 33, True, 2.0, "4", None],
    "nonlinearity": ["sigmoid", None, 1, ["gelu"]],
    "placement": ["lora", None, 1],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, vs in BAD.items() for v in vs])
def test_arguments_out_of_range_are_refused_and_shown(name, value):
    model = build("llama")
    with refused(model, f"{name}={value!r}"):
        houlsby.inject(model, **{"m": 4, name: value})


def test_a_bottleneck_cannot_be_merged_and_says_why():
    model = build("gpt2")
    houlsby.inject(model, m=4)
    with refused(model, "nonlinearity", error=pfs.CannotMerge):
        pfs.merge(model)
