"""Experiments measure what they say: against closed forms, and with faults planted."""

from itertools import pairwise
from statistics import fmean

import numpy as np
import pytest
import torch
from architectures import build, byte_tokenizer
from planting import assert_caught, law, planted

from peft_from_scratch import lora, merge, trainable
from peft_from_scratch.common.grid import is_inside
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.core.targets import resolve
from peft_from_scratch.ledger import intervals, rates, runs
from peft_from_scratch.ledger.claim import Invalid
from peft_from_scratch.ledger.experiments import (
    bill,
    counting,
    data_size,
    finetune,
    separation,
    spectrum,
    standalone,
    starts,
)
from peft_from_scratch.ledger.runs import Run
from peft_from_scratch.ledger.verdicts import claim
from peft_from_scratch.memory.formulas import lora_parameters
from peft_from_scratch.memory.mixed_adamw import MixedAdamW
from peft_from_scratch.models.load import load_model
from peft_from_scratch.tasks.task import load_task
from peft_from_scratch.tasks.templates import encode_rows
from peft_from_scratch.training.batch import batch_of
from peft_from_scratch.training.loss import summed_loss, token_losses

SMALL = dict(
    task="orders",
    n=24,
    steps=4,
    batch=4,
    test=12,
    validation=6,
    template="raw",
)


def small(base, method="lora", lr=1e-2, **changes):
    return finetune.config(**(dict(base=base, method=method, lr=lr) | SMALL | changes))


# ------------------------------------------------------------------------- Fine-tuning


def test_a_configuration_is_whole(base):
    config = small(base)
    assert config["r"] == 8 and config["alpha"] == 16 and config["warmup"] == 0
    assert "r" not in small(base, "full")
    assert small(base, r=8) == config != small(base, r=4)
    with pytest.raises(ValueError, match=r"method='sora': allowed are .*lora"):
        small(base, "sora")
    with pytest.raises(ValueError, match=r"rank=4 is no argument of method='lora'"):
        small(base, rank=4)
    with pytest.raises(ValueError, match=r"r=4 is no argument of method='full'"):
        small(base, "full", r=4)


def test_a_run_is_kept_and_repeats_to_the_bit(base, store):
    first = finetune.run(base=base, method="lora", lr=1e-2, **SMALL)
    again = finetune.compute(small(base))
    for name in ("test_items", "validation_loss", "train_loss", "rows_digest"):
        assert first[name] == again[name]
    assert len(runs.select(experiment="finetune")) == 1
    assert first["test_loss"] == pytest.approx(fmean(first["test_items"]), abs=1e-4)


def test_methods_of_one_seed_see_the_same_rows_and_seeds_do_not(base):
    def rows(method, seed, n=24):
        return finetune.chosen_rows(task, small(base, method, seed=seed, n=n))

    task = load_task("orders")
    assert rows("full", 0) == rows("lora", 0)
    assert rows("full", 0)["train"] != rows("full", 1)["train"]
    assert rows("full", 0)["test"] == rows("full", 1)["test"]
    assert rows("full", 0, n=12)["train"] == rows("full", 0)["train"][:12]
    with pytest.raises(ValueError, match="train: 9999999 rows asked for; orders has"):
        rows("full", 0, n=9_999_999)


@law
def item_losses_are_those_of_rows_alone():
    model, tokenizer = build("llama"), byte_tokenizer()
    task = load_task("orders")
    rows = encode_rows(tokenizer, "", list(task.test)[:9], template="raw")
    found = finetune.item_losses(model, rows, batch=4)
    for row, loss in zip(rows, found, strict=True):
        labels = sum(label != -100 for label in row[1][1:])
        with torch.no_grad():
            alone = summed_loss(model, batch_of([row], model.device)).item() / labels
        assert loss == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize(
    ("function", "right", "wrong"),
    [
        (finetune.item_losses, "zip(part, means", "zip(sorted(part), means"),
        (finetune.item_losses, "/ labelled.sum(1)", "/ labelled.shape[1]"),
        (token_losses, "losses[labelled] = each", "losses[labelled] = each.flip(0)"),
    ],
)
def test_planted_faults_of_item_losses_are_caught(function, right, wrong):
    law = item_losses_are_those_of_rows_alone
    assert_caught(function, right, wrong, law)


