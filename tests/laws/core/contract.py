"""The laws of the contract: what holds for every method on every architecture.

A law is a function (method, architecture) that raises AssertionError where it is
broken. test_contract.py runs each on every row of its table; test_lora_bugs.py plants
bugs and demands that the law which it names fails.
"""

import copy
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from tempfile import TemporaryDirectory

import torch
from architectures import CONFIGS, build
from model_state import (
    assert_same,
    gradients,
    largest,
    logits,
    loss,
    refused,
    snapshot,
    tokens,
    train,
    values,
)
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import peft_from_scratch as pfs
from peft_from_scratch.core import adapter
from peft_from_scratch.core.adapter import adapters


@dataclass(frozen=True)
class Method:
    """One row of the contract: how to inject a method, and what it promises."""

    name: str
    inject: Callable[[nn.Module], list[str]]
    count: Callable[[nn.Module], int]  # trainable parameters, of an untouched model
    mergeable: bool = True
    restores: bool = True  # False: remove() raises, since the originals are lost
    start: float | None = 0.0  # logits' largest relative distance from the pretrained
    #   model's: 0 bit for bit, None where the method makes no such promise
    saved: bool = True  # has a file format that gives the same method back
    wraps: bool = True  # False: trains the model's own tensors only
    random: bool = False  # draws random numbers in training mode
    prepare: Callable[[nn.Module], object] | None = None  # makes the untouched model
    #   of a freshly loaded one; what remove() gives back
    merges_within: float = 1e-5  # of the unmerged logits: what rounding allows
    architectures: tuple[str, ...] = tuple(CONFIGS)  # that it works on


@cache
def original(architecture, dtype=torch.float32, prepare=None):
    """Built once; to be copied, never changed."""
    model = build(architecture, dtype=dtype)
    if prepare:
        prepare(model)
    return model


def fresh(method, architecture, *, steps=0, dtype=torch.float32):
    """(an injected model, the untouched one), after `steps` of training."""
    untouched = copy.deepcopy(original(architecture, dtype, method.prepare))
    model = copy.deepcopy(untouched)
    method.inject(model)
    train(model, steps)
    return model, untouched


def starts_from_the_pretrained_model(method, architecture):
    model, untouched = fresh(method, architecture)
    for training in (False, True):
        ours, theirs = (logits(m.train(training)) for m in (model, untouched))
        if method.start == 0:
            assert torch.equal(ours, theirs)
        elif method.start is not None:
            assert 0 < largest(ours, theirs) < method.start
        else:
            assert ours.shape == theirs.shape


def counts_equal_the_formula(method, architecture):
    model, _ = fresh(method, architecture)
    counted = sum(p.numel() for p in pfs.trainable(model).values())
    assert counted == method.count(original(architecture))


def tensors_lie_in_memory_as_files_do(method, architecture):
    """AdamW pairs a parameter with a loaded moment by address, not by index."""
    model, _ = fresh(method, architecture)
    assert all(p.is_contiguous() for p in pfs.trainable(model).values())


def only_what_is_trainable_moves(method, architecture):
    model, untouched = fresh(method, architecture)
    declared = {id(p) for p in pfs.trainable(model).values()}
    loss(model.train()).backward()
    assert declared == {id(p) for p in model.parameters() if p.requires_grad}
    assert declared == {id(p) for p in model.parameters() if p.grad is not None}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    train(model)
    for name, parameter in model.named_parameters():
        if id(parameter) not in declared:
            assert torch.equal(parameter, before[name]), f"{name} moved"
    assert_same(dict(model.named_buffers()), buffers)
    assert largest(logits(model.eval()), logits(untouched)) > 1e-4


def every_tensor_moves_after_an_evaluation(method, architecture):
    model, _ = fresh(method, architecture, steps=1)
    before, stale = values(model), logits(model.eval())
    train(model.train(), 2)
    for name, tensor in values(model).items():
        assert not torch.equal(tensor, before[name]), f"{name} did not move"
    assert not torch.equal(logits(model.eval()), stale)


def plan_of(method, model):
    """The plan that stands beside the method's inject, of the same arguments."""
    function = getattr(method.inject, "func", method.inject)
    arguments = getattr(method.inject, "keywords", {})
    return sys.modules[function.__module__].plan(model, **arguments)


