"""QLoRA: what is refused, what is counted, and what its three merges cost."""

import copy
import math

import pytest
import torch
from adapter_files import A, parsed, tampered
from architectures import CONFIGS, build
from laws.core import contract as laws
from laws.methods.qlora import ARGUMENTS, WHOLE, caught, packed, trained, untrained
from model_state import logits, refused, train, values

import peft_from_scratch as pfs
from peft_from_scratch import nf4
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.files import base_notes, exchange
from peft_from_scratch.files.base_notes import BASE_BITS
from peft_from_scratch.methods import qlora
from peft_from_scratch.methods.lora import LoRA

# ------------------------------------------------------------------------ Injection


def test_targets_of_all_kinds_are_resolved_before_quantizing():
    for targets in (
        "attention",
        ["q_proj", "up_proj"],
        iter(["q_proj", "up_proj"]),
        lambda name, module: isinstance(module, torch.nn.Linear) and "1.mlp" in name,
    ):
        model = build("llama")
        names = qlora.inject(model, targets=targets, **ARGUMENTS)
        assert list(adapters(model)) == names and len(packed(model)) == 14


@pytest.mark.parametrize("method", WHOLE, ids=lambda m: m.name)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_plan_quantizes_nothing_and_is_what_is_injected(method, architecture):
    laws.a_plan_touches_nothing(method, architecture)
    laws.inject_is_plan_and_apply(method, architecture)


@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_adapters_are_in_float32_unless_asked_otherwise(dtype, of):
    model = trained(of=of, dtype=dtype)
    expected = dtype or torch.float32
    assert {p.dtype for p in pfs.trainable(model).values()} == {expected}
    assert logits(model).dtype == of
    assert all((m.B != 0).any() for m in adapters(model).values())


# --------------------------------------------------------------------------- Shares


# -------------------------------------------------------------------------- Merging


def test_requantized_keeps_double_compute_dtype_and_mode():
    model = trained("opt", double="fp8", compute_dtype=torch.bfloat16).train()
    qlora.merge(model, "requantized")
    for module in packed(model).values():
        assert (
            module.constant_codebook == "fp8" and module.compute_dtype == torch.bfloat16
        )
        assert module.training and module.bias is not None


def test_an_update_of_zero_has_no_ratio():
    model = trained(steps=0)
    errors = qlora.merge(copy.deepcopy(model))
    assert all(e == (0.0, 0.0) for e in errors.values())
    errors = qlora.merge(model, "original", build("llama"))
    assert all(e.update == math.inf and e.weight > 0 for e in errors.values())


def test_wrong_arguments_of_merge_are_refused():
    model = trained()
    with refused(model, "onto='base'", "dequantized, original, requantized"):
        qlora.merge(model, "base")
    with refused(model, "original=…"):
        qlora.merge(model, "original")
    with refused(build("llama"), "carries no adapter"):
        qlora.merge(build("llama"))


def test_other_adapters_have_one_merge_only():
    model = build("llama")
    pfs.lora.inject(model)
    with refused(model, "LoRA on a Linear", error=pfs.CannotMerge):
        qlora.merge(model)
    model = build("llama")
    nf4.quantize_model(model)
    pfs.ia3.inject(model)
    with refused(model, "IA3 on a NF4Linear", error=pfs.CannotMerge):
        qlora.merge(model)
    some = trained(skip="mlp")
    with refused(some, "LoRA on a Linear", error=pfs.CannotMerge):
        qlora.merge(some, "requantized")
    pfs.merge(some)
    assert not packed(some)


# ---------------------------------------------------------------------------- Files


def test_a_file_of_a_base_in_full_has_no_note(tmp_path):
    model = build("llama")
    pfs.lora.inject(model, **ARGUMENTS)
    train(model, 1)
    pfs.save(model, tmp_path)
    _, metadata, _ = parsed(tmp_path)
    assert BASE_BITS not in metadata
    assert caught(build("llama"), tmp_path) == []


def test_a_bfloat16_adapter_keeps_its_values_on_disk(tmp_path):
    model, other = trained(dtype=torch.bfloat16), build("llama")
    pfs.save(model, tmp_path)
    nf4.quantize_model(other)
    pfs.load(other, tmp_path)
    for name, value in values(model).items():
        assert torch.equal(values(other)[name], value.float())


def test_a_block_larger_than_a_weight_is_none_of_those(tmp_path):
    pfs.save(trained(block=5000), tmp_path)
    assert "differ by" in caught(build("llama"), tmp_path)[0]


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_broken_adapter_leaves_the_codes_alone(architecture, tmp_path):
    pfs.save(trained(architecture), tmp_path / "sound")
    key = next(k for k in parsed(tmp_path / "sound")[0] if k.endswith(A))
    bad = tampered(
        tmp_path / "sound", tmp_path / "bad", lambda tensors, _: tensors.pop(key)
    )
    model = untrained(architecture, 64)
    with refused(model, "lacks"):
        pfs.load(model, bad)


def test_a_file_without_bits_leaves_the_base_in_full(tmp_path):
    model, other = build("llama"), build("llama")
    pfs.lora.inject(model, r=4)
    train(model, 1)
    pfs.save(model, tmp_path)
    exchange.load_as_trained(other, tmp_path)
    assert not packed(other) and torch.equal(logits(other), logits(model))


def test_base_bits_are_those_of_the_base():
    assert base_notes.base_bits(build("llama")) is None
    model = trained(block=32, double=False)
    assert base_notes.read_bits(base_notes.base_bits(model)) == {
        "code": "nf4",
        "block": 32,
        "double": False,
    }
    assert base_notes.read_bits(None) is None
    assert isinstance(next(iter(adapters(model).values())), LoRA)
