"""Projections in four bits, and models of them, against dense weights in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from architectures import build
from laws.nf4.linear import (
    dense,
    drawn,
    in_four_bits,
    layer,
    made_plain,
    packed,
    two_threads_on,
)
from model_state import assert_same, largest, logits, train

import peft_from_scratch as pfs
from peft_from_scratch import nf4

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
HALF = (torch.bfloat16, torch.float16)


# ------------------------------------------------------------------------ Products


def test_two_threads_at_once_on_one_model():
    assert not two_threads_on(in_four_bits())()


# -------------------------------------------------------------------------- Dtypes


@pytest.mark.parametrize("dtype", HALF)
def test_a_model_in_half_precision_is_quantized_and_moved(dtype):
    model = in_four_bits(of=dtype)
    assert {m.dtype for m in packed(model).values()} == {dtype}
    twin = made_plain(model)
    assert {p.dtype for p in twin.parameters()} == {dtype}
    assert largest(logits(model), logits(twin)) < 0.03
    moved = copy.deepcopy(model).to("cpu").to(torch.float32).to(dtype)
    for name, module in packed(moved).items():
        before = model.get_submodule(name)
        assert_same(module.state_dict(), before.state_dict())


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_decides_the_dtype_of_the_product(dtype):
    module, x = layer(), drawn(3, 40).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = module(x)
    W, bias = dense(module, dtype)
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x.to(dtype), W) + bias)
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert largest(x.grad, dense(module)[0].sum(0).expand(3, -1)) < 0.02


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_compute_dtype_is_that_of_the_product_and_not_of_the_result(dtype):
    module, x = layer(compute_dtype=dtype), drawn(3, 40)
    W, _ = dense(module, dtype)
    expected = F.linear(x.to(dtype), W).to(torch.float32) + module.bias
    assert module(x).dtype == torch.float32
    assert torch.equal(module(x), expected)


def test_a_compute_dtype_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"compute_dtype=torch.int8: allowed are None"):
        layer(compute_dtype=torch.int8)


# -------------------------------------------------------------------------- Copies


@pytest.mark.parametrize("double", [False, True, "int8"])
def test_state_dict_holds_the_codes_and_brings_them_back(double):
    model, other = in_four_bits(double=double), build("llama", seed=1)
    nf4.quantize_model(other, double=double)
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(other), logits(model))
    keys = {k for k in model.state_dict() if "up_proj" in k and "layers.0" in k}
    ends = {key.rpartition(".")[2] for key in keys}
    assert (
        ends == {"packed", "absmax_values"}
        if not double
        else ends
        == {
            "packed",
            "absmax_codes",
            "absmax_units",
            "absmax_offset",
        }
    )


def test_what_it_shows():
    module = layer(48, 40, block=32)
    assert "40, 48, bias=True, nf4, block=32, double=dynamic, 4." in str(module)
    assert module.device == torch.device("cpu") and module.values == 48 * 40


# -------------------------------------------------------------------------- Models


# ------------------------------------------------------------------------ Refusals


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_dora_on_four_bits_of_half_precision(dropout):
    model = in_four_bits("opt", of=torch.bfloat16)
    pfs.dora.inject(model, r=4, dropout=dropout)
    train(model, 2)
    unmerged = logits(model)
    pfs.merge(model)
    assert not packed(model) and largest(logits(model), unmerged) < 0.05
