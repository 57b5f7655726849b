"""Bytes and FLOPs of a launch, by formula: what the grid and the tiles come to.

    issued      bytes of all loads and stores that a mask lets through; caches serve
                most of them
    compulsory  bytes of every operand once: what no cache can save
    flops       of whole blocks, padding included: what the matrix unit does
    needed      2 m n k of each product, once

A block of y = x W^T reads its rows of x and of W: with blocks of BM x BN

    x   ⌈n / BN⌉ m k         W   ⌈m / BM⌉ n k         y   m n        elements

and the update adds to it, fused: A once a program, which has `sweep` blocks; B once a
block of rows. A sweep that ends beyond n reads nothing there. Where programs sum shares
of the columns k (split-K), x, W and A are read as often, and the shares are written and
read again, in float32:

    s m n  of y, once              s m r  of h, once for each ⌈n / BN⌉ of `_finish`

trace.py counts the same in the interpreter, element by element: the tests hold the two
to each other.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from . import lora
from .cases import KernelCase, empty, forward
from .language import Launch, Tiles, matrix, recorded


@dataclass(frozen=True)
class LaunchCost:
    """Bytes and floating-point operations of one launch, or the sum over several."""

    loads: int = 0
    stores: int = 0
    compulsory: int = 0
    flops: int = 0
    needed: int = 0

    @property
    def issued(self) -> int:
        return self.loads + self.stores

    def __add__(self, other: "LaunchCost") -> "LaunchCost":
        pairs = zip(_fields(self), _fields(other), strict=True)
        return LaunchCost(*(a + b for a, b in pairs))


def count(launch: Launch) -> LaunchCost:
    """The cost of a launch.

    Raises   ValueError   a kernel, or a reader of W, that has no formula here
    """
    name = launch.kernel.fn.__name__
    if name not in FORMULAS:
        raise ValueError(f"no formula for {name}; there are {', '.join(FORMULAS)}")
    return FORMULAS[name](launch.arguments, launch.constants, launch.grid)


def total(launches: Iterable[Launch]) -> LaunchCost:
    """The sum, with nothing left in a cache from one launch to the next."""
    return sum(map(count, launches), LaunchCost())


def _product(arguments: dict, constants: dict, grid: tuple) -> LaunchCost:
    m, n, k, r = (arguments[size] for size in ("m_size", "n_size", "k_size", "r"))
    update, BM, BN, BK = (constants[c] for c in ("UPDATE", "BM", "BN", "BK"))
    split, shares = constants["SPLIT"], math.prod(grid[1:])
    down = math.ceil(m / BM)
    programs = grid[0] // down  # side by side
    blocks = programs * constants["SWEEP"]
    columns = math.ceil(n / BN)  # of blocks that are not wholly beyond n
    fused = update == "fused"
    moved = {  # name: (elements of the operand, how often each is loaded)
        "x": (m * k, columns),
        "A": (r * k, fused and programs * down),
    }
    stored = {"y": shares * m * n}
    if constants["KEEP"]:
        stored["h"] = shares * m * r
    height, depth = down * BM, math.ceil(k / BK) * BK
    whole = height * BN * columns * depth
    whole += fused * programs * height * constants["RANK"] * depth
    needed = m * n * k + fused * m * r * k
    if not split:
        last, flops, useful = _update(arguments, constants, down, blocks)
        moved, whole, needed = moved | last, whole + flops, needed + useful
    others = _moved(arguments, moved, stored, 2 * whole, 2 * needed)
    return others + _weight(arguments["W"], constants, n, k, down)


def _update(arguments: dict, constants: dict, down: int, blocks: int) -> tuple:
    """What is added to a whole x W^T: ({name: (elements, loads)}, products, needed)."""
    m, n, r = (arguments[size] for size in ("m_size", "n_size", "r"))
    fused, read = (constants["UPDATE"] == kind for kind in ("fused", "given"))
    rank = constants["RANK"] if fused else math.ceil(r / 64) * 64 if read else 0
    moved = {
        "B": (n * r, (fused or read) and down),
        "h": (m * r, read and blocks),
        "bias": (n, arguments["bias"] is not None and down),
    }
    whole = down * constants["BM"] * constants["BN"] * blocks * rank
    return moved, whole, (fused or read) * m * n * r


def _finish(arguments: dict, constants: dict, grid: tuple) -> LaunchCost:
    """The products alone: an addition for each number of a share is little beside k."""
    m, n, r, count = (arguments[name] for name in ("m_size", "n_size", "r", "count"))
    moved, whole, needed = _update(arguments, constants, *grid)
    lows = (count * m * r, constants["UPDATE"] == "fused" and grid[1])
    moved |= {"shares": (count * m * n, 1), "lows": lows}
    stored = {"y": m * n} | ({"h": m * r} if constants["KEEP"] else {})
    return _moved(arguments, moved, stored, 2 * whole, 2 * needed)


def _dequantize(arguments: dict, constants: dict, grid: tuple) -> LaunchCost:
    """One row of weights, cut into the programs' pieces."""
    size = arguments["size"]
    read = _packed(arguments["W"], 1, size, 1, constants["CHUNK"])
    written = size * _itemsize(arguments["out"])
    return read + LaunchCost(stores=written, compulsory=written)


