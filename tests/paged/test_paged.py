"""PagedAdamW against torch's plain loop: equal bits, whatever the budget."""

import copy
import os
import pickle
from itertools import product

import hypothesis
import pytest
import torch
from architectures import build
from hypothesis import strategies as st
from torch import nn
from two_optimizers import (
    OPTIONS,
    PAGE,
    assert_equal_bits,
    assert_equal_states,
    assert_sound,
    feed,
    paged,
    pages_of,
    parameters,
    step_together,
    torchs,
)

import peft_from_scratch as pfs
from peft_from_scratch import PagedAdamW
from peft_from_scratch.paged.states import DTYPES


def side_by_side(options, steps, dtype=torch.float32, page_bytes=PAGE):
    """Torch's and ours at budgets of one page, a quarter and all, in one loop."""
    everything = pages_of(parameters(dtype), 3, page_bytes)
    sides = [parameters(dtype) for _ in range(4)]
    optimizers = [torchs(sides[0], options)] + [
        paged(side, pages, page_bytes=page_bytes, **options)
        for side, pages in zip(
            sides[1:], (1, everything // 4, everything + 1), strict=True
        )
    ]
    step_together(sides, optimizers, steps)
    return sides, optimizers


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_two_hundred_steps_have_the_bits_of_torch(options):
    sides, optimizers = side_by_side(options, 200)
    for ours, optimizer in zip(sides[1:], optimizers[1:], strict=True):
        assert_equal_bits(ours, sides[0])
        assert_equal_states(optimizer.state_dict(), optimizers[0].state_dict())
        assert_sound(optimizer)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [*product(DTYPES, [OPTIONS["as it comes"], OPTIONS["all"]])],
)
def test_every_dtype_has_the_bits_of_torch(dtype, options):
    sides, _ = side_by_side(options, 20, dtype)
    for ours in sides[1:]:
        assert_equal_bits(ours, sides[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_pages_of_the_default_size_have_the_bits_of_torch(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shapes = ((700, 300), (8192 * 5 + 1,))
        sides = [parameters(shapes=shapes) for _ in range(3)]
        optimizers = [torchs(sides[0], {})] + [
            paged(side, pages, page_bytes=65536)
            for side, pages in zip(sides[1:], (None, 9), strict=True)
        ]
        step_together(sides, optimizers, 4)
        for ours in sides[1:]:
            assert_equal_bits(ours, sides[0])
    finally:
        torch.set_num_threads(before)


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_shapes_pages_and_changes_of_the_budget(data):
    """The law of all laws: no budget, and no change of it, has a bit of influence."""
    dtype = data.draw(st.sampled_from(DTYPES))
    shapes = data.draw(
        st.lists(st.lists(st.integers(0, 12), max_size=3), min_size=1, max_size=4)
    )
    options = data.draw(st.sampled_from([*OPTIONS.values()]))
    page_bytes = 8 * data.draw(st.integers(3, 40))
    pages = st.integers(1, 30)
    sides = parameters(dtype, shapes), parameters(dtype, shapes)
    theirs = torchs(sides[0], options)
    ours = paged(sides[1], data.draw(pages), page_bytes=page_bytes, **options)
    generator = torch.Generator().manual_seed(1)
    for budget in data.draw(st.lists(pages, min_size=1, max_size=5)):
        feed(sides, generator)
        theirs.step()
        ours.step()
        ours.budget_bytes = budget * page_bytes
        assert_sound(ours)
    assert_equal_bits(sides[1], sides[0])
    assert_equal_states(ours.state_dict(), theirs.state_dict())


# ----------------------------------------------------- what an optimizer of torch takes


def groups_of(ps):
    return [
        {"params": ps[:3], "lr": 1e-2, "amsgrad": True},
        {"params": ps[3:6], "weight_decay": 0.3, "betas": (0.8, 0.99)},
    ]


def test_groups_one_of_them_added_later():
    sides = parameters(), parameters()
    optimizers = torchs(groups_of(sides[0]), {}), paged(sides[1][:6], 4)
    optimizers = (
        optimizers[0],
        PagedAdamW(groups_of(sides[1]), budget_bytes=4 * PAGE, page_bytes=PAGE),
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        if step == 5:
            for optimizer, side in zip(optimizers, sides, strict=True):
                optimizer.add_param_group({"params": side[6:], "maximize": True})
        feed(sides, generator)
        for optimizer in optimizers:
            optimizer.step()
        assert_sound(optimizers[1])
    assert_equal_bits(sides[1], sides[0])
    table = optimizers[1].page_table()
    assert {row.group for row in table} == {0, 1, 2}
    assert [row.param for row in table] == sorted(row.param for row in table)


def test_a_closure_a_scheduler_and_hooks():
    sides = parameters(), parameters()
    optimizers = torchs(sides[0], dict(lr=1e-2)), paged(sides[1], 3, lr=1e-2)
    seen = {"before": 0, "after": 0}
    optimizers[1].register_step_pre_hook(lambda *_: seen.update(before=1))
    optimizers[1].register_step_post_hook(lambda *_: seen.update(after=1))
    losses = []
    for optimizer, side in zip(optimizers, sides, strict=True):
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12)

        def closure(optimizer=optimizer, side=side):
            optimizer.zero_grad()
            loss = sum((p - 1).square().sum() for p in side)
            loss.backward()
            return loss

        losses.append([])
        for _ in range(10):
            losses[-1].append(optimizer.step(closure).item())
            schedule.step()
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert_equal_bits(sides[1], sides[0])
    assert seen == {"before": 1, "after": 1}


def test_a_step_without_a_gradient_does_not_count():
    ps = parameters()
    optimizer = paged(ps)
    optimizer.step()
    assert not optimizer.state_dict()["state"]
    ps[0].grad = torch.ones_like(ps[0])
    for _ in range(3):
        optimizer.step()
    steps = {k: s["step"].item() for k, s in optimizer.state_dict()["state"].items()}
    assert steps == {0: 3}
    assert {row.param for row in optimizer.page_table() if row.resident} == {0}


def test_a_cleared_state_starts_again_as_torchs():
    sides = parameters(), parameters()
    optimizers = torchs(sides[0], {}), paged(sides[1], 5)
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        feed(sides, generator)
        for optimizer in optimizers:
            if step == 3:
                optimizer.state.clear()
            optimizer.step()
    assert_equal_bits(sides[1], sides[0])


def test_a_lora_trains_with_the_bits_of_torch():
    """The library's own parameters, from a backward pass; counted in the page table."""
    models = [build("llama"), build("llama")]
    for model in models:
        torch.manual_seed(0)
        pfs.lora.inject(model, r=4)
    sides = [[*pfs.trainable(model).values()] for model in models]
    optimizers = torchs(sides[0], dict(lr=1e-2)), paged(sides[1], 9, lr=1e-2)
    ids = torch.arange(24).view(2, 12)
    losses = []
    for model, optimizer in zip(models, optimizers, strict=True):
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert_equal_bits(sides[1], sides[0])
    table = optimizers[1].page_table()
    assert len(table) == pages_of(sides[1])
    assert sum(row.bytes for row in table) == 8 * sum(p.numel() for p in sides[1])
    assert sum(row.resident for row in table) == 9


def test_names_are_in_the_table():
    module = nn.Linear(4, 3)
    optimizer = PagedAdamW(module.named_parameters(), budget_bytes=65536)
    assert [row.name for row in optimizer.page_table()] == ["weight", "bias"]
    assert paged([module.weight]).page_table()[0].name == "parameter 0"


# -------------------------------------------------------------------------- State dicts


def trained(make, options, steps=7):
    ps = parameters()
    optimizer = make(ps, options)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        feed([ps], generator)
        optimizer.step()
    return ps, optimizer


def ours(ps, options):
    return paged(ps, 6, **options)


@pytest.mark.parametrize("options", [{}, dict(amsgrad=True)])
@pytest.mark.parametrize(("giver", "taker"), [*product((torchs, ours), repeat=2)])
def test_a_state_dict_goes_on_with_the_same_bits(giver, taker, options, tmp_path):
    ps, optimizer = trained(giver, options)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    others = parameters()
    other = taker(others, {"lr": 1.0})  # and its settings, amsgrad too, are replaced
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    with torch.no_grad():
        for mine, theirs in zip(others, ps, strict=True):
            mine.copy_(theirs)
    assert_equal_states(other.state_dict(), optimizer.state_dict())
    generator = torch.Generator().manual_seed(3)
    for _ in range(7):
        feed([ps, others], generator)
        optimizer.step()
        other.step()
    assert_equal_bits(others, ps)
    if taker is ours:
        assert_sound(other)


def test_loading_keeps_the_counters_and_goes_on_counting():
    _, optimizer = trained(ours, {})
    faults = optimizer.counters.faults
    optimizer.load_state_dict(optimizer.state_dict())
    assert not any(row.resident for row in optimizer.page_table())
    optimizer.step()
    assert optimizer.counters.faults > faults


def test_a_state_dict_stays_when_steps_go_on():
    _, optimizer = trained(ours, {})
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    optimizer.step()
    assert_equal_states(saved, before)


def test_hooks_of_the_state_dict_see_the_moments():
    _, optimizer = trained(ours, {})
    seen = []
    optimizer.register_state_dict_post_hook(
        lambda _, saved: seen.append({*saved["state"][0]})
    )
    optimizer.register_load_state_dict_pre_hook(
        lambda _, saved: seen.append({*saved["state"][0]})
    )
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("done"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [{"step", "exp_avg", "exp_avg_sq"}] * 2 + ["done"]


BROKEN = {
    "'exp_avg_sq' of parameter 1 in the state dict is None": lambda s: s["state"][
        1
    ].pop("exp_avg_sq"),
    "'exp_avg' of parameter 0 in the state dict is [3]": lambda s: s["state"][0].update(
        exp_avg=torch.ones(3)
    ),
    "'step' of parameter 2 in the state dict is None": lambda s: s["state"][2].pop(
        "step"
    ),
    "'step' of parameter 2 in the state dict is -1": lambda s: s["state"][2].update(
        step=-1
    ),
    "groups of [8] parameters": lambda s: s["param_groups"][0]["params"].pop(),
    "group 0 of the state dict has no 'eps'": lambda s: s["param_groups"][0].pop("eps"),
    "a state of 99": lambda s: s["state"].update({99: s["state"][0]}),
    "lr=-1": lambda s: s["param_groups"][0].update(lr=-1),
}


@pytest.mark.parametrize(("message", "spoil"), BROKEN.items(), ids=BROKEN)
def test_a_state_dict_that_does_not_fit_is_refused_whole(message, spoil):
    _, optimizer = trained(ours, {})
    before, table = optimizer.state_dict(), optimizer.page_table()
    saved = copy.deepcopy(trained(torchs, {}, 9)[1].state_dict())
    spoil(saved)
    with pytest.raises(ValueError) as error:
        optimizer.load_state_dict(saved)
    assert message in str(error.value)
    assert_equal_states(optimizer.state_dict(), before)
    assert optimizer.page_table() == table
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


# ----------------------------------------------------------------------------- Refusals

REFUSED = {
    "budget_bytes=255 is less than one page, page_bytes=256": dict(budget_bytes=255),
    "budget_bytes=1000.0: allowed is a whole": dict(budget_bytes=1e3),
    "page_bytes=100: allowed are multiples of 8": dict(page_bytes=100),
    "page_bytes=0: allowed is a whole number from 8": dict(page_bytes=0),
    "page_bytes=16: parameter 0 needs at least 24": dict(page_bytes=16, amsgrad=True),
    "lr=-1: allowed is a number from 0": dict(lr=-1),
    "lr has 2 values": dict(lr=torch.ones(2)),
    "eps=nan": dict(eps=float("nan")),
    "weight_decay=-0.1": dict(weight_decay=-0.1),
    "betas=(0.9, 1.0)": dict(betas=(0.9, 1.0)),
    "betas=(0.9,)": dict(betas=(0.9,)),
    "foreach=True: PagedAdamW computes page by page": dict(foreach=True),
    "fused='yes': allowed are True and False": dict(fused="yes"),
    "page_bytes=96: with fused=True, parameter 0 needs at least 128": dict(
        fused=True, page_bytes=96
    ),
    "capturable=True": dict(capturable=True),
    "differentiable=True": dict(differentiable=True),
}


@pytest.mark.parametrize(("message", "arguments"), REFUSED.items(), ids=REFUSED)
def test_an_argument_out_of_its_range_is_refused_by_name(message, arguments):
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError) as error:
        PagedAdamW([p], **dict(budget_bytes=1024, page_bytes=PAGE) | arguments)
    assert message in str(error.value)


def test_an_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="has no argument 'momentum'"):
        paged(parameters(), momentum=0.9)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), "parameter 6 is .* torch.complex64"),
        (torch.ones(2, device="meta"), "parameter 6 is on meta; allowed are cpu, cuda"),
        (torch.eye(2).to_sparse(), "parameter 6 is torch.sparse_coo"),
        (torch.ones(1).expand(4), "parameter 6 is expanded: its values share memory"),
    ],
)
def test_a_parameter_that_cannot_be_paged_leaves_the_optimizer_as_it_was(p, message):
    ps = parameters()[:6]
    optimizer = paged(ps, 3)
    table = optimizer.page_table()
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(p)]})
    assert len(optimizer.param_groups) == 1 and optimizer.page_table() == table
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_a_parameter_listed_twice_is_refused():
    p = nn.Parameter(torch.ones(3))
    with (
        pytest.warns(UserWarning, match="duplicate"),
        pytest.raises(ValueError, match="parameter 1 is in the group twice"),
    ):
        paged([p, p])


def sparse(p):
    p.grad = torch.ones_like(p).to_sparse()


def other_dtype(p):
    p.data = p.data.double()
    p.grad = torch.ones_like(p)


def other_strides(p):
    p.data = p.data.t().contiguous().t()
    p.grad = torch.ones_like(p)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (sparse, "gradient of parameter 0 is torch.sparse_coo; AdamW needs all"),
        (other_dtype, "parameter 0 was .*float32.*float64.* now"),
        (other_strides, "parameter 0 was .* now"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_moves(change, message):
    ps = parameters()
    optimizer = paged(ps)
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    change(ps[0])
    before = [p.detach().clone() for p in ps]
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_equal_bits(ps, before)


def test_amsgrad_cannot_be_switched_on_later():
    _, optimizer = trained(ours, {})
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(RuntimeError, match="amsgrad=True was set after"):
        optimizer.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_copy_is_refused(copied):
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copied(paged(parameters()))


def test_a_step_after_a_fork_is_refused(monkeypatch):
    optimizer = paged(parameters())
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="belongs to the process that made it"):
        optimizer.step()
