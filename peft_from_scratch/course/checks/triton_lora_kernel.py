"""Notebook 09's checks: kernels, watched by the tracer while the interpreter runs them.

A kernel that forgets a mask reads and writes beside its tensors. Here they lie in the
middle of a buffer of NaN, the *fence*, so that this harms nothing; and the trace tells
which program left which tensor, before any value is compared.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from ...kernels.language import Tiles, load, matrix, store, tl, triton, within
from ...kernels.lora import product
from ...kernels.trace import Trace, trace
from ..pictures.access_picture import positions
from . import Wrong, close, judged, unchanged

FENCE = 2**16  # elements of NaN on each side
HALF = 1e-3  # tolerance in float16: its eps, 2^-10
TARGET = 1.1  # times the bytes of the plain product


def fenced(*shape: int, dtype=torch.float32, fill: Callable = torch.randn) -> Tensor:
    """A tensor in the middle of a buffer of NaN."""
    size = math.prod(shape)
    buffer = torch.full((size + 2 * FENCE,), math.nan, dtype=dtype)
    inner = buffer[FENCE : FENCE + size].view(shape)
    return inner.copy_(fill(shape))


def empty(*shape: int, dtype=torch.float32) -> Tensor:
    """Fenced, and NaN itself: what a kernel does not write is seen."""
    return fenced(*shape, dtype=dtype, fill=lambda s: torch.full(s, math.nan))


def turned(M: Tensor) -> Tensor:
    """The same matrix, fenced, its columns one after the other in memory."""
    return fenced(*M.shape[::-1], dtype=M.dtype, fill=lambda _: M.T).T


def run(launch: Callable, what: str, written: str, /, **tensors: Tensor) -> Trace:
    """Run a launch of the learner's kernel under the tracer.

    Raises   Wrong   it touches what lies beside the tensors, leaves a part of `written`
                     out, or changes another one
    """
    lent = {name: tensor for name, tensor in tensors.items() if name != written}
    with unchanged(**lent), trace(**tensors) as seen:
        try:
            launch()
        except Exception as error:
            raise _told(_root(error), what) from None
    for access in seen.accesses:
        _demand_inside(access, tensors, what)
    _demand_whole(seen, written, tensors[written], what)
    return seen


def _told(error: BaseException, what: str) -> BaseException:
    if "'NoneType' object has no" in str(error):
        return Wrong(f"{what}: nothing came back.\nLikely mistake: `return` is missing")
    return error


def _root(error: BaseException) -> BaseException:
    """What the kernel itself raised: the interpreter wraps it, once a call."""
    while type(error).__name__ == "InterpreterError" and error.__cause__:
        error = error.__cause__
    return error


def _demand_inside(access, tensors: dict[str, Tensor], what: str) -> None:
    if not len(access.elements):
        return
    did = "reads" if access.kind == "load" else "writes"
    if access.tensor not in tensors:
        raise Wrong(f"{what}: a program {did} far away from all tensors")
    tensor = tensors[access.tensor]
    allowed = set(_places(tensor).tolist())
    beside = [at for at in access.elements.tolist() if at not in allowed]
    if beside:
        program = access.program[: 1 if access.program[1:] == (0, 0) else 2]
        raise Wrong(
            f"{what}: program {program} {did} {len(beside)} elements beside "
            f"{access.tensor}, which has the shape {tuple(tensor.shape)}.\n"
            "Likely mistake: `mask=`, or `within(…)`, lets through what lies behind "
            "the edge; or an offset or a stride is another one's"
        )


def _demand_whole(seen: Trace, name: str, tensor: Tensor, what: str) -> None:
    """Wrong where there are elements that no program writes."""
    stores = [a.elements for a in seen.of("store", name)]
    done = set(numpy.concatenate(stores).tolist()) if stores else set()
    left = [at for at in _places(tensor).tolist() if at not in done]
    if left:
        raise Wrong(
            f"{what}: of the {tensor.numel():,} elements of {name}, no program writes "
            f"{len(left):,}.\nLikely mistake: "
            + (
                "a program's number, `tl.program_id(…)`, or what it is multiplied by; "
                "or a mask that lets through too little"
                if done
                else f"`tl.store` is missing, or writes elsewhere than to {name}"
            )
        )


def _places(tensor: Tensor):
    if tensor.dim() == 1:
        tensor = tensor[None]
    return positions(tensor).ravel()


def _ceil(size: int, block: int) -> int:
    return math.ceil(size / block)


# 9.1 ----------------------------------------------------------------------------------


@judged
def vector_add(my_add) -> None:
    """9.1: my_add(x, y, out, size, BLOCK): out = x + y, a block for each program."""
    _demand_kernel(my_add)
    for size, block in ((256, 64), (100, 64), (300, 128), (7, 16)):
        x, y, out = fenced(size), fenced(size), empty(size)
        what = f"x + y, {size} numbers in blocks of {block}"
        grid = (_ceil(size, block),)
        add = partial(my_add[grid], x, y, out, size, BLOCK=block)
        run(add, what, "out", x=x, y=y, out=out)
        close(out, x + y, what=what, mistakes=_wrong_sums(x, y))


def _wrong_sums(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"x alone": x, "y alone": y, "x twice": 2 * x, "x - y": x - y}


def _demand_kernel(answer) -> None:
    if not hasattr(answer, "__getitem__"):
        raise Wrong(
            f"{getattr(answer, '__name__', answer)} is no kernel.\n"
            "Likely mistake: `@triton.jit` is missing above it"
        )


# 9.2 ----------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Of a product, and of its blocks."""

    m: int
    n: int
    k: int
    BM: int
    BN: int
    BK: int

    @property
    def blocks(self) -> dict[str, int]:
        return dict(BM=self.BM, BN=self.BN, BK=self.BK)

    @property
    def grid(self) -> tuple[int, int]:
        return _ceil(self.m, self.BM), _ceil(self.n, self.BN)


