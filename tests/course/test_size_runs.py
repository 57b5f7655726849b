"""Leads of claim F4: made-up runs whose leads are known, and the rule's own numbers."""

import pytest
from figure_overlaps import assert_apart
from planting import each_is_caught, law

from peft_from_scratch.course.pictures import size_runs
from peft_from_scratch.ledger.experiments import data_size, finetune
from peft_from_scratch.ledger.runs import Run

FAR, NEAR = data_size.FOR_FULL[0], data_size.FOR_LORA[0]
LOSSES = {  # at the searched rate, seed 0; a seed more, a tenth more
    (FAR, data_size.FULL): 1.0,
    (FAR, data_size.LORA): 1.5,
    (NEAR, data_size.FULL): 0.7,
    (NEAR, data_size.LORA): 0.65,
}
SEEDS = {data_size.FULL: (0, 1, 2, 3), data_size.LORA: (0, 1, 3)}


def run(task, n, method, lr, seed, loss):
    config = data_size.config(task, n, method, lr, seed)
    losses = {"test_loss": loss, "validation_loss": loss, "test_items": [loss] * 4}
    result = losses | {"diverged": None, "rows_digest": "same"}
    return Run(f"{task}-{n}-{method}-{lr}-{seed}", config, result, {})


def stored():
    """Both methods search three rates, the middle one is the best."""
    runs = []
    for (task, n), method in LOSSES:
        for k, lr in enumerate(data_size.RATES[method]):
            worse = (0.5, 0.0, 0.5)[k]
            at = data_size.TUNED_AT
            runs.append(run(task, at, method, lr, 0, 1.0 + worse))
        rate = data_size.RATES[method][1]
        for seed in SEEDS[method]:
            loss = LOSSES[(task, n), method] + seed / 10
            runs.append(run(task, n, method, rate, seed, loss))
    for method, loss in ((data_size.FULL, 2.0), (data_size.LORA, 2.5)):
        rate = data_size.RATES[method][1]
        runs.append(run(data_size.CONTROL, data_size.SOME, method, rate, 0, loss))
    return runs


@law
def a_lead_is_paired_by_seed():
    for cell, lead in ((FAR, 0.5), (NEAR, -0.05)):
        leads = size_runs.leads(stored(), cell, data_size.FULL, data_size.LORA)
        assert leads == pytest.approx([lead] * 3)


@law
def random_answers_stand_beside_right_ones():
    assert size_runs.random_answers(stored()) == [(2.0, 1.0), (2.5, 1.0)]


@law
def a_live_number_is_the_rules(monkeypatch):
    """With the losses of the stored runs; the near number is the smaller one."""
    asked = []

    def compute(config):
        asked.append(config)
        cell = config["task"], config["n"]
        loss = LOSSES[cell, config["method"]] + config["seed"] / 100
        items = {"test_items": [loss] * 4, "rows_digest": "same"}
        return {"test_loss": loss, "diverged": None, **items}

    monkeypatch.setattr(finetune, "compute", compute)
    number = size_runs.live(stored(), seeds=(20, 21))
    assert number == pytest.approx((0.07, 0.07, 0.07))
    assert {config["seed"] for config in asked} == {20, 21}
    assert all(config.items() >= size_runs.SHORT.items() for config in asked)
    rates = {(c["method"], c["lr"]) for c in asked}
    assert rates == {(m, data_size.RATES[m][1]) for m in SEEDS}


def test_the_picture_has_a_row_for_each_comparison():
    pair = data_size.FULL, data_size.LORA
    compared = {"far": (FAR, *pair), "near": (NEAR, *pair)}
    figure, words = size_runs.picture(stored(), compared, title="Leads")
    assert words.startswith("far +0.500 [") and "; near -0.050 [" in words
    assert_apart(figure)


LEAD, RANDOM, LIVE = (
    a_lead_is_paired_by_seed,
    random_answers_stand_beside_right_ones,
    a_live_number_is_the_rules,
)
BUGS = {
    "the sign": (size_runs.leads, "behind[seed] - ahead", "ahead[seed] - ahead", LEAD),
    "a seed of one arm": (size_runs.leads, "() & behind", "() | behind", LEAD),
    "the other method": (size_runs.random_answers, "== how]", "!= how]", RANDOM),
    "the margin's sign": (size_runs.live, "end + MARGIN", "end - MARGIN", LIVE),
    "the larger number": (size_runs.live, "map(min", "map(max", LIVE),
    "runs of full length": (size_runs._short, " | SHORT", "", LIVE),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS, (AssertionError, KeyError))
