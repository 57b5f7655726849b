"""A projection whose weight is in four bits, and a model of such projections.

    y  = x W'ᵀ + bias       W' = dequantize(codes), for this product only
    dx = dy W'              W' dequantized a second time: nothing of it was kept

Gradients pass through W' to x. The codes have no gradient and never train.

All layers share one buffer, as large as the largest weight in full. The last layer
frees it before the logits are computed, where a training step's memory peaks. The price
is time: a training step dequantizes each weight twice. While a model answers, weights
may stay dequantized, within a budget (keeping.py).
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core import adapter
from ..core.adapter import as_matrix, is_transposed, modules_sharing, replace_modules
from ..core.targets import QuantizedLinear, Targets, resolve
from .blocks import (
    DTYPES,
    Quantized,
    check_dtype,
    check_options,
    dequantize,
    quantize,
    refuse_not_finite,
)
from .double import DoubleQuantized

COMPUTE = (*DTYPES, torch.float64)


class NF4Linear(QuantizedLinear):
    """A frozen projection whose weight is stored in four bits.

        y = x W'ᵀ + bias                        [1] eq. (5), without its adapter

    Args
        q              the weight W0 (d_out, d_in), quantized
        bias           the projection's own bias (d_out), or None
        compute_dtype  of W' and of the product; None for the dtype of x
        transposed     whether the projection was a Conv1D, and becomes one again when
                       it is merged or saved
    Returns  (…, d_out), in the dtype of x; under autocast in autocast's
    Memory   q.nbytes and the bias; in the shared buffer d_out d_in itemsize bytes
    Raises   ValueError   a compute dtype that is no floating-point one
    Source   [1] arXiv:2305.14314v1

    on_dequantize  functions that are called with the layer whenever W' is made
    """

    on_dequantize: ClassVar[list[Callable[["NF4Linear"], object]]] = []

    def __init__(
        self,
        q: Quantized,
        bias: nn.Parameter | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        transposed: bool = False,
    ):
        super().__init__()
        check_compute_dtype(compute_dtype)
        self.out_features, self.in_features = q.shape
        self.block, self.codebook, self.dtype = q.block, q.codebook, q.dtype
        self.compute_dtype, self.transposed = compute_dtype, transposed
        self.buffer, self.is_last = DequantBuffer(), False  # see share_buffer
        self.unpacked = None  # inside the block of `nf4.unpacked`, what it keeps
        self.register_parameter("bias", bias)
        self.register_buffer("packed", q.packed)
        # The names are keys of state dicts, and stay as they are.
        if isinstance(q.absmax, DoubleQuantized):
            self.constant_codebook = q.absmax.codebook
            self.register_buffer("absmax_codes", q.absmax.codes)
            self.register_buffer("absmax_units", q.absmax.nested_absmax)
            self.register_buffer("absmax_offset", q.absmax.offset)
        else:
            self.constant_codebook = None
            self.register_buffer("absmax_values", q.absmax)

    @property
    def quantized(self) -> Quantized:
        """The stored weight: (d_out, d_in)."""
        if self.constant_codebook is None:
            absmax = self.absmax_values
        else:
            absmax = DoubleQuantized(
                self.absmax_codes,
                self.absmax_units,
                self.absmax_offset,
                self.constant_codebook,
            )
        shape = torch.Size((self.out_features, self.in_features))
        rest = shape, self.dtype, self.block, self.codebook
        return Quantized(self.packed, absmax, *rest)

    @property
    def weight(self) -> Tensor:
        """W' in the projection's own orientation: a new tensor at each access."""
        W = dequantize(self.quantized)
        return W.T if self.transposed else W

    @contextmanager
    def dequantized(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """W' (d_out, d_in) for the product inside the block; not to be written to.

        It is in the shared buffer, or was kept by `nf4.unpacked`.
        """
        kept, device = self.unpacked, self.packed.device
        W = None if kept is None else kept.weight(self, dtype, _stream(device))
        if W is not None:
            yield W
            return
        shape = (self.out_features, self.in_features)
        with self.buffer.of(shape, dtype, device) as out:
            yield self.dequantize_into(out)

    def dequantize_into(self, out: Tensor) -> Tensor:
        """Write W' to `out` (d_out, d_in), in its dtype; the observers are called."""
        for observer in self.on_dequantize:
            observer(self)
        return dequantize(self.quantized, out=out)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        dtype, result = self.dtypes(x)
        product = DequantMatmul.apply if torch.is_grad_enabled() else times_dequantized
        y = product(x, self, dtype, True).to(result)
        self.release_if_last()
        return y if self.bias is None else y + self.bias.to(result)

    def dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """Of the product with x, and of what forward returns."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            return (torch.get_autocast_dtype(device),) * 2
        return self.compute_dtype or x.dtype, x.dtype

    def add_product(self, C: Tensor, x: Tensor, scale: float) -> Tensor:
        """scale · C + x W'ᵀ, in the memory of C: rounded once, and not differentiable.

        x (tokens, d_in) and C (tokens, d_out) are of one dtype.
        """
        with self.dequantized(C.dtype) as W:
            return C.addmm_(x, W.T, beta=scale)

    def release_if_last(self) -> None:
        """After the last product of a training step, free the buffer."""
        if self.is_last and torch.is_grad_enabled():
            # The logits come next, where a step's bytes peak.
            self.buffer.release(self.packed.device)

    def plain(self) -> nn.Module:
        """A Linear or Conv1D with W' as its weight, in the dtype before quantizing."""
        with torch.device("meta"):
            like = Conv1D if self.transposed else nn.Linear
            first, second = self.out_features, self.in_features
            if not self.transposed:
                first, second = second, first
            module = like(first, second)
        weight = self.weight.contiguous()
        module.weight = nn.Parameter(weight)
        module.bias = self.bias
        return module.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"{self.codebook}, block={self.block}, double={self.constant_codebook}, "
            f"{self.quantized.bits_per_value:.3f} bits a value"
        )

    def _apply(self, fn, recurse=True):
        """Move or convert the module, as .to() does; the constants stay float32."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


class DequantMatmul(torch.autograd.Function):
    """x W'ᵀ with `transpose`, x W' without: each is the gradient of the other.

    Forward   W' = dequantize(codes)     (d_out, d_in), into the buffer
              y  = x W'ᵀ                 (…, d_out)
    Backward  dx = dy W'                 (…, d_in), W' dequantized again
    """

    @staticmethod
    def forward(ctx, x, layer, dtype, transpose):
        ctx.layer, ctx.dtype, ctx.transpose = layer, dtype, transpose
        ctx.x_dtype = x.dtype
        return times_dequantized(x, layer, dtype, transpose)

    @staticmethod
    def backward(ctx, dy):
        dx = DequantMatmul.apply(dy, ctx.layer, ctx.dtype, not ctx.transpose)
        return dx.to(ctx.x_dtype), None, None, None


def times_dequantized(
    x: Tensor, layer: NF4Linear, dtype: torch.dtype, transpose: bool
) -> Tensor:
    """x W'ᵀ with `transpose`, x W' without; not to be differentiated."""
    with layer.dequantized(dtype) as W:
        return F.linear(x.to(dtype), W if transpose else W.T)


class DequantBuffer:
    """One buffer for the dequantized weights of all layers, of the largest one's size.

    On a CPU each thread has its own, since two may be in different layers at a time. On
    a GPU each stream has its own, whichever thread asks: autograd runs a backward pass
    in threads of its own, on the stream of the forward pass. What a stream is asked to
    do, it does in order; so a lock keeps a weight and its product together, and nothing
    waits for the GPU. A copy of a model gets a new buffer.
    """

    def __init__(self):
        self._of_thread, self._of_stream = threading.local(), {}
        self._lock = threading.RLock()

    @contextmanager
    def of(
        self, shape: tuple, dtype: torch.dtype, device: torch.device
    ) -> Iterator[Tensor]:
        """An uninitialized view (d_out, d_in), nobody else's inside the block."""
        count, key = shape[0] * shape[1] * dtype.itemsize, _stream(device)
        buffers, lock = self._shared_by(device)
        with lock:
            if key not in buffers or len(buffers[key]) < count:
                buffers.pop(key, None)  # free the small one before the large one
                with torch.inference_mode(False):  # else of no use in training
                    new = torch.empty(count, dtype=torch.uint8, device=device)
                buffers[key] = new
            yield buffers[key][:count].view(dtype).view(shape)

    def release(self, device: torch.device) -> None:
        """Free the buffer of this thread, or of this stream; the next one is new."""
        buffers, lock = self._shared_by(device)
        with lock:
            buffers.pop(_stream(device), None)

    def _shared_by(self, device: torch.device) -> tuple[dict, AbstractContextManager]:
        """({device and stream: buffer}, what guards it)"""
        if not has_streams(device):
            return vars(self._of_thread), nullcontext()
        return self._of_stream, self._lock

    def __deepcopy__(self, memo) -> "DequantBuffer":
        return DequantBuffer()

    def __reduce__(self):
        return DequantBuffer, ()


