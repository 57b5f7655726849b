"""The memory bill of models that do not fit: a model without its numbers.

On torch's device "meta" a tensor has a shape and a dtype and no memory. A model of such
tensors, here called a *ghost*, takes a whole training step in a second, and meter.Meter
counts the bytes that each of its tensors would take. So the bytes of a 7B model are
counted on a laptop, tensor by tensor, by the code that counts those of a real one.

Attention is counted as a kernel does it that keeps no (t, t) matrix (flash attention,
torch's default on a CPU and on GPUs); without one, activations grow with t².
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
)

from ..core.adapter import trainable
from ..models.load import pick_dtype
from ..training.loss import logits_at, widened
from .meter import Meter
from .step_bill import optimizer_class, step_bill

ATTENTION = "peft_from_scratch.ghost"  # its name among transformers' kinds of attention
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def ghost(
    config: PretrainedConfig,
    dtype: str | torch.dtype = "bfloat16",
    attention: str = "sdpa",
) -> nn.Module:
    """A causal language model of this configuration, without numbers.

    Args
        config     of any model of transformers, model.config for example; not changed
        dtype      of the weights that it would have
        attention  "sdpa": in a kernel, without a (t, t) matrix; "eager": with one
    Memory   none, but for the modules themselves
    """
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)  # it is causal
    config = copy.deepcopy(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=pick_dtype(dtype),
            attn_implementation=ATTENTION if attention == "sdpa" else attention,
        )


def bill(model: nn.Module, recipe: str, *, batch: int = 1, length: int = 64) -> dict:
    """Count the bytes of one training step of an injected ghost.

    Args
        model   a ghost, after full.inject or lora.inject for example
        recipe  as for experiments.bill: "fp32", "bf16" or "mixed"
        batch   rows, each of `length` tokens, which all have a label but the first
    Returns  bytes {weights, gradients, optimizer, activations, temporaries, peak}, as
             experiments.bill.counted finds them for a real model
    Raises   ValueError  no such recipe, nothing to train, or a model that has numbers
    """
    parameters = list(trainable(model).values())
    _refuse(model, recipe, parameters)
    optimizer = optimizer_class(recipe)(parameters, lr=1e-5)
    ids = torch.empty(batch, length, dtype=torch.long, device="meta")
    model.train()
    counted = step_bill(model, lambda: _loss(model, ids).backward(), optimizer)
    for parameter in parameters:
        parameter.grad = None  # so that the next bill begins like this one
    return counted


def kept_for_backward(model: nn.Module, batch: int, length: int) -> tuple[int, int]:
    """Bytes of activations of an injected ghost: what forward keeps, and the most.

    Returns  what torch hands to its saved-tensor hooks until the logits are there,
             parameters left out; and the most of activations, logits and all temporary
             tensors at one moment of forward and backward
    Raises   ValueError  a model that cannot run without numbers, with the reason
    """
    ids = torch.empty(batch, length, dtype=torch.long, device="meta")
    own = [*model.parameters(), *model.buffers()]
    own = {tensor.untyped_storage()._cdata for tensor in own}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    model.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _logits(model, ids)
        with Meter(model) as meter:
            _loss(model, ids).backward()
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        why = str(error).strip().splitlines()[0][:120]
        raise ValueError(
            f"{type(model).__name__} cannot take a step without numbers ({why})"
        ) from None
    for parameter in model.parameters():
        parameter.grad = None
    return sum(s.nbytes() for s in kept.values()), meter.memory().activations


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits, targets = _logits(model, ids), ids[:, 1:].flatten()
    return F.cross_entropy(widened(logits.flatten(0, 1)), targets, reduction="sum")


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    # Where transformers gets no mask, it looks into the position ids for packed rows,
    # and these have no values.
    mask = torch.ones_like(ids)
    return logits_at(model, ids, slice(None, -1), attention_mask=mask)


def _attend(module, query, key, value, attention_mask, scaling=None, **_):
    """Causal attention; the kernel keeps a sum for each row, and no (t, t) matrix."""
    h, _ = FUSED(query, key, value, 0.0, True, scale=scaling)
    return h.transpose(1, 2).contiguous(), None


def _refuse(model: nn.Module, recipe: str, parameters: list) -> None:
    optimizer_class(recipe)
    if not all(p.is_meta for p in model.parameters()):
        raise ValueError(
            "this model holds numbers; ghost(model.config) makes one that holds none, "
            "and experiments.bill.counted counts the bill of a real one"
        )
    if not parameters:
        raise ValueError("nothing trains: inject first, with full.inject(model)")
