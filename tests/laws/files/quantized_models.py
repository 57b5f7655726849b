"""Laws of quantized models on disk: bit for bit what was saved."""

import json
import math

import pytest
import torch
from adapter_files import contents
from architectures import build, byte_tokenizer
from model_state import assert_same, largest, logits, refused
from planting import law
from safetensors.torch import load_file, save_file

import peft_from_scratch as pfs
from peft_from_scratch import nf4
from peft_from_scratch.common import atomic
from peft_from_scratch.files import quantized as quantized_files
from peft_from_scratch.files.quantized import CONFIG, STATE, WEIGHTS

UP = "model.layers.1.mlp.up_proj"
KEY = f"{UP}.weight"
JSON = f"{KEY}.{STATE}nf4"


def quantized(architecture="llama", of=torch.float32, **arguments):
    model = build(architecture, dtype=of)
    nf4.quantize_model(model, **arguments)
    return model


def saved(folder, architecture="llama", **arguments):
    nf4.save(quantized(architecture, **arguments), folder)
    return folder


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def a_round_trip_is_bit_equal(folder, architecture="gpt2", **arguments):
    model = quantized(architecture, **arguments)
    nf4.save(model, folder)
    loaded = nf4.load(folder)
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert torch.equal(logits(loaded), logits(model))
    for name, module in model.named_modules():
        found = loaded.get_submodule(name)
        assert type(found) is type(module)
        if isinstance(module, nf4.NF4Linear):
            for key in (
                "block",
                "codebook",
                "constant_codebook",
                "dtype",
                "transposed",
            ):
                assert getattr(found, key) == getattr(module, key)
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert str(loaded.generation_config) == str(model.generation_config)
    again = folder / "again"
    nf4.save(loaded, again)
    assert_same(load_file(again / WEIGHTS), load_file(folder / WEIGHTS))


