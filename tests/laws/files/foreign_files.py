"""Laws of adapter folders as other tools leave them: read, or refused for a reason."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from architectures import build
from model_state import logits, refused, train
from planting import law
from safetensors.torch import load_file, save_file

import peft_from_scratch as pfs
from peft_from_scratch.files.adapter_file import CONFIG, WEIGHTS
from peft_from_scratch.files.formats import PREFIX

PART = "adapter_model-0000{}-of-0000{}.safetensors"
METHODS = {
    "lora": partial(pfs.lora.inject, r=3, targets=["q_proj", "down_proj"]),
    "dora": partial(pfs.dora.inject, r=3, targets=["q_proj", "down_proj"]),
    "ia3": pfs.ia3.inject,
}
# What PEFT's classes call these tensors in memory, of an adapter of this name.
IN_MEMORY = {
    ".lora_A.weight": ".lora_A.{}.weight",
    ".lora_B.weight": ".lora_B.{}.weight",
    ".lora_magnitude_vector": ".lora_magnitude_vector.{}.weight",
    ".ia3_l": ".ia3_l.{}",
}


def trained(method="lora"):
    model = build("llama")
    METHODS[method](model)
    train(model, 2)
    return model


def with_adapter_name(key, name="default"):
    for plain, named in IN_MEMORY.items():
        if key.endswith(plain):
            return key.removesuffix(plain) + named.format(name)
    raise AssertionError(key)


def renamed(change):
    """A way to leave a folder: with each key changed."""

    def leave(folder, tensors):
        save_file({change(key): t for key, t in tensors.items()}, folder / WEIGHTS)

    return leave


def in_parts(folder, tensors, total=3, missing=()):
    for i in range(1, total + 1):
        part = {key: tensors[key] for key in list(tensors)[i - 1 :: total]}
        if i not in missing:
            save_file(part, folder / PART.format(i, total))


def in_another_encoding(encoding, mark=""):
    def leave(folder, tensors):
        text = mark + (folder / CONFIG).read_text(encoding="utf-8")
        (folder / CONFIG).write_text(text, encoding=encoding)
        save_file(tensors, folder / WEIGHTS)

    return leave


# How the folder was left -> (folder with a sound config, sound tensors) -> None
LEFT = {
    "compiled around": renamed(lambda key: f"_orig_mod.{key}"),
    "compiled inside": renamed(lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod.")),
    "DDP around": renamed(lambda key: f"module.{key}"),
    "DDP around a compiled one": renamed(lambda key: f"module._orig_mod.{key}"),
    "DDP inside": renamed(lambda key: key.replace(PREFIX, f"{PREFIX}module.")),
    "checkpointed layers": renamed(
        lambda key: key.replace(".layers.0.", ".layers.0._checkpoint_wrapped_module.")
    ),
    "FSDP": renamed(lambda key: key.replace(".layers", "._fsdp_wrapped_module.layers")),
    "the adapter's name": renamed(with_adapter_name),
    "another name": renamed(partial(with_adapter_name, name="my_adapter")),
    "no prefix": renamed(lambda key: key.removeprefix(PREFIX)),
    "the prefix twice": renamed(lambda key: PREFIX + key),
    "in parts": in_parts,
    "a byte order mark": in_another_encoding("utf-8", "\ufeff"),
    "UTF-16": in_another_encoding("utf-16"),
}


@law
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", LEFT)
def what_other_tools_leave_is_the_same_adapter(folder, how, method="lora"):
    model, loaded = trained(method), build("llama")
    pfs.save(model, folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    LEFT[how](folder, tensors)
    pfs.load(loaded, folder)
    assert torch.equal(logits(loaded), logits(model))


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def two_adapters(folder, tensors):
    names = [partial(with_adapter_name, name=name) for name in ("one", "two")]
    both = {name(key): t.clone() for key, t in tensors.items() for name in names}
    save_file(both, folder / WEIGHTS)


def twice(folder, tensors):
    others = {f"_orig_mod.{key}": tensor + 1 for key, tensor in tensors.items()}
    save_file(tensors | others, folder / WEIGHTS)


def part_twice(folder, tensors):
    for i in (1, 2):
        save_file(tensors, folder / PART.format(i, 2))


def in_a_folder(folder, tensors):
    (folder / "default").mkdir()
    (folder / CONFIG).rename(folder / "default" / CONFIG)
    save_file(tensors, folder / "default" / WEIGHTS)


def pointer(folder, tensors):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / WEIGHTS).write_text(text)


# How the folder was left -> (the same, the error, words of the reason)
MISSING = FileNotFoundError
REASONS = {
    "a pickle": (
        lambda folder, tensors: torch.save(
            Touch(folder / "touched"), folder / "adapter_model.bin"
        ),
        MISSING,
        ["adapter_model.bin is a pickle", "safetensors"],
    ),
    "a missing part": (partial(in_parts, missing=[2]), MISSING, ["3 parts", "others"]),
    "a part twice": (part_twice, ValueError, ["part before"]),
    "two adapters": (two_adapters, ValueError, ["['one', 'two']", "one"]),
    "a tensor twice": (twice, ValueError, ["more than once"]),
    "a folder inside": (in_a_folder, MISSING, ["default", "name one of those"]),
    "a pointer of Git LFS": (pointer, ValueError, ["Git LFS", "git lfs pull"]),
    "nothing": (lambda folder, tensors: None, MISSING, ["has no weights"]),
}


@law
@pytest.mark.parametrize("how", REASONS)
def what_cannot_be_read_is_refused_for_its_reason(folder, how="a pickle"):
    leave, error, words = REASONS[how]
    pfs.save(trained(), folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    leave(folder, tensors)
    model = build("llama")
    with refused(model, *words, error=error):
        pfs.load(model, folder)
    assert not (folder / "touched").exists()


@law
def a_model_with_a_part_called_module_keeps_its_names(folder):
    """Its keys are sound as they are: nothing is taken out of them."""
    model = torch.nn.ModuleDict({"module": build("llama")})
    model.update(build("llama").named_children())  # where they would lead without it
    again = copy.deepcopy(model)
    pfs.lora.inject(model, r=3, targets=r"module\..*q_proj")
    for parameter in pfs.trainable(model).values():
        parameter.data.add_(0.1)
    pfs.save(model, folder)
    assert all(
        key.startswith(f"{PREFIX}module.") for key in load_file(folder / WEIGHTS)
    )
    pfs.load(again, folder)
    assert torch.equal(logits(again["module"]), logits(model["module"]))
