"""Laws of the byte count: closed forms, and an allocator that counts independently."""

from types import SimpleNamespace

import pytest
import torch
from architectures import CONFIGS
from model_state import assert_same, snapshot, values
from planting import each_is_caught, law
from small_runs import TASK, TOKENIZER, adapted, recipe
from torch import nn
from torch.profiler import ProfilerActivity, profile

from peft_from_scratch.core import adapter
from peft_from_scratch.core.counting import count
from peft_from_scratch.memory import formulas, meter
from peft_from_scratch.memory.meter import Meter, measure_step, measured_step
from peft_from_scratch.paged import PAGE_BYTES

IDS = torch.arange(64, 64 + 6 * 40).view(6, 40)


def optimizer_step(model, micro_batches=1):
    """(a step on 6 rows of 40 tokens, its optimizer)"""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        for ids in IDS.chunk(micro_batches):
            model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    return step, optimizer


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


# Parameters --------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", CONFIGS)
def test_lora_parameters_follow_the_formula(architecture):
    model = adapted("lora", architecture)
    shapes = [adapter.sizes(m.base) for m in adapter.adapters(model).values()]
    counted = count(model)
    assert counted.trainable == formulas.lora_parameters(shapes, r=4)
    added = counted.total - counted.trainable
    adapter.remove(model)
    assert added == model.num_parameters()
    assert counted.share == counted.trainable / counted.total


def test_lora_on_a_large_projection():
    """4096 x 4096 at r = 16: 131,072 parameters, 0.78 % of the weight's."""
    assert formulas.lora_parameters([(4096, 4096)], r=16) == 131_072
    assert round(131_072 / 4096**2, 4) == 0.0078


def test_a_tied_weight_counts_once():
    model = adapted("full", "qwen")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert count(model).trainable == count(model).total
    embedding = model.lm_head.weight.numel()
    listed = sum(tensor.numel() for tensor in model.state_dict().values())
    assert count(model).total == listed - embedding


# Bytes against closed forms ----------------------------------------------------------


@law
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("architecture", CONFIGS)
def weights_gradients_and_moments_are_exact(method="lora", architecture="llama"):
    model = adapted(method, architecture)
    step, optimizer = optimizer_step(model)
    moving = adapter.trainable(model)
    for _ in range(2):  # the step that allocates the moments, and one that finds them
        memory = measure_step(model, step)
        assert memory.weights == nbytes([*model.parameters(), *model.buffers()])
        assert memory.gradients == nbytes(moving.values())
        states = optimizer.state.values()
        held = [t for state in states for t in state.values()]
        assert memory.optimizer == nbytes(held)
        parameters = count(model).trainable
        assert memory.optimizer == formulas.adamw_bytes(parameters, len(moving))


