"""Our folders against what other engines ask for, and the guide against the table.

No engine is run here: the table in tests/helpers/engine_limits.py says what their
source does with a folder. One that an engine refuses, or misreads, must be noticed.
"""

import json
import re
from pathlib import Path

import architectures
import pytest
import torch
from engine_limits import (
    CONFIG,
    ENGINES,
    REFUSED,
    SERVED,
    WEIGHTS,
    WRONG,
    Engine,
    Saved,
)
from planting import Bug, each_is_caught, law
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import peft_from_scratch as pfs
from peft_from_scratch.core import adapter
from peft_from_scratch.files import formats
from peft_from_scratch.files.formats import Format

GUIDE = Path(__file__).parents[2] / "docs" / "other_engines.md"
PATTERN = {"q_proj": 9}
FOLDERS = {  # as the guide calls them: how each is made
    "LoRA, r = 8": {"r": 8},
    "LoRA, r = 16": {"r": 16},
    "LoRA, r = 64": {"r": 64},
    "LoRA, r = 4": {"r": 4},
    "LoRA, r = 24": {"r": 24},
    "LoRA, r = 600": {"r": 600},
    "LoRA on attention, r = 16": {"r": 16, "targets": "attention"},
    "LoRA on the MLP, r = 16": {"r": 16, "targets": "mlp"},
    "LoRA on `v_proj`, r = 16": {"r": 16, "targets": ["v_proj"]},
    "LoRA on one layer, r = 16": {"r": 16, "targets": r"model\.layers\.0\..*_proj"},
    "LoRA with `rslora`, r = 16": {"r": 16, "rslora": True},
    "LoRA with `rank_pattern`": {"r": 16, "rank_pattern": PATTERN},
    "LoRA with `alpha_pattern`": {"r": 16, "alpha_pattern": PATTERN},
    "LoRA with `bias`, r = 16": {"r": 16, "bias": "lora_only"},
    "QLoRA, r = 16": {"method": pfs.qlora, "r": 16},
    "PiSSA, r = 8": {"method": pfs.pissa, "r": 8},
    "DoRA, r = 16": {"method": pfs.dora, "r": 16},
    "IA3": {"method": pfs.ia3},
}
SOUND = [  # what every one of the engines serves
    "LoRA, r = 8",
    "LoRA, r = 16",
    "LoRA, r = 64",
    "LoRA on attention, r = 16",
    "LoRA on the MLP, r = 16",
    "QLoRA, r = 16",
    "PiSSA, r = 8",
]
EACH = list(ENGINES)  # vLLM, SGLang, LoRAX, TGI, llama.cpp


