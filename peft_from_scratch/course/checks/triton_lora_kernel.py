"""Notebook 10's checks: kernels, watched by the tracer while the interpreter runs them.

A kernel that forgets a mask reads and writes beside its tensors. Here they lie in the
middle of a buffer of NaN, the *fence*, so that this harms nothing; what is further away
is refused before it is touched. The trace tells which program left which tensor, or did
another program's work, before any value is compared. What a mask hides and no `other=`
fills in is NaN here: on a GPU it is undefined.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest import mock

import numpy
import torch
from torch import Tensor

from ...kernels.language import Tiles, load, matrix, store, tl, triton, within
from ...kernels.lora import product
from ...kernels.trace import Access, Trace, trace
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


def wide(M: Tensor) -> Tensor:
    """The same matrix, fenced, with NaN between its rows."""
    wider = empty(M.shape[0], M.shape[1] + 8, dtype=M.dtype)
    wider[:, : M.shape[1]] = M
    return wider[:, : M.shape[1]]


Blocks = Callable[[int, int], dict[str, tuple[slice, ...]]]


def run(
    launch: Callable, what: str, written: str, own: Blocks, /, **tensors: Tensor
) -> Trace:
    """Run a launch of the learner's kernel under the tracer.

    Args
        own   (i, j) -> {tensor: the part of it that this program may touch}; all of
              those that it does not name
    Raises   Wrong   it touches what lies beside the tensors, leaves a part of `written`
                     out or writes it twice, changes another one, or does the work of
                     another program
    """
    lent = {name: tensor for name, tensor in tensors.items() if name != written}
    with unchanged(**lent), trace(**tensors) as seen, _guarded(tensors, what) as hidden:
        try:
            launch()
        except Exception as error:
            raise _explained(_root(error), what) from None
    for access in seen.accesses:
        _demand_inside(access, tensors, what)
    _demand_whole(seen, written, tensors[written], what)
    _demand_own(seen, written, own, tensors, what)
    if hidden and tensors[written].isnan().any():
        raise Wrong(
            f"{what}: {written} has NaN entries, from what a mask hides.\nLikely "
            "mistake: `other=0.0` is missing in a load whose block goes into a sum"
        )
    return seen


@contextmanager
def _guarded(tensors: dict[str, Tensor], what: str) -> Iterator[list]:
    """Wrong before memory is touched that no fence surrounds, which could end Python.

    Gives a list that has an entry for each load that leaves what it hides undefined.
    """
    from triton.runtime.interpreter import (
        InterpreterBuilder,
        TensorHandle,
        _get_np_dtype,
    )

    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    known = [(each.data_ptr(), each.data_ptr() + each.nbytes()) for each in storages]
    hidden = []
    load, store = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def demand_known(builder, pointers, mask, did: str) -> None:
        at = pointers.data[mask.data.astype(bool)].astype(numpy.int64)
        near = numpy.zeros(at.shape, dtype=bool)
        for start, stop in known:
            near |= (start <= at) & (at < stop)
        if not near.all():
            raise Wrong(
                f"{what}: program {_shown(tuple(builder.grid_idx))} {did} far away "
                "from all tensors.\nLikely mistake: an offset is there twice, or "
                "multiplied by another number; or the mask is missing"
            )

    def guarded_load(self, pointers, mask, other, *rest):
        demand_known(self, pointers, mask, "reads")
        dtype = pointers.get_element_ty()
        if other is None and not mask.data.all() and dtype.is_floating():
            hidden.append(dtype)
            nothing = numpy.full(pointers.data.shape, math.nan, _get_np_dtype(dtype))
            other = TensorHandle(nothing, dtype)
        return load(self, pointers, mask, other, *rest)

    def guarded_store(self, pointers, value, mask, *rest):
        demand_known(self, pointers, mask, "writes")
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", guarded_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", guarded_store),
    ):
        yield hidden


def _explained(error: BaseException, what: str) -> BaseException:
    if "'NoneType' object has no" in str(error):
        return Wrong(f"{what}: nothing came back.\nLikely mistake: `return` is missing")
    return error


def _root(error: BaseException) -> BaseException:
    """What the kernel itself raised: the interpreter wraps it, once a call."""
    while type(error).__name__ == "InterpreterError" and error.__cause__:
        error = error.__cause__
    return error


def _shown(program: tuple[int, int, int]) -> tuple:
    return program[: 1 if program[1:] == (0, 0) else 2]


def _demand_inside(access: Access, tensors: dict[str, Tensor], what: str) -> None:
    if not len(access.elements):
        return
    did = "reads" if access.kind == "load" else "writes"
    tensor = tensors[access.tensor]
    beside = access.elements[~numpy.isin(access.elements, _places(tensor))]
    if len(beside):
        raise Wrong(
            f"{what}: program {_shown(access.program)} {did} {len(beside)} elements "
            f"beside {access.tensor}, which has the shape {tuple(tensor.shape)}.\n"
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


def _demand_own(seen: Trace, written: str, own: Blocks, tensors, what: str) -> None:
    """Wrong where a program leaves its block, or an element is written twice."""
    times = dict.fromkeys(_places(tensors[written]).tolist(), 0)
    for access in seen.accesses:
        name, program = access.tensor, access.program
        if access.kind == "store" and len(access.elements) and name != written:
            raise Wrong(
                f"{what}: program {_shown(program)} writes to {name}, which is only "
                f"to be read.\nLikely mistake: `tl.store` to another tensor than "
                f"{written}"
            )
        if access.kind == "store":
            for at in set(access.elements.tolist()):
                times[at] += 1
        part = own(*program[:2]).get(name) if name in tensors else None
        if part is None:
            continue
        foreign = ~numpy.isin(access.elements, _places(tensors[name], part))
        if foreign.any():
            did = "reads" if access.kind == "load" else "writes"
            raise Wrong(
                f"{what}: program {_shown(program)} {did} {foreign.sum()} elements of "
                f"{name} that belong to the block of another program.\nLikely mistake: "
                "one program does the work of others, which on a GPU run beside it; or "
                "the programs are numbered in another order"
            )
    again = sum(count > 1 for count in times.values())
    if again:
        raise Wrong(
            f"{what}: {again} elements of {written} are written more than once.\n"
            "Likely mistake: `tl.store` stands inside of a loop, where it belongs "
            "behind it; or two programs write the same block"
        )


def _places(tensor: Tensor, part: tuple[slice, ...] = ()) -> numpy.ndarray:
    """Positions in memory of the elements of a tensor, or of a part of it."""
    if tensor.dim() == 1:
        return positions(tensor[None])[0][part].ravel()
    return positions(tensor)[part].ravel()


def _block(number: int, size: int) -> slice:
    return slice(number * size, (number + 1) * size)


def _ceil(size: int, block: int) -> int:
    return math.ceil(size / block)


# 10.1 ----------------------------------------------------------------------------------


@judged
def vector_add(my_add) -> None:
    """10.1: my_add(x, y, out, size, BLOCK): out = x + y, a block for each program."""
    _demand_kernel(my_add)
    for size, block, scale, dtype in (
        (256, 64, 1.0, torch.float32),
        (100, 64, 1.0, torch.float32),
        (300, 128, 1.0, torch.float32),
        (7, 16, 1e6, torch.float32),
        (1, 16, 1.0, torch.float32),
        (64, 64, 1e-6, torch.float32),
        (530, 16, 1.0, torch.float32),
        (1500, 256, 1.0, torch.float16),
    ):
        x, y = (fenced(size, dtype=dtype).mul_(scale) for _ in "xy")
        x[1::5], y[2::5] = 0, 0
        out = empty(size, dtype=dtype)
        what = f"x + y, {size} numbers in blocks of {block}"
        grid = (_ceil(size, block),)
        add = partial(my_add[grid], x, y, out, size, BLOCK=block)
        run(add, what, "out", _each_its_block(block), x=x, y=y, out=out)
        tolerance = HALF if dtype == torch.float16 else 1e-5
        close(
            out,
            x.double() + y.double(),
            what=what,
            mistakes=_wrong_sums(x, y),
            tolerance=tolerance,
        )


def _each_its_block(block: int) -> Blocks:
    return lambda i, j: dict.fromkeys(("x", "y", "out"), (_block(i, block),))


def _wrong_sums(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"x alone": x, "y alone": y, "x twice": 2 * x, "x - y": x - y}


def _demand_kernel(answer) -> None:
    if not hasattr(answer, "__getitem__"):
        raise Wrong(
            f"{getattr(answer, '__name__', answer)} is no kernel.\n"
            "Likely mistake: `@triton.jit` is missing above it"
        )


# 10.2 ----------------------------------------------------------------------------------


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
    Shape(50, 70, 20, 16, 16, 16),
    Shape(40, 17, 1, 32, 16, 16),
)


@judged
def tiled_product(my_product) -> None:
    """10.2: my_product(x, W, y, m_size, n_size, k_size, BM, BN, BK): y = x W^T."""
    _demand_kernel(my_product)
    for shape in SHAPES:
        x, W = fenced(shape.m, shape.k), fenced(shape.n, shape.k)
        _judge_product(my_product, shape, x, W, 1e-5)
    shape = Shape(20, 40, 33, 16, 32, 16)
    x, W = 1e4 * fenced(shape.m, shape.k), fenced(shape.n, shape.k)
    for more, (a, b, c) in LAYOUTS.items():
        lent = a(x), b(W)
        _judge_product(my_product, shape, *lent, 1e-5, more, layout=c)
    shape = Shape(16, 16, 4096, 16, 16, 64)
    x, W = (fenced(16, 4096, dtype=torch.float16, fill=_near_a_half) for _ in "xW")
    _judge_product(my_product, shape, x, W, HALF, "float16, a long sum")


def as_it_is(M: Tensor) -> Tensor:
    """The same matrix, fenced, row after row."""
    return fenced(*M.shape, dtype=M.dtype, fill=lambda _: M)


LAYOUTS = {  # of x, W and y
    "both stored by columns": (turned, turned, as_it_is),
    "x stored by columns": (turned, as_it_is, as_it_is),
    "W stored by columns": (as_it_is, turned, as_it_is),
    "y stored by columns": (as_it_is, as_it_is, turned),
    "all parts of wider ones": (wide, wide, wide),
}


def _near_a_half(shape) -> Tensor:
    """All of one sign: a float16 sum of them loses a part of each that is added."""
    return 0.7 + 0.05 * torch.rand(shape)


def _judge_product(
    my_product, shape: Shape, x, W, tolerance, more="", layout: Callable = as_it_is
) -> None:
    y = layout(empty(shape.m, shape.n, dtype=x.dtype))
    what = f"x W^T, {_sizes(shape, more)}"
    arguments = map(matrix, (x, W, y))
    multiply = partial(my_product[shape.grid], *arguments, *shape[:3], **shape.blocks)
    run(multiply, what, "y", _each_its_tile(shape), x=x, W=W, y=y)
    expected = x.double() @ W.double().T
    mistakes = _wrong_products(x, W, shape)
    close(y, expected, what=what, mistakes=mistakes, tolerance=tolerance)


def _each_its_tile(shape: Shape, sweep: int = 1) -> Blocks:
    """Of program (i, j): BM rows, and `sweep` blocks of BN columns side by side."""

    def own(i: int, j: int) -> dict[str, tuple[slice, ...]]:
        rows, columns = _block(i, shape.BM), _block(j, sweep * shape.BN)
        return {"x": (rows,), "W": (columns,), "B": (columns,), "y": (rows, columns)}

    return own


def _sizes(shape: Shape, more: str = "") -> str:
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


# 10.3 ----------------------------------------------------------------------------------


@triton.jit
def _lend_block(
    W, out, n_size, k_size, READER: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Program (i, j) writes the block that READER returns, with all that is hidden."""
    n, k = tl.program_id(0) * BN, tl.program_id(1) * BK
    rows, columns = n + tl.arange(0, BN), k + tl.arange(0, BK)
    block = READER(W, n, k, n_size, k_size, BN, BK)
    store(out, rows, columns, block, (rows >= 0)[:, None] & (columns >= 0)[None, :])


