"""Notebook 10's checks: kernels, watched by the tracer while the interpreter runs them.

A kernel without a mask reads and writes outside of its tensors. Here each tensor lies
in the middle of a buffer of NaN, the *fence*, so this harms nothing; accesses further
away are refused before they happen. The trace shows which program left which tensor, or
did another program's work, before any value is compared. What a mask hides and no
`other=` fills in is NaN here: on a GPU it is undefined. Exercise 10.5 is also compiled
for GPUs.
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

from ...kernels.language import (
    Tiles,
    dot,
    load,
    matrix,
    rounded,
    store,
    tl,
    triton,
    within,
)
from ...kernels.lora import product
from ...kernels.trace import Access, Trace, trace
from .. import compile_answer
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
    Raises   Wrong   it touches memory outside of them, leaves a part of `written`
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
            "mistake: `other=0.0` is missing in a load whose tile goes into a sum"
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
            f"outside of {access.tensor}, of shape {tuple(tensor.shape)}.\n"
            "Likely mistake: `mask=`, or `within(…)`, is true for elements past the "
            "edge; or an offset or a stride is another one's"
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
                "a program's index, `tl.program_id(…)`, or what it is multiplied by; "
                "or a mask that lets through too little"
                if done
                else f"`tl.store` is missing, or writes elsewhere than to {name}"
            )
        )


def _demand_own(seen: Trace, written: str, own: Blocks, tensors, what: str) -> None:
    """Wrong where a program leaves its tile, or an element is written twice."""
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
                f"{name} that belong to the tile of another program.\nLikely mistake: "
                "one program does the work of others, which run at the same time; or "
                "the programs are numbered in another order"
            )
    again = sum(count > 1 for count in times.values())
    if again:
        raise Wrong(
            f"{what}: {again} elements of {written} are written more than once.\n"
            "Likely mistake: `tl.store` is inside of a loop, and belongs after it; or "
            "two programs write the same tile"
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


# 10.1 ---------------------------------------------------------------------------------


@judged
def vector_add(my_add) -> None:
    """10.1: my_add(x, y, out, size, BLOCK): out = x + y, a tile for each program."""
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
        what = f"x + y, {size} elements in tiles of {block}"
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


# 10.2 ---------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Of a product, and of its tiles."""

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
    """Of program (i, j): BM rows, and `sweep` neighboring tiles of BN columns."""

    def own(i: int, j: int) -> dict[str, tuple[slice, ...]]:
        rows, columns = _block(i, shape.BM), _block(j, sweep * shape.BN)
        return {"x": (rows,), "W": (columns,), "B": (columns,), "y": (rows, columns)}

    return own


def _sizes(shape: Shape, more: str = "") -> str:
    sizes = f"x {shape.m, shape.k}, W {shape.n, shape.k}"
    blocks = f"tiles {shape.BM} x {shape.BN} x {shape.BK}"
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
        wrong["tl.trans of W's tile is missing"] = x.double() @ _turned_blocks(W, shape)
    return {text: y for text, y in wrong.items() if not y.equal(sum(parts))}


def _turned_blocks(W: Tensor, shape: Shape) -> Tensor:
    """W^T whose tiles are not transposed."""
    blocks = W.double().unflatten(1, (-1, shape.BK)).unflatten(0, (-1, shape.BN))
    return blocks.permute(2, 1, 0, 3).flatten(2, 3).flatten(0, 1)


def _rounded_sum(parts: list[Tensor]) -> Tensor:
    total = torch.zeros_like(parts[0], dtype=torch.float16)
    for part in parts:
        total = (total.double() + part).half()
    return total.double()


# 10.3 ---------------------------------------------------------------------------------

WORTH = 5.0  # percent of the rival's bound, from which on "fused" is the answer
CHOICES = "fused", "rival"
Launches = dict[str, list[tuple[float, float]]]  # {version: [(FLOPs, bytes), …]}


class Case(NamedTuple):
    """A product with its update, and the two speeds of a GPU."""

    m: int
    n: int
    k: int
    r: int
    columns: int  # of y that a program of the fused kernel computes
    peak: float  # FLOP/s
    bandwidth: float  # bytes/s

    def __str__(self):
        return (
            f"m {self.m:,}, n {self.n:,}, k {self.k:,}, r {self.r}, columns "
            f"{self.columns}, peak {self.peak:.4g}, bandwidth {self.bandwidth:.4g}"
        )