def saved(folder, method=pfs.lora, **options) -> Saved:
    """A trained adapter's folder, from a Llama whose attention has biases."""
    config = LlamaConfig(**architectures.GATED, attention_bias=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    method.inject(model, **options)
    with torch.no_grad():
        for parameter in pfs.trainable(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    wrapped = adapter.adapters(model).items()
    scales = {name: getattr(module, "scale", 1.0) for name, module in wrapped}
    pfs.save(model, folder)
    return Saved(folder, scales, config.num_hidden_layers)


def made(folder, name) -> Saved:
    return saved(folder / re.sub(r"\W+", "_", name), **FOLDERS[name])


def outcomes(one: Saved) -> dict[str, str]:
    """{engine: what becomes of the folder}; options are left out."""
    return {name: e.outcome(one).split(",")[0] for name, e in ENGINES.items()}


@law
def our_folders_are_what_the_engines_ask_for(folder):
    for name in SOUND:
        one = made(folder, name)
        assert {path.name for path in one.folder.iterdir()} == {CONFIG, WEIGHTS}
        wanted = {
            f"base_model.model.{n}.lora_{x}.weight" for n in one.scales for x in "AB"
        }
        with safe_open(one.folder / WEIGHTS, "pt") as file:
            keys = set(file.keys())
            dtypes = {file.get_slice(key).get_dtype() for key in keys}
        assert keys == wanted and dtypes == {"F32"}
        for engine in ENGINES.values():
            assert engine.objections(one) == [], (name, engine.name)


@law
def what_an_engine_does_not_serve_is_noticed(folder):
    """The outcomes in the order of the engines: vLLM, SGLang, LoRAX, TGI, llama.cpp."""
    for name, expected in {
        "DoRA, r = 16": (REFUSED, REFUSED, WRONG, WRONG, REFUSED),
        "LoRA with `bias`, r = 16": (REFUSED, WRONG, WRONG, WRONG, REFUSED),
        "LoRA with `rank_pattern`": (SERVED, WRONG, WRONG, WRONG, SERVED),
        "LoRA with `alpha_pattern`": (SERVED, WRONG, WRONG, WRONG, WRONG),
        "LoRA with `rslora`, r = 16": (SERVED, WRONG, WRONG, SERVED, WRONG),
        "LoRA on `v_proj`, r = 16": (SERVED, WRONG, SERVED, SERVED, SERVED),
        "LoRA on one layer, r = 16": (SERVED, SERVED, WRONG, WRONG, SERVED),
        "LoRA, r = 4": (SERVED, SERVED, WRONG, WRONG, SERVED),
        "LoRA, r = 600": (REFUSED, SERVED, WRONG, WRONG, SERVED),
        "IA3": (REFUSED, REFUSED, WRONG, REFUSED, REFUSED),
    }.items():
        assert outcomes(made(folder, name)) == dict(zip(EACH, expected, strict=True)), (
            name
        )


def with_config(one, **changes):
    """The folder with other fields in its config; None takes one away."""
    config = json.loads((one.folder / CONFIG).read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (one.folder / CONFIG).write_text(json.dumps(kept))
    return one


def with_keys(one, old, new):
    """The folder with a part of each key exchanged."""
    tensors = load_file(one.folder / WEIGHTS)
    save_file(
        {k.replace(old, new): t for k, t in tensors.items()}, one.folder / WEIGHTS
    )
    return one


BROKEN = {  # a sound folder of rank 16 is changed by hand
    "no r": (
        lambda one: with_config(one, r=None),
        (REFUSED, REFUSED, WRONG, WRONG, SERVED),
    ),
    "no alpha": (
        lambda one: with_config(one, lora_alpha=None),
        (REFUSED, REFUSED, WRONG, WRONG, REFUSED),
    ),
    "another alpha": (lambda one: with_config(one, lora_alpha=17), (WRONG,) * 5),
    "not PEFT's prefix": (
        lambda one: with_keys(one, "base_model.model.model.", "base_model.model."),
        (WRONG, SERVED, WRONG, WRONG, REFUSED),
    ),
    "the adapter's name in the keys": (
        lambda one: with_keys(one, ".weight", ".default.weight"),
        (REFUSED, WRONG, WRONG, WRONG, REFUSED),
    ),
    "PiSSA as PEFT leaves it": (
        lambda one: with_config(one, init_lora_weights="pissa"),
        (REFUSED, WRONG, WRONG, WRONG, WRONG),
    ),
    "no type": (
        lambda one: with_config(one, peft_type=None),
        (SERVED, REFUSED, SERVED, SERVED, SERVED),
    ),
    "no weights": (lambda one: (one.folder / WEIGHTS).unlink(), (REFUSED,) * 5),
    "more weights": (
        lambda one: save_file({"x": torch.ones(1)}, one.folder / "x.safetensors"),
        (SERVED, WRONG, WRONG, WRONG, SERVED),
    ),
}


@pytest.mark.parametrize("change", BROKEN)
def test_a_folder_broken_by_hand_is_noticed(change, folder):
    one = made(folder, "LoRA, r = 16")
    damage, expected = BROKEN[change]
    damage(one)
    assert outcomes(one) == dict(zip(EACH, expected, strict=True))


def test_weights_of_eight_bits_are_noticed(folder):
    one = made(folder, "LoRA, r = 16")
    tensors = load_file(one.folder / WEIGHTS)
    save_file({k: t.to(torch.int8) for k, t in tensors.items()}, one.folder / WEIGHTS)
    assert set(outcomes(one).values()) == {REFUSED}


def test_the_rank_says_which_option_vllm_needs(folder):
    needed = {"LoRA, r = 16": SERVED, "LoRA, r = 24": "served, 32"}
    needed |= {"LoRA, r = 64": "served, 64", "PiSSA, r = 8": SERVED}
    for name, outcome in needed.items():
        assert ENGINES["vLLM"].outcome(made(folder, name)) == outcome


def rows(heading):
    """The cells of the table below a heading of the guide."""
    text = GUIDE.read_text("utf-8").partition(f"\n## {heading}\n")[2]
    lines = re.findall(r"^\|(.*)\|$", text.partition("\n## ")[0], re.MULTILINE)
    head, _, *body = [[cell.strip() for cell in line.split("|")] for line in lines]
    return head, body


def test_the_guide_has_what_the_table_computes(folder):
    head, body = rows("What becomes of our folders")
    assert head[1:] == EACH and [row[0] for row in body] == list(FOLDERS)
    for name, *cells in body:
        one = made(folder, name)
        outcome = {n: engine.outcome(one) for n, engine in ENGINES.items()}
        assert dict(zip(EACH, cells, strict=True)) == outcome, name


def test_the_guide_names_the_versions_of_the_table():
    _, body = rows("The versions that were read")
    assert {row[0]: row[1].split()[0] for row in body} == {
        name: engine.version for name, engine in ENGINES.items()
    }


BUGS = {
    "a prefix that PEFT has not": Bug(
        Format.key,
        "{PREFIX}{name}",
        "{PREFIX}base.{name}",
        our_folders_are_what_the_engines_ask_for,
    ),
    "no r in the config": Bug(
        Format.config,
        "for ours, theirs in self.fields.items()",
        "for ours, theirs in self.fields.items() if ours != 'r'",
        our_folders_are_what_the_engines_ask_for,
    ),
    "a rank above every limit": Bug(
        formats._twice_the_rank,
        '2 * options["r"]',
        '128 * options["r"]',
        our_folders_are_what_the_engines_ask_for,
    ),
    "PiSSA with the alpha of half its rank": Bug(
        formats._twice_the_rank,
        '2 * options["alpha"]',
        'options["alpha"]',
        our_folders_are_what_the_engines_ask_for,
    ),
    "targets as a pattern": Bug(
        formats._lora_targets,
        "patterns.target_modules_of(model, wrapped)",
        '"|".join(wrapped)',
        our_folders_are_what_the_engines_ask_for,
    ),
    "no factor is compared": Bug(
        Engine._of_scales,
        "if not math.isclose(scale, true, rel_tol=1e-6)",
        "if False",
        what_an_engine_does_not_serve_is_noticed,
    ),
    "no field is looked at": Bug(
        Engine._of_config,
        "name in config and config[name] not in served",
        "False",
        what_an_engine_does_not_serve_is_noticed,
    ),
    "layers are not counted": Bug(
        Engine._of_kinds,
        "self.every and",
        "False and",
        what_an_engine_does_not_serve_is_noticed,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS)
