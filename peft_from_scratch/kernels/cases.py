"""What is compiled and counted without a GPU: the kernels in the shapes of real use.

A case has a name and a function that makes its launches; under language.recorded(), on
"meta" tensors, nothing is computed and nothing takes memory. A new kernel is a new
function here and its cases in CASES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product as pairs

import torch

from .language import Launch, recorded
from .lora import lora_linear, product

PROJECTIONS = ((4096, 4096), (576, 576), (576, 1536), (1536, 576))  # d_in, d_out
ROWS = (4096, 16, 1)  # a training step's or a prompt's tokens; decoding
RANKS = (8, 16, 32, 64, 128, 256)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.uint8: "u8"}
SHAPES = tuple((m, *sizes) for sizes in PROJECTIONS for m in ROWS)  # m, d_in, d_out


@dataclass(frozen=True)
class Case:
    """Launches under a name."""

    name: str
    make: Callable[[], object]

    def launches(self) -> list[Launch]:
        """Those that `make` would make; nothing runs."""
        with recorded() as log:
            self.make()
        return log


def empty(*shape: int, dtype: torch.dtype, grad: bool = False) -> torch.Tensor:
    """A tensor that has a shape and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def lora(m, d_in, d_out, r, dtype, adapter=None, bias=False, grad_W=False) -> None:
    """lora_linear as inference calls it, and as a step of training does."""
    x = empty(m, d_in, dtype=dtype, grad=True)
    W = empty(d_out, d_in, dtype=dtype, grad=grad_W)
    A = empty(r, d_in, dtype=adapter or dtype, grad=True)
    B = empty(d_out, r, dtype=adapter or dtype, grad=True)
    b = empty(d_out, dtype=dtype) if bias else None
    with torch.no_grad():
        lora_linear(x, W, A, B, 0.5, b, backend="triton")
    y = lora_linear(x, W, A, B, 0.5, b, backend="triton")
    y.backward(torch.empty_like(y))


def forward(m, d_in, d_out, r, dtype) -> None:
    """The product alone, h not kept."""
    x, W = empty(m, d_in, dtype=dtype), empty(d_out, d_in, dtype=dtype)
    A, B = empty(r, d_in, dtype=dtype), empty(d_out, r, dtype=dtype)
    lora_linear(x, W, A, B, 0.5, backend="triton")


def for_dx(m, d_in, d_out, r, dtype) -> None:
    """dx and dh of a projection d_in -> d_out, as LoRAProduct.backward asks for it."""
    dy, W = empty(m, d_out, dtype=dtype), empty(d_out, d_in, dtype=dtype)
    A, B = empty(r, d_in, dtype=dtype), empty(d_out, r, dtype=dtype)
    wide = (W.T, W.T.stride(0), W.T.stride(1))
    product(dy, wide, d_in, A=B.T, B=A.T, scale=0.5, keep=True)


def _case(what: str, *shape, **more) -> Case:
    *sizes, r, dtype = shape
    m, d_in, d_out = sizes
    name = f"{what} {m} x {d_in} -> {d_out}, r {r}, {dtype}"
    return Case(name, lambda: lora(*sizes, r, DTYPES[dtype], **more))


CASES = (
    *(
        _case("lora", *shape, r, dtype)
        for shape, r, dtype in pairs(SHAPES, RANKS, DTYPES)
        if dtype == "bf16" or (shape[0] > 1 and r > 8)  # all for one dtype: minutes
    ),
    _case("lora with W trained", *SHAPES[0], 16, "bf16", grad_W=True),
    _case(
        "lora with bias and float32 A, B",
        *(*SHAPES[0], 16, "bf16"),
        adapter=torch.float32,
        bias=True,
    ),
)
SAMPLE = (  # compiled anew by the tests: few, each of another kind
    "lora 4096 x 576 -> 1536, r 16, bf16",
    "lora 16 x 4096 -> 4096, r 16, bf16",
)
