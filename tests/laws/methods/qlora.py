"""Laws of QLoRA: what is refused, what is counted, what its three merges cost."""

import copy
import json
import math
import warnings
import weakref
from functools import partial

import pytest
import torch
from adapter_files import contents, parsed
from architectures import CONFIGS, build
from model_state import assert_same, largest, logits, refused, train, values
from planting import law
from safetensors.torch import save_file

import peft_from_scratch as pfs
from laws.core import contract as laws
from laws.core.contract import types
from peft_from_scratch import nf4
from peft_from_scratch.core.adapter import adapters, as_matrix
from peft_from_scratch.core.counting import count
from peft_from_scratch.core.targets import resolve
from peft_from_scratch.files import base_notes, combine, exchange
from peft_from_scratch.files.adapter_file import CONFIG, WEIGHTS
from peft_from_scratch.files.base_notes import BASE_BITS
from peft_from_scratch.methods import loftq, qlora
from peft_from_scratch.nf4 import NF4Linear

ARGUMENTS = dict(r=4, alpha=8)


def trained(architecture="llama", *, steps=3, of=torch.float32, **arguments):
    torch.manual_seed(3)
    model = build(architecture, dtype=of)
    qlora.inject(model, **ARGUMENTS | arguments)
    train(model, steps)
    return model


def packed(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}


@law
@pytest.mark.parametrize("architecture", CONFIGS)
def it_is_lora_on_the_quantized_model(architecture="gpt2"):
    """Codes, names and the draws of A: trying the injection first takes no numbers."""
    model, other = build(architecture), build(architecture)
    nf4.quantize_model(other)
    torch.manual_seed(5)
    names = qlora.inject(model, **ARGUMENTS)
    torch.manual_seed(5)
    assert pfs.lora.inject(other, **ARGUMENTS) == names
    assert_same(model.state_dict(), other.state_dict())
    assert {type(m.base) for m in adapters(model).values()} == {NF4Linear}
    assert len(packed(model)) == len(names)


@law
def every_argument_arrives():
    model = build("llama").train()
    names = qlora.inject(
        model,
        r=4,
        alpha=6,
        targets="all-linear",
        exclude="v_proj",
        rslora=True,
        dropout=0.25,
        rank_pattern={r".*\.1\..*": 3},
        alpha_pattern={"q_proj": 5.0},
        block=32,
        double="int8",
        skip="mlp",
        compute_dtype=torch.bfloat16,
        dtype=torch.bfloat16,
    )
    wrapped = adapters(model)
    assert list(wrapped) == names and not any("v_proj" in name for name in names)
    for name, module in wrapped.items():
        r = 3 if ".1." in name else 4
        alpha = 5.0 if "q_proj" in name else 6
        assert module.A.shape[0] == r and module.dropout.p == 0.25
        assert module.scale == pytest.approx(alpha / math.sqrt(r))
        assert module.A.dtype == module.B.dtype == torch.bfloat16
        assert isinstance(module.base, NF4Linear) == ("mlp" not in name)
    assert len(packed(model)) == 2 * 4  # the values' too, though without an adapter
    for module in packed(model).values():
        assert (module.block, module.constant_codebook) == (32, "int8")
        assert module.compute_dtype == torch.bfloat16 and module.training


