"""Figures of LoRA's relatives: made-up runs whose leads are known, and what is said."""

import random

import pytest
from planting import Bug, each_is_caught, law

from peft_from_scratch.course.pictures import family_runs
from peft_from_scratch.ledger.experiments import family
from peft_from_scratch.ledger.runs import Run

OWN = {"lora": 0.2, "rslora": 0.2, "lora-plus": 0.1, "dora": 0.2, "pissa": 0.1}


def trial():
    """Own rates of OWN. PiSSA loses 0.3 less there, and 2 more where LoRA is best."""
    all_runs = []
    for method, own in OWN.items():
        for k, lr in enumerate((0.05, 0.1, 0.2, 0.4)):
            for seed in (*family.SEARCHED, *family.COMPARED):
                loss = 1.0 if lr == own else 3.0 + k
                loss -= 0.3 * (method == "pissa" and lr == own)
                spread = 0.1 * (seed - 11) if seed in family.SEARCHED else 0.0
                result = {
                    "validation_loss": loss + spread,
                    "test_items": [loss, loss],
                    "test_loss": loss,
                    "diverged": None,
                    "rows_digest": "same",
                }
                about = dict(method=method, lr=lr, seed=seed, task="t", n=1, test=2)
                config = about | {"base_digest": "same"}
                all_runs.append(Run(f"{method}-{lr}-{seed}", config, result, {}))
    random.Random(0).shuffle(all_runs)
    return all_runs


@law
def a_valley_has_every_seed_of_the_search():
    figure, words = family_runs.valleys(trial())
    assert words == (
        "Lowest at learning rate (validation loss): LoRA 0.2 (1.00), rsLoRA 0.2 "
        "(1.00), LoRA+ 0.1 (1.00), DoRA 0.2 (1.00), PiSSA 0.1 (0.70)."
    )
    first = figure.axes[0].lines[0].get_xydata()
    assert first.ravel() == pytest.approx([0.05, 3, 0.1, 4, 0.2, 1, 0.4, 6])


@law
def leads_are_those_at_one_rate_and_at_the_own():
    figure, words = family_runs.leads(trial())
    assert words == (
        "Lead over LoRA, nats per token. All at 0.2: rsLoRA +0.00, LoRA+ -4.00, DoRA "
        "+0.00, PiSSA -4.00, spread 4.00; Each at its own: rsLoRA +0.00, LoRA+ +0.00, "
        "DoRA +0.00, PiSSA +0.30, spread 0.30."
    )
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names == ["All at 0.2", "Each at its own"]


def test_a_relative_that_diverged_at_loras_rate_has_no_dot_there():
    runs = trial()
    for run in runs:
        if run.config["method"] == "lora-plus" and run.config["lr"] == 0.2:
            nothing = dict.fromkeys(("validation_loss", "test_items", "test_loss"))
            run.result.update(nothing, diverged="the loss is nan")
    _, words = family_runs.leads(runs)
    assert "All at 0.2: rsLoRA +0.00, DoRA" in words
    _, words = family_runs.valleys(runs)
    assert "LoRA+ 0.1 (1.00)" in words


BUGS = {
    "the own rate for both": Bug(
        family_runs.leads,
        "family.lead_at_loras(pools, method)",
        "family.lead_at_own(pools, method)",
        leads_are_those_at_one_rate_and_at_the_own,
    ),
    "everyone's rate is LoRA's": Bug(
        family_runs.valleys,
        "chosen(pools[method].table) for",
        "chosen(pools[family.LORA].table) for",
        a_valley_has_every_seed_of_the_search,
    ),
    "the other way round": Bug(
        family.lead_at_loras,
        "paired(pool[LORA].at(shared), theirs)",
        "paired(theirs, pool[LORA].at(shared))",
        leads_are_those_at_one_rate_and_at_the_own,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS)
