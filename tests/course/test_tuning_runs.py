"""Figures of stored runs: made-up runs whose numbers are known, and what is said."""

import math
import random

import pytest
from planting import Bug, each_is_caught, law

from peft_from_scratch.course.pictures import tuning_runs
from peft_from_scratch.ledger.experiments import (
    family,
    own_rates,
    rank_and_place,
    scaling,
)
from peft_from_scratch.ledger.runs import Run

SEEDS = scaling.SEEDS


def run(result, **config):
    return Run("finetune-0", config, result, {})


def losses(test, validation=None, rows=3):
    """A result with these losses, and the same loss on each test row."""
    validation = test if validation is None else validation
    parts = {"test_loss": test, "validation_loss": validation}
    return parts | {
        "test_items": [test] * rows,
        "diverged": None,
        "rows_digest": "same",
    }


def shuffled(runs):
    random.Random(0).shuffle(runs)
    return runs


SEARCHES = {
    name: {
        "chosen": {"lr": own},
        "runs": [
            {"setting": {"lr": lr}, "correct": right, "rows": 20}
            for lr, right in by_rate.items()
        ],
    }
    for name, own, by_rate in (
        ("LoRA", 0.3, {0.1: 12, 0.3: 19, 1.0: 3}),
        ("other", 0.1, {0.1: 18, 0.3: 4}),
    )
}


@law
def a_grid_says_who_has_what():
    figure, words = tuning_runs.search_grid(SEARCHES)
    assert words == (
        "Rows right of 20. At 0.3: LoRA 19, other 4. At its own best learning rate: "
        "LoRA 19, other 18."
    )
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"95 % ★", "90 % ★", "60 %", "20 %", "not run"} <= set(texts)


@law
def records_have_what_a_judge_needs():
    about = dict(method="lora", r=8, alpha=16)
    trial = [
        run(losses(1.0 + k, 0.5 + 0.1 * k), lr=0.1, seed=seed, **about)
        for k, seed in enumerate(family.SEARCHED)
    ]
    trial += [run(losses(9.0, 8.0), lr=0.1, seed=20, **about)]
    trial += [run(losses(7.0), lr=0.1, seed=21, **about | {"method": "dora"})]
    lost = dict.fromkeys(("test_loss", "validation_loss", "test_items"))
    for seed in family.SEARCHED:
        worked = {} if seed > family.SEARCHED[0] else lost | {"diverged": "nan"}
        trial += [run(losses(5.0) | worked, lr=0.2, seed=seed, **about)]
    first, search = tuning_runs.records(shuffled(trial), "lora")
    wanted = dict(method="lora", lr=0.1)
    assert first == wanted | dict(seed=20, validation=8.0, test=9.0)
    means = dict(seed=0, validation=pytest.approx(0.6), test=pytest.approx(2.0))
    assert search == wanted | means


def sized():
    powers = {"lora": -0.5, "rslora": 0.25}
    return shuffled(
        [
            run(
                {"ratio": r**power * (1 + 0.01 * seed), "test_loss": power + 2},
                method=method,
                r=r,
                seed=seed,
            )
            for method, power in powers.items()
            for r in scaling.SIZED
            for seed in SEEDS
        ]
    )


@law
def sizes_and_losses_stand_beside_each_other():
    figure, words = tuning_runs.sizes(sized(), {1: [0.2, 0.4], 64: [0.1, 0.1]})
    assert words == (
        "Size: LoRA r^-0.50, rsLoRA r^+0.25. Test loss: LoRA 1.50 at rank 1, 1.50 at "
        "64; rsLoRA 2.25 at rank 1, 2.25 at 64."
    )
    left, right = figure.axes
    lora, rslora, live = (line.get_xydata() for line in left.lines)
    assert lora[:, 1] == pytest.approx([1.02 * r**-0.5 for r in scaling.SIZED])
    assert rslora[:, 0].tolist() == list(scaling.SIZED)
    assert live.ravel() == pytest.approx([1, 0.3, 64, 0.1])
    assert {line.get_ydata()[0] for line in right.lines} == {1.5, 2.25}


def tuned():
    """Alpha a is best at 0.1 / a, with losses a, a + 1 and a + 2 of the three seeds."""
    return shuffled(
        [
            run(
                losses(99.0 if k else alpha + seed - family.SEARCHED[0]),
                alpha=alpha,
                lr=lr,
                seed=seed,
            )
            for alpha in own_rates.ALPHAS
            for k, lr in ((1, 0.01 / alpha), (0, 0.1 / alpha), (1, 1 / alpha))
            for seed in family.SEARCHED
        ]
    )


@law
def a_product_is_alpha_times_the_learning_rate():
    figure, words = tuning_runs.alphas(tuned())
    assert "alpha 2: learning rate 0.05, product 0.1, loss 3.00 (2.00 to 4.00)" in words
    first = figure.axes[0].lines[0].get_xydata()
    assert first[:, 0] == pytest.approx([0.01, 0.1, 1.0])
    assert first[:, 1] == pytest.approx([99, 3, 99])


