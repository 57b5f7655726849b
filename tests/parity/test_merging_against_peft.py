"""Combined adapters against PEFT's add_weighted_adapter: logits, and files both ways.

The same two files are given to both. PEFT's `linear`, `cat` and `svd` compute what
"linear", "concatenation" and "svd" do, with weights of either sign. Its `ties_svd`,
with signs by "total" magnitude, and `dare_linear_svd` compute "ties" and "dare". But:

    weights   ties_svd elects the signs of ΔW_i, and then multiplies by w_i. We elect
              those of w_i ΔW_i, so that an adapter of weight 0 has no vote. With equal
              positive weights both are the same
    a tie     where the ΔW_i sum to 0, ties_svd keeps the positive ones; we keep none
    rslora    PEFT copies use_rslora from the first adapter into the result, whose scale
              is then √r where it was meant to be 1. Ours is 1 always
    linear    asks for one rank in the whole of each adapter, we for one in each module
    cat, svd  write the sum of all ranks, or the rank, for every module and fill up with
              zeros; we write what each module needs
    dare      draws from the global generator in the order of the model's modules; we
              draw from our own. With one module and one seed the draws are the same
"""

import copy
import math

import pytest
import torch
from against import answers, quietly
from architectures import build
from model_state import largest

import peft_from_scratch as pfs
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.files.combine import combine

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.jit.script:DeprecationWarning"),
]

MIXED, EQUAL, UNEQUAL = (0.7, -1.3), (0.8, 0.8), (1.5, 0.5)
EVEN = ({}, {})  # of both adapters, beside r=4, lora_alpha=6, "all-linear"
UNEVEN = ({"r": 3, "alpha_pattern": {r".*\.0\..*": 2.5}}, {"use_rslora": True})
ONE = {  # a square module of each, and one that is not
    "llama": {"target_modules": ["layers.1.mlp.up_proj"]},
    "gpt2": {"target_modules": ["h.1.mlp.c_fc"], "fan_in_fan_out": True},
}
SVD = dict(how="svd", r=5), dict(combination_type="svd", svd_rank=5)
TIES = (
    dict(how="ties", r=5, density=0.3),
    dict(combination_type="ties_svd", svd_rank=5, density=0.3),
)
DARE = (
    dict(how="dare", r=5, density=0.4, seed=3),
    dict(combination_type="dare_linear_svd", svd_rank=5, density=0.4),
)
# name -> (our arguments, PEFT's, weights, the two adapters)
CASES = {
    "linear": (
        dict(how="linear"),
        dict(combination_type="linear"),
        MIXED,
        ({"alpha_pattern": {r".*\.0\..*": 2.5}}, {"use_rslora": True}),
    ),
    "concatenation": (
        dict(how="concatenation"),
        dict(combination_type="cat"),
        MIXED,
        UNEVEN,
    ),
    "svd": (*SVD, MIXED, UNEVEN),
    "ties": (*TIES, EQUAL, UNEVEN),
}
ROWS = [
    pytest.param(architecture, *case, id=f"combine_{name}-{architecture}")
    for name, case in CASES.items()
    for architecture in ("llama", "gpt2")
]


def two_adapters(base, folder, options):
    """PEFT's model with the adapters "a" and "b", and the folders of their files."""
    torch.manual_seed(7)
    shared = dict(r=4, lora_alpha=6, target_modules="all-linear")
    configs = [
        peft.LoraConfig(**shared | each, init_lora_weights=False, task_type="CAUSAL_LM")
        for each in options
    ]
    model = quietly(peft.get_peft_model, copy.deepcopy(base), configs[0], "a").eval()
    quietly(model.add_adapter, "b", configs[1])
    quietly(model.save_pretrained, folder, save_embedding_layers=False)
    return model, [folder / "a", folder / "b"]


def both(architecture, ours, theirs, weights, options, folder):
    """(the model with our combination, the model with PEFT's, ours as PEFT reads it)"""
    base = build(architecture)
    reference, folders = two_adapters(base, folder, options)
    combine(folders, folder / "out", weights=weights, **ours)
    quietly(reference.add_weighted_adapter, ["a", "b"], list(weights), "c", **theirs)
    reference.set_adapter("c")
    model = copy.deepcopy(base)
    pfs.load(model, folder / "out")
    read = quietly(peft.PeftModel.from_pretrained, base, folder / "out")
    return model, reference.eval(), read.eval()


@pytest.mark.parametrize("architecture, ours, theirs, weights, options", ROWS)
def test_the_combination_is_pefts(
    architecture, ours, theirs, weights, options, tmp_path, measure
):
    without = answers(build(architecture))[0]
    models = both(architecture, ours, theirs, weights, options, tmp_path)
    model, reference, read = (answers(model)[0] for model in models)
    measure("logits", model, reference)
    measure("file", read, reference)
    assert largest(without, reference) > 0.1


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2"], ids="combine_dare-{}".format
)
def test_dare_is_pefts_where_the_draws_are_the_same(
    architecture, tmp_path, measure, monkeypatch
):
    """PEFT holds a Conv1D's update as (d_in, d_out), and draws for that shape."""
    lora_model = peft.tuners.lora.model
    sound = lora_model.dare_linear

    def seeded(deltas, weights, density):
        torch.manual_seed(3)
        if architecture == "gpt2":  # draw for (d_out, d_in), as we do
            return sound([delta.T for delta in deltas], weights, density).T
        return sound(deltas, weights, density)

    monkeypatch.setattr(lora_model, "dare_linear", seeded)
    options = (ONE[architecture], ONE[architecture] | {"r": 3})
    models = both(architecture, *DARE, MIXED, options, tmp_path)
    model, reference, read = (answers(model)[0] for model in models)
    measure("logits", model, reference)
    measure("file", read, reference)


def test_ties_with_unequal_weights_is_where_we_differ(tmp_path):
    """Weight 0: with PEFT the adapter still votes and counts, with us it is absent."""
    base = build("llama")
    ties = dict(weights=(1.0, 0.0), how="ties", r=5, density=0.3)
    model, reference, _ = both("llama", *TIES, (1.0, 0.0), EVEN, tmp_path)
    combine([tmp_path / "a"], tmp_path / "alone", **ties | dict(weights=(1.0,)))
    pfs.load(base, tmp_path / "alone")
    ours, alone, theirs = (answers(each)[0] for each in (model, base, reference))
    assert largest(ours, alone) < 1e-5
    assert largest(ours, theirs) > 0.01
    model, reference, _ = both("llama", *TIES, UNEQUAL, EVEN, tmp_path / "unequal")
    assert largest(answers(model)[0], answers(reference)[0]) > 0.01


def test_rslora_of_the_first_adapter_is_where_we_differ(tmp_path):
    """Concatenation is exact, and PEFT's is √r times too large."""
    ours, theirs = dict(how="concatenation"), dict(combination_type="cat")
    options = ({"use_rslora": True}, {})
    model, reference, _ = both("llama", ours, theirs, MIXED, options, tmp_path)
    for name, module in adapters(model).items():
        theirs = reference.get_submodule(f"base_model.model.{name}")
        off = theirs.get_delta_weight("c") / math.sqrt(8)
        assert largest(module.delta(), off) < 1e-5
