"""bitsandbytes' own four-bit projections, to be measured beside ours.

Nothing in the library needs this. It is QLoRA as others run it, with our LoRA beside
bitsandbytes' Linear4bit: what differs in a comparison is then the four bits alone.
"""

import importlib
import logging
from types import ModuleType

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core import adapter
from ..core.adapter import replace_modules
from ..core.targets import Targets, resolve
from ..methods import lora
from .candidates import LIBRARY

BLOCK = 64  # its default


def bitsandbytes() -> ModuleType:
    """The library, without what its logger has to say at import.

    Raises  ModuleNotFoundError  it is not here; the message says what to do
    """
    logging.getLogger(LIBRARY).setLevel(logging.ERROR)
    try:
        return importlib.import_module(LIBRARY)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{LIBRARY} is not installed, and is here to be compared with: pip install "
            f"{LIBRARY}"
        ) from error


def qlora(
    model: nn.Module, *, r: int = 8, alpha: float = 16, targets: Targets = "all-linear"
) -> list[str]:
    """Linear4bit (NF4, double quantization) in every layer, and our LoRA beside it.

    Raises  ValueError  a Conv1D, whose transposed weight this does not turn; a row
            length that is no multiple of 64, which it dequantizes wrongly on a CPU
    """
    model = adapter.unwrapped(model)
    adapter.refuse_unfit(model)
    for name, module in resolve(model, "all-linear").items():
        if isinstance(module, Conv1D):
            raise ValueError(f"{name} is a Conv1D: not turned for {LIBRARY} here")
        if module.in_features % BLOCK:
            raise ValueError(
                f"{name} has rows of {module.in_features} values, no multiple of its "
                f"block of {BLOCK}: {LIBRARY} 0.50 dequantizes those wrongly on a CPU"
            )
        replace_modules(model, {module: linear4bit(module)})
    return lora.inject(model, r=r, alpha=alpha, targets=targets)


def linear4bit(module: nn.Linear) -> nn.Module:
    """bitsandbytes' projection with the same weight, in four bits of its own making.

    Where a CPU multiplies bfloat16, it would repack its weights at the first answer,
    round their constants to that, and give double quantization up. That is kept off, so
    that what is measured is what was trained.
    """
    bnb = bitsandbytes()
    options = dict(quant_type="nf4", compress_statistics=True)
    new = bnb.nn.Linear4bit(
        1, 1, bias=False, compute_dtype=module.weight.dtype, **options
    )
    new.in_features, new.out_features = module.in_features, module.out_features
    weight = module.weight.detach()
    new.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=new, **options)
    new.bias, new.support_avx512bf16_for_cpu = module.bias, False
    new.to(weight.device)
    if not new.weight.bnb_quantized:  # its .to() quantizes on the way to a GPU only
        new.weight._quantize(weight.device)
    state = new.weight.quant_state
    for name, tensor in {
        "absmax": state.absmax,
        "nested_absmax": state.state2.absmax,
        "offset": state.offset,
    }.items():  # its constants are no buffers; as such, they are counted like ours
        new.register_buffer(name, tensor, persistent=False)
    return new.train(module.training)
