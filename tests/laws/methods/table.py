"""METHODS: one row a method, with its promises. LAWS: the contract's, for every row."""

from functools import partial

import pytest
import torch
from torch import nn

import peft_from_scratch as pfs
from laws.core import contract as laws
from laws.core.contract import Method
from peft_from_scratch import nf4
from peft_from_scratch.core import adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


# In the attention of every architecture, and no MLP's.
SKIPPED = r"c_attn|(k|v)_proj"


class Smallest(pfs.Adapter):
    """h = W0 x + s: the smallest method there is, with no weight to merge into."""

    def __init__(self, base):
        super().__init__(base)
        d_out, _ = adapter.sizes(base)
        self.s = nn.Parameter(torch.zeros(d_out, **adapter.factory_kwargs(base)))

    def forward(self, x):
        return self.base(x) + self.s


def lora(**arguments):
    return partial(pfs.lora.inject, **{"r": 4, "alpha": 8} | arguments)


def qlora(**arguments):
    return partial(pfs.qlora.inject, **{"r": 4, "alpha": 8} | arguments)


def four_bits(model):
    nf4.quantize_model(model)


def some_in_four_bits(model):
    """Keys and values stay in full, and get a LoRA all the same."""
    nf4.quantize_model(model, block=32, double=False, exclude=SKIPPED)


smallest = partial(adapter.inject, wrap=Smallest, targets="all-linear")


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


def every_bias(model):
    return sum(parameter.numel() for parameter in biases(model).values())


def two_bottlenecks_a_layer(model, m=4, sublayers=2):
    d, layers = model.config.hidden_size, model.config.num_hidden_layers
    return layers * sublayers * (2 * m * d + d + m)


def one_bottleneck_a_layer(model):
    return two_bottlenecks_a_layer(model, sublayers=1)


def lengths_too(model):
    return low_rank(model) + one_vector_each(model)


def keys_and_values(model, n=3):
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    d = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return n * config.num_hidden_layers * 2 * heads * d


def made_by_an_mlp(model, n=3, hidden=8):
    width, d = (
        keys_and_values(model, n=1),
        keys_and_values(model, n=1) // (2 * model.config.num_hidden_layers),
    )
    return n * d + (d + 1) * hidden + (hidden + 1) * width


def three_embeddings(model):
    return 3 * model.config.hidden_size


