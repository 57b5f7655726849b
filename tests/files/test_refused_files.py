"""What a file from a stranger may not do: every kind of broken file, one by one.

After each refusal the model is compared bit for bit with what it was before.
"""

import math

import pytest
import torch
from adapter_files import (
    MODULE,
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
from laws.files.refused_files import JUNK
from model_state import assert_same, refused, snapshot

import peft_from_scratch as pfs
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.files.adapter_file import CONFIG, WEIGHTS
from peft_from_scratch.files.formats import LORA, METADATA, PREFIX

BROKEN_FULL = {
    "lacks": (drop(f"{MODULE}norm.weight"), ["lacks", "norm.weight"]),
    "extra": (add(other__weight=(4, 4)), ["other.weight"]),
    "misshapen": (put(f"{MODULE}embed_tokens.weight", torch.t), ["(32, 320)"]),
    "NaN": (put(f"{MODULE}embed_tokens.weight", one(math.nan)), ["embed_tokens"]),
    "field": (say(r=4), ["r=4"]),
}


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
