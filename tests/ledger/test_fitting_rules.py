"""F2, F3 and Y3: invented runs, their verdicts, and what is measured by other means."""

import pytest
import torch
from architectures import build
from invented_runs import judged
from planting import Bug, each_is_caught, law

from peft_from_scratch import full
from peft_from_scratch.ledger.claim import Invalid
from peft_from_scratch.ledger.experiments import recomputing, zero_ranks
from peft_from_scratch.ledger.runs import Run
from peft_from_scratch.memory.formulas import zero_bytes
from peft_from_scratch.memory.step_bill import optimizer_class, step_bill

pytestmark = pytest.mark.usefixtures("store")

# --------------------------------------------------------------------------------- F2

BILL = dict(weights=100, gradients=100, optimizer=600, activations=1000, peak=1000)


def saving(begins, change=0.0, gap=0.0):
    """A result whose step saves nothing up to a length, and 20 % beyond."""

    def result_of(config):
        if "method" in config:
            seconds = {"without": [2.0] * config["rounds"]}
            seconds |= {"checkpointed": [2.8] * config["rounds"]}
            return {"seconds": seconds | {"without, again": seconds["without"]}}
        share = 0.2 if config["length"] > begins else 0.0
        less = BILL | {"peak": 1000 * (1 - share), "activations": 300}
        less["weights"] *= 1 + change
        return {"without": BILL, "checkpointed": less, "gap": gap}

    return result_of


@pytest.mark.parametrize(
    "begins, verdict, tokens",
    [(0, "holds", 16), (16, "holds", 24), (128, "holds when", 192)],
)
def test_f2_is_where_a_tenth_is_saved(begins, verdict, tokens):
    judgement = judged("F2", saving(begins))
    assert judgement.verdict == verdict
    assert judgement.measured == pytest.approx(tokens)
    assert "1.40 times as long" in judgement.say_instead


def test_an_edge_belongs_to_the_shorter_lengths():
    assert judged("F2", saving(32)).verdict == "holds"
    assert recomputing.threshold([(64, 0.0), (8192, 20.0)]) == (4128.0, 64.0, 8192.0)


@pytest.mark.parametrize(
    "invented, reason",
    [
        (saving(16, change=0.01), "the bill differs"),
        (saving(16, gap=1e-3), "gradients by"),
        (saving(10**6), "longer rows are needed"),
    ],
)
def test_f2_is_void_where_a_control_fails(invented, reason):
    judgement = judged("F2", invented)
    assert judgement.verdict == "not run yet" and reason in judgement.reason


@law
def both_ways_take_the_same_step():
    found = {}
    for way in (recomputing.WITHOUT, recomputing.WITH):
        torch.manual_seed(0)
        model = build("llama", dtype=torch.bfloat16)
        full.inject(model)
        found[way] = recomputing.bytes_of_step(model, way, 40)
    (plain, one), (less, other) = found.values()
    assert torch.equal(one, other) and one.any()
    assert less["activations"] < 0.8 * plain["activations"]
    assert recomputing.bill_change({"without": plain, "checkpointed": less}) == 0


def test_the_bill_is_that_of_step_bill():
    torch.manual_seed(0)
    model = build("llama", dtype=torch.bfloat16)
    full.inject(model)
    found, _ = recomputing.bytes_of_step(model, recomputing.WITHOUT, 24)
    torch.manual_seed(0)
    twin = build("llama", dtype=torch.bfloat16)
    full.inject(twin)
    optimizer = optimizer_class("mixed")(twin.parameters(), lr=1e-5)
    assert found == step_bill(twin.train(), recomputing.learning(twin, 24), optimizer)


def test_the_ways_take_turns():
    model = build("llama")
    full.inject(model)
    seconds = recomputing.timed(model, 8, rounds=6)
    assert set(seconds) == set(recomputing.ways())
    assert {len(each) for each in seconds.values()} == {6}
    assert all(p.grad is None for p in model.parameters())
    invented = {"without": [2.0] * 9, "checkpointed": [3.0] * 9}
    middle, low, high = recomputing.slower(invented)
    assert middle == low == high == 1.5


@law
def a_threshold_lies_between_two_lengths():
    rows = [(16, 0.0), (32, 12.0), (64, 8.0), (128, 16.0), (256, 40.0)]
    assert recomputing.threshold(rows) == (80.0, 64.0, 128.0)
    assert recomputing.threshold([(16, 11.0), (32, 30.0)]) == (16.0, 16.0, 16.0)
    with pytest.raises(Invalid, match="32 tokens save 9"):
        recomputing.threshold([(16, 0.0), (32, 9.0)])


# --------------------------------------------------------------------------- F3 and Y3

P = 10**6


