"""Broken LoRA files, each of which is refused."""

import math

import pytest
import torch
from adapter_files import (
    FIRST,
    LAST,
    A,
    B,
    add,
    drop,
    one,
    put,
    saved,
    say,
    tampered,
)
from architectures import build
from model_state import refused
from planting import law

import peft_from_scratch as pfs
from peft_from_scratch.files import exchange

HEAD = "base_model.model.lm_head."
# A regex that tries every way to cut a name in pieces before it fails.
YEARS = r"(([a-z_.0-9]+)+)+!"


def rename(tensors, start, old, new):
    for key in [key for key in tensors if key.startswith(start)]:
        tensors[key.replace(old, new)] = tensors.pop(key)


def add_under(key):
    """A tensor of the head's shape, but not with its values, under a key."""
    return lambda tensors, config: tensors.update({key: torch.ones(320, 32)})


# name -> (change of a sound LoRA file, words that the error holds)
BROKEN = {
    "no tensor": (lambda tensors, config: tensors.clear(), ["lacks"]),
    "no A": (drop(FIRST + A), ["lacks", FIRST + A]),
    "no B": (drop(LAST + B), ["lacks", LAST + B]),
    "no A and no B": (drop(LAST + A, LAST + B), ["lacks", "layers.1.mlp.down_proj"]),
    "extra bias": (add(norm__bias=32), ["norm.bias"]),
    "extra kind": (add(layers__0__mlp__up_proj__lora_C=(4, 4)), ["lora_C"]),
    "another head": (add_under(f"{HEAD}base_layer.weight"), ["lm_head"]),
    "no prefix": (
        lambda tensors, config: tensors.update({A: tensors[FIRST + A].clone()}),
        [A],
    ),
    "unknown module": (
        add(layers__7__x__lora_A__weight=(4, 32)),
        ["layers.7.x", "does not have"],
    ),
    "embedding": (
        add(
            embed_tokens__lora_A__weight=(4, 32),
            embed_tokens__lora_B__weight=(320, 4),
        ),
        ["Embedding"],
    ),
    "norm": (add(norm__lora_A__weight=(4, 32)), ["RMSNorm"]),
    "transposed": (put(FIRST + A, torch.t), ["(32, 4)", "(4, 32)"]),
    "broadcastable": (put(FIRST + B, lambda t: t[:1]), ["(1, 4)", "(32, 4)"]),
    "one dimension": (put(FIRST + A, lambda t: t[0]), ["(32,)"]),
    "another rank": (say(r=5), ["(4, 32)", "(5, 32)"]),
    "NaN": (put(FIRST + A, one(math.nan)), [FIRST + A, "not finite"]),
    "infinite": (put(LAST + B, one(-math.inf)), [LAST + B, "not finite"]),
    "integers": (put(FIRST + A, lambda t: t.int()), [FIRST + A, "int32", "float32"]),
    "eight bits": (
        put(FIRST + A, lambda t: t.to(torch.float8_e5m2)),
        [FIRST + A, "float8_e5m2", "float32"],
    ),
    "beyond float32": (
        put(FIRST + A, lambda t: t.double().fill_(1e300)),
        [FIRST + A, "float32"],
    ),
    "rank 0": (say(r=0), ["r=0"]),
    "a huge rank": (say(r=10**9), ["1000000000"]),
    "a rank larger than the tensors": (say(r=65536), ["(4, 32)", "(65536, 32)"]),
    "rank as text": (say(r="4"), ["'4'"]),
    "alpha as text": (say(lora_alpha="8"), ["'8'"]),
    "alpha NaN": (say(lora_alpha=math.nan), ["nan"]),
    "alpha null": (say(lora_alpha=None), ["alpha=None"]),
    "alpha beyond float32": (say(lora_alpha=1e308), ["1e+308", "float32"]),
    "alpha beyond any float": (say(lora_alpha=10**400), ["alpha=1000", "float32"]),
    "alphas beyond any float": (
        say(alpha_pattern={"q_proj": 10**400}),
        ["q_proj: alpha=1000"],
    ),
    "a long value": (say(a_field_of_2030="x" * 10**6), ["a_field_of_2030", "xxx…"]),
    "dropout": (say(lora_dropout=1.5), ["1.5"]),
    "bias": (say(bias="some"), ["some", "lora_only"]),
    "rslora as text": (say(use_rslora="no"), ["'no'"]),
    "targets that take years": (say(target_modules=YEARS), ["more than", "names"]),
    "exclusions that take years": (say(exclude_modules=YEARS), ["more than"]),
    "a pattern that takes years": (say(rank_pattern={YEARS: 4}), ["more than"]),
    "nested too deep": (say(target_modules="(" * 5000 + ")" * 5000), ["regex"]),
    "too often": (say(target_modules="a{99999999999999999999}"), ["regex"]),
    "pattern no regex": (say(rank_pattern={"(": 4}), ["'('", "regex"]),
    "pattern a list": (say(rank_pattern=["q_proj"]), ["q_proj", "mapping"]),
    "targets no regex": (say(target_modules="("), ["'('", "regex"]),
    "another kind of tensor": (
        lambda tensors, config: rename(tensors, FIRST, "lora_", "lora_embedding_"),
        ["q_proj", "lora_embedding_A"],
    ),
    "targets a number": (say(target_modules=3), ["3"]),
    "DoRA without lengths": (say(use_dora=True), ["lacks", "lora_magnitude_vector"]),
    "unknown type": (say(peft_type="LOHA"), ["LOHA", "LORA"]),
    "type a list": (say(peft_type=["LORA"]), ["peft_type"]),
    "no type": (lambda tensors, config: config.pop("peft_type"), ["peft_type"]),
}
# Fields of PEFT, and of its future, that this library does not implement.
UNIMPLEMENTED = {
    "layers_to_transform": [0, [0], [0, 1]],
    "layers_pattern": ["layers"],
    "modules_to_save": [["lm_head"]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [0]}],
    "lora_bias": [True],
    "layer_replication": [[[0, 2]]],
    "use_qalora": [True],
    "target_parameters": [["experts.w"]],
    "loftq_config": [{"loftq_bits": 4}],
    "alora_invocation_tokens": [[5]],
    "megatron_config": [{"a": 1}],
    "a_field_of_2030": [1, 0, "yes", {"x": None}],
}
BROKEN |= {
    f"{field}={value}": (say(**{field: value}), [field])
    for field, values in UNIMPLEMENTED.items()
    for value in values
}
# Ways to start that move part of the base into the adapter.
STARTS = "pissa pissa_niter_4 olora corda loftq mica lora_ga".split()
BROKEN |= {
    start: (say(init_lora_weights=start), ["init_lora_weights", start])
    for start in STARTS
}


@law
@pytest.mark.parametrize("name", BROKEN)
def a_broken_file_is_refused(folder, name):
    change, words = BROKEN[name]
    model = build("llama")
    with refused(model, *words):
        pfs.load(model, tampered(saved(folder), folder / "broken", change))


JUNK = [
    None,
    True,
    0,
    -1,
    3,
    2.5,
    math.inf,
    "",
    "x",
    "(",
    [],
    ["x"],
    [[1]],
    {},
    {"x": 1},
]


@law
def a_failure_after_the_copy_leaves_no_trace(folder, monkeypatch):
    model = build("opt")
    saved(folder, architecture="opt", bias="all")
    sound, asked = exchange._probe, []

    def fails_the_second_time(model):
        asked.append(1)
        if len(asked) == 2:
            raise RuntimeError("planted")
        return sound(model)

    monkeypatch.setattr(exchange, "_probe", fails_the_second_time)
    with refused(model, "planted", error=RuntimeError):
        pfs.load(model, folder)
