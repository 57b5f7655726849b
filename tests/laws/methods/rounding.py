"""Laws of rounding once: what half precision leaves of a small update.

A sum that rounds W0 x first loses every update below half a unit of its last bit. So
each law here measures what is left of an update, or of training.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from planting import law
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_from_scratch as pfs
from peft_from_scratch import nf4
from peft_from_scratch.methods.dora import DoRA
from peft_from_scratch.methods.lora import LoRA
from peft_from_scratch.methods.pissa import PiSSA
from peft_from_scratch.tasks.task import load_task
from peft_from_scratch.training.config import TrainConfig
from peft_from_scratch.training.loop import train

HALF = [torch.bfloat16, torch.float16]
KINDS = ["Linear", "Conv1D", "NF4Linear"]
SIZES = [5e-5, 2e-4, 2e-2]  # of B: after one step, after a few, after training
LEFT = 0.97  # share of an update, at least; 6 standard deviations of its noise
BITS = {torch.bfloat16: 8, torch.float16: 11}  # of a value


def projection(kind="Linear", bias=False, dtype=torch.bfloat16, d_in=64, d_out=2048):
    """A random base in half precision; its bias is as large as its product."""
    torch.manual_seed(0)
    base = Conv1D(d_out, d_in) if kind == "Conv1D" else nn.Linear(d_in, d_out, bias)
    W = (base.weight.T if kind == "Conv1D" else base.weight).data
    W.copy_(torch.randn(d_out, d_in) / d_in**0.5)
    base = base.to(dtype)
    if base.bias is not None:
        nn.init.normal_(base.bias) if bias else nn.init.zeros_(base.bias)
    if kind == "NF4Linear":
        base = nf4.NF4Linear(nf4.quantize(base.weight), base.bias)
    return base


def batches(rows, d_in, values, d_out, dtype):
    """Inputs (rows, d_in), as many as make `values` outputs."""
    torch.manual_seed(1)
    for _ in range(max(1, values // (rows * d_out))):
        yield torch.randn(rows, d_in).to(dtype)


@law
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def an_update_survives(kind="Linear", bias=False, dtype=torch.bfloat16):
    """In a batch of 512 rows, and in single ones, as they are in decoding."""
    for rows in (512, 1):
        lora = LoRA(projection(kind, bias, dtype), r=8)
        direction = torch.randn_like(lora.B)
        left = dict.fromkeys(SIZES, 0.0)
        exact = dict.fromkeys(SIZES, 0.0)
        for x in batches(rows, 64, 2**19, 2048, dtype):
            lora.B.zero_()
            without = lora(x).double()
            for size in SIZES:
                lora.B.copy_(size * direction)
                update = lora.scale * x.double() @ lora.A.double().T @ lora.B.double().T
                left[size] += ((lora(x).double() - without) * update).sum().item()
                exact[size] += update.square().sum().item()
        for size in SIZES:
            assert abs(left[size] / exact[size] - 1) < 1 - LEFT, (rows, size)


@law
@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_half_precision_output_is_the_sum_rounded_once(dtype=torch.bfloat16):
    """Each value is within half a unit of its last bit of the sum in float64."""
    for rows in (512, 1):
        lora = LoRA(projection(dtype=dtype), r=8)
        nn.init.normal_(lora.B, std=2e-4)
        x = torch.randn(rows, 64).to(dtype)
        h = lora(x).double()
        update = x.double() @ lora.delta(torch.float64).T
        exact = x.double() @ weight(lora.base).T + update
        half = 2.0 ** (torch.frexp(h).exponent - 1 - BITS[dtype])
        rounded_update = 2 ** (1 - BITS[dtype]) * update.abs().max()
        assert ((h - exact).abs() <= half + rounded_update).all()


@law
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def a_change_of_length_survives(kind="Linear", dtype=torch.bfloat16):
    """DoRA's m, by a thousandth: below the last bit of a rounded output."""
    dora = DoRA(projection(kind, True, dtype), r=8)
    start, exact, left = dora.m.clone(), 0.0, 0.0
    by = 1e-3 * torch.randn_like(start)
    for x in batches(512, 64, 2**20, 2048, dtype):
        dora.m.copy_(start)
        without = dora(x).double()
        dora.m.copy_(start * (1 + by))
        change = by * (x.double() @ weight(dora.base).T)
        left += ((dora(x).double() - without) * change).sum().item()
        exact += change.square().sum().item()
    assert abs(left / exact - 1) < 1 - LEFT


@law
@pytest.mark.parametrize("dtype", HALF)
def an_update_beside_a_residual_survives(dtype=torch.bfloat16):
    """PiSSA starts from a large B; what a step adds to it is small."""
    pissa = PiSSA(projection(bias=True, dtype=dtype), r=8)
    pissa.on_attach()
    by, exact, left = 5e-5 * torch.randn_like(pissa.B), 0.0, 0.0
    with torch.no_grad():
        for x in batches(512, 64, 2**21, 2048, dtype):
            pissa.B.copy_(pissa.B0)
            without = pissa(x).double()
            pissa.B.copy_(pissa.B0 + by)
            update = pissa.scale * x.double() @ pissa.A.double().T @ by.double().T
            left += ((pissa(x).double() - without) * update).sum().item()
            exact += update.square().sum().item()
    assert abs(left / exact - 1) < 1 - LEFT


