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

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..common import scoped
from ..core import adapter
from ..core.adapter import Plan
from ..core.targets import named_parameters


def plan(model: nn.Module) -> Plan:
    """The plan of inject; see adapter.plan."""
    names = [name for name, _ in named_parameters(model)]
    biases = [name for name in names if name.rpartition(".")[2] == "bias"]
    if not biases:
        raise ValueError(
            f"this {type(model).__name__} has no bias among its {len(names)} "
            "tensors: Llama and most models since then leave them out, and "
            "BitFit has nothing to train. IA3 is as small: ia3.inject(model)"
        )
    planned = adapter.plan(model, None, {}, method="bitfit", base_params=biases)
    reached = reached_by_text(model, planned.base_params)
    if not reached:
        raise ValueError(
            f"no text gives any of the {len(biases)} biases of this "
            f"{type(model).__name__} a gradient, {biases[0]} for one: text does not "
            "pass through them. IA3 is as small: ia3.inject(model)"
        )
    return replace(planned, base_params=reached)


def inject(model: nn.Module) -> list[str]:
    """Freeze the model but for its biases that a text gives a gradient.

    Returns  the names of the biases
    Raises   ValueError   a model without such biases, with what to use instead
    Memory   a copy of the biases, so that remove() restores them
    """
    return adapter.apply(model, plan(model))


def reached_by_text(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the parameters that the logits of a token depend on.

    All of them for a model without an embedding of tokens, or that needs more than
    tokens: what it reads is not known here. The model is left as it was.
    """
    parameters = dict(named_parameters(model))
    if adapter.vocabulary(model) is None:
        return tuple(names)
    flags = {p: p.requires_grad for p in parameters.values()}
    token = torch.zeros(1, 1, dtype=torch.long, device=parameters[names[0]].device)
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
        with scoped.mode(model, training=False), torch.enable_grad():
            logits = adapter.unwrapped(model)(input_ids=token, use_cache=False).logits
            if not logits.requires_grad:
                return ()
            asked = [parameters[name] for name in names]
            gradients = torch.autograd.grad(logits.sum(), asked, allow_unused=True)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return tuple(names)
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    pairs = zip(names, gradients, strict=True)
    return tuple(name for name, gradient in pairs if gradient is not None)
