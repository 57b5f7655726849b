"""Laws of models that other tools have wrapped, offloaded, sharded or written to."""

import copy
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as processes
from accelerate import cpu_offload
from architectures import build
from model_state import assert_same, largest, logits, refused
from planting import law
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import peft_from_scratch as pfs
from peft_from_scratch import nf4
from peft_from_scratch.core import adapter
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.files.adapter_file import AdapterFile


def compiled(module):
    return torch.compile(module, backend="eager")


def around_layers(wrap):
    """A wrapper around each layer, as for compiling or checkpointing by layers."""

    def wrapped(model):
        layers = model.model.layers
        for i, layer in enumerate(layers):
            layers[i] = wrap(layer)
        return model

    return wrapped


def around_a_part(model):
    """A DataParallel within the model, whose `.module` stands inside the names."""
    model.model.layers[1].mlp = nn.DataParallel(model.model.layers[1].mlp)
    return model


AROUND = {
    "DataParallel": nn.DataParallel,
    "DataParallel, compiled": lambda model: compiled(nn.DataParallel(model)),
    "compiled": compiled,
    "compiled by layers": around_layers(compiled),
    "checkpointed": checkpoint_wrapper,
    "checkpointed by layers": around_layers(checkpoint_wrapper),
    "DataParallel inside": around_a_part,
}
METHODS = {
    "lora": lambda model: pfs.lora.inject(model, r=4),
    "biases": lambda model: pfs.lora.inject(model, r=4, bias="all"),
    "qlora": lambda model: pfs.qlora.inject(model, r=4),
    "ia3": pfs.ia3.inject,
    "houlsby": lambda model: pfs.houlsby.inject(model, m=4),
    "full": lambda model: pfs.full.inject(model, keep_original=True),
}
IN_FRONT = {
    "prompt": lambda model: pfs.prompt.inject(model, n=3),
    "prefix": lambda model: pfs.prefix.inject(model, n=3),
}
PAIRS = [(around, method) for around in AROUND for method in METHODS]
PAIRS += [(around, method) for around in AROUND for method in IN_FRONT]


def are_equal(folder, other):
    """Whether two adapter folders hold the same values, under the same names."""
    ours, theirs = map(AdapterFile.read, (folder, other))
    assert (ours.config, ours.notes) == (theirs.config, theirs.notes)
    assert_same(ours.tensors, theirs.tensors)
    return True


def moved(model, inject):
    """The names that inject gives, and the model with all that trains moved."""
    torch.manual_seed(3)
    names = inject(model)
    for parameter in pfs.trainable(model).values():
        parameter.data.add_(0.05)
    return names


@law
@pytest.mark.parametrize("around, method", PAIRS)
def every_verb_looks_through(around="DataParallel", method="lora"):
    """Names, logits, files, merging and removal are those of the model itself."""
    with torch.compiler.set_stance("force_eager"):
        _every_verb_looks_through(AROUND[around], method)


def _every_verb_looks_through(wrap, method):
    inject = (METHODS | IN_FRONT)[method]
    plain, inner = build("llama"), build("llama")
    plain.config.name_or_path = inner.config.name_or_path = "here"
    wrapped = wrap(inner)
    assert moved(wrapped, inject) == moved(plain, inject)
    assert list(pfs.trainable(wrapped)) == list(pfs.trainable(plain))
    trained = logits(plain)
    assert largest(logits(wrapped), trained) < 1e-5
    with adapter.disabled(wrapped), adapter.disabled(plain):
        base = logits(plain)
        assert largest(logits(wrapped), base) < 1e-5
    with TemporaryDirectory() as ours, TemporaryDirectory() as theirs:
        pfs.save(wrapped, ours)
        pfs.save(plain, theirs)
        assert are_equal(ours, theirs)
        again = wrap(build("llama"))
        if method == "qlora":
            nf4.quantize_model(again)
        pfs.load(again, theirs)
    assert largest(logits(again), trained) < 1e-5
    if method not in ("houlsby", *IN_FRONT):
        pfs.merge(again)
        assert largest(logits(again), trained) < 1e-5
    pfs.remove(wrapped)
    assert largest(logits(wrapped), base) < 1e-5
    assert not adapters(wrapped) and not adapter.is_injected(wrapped)


@contextmanager
def one_process():
    """A group of processes that has one member."""
    store = processes.HashStore()
    processes.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        processes.destroy_process_group()


@law
def what_synchronizes_processes_is_looked_through_but_for_injection(folder):
    plain, inner = build("llama"), build("llama")
    moved(plain, METHODS["lora"])
    moved(inner, METHODS["lora"])
    pfs.save(plain, folder / "plain")
    trained, bare = logits(plain), build("llama")
    plan = pfs.lora.plan(bare, r=4)
    with one_process():
        model = DistributedDataParallel(inner)
        pfs.save(model, folder / "wrapped")
        with adapter.disabled(model):
            assert torch.equal(logits(model), logits(bare))
        pfs.merge(model)
        outside = DistributedDataParallel(bare)
        words = "DistributedDataParallel", "Inject into the model itself"
        for inject in (METHODS | IN_FRONT).values():
            with refused(bare, *words):
                inject(outside)
        with refused(bare, *words):
            pfs.lora.plan(outside, r=4)
        with refused(bare, *words):
            adapter.apply(outside, plan)
        with refused(bare, *words):
            pfs.load(outside, folder / "plain")
    assert largest(logits(inner), trained) < 1e-5
    assert are_equal(folder / "plain", folder / "wrapped")