def test_controls_do_not_train(base):
    untouched = finetune.compute(small(base, "base"))
    frozen = finetune.compute(small(base, "lora-frozen"))
    trained = finetune.compute(small(base))
    assert untouched["steps"] == frozen["steps"] == 0
    assert untouched["test_items"] != frozen["test_items"]
    assert trained["test_loss"] < untouched["test_loss"]
    zero = finetune.compute(small(base, lr=1e-7))
    assert zero["test_items"] == pytest.approx(untouched["test_items"], abs=1e-4)


def test_a_run_that_diverges_is_a_result(base, store):
    result = finetune.run(base=base, method="full", lr=1e30, **SMALL)
    assert "not a" in result["diverged"] or "loss is" in result["diverged"]
    assert result["test_loss"] is result["test_items"] is None


def test_early_stopping_and_answers(base):
    config = small(base, steps=8, validate_every=2, patience=1, exact=True, test=4)
    result = finetune.compute(config)
    assert [step for step, _ in result["validation"]] == [2, 4, 6, 8]
    assert result["best_step"] in (2, 4, 6, 8)
    assert result["correct"] == [0, 0, 0, 0]


# ------------------------------------------------------------------------- Intervals


def test_students_quantiles_are_the_tables():
    table = {1: 12.7062, 2: 4.3027, 4: 2.7764, 9: 2.2622, 29: 2.0452}
    for df, quantile in table.items():
        assert intervals.t_quantile(0.975, df) == pytest.approx(quantile, abs=1e-4)
    assert intervals.t_quantile(0.95, 4) == pytest.approx(2.1318, abs=1e-4)


def test_three_seeds_give_two_and_a_half_standard_deviations():
    mean, low, high = intervals.over_seeds([1.0, 2.0, 3.0])
    assert mean == 2 and high - mean == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert mean - low == pytest.approx(high - mean)
    with pytest.raises(Invalid, match="1 seed has no interval"):
        intervals.over_seeds([1.0])


def test_the_nested_bootstrap_has_the_variance_of_both_levels():
    """Against the closed form: seeds' variance over s, items' over s · i."""
    generator = np.random.default_rng(1)
    seeds = generator.normal(size=(30, 1))
    table = seeds + generator.normal(size=(30, 40))
    mean, low, high = intervals.nested_bootstrap(table)
    of_seeds = table.mean(1).var() / 30
    of_items = table.var(1).mean() / (30 * 40)
    expected = 2 * 1.96 * (of_seeds + of_items) ** 0.5
    assert mean == pytest.approx(table.mean())
    assert high - low == pytest.approx(expected, rel=0.1)


def finished(key, loss, *, seed=0, items=None, diverged=None, **config):
    """A run as it might be stored."""
    items = [loss] * 4 if items is None else items
    settings = dict(seed=seed, test=4, n=1, task="t", base_digest="b") | config
    result = dict(
        test_items=items,
        test_loss=fmean(items),
        validation_loss=loss,
        diverged=diverged,
        rows_digest=f"rows of {seed}",
    )
    return Run(key, settings, result, {})


@law
def paired_runs_are_compared_row_by_row():
    a = [finished("a", 0, seed=s, items=[1, 2, 3, 4.0 + s]) for s in range(3)]
    b = [finished("b", 0, seed=s, items=[0, 1, 2, 3.0 + s]) for s in range(3)]
    assert intervals.paired(a, b[::-1]) == (1, 1, 1)
    assert intervals.paired(b, a) == (-1, -1, -1)


def test_the_planted_pairing_of_other_seeds_is_caught():
    assert_caught(
        intervals.paired,
        'sorted(runs, key=lambda run: run.config["seed"])',
        "list(runs)",
        paired_runs_are_compared_row_by_row,
        errors=(AssertionError, Invalid),
    )


