"""Files: round trips, and what a file from a stranger may not do."""

import copy
import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from architectures import CONFIGS, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from observe import assert_same, logits, refused, snapshot, train, values
from safetensors.torch import load_file, save_file

import peft_from_scratch as pfs
from peft_from_scratch import exchange
from peft_from_scratch.adapter import adapters
from peft_from_scratch.exchange import CONFIG, WEIGHTS

A, B = "lora_A.weight", "lora_B.weight"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj."
LAST = "base_model.model.model.layers.1.mlp.down_proj."


def trained(method="lora", architecture="llama", **arguments):
    model = build(architecture)
    if method == "full":
        pfs.full.inject(model)
    else:
        pfs.lora.inject(model, **{"r": 4, "alpha": 8} | arguments)
    train(model, 2)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{method: a folder with a sound file}, never written to."""
    folders = {}
    for method in ("lora", "full"):
        folders[method] = tmp_path_factory.mktemp(method)
        pfs.save(trained(method), folders[method])
    return folders


def contents(folder):
    """{path: (bytes, mode)} of everything in a folder."""
    return {
        str(path.relative_to(folder)): path.is_file() and path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
    }


def tampered(source, folder, change):
    """A copy of `source` after change(tensors, config)."""
    tensors = load_file(source / WEIGHTS)
    config = json.loads((source / CONFIG).read_text())
    change(tensors, config)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------- round trips


def a_round_trip_is_bit_equal(folder, architecture="llama", **arguments):
    model = trained(architecture=architecture, **arguments)
    pfs.save(model, folder)
    loaded = build(architecture)
    assert pfs.load(loaded, folder) == list(adapters(model))
    assert_same(values(loaded), values(model))
    assert torch.equal(logits(loaded), logits(model))
    before = contents(folder)
    pfs.save(loaded, folder)
    assert contents(folder) == before  # to the byte, though other hands saved it


VARIANTS = {
    "rslora": dict(rslora=True, alpha=3.5),
    "one module": dict(targets="layers.1.mlp.up_proj|h.1.mlp.c_fc|layers.1.fc1"),
    "function": dict(targets=lambda name, module: ".1." in name),
    "exclude": dict(exclude="layers.0.*|h.0.*"),
    "patterns": dict(
        rank_pattern={r".*\.0\..*": 2, "c_fc": 5},
        alpha_pattern={r".*\.1\..*": 2.5},
    ),
    "biases": dict(bias="all"),
    "head": dict(targets=["all-linear", "lm_head"]),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_round_trip(architecture, variant, tmp_path):
    a_round_trip_is_bit_equal(tmp_path, architecture, **VARIANTS[variant])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_on_other_precisions(dtype, tmp_path):
    model = build("gpt2", dtype=dtype)
    pfs.lora.inject(model, bias="all")
    for parameter in pfs.trainable(model).values():
        torch.nn.init.normal_(parameter)
    pfs.save(model, tmp_path)
    loaded = build("gpt2", dtype=dtype)
    pfs.load(loaded, tmp_path)
    assert_same(values(loaded), values(model))


def test_a_file_holds_the_adapter_and_nothing_else(saved):
    tensors = load_file(saved["lora"] / WEIGHTS)
    assert sorted(contents(saved["lora"])) == [CONFIG, WEIGHTS]
    assert len(tensors) == 2 * 14 and all(k.endswith((A, B)) for k in tensors)
    assert tensors[FIRST + A].shape == (4, 32) and tensors[LAST + B].shape == (32, 4)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size < (saved["lora"] / WEIGHTS).stat().st_size < size + 8192


def test_training_goes_on_after_loading_as_if_nothing_had_happened(saved):
    model, loaded = trained(), build("llama")
    pfs.load(loaded, saved["lora"])
    train(model, 2, seed=5)
    train(loaded, 2, seed=5)
    assert_same(values(loaded), values(model))


def an_adapter_that_does_nothing_warns(folder):
    model = build("llama")
    pfs.lora.inject(model)
    pfs.save(model, folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pfs.load(build("llama"), folder)
    assert any("changes no logit" in str(w.message) for w in caught)


def test_warning_for_an_untrained_adapter_only(tmp_path, saved):
    an_adapter_that_does_nothing_warns(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pfs.load(build("llama").train(), saved["lora"])


def test_loading_keeps_the_mode(saved):
    model = build("llama")
    model.model.layers[0].train()
    before = {name: m.training for name, m in model.named_modules()}
    pfs.load(model, saved["lora"])
    pfs.remove(model)
    assert {name: m.training for name, m in model.named_modules()} == before


# ---------------------------------------------------------------- refused files


def drop(*keys):
    return lambda tensors, config: [tensors.pop(key) for key in keys]


def put(key, change):
    def apply(tensors, config):
        tensors[key] = change(tensors[key]).contiguous()

    return apply


def add(key, shape=(4, 32)):
    return lambda tensors, config: tensors.update({key: torch.ones(shape)})


def say(**fields):
    return lambda tensors, config: config.update(fields)


def one(value):
    return lambda tensor: tensor.index_fill(0, torch.tensor([1]), value)


# name -> (change of a sound LoRA file, words that the error holds)
BROKEN = {
    "no tensor": (lambda tensors, config: tensors.clear(), ["lacks"]),
    "lacks an A": (drop(FIRST + A), ["lacks", FIRST + A]),
    "lacks a B": (drop(LAST + B), ["lacks", LAST + B]),
    "lacks a module": (drop(LAST + A, LAST + B), ["lacks", "1.mlp.down_proj"]),
    "extra tensor": (add("base_model.model.lm_head.weight"), ["lm_head.weight"]),
    "extra kind": (add(FIRST + "lora_C.weight"), [FIRST + "lora_C.weight"]),
    "extra bias": (add(FIRST + "base_layer.bias", (32,)), ["base_layer.bias"]),
    "other prefix": (add("model.layers.0.self_attn.q_proj." + A), ["model.layers.0"]),
    "no prefix": (add(A), [A]),
    "unknown module": (
        lambda t, c: t.update(
            {f"base_model.model.model.layers.7.x.{k}": t[FIRST + k] for k in (A, B)}
        ),
        ["model.layers.7.x", "does not have"],
    ),
    "embedding": (
        lambda t, c: t.update(
            {
                f"base_model.model.model.embed_tokens.{A}": torch.ones(4, 32),
                f"base_model.model.model.embed_tokens.{B}": torch.ones(320, 4),
            }
        ),
        ["Embedding"],
    ),
    "norm": (add(f"base_model.model.model.norm.{A}"), ["RMSNorm"]),
    "transposed": (put(FIRST + A, torch.t), ["(32, 4)", "(4, 32)"]),
    "broadcastable": (put(FIRST + B, lambda t: t[:1]), ["(1, 4)", "(32, 4)"]),
    "one dimension": (put(FIRST + A, lambda t: t[0]), ["(32,)"]),
    "other rank": (say(r=5), ["(4, 32)", "(5, 32)"]),
    "NaN": (put(FIRST + A, one(math.nan)), [FIRST + A, "not finite"]),
    "infinite": (put(LAST + B, one(-math.inf)), [LAST + B, "not finite"]),
    "integers": (put(FIRST + A, lambda t: t.int()), [FIRST + A]),
    "beyond fp32": (
        put(FIRST + A, lambda t: t.double().fill_(1e300)),
        [FIRST + A, "float32"],
    ),
    "rank 0": (say(r=0), ["r=0"]),
    "rank too large": (say(r=10**9), ["1000000000"]),
    "rank as text": (say(r="4"), ["'4'"]),
    "rank as a list": (say(r=[4]), ["[4]"]),
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
    "type unknown": (say(peft_type="LOHA"), ["LOHA", "LORA"]),
    "type a list": (say(peft_type=["LORA"]), ["peft_type"]),
    "type missing": (lambda t, c: c.pop("peft_type"), ["peft_type"]),
}
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
BROKEN |= {
    f"start {start}": (say(init_lora_weights=start), ["init_lora_weights", str(start)])
    for start in (
        "pissa",
        "pissa_niter_4",
        "olora",
        "corda",
        "loftq",
        "mica",
        "lora_ga",
    )
}


def broken_files_are_refused(name, source, folder):
    change, words = BROKEN[name]
    model = build("llama")
    with refused(model, *words):
        pfs.load(model, tampered(source, folder, change))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_and_the_model_untouched(name, saved, tmp_path):
    broken_files_are_refused(name, saved["lora"], tmp_path)


FULL = {
    "lacks": (drop("base_model.model.model.norm.weight"), ["model.norm.weight"]),
    "extra": (add("base_model.model.model.other.weight"), ["model.other.weight"]),
    "misshapen": (put("base_model.model.lm_head.weight", torch.t), ["(32, 320)"]),
    "NaN": (put("base_model.model.lm_head.weight", one(math.nan)), ["lm_head"]),
    "field": (say(r=4), ["r=4"]),
}


@pytest.mark.parametrize("name", FULL)
def test_a_broken_full_file_is_refused(name, saved, tmp_path):
    change, words = FULL[name]
    model = build("llama")
    with refused(model, *words):
        pfs.load(model, tampered(saved["full"], tmp_path, change))


BYTES = {
    (CONFIG, "no JSON"): b"{'peft_type': 'LORA'}",
    (CONFIG, "a list"): b"[]",
    (CONFIG, "empty"): b"",
    (CONFIG, "no text"): b"\xff\xfe\x00",
    (CONFIG, "deep"): b"[" * 100_000,
    (WEIGHTS, "empty"): b"",
    (WEIGHTS, "a pickle"): b"\x80\x04\x95cos\nsystem\n",
    (WEIGHTS, "a huge header"): (2**62).to_bytes(8, "little") + b"{}",
    (WEIGHTS, "half"): None,
}


@pytest.mark.parametrize("file, what", BYTES, ids=str)
def test_bytes_that_are_no_such_file_are_refused(file, what, saved, tmp_path):
    shutil.copytree(saved["lora"], tmp_path, dirs_exist_ok=True)
    sound = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(BYTES[file, what] or sound[: len(sound) // 2])
    model = build("llama")
    with refused(model, file):
        pfs.load(model, tmp_path)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(file, saved, tmp_path):
    shutil.copytree(saved["lora"], tmp_path, dirs_exist_ok=True)
    (tmp_path / file).unlink()
    model = build("llama")
    with refused(model, file, "does not exist", error=FileNotFoundError):
        pfs.load(model, tmp_path)


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
KNOWN = [*pfs.lora.FIELDS.values(), *pfs.lora.INERT, *exchange.METADATA]


@settings(
    deadline=None,
    max_examples=120,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.dictionaries(st.sampled_from(sorted(KNOWN)), st.sampled_from(JUNK), max_size=2)
)
def test_any_config_loads_or_is_refused_with_a_value_error(saved, tmp_path, fields):
    model = build("llama")
    before = snapshot(model)
    try:
        pfs.load(model, tampered(saved["lora"], tmp_path, say(**fields)))
    except ValueError:
        assert_same(snapshot(model), before)
    else:
        assert len(adapters(model)) == 14


def test_a_file_for_another_model_is_refused(saved):
    model = build("gpt2")
    with refused(model, "GPT2LMHeadModel", "another model"):
        pfs.load(model, saved["lora"])


def test_loading_onto_adapters_is_refused(saved):
    model = trained()
    with refused(model, "already", "remove()"):
        pfs.load(model, saved["lora"])


# ---------------------------------------------------------------- vocabulary


def saving_a_resized_vocabulary_is_refused(folder):
    model = trained()
    model.resize_token_embeddings(323)
    with refused(model, "320", "323", "resize"):
        pfs.save(model, folder)
    assert contents(folder) == {}


def test_saving_a_resized_vocabulary_is_refused(tmp_path):
    saving_a_resized_vocabulary_is_refused(tmp_path)
    model = build("llama")
    model.pfs_vocab_size = 320  # which load_model sets
    model.resize_token_embeddings(321)
    pfs.lora.inject(model)
    with refused(model, "320", "321", "resize"):
        pfs.save(model, tmp_path)
    assert contents(tmp_path) == {}


def loading_onto_another_vocabulary_is_refused(source):
    for rows in (319, 330):
        model = build("llama")
        model.resize_token_embeddings(rows)
        with refused(model, "320", str(rows)):
            pfs.load(model, source)


def test_loading_onto_another_vocabulary_is_refused(saved):
    loading_onto_another_vocabulary_is_refused(saved["lora"])


# ---------------------------------------------------------------- saving


def a_failed_save_leaves_the_folder_as_it_was(monkeypatch, source, folder):
    shutil.copytree(source, folder, dirs_exist_ok=True)
    before, model = contents(folder), trained(r=2)

    def disk_full(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError("planted: no space left")

    monkeypatch.setattr(exchange, "save_file", disk_full)
    with refused(model, "planted", error=OSError):
        pfs.save(model, folder)
    assert contents(folder) == before


def test_a_failed_save(monkeypatch, saved, tmp_path):
    a_failed_save_leaves_the_folder_as_it_was(monkeypatch, saved["lora"], tmp_path)


def test_a_config_that_cannot_be_written_leaves_the_weights(
    monkeypatch, saved, tmp_path
):
    shutil.copytree(saved["lora"], tmp_path, dirs_exist_ok=True)
    before, model = contents(tmp_path), trained(r=2)
    monkeypatch.setattr(pfs.lora, "to_peft", lambda model: {"r": object()})
    with pytest.raises(TypeError):
        pfs.save(model, tmp_path)
    assert contents(tmp_path) == before


def an_adapter_with_nan_is_not_saved(folder):
    model = trained()
    list(adapters(model).values())[3].B.data[0, 0] = torch.nan
    with refused(model, "o_proj", "not finite"):
        pfs.save(model, folder)
    assert contents(folder) == {}


def test_an_adapter_with_nan_is_not_saved(tmp_path):
    an_adapter_with_nan_is_not_saved(tmp_path)


def test_saving_leaves_the_model_alone_and_replaces_what_was_there(saved, tmp_path):
    shutil.copytree(saved["full"], tmp_path, dirs_exist_ok=True)
    model = trained()
    before = snapshot(model)
    pfs.save(model, tmp_path)
    assert_same(snapshot(model), before)
    assert contents(tmp_path) == contents(saved["lora"])


def test_a_method_without_a_format_is_refused(tmp_path):
    model = build("llama")
    pfs.adapter.inject(model, pfs.Adapter, "attention")
    with refused(model, "custom", "file format"):
        pfs.save(model, tmp_path)
    copy.deepcopy(model)