def placed(levels):
    """{targets: (rank, loss)} on every task at a searched rate; other runs too."""
    known = [
        run(losses(level), **about, lr=0.3, seed=seed)
        for targets, (r, level) in levels.items()
        for task in rank_and_place.GAPS
        for seed in SEEDS
        for about in [_about(task, targets, r)]
    ]
    for targets, (r, _) in levels.items():
        for task in rank_and_place.GAPS:
            known += [
                run(losses(9.0), **_about(task, targets, r), lr=lr, seed=0)
                for lr in (0.1, 1.0)
            ]
            known.append(
                run(losses(7.0), **_about(task, targets, r) | {"n": 5}, lr=0.3, seed=0)
            )
    return shuffled(known)


def _about(task, targets, r):
    base = dict(test=3, base_digest="same", n=rank_and_place.N)
    return base | dict(task=task, targets=targets, r=r)


@law
def targets_are_compared_with_the_first():
    pool = placed({"attention": (12, 1.0), "mlp": (8, 0.7), "all-linear": (4, 1.5)})
    places = {"heads": ("attention", 12), "MLP": ("mlp", 8), "all": ("all-linear", 4)}
    cells = tuning_runs.at_targets(pool, places)
    assert list(cells) == list(rank_and_place.GAPS)
    assert all(len(runs) == 5 for row in cells.values() for runs in row.values())
    figure, words = tuning_runs.targets(cells)
    assert words.startswith(
        "Minus heads, nats per token: gap-0 MLP -0.300, all +0.500;"
    )
    assert "heads falls behind" in figure.texts[0].get_text()


def test_a_place_without_runs_is_refused():
    with pytest.raises(LookupError, match="no stored runs of mlp, rank 9, on gap-0"):
        tuning_runs.at_targets(placed({"mlp": (8, 1.0)}), {"MLP": ("mlp", 9)})


@law
def the_excess_is_above_the_best_rank():
    pool = []
    for r in rank_and_place.RANKS:
        pool += placed({"all-linear": (r, 3 - math.log2(r) / 2 if r < 64 else 2.5)})
    figure, words = tuning_runs.excess_by_rank(pool)
    tasks = ", ".join(f"{task} 2.00" for task in rank_and_place.GAPS)
    assert words == f"Rank 1 above the best rank: {tasks}."
    first = figure.axes[0].lines[0].get_xydata()
    assert first.tolist() == [[1, 2.0], [4, 1.0], [16, 0.0], [64, 1.5]]


@law
def two_scales_say_how_much_a_size_grew():
    sides = {"apart": {"LoRA": [(1, 2.0), (4, 1.0)], "rsLoRA": [(1, 1.0), (4, 3.0)]}}
    sides["together"] = {"LoRA": [(1, 1.0), (4, 4.0)]}
    _, words = tuning_runs.two_scales(sides)
    assert words == (
        "Size at the last rank over that at rank 1. apart: LoRA 0.50, rsLoRA 3.00; "
        "together: LoRA 4.00."
    )


BUGS = {
    "the shared rate of the last": Bug(
        tuning_runs.search_grid,
        "next(iter(own.values()))",
        "[*own.values()][-1]",
        a_grid_says_who_has_what,
    ),
    "test for validation": Bug(
        tuning_runs._record,
        '"test": "test_loss"',
        '"test": "validation_loss"',
        records_have_what_a_judge_needs,
    ),
    "a diverged rate has a mean": Bug(
        tuning_runs.records,
        'any(run.result["diverged"] for run in at_rate)',
        'all(run.result["diverged"] for run in at_rate)',
        records_have_what_a_judge_needs,
    ),
    "a size for a loss": Bug(
        tuning_runs.sizes,
        '"test_loss"',
        '"ratio"',
        sizes_and_losses_stand_beside_each_other,
    ),
    "divided by alpha": Bug(
        tuning_runs.alphas,
        "_spread(alpha * lr",
        "_spread(lr / alpha",
        a_product_is_alpha_times_the_learning_rate,
    ),
    "few rows too": Bug(
        tuning_runs.at_targets,
        ", n=rank_and_place.N",
        "",
        targets_are_compared_with_the_first,
    ),
    "few rows for many": Bug(
        tuning_runs.excess_by_rank,
        ", n=rank_and_place.N",
        "",
        the_excess_is_above_the_best_rank,
    ),
    "above rank 64": Bug(
        tuning_runs.excess_by_rank,
        "min(means.values())",
        "means[64]",
        the_excess_is_above_the_best_rank,
    ),
    "upside down": Bug(
        tuning_runs.two_scales,
        "rows[-1][1] / rows[0][1]",
        "rows[0][1] / rows[-1][1]",
        two_scales_say_how_much_a_size_grew,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS, errors=(AssertionError, TypeError))
