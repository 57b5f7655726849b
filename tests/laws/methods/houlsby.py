"""Laws of bottleneck adapters: their equation, their places, their start."""

import copy

import pytest
import torch
from architectures import CONFIGS, build
from model_state import largest, logits, train
from planting import law
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_from_scratch as pfs
from laws.core.contract import original
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.methods import houlsby
from peft_from_scratch.methods.houlsby import NONLINEARITIES, Bottleneck

DOUBLE = dict(dtype=torch.float64)
PLAIN = {  # each nonlinearity in other words
    "relu": lambda z: z * (z > 0),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "tanh": lambda z: 1 - 2 / (torch.exp(2 * z) + 1),
}
LAST = {  # the last projections of attention and of the MLP
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
} | dict.fromkeys(("llama", "qwen", "gemma"), ("self_attn.o_proj", "mlp.down_proj"))


def closed_form(bottleneck, x, sigma):
    W = bottleneck.base.weight
    W = W if isinstance(bottleneck.base, nn.Linear) else W.T
    y = x @ W.T + bottleneck.base.bias
    D, b_D, U, b_U = (*bottleneck.down.parameters(), *bottleneck.up.parameters())
    return y + sigma(y @ D.T + b_D) @ U.T + b_U


@law
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("sigma", NONLINEARITIES)
def forward_and_gradients_are_those_of_the_equation(sigma="gelu", kind=nn.Linear):
    torch.manual_seed(0)
    base = nn.Linear(5, 6) if kind is nn.Linear else Conv1D(6, 5)
    bottleneck = Bottleneck(base.double(), m=3, nonlinearity=sigma)
    for parameter in bottleneck.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 4, 5, **DOUBLE).requires_grad_()
    dh = torch.randn(2, 4, 6, **DOUBLE)
    wanted = [x, *bottleneck.down.parameters(), *bottleneck.up.parameters()]
    found, expected = (
        [h, *torch.autograd.grad(h, wanted, dh)]
        for h in (bottleneck(x), closed_form(bottleneck, x, PLAIN[sigma]))
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@law
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def stands_behind_the_last_projections(architecture="llama", placement="houlsby"):
    """A hook on the untouched model does the same, at these modules and no other."""
    model, untouched = copy.deepcopy(original(architecture)), build(architecture)
    names = houlsby.inject(model, m=4, placement=placement, nonlinearity="silu")
    ends = LAST[architecture][0 if placement == "houlsby" else 1 :]
    every = [name for name, _ in untouched.named_modules()]
    wanted = [n for n in every if n.endswith(tuple(f".{end}" for end in ends))]
    assert names == wanted == list(adapters(model))
    assert len(names) == 2 * len(ends)
    count = sum(parameter.numel() for parameter in pfs.trainable(model).values())
    assert count == len(names) * (2 * 4 * 32 + 32 + 4)
    train(model, 3)

    def behind(bottleneck):
        def hook(module, args, y):
            down, up = bottleneck.down, bottleneck.up
            narrow = PLAIN["silu"](y @ down.weight.T + down.bias)
            return y + narrow @ up.weight.T + up.bias

        return hook

    for name, bottleneck in adapters(model).items():
        untouched.get_submodule(name).register_forward_hook(behind(bottleneck))
    assert largest(logits(model), logits(untouched)) < 1e-6
    assert largest(logits(model), logits(build(architecture))) > 1e-3


@law
def starts_near_the_identity():
    """Gaussian of 1e-2, cut at two deviations; biases of zero; h hardly differs."""
    torch.manual_seed(0)
    bottleneck = Bottleneck(nn.Linear(400, 300), m=64)
    for linear in (bottleneck.down, bottleneck.up):
        w = linear.weight.detach().double()
        deviation = 0.8796 * 1e-2  # of a unit Gaussian cut at 2: its own is smaller
        assert abs(w.std() / deviation - 1) < 5 / (2 * w.numel()) ** 0.5
        assert abs(w.mean()) < 5 * deviation / w.numel() ** 0.5
        assert 1.9e-2 < w.abs().max() <= 2e-2
        assert not linear.bias.any()
    x = torch.randn(50, 400)
    y, h = bottleneck.base(x), bottleneck(x)
    assert 0 < (h - y).abs().max() < 0.02 * y.abs().max()