SHAPES = (
    Shape(32, 32, 32, 16, 16, 16),
    Shape(32, 48, 64, 16, 16, 32),
    Shape(20, 100, 50, 16, 32, 16),
    Shape(5, 3, 7, 16, 16, 16),
)


@judged
def tiled_product(my_product) -> None:
    """9.2: my_product(x, W, y, m_size, n_size, k_size, BM, BN, BK): y = x W^T."""
    _demand_kernel(my_product)
    for shape in SHAPES:
        x, W = fenced(shape.m, shape.k), fenced(shape.n, shape.k)
        _judge_product(my_product, shape, x, W, 1e-5)
    shape = SHAPES[2]
    x, W = turned(fenced(shape.m, shape.k)), turned(fenced(shape.n, shape.k))
    _judge_product(my_product, shape, x, W, 1e-5, "both stored by columns")
    shape = Shape(16, 16, 4096, 16, 16, 32)
    x, W = (fenced(16, 4096, dtype=torch.float16, fill=_near_a_half) for _ in "xW")
    _judge_product(my_product, shape, x, W, HALF, "float16, a long sum")


def _near_a_half(shape) -> Tensor:
    """All of one sign: a float16 sum of them loses a part of each that is added."""
    return 0.7 + 0.05 * torch.rand(shape)


def _judge_product(my_product, shape: Shape, x, W, tolerance, more="") -> None:
    y = empty(shape.m, shape.n, dtype=x.dtype)
    what = f"x W^T, {_said(shape, more)}"
    arguments = map(matrix, (x, W, y))
    multiply = partial(my_product[shape.grid], *arguments, *shape[:3], **shape.blocks)
    run(multiply, what, "y", x=x, W=W, y=y)
    expected = x.double() @ W.double().T
    mistakes = _wrong_products(x, W, shape)
    close(y, expected, what=what, mistakes=mistakes, tolerance=tolerance)


def _said(shape: Shape, more: str = "") -> str:
    sizes = f"x {shape.m, shape.k}, W {shape.n, shape.k}"
    blocks = f"blocks {shape.BM} x {shape.BN} x {shape.BK}"
    return ", ".join(filter(None, (sizes, blocks, more)))


def _wrong_products(x: Tensor, W: Tensor, shape: Shape) -> dict[str, Tensor]:
    parts = [
        a.double() @ b.double().T
        for a, b in zip(x.split(shape.BK, 1), W.split(shape.BK, 1), strict=True)
    ]
    wrong = {
        "only the first BK columns: the loop over k is missing, or its k stays": (
            parts[0]
        ),
        "the same BK columns again and again: k does not move with the loop": (
            parts[0] * len(parts)
        ),
        "only the last BK columns: the total is not added to": parts[-1],
        "the last BK columns are missing": sum(parts) - parts[-1],
    }
    if x.dtype == torch.float16:
        wrong["the total was rounded to float16 at each step: sum in float32"] = (
            _rounded_sum(parts)
        )
    if shape.BN == shape.BK and not len(W) % shape.BN and not W.shape[1] % shape.BK:
        wrong["tl.trans of W's block is missing"] = x.double() @ _turned_blocks(
            W, shape
        )
    return {text: y for text, y in wrong.items() if not y.equal(sum(parts))}


