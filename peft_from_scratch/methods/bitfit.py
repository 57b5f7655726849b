"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-
models. Ben Zaken et al., arXiv:2106.10199v5.

    h = W0 x + b        only b trains, in every layer, the norms included

A declared exception of the contract: it trains the model's own tensors. Two things to
know. Llama, Qwen 3, Gemma and most models of their time have no biases. And the bias of
a key projection changes nothing where positions are added to embeddings: it adds
q · b_K to every score of a query, and a softmax does not see what all its inputs share.
Its gradient is rounding noise. Rotary models turn each key by its position, the sum
differs between keys, and the bias counts.
"""

from torch import nn

from ..core import adapter
from ..core.adapter import Plan
from ..core.targets import is_idle, named_parameters


def plan(model: nn.Module) -> Plan:
    """The plan of inject; see adapter.plan."""
    names = [name for name, _ in named_parameters(model)]
    biases = [
        name
        for name in names
        if name.rpartition(".")[2] == "bias" and not is_idle(model, name)
    ]
    if not biases:
        raise ValueError(
            f"this {type(model).__name__} has no bias among its {len(names)} tensors "
            "that can learn: Llama and most models since then leave them out, and "
            "BitFit has nothing to train. IA3 is as small: ia3.inject(model)"
        )
    return adapter.plan(model, None, {}, method="bitfit", base_params=biases)


def inject(model: nn.Module) -> list[str]:
    """Freeze the model but for its biases.

    Returns  the names of the biases
    Raises   ValueError   a model without biases, with what to use instead
    Memory   a copy of the biases, so that remove() restores them
    """
    return adapter.apply(model, plan(model))