@judged
def conv1d_reader(my_reader) -> None:
    """10.3: my_reader(W, n, k, n_size, k_size, BN, BK): a block of W^T, for W (k, n).

    It stands in the library's own kernel, in the place of `dense`; and alone, where the
    zeros behind the edges are seen.
    """
    _demand_kernel(my_reader)
    for m, n, k in ((16, 32, 32), (20, 40, 24), (16, 32, 16)):
        weight = fenced(k, n)
        for how, W in _stored(weight).items():
            x, y = fenced(m, k), empty(m, n)
            what = f"x W, Conv1D's weight {k, n} {how}, x {m, k}"
            _run_reader(my_reader, x, W, y, what)
            close(y, x.double() @ W.double(), what=what, mistakes=_misread(x, W))
    for n, k, BN, BK in ((40, 24, 32, 16), (52, 70, 16, 32), (3, 5, 16, 16)):
        for how, W in _stored(1e-5 * fenced(k, n)).items():
            _judge_block(my_reader, W, BN, BK, how)


def _run_reader(my_reader, x: Tensor, W: Tensor, y: Tensor, what: str) -> None:
    tiles = Tiles(m=16, n=16, k=16, sweep=1, group=1)
    more = dict(reader=my_reader, out=y, tiles=tiles)
    multiply = partial(product, x, matrix(W), y.shape[1], **more)
    run(multiply, what, "y", lambda i, j: {}, x=x, W=W, y=y)


