"""Many adapters in one product: each row of x has its own, or none.

    y_i <- y_i + scale_a (x_i A_a^T) B_a^T          a = which[i]; none where that is -1

One base model can serve many fine-tuned ones in the same batch, because the base's
product is the same for all rows and only this small update differs. Punica
(arXiv:2310.18547) and S-LoRA (arXiv:2311.03285) compute it as here: shrink each row to
its adapter's rank, expand it again, and let ranks differ.

A `Stack` holds the adapters of one projection, rank under rank and nothing padded. A
`Plan` sorts the rows by adapter and cuts them into blocks that share one:

    decode    rows mostly have their adapter to themselves. A block is a single row; its
              adapter is read once for it, which is all that there is to wait for
    prefill   prompts: many rows share an adapter. A block is 16 or 64 rows, multiplied
              on matrix units, and A and B are read once for a block

x is not sorted: a block reads its rows where they are. One pair of kernels serves both
shapes. `_shrink` sums x A^T over a share of the columns, so that few rows still occupy
a whole GPU; `_expand` adds the shares up. No atomics: equal bits each time.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .language import (
    Tiles,
    choose,
    dot,
    launch,
    load,
    matrix,
    rounded,
    store,
    tl,
    triton,
    within,
)
from .lora import DTYPES, LARGEST, PROGRAMS

ROWS = (1, 16, 64)  # of a block; matrix units multiply 16 at least
COLUMNS = 512  # of x that one share sums, at least


# The adapters -------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """n adapters of one projection, rank under rank.

    Args
        A       (R, d_in), R the sum of the ranks
        B       (R, d_out): transposed, so that row j goes with row j of A
        ranks   of the adapters, in their order; each 1 to 256
        scale   (n,) float32: alpha / r of each
    Has      first  (n + 1,) int32: adapter a has the rows first[a] to first[a + 1]
    Raises   ValueError   a shape, rank, dtype or device that does not fit, named
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]  # known on the CPU: a launch waits for no GPU to learn them
    scale: Tensor
    first: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        self._check()
        ends = torch.tensor((0, *self.ranks), dtype=torch.int32).cumsum(0)
        first = ends.to(self.A.device, torch.int32)
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "scale", self.scale.contiguous())  # read one by one

    @classmethod
    def of(cls, adapters: Iterable[tuple[Tensor, Tensor, float]]) -> "Stack":
        """The stack of copies of adapters (A (r, d_in), B (d_out, r), scale)."""
        adapters = list(adapters)
        if not adapters:
            raise ValueError(
                "no adapters, and so no d_in and d_out: an empty stack is Stack(A of "
                "shape (0, d_in), B of shape (0, d_out), (), scale of shape (0,))"
            )
        As, Bs, scales = zip(*adapters, strict=True)
        for a, (A, B, scale) in enumerate(adapters):
            if A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1]:
                raise ValueError(
                    f"adapter {a}: A is {tuple(A.shape)}, B {tuple(B.shape)}; "
                    "(r, d_in) and (d_out, r) fit"
                )
            if (A.shape[1], len(B)) != (As[0].shape[1], len(Bs[0])):
                raise ValueError(
                    f"adapter {a} maps {A.shape[1]} to {len(B)}, adapter 0 "
                    f"{As[0].shape[1]} to {len(Bs[0])}: they adapt other projections"
                )
            if (A.dtype, B.dtype) != (As[0].dtype, As[0].dtype):
                raise ValueError(
                    f"adapter {a}: A is {A.dtype}, B {B.dtype}; adapter 0's A is "
                    f"{As[0].dtype}, and a stack has one dtype: cast the others"
                )
            if not math.isfinite(scale):
                raise ValueError(f"adapter {a}: scale={scale} is not a finite number")
        return cls(
            torch.cat(As).detach(),
            torch.cat([B.T for B in Bs]).detach(),
            tuple(map(len, As)),
            torch.tensor(scales, dtype=torch.float32, device=As[0].device),
        )

    def __len__(self) -> int:
        return len(self.ranks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each adapter's A (r, d_in), B (d_out, r) and scale ()."""
        As, Bs = self.A.split(self.ranks), self.B.split(self.ranks)
        return ((A, B.T, scale) for A, B, scale in zip(As, Bs, self.scale, strict=True))

    @property
    def largest(self) -> int:
        """The largest rank; 0 where there is no adapter."""
        return max(self.ranks, default=0)

    def _check(self) -> None:
        R, n = sum(self.ranks), len(self.ranks)
        wanted = {"A": (R, "d_in"), "B": (R, "d_out"), "scale": (n,)}
        for name, fits in wanted.items():
            tensor = getattr(self, name)
            if tensor.dim() != len(fits) or len(tensor) != fits[0]:
                shape = ", ".join(map(str, fits))
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; ({shape}) fits {n} "
                    f"adapters whose ranks sum to {R}"
                )
            if tensor.device != self.A.device:
                raise ValueError(f"{name} is on {tensor.device}, A on {self.A.device}")
        for a, rank in enumerate(self.ranks):
            if not 1 <= rank <= LARGEST:
                raise ValueError(
                    f"adapter {a} has rank {rank}; 1 to {LARGEST} are allowed"
                )
        if self.A.dtype not in DTYPES or self.B.dtype != self.A.dtype:
            raise ValueError(
                f"A is {self.A.dtype}, B {self.B.dtype}: both must be the same one of "
                "float32, float16 and bfloat16"
            )
        if self.scale.dtype != torch.float32:
            raise ValueError(f"scale is {self.scale.dtype}, and must be float32")


