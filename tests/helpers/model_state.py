"""What the laws look at: logits, gradients, and every bit of a model's state."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from architectures import VOCAB
from device import DEVICE
from torch import nn

import peft_from_scratch as pfs

transformers.logging.set_verbosity_error()
PLAIN = (bool, int, float, str, type(None))


def tokens(rows=3, length=10, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)  # (b, t)
    return ids.to(DEVICE)


@torch.no_grad()
def logits(model, ids=None):
    return model(tokens() if ids is None else ids, use_cache=False).logits


def loss(model, ids=None):
    ids = tokens() if ids is None else ids
    return model(ids, labels=ids, use_cache=False).loss


def gradients(model, seed=0, ids=None):
    """{name: gradient of the loss} of what trains, in the mode the model is in."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss(model, ids).backward()
    return {name: p.grad.clone() for name, p in pfs.trainable(model).items()}


def train(model, steps=1, seed=1):
    """Adam over *all* parameters, so that whatever is not frozen moves."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    mode = model.training
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, tokens(seed=seed + step)).backward()
        optimizer.step()
    model.zero_grad()
    model.train(mode)


def values(model):
    """A copy of what trains."""
    return {n: p.detach().clone() for n, p in pfs.trainable(model).items()}


def snapshot(model):
    """Everything about a model that an outsider could see, as {fact: value}."""
    facts = {}
    for name, module in model.named_modules():
        kept = vars(module)
        facts[f"type of {name}"] = type(module)
        facts[f"attributes of {name}"] = sorted(kept)
        facts[f"values in {name}"] = {
            key: value for key, value in kept.items() if isinstance(value, PLAIN)
        }
        for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            facts[f"{key} of {name}"] = len(kept[key])
    for name, parameter in model.named_parameters(remove_duplicate=False):
        facts[f"object {name}"] = id(parameter)
        facts[f"flag of {name}"] = parameter.requires_grad
    facts |= {name: tensor.clone() for name, tensor in model.state_dict().items()}
    facts["buffers"] = {name: b.clone() for name, b in model.named_buffers()}
    config = getattr(model, "config", None)
    facts["config"] = str(config)
    facts["attention"] = getattr(config, "_attn_implementation", None)
    return facts


def assert_same(after, before):
    """Two snapshots, or any two nested dicts of tensors, equal bit for bit."""
    assert list(after) == list(before), set(after) ^ set(before)
    for key, value in before.items():
        if isinstance(value, dict):
            assert_same(after[key], value)
        elif isinstance(value, torch.Tensor):
            assert after[key].dtype == value.dtype, key
            assert bits(after[key]).equal(bits(value)), f"{key} changed"
        else:
            assert after[key] == value, f"{key}: {value} became {after[key]}"


def bits(tensor):
    """NaN equals NaN and -0 differs from 0 when the bytes are compared."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def largest(ours, theirs):
    """max |ours - theirs| / max |theirs|, over two tensors or two dicts of them."""
    if isinstance(theirs, torch.Tensor):
        ours, theirs = {"": ours}, {"": theirs}
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    scale = max(tensor.abs().max().item() for tensor in theirs.values())
    return max(_distance(ours[key], theirs[key]) for key in theirs) / scale


def _distance(ours, theirs):
    """NaN on one side is infinitely far: max() would pass over it."""
    assert ours.shape == theirs.shape
    distance = (ours.double() - theirs.double()).abs().max().item()
    return math.inf if math.isnan(distance) else distance


@contextmanager
def refused(model: nn.Module, *words, error=ValueError) -> Iterator[None]:
    """The block raises `error` with `words` in its message; the model is untouched."""
    before = snapshot(model)
    try:
        yield
    except error as caught:
        message = str(caught)
    else:
        raise AssertionError(f"no {error.__name__} was raised")
    assert_same(snapshot(model), before)
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
