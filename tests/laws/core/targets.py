"""Laws of the choice of modules by presets and patterns."""

from architectures import build
from model_state import refused

import peft_from_scratch as pfs
from peft_from_scratch.core.targets import resolve

# Read off the model cards' architecture listings: (attention, mlp) of layer 0.
GATED = (
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
)
EXPECTED = {
    "llama": ("model.layers", *GATED),
    "gpt2": (
        "transformer.h",
        ["attn.c_attn", "attn.c_proj"],
        ["mlp.c_fc", "mlp.c_proj"],
    ),
    "qwen": ("model.layers", *GATED),
    "opt": (
        "model.decoder.layers",
        [
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.q_proj",
            "self_attn.out_proj",
        ],
        ["fc1", "fc2"],
    ),
    "gemma": ("model.layers", *GATED),
}


def names(architecture, *parts):
    root = EXPECTED[architecture][0]
    return [f"{root}.{layer}.{part}" for layer in (0, 1) for part in parts]


def all_linear_is_every_projection_and_no_head(architecture="llama"):
    _, attention, mlp = EXPECTED[architecture]
    found = resolve(build(architecture), "all-linear")
    assert list(found) == names(architecture, *attention, *mlp)


def a_typo_inside_a_list_is_refused():
    model = build("llama")
    words = ("'q_prj'", "q_proj", "down_proj", "lm_head", "all-linear")
    with refused(model, *words):
        pfs.lora.inject(model, targets=["v_proj", "q_prj"])