# The rows -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which adapter each row takes: checked, sorted, cut into blocks; on x's device.

    Made by `Plan.of` once for a batch, it serves every projection of a model.

    shape      of x but for its last dimension; m, their product, is the number of rows
    adapters   how many the stacks must have
    which      (m,) int64
    order      (rows with an adapter,) int32: these rows, each adapter's together
    blocks     (count, 3) int32: the adapter, its rows' first place in order, their end
    rows       of a block at most, one of ROWS
    """

    shape: torch.Size
    adapters: int
    which: Tensor = field(repr=False)
    order: Tensor = field(repr=False)
    blocks: Tensor = field(repr=False)
    rows: int

    @classmethod
    def of(cls, which: Tensor, x: Tensor, stack: Stack, rows: int | None = None):
        """The plan for all x of this shape and device, and all stacks of this length.

        Args
            which   integers -1 … n - 1; its shape is x's, without one or more of the
                    last dimensions: for x (b, t, d_in) an adapter for each token (b, t)
                    or each sequence (b,)
            rows    of a block, one of ROWS; None: as many as an adapter in use has in
                    the mean, for what is shared by fewer rows than a block has leaves
                    the others idle
        Raises   ValueError   what does not fit, named
        Time     `which` on a GPU is copied to the CPU to be checked, and the CPU waits
                 for that: best is a `which` on the CPU, where a scheduler knows it
        """
        each = _checked(which, x, len(stack)).flatten()
        order = each.argsort(stable=True)
        order = order[each[order] >= 0]
        counts = each[order].bincount(minlength=len(stack)).tolist()
        rows = rows or rows_for(len(order), sum(count > 0 for count in counts))
        if rows not in ROWS:
            raise ValueError(f"rows={rows} is not one of {ROWS}")
        blocks, end = [], 0
        for adapter, count in enumerate(counts):
            begin, end = end, end + count
            for first in range(begin, end, rows):
                blocks.append((adapter, first, min(first + rows, end)))
        return cls(
            x.shape[:-1],
            len(stack),
            each.to(x.device),
            order.to(x.device, torch.int32),
            torch.tensor(blocks, dtype=torch.int32).view(-1, 3).to(x.device),
            rows,
        )


def rows_for(rows: int, adapters: int) -> int:
    """The rows of a block, where `rows` rows share `adapters` adapters."""
    return max(size for size in ROWS if size == 1 or size * adapters <= rows)


def _checked(which, x, n) -> Tensor:
    """`which` on the CPU, for each row of x."""
    dimensions = which.dim()
    if dimensions >= x.dim() or which.shape != x.shape[:dimensions]:
        raise ValueError(
            f"which has shape {tuple(which.shape)}; for x {tuple(x.shape)} it is "
            f"{tuple(x.shape[:-1])}, or that without some of the last dimensions"
        )
    if (
        which.dtype.is_floating_point
        or which.dtype.is_complex
        or which.dtype is torch.bool
    ):
        raise ValueError(f"which is {which.dtype}, and must hold integers")
    if which.device.type != "cpu" and which.device != x.device:
        raise ValueError(f"which is on {which.device}, x on {x.device}")
    which = which.to("cpu", torch.int64)
    wrong = ((which < -1) | (which >= n)).nonzero()
    if len(wrong):
        at = wrong[0].tolist()
        raise ValueError(
            f"which{at} = {which[tuple(at)]}; of {n} adapters {n - 1} is the last, and "
            "-1 is none"
        )
    missing = (1,) * (x.dim() - 1 - dimensions)
    return which.view(*which.shape, *missing).expand(x.shape[:-1])


# The spec -----------------------------------------------------------------------------


def gather_spec(y: Tensor, x: Tensor, stack: Stack, which: Tensor) -> None:
    """What the kernels compute, in torch, for rows y (m, d_out) and x (m, d_in)."""
    for a, (A, B, scale) in enumerate(stack):
        mine = which == a
        y[mine] += scale * F.linear(F.linear(x[mine], A), B)


# The kernels --------------------------------------------------------------------------


@triton.jit
def rows_of(blocks, order, BM: tl.constexpr):
    """A program's block: adapter, places in the order, their end, their rows."""
    block = blocks + 3 * tl.program_id(0)
    place = tl.load(block + 1) + tl.arange(0, BM)
    end = tl.load(block + 2)
    row = tl.load(order + place, mask=place < end, other=0)
    return tl.load(block), place, end, row


