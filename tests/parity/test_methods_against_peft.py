"""Every other method that PEFT has: logits, gradients, and files both ways.

PEFT draws the values and we read its file; the other way round we train, write, and
PEFT reads. Every difference is then one of computation.
"""

import copy
import warnings
from functools import partial

import pytest
import torch
from against import answers, gradients_of, our_name, ours, quietly
from architectures import CONFIGS, build
from laws.methods.unlike_tokens import other
from model_state import refused, train

import peft_from_scratch as pfs
from peft_from_scratch.core.decoder import find_decoder

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.jit.script:DeprecationWarning"),
]

LOW_RANK = dict(r=4, lora_alpha=6, target_modules="all-linear")
SCALED = {  # PEFT's targets of (IA)³, and those of them whose input is scaled
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "opt": (["k_proj", "v_proj", "fc2"], ["fc2"]),
}
GATED = (["k_proj", "v_proj", "down_proj"], ["down_proj"])


def dora(architecture, **options):
    return peft.LoraConfig(**LOW_RANK | options, use_dora=True, init_lora_weights=False)


def ia3(architecture):
    targets, feedforward = SCALED.get(architecture, GATED)
    return peft.IA3Config(
        target_modules=targets, feedforward_modules=feedforward, init_ia3_weights=False
    )


def prompt(architecture):
    return peft.PromptTuningConfig(num_virtual_tokens=3)


def prefix(architecture):
    return peft.PrefixTuningConfig(num_virtual_tokens=3)


# name -> (our inject, PEFT's configuration for an architecture)
CASES = {
    "dora": (partial(pfs.dora.inject, r=4, alpha=6), dora),
    "dora-rslora": (
        partial(pfs.dora.inject, r=4, alpha=6, rslora=True),
        partial(dora, use_rslora=True),
    ),
    "dora-dropout": (
        partial(pfs.dora.inject, r=4, alpha=6, dropout=0.4),
        partial(dora, lora_dropout=0.4),
    ),
    "ia3": (pfs.ia3.inject, ia3),
    "prompt": (partial(pfs.prompt.inject, n=3), prompt),
    "prefix": (partial(pfs.prefix.inject, n=3), prefix),
}
ROWS = [
    pytest.param(architecture, *case, id=f"{name}-{architecture}")
    for name, case in CASES.items()
    for architecture in CONFIGS
]


def of_peft(base, config):
    """PEFT's model on a copy of the base, with values that matter."""
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(7)
    model = quietly(peft.get_peft_model, copy.deepcopy(base), config).eval()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:  # or it would be the norm, exactly
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    return model


def trained_by_peft(model, base):
    """{our name: PEFT's parameter}."""
    trunk = find_decoder(base)[0]
    return {
        f"{trunk}.P" if name.startswith("prompt_encoder") else our_name(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("architecture, inject, config", ROWS)
def test_reading_pefts_file_gives_its_model(
    architecture, inject, config, tmp_path, measure
):
    base = build(architecture)
    reference, model = of_peft(base, config(architecture)), copy.deepcopy(base)
    quietly(reference.save_pretrained, tmp_path, save_embedding_layers=False)
    pfs.load(model, tmp_path)
    theirs = trained_by_peft(reference, base)
    measure("logits", answers(model)[0], answers(reference)[0])
    measure("gradients", ours(model), gradients_of(reference, theirs))
    model.train(), reference.train()
    measure("in training", ours(model), gradients_of(reference, theirs))


@pytest.mark.parametrize("architecture, inject, config", ROWS)
def test_peft_reads_our_file(architecture, inject, config, tmp_path, measure):
    base = build(architecture)
    model = copy.deepcopy(base)
    inject(model)
    train(model, 2)
    pfs.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a missing or unexpected key
        reference = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    measure("file", answers(model)[0], answers(reference.eval())[0])
    names = set(trained_by_peft(of_peft(base, config(architecture)), base))
    assert names == set(pfs.trainable(model))


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("name", ["dora", "ia3"])
def test_merged_weights_equal_pefts(name, architecture, tmp_path, measure):
    base = build(architecture)
    reference, model = of_peft(base, CASES[name][1](architecture)), copy.deepcopy(base)
    quietly(reference.save_pretrained, tmp_path)
    pfs.load(model, tmp_path)
    pfs.merge(model)
    merged = quietly(reference.merge_and_unload).state_dict()
    measure("merged weights", model.state_dict(), merged, allowed=1e-6)


@pytest.mark.parametrize("architecture", CONFIGS, ids="pissa-{}".format)
def test_pissa_starts_like_pefts_and_is_read_by_it(architecture, tmp_path, measure):
    """Singular vectors have a free sign: BA is compared, and what follows from it."""
    base = build(architecture)
    config = peft.LoraConfig(**LOW_RANK, init_lora_weights="pissa")
    reference, model = of_peft(base, config), copy.deepcopy(base)
    pfs.pissa.inject(model, r=4, alpha=6)
    ba, residual = {}, {}
    for name, module in reference.named_modules():
        if hasattr(module, "lora_A"):
            name = name.removeprefix("base_model.model.")
            ba[name] = module.lora_B.default.weight @ module.lora_A.default.weight
            residual[name] = module.base_layer.weight
    adapters = {name: model.get_submodule(name) for name in ba}
    measure("BA", {n: a.B @ a.A for n, a in adapters.items()}, ba)
    measure("residual", {n: a.base.weight for n, a in adapters.items()}, residual)
    measure("logits", answers(model)[0], answers(reference)[0])
    train(model, 2)
    pfs.save(model, tmp_path)
    read = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), tmp_path)
    measure("file", answers(model)[0], answers(read.eval())[0])


@pytest.mark.parametrize("architecture", CONFIGS, ids="prefix_mlp-{}".format)
def test_the_mlp_of_a_prefix_is_pefts(architecture, tmp_path, measure):
    base = build(architecture)
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    )
    reference, model = of_peft(base, config), copy.deepcopy(base)
    pfs.prefix.inject(model, n=3, hidden=8)
    encoder, name = reference.prompt_encoder.default, find_decoder(base)[0]
    mlp = model.get_submodule(name).mlp
    mlp.E.data.copy_(encoder.embedding.weight)
    mlp.mlp.load_state_dict(encoder.transform.state_dict())
    theirs = {f"{name}.mlp.E": encoder.embedding.weight}
    for part, parameter in encoder.transform.named_parameters():
        theirs[f"{name}.mlp.mlp.{part}"] = parameter
    measure("logits", answers(model)[0], answers(reference)[0])
    measure("gradients", ours(model), gradients_of(reference, theirs))
    quietly(reference.save_pretrained, tmp_path)
    read = copy.deepcopy(base)
    pfs.load(read, tmp_path)
    measure("file", answers(read)[0], answers(reference)[0])


@pytest.mark.parametrize("architecture", ["bart", "doge"])
def test_a_prefix_that_would_compute_something_else_is_refused(architecture, tmp_path):
    """PEFT puts it into the cache, from which these models number and mask tokens."""
    base = other(architecture)
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    theirs = quietly(peft.get_peft_model, copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    with refused(base, "a prefix on", "differs by"):
        pfs.load(base, tmp_path)
