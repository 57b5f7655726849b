"""The LoRA product as one kernel, and its gradients: x is read once for W and for A.

    y  = x W^T + scale (x A^T) B^T + bias               arXiv:2106.09685v2, eq. (3)

    dx = dy W + scale (dy B) A      the same product, of dy with W^T, B^T and A^T
    dA = scale (dy B)^T x           a sum over the rows of x: in shares, then added up
    dB = scale dy^T (x A^T)         likewise

With h = scale x A^T and dh = scale dy B, both (m, r), scale is used up: dA = dh^T x and
dB = dy^T h. The forward pass keeps h, the product for dx leaves dh behind.

Four kernels. `_product` computes a block of y, or `sweep` of them side by side; beside
x W^T it sums x A^T from the same block of x (r <= ONE_PASS), or is given h where r is
larger, which `_product` itself has computed as a product with W = A. Few rows make few
blocks, too few for a GPU's processors: then each program sums a share of the columns k
(split-K), and `_finish` adds the shares up. For dA and dB `_over_rows` sums over a
share of the rows, and `_add_up` adds these. No atomics: equal bits each time.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .language import (
    Tiles,
    as_autocast,
    choose,
    dot,
    grouped,
    launch,
    load,
    matrix,
    rounded,
    store,
    tl,
    triton,
    within,
)

# The largest rank whose x A^T is summed beside x W^T. In float32, which has no matrix
# unit, larger ones spill registers: targets.py.
ONE_PASS = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}
LARGEST = 256  # the largest rank
DTYPES = tuple(ONE_PASS)
PARTIALS_BYTES = 32 * 2**20  # at most, for the shares of a sum over rows
PROGRAMS = 264  # that keep a large GPU busy: two for each of an H100's 132 processors


# The spec -----------------------------------------------------------------------------


def spec(x, W, A, B, scale, bias=None) -> Tensor:
    """What the kernels compute, in torch: for autograd, for any device."""
    h = F.linear(x.to(A.dtype), A)
    y = F.linear(x, W) + scale * F.linear(h.to(B.dtype), B)
    return (y if bias is None else y + bias).to(x.dtype)


# The kernels --------------------------------------------------------------------------


@triton.jit
def dense(W, n, k, n_size, k_size, BN: tl.constexpr, BK: tl.constexpr):
    """W[n:, k:] (BN, BK) as it stands; nf4.py has a W that is unpacked on the way."""
    rows, columns = n + tl.arange(0, BN), k + tl.arange(0, BK)
    return load(W, rows, columns, within(rows, columns, n_size, k_size))


@triton.jit
def finished(
    total,
    low,
    B,
    bias,
    h,
    m,
    n,
    m_size,
    n_size,
    r,
    dtype: tl.constexpr,
    UPDATE: tl.constexpr,
    RANK: tl.constexpr,
):
    """A block of y of its whole x W^T, `total`: plus low B^T or h B^T, plus bias.

    low = scale x A^T
    """
    if UPDATE == "fused":
        rank = tl.arange(0, RANK)
        b = rounded(load(B, n, rank, within(n, rank, n_size, r)), dtype)
        total = dot(rounded(low, dtype), tl.trans(b), total)
    elif UPDATE == "given":
        for start in range(0, r, 64):
            some = start + tl.arange(0, 64)
            part = load(h, m, some, within(m, some, m_size, r))
            b = rounded(load(B, n, some, within(n, some, n_size, r)), dtype)
            total = dot(part, tl.trans(b), total)
    if bias is not None:
        total += tl.load(bias + n, mask=n < n_size, other=0.0)[None, :]
    return total


@triton.jit(do_not_specialize=["m_size"])
def _product(
    x,
    W,
    A,
    B,
    bias,
    h,
    y,
    m_size,
    n_size,
    k_size,
    r,
    columns,
    scale,
    LOAD: tl.constexpr,  # dense, or another reader of W
    UPDATE: tl.constexpr,  # "fused": h is computed here; "given": it is read; "none"
    KEEP: tl.constexpr,  # write h, for the gradients
    SPLIT: tl.constexpr,  # sum `columns` of k, and leave what is left to `_finish`
    RANK: tl.constexpr,  # r, up to the next power of two, 16 at least
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SWEEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = x W^T, plus h B^T if there is an update, plus bias if there is one.

    h = scale x A^T. With SPLIT y and h are float32 and (shares m) high: share after
    share, each the sum over its columns of k.
    """
    dtype = x[0].dtype.element_ty
    down, along = tl.cdiv(m_size, BM), tl.cdiv(n_size, BN * SWEEP)
    row, column = grouped(tl.program_id(0), down, along, GROUP)
    m = row * BM + tl.arange(0, BM)
    rank = tl.arange(0, RANK)
    low = tl.zeros((BM, RANK), tl.float32)
    below, begin, end = 0, 0, k_size
    if SPLIT:
        begin = tl.program_id(1) * columns
        below, end = tl.program_id(1) * m_size, min(begin + columns, k_size)
    for step in tl.static_range(SWEEP):
        first = (column * SWEEP + step) * BN
        n = first + tl.arange(0, BN)
        total = tl.zeros((BM, BN), tl.float32)
        depth = tl.where(first < n_size, end, begin)  # a sweep may end beyond n
        for start in range(begin, depth, BK):
            k = start + tl.arange(0, BK)
            part = load(x, m, k, within(m, k, m_size, k_size))  # (BM, BK)
            wide = LOAD(W, first, start, n_size, k_size, BN, BK)  # (BN, BK)
            # W = A may be float32, and a W in four bits is.
            total = dot(part, tl.trans(rounded(wide, dtype)), total)
            if UPDATE == "fused" and step == 0:
                a = rounded(load(A, rank, k, within(rank, k, r, k_size)), dtype)
                low = dot(part, tl.trans(a), low)
        if UPDATE == "none":
            total *= scale
        if not SPLIT:
            high = low * scale
            total = finished(
                *(total, high, B, bias, h, m, n, m_size, n_size, r),
                *(dtype, UPDATE, RANK),
            )
        store(y, below + m, n, total, within(m, n, m_size, n_size))
    if KEEP and column == 0:
        store(h, below + m, rank, low * scale, within(m, rank, m_size, r))


