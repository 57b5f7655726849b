"""PagedAdamW(fused=True) against torch.optim.AdamW(fused=True); planted bugs.

torch's fused kernel reads a gradient as it lies in memory, also where that is not how
the parameter lies (a defect: the weights then go wrong). So torch is given parameters
without gaps here, and gradients with the strides of their parameters; ours gets both as
they come.
"""

import copy
from functools import partial
from itertools import product

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from planting import Bug, each_is_caught, law
from torch import nn
from two_optimizers import (
    OPTIONS,
    PAGE,
    Births,
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

from peft_from_scratch import PagedAdamW
from peft_from_scratch.paged import adamw, states
from peft_from_scratch.paged.adamw import FusedAdamW
from peft_from_scratch.paged.layout import StatePages
from peft_from_scratch.paged.states import DTYPES

SHAPES = ((17, 9), (40,), (), (0, 3), (1,), (8, 4, 5), (333,))


def without_gaps(ps):
    """The same values; where the memory has gaps, in a tensor of their own."""
    dense = [p.detach().clone(memory_format=torch.preserve_format) for p in ps]
    return [nn.Parameter(p) for p in dense]


def fused_by_torch(ps, options):
    """torch's fused loop, given gradients as it needs them."""
    optimizer = torch.optim.AdamW(ps, fused=True, **options)

    def in_order(*_):
        for p in ps:
            if p.grad is not None:
                p.grad = torch.empty_like(p).copy_(p.grad)

    optimizer.register_step_pre_hook(in_order)
    return optimizer


def ours(ps, options, pages=6, page_bytes=PAGE):
    return paged(ps, pages, page_bytes=page_bytes, fused=True, **options)


def sides_of(options, steps, dtype=torch.float32, shapes=SHAPES, page_bytes=PAGE):
    """Torch's and ours at budgets of one page, a quarter and all, in one loop."""
    everything = 2 * pages_of(parameters(dtype, shapes), 3, page_bytes)
    sides = [parameters(dtype, shapes) for _ in range(4)]
    sides[0] = without_gaps(sides[0])
    optimizers = [fused_by_torch(sides[0], options)] + [
        ours(side, options, pages, page_bytes)
        for side, pages in zip(sides[1:], (1, everything // 4, everything), strict=True)
    ]
    step_together(sides, optimizers, steps)
    return sides, optimizers


def assert_one_outcome(sides, optimizers):
    for side, optimizer in zip(sides[1:], optimizers[1:], strict=True):
        assert_equal_bits(side, sides[0])
        assert_equal_states(optimizer.state_dict(), optimizers[0].state_dict())


@law
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def the_bits_are_those_of_torchs_fused_loop(options=OPTIONS["as it comes"], steps=60):
    assert_one_outcome(*sides_of(options, steps))


@pytest.mark.parametrize(
    ("dtype", "options"), [*product(DTYPES, [OPTIONS["as it comes"], OPTIONS["all"]])]
)
def test_every_dtype_has_the_bits_of_torch(dtype, options):
    assert_one_outcome(*sides_of(options, 20, dtype))


def test_the_fused_loop_is_not_the_plain_one():
    """Else the laws would hold for the plain loop, too."""
    fused, plain = parameters(), parameters()
    optimizers = ours(fused, {}), paged(plain, 6)
    step_together((fused, plain), optimizers, 5)
    pairs = zip(fused, plain, strict=True)
    apart = max((a - b).abs().max().item() for a, b in pairs if a.numel())
    assert 0 < apart < 1e-6


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("page_bytes", [65536, 1 << 20])
def test_large_pages_and_threads_have_the_bits_of_torch(threads, page_bytes):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shapes = ((700, 300), (8192 * 5 + 1,))
        assert_one_outcome(*sides_of({}, 4, shapes=shapes, page_bytes=page_bytes))
    finally:
        torch.set_num_threads(before)


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_shapes_pages_and_changes_of_the_budget(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shapes = data.draw(
        st.lists(st.lists(st.integers(0, 12), max_size=3), min_size=1, max_size=4)
    )
    options = data.draw(st.sampled_from([*OPTIONS.values()]))
    page_bytes = 8 * data.draw(st.integers(24, 80))
    pages = st.integers(1, 30)
    sides = without_gaps(parameters(dtype, shapes)), parameters(dtype, shapes)
    theirs = fused_by_torch(sides[0], options)
    mine = ours(sides[1], options, data.draw(pages), page_bytes)
    generator = torch.Generator().manual_seed(1)
    for budget in data.draw(st.lists(pages, min_size=1, max_size=5)):
        feed(sides, generator)
        theirs.step()
        mine.step()
        mine.budget_bytes = budget * page_bytes
        assert_sound(mine)
    assert_equal_bits(sides[1], sides[0])
    assert_equal_states(mine.state_dict(), theirs.state_dict())


@law
def no_moment_exceeds_the_budget():
    """Every storage that a step makes is counted: the arena, and nothing beside it."""
    ps = [nn.Parameter(torch.randn(8192)) for _ in range(3)]
    optimizer = ours(ps, {}, 64)
    for p in ps:
        p.grad = torch.randn_like(p)
    with Births() as births:
        for _ in range(3):
            optimizer.step()
    small = 8 * len(ps) * 3  # step counts
    assert births.most <= optimizer.budget_bytes + small


@law
def fused_and_plain_groups_stand_side_by_side():
    sides = without_gaps(parameters()), parameters()
    torchs_groups, our_groups = (
        [{"params": ps[:5], "fused": True}, {"params": ps[5:], "fused": False}]
        for ps in sides
    )
    theirs = torch.optim.AdamW(torchs_groups, lr=0.1, foreach=False)
    mine = PagedAdamW(our_groups, lr=0.1, budget_bytes=4 * PAGE, page_bytes=PAGE)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        feed(sides, generator)
        for p in sides[0]:
            if p.grad is not None:
                p.grad = torch.empty_like(p).copy_(p.grad)
        theirs.step()
        mine.step()
    assert_equal_bits(sides[1], sides[0])


# -------------------------------------------------------------------------- State dicts


def after(make, options, steps=7):
    ps = without_gaps(parameters())
    optimizer = make(ps, options)
    stepped([ps], [optimizer], steps, 2)
    return ps, optimizer


def stepped(sides, optimizers, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        feed(sides, generator)
        for optimizer in optimizers:
            optimizer.step()


def plain(ps, options):
    return paged(ps, 6, **options)


GIVERS = (fused_by_torch, ours, torchs, plain)


@law
@pytest.mark.parametrize("options", [{}, dict(amsgrad=True)])
@pytest.mark.parametrize(("giver", "taker"), [*product(GIVERS, repeat=2)])
def a_state_dict_goes_on_with_the_same_bits(
    folder, giver=fused_by_torch, taker=ours, options=OPTIONS["as it comes"]
):
    """Through a file, between all four: the loop goes along, as in torch."""
    ps, optimizer = after(giver, options)
    torch.save(optimizer.state_dict(), folder / "state.pt")
    others = without_gaps(parameters())
    other = taker(others, {"lr": 1.0})
    other.load_state_dict(torch.load(folder / "state.pt"))
    with torch.no_grad():
        for mine, theirs in zip(others, ps, strict=True):
            mine.copy_(theirs)
    assert_equal_states(other.state_dict(), optimizer.state_dict())
    generator = torch.Generator().manual_seed(3)
    for _ in range(7):
        feed([ps, others], generator)
        for side in (ps, others):
            for p in side:
                if p.grad is not None:
                    p.grad = torch.empty_like(p).copy_(p.grad)
        optimizer.step()
        other.step()
    assert_equal_bits(others, ps)


@law
def the_step_count_is_float32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        _, mine = after(ours, {})
        _, theirs = after(fused_by_torch, {})
        for optimizer in (mine, theirs):
            other = ours(parameters(), {})
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for each in (optimizer, other):
                saved = each.state_dict()["state"].values()
                assert {s["step"].dtype for s in saved} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


@law
def the_loop_cannot_be_changed_later():
    for make, fused in ((ours, False), (plain, True)):
        ps, optimizer = after(make, {})
        before = [p.detach().clone() for p in ps]
        optimizer.param_groups[0]["fused"] = fused
        with pytest.raises(RuntimeError, match=f"fused={fused} was set after the page"):
            optimizer.step()
        assert_equal_bits(ps, before)


def test_a_new_group_has_the_loop_of_the_optimizer():
    optimizer = ours(parameters(), {})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]
    assert "fused" not in plain(parameters(), {}).param_groups[0]


# ---------------------------------------------------------------------------- Bugs

amsgrad = partial(the_bits_are_those_of_torchs_fused_loop, OPTIONS["amsgrad"], 9)
all_options = partial(the_bits_are_those_of_torchs_fused_loop, OPTIONS["all"], 9)
in_short = partial(the_bits_are_those_of_torchs_fused_loop, steps=9)

BUGS = {
    "pages that begin within a register": Bug(
        StatePages.of.__func__,
        "length -= length % (REGISTER // p.itemsize)",
        "length -= 1",
        in_short,
    ),
    "the plain loop in its place": Bug(
        PagedAdamW._walk,
        "FusedAdamW if state_pages.fused else SlicedAdamW",
        "SlicedAdamW",
        in_short,
    ),
    "the gradient as it lies in memory": Bug(
        adamw.Sliced.__init__,
        "in_order(p.grad, p)",
        "p.grad.as_strided((p.numel(),), (1,))",
        in_short,
    ),
    "the first page's step for all": Bug(
        FusedAdamW.__call__,
        "[self.step] * len(lists[0])",
        "[self.step.add_(1)] * len(lists[0])",
        in_short,
    ),
    "the largest v is left out": Bug(
        FusedAdamW.__call__,
        "t in (self.p, self.g))",
        "t in (self.p, self.g))\n    v_max = v_max if v_max is None else v_max.clone()",
        amsgrad,
    ),
    "the wrong way up": Bug(
        FusedAdamW.__init__,
        "self.settings |= {",
        "self.settings |= {'maximize': False, ",
        all_options,
    ),
    "even gaps are taken for values": Bug(
        FusedAdamW.__init__,
        "self.p.contiguous()",
        "self.p",
        in_short,
    ),
    "a parameter with gaps is not written back": Bug(
        adamw.Sliced.finish,
        "self.parameter.copy_(self.p.view(self.parameter.shape))",
        "pass",
        in_short,
    ),
    "a buffer beside the arena": Bug(
        PagedAdamW._walk,
        "if not pages.fused]",
        "]",
        no_moment_exceeds_the_budget,
    ),
    "one loop for all groups": Bug(
        states.is_fused,
        'bool(group.get("fused"))',
        "True",
        fused_and_plain_groups_stand_side_by_side,
    ),
    "the loop is left out of the state dict": Bug(
        PagedAdamW._lay_out,
        'for name in OTHERS if is_fused(group) else (*OTHERS, "fused"):',
        'for name in (*OTHERS, "fused"):',
        a_state_dict_goes_on_with_the_same_bits,
    ),
    "step counts as the plain loop has them": Bug(
        states.step_dtype,
        "if is_fused(group):",
        "if False:",
        the_step_count_is_float32_whatever_the_default,
    ),
    "the loop may change beside the pages": Bug(
        states.check_gradient,
        "if is_fused(group) != pages.fused:",
        "if False:",
        the_loop_cannot_be_changed_later,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(
    BUGS, (AssertionError, RuntimeError, KeyError, pytest.fail.Exception)
)
