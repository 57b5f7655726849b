"""The formulas of the cost estimates, against what torch counts on the real model."""

import inspect
from dataclasses import replace
from itertools import count
from statistics import fmean

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import peft_from_scratch as pfs
from peft_from_scratch.comparison import estimate, timing, tuning
from peft_from_scratch.comparison.adapt import few_shot_examples
from peft_from_scratch.comparison.plan import Plan
from peft_from_scratch.core import counting
from peft_from_scratch.core.targets import kinds, projections
from peft_from_scratch.memory.meter import measure_step
from peft_from_scratch.tasks.task import load_task
from peft_from_scratch.tasks.templates import encode_prompt, encode_row
from peft_from_scratch.training import checkpoint, evaluation, loss
from peft_from_scratch.training.state import TrainState

RATES = estimate.Rates(many=80e9, some=50e9, one=8e9)
INJECT = {False: pfs.lora.inject, True: pfs.full.inject}


def batch_of(tokens, labels):
    ids = torch.randint(64, 4000, (1, tokens))
    chosen = torch.full_like(ids, -100)
    chosen[:, tokens - labels :] = ids[:, tokens - labels :]
    return {"input_ids": ids, "labels": chosen}


def flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_the_parameters_are_those_of_the_model(fresh_smollm2):
    model, _ = fresh_smollm2()
    found = projections(model)
    layers = sum(found[name].weight.numel() for name in kinds(model))
    assert layers == estimate.LAYERS
    assert model.lm_head.weight.numel() == estimate.HEAD
    pfs.lora.inject(model)
    assert counting.count(model).trainable == estimate.LORA


@pytest.mark.parametrize(("tokens", "labels"), [(64, 16), (32, 31)])
def test_reading_costs_what_torch_counts(smollm2, tokens, labels):
    model, _ = smollm2
    with torch.no_grad():
        counted = flops(lambda: loss.summed_loss(model, batch_of(tokens, labels)))
    assert counted == pytest.approx(estimate.reading_flops(tokens, labels), rel=0.03)


@pytest.mark.parametrize("full", [False, True])
def test_a_step_costs_what_torch_counts(fresh_smollm2, full):
    model, _ = fresh_smollm2()
    INJECT[full](model)
    sizes = estimate.Sizes(48, 12)
    counted = flops(lambda: loss.summed_loss(model, batch_of(48, 12)).backward())
    assert counted == pytest.approx(
        estimate.step_flops(1, full=full, sizes=sizes), rel=0.06
    )