def _turned_blocks(W: Tensor, shape: Shape) -> Tensor:
    """W^T whose blocks lie as they do in W."""
    blocks = W.double().unflatten(1, (-1, shape.BK)).unflatten(0, (-1, shape.BN))
    return blocks.permute(2, 1, 0, 3).flatten(2, 3).flatten(0, 1)


def _rounded_sum(parts: list[Tensor]) -> Tensor:
    total = torch.zeros_like(parts[0], dtype=torch.float16)
    for part in parts:
        total = (total.double() + part).half()
    return total.double()


# 9.3 ----------------------------------------------------------------------------------


@judged
def conv1d_reader(my_reader) -> None:
    """9.3: my_reader(W, n, k, n_size, k_size, BN, BK): a block of W^T, for W (k, n).

    It stands in the library's own kernel, in the place of `dense`.
    """
    _demand_kernel(my_reader)
    for m, n, k in ((16, 32, 32), (20, 40, 24), (16, 32, 16)):
        weight = fenced(k, n)
        for how, W in _stored(weight).items():
            x, y = fenced(m, k), empty(m, n)
            what = f"x W, Conv1D's weight {k, n} {how}, x {m, k}"
            _run_reader(my_reader, x, W, y, what)
            close(y, x.double() @ W.double(), what=what, mistakes=_misread(x, W))


def _run_reader(my_reader, x: Tensor, W: Tensor, y: Tensor, what: str) -> None:
    tiles = Tiles(m=16, n=16, k=16, sweep=1, group=1)
    more = dict(reader=my_reader, out=y, tiles=tiles)
    multiply = partial(product, x, matrix(W), y.shape[1], **more)
    run(multiply, what, "y", x=x, W=W, y=y)


def _stored(weight: Tensor) -> dict[str, Tensor]:
    k, n = weight.shape
    wider = fenced(k, n + 8)
    return {
        "as usual": weight,
        "as a part of a wider one": wider[:, :n],
        "by columns": turned(weight),
    }


def _misread(x: Tensor, W: Tensor) -> dict[str, Tensor]:
    mistakes = {}
    if W.shape[0] == W.shape[1]:
        mistakes["W^T in the place of W: the strides are exchanged"] = (
            x.double() @ W.double().T
        )
    return mistakes


# 9.4 ----------------------------------------------------------------------------------


@triton.jit
def _finish(
    total,
    low,
    B,
    y,
    m_size,
    n_size,
    r,
    scale,
    UPDATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RANK: tl.constexpr,
):
    """Lend a block of total and low to UPDATE, and write what it returns."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    rank = tl.arange(0, RANK)
    block = load(total, m, n, within(m, n, m_size, n_size))
    narrow = load(low, m, rank, within(m, rank, m_size, r))
    made = UPDATE(block, narrow, B, n, n_size, r, scale, RANK)
    store(y, m, n, made, within(m, n, m_size, n_size))


@judged
def fused_update(my_update) -> None:
    """9.4: my_update(total, low, B, n, n_size, r, scale, RANK): + scale low B^T."""
    _demand_kernel(my_update)
    for m, n, r in ((16, 32, 16), (20, 40, 5), (7, 19, 3)):
        for scale in (0.5, -3.0):
            for how in ("", "B stored by columns"):
                _judge_update(my_update, m, n, r, scale, how)


def _judge_update(my_update, m: int, n: int, r: int, scale: float, how: str) -> None:
    total, low, B, y = fenced(m, n), fenced(m, r), fenced(n, r), empty(m, n)
    B = turned(B) if how else B
    said = (f"total {m, n}, B {n, r}, scale {scale}", how)
    what = f"total + scale low B^T, {', '.join(filter(None, said))}"
    grid = _ceil(m, 16), _ceil(n, 16)
    arguments = *map(matrix, (total, low, B, y)), m, n, r, scale
    finish = partial(_finish[grid], *arguments, UPDATE=my_update, BM=16, BN=16, RANK=16)
    run(finish, what, "y", **dict(total=total, low=low, B=B, y=y))
    update = low.double() @ B.double().T
    wrong = _wrong_updates(total, update, scale, r)
    close(y, total + scale * update, what=what, mistakes=wrong)


def _wrong_updates(total, update, scale: float, r: int) -> dict[str, Tensor]:
    return {
        "the scale is forgotten": total + update,
        "the scale, twice": total + scale**2 * update,
        "the scale of total as well: only the update has it": scale * (total + update),
        "divided by the scale": total + update / scale,
        "divided by r: the scale is alpha / r already": total + scale / r * update,
        "the update alone: start from total": scale * update,
        "the update is taken away": total - scale * update,
        "total as it was": total.double(),
    }


# 9.5 ----------------------------------------------------------------------------------

SWEEP, RANKS = 4, 16
FUSED = (  # (shape, r)
    (Shape(32, 64, 32, 16, 16, 16), 8),
    (Shape(24, 100, 40, 16, 16, 16), 5),
    (Shape(20, 256, 30, 16, 32, 32), 16),
)
SCORED = Shape(64, 256, 256, 32, 32, 64), 8


@judged
def fewest_bytes(my_lora) -> None:
    """9.5: my_lora(x, W, A, B, y, …): the product, its bytes close to plain x W^T's."""
    _demand_kernel(my_lora)
    for shape, r in FUSED:
        _judge_fused(my_lora, shape, r)
    shape, r = SCORED
    seen = _judge_fused(my_lora, shape, r)
    mine, plain = seen.bytes(), plain_bytes(shape)
    limit = int(TARGET * plain)
    said = (
        f"bytes issued, {_said(shape)}, r {r}:\n"
        f"  yours           {mine:9,}\n"
        f"  plain x W^T     {plain:9,}\n"
        f"  allowed         {limit:9,}  ({TARGET} times the plain product's)"
    )
    if mine > limit:
        raise Wrong(f"right, but it moves too much: {said}\n{_waste(seen, shape, r)}")
    print(said)


