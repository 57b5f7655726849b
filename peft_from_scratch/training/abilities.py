"""What a recipe asks and a model cannot do is refused before anything is trained.

No list of architectures could be complete, so the model is asked: its loss in chunks
must be its plain loss. transformers says of a layer itself that it can be checkpointed.
"""

import torch
from torch import nn

from ..common import scoped
from ..core.decoder_probe import CLOSE, CLOSE_IN_HALF
from ..core.targets import unwrapped
from .chunked_loss import summed_loss_in_chunks
from .config import TrainConfig
from .gradient_checkpointing import decoder_layers
from .loss import summed_loss

TOKENS, CHUNK = 7, 2  # of the rows that the model is asked with; a chunk crosses rows


def refuse_unable(model: nn.Module, config: TrainConfig) -> None:
    """ValueError unless the model can do what the recipe asks of it.

    Weights, flags and random generators are as before.

    Raises  ValueError  checkpointing without layers to be computed twice; a loss in
            chunks of a model that has no such loss, or another one
    """
    if config.checkpointing:
        decoder_layers(model)
    if config.chunk is not None:
        _refuse_chunks(model)


@torch.no_grad()
def _refuse_chunks(model: nn.Module) -> None:
    weight = unwrapped(model).get_input_embeddings().weight
    ids = torch.arange(2 * TOKENS, device=weight.device).view(2, TOKENS) % len(weight)
    batch = {"input_ids": ids, "labels": ids}
    with scoped.mode(model, training=False):
        plain = summed_loss(model, batch).double()
        chunked = summed_loss_in_chunks(model, batch, chunk=CHUNK).double()
    close = CLOSE if weight.dtype.itemsize >= 4 else CLOSE_IN_HALF
    if not abs(chunked - plain) <= close * abs(plain):
        raise ValueError(
            f"the loss of this {type(unwrapped(model)).__name__} in chunks is "
            f"{chunked:.6g} nats, and {plain:.6g} at once: it reads more behind its "
            "layers than the hidden states. Leave chunk at None"
        )