def kept(stage=None, off=0.0, extra=0):
    """A result whose ranks keep what the formula says, of another stage if asked."""

    def result_of(config):
        itemsize = zero_ranks.ITEMSIZE[config["recipe"]]
        ranks, of_stage = config["ranks"], {}
        for number in zero_ranks.STAGES:
            sizes = dict(ranks=ranks, stage=stage or number, itemsize=itemsize)
            report = zero_bytes([P], **sizes)
            report["optimizer"] += extra
            report |= {"sent": 0, "peak": sum(report.values()) + 4 * P // ranks}
            report |= {"off": off} if config["recipe"] == "float32" else {}
            of_stage[str(number)] = [report] * ranks
        return {"parameters": P, "tensors": 1, "formula": {}, "ranks": of_stage}

    return result_of


@pytest.mark.parametrize(
    "result_of, verdict",
    [
        (kept(), "holds"),
        (kept(stage=1), "undecided"),
        (kept(extra=12 * P), "does not hold here"),
    ],
)
def test_f3_is_the_saving_that_is_reached(result_of, verdict):
    judgement = judged("F3", result_of)
    assert judgement.verdict == verdict
    if verdict == "holds":
        assert judgement.measured == pytest.approx(100, abs=0.01)
        assert "7.0, 5.5 and 4.0 bytes" in judgement.say_instead


@pytest.mark.parametrize(
    "result_of, verdict, factor",
    [
        (kept(), "holds", 14),
        (kept(stage=1), "does not hold here", 18),
        (kept(extra=P), "does not hold here", 17),
    ],
)
def test_y3_is_what_stage_two_keeps(result_of, verdict, factor):
    """Whole gradients are 12 P / N and 4 P: c is 12 + 2 N, 16 and 20."""
    judgement = judged("Y3", result_of)
    assert judgement.verdict == verdict
    assert judgement.measured == pytest.approx(factor, abs=0.01)


@pytest.mark.parametrize("id", ["F3", "Y3"])
def test_both_are_void_where_ranks_learn_something_else(id):
    judgement = judged(id, kept(off=0.1))
    assert judgement.verdict == "not run yet"
    assert "away from those of one rank" in judgement.reason


@law
def the_formula_is_that_of_the_figure_in_the_paper():
    """7.5B parameters on 64 ranks, in GB: ZeRO's figure 1."""
    gb = [zero_ranks.by_paper(7.5e9, 64, stage) / 1e9 for stage in (1, 2, 3)]
    assert [round(each, 1) for each in gb] == [31.4, 16.6, 1.9]
    assert zero_ranks.by_paper(P, 1, 0) == 16 * P
    assert zero_ranks.by_paper(P, 4, 2) == 2 * P + 14 * P / 4
    config = {"ranks": 4, "recipe": "mixed"}
    run = Run("r", config, kept()(config), {})
    assert zero_ranks.factor(run) == pytest.approx(14, abs=1e-3)
    assert zero_ranks.factor(run, "peak") == pytest.approx(18, abs=1e-3)


def test_a_rank_that_fails_says_why():
    config = zero_ranks.config("tiny", "mixed", 2) | {"recipe": "none such"}
    with pytest.raises(RuntimeError, match=r"rank 0 of 2 failed: .*\n(.*\n)*KeyError"):
        zero_ranks.on_ranks(2, config)


def test_real_ranks_keep_what_the_formula_says():
    config = zero_ranks.config("tiny", "float32", 2)
    result = zero_ranks.compute(config)
    for stage, reports in result["ranks"].items():
        assert len(reports) == 2
        for report in reports:
            own = {kind: report[kind] for kind in zero_ranks.KINDS}
            assert own == result["formula"][stage]
            assert report["off"] < 1e-4


BUGS = {
    "the first short length": Bug(
        recomputing.threshold,
        "short[-1]",
        "short[0]",
        a_threshold_lies_between_two_lengths,
    ),
    "the other part of the line": Bug(
        recomputing.threshold,
        "WORTH - below",
        "above - WORTH",
        a_threshold_lies_between_two_lengths,
    ),
    "nothing is checkpointed": Bug(
        recomputing.ways,
        "WITH: checkpointed",
        "WITH: nothing",
        both_ways_take_the_same_step,
    ),
    "weights are cut first": Bug(
        zero_ranks.by_paper,
        "first = 3, 2, 1",
        "first = 1, 2, 3",
        the_formula_is_that_of_the_figure_in_the_paper,
    ),
    "one byte of the weights": Bug(
        zero_ranks.factor,
        "- 2 * parameters",
        "- parameters",
        the_formula_is_that_of_the_figure_in_the_paper,
    ),
}
test_a_planted_bug_is_caught = each_is_caught(BUGS)
