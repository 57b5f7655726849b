"""A ghost's bill is that of the model it stands for, and it never holds a number."""

import pytest
import torch
from architectures import CONFIGS, build
from planting import assert_caught, law
from transformers import LlamaConfig

from peft_from_scratch import full, lora
from peft_from_scratch.ledger.experiments import bill
from peft_from_scratch.memory import meta_model as ghost
from peft_from_scratch.memory.meter import Meter
from peft_from_scratch.memory.step_bill import optimizer_class, step_bill

# Gemma's attention has softcaps, GPT-2 and OPT have a step of their own for a mask that
# a caller made: the ghost is held to the architectures that it is used for.
ARCHITECTURES = ("llama", "qwen")
ROWS = ("weights", "gradients", "optimizer", "activations", "temporaries", "peak")
SEVEN = dict(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
)


def real_bill(architecture, recipe, length):
    dtype = torch.float32 if recipe == "fp32" else torch.bfloat16
    model = build(architecture, dtype=dtype)
    return bill.counted(model, recipe, batch=2, length=length)["bytes"]


def ghost_bill(architecture, recipe, length, method=full):
    dtype = "float32" if recipe == "fp32" else "bfloat16"
    model = ghost.ghost(CONFIGS[architecture](), dtype)
    method.inject(model)
    return ghost.bill(model, recipe, batch=2, length=length)


def agrees(architecture="llama", recipe="mixed", length=200):
    real = real_bill(architecture, recipe, length)
    assert real.keys() == set(ROWS)
    assert ghost_bill(architecture, recipe, length) == pytest.approx(real, rel=0.01)


class Momentum(torch.optim.Optimizer):
    """One state as large as the weight, and a temporary three times that."""

    @torch.no_grad()
    def step(self):
        (weight,) = self.param_groups[0]["params"]
        self.state[weight]["momentum"] = torch.ones_like(weight)
        weight -= torch.zeros(3, *weight.shape)[0]


@law
def a_bill_has_every_part():
    model = torch.nn.Linear(64, 64, bias=False)
    x, n = torch.ones(5000, 64), model.weight.nbytes

    def learn():
        model(x).square().sum().backward()

    found = step_bill(model, learn, Momentum(model.parameters(), {}))
    assert [found[part] for part in ROWS[:3]] == [n, n, n]
    assert found["temporaries"] == 3 * n
    assert found["activations"] > 10 * n
    assert found["peak"] >= found["activations"] + 2 * n  # the weight and its state


@law
def a_peak_is_that_of_a_later_step():
    """Few tokens, and a large embedding first: the update decides."""
    for recipe in bill.RECIPES:
        dtype = torch.float32 if recipe == "fp32" else torch.bfloat16
        model = torch.nn.Sequential(torch.nn.Linear(64, 576), torch.nn.Linear(576, 8))
        model.to(dtype)
        optimizer = optimizer_class(recipe)(model.parameters(), lr=1e-3)
        x = torch.ones(1, 64, dtype=dtype)

        def learn(model=model, x=x):
            model(x).sum().backward()

        counted = step_bill(model, learn, optimizer)
        with Meter(model) as later:
            optimizer.step()
        assert counted["peak"] == later.memory().peak


@pytest.mark.parametrize("recipe", bill.RECIPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_ghost_has_the_bill_of_its_model(architecture, recipe):
    for length in (40, 200):
        agrees(architecture, recipe, length)


def test_activations_grow_with_the_tokens_and_not_faster():
    short, long = (
        ghost_bill("llama", "mixed", length)["activations"] for length in (500, 4000)
    )
    assert long == pytest.approx(8 * short, rel=0.01)


def test_a_lora_keeps_the_activations_and_drops_the_rest():
    whole, thin = (ghost_bill("llama", "mixed", 400, m) for m in (full, lora))
    assert thin["activations"] > whole["activations"] / 2
    for row in ("gradients", "optimizer"):
        assert thin[row] < whole[row] / 2


def test_seven_billion_parameters_take_sixteen_bytes_each():
    model = ghost.ghost(LlamaConfig(**SEVEN, tie_word_embeddings=False))
    full.inject(model)
    found = ghost.bill(model, "mixed")
    n = sum(p.numel() for p in model.parameters())
    assert n == 6_738_415_616
    kept = found["weights"] + found["gradients"] + found["optimizer"]
    assert kept / n == pytest.approx(16, abs=1e-4)
    assert all(p.is_meta for p in model.parameters())


def test_a_ghost_can_be_billed_again():
    model = ghost.ghost(CONFIGS["llama"]())
    full.inject(model)
    bills = [ghost.bill(model, "bf16", length=length) for length in (40, 80, 40)]
    assert bills[0] == bills[2] != bills[1]


def test_the_configuration_is_the_callers():
    config = CONFIGS["llama"]()
    before = config.to_dict()
    ghost.ghost(config)
    assert config.to_dict() == before


def test_what_it_refuses():
    model = ghost.ghost(CONFIGS["llama"]())
    with pytest.raises(ValueError, match="inject first"):
        ghost.bill(model, "mixed")
    full.inject(model)
    with pytest.raises(ValueError, match=r"recipe='int8': allowed are fp32, bf16"):
        ghost.bill(model, "int8")
    real = build("llama")
    full.inject(real)
    with pytest.raises(ValueError, match="holds numbers"):
        ghost.bill(real, "mixed")


MUTANTS = {
    "attention that keeps a (t, t) matrix": (
        ghost._attend,
        "FUSED(query, key, value, 0.0, True, scale=scaling)",
        "(query @ key.repeat_interleave(2, 1).transpose(2, 3)).softmax(-1)"
        " @ value.repeat_interleave(2, 1), None",
    ),
    "no float32 logits": (ghost._loss, "widened(", "("),
    "the update is not counted": (
        step_bill,
        '"temporaries": updating.activations',
        '"temporaries": 0',
    ),
    "the first update's peak": (
        step_bill,
        "lasting + updating.activations",
        "updating.peak",
    ),
    "no optimizer in the peak": (
        step_bill,
        "learning.peak + updating.optimizer",
        "learning.peak",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant):
    function, right, wrong = MUTANTS[mutant]
    law = a_bill_has_every_part if function is step_bill else agrees
    if mutant == "the first update's peak":
        law = a_peak_is_that_of_a_later_step
    assert_caught(function, right, wrong, law)