def launches(case: Case, *, programs=None, issued=False, y_read=True) -> Launches:
    """FLOPs and distinct bytes of every launch, of each version, in bf16.

    Args
        programs  of a tile row of the fused kernel; None: as many as n needs
        issued    count x and A for each of them
        y_read    the addition in place reads y
    """
    m, n, k, r, columns, *_ = case
    programs = programs or _ceil(n, columns)
    x, W, A, B, h, y = (2 * size for size in (m * k, n * k, r * k, n * r, m * r, m * n))
    wide, low, up = 2 * m * n * k, 2 * m * r * k, 2 * m * n * r
    times = programs if issued else 1
    fused = wide + programs * low + up
    first = [(wide, x + W + y), (low, x + A + h)]
    return {
        "fused": [(fused, times * (x + A) + W + B + y)],
        "three": [*first, (up, h + B + y + y_read * y)],
        "four": [*first, (up, h + B + y), (0, 3 * y)],
    }


def bound(each: list[tuple[float, float]], case: Case, slower=max) -> float:
    """The sum over launches of the slower of arithmetic and memory, seconds."""
    return sum(slower(f / case.peak, moved / case.bandwidth) for f, moved in each)


def fused_or_rival(m, n, k, r, columns, peak, bandwidth) -> tuple[float, str]:
    """(saving, choice): percent of the stronger rival's bound that fusing saves.

        saving = 100 (1 - fused bound / bound of three kernels)

    Args
        m, n, k, r       rows of x, rows of W, columns of both, rank
        columns          of y that a program of the fused kernel computes
        peak, bandwidth  FLOP/s and bytes/s
    Returns  the saving, and "fused" from WORTH percent on, else "rival"
    """
    case = Case(m, n, k, r, columns, peak, bandwidth)
    return _decided(case, launches(case))


def _decided(case: Case, versions: Launches, rival="three", slower=max) -> tuple:
    fused, other = (bound(versions[v], case, slower) for v in ("fused", rival))
    saving = 100 * (1 - fused / other)
    return saving, CHOICES[saving < WORTH]


H100, A100 = (989.4e12, 3.35e12), (312e12, 2.039e12)
CASES = (
    Case(4096, 4096, 4096, 64, 256, *H100),
    Case(4096, 576, 576, 16, 128, *H100),
    Case(4096, 1000, 576, 32, 256, *A100),
    Case(1, 4096, 4096, 16, 128, *H100),
    Case(16, 1536, 576, 8, 64, *A100),
    Case(2048, 300, 8192, 256, 128, *H100),
    Case(512, 100, 64, 8, 256, 1e12, 1e9),
    Case(4096, 4096, 11008, 16, 128, *A100),
)


@judged
def worth_fusing(my_choice) -> None:
    """10.3: my_choice(m, n, k, r, columns, peak, bandwidth): (saving, choice)."""
    for case in (*CASES, *_near_the_threshold(), CASES[0]):
        what, wrong = f"(saving in %, choice), {case}", _wrong_choices(case)
        close(my_choice(*case), fused_or_rival(*case), what=what, mistakes=wrong)
    named = my_choice(**CASES[1]._asdict())
    close(named, fused_or_rival(*CASES[1]), what="the same, by name")


def _near_the_threshold() -> Iterator[Case]:
    """Cases a little above and a little below WORTH, and one that saves a little.

    A slower memory makes three kernels slower: the peak is what is searched.
    """
    for wanted in (WORTH + 0.02, WORTH - 0.02, 1.0):
        low, high = 1e12, 1e16  # a faster multiplier makes memory count more
        for _ in range(60):
            middle = math.sqrt(low * high)
            case = Case(4096, 4096, 4096, 16, 128, middle, H100[1])
            enough = fused_or_rival(*case)[0] > wanted
            low, high = (low, middle) if enough else (middle, high)
        yield case


