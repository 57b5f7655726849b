"""The loss of every method: cross-entropy over label tokens.

Three choices are worth a sentence. A step's sum is divided by the label tokens of the
*whole* step, not by those of a micro-batch and then by the number of micro-batches:
otherwise short answers would weigh more as soon as a step is split. Logits are computed
at labelled positions only, before the head, since nothing reads the others. And no
attention mask is passed: padding stands to the right of every real token, where a
causal model cannot see it, and attention without a mask is the faster path.
"""

import inspect
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.scoped import mode
from ..core.adapter import unwrapped
from ..tasks.templates import IGNORED
from .batch import Batch, Row, batch_of, label_tokens, unpacked

SEEN = ("position_ids", "attention_mask")  # what a model reads of a pack besides
Summed = Callable[[nn.Module, Batch], Tensor]  # as summed_loss


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the label tokens of a batch.

        - sum over labelled tokens (i, t) of  log softmax(logits[i, t-1])[label[i, t]]

    Returns  a scalar in nats; float32 where the model computes in half precision
    """
    logits, targets, _ = label_logits(model, batch)
    return F.cross_entropy(widened(logits), targets, reduction="sum")


def token_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each label token of a batch, before any sum.

    Returns  losses (b, t - 1) in nats, 0 at tokens without a label; and which of them
             have one, (b, t - 1) bool; of b rows of t tokens, packed or not
    """
    logits, targets, keep = label_logits(model, batch)
    labelled = keep[:, :-1]
    each = F.cross_entropy(widened(logits), targets, reduction="none")
    losses = each.new_zeros(labelled.shape)
    losses[labelled] = each
    return unpacked(losses, batch), unpacked(labelled, batch)


def micro_batch_loss(
    model: nn.Module, batch: Batch, tokens: int, summed: Summed = summed_loss
) -> Tensor:
    """A micro-batch's part of the step's loss: its sum over the step's label tokens.

    Args
        tokens  label tokens of the whole step, all of its micro-batches together
        summed  how the sum is computed: at once, or in chunks (chunked_loss.py)
    Returns  a scalar; over the micro-batches they add up to nats per label token
    Raises   RuntimeError   the loss does not depend on any trainable tensor
    """
    loss = summed(model, batch) / tokens
    if not loss.requires_grad:
        raise RuntimeError(
            "the loss does not depend on any trainable tensor: the forward pass "
            "does not use the adapted modules, or reentrant gradient checkpointing "
            "cut the graph at frozen embeddings"
        )
    return loss


def accumulate_gradients(model: nn.Module, batches: list[Batch]) -> tuple[float, int]:
    """Add to `.grad` the gradient of the mean loss over the batches' label tokens.

    For what needs a gradient and no training loop: a measurement, a benchmark.

    Returns  (nats per label token, label tokens)
    Raises   RuntimeError   the loss does not depend on any trainable tensor
    """
    tokens = sum(map(label_tokens, batches))
    total = 0.0
    for batch in batches:
        loss = micro_batch_loss(model, batch, tokens)
        loss.backward()
        total += loss.detach()
    return total.item(), tokens


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    rows: list[Row],
    *,
    batch: int = 8,
    collate: Callable[[list[Row]], Batch] | None = None,
    summed: Summed = summed_loss,
) -> float:
    """Nats per label token over all rows, with dropout off, `batch` rows at a time.

    Args
        collate  makes a batch of rows, as Packing.batch does; None: padded
        summed   as of micro_batch_loss
    """
    device = next(model.parameters()).device
    collate = collate or partial(batch_of, device=device)
    by_length = sorted(rows, key=lambda row: len(row[0]))  # hardly any padding
    total, tokens = 0.0, 0
    with mode(model, training=False):
        for start in range(0, len(rows), batch):
            part = collate(by_length[start : start + batch])
            total += summed(model, part).item()
            tokens += label_tokens(part)
    return total / tokens


def label_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a batch where the next token has a label, and those labels.

    Returns  logits (labelled, vocabulary) and targets (labelled,), in reading order;
             and the positions of the logits, (b, t) bool
    """
    labels = batch["labels"][:, 1:]
    keep = F.pad(labels != IGNORED, (0, 1))  # (b, t): the next token has a label
    seen = {name: batch[name] for name in SEEN if name in batch}
    logits = logits_at(model, batch["input_ids"], keep, **seen)
    return logits, labels[labels != IGNORED], keep


def logits_at(model: nn.Module, input_ids: Tensor, keep, **options) -> Tensor:
    """Logits at some positions, which are all that the model's head computes.

    The few architectures that can only compute all of them do so, and the right ones
    are picked here.

    Args
        keep     positions: (b, t) bool, or a slice of the t
        options  more arguments of the model's forward
    Returns  (kept, vocabulary), or (b, kept, vocabulary) for a slice; the model's dtype
    """
    if can_choose_logits(model):
        options["logits_to_keep"] = keep
    logits = model(input_ids=input_ids, use_cache=False, **options).logits
    if isinstance(keep, Tensor) and logits.dim() == 3:  # (b, t, vocabulary)
        logits = logits[keep]
    return logits


def widened(logits: Tensor) -> Tensor:
    """Logits in float32 at least: a softmax in half precision loses small ones."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def can_choose_logits(model: nn.Module) -> bool:
    """Whether the model's forward takes the positions whose logits are wanted."""
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters
