"""What is compiled and counted without a GPU: the kernels in the shapes of real use.

A case has a name and a function that makes its launches; under language.recorded(), on
"meta" tensors, nothing is computed and nothing takes memory. A new kernel is a new
function here and its cases in CASES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product as pairs

import torch

from ..nf4 import Quantized
from ..nf4.double import BLOCK, DoubleQuantized
from .gather import ROWS as ROWS_OF_A_BLOCK
from .gather import Plan, Stack, gather
from .language import Launch, matrix, recorded
from .lora import lora_linear, product
from .nf4 import nf4_dequantize, nf4_lora_linear

PROJECTIONS = ((4096, 4096), (576, 576), (576, 1536), (1536, 576))  # d_in, d_out
ROWS = (4096, 16, 1)  # a training step's or a prompt's tokens; decoding
RANKS = (8, 16, 32, 64, 128, 256)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
NAMES |= {torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}
SHAPES = tuple((m, *sizes) for sizes in PROJECTIONS for m in ROWS)  # m, d_in, d_out


@dataclass(frozen=True)
class KernelCase:
    """A name for the launches of one use of a kernel."""

    name: str
    make: Callable[[], object]

    def launches(self) -> list[Launch]:
        """The launches of `make`; nothing runs."""
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
    product(dy, matrix(W.T), d_in, A=B.T, B=A.T, scale=0.5, keep=True)


def codes(d_in, d_out, dtype, double=True) -> Quantized:
    """A weight in four bits, in blocks of 64."""
    blocks = d_in * d_out // 64
    constants = empty(blocks, dtype=torch.float32)
    if double:
        units = empty(-(-blocks // BLOCK), dtype=torch.float32)
        offset = empty(dtype=torch.float32)
        constants = DoubleQuantized(
            empty(blocks, dtype=torch.uint8), units, offset, "dynamic"
        )
    packed = empty(d_in * d_out // 2, dtype=torch.uint8)
    return Quantized(packed, constants, torch.Size((d_out, d_in)), dtype, 64, "nf4")


def four_bits(m, d_in, d_out, r, dtype, double=True) -> None:
    """A step of QLoRA's product, and its weight dequantized."""
    q = codes(d_in, d_out, dtype, double)
    x = empty(m, d_in, dtype=dtype, grad=True)
    A, B = (empty(*s, dtype=dtype, grad=True) for s in ((r, d_in), (d_out, r)))
    nf4_dequantize(q, backend="triton")
    y = nf4_lora_linear(x, q, A, B, 0.5, backend="triton")
    y.backward(torch.empty_like(y))


def forward_in_four_bits(m, d_in, d_out, r, dtype) -> None:
    """The product alone, h not kept."""
    x, q = empty(m, d_in, dtype=dtype), codes(d_in, d_out, dtype)
    A, B = empty(r, d_in, dtype=dtype), empty(d_out, r, dtype=dtype)
    nf4_lora_linear(x, q, A, B, 0.5, backend="triton")


def gathered(m, d_in, d_out, r, dtype, rows) -> None:
    """The update of m rows that take two adapters in turn, in blocks of `rows`."""
    A, B = empty(2 * r, d_in, dtype=dtype), empty(2 * r, d_out, dtype=dtype)
    stack = Stack(A, B, (r, r), empty(2, dtype=torch.float32))
    x, y = empty(m, d_in, dtype=dtype), empty(m, d_out, dtype=dtype)
    gather(y, x, stack, Plan.of(torch.arange(m) % 2, x, stack, rows))


def _case(what: str, *shape, make=lora, **more) -> KernelCase:
    *sizes, r, dtype = shape
    m, d_in, d_out = sizes
    name = f"{what} {m} x {d_in} -> {d_out}, r {r}, {dtype}"
    return KernelCase(name, lambda: make(*sizes, r, DTYPES[dtype], **more))


CASES = (
    *(
        _case("lora", *shape, r, dtype)
        for shape, r, dtype in pairs(SHAPES, RANKS, DTYPES)
        if (dtype == "bf16" or r > 8)  # 8 differs from 16 by its masks alone
        and (shape[0] > 1 or (dtype == "bf16" and r in (16, 256)))
    ),
    _case("lora with W trained", *SHAPES[0], 16, "bf16", grad_W=True),
    _case(
        "lora with bias and float32 A, B",
        *(*SHAPES[0], 16, "bf16"),
        adapter=torch.float32,
        bias=True,
    ),
    *(
        _case("nf4", m, 4096, 4096, r, dtype, make=four_bits)
        for m, r, dtype in pairs((*ROWS, 64, 128), (16, 64), DTYPES)
        if (m > 1 or dtype == "bf16") and (r == 16 or dtype != "fp16")
    ),
    _case("nf4, odd rows", 16, 577, 576, 16, "bf16", make=four_bits),
    _case(
        "nf4, constants in float32",
        *(16, 4096, 4096, 16, "bf16"),
        make=four_bits,
        double=False,
    ),
    *(
        _case(f"gather by {n}", 128, 4096, 4096, r, dtype, make=gathered, rows=n)
        for n, r, dtype in pairs(ROWS_OF_A_BLOCK, (16, 64), ("fp32", "bf16"))
    ),
)
SAMPLE = (  # compiled anew by the tests: few, each of another kind
    "lora 4096 x 576 -> 1536, r 16, bf16",
    "lora 16 x 4096 -> 4096, r 16, bf16",
    "nf4 16 x 4096 -> 4096, r 16, bf16",
)