@law
def full_weights_go_as_their_codes_come(monkeypatch):
    """A plan that held on to them would cost the bytes that four bits save."""
    model = build("llama")
    full = [weakref.ref(module) for module in resolve(model, "all-linear").values()]
    sound, alive = NF4Linear.__init__, []

    def counting(*arguments, **options):
        alive.append(sum(module() is not None for module in full))
        sound(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(NF4Linear, "__init__", counting)
        qlora.inject(model, **ARGUMENTS)
    assert alive == list(range(len(full), 0, -1))


WHOLE = [
    laws.Method("qlora", partial(qlora.inject, r=4, block=32, skip="mlp"), len),
    laws.Method("loftq", partial(loftq.inject, r=4, double=False), len),
]


def nan_in(model):
    model.model.layers[1].mlp.down_proj.weight.data[0, 1] = math.nan


REFUSED = {  # arguments (and what was done before) -> words of the error
    "r=0": (dict(r=0), ["r=0"]),
    "r too large": (dict(r=65537), ["r=65537"]),
    "alpha=-1": (dict(alpha=-1), ["alpha=-1"]),
    "dropout=1": (dict(dropout=1.0), ["dropout=1.0"]),
    "bias=some": (dict(bias="some"), ["bias='some'"]),
    "rslora=1": (dict(rslora=1), ["rslora=1"]),
    "a typo in targets": (dict(targets="q_prj"), ["q_prj"]),
    "a typo in exclude": (dict(exclude="q_prj"), ["q_prj"]),
    "a typo in skip": (dict(skip="q_prj"), ["q_prj"]),
    "all skipped": (dict(skip="all-linear"), ["leaves no module"]),
    "a typo in a pattern": (dict(rank_pattern={"q_prj": 2}), ["q_prj"]),
    "no pattern": (dict(alpha_pattern=[2]), ["is no mapping"]),
    "block=0": (dict(block=0), ["block=0"]),
    "double=nf4": (dict(double="nf4"), ["double='nf4'"]),
    "compute_dtype": (dict(compute_dtype=torch.int8), ["compute_dtype=torch.int8"]),
    "dtype": (dict(dtype=torch.float16), ["dtype=torch.float16", "bfloat16"]),
    "a NaN": (dict(before=nan_in), ["down_proj", "is nan"]),
    "float64": (dict(before=torch.nn.Module.double), ["float64"]),
    "adapters": (dict(before=pfs.lora.inject), ["carries lora adapters already"]),
}


@law
@pytest.mark.parametrize("name", REFUSED)
def a_refusal_leaves_nothing_behind(name):
    """Neither four bits, which cannot be undone, nor a used random number."""
    arguments, words = REFUSED[name]
    model, arguments = build("llama"), dict(arguments)
    arguments.pop("before", lambda model: None)(model)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    with refused(model, *words):
        qlora.inject(model, **ARGUMENTS | arguments)
    assert not packed(model)
    assert torch.equal(torch.get_rng_state(), state)


@law
def codes_are_not_quantized_a_second_time():
    model = build("llama")
    nf4.quantize_model(model, block=32, targets="mlp")
    for asked in (
        dict(block=64),
        dict(block=32),
        dict(double=True),
        dict(double=False),
        dict(skip="mlp"),
        dict(compute_dtype=torch.bfloat16),
    ):
        state = torch.get_rng_state()
        with refused(model, "in four bits already", f"{next(iter(asked))}"):
            qlora.inject(model, **ARGUMENTS, **asked)
        assert torch.equal(torch.get_rng_state(), state)
    before = {name: m.packed.clone() for name, m in packed(model).items()}
    qlora.inject(model, **ARGUMENTS)
    after = {n.removesuffix(".base"): m.packed for n, m in packed(model).items()}
    assert_same(after, before)


@law
@pytest.mark.parametrize("architecture", CONFIGS)
def shares_count_values_and_not_bytes(architecture="llama"):
    """Half as many elements would double the share."""
    plain, model = build(architecture), trained(architecture)
    lora = copy.deepcopy(plain)
    pfs.lora.inject(lora, **ARGUMENTS)
    assert count(model) == count(lora)
    projections = sum(m.values for m in packed(model).values())
    bytes_ = sum(m.packed.numel() for m in packed(model).values())
    assert 2 * bytes_ == projections
    rest = sum(p.numel() for p in model.parameters())
    assert count(model).total == rest + projections
    naive = count(model).trainable / (rest + bytes_)
    assert naive > 1.2 * count(model).share


def pieces(model):
    """{name: (W', ΔW)} in float64, from codes, A and B."""
    found = {}
    for name, module in adapters(model).items():
        kept = nf4.dequantize(module.base.quantized).double()
        r = module.A.shape[0]
        update = module.alpha / r * module.B.detach().double() @ module.A.double()
        found[name] = kept, update.detach()
    return found


def weights(model, names):
    return {n: as_matrix(model.get_submodule(n)).detach().double() for n in names}


def error(W, kept, update):
    lost = (W - kept - update).norm()
    return (lost / (kept + update).norm()).item(), (lost / update.norm()).item()


@law
@pytest.mark.parametrize("architecture", CONFIGS)
def merged_onto_what_was_trained_is_exact(architecture="llama"):
    for merge in (qlora.merge, pfs.merge):
        model, plain = trained(architecture), build(architecture)
        parts, expected = pieces(model), logits(model)
        errors = merge(model)
        assert types(model) == types(plain) and list(errors) == list(parts)
        assert largest(logits(model), expected) < 1e-5
        for name, W in weights(model, parts).items():
            kept, update = parts[name]
            assert torch.equal(W, (kept + update).float().double())
            if merge is qlora.merge:
                assert errors[name] == pytest.approx(error(W, kept, update), rel=1e-6)
                assert errors[name].weight < 1e-7
        assert all(p.requires_grad for p in model.parameters())


@law
@pytest.mark.parametrize("as_mapping", [False, True])
@pytest.mark.parametrize("architecture", CONFIGS)
def merged_onto_the_original_is_off_by_what_quantizing_changed(
    architecture="gpt2", as_mapping=False, **arguments
):
    model, base = trained(architecture, **arguments), build(architecture)
    parts, expected = pieces(model), logits(model)
    W0 = weights(base, parts)
    errors = qlora.merge(model, "original", W0 if as_mapping else base)
    assert {n: types(model)[n] for n in parts} == {n: types(base)[n] for n in parts}
    for name, (kept, update) in parts.items():
        lost = (W0[name] - kept).norm()
        assert errors[name].weight == pytest.approx(
            (lost / (kept + update).norm()).item(), rel=1e-5
        )
        assert errors[name].update == pytest.approx(
            (lost / update.norm()).item(), rel=1e-5
        )
        merged = as_matrix(model.get_submodule(name)).detach()
        assert torch.equal(merged, (W0[name] + update).float())
        assert 0.02 < errors[name].weight < 0.2
    assert largest(logits(model), expected) > 1e-2


def rounded(W, block):
    """NF4 by brute force: the nearest of sixteen values in float64."""
    table = torch.tensor(nf4.CODES["nf4"], dtype=torch.float64)
    flat = torch.nn.functional.pad(W.flatten(), (0, -W.numel() % block))
    rows = flat.view(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    nearest = (rows[..., None] - table * absmax[..., None]).abs().argmin(-1)
    return (table[nearest] * absmax).flatten()[: W.numel()].view(W.shape)


@law
@pytest.mark.parametrize("architecture", CONFIGS)
def merged_and_requantized_is_off_by_rounding_once_more(architecture="gpt2", block=32):
    model = trained(architecture, block=block, double=False)
    parts, expected = pieces(model), logits(model)
    errors = qlora.merge(model, "requantized")
    assert list(packed(model)) == list(parts) and not adapters(model)
    assert len({id(m.buffer) for m in packed(model).values()}) == 1
    for name, (kept, update) in parts.items():
        module = model.get_submodule(name)
        assert (module.block, module.constant_codebook, module.codebook) == (
            block,
            None,
            "nf4",
        )
        W = nf4.dequantize(module.quantized).double()
        brute = rounded((kept + update).float().double(), block)
        assert (W - brute).abs().max() < 1e-6
        assert errors[name] == pytest.approx(error(brute, kept, update), rel=1e-4)
        assert 0.02 < errors[name].weight < 0.2
    assert largest(logits(model), expected) > 1e-2
    assert not torch.equal(logits(model), logits(untrained(architecture, block)))


def untrained(architecture, block):
    model = build(architecture)
    nf4.quantize_model(model, block=block, double=False)
    return model


def smaller(model):
    module = model.model.layers[1].mlp.down_proj
    module.weight = torch.nn.Parameter(module.weight[:, :-1])
    module.in_features -= 1
    return model


def without_one(model):
    found = dict(model.named_modules())
    names = [n for n in found if n.endswith("_proj")]
    return {n: found[n].weight for n in names[:-1]}


def a_nan_in_the_last(model):
    nan_in(model)
    return model


def a_nan_in_an_adapter(model):
    list(adapters(model).values())[-1].B.data[0, 0] = math.nan


CANNOT = {  # -> (what is done to the model, onto, original, words)
    "another shape": (
        None,
        "original",
        lambda: smaller(build("llama")),
        ["no weight of (32, 48)", "layers.1.mlp.down_proj"],
    ),
    "one weight missing": (
        None,
        "original",
        lambda: without_one(build("llama")),
        ["no weight of (32, 48)", "layers.1.mlp.down_proj"],
    ),
    "another architecture": (
        None,
        "original",
        lambda: build("gpt2"),
        ["no weight of"],
    ),
    "a NaN in the original": (
        None,
        "original",
        lambda: a_nan_in_the_last(build("llama")),
        ["layers.1.mlp.down_proj", "look for NaN"],
    ),
    "a NaN in the adapter": (
        a_nan_in_an_adapter,
        "dequantized",
        lambda: None,
        ["layers.1.mlp.down_proj", "look for NaN"],
    ),
    "a NaN in the adapter, requantized": (
        a_nan_in_an_adapter,
        "requantized",
        lambda: None,
        ["layers.1.mlp.down_proj", "look for NaN"],
    ),
}


@law
@pytest.mark.parametrize("name", CANNOT)
def what_cannot_be_merged_is_left_alone(name):
    change, onto, original, words = CANNOT[name]
    model = trained()
    if change:
        change(model)
    with refused(model, *words, error=pfs.CannotMerge):
        qlora.merge(model, onto, original())


@law
def overflow_in_half_precision_is_not_merged():
    for onto in qlora.ONTO:
        model = trained(of=torch.float16, steps=0)
        for module in adapters(model).values():
            torch.nn.init.constant_(module.B, 3e5)
        with refused(model, "float16 cannot", error=pfs.CannotMerge):
            qlora.merge(model, onto, build("llama", dtype=torch.float16))


def caught(model, folder):
    """The warnings of loading."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        pfs.load(model, folder)
    return [str(w.message) for w in found]


@law
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def a_file_of_four_bits_warns_on_a_base_in_full(folder, architecture="gpt2"):
    """And measures, on the base that is here, what nobody can read off the file."""
    model, full = trained(architecture, block=32), build(architecture)
    pfs.save(model, folder)
    lost = trained_ = changed = 0.0
    for name, (kept, update) in pieces(model).items():
        W0 = as_matrix(full.get_submodule(name)).detach().double()
        lost += (W0 - kept).square().sum().item()
        trained_ += (kept + update).square().sum().item()
        changed += update.square().sum().item()
    said = "\n".join(caught(full, folder))
    assert said.count("four bits") == 1
    assert f"differ by {math.sqrt(lost / trained_):.1%} of their norm" in said
    assert f"is {math.sqrt(lost / changed):.2g} times that of the update" in said
    assert '"block": 32' in said and "nf4.quantize_model() first" in said
    assert_same(values(full), values(model))
    assert largest(logits(full), logits(model)) > 1e-2
    again = build(architecture)
    nf4.quantize_model(again, block=32)
    assert caught(again, folder) == []
    assert torch.equal(logits(again), logits(model))


@law
def a_file_of_other_bits_warns(folder):
    """The codes of another block are other weights, and nobody sees it in a shape."""
    pfs.save(trained(block=32), folder)
    for arguments in (dict(), dict(block=32, double=False), dict(exclude="mlp")):
        model = build("llama")
        nf4.quantize_model(model, **{"block": 32} | arguments)
        said = caught(model, folder)
        assert bool(said) == bool(arguments)
        for text in said:
            assert "other bits" in text and '"block": 32' in text


@law
def a_file_is_a_loras(folder):
    """Only the note tells it from one: PEFT reads what any LoRA has."""
    pfs.save(trained(), folder)
    tensors, metadata, config = parsed(folder)
    assert json.loads(metadata[BASE_BITS]) == {
        "code": "nf4",
        "block": 64,
        "double": "dynamic",
    }
    assert config["peft_type"] == "LORA" and len(tensors) == 28
    assert sorted(contents(folder)) == [CONFIG, WEIGHTS]
    assert all(t.dtype == torch.float32 for t in tensors.values())


HOSTILE = [
    "",
    "{",
    "null",
    "3",
    "[]",
    '"nf4"',
    "{}",
    '{"code": "nf4"}',
    '{"code": "nf4", "block": 64}',
    '{"code": "nf4", "block": 64, "double": true, "w": 1}',
    '{"code": "nf5", "block": 64, "double": true}',
    '{"code": ["nf4"], "block": 64, "double": true}',
    '{"code": "nf4", "block": 0, "double": true}',
    '{"code": "nf4", "block": -1, "double": true}',
    '{"code": "nf4", "block": 64.0, "double": true}',
    '{"code": "nf4", "block": true, "double": true}',
    '{"code": "nf4", "block": "64", "double": true}',
    '{"code": "nf4", "block": 1e99, "double": true}',
    '{"code": "nf4", "block": 1' + "0" * 50 + ', "double": true}',
    '{"code": "nf4", "block": NaN, "double": true}',
    '{"code": "nf4", "block": 64, "double": "x"}',
    '{"code": "nf4", "block": 64, "double": 2}',
    '{"code": "nf4", "block": 64, "double": {"a": 1}}',
    '{"code": "nf4", "block": 64, "double": true, "exclude": "mlp"}',
    '{"code": "nf4", "block": 64, "double": true, "exclude": [1]}',
    '{"code": "nf4", "block": 64, "double": true, "exclude": {"a": 1}}',
    '{"code": "nf4", "block": 64, "double": true, "exclude": null}',
    "[" * 100_000,
]


def noted(source, folder, note):
    tensors, metadata, config = parsed(source)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, metadata | {BASE_BITS: note})
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@law
@pytest.mark.parametrize("note", HOSTILE, ids=lambda note: note[:60])
def a_hostile_note_is_refused(folder, note):
    pfs.save(trained(), folder / "sound")
    bad = noted(folder / "sound", folder / "bad", note)
    for model in (build("llama"), untrained("llama", 64)):
        with refused(model, "base_bits=", "not implemented"):
            pfs.load(model, bad)


@law
def adapters_of_other_bits_have_no_sum(folder):
    for name, arguments in (
        ("64", {}),
        ("64 again", {}),
        ("32", dict(block=32)),
        ("float32", dict(double=False)),
    ):
        pfs.save(trained(**arguments), folder / name)
    lora = build("llama")
    pfs.lora.inject(lora, **ARGUMENTS)
    train(lora, 1)
    pfs.save(lora, folder / "full")
    for other in ("32", "float32"):
        with refused(torch.nn.Module(), "the bits of the base is of"):
            combine.combine(
                [folder / "64", folder / other], folder / "out", how="linear"
            )
        assert not (folder / "out").exists()
    combine.combine([folder / "64", folder / "64 again"], folder / "out", how="linear")
    assert parsed(folder / "out")[1][BASE_BITS] == parsed(folder / "64")[1][BASE_BITS]
    # A file without the note may be PEFT's, which never says.
    combine.combine([folder / "full", folder / "64"], folder / "both", how="linear")
    assert parsed(folder / "both")[1][BASE_BITS] == parsed(folder / "64")[1][BASE_BITS]


METHODS = {
    "qlora": lambda model: pfs.qlora.inject(model, r=4),
    "lora on one": lambda model: pfs.lora.inject(model, r=4, targets="up_proj|fc1"),
    "dora": lambda model: pfs.dora.inject(model, r=4),
    "ia3": pfs.ia3.inject,
    "houlsby": lambda model: pfs.houlsby.inject(model, m=4),
    "prompt": lambda model: pfs.prompt.inject(model, n=3),
    "prefix": lambda model: pfs.prefix.inject(model, n=3),
}


@law
@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("method", METHODS)
def an_adapter_brings_its_bits_along(folder, method="houlsby", architecture="llama"):
    """What was left in full, too, by its name before adapters stood there."""
    model = build(architecture)
    nf4.quantize_model(model, block=32, double=False, exclude="mlp")
    names = list(packed(model))
    METHODS[method](model)
    train(model, 2)
    whole = list(resolve(build(architecture), "mlp"))
    assert base_notes.read_bits(base_notes.base_bits(model))["exclude"] == whole
    pfs.save(model, folder)
    found = build(architecture)
    exchange.load_as_trained(found, folder)
    assert torch.equal(logits(found), logits(model))
    again = build(architecture)
    nf4.quantize_model(again, block=32, double=False, exclude="mlp")
    exchange.load_as_trained(again, folder)
    assert torch.equal(logits(again), logits(model))
    pfs.remove(found)
    assert list(packed(found)) == names