def _weight(W: tuple, constants: dict, n: int, k: int, down: int) -> LaunchCost:
    """W's part: each row of blocks of y reads all of it, as its reader does."""
    reader, BN, BK = constants["LOAD"].fn.__name__, constants["BN"], constants["BK"]
    if reader == "dense":
        size = n * k * _itemsize(W)
        once = LaunchCost(loads=size, compulsory=size)
    elif reader == "unpacked":
        once = _packed(W, n, k, BN, BK)
    elif reader == "unpacked_across":  # the bytes run along n
        once = _packed(W, k, n, BK, BN)
    else:
        raise ValueError(f"no formula for W as {reader} reads it")
    return LaunchCost(loads=down * once.loads, compulsory=once.compulsory)


def _packed(W: tuple, height: int, width: int, tall: int, wide: int) -> LaunchCost:
    """Four bits (height, width), read once in blocks of tall x wide.

    The table's entries are asked for by masked bytes as well, which are 0.
    """
    packed, (absmax, *doubled), table, _, step = W
    run = min(step.value, wide)  # weights that share a load of their constant
    blocks = math.ceil(height / tall) * math.ceil(width / wide)
    codes = height * (math.ceil(width / 2) if run > 1 else width)
    looked_up = blocks * tall * wide // (2 if run > 1 else 1) * table.element_size()
    asked = height * math.ceil(width / run)
    tensors = [t for t in (packed, absmax, table, *doubled) if t is not None]
    each = absmax.element_size() * asked
    if doubled[0] is not None:  # its unit and its value, and the offset for a block
        each += 4 * (2 * asked + blocks)
    return LaunchCost(
        loads=codes + looked_up + each,
        compulsory=sum(t.numel() * t.element_size() for t in tensors),
    )


def _over_rows(arguments: dict, constants: dict, grid: tuple) -> LaunchCost:
    m, r, width, rows = (arguments[name] for name in ("m_size", "r", "width", "rows"))
    moved = {"U": (m * r, grid[1]), "V": (m * width, grid[0])}
    stored = {"shares": grid[2] * r * width}
    BM, whole = constants["BM"], 0
    for share in range(grid[2]):
        rows_here = min(rows, m - share * rows)
        whole += math.ceil(rows_here / BM) * BM
    whole *= grid[0] * constants["BR"] * grid[1] * constants["BW"]
    return _moved(arguments, moved, stored, 2 * whole, 2 * m * r * width)


def _add_up(arguments: dict, constants: dict, grid: tuple) -> LaunchCost:
    size, adds = arguments["size"], arguments["count"] * arguments["size"]
    return _moved(arguments, {"shares": (adds, 1)}, {"out": size}, adds, adds)


FORMULAS = {
    "_product": _product,
    "_finish": _finish,
    "_over_rows": _over_rows,
    "_add_up": _add_up,
    "_dequantize": _dequantize,
}


def _moved(arguments, moved: dict, stored: dict, flops: int, needed: int) -> LaunchCost:
    def bytes_of(name: str, elements: int) -> int:
        return elements * _itemsize(arguments[name])

    loaded = {name: size for name, (size, times) in moved.items() if times}
    return LaunchCost(
        loads=sum(
            bytes_of(name, size * moved[name][1]) for name, size in loaded.items()
        ),
        stores=sum(bytes_of(*item) for item in stored.items()),
        compulsory=sum(bytes_of(*i) for i in (*loaded.items(), *stored.items())),
        flops=flops,
        needed=needed,
    )


def _itemsize(operand) -> int:
    return (operand[0] if isinstance(operand, tuple) else operand).element_size()


def _fields(cost: LaunchCost) -> tuple[int, ...]:
    return tuple(vars(cost).values())


# What the fused product is compared with ----------------------------------------------


def fused(m, d_in, d_out, r, dtype, make=forward) -> list[Launch]:
    """The launches of lora_linear, or with make=for_dx those of its dx."""
    return KernelCase("", lambda: make(m, d_in, d_out, r, dtype)).launches()


def plain(launches: list[Launch]) -> list[Launch]:
    """x W^T alone in the same blocks: the last of these products without an update."""
    last = [one for one in launches if one.kernel.fn.__name__ == "_product"][-1]
    arguments, constants = last.arguments, last.constants
    tiles = Tiles(
        *(constants[name] for name in ("BM", "BN", "BK")),
        group=constants["GROUP"],
        warps=last.warps,
        stages=last.stages,
    )
    with recorded() as log:
        lora.product(
            arguments["x"][0], arguments["W"], arguments["n_size"], tiles=tiles
        )
    return log


def unfused(m, d_in, d_out, r, dtype) -> list[LaunchCost]:
    """x W^T, then h = x A^T, then h B^T, then their sum: each step on its own."""
    x, h = empty(m, d_in, dtype=dtype), empty(m, r, dtype=dtype)
    steps = []
    for operand, sizes in ((x, (d_out, d_in)), (x, (r, d_in)), (h, (d_out, r))):
        W = empty(*sizes, dtype=dtype)
        with recorded() as log:
            lora.product(operand, matrix(W), sizes[0])
        steps.append(total(log))
    return [*steps, _sum(m * d_out, dtype)]


def in_three(m, d_in, d_out, r, dtype) -> list[LaunchCost]:
    """The same, better: h B^T is added to x W^T where it is computed (addmm)."""
    wide, low, back, add = unfused(m, d_in, d_out, r, dtype)
    extra = m * d_out * dtype.itemsize  # x W^T, read again
    more = {
        "loads": extra,
        "compulsory": extra,
        "flops": add.flops,
        "needed": add.needed,
    }
    return [wide, low, back + LaunchCost(**more)]


def _sum(elements: int, dtype: torch.dtype) -> LaunchCost:
    """y + scale u, read twice and written."""
    size = elements * dtype.itemsize
    return LaunchCost(2 * size, size, 3 * size, 2 * elements, 2 * elements)
