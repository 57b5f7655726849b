"""M3 and Y2: invented runs and their verdicts, and both measurements by other means."""

from copy import deepcopy

import pytest
import torch
from architectures import build
from invented_runs import judged
from planting import Bug, each_is_caught, law

from peft_from_scratch import lora
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.ledger import runs
from peft_from_scratch.ledger.experiments import finetune, many_adapters, wrong_cache
from peft_from_scratch.serving.batch import Slots
from peft_from_scratch.tasks.templates import IGNORED

pytestmark = pytest.mark.usefixtures("store")
NAMES = ["base", "again", "gather 1"]
NAMES += [f"{kind} {m}" for m in (2, 4, 8, 16) for kind in ("gather", "loop")]


# --------------------------------------------------------------------------------- M3


def timed(gather=1.2, loop=9.0, **others):
    """A result whose gathered batch takes so many times the time of one adapter."""

    def result_of(config):
        ms = {name: [2.0] * config["rounds"] for name in NAMES}
        ms["gather 16"] = [2.0 * gather] * config["rounds"]
        ms["loop 16"] = [2.0 * loop] * config["rounds"]
        return {"ms": ms, "apart": 1e-6, "swapped": 0.3} | others

    return result_of


@pytest.mark.parametrize(
    "gather, verdict",
    [(1.0, "holds"), (1.3, "holds"), (1.5, "holds when"), (2.5, "does not hold here")],
)
def test_m3_is_the_throughput_that_is_kept(gather, verdict):
    judgement = judged("M3", timed(gather))
    assert judgement.verdict == verdict
    assert judgement.measured == pytest.approx(100 / gather, rel=1e-5)
    assert f"keeps {100 / 9:.0f} %" in judgement.say_instead


@pytest.mark.parametrize(
    "others, reason",
    [
        ({"apart": 2e-4}, "away from its rows one by one"),
        ({"swapped": 5e-3}, "shows nothing"),
        ({"again": 2.3}, "of its own copy"),
    ],
)
def test_m3_is_void_where_a_control_fails(others, reason):
    def result_of(config):
        result = timed()(config)
        if "again" in others:
            result["ms"]["again"] = [others["again"]] * config["rounds"]
            return result
        return result | others

    judgement = judged("M3", result_of)
    assert judgement.verdict == "not run yet" and reason in judgement.reason


def small():
    """(a model, its slots, ids, three random LoRAs)"""
    torch.manual_seed(0)
    model = build("llama").eval()
    config = {"r": 3, "size": 0.3}
    versions = [many_adapters.random_lora(model, config) for _ in range(3)]
    return model, Slots(deepcopy(model)), torch.randint(3, 40, (5, 6)), versions


@law
def every_way_to_step_gives_the_logits_of_the_whole_row():
    model, slots, ids, versions = small()
    of_rows = [versions[i] for i in (2, 0, 2, 1, 0)]
    expected = []
    for row, version in zip(ids, of_rows, strict=True):
        copy = deepcopy(model)
        with torch.no_grad():
            for name, (A, B) in version.layers.items():
                copy.get_submodule(name).weight += B @ A
            expected.append(copy(input_ids=row[None]).logits[0, -1])
    expected = torch.stack(expected)
    for way in (many_adapters.gathered, many_adapters.looped):
        step = way(slots, ids, of_rows)
        for _ in range(3):  # a step leaves the cache as it was
            assert torch.allclose(step(), expected, atol=1e-4)
    one = torch.cat(
        [many_adapters.alone(model, *pair) for pair in zip(ids, of_rows, strict=True)]
    )
    assert torch.allclose(one, expected, atol=1e-4)


@law
def equal_and_swapped_are_told_apart():
    model, slots, ids, versions = small()
    apart, swapped = many_adapters.distances(model, slots, ids, versions)
    assert apart < 1e-5 < 1e-2 < swapped


@law
def each_has_its_turn_in_each_round():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = many_adapters.in_turn(calls, rounds=4, repeat=2)
    assert {name: len(times) for name, times in seconds.items()} == dict(a=4, b=4, c=4)
    rounds = [order[i : i + 6] for i in range(0, len(order), 6)]
    assert len(rounds) == 5
    assert all(sorted(each) == list("aabbcc") for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


# --------------------------------------------------------------------------------- Y2


def cached(share=20.0, own=0, whole=9, error=1e-7):
    """A result in which so many % of the tokens change with the whole prompt cached."""

    def result_of(config):
        rows = 10
        part = {"25": [0] * rows, "50": [0] * rows, "75": [1] * rows}
        counts = [round(share / 10)] * rows
        changed = {
            who: part | {"100": counts} for who in ("other task", "same task", "base")
        }
        changed["own"] = dict.fromkeys(("25", "50", "75", "100"), [own] * rows)
        errors = {who: dict.fromkeys(part | {"100": 0}, 0.1) for who in changed}
        errors["own"] = dict.fromkeys(part | {"100": 0}, error)
        return {
            "tokens": [10] * rows,
            "changed": changed,
            "error": errors,
            "whole": dict.fromkeys(changed, [whole] * rows),
            "loss": 0.2,
        }

    return result_of


@pytest.mark.parametrize(
    "share, verdict", [(0.0, "holds"), (20.0, "does not hold here")]
)
def test_y2_is_the_share_of_changed_tokens(share, verdict):
    judgement = judged("Y2", cached(share))
    assert (judgement.verdict, judgement.measured) == (verdict, share)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"own": 1}, "with its own cache"),
        ({"error": 1e-3}, "with its own cache"),
        ({"whole": 0}, "answer alike"),
    ],
)
def test_y2_is_void_where_a_control_fails(options, reason):
    judgement = judged("Y2", cached(**options))
    assert judgement.verdict == "not run yet" and reason in judgement.reason