def half_in_training(method, architecture):
    """A fresh model with its first parameter frozen and one layer in training mode."""
    model = copy.deepcopy(original(architecture, prepare=method.prepare))
    next(model.parameters()).requires_grad_(False)
    next(
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
    ).train()
    return model


def a_plan_touches_nothing(method, architecture):
    """Not a bit, a flag, a module or a training mode, even where they are mixed."""
    model = half_in_training(method, architecture)
    before, expected = snapshot(model), logits(model)
    plan_of(method, model)
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model), expected)


def inject_is_plan_and_apply(method, architecture):
    models = [half_in_training(method, architecture) for _ in range(2)]
    torch.manual_seed(7)
    names = method.inject(models[0])
    torch.manual_seed(7)
    assert adapter.apply(models[1], plan_of(method, models[1])) == names
    one, other = map(everything_about, models)
    assert_same(one, other)


def everything_about(model):
    """A snapshot that may be compared with another model's."""
    injection = adapter.injected(model)
    facts = snapshot(model) | {"record": (injection.method, injection.config)}
    facts |= {"flags before": injection.requires_grad}
    facts |= {"originals": injection.originals, "trains": values(model)}
    return {k: v for k, v in facts.items() if not k.startswith("object ")}


def remove_is_exact(method, architecture):
    model = copy.deepcopy(original(architecture, prepare=method.prepare))
    frozen_before = next(model.parameters()).requires_grad_(False)
    layer = next(
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
    )
    layer.train()  # a model half in training mode, half frozen: both must come back
    before = snapshot(model)
    method.inject(model)
    train(model, 2)
    if not method.restores:
        with refused(model, "keep_original"):
            pfs.remove(model)
        return
    pfs.remove(model)
    assert not frozen_before.requires_grad
    model.eval()
    layer.train()
    assert_same(snapshot(model), before)
    with refused(model, "no adapter"):
        pfs.remove(model)


def disabled_is_the_untouched_model(method, architecture):
    """Inside the block, and not behind it: an error does not leave the adapters off."""
    model, untouched = fresh(method, architecture, steps=2)
    if not method.restores:
        with refused(model, "keep_original"), adapter.disabled(model):
            pass
        return
    before, adapted = snapshot(model), logits(model)
    for _ in range(2):
        with suppress(Stop), adapter.disabled(model):
            assert torch.equal(logits(model), logits(untouched))
            raise Stop
        assert_same(snapshot(model), before)
        assert torch.equal(logits(model), adapted)


class Stop(Exception):
    """What ends a block early."""


def mode_is_kept_and_changes_nothing(method, architecture):
    model = copy.deepcopy(original(architecture, prepare=method.prepare))
    layer = next(m for name, m in model.named_modules() if name.endswith(".1"))
    layer.train()
    method.inject(model)
    for name, module in model.named_modules():
        expected = module in set(layer.modules())
        assert module.training == expected, f"{name} is in the other mode"
    train(model, 2)
    model.eval()
    before, expected = snapshot(model), logits(model)
    for _ in range(2):
        in_training = logits(model.train())
        assert method.random or torch.equal(in_training, expected)
        assert torch.equal(logits(model.eval()), expected)
    assert_same(snapshot(model), before)


def merged_equals_unmerged(method, architecture):
    model, untouched = fresh(method, architecture, steps=3)
    if not method.mergeable:
        with refused(model, error=pfs.CannotMerge):
            pfs.merge(model)
        return
    unmerged, wrapped = logits(model), list(adapters(model))
    pfs.merge(model)
    assert largest(logits(model), unmerged) < method.merges_within
    assert largest(logits(model), logits(untouched)) > 1e-3
    expected, plain = types(untouched), types(original(architecture))
    assert types(model) == expected | {name: plain[name] for name in wrapped}
    assert all(p.requires_grad for p in model.parameters())
    assert sorted(vars(model)) == sorted(vars(untouched))


def types(model):
    return {name: type(module) for name, module in model.named_modules()}


def merged_equals_unmerged_in_fp64(method, architecture):
    model, _ = fresh(method, architecture, steps=3, dtype=torch.float64)
    unmerged = logits(model)
    pfs.merge(model)
    assert largest(logits(model), unmerged) < 1e-12