@triton.jit
def multiply(a, b, total):
    """total + a b, summed in float32; a single row is no work for a matrix unit."""
    if a.shape[0] == 1:
        wide = tl.trans(a).to(tl.float32) * b.to(tl.float32)
        return total + tl.sum(wide, axis=0)[None, :]
    else:
        return dot(rounded(a, b.dtype), b, total)


@triton.jit(do_not_specialize=["count", "largest"])
def _shrink(
    x,
    A,
    first,
    blocks,
    order,
    low,
    count,
    largest,
    d_in,
    columns,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """low[share] = x A_a^T over a share of the columns, for a block of rows."""
    adapter, place, end, row = rows_of(blocks, order, BM)
    begin, stop = tl.load(first + adapter), tl.load(first + adapter + 1)
    rank = begin + tl.program_id(1) * BR + tl.arange(0, BR)
    if begin + tl.program_id(1) * BR < stop:
        share = tl.program_id(2)
        last = min((share + 1) * columns, d_in)
        total = tl.zeros((BM, BR), tl.float32)
        for start in range(share * columns, last, BK):
            k = start + tl.arange(0, BK)
            part = load(x, row, k, within(place, k, end, last))  # (BM, BK)
            a = load(A, rank, k, within(rank, k, stop, last))  # (BR, BK)
            total = multiply(part, tl.trans(a), total)
        out = (low + share.to(tl.int64) * count * largest, largest, 1)
        store(out, place, rank - begin, total, within(place, rank, end, stop))


@triton.jit(do_not_specialize=["count", "largest", "shares"])
def _expand(
    low,
    B,
    first,
    scale,
    blocks,
    order,
    y,
    count,
    largest,
    shares,
    d_out,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    """y <- y + h B_a, h = scale_a (the sum of low's shares), for a block of rows."""
    adapter, place, end, row = rows_of(blocks, order, BM)
    begin, stop = tl.load(first + adapter), tl.load(first + adapter + 1)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(begin, stop, BR):
        rank = start + tl.arange(0, BR)
        h, share = tl.zeros((BM, BR), tl.float32), low
        for _ in range(shares):
            keep = within(place, rank, end, stop)
            h += load((share, largest, 1), place, rank - begin, keep)
            share += count.to(tl.int64) * largest
        b = load(B, rank, n, within(rank, n, stop, d_out))  # (BR, BN)
        total = multiply(h * tl.load(scale + adapter), b, total)
    keep = within(place, n, end, d_out)
    store(y, row, n, load(y, row, n, keep) + total, keep)


# How they are launched ----------------------------------------------------------------


def tiles_for(rows: int, dtype: torch.dtype) -> Tiles:
    """The blocks of both kernels: n columns of y, k columns of x at a time."""
    if rows == 1:
        return Tiles(m=1, n=256, k=COLUMNS, warps=4, stages=1)
    if dtype == torch.float32:  # no matrix unit keeps its 24 bits: smaller blocks
        return Tiles(m=rows, n=64 if rows == 16 else 32, k=32, warps=4, stages=2)
    return Tiles(m=rows, n=128 if rows == 16 else 64, k=64, warps=4, stages=3)


def ranks_for(rows: int, largest: int, dtype: torch.dtype) -> int:
    """How many ranks a program takes at a time: larger ones are walked in steps."""
    if rows == 1:
        return 16
    if dtype == torch.float32:
        return 32
    return min(64, max(16, triton.next_power_of_2(largest)))


def columns_for(rows: int, programs: int, d_in: int) -> int:
    """The columns of x in a share, where one share is the work of so many programs.

    Single rows take COLUMNS whatever the batch: a row's sum then has the same order,
    and the same bits, alone and in any company. Blocks take what leaves a GPU busy.
    """
    if rows == 1:
        return COLUMNS
    shares = max(1, PROGRAMS // programs)
    return max(1, math.ceil(d_in / shares / COLUMNS)) * COLUMNS


def gather(y: Tensor, x: Tensor, stack: Stack, plan: Plan) -> None:
    """Launch the kernels, for rows y (m, d_out) and x (m, d_in).

    Memory   shares count largest float32 numbers: count rows with an adapter, and
             d_in / columns_for(…) shares
    """
    count, blocks, largest = len(plan.order), len(plan.blocks), stack.largest
    if not blocks:
        return
    d_in, d_out = x.shape[1], y.shape[1]
    tiles = tiles_for(plan.rows, x.dtype)
    ranks = ranks_for(plan.rows, largest, x.dtype)
    steps = math.ceil(largest / ranks)
    columns = columns_for(plan.rows, blocks * steps, d_in)
    shares = max(1, math.ceil(d_in / columns))
    low = x.new_empty(shares, count, largest, dtype=torch.float32)
    common = {
        "first": stack.first,
        "blocks": plan.blocks,
        "order": plan.order,
        "low": low,
        "count": count,
        "largest": largest,
    }
    block = {"BM": tiles.m, "BR": ranks}
    launch(
        _shrink,
        (blocks, steps, shares),
        common
        | {"x": matrix(x), "A": matrix(stack.A), "d_in": d_in, "columns": columns},
        block | {"BK": tiles.k},
        tiles.warps,
        tiles.stages,
    )
    launch(
        _expand,
        (blocks, math.ceil(d_out / tiles.n)),
        common
        | {"B": matrix(stack.B), "scale": stack.scale, "y": matrix(y)}
        | {"shares": shares, "d_out": d_out},
        block | {"BN": tiles.n},
        tiles.warps,
        stages=1,  # a rank is walked in few steps: nothing to load ahead
    )


def compulsory_bytes(stack: Stack, plan: Plan) -> int:
    """The bytes that any program must move for this product, were its caches endless.

        itemsize (c (d_in + 2 d_out) + U (d_in + d_out))

    for c rows with an adapter, y both read and written, and U the sum of the ranks in
    use. The kernels ask for A and B once a block, not once an adapter: for single rows
    U is then the sum of the rows' own ranks. Blocks of one adapter run side by side, so
    that all but the first may find it in the L2 cache. The shares of h are written once
    and read by each program of `_expand`, and seldom leave that cache.
    """
    used = {adapter for adapter, _, _ in plan.blocks.tolist()}
    U = sum(stack.ranks[adapter] for adapter in used)
    d_in, d_out = stack.A.shape[1], stack.B.shape[1]
    rows = len(plan.order) * (d_in + 2 * d_out)
    return stack.A.element_size() * (rows + U * (d_in + d_out))


# The checked wrapper ------------------------------------------------------------------


@torch.compiler.disable
def gather_lora(
    y: Tensor,
    x: Tensor,
    stack: Stack,
    which: Tensor | Plan,
    backend: str | None = None,
) -> Tensor:
    """Add to each row of y the low-rank update of the adapter that the row has.

        y_i <- y_i + scale_a (x_i A_a^T) B_a^T               a = which[i], or none at -1

    Args
        y        (…, d_out): the base's product. Changed in place
        x        (…, d_in), float32, float16 or bfloat16; any strides
        stack    n adapters from d_in to d_out, of x's dtype; n may be 0
        which    integers -1 … n - 1, x's shape without its last dimension or without
                 more of them; or a Plan, made once for all projections of a batch
        backend  None: Triton on CUDA, the torch spec elsewhere; or "torch", "triton"
    Returns  y itself. Summed in float32; where rows share adapters, h = scale x A^T is
             rounded to x's dtype before its product with B. A row's bits are the same
             alone and in company only in blocks of one row, Plan.of(…, rows=1): the
             default plan takes blocks of 16 or 64 where rows share an adapter, and the
             blocks decide how h is summed and rounded
    Raises   ValueError     a shape, dtype, device, index or backend that does not fit,
                            named; nothing has been added then
                            a tensor that requires a gradient, outside no_grad(): this
                            product has none. lora_linear trains
             MissingTriton  backend="triton" where Triton is not installed
    Time     a `which` on a GPU costs a synchronisation, a Plan none: Plan.of
    Source   arXiv:2310.18547, arXiv:2311.03285; rows without an adapter, sums without
             atomics and blocks of one row are ours
    """
    _check(y, x, stack)
    backend = choose(x.device, backend)
    plan = which if isinstance(which, Plan) else Plan.of(which, x, stack)
    _check_plan(plan, x, stack)
    m = math.prod(plan.shape)
    rows = y.view(m, y.shape[-1]), x.reshape(m, x.shape[-1])
    if backend == "torch":
        gather_spec(*rows, stack, plan.which)
    else:
        gather(*rows, stack, plan)
    return y


def _check(y, x, stack) -> None:
    d_in, d_out = stack.A.shape[1], stack.B.shape[1]
    if not x.dim() or x.shape[-1] != d_in:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; (…, {d_in}) fits the stack's A"
        )
    if y.shape != (*x.shape[:-1], d_out):
        raise ValueError(
            f"y has shape {tuple(y.shape)}; {(*x.shape[:-1], d_out)} fits x "
            f"{tuple(x.shape)} and the stack's B"
        )
    tensors = {"y": y, "x": x, "stack.A": stack.A, "stack.B": stack.B}
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
        if tensor.dtype != stack.A.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, the stack {stack.A.dtype}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, and gather_lora gives none: call it in "
                "torch.no_grad(), or train with lora_linear"
            )
    if not _rows_in_place(y):
        raise ValueError(
            f"y with shape {tuple(y.shape)} and strides {y.stride()} is no matrix of "
            "rows that can be changed in place: give y.contiguous()"
        )


def _rows_in_place(y) -> bool:
    """Whether y is a view of (m, d_out) in which each element has its own memory."""
    if any(
        size > 1 and not stride
        for size, stride in zip(y.shape, y.stride(), strict=True)
    ):
        return False
    try:
        y.view(math.prod(y.shape[:-1]), y.shape[-1])
    except RuntimeError:
        return False
    return True


def _check_plan(plan, x, stack) -> None:
    if plan.shape != x.shape[:-1] or plan.adapters != len(stack):
        raise ValueError(
            f"the plan is for rows {tuple(plan.shape)} and {plan.adapters} adapters; x "
            f"has rows {tuple(x.shape[:-1])}, the stack {len(stack)} adapters"
        )
    if plan.which.device != x.device:
        raise ValueError(f"the plan is on {plan.which.device}, x on {x.device}")
