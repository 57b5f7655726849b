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
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from ..core.adapter import trainable
from ..models.load import pick_dtype
from ..training.loss import logits_at, widened
from .step_bill import optimizer_class, step_bill

ATTENTION = "peft_from_scratch.ghost"  # its name among transformers' kinds of attention
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def ghost(config: PretrainedConfig, dtype: str | torch.dtype = "bfloat16") -> nn.Module:
    """A causal language model of this configuration, without numbers.

    Args
        config  of any model of transformers, model.config for example; not changed
        dtype   of the weights that it would have
    Memory   none, but for the modules themselves
    """
    AttentionInterface.register(ATTENTION, _attend)
    config = copy.deepcopy(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=pick_dtype(dtype), attn_implementation=ATTENTION
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


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    # transformers would read the values of a mask that it has to make; it leaves one
    # with four sides as it is, and _attend does not look at it.
    mask = torch.empty(1, 1, 1, 1, device="meta")
    logits = logits_at(model, ids, slice(None, -1), attention_mask=mask)
    targets = ids[:, 1:].flatten()
    return F.cross_entropy(widened(logits.flatten(0, 1)), targets, reduction="sum")


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
