"""Every law x every method x every architecture. A new method is one row of METHODS."""

from functools import partial

import laws
import pytest
import torch
from architectures import CONFIGS
from laws import Method
from torch import nn

import peft_from_scratch as pfs
from peft_from_scratch import adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


class Shift(pfs.Adapter):
    """h = W0 x + s: the smallest method there is, with no weight to merge into."""

    def __init__(self, base):
        super().__init__(base)
        d_out, _ = adapter.sizes(base)
        self.s = nn.Parameter(torch.zeros(d_out, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + self.s


def lora(**arguments):
    return partial(pfs.lora.inject, **{"r": 4, "alpha": 8} | arguments)


def shift(model):
    return adapter.inject(model, Shift, "all-linear")


# The formulas, from the weights' shapes alone: "proj", "fc" and "attn" are the names of
# every projection of the five architectures, and no other weight has two dimensions.
def projections(model):
    return {
        name.removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and any(w in name for w in ("proj", "fc", "attn"))
    }


def biases(model):
    return {n: p for n, p in model.named_parameters() if n.endswith(".bias")}


def everything(model):
    return sum(parameter.numel() for parameter in model.parameters())


def low_rank(model, rank=lambda name: 4):
    shapes = {name: weight.shape for name, weight in projections(model).items()}
    return sum(rank(name) * (d_in + d_out) for name, (d_in, d_out) in shapes.items())


def with_every_bias(model):
    return low_rank(model) + sum(p.numel() for p in biases(model).values())


def with_wrapped_biases(model):
    inside = [f"{name}.bias" for name in projections(model)]
    return low_rank(model) + sum(
        bias.numel() for name, bias in biases(model).items() if name in inside
    )


def first_layer_smaller(model):
    return low_rank(model, lambda name: 2 if ".0." in name else 4)


def one_vector_each(model):
    names = projections(model)
    return sum(sum(adapter.sizes(model.get_submodule(n))[:1]) for n in names)


METHODS = [
    Method(
        "full",
        partial(pfs.full.inject, keep_original=True),
        everything,
        wraps=False,
    ),
    Method("full-lost", pfs.full.inject, everything, wraps=False, restores=False),
    Method("lora", lora(), low_rank),
    Method("lora-rslora", lora(rslora=True), low_rank),
    Method("lora-dropout", lora(dropout=0.3), low_rank, random=True),
    Method("lora-biases", lora(bias="all"), with_every_bias),
    Method("lora-own-biases", lora(bias="lora_only"), with_wrapped_biases),
    Method(
        "lora-patterns",
        lora(rank_pattern={r".*\.0\..*": 2}, alpha_pattern={r".*\.1\..*": 3.0}),
        first_layer_smaller,
    ),
    Method("shift", shift, one_vector_each, mergeable=False, saved=False),
]

# law -> the methods that it speaks of
LAWS = {
    laws.starts_from_the_pretrained_model: lambda m: True,
    laws.counts_equal_the_formula: lambda m: True,
    laws.only_what_is_trainable_moves: lambda m: True,
    laws.every_tensor_moves_after_an_evaluation: lambda m: True,
    laws.remove_is_exact: lambda m: True,
    laws.mode_is_kept_and_changes_nothing: lambda m: True,
    laws.merged_equals_unmerged: lambda m: True,
    laws.merge_is_all_or_nothing: lambda m: m.wraps and m.mergeable,
    laws.a_second_injection_is_refused: lambda m: True,
    laws.saved_and_loaded_is_bit_equal: lambda m: m.saved,
    laws.padding_changes_no_generated_token: lambda m: True,
    laws.checkpointing_changes_no_gradient: lambda m: True,
    laws.a_copy_is_independent: lambda m: True,
    laws.state_dict_is_the_whole_state: lambda m: True,
    laws.two_adapters_in_turn_share_a_base: lambda m: m.restores,
    laws.autocast_trains_close_to_fp32: lambda m: True,
}


def cases(chosen, architectures):
    for law, applies in chosen.items():
        for method in filter(applies, METHODS):
            for architecture in architectures:
                label = f"{law.__name__}-{method.name}-{architecture}"
                yield pytest.param(law, method, architecture, id=label)


@pytest.mark.parametrize("law, method, architecture", list(cases(LAWS, CONFIGS)))
def test_law(law, method, architecture):
    law(method, architecture)


# Random Llama, Qwen and Gemma models are not fp64 inside: their norms compute in fp32.
@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
@pytest.mark.parametrize(
    "method", [m for m in METHODS if m.mergeable], ids=lambda m: m.name
)
def test_merged_equals_unmerged_in_fp64(method, architecture):
    laws.merged_equals_unmerged_in_fp64(method, architecture)