def has_streams(device: torch.device) -> bool:
    """Whether work there is queued; on a CPU the caller's thread does it at once."""
    return device.type != "cpu"


def _stream(device: torch.device) -> tuple:
    """The device and its current stream: work on one stream is done in order."""
    on_cuda = device.type == "cuda"
    return device, torch.cuda.current_stream(device).stream_id if on_cuda else 0


def quantize_model(
    model: nn.Module,
    *,
    block: int = 64,
    double: bool | str = True,
    code: str = "nf4",
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    compute_dtype: torch.dtype | None = None,
) -> list[str]:
    """Put every matching projection into four bits, one after the other, in place.

    Heads, embeddings and norms are not among the presets, and stay as they are.

    Args
        block, double, code  see quantize
        targets, exclude     see targets.resolve
        compute_dtype        see NF4Linear
    Returns  names of the quantized modules, in the model's order
    Raises   ValueError   adapters on the model (quantize first, wrap afterwards), a
             weight that is quantized already, tied to another module, not finite or of
             another dtype; nothing matches. The model is then as it was
    Memory   during the work less than half of a projection more than before (with
             Conv1D one and a quarter: its transpose); each one's own weight goes as
             soon as its codes are there
    """
    model = adapter.unwrapped(model)
    modules = quantizable(
        model,
        block=block,
        double=double,
        code=code,
        targets=targets,
        exclude=exclude,
        compute_dtype=compute_dtype,
    )
    names = list(modules)
    for name in names:
        module = modules.pop(name)  # no other reference: its memory is free afterwards
        packed = NF4Linear(
            quantize(as_matrix(module), block, double, code),
            module.bias,
            compute_dtype=compute_dtype,
            transposed=is_transposed(module),
        )
        replace_modules(model, {module: packed.train(module.training)})
    share_buffer(model)
    return names


