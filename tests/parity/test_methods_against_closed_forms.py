"""Bottleneck adapters and BitFit, which PEFT lacks, against plain torch.

The reference hangs the paper's equation on an untouched model by forward hooks, or lets
the biases alone train; autograd does the rest.
"""

import copy

import pytest
import torch
from against import answers, gradients_of, ours
from architectures import CONFIGS, build
from model_state import train

import peft_from_scratch as pfs
from peft_from_scratch.core.adapter import adapters

LAST = {  # the last projections of a layer's attention and MLP
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
}
GATED = ("self_attn.o_proj", "mlp.down_proj")
SIGMAS = {"gelu": torch.nn.functional.gelu, "relu": torch.relu, "tanh": torch.tanh}


def bottleneck(p, name, sigma):
    """h = y + U σ(D y + b_D) + b_U, as a forward hook."""

    def hook(module, inputs, y):
        down = y @ p[f"{name}.down.weight"].T + p[f"{name}.down.bias"]
        return y + sigma(down) @ p[f"{name}.up.weight"].T + p[f"{name}.up.bias"]

    return hook


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("sigma", SIGMAS, ids="houlsby_{}".format)
def test_houlsby_is_its_equation_behind_both_sublayers(
    sigma, architecture, tmp_path, measure
):
    base = build(architecture)
    model, reference = copy.deepcopy(base), copy.deepcopy(base).requires_grad_(False)
    pfs.houlsby.inject(model, m=4, nonlinearity=sigma)
    ends = LAST.get(architecture, GATED)
    every = [name for name, _ in reference.named_modules()]
    wanted = [n for n in every if n.endswith(tuple(f".{end}" for end in ends))]
    assert list(adapters(model)) == wanted
    train(model, 2)
    p = {
        n: v.detach().clone().requires_grad_() for n, v in pfs.trainable(model).items()
    }
    for name in wanted:
        hook = bottleneck(p, name, SIGMAS[sigma])
        reference.get_submodule(name).register_forward_hook(hook)
    measure("logits", answers(model)[0], answers(reference)[0])
    measure("gradients", ours(model), gradients_of(reference, p))
    pfs.save(model, tmp_path)
    pfs.load(base, tmp_path)
    measure("file", answers(base)[0], answers(reference)[0])


@pytest.mark.parametrize("architecture", ["gpt2", "opt"], ids="bitfit-{}".format)
def test_bitfit_trains_the_biases_and_nothing_else(architecture, tmp_path, measure):
    base = build(architecture)
    model, reference = copy.deepcopy(base), copy.deepcopy(base).requires_grad_(False)
    pfs.bitfit.inject(model)
    named = dict(reference.named_parameters())
    p = {n: v.requires_grad_() for n, v in named.items() if n.endswith(".bias")}
    measure("logits", answers(model)[0], answers(reference)[0])
    measure("gradients", ours(model), gradients_of(reference, p))
    train(model, 2)
    pfs.save(model, tmp_path)
    pfs.load(base, tmp_path)
    measure("file", answers(base)[0], answers(model)[0])
