"""Notebook 10's checks: what the common mistakes are told, and what else is right."""

import build
import pytest
import torch
from exercise_checks import checked
from try_answers import lesson

from peft_from_scratch.course.checks import triton_lora_kernel as checks
from peft_from_scratch.kernels.count import in_three
from peft_from_scratch.kernels.language import Tiles, matrix
from peft_from_scratch.kernels.lora import product
from peft_from_scratch.kernels.roofline import SHOWN
from peft_from_scratch.kernels.trace import trace
from peft_from_scratch.ledger.experiments import fusing

LESSON = lesson(build.FOLDER / "10_triton_lora_kernel.py")
MASK = "is true for elements past the edge"
UNWRITTEN = "no program writes"

TOLD = {  # exercise: {mutant: what its learner must read}
    "10.1": {
        "all zeros": "all entries are zero",
        "no mask at all": "program (1,) reads 28 elements outside of x",
        "no mask in the store": "program (1,) writes 28 elements outside of out",
        "no mask in a load": "reads 28 elements outside of x",
        "the mask one too far": "reads 1 elements outside of x",
        "the mask one too short": "no program writes 1.",
        "the mask of the block": MASK,
        "program_id forgotten": "a program's index",
        "program_id not times BLOCK": "what it is multiplied by",
        "the second axis": "a program's index",
        "the short block left out": "no program writes 36",
        "subtracts": "x - y",
        "x twice": "x twice",
        "y alone": "y alone",
        "written over x": "x itself was changed",
        "no jit": "`@triton.jit` is missing",
    },
    "10.2": {
        "all zeros": "all entries are zero",
        "no loop": "the loop over k is missing",
        "k without the loop's first": "k does not move with the loop",
        "total not added to": "the total is not added to",
        "total begins at one": "off by 1",
        "a total in x's dtype": "sum in float32",
        "k mask missing": "outside of x",
        "m mask missing": "outside of x",
        "n mask missing": "outside of W",
        "no mask in the store": "elements outside of y",
        "W not transposed": "tl.trans of W's tile is missing",
        "programs exchanged": "numbered in another order",
        "the first rows always": UNWRITTEN,
        "BN for BM": UNWRITTEN,
        "strides taken for granted": "both stored by columns",
    },
    "10.3": {
        "against four kernels": "three are faster",
        "low computed once": "each program of a tile row computes it again",
        "programs rounded down": "the last program has work, too",
        "all launches in one bound": "each launch has a bound of its own",
        "issued bytes": "the bound is of distinct ones",
        "y is not read": "reads y, too, before it adds",
        "no launch for h": "the launch of h",
        "four bytes": "a value has two bytes",
        "one FLOP": "is two FLOPs",
        "both times": "the slower one is the bound",
        "the smaller time": "the smaller of the two times",
        "percent of the fused bound": "take it of the rival's",
        "a fraction": "asked for in percent",
        "the sign": "what fusing saves is positive",
        "any saving": "for less than 5 % saved",
        "exchanged": "the two choices are exchanged",
        "only the choice": "return all 2",
        "nothing at all": "`return` is missing",
    },
    "10.4": {
        "all zeros": "all entries are zero",
        "no scale": "the scale is forgotten",
        "the scale twice": "the scale, twice",
        "the scale of all": "only the update has it",
        "divided by the scale": "divided by the scale",
        "divided by r": "the scale is alpha / r already",
        "the update alone": "start from total",
        "total alone": "total as it was",
        "taken away": "taken away",
        "r mask missing": "outside of B",
        "n mask missing": "outside of B",
        "nothing at all": "`return` is missing",
    },
    "10.5": {
        "all zeros": "all entries are zero",
        "A for each block": "A is moved 4 times as often",
        "low summed on": "it needs x A^T once",
        "low lost": "filled for the first alone",
        "no scale": "the scale is forgotten",
        "the scale of all": "only the update has it",
        "no update": "x W^T alone",
        "x again for A": "x is moved 1.25 times",
        "x and W twice": "is moved 2 times",
        "a product of its own for low": "x is moved 1.25 times",
        "the first block again": UNWRITTEN,
        "SWEEP forgotten": UNWRITTEN,
        "one block": UNWRITTEN,
        "B for each part": "B is moved 5 times",
        "A's mask missing": "outside of A",
        "nothing at all": "`tl.store` is missing",
        "low is not rounded": "rounded(low * scale, B[0].dtype.element_ty)",
        "RANK 8": "at least 16 ranks",
    },
}
HEAD = """\
@triton.jit
def my_lora(x, W, A, B, y, m_size, n_size, k_size, r, scale, BM: tl.constexpr,
            BN: tl.constexpr, BK: tl.constexpr, RANK: tl.constexpr,
            SWEEP: tl.constexpr):
"""
RIGHT = {  # exercise: {name: source of an answer that is right in another way}
    "10.1": {
        "with zeros in the place of what is not there": (
            "@triton.jit\n"
            "def my_add(x, y, out, size, BLOCK: tl.constexpr):\n"
            "    first = tl.program_id(axis=0) * BLOCK\n"
            "    at = first + tl.arange(0, BLOCK)\n"
            "    a = tl.load(x + at, at < size, other=0.0)\n"
            "    b = tl.load(y + at, at < size, other=0.0)\n"
            "    tl.store(out + at, a + b, at < size)\n"
        ),
    },
    "10.2": {
        "with pointers that move": (
            "@triton.jit\n"
            "def my_product(x, W, y, m_size, n_size, k_size, BM: tl.constexpr,\n"
            "               BN: tl.constexpr, BK: tl.constexpr):\n"
            "    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]\n"
            "    n = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]\n"
            "    k = tl.arange(0, BK)\n"
            "    left = x[0] + m * x[1] + k[None, :] * x[2]\n"
            "    right = W[0] + n * W[1] + k[:, None] * W[2]\n"
            "    total = tl.zeros((BM, BN), tl.float32)\n"
            "    for first in range(0, k_size, BK):\n"
            "        keep = k + first < k_size\n"
            "        a = tl.load(left, (m < m_size) & keep[None, :], 0.0)\n"
            "        b = tl.load(right, (n < n_size) & keep[:, None], 0.0)\n"
            "        total += tl.dot(a, b, input_precision='ieee')\n"
            "        left += BK * x[2]\n"
            "        right += BK * W[2]\n"
            "    out = y[0] + m * y[1] + n * y[2]\n"
            "    total = total.to(y[0].dtype.element_ty)\n"
            "    tl.store(out, total, (m < m_size) & (n < n_size))\n"
        ),
    },
    "10.3": {
        "a list of launches for each version": (
            "def my_choice(m, n, k, r, columns, peak, bandwidth):\n"
            "    import math\n"
            "    x, W, A, B = m * k, n * k, r * k, n * r\n"
            "    h, y, low = m * r, m * n, 2 * m * r * k\n"
            "    times = math.ceil(n / columns)\n"
            "    flops = 2 * m * n * (k + r) + times * low\n"
            "    versions = {\n"
            "        'fused': [(flops, x + W + A + B + y)],\n"
            "        'rival': [(2 * x * n, x + W + y), (low, x + A + h),\n"
            "                  (2 * h * n, h + B + 2 * y)],\n"
            "    }\n"
            "    slow = lambda f, v: max(f / peak, 2 * v / bandwidth)\n"
            "    times = {name: sum(slow(*one) for one in each)\n"
            "             for name, each in versions.items()}\n"
            "    saving = 100 - 100 * times['fused'] / times['rival']\n"
            "    return saving, 'rival' if saving < 5 else 'fused'\n"
        ),
    },
    "10.4": {
        "a product of its own": (
            "@triton.jit\n"
            "def my_update(total, low, B, n, n_size, r, scale, RANK: tl.constexpr):\n"
            "    rank = tl.arange(0, RANK)\n"
            "    b = load(B, n, rank, within(n, rank, n_size, r))\n"
            "    return total + scale * tl.dot(low, tl.trans(b))\n"
        ),
    },
    "10.5": {
        "no x twice: low first, and W beside it for the first block": (
            f"{HEAD}"
            "    m = tl.program_id(0) * BM + tl.arange(0, BM)\n"
            "    rank = tl.arange(0, RANK)\n"
            "    low = tl.zeros((BM, RANK), tl.float32)\n"
            "    for step in tl.static_range(SWEEP):\n"
            "        n = tl.program_id(1) * SWEEP * BN + step * BN + tl.arange(0, BN)\n"
            "        total = tl.zeros((BM, BN), tl.float32)\n"
            "        for first in range(0, k_size, BK):\n"
            "            k = first + tl.arange(0, BK)\n"
            "            part = load(x, m, k, within(m, k, m_size, k_size))\n"
            "            wide = load(W, n, k, within(n, k, n_size, k_size))\n"
            "            total += tl.dot(part, tl.trans(wide))\n"
            "            if step < 1:\n"
            "                a = load(A, rank, k, within(rank, k, r, k_size))\n"
            "                low += scale * tl.dot(part, tl.trans(a))\n"
            "        b = load(B, n, rank, within(n, rank, n_size, r))\n"
            "        narrow = low.to(B[0].dtype.element_ty)\n"
            "        total += tl.dot(narrow, tl.trans(b))\n"
            "        store(y, m, n, total, within(m, n, m_size, n_size))\n"
        ),
    },
}