@law
def activations_of_a_chain_are_exact():
    """n tanh in a row keep n outputs for backward, each of the input's size.

    Backward is at its highest when all n are there with the first two gradients: that
    of tanh n's output, and, when it is used up, that of tanh n-1's. The input was there
    before, and the loss and its gradient are one float32 each.
    """

    class Chain(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.p = nn.Parameter(torch.ones(()))
            self.n = n

        def forward(self, x):
            x = x * self.p
            for _ in range(self.n):
                x = torch.tanh(x)
            return x.sum()

    x = torch.randn(50, 100)
    measured = {}
    for n in (1, 5, 20):
        model = Chain(n)
        measured[n] = measure_step(model, lambda m=model: m(x).backward()).activations
    assert measured[5] - measured[1] == 4 * x.nbytes
    assert measured[20] - measured[5] == 15 * x.nbytes
    input_and_first_gradient, loss_and_its_gradient = 2 * x.nbytes, 8
    assert (
        measured[20] == 20 * x.nbytes + input_and_first_gradient + loss_and_its_gradient
    )


def test_peak_is_the_largest_sum_at_one_moment():
    memory = measure_step(adapted(), optimizer_step(adapted())[0])
    rows = memory.weights, memory.gradients, memory.optimizer, memory.activations
    assert max(rows) <= memory.peak <= sum(rows)


# Bytes against the allocator ---------------------------------------------------------


def allocated(step):
    """The largest number of bytes that the CPU allocator gave out during `step`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = record.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@law
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("architecture", CONFIGS)
def count_agrees_with_the_allocator(method="lora", architecture="llama", parts=2):
    model = adapted(method, architecture)
    step, optimizer = optimizer_step(model, parts)
    step()
    optimizer.zero_grad()
    states = optimizer.state.values()
    before = nbytes([*model.parameters(), *model.buffers()])
    before += nbytes(t for state in states for t in state.values()) + IDS.nbytes
    counted = measure_step(model, step).peak
    optimizer.zero_grad()
    assert abs(counted / (before + allocated(step)) - 1) < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_count_agrees_with_the_cuda_allocator():
    model = adapted().to("cuda")
    optimizer = torch.optim.AdamW(adapter.trainable(model).values(), fused=True)
    ids = IDS.repeat(20, 1).to("cuda")  # large enough for rounding to vanish

    def step():
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    step()  # the libraries' workspaces are there before
    held = torch.cuda.memory_allocated()
    counted = measure_step(model, step)
    torch.cuda.reset_peak_memory_stats()
    step()
    taken = torch.cuda.max_memory_allocated() - held
    at_start = counted.weights + counted.gradients + counted.optimizer + ids.nbytes
    assert abs((counted.peak - at_start) / taken - 1) < 0.05


# What measuring must not do, and what it must show -----------------------------------


def test_measuring_changes_no_bit():
    measured, plain = adapted(), adapted()
    for model, wrap in ((measured, measure_step), (plain, lambda _, step: step())):
        torch.manual_seed(0)
        wrap(model.train(), optimizer_step(model)[0])
    assert_same(values(measured), values(plain))
    assert not any(p._post_accumulate_grad_hooks for p in measured.parameters())


def test_measuring_twice_counts_the_same():
    model = adapted()
    step, _ = optimizer_step(model)
    step()
    assert measure_step(model, step) == measure_step(model, step)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_checkpointing_and_micro_batches_save_activations():
    model = adapted()
    whole = measure_step(model, optimizer_step(model)[0])
    split = measure_step(model, optimizer_step(model, micro_batches=6)[0])
    assert split.activations < whole.activations / 3
    model.train().gradient_checkpointing_enable()
    checkpointed = measure_step(model, optimizer_step(model)[0])
    assert checkpointed.activations < whole.activations
    assert checkpointed.weights == split.weights == whole.weights


def test_lora_saves_gradients_and_moments_but_not_activations():
    full, lora = adapted("full"), adapted("lora")
    theirs = measure_step(full, optimizer_step(full)[0])
    ours = measure_step(lora, optimizer_step(lora)[0])
    share = count(lora).trainable / count(full).total
    assert ours.gradients == theirs.gradients * share
    assert ours.activations > 0.8 * theirs.activations


@pytest.mark.parametrize("method", ["lora", "full"])
def test_of_paged_states_what_is_resident_is_counted_and_no_file(method):
    model = adapted(method)
    counts = 4 * len(adapter.trainable(model))
    whole = measured_step(model, TOKENIZER, TASK, recipe())
    one_page = measured_step(model, TOKENIZER, TASK, recipe(paged=1e-9))
    assert one_page.optimizer == PAGE_BYTES + counts
    for kind in ("weights", "gradients"):
        assert getattr(one_page, kind) == getattr(whole, kind)
    # The paged loop needs less room for what it computes, and no more.
    assert one_page.activations <= whole.activations


def test_measured_step_leaves_everything_as_it_was():
    model = adapted()
    before, generator = snapshot(model), torch.get_rng_state()
    memory = measured_step(model, TOKENIZER, TASK, recipe())
    assert_same(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())
    assert memory.optimizer == formulas.adamw_bytes(
        count(model).trainable, len(adapter.trainable(model))
    )
    whole = measured_step(model, TOKENIZER, TASK, recipe(accumulate=1))
    assert whole.activations > memory.activations


@law
def measured_step_is_the_largest_of_the_run():
    """Of steps of one row each: as large as the step of the longest row."""
    one_row = recipe(batch=1, accumulate=1, steps=8)
    most = measured_step(adapted(), TOKENIZER, TASK, one_row)
    longest = max(TASK.train, key=lambda row: len(row["prompt"] + row["completion"]))
    alone = SimpleNamespace(**(vars(TASK) | {"train": [longest]}))
    assert measured_step(adapted(), TOKENIZER, alone, one_row) == most


# Planted bugs ------------------------------------------------------------------------

BUGS = {
    "deaths not noticed": (
        Meter._bury,
        "-self.size[storage]",
        "0",
        count_agrees_with_the_allocator,
    ),
    "views counted again": (
        Meter._meet,
        "address = untyped._cdata",
        "address = id(tensor)",
        count_agrees_with_the_allocator,
    ),
    "gradients not told from activations": (
        Meter._label_gradient,
        "if parameter.grad is not None:",
        "if False:",
        weights_gradients_and_moments_are_exact,
    ),
    "moments not told from activations": (
        Meter._label_state,
        "optimizer.state.values()",
        "()",
        weights_gradients_and_moments_are_exact,
    ),
    "the smallest step measured": (
        meter.measured_step,
        "largest = max(",
        "largest = min(",
        measured_step_is_the_largest_of_the_run,
    ),
    "what was there before counted as new": (
        Meter.__torch_dispatch__,
        "self._meet(tensor, born=False)",
        "pass",
        activations_of_a_chain_are_exact,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
