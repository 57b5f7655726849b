"""The formula of what a layer keeps is what torch hands to its saved-tensor hooks."""

import pytest
import torch
from architectures import build
from planting import Bug, each_is_caught, law
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, Qwen2Config

from peft_from_scratch.core import adapter
from peft_from_scratch.memory import activations
from peft_from_scratch.memory.activations import a_layer, kept
from peft_from_scratch.memory.shapes import shape_of
from peft_from_scratch.memory.steps import NAMES, Step, Trains, lengthened
from peft_from_scratch.methods import named

BATCH, LENGTH = 2, 70  # with fewer than 64 tokens, LoRA computes otherwise
METHODS = {
    "full": {},
    "lora": {},
    "lora, attention": {"targets": "attention"},
    "lora, mlp": {"targets": "mlp"},
    "dora": {},
    "houlsby": {"m": 8},
    "prompt": {"n": 5},
    "prefix": {"n": 5},
}


def saved_bytes(model, ids):
    """Bytes of the storages that autograd keeps, parameters and buffers left out."""
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


def case(architecture, attention, dtype, name):
    """(bytes that torch keeps, bytes by the formula)"""
    method = name.partition(",")[0]
    model = build(architecture, dtype=dtype)
    model.set_attn_implementation(attention)
    named(method).module.inject(model, **METHODS[name])
    ids = torch.randint(64, 320, (BATCH, LENGTH))
    adapted = {
        next(place for place in NAMES if full.endswith(place)): adapter.sizes(m.base)
        for full, m in adapter.adapters(model).items()
        if ".0." in full
    }
    low_rank = method in ("lora", "dora")
    sizes = (8 if low_rank else 0, *(METHODS[name].get(k, 0) for k in ("m", "n")))
    trains = Trains(method, adapted, *sizes)
    step = Step(BATCH, LENGTH, dtype.itemsize, attention)
    return saved_bytes(model, ids), kept(shape_of(model.config), step, trains)


@law
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def formula_is_what_torch_keeps(
    architecture="llama", attention="sdpa", dtype=torch.bfloat16, name="lora"
):
    real, formula = case(architecture, attention, dtype, name)
    if name == "dora":  # of the first layer, one vector of some projections is not kept
        assert formula == pytest.approx(real, rel=2e-3)
    else:
        assert formula == real


@law
@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def dropout_on_a_cpu_keeps_masks_and_probabilities(
    attention="sdpa", dtype=torch.bfloat16, name="full"
):
    sizes = dict(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=320)
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    assert config.resid_pdrop and config.attn_pdrop and config.embd_pdrop
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attention
    )
    named(name).module.inject(model)
    adapted = {} if name == "full" else dict.fromkeys(PROJECTIONS_OF_GPT2, (0, 0))
    trains = Trains(name, adapted, 8 if adapted else 0)
    step = Step(BATCH, LENGTH, dtype.itemsize, attention, device="cpu")
    ids = torch.randint(64, 320, (BATCH, LENGTH))
    assert saved_bytes(model, ids) == kept(shape_of(config), step, trains)


PROJECTIONS_OF_GPT2 = ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")


@pytest.mark.parametrize("kind", [MistralConfig, Qwen2Config])
def test_llamas_kin_keep_what_llama_keeps(kind):
    """Mistral without its window, and Qwen2, whose q, k and v have biases."""
    sizes = dict(hidden_size=64, intermediate_size=200, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=320)
    config = kind(**sizes, **heads, sliding_window=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    named("full").module.inject(model)
    ids = torch.randint(64, 320, (BATCH, LENGTH))
    formula = kept(shape_of(config), Step(BATCH, LENGTH, 2), Trains("full"))
    assert saved_bytes(model, ids) == formula


@law
def checkpointing_keeps_the_input_of_each_layer():
    shape = shape_of(build("llama").config)
    step = Step(BATCH, LENGTH, 2, checkpointing=True)
    bytes_, layer = (
        kept(shape, step, Trains("full")),
        a_layer(shape, step, Trains("full")),
    )
    inputs = shape.layers * 2 * shape.d * BATCH * LENGTH
    assert inputs < bytes_ < inputs + layer


@law
def scores_are_quadratic_only_where_they_are_written_out():
    shape, trains = shape_of(build("llama").config), Trains("full")
    for attention, power in (("sdpa", 2), ("eager", 3.5)):
        short, long = (
            a_layer(shape, Step(1, length, 2, attention), trains)
            for length in (2000, 4000)
        )
        assert long == 2 * short if power == 2 else long > power * short


def full_is_exact():
    formula_is_what_torch_keeps(name="full")


def written_out_is_exact():
    formula_is_what_torch_keeps(attention="eager")


def gpt2_is_exact():
    formula_is_what_torch_keeps("gpt2", name="full")


def lora_of_the_mlp_is_exact():
    formula_is_what_torch_keeps(name="lora, mlp")


def prompt_is_exact():
    formula_is_what_torch_keeps(name="prompt")


def prefix_is_exact():
    formula_is_what_torch_keeps(name="prefix")


def houlsby_is_exact():
    formula_is_what_torch_keeps(name="houlsby")


BUGS = {
    "keys and values counted for all heads": Bug(
        activations._attention,
        "(q if longer else k)",
        "q",
        full_is_exact,
    ),
    "row sums of attention forgotten": Bug(
        activations._attention, "4 * shape.heads,", "0,", full_is_exact
    ),
    "probabilities kept once": Bug(
        activations._attention,
        "s * pairs if s < 4 else 0",
        "0",
        written_out_is_exact,
    ),
    "a norm that keeps x in half precision": Bug(
        activations._llama, "4 * d + 4", "s * d + 4", full_is_exact
    ),
    "inputs of frozen weights counted": Bug(
        Trains.at,
        "any(NAMES[name] == place for name in self.adapted)",
        "True",
        lora_of_the_mlp_is_exact,
    ),
    "the first layer counted as the others": Bug(
        activations.tensors, "trains.begins if first else -1", "-1", houlsby_is_exact
    ),
    "z = x Aᵀ forgotten": Bug(
        activations._of_method,
        "(s if narrow else 4) * trains.r",
        "0",
        formula_is_what_torch_keeps,
    ),
    "GELU keeps its input alone": Bug(
        activations._gpt2, "shape.gelu * s", "s", gpt2_is_exact
    ),
    "masks of dropout forgotten": Bug(
        activations._gpt2,
        "2 * step.mask * d",
        "0",
        dropout_on_a_cpu_keeps_masks_and_probabilities,
    ),
    "a prompt of no tokens": Bug(
        lengthened, "step.length + n", "step.length", prompt_is_exact
    ),
    "a prefix without its mask": Bug(
        activations._of_method,
        "s * (step.length + trains.n) / step.batch",
        "0",
        prefix_is_exact,
    ),
    "checkpointing keeps everything": Bug(
        activations.kept,
        "if step.checkpointing:",
        "if False:",
        checkpointing_keeps_the_input_of_each_layer,
    ),
    "attention that is never quadratic": Bug(
        activations._attention,
        "shape.heads * (step.length + longer)",
        "shape.heads",
        scores_are_quadratic_only_where_they_are_written_out,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS)
