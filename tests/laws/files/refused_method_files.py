"""Broken files of the other methods, each of which is refused."""

import copy
import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from adapter_files import drop, one, put, say, tampered
from model_state import refused, train
from planting import law

import peft_from_scratch as pfs
from laws.core.contract import original
from peft_from_scratch.methods import bitfit, dora, houlsby, ia3, prefix, prompt

KEPT = TemporaryDirectory()  # until the process ends
P = "prompt_embeddings"
K = "base_model.model.model.layers.0.self_attn.k_proj."
DOWN = "base_model.model.model.layers.1.mlp.down_proj."
BIAS = "base_model.model.model.decoder.layers.0.self_attn.q_proj.bias"
M = "lora_magnitude_vector"
# name -> (architecture, how to inject)
SOUND = {
    "prompt": ("llama", lambda m: prompt.inject(m, n=3)),
    "prefix": ("llama", lambda m: prefix.inject(m, n=3)),
    "houlsby": ("llama", lambda m: houlsby.inject(m, m=4)),
    "ia3": ("llama", ia3.inject),
    "dora": ("llama", lambda m: dora.inject(m, r=4, alpha=8)),
    "bitfit": ("opt", bitfit.inject),
}


def more(**tensors):
    """Tensors of ones; dots are written as double underscores."""

    def apply(held, config):
        for name, shape in tensors.items():
            held[name.replace("__", ".")] = torch.ones(shape)

    return apply


def no(field):
    return lambda tensors, config: config.pop(field)


def moved(old, new):
    """Every key with `old` in it says `new` there."""

    def apply(tensors, config):
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return apply


def longer(key, dim=0):
    return put(key, lambda t: torch.cat([t, t.narrow(dim, 0, 1)], dim))


