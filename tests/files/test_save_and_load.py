"""Files: what is saved is what is loaded, and a failed save leaves nothing behind."""

import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from adapter_files import FIRST, LAST, A, B, contents, parsed, saved, trained
from architectures import build
from laws.files.save_and_load import (
    a_file_without_lora_alpha_means_pefts_default,
    an_adapter_that_does_nothing_warns,
)
from model_state import assert_same, refused, snapshot, train, values
from torch import nn

import peft_from_scratch as pfs
from peft_from_scratch.common import atomic
from peft_from_scratch.core import adapter
from peft_from_scratch.files import exchange, foreign, formats
from peft_from_scratch.files.adapter_file import CONFIG, WEIGHTS, AdapterFile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_round_trip_in_other_precisions(dtype, tmp_path):
    model, loaded = build("gpt2", dtype=dtype), build("gpt2", dtype=dtype)
    pfs.lora.inject(model, bias="all")
    for parameter in pfs.trainable(model).values():
        torch.nn.init.normal_(parameter)
    pfs.save(model, tmp_path)
    pfs.load(loaded, tmp_path)
    assert_same(values(loaded), values(model))


def test_a_file_holds_the_adapter_and_nothing_else(tmp_path):
    tensors, metadata, config = parsed(saved(tmp_path))
    assert sorted(contents(tmp_path)) == [CONFIG, WEIGHTS]
    assert len(tensors) == 2 * 14 and all(key.endswith((A, B)) for key in tensors)
    assert tensors[FIRST + A].shape == (4, 32) and tensors[LAST + B].shape == (32, 4)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size < (tmp_path / WEIGHTS).stat().st_size < size + 8192
    assert config["peft_type"] == "LORA" and metadata["vocab_size"] == "320"


def test_training_goes_on_after_loading_as_if_nothing_had_happened(tmp_path):
    model, loaded = trained(), build("llama")
    pfs.save(model, tmp_path)
    pfs.load(loaded, tmp_path)
    train(model, 2, seed=5)
    train(loaded, 2, seed=5)
    assert_same(values(loaded), values(model))


def test_a_file_without_lora_alpha_means_pefts_default(tmp_path):
    a_file_without_lora_alpha_means_pefts_default(tmp_path)
    assert pytest.importorskip("peft").LoraConfig().lora_alpha == 8


def test_an_untrained_adapter_warns_and_a_trained_one_does_not(tmp_path):
    an_adapter_that_does_nothing_warns(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pfs.load(build("llama").train(), saved(tmp_path))


def test_loading_keeps_the_mode_of_every_module(tmp_path):
    model = build("llama")
    model.model.layers[0].train()
    before = {name: module.training for name, module in model.named_modules()}
    pfs.load(model, saved(tmp_path))
    pfs.remove(model)
    assert {name: m.training for name, m in model.named_modules()} == before


def test_a_file_that_is_read_and_written_is_the_same(tmp_path):
    AdapterFile.read(saved(tmp_path / "first")).write(tmp_path / "second")
    (tensors, *texts), (again, *texts_again) = (
        parsed(tmp_path / name) for name in ("first", "second")
    )
    assert_same(again, tensors)
    assert texts_again == texts


@pytest.mark.parametrize("load", [exchange.load, exchange.load_as_trained])
def test_weights_are_read_once(load, tmp_path, monkeypatch):
    read, paths = foreign.read_safetensors, []

    def counted(path):
        paths.append(path)
        return read(path)

    monkeypatch.setattr(foreign, "read_safetensors", counted)
    load(build("llama"), saved(tmp_path))
    assert paths == [tmp_path / WEIGHTS]


# --------------------------------------------------------------------- Vocabulary


def test_saving_a_vocabulary_resized_before_injection_is_refused(tmp_path):
    model = build("llama")
    model.pfs_vocab_size = 320  # as load_model leaves it
    model.resize_token_embeddings(321)
    pfs.lora.inject(model)
    with refused(model, "320", "321", "resize"):
        pfs.save(model, tmp_path)
    assert contents(tmp_path) == {}


# ------------------------------------------------------------------------- Saving


def test_what_a_killed_save_left_is_swept(tmp_path):
    leftover = tmp_path / f"{atomic.TEMPORARY}x1"
    leftover.mkdir()
    (leftover / WEIGHTS).write_bytes(b"half")
    assert sorted(contents(saved(tmp_path))) == [CONFIG, WEIGHTS]


def test_a_target_that_other_names_end_with_is_the_only_one(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    pfs.lora.inject(model, r=2, targets={"0": model[0]})
    pfs.save(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    assert pfs.load(fresh, tmp_path) == ["0"]


def test_a_config_that_cannot_be_written_leaves_the_weights(monkeypatch, tmp_path):
    before, model = contents(saved(tmp_path)), trained(r=2)
    row = replace(formats.LORA, described=lambda model: {"r": object()})
    monkeypatch.setitem(formats.FORMATS, "lora", row)
    with refused(model, error=TypeError):
        pfs.save(model, tmp_path)
    assert contents(tmp_path) == before


def test_saving_leaves_the_model_alone_and_replaces_the_file_of_before(tmp_path):
    saved(tmp_path / "there", method=pfs.full)
    model = trained()
    before = snapshot(model)
    pfs.save(model, tmp_path / "there")
    assert_same(snapshot(model), before)
    shutil.copytree(tmp_path / "there", tmp_path / "copy")
    pfs.save(model, tmp_path / "new" / "folder")
    assert parsed(tmp_path / "copy")[1:] == parsed(tmp_path / "new" / "folder")[1:]
    assert_same(parsed(tmp_path / "copy")[0], parsed(tmp_path / "new" / "folder")[0])


def test_a_method_without_a_format_is_refused(tmp_path):
    model = build("llama")
    adapter.inject(model, pfs.Adapter, "attention")
    with refused(model, "custom", "file format"):
        pfs.save(model, tmp_path)