@triton.jit(do_not_specialize=["m_size", "count"])
def _finish(
    shares,
    lows,
    B,
    bias,
    h,
    y,
    m_size,
    n_size,
    r,
    count,
    UPDATE: tl.constexpr,
    KEEP: tl.constexpr,
    RANK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """y of `count` shares of x W^T, and of h = scale x A^T if it is in shares, too."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    rank = tl.arange(0, RANK)
    total, low = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, RANK), tl.float32)
    for share in range(count):
        below = share * m_size
        total += load(shares, below + m, n, within(m, n, m_size, n_size))
        if UPDATE == "fused":
            low += load(lows, below + m, rank, within(m, rank, m_size, r))
    dtype: tl.constexpr = y[0].dtype.element_ty
    total = finished(
        *(total, low, B, bias, h, m, n, m_size, n_size, r, dtype, UPDATE, RANK),
    )
    store(y, m, n, total, within(m, n, m_size, n_size))
    if KEEP and tl.program_id(1) == 0:
        store(h, m, rank, low, within(m, rank, m_size, r))


@triton.jit(do_not_specialize=["m_size", "rows"])
def _over_rows(
    U,
    V,
    shares,
    m_size,
    r,
    width,
    rows,
    BR: tl.constexpr,
    BW: tl.constexpr,
    BM: tl.constexpr,
):
    """shares[s] = U[rows of s]^T V[rows of s], (r, width) for each share s."""
    rank = tl.program_id(0) * BR + tl.arange(0, BR)
    at = tl.program_id(1) * BW + tl.arange(0, BW)
    share = tl.program_id(2)
    total = tl.zeros((BR, BW), tl.float32)
    last = min((share + 1) * rows, m_size)
    for start in range(share * rows, last, BM):
        m = start + tl.arange(0, BM)
        u = load(U, m, rank, within(m, rank, last, r))
        v = load(V, m, at, within(m, at, last, width))
        total = dot(tl.trans(u), v, total)
    block = (shares + share.to(tl.int64) * r * width, width, 1)
    store(block, rank, at, total, within(rank, at, r, width))


@triton.jit(do_not_specialize=["count"])
def _add_up(shares, out, count, size, BLOCK: tl.constexpr):
    """out = the sum of `count` shares of `size` elements, in their order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(count):
        total += tl.load(shares + at, at < size, 0.0)
        shares += size
    tl.store(out + at, total.to(out.dtype.element_ty), at < size)


# How they are launched ----------------------------------------------------------------


def tiles_for(m: int, n: int, r: int, dtype: torch.dtype) -> Tiles:
    """The blocks of a product with m rows and n columns; r = 0: without an update.

    The largest that spill no register on sm_80, sm_90 and sm_100, forward and for dx,
    and issue at most 1.1 times the bytes of the same blocks without A and B: targets.py
    compiles and counts them. No GPU has timed them.
    """
    if dtype == torch.float32:  # no matrix unit keeps its 24 bits: smaller blocks
        if m <= 16:
            return Tiles(m=16, n=64, k=32, warps=4, stages=3)
        sweep = 4 if r <= ONE_PASS[dtype] else 1
        return Tiles(m=64, n=64, k=16, sweep=sweep, warps=8, stages=2)
    if m <= 16:  # decoding: each block of W is read once, however few the rows
        return Tiles(m=16, n=64, k=64, warps=8, stages=4)
    if m <= 64:
        return Tiles(m=64, n=64, k=64, warps=8, stages=4)
    if r <= 16:
        return Tiles(m=128, n=128, k=32, warps=8, stages=3)
    if r <= ONE_PASS[dtype]:  # A is read for one block in four
        return Tiles(m=128, n=64, k=32, sweep=4, warps=8, stages=4)
    return Tiles(m=128, n=128, k=32, warps=8, stages=3)


def product(
    x: Tensor,
    W: tuple,
    n: int,
    *,
    reader=dense,
    A: Tensor | None = None,
    B: Tensor | None = None,
    h: Tensor | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    keep: bool = False,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x W^T scale, or x W^T + h B^T with h = scale x A^T computed on the way.

    Args
        x       (m, k), any strides
        W       what `reader` reads, n rows of k
        A, B    (r, k), (n, r); A is None: no update, or with h given (m, r) that update
        keep    return h as well
    Returns  (y (m, n) of x's dtype, h (m, r) of x's dtype or None)
    """
    m, k = x.shape
    r = 0 if B is None else B.shape[1]
    if A is not None and r > ONE_PASS[x.dtype]:
        h, A = product(x, matrix(A), r, scale=scale)[0], None
    fused = A is not None
    if fused and keep:
        h = x.new_empty(m, r)
    y = x.new_empty(m, n) if out is None else out
    if not y.numel():
        return y, h
    tiles = tiles or tiles_for(m, n, r, x.dtype)
    columns = columns_of(m, n, k, tiles)
    arguments = {
        "x": matrix(x),
        "W": W,
        "A": matrix(A) if fused else None,
        "B": None if B is None else matrix(B),
        "bias": None if bias is None else bias.contiguous(),
        "h": None if h is None else matrix(h),
        "y": matrix(y),
        "m_size": m,
        "n_size": n,
        "k_size": k,
        "r": r,
        "columns": columns,
        "scale": float(scale),
    }
    constants = {
        "LOAD": reader,
        "UPDATE": "fused" if fused else "none" if B is None else "given",
        "KEEP": fused and keep,
        "SPLIT": False,
        "RANK": max(16, triton.next_power_of_2(r)) if fused else 16,
        "BM": tiles.m,
        "BN": tiles.n,
        "BK": tiles.k,
        "SWEEP": tiles.sweep,
        "GROUP": tiles.group,
    }
    if columns < k:
        _launch_in_shares(arguments, constants, tiles)
    else:
        grid = (math.ceil(m / tiles.m) * math.ceil(n / (tiles.n * tiles.sweep)),)
        launch(_product, grid, arguments, constants, tiles.warps, tiles.stages)
    return y, h


def _launch_in_shares(arguments: dict, constants: dict, tiles: Tiles) -> None:
    """The launch of `_product` as two: shares of the sum over k, and their sum."""
    m, n, r = (arguments[size] for size in ("m_size", "n_size", "r"))
    count = math.ceil(arguments["k_size"] / arguments["columns"])
    y, fused = arguments["y"][0], constants["UPDATE"] == "fused"
    shares = y.new_empty(count * m, n, dtype=torch.float32)
    lows = y.new_empty(count * m, r, dtype=torch.float32) if fused else None
    written = {"y": matrix(shares), "h": matrix(lows) if fused else None}
    launch(
        _product,
        (math.ceil(m / tiles.m) * math.ceil(n / (tiles.n * tiles.sweep)), count),
        arguments | {"B": None, "bias": None} | written,
        constants | {"KEEP": fused, "SPLIT": True},
        tiles.warps,
        tiles.stages,
    )
    update = ("B", "bias", "h", "y", "m_size", "n_size", "r")
    launch(
        _finish,
        (math.ceil(m / tiles.m), math.ceil(n / tiles.n)),
        {"shares": written["y"], "lows": written["h"], "count": count}
        | {name: arguments[name] for name in update},
        {name: constants[name] for name in ("UPDATE", "KEEP", "RANK", "BM", "BN")},
        tiles.warps,
        stages=1,
    )


def columns_of(m: int, n: int, k: int, tiles: Tiles) -> int:
    """How many of k columns a program sums: all, or a share where blocks are few.

    As many shares as make PROGRAMS programs, or as there are blocks of k. But those of
    y, written and read again in float32, may take a sixteenth of a 16-bit W's bytes:

        8 shares m n <= 2 n k / 16        shares <= k / (64 m)

    So k is shared out for one row of x always, for 16 rows where W is large. With k as
    short as a rank there is nothing to share.
    """
    if k <= LARGEST:
        return max(1, math.ceil(k / tiles.k)) * tiles.k
    programs = math.ceil(m / tiles.m) * math.ceil(n / (tiles.n * tiles.sweep))
    shares = max(1, min(math.ceil(PROGRAMS / programs), k // (64 * m)))
    return max(1, math.ceil(k / shares / tiles.k)) * tiles.k


def blocks_over_rows(r: int, width: int) -> tuple[int, int]:
    """The block of U^T V (r, width) of a program: up to 128 along the narrow side."""
    most = (128, 64) if r <= width else (64, 128)
    return tuple(
        min(limit, max(16, triton.next_power_of_2(size)))
        for size, limit in zip((r, width), most, strict=True)
    )


def shares_of(m: int, r: int, width: int) -> int:
    """In how many shares a sum over m rows is split: busy, within PARTIALS_BYTES."""
    tall, wide = blocks_over_rows(r, width)
    busy = math.ceil(PROGRAMS / (math.ceil(r / tall) * math.ceil(width / wide)))
    fit = PARTIALS_BYTES // (4 * r * width)
    return max(1, min(busy, fit, math.ceil(m / 64)))


def over_rows(U: Tensor, V: Tensor, dtype: torch.dtype) -> Tensor:
    """U^T V (r, width) for U (m, r), V (m, width): in float32, then rounded to dtype.

    Memory   shares_of(m, r, width) r width float32 numbers, PARTIALS_BYTES at most;
             none where one share is enough
    """
    (m, r), width = U.shape, V.shape[1]
    if not m:
        return U.new_zeros(r, width, dtype=dtype)
    rows = math.ceil(m / shares_of(m, r, width) / 64) * 64
    count = math.ceil(m / rows)
    out = U.new_empty(r, width, dtype=dtype)
    shares = out if count == 1 else U.new_empty(count, r, width, dtype=torch.float32)
    tall, wide = blocks_over_rows(r, width)
    arguments = {"U": matrix(U), "V": matrix(V), "shares": shares}
    arguments |= {"m_size": m, "r": r, "width": width, "rows": rows}
    grid = (math.ceil(r / tall), math.ceil(width / wide), count)
    launch(_over_rows, grid, arguments, {"BR": tall, "BW": wide, "BM": 64}, 4, 3)
    if count > 1:
        arguments = {"shares": shares, "out": out, "count": count, "size": r * width}
        grid = (math.ceil(r * width / 1024),)
        launch(_add_up, grid, arguments, {"BLOCK": 1024}, 4, 1)
    return out


def gradients(wanted, dy, x, A, B, h, bias, scale, across) -> tuple:
    """dx, dA, dB and dbias, each None unless it is wanted.

    Args
        wanted  four booleans
        across  W^T as `product` takes it: its W and n, its reader and tiles
    """
    for_x, for_A, for_B, for_bias = wanted
    dx = dh = dA = dB = dbias = None
    if for_x:
        update = {} if A is None else {"A": B.T, "B": A.T, "keep": for_A}
        dx, dh = product(dy, scale=scale, **update, **across)
    elif for_A:
        dh, _ = product(dy, matrix(B.T), B.shape[1], scale=scale)
    if for_A:
        dA = over_rows(dh, x, A.dtype)
    if for_B:
        dB = over_rows(dy, h, B.dtype)
    if for_bias:
        dbias = dy.sum(0, dtype=torch.float32).to(bias.dtype)
    return dx, dA, dB, dbias


class LoRAProduct(torch.autograd.Function):
    """The kernels under autograd; x and y are matrices here.

    `grad` is whether gradients are recorded: ctx.needs_input_grad is True for a
    parameter under no_grad(), too.
    """

    @staticmethod
    def forward(ctx, x, W, A, B, scale, bias, grad):
        for_x, for_W, _, for_B, *_ = (
            grad and needed for needed in ctx.needs_input_grad
        )
        y, h = product(
            x, matrix(W), len(W), A=A, B=B, scale=scale, bias=bias, keep=for_B
        )  # only dB takes h
        for read in for_x * [W.T] + for_W * [x.T, y.T]:
            matrix(read)  # what backward could not read is refused now
        ctx.save_for_backward(W, x, A, B, h, bias)
        ctx.scale = scale
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        W, x, *others = ctx.saved_tensors
        for_x, for_W, for_A, for_B, _, for_bias, _ = ctx.needs_input_grad
        wanted = for_x, for_A, for_B, for_bias
        across = {"W": matrix(W.T), "n": W.shape[1]}
        dx, dA, dB, dbias = gradients(wanted, dy, x, *others, ctx.scale, across)
        dW = product(dy.T, matrix(x.T), x.shape[1])[0] if for_W else None
        return dx, dW, dA, dB, None, dbias, None


# The checked wrapper ------------------------------------------------------------------


@torch.compiler.disable
def lora_linear(
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A projection with its low-rank update, in one pass over x.

        y = x W^T + scale (x A^T) B^T + bias                             [1] eq. (3)

    Args
        x        (…, d_in), float32, float16 or bfloat16, in torch float64 too; any
                 strides
        W        (d_out, d_in), x's dtype; any strides: a Conv1D's weight as weight.T
        A, B     (r, d_in), (d_out, r), 1 <= r <= 256; x's dtype or float32. The kernel
                 rounds float32 to x's dtype when it reads them, so that in float16
                 entries below 6e-8 are 0; the spec multiplies in float32
        scale    a number, alpha / r in [1]
        bias     (d_out,), x's dtype or float32; any stride
        backend  None: Triton on CUDA from compute capability 8.0 on, the torch spec
                 elsewhere; or "torch", "triton"
    Returns  (…, d_out), x's dtype; summed in float32, h = scale x A^T rounded to x's
             dtype before its product with B. Differentiable once, by all five tensors.
             Under autocast all of them are cast first, as F.linear casts its own. In a
             torch.compile'd model this call is a graph break
    Raises   ValueError     a shape, dtype, device or backend that does not fit, named
             MissingTriton  backend="triton" where Triton is not installed
    Memory   h: (rows of x) r numbers, kept for the gradient of B
    Source   [1] arXiv:2106.09685v2
    """
    backend = choose(x.device, backend)
    x, W, A, B, bias = as_autocast(x.device, x, W, A, B, bias)
    more = () if backend == "triton" else (torch.float64,)
    check(x, W, A, B, scale, bias, (*DTYPES, *more))
    if backend == "torch":
        return spec(x, W, A, B, scale, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = LoRAProduct.apply(rows, W, A, B, float(scale), bias, torch.is_grad_enabled())
    return y.view(*x.shape[:-1], len(W))


def check(x, W, A, B, scale, bias, dtypes=DTYPES) -> None:
    """Refuse what does not fit: a ValueError that names it, its value and what fits."""
    wanted = {"W": (W, 2), "A": (A, 2), "B": (B, 2)}
    if bias is not None:
        wanted["bias"] = (bias, 1)
    for name, (tensor, dimensions) in wanted.items():
        if tensor.dim() != dimensions:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: {dimensions} dimensions fit"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
    (d_out, d_in), r = W.shape, len(A)
    shapes = {
        "x": (x.shape[-1:], (d_in,)),
        "A": (A.shape, (r, d_in)),
        "B": (B.shape, (d_out, r)),
        "bias": (None if bias is None else bias.shape, bias is not None and (d_out,)),
    }
    for name, (shape, fits) in shapes.items():
        if shape is not None and tuple(shape) != fits:
            raise ValueError(
                f"{name} ends in {tuple(shape)}; {fits} fits W {tuple(W.shape)} and "
                f"A {tuple(A.shape)}"
            )
    if not 1 <= r <= LARGEST:
        raise ValueError(f"A has r = {r} rows; 1 to {LARGEST} are allowed")
    if x.dtype not in dtypes or W.dtype != x.dtype:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"x is {x.dtype}, W {W.dtype}: both must be the same one of {allowed}"
        )
    for name, tensor in {"A": A, "B": B, "bias": bias}.items():
        if tensor is not None and tensor.dtype not in (x.dtype, torch.float32):
            raise ValueError(
                f"{name} is {tensor.dtype}: x's dtype, {x.dtype}, or float32 is allowed"
            )
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} is not a finite number")
