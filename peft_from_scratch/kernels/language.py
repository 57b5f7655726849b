"""Triton, where it is installed; and how one of our kernels is launched.

Triton compiles a Python function into code for a GPU. Without a GPU two things are
left, and this course lives on both: its **interpreter**, which runs a kernel block by
block on NumPy arrays (`TRITON_INTERPRET=1`, read when this module is imported), and its
**compiler**, which needs no GPU to say what it would make for one (targets.py).

Kernels are launched through `launch` alone, so that what is compiled, counted and timed
is what runs. Importing works without Triton (macOS, Windows); using a kernel there says
so.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

MISSING = (
    "Triton is not installed: it has wheels for Linux only. backend='torch' runs the "
    "same product anywhere"
)


class MissingTriton(ImportError):
    """A kernel was used where Triton cannot be imported."""


class _Absent:
    """Stands for all of Triton: a kernel can be defined with it, and not launched."""

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **options):
        return self

    def __getitem__(self, grid):
        raise MissingTriton(MISSING)


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = _Absent()

INSTALLED = not isinstance(triton, _Absent)
INTERPRETED = INSTALLED and bool(triton.knobs.runtime.interpret)
UPCAST = tl.constexpr(INTERPRETED)
OLDEST = (8, 0)  # compute capability from which Triton uses the matrix units


@dataclass(frozen=True)
class Tiles:
    """How a product is cut; sizes in elements.

    m, n, k   of a block: m rows of x, n rows of W, k columns of both at a time
    sweep     blocks side by side that one program computes: A is read for the first
    group     rows of blocks that are computed together, so that W is still in L2
    warps     of 32 threads (64 on AMD), stages   of the load pipeline
    """

    m: int = 128
    n: int = 128
    k: int = 32
    sweep: int = 1
    group: int = 8
    warps: int = 8
    stages: int = 3


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: everything but the GPU."""

    kernel: Callable
    grid: tuple[int, ...]
    arguments: dict = field(repr=False)  # tensors, numbers, tuples of both
    constants: dict  # compiled in
    warps: int
    stages: int


# What `recorded` and `observed` have entered, the innermost last. They hold for all
# threads, because autograd runs the backward pass of a CUDA device in a thread of its
# own, which knows no context variable of the caller's.
_recorders: dict[object, Callable[[Launch], None]] = {}
_observers: dict[object, Callable[[Launch], None]] = {}


def launch(kernel, grid, arguments: dict, constants: dict, warps=4, stages=1) -> None:
    """Run a kernel on its tensors' device, or within `recorded()` write it down."""
    asked = Launch(kernel, grid, arguments, constants, warps, stages)
    for observer in list(_observers.values())[-1:]:
        observer(asked)
    if _recorders:
        list(_recorders.values())[-1](asked)
        return
    with torch.cuda.device_of(first_tensor(arguments)):  # Triton takes the current one
        kernel[grid](**arguments, **constants, num_warps=warps, num_stages=stages)


