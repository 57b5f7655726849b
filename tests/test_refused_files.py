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
from planting import law

import peft_from_scratch as pfs
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.files import exchange
from peft_from_scratch.files.adapter_file import CONFIG, WEIGHTS
from peft_from_scratch.files.formats import LORA, METADATA, PREFIX

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
BROKEN_FULL = {
    "lacks": (drop(f"{MODULE}norm.weight"), ["lacks", "norm.weight"]),
    "extra": (add(other__weight=(4, 4)), ["other.weight"]),
    "misshapen": (put(f"{MODULE}embed_tokens.weight", torch.t), ["(32, 320)"]),
    "NaN": (put(f"{MODULE}embed_tokens.weight", one(math.nan)), ["embed_tokens"]),
    "field": (say(r=4), ["r=4"]),
}


@law
@pytest.mark.parametrize("name", BROKEN)
def a_broken_file_is_refused(folder, name):
    change, words = BROKEN[name]
    model = build("llama")
    with refused(model, *words):
        pfs.load(model, tampered(saved(folder), folder / "broken", change))


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


KNOWN = [*LORA.fields.values(), *LORA.ignored, *LORA.supported, *METADATA]
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


@pytest.mark.parametrize("what", ["a file", "a folder", "a link to itself"])
def test_paths_that_are_no_adapter_folder_are_refused(what, tmp_path):
    model, folder = build("llama"), saved(tmp_path / "sound")
    if what == "a file":
        folder = folder / WEIGHTS
    else:
        (folder / CONFIG).unlink()
    if what == "a folder":
        (folder / CONFIG).mkdir()
    if what == "a link to itself":
        (folder / CONFIG).symlink_to(CONFIG)
    with refused(model, CONFIG, "name the folder", error=FileNotFoundError):
        pfs.load(model, folder)


def test_layers_that_peft_left_out_are_named_by_their_field(tmp_path):
    """The reason is the field, not the tensors that are missing because of it."""

    def one_layer(tensors, config):
        config["layers_to_transform"] = [1]
        for key in [key for key in tensors if ".layers.0." in key]:
            del tensors[key]

    model = build("llama")
    with refused(model, "layers_to_transform"):
        pfs.load(model, tampered(saved(tmp_path), tmp_path / "broken", one_layer))


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


def test_a_copy_of_the_base_beside_an_adapted_head_is_let_through(tmp_path):
    """PEFT writes it on its own account, save_embedding_layers="auto"."""
    model = build("llama")
    head = {f"{PREFIX}lm_head.base_layer.weight": model.lm_head.weight}

    def with_head(tensors, config):
        tensors |= {key: value.detach().clone() for key, value in head.items()}

    saved(tmp_path, targets=["all-linear", "lm_head"])
    pfs.load(model, tampered(tmp_path, tmp_path / "copied", with_head))
    assert "lm_head" in adapters(model)


def test_loading_onto_adapters_is_refused(tmp_path):
    model = trained()
    with refused(model, "already", "remove()"):
        pfs.load(model, saved(tmp_path))
