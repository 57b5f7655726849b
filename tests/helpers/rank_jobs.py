"""What the tests of ZeRO let each rank do: see ranks.on_ranks."""

import copy
import os
import time
import weakref
from contextlib import nullcontext
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from architectures import build
from model_state import gradients, largest, loss, tokens
from torch import nn

import peft_from_scratch as pfs
from peft_from_scratch.memory import formulas, zero
from peft_from_scratch.memory.collectives import Ring
from peft_from_scratch.memory.mixed_adamw import MixedAdamW
from peft_from_scratch.training.chunked_loss import summed_loss_in_chunks
from peft_from_scratch.training.gradient_checkpointing import checkpointed
from peft_from_scratch.training.loss import summed_loss

WIDE = torch.float64
SETTINGS = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
ROWS, PARTS = 16, 2  # of a step, over all ranks; micro-batches a rank


def chain(dtype=WIDE, seed=0):
    """Sizes that no number of ranks divides, and a frozen projection in the middle."""
    torch.manual_seed(0)
    layers = nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)
    model = nn.Sequential(*layers).to(dtype)
    model[2].requires_grad_(False)
    return moved(model, seed)


def language_model(method="lora", seed=0):
    """A random GPT-2 in float64: transposed projections, a head tied to embeddings."""
    model = build("gpt2", dtype=WIDE)
    torch.manual_seed(0)
    if method == "full":
        pfs.full.inject(model)
    elif method == "dora":  # reads W0 past the module that holds it
        pfs.dora.inject(model, r=3, alpha=6)
    elif method == "prompt":
        pfs.prompt.inject(model, n=3)
    else:
        pfs.lora.inject(model, r=3, alpha=6)
    return moved(model, seed)


def moved(model, seed):
    """As another seed would have started what trains; 0 changes nothing."""
    with torch.no_grad():
        for p in trains(model):
            p.add_(seed)
    return model


def made(kind, seed=0):
    return chain(seed=seed) if kind == "chain" else language_model(kind, seed)


def loss_of(model, rows):
    """The mean over these rows of a step."""
    if isinstance(model, nn.Sequential):
        return model(rows.to(next(model.parameters()).dtype)).square().mean()
    ids = (rows[:, :5].abs() * 100).long() % 300 + 3
    return model(ids, labels=ids, use_cache=False).loss


def rows_of(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 5, generator=generator, dtype=WIDE)


def trains(model):
    return [p for p in model.parameters() if p.requires_grad]


def a_backward(model, step, parts=PARTS):
    """This rank's rows of a step, in micro-batches."""
    mine = rows_of(step).chunk(dist.get_world_size())[dist.get_rank()]
    for rows in mine.chunk(parts):
        (loss_of(model, rows) / parts).backward()


def reference(kind, steps, clip=None):
    """The model after one rank's AdamW on the whole batch, and its gradients' norms."""
    model, norms = made(kind), []
    alone = torch.optim.AdamW(trains(model), **SETTINGS)
    for step in range(steps):
        alone.zero_grad()
        loss_of(model, rows_of(step)).backward()
        if clip:
            norms.append(nn.utils.clip_grad_norm_(trains(model), clip).item())
        alone.step()
    return model, norms


def zeroed(kind, stage, model=None):
    """A model, as another seed would start it on each rank but 0, and its optimizer."""
    model = made(kind, seed=dist.get_rank()) if model is None else model
    if stage == 3:
        zero.shard(model, timeout=20)
    return model, zero.Optimizer(trains(model), stage, **SETTINGS, timeout=20)


def take_steps(model, optimizer, steps, clip=None, parts=PARTS):
    norms = []
    for step in steps:
        optimizer.zero_grad()
        a_backward(model, step, parts)
        if clip:
            norms.append(optimizer.clip_grad_norm_(clip))
        optimizer.step()
    return norms


def whole_values(model):
    with zero.whole(model):
        return {n: p.detach().clone() for n, p in model.named_parameters()}


# ---------------------------------------------------------------------------- Weights


