"""M4b: what the merge onto the original weights keeps, and the rule that judges it."""

from copy import deepcopy
from statistics import fmean

import pytest
import torch
from architectures import build
from invented_runs import judged
from planting import Bug, each_is_caught, law, planted

from peft_from_scratch.core.adapter import adapters, as_matrix
from peft_from_scratch.core.targets import projections
from peft_from_scratch.ledger.experiments import finetune, fourth_merge
from peft_from_scratch.ledger.verdicts import claim, judge
from peft_from_scratch.methods import qlora
from peft_from_scratch.nf4 import CODES, NF4Linear, dequantize, quantize


def qlora_with_updates(norm: float):
    """(model, its base): every update has this norm, relative to its weight's."""
    base, model = build("llama"), build("llama")
    qlora.inject(model, r=4)
    finetune.randomize(model)
    for module in adapters(model).values():
        W, dW = fourth_merge.parts(module)
        module.B.data *= norm * W.norm() / dW.norm()
    return model, base


@law
def a_small_update_survives_on_the_original_weights_alone():
    model, base = qlora_with_updates(0.005)
    updates = {n: fourth_merge.parts(m) for n, m in adapters(model).items()}
    kept = {}
    for way in fourth_merge.WAYS["tiny"]:
        merged = fourth_merge.merged(model, way, base)
        kept[way] = fourth_merge.shares_kept(merged, updates)
    assert all(share == pytest.approx(1, abs=1e-3) for share in kept["dequantized"])
    assert max(map(abs, kept["requantized"])) < 0.2
    # NF4(W0 + ΔW) - W' has the update and what differs between two roundings of W0,
    # which is far larger and has no direction: so the mean over weights is compared.
    others = {n: -dW for n, (_, dW) in updates.items()}
    mirrored = deepcopy(model)
    for module in adapters(mirrored).values():
        module.B.data *= -1
    back = fourth_merge.shares_kept(
        fourth_merge.merged(mirrored, "quantized", base),
        {n: (updates[n][0], dW) for n, dW in others.items()},
    )
    assert fmean([*kept["quantized"], *back]) == pytest.approx(1, abs=0.15)


@law
def the_fourth_merge_is_nf4_of_the_sum():
    """By hand: the nearest of sixteen values to (W0 + ΔW) / absmax, block by block."""
    model, base = qlora_with_updates(0.3)
    merged = fourth_merge.merged(model, "quantized", base)
    code = torch.tensor(CODES["nf4"])
    for name, module in adapters(model).items():
        W = as_matrix(projections(base)[name]) + module.delta(torch.float32)
        own = merged.get_submodule(name)
        assert isinstance(own, NF4Linear)
        blocks = W.flatten().view(-1, 64)
        ratios = blocks / blocks.abs().amax(1, keepdim=True)
        nearest = code[(ratios[..., None] - code).abs().argmin(-1)]
        scale = dequantize(quantize(W, double=False)).flatten().view(-1, 64).abs()
        expected = nearest * scale.amax(1, keepdim=True)
        left = dequantize(own.quantized).flatten().view(-1, 64) - expected
        assert left.norm() / expected.norm() < 0.02  # the constants' own rounding


def test_a_run_merges_in_the_ways_that_it_names(base):
    trained = finetune.config(
        base=base,
        task="orders",
        method="qlora",
        lr=1e-2,
        template="raw",
        **dict(n=24, steps=10, batch=4, test=12, validation=6),
    )
    ways = [*fourth_merge.WAYS["tiny"]]
    result = fourth_merge.compute(
        trained | {"experiment": "fourth_merge", "merges": ways}
    )
    merges = result["merges"]
    assert list(merges) == ways and 0 < result["norm"] < 1
    assert merges["dequantized"]["kept"] == pytest.approx(1, abs=1e-3)
    assert merges["quantized"]["bytes"] == merges["requantized"]["bytes"]
    assert merges["quantized"]["bytes"] == result["bytes"]
    assert merges["original"]["bytes"] > 1.5 * result["bytes"]
    assert len({merge["test_loss"] for merge in merges.values()}) == 4
    assert merges["dequantized"]["test_loss"] == pytest.approx(
        result["test_loss"], abs=1e-4
    )


BUGS = {
    "onto the dequantized weights": Bug(
        fourth_merge.merged,
        '"original" if way == FOURTH else way',
        '"dequantized" if way == FOURTH else way',
        a_small_update_survives_on_the_original_weights_alone,
    ),
    "not in four bits": Bug(
        fourth_merge.merged,
        "quantize_model(copy)",
        "pass",
        the_fourth_merge_is_nf4_of_the_sum,
    ),
    "the share of the merged weight": Bug(
        fourth_merge.shares_kept,
        " - before",
        "",
        a_small_update_survives_on_the_original_weights_alone,
    ),
    "not over the update's square": Bug(
        fourth_merge.shares_kept,
        "dW.square().sum()",
        "before.square().sum()",
        a_small_update_survives_on_the_original_weights_alone,
    ),
}
test_a_planted_bug_of_the_fourth_merge_is_caught = each_is_caught(BUGS)


# ------------------------------------------------------------------------- The rule


def invented(fourth: float, requantized: float = 1.0, noise: float = 1e-4):
    """Runs whose merges cost so much."""

    def losses(config, loss):
        spread = [i * noise * (1 + config["seed"]) for i in range(4)]
        items = [loss + each for each in spread]
        return {"test_items": items, "test_loss": fmean(items), "kept": 0.5}

    def result_of(config):
        off = abs(config["lr"] - 1e-2) if config["base"] == "tiny" else 0.0
        result = losses(config, 1.0) | {
            "validation_loss": 1.0 + off,
            "diverged": None,
            "rows_digest": f"{config['task']} {config['seed']}",
            "bytes": 100,
            "norm": 0.01,
        }
        costs = {"quantized": fourth, "requantized": requantized}
        merges = {
            way: losses(config, 1.0 + costs.get(way, 0.5)) | {"bytes": 101}
            for way in config.get("merges", ())
        }
        return result | {"merges": merges}

    return result_of


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("scale", ["tiny", "smollm2"])
@pytest.mark.parametrize(
    ("fourth", "verdict"), [(0.0, "holds"), (0.3, "does not hold here")]
)
def test_m4b_is_what_the_fourth_merge_costs(fourth, verdict, scale):
    judgement = judged("M4b", invented(fourth), scale)
    assert judgement.verdict == verdict
    assert judgement.measured == pytest.approx(fourth, abs=1e-3)
    assert "1.01 times the bytes" in judgement.say_instead


@pytest.mark.usefixtures("store")
def test_m4b_is_planted_on_the_other_merge():
    judged("M4b", invented(0.0))
    right = "Measured(*cost(own, FOURTH), seeds, figures)"
    wrong = 'Measured(*cost(own, "requantized"), seeds, figures)'
    with planted(fourth_merge.measured, right, wrong):
        assert judge(claim("M4b"), "tiny").verdict == "does not hold here"
    assert judge(claim("M4b"), "tiny").verdict == "holds"
