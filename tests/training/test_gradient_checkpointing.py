"""Gradient checkpointing: equal gradients, random numbers drawn once, fewer bytes."""

import copy
from functools import partial

import pytest
import torch
from architectures import CONFIGS
from laws.core.contract import fresh
from laws.methods.table import METHODS
from model_state import assert_same, gradients, largest, loss, snapshot
from planting import each_is_caught, law
from torch import nn
from torch.utils import checkpoint as torchs
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_from_scratch.memory.meter import measure_step
from peft_from_scratch.training.gradient_checkpointing import (
    Checkpoint,
    checkpoint,
    checkpointed,
)

BY_NAME = {method.name: method for method in METHODS}
# Random Llama, Qwen and Gemma models are not fp64 inside, nor is a base in four bits.
CASES = [
    (method.name, architecture)
    for method in METHODS
    for architecture in ("gpt2", "opt", "llama")
    if architecture in method.architectures
]


def a_model(method, architecture):
    """(an injected model in training mode, the tolerance of its arithmetic)"""
    method = BY_NAME[method]
    exact = architecture in ("gpt2", "opt") and not method.prepare
    dtype = torch.float64 if exact else torch.float32
    return fresh(method, architecture, steps=1, dtype=dtype)[0].train(), (
        1e-12 if exact else 1e-6
    )


def value(model):
    torch.manual_seed(0)
    return loss(model).detach()


@law
@pytest.mark.parametrize("method, architecture", CASES)
def no_gradient_changes(method="lora-dropout", architecture="gpt2"):
    """And every layer is computed twice, although the embeddings are frozen."""
    model, _ = a_model(method, architecture)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    runs = []
    inner = next(m for m in layers[0].modules() if not list(m.children()))
    inner.register_forward_hook(lambda *_: runs.append(1))
    expected = {"loss": value(model)} | gradients(model)
    after, once = torch.get_rng_state(), len(runs) // 2
    with checkpointed(model):
        found = {"loss": value(model)} | gradients(model)
    # The same bits are computed twice, so that float32 is no excuse.
    assert largest(found, expected) <= 1e-12
    assert torch.equal(torch.get_rng_state(), after), "drew other numbers on the whole"
    assert len(runs) == 5 * once, "the layer was not computed a second time"


@pytest.mark.parametrize("architecture", CONFIGS)
def test_gradients_are_those_of_transformers_checkpointing(architecture):
    ours, close = a_model("lora-dropout", architecture)
    theirs = copy.deepcopy(ours)
    theirs.activation_checkpointing_enable()
    with checkpointed(ours):
        found = gradients(ours)
    assert largest(found, gradients(theirs)) <= close


@law
def autocast_is_the_same_in_backward():
    model, _ = a_model("lora", "llama")

    def found():
        model.zero_grad()
        ids = torch.arange(3, 43).view(2, 20)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()  # outside of autocast, as train() has it
        return {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }

    expected = found()
    with checkpointed(model):
        assert_same(found(), expected)


class Block(nn.Module):
    """n tanh in a row, of a product with one number; each keeps its output."""

    def __init__(self, n):
        super().__init__()
        self.p, self.n = nn.Parameter(torch.ones(())), n

    def forward(self, x):
        x = x * self.p
        for _ in range(self.n):
            x = torch.tanh(x)
        return x


@law
def bytes_are_layers_times_inputs_and_one_layer():
    """Between 4 and 12 blocks: 8 whole blocks without, 8 inputs checkpointed."""
    x, n = torch.randn(50, 100), 10
    kept = {}
    for how, run in (
        ("without", lambda block, x: block(x)),
        ("ours", checkpoint),
        ("torch's", partial(torchs.checkpoint, use_reentrant=False)),
    ):
        for blocks in (4, 12):
            model = nn.Sequential(*(Block(n) for _ in range(blocks)))

            def step(model=model, run=run):
                y = x
                for block in model:
                    y = run(block, y)
                y.sum().backward()

            kept[how, blocks] = measure_step(model, step).activations

    def of_eight(how):
        return (kept[how, 12] - kept[how, 4]) / x.nbytes

    # A block keeps its product's input, which is the block's before, and n outputs.
    assert of_eight("without") == pytest.approx(8 * n, abs=0.1)
    # The generator's state, 5,056 bytes a block, is no result of an operation.
    assert of_eight("ours") == pytest.approx(8, abs=0.1)
    assert of_eight("torch's") == pytest.approx(8, abs=0.1)


def test_a_models_activations_shrink():
    """As much as by transformers' own, within 5 %."""
    measured = {}
    ids = torch.arange(3, 243).view(6, 40)
    for how in ("without", "ours", "theirs"):
        model, _ = a_model("lora", "llama")
        if how == "theirs":
            model.activation_checkpointing_enable()

        def step(model=model):
            model(ids, labels=ids, use_cache=False).loss.backward()

        if how == "ours":
            with checkpointed(model):
                measured[how] = measure_step(model, step).activations
        else:
            measured[how] = measure_step(model, step).activations
    assert measured["ours"] < 0.75 * measured["without"]
    assert measured["ours"] == pytest.approx(measured["theirs"], rel=0.05)


