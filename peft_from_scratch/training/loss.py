"""The loss of every method: cross-entropy over label tokens, and how steps add it up.

Three choices are worth a sentence. A step's sum is divided by the label tokens of the
*whole* step, not by those of a micro-batch and then by the number of micro-batches:
otherwise short answers would weigh more as soon as a step is split. Logits are computed
at labelled positions only, before the head, since nothing reads the others. And no
attention mask is passed: padding stands to the right of every real token, where a
causal model cannot see it, and attention without a mask is the faster path.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.scoped import mode
from ..core.adapter import unwrap_compiled
from ..tasks.templates import IGNORED, collate

EncodedExample = tuple[
    list[int], list[int]
]  # input_ids, labels: as encode_row makes them
Batch = dict[str, Tensor]


def batch_of(rows: list[EncodedExample], device: torch.device) -> Batch:
    """The rows as tensors on the device, padded on the right."""
    # Any token does for padding: no real token sees it, and it has no label. The first
    # token of a row is not the pad token, which transformers warns of without a mask.
    batch = collate(rows, pad_id=rows[0][0][0])
    return {name: tensor.to(device) for name, tensor in batch.items()}


def label_tokens(batch: Batch) -> int:
    """How many tokens of a batch the loss is summed over."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the label tokens of a batch.

        - sum over labelled tokens (i, t) of  log softmax(logits[i, t-1])[label[i, t]]

    The model computes those logits alone, (labelled, vocabulary). The few architectures
    that can only compute all of them do so, and the right ones are picked here.

    Returns  a scalar in nats; float32 where the model computes in half precision
    """
    labels = batch["labels"][:, 1:]
    keep = F.pad(labels != IGNORED, (0, 1))  # (b, t): the next token has a label
    chosen = {"logits_to_keep": keep} if can_choose_logits(model) else {}
    logits = model(input_ids=batch["input_ids"], use_cache=False, **chosen).logits
    if logits.dim() == 3:  # (b, t, vocabulary)
        logits = logits[keep]
    targets = labels[labels != IGNORED]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, reduction="sum")


def accumulate_gradients(model: nn.Module, batches: list[Batch]) -> tuple[float, int]:
    """Add to `.grad` the gradient of the mean loss over the batches' label tokens.

    Returns  (nats per label token, label tokens)
    Raises   RuntimeError   the loss does not depend on any trainable tensor
    """
    tokens = sum(map(label_tokens, batches))
    total = 0.0
    for batch in batches:
        loss = summed_loss(model, batch) / tokens
        if not loss.requires_grad:
            raise RuntimeError(
                "the loss does not depend on any trainable tensor: the forward pass "
                "does not use the adapted modules, or reentrant gradient checkpointing "
                "cut the graph at frozen embeddings"
            )
        loss.backward()
        total += loss.detach()
    return total.item(), tokens


@torch.no_grad()
def mean_loss(model: nn.Module, rows: list[EncodedExample], *, batch: int = 8) -> float:
    """Nats per label token over all rows, with dropout off, `batch` rows at a time."""
    device = next(model.parameters()).device
    by_length = sorted(rows, key=lambda row: len(row[0]))  # hardly any padding
    total, tokens = 0.0, 0
    with mode(model, training=False):
        for start in range(0, len(rows), batch):
            part = batch_of(by_length[start : start + batch], device)
            total += summed_loss(model, part).item()
            tokens += label_tokens(part)
    return total / tokens


def can_choose_logits(model: nn.Module) -> bool:
    return (
        "logits_to_keep" in inspect.signature(unwrap_compiled(model).forward).parameters
    )
