"""Quantized models on disk: bit for bit what was saved; nothing else gets in."""

import copy
import json
import math
import pickle

import pytest
import torch
from architectures import CONFIGS, byte_tokenizer
from laws.files.quantized_models import (
    BROKEN,
    JSON,
    UP,
    WRONG_FIELDS,
    a_broken_file_is_refused,
    a_failed_save_leaves_the_folder_as_it_was,
    a_round_trip_is_bit_equal,
    add,
    config_of,
    drop,
    one,
    put,
    quantized,
    saved,
    says,
)
from model_state import assert_same, logits, train
from safetensors.torch import load_file, save_file

import peft_from_scratch as pfs
from peft_from_scratch import nf4
from peft_from_scratch.files.quantized import CONFIG, WEIGHTS

# ----------------------------------------------------------------------- Round trips


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("double", [True, False])
def test_a_round_trip_is_bit_equal(architecture, double, tmp_path):
    a_round_trip_is_bit_equal(tmp_path, architecture, double=double)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(code="fp4"),
        dict(block=32),
        dict(block=4096),
        dict(targets="mlp"),
        dict(exclude="up_proj"),
        dict(targets=["all-linear", "lm_head"]),
        dict(of=torch.bfloat16),
        dict(of=torch.float16, double=False),
    ],
    ids=str,
)
def test_other_arguments_make_the_round_trip(arguments, tmp_path):
    a_round_trip_is_bit_equal(tmp_path, "llama", **arguments)


def test_a_file_is_as_large_as_what_the_model_holds(tmp_path):
    model = quantized()
    nf4.save(model, tmp_path)
    held = sum(t.nbytes for t in model.state_dict().values())
    modules = sum(isinstance(m, nf4.NF4Linear) for m in model.modules())
    # Each projection's code books and its JSON come on top, and the head of the file.
    books = modules * (4 * 16 + 4 * 256 + 400) + 20_000
    assert held < (tmp_path / WEIGHTS).stat().st_size < held + books


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_what_is_not_quantized_takes_the_dtype_that_is_asked_for(
    architecture, tmp_path
):
    saved(tmp_path, architecture, of=torch.bfloat16)
    for asked, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        loaded = nf4.load(tmp_path, dtype=asked)
        assert {p.dtype for p in loaded.parameters()} == {expected}
        packed = [m for m in loaded.modules() if isinstance(m, nf4.NF4Linear)][-1]
        assert packed.dtype == torch.bfloat16 and packed.packed.dtype == torch.uint8
        assert packed.absmax_units.dtype == torch.float32
        assert logits(loaded).dtype == expected
        pfs.lora.inject(loaded)
        assert all(p.dtype == torch.float32 for p in pfs.trainable(loaded).values())
        train(loaded, 1)


def test_a_loaded_model_is_trained_saved_and_merged(tmp_path):
    model = nf4.load(saved(tmp_path / "base"))
    pfs.qlora.inject(model, r=4)
    train(model, 2)
    pfs.save(model, tmp_path / "adapter")
    other = nf4.load(tmp_path / "base")
    pfs.load(other, tmp_path / "adapter")
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match=r"carries adapters: save those with"):
        nf4.save(model, tmp_path / "both")
    assert not (tmp_path / "both").exists()
    pfs.merge(model)
    with pytest.raises(ValueError, match="has nothing in four bits"):
        nf4.save(model, tmp_path / "both")


# ------------------------------------------------------------------------ load_model


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_load_model_says_that_a_folder_has_no_tokenizer(architecture, tmp_path):
    """For GPT-2, transformers would make an empty one."""
    saved(tmp_path, architecture)
    with pytest.raises(OSError, match=r"holds a model and no tokenizer: save it with"):
        pfs.load_model(tmp_path)


# ------------------------------------------------------------------------ Broken files


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(name, tmp_path, sound):
    a_broken_file_is_refused(tmp_path, name, sound)


BIAS = "transformer.h.1.mlp.c_fc.bias"
BROKEN_BIAS = {  # Conv1D's, which stand beside codes
    "no bias": (drop(BIAS), [f"lack {BIAS}"]),
    "a NaN": (put(BIAS, one(math.nan)), [BIAS, "not finite"]),
    "whole numbers": (put(BIAS, lambda t: t.int()), [BIAS, "int32"]),
    "misshapen": (put(BIAS, lambda t: t[:-1]), [BIAS, "(127,)", "(128,)"]),
    "codes by our own names": (
        add("transformer.h.1.mlp.c_fc.packed", torch.zeros(2, dtype=torch.uint8)),
        ["c_fc.packed", "the model has not"],
    ),
}


@pytest.mark.parametrize("name", BROKEN_BIAS)
def test_a_broken_bias_is_refused(name, tmp_path):
    sound = saved(tmp_path / "sound", "gpt2")
    a_broken_file_is_refused(tmp_path, name, sound, BROKEN_BIAS)


def test_every_field_of_a_state_is_among_the_broken_ones(sound):
    state = json.loads(bytes(load_file(sound / WEIGHTS)[JSON].tolist()))
    assert set(state) == set(WRONG_FIELDS)


def test_a_whole_number_written_with_a_point_is_the_number(sound, tmp_path):
    """JSON has one kind of number: 48.0 is 48, and the shape is the module's own."""
    tensors = load_file(sound / WEIGHTS)
    says(shape=[48.0, 32.0])(tensors, {})
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    (tmp_path / CONFIG).write_text((sound / CONFIG).read_text())
    loaded = nf4.load(tmp_path)
    assert torch.equal(logits(loaded), logits(nf4.load(sound)))
    assert all(type(n) is int for n in loaded.get_submodule(UP).quantized.shape)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


def test_a_pickle_is_not_read(tmp_path):
    saved(tmp_path)
    for name, error in (
        (WEIGHTS, ValueError),
        ("pytorch_model.bin", FileNotFoundError),
    ):
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
        (tmp_path / name).write_bytes(pickle.dumps({"model.norm.weight": Bomb()}))
        with pytest.raises(error):
            nf4.load(tmp_path)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    saved(tmp_path)
    config = config_of(tmp_path)
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('code of a file was run')")
    with pytest.raises(ValueError, match="custom code"):
        nf4.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "3"])
def test_a_config_that_is_no_config_is_refused(text, tmp_path):
    saved(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=CONFIG):
        nf4.load(tmp_path)


def test_a_folder_without_files_is_named(tmp_path):
    for missing in (CONFIG, WEIGHTS):
        folder = saved(tmp_path / missing)
        (folder / missing).unlink()
        with pytest.raises(FileNotFoundError, match=f"needs a {CONFIG}"):
            nf4.load(folder)


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    a_failed_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch, byte_tokenizer())


def test_saving_changes_nothing_about_the_model(tmp_path):
    model = quantized()
    before = copy.deepcopy(model.state_dict()), str(model.config)
    nf4.save(model, tmp_path)
    assert_same(model.state_dict(), before[0])
    assert str(model.config) == before[1]