def _judge_block(my_reader, W: Tensor, BN: int, BK: int, how: str) -> None:
    """The blocks themselves, each from its own part of W."""
    k, n = W.shape
    grid = _ceil(n, BN), _ceil(k, BK)
    out = empty(grid[0] * BN, grid[1] * BK)
    what = f"the blocks {BN} x {BK} of Conv1D's weight {k, n} {how}"
    arguments = matrix(W), matrix(out), n, k
    lend = partial(_lend_block[grid], *arguments, READER=my_reader, BN=BN, BK=BK)

    def own(i: int, j: int) -> dict[str, tuple[slice, ...]]:
        return {"W": (_block(j, BK), _block(i, BN))}

    run(lend, what, "out", own, W=W, out=out)
    expected = torch.zeros(out.shape, dtype=torch.float64)
    expected[:n, :k] = W.double().T
    again = W.T.double()[torch.arange(len(out)).clamp(max=n - 1)]
    close(
        out,
        expected,
        what=what,
        mistakes={
            "where there is nothing, zeros are asked for: other=0.0": expected.where(
                _inside(out, n, k), 1.0
            ),
            "where there is nothing, zeros are asked for, not the last ones again": (
                again[:, torch.arange(out.shape[1]).clamp(max=k - 1)]
            ),
        },
    )