def two_models():
    torch.manual_seed(1)
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        model = build("llama").eval()
        lora.inject(model, r=4, targets="all-linear")
        torch.manual_seed(len(models) + 7)
        finetune.randomize(model)
        models.append(model)
    return models


@torch.no_grad()
def by_hand(a, b, row, kept):
    """B's logits where the first tokens' keys and values are A's, token by token.

    Before each token B's own parameters are exchanged for A's, or back.
    """
    mixed, cache, logits = deepcopy(b), None, []
    own, other = (
        {n: (m.A.clone(), m.B.clone()) for n, m in adapters(x).items()} for x in (b, a)
    )
    for place in range(row.shape[1]):
        values = other if place < kept else own
        for name, module in adapters(mixed).items():
            module.A.copy_(values[name][0])
            module.B.copy_(values[name][1])
        token = row[:, place : place + 1]
        out = mixed(input_ids=token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[0, -1])
    return torch.stack(logits)


@law
def a_foreign_cache_is_the_other_adapter_up_to_a_token():
    a, b = two_models()
    row, prompt = torch.randint(3, 40, (1, 11)), 8
    with torch.no_grad():
        cache = a(input_ids=row, use_cache=True).past_key_values
    for share, kept in ((25, 2), (50, 4), (75, 6), (100, 7)):
        got = wrong_cache.continued(b, cache, row, prompt, share)
        expected = by_hand(a, b, row, kept)[prompt - 1 : -1]
        assert torch.allclose(got, expected, atol=1e-4)
    assert cache.get_seq_length() == 11


@law
def own_keys_and_values_change_nothing_and_others_do():
    a, b = two_models()
    ids = torch.randint(3, 40, (6, 11)).tolist()
    encoded = [(row, [IGNORED] * 8 + row[8:]) for row in ids]
    result = wrong_cache.counted(b, {"own": b, "other": a}, encoded, (50, 100))
    assert result["tokens"] == [3] * 6
    assert result["changed"]["own"] == {"50": [0] * 6, "100": [0] * 6}
    assert max(result["error"]["own"].values()) < 1e-5
    assert min(result["error"]["other"].values()) > 0.01
    assert sum(result["whole"]["other"]) > 0 == sum(result["whole"]["own"])


def test_times_are_relative_round_by_round():
    seconds = {"a": [1.0, 2.0, 4.0, 1.0, 1.0, 1.0], "b": [2.0, 4.0, 8.0, 2.0, 2.0, 3.0]}
    assert many_adapters.relative(seconds, "a") == {"b": (2.0, 2.0, 3.0)}


def test_the_points_of_the_figures_are_what_is_judged():
    for config in many_adapters.configs("tiny"):
        runs.write(config, timed()(config))
    m3 = [runs.stored(c) for c in many_adapters.configs("tiny")]
    points = {way: many_adapters.throughput(m3, way) for way in ("gather", "loop")}
    assert points["gather"][0] == points["loop"][0] == (1, 100, 100, 100)
    assert points["gather"][-1][1:] == pytest.approx([100 / 1.2] * 3)
    assert points["loop"][-1] == pytest.approx((16, *[100 / 9] * 3))
    for config in wrong_cache.configs("tiny"):
        runs.write(config, cached(20.0 + 10 * (config["seed"] % 2))(config))
    y2 = [runs.stored(c) for c in wrong_cache.configs("tiny")]
    points = wrong_cache.by_share([run.result for run in y2], "other task")
    expected = wrong_cache.measured(y2)
    assert points[-1] == (100, expected.value, expected.low, expected.high)
    assert points[0] == (25, 0, 0, 0)
    (_, mean, low, high) = wrong_cache.by_share([y2[0].result], "other task")[-1]
    assert (mean, low, high) == (20, 20, 20)


BUGS = {
    "everyone has the first adapter": Bug(
        many_adapters.gathered,
        "Batch(of_rows)",
        "Batch(of_rows[:1] * len(of_rows))",
        every_way_to_step_gives_the_logits_of_the_whole_row,
    ),
    "rows in the order of the passes": Bug(
        many_adapters.step_of,
        "[order]",
        "",
        every_way_to_step_gives_the_logits_of_the_whole_row,
    ),
    "the cache grows": Bug(
        many_adapters.step_of,
        "cache.crop(-1)",
        "pass",
        every_way_to_step_gives_the_logits_of_the_whole_row,
    ),
    "swapped with itself": Bug(
        many_adapters.distances,
        "[*of_rows[1:], of_rows[0]]",
        "of_rows",
        equal_and_swapped_are_told_apart,
    ),
    "one order for all rounds": Bug(
        many_adapters.in_turn,
        "dice.sample(list(calls), len(calls))",
        "calls",
        each_has_its_turn_in_each_round,
    ),
    "warming up counts": Bug(
        many_adapters.in_turn,
        "times[1:]",
        "times",
        each_has_its_turn_in_each_round,
    ),
    "a token too many": Bug(
        wrong_cache.continued,
        "prompt * share / 100",
        "prompt * share / 100 + 1",
        a_foreign_cache_is_the_other_adapter_up_to_a_token,
    ),
    "the cache is used up": Bug(
        wrong_cache.continued,
        "deepcopy(cache)",
        "cache",
        a_foreign_cache_is_the_other_adapter_up_to_a_token,
    ),
    "no foreign cache": Bug(
        wrong_cache.counted,
        "filler(input_ids",
        "b(input_ids",
        own_keys_and_values_change_nothing_and_others_do,
    ),
    "the place of the label": Bug(
        wrong_cache.continued,
        "prompt - 1 - kept : -1",
        "prompt - kept :",
        a_foreign_cache_is_the_other_adapter_up_to_a_token,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