def test_the_wider_interval_counts():
    """Rows that differ much, seeds that do not; and the other way about."""
    zero = [finished("a", 0, seed=s, items=[0.0] * 4) for s in range(3)]
    rows = [finished("b", 0, seed=s, items=[-9.0, 9, -9, 9]) for s in range(3)]
    seeds = [finished("b", 0, seed=s, items=[9.0 * s] * 4) for s in range(3)]
    assert intervals.paired(rows, zero)[2] > 2
    assert intervals.paired(seeds, zero)[2] > 9 + 20


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (dict(seed=1), "seed"),
        (dict(test=5), "test"),
        (dict(task="u"), "task"),
        (dict(base_digest="c"), "base_digest"),
        (dict(diverged="the loss is nan"), "diverged"),
    ],
)
def test_runs_that_do_not_pair_are_invalid(other, reason):
    with pytest.raises(Invalid, match=reason):
        intervals.paired([finished("a", 0)] * 2, [finished("b", 0, **other)] * 2)


# ------------------------------------------------------------------------- Rates


@law
def an_optimum_at_an_edge_is_invalid():
    assert rates.best_inside({1e-3: 2.0, 3e-3: 1.0, 1e-2: 1.5}) == 3e-3
    assert rates.best_inside({3e-3: 1.0, 1e-2: None, 1e-3: 2.0}) == 3e-3
    for losses in ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, None, None]):
        with pytest.raises(Invalid, match=r"0\.00\d is an end of the grid|0\.01 is"):
            rates.best_inside(dict(zip((1e-3, 3e-3, 1e-2), losses, strict=True)))
    with pytest.raises(Invalid, match="diverged"):
        rates.best_inside({1e-3: None, 1e-2: None})


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("min(rates) < best", "min(rates) <= best"),
        ("best < max(rates)", "best <= max(rates)"),
    ],
)
def test_a_planted_blindness_for_edges_is_caught(right, wrong):
    assert_caught(
        is_inside,
        right,
        wrong,
        an_optimum_at_an_edge_is_invalid,
        errors=pytest.fail.Exception,
    )


def searched(loss_of, growth=3):
    """(rates tried, the best one) of a search among runs that `loss_of` invents."""
    tried = []

    def config_of(lr):
        return {"experiment": "search", "lr": lr}

    while True:
        configs, best = rates.search(config_of, (1e-3, 3e-3, 1e-2), growth)
        missing = [c for c in configs if runs.stored(c) is None]
        if not missing:
            return tried, best
        for config in missing:
            tried.append(config["lr"])
            runs.write(config, {"validation_loss": loss_of(config["lr"])})


def test_a_search_grows_past_its_ends_and_then_gives_up(store, monkeypatch, tmp_path):
    assert searched(lambda lr: abs(lr - 3e-3)) == ([1e-3, 3e-3, 1e-2], 3e-3)
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "up")
    assert searched(lambda lr: abs(lr - 3e-2)) == ([1e-3, 3e-3, 1e-2, 3e-2, 1e-1], 3e-2)
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "down")
    tried, best = searched(lambda lr: abs(lr - 3e-4))
    assert (tried[3:], best) == ([3e-4, 1e-4], 3e-4)
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "never")
    with pytest.raises(Invalid, match=r"0\.3 is an end of the grid"):
        searched(lambda lr: 1 / lr)


# ------------------------------------------------------------------------- L1


@law
def spectra_follow_eckart_and_young():
    """The best rank-k error is the energy that rank k does not hold."""
    torch.manual_seed(0)
    dW = torch.randn(20, 7) @ torch.randn(7, 12) + 0.1 * torch.randn(20, 12)
    held = spectrum.energy(dW)
    assert len(held) == 12 and held[-1] == pytest.approx(1)
    assert all(a < b for a, b in pairwise(held.tolist()))
    for k in (1, 5, 12):
        lost = (dW - spectrum.truncated(dW, k)).norm() ** 2 / dW.norm() ** 2
        assert lost.item() == pytest.approx(1 - held[k - 1].item(), abs=1e-5)
        assert torch.linalg.matrix_rank(spectrum.truncated(dW, k)) == k
    assert spectrum.energy(torch.diag(torch.tensor([3.0, 1, 0])))[0] == pytest.approx(
        0.9
    )