def three_vectors_a_layer(model):
    """Keys, values, and what the last projection of the MLP reads."""
    found = 0
    for name in projections(model):
        d_out, d_in = adapter.sizes(model.get_submodule(name))
        part = name.rpartition(".")[2]
        if part in ("k_proj", "v_proj", "c_attn"):
            found += d_out
        elif part in ("down_proj", "fc2") or name.endswith("mlp.c_proj"):
            found += d_in
    return found


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
    Method("dora", partial(pfs.dora.inject, r=4, alpha=8), lengths_too),
    Method(
        "dora-dropout",
        partial(pfs.dora.inject, r=4, alpha=8, dropout=0.3),
        lengths_too,
        random=True,
    ),
    Method(
        "pissa",
        partial(pfs.pissa.inject, r=4, alpha=8),
        low_rank,
        start=1e-5,
        saved=False,  # load() makes a LoRA of twice the rank: test_lora_family.py
    ),
    Method("ia3", pfs.ia3.inject, three_vectors_a_layer),
    Method(
        "bitfit",
        pfs.bitfit.inject,
        every_bias,
        wraps=False,
        architectures=("gpt2", "opt"),
    ),
    Method(
        "houlsby",
        partial(pfs.houlsby.inject, m=4),
        two_bottlenecks_a_layer,
        mergeable=False,
        start=0.02,
    ),
    Method(
        "pfeiffer",
        partial(pfs.houlsby.inject, m=4, placement="pfeiffer", nonlinearity="relu"),
        one_bottleneck_a_layer,
        mergeable=False,
        start=0.02,
    ),
    Method(
        "prefix",
        partial(pfs.prefix.inject, n=3),
        keys_and_values,
        mergeable=False,
        start=None,
    ),
    Method(
        "prefix-mlp",
        partial(pfs.prefix.inject, n=3, hidden=8),
        made_by_an_mlp,
        mergeable=False,
        start=None,
        saved=False,  # the file holds what the MLP makes: test_prefix.py
    ),
    Method(
        "prefix-tokens",
        partial(pfs.prefix.inject, n=3, start=[5, 6]),
        keys_and_values,
        mergeable=False,
        start=None,
    ),
    Method(
        "prompt",
        partial(pfs.prompt.inject, n=3),
        three_embeddings,
        mergeable=False,
        start=None,
    ),
    Method("smallest", smallest, one_vector_each, mergeable=False, saved=False),
    Method("qlora", qlora(), low_rank, prepare=four_bits),
    Method(
        "qlora-skip",
        qlora(),
        low_rank,
        prepare=some_in_four_bits,
    ),
    Method(
        "qlora-dropout", qlora(dropout=0.3), low_rank, prepare=four_bits, random=True
    ),
    Method("qlora-biases", qlora(bias="all"), with_every_bias, prepare=four_bits),
    Method(
        "qlora-patterns",
        qlora(rank_pattern={r".*\.0\..*": 2}, alpha_pattern={r".*\.1\..*": 3.0}),
        first_layer_smaller,
        prepare=four_bits,
    ),
    Method(
        "qlora-bf16",
        qlora(dtype=torch.bfloat16),
        low_rank,
        prepare=four_bits,
        merges_within=0.02,  # x is rounded to 8 bits before A
        saved=False,  # load() gives float32: test_qlora.py
    ),
    Method(
        "dora-on-four-bits",
        partial(pfs.dora.inject, r=4, alpha=8),
        lengths_too,
        prepare=four_bits,
    ),
    Method(
        "ia3-on-four-bits", pfs.ia3.inject, three_vectors_a_layer, prepare=four_bits
    ),
    Method(
        "bitfit-on-four-bits",
        pfs.bitfit.inject,
        every_bias,
        wraps=False,
        architectures=("gpt2", "opt"),
        prepare=four_bits,
    ),
    Method(
        "houlsby-on-four-bits",
        partial(pfs.houlsby.inject, m=4),
        two_bottlenecks_a_layer,
        mergeable=False,
        start=0.02,
        prepare=four_bits,
    ),
    Method(
        "prefix-on-four-bits",
        partial(pfs.prefix.inject, n=3),
        keys_and_values,
        mergeable=False,
        start=None,
        prepare=four_bits,
    ),
    Method(
        "prompt-on-four-bits",
        partial(pfs.prompt.inject, n=3),
        three_embeddings,
        mergeable=False,
        start=None,
        prepare=four_bits,
    ),
]

# law -> the methods that it speaks of
LAWS = {
    laws.starts_from_the_pretrained_model: lambda m: True,
    laws.counts_equal_the_formula: lambda m: True,
    laws.tensors_lie_in_memory_as_files_do: lambda m: True,
    laws.only_what_is_trainable_moves: lambda m: True,
    laws.every_tensor_moves_after_an_evaluation: lambda m: True,
    laws.a_plan_touches_nothing: lambda m: True,
    laws.inject_is_plan_and_apply: lambda m: True,
    laws.remove_is_exact: lambda m: True,
    laws.disabled_is_the_untouched_model: lambda m: True,
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


def cases(laws, methods, architectures):
    """(name, (law, method, architecture)) of each law on all that it speaks of."""
    for law, applies in laws.items():
        for method in filter(applies, methods):
            for architecture in filter(
                method.architectures.__contains__, architectures
            ):
                name = f"{law.__name__}-{method.name}-{architecture}"
                yield name, (law, method, architecture)