(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)


def test_bytes_are_compared_with_those_of_the_library():
    """The plain product, and what the exercise's solution moves, by formula."""
    shape, r, *_ = checks.SCORED
    (m, n, k), (down, across) = shape[:3], shape.grid
    plain = 4 * (across * m * k + down * n * k + m * n)
    assert checks.plain_bytes(shape) == plain
    x, W, A, B = (torch.randn(s) for s in ((m, k), (n, k), (r, k), (n, r)))
    tiles = Tiles(m=shape.BM, n=shape.BN, k=shape.BK, sweep=checks.SWEEP, group=1)
    with trace() as seen:
        product(x, matrix(W), n, A=A, B=B, tiles=tiles)
    thin = 4 * r * down * (k * across // checks.SWEEP + n)
    assert seen.bytes() == plain + thin <= checks.TARGET * plain


def test_the_bound_of_exercise_3_is_nearly_the_librarys():
    """Of the same columns for each program; the library counts whole tiles."""
    for k, r in ((576, 16), (4096, 16), (4096, 64)):
        columns = 128 if r <= 16 else 256
        speeds = SHOWN.matrix, SHOWN.bandwidth
        saving, _ = checks.fused_or_rival(4096, k, k, r, columns, *speeds)
        library = fusing.saved((4096, k, k), r, in_three, SHOWN)
        assert saving == pytest.approx(library, abs=5)


def test_cases_lie_on_both_sides_of_the_threshold():
    savings = [checks.fused_or_rival(*case) for case in checks._near_the_threshold()]
    assert [choice for _, choice in savings] == ["fused", "rival", "rival"]
    assert all(abs(saving - 5) < 0.03 for saving, _ in savings[:2])
    assert {checks.fused_or_rival(*case)[1] for case in checks.CASES} == {
        *checks.CHOICES
    }


def test_every_named_mistake_of_exercise_3_is_told_apart_in_some_case():
    cases = (*checks.CASES, *checks._near_the_threshold())
    every = [checks._wrong_choices(case) for case in cases]
    assert set().union(*every) >= set(every[0]) and len(set().union(*every)) == 15


def test_a_fence_is_around_every_tensor_that_is_lent():
    for tensor in (checks.fenced(5, 7), checks.turned(checks.fenced(5, 7))):
        assert tensor.shape == (5, 7) and tensor.isfinite().all()
        memory = tensor.new_empty(0).set_(tensor.untyped_storage())
        assert memory.isnan().sum() == 2 * checks.FENCE == len(memory) - 35
    assert checks.empty(3, 2).isnan().all()