def weights_are_one_ranks(kinds, stages):
    """Full and LoRA, accumulation, clipping: {(kind, stage): relative distance}."""
    distances = {}
    for kind in kinds:
        expected, theirs = reference(kind, 3, clip=0.05)
        expected = dict(expected.named_parameters())
        assert min(theirs) > 0.05, "nothing is clipped"
        for stage in stages:
            model, optimizer = zeroed(kind, stage)
            norms = take_steps(model, optimizer, range(3), clip=0.05)
            assert norms == pytest.approx(theirs, rel=1e-12), (kind, stage)
            distance = largest(whole_values(model), expected)
            distances[kind, stage] = distance
            assert distance < 1e-12, (kind, stage, distance)
            _every_rank_has_the_same(model)
    return distances


def _every_rank_has_the_same(model):
    for number, value in enumerate(whole_values(model).values()):
        ours = value.clone()
        Ring(timeout=20).broadcast(ours, 1000 + number)
        assert torch.equal(ours, value)


def checkpointed_weights_are_the_same(stage):
    """By this project's checkpointing, and before stage 3 by transformers' own."""
    expected = dict(reference("lora", 1)[0].named_parameters())
    for own in (True, False)[: 1 if stage == 3 else 2]:
        model, optimizer = zeroed("lora", stage)
        model.train()
        with checkpointed(model) if own else nullcontext():
            if not own:
                model.activation_checkpointing_enable()
            take_steps(model, optimizer, range(1))
        assert largest(whole_values(model), expected) < 1e-12, own
    if stage == 3:
        model.activation_checkpointing_enable()
        with pytest.raises(ValueError, match="transformers' own gradient checkpoint"):
            take_steps(model, optimizer, range(1))


def every_method_learns_in_stage_three():
    """The mean of equal gradients is the gradient of the model that was not cut."""
    from laws.core.contract import fresh  # seconds to import
    from laws.methods.table import METHODS

    in_full = [m for m in METHODS if not m.prepare or m.name == "qlora"]
    for method in in_full:
        dtype = torch.float32 if method.prepare else WIDE
        model, _ = fresh(method, "gpt2", steps=1, dtype=dtype)
        model.train()
        whole = copy.deepcopy(model)
        zero.shard(model, timeout=20)
        optimizer = zero.Optimizer(trains(model), 3, timeout=20)
        expected = gradients(whole)
        torch.manual_seed(0)
        loss(model).backward()
        found = {
            name: p.zero_shard.join(optimizer.gradients[p])
            for name, p in pfs.trainable(model).items()
        }
        close = 1e-12 if dtype == WIDE else 1e-5
        assert largest(found, expected) < close, method.name


def a_cut_model_answers_and_learns_in_chunks():
    ids = tokens(2, 9)
    batch = {"input_ids": ids, "labels": ids}
    for kind in ("lora", "full"):
        whole, (cut, optimizer) = made(kind), zeroed(kind, 3)
        asked = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(cut.generate(ids, **asked), whole.generate(ids, **asked))
        summed_loss(whole, batch).backward()
        summed_loss_in_chunks(cut, batch, chunk=5).backward()
        for p, other in zip(trains(cut), trains(whole), strict=True):
            gradient = p.zero_shard.join(optimizer.gradients[p])
            assert torch.allclose(gradient, other.grad, rtol=0, atol=1e-10)


def half_precision_has_masters(ranks):
    """Bit for bit MixedAdamW on one rank; 2 Ψ + 14 Ψ / N bytes in stage 2."""
    for stage in (1, 2, 3):
        alone, model = chain(torch.bfloat16), chain(torch.bfloat16)
        expected = MixedAdamW(trains(alone), **SETTINGS)
        model, optimizer = zeroed("chain", stage, model)
        for step in range(3):
            expected.zero_grad()
            loss_of(alone, rows_of(step)).backward()
            expected.step()
        take_steps(model, optimizer, range(3), parts=1)
        values = whole_values(model)
        for name, p in alone.named_parameters():
            if ranks == 1:
                assert torch.equal(values[name], p), (stage, name)
            else:
                assert (values[name] - p).abs().max() < 0.03, (stage, name)
        optimizer.zero_grad()
        a_backward(model, 9, parts=1)
        assert zero.bytes_kept(model, optimizer) == expected_bytes(model, stage, 2)


