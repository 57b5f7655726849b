"""Adapters on disk, and what each of them answers alone: the reference of serving."""

import time
from dataclasses import replace

import torch

from peft_from_scratch import load, lora, remove, save, trainable
from peft_from_scratch.serving.requests import Request

KINDS = {  # name: what is injected; ranks of four classes, and three sets of targets
    "small": {"r": 3},
    "square": {"r": 4},
    "attention": {"r": 16, "targets": "attention"},
    "mlp": {"r": 33, "targets": "mlp", "rslora": True},
    "uneven": {"r": 2, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 40}},
}
SIZE = 0.05  # standard deviation of A and B: enough to change most tokens of tiny


def adapter_folder(model, folder, *, seed=0, size=SIZE, method=lora, **options):
    """Save an adapter with random values; the model is as before."""
    method.inject(model, **options)
    dice = torch.Generator().manual_seed(seed)
    for parameter in trainable(model).values():
        values = torch.randn(parameter.shape, generator=dice, dtype=torch.float64)
        parameter.data.copy_(size * values)
    save(model, folder)
    remove(model)
    return folder


def adapter_folders(model, root):
    """{name: folder} of all KINDS that name modules of this model."""
    last = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return {
        name: adapter_folder(model, root / name, seed=seed, **options)
        for seed, (name, options) in enumerate(KINDS.items())
        if last.issuperset(options.get("rank_pattern", ()))
    }


@torch.no_grad()
def alone(model, folder, ids):
    """The logits (tokens, vocabulary) of one row with one adapter, or with none."""
    if folder is None:
        return model(input_ids=torch.tensor([ids])).logits[0]
    load(model, folder)
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    remove(model)
    return logits


@torch.no_grad()
def greedy(model, folder, request: Request):
    """The tokens of a request, one after the other, computed anew from the start."""
    if folder is not None:
        load(model, folder)
    ids = list(request.prompt)
    for _ in range(request.max_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    if folder is not None:
        remove(model)
    return ids[len(request.prompt) :]


def served(engine, requests, turns=10_000):
    """The pieces of each request, the engine's turns taken here and not in a thread."""
    pieces = [[] for _ in requests]
    for request, its in zip(requests, pieces, strict=True):
        engine.submit(request, its.append)
    run(engine, pieces, turns)
    return pieces


def run(engine, pieces, turns=10_000):
    """Take turns until each request has its last piece."""
    for _ in range(turns):
        if all(its and its[-1].reason for its in pieces):
            return
        if not engine.turn():  # it waits for a thread that reads an adapter
            time.sleep(0.001)
    raise AssertionError(f"no end after {turns} turns: {[i[-1:] for i in pieces]}")


def tokens_of(pieces):
    return [token.id for piece in pieces for token in piece.tokens]


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def asking(prompt, adapter=None, max_tokens=6, **others):
    return replace(Request(tuple(prompt), adapter, max_tokens), **others)
