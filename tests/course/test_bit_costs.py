"""What four bits save and cost: bytes held and kept, calls, and an interval."""

import numpy as np
import pytest
import torch
from planting import Bug, each_is_caught, law
from torch import nn

import peft_from_scratch as pfs
from peft_from_scratch.core import counting
from peft_from_scratch.course import bit_costs
from peft_from_scratch.ledger import runs, verdicts
from peft_from_scratch.ledger.intervals import nested_bootstrap, over_seeds


def steps(method=pfs.qlora, **more):
    return bit_costs.Steps("tiny", method, "gap-1", template="raw", rows=2, **more)


def test_every_byte_is_held_by_something():
    model = steps().model
    held = bit_costs.held(model)
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    assert sum(held.values()) == sum(t.nbytes for t in tensors.values())


def test_the_kinds_are_those_of_the_shapes():
    model = steps(r=4).model
    held, count = bit_costs.held(model), counting.count(model)
    packed = [m for m in model.modules() if isinstance(m, pfs.nf4.NF4Linear)]
    assert held["codes"] == sum(m.packed.nbytes for m in packed) > 0
    assert held["constants"] == sum(m.quantized.absmax.nbytes for m in packed) > 0
    assert held["adapters"] == 4 * count.trainable
    assert held["embedding"] == model.get_input_embeddings().weight.nbytes
    assert held["weights"] == 0 < held["others"] < held["constants"] * 4
    pfs.qlora.merge(model)
    merged = bit_costs.held(model)
    assert merged["weights"] == sum(4 * m.quantized.numel for m in packed)
    assert merged["codes"] == merged["constants"] == merged["adapters"] == 0


def test_kept_counts_what_a_product_leaves_behind():
    q, x = pfs.nf4.quantize(torch.randn(64, 128)), torch.randn(3, 128)
    x.requires_grad_()
    assert bit_costs.kept(pfs.nf4.NF4Linear(q), x) == 0
    assert bit_costs.kept(lambda x: x @ pfs.nf4.dequantize(q).T, x) == 4 * 64 * 128
    assert bit_costs.kept(lambda x: (x * x).sum(), x) == 0  # x itself is the caller's


@law
def losses_above_loras_are_those_of_the_ledger():
    row = next(row for row in verdicts.read() if row["id"] == "Q4")["scales"]["tiny"]
    shown = bit_costs.above_lora()
    value, *ends = shown["QLoRA", "task"]
    assert [value, *ends] == pytest.approx([row["measured"], *row["interval"]], 1e-4)
    for (name, text), triple in shown.items():
        written = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*triple)
        there = written in row["say_instead"]
        assert there == ((name, text) != ("transplant", "general text"))


def test_losses_above_loras_need_their_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "FOLDER", tmp_path)
    with pytest.raises(LookupError, match="ledger Q4 --run --base tiny"):
        bit_costs.above_lora()


def test_steps_train_on_the_rows_in_their_order():
    one, other = steps(seed=3), steps(seed=3)
    for run in (one, other):
        run.step()
    assert one.losses == other.losses and len(one.losses) == 2
    assert len(one.times) == 1 and one.seconds > 0
    assert one.memory.optimizer > 0
    lora, qlora = steps(pfs.lora).memory, steps().memory
    assert qlora.weights < lora.weights and qlora.optimizer == lora.optimizer
    assert one.batches[0] != one.batches[1]


def test_a_span_is_as_wide_as_either_interval():
    rows = np.random.default_rng(0).normal(1, 1, (3, 50))
    mean, low, high = bit_costs.span(rows)
    _, *seeds = over_seeds(rows.mean(1).tolist())
    _, *items = nested_bootstrap(rows)
    assert mean == pytest.approx(rows.mean())
    assert (low, high) == (min(seeds[0], items[0]), max(seeds[1], items[1]))


def test_a_span_is_that_of_the_items_where_the_seeds_agree():
    rows = np.array([[0.0, 10.0] * 20] * 2)
    _, low, high = bit_costs.span(rows)
    assert low < 5 < high and high - low > 1


@law
def a_tied_tensor_counts_once():
    model = nn.Module()
    model.embed_tokens = nn.Embedding(5, 3)
    model.lm_head = nn.Linear(3, 5, bias=False)
    model.lm_head.weight = model.embed_tokens.weight
    model.norm = nn.LayerNorm(3)
    held = bit_costs.held(model)
    assert held["embedding"] == 60 and held["weights"] == 0 and held["others"] == 24


BUGS = {
    "buffers forgotten": Bug(
        bit_costs.held,
        "*model.named_buffers()",
        "",
        test_every_byte_is_held_by_something,
    ),
    "constants are codes": Bug(
        bit_costs.held,
        "if part in words",
        'if part in words and part != "absmax"',
        test_the_kinds_are_those_of_the_shapes,
    ),
    "numbers, not bytes": Bug(
        bit_costs.held, "tensor.nbytes", "tensor.numel()", a_tied_tensor_counts_once
    ),
    "x is counted": Bug(
        bit_costs.kept,
        "storage._cdata != x.untyped_storage()._cdata",
        "True",
        test_kept_counts_what_a_product_leaves_behind,
    ),
    "general text is the task": Bug(
        bit_costs.above_lora,
        "four_bit_cost.GENERAL_ITEMS",
        "four_bit_cost.TASK_ITEMS",
        losses_above_loras_are_those_of_the_ledger,
    ),
    "the transplant is QLoRA": Bug(
        bit_costs.above_lora,
        "four_bit_cost.MOVED",
        "four_bit_cost.QLORA",
        losses_above_loras_are_those_of_the_ledger,
    ),
    "the same batch again": Bug(
        bit_costs.Steps.step,
        "len(self.losses) % len(self.batches)",
        "0",
        lambda: second_batch_is_used(),
    ),
    "the items forgotten": Bug(
        bit_costs.span,
        "max(seeds[1], drawn[1])",
        "seeds[1]",
        test_a_span_is_that_of_the_items_where_the_seeds_agree,
    ),
}


@law
def second_batch_is_used():
    run = steps()
    used = []
    hook = run.model.register_forward_pre_hook(
        lambda _, args, kwargs: used.append(kwargs["input_ids"].tolist()),
        with_kwargs=True,
    )
    run.step(), run.step()
    hook.remove()
    assert used[0] != used[1]


test_a_planted_bug_is_caught = each_is_caught(BUGS)