def groups_have_settings_of_their_own():
    """One of them added later; the optimizer that came last is the one that learns."""
    for stage in (1, 2, 3):
        alone, model = chain(), chain()
        if stage == 3:
            zero.shard(model, timeout=20)
        zero.Optimizer(trains(model), stage, timeout=20)  # and forgotten
        makers = torch.optim.AdamW, partial(zero.Optimizer, stage=stage)
        for each, make in zip((alone, model), makers, strict=True):
            *most, last = trains(each)
            slow = {"params": iter(most[:2]), "lr": 1e-3, "betas": (0.5, 0.9)}
            optimizer = make([slow, {"params": most[2:]}], lr=1e-2, eps=1e-4)
            optimizer.add_param_group({"params": [last], "weight_decay": 0.3})
            warmer = torch.optim.lr_scheduler.LinearLR(optimizer)
            for step in range(3):
                optimizer.zero_grad()
                optimizer.step(partial(_all_rows, each, step))
                warmer.step()
        values = whole_values(model)
        assert largest(values, dict(alone.named_parameters())) < 1e-12, stage


def _all_rows(model, step):
    total = loss_of(model, rows_of(step))
    total.backward()
    return total


# ------------------------------------------------------------------------------ Bytes


def expected_bytes(model, stage, itemsize=8, ranks=None):
    return formulas.zero_bytes(
        [p.numel() for p in model.parameters() if p.requires_grad],
        [p.numel() for p in model.parameters() if not p.requires_grad],
        ranks=ranks or dist.get_world_size(),
        stage=stage,
        itemsize=itemsize,
    )


def bytes_are_the_formulas(kinds):
    """What is kept after backward, of all stages; what a step sends, of 1 and 2."""
    for kind in kinds:
        for stage in (1, 2, 3):
            model, optimizer = zeroed(kind, stage)
            take_steps(model, optimizer, [0], parts=1)
            optimizer.zero_grad()
            before = optimizer.ring.sent
            a_backward(model, 1, parts=1)
            assert zero.bytes_kept(model, optimizer) == expected_bytes(model, stage)
            optimizer.step()
            sent = optimizer.ring.sent - before
            numels = [p.numel() for p in trains(model)]
            if stage < 3:
                expected = formulas.zero_traffic(
                    numels, ranks=dist.get_world_size(), stage=stage, itemsize=8
                )
                assert sent == expected, (kind, stage)


def stage_three_sends_what_is_read():
    """Every weight for forward; for backward those that it reads, and no bias."""
    model, optimizer = zeroed("chain", 3)
    take_steps(model, optimizer, [0], parts=1)
    before = optimizer.ring.sent
    take_steps(model, optimizer, [1], parts=1)
    sent = optimizer.ring.sent - before
    forward = [p.numel() for p in model.parameters()]
    backward = [model[2].weight.numel(), model[4].weight.numel()]  # not the input's
    expected = formulas.zero_traffic(
        [p.numel() for p in trains(model)],
        ranks=dist.get_world_size(),
        stage=3,
        itemsize=8,
        gathered=forward + backward,
    )
    assert sent == expected, (sent, expected)


