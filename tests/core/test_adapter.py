"""The verbs at their edges: merging in every precision, tied heads, half-done work."""

import copy

import peft
import pytest
import torch
from architectures import build
from laws.core.adapter import TIED, injected
from model_state import (
    assert_same,
    gradients,
    largest,
    logits,
    refused,
    snapshot,
    train,
)

import peft_from_scratch as pfs
from peft_from_scratch.core import adapter
from peft_from_scratch.core.adapter import adapters


def test_an_update_below_the_resolution_of_the_weights_is_reported_as_lost():
    errors = pfs.merge(injected(dtype=torch.bfloat16, size=1e-6))
    assert min(errors.values()) > 0.9
    errors = pfs.merge(injected(dtype=torch.float64, size=0.1))
    assert max(errors.values()) < 1e-12


def test_an_untrained_adapter_merges_into_the_same_bits():
    model = build("llama", dtype=torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    pfs.lora.inject(model)
    assert set(pfs.merge(model).values()) == {0.0}
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_not_merged(value):
    model = injected()
    last = list(adapters(model).values())[-1]
    last.B.data[0, 0] = value
    with refused(model, "down_proj", error=pfs.CannotMerge):
        pfs.merge(model)


def test_an_untied_head_is_merged():
    model = injected("llama", targets=["q_proj", "lm_head"])
    unmerged = logits(model)
    pfs.merge(model)
    assert largest(logits(model), unmerged) < 1e-5


@pytest.mark.parametrize("architecture", TIED)
def test_a_merged_tied_model_survives_the_disk(architecture, tmp_path):
    model = injected(architecture)
    pfs.merge(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.get_input_embeddings().weight


def test_a_module_used_twice_is_adapted_once():
    model = build("llama")
    first, second = model.model.layers
    second.mlp.up_proj = first.mlp.up_proj
    plain = copy.deepcopy(model)
    names = pfs.lora.inject(model, targets="up_proj")
    assert names == ["model.layers.0.mlp.up_proj"]
    assert first.mlp.up_proj is second.mlp.up_proj
    train(model, 2)
    unmerged = logits(model)
    pfs.merge(model)
    assert first.mlp.up_proj is second.mlp.up_proj
    assert largest(logits(model), unmerged) < 1e-5
    assert largest(logits(plain), unmerged) > 1e-4


def test_the_verbs_refuse_a_plain_model(tmp_path):
    model = build("llama")
    assert pfs.trainable(model) == {}
    for verb in (pfs.merge, pfs.remove, lambda m: pfs.save(m, tmp_path)):
        with refused(model, "LlamaForCausalLM", "no adapter"):
            verb(model)


def test_adapters_of_peft_are_refused():
    model = build("llama")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with refused(model, "q_proj", "another library"):
        pfs.lora.inject(model)


@pytest.mark.parametrize("method", [pfs.lora, pfs.full])
def test_a_compiled_model_is_injected_saved_loaded_and_restored(method, tmp_path):
    model, loaded = build("llama"), build("llama")
    compiled = torch.compile(model, backend="eager")
    before = snapshot(model)
    method.inject(compiled, **({"keep_original": True} if method is pfs.full else {}))
    train(model, 2)
    pfs.save(compiled, tmp_path)
    pfs.load(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    pfs.remove(compiled)
    assert_same(snapshot(model), before)


def test_modules_of_another_model_are_refused():
    model, other = build("llama"), build("llama")
    name = "model.layers.0.mlp.up_proj"
    before = snapshot(other)
    with refused(model, name, "not the module"):
        pfs.lora.inject(model, targets={name: other.get_submodule(name)})
    assert_same(snapshot(other), before)


def test_an_injection_in_inference_mode_is_refused():
    model = build("llama")
    with refused(model, "inference_mode", error=RuntimeError), torch.inference_mode():
        pfs.lora.inject(model)


def test_an_unknown_own_parameter_leaves_no_trace():
    model = build("llama")
    with refused(model, error=AttributeError):
        adapter.inject(
            model, adapter.Adapter, "all-linear", base_params=["no.such.bias"]
        )


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_reentrant_checkpointing_changes_no_gradient_either():
    """It recomputes only what an input with a gradient leads to; all inputs are frozen
    here, so that the embeddings' output must be told to ask for one."""
    model = injected("llama").train()
    expected = gradients(model)
    reentrant = {"use_reentrant": True}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
    model.enable_input_require_grads()
    assert largest(gradients(model), expected) < 1e-6