def first_tensor(arguments: dict) -> torch.Tensor:
    """A tensor of a launch; all of them are on one device."""
    values = (v[0] if isinstance(v, tuple) else v for v in arguments.values())
    return next(value for value in values if isinstance(value, torch.Tensor))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within it kernels are written down instead of run, in whichever thread.

    Tensors may be on "meta".
    """
    log: list[Launch] = []
    with _entered(_recorders, log.append):
        yield log


@contextmanager
def observed(observer: Callable[[Launch], None]) -> Iterator[None]:
    """Within it `observer` is told of each launch before it runs, of any thread."""
    with _entered(_observers, observer):
        yield


@contextmanager
def _entered(listeners: dict, listener: Callable[[Launch], None]) -> Iterator[None]:
    token = object()
    listeners[token] = listener
    try:
        yield
    finally:
        del listeners[token]


def choose(device: torch.device | str, backend: str | None = None) -> str:
    """The backend that a kernel takes for tensors on `device`: "torch" or "triton".

    None is Triton on CUDA where it is installed and uses the matrix units, which it
    does from compute capability 8.0 on; elsewhere None is the torch spec.

    Raises   MissingTriton   Triton asked for, and not installed
             ValueError      another name, or Triton for a device that it cannot run on
    """
    if backend not in (None, "torch", "triton"):
        raise ValueError(
            f"backend={backend!r} is not one of None, 'torch', 'triton'; None takes "
            "Triton on CUDA and torch elsewhere"
        )
    kind = torch.device(device).type
    if backend is None:
        runs = kind == "cuda" and INSTALLED and not _too_old(device)
        return "triton" if runs else "torch"
    if backend == "torch" or _recorders:
        return backend
    if not INSTALLED:
        raise MissingTriton(MISSING)
    if INTERPRETED:
        return "triton"
    if kind == "cuda" and (reason := _too_old(device)):
        raise ValueError(reason)
    if kind != "cuda":
        raise ValueError(
            f"backend='triton' cannot run on {kind}: Triton compiles for GPUs. Set the "
            "environment variable TRITON_INTERPRET=1 before Python starts to run its "
            "interpreter, slowly and on any device; or take backend='torch'"
        )
    return "triton"


def _too_old(device: torch.device | str) -> str:
    """Why Triton does not fit an NVIDIA GPU; empty where it does, or none is here."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return ""
    has = torch.cuda.get_device_capability(device)
    if has >= OLDEST:
        return ""
    return (
        f"backend='triton' does not fit {device}, of compute capability "
        f"{has[0]}.{has[1]}: below {OLDEST[0]}.{OLDEST[1]} Triton's products use no "
        "matrix unit, and their registers spill by kilobytes a thread; take "
        "backend='torch'"
    )


def as_autocast(device: torch.device, *tensors: torch.Tensor | None) -> tuple:
    """The tensors as F.linear takes them: where autocast is on, in its dtype.

    Float64 and None stay as they are. The cast is differentiable.
    """
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors
    )


# Pieces that the kernels share --------------------------------------------------------


@triton.jit
def load(M, rows, columns, keep):
    """The elements of a matrix M = (pointer, row stride, column stride); else 0."""
    pointer, down, along = M
    at = pointer + rows.to(tl.int64)[:, None] * down + columns[None, :] * along
    return tl.load(at, mask=keep, other=0.0)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """The nearest values in `dtype`, of two the even one.

    Interpreted, Triton cuts float32 off to bf16: there, and only there, the bits are
    rounded by hand. NaN stays NaN.
    """
    if UPCAST and dtype == tl.bfloat16:
        wide = values.to(tl.float32)
        bits = wide.to(tl.int32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(wide == wide, nearest, bits)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(dtype)


@triton.jit
def store(M, rows, columns, values, keep):
    """Write a block, rounded to the matrix's dtype."""
    pointer, down, along = M
    at = pointer + rows.to(tl.int64)[:, None] * down + columns[None, :] * along
    tl.store(at, rounded(values, pointer.dtype.element_ty), mask=keep)


@triton.jit
def within(rows, columns, height, width):
    """Which elements of a block lie inside a matrix of height x width."""
    return (rows < height)[:, None] & (columns < width)[None, :]


@triton.jit
def dot(a, b, total):
    """total + a b, summed in float32.

    Interpreted, bf16 operands come out as garbage (triton#11584): there, and only
    there, they are widened first, which changes no value.
    """
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def grouped(program, down, along, GROUP: tl.constexpr):
    """The block (row, column) of a program, so that neighbours share rows of W in L2.

    Programs run roughly in order. GROUP rows of blocks are walked column by column.
    """
    first = program // (GROUP * along) * GROUP
    height = min(down - first, GROUP)
    within_group = program % (GROUP * along)
    return first + within_group % height, within_group // height


def matrix(tensor: torch.Tensor) -> tuple:
    """A 2-D tensor as the kernels take it: (pointer, row stride, column stride).

    Raises   ValueError   a row reaches over 2^31 elements, which the kernels count in
             32 bits along a row (and in 64 from row to row)
    """
    (_, width), (down, along) = tensor.shape, tensor.stride()
    if width * along >= 2**31:
        raise ValueError(
            f"a matrix of shape {tuple(tensor.shape)} has strides {(down, along)}: its "
            "rows reach over 2^31 elements; pass it with .contiguous(), or fewer rows"
        )
    return tensor, down, along
