"""A projection in four bits, and a model whose projections are.

    y  = x W'ᵀ + bias       W' = dequantize(codes), for this product only
    dx = dy W'              dequantized a second time: nothing of it was kept

So the model takes its four bits and, for all layers together, one buffer of the size of
the largest weight, and not even that while the logits are there. The price is time: two
passes over each weight more in a training step. Gradients go through W' to x; the codes
have none, and never train.
"""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core import adapter
from ..core.adapter import as_matrix, is_transposed, modules_sharing, replace_modules
from ..core.targets import QuantizedLinear, Targets, resolve
from .blocks import DTYPES, Quantized, dequantize, quantize
from .double import Doubled

COMPUTE = (*DTYPES, torch.float64)


class Scratch:
    """One buffer for the dequantized weights of all layers, of the largest's size.

    Each thread has its own: two of them may be in different layers at a time. A copy of
    a model gets another one.
    """

    def __init__(self):
        self._of_thread = threading.local()

    def of(self, shape: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for a tensor: it holds what was last written there."""
        count = shape[0] * shape[1] * dtype.itemsize
        held = getattr(self._of_thread, "bytes", None)
        if held is None or held.device != device or len(held) < count:
            self._of_thread.bytes = None  # let go of the small one first
            with torch.inference_mode(False):  # else it could not be used in training
                held = torch.empty(count, dtype=torch.uint8, device=device)
            self._of_thread.bytes = held
        return held[:count].view(dtype).view(shape)

    def release(self) -> None:
        """Let go of this thread's buffer; the next layer makes it anew."""
        self._of_thread.bytes = None

    def __deepcopy__(self, memo) -> "Scratch":
        return Scratch()

    def __reduce__(self):
        return Scratch, ()


class Product(torch.autograd.Function):
    """x W'ᵀ, or x W' where `across`: each is the gradient of the other.

    Forward   W' = dequantize(codes)     (d_out, d_in), into the buffer
              y  = x W'ᵀ                 (…, d_out)
    Backward  dx = dy W'                 (…, d_in), W' dequantized anew
    """

    @staticmethod
    def forward(ctx, x, layer, dtype, across):
        ctx.layer, ctx.dtype, ctx.across, ctx.of_x = layer, dtype, across, x.dtype
        W = layer.dequantized(dtype)
        return F.linear(x.to(dtype), W.T if across else W)

    @staticmethod
    def backward(ctx, dy):
        dx = Product.apply(dy, ctx.layer, ctx.dtype, not ctx.across)
        return dx.to(ctx.of_x), None, None, None


class NF4Linear(QuantizedLinear):
    """A frozen projection whose weight is held in four bits.

        y = x W'ᵀ + bias                        [1] eq. (5), without its adapter

    Args
        q              the weight W0 (d_out, d_in), quantized
        bias           the projection's own bias (d_out), or None
        compute_dtype  of W' and of the product; None for that of x
        transposed     whether the projection came from a Conv1D, so that merging and
                       saving give one back
    Returns  (…, d_out), dtype of x; under autocast that of autocast
    Memory   q.nbytes and the bias; the buffer: d_out d_in bytes times compute itemsize
    Raises   ValueError   a compute dtype that is no floating-point one
    Source   [1] arXiv:2305.14314v1
    """

    def __init__(
        self,
        q: Quantized,
        bias: nn.Parameter | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        transposed: bool = False,
    ):
        super().__init__()
        if compute_dtype not in (None, *COMPUTE):
            raise ValueError(f"{compute_dtype=}: allowed are None, {COMPUTE}")
        self.out_features, self.in_features = q.shape
        self.block, self.code, self.dtype = q.block, q.code, q.dtype
        self.compute_dtype, self.transposed = compute_dtype, transposed
        self.last = False  # of the model's: see share_scratch
        self.scratch = Scratch()
        self.register_parameter("bias", bias)
        self.register_buffer("packed", q.packed)
        doubled = isinstance(q.absmax, Doubled)
        self.recipe = q.absmax.code if doubled else None
        constants = vars(q.absmax) if doubled else {"values": q.absmax}
        for name, value in constants.items():
            if isinstance(value, Tensor):
                self.register_buffer(f"absmax_{name}", value)

    @property
    def quantized(self) -> Quantized:
        """The weight as it is held: (d_out, d_in)."""
        absmax = (
            Doubled(
                self.absmax_codes, self.absmax_units, self.absmax_offset, self.recipe
            )
            if self.recipe
            else self.absmax_values
        )
        shape = torch.Size((self.out_features, self.in_features))
        return Quantized(self.packed, absmax, shape, self.dtype, self.block, self.code)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, as it was stored: a fresh tensor at each look."""
        W = dequantize(self.quantized)
        return W.T if self.transposed else W

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """W' (d_out, d_in), in the buffer: the next layer's will overwrite it."""
        shape = (self.out_features, self.in_features)
        room = self.scratch.of(shape, dtype, self.packed.device)
        return dequantize(self.quantized, out=room)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = result = torch.get_autocast_dtype(device)
        else:
            dtype, result = self.compute_dtype or x.dtype, x.dtype
        y = Product.apply(x, self, dtype, False).to(result)
        if self.last and torch.is_grad_enabled():
            self.scratch.release()  # the logits come next, where a step's bytes peak
        return y if self.bias is None else y + self.bias.to(result)

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
            f"{self.code}, block={self.block}, double={self.recipe}, "
            f"{self.quantized.bits_per_value:.3f} bits a value"
        )

    def _apply(self, fn, recurse=True):
        """What .to(dtype), .half() … do: constants keep their float32."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


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
    model = adapter.unwrap_compiled(model)
    adapter.refuse_second(model)
    modules = resolve(model, targets, exclude)
    for name, module in modules.items():
        _check(model, name, module, block, double, code)
    names = list(modules)
    while modules:
        module = modules.pop(next(iter(modules)))
        packed = NF4Linear(
            quantize(as_matrix(module), block, double, code),
            module.bias,
            compute_dtype=compute_dtype,
            transposed=is_transposed(module),
        )
        replace_modules(model, {module: packed.train(module.training)})
    share_scratch(model)
    return names


@torch.no_grad()
def dequantize_model(model: nn.Module) -> list[str]:
    """Put a plain projection in the place of every one in four bits.

    Not the way back: the weights are W', what the codes stand for.

    Returns  names of the projections
    Raises   ValueError  adapters on the model: merge() or remove() them first
    """
    model = adapter.unwrap_compiled(model)
    adapter.refuse_second(model)
    found = {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    for module in found.values():
        replace_modules(model, {module: module.plain()})
    return list(found)


def share_scratch(model: nn.Module) -> None:
    """Give all projections in four bits one buffer, which the last one lets go of."""
    scratch = Scratch()
    packed = [m for m in model.modules() if isinstance(m, NF4Linear)]
    for module in packed:
        module.scratch, module.last = scratch, module is packed[-1]


def _check(model, name, module, block, double, code) -> None:
    """ValueError where this module could not be quantized."""
    if isinstance(module, QuantizedLinear):
        raise ValueError(f"{name} is in four bits already: {module}")
    held = modules_sharing(model, module.weight)
    if len(held) > 1:
        raise ValueError(
            f"{name}.weight is one tensor with {held[0]}.weight: a copy of it in four "
            "bits would take more bytes, not less. Leave it out of the targets"
        )
    W = module.weight.detach()
    try:
        quantize(W.flatten()[:0], block, double, code)
        if not torch.stack(W.aminmax()).isfinite().all():  # isfinite() makes a copy
            quantize(W)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