@law
def every_kind_of_argument_is_passed():
    """Tensors in lists and dicts, by keyword, bound by partial; and other values.

    Two calls share them, as layers share a prefix: what made them is passed once.
    """

    def function(a, others, *, scale, table, word):
        assert word == "word" and others[1] == 3
        y = a * others[0] + scale * table["t"]
        return {"y": y, "none": None, "whole": table["i"] + 1}, [y.sum(), "text"]

    leaves = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    results = []
    for run in (lambda f, *args, **kwargs: f(*args, **kwargs), checkpoint):
        a, b, scale, t = (leaf.exp() for leaf in leaves)  # no leaves themselves
        table = {"t": t, "i": torch.arange(2)}
        bound = partial(function, word="word", table=table)
        loss = 0
        for _ in range(2):
            found, (total, text) = run(bound, a, [b, 3], scale=scale)
            assert found["none"] is None and text == "text"
            assert found["whole"].tolist() == [1, 2]
            assert not found["whole"].requires_grad
            loss = loss + found["y"].square().sum() + total
        loss.backward()
        results.append((loss, [leaf.grad for leaf in leaves]))
        for leaf in leaves:
            leaf.grad = None
    (one, expected), (other, ours) = results
    assert torch.equal(one, other)
    assert all(map(torch.equal, ours, expected))


@law
def every_second_layer_is_computed_twice():
    """The first, the third, …: their activations are made again, and no others."""
    model, _ = a_model("lora", "gpt2")
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    runs = []
    for number, layer in enumerate(layers):
        inner = next(m for m in layer.modules() if not list(m.children()))
        inner.register_forward_hook(lambda *_, number=number: runs.append(number))
    expected = gradients(model)
    runs.clear()
    with checkpointed(model, every=2):
        assert largest(gradients(model), expected) <= 1e-12
    assert sorted(runs) == sorted([*range(len(layers)), *range(0, len(layers), 2)])


def test_without_gradients_nothing_is_kept():
    model, _ = a_model("lora", "llama")
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with checkpointed(model):
            found = model(ids, use_cache=False).logits
    assert torch.equal(found, expected) and not found.requires_grad


@pytest.mark.parametrize("enabled_before", [False, True])
def test_the_model_is_as_it_was_afterwards(enabled_before):
    model, _ = a_model("lora", "llama")
    if enabled_before:
        model.activation_checkpointing_enable()
    before = snapshot(model)
    functions = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    with pytest.raises(KeyError), checkpointed(model):
        raise KeyError
    assert_same(snapshot(model), before)
    after = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    assert after == functions


def test_what_would_miss_the_parameters_is_refused():
    block, x = Block(2), torch.randn(3, requires_grad=True)
    for call in (
        lambda total: torch.autograd.grad(total, x),
        lambda total: total.backward(inputs=[x]),
    ):
        with pytest.raises(RuntimeError, match="would miss the parameters inside"):
            call(checkpoint(block, x).sum())
    fails = iter((False, True))

    def function(x):
        if next(fails):
            raise KeyError
        return x * torch.rand(3)

    total = checkpoint(function, x).sum()
    generator = torch.get_rng_state()
    with pytest.raises(KeyError):
        total.backward()
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_model_without_layers_is_refused():
    with (
        pytest.raises(ValueError, match="this Sequential has no decoder layers"),
        checkpointed(nn.Sequential(nn.Linear(2, 2))),
    ):
        pass


BUGS = {
    "the other half of the layers": (
        checkpointed,
        "[::every]",
        "[every - 1 :: every]",
        every_second_layer_is_computed_twice,
    ),
    "dropout draws other numbers": (
        Checkpoint.backward,
        "set_rng_state(ctx.random, ctx.device)",
        "pass",
        no_gradient_changes,
    ),
    "the generator is left where recomputing ended": (
        Checkpoint.backward,
        "set_rng_state(now, ctx.device)",
        "torch.rand(3)",
        no_gradient_changes,
    ),
    "autocast is off in backward": (
        Checkpoint.backward,
        "torch.enable_grad(), ctx.autocast, saved_by_value():",
        "torch.enable_grad(), saved_by_value():",
        autocast_is_the_same_in_backward,
    ),
    "behind frozen embeddings nothing needs a gradient": (
        checkpoint,
        "requires_grad=True",
        "requires_grad=False",
        no_gradient_changes,
    ),
    "a copy of the result is kept": (
        Checkpoint.forward,
        "return f(*x)",
        "y = f(*x); ctx.y = [t * 1 for t in y]; return y",
        bytes_are_layers_times_inputs_and_one_layer,
    ),
    "what is bound by keyword is no input": (
        checkpoint,
        "isinstance(function, partial)",
        "False",
        every_kind_of_argument_is_passed,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(
    BUGS, errors=(AssertionError, RuntimeError)
)
