"""The loss in chunks of tokens: never all logits at once.

Behind SmolLM2's last layer a token has 576 values, and behind its head 49,152. The loss
of 1,000 label tokens holds three tables of that width: the logarithms of probabilities,
their gradient and that of the logits. In float32 that is 590 MB: a third of the bytes
of a LoRA step's activations, and nine tenths where layers are checkpointed.

But each token's loss needs its own row only. So the rows are taken a chunk at a time,
and a chunk's gradient is computed before the next chunk's logits are:

    for each chunk of c label tokens
        z = H_c Wᵀ               logits (c, V), in the place of (tokens, V)
        loss += cross-entropy(z)
        dH_c = dz W              kept: (c, d)
        dW += dzᵀ H_c            kept where the head trains: (V, d)

The loss is a scalar, so what comes from above is one number, by which backward
multiplies what is kept. Nothing is computed twice: three products a chunk, as without
chunks. Only label tokens have rows, as in loss.py.

What stands between the layers and the loss is the model's own code: a norm, the head, a
softcap, an adapter on the head. It runs on a chunk as if its rows came from the layers.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from ..common import check
from ..core.targets import unwrapped
from ..tasks.templates import IGNORED
from .batch import Batch
from .loss import SEEN, Summed, can_choose_logits, summed_loss, widened


def summed_loss_in_chunks(
    model: nn.Module, batch: Batch, *, chunk: int = 256
) -> Tensor:
    """loss.summed_loss, with the logits of at most `chunk` label tokens at a time.

        - sum over labelled tokens (i, t) of  log softmax(logits[i, t-1])[label[i, t]]

    The value and all gradients are those of summed_loss, but for the order of sums.

    Args
        chunk  c, label tokens; 256 of SmolLM2's take 50 MB a table in float32
    Returns  a scalar in nats; float32 where the model computes in half precision
    Raises   ValueError   chunk is not a whole number from 1 on, or a model that cannot
             compute the logits of chosen positions alone
    Memory   3 c V values of the loss's dtype, in the place of 3 tokens V; from forward
             on dH (tokens, d), and where the head trains dW (V, d), whose part of a
             chunk is there when two of the chunk's three tables are gone
    Departs  dW is a sum over chunks in the head's dtype: in half precision it is
             rounded once a chunk
    """
    check.whole("chunk", chunk, 1, of="label tokens")
    if not can_choose_logits(model):
        raise ValueError(
            f"{type(unwrapped(model)).__name__} computes the logits of all positions "
            "and cannot be asked for some, so that chunks would save nothing: take "
            "loss.summed_loss"
        )
    labels = batch["labels"][:, 1:]
    keep = F.pad(labels != IGNORED, (0, 1))  # (b, t): the next token has a label
    output = _of_layers(model, batch)
    H, empty = output.last_hidden_state[keep], replace(output, last_hidden_state=None)
    del output  # so that of what the layers return only H (tokens, d) is kept here
    targets = labels[labels != IGNORED]

    def chunk_loss(H_c: Tensor, targets_c: Tensor) -> Tensor:
        logits = _logits(model, replace(empty, last_hidden_state=H_c[None]))
        return F.cross_entropy(widened(logits), targets_c, reduction="sum")

    if not torch.is_grad_enabled():
        parts = zip(H.split(chunk), targets.split(chunk), strict=True)
        return sum((chunk_loss(*part) for part in parts), H.new_zeros(()))
    return ChunkedLoss.apply(chunk_loss, chunk, targets, H, *_behind(model))


def loss_of(chunk: int | None) -> Summed:
    """The loss of a recipe: in chunks of so many label tokens; None: all at once."""
    if chunk is None:
        return summed_loss
    return partial(summed_loss_in_chunks, chunk=chunk)


class ChunkedLoss(torch.autograd.Function):
    """Σ over chunks of loss(H_c), whose gradients forward has computed already."""

    @staticmethod
    def forward(
        ctx, loss: Callable, chunk: int, targets: Tensor, H: Tensor, *W: Tensor
    ):
        total, dH, dW = 0.0, torch.empty_like(H), [torch.zeros_like(w) for w in W]
        rows = zip(H.split(chunk), targets.split(chunk), dH.split(chunk), strict=True)
        for H_c, targets_c, dH_c in rows:
            with torch.enable_grad():
                H_c = H_c.detach().requires_grad_()
                part = loss(H_c, targets_c)
            total += part.detach()
            with _without_autocast(H.device):  # where a loop calls backward
                here, *others = torch.autograd.grad(part, (H_c, *W), allow_unused=True)
            dH_c.copy_(here)
            pairs = zip(dW, others, strict=True)
            dW = [sum_of if g is None else sum_of.add_(g) for sum_of, g in pairs]
            del part, here, others, pairs  # before the next chunk's logits are there
        ctx.save_for_backward(dH, *dW)
        return total

    @staticmethod
    def backward(ctx, above):
        dH, *dW = ctx.saved_tensors
        return None, None, None, above * dH, *(above * each for each in dW)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, products are computed in the dtype of their factors."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _of_layers(model: nn.Module, batch: Batch) -> ModelOutput:
    """What the trunk returns; last_hidden_state is (b, t, d). The head gets no row."""
    seen = {name: batch[name] for name in SEEN if name in batch}
    nowhere = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    outputs = []

    def note(module, args, output):
        outputs.append(output)

    hooks = [m.register_forward_hook(note) for m in _around_layers(model)]
    try:
        ids = batch["input_ids"]
        model(input_ids=ids, use_cache=False, logits_to_keep=nowhere, **seen)
    finally:
        for hook in hooks:
            hook.remove()
    output = outputs[-1] if outputs else None  # of the outermost, which returns last
    if not isinstance(output, ModelOutput) or "last_hidden_state" not in output:
        raise ValueError(
            f"the layers of {type(unwrapped(model)).__name__} return no output with a "
            "last_hidden_state, which would be cut in chunks: take loss.summed_loss"
        )
    return output


def _logits(model: nn.Module, output: ModelOutput) -> Tensor:
    """The model's logits (c, V) where its trunk returns this output."""
    H = output.last_hidden_state  # (1, c, d)
    ids = torch.zeros(H.shape[:2], dtype=torch.long, device=H.device)
    with _trunk_returns(model, output):
        return model(input_ids=ids, use_cache=False).logits[0]


@contextmanager
def _trunk_returns(model: nn.Module, output: ModelOutput) -> Iterator[None]:
    """Inside, the modules around the layers return `output`, whatever they get."""
    modules = _around_layers(model)
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            vars(module)["forward"] = lambda *args, **kwargs: output
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            vars(module).pop("forward")
            if own is not None:
                vars(module)["forward"] = own


def _around_layers(model: nn.Module) -> list[nn.Module]:
    """The modules between the model and its layers: the trunk, and what wraps it."""
    model = unwrapped(model)
    layer = dict.fromkeys(
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
    )
    return [
        module
        for module in model.modules()
        if module is not model
        and not isinstance(module, nn.ModuleList)
        and module not in layer
        and any(each in layer for each in module.modules())
    ]


def _behind(model: nn.Module) -> list[nn.Parameter]:
    """What trains and may stand between the layers and the loss, the head among it."""
    model = unwrapped(model)
    head = model.get_output_embeddings()
    before = {id(p) for m in _around_layers(model) for p in m.parameters()}
    own = {id(p) for p in head.parameters()} if head is not None else set()
    return [
        p
        for p in model.parameters()
        if p.requires_grad and (id(p) in own or id(p) not in before)
    ]
