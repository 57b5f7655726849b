"""DoRA, PiSSA, (IA)³, BitFit and LoRA+ against closed forms of their papers."""

import math

import pytest
from architectures import build
from laws.methods.lora_family import a_ratio_without_a_lora_is_refused
from model_state import refused, values
from small_runs import recipe, run

import peft_from_scratch as pfs
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.methods import bitfit, dora, houlsby, ia3, pissa

# DoRA --------------------------------------------------------------------------------


# PiSSA -------------------------------------------------------------------------------


# (IA)³ -------------------------------------------------------------------------------


def test_feedforward_can_be_said_otherwise():
    model = build("llama")
    ia3.inject(model, targets="attention", feedforward="o_proj")
    for name, layer in adapters(model).items():
        assert layer.feedforward == name.endswith("o_proj")
        assert layer.l.shape == ((1, 32) if layer.feedforward else (len(layer.l), 1))
    model = build("llama")
    with refused(model, "feedforward", "o_proj", "none of the targets"):
        ia3.inject(model, targets="k_proj", feedforward="o_proj")
    with refused(model, "q_prj"):
        ia3.inject(model, targets="q_prj")


# BitFit ------------------------------------------------------------------------------


def test_a_model_without_biases_is_refused():
    model = build("llama")
    with refused(model, "no bias", "LlamaForCausalLM", "ia3.inject"):
        bitfit.inject(model)


# LoRA+ -------------------------------------------------------------------------------


@pytest.mark.parametrize("method, fast", [(dora, "B"), (pissa, "B")])
def test_relatives_of_lora_have_a_fast_B_too(method, fast):
    model = build("llama")
    method.inject(model, r=2)
    before = values(model)
    run(model, recipe(steps=1, warmup=0, weight_decay=0.0, lr=1e-5, lr_ratio=8))
    for name, tensor in values(model).items():
        moved = (tensor - before[name]).abs().max()  # A of a DoRA waits for its B
        assert moved < (9e-5 if name.endswith(f".{fast}") else 1.2e-5), name
        assert moved > 7e-5 or not name.endswith(f".{fast}"), name


@pytest.mark.parametrize(
    "ratio", [0, -1, math.nan, math.inf, "16", None, True], ids=str
)
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match="lr_ratio="):
        recipe(lr_ratio=ratio)


@pytest.mark.parametrize("method", [ia3, pfs.prefix, pfs.full])
def test_a_ratio_without_a_lora_is_refused(method):
    a_ratio_without_a_lora_is_refused(method)
    a_ratio_without_a_lora_is_refused(houlsby, m=4)
