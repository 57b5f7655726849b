"""LoftQ starts where it says, and is a QLoRA in all else."""

import pytest
import torch
from architectures import build
from planting import Bug, each_is_caught, law

from peft_from_scratch import load, save
from peft_from_scratch.core import matrices
from peft_from_scratch.core.adapter import adapters, as_matrix, injected
from peft_from_scratch.core.targets import projections
from peft_from_scratch.methods import loftq, qlora
from peft_from_scratch.nf4 import dequantize, quantize_model


@law
def it_starts_at_the_best_of_its_rank():
    """Eckart and Young: the error left is that of the directions beyond the rank."""
    for architecture in ("llama", "gpt2"):
        base, model = build(architecture), build(architecture)
        loftq.inject(model, r=4, alpha=12)
        for name, module in adapters(model).items():
            W0 = as_matrix(projections(base)[name]).double()
            lost = W0 - dequantize(module.base.quantized).double()
            beyond = torch.linalg.svdvals(lost)[4:].norm()
            left = (lost - module.delta(torch.float64)).norm()
            assert left.item() == pytest.approx(beyond.item(), rel=1e-4)
            assert torch.allclose(
                module.A @ module.A.T, module.B.T @ module.B, atol=1e-5
            )


@law
def its_codes_are_qloras():
    one, other = build("llama"), build("llama")
    loftq.inject(one, r=4)
    qlora.inject(other, r=4)
    for a, b in zip(adapters(one).values(), adapters(other).values(), strict=True):
        assert torch.equal(a.base.packed, b.base.packed)
    assert injected(one).method == "qlora"


def test_it_is_closer_to_the_base_than_qlora():
    ids = torch.arange(3, 30)[None]
    base, one, other = (build("llama") for _ in range(3))
    loftq.inject(one, r=8)
    qlora.inject(other, r=8)
    far, near = ((m(ids).logits - base(ids).logits).norm() for m in (other, one))
    assert near < 0.9 * far


def test_a_file_of_it_is_a_qloras(tmp_path):
    model = build("llama")
    loftq.inject(model, r=4)
    save(model, tmp_path / "it")
    loaded = build("llama")
    quantize_model(loaded)
    load(loaded, tmp_path / "it")
    ids = torch.arange(3, 30)[None]
    assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_what_stays_as_it_is_starts_as_a_lora():
    model = build("llama")
    loftq.inject(model, r=2, skip="mlp")
    zero = {name for name, m in adapters(model).items() if not m.B.any()}
    assert zero == {name for name in adapters(model) if ".mlp." in name}


def test_a_base_that_lost_its_weights_is_refused():
    model = build("llama")
    loftq.inject(model, r=2)
    with pytest.raises(ValueError, match="in four bits already"):
        loftq.inject(model, r=2)


BUGS = {
    "no scale": Bug(
        loftq.start, ", module.scale)", ")", it_starts_at_the_best_of_its_rank
    ),
    "the weight itself": Bug(
        loftq.start,
        "- dequantize(module.base.quantized).float()",
        "",
        it_starts_at_the_best_of_its_rank,
    ),
    "the other sign": Bug(
        loftq.start,
        "[:, : len(A)].copy_(B)",
        "[:, : len(A)].copy_(-B)",
        it_starts_at_the_best_of_its_rank,
    ),
    "all of it in A": Bug(
        matrices.svd_halves,
        "(S[:r] / scale).sqrt()",
        "S[:r] / scale",
        it_starts_at_the_best_of_its_rank,
    ),
    "codes of something else": Bug(
        loftq.plan,
        "qlora.plan(model, **arguments)",
        "qlora.plan(model, block=32, **arguments)",
        its_codes_are_qloras,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