def test_singular_values_that_are_not_squared_are_caught():
    law = spectra_follow_eckart_and_young
    assert_caught(spectrum.energy, ".square()", "", law)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_rank_of_equal_singular_values_is_counted(rank):
    """k equal ones hold 90 % together only when nine tenths of them are there."""
    Q, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))
    dW = Q[:, :rank] @ Q[:rank]
    expected = max(1, -(-9 * rank // 10))
    assert spectrum.rank_of_energy(dW) == expected
    assert spectrum.share(dW) == pytest.approx(100 * expected / 16)
    with pytest.raises(ValueError, match="no spectrum"):
        spectrum.energy(torch.zeros(3, 3))


def test_the_control_has_shape_and_norm_and_no_low_rank():
    dW = torch.outer(torch.randn(40), torch.randn(30))
    noise = spectrum.random_like(dW)
    assert noise.shape == dW.shape and noise.norm() == pytest.approx(dW.norm())
    assert spectrum.share(dW) < 4 < 40 < spectrum.share(noise)


def test_updates_are_what_was_added():
    base, model = build("gpt2"), build("gpt2")
    lora.inject(model, r=2)
    finetune.randomize(model)
    added = {n: m.delta() for n, m in adapters(model).items()}
    merge(model)
    found = spectrum.updates(model, base)
    assert found.keys() == added.keys()
    for name, dW in found.items():
        torch.testing.assert_close(dW, added[name], atol=1e-6, rtol=0)
        assert spectrum.rank_of_energy(dW) <= 2
    value, low, high = spectrum.median_share(found)
    assert low <= value <= high


@pytest.fixture
def spectrum_run(base, monkeypatch):
    monkeypatch.setitem(spectrum.SETTINGS, base, SMALL | {"lr": 3e-3})
    config = spectrum.config(base, 0)
    return Run("spectrum-x", config, spectrum.compute(config), {})


def test_a_whole_update_is_measured(spectrum_run):
    result = spectrum_run.result
    assert result["ranks"] == [1, 2, 4, 8, 16, 32]
    for group in result["energy"].values():
        for curve in group:
            assert curve == sorted(curve) and curve[-1] == 1
    assert result["median_share"] < result["random_share"]
    loss = result["function"]
    assert loss["update"] < loss["rank 1"] < loss["nothing"]
    assert abs(loss["random"] - loss["nothing"]) < loss["nothing"] - loss["update"]
    assert spectrum.kept(spectrum_run, 16) == pytest.approx(100, abs=5)

    twice = [spectrum_run, spectrum_run]
    measured = spectrum.measured(twice)
    assert measured.value == result["median_share"]
    assert claim("L1").say_instead["does not hold here"].format(**measured.figures)


def test_an_update_that_learned_nothing_is_invalid(spectrum_run):
    loss = spectrum_run.result["function"]
    loss["update"] = loss["random"] + 1
    with pytest.raises(Invalid, match="no more than a random update"):
        spectrum.measured([spectrum_run, spectrum_run])


# ------------------------------------------------------------------------- L2


@pytest.fixture
def started(base, monkeypatch):
    """started(start) is the run of a start."""
    monkeypatch.setitem(
        starts.SETTINGS, base, dict(task="orders", lr=1e-2, batch=4, template="raw")
    )
    changes = dict(n=12, steps=4, validation=4, test=3)

    def run(start):
        config = starts.config(base, start, 0, **changes)
        return Run(start, config, starts.compute(config), {})

    return run


def test_the_three_starts(started):
    own, random, zero = map(started, starts.STARTS)
    assert own.result["logit_difference"] == 0
    assert own.result["before"] == own.result["base"] > own.result["after"]
    assert own.result["still_zero"] == [False, False]

    assert random.result["logit_difference"] > 1e-3
    assert random.result["before"] != random.result["base"]

    assert zero.result["logit_difference"] == zero.result["largest_gradient"] == 0
    assert zero.result["still_zero"] == [True, True]
    assert zero.result["after"] == zero.result["before"] == zero.result["base"]

    measured = starts.measured([own, random, zero])
    rule = claim("L2").rule
    assert rule.verdict(measured.value, measured.low, measured.high) == "holds"
    assert rule.verdict(1e-9, 0, 1e-9) == "undecided"
    assert rule.verdict(1e-9, 1e-9, 1e-9) == "does not hold here"
    with pytest.raises(Invalid, match="both-random starts at the pretrained"):
        starts.measured([own, Run("r", random.config, own.result, {}), zero])
    with pytest.raises(Invalid, match="both-zero has a gradient"):
        starts.measured([own, random, Run("z", zero.config, own.result, {})])


def test_a_planted_start_with_random_B_refutes_the_claim(started):
    with planted(lora.LoRA.__init__, "torch.zeros(d_out, r", "torch.ones(d_out, r"):
        measured = started("gaussian-zero").result["logit_difference"]
    assert (
        claim("L2").rule.verdict(measured, measured, measured) == "does not hold here"
    )


def test_bits_tell_negligible_from_equal():
    x = torch.ones(3)
    assert starts.largest_difference([x], [x.clone()]) == 0
    assert starts.largest_difference([x, x], [x, x.nextafter(x + 1)]) > 0


# ------------------------------------------------------------------------- L4


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(4096, 4096, 16), (10, 30, 3)])
def test_lora_is_counted_as_the_formula_says(d_out, d_in, r):
    result = counting.compute(counting.config(d_out, d_in, r))
    assert result["trainable"] == lora_parameters([(d_out, d_in)], r)
    assert result["percent"] == pytest.approx(100 * r * (d_in + d_out) / d_in / d_out)


