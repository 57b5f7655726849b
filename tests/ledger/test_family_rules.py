"""X1, L7, L8: invented runs with known leads and searches, and verdicts."""

import json
import math

import pytest
from invented_runs import diverging, judged, valley
from planting import Bug, each_is_caught, law

from peft_from_scratch.ledger import rates, runs
from peft_from_scratch.ledger.claim import Invalid
from peft_from_scratch.ledger.experiments import family, finetune, own_rates
from peft_from_scratch.ledger.intervals import paired
from peft_from_scratch.ledger.runs import Run

pytestmark = pytest.mark.usefixtures("store")
BEST = {"lora": 1e-2, "rslora": 6e-3, "lora-plus": 3e-3, "dora": 1e-2, "pissa": 6e-3}


def lost(leads, best=BEST, noise=1e-3):
    """config -> a result: LoRA's loss minus the method's lead, at its best rate."""
    return valley(
        lambda config: 1.0 - leads.get(config["method"], 0.0),
        lambda config: best[config["method"]],
        noise,
    )


@pytest.mark.parametrize(
    ("leads", "noise", "verdict"),
    [
        ({}, 1e-3, "holds"),
        ({"dora": 0.015, "pissa": -0.5}, 1e-3, "holds"),
        ({"pissa": 0.05}, 1e-3, "does not hold here"),
        ({"rslora": 0.03}, 0.3, "undecided"),
    ],
)
def test_x1_is_the_lead_of_the_best_relative(leads, noise, verdict):
    assert judged("X1", lost(leads, noise=noise)).verdict == verdict


def test_x1_shows_what_one_rate_would_have_said():
    judgement = judged("X1", lost({}))
    assert judgement.measured == pytest.approx(0, abs=2e-3)
    off = math.log10(1e-2 / 3e-3) ** 2  # LoRA+ at LoRA's rate
    assert f"spread over {off:.2f} nats at one rate and 0.00" in judgement.say_instead
    assert "LoRA 0.01, rsLoRA 0.006, LoRA+ 0.003" in judgement.say_instead


def test_x1_says_that_a_relative_diverged_at_loras_rate():
    def too_high(config):
        return config["method"] == "lora-plus" and config["lr"] >= 1e-2

    result_of = diverging(lost({}), too_high)
    assert "LoRA+ diverged" in judged("X1", result_of).say_instead


def test_an_optimum_at_an_end_is_no_verdict():
    """The grid grows to 6e-2 · 10^(3/4) at the most; the best rate is far above."""
    judgement = judged("X1", lost({}, BEST | {"dora": 3.0}))
    assert judgement.verdict == "not run yet"
    assert "is an end of the grid" in judgement.reason


def test_the_search_and_the_comparison_share_no_seed():
    assert not set(family.SEARCHED) & set(family.COMPARED)


def test_lora_plus_with_a_ratio_of_one_is_lora():
    short = {"steps": 3, "warmup": 1, "test": 4, "validation": 4}
    plus, plain = (family.config(m, 1e-2, 5) | short for m in ("lora-plus", "lora"))
    ours, theirs = family.compute(plus | {"lr_ratio": 1.0}), finetune.compute(plain)
    for result in (ours, theirs):
        del result["seconds"], result["step_seconds"]
    assert ours == theirs
    assert family.compute(plus)["test_items"] != theirs["test_items"]


def test_lora_plus_is_lora_with_more_alpha():
    """Under Adam, lr_ratio · lr for B and alpha · lr_ratio give the same model."""
    short = {"steps": 3, "warmup": 1, "test": 4, "validation": 4, "clip": None}
    plus = family.config("lora-plus", 1e-3, 5) | short
    more = family.config("lora", 1e-3, 5, alpha=family.ALPHA * family.RATIO) | short
    ours, theirs = family.compute(plus), finetune.compute(more)
    assert ours["test_items"] == pytest.approx(theirs["test_items"], rel=1e-3)
    plain = finetune.compute(family.config("lora", 1e-3, 5) | short)
    assert ours["test_items"] != pytest.approx(plain["test_items"], rel=1e-3)


# ---------------------------------------------------------------------- L7 and L8


@pytest.mark.parametrize(
    ("losses", "noise", "verdict"),
    [
        ({}, 1e-3, "holds"),  # one knob: every alpha is as good
        ({2: 2.0, 64: 2.0}, 1e-3, "holds"),
        ({2: 0.95}, 1e-3, "holds when"),
        ({64: 0.7}, 1e-3, "does not hold here"),
        ({8: 1.3}, 1e-3, "does not hold here"),  # the worse of the two usual ones
        ({64: 0.97}, 0.3, "undecided"),
    ],
)
def test_l7_is_what_the_usual_alphas_cost(losses, noise, verdict):
    def loss_of(config):
        return losses.get(config["alpha"], 1.0)

    assert judged("L7", valley(loss_of, noise=noise)).verdict == verdict


def rates_move(by: float):
    """The best rate of a rank: it moves by this power of the rank."""
    return lambda config: 1e-2 * (config["r"] / 8) ** by


@pytest.mark.parametrize(
    ("by", "cost", "verdict"),
    [
        (0.0, 0.0, "holds"),
        (-0.25, math.log10(8**0.25) ** 2, "holds when"),
        (-0.5, math.log10(8**0.5) ** 2, "does not hold here"),
    ],
)
def test_l8_is_what_a_moved_rate_costs(by, cost, verdict):
    judgement = judged("L8", valley(lambda config: 1.0, rates_move(by)))
    assert judgement.verdict == verdict
    assert judgement.measured == pytest.approx(cost, abs=0.025)  # to a quarter decade


