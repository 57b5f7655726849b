"""Rules of the family, adapters and soft prompts: invented runs, and their verdicts.

A claim is judged as the ledger does it: the runs that it asks for are written to a
store, with results that a function of their configuration invents, until it asks for
no more. So its searches, its queries and its rule are tested together.
"""

import math
from statistics import fmean

import numpy as np
import pytest
import torch
from architectures import build
from invented_runs import judged
from planting import law, planted

from peft_from_scratch import lora
from peft_from_scratch.comparison import timing
from peft_from_scratch.comparison.timing import step_seconds
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.ledger import intervals
from peft_from_scratch.ledger.claim import Invalid
from peft_from_scratch.ledger.experiments import (
    challengers,
    counting,
    finetune,
    latency,
    rank_and_place,
    scaling,
)
from peft_from_scratch.ledger.verdicts import claim, judge
from peft_from_scratch.methods import prefix, prompt

pytestmark = pytest.mark.usefixtures("store")


def lost(loss_of, best_rate=lambda config: 1e-2):
    """config -> a result of a training run: its loss grows away from the best rate.

    Its rows' losses differ by seed, in the same way for all methods.
    """

    def result_of(config: dict) -> dict:
        off = math.log10(config["lr"] / best_rate(config))
        loss = loss_of(config) + off**2
        noise = np.random.default_rng(config["seed"]).normal(scale=1e-3, size=4)
        items = (loss + noise).tolist()
        return {
            "test_items": items,
            "test_loss": fmean(items),
            "validation_loss": loss,
            "diverged": None,
            "rows_digest": f"rows of {config['task']} {config['n']} {config['seed']}",
        }

    return result_of


def within(config: dict, grids: dict) -> float:
    """A best rate in the middle of the method's own grid."""
    return grids[config["method"]][1]


# --------------------------------------------------------------------------- L3


@pytest.mark.parametrize(
    ("p", "verdict"),
    [
        (0.0, "holds"),
        (-0.2, "holds when"),
        (-0.5, "does not hold here"),
        (0.4, "does not hold here"),
    ],
)
def test_l3_is_the_power_that_the_size_has(p, verdict):
    def sized(config):
        own = p if config["method"] == "lora" else 0.3
        return {"ratio": 0.2 * config["r"] ** own, "test_loss": 1.0}

    judgement = judged("L3", sized)
    assert judgement.verdict == verdict
    assert judgement.measured == pytest.approx(p, abs=1e-6)


@law
def an_update_is_measured_on_its_own_inputs():
    """rms((W - W0) x) / rms(W0 x) from weights, by an independent way to the same."""
    model = build("llama")
    lora.inject(model, r=4, alpha=12, targets="all-linear")
    finetune.randomize(model)
    batch = {"input_ids": torch.randint(3, 40, (2, 7))}
    seen, hooks = {}, []
    for name, module in adapters(model).items():
        note = lambda module, inputs, name=name: seen.update({name: inputs[0]})  # noqa: E731
        hooks.append(module.register_forward_pre_hook(note))
    model(**batch)
    for hook in hooks:
        hook.remove()
    found = scaling.update_ratios(model, batch)
    assert found.keys() == seen.keys()
    for name, module in adapters(model).items():
        dW = 3 * module.B.double() @ module.A.double()
        W0, x = module.base.weight.double(), seen[name].double()
        ratio = (x @ dW.T).norm() / (x @ W0.T).norm()
        assert found[name] == pytest.approx(ratio.item(), rel=1e-4)
    assert all(not module._forward_hooks for module in adapters(model).values())


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("module.scale * (x", "1.0 * (x"),
        ("_rms(output - added)", "_rms(output)"),
        ("ratios[name]", "ratios['q_proj']"),
        ("hook.remove()", "pass"),
    ],
)
def test_planted_faults_of_the_updates_size_are_caught(right, wrong):
    with (
        planted(scaling.update_ratios, right, wrong),
        pytest.raises((AssertionError, KeyError)),
    ):
        an_update_is_measured_on_its_own_inputs()


# ----------------------------------------------------------------------- L5, L6


def wins_on(tasks, by=0.2):
    """Attention's LoRA is better by so much on these tasks, and worse on others."""

    def loss_of(config):
        if config["targets"] != "attention":
            return 1.0
        return 1.0 - by if config["task"] in tasks else 1.0 + by

    return loss_of


@pytest.mark.parametrize(
    ("tasks", "verdict"),
    [
        (rank_and_place.GAPS, "holds"),
        (rank_and_place.GAPS[:3], "holds when"),
        ((), "does not hold here"),
    ],
)
def test_l5_counts_the_gaps_where_attention_is_better(tasks, verdict):
    judgement = judged("L5", lost(wins_on(tasks)))
    assert judgement.verdict == verdict
    assert judgement.measured == pytest.approx(20 * len(tasks))


