"""What a file from a stranger may not do: every kind of broken file, one by one.

After each refusal the model is compared bit for bit with what it was before.
"""

import math

import pytest
import torch
from adapter_files import (
    FIRST,
    LAST,
    MODULE,
    A,
    B,
    add,
    drop,
    one,
    put,
    saved,
    say,
    tampered,
    trained,
)
from architectures import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from observe import assert_same, refused, snapshot

import peft_from_scratch as pfs
from peft_from_scratch import exchange
from peft_from_scratch.adapter import adapters
from peft_from_scratch.exchange import CONFIG, WEIGHTS

# name -> (change of a sound LoRA file, words that the error holds)
BROKEN = {
    "no tensor": (lambda tensors, config: tensors.clear(), ["lacks"]),
    "no A": (drop(FIRST + A), ["lacks", FIRST + A]),
    "no B": (drop(LAST + B), ["lacks", LAST + B]),
    "no A and no B": (drop(LAST + A, LAST + B), ["lacks", "layers.1.mlp.down_proj"]),
    "extra bias": (add(norm__bias=32), ["norm.bias"]),
    "extra kind": (add(layers__0__mlp__up_proj__lora_C=(4, 4)), ["lora_C"]),
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
    "integers": (put(FIRST + A, lambda t: t.int()), [FIRST + A]),
    "beyond float32": (
        put(FIRST + A, lambda t: t.double().fill_(1e300)),
        [FIRST + A, "float32"],
    ),
    "rank 0": (say(r=0), ["r=0"]),
    "a huge rank": (say(r=10**9), ["1000000000"]),
    "rank as text": (say(r="4"), ["'4'"]),
    "alpha as text": (say(lora_alpha="8"), ["'8'"]),
    "alpha NaN": (say(lora_alpha=math.nan), ["nan"]),
    "alpha null": (say(lora_alpha=None), ["alpha=None"]),
    "dropout": (say(lora_dropout=1.5), ["1.5"]),
    "bias": (say(bias="some"), ["some", "lora_only"]),
    "rslora as text": (say(use_rslora="no"), ["'no'"]),
    "pattern no regex": (say(rank_pattern={"(": 4}), ["'('", "regex"]),
    "pattern a list": (say(rank_pattern=["q_proj"]), ["q_proj", "mapping"]),
    "targets no regex": (say(target_modules="("), ["'('", "regex"]),
    "targets a number": (say(target_modules=3), ["3"]),
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
    "use_dora": [True],
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
BROKEN_FULL = {
    "lacks": (drop(f"{MODULE}norm.weight"), ["lacks", "norm.weight"]),
    "extra": (add(other__weight=(4, 4)), ["other.weight"]),
    "misshapen": (put(f"{MODULE}embed_tokens.weight", torch.t), ["(32, 320)"]),
    "NaN": (put(f"{MODULE}embed_tokens.weight", one(math.nan)), ["embed_tokens"]),
    "field": (say(r=4), ["r=4"]),
}


def a_broken_file_is_refused(folder, name):
    change, words = BROKEN[name]
    model = build("llama")
    with refused(model, *words):
        pfs.load(model, tampered(saved(folder), folder / "broken", change))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(name, tmp_path):
    a_broken_file_is_refused(tmp_path, name)


@pytest.mark.parametrize("name", BROKEN_FULL)
def test_a_broken_file_of_full_fine_tuning_is_refused(name, tmp_path):
    change, words = BROKEN_FULL[name]
    model, sound = build("llama"), saved(tmp_path, method=pfs.full)
    with refused(model, *words):
        pfs.load(model, tampered(sound, tmp_path / "broken", change))


BYTES = {
    "no JSON": (CONFIG, b"{'peft_type': 'LORA'}"),
    "a list": (CONFIG, b"[]"),
    "an empty config": (CONFIG, b""),
    "no text": (CONFIG, b"\xff\xfe\x00"),
    "too deep": (CONFIG, b"[" * 100_000),
    "empty weights": (WEIGHTS, b""),
    "a pickle": (WEIGHTS, b"\x80\x04\x95cos\nsystem\n"),
    "a huge header": (WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"),
}


@pytest.mark.parametrize("what", BYTES)
def test_bytes_that_are_no_such_file_are_refused(what, tmp_path):
    file, content = BYTES[what]
    (saved(tmp_path) / file).write_bytes(content)
    model = build("llama")
    with refused(model, file):
        pfs.load(model, tmp_path)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_half_a_file_is_refused_and_a_missing_one_named(file, tmp_path):
    path, model = saved(tmp_path) / file, build("llama")
    path.write_bytes(path.read_bytes()[:-40])
    with refused(model, file):
        pfs.load(model, tmp_path)
    path.unlink()
    with refused(model, file, "does not exist", error=FileNotFoundError):
        pfs.load(model, tmp_path)


KNOWN = [*pfs.lora.FIELDS.values(), *pfs.lora.INERT, *exchange.METADATA]
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


@settings(
    deadline=None,
    max_examples=100,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.dictionaries(st.sampled_from(sorted(KNOWN)), st.sampled_from(JUNK), min_size=1)
)
def test_any_config_loads_or_is_refused(tmp_path, fields):
    if not (tmp_path / CONFIG).exists():
        saved(tmp_path)
    model = build("llama")
    before = snapshot(model)
    try:
        pfs.load(model, tampered(tmp_path, tmp_path / "junk", say(**fields)))
    except ValueError:
        assert_same(snapshot(model), before)
    else:
        assert len(adapters(model)) == 14


def test_a_file_for_another_architecture_is_refused(tmp_path):
    model = build("gpt2")
    with refused(model, "GPT2LMHeadModel", "another model"):
        pfs.load(model, saved(tmp_path))


def test_loading_onto_adapters_is_refused(tmp_path):
    model = trained()
    with refused(model, "already", "remove()"):
        pfs.load(model, saved(tmp_path))