def test_l8_takes_the_rank_that_pays_more():
    """Rank 1 has another best rate, rank 64 has that of rank 8."""

    def best_of(config):
        return 1e-2 / (4 if config["r"] == 1 else 1)

    judgement = judged("L8", valley(lambda config: 1.0, best_of))
    assert judgement.measured > 0.2
    assert "rank 64: +0.000" in judgement.say_instead


def test_x1_and_the_others_share_their_runs_of_lora():
    judged("X1", lost({}))
    stored = {json.dumps(r.config, sort_keys=True) for r in runs.select()}
    asked = [*own_rates.alpha_configs("tiny"), *own_rates.rank_configs("tiny")]
    plain = [c for c in asked if (c["r"], c["alpha"]) == (family.RANK, family.ALPHA)]
    assert plain
    assert {json.dumps(runs._plain(c, ""), sort_keys=True) for c in plain} <= stored


# ------------------------------------------------------------------ The search's noise


def of(name, loss, lr, seed, validation=0.0):
    items = {"test_items": [loss, loss], "validation_loss": validation}
    about = dict(method=name, lr=lr, seed=seed, test=2, n=1, task="t", base_digest="b")
    return Run(name, about, items | {"diverged": None, "rows_digest": "r"}, {})


def refusal(*arguments) -> str:
    try:
        rates.chosen(*arguments)
    except Invalid as why:
        return str(why)
    return "none"


@law
def the_noise_of_the_search_adds_in_squares():
    """Resamples that draw seed 0 twice or more choose 0.2, where the loss is higher."""
    losses = {0.1: [9.0, 0.0, 0.0], 0.2: [2.0, 3.0, 3.0], 0.3: [9.0, 9.0, 9.0]}
    losses[0.05] = [99.0] * 3
    assert rates.chosen(losses) == 0.2  # 8/3 against 3
    assert rates.choices(losses) == {0.1, 0.2}

    def sides(drawn):
        worse = 0.3 if rates.chosen(losses, drawn) == 0.1 else 0.0
        noise = (0.01, -0.02, 0.01)
        ours = [of("a", 1 + worse + e, 0.1, s) for s, e in enumerate(noise)]
        return ours, [of("b", 0.5, 0.1, s) for s in range(3)]

    mean, low, high = rates.at_own(sides, 3)
    alone, alone_low, alone_high = paired(*sides(range(3)))
    assert mean == alone == pytest.approx(0.5)
    assert low == pytest.approx(alone_low)  # no resample is better
    assert high - mean == pytest.approx(math.hypot(0.3, alone_high - alone))


@law
def every_choice_is_inside_of_the_grid():
    losses = {0.1: [0.0, 5.0, 5.0], 0.2: [3.0, 1.0, 1.0], 0.3: [9.0, 9.0, 9.0]}
    assert rates.chosen(losses) == 0.2
    assert rates.choices(losses) == {0.1, 0.2}
    assert "best learning rate 0.1 is an end" in refusal(losses, (0, 0, 1))


@law
def a_grid_grows_where_a_resample_chooses_its_end():
    """Seed 2 wants 3e-3, an end; the mean of the three does not."""
    tried = []

    def config_of(lr, seed):
        return {"experiment": "x", "lr": lr, "seed": seed}

    def loss(lr, seed):
        wanted = 3e-3 if seed == 2 else 1e-2
        return abs(math.log10(lr / wanted))

    for _ in range(9):
        configs, table = rates.searched(config_of, (3e-3, 6e-3, 1e-2, 2e-2), (0, 1, 2))
        if table:
            break
        for c in configs:
            if runs.stored(c) is None:
                tried.append(c["lr"])
                result = {"validation_loss": loss(c["lr"], c["seed"])}
                runs.write(c, result)
    assert sorted(table) == [2e-3, 3e-3, 6e-3, 1e-2, 2e-2]
    assert table[3e-3] == pytest.approx([loss(3e-3, s) for s in range(3)])


def test_a_diverged_run_is_never_chosen():
    own = [of("a", 1.0, lr, s, None if s else 0.0) for lr in (0.1,) for s in (0, 1)]
    own += [of("a", 1.0, lr, s, 5.0) for lr in (0.05, 0.2, 0.4) for s in (0, 1)]
    table = rates.table_of(own)
    assert table[0.1] == [0.0, math.inf]
    assert rates._choice(table, (0, 1)) == 0.05
    assert rates._choice(table, (0, 0)) == 0.1


BUGS = {
    "one resample": Bug(
        rates.at_own,
        "for drawn in resamples(seeds)",
        "for drawn in [range(seeds)]",
        the_noise_of_the_search_adds_in_squares,
    ),
    "upside down": Bug(
        rates.at_own,
        "max(0.0, -min(moved)), max(0.0, max(moved))",
        "max(0.0, max(moved)), max(0.0, -min(moved))",
        the_noise_of_the_search_adds_in_squares,
    ),
    "an end will do": Bug(
        rates.chosen,
        "not is_inside(rate, table)",
        "False",
        every_choice_is_inside_of_the_grid,
    ),
    "only what all seeds choose": Bug(
        rates.choices,
        "for drawn in resamples(_seeds(table))",
        "for drawn in [range(_seeds(table))]",
        a_grid_grows_where_a_resample_chooses_its_end,
    ),
    "half decades": Bug(
        rates.searched,
        "rates, QUARTERS)",
        "rates, 2)",
        a_grid_grows_where_a_resample_chooses_its_end,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS, errors=(AssertionError, Invalid))
