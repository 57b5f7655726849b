"""Which modules the presets and patterns choose, against lists made by hand."""

import pytest
import torch
from architectures import CONFIGS, build
from laws.core.targets import (
    EXPECTED,
    a_typo_inside_a_list_is_refused,
    all_linear_is_every_projection_and_no_head,
    names,
)
from model_state import refused
from torch import nn

import peft_from_scratch as pfs
from peft_from_scratch.core.targets import resolve


@pytest.mark.parametrize("architecture", CONFIGS)
def test_presets(architecture):
    _, attention, mlp = EXPECTED[architecture]
    model = build(architecture)
    all_linear_is_every_projection_and_no_head(architecture)
    assert list(resolve(model, "attention")) == names(architecture, *attention)
    assert list(resolve(model, "mlp")) == names(architecture, *mlp)
    both = resolve(model, ["mlp", "attention"])
    assert list(both) == names(architecture, *attention, *mlp)
    for name, module in both.items():
        assert module is model.get_submodule(name)


@pytest.mark.parametrize(
    "targets, exclude, expected",
    [
        ("q_proj", None, ["self_attn.q_proj"]),
        ("self_attn.q_proj", None, ["self_attn.q_proj"]),
        ("q_proj|up_proj", None, ["self_attn.q_proj", "mlp.up_proj"]),
        (r"model\.layers\.\d\.mlp\.up_proj", None, ["mlp.up_proj"]),
        ([r".*attn\.[kv]_proj"], None, ["self_attn.k_proj", "self_attn.v_proj"]),
        (["v_proj", "down_proj"], None, ["self_attn.v_proj", "mlp.down_proj"]),
        (("mlp", "k_proj"), "gate_proj|up_proj", ["self_attn.k_proj", "mlp.down_proj"]),
        ("all-linear", ["attention", "gate_proj"], ["mlp.up_proj", "mlp.down_proj"]),
        (
            lambda name, module: module.weight.shape == (16, 32),
            None,
            ["self_attn.k_proj", "self_attn.v_proj"],
        ),
        (
            "attention",
            lambda name, module: "q_" in name or "o_" in name,
            ["self_attn.k_proj", "self_attn.v_proj"],
        ),
    ],
    ids=lambda given: given.__name__ if callable(given) else str(given),
)
def test_names_patterns_lists_functions_and_exclusions(targets, exclude, expected):
    found = resolve(build("llama"), targets, exclude)
    assert list(found) == names("llama", *expected)


def test_one_module_by_its_full_name():
    name = "model.layers.1.mlp.up_proj"
    assert list(resolve(build("llama"), name)) == [name]


def test_a_name_is_not_a_prefix_nor_a_part_of_a_name():
    for near in ("proj", "q_pro", "_proj", "layers.0", "self_attn", "Q_PROJ"):
        with pytest.raises(ValueError, match="matches no module"):
            resolve(build("llama"), near)


def test_the_head_is_adapted_only_when_it_is_named():
    assert list(resolve(build("llama"), "lm_head")) == ["lm_head"]
    found = resolve(build("llama"), ["attention", "lm_head"])
    assert list(found)[-1] == "lm_head" and len(found) == 9


def test_a_typo():
    a_typo_inside_a_list_is_refused()
    model = build("llama")
    with refused(model, "exclude", "'q_prj'", "q_proj"):
        pfs.lora.inject(model, exclude="q_prj")
    with refused(model, "'(q'", "regex"):
        pfs.lora.inject(model, targets="(q")


def test_nothing_left_is_refused():
    model = build("gpt2")
    with refused(model, "leaves no module", "c_attn"):
        pfs.lora.inject(model, targets="attention", exclude="all-linear")


class Perceptron(nn.Module):
    """No decoder layer and no token: a model from outside transformers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_a_model_without_decoder_layers_gets_help_for_presets_and_works_by_name(
    tmp_path,
):
    model = Perceptron()
    with refused(model, "decoder layer", "first, second"):
        pfs.lora.inject(model, r=2)
    pfs.lora.inject(model, r=2, targets=["first", "second"])
    nn.init.normal_(model.first.B)
    x = torch.randn(3, 6)
    expected = model(x)
    pfs.save(model, tmp_path)
    pfs.remove(model)
    pfs.load(model, tmp_path)
    assert torch.equal(model(x), expected)


def test_a_model_without_projections_is_told_so():
    model = nn.Sequential(nn.Embedding(3, 2))
    with refused(model, "no Linear and no Conv1D"):
        pfs.lora.inject(model, targets="q_proj")