def _wrong_choices(case: Case) -> dict[str, tuple]:
    """{mistake: (its saving, None)}; (None, its choice) where the saving is right."""
    versions = launches(case)
    saving, choice = _decided(case, versions)
    fused, three = (bound(versions[v], case) for v in ("fused", "three"))
    added = {
        v: [tuple(map(sum, zip(*each, strict=True)))] for v, each in versions.items()
    }
    doubled = {v: [(f, 2 * moved) for f, moved in e] for v, e in versions.items()}
    down = max(1, case.n // case.columns)
    of_fused = 100 * (three / fused - 1)
    no_h = versions | {"three": [versions["three"][i] for i in (0, 2)]}
    wrong = {
        "compared with four kernels: three are faster, so they are the rival": (
            _decided(case, versions, "four")
        ),
        "low = x A^T counted once: each program of a tile row computes it again": (
            _decided(case, launches(case, programs=1))
        ),
        "n / columns was rounded down: the last program has work, too": (
            _decided(case, launches(case, programs=down))
        ),
        "the FLOPs and the bytes of all launches were added first: each launch has "
        "a bound of its own, and the bounds are added": _decided(case, added),
        "x and A counted for each program: these are issued bytes; the bound is of "
        "distinct ones": _decided(case, launches(case, issued=True)),
        "the last of three kernels reads y, too, before it adds": (
            _decided(case, launches(case, y_read=False))
        ),
        "the launch of h = x A^T is missing in the rival": _decided(case, no_h),
        "FLOPs to bytes as one to two: a value has two bytes, and a multiplication "
        "with its addition is two FLOPs": _decided(case, doubled),
        "the two times of a launch were added: the slower one is the bound": (
            _decided(case, versions, slower=lambda a, b: a + b)
        ),
        "the smaller of the two times: the slower one is the bound": (
            _decided(case, versions, slower=min)
        ),
        "percent of the fused bound: take it of the rival's": (
            of_fused, CHOICES[of_fused < WORTH],
        ),
        "a fraction: the saving is asked for in percent": (saving / 100, choice),
        "the sign: what fusing saves is positive": (-saving, CHOICES[-saving < WORTH]),
        f'"fused" for less than {WORTH:g} % saved': (
            saving, CHOICES[saving <= 0],
        ),
        "the two choices are exchanged": (saving, CHOICES[saving >= WORTH]),
    }  # fmt: skip
    return {
        text: (other, None) if other != saving else (None, word)
        for text, (other, word) in wrong.items()
        if (other, word) != (saving, choice)
    }


# 10.4 ---------------------------------------------------------------------------------


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
    """Lend a tile of total and low to UPDATE, and write what it returns."""
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
    named = (f"total {m, n}, B {n, r}, scale {scale:g}, tiles {BM} x {BN}", how)
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


# 10.5 ---------------------------------------------------------------------------------

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
            f"tiles in each program{how.get(self.layout, '')}"
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


@triton.jit
def our_lora(
    x,
    W,
    A,
    B,
    y,
    m_size,
    n_size,
    k_size,
    r,
    scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RANK: tl.constexpr,
    SWEEP: tl.constexpr,
):
    """y = x W^T + scale (x A^T) B^T; program (i, j): SWEEP tiles next to each other."""
    m, rank = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, RANK)
    low = tl.zeros((BM, RANK), tl.float32)
    for step in tl.static_range(SWEEP):
        n = (tl.program_id(1) * SWEEP + step) * BN + tl.arange(0, BN)
        total = tl.zeros((BM, BN), tl.float32)
        for first in range(0, k_size, BK):
            k = first + tl.arange(0, BK)
            part = load(x, m, k, within(m, k, m_size, k_size))
            wide = load(W, n, k, within(n, k, n_size, k_size))
            total = dot(part, tl.trans(wide), total)
            if step == 0:
                a = load(A, rank, k, within(rank, k, r, k_size))
                low = dot(part, tl.trans(a), low)
        b = load(B, n, rank, within(n, rank, n_size, r))
        total = dot(rounded(low * scale, B[0].dtype.element_ty), tl.trans(b), total)
        store(y, m, n, total, within(m, n, m_size, n_size))


@judged
def fewest_bytes(my_lora) -> None:
    """10.5: my_lora(x, W, A, B, y, …): right, few bytes, and it compiles for GPUs."""
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
    facts = _compiled(my_lora)
    print(bill)
    print(facts)


def _compiled(my_lora) -> str:
    """What a compiler makes of it for two GPUs, in a line each.

    Raises   Wrong   it does not compile there
    """
    try:
        facts = compile_answer.compiled(my_lora)
    except compile_answer.Refused as refused:
        raise Wrong(str(refused)) from None
    size, rank = compile_answer.SIZE, compile_answer.RANK
    lines = [f"compiled in bf16, {size:,} x {size:,}, rank {rank}, for"]
    for target, fact in facts.items():
        name = f"{target} ({compile_answer.TARGETS[target]})"
        lines.append(
            f"  {name}  {fact['registers']} registers, {fact['spilled']} bytes "
            f"spilled, {(fact['instructions'] or ['no matrix instruction'])[0]}"
        )
    return "\n".join(lines)


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
        "low is summed on from tile to tile: it needs x A^T once": (
            plain + scale * (summed * B).sum(-1)
        ),
        "low is set to zero for each tile, and filled for the first alone": (
            plain + scale * (first * B).sum(-1)
        ),
        "low has only the first BK columns": plain + scale * part @ B.T,
        "the scale of all: only the update has it": scale * (plain + low @ B.T),
    }
    right = plain + scale * low @ B.T
    return {text: y for text, y in wrong.items() if not y.equal(right)}


def plain_bytes(shape: Shape) -> int:
    """What x W^T issues with the same tiles, traced."""
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
