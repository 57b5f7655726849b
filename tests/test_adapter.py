"""The verbs at their edges: merging in every precision, tied heads, half-done work."""

import copy
import sys

import peft
import pytest
import torch
from architectures import CONFIGS, build
from observe import (
    assert_same,
    gradients,
    largest,
    logits,
    refused,
    snapshot,
    train,
)
from planting import law
from torch import nn

import peft_from_scratch as pfs
from peft_from_scratch import nf4
from peft_from_scratch.core import adapter
from peft_from_scratch.core.adapter import adapters

TIED = [name for name in CONFIGS if name != "llama"]
HALF = [torch.bfloat16, torch.float16]


def injected(architecture="llama", *, dtype=torch.float32, size=0.1, **arguments):
    """An injected model whose B is Gaussian of standard deviation `size`."""
    model = build(architecture, dtype=dtype)
    pfs.lora.inject(model, **{"r": 4} | arguments)
    torch.manual_seed(2)
    for module in adapters(model).values():
        nn.init.normal_(module.B, std=size)
    return model


def exact_weights(model):
    """{module: W0 + scale · B A in float64}, written out once more."""
    exact = {}
    for name, module in adapters(model).items():
        update = module.scale * module.B.double() @ module.A.double()
        if type(module.base).__name__ == "Conv1D":
            update = update.T
        exact[name] = (module.base.weight.double() + update).detach()
    return exact


@law
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def merging_rounds_once_and_says_how_much(architecture="llama", dtype=torch.bfloat16):
    model = injected(architecture, dtype=dtype, size=0.02)
    exact, before = exact_weights(model), copy.deepcopy(model)
    errors = pfs.merge(model)
    assert list(errors) == list(exact)
    for name, W in exact.items():
        merged, W0 = (
            model.get_submodule(name).weight,
            adapters(before)[name].base.weight,
        )
        assert torch.equal(merged, W.to(dtype)), name
        expected = (merged.double() - W).norm() / (W - W0.double()).norm()
        assert abs(errors[name] - expected) < 1e-9
        assert errors[name] > torch.finfo(dtype).eps / 4


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


@law
def overflow_in_half_precision_is_not_merged():
    model = injected(dtype=torch.float16)
    last = list(adapters(model).values())[-1]
    last.B.data.fill_(1e6)  # finite in float32, beyond the 65504 of float16
    with refused(model, "down_proj", "float16", error=pfs.CannotMerge):
        pfs.merge(model)


@law
@pytest.mark.parametrize("architecture", TIED)
def a_tied_head_is_not_merged(architecture="gpt2"):
    model = injected(architecture, targets=["all-linear", "lm_head"])
    embedding = next(n for n, m in model.named_modules() if isinstance(m, nn.Embedding))
    with refused(model, "lm_head", embedding, "tie", error=pfs.CannotMerge):
        pfs.merge(model)
    pfs.remove(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight


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


@law
def adapters_in_a_part_are_refused():
    model = build("llama")
    pfs.lora.inject(model.model)
    with refused(model, "layers.0", "LoRA", "a part"):
        pfs.lora.inject(model)


def test_adapters_of_peft_are_refused():
    model = build("llama")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with refused(model, "q_proj", "another library"):
        pfs.lora.inject(model)


@law
def what_reads_the_weight_itself_is_told():
    """State-space mixers do: the adapter would be there and never run."""
    model = injected()
    wrapped = next(iter(adapters(model).values()))
    try:
        said = str(wrapped.weight)
    except AttributeError as error:
        said = str(error)
    assert "past the adapter" in said and "exclude" in said
    assert not hasattr(wrapped, "no_such_thing")


@law
def a_read_in_a_forward_enters_one_function():
    """Reading A or B of an adapter costs what it costs of any module of torch."""
    model, entered = injected(), []

    def note(frame, event, argument):
        owner = frame.f_locals.get("self")
        read = frame.f_code.co_name == "__getattr__"
        if event == "call" and read and isinstance(owner, adapter.Adapter):
            entered.append((id(owner), frame.f_back.f_code.co_name))

    sys.setprofile(note)
    try:
        logits(model)
    finally:
        sys.setprofile(None)
    assert len(entered) > 4 * len(adapters(model))  # base, dropout, A and B of each
    assert "__getattr__" not in {caller for _, caller in entered}


@law
def a_plan_is_for_its_model_as_it_was():
    model, other = build("llama"), build("llama")
    plan = pfs.lora.plan(model, r=4)
    with refused(other, "q_proj", "not the module that was planned"):
        adapter.apply(other, plan)
    nf4.quantize_model(model, targets="down_proj")
    with refused(model, "down_proj", "plan() again"):
        adapter.apply(model, plan)
    plan = pfs.lora.plan(model, r=4)
    pfs.ia3.inject(model)
    with refused(model, "carries ia3 adapters already"):
        adapter.apply(model, plan)


@law
def compiled_models_have_the_same_names():
    plain = injected()
    for where in ("whole", "layer"):
        model = injected()
        layers, compiled = model.model.layers, model
        if where == "whole":
            compiled = torch.compile(model, backend="eager")
        else:
            layers[0] = torch.compile(layers[0], backend="eager")
        assert list(pfs.trainable(compiled)) == list(pfs.trainable(plain)), where
        pfs.merge(compiled)
        assert all(p.requires_grad for p in model.parameters())
        assert not adapters(model)


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


@law
def an_injection_that_fails_late_leaves_no_trace():
    model = build("llama")

    def wrap(base):
        if wrapped:
            raise RuntimeError("planted")
        return wrapped.append(adapter.Adapter(base)) or wrapped[0]

    wrapped = []
    with refused(model, "planted", error=RuntimeError):
        adapter.inject(model, wrap, "all-linear")


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