@law
@pytest.mark.parametrize("kind", KINDS)
def doras_gradients_are_those_of_float64(kind="Linear", dtype=torch.bfloat16):
    dora = DoRA(projection(kind, True, dtype), r=8, alpha=8)
    nn.init.normal_(dora.B, std=0.1)
    x = torch.randn(128, 64).to(dtype).requires_grad_()
    dh = torch.randn(128, 2048).to(dtype)
    wanted = (x, dora.A, dora.B, dora.m)
    ours = dora(x), *torch.autograd.grad(dora(x), wanted, dh)
    wide = [t.detach().double().requires_grad_() for t in wanted]
    V = weight(dora.base) + wide[2] @ wide[1]
    g = wide[3] / dora.norm(torch.float64)
    h = wide[0] @ (g[:, None] * V).T + dora.base.bias.double()
    theirs = h, *torch.autograd.grad(h, wide, dh.double())
    for name, found, right in zip("hxABm", ours, theirs, strict=True):
        off = (found.double() - right).norm() / right.norm()
        assert off < 2 * 2 ** -BITS[dtype], name


@law
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def a_large_sum_is_off_by_roundings_alone(kind="Linear", dtype=torch.bfloat16):
    """h and the gradients, against float64, with an update as large as the product."""
    for rows in (128, 2):
        lora = LoRA(projection(kind, True, dtype), r=8, alpha=8)
        nn.init.normal_(lora.B, std=0.6)
        x = torch.randn(rows, 64).to(dtype).requires_grad_()
        dh = torch.randn(rows, 2048).to(dtype)
        wide = [t.detach().double().requires_grad_() for t in (x, lora.A, lora.B)]
        ours = lora(x), *torch.autograd.grad(lora(x), (x, lora.A, lora.B), dh)
        h = wide[0] @ weight(lora.base).T + lora.base.bias.double()
        h = h + wide[0] @ wide[1].T @ wide[2].T
        theirs = h, *torch.autograd.grad(h, wide, dh.double())
        for name, found, right in zip("hxAB", ours, theirs, strict=True):
            off = (found.double() - right).norm() / right.norm()
            assert off < 2 ** -BITS[dtype], (name, rows)


@law
@torch.no_grad()
def autocast_rounds_once_too():
    """A float32 base under autocast multiplies in bfloat16, and so does LoRA's sum."""
    lora = LoRA(projection(dtype=torch.float32), r=8)
    direction = torch.randn_like(lora.B)
    left = exact = 0.0
    for x in batches(512, 64, 2**20, 2048, torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            lora.B.zero_()
            without = lora(x)
            lora.B.copy_(5e-5 * direction)
            found = lora(x)
        assert found.dtype == torch.bfloat16 and torch.equal(without, rounded(lora, x))
        update = lora.scale * x.double() @ lora.A.double().T @ lora.B.double().T
        left += ((found.double() - without.double()) * update).sum().item()
        exact += update.square().sum().item()
    assert abs(left / exact - 1) < 1 - LEFT


def rounded(lora, x):
    """The base's own output, under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return lora.base(x)


@law
def autocast_leaves_float64_alone():
    lora = LoRA(projection(dtype=torch.float64), r=8)
    nn.init.normal_(lora.B)
    x = torch.randn(3, 64, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = lora(x)
    assert torch.equal(found, lora(x)) and found.dtype == torch.float64


def weight(base):
    """W0 (d_out, d_in), in float64."""
    W = base.weight.detach().double()
    return W.T if isinstance(base, Conv1D) else W


@law
@pytest.mark.parametrize("dtype", HALF)
def sums_that_half_precision_holds_are_finite(dtype=torch.float16):
    """Of products that it does not hold: B alone is 10,000 here, times 64 rows of A."""
    lora = LoRA(projection(dtype=dtype), r=8, alpha=0.01)
    for rows in (1, 128):
        with torch.no_grad():
            lora.A.fill_(1.0)
            lora.B.fill_(1e4)
            h = lora(torch.ones(rows, 64, dtype=dtype))
        assert (h.double() / 6400 - 1).abs().max() < 0.02


@law
def small_gradients_survive_in_float16():
    """B of 1e-5 times a gradient of 1e-5 is below all that float16 holds."""
    lora = LoRA(projection(dtype=torch.float16), r=8)
    nn.init.normal_(lora.B, std=1e-5)
    x, dh = torch.randn(128, 64), 1e-5 * torch.randn(128, 2048)
    x, dh = x.half(), dh.half()
    (dA,) = torch.autograd.grad(lora(x), lora.A, dh)
    right = lora.scale * (dh.double() @ lora.B.double()).T @ x.double()
    assert (dA - right).norm() < 1e-3 * right.norm()


RATES = [1e-4, 1e-3, 3e-3]
STEPS, APART = 8, 0.02  # nats


@cache
def losses(dtype: str, rate: float) -> list[float]:
    """Of tiny, which is pretrained, before each of its steps on eight orders."""
    model, tokenizer = pfs.load_model("tiny", device="cpu", dtype=dtype)
    task = load_task("orders", seed=0)
    torch.manual_seed(0)
    pfs.lora.inject(model)
    recipe = TrainConfig(steps=STEPS + 1, lr=rate, schedule="constant", template="raw")
    task = replace(task, train=task.train.select(range(8)))
    return train(model, tokenizer, task, recipe, progress=False).loss


@law
@pytest.mark.parametrize("rate", RATES)
def training_in_bfloat16_follows_float32(rate=1e-4):
    """What each step has gained so far, in nats; a base in bfloat16 starts elsewhere.

    With two roundings, it is 0.08 behind at the rates of 1e-4 and 1e-3.
    """
    full = losses("float32", rate)
    half = losses.__wrapped__("bfloat16", rate)
    gained = [[series[0] - loss for loss in series] for series in (full, half)]
    apart = [abs(a - b) for a, b in zip(*gained, strict=True)]
    assert max(apart) < APART, apart
    assert full[0] - full[-1] > 10 * APART