@law
def a_tied_tensor_is_written_once(folder):
    """qwen's head is its embedding, before and after."""
    model = quantized("qwen")
    nf4.save(model, folder)
    keys = [key for key in load_file(folder / WEIGHTS) if "weight." not in key]
    assert "model.embed_tokens.weight" in keys and "lm_head.weight" not in keys
    loaded = nf4.load(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@law
def parts_are_read_as_one(folder):
    """Several files with an index, as large models come."""
    model = quantized("gpt2")
    nf4.save(model, folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    keys = sorted(tensors)
    index = {}
    for i in range(3):
        name = f"model-0000{i + 1}-of-00003.safetensors"
        part = {key: tensors[key] for key in keys[i::3]}
        save_file(part, folder / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(logits(nf4.load(folder)), logits(model))


@law
def load_model_reads_such_a_folder(folder):
    model = quantized("qwen")
    nf4.save(model, folder, byte_tokenizer())
    loaded, tokenizer = pfs.load_model(folder, device="cpu")
    assert isinstance(loaded.get_submodule(UP), nf4.NF4Linear)
    assert torch.equal(logits(loaded), logits(model)) and not loaded.training
    assert tokenizer("ab").input_ids == byte_tokenizer()("ab").input_ids
    assert loaded.pfs_vocab_size == 320
    half, _ = pfs.load_model(folder, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert largest(logits(half), logits(model)) < 0.1


@law
def a_changed_generation_config_is_kept(folder):
    model = quantized()
    model.generation_config.max_new_tokens = 7
    nf4.save(model, folder)
    assert nf4.load(folder).generation_config.max_new_tokens == 7


def drop(key):
    return lambda tensors, config: tensors.pop(key)


def put(key, change):
    def apply(tensors, config):
        tensors[key] = change(tensors[key]).contiguous()

    return apply


def add(key, tensor):
    return lambda tensors, config: tensors.update({key: tensor})


def says(**fields):
    """The state of one projection, with other fields; None leaves one out."""

    def apply(tensors, config):
        state = json.loads(bytes(tensors[JSON].tolist())) | fields
        state = {key: value for key, value in state.items() if value is not None}
        tensors[JSON] = as_bytes(json.dumps(state))

    return apply


def as_bytes(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def one(value):
    return lambda tensor: tensor.index_fill(0, torch.tensor([1]), value)


def configured(**fields):
    return lambda tensors, config: config.update(fields)


def described(**fields):
    return lambda tensors, config: config["quantization_config"].update(fields)


def under_another_name(tensors, config):
    for key in [key for key in tensors if key.startswith(f"{KEY}.")]:
        tensors[key.replace("up_proj", "sideways_proj")] = tensors.pop(key)


def beside_an_embedding(tensors, config):
    for key in [key for key in tensors if key.startswith(KEY)]:
        tensors[key.replace(UP, "model.embed_tokens")] = tensors.pop(key)


def units_that_overflow(tensors, config):
    """Each number is finite, and their sum is not."""
    tensors[f"{KEY}.nested_absmax"] = torch.full((1,), 3e38)
    tensors[f"{KEY}.absmax"] = torch.full((24,), 255, dtype=torch.uint8)
    says(nested_offset=3e38)(tensors, config)


WRONG_FIELDS = {
    "shape": [
        None,
        [],
        [48],
        [32, 48],
        [48, 33],
        [48, 32, 1],
        "48x32",
        {"0": 48},
        [-48, -32],
        [10**30, 32],
        48 * 32,
    ],
    "blocksize": [None, 0, -64, 64.0, True, "64", [64], 32, 10**30, math.nan],
    "dtype": [None, "float64", "int8", "torch.float32", 32, ["float32"], {}],
    "quant_type": [None, "fp4", "int4", "NF4", 4, ["nf4"]],
    "nested_blocksize": [None, 0, 128, "256", [256], 10**30],
    "nested_dtype": [None, "float16", 32, ["float32"]],
    "nested_offset": [
        "0.1",
        [0.1],
        True,
        math.nan,
        math.inf,
        -math.inf,
        10**400,
        1e300,
        {},
    ],
}
BROKEN = (
    {  # name -> (change of a sound file, words that the error holds)
        "no packed weight": (drop(KEY), [f"lack {KEY}"]),
        "no constants": (drop(f"{KEY}.absmax"), [f"lack {KEY}.absmax"]),
        "no code book": (drop(f"{KEY}.quant_map"), [f"lack {KEY}.quant_map"]),
        "no units": (drop(f"{KEY}.nested_absmax"), ["nested_absmax"]),
        "no second book": (drop(f"{KEY}.nested_quant_map"), ["nested_quant_map"]),
        "no state": (drop(JSON), [KEY]),
        "no offset": (says(nested_offset=None), [f"{KEY}.absmax"]),
        "no norm": (drop("model.norm.weight"), ["lack model.norm.weight"]),
        "no embedding": (drop("model.embed_tokens.weight"), ["embed_tokens"]),
        "an extra tensor": (add("model.extra", torch.ones(2)), ["model.extra"]),
        "an extra constant": (add(f"{KEY}.more", torch.ones(2)), [f"{KEY}.more"]),
        "a bias that is none": (add(f"{UP}.bias", torch.ones(48)), [f"{UP}.bias"]),
        "another module": (under_another_name, ["sideways_proj", "this model has no"]),
        "an embedding": (beside_an_embedding, ["embed_tokens"]),
        "short codes": (put(KEY, lambda t: t[:-1]), [KEY, "767", "768"]),
        "long codes": (put(KEY, lambda t: torch.cat([t, t])), [KEY, "1536"]),
        "codes of another dtype": (put(KEY, lambda t: t.float()), [KEY, "float32"]),
        "short constants": (put(f"{KEY}.absmax", lambda t: t[:-1]), ["absmax", "23"]),
        "constants in full": (put(f"{KEY}.absmax", lambda t: t.float()), ["uint8"]),
        "short units": (put(f"{KEY}.nested_absmax", lambda t: t[:0]), ["0 values"]),
        "NaN units": (
            put(f"{KEY}.nested_absmax", lambda t: t * math.nan),
            ["nested_absmax", "not finite"],
        ),
        "units that overflow": (
            units_that_overflow,
            [KEY, "constants are not finite"],
        ),
        "infinite norm": (
            put("model.norm.weight", one(math.inf)),
            ["model.norm.weight", "not finite"],
        ),
        "a norm of whole numbers": (
            put("model.norm.weight", lambda t: t.to(torch.int32)),
            ["model.norm.weight", "int32"],
        ),
        "a misshapen norm": (
            put("model.norm.weight", lambda t: t[:-1]),
            ["model.norm.weight", "(31,)", "(32,)"],
        ),
        "another code book": (
            put(f"{KEY}.quant_map", one(0.5)),
            ["quant_map", "'nf4'"],
        ),
        "a short code book": (put(f"{KEY}.quant_map", lambda t: t[:8]), ["quant_map"]),
        "another second book": (
            put(f"{KEY}.nested_quant_map", one(0.5)),
            ["nested_quant_map", "'dynamic'"],
        ),
        "no JSON": (add(JSON, as_bytes("{")), [JSON, "not JSON"]),
        "JSON of a list": (add(JSON, as_bytes("[1]")), [JSON, "[1]"]),
        "JSON without end": (add(JSON, as_bytes("[" * 100_000)), [JSON, "not JSON"]),
        "JSON in latin-1": (
            add(JSON, torch.tensor([0xE4, 0xFF], dtype=torch.uint8)),
            [JSON, "not UTF-8"],
        ),
        "an empty state": (add(JSON, torch.zeros(0, dtype=torch.uint8)), [JSON]),
        "a state that is empty": (add(JSON, as_bytes("{}")), [JSON]),
        "eight bits": (
            described(load_in_4bit=False, load_in_8bit=True),
            ["no model in four bits"],
        ),
        "another library": (described(quant_method="gptq"), ["'gptq'"]),
        "no description": (
            lambda tensors, config: config.pop("quantization_config"),
            ["no model in four bits", "load_model()"],
        ),
        "a description that is text": (
            configured(quantization_config="4 bits"),
            ["no model in four bits"],
        ),
        "another size": (configured(intermediate_size=49), ["does not fit"]),
        "one layer less": (configured(num_hidden_layers=1), ["layers.1"]),
        "one layer more": (configured(num_hidden_layers=3), ["lack", "layers.2"]),
        "nothing in four bits": (
            lambda tensors, config: [
                tensors.pop(k) for k in list(tensors) if STATE in k
            ],
            ["no projection in four bits"],
        ),
    }
    | {
        f"{field}={value!r}"[:40]: (says(**{field: value}), [KEY])
        for field, wrong in WRONG_FIELDS.items()
        for value in wrong
    }
)


def a_broken_file_is_refused(folder, name, source=None, table=BROKEN):
    if source is None:
        source = saved(folder / "sound")
    change, words = table[name]
    tensors, config = load_file(source / WEIGHTS), config_of(source)
    change(tensors, config)
    (folder / "broken").mkdir()
    save_file(tensors, folder / "broken" / WEIGHTS, {"format": "pt"})
    (folder / "broken" / CONFIG).write_text(json.dumps(config))
    try:
        nf4.load(folder / "broken")
    except ValueError as error:
        message = str(error)
    else:
        raise AssertionError("it was loaded")
    assert len(message) < 2000
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


@law
def half_a_file_is_refused(folder):
    data = (saved(folder) / WEIGHTS).read_bytes()
    for end in (0, 4, 100, len(data) // 2, len(data) - 1):
        (folder / WEIGHTS).write_bytes(data[:end])
        with pytest.raises(ValueError, match="is no readable safetensors"):
            nf4.load(folder)


@law
def what_the_layout_has_no_place_for_is_not_saved(folder):
    for arguments in (dict(code="int4"), dict(double="fp8"), dict(double="int8")):
        with pytest.raises(ValueError, match="the layout has no place for"):
            nf4.save(quantized(**arguments), folder / "new")
    assert not (folder / "new").exists()


def a_failed_save_leaves_the_folder_as_it_was(folder, monkeypatch, tokenizer=None):
    """A full disk, at the tensors and at every replacement."""
    nf4.save(quantized(block=32), folder, tokenizer)
    before, other = contents(folder), quantized(block=128)

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(quantized_files, "save_file", full)
        with refused(other, "No space", error=OSError):
            nf4.save(other, folder, tokenizer)
    assert contents(folder) == before
    sound, calls = atomic.os.replace, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            full()
        return sound(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", failing)
        with refused(other, "No space", error=OSError):
            nf4.save(other, folder, tokenizer)
    assert contents(folder) == before and len(calls) > 4


@law
def loading_leaves_modules_as_torch_makes_them(folder):
    """Only what is built inside has no memory, whether loading ends well or not."""
    register = torch.nn.Module.register_parameter
    a_broken_file_is_refused(folder, "no norm")
    nf4.load(folder / "sound")
    assert torch.nn.Module.register_parameter is register
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
