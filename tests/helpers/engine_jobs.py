"""What the tests of parallel/ let each rank do: see ranks.on_ranks, and launch."""

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from model_state import largest
from small_runs import adapted, recipe, run
from torch import nn
from torch.distributed.tensor import DTensor

from peft_from_scratch.core.adapter import trainable
from peft_from_scratch.memory import formulas, zero
from peft_from_scratch.methods import qlora
from peft_from_scratch.parallel.engines import engine_of
from peft_from_scratch.parallel.fsdp2 import FSDP2
from peft_from_scratch.parallel.group import Group, join
from peft_from_scratch.training.checkpoint import checkpoints
from peft_from_scratch.training.state import new_state

WIDE = torch.float64
# Rounding alone differs. AdamW divides by the root of v: of a gradient that is only
# rounding, as that of GPT-2's key biases is, it makes updates of 1e-11.
CLOSE = 1e-9
# Four rows in two micro-batches: one row a rank, of very different label tokens.
SETTINGS = recipe(batch=4, steps=6, validate_every=3, checkpoint_every=1)


class Stop(Exception):
    """What ends a run in the middle."""


def model_of(method, dtype=WIDE):
    if method == "qlora":
        model = adapted("full", "gpt2", dropout=0.0, dtype=dtype)
        nn.Module.__delattr__(model, "pfs_injection")
        qlora.inject(model, r=4, alpha=8)
        return model
    # In float32 the rounding in the gradients of GPT-2's key biases moves them.
    rounds = method == "full" and dtype == torch.float32
    return adapted(method, "llama" if rounds else "gpt2", dropout=0.0, dtype=dtype)


def end_of(model, history):
    """(loss, norm, validation, weights) of a run."""
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    return history.loss, history.norm, [v for _, v in history.validation], values


def one_rank(method, dtype=WIDE, settings=SETTINGS):
    model = model_of(method, dtype)
    return end_of(model, run(model, settings))


def apart(ours, theirs):
    """The largest distance between two runs: of losses, norms, validations, weights."""
    curves = zip(ours[:3], theirs[:3], strict=True)
    pairs = (zip(a, b, strict=True) for a, b in curves)
    return max(
        *(abs(a - b) for each in pairs for a, b in each), largest(ours[3], theirs[3])
    )


def trains_as_one_rank(engine, stage, method, dtype=WIDE, most=CLOSE, **changes):
    settings = replace(SETTINGS, **changes)
    expected, model = one_rank(method, dtype, settings), model_of(method, dtype)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    history = run(model, settings, engine=engine_of(engine, stage))
    ended = end_of(model, history)
    assert largest(start, ended[3]) > 1e-3, "nothing was learned"
    assert apart(ended, expected) < most, apart(ended, expected)


def stop_at(step, history):
    if history.steps == step:
        raise Stop


def train_until(engine, stage, method, step, folder, dtype=WIDE):
    """Start a run on these ranks, and end it after a step and its checkpoint."""
    chosen = {} if engine is None else {"engine": engine_of(engine, stage)}
    with pytest.raises(Stop):
        run(
            model_of(method, dtype),
            SETTINGS,
            checkpoints=folder,
            on_step=partial(stop_at, step),
            **chosen,
        )


def go_on(engine, stage, method, folder, dtype=WIDE, most=CLOSE):
    """Go on from there, on these ranks: the end of a run that was never stopped."""
    chosen = {} if engine is None else {"engine": engine_of(engine, stage)}
    model = model_of(method, dtype)
    history = run(model, SETTINGS, checkpoints=folder, **chosen)
    assert history.resumed_from == 3
    distance = apart(end_of(model, history), one_rank(method, dtype))
    assert distance < most, distance


def only_rank_0_writes(folder):
    mine = Path(folder, str(dist.get_rank()))
    model = model_of("lora")
    run(model, SETTINGS, checkpoints=mine, engine=engine_of("zero", 2))
    return len(checkpoints(mine)) if mine.exists() else 0


def dropout_of_the_steps():
    """What a rank draws in its steps, twice."""
    model, group = model_of("lora"), Group()
    drawn = []
    for _ in range(2):
        with engine_of("zero")(model, new_state(model, SETTINGS), SETTINGS) as (
            _,
            state,
        ):
            state.begin_step(SETTINGS)
            drawn.append(torch.rand(4).tolist())
            state.history.loss.append(0.0)
            state.begin_step(SETTINGS)
            drawn.append(torch.rand(4).tolist())
    assert group.ranks == dist.get_world_size()
    return drawn


def qlora_base_stays_whole():
    """Under FSDP2 the four-bit base is on every rank, and the adapter is cut."""
    model = model_of("qlora", torch.float32)
    packed = [b.clone() for b in model.buffers() if b.dtype == torch.uint8]
    with FSDP2()(model, new_state(model, SETTINGS), SETTINGS) as (theirs, state):
        kept = [b for b in theirs.buffers() if b.dtype == torch.uint8]
        assert packed and all(map(torch.equal, packed, kept))
        assert all(isinstance(p, DTensor) for p in state.trainable.values())


def packed_weights_are_refused():
    model = model_of("lora")
    codes = torch.zeros(4, dtype=torch.uint8)
    model.codes = nn.Parameter(codes, requires_grad=False)
    for engine, name in ((engine_of("fsdp2"), "FSDP2"), (engine_of("zero", 3), "ZeRO")):
        with pytest.raises(ValueError, match=rf"codes is packed .*{name}"):
            run(model, SETTINGS, engine=engine)


def what_cannot_be_divided_is_refused():
    model = model_of("lora")
    for name in ("zero", "fsdp2"):
        with pytest.raises(ValueError, match=r"batch=6: allowed is a multiple of 4"):
            run(model, recipe(batch=6, accumulate=2), engine=engine_of(name))
        with pytest.raises(ValueError, match=r"paged=0\.5"):
            run(model, recipe(batch=4, paged=0.5), engine=engine_of(name))
    for engine in (engine_of("fsdp2"), engine_of("zero", 3)):
        with pytest.raises(ValueError, match=r"chunk=4: .* gathers the head"):
            run(model, recipe(batch=4, chunk=4), engine=engine)
    assert run(model, recipe(batch=4, steps=1, warmup=0)).steps == 1


def fsdp2_bytes_are_the_formulas(method):
    """After a step and one more backward pass: weights, gradients, states."""
    model = model_of(method, torch.float32)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    trains = [shapes[n] for n, p in model.named_parameters() if p.requires_grad]
    frozen = [shapes[n] for n, p in model.named_parameters() if not p.requires_grad]
    settings = recipe(batch=4, accumulate=1)
    with FSDP2()(model, new_state(model, settings), settings) as (theirs, state):
        for _ in range(2):
            state.optimizer.zero_grad()
            theirs(torch.tensor([[5, 6, 7, 8]])).logits.square().mean().backward()
            kept = zero.bytes_kept(theirs, state.optimizer)
            state.optimizer.step()
        expected = formulas.fsdp2_bytes(
            trains, frozen, rank=state.rank, ranks=state.ranks
        )
        assert kept == expected, (kept, expected)
    assert set(trainable(model)) <= set(shapes)


def is_killed_in_training(folder):
    """Rank 1 is killed after step 3, in the middle of the run."""
    with join(30) as group:

        def look(history):
            if history.steps == 3 and group.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        model = model_of("lora")
        engine = engine_of("zero", 2)
        run(model, SETTINGS, checkpoints=folder, on_step=look, engine=engine)
