"""Laws of adapter files: what is saved is what is loaded."""

import copy
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from adapter_files import contents, parsed, saved, tampered, trained
from architectures import CONFIGS, build
from model_state import assert_same, largest, logits, refused, values
from planting import law
from torch import nn

import peft_from_scratch as pfs
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.files import adapter_file
from peft_from_scratch.files.adapter_file import CONFIG

VARIANTS = {
    "rslora": dict(rslora=True, alpha=3.5),
    "one-module": dict(targets="layers.1.mlp.up_proj|h.1.mlp.c_fc|layers.1.fc1"),
    "function": dict(targets=lambda name, module: ".1." in name),
    "exclude": dict(exclude="layers.0.*|h.0.*"),
    "patterns": dict(
        rank_pattern={r".*\.0\..*": 2, "c_fc|up_proj|fc1": 5},
        alpha_pattern={r".*\.1\..*": 2.5},
    ),
    "dropout": dict(dropout=0.25),
    "biases": dict(bias="all"),
    "head": dict(targets=["all-linear", "lm_head"]),
}


@law
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", CONFIGS)
def a_round_trip_is_bit_equal(folder, variant, architecture="llama"):
    model = trained(architecture, **VARIANTS[variant])
    pfs.save(model, folder)
    loaded, (tensors, *said) = build(architecture), parsed(folder)
    assert pfs.load(loaded, folder) == list(adapters(model))
    assert_same(values(loaded), values(model))
    assert torch.equal(logits(loaded), logits(model))
    pfs.save(loaded, folder)
    tensors_again, *said_again = parsed(folder)
    assert_same(tensors_again, tensors)
    assert said_again == said


def a_file_without_lora_alpha_means_pefts_default(folder):
    """peft.LoraConfig().lora_alpha is 8, where ours is 16."""
    sound = saved(folder, alpha=8)
    cut = tampered(sound, folder / "cut", lambda _, config: config.pop("lora_alpha"))
    loaded, expected = build("llama"), build("llama")
    pfs.load(loaded, cut)
    pfs.load(expected, sound)
    assert torch.equal(logits(loaded), logits(expected))


def an_adapter_that_does_nothing_warns(folder):
    model = build("llama")
    pfs.lora.inject(model)
    pfs.save(model, folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pfs.load(build("llama"), folder)
    assert any("changes no logit" in str(w.message) for w in caught)


@law
def saving_a_resized_vocabulary_is_refused(folder):
    model = trained()
    model.resize_token_embeddings(323)
    with refused(model, "320", "323", "resize"):
        pfs.save(model, folder)
    assert contents(folder) == {}


@law
@pytest.mark.parametrize("rows", [319, 330])
def loading_onto_another_vocabulary_is_refused(folder, rows=330):
    model = build("llama")
    model.resize_token_embeddings(rows)
    with refused(model, "320", str(rows)):
        pfs.load(model, saved(folder))


@law
def a_failed_save_leaves_the_folder_as_it_was(folder, monkeypatch):
    before, model = contents(saved(folder)), trained(r=2)

    def disk_full(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError("planted: no space left")

    with monkeypatch.context() as patched, refused(model, "planted", error=OSError):
        patched.setattr(adapter_file, "save_file", disk_full)
        pfs.save(model, folder)
    assert contents(folder) == before


@law
def a_file_that_cannot_be_replaced_leaves_the_folder_as_it_was(folder, monkeypatch):
    """As on Windows, where a file that somebody has mapped stays where it is."""
    before, model = contents(saved(folder)), trained(r=2)
    replace = os.replace

    def in_use(old, new):
        if Path(new) == Path(folder, CONFIG) and "before" not in str(old):
            raise PermissionError("planted")
        replace(old, new)

    refusal = refused(model, "planted", error=PermissionError)
    with monkeypatch.context() as patched, refusal:
        patched.setattr(os, "replace", in_use)
        pfs.save(model, folder)
    assert contents(folder) == before


@law
def names_that_end_alike_are_told_apart(folder):
    """ "0" is a module, and the end of the name of another, "2.0"."""

    def net():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), inner)

    model, loaded, x = net(), net(), torch.randn(4, 8)
    targets = {name: model.get_submodule(name) for name in ("0", "2.0")}
    pfs.lora.inject(model, r=2, targets=targets, alpha_pattern={"^0$": 2.5})
    for parameter in pfs.trainable(model).values():
        nn.init.normal_(parameter)
    pfs.save(model, folder)
    assert pfs.load(loaded, folder) == ["0", "2.0"]
    assert torch.equal(loaded(x), model(x))


class TakesTokensAlone(nn.Module):
    """A language model whose forward knows neither a mask nor a cache."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(320, 8), nn.Linear(8, 320)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids):
        return SimpleNamespace(logits=self.head(self.embedding(ids)))


@law
def a_model_is_asked_with_the_arguments_that_it_has(folder):
    """load() looks for a logit that changes; here one does, and there none."""
    model = TakesTokensAlone()
    pfs.lora.inject(model, r=2, targets="head")
    pfs.save(model, folder / "untrained")
    nn.init.normal_(model.head.B)
    pfs.save(model, folder / "trained")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pfs.load(TakesTokensAlone(), folder / "trained")
    with pytest.warns(UserWarning, match="changes no logit"):
        pfs.load(TakesTokensAlone(), folder / "untrained")


@law
def the_task_in_a_file_is_the_models(folder):
    """PEFT asks a causal model for what a plain module has not."""
    net, causal = nn.Sequential(nn.Linear(8, 8)), build("llama")
    x, base = torch.randn(4, 8), copy.deepcopy(net)
    pfs.lora.inject(net, r=2, targets="0")
    pfs.lora.inject(causal, r=2)
    nn.init.normal_(net[0].B)
    pfs.save(net, folder / "net")
    pfs.save(causal, folder / "causal")
    assert parsed(folder / "net")[2]["task_type"] is None
    assert parsed(folder / "causal")[2]["task_type"] == "CAUSAL_LM"
    theirs = peft.PeftModel.from_pretrained(base, folder / "net")
    assert largest(theirs(x).detach(), net(x).detach()) < 1e-6


@law
def an_adapter_with_nan_is_not_saved(folder):
    model = trained()
    list(adapters(model).values())[3].B.data[0, 0] = torch.nan
    with refused(model, "o_proj", "not finite"):
        pfs.save(model, folder)
    assert contents(folder) == {}