def merge_is_all_or_nothing(method, architecture):
    model, _ = fresh(method, architecture, steps=1)

    def cannot(dtype):
        raise pfs.CannotMerge("planted")

    list(adapters(model).values())[-1].merged = cannot
    with refused(model, "planted", error=pfs.CannotMerge):
        pfs.merge(model)


def a_second_injection_is_refused(method, architecture):
    model, _ = fresh(method, architecture, steps=1)
    with refused(model, "already", "remove()"):
        method.inject(model)


def saved_and_loaded_is_bit_equal(method, architecture):
    model, untouched = fresh(method, architecture, steps=2)
    with TemporaryDirectory() as folder:
        pfs.save(model, folder)
        loaded = copy.deepcopy(untouched)
        names = pfs.load(loaded, folder)
    assert names == list(adapters(model)) or not method.wraps
    assert_same(values(loaded), values(model))
    assert torch.equal(logits(loaded), logits(model))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert flags == {n: p.requires_grad for n, p in loaded.named_parameters()}


def padding_changes_no_generated_token(method, architecture):
    model, _ = fresh(method, architecture, steps=3)
    prompts = [row[: 4 + 3 * i] for i, row in enumerate(tokens())]
    width = max(map(len, prompts))
    ids = torch.stack([nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    asked = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    together = model.generate(ids, attention_mask=(ids != 0).long(), **asked)
    for prompt, answer in zip(prompts, together, strict=True):
        mask = torch.ones_like(prompt)[None]
        alone = model.generate(prompt[None], attention_mask=mask, **asked)[0]
        assert torch.equal(alone[len(prompt) :], answer[width:])


def checkpointing_changes_no_gradient(method, architecture):
    model, _ = fresh(method, architecture, steps=1)
    layer = next(
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
    )
    runs = []
    inner = next(m for m in layer.modules() if not list(m.children()))
    inner.register_forward_hook(lambda *_: runs.append(1))
    expected = gradients(model.train())
    once = len(runs)
    model.gradient_checkpointing_enable()
    assert largest(gradients(model), expected) < 1e-6
    assert len(runs) == 3 * once, "the layer was not computed a second time"


def a_copy_is_independent(method, architecture):
    model, untouched = fresh(method, architecture, steps=2)
    duplicate = copy.deepcopy(model)
    before, expected = snapshot(model), logits(model)
    assert torch.equal(logits(duplicate), expected)
    train(duplicate)
    assert not torch.equal(logits(duplicate), expected)
    if method.restores:
        pfs.remove(duplicate)
        assert torch.equal(logits(duplicate), logits(untouched))
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model), expected)


def state_dict_is_the_whole_state(method, architecture):
    """Nothing that decides a logit was kept elsewhere while it was evaluated."""
    model, untouched = fresh(method, architecture, steps=1)
    logits(model.eval())
    train(model, 2)
    method.inject(untouched)
    untouched.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(untouched), logits(model))


def two_adapters_in_turn_share_a_base(method, architecture):
    model = copy.deepcopy(original(architecture, prepare=method.prepare))
    before, plain, trained = snapshot(model), logits(model), []
    for seed in (1, 2):
        method.inject(model)
        assert method.start != 0 or torch.equal(logits(model), plain)
        train(model, 2, seed=10 * seed)
        trained.append(logits(model))
        pfs.remove(model)
        assert_same(snapshot(model), before)
    assert not torch.equal(*trained)


def autocast_trains_close_to_fp32(method, architecture):
    model, _ = fresh(method, architecture, steps=2)
    expected, exact = logits(model), gradients(model.train())
    with torch.autocast("cpu", torch.bfloat16):
        rough = logits(model.eval())
        model.zero_grad()
        torch.manual_seed(0)
        total = loss(model.train())
    total.backward()
    assert largest(rough, expected) < 0.1
    parameters = pfs.trainable(model)
    assert all(p.grad.dtype == p.dtype for p in parameters.values())
    found = {name: parameter.grad for name, parameter in parameters.items()}
    # OPT's ReLU flips: the fewer the tensors, the more it weighs.
    assert largest(found, exact) < 0.3
