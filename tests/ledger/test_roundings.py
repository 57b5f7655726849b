"""K2: what two roundings leave of an update, and the rule that judges what it costs."""

import math

import numpy as np
import pytest
import torch
from architectures import build
from invented_runs import judged
from planting import Bug, each_is_caught, law, planted

from peft_from_scratch import lora
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.ledger.experiments import roundings
from peft_from_scratch.ledger.verdicts import claim, judge


@law
def the_last_place_is_the_distance_to_the_next_value():
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        h = torch.cat([torch.randn(500), torch.tensor([1.0, 2.0, 0.75])]).to(dtype)
        up = torch.nextafter(h.abs(), torch.tensor(math.inf, dtype=dtype))
        distance = up.double() - h.abs().double()
        assert torch.equal(roundings.last_place(h), distance)


def injected(size: float, dtype="bfloat16", twice=False):
    """A small LoRA whose updates have about this size, in units of the last place."""
    torch.manual_seed(0)
    model = build("llama").to(getattr(torch, dtype))
    lora.inject(model, r=4)
    if twice:
        roundings.round_twice(model)
    for layer in adapters(model).values():
        layer.B.data = size * torch.randn_like(layer.B)
    return model


def batch(rows=16):
    torch.manual_seed(1)
    return {"input_ids": torch.randint(3, 40, (rows, 32))}


@law
def one_rounding_keeps_what_two_lose():
    """The mean over projections: an update of a small part of a unit, and a large."""
    for size, left in ((3e-5, 0.0), (0.5, 1.0)):
        ways = (injected(size, twice=True), injected(size))
        twice, once = (np.mean(roundings.survival(way, batch(64))[1]) for way in ways)
        assert twice == pytest.approx(left, abs=0.15)
        assert once == pytest.approx(1, abs=0.25)


@law
def in_float32_all_is_kept_and_sizes_are_counted():
    """By hand: u of one projection, from its weights and what goes into it."""
    model = injected(0.01, "float32")
    seen = {}
    for name, layer in adapters(model).items():
        note = lambda module, args, name=name: seen.update({name: args[0]})  # noqa: E731
        layer.register_forward_pre_hook(note)
    with torch.no_grad():
        model(**batch(2))
    inputs = dict(seen)
    sizes, shares = roundings.survival(model, batch(2))
    assert all(share == pytest.approx(1, abs=1e-2) for share in shares)
    for size, (name, layer) in zip(sizes, adapters(model).items(), strict=True):
        u = inputs[name].double() @ layer.delta(torch.float64).T
        W0x = layer.base(inputs[name]).abs()
        next_ = torch.nextafter(W0x, torch.tensor(math.inf))
        ulp = (next_.double() - W0x.double()).median()
        assert size == pytest.approx((u.square().mean().sqrt() / ulp).item(), rel=1e-3)


def test_a_run_has_all_that_the_rule_asks_for(base):
    settings = dict(task="orders", template="raw", steps=4, batch=4, test=6)
    own = roundings.config("tiny", "once", 1e-3, 0) | settings | {"base": base}
    results = {
        way: roundings.compute(own | {"way": way, "lr": lr})
        for way, lr in (("float32", 1e-3), ("twice", 1e-3), ("once", 1e-3))
    }
    for result in results.values():
        assert len(result["losses"]) == 4 and len(result["test_items"]) == 6
        assert len(result["size"]) == len(result["kept"]) == 14
    twice, once = results["twice"], results["once"]
    assert twice["before_items"] == pytest.approx(once["before_items"], abs=0.1)
    assert twice["test_items"] != once["test_items"]


BUGS = {
    "the unit of a larger number": Bug(
        roundings.last_place,
        ".eps / 2",
        ".eps",
        the_last_place_is_the_distance_to_the_next_value,
    ),
    "two roundings that are one": Bug(
        roundings.round_twice,
        "layer.base.register",
        "layer.register",
        one_rounding_keeps_what_two_lose,
    ),
    "no scale": Bug(
        roundings.survival,
        "layer.scale * ",
        "",
        in_float32_all_is_kept_and_sizes_are_counted,
    ),
    "of the whole output": Bug(
        roundings.survival,
        "whole.double() - without.double()",
        "whole.double()",
        in_float32_all_is_kept_and_sizes_are_counted,
    ),
}
test_a_planted_bug_of_the_roundings_is_caught = each_is_caught(BUGS)


# ------------------------------------------------------------------------- The rule


def invented(lost: float, control: float = 0.0, once: float = 0.0):
    """Float32 learns 1 nat; of that, the ways lose these shares."""

    def result_of(config):
        small = config["lr"] == roundings.SMALL
        share = {"float32": 0.0, "once": once, "twice": once + lost}[config["way"]]
        if not small:
            share = control if config["way"] == "twice" else 0.0
        noise = np.random.default_rng(config["seed"]).normal(scale=1e-3, size=6)
        return {
            "losses": [2.0],
            "before_items": [2.0] * 6,
            "test_items": (1.0 + share + noise).tolist(),
            "size": [0.2, 0.3, 0.4],
            "kept": [0.1 if config["way"] == "twice" else 1.0] * 3,
        }

    return result_of


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("scale", ["tiny", "smollm2"])
@pytest.mark.parametrize(
    ("lost", "verdict"),
    [(0.8, "holds"), (0.3, "holds when"), (0.01, "does not hold here")],
)
def test_k2_is_what_two_roundings_lose_of_the_learning(lost, verdict, scale):
    judgement = judged("K2", invented(lost), scale)
    assert judgement.verdict == verdict
    assert judgement.measured == pytest.approx(100 * lost, abs=0.5)
    assert "10 % of it is left, with one 100 %" in judgement.say_instead


@pytest.mark.usefixtures("store")
def test_k2_counts_nothing_that_one_rounding_loses_too():
    judgement = judged("K2", invented(0.0, once=0.8))
    assert judgement.verdict == "does not hold here"
    with planted(roundings.lost, "items(of_way(all_runs, beside, lr))", "items(full)"):
        assert judge(claim("K2"), "tiny").verdict == "holds"


@pytest.mark.usefixtures("store")
def test_k2_is_about_small_updates():
    judgement = judged("K2", invented(0.8, control=0.8))
    assert judgement.verdict == "not run yet"
    assert "the size of the update does not decide" in judgement.reason
