"""Many adapters in one product: each row gets its own adapter's update, and no other's.

The reference is one row at a time in float64, from the adapters as they were before
they were stacked.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import assert_caught, law, planted, planted_kernel

from peft_from_scratch.kernels import Plan, Stack, gather, gather_lora
from peft_from_scratch.kernels.gather import ROWS, compulsory_bytes, rows_for
from peft_from_scratch.kernels.language import recorded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
D_IN, D_OUT = 530, 70  # more than one share of columns, more than one block, ragged


def adapters(ranks, dtype=torch.float32, d_in=D_IN, d_out=D_OUT):
    return [
        (
            torch.randn(r, d_in).to(dtype) / 16,
            torch.randn(d_out, r).to(dtype),
            (-1) ** a * (a + 1) / 2,
        )
        for a, r in enumerate(ranks)
    ]


def drawn(shape, dtype=torch.float32, d_in=D_IN, d_out=D_OUT):
    return torch.randn(*shape, d_out).to(dtype), torch.randn(*shape, d_in).to(dtype)


def expected(y, x, pool, which):
    """(the result, a bound of its error), row by row in float64."""
    want, bound = y.double(), torch.zeros_like(y, dtype=torch.float64)
    tiny, eps = torch.finfo(torch.float32).eps, torch.finfo(y.dtype).eps
    for i, a in enumerate(which.tolist()):
        if a == -1:
            continue
        A, B, scale = pool[a][0].double(), pool[a][1].double(), pool[a][2]
        h = scale * A @ x[i].double()
        want[i] += B @ h
        sizes = abs(scale) * A.abs() @ x[i].double().abs()
        terms = x.shape[1] + len(A) + 4
        bound[i] = eps * (want[i].abs() + B.abs() @ h.abs())
        bound[i] += tiny * terms * (B.abs() @ sizes + y[i].double().abs())
    return want, bound


def unwritten_memory_is_nan(law):
    """The law, while torch.empty() gives NaN: what is read must have been written."""

    def held(*args, **options):
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            law(*args, **options)
        finally:
            torch.use_deterministic_algorithms(before)

    return held


@unwritten_memory_is_nan
def each_row_gets_its_own(
    ranks, which, rows=None, dtype=torch.float32, backend="triton"
):
    pool, which = adapters(ranks, dtype), torch.tensor(which, dtype=torch.int64)
    y, x = drawn(which.shape, dtype)
    want, bound = expected(y, x, pool, which)
    stack = Stack.of(pool)
    out = gather_lora(y, x, stack, Plan.of(which, x, stack, rows), backend)
    assert out is y
    assert ((y.double() - want).abs() <= bound).all()


MIXED = ((1, 17, 3, 70), (2, -1, 0, 3, 0, 1, -1, 3, 0))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_gets_its_own(dtype, rows):
    each_row_gets_its_own(*MIXED, rows, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_spec_gives_each_row_its_own(dtype):
    pool, which = adapters(MIXED[0], dtype), torch.tensor(MIXED[1])
    y, x = drawn(which.shape, dtype)
    want, bound = expected(y, x, pool, which)
    gather_lora(y, x, Stack.of(pool), which)
    # In torch h, the product, its scaling and the sum are rounded one by one.
    assert ((y.double() - want).abs() <= 4 * bound).all()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_ranks_in_any_order(data):
    sizes = st.sampled_from([1, 2, 15, 16, 17, 33, 65])
    ranks = data.draw(st.lists(sizes, min_size=1, max_size=4))
    of_row = st.integers(-1, len(ranks) - 1)
    which = data.draw(st.lists(of_row, max_size=9))
    rows = data.draw(st.sampled_from([None, *ROWS]))
    each_row_gets_its_own(ranks, which, rows)


@pytest.mark.parametrize("rows", ROWS)
def test_the_largest_rank_beside_the_smallest(rows):
    each_row_gets_its_own((256, 1), (1, 0), rows)


def test_more_rows_of_an_adapter_than_a_block_has():
    each_row_gets_its_own((3, 5), [0] * 33 + [1] * 2, 16)


@law
def a_row_alone_is_the_row_in_company():
    """Single rows: equal bits, whatever else is in the batch."""
    stack, which = Stack.of(adapters(MIXED[0])), torch.tensor(MIXED[1])
    y, x = drawn(which.shape)
    together = gather_lora(y.clone(), x, stack, Plan.of(which, x, stack, 1), "triton")
    for i in range(len(x)):
        own = slice(i, i + 1)
        alone = gather_lora(y[own].clone(), x[own], stack, which[own], "triton")
        assert torch.equal(alone, together[own])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("which", [[-1, -1], []])
def test_nothing_is_added_where_no_adapter_is(which, backend):
    which = torch.tensor(which, dtype=torch.int64)
    y, x = drawn(which.shape)
    before = y.clone()
    empty = Stack(x.new_empty(0, D_IN), x.new_empty(0, D_OUT), (), torch.empty(0))
    for stack in (empty, Stack.of(adapters((2,)))):
        assert torch.equal(gather_lora(y, x, stack, which, backend), before)


def test_an_adapter_for_a_sequence_is_one_for_each_of_its_tokens():
    stack, (y, x) = Stack.of(adapters((2, 3))), drawn((2, 3))
    which = torch.tensor([[1] * 3, [-1] * 3])
    rows = gather_lora(y.clone(), x, stack, which, "triton")
    plan = Plan.of(torch.tensor([1, -1]), x, stack)
    assert torch.equal(gather_lora(y.clone(), x, stack, plan, "triton"), rows)


def test_strides_do_not_matter_and_only_the_view_of_y_changes():
    stack, which = Stack.of(adapters((2, 3))), torch.tensor([1, 0, -1])
    wide, x = torch.randn(3, 2 * D_OUT), torch.randn(D_IN, 3).T
    before = wide.clone()
    want = gather_lora(wide[:, ::2].clone(), x.contiguous(), stack, which, "triton")
    gather_lora(wide[:, ::2], x, stack, which, "triton")
    assert torch.equal(wide[:, ::2], want)
    assert torch.equal(wide[:, 1::2], before[:, 1::2])


@law
def strided_scales_are_read_where_they_are():
    """A stack of every second scale, and of one scale for all adapters."""
    pool, which = adapters((2, 3, 5)), torch.tensor([2, 0, 1])
    stack, (y, x) = Stack.of(pool), drawn((3,))
    spread = torch.randn(6)
    for scale in (spread[::2], spread[:1].expand(3)):
        own = [(A, B, s.item()) for (A, B, _), s in zip(pool, scale, strict=True)]
        want = gather_lora(y.clone(), x, Stack.of(own), which, "triton")
        strided = Stack(stack.A, stack.B, stack.ranks, scale)
        assert torch.equal(gather_lora(y.clone(), x, strided, which, "triton"), want)


# The choice between the shapes --------------------------------------------------------


@given(rows=st.integers(0, 4096), used=st.integers(0, 64))
def test_a_block_is_no_larger_than_the_mean_adapter_fills(rows, used):
    chosen = rows_for(rows, used)
    larger = [size for size in ROWS if size > chosen]
    assert chosen == 1 or chosen * used <= rows
    assert not larger or larger[0] * used > rows


@given(st.lists(st.integers(-1, 3), max_size=80), st.sampled_from([None, *ROWS]))
def test_a_plan_has_each_row_with_an_adapter_once(which, rows):
    which = torch.tensor(which, dtype=torch.int64)
    x = torch.empty(len(which), D_IN)
    plan = Plan.of(which, x, Stack.of(adapters((1, 1, 1, 1))), rows)
    seen = []
    for a, begin, end in plan.blocks.tolist():
        assert 0 < end - begin <= plan.rows
        assert (which[plan.order[begin:end].long()] == a).all()
        seen += plan.order[begin:end].tolist()
    assert sorted(seen) == (which >= 0).nonzero().flatten().tolist()


def test_few_rows_still_occupy_a_gpu():
    """One block is shared by eight programs; of 264 blocks each has one."""
    A, B = torch.empty(2, 16, 4096, device="meta")
    stack = Stack(A, B, (16,), torch.empty(1, device="meta"))
    for m, shares in ((16, 8), (264 * 64, 1)):
        y, x = torch.empty(2, m, 4096, device="meta")
        with recorded() as log:
            gather_lora(y, x, stack, torch.zeros(m, dtype=torch.int64), "triton")
        assert log[0].grid == (math.ceil(m / 64), 1, shares)


def test_compulsory_bytes():
    pool, which = adapters(MIXED[0], torch.float16), torch.tensor(MIXED[1])
    _, x = drawn(which.shape, torch.float16)
    stack = Stack.of(pool)
    rows = sum(2 * (D_IN + 2 * D_OUT) for a in MIXED[1] if a >= 0)
    used = sum(pool[a][0].nbytes + pool[a][1].nbytes for a in set(MIXED[1]) - {-1})
    for size in ROWS:
        assert compulsory_bytes(stack, Plan.of(which, x, stack, size)) == rows + used


# Refusals -----------------------------------------------------------------------------


def refusal(error, **changes):
    pool = adapters((2, 3))
    y, x = drawn((3,))
    given = {"y": y, "x": x, "stack": Stack.of(pool), "which": torch.tensor([0, 1, -1])}
    given |= {name: change(given[name]) for name, change in changes.items()}
    before = given["y"].detach().clone()
    with pytest.raises(ValueError, match=error):
        gather_lora(**given)
    assert torch.equal(given["y"], before)


@pytest.mark.parametrize(
    "error, changes",
    {
        r"which\[1\] = 2; of 2 adapters 1 is the last": {
            "which": lambda w: torch.tensor([0, 2, 5])
        },
        r"which\[0\] = -2": {"which": lambda w: torch.tensor([-2, 0, 0])},
        r"which has shape \(2,\); for x \(3, 530\)": {"which": lambda w: w[:2]},
        "which is torch.float32": {"which": lambda w: w.float()},
        r"x has shape \(3, 529\); \(…, 530\)": {"x": lambda x: x[:, 1:]},
        r"y has shape \(3, 69\); \(3, 70\)": {"y": lambda y: y[:, 1:]},
        "y is torch.float16": {"y": lambda y: y.half()},
        "x is torch.float64": {"x": lambda x: x.double()},
        "x requires a gradient": {"x": lambda x: x.requires_grad_()},
        "y requires a gradient": {"y": lambda y: y.requires_grad_()},
        "no matrix of rows": {"y": lambda y: y[:1].expand(3, -1)},
        "x on meta": {"x": lambda x: x.to("meta")},
    }.items(),
)
def test_what_does_not_fit_is_refused_by_name(error, changes):
    refusal(error, **changes)


def test_a_plan_of_another_batch_is_refused():
    stack, (_, x) = Stack.of(adapters((2, 3))), drawn((2,))
    plan = Plan.of(torch.tensor([0, 1]), x, stack)
    refusal(r"plan is for rows \(2,\)", which=lambda w: plan)
    with pytest.raises(ValueError, match="rows=8"):
        Plan.of(torch.tensor([0, 1]), x, stack, 8)


def test_no_gradient_is_asked_for_in_no_grad():
    stack, (y, x) = Stack.of(adapters((2,))), drawn((1,))
    with torch.no_grad():
        gather_lora(y, x.requires_grad_(), stack, torch.tensor([0]))


@pytest.mark.parametrize(
    "error, change",
    {
        "no adapters": lambda p: [],
        "adapter 1: A is": lambda p: [p[0], (p[1][0], p[1][1][:, 1:], 1.0)],
        "adapter 1 maps 529": lambda p: [p[0], (p[1][0][:, 1:], p[1][1], 1.0)],
        "adapter 0: A is torch.float32, B torch.float16": lambda p: [
            (p[0][0], p[0][1].half(), 1.0)
        ],
        "scale=inf": lambda p: [(*p[0][:2], math.inf)],
        "rank 257": lambda p: adapters((257,)),
        "must be the same one of": lambda p: adapters((2,), torch.float64),
    }.items(),
)
def test_a_stack_is_checked(error, change):
    with pytest.raises(ValueError, match=error):
        Stack.of(change(adapters((2, 3))))


def test_a_stack_gives_its_adapters_back():
    pool = adapters((2, 3))
    for (A, B, scale), own in zip(Stack.of(pool), pool, strict=True):
        assert torch.equal(A, own[0]) and torch.equal(B, own[1]) and scale == own[2]


# Planted bugs -------------------------------------------------------------------------

IN_KERNELS = {
    "a neighbour's ranks leak in": (
        "_expand",
        "begin, stop = tl.load(first + adapter), tl.load(first + adapter + 1)",
        "begin, stop = tl.load(first + adapter), tl.load(first + adapter) + BR",
    ),
    "the rank mask of h forgotten": (
        "_expand",
        "keep = within(place, rank, end, stop)",
        "keep = within(place, rank, end, begin + largest)",
    ),
    "the first adapter's scale": (
        "_expand",
        "tl.load(scale + adapter)",
        "tl.load(scale)",
    ),
    "the permutation not undone": ("_expand", "store(y, row, n", "store(y, place, n"),
    "x not permuted": ("_shrink", "load(x, row, k", "load(x, place, k"),
    "the last column of a share": (
        "_shrink",
        "last = min((share + 1) * columns, d_in)",
        "last = min((share + 1) * columns, d_in) - 1",
    ),
    "one share counted for all": (
        "_expand",
        "share += count.to(tl.int64) * largest",
        "share += 0",
    ),
    "y lost": ("_expand", "load(y, row, n, keep) + total", "total"),
}


@pytest.mark.parametrize("name, right, wrong", IN_KERNELS.values(), ids=IN_KERNELS)
@pytest.mark.parametrize("rows", [1, 16])
def test_a_bug_in_a_kernel_is_caught(name, right, wrong, rows):
    law = partial(each_row_gets_its_own, *MIXED, rows)
    with (
        planted_kernel(gather, name, right, wrong),
        pytest.raises(AssertionError),
    ):
        law()


def test_scales_taken_for_contiguous_are_caught():
    right = "self.scale.contiguous()"
    assert_caught(
        Stack.__post_init__, right, "self.scale", strided_scales_are_read_where_they_are
    )


def test_sums_in_half_precision_are_caught():
    right = "dot(rounded(a, b.dtype), b, total)"
    bug = ("multiply", right, f"{right}.to(b.dtype).to(tl.float32)")
    with planted_kernel(gather, *bug), pytest.raises(AssertionError):
        each_row_gets_its_own(*MIXED, 16, torch.bfloat16)


IN_THE_PLAN = {
    "a segment ends one early": (
        "min(first + rows, end)",
        "min(first + rows, end - 1)",
    ),
    "a segment ends one late": (
        "min(first + rows, end)",
        "min(first + rows, end + 1, len(order))",
    ),
    "-1 is the last adapter": (
        "_checked(which, x, len(stack)).flatten()",
        "_checked(which, x, len(stack)).flatten() % len(stack)",
    ),
}


@pytest.mark.parametrize("right, wrong", IN_THE_PLAN.values(), ids=IN_THE_PLAN)
def test_a_bug_in_the_plan_is_caught(right, wrong):
    with planted(Plan.of.__func__, right, wrong), pytest.raises(AssertionError):
        each_row_gets_its_own(*MIXED, 16)