def test_the_places_have_as_many_parameters():
    counts = {}
    for place, (targets, r) in rank_and_place.PLACES.items():
        model, _ = finetune.load_model("tiny", device="cpu")
        lora.inject(model, r=r, targets=targets)
        counts[place] = sum(
            p.numel() for m in adapters(model).values() for p in (m.A, m.B)
        )
    assert counts["attention"] == counts["mlp"] == 4 * 12_288
    assert counts["both"] == 4 * 12_800


def best_at(r, by):
    """The loss is lowest at rank r; at others higher by so much."""
    return lambda config: 1.0 + by * (config["r"] != r)


@pytest.mark.parametrize(
    ("loss_of", "verdict"),
    [
        (best_at(16, 0.3), "holds"),
        (best_at(4, 0.3), "does not hold here"),
        (best_at(4, 0.1), "holds when"),
        # Bad on one gap is enough.
        (
            lambda c: 1.0 + 0.3 * (c["r"] < 64 and c["task"] == "gap-4"),
            "does not hold here",
        ),
    ],
)
def test_l6_is_what_rank_16_costs_where_it_costs_most(loss_of, verdict):
    assert judged("L6", lost(loss_of)).verdict == verdict


def test_l6_tells_what_few_rows_do_to_a_high_rank():
    def overfits(config):
        return (
            1.0
            + 0.4 * (config["n"] == 100 and config["r"] == 64)
            + best_at(4, 0.3)(config)
        )

    assert "rank 64 minus rank 16 is +0.400" in judged("L6", lost(overfits)).say_instead


# ------------------------------------------------------------------- A2, T2, T3


def ahead(**by):
    """Methods whose loss is lower or higher than 1 by so much."""
    return lambda config: 1.0 + by.get(config["method"], 0.0)


def challenged(id, loss_of):
    best = lambda config: within(config, challengers.RATES)  # noqa: E731
    return judged(id, lost(loss_of, best))


@pytest.mark.parametrize(
    ("id", "by", "verdict"),
    [
        ("A2", dict(houlsby=0.3), "holds"),
        ("A2", dict(houlsby=0.05), "holds when"),
        ("A2", dict(houlsby=0.0), "does not hold here"),
        ("A2", dict(houlsby=-0.3), "does not hold here"),
        ("T2", dict(prompt=0.3), "holds when"),
        ("T2", dict(prompt=0.3, prefix=0.3), "does not hold here"),
        ("T3", dict(prompt=0.3, prefix=0.3), "holds"),
        ("T3", dict(prompt=0.3), "does not hold here"),  # the prefix is as good
        ("T3", dict(prefix=0.3), "does not hold here"),  # the prompt is
        ("T3", dict(prompt=0.05, prefix=0.3), "holds when"),
    ],
)
def test_challengers_are_judged_by_what_they_lose(id, by, verdict):
    judgement = challenged(id, ahead(**by))
    assert judgement.verdict == verdict, judgement.reason


def test_the_better_start_is_taken():
    """A soft prompt that only learns from text is judged by its runs from text."""

    def loss_of(config):
        drawn = isinstance(config.get("start"), str)
        return 1.0 + 0.5 * drawn

    assert challenged("T3", loss_of).measured == pytest.approx(0, abs=1e-6)
    law = "key=lambda start: losses[start][best[start]]"
    with planted(challengers.chosen, law, "key=lambda start: start[0] == '['"):
        assert "do not pair" in judge(claim("T3"), "tiny").reason


def test_a_search_that_ends_at_an_edge_is_no_verdict():
    judgement = judged("A2", lost(ahead(), lambda config: 1e9))
    assert judgement.verdict == "not run yet"
    assert "is an end of the grid" in judgement.reason


def test_longer_runs_do_not_count_as_the_usual_ones():
    def loss_of(config):
        return 1.0 + 0.3 * (config["method"] == "prompt") * (config["steps"] == 100)

    judgement = challenged("T2", loss_of)
    assert judgement.measured == pytest.approx(0.3, abs=1e-6)
    assert "300 optimizer steps ends +0.000 nats above" in judgement.say_instead


def test_the_challengers_are_of_equal_size():
    def trained(name):
        config = challengers.config(name, "gap-1", 1e-2, 0, steps=1)
        return finetune.compute(config | {"test": 2, "validation": 2})["trainable"]

    assert trained("lora") == trained("prefix-80") == 4 * 20_480
    assert trained("houlsby") == 4 * 20_302
    assert trained("prompt") == 16 * 128


# --------------------------------------------------------------------------- T1