def _judge_fused(my_lora, shape: Shape, r: int) -> Trace:
    m, n, k = shape[:3]
    x, W, A, B = fenced(m, k), fenced(n, k), fenced(r, k), fenced(n, r)
    y, scale = empty(m, n), 0.5
    what = f"x W^T + scale (x A^T) B^T, {_said(shape)}, r {r}, {SWEEP} blocks a program"
    grid = _ceil(m, shape.BM), _ceil(n, SWEEP * shape.BN)
    blocks = shape.blocks | {"RANK": RANKS, "SWEEP": SWEEP}
    arguments = *map(matrix, (x, W, A, B, y)), m, n, k, r, scale
    multiply = partial(my_lora[grid], *arguments, **blocks)
    seen = run(multiply, what, "y", **dict(x=x, W=W, A=A, B=B, y=y))
    wide, low = x.double() @ W.double().T, x.double() @ A.double().T
    expected = wide + scale * low @ B.double().T
    wrong = _wrong_fused(x, A, B, wide, low, scale, shape)
    close(y, expected, what=what, mistakes=wrong)
    return seen


def _wrong_fused(x, A, B, wide, low, scale, shape: Shape) -> dict[str, Tensor]:
    B = B.double()
    block = torch.arange(len(B)) // shape.BN % SWEEP  # which of its program's
    summed = low[:, None] * (block + 1)[:, None]  # (m, n, r)
    first = low[:, None] * (block == 0)[:, None]
    part = x[:, : shape.BK].double() @ A[:, : shape.BK].double().T
    return {
        "the scale is forgotten": wide + low @ B.T,
        "x W^T alone": wide,
        "the update alone": scale * low @ B.T,
        "low is summed on from block to block: it needs x A^T once": (
            wide + scale * (summed * B).sum(-1)
        ),
        "low is set to zero for each block, and filled for the first alone": (
            wide + scale * (first * B).sum(-1)
        ),
        "low has only the first BK columns": wide + scale * part @ B.T,
        "the scale of all: only the update has it": scale * (wide + low @ B.T),
    }


def plain_bytes(shape: Shape) -> int:
    """What x W^T issues with the same blocks, traced."""
    m, n, k = shape[:3]
    x, W, y = torch.zeros(m, k), torch.zeros(n, k), torch.zeros(m, n)
    tiles = Tiles(m=shape.BM, n=shape.BN, k=shape.BK, sweep=1, group=1)
    with trace() as seen:
        product(x, matrix(W), n, out=y, tiles=tiles)
    return seen.bytes()


def _waste(seen: Trace, shape: Shape, r: int) -> str:
    """The tensor that is read more often than it must be."""
    down, across = shape.grid
    needed = {
        "x": across * shape.m * shape.k * 4,
        "W": down * shape.n * shape.k * 4,
        "A": down * _ceil(across, SWEEP) * r * shape.k * 4,
        "B": down * shape.n * r * 4,
        "y": shape.m * shape.n * 4,
    }
    surplus = {name: seen.bytes(tensor=name) - most for name, most in needed.items()}
    worst = max(surplus, key=surplus.__getitem__)
    return (
        f"Likely mistake: {worst} is moved {surplus[worst] / needed[worst] + 1:.3g} "
        f"times as often as it needs to be; of the surplus, {surplus[worst]:,} bytes"
    )