@law
def a_sharded_model_is_saved_whole_and_not_injected(folder):
    """FSDP2 makes DTensors of the parameters, each process with a part."""
    plain, model, other = (build("llama") for _ in range(3))
    moved(plain, METHODS["lora"])
    moved(model, METHODS["lora"])
    pfs.save(plain, folder / "plain")
    with one_process():
        mesh = processes.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        pfs.save(model, folder / "sharded")
        fully_shard(other.model.layers[1], mesh=mesh)
        for inject in (METHODS | IN_FRONT).values():
            assert "layers.1" in said(lambda: inject(other))  # noqa: B023
        assert "DTensor" in said(lambda: pfs.load(other, folder / "plain"))
    assert are_equal(folder / "plain", folder / "sharded")


def said(act, error=ValueError):
    """The words of the error that the act raises; empty where it raises none."""
    try:
        act()
    except error as caught:
        return str(caught)
    return ""


@law
def an_offloaded_model_is_refused(folder):
    """By name, and before anything else is tried; a model that is all sizes is not."""
    trained = build("llama")
    moved(trained, METHODS["lora"])
    pfs.save(trained, folder)
    model = cpu_offload(build("llama"), execution_device="cpu")
    expected = logits(model)
    for inject in (METHODS | IN_FRONT | {"NF4": nf4.quantize_model}).values():
        message = said(lambda: inject(model))  # noqa: B023
        assert "embed_tokens.weight is offloaded" in message, message
        assert "cpu_offload" in message
    assert "is offloaded" in said(lambda: pfs.load(model, folder))
    assert torch.equal(logits(model), expected)
    sizes = build("llama").to("meta")
    METHODS["lora"](sizes)
    pfs.remove(sizes)
    assert "meta" in said(lambda: pfs.load(sizes, folder))
    trained = cpu_offload(trained, execution_device="cpu")
    assert "offloaded" in said(lambda: pfs.save(trained, folder / "no"))
    assert "offloaded" in said(lambda: pfs.merge(trained), pfs.CannotMerge)


@law
@pytest.mark.parametrize("method", IN_FRONT)
def a_write_on_the_trunk_reaches_it(method="prompt"):
    """Reads come from it: a write that stays on the wrapper would have no effect."""
    model, plain = build("llama"), build("llama")
    IN_FRONT[method](model)
    trunk = model.model.base
    plain.model.load_state_dict(trunk.state_dict())
    embedding = nn.Embedding.from_pretrained(torch.randn(320, 32))
    for each in (model, plain):
        each.set_input_embeddings(copy.deepcopy(embedding))
        each.model.layers = each.model.layers[:1]
        each.model.norm = nn.Identity()
    with adapter.disabled(model):
        assert torch.equal(logits(model), logits(plain))
    assert len(trunk.layers) == 1 and list(pfs.trainable(model)) == ["model.P"]


@law
def a_write_on_a_projection_is_refused():
    model = build("llama")
    METHODS["lora"](model)
    wrapped = model.model.layers[0].mlp.up_proj
    new = {
        "weight": nn.Parameter(torch.zeros(48, 32)),
        "bias": nn.Parameter(torch.ones(48)),
    }
    for name, value in new.items():
        with refused(
            model, f".{name} of a wrapped Linear", "remove()", error=AttributeError
        ):
            setattr(wrapped, name, value)
    wrapped.note = "an attribute that the projection has not is the wrapper's own"
    assert "note" in vars(wrapped) and not hasattr(wrapped.base, "note")


@law
def weights_are_tied_again_beside_an_adapter():
    model = build("qwen")
    pfs.lora.inject(model, r=4, targets=["lm_head"])
    names, before = list(pfs.trainable(model)), logits(model)
    model.tie_weights()
    assert list(pfs.trainable(model)) == names == ["lm_head.A", "lm_head.B"]
    assert model.lm_head.base.weight is model.get_input_embeddings().weight
    assert torch.equal(logits(model), before)


@law
def sizes_are_read_through_an_adapter():
    """in_features and out_features are numbers that no adapter changes."""
    for architecture, names in {
        "llama": ("in_features", "out_features"),
        "gpt2": ("nx", "nf"),
    }.items():
        model = build(architecture)
        METHODS["lora"](model)
        for wrapped in adapters(model).values():
            for name in names:
                assert getattr(wrapped, name) == getattr(wrapped.base, name)


@law
def a_part_of_the_name_base_layer_is_no_adapter():
    """Only what is built as PEFT's adapters are is taken for one."""
    model = build("llama")
    model.model.base_layer = model.model.layers[0].mlp
    assert METHODS["lora"](model)


@law
def the_hidden_size_is_that_of_the_text():
    """A model of text and images has a config for each, and none of its own size."""
    model, plain = build("llama"), build("llama")
    text = model.config
    model.config = SimpleNamespace(get_text_config=lambda: text)
    for inject in (METHODS["houlsby"], METHODS["ia3"]):
        assert inject(model) == inject(plain)
        pfs.remove(model)
        pfs.remove(plain)


@law
def a_module_without_a_config_is_refused_with_what_to_do():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    for inject in (METHODS["houlsby"], METHODS["ia3"]):
        with refused(net, "Sequential", "hidden_size", "targets="):
            inject(net)
    assert pfs.houlsby.inject(net, m=2, targets={"0": net[0]}) == ["0"]
    pfs.remove(net)
    assert pfs.ia3.inject(net, targets=["0"]) == ["0"]