@pytest.mark.parametrize("shape", counting.SHAPES)
def test_soft_prompts_are_counted_as_the_formulas_say(shape):
    sizes = counting.SHAPES[shape]
    layers, width = sizes["num_hidden_layers"], sizes["hidden_size"]
    heads = sizes["num_attention_heads"]
    kept = sizes.get("num_key_value_heads", heads) * width // heads
    assert counting.count_soft("prefix", shape, 7)[0] == 7 * 2 * layers * kept
    assert counting.count_soft("prompt", shape, 7)[0] == 7 * width


def test_the_counted_shapes_are_those_of_the_models():
    models = {
        shape: counting.count_soft("prompt", shape, 1)[1] for shape in counting.SHAPES
    }
    assert models["SmolLM2-135M"] == 134_515_008
    assert (
        round(models["Llama-7B"] / 1e8) == 67
        and round(models["Llama-65B"] / 1e8) == 653
    )


@pytest.mark.parametrize(("name", "method"), [("prefix", prefix), ("prompt", prompt)])
def test_an_injected_model_trains_what_was_counted(name, method):
    model = build("llama")
    config = model.config
    expected = counting.SOFT[name](model.model, config, 5).P.numel()
    method.inject(model, n=5)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_t1_is_counted():
    judgement = judged("T1", counting.compute)
    assert judgement.verdict == "computed"
    assert judgement.measured == pytest.approx(100 * 8 / 12)
    assert (
        "On Llama-7B, a prefix stays below its bound up to 25 positions, and a prompt "
        "up to 164 vectors" in judgement.say_instead
    )


# --------------------------------------------------------------------------- A1


def timed(houlsby, lora, **others):
    """Times of a machine that slows down by the round: only ratios within one tell."""

    def result_of(config):
        slower = [1.0 + i for i in range(config["rounds"])]
        of = {"base": 10, "again": 10, "merged": 10, "houlsby": houlsby, "lora": lora}
        return {name: [ms * s for s in slower] for name, ms in (of | others).items()}

    return result_of


@pytest.mark.parametrize(
    ("houlsby", "lora", "verdict"),
    [
        (15, 10, "holds"),
        (10.5, 10, "holds when"),
        (12, 20, "does not hold here"),
    ],
)
def test_a1_is_a_ratio_of_the_same_round(houlsby, lora, verdict):
    judgement = judged("A1", timed(houlsby, lora))
    assert judgement.verdict == verdict
    assert judgement.measured == pytest.approx(houlsby / lora)


def test_every_candidate_of_a_round_is_what_its_name_says(monkeypatch):
    monkeypatch.setitem(latency.SIZES, "tiny", dict(r=8, m=39))
    models = latency.candidates(latency.config("tiny", 1, 0))
    tokens = torch.arange(3, 19)[None]
    out = {name: model(tokens).logits for name, model in models.items()}
    assert torch.equal(out["base"], out["again"])
    assert torch.allclose(out["lora"], out["merged"], atol=1e-3)
    assert (out["lora"] - out["base"]).abs().max() > 1e-2
    assert adapters(models["lora"]) and not adapters(models["merged"])
    assert {type(m).__name__ for m in adapters(models["houlsby"]).values()} == {
        "Bottleneck"
    }


def test_a_step_of_a_batch_decodes_them_all():
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("llama")

        def forward(self, ids, **options):
            seen.append(tuple(ids.shape))
            return self.inner(ids, **options)

    step_seconds({"one": (Watched(), [3, 4, 5])}, tokens=2, rounds=1, batch=4)
    assert seen == [(4, 3), (4, 1), (4, 1)] * 2


def test_every_round_has_all_candidates_in_an_order_of_its_own(monkeypatch):
    """What ran before leaves the caches, so that a fixed order would favor one."""
    turns = []
    monkeypatch.setattr(
        timing, "_seconds_a_step", lambda model, *_: turns.append(model) or 1.0
    )
    names = "abcde"
    seconds = step_seconds({name: (name, [3]) for name in names}, rounds=29)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(
        names, 29
    )
    rounds = ["".join(turns[i : i + 5]) for i in range(0, len(turns), 5)]
    assert len(rounds) == 30 and all(sorted(r) == list(names) for r in rounds)
    for name in names:
        before = {r[r.index(name) - 1] for r in rounds if r[0] != name}
        assert len(before) == 4
    order = turns.copy()
    turns.clear()
    step_seconds({name: (name, [3]) for name in names}, rounds=29)
    assert turns == order


@pytest.mark.parametrize(
    ("n", "low", "high"), [(6, 1, 6), (9, 2, 8), (15, 4, 12), (21, 6, 16)]
)
def test_the_medians_interval_has_the_binomials_ranks(n, low, high):
    """The ranks that any table of the sign test has."""
    assert intervals.of_median(range(1, n + 1)) == ((n + 1) / 2, low, high)


def test_five_values_hold_no_median():
    with pytest.raises(Invalid, match="5 values"):
        intervals.of_median([1, 2, 3, 4, 5])