def test_the_claims_numbers():
    assert counting.compute(counting.config())["trainable"] == 131_072
    assert claim("L4").rule.computed


# ------------------------------------------------------------------------- F1


@pytest.mark.parametrize(
    ("recipe", "dtype", "weights", "state"),
    [
        ("fp32", torch.float32, 4, 8),
        ("bf16", torch.bfloat16, 2, 4),
        ("mixed", torch.bfloat16, 2, 12),
    ],
)
def test_the_bill_is_the_closed_form(recipe, dtype, weights, state):
    model = build("llama", dtype=dtype)
    numbers = sum(p.numel() for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    found = bill.counted(model, recipe, length=16)
    counted = found["bytes"]
    assert found["parameters"] == numbers
    assert counted["weights"] == weights * numbers + buffers
    assert counted["gradients"] == weights * numbers
    assert counted["optimizer"] == state * numbers + 4 * found["tensors"]
    assert sum(found["state"].values()) == counted["optimizer"]
    held = counted["weights"] + counted["optimizer"]
    assert held + counted["gradients"] < counted["peak"]
    assert counted["peak"] <= held + max(
        counted["gradients"] + counted["activations"],
        counted["gradients"] + counted["temporaries"],
    )


def test_activations_grow_with_the_tokens():
    lengths = [bill.counted(build("llama"), "fp32", length=t) for t in (16, 32, 64)]
    grown = [each["bytes"]["activations"] for each in lengths]
    assert grown[0] < grown[1] < grown[2]
    with pytest.raises(ValueError, match="recipe='fp8': allowed are fp32, bf16, mixed"):
        bill.counted(build("llama"), "fp8")


def test_the_worst_row_counts():
    exact = {"weights": 4, "gradients": 4, "optimizer": 8}
    assert bill.row_error(exact) == 0
    assert bill.row_error(exact | {"weights": 2}) == 50
    assert bill.row_error({"weights": 2, "gradients": 2, "optimizer": 12}) == 50
    rule = claim("F1").rule
    assert rule.verdict(50, 50, 50.1) == "wrong as stated"
    assert rule.verdict(0, 0, 0) == "holds"
    assert bill.gigabytes(16) == 112


@law
def mixed_adamw_is_adamw_on_a_master_copy():
    torch.manual_seed(0)
    weight = torch.randn(9, 5).bfloat16().requires_grad_()
    master = weight.detach().float().requires_grad_()
    ours = MixedAdamW([weight], lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW([master], lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        weight.grad = torch.randn(9, 5).bfloat16()
        master.grad = weight.grad.float()
        ours.step()
        theirs.step()
        kept = ours.state[weight]["master"]
        torch.testing.assert_close(kept, master.detach(), atol=1e-6, rtol=1e-5)
        assert torch.equal(weight.detach(), kept.bfloat16())


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(1 - beta1**t)", "1"),
        ("(1 - beta2**t)", "1"),
        ('1 - group["lr"] * group["weight_decay"]', "1"),
        ("addcmul_(g, g,", "addcmul_(g, torch.ones_like(g),"),
        ('state["exp_avg_sq"]\n', 'state["exp_avg"]\n'),
    ],
)
def test_planted_faults_of_mixed_adamw_are_caught(right, wrong):
    law = mixed_adamw_is_adamw_on_a_master_copy
    assert_caught(MixedAdamW._update, right, wrong, law)


def test_a_master_copy_keeps_what_bfloat16_loses():
    weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    optimizer = MixedAdamW([weight], lr=1e-4)
    for _ in range(50):
        weight.grad = torch.ones(1, dtype=torch.bfloat16)
        optimizer.step()
    assert optimizer.state[weight]["master"].item() == pytest.approx(1 - 50e-4)
    assert weight.item() == pytest.approx(1 - 50e-4, abs=4e-3) and weight.item() < 1


# ------------------------------------------------------------------------- F4


def invented(advantage, *, edge=False, control=3.0):
    """The runs of F4: LoRA's loss minus that of the same weights in full, by cell."""
    found = []
    for task, n in data_size.cells():
        for method, grid in data_size.RATES.items():
            loss = 1.0 + (method == "lora") * advantage(task, n)
            best = grid[0] if edge and method == data_size.FULL else grid[1]
            searched = grid if n == data_size.TUNED_AT else [best]
            found += [
                of_f4(task, n, method, lr, 0, loss + 9.0 * (lr != best))
                for lr in searched
            ]
            found += [of_f4(task, n, method, best, seed, loss) for seed in (1, 2, 3, 4)]
    for method in (data_size.FULL, data_size.LORA):
        found += [
            of_f4("gap-1-random", data_size.SOME, method, 1e-2, seed, control)
            for seed in range(5)
        ]
    return found


def of_f4(task, n, method, lr, seed, loss):
    noise = np.random.default_rng(seed).normal(scale=1e-3, size=4)
    return finished(
        f"{task}-{n}-{method}-{lr}-{seed}",
        loss,
        seed=seed,
        items=(loss + noise * (method == "lora")).tolist(),
        task=task,
        n=n,
        method=method,
        lr=lr,
    )


def verdict_of_f4(found):
    measured = data_size.measured(found)
    assert claim("F4").say_instead["does not hold here"].format(**measured.figures)
    return claim("F4").rule.verdict(measured.value, measured.low, measured.high)


@pytest.mark.parametrize(
    ("advantage", "verdict"),
    [
        (
            lambda task, n: 0.3 if (task, n) == ("gap-3", data_size.MANY) else -0.3,
            "holds",
        ),
        (
            lambda task, n: 0.01 if (task, n) == ("gap-3", data_size.MANY) else -0.3,
            "holds",
        ),
        (
            lambda task, n: 0.3,
            "does not hold here",
        ),  # full always wins: no advice is needed
        (lambda task, n: -0.3, "does not hold here"),  # LoRA always wins
        (lambda task, n: 0.0, "undecided"),
        (lambda task, n: 0.3 if n == data_size.MANY else 0.01, "holds"),  # in margin
        (lambda task, n: 0.3 if n == data_size.MANY else 0.03, "does not hold here"),
    ],
)
def test_the_advice_must_beat_both_simple_policies(advantage, verdict):
    assert verdict_of_f4(invented(advantage)) == verdict


def test_seeds_that_one_arm_lacks_are_left_out():
    found = invented(lambda task, n: 0.3)
    fewer = [r for r in found if (r.config["method"], r.config["seed"]) != ("lora", 4)]
    cell = data_size.FOR_FULL[0]
    assert data_size.lead(fewer, cell)[0] == pytest.approx(0.3, abs=1e-2)
    mixed = [r for r in found if r.config["method"] != data_size.FULL]
    assert data_size.lead(mixed, cell, data_size.ALL, data_size.BOTH)[0] == 0


def test_the_arms_train_what_they_are_named_for():
    sizes = {}
    for method in data_size.RATES:
        model, _ = load_model("tiny", device="cpu")
        chosen = data_size.config("gap-1", 100, method, 1e-2, 0)
        finetune.kind_of(method).injected(model, chosen)
        sizes[method] = sum(p.numel() for p in trainable(model).values())
    model, _ = load_model("tiny", device="cpu")
    projections = resolve(model, "all-linear").values()
    inside, every = sum(m.weight.numel() for m in projections), model.num_parameters()
    assert sizes[data_size.ALL] == every and sizes[data_size.FULL] == inside
    assert sizes[data_size.BOTH] == sizes[data_size.LORA] + every - inside


def test_an_edge_or_a_learnable_control_makes_it_invalid():
    with pytest.raises(Invalid, match="is an end of the grid"):
        data_size.measured(invented(lambda task, n: 0.3, edge=True))
    with pytest.raises(Invalid, match="learns random labels"):
        data_size.measured(invented(lambda task, n: 0.3, control=0.5))


# ------------------------------------------------------------------------- F5


def test_a_model_serves_alone_and_an_adapter_does_not(base):
    result = standalone.compute(standalone.config(base))
    assert all(result["checks"].values()), result
    model, tokens = build("llama"), result["bytes"]
    assert tokens["model"]["memory"] == sum(p.nbytes for p in model.parameters())
    lora.inject(model, r=8)
    adapter = sum(p.nbytes for p in trainable(model).values())
    assert tokens["adapter"]["memory"] == adapter < tokens["adapter"]["disk"]
    assert result["memory"]["adapters"][2] == tokens["model"]["memory"] + 100 * adapter
    assert result["disk"]["full"][1] == 10 * tokens["model"]["disk"]


def test_an_error_is_no_logits():
    assert not standalone.close("OSError: no base", torch.zeros(3))
    assert not standalone.close([0.0, 0.0], torch.zeros(3))
    assert not standalone.close([1.0, 0.0, 0.0], torch.zeros(3))
    assert standalone.close([0.0, 0.0, 0.0], torch.zeros(3))


def test_failed_checks_are_counted():
    checks = dict.fromkeys("abc", True) | {"d": False}
    measured = standalone.measured([Run("s", {}, {"checks": checks}, {})])
    assert measured.value == 1
    assert claim("F5").rule.verdict(1, 1, 1) == "does not hold here"
    assert claim("F5").rule.verdict(0, 0, 0) == "holds"


# ------------------------------------------------------------ Whether methods differ


def separation_store(monkeypatch, losses, seeds=separation.SEEDS):
    """Every run that the table asks for, with these losses by method."""

    def stored(config):
        if config["seed"] not in seeds:
            return None
        (name,) = (
            name
            for name, own in separation.CONTENDERS.items()
            if all(config.get(key) == value for key, value in own.items())
        )
        far = abs(np.log10(config["lr"] / 3e-3)) if config["method"] == "full" else 0
        far += abs(np.log10(config["lr"] / 1e-2)) if config["method"] == "lora" else 0
        noise = np.random.default_rng(config["seed"]).normal(scale=0.01, size=4)
        found = finished(
            name, losses[name] + far, items=(losses[name] + noise).tolist()
        )
        found.config.update(config)
        found.result.update(trainable=7, seconds=1.0, test_loss=losses[name])
        return found

    monkeypatch.setattr(separation, "stored", stored)
    monkeypatch.setattr(rates, "stored", stored)


def test_a_table_tells_methods_apart_that_differ(monkeypatch):
    monkeypatch.setattr(runs, "base_digest", lambda base: "digest")
    losses = dict.fromkeys(separation.CONTENDERS, 1.0)
    losses |= {"full": 1.5, "LoRA, rank 1": 0.5}
    separation_store(monkeypatch, losses)
    found = {row.method: row for row in separation.rows() if row.task == "gap-1"}
    assert list(found) == list(separation.CONTENDERS)
    apart = {name for name, row in found.items() if row.told_apart}
    assert apart == {"full", "LoRA, rank 1"}
    assert found["full"].over[0] == pytest.approx(0.5)
    assert found["full"].lr == 3e-3 and found["LoRA, rank 1"].lr == 1e-2
    assert found["nothing trained"].lr is None
    assert found[separation.REFERENCE].over is None


def test_a_table_with_a_missing_seed_is_no_table(monkeypatch):
    monkeypatch.setattr(runs, "base_digest", lambda base: "digest")
    losses = dict.fromkeys(separation.CONTENDERS, 1.0)
    separation_store(monkeypatch, losses, seeds=(0, 1, 2, 3))
    with pytest.raises(Invalid, match="are missing"):
        list(separation.rows())
