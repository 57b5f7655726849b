"""Sound adapter files, and the changes that make them unsound."""

import json
from pathlib import Path

import torch
from architectures import build
from model_state import train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import peft_from_scratch as pfs
from peft_from_scratch.files.adapter_file import CONFIG, WEIGHTS

A, B = "lora_A.weight", "lora_B.weight"
MODULE = "base_model.model.model."
FIRST = f"{MODULE}layers.0.self_attn.q_proj."
LAST = f"{MODULE}layers.1.mlp.down_proj."


def trained(architecture="llama", *, method=pfs.lora, **arguments):
    """A random model after two steps with r=4, alpha=8 unless `arguments` differ."""
    model = build(architecture)
    if method is pfs.lora:
        arguments = {"r": 4, "alpha": 8} | arguments
    method.inject(model, **arguments)
    train(model, 2)
    return model


def saved(folder, **arguments):
    """`folder`, with the file of a trained model in it."""
    pfs.save(trained(**arguments), folder)
    return folder


def contents(folder):
    """{path: bytes} of everything below a folder; False for a folder."""
    return {
        str(path.relative_to(folder)): path.is_file() and path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
    }


def parsed(folder):
    """(tensors, metadata, config); safetensors shuffles its metadata's bytes."""
    with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    config = json.loads((Path(folder) / CONFIG).read_text())
    return load_file(Path(folder) / WEIGHTS), metadata, config


def tampered(source, folder, change):
    """`folder`, with a copy of the file in `source` after change(tensors, config)."""
    tensors, metadata, config = parsed(source)
    change(tensors, config)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def drop(*keys):
    return lambda tensors, config: [tensors.pop(key) for key in keys]


def put(key, change):
    def apply(tensors, config):
        tensors[key] = change(tensors[key]).contiguous()

    return apply


def add(**shapes):
    """Tensors of ones under MODULE; dots are written as double underscores."""

    def apply(tensors, config):
        for name, shape in shapes.items():
            tensors[MODULE + name.replace("__", ".")] = torch.ones(shape)

    return apply


def say(**fields):
    return lambda tensors, config: config.update(fields)


def one(value):
    """Exchange the second row's values."""
    return lambda tensor: tensor.index_fill(0, torch.tensor([1]), value)
