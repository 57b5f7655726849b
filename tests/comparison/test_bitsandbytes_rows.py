"""bitsandbytes' rows: the same four bits as ours, and what they refuse."""

import copy
from dataclasses import replace

import pytest
import torch
from architectures import build

import peft_from_scratch as pfs
from peft_from_scratch.comparison import compare, reference
from peft_from_scratch.comparison.plan import Plan
from peft_from_scratch.core.adapter import injected
from peft_from_scratch.core.counting import count

IDS = torch.arange(48)[None] + 300


@pytest.fixture(scope="module")
def tiny():
    return pfs.load_model("tiny", device="cpu")[0]


def both(tiny):
    """(theirs, ours) with the same LoRA values."""
    theirs, ours = copy.deepcopy(tiny), copy.deepcopy(tiny)
    reference.qlora(theirs, r=4, alpha=8)
    pfs.qlora.inject(ours, r=4, alpha=8)
    with torch.no_grad():
        pairs = zip(*(pfs.trainable(m).values() for m in (theirs, ours)), strict=True)
        for mine, other in pairs:
            other.copy_(mine.normal_(std=0.05))
    return theirs, ours


def test_its_four_bits_are_ours(tiny):
    theirs, ours = both(tiny)
    losses = [m.train()(IDS, labels=IDS).loss for m in (theirs, ours)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(
        pfs.trainable(theirs).items(), pfs.trainable(ours).values(), strict=True
    ):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_answers_are_of_the_trained_weights_too(tiny):
    """Not of weights that were repacked at the first answer."""
    theirs, ours = both(tiny)
    with torch.no_grad():
        for _ in range(2):
            logits = [m.eval()(IDS).logits for m in (theirs, ours)]
            torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-4)


def test_true_sizes_are_counted(tiny):
    theirs, ours = both(tiny)
    assert count(theirs) == count(ours)
    held = [sum(b.nbytes for b in [*m.parameters(), *m.buffers()]) for m in both(tiny)]
    assert held[0] == pytest.approx(held[1], rel=1e-6)


def test_it_cannot_be_merged_and_is_left_as_it_was(tiny):
    theirs, _ = both(tiny)
    before = theirs(IDS).logits
    with pytest.raises(pfs.CannotMerge, match="packed"):
        pfs.merge(theirs)
    assert injected(theirs).method == "lora"
    assert torch.equal(theirs(IDS).logits, before)


@pytest.mark.parametrize(
    ("architecture", "why"), [("gpt2", "Conv1D"), ("llama", "no multiple")]
)
def test_what_it_would_get_wrong_is_refused(architecture, why):
    model = build(architecture)
    with pytest.raises(ValueError, match=why):
        reference.qlora(model)


def test_its_row_is_left_out_where_it_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    plan = compare._without_missing(Plan(methods=("lora", "qlora-bnb")))
    assert plan == replace(plan, methods=("lora",))
    assert "bitsandbytes is not installed" in capsys.readouterr().out


def test_its_absence_is_a_sentence(monkeypatch):
    monkeypatch.setattr(reference, "LIBRARY", "no_such_library")
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        reference.bitsandbytes()
