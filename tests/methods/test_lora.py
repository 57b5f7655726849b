"""LoRA's arithmetic against its closed form; its start, ranges and precisions."""

import math

import pytest
import torch
from architectures import CONFIGS, build
from hypothesis import given, settings
from hypothesis import strategies as st
from laws.methods.lora import (
    DOUBLE,
    adapted,
    forward_is_the_equation,
    gradients_are_those_of_the_equation,
)
from model_state import largest, refused, tokens, train
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_from_scratch as pfs

sizes = st.integers(1, 6)
shapes = st.tuples(sizes, sizes, st.lists(st.integers(0, 4), max_size=3), sizes)
fast = settings(deadline=None, max_examples=40, derandomize=True, database=None)


@fast
@given(shapes, st.sampled_from([nn.Linear, Conv1D]), st.booleans(), st.booleans())
def test_forward_is_the_equation(shape, kind, bias, transposed):
    d_in, d_out, leading, r = shape
    r = min(r, d_in, d_out)
    forward_is_the_equation(d_in, d_out, leading, r, kind, bias, transposed)


@fast
@given(shapes, st.sampled_from([nn.Linear, Conv1D]))
def test_gradients_are_those_of_the_equation(shape, kind):
    d_in, d_out, leading, r = shape
    r = min(r, d_in, d_out)
    gradients_are_those_of_the_equation(d_in, d_out, leading, r, kind=kind)


def test_a_frozen_input_gets_no_gradient():
    lora = adapted(4, 5, 2)
    lora(torch.randn(3, 4, **DOUBLE)).sum().backward()
    assert lora.base.weight.grad is None and lora.base.bias.grad is None


@pytest.mark.parametrize("r, alpha", [(1, 16), (8, 16), (8, 0.5), (16, 16)])
def test_scale_is_alpha_over_r_or_its_root(r, alpha):
    assert adapted(16, 16, r, alpha=alpha).scale == alpha / r
    assert adapted(16, 16, r, alpha=alpha, rslora=True).scale == alpha / math.sqrt(r)


BAD = {
    "r": [0, -1, 65537, True, 2.0, "4", None],
    "alpha": [0, -1.0, math.nan, math.inf, "16", None, True],
    "dropout": [1.0, -0.1, math.nan, "0", None],
    "rslora": ["yes", 1],
    "bias": ["every", True, None],
    "rank_pattern": [{"q_proj": 65537}, {"down_proj": 0}, {"(": 2}, [("q_proj", 2)]],
    "alpha_pattern": [{"q_proj": 0}, {"(": 2}],
}
# What the message shows of a pattern: the value out of range, the regex that is none.
SHOWN = {
    "{'q_proj': 65537}": "r=65537",
    "{'down_proj': 0}": "r=0",
    "{'q_proj': 0}": "alpha=0",
}
SHOWN |= {"{'(': 2}": "'(' is no regex"}


@pytest.mark.parametrize("name, value", [(n, v) for n, vs in BAD.items() for v in vs])
def test_arguments_out_of_range_are_refused_and_shown(name, value):
    model = build("llama")
    with refused(model, str(SHOWN.get(str(value), value))):
        pfs.lora.inject(model, **{name: value})


@pytest.mark.parametrize("empty", [[], {}, lambda name, module: False])
def test_an_empty_injection_is_refused(empty):
    model = build("llama")
    with refused(model):
        pfs.lora.inject(model, targets=empty)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_typo_in_a_pattern_is_refused(field):
    model = build("llama")
    with refused(model, field, "q_prj"):
        pfs.lora.inject(model, **{field: {"q_prj": 2}})


def test_a_rank_out_of_range_names_the_module():
    model = build("llama")
    with refused(model, "layers.0.self_attn.k_proj", "r=65537", "65536"):
        pfs.lora.inject(model, rank_pattern={"k_proj": 65537})


@pytest.mark.parametrize("architecture", CONFIGS)
def test_compiled_equals_eager(architecture):
    torch._dynamo.reset()
    model = build(architecture)
    pfs.lora.inject(model, r=4, dropout=0.2)
    train(model, 2)

    def outcome(run):
        model.zero_grad()
        torch.manual_seed(0)
        out = run(tokens(), use_cache=False).logits
        out.square().mean().backward()
        found = {name: p.grad.clone() for name, p in pfs.trainable(model).items()}
        return found | {"logits": out.detach()}

    expected = outcome(model.train())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert largest(outcome(compiled), expected) < 1e-6