OUTSIDE = "base_model.model.../../../etc/passwd."
# method -> name -> (change of a sound file, words that the error holds)
IN_FRONT = {
    "one row more": (longer(P), [P, "(4, ", "(3, "]),
    "one column less": (put(P, lambda t: t[:, :-1]), [P, "this model"]),
    "a row to be broadcast": (put(P, lambda t: t[:1]), [P, "(1, "]),
    "transposed": (put(P, torch.t), [P, "this model"]),
    "NaN": (put(P, one(math.nan)), [P, "not finite"]),
    "infinite": (put(P, one(math.inf)), [P, "not finite"]),
    "integers": (put(P, lambda t: t.int()), [P, "int32"]),
    "nothing": (lambda tensors, config: tensors.clear(), ["lacks", P]),
    "another name": (moved(P, "prompt_embedding"), ["lacks", P]),
    "one tensor more": (more(base_model__model__x=3), ["base_model.model.x"]),
    "a LoRA's tensor": (
        more(**{K.replace(".", "__") + "lora_A__weight": (4, 32)}),
        [K],
    ),
    "a module outside": (more(**{OUTSIDE.replace(".", "__") + "x": 3}), ["etc/passwd"]),
    "n too large": (say(num_virtual_tokens=10**9), ["n=1000000000", "255"]),
    "n beyond the positions": (say(num_virtual_tokens=256), ["n=256", "255"]),
    "n negative": (say(num_virtual_tokens=-1), ["n=-1"]),
    "n zero": (say(num_virtual_tokens=0), ["n=0"]),
    "n a bool": (say(num_virtual_tokens=True), ["n=True"]),
    "n null": (say(num_virtual_tokens=None), ["n=None"]),
    "no n": (no("num_virtual_tokens"), ["n=None"]),
    "n as text": (say(num_virtual_tokens="3"), ["n='3'"]),
    "n a fraction": (say(num_virtual_tokens=3.0), ["n=3.0"]),
    "n another": (say(num_virtual_tokens=2), ["(3, ", "(2, "]),
    "a field of 2030": (say(a_field_of_2030=1), ["a_field_of_2030"]),
    "modules to save": (say(modules_to_save=["lm_head"]), ["modules_to_save"]),
}
MODULES = {
    "unknown module": (
        moved("layers.0.self_attn", "layers.7.self_attn"),
        ["layers.7", "does not have"],
    ),
    "a module outside": (
        moved("base_model.model.model.layers.0.self_attn.", OUTSIDE),
        ["etc/passwd", "does not have"],
    ),
    "a field of 2030": (say(a_field_of_2030="x"), ["a_field_of_2030"]),
    "targets a number": (say(target_modules=3), ["3"]),
    "unknown type": (say(peft_type="IA4"), ["IA4", "IA3", "HOULSBY", "PREFIX_TUNING"]),
    "a type of lower case": (say(peft_type="ia3"), ["'ia3'"]),
}
BROKEN = {
    "prompt": IN_FRONT
    | {
        "another width": (put(P, lambda t: t[:, :16]), ["(3, 16)", "(3, 32)"]),
        "two submodules": (say(num_transformer_submodules=2), ["submodules=2"]),
        "submodules as text": (say(num_transformer_submodules="1"), ["submodules='1'"]),
        "said to be a prefix": (say(peft_type="PREFIX_TUNING"), ["prompt_tuning_init"]),
    },
    "prefix": IN_FRONT
    | {
        "another width": (put(P, lambda t: t[:, :32]), ["(3, 32)", "(3, 64)"]),
        "said to be a prompt": (
            say(peft_type="PROMPT_TUNING"),
            ["encoder_hidden_size"],
        ),
    },
    "houlsby": MODULES
    | {
        "one unit more": (longer(f"{DOWN}down.weight"), ["(5, 32)", "(4, 32)"]),
        "transposed": (put(f"{DOWN}up.weight", torch.t), ["(4, 32)", "(32, 4)"]),
        "NaN": (put(f"{DOWN}up.bias", one(math.nan)), [DOWN, "not finite"]),
        "no bias": (drop(f"{DOWN}up.bias"), ["lacks", f"{DOWN}up.bias"]),
        "one tensor more": (more(**{f"{DOWN}side".replace(".", "__"): 4}), ["side"]),
        "m zero": (say(bottleneck_size=0), ["m=0", "32"]),
        "m negative": (say(bottleneck_size=-4), ["m=-4"]),
        "m huge": (say(bottleneck_size=10**12), ["m=1000000000000"]),
        "m a bool": (say(bottleneck_size=True), ["m=True"]),
        "m as text": (say(bottleneck_size="4"), ["m='4'"]),
        "no m": (no("bottleneck_size"), ["m=None"]),
        "m another": (say(bottleneck_size=5), ["(4, 32)", "(5, 32)"]),
        "nonlinearity unknown": (say(non_linearity="exec"), ["'exec'", "gelu"]),
        "nonlinearity a list": (say(non_linearity=["gelu"]), ["['gelu']"]),
        "nonlinearity null": (say(non_linearity=None), ["None", "gelu"]),
        "an embedding": (
            lambda tensors, config: (
                moved("layers.0.self_attn.o_proj", "embed_tokens")(tensors, config),
                config.pop("target_modules"),
            ),
            ["Embedding"],
        ),
    },
    "ia3": MODULES
    | {
        "one number more": (longer(f"{K}ia3_l"), ["(17, 1)", "(16, 1)"]),
        "lying": (put(f"{K}ia3_l", torch.t), ["(1, 16)", "(16, 1)"]),
        "NaN": (put(f"{K}ia3_l", one(math.nan)), [K, "not finite"]),
        "one vector less": (drop(f"{K}ia3_l"), ["lacks", "k_proj"]),
        "one tensor more": (more(**{f"{K}ia3_m".replace(".", "__"): 4}), ["ia3_m"]),
        "no feedforward": (say(feedforward_modules=None), ["(1, 48)", "(32, 1)"]),
        "feedforward a number": (say(feedforward_modules=3), ["feedforward_modules=3"]),
        "feedforward a dict": (
            say(feedforward_modules={"x": 1}),
            ["feedforward_modules"],
        ),
        "feedforward no regex": (say(feedforward_modules="("), ["'('"]),
        "feedforward that takes years": (
            say(feedforward_modules=r"(([a-z_.0-9]+)+)+!"),
            ["more than"],
        ),
        "feedforward of another": (say(feedforward_modules=["k_proj"]), ["ia3_l"]),
        "modules to save": (say(modules_to_save=["lm_head"]), ["modules_to_save"]),
    },
    "dora": {
        "no magnitude": (drop(K + M), ["lacks", K + M]),
        "one number more": (longer(K + M), ["(17,)", "(16,)"]),
        "as a column": (put(K + M, lambda t: t[:, None]), ["(16, 1)", "(16,)"]),
        "NaN": (put(K + M, one(math.nan)), [M, "not finite"]),
        "said to be a LoRA": (say(use_dora=False), [M]),
        "use_dora as text": (say(use_dora="yes"), ["use_dora"]),
        "use_dora 1": (say(use_dora=1), ["use_dora"]),
        "rank 0": (say(r=0), ["r=0"]),
        "started as pissa": (say(init_lora_weights="pissa"), ["init_lora_weights"]),
        "a module outside": (moved(K, OUTSIDE), ["etc/passwd", "does not have"]),
    },
    "bitfit": {
        "one bias less": (drop(BIAS), ["lacks", BIAS]),
        "one number more": (longer(BIAS), ["(33,)", "(32,)"]),
        "NaN": (put(BIAS, one(math.nan)), [BIAS, "not finite"]),
        "a weight as well": (
            more(**{BIAS.replace("bias", "weight").replace(".", "__"): (32, 32)}),
            ["q_proj.weight"],
        ),
        "a module outside": (moved(BIAS, OUTSIDE + "bias"), ["lacks", BIAS]),
        "a field": (say(r=4), ["r=4"]),
    },
}
CASES = [(method, name) for method, broken in BROKEN.items() for name in broken]


@cache
def sound(method):
    """A folder with the file of a trained model."""
    architecture, inject = SOUND[method]
    model, folder = copy.deepcopy(original(architecture)), Path(KEPT.name, method)
    inject(model)
    train(model, 2)
    pfs.save(model, folder)
    return folder


@law
@pytest.mark.parametrize("method, name", CASES)
def a_broken_file_is_refused(folder, method, name):
    change, words = BROKEN[method][name]
    model = copy.deepcopy(original(SOUND[method][0]))
    with refused(model, *words):
        pfs.load(model, tampered(sound(method), folder / "broken", change))