def test_a_lora_step_holds_what_is_counted(fresh_smollm2):
    model, _ = fresh_smollm2()
    pfs.lora.inject(model)
    optimizer = torch.optim.AdamW(pfs.trainable(model).values())

    def step():
        loss.summed_loss(model, batch_of(40, 10)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the moments, which every later step holds from the start
    sizes = estimate.Sizes(40, 10)
    measured = measure_step(model, step)
    assert measured.peak == pytest.approx(
        estimate.step_bytes(1, full=False, sizes=sizes), rel=0.02
    )


def test_a_full_step_of_few_rows_holds_sixteen_bytes_a_parameter():
    assert estimate.step_bytes(1, full=True) == 16 * (estimate.LAYERS + estimate.HEAD)


def test_the_sizes_of_a_row_are_those_of_the_task(smollm2):
    _, tokenizer = smollm2
    task = load_task("orders")
    rows = [
        encode_row(tokenizer, task.instruction, *row.values(), template="chat")
        for row in task.train.select(range(100))
    ]
    tokens = fmean(len(ids) for ids, _ in rows)
    labels = fmean(sum(label != -100 for label in labels) for _, labels in rows)
    examples = few_shot_examples(task, 8, 0)
    prompt = encode_prompt(
        tokenizer,
        task.instruction,
        task.test[0]["prompt"],
        template="chat",
        examples=examples,
    )
    assert tokens == pytest.approx(estimate.ROW_TOKENS, rel=0.05)
    assert labels == pytest.approx(estimate.ROW_LABELS, rel=0.05)
    assert len(prompt) == pytest.approx(estimate.FEW_SHOT_TOKENS, rel=0.1)


def test_the_sizes_of_a_comparison_are_those_of_its_parts():
    def default(function, name):
        return inspect.signature(function).parameters[name].default

    general = evaluation.general_losses
    read = default(general, "windows") * default(general, "length")
    timed = timing.against_first
    steps = default(timed, "tokens") * (default(timed, "rounds") + 1)
    assert read == estimate.GENERAL_TOKENS
    assert 2 * steps <= estimate.TIMED_STEPS <= 3 * steps  # adapted, base, some merged


def test_the_rate_is_products_per_second_at_the_fastest(monkeypatch):
    """A clock that runs 1 ms a product, and 5 ms in the first pass."""
    ticks = count()
    slow = 2 * estimate.DEPTH + 2  # the first readings: a start, a check, a pass

    def clock():
        tick = next(ticks)
        return tick * 5e-3 if tick < slow else slow * 5e-3 + (tick - slow) * 1e-3

    monkeypatch.setattr("time.perf_counter", clock)
    rate = estimate.measured_rate(torch.device("cpu"), 4, 1.0)
    assert rate == pytest.approx(2 * 4 * 576 * 1536 / 1e-3)


def test_a_comparison_costs_the_sum_of_its_rows_and_seeds():
    tokens = estimate.GENERAL_TOKENS
    read = estimate.reading_flops(tokens, tokens) / (estimate.EFFICIENCY * RATES.many)
    whole = estimate.compare_seconds(RATES, Plan())
    alone = {
        each.key: estimate.compare_seconds(RATES, Plan(methods=(each.key,))) - read
        for each in Plan().chosen()
    }
    assert whole == pytest.approx(read + sum(alone.values()))
    trained = sum(alone[each.key] for each in Plan().chosen() if each.trains)
    twice = estimate.compare_seconds(RATES, Plan(seeds=(0, 1)))
    assert twice == pytest.approx(whole + trained)
    assert alone["zero-shot"] < alone["few-shot"] < alone["lora"] < alone["full"]


def test_a_search_costs_the_sum_of_its_runs():
    one = Plan(methods=("lora",), steps=10)
    more = estimate.tuning_seconds(RATES, replace(one, steps=30))
    steps = 20 * tuning.fewest_runs(one.chosen()[0])
    step = estimate.step_seconds(RATES, one.batch, full=False)
    assert more - estimate.tuning_seconds(RATES, one) == pytest.approx(steps * step)


@pytest.mark.parametrize("full", [False, True])
def test_checkpoints_take_the_room_of_their_files(full, fresh_smollm2, tmp_path):
    model, _ = fresh_smollm2()
    INJECT[full](model)
    parameters = pfs.trainable(model)
    optimizer = torch.optim.AdamW(parameters.values())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    run = TrainState(parameters, optimizer, torch.device("cpu"))
    made = checkpoint.save(run, tmp_path, {})
    size = sum(file.stat().st_size for file in made.iterdir())
    assert 3 * size == pytest.approx(estimate.checkpoint_bytes(full=full), rel=0.01)


def test_training_costs_its_steps():
    ten = estimate.train_seconds(RATES, 10, 8, full=False)
    thirty = estimate.train_seconds(RATES, 30, 8, full=False)
    step = estimate.step_flops(8, full=False) / (estimate.EFFICIENCY * RATES.many)
    assert thirty - ten == pytest.approx(20 * step)


def test_a_machine_twice_as_fast_takes_half_as_long():
    double = estimate.Rates(2 * RATES.many, 2 * RATES.some, 2 * RATES.one)
    for cost in (
        lambda rates: estimate.compare_seconds(rates, Plan()),
        lambda rates: estimate.tuning_seconds(rates, Plan()),
        lambda rates: estimate.train_seconds(rates, 50, 8, full=True),
        lambda rates: estimate.answer_seconds(rates, 100, 46),
        lambda rates: 1 / estimate.chat_tokens_a_second(rates),
    ):
        assert cost(double) == pytest.approx(cost(RATES) / 2)