def states_and_gradients_are_parts():
    """And what is over at their end stays zero."""
    for stage in (1, 2, 3):
        model, optimizer = zeroed("chain", stage)
        take_steps(model, optimizer, range(2))
        rank, ranks = dist.get_rank(), dist.get_world_size()
        for p, state in optimizer.state.items():
            n = -(-p.numel() // ranks)
            real = min(max(p.numel() - rank * n, 0), n)
            for tensor in (
                state["exp_avg"],
                state["exp_avg_sq"],
                optimizer.gradients[p],
            ):
                assert tensor.shape == (n,)
                assert not tensor[real:].any(), "the padding was updated"
                assert tensor[:real].any() or not real


def forward_keeps_no_weight():
    """Of stage 3: a gathered weight is gone after forward, and reads as NaN."""
    model, _ = zeroed("lora", 3)
    seen = []

    def look(module, *_):
        for p in module.parameters(recurse=False):
            seen.append(weakref.ref(p.untyped_storage()))
            assert p.isfinite().all()

    for module in model.modules():
        if not list(module.children()) and list(module.parameters()):
            module.register_forward_hook(look, prepend=True)
    total = loss_of(model, rows_of(0))
    assert len(seen) > 10 and not any(ref() is not None for ref in seen)
    shapes = {n: p.shape for n, p in language_model().named_parameters()}
    assert all(p.shape == shapes[n] for n, p in model.named_parameters())
    assert all(p.isnan().all() for p in model.parameters())
    total.backward()
    assert all(p.isnan().all() for p in model.parameters())


# ------------------------------------------------------------------------ State dicts


def save_after(kind, stage, steps, path):
    model, optimizer = zeroed(kind, stage)
    take_steps(model, optimizer, range(steps))
    saved, values = optimizer.state_dict(), whole_values(model)
    if dist.get_rank() == 0:
        torch.save({"optimizer": saved, "model": values}, path)
    else:
        assert not saved["state"]
        with pytest.raises(ValueError, match="state dict of rank"):
            optimizer.load_state_dict(saved)


def go_on_from(kind, stage, steps, path):
    """On another number of ranks: the end of a run that was never stopped."""
    file = torch.load(path)
    model = made(kind)
    model.load_state_dict(file["model"], strict=False)
    model, optimizer = zeroed(kind, stage, model)
    optimizer.load_state_dict(file["optimizer"])
    take_steps(model, optimizer, steps)
    expected = dict(reference(kind, steps.stop)[0].named_parameters())
    assert largest(whole_values(model), expected) < 1e-12
    wrong = copy.deepcopy(file["optimizer"])
    wrong["state"][0]["exp_avg"] = torch.zeros(2, 2)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="'exp_avg' of parameter 0"):
        optimizer.load_state_dict(wrong)
    assert str(optimizer.state_dict()) == str(before)


# ------------------------------------------------------------------------------ Errors


def a_lost_rank_is_an_error(how):
    """Within seconds; (the message, seconds it took) on rank 0."""
    model = chain()
    optimizer = zero.Optimizer(trains(model), 2, **SETTINGS, timeout=2)
    take_steps(model, optimizer, [0])
    if dist.get_rank() == 1:
        if how == "killed":
            os._exit(1)
        time.sleep(6)
        return None
    begin = time.perf_counter()
    with pytest.raises(zero.RankLost, match=r"rank 0 of 2 lost a neighbour") as caught:
        take_steps(model, optimizer, [1])
    return str(caught.value), time.perf_counter() - begin


def another_tensor_is_not_listened_to():
    ring = Ring(timeout=1)
    with pytest.raises(zero.RankLost, match="is at another tensor"):
        ring.all_gather(torch.zeros(2, 3), number=dist.get_rank())


def what_cannot_be_is_refused():
    model = chain()
    both = trains(model)
    for stage in (0, 4, "2", 2.0, True):
        with pytest.raises(ValueError, match=r"stage=.*from 1 to 3"):
            zero.Optimizer(both, stage)
    for twice in ([*both, both[0]], [{"params": both}, {"params": both[:1]}]):
        with pytest.raises(ValueError, match=r"parameter 4 .* parameter 0 once more"):
            zero.Optimizer(twice, 1)
    with pytest.raises(ValueError, match=r"zero\.shard\(model\) first"):
        zero.Optimizer(both, 3)
    with pytest.raises(ValueError, match="timeout=0"):
        zero.Optimizer(both, 1, timeout=0)
    zero.shard(model)
    with pytest.raises(ValueError, match="cut this model already"):
        zero.shard(model)
    with pytest.raises(ValueError, match=r"was cut by zero\.shard: stage=3"):
        zero.Optimizer(both, 2)


def a_group_is_part_of_the_ranks():
    """Ranks 1 and 2 of 3 train, by themselves."""
    group = dist.new_group([1, 2], timeout=timedelta(seconds=60))
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="rank 0 is not in it"):
            Ring(group)
        return
    model = chain()
    optimizer = zero.Optimizer(trains(model), 2, **SETTINGS, group=group, timeout=20)
    loss_of(model, rows_of(0).chunk(2)[dist.get_rank() - 1]).backward()
    optimizer.step()
    expected = dict(reference("chain", 1)[0].named_parameters())
    assert largest(dict(model.named_parameters()), expected) < 1e-12