def _inside(out: Tensor, n: int, k: int) -> Tensor:
    rows, columns = (torch.arange(size) for size in out.shape)
    return (rows < n)[:, None] & (columns < k)


def _stored(weight: Tensor) -> dict[str, Tensor]:
    return {
        "as usual": as_it_is(weight),
        "as a part of a wider one": wide(weight),
        "by columns": turned(weight),
    }


def _misread(x: Tensor, W: Tensor) -> dict[str, Tensor]:
    mistakes = {}
    if W.shape[0] == W.shape[1]:
        mistakes["W^T in the place of W: the strides are exchanged"] = (
            x.double() @ W.double().T
        )
    return mistakes


# 10.4 ----------------------------------------------------------------------------------


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
    finished = UPDATE(block, narrow, B, n, n_size, r, scale, RANK)
    store(y, m, n, finished, within(m, n, m_size, n_size))


@judged
def fused_update(my_update) -> None:
    """10.4: my_update(total, low, B, n, n_size, r, scale, RANK): + scale low B^T."""
    _demand_kernel(my_update)
    for m, n, r, blocks in (
        (16, 32, 16, (16, 16, 16)),
        (20, 40, 5, (16, 16, 16)),
        (7, 19, 3, (16, 16, 16)),
        (40, 70, 20, (32, 16, 32)),
        (10, 70, 1, (16, 32, 16)),
    ):
        for scale, how in zip((0.5, -3.0, 0.5), B_LAYOUTS, strict=True):
            _judge_update(my_update, (m, n, r), blocks, scale, how)
    _judge_update(my_update, (16, 32, 16), (16, 16, 16), 1e5, "")


B_LAYOUTS = {
    "": as_it_is,
    "B stored by columns": turned,
    "B a part of a wider one": wide,
}


def _judge_update(my_update, sizes, blocks, scale: float, how: str) -> None:
    (m, n, r), (BM, BN, RANK) = sizes, blocks
    total, low, y = fenced(m, n), fenced(m, r), empty(m, n)
    total[::3, ::4] = 0
    B = B_LAYOUTS[how](fenced(n, r))
    named = (f"total {m, n}, B {n, r}, scale {scale:g}, blocks {BM} x {BN}", how)
    what = f"total + scale low B^T, {', '.join(filter(None, named))}"
    arguments = *map(matrix, (total, low, B, y)), m, n, r, scale
    grid, constants = (_ceil(m, BM), _ceil(n, BN)), dict(BM=BM, BN=BN, RANK=RANK)
    finish = partial(_finish[grid], *arguments, UPDATE=my_update, **constants)
    own = _each_its_tile(Shape(m, n, 0, BM, BN, 0))
    run(finish, what, "y", own, **dict(total=total, low=low, B=B, y=y))
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


