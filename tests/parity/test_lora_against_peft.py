"""LoRA against Hugging Face PEFT: modules, logits, gradients, steps, files both ways.

Both start from the same base. PEFT draws A and B and we read its file; the other way
round we write and PEFT reads. Every difference is then one of computation.
"""

import copy
import warnings

import pytest
import torch
from against import our_name, quietly
from architectures import CONFIGS, build
from model_state import gradients, largest, logits, loss, refused, tokens, train, values

import peft_from_scratch as pfs
from peft_from_scratch.core.adapter import adapters

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.jit.script:DeprecationWarning"),
]

LIST = ["q_proj", "o_proj", "out_proj", "c_attn"]
REGEX = r".*\.(q_proj|up_proj|c_attn|c_fc|fc1)"
PATTERN = {r".*\.0\..*": 2, "o_proj|c_fc|fc2": 6}
BIASED = ("gpt2", "opt")
BF16 = 0.1  # 8 bits of mantissa, two layers and back, some ReLUs flipped
GATED = ("llama", "qwen", "gemma")

# name -> (our arguments, peft's arguments, the architectures that have such modules)
CASES = {
    "all-linear": ({}, {}, CONFIGS),
    "rslora": ({"rslora": True}, {"use_rslora": True}, CONFIGS),
    "regex": ({"targets": REGEX}, {"target_modules": REGEX}, CONFIGS),
    "list": (
        {"targets": ["v_proj", "down_proj"]},
        {"target_modules": ["v_proj", "down_proj"]},
        GATED,
    ),
    "list-conv1d": (
        {"targets": ["c_attn", "c_proj"]},
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        ("gpt2",),
    ),
    "exclude": (
        {"exclude": ["v_proj", "up_proj"]},
        {"exclude_modules": ["v_proj", "up_proj"]},
        GATED,
    ),
    "rank_pattern": ({"rank_pattern": PATTERN}, {"rank_pattern": PATTERN}, CONFIGS),
    "alpha_pattern": ({"alpha_pattern": PATTERN}, {"alpha_pattern": PATTERN}, CONFIGS),
    "bias-lora_only": ({"bias": "lora_only"}, {"bias": "lora_only"}, BIASED),
    "bias-all": ({"bias": "all"}, {"bias": "all"}, BIASED),
    "dropout": ({"dropout": 0.4}, {"lora_dropout": 0.4}, CONFIGS),
    "head": (  # on an untied model
        {"targets": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        ("llama",),
    ),
}
ROWS = [
    pytest.param(architecture, ours, theirs, id=f"lora_{name}-{architecture}")
    for name, (ours, theirs, architectures) in CASES.items()
    for architecture in architectures
]


def of_peft(base, arguments):
    """PEFT's model with random A, B and moved biases."""
    config = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6} | arguments
    config = peft.LoraConfig(**config, init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(7)
    model = quietly(peft.get_peft_model, copy.deepcopy(base), config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def trained_by_peft(model):
    named = model.named_parameters()
    return {our_name(name): p for name, p in named if p.requires_grad}


def peft_gradients(model):
    model.zero_grad()
    torch.manual_seed(0)
    loss(model).backward()
    return {name: p.grad for name, p in trained_by_peft(model).items()}


def three_steps(model, parameters):
    """Momentum rather than Adam, which blows rounding noise up to whole steps."""
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9)
    model.train()
    torch.manual_seed(0)
    for step in range(3):
        optimizer.zero_grad()
        loss(model, tokens(seed=step)).backward()
        optimizer.step()
    return {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize("architecture, ours, theirs", ROWS)
def test_reading_pefts_file_gives_its_model(
    architecture, ours, theirs, tmp_path, measure
):
    base = build(architecture)
    reference, model = of_peft(base, theirs), copy.deepcopy(base)
    reference.save_pretrained(tmp_path, save_embedding_layers=False)
    pfs.load(model, tmp_path)
    measure("logits", logits(model), logits(reference))
    measure("gradients", gradients(model), peft_gradients(reference))
    measure("in training", gradients(model.train()), peft_gradients(reference.train()))
    stepped = three_steps(reference, trained_by_peft(reference))
    measure("3 steps", three_steps(model, pfs.trainable(model)), stepped)


@pytest.mark.parametrize("architecture, ours, theirs", ROWS)
def test_peft_reads_our_file(architecture, ours, theirs, tmp_path, measure):
    base = build(architecture)
    selected = {
        our_name(name).rpartition(".")[0]
        for name in trained_by_peft(of_peft(base, theirs))
        if name.endswith(".A")
    }
    model = copy.deepcopy(base)
    assert set(pfs.lora.inject(model, r=4, alpha=6, **ours)) == selected
    train(model, 2)
    pfs.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a missing or unexpected key
        reference = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    written, read = values(model), trained_by_peft(reference)
    assert set(adapters(model)) == selected
    assert all(torch.equal(read[name], written[name]) for name in written)
    measure("file", logits(model), logits(reference.eval()))


@pytest.mark.parametrize("architecture", CONFIGS, ids="lora-{}".format)
def test_merged_weights_equal_pefts(architecture, tmp_path, measure):
    base = build(architecture)
    reference, model = of_peft(base, {}), copy.deepcopy(base)
    reference.save_pretrained(tmp_path)
    pfs.load(model, tmp_path)
    pfs.merge(model)
    merged = reference.merge_and_unload().state_dict()
    measure("merged weights", model.state_dict(), merged, allowed=1e-6)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_half_precision_and_autocast_stay_close(architecture, tmp_path, measure):
    base = build(architecture)
    reference, model = of_peft(base, {}), copy.deepcopy(base)
    reference.save_pretrained(tmp_path)
    pfs.load(model, tmp_path)
    exact = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = gradients(model), peft_gradients(reference)
    measure("autocast gradients, from float32", ours, exact, allowed=2 * BF16)
    measure("autocast gradients", ours, theirs, allowed=2 * BF16)  # PEFT rounds twice
    half, reference = base.bfloat16(), copy.deepcopy(base).bfloat16()
    pfs.load(half, tmp_path)
    reference = peft.PeftModel.from_pretrained(reference, tmp_path, is_trainable=True)
    measure("bf16 base, logits", logits(half), logits(reference), allowed=BF16)
    ours, theirs = gradients(half), peft_gradients(reference.eval())
    measure("bf16 base, gradients", ours, theirs, allowed=BF16)


def test_a_file_with_a_copy_of_the_head_loads_on_its_base_only(tmp_path, measure):
    """PEFT adds the head's own weight where the head is a target; it is frozen."""
    base, other = build("llama"), build("llama", seed=1)
    reference = of_peft(base, {"target_modules": ["lm_head"]})
    quietly(reference.save_pretrained, tmp_path)
    with refused(other, "lm_head.base_layer.weight"):
        pfs.load(other, tmp_path)
    pfs.load(base, tmp_path)
    measure("logits", logits(base), logits(reference))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("r", [17, 32, 100])
def test_a_rank_above_the_sides_of_a_weight_is_read_and_written(r, use_dora, tmp_path):
    """k_proj is 16 x 32. PEFT knows no upper end, and its files are sound."""
    config = peft.LoraConfig(
        r=r,
        target_modules=["k_proj"],
        init_lora_weights=False,
        use_dora=use_dora,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(build("llama"), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = build("llama")
    pfs.load(model, tmp_path / "theirs")
    assert largest(logits(model), logits(theirs)) < 1e-6
    pfs.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours").eval()
    assert largest(logits(again), logits(model)) < 1e-6
    pfs.merge(model)
    assert largest(logits(model), logits(theirs)) < 1e-5