def quantizable(
    model: nn.Module,
    *,
    block: int = 64,
    double: bool | str = True,
    code: str = "nf4",
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    compute_dtype: torch.dtype | None = None,
) -> dict[str, nn.Module]:
    """{name: module} of what quantize_model would quantize; raises all that it would.

    The model is left alone.
    """
    check_compute_dtype(compute_dtype)
    modules = resolve(model, targets, exclude)
    for name, module in modules.items():
        _check(model, name, module, block, double, code)
    return modules


def check_compute_dtype(compute_dtype: torch.dtype | None) -> None:
    """ValueError for a dtype that W' cannot be computed in."""
    if compute_dtype not in (None, *COMPUTE):
        raise ValueError(f"{compute_dtype=}: allowed are None, {COMPUTE}")


@torch.no_grad()
def dequantize_model(model: nn.Module) -> list[str]:
    """Replace every projection in four bits by a plain one, whose weight is W'.

    The weights of before quantizing do not come back.

    Returns  names of the projections
    Raises   ValueError  adapters on the model: merge() or remove() them first
    """
    model = adapter.unwrapped(model)
    adapter.refuse_unfit(model)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    for module in packed.values():
        replace_modules(model, {module: module.plain()})
    return list(packed)


def share_buffer(model: nn.Module) -> None:
    """Give all projections in four bits one buffer, which the last one frees."""
    buffer = DequantBuffer()
    packed = [m for m in model.modules() if isinstance(m, NF4Linear)]
    for module in packed:
        module.buffer, module.is_last = buffer, module is packed[-1]


def _check(model, name, module, block, double, code) -> None:
    """ValueError where this module could not be quantized."""
    if isinstance(module, QuantizedLinear):
        raise ValueError(f"{name} is in four bits already: {module}")
    tied = modules_sharing(model, module.weight)
    if len(tied) > 1:
        raise ValueError(
            f"{name}.weight is one tensor with {tied[0]}.weight: a copy of it in four "
            "bits would take more bytes, not less. Leave it out of the targets"
        )
    W = module.weight.detach()
    try:
        check_dtype(W)
        check_options(block, double, code)
        if not torch.stack(W.aminmax()).isfinite().all():  # W.isfinite() makes a copy
            refuse_not_finite(W)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
