"""F1b: pure bf16 against float32 master weights, and the rule that judges it."""

import numpy as np
import pytest
import torch
from architectures import build
from invented_runs import judged
from planting import Bug, each_is_caught, law, planted
from torch import nn

from peft_from_scratch import full
from peft_from_scratch.ledger.experiments import masters
from peft_from_scratch.ledger.verdicts import claim, judge


def rows(n=6):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (n, 9), generator=generator).tolist()
    return [(row, row) for row in ids]


def trained(recipe, lr, dtype="bfloat16", n=6):
    model = build("llama").to(getattr(torch, dtype))
    full.inject(model)
    start = masters.weights(model)
    losses = masters.steps(model, rows(n), dict(recipe=recipe, lr=lr, batch=2))
    return model, start, losses


@law
def steps_are_those_of_torchs_adamw():
    """In float32, by hand: each pair of rows once, clipped at one."""
    model, _, losses = trained("fp32", 1e-3, "float32")
    other = build("llama")
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0)
    for step in range(3):
        pair = rows()[2 * step : 2 * step + 2]
        ids = torch.tensor([row for row, _ in pair])
        loss = other(input_ids=ids, labels=ids).loss
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4)
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for own, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(own, theirs, atol=1e-5)


@law
def small_steps_move_few_weights_of_pure_bf16():
    """Thirty steps of 1e-5: without a master copy, a weight of 0.01 stays."""
    model, start, _ = trained("bf16", 1e-5, n=60)
    moved = masters.weights(model) != start
    assert 0 < moved.float().mean() < 0.4
    assert start[moved].abs().float().quantile(0.99) < 0.01


def test_a_run_of_each_recipe(base):
    settings = dict(task="orders", template="raw", steps=3, batch=4, test=6)
    config = masters.config("tiny", "bf16", 1e-3, 0) | settings | {"base": base}
    results = {
        recipe: masters.compute(config | {"recipe": recipe})
        for recipe in ("bf16", "mixed", "fp32")
    }
    for result in results.values():
        assert len(result["losses"]) == 3 and len(result["test_items"]) == 6
        assert np.mean(result["test_items"]) < np.mean(result["before_items"])
    assert results["fp32"]["changed"] > 0.5
    assert results["bf16"]["before_items"] == results["mixed"]["before_items"]


BUGS = {
    "the same rows at every step": Bug(
        masters.steps,
        "rows[first : first + size]",
        "rows[:size]",
        steps_are_those_of_torchs_adamw,
    ),
    "not clipped": Bug(
        masters.steps,
        "nn.utils.clip_grad_norm_(parameters, 1.0)",
        "pass",
        steps_are_those_of_torchs_adamw,
    ),
    "a master copy after all": Bug(
        masters.steps,
        'optimizer_class(config["recipe"])',
        'optimizer_class("mixed")',
        small_steps_move_few_weights_of_pure_bf16,
    ),
}
test_a_planted_bug_of_the_recipes_is_caught = each_is_caught(BUGS)


# ------------------------------------------------------------------------- The rule


def invented(low: float, high: float, control: float = 0.0):
    """Master weights learn 1 nat; pure bf16 loses these shares of it."""

    def result_of(config):
        share = {1e-5: low, 5e-5: high, 1e-3: control}[config["lr"]]
        share = share if config["recipe"] == "bf16" else 0.0
        noise = np.random.default_rng(config["seed"]).normal(scale=1e-3, size=6)
        return {
            "losses": [2.0],
            "before_items": [2.0] * 6,
            "test_items": (1.0 + share + noise).tolist(),
            "changed": 0.1 if config["recipe"] == "bf16" else 0.9,
        }

    return result_of


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("scale", ["tiny", "smollm2"])
@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.0, 0.0, "holds"),
        (0.3, 0.0, "holds when"),
        (0.9, 0.3, "does not hold here"),
        (0.0, 0.9, "does not hold here"),
    ],
)
def test_f1b_is_what_pure_bf16_loses_at_its_worse_rate(low, high, verdict, scale):
    judgement = judged("F1b", invented(low, high), scale)
    assert judgement.verdict == verdict
    assert judgement.measured == pytest.approx(100 * max(low, high), abs=0.5)
    assert "10 % of its weights have moved, and 90 %" in judgement.say_instead


@pytest.mark.usefixtures("store")
def test_f1b_is_about_small_steps():
    judgement = judged("F1b", invented(0.9, 0.9, control=0.5))
    assert judgement.verdict == "not run yet"
    assert "the size of a step does not decide" in judgement.reason


@pytest.mark.usefixtures("store")
def test_f1b_is_planted_on_the_better_rate():
    judged("F1b", invented(0.9, 0.0))
    with planted(masters.measured, "max(low, high)", "min(low, high)"):
        assert judge(claim("F1b"), "tiny").verdict == "holds"
    assert judge(claim("F1b"), "tiny").verdict == "does not hold here"
