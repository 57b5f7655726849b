"""Laws of the verbs at their edges: merging in every precision, tied heads."""

import copy
from unittest import mock

import pytest
import torch
from architectures import CONFIGS, build
from model_state import (
    logits,
    refused,
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


@law
def adapters_in_a_part_are_refused():
    model = build("llama")
    pfs.lora.inject(model.model)
    with refused(model, "layers.0", "LoRA", "a part"):
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
    model, read, read_again = injected(), [], []
    ours, torchs = adapter.Adapter.__getattr__, nn.Module.__getattr__

    def first(self, name):
        read.append(name)
        return ours(self, name)

    def second(self, name):
        if isinstance(self, adapter.Adapter):
            read_again.append(name)
        return torchs(self, name)

    with (
        mock.patch.object(adapter.Adapter, "__getattr__", first),
        mock.patch.object(nn.Module, "__getattr__", second),
    ):
        logits(model)
    assert len(read) >= 4 * len(adapters(model))  # base, dropout, A and B of each
    assert not read_again


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
def an_injection_that_fails_late_leaves_no_trace():
    model = build("llama")

    def wrap(base):
        if wrapped:
            raise RuntimeError("planted")
        return wrapped.append(adapter.Adapter(base)) or wrapped[0]

    wrapped = []
    with refused(model, "planted", error=RuntimeError):
        adapter.inject(model, wrap, "all-linear")