# 10.5 ----------------------------------------------------------------------------------

SWEEP, RANKS = 4, 16


class Fused(NamedTuple):
    """A product with its update: of which sizes, and how its matrices are stored."""

    shape: Shape
    r: int
    scale: float = 0.5
    sweep: int = SWEEP
    ranks: int = RANKS
    layout: Callable = as_it_is

    def __str__(self):
        how = {turned: ", all stored by columns", wide: ", all parts of wider ones"}
        return (
            f"{_sizes(self.shape)}, r {self.r}, scale {self.scale:g}, {self.sweep} "
            f"blocks a program{how.get(self.layout, '')}"
        )


FUSED = (
    Fused(Shape(32, 64, 32, 16, 16, 16), 8),
    Fused(Shape(24, 100, 40, 16, 16, 16), 5),
    Fused(Shape(20, 256, 30, 16, 32, 32), 16),
    Fused(Shape(20, 70, 24, 16, 16, 16), 5, -3.0, layout=turned),
    Fused(Shape(40, 60, 17, 32, 16, 16), 20, 0.1, 2, 32, wide),
    Fused(Shape(50, 100, 16, 16, 16, 16), 1, 2.0, 2),
    Fused(Shape(80, 40, 20, 64, 16, 16), 3, 0.5, 1),
)
SCORED = Fused(Shape(64, 256, 256, 32, 32, 64), 8)


@judged
def fewest_bytes(my_lora) -> None:
    """10.5: my_lora(x, W, A, B, y, …): the product, its bytes close to plain x W^T's."""
    _demand_kernel(my_lora)
    for case in FUSED:
        _judge_fused(my_lora, case)
    seen = _judge_fused(my_lora, SCORED)
    mine, plain = seen.bytes(), plain_bytes(SCORED.shape)
    limit = int(TARGET * plain)
    bill = (
        f"bytes issued, {SCORED}:\n"
        f"  yours           {mine:9,}\n"
        f"  plain x W^T     {plain:9,}\n"
        f"  allowed         {limit:9,}  ({TARGET} times the plain product's)"
    )
    if mine > limit:
        raise Wrong(
            f"right, but it moves too much: {bill}\n{_waste(seen, *SCORED[:2])}"
        )
    print(bill)


def _judge_fused(my_lora, case: Fused) -> Trace:
    shape, r, scale, sweep, ranks, layout = case
    m, n, k = shape[:3]
    lent = fenced(m, k), fenced(n, k), fenced(r, k), fenced(n, r), empty(m, n)
    x, W, A, B, y = map(layout, lent)
    what = f"x W^T + scale (x A^T) B^T, {case}"
    grid = _ceil(m, shape.BM), _ceil(n, sweep * shape.BN)
    blocks = shape.blocks | {"RANK": ranks, "SWEEP": sweep}
    arguments = *map(matrix, (x, W, A, B, y)), m, n, k, r, scale
    multiply = partial(my_lora[grid], *arguments, **blocks)
    tensors = dict(x=x, W=W, A=A, B=B, y=y)
    seen = run(multiply, what, "y", _each_its_tile(shape, sweep), **tensors)
    plain, low = x.double() @ W.double().T, x.double() @ A.double().T
    expected = plain + scale * low @ B.double().T
    wrong = _wrong_fused(x, A, B, plain, low, case)
    close(y, expected, what=what, mistakes=wrong)
    return seen


def _wrong_fused(x, A, B, plain, low, case: Fused) -> dict[str, Tensor]:
    B, shape, scale = B.double(), case.shape, case.scale
    block = torch.arange(len(B)) // shape.BN % case.sweep  # which of its program's
    summed = low[:, None] * (block + 1)[:, None]  # (m, n, r)
    first = low[:, None] * (block == 0)[:, None]
    part = x[:, : shape.BK].double() @ A[:, : shape.BK].double().T
    wrong = {
        "the scale is forgotten": plain + low @ B.T,
        "x W^T alone": plain,
        "the update alone": scale * low @ B.T,
        "low is summed on from block to block: it needs x A^T once": (
            plain + scale * (summed * B).sum(-1)
        ),
        "low is set to zero for each block, and filled for the first alone": (
            plain + scale * (first * B).sum(-1)
        ),
        "low has only the first BK columns": plain + scale * part @ B.T,
        "the scale of all: only the update has it": scale * (plain + low @ B.T),
    }
    right = plain + scale * low @ B.T
    return {text: y for text, y in wrong.items() if not y.equal(right)}


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
