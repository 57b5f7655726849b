"""Gradient checkpointing: keep a layer's input, and compute the layer once more.

Backward needs what forward computed on the way. A model of L layers keeps L times what
one layer keeps, k bytes; checkpointed, it keeps each layer's input, i bytes, and what
one layer keeps:

    bytes of activations    L k              without        (k is many times i)
                            L i + k          checkpointed, for one more forward pass

Chen et al. (arXiv:1604.06174) propose it, with √L segments; here, as in transformers, a
segment is a layer. Computed once more must mean computed the same: dropout has to draw
the same numbers, and autocast to round in the same places.

torch.utils.checkpoint has this form as use_reentrant=True, with two traps that are not
here. A frozen embedding's output needs no gradient, so the layers behind it would get
none; here a result always needs one. And what a layer gets by keyword is an input too,
as a prefix is. torch's other form hooks each tensor that autograd saves, and is what
transformers takes by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.modeling_layers import GradientCheckpointingLayer

from ..common.scoped import rng_state, set_rng_state
from ..core.adapter import unwrapped


class Checkpoint(torch.autograd.Function):
    """y = f(x): forward keeps x and the random state, backward computes y again.

    backward    y = f(x), with its graph      dx, dθ by backward from y
    """

    @staticmethod
    def forward(ctx, needed, f, device, *x):
        ctx.f, ctx.device, ctx.random = f, device, rng_state(device)
        ctx.autocast = _autocast(device)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*x)
        return f(*x)

    @staticmethod
    def backward(ctx, *dy):
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "torch.autograd.grad and backward(inputs=…) would miss the parameters "
                "inside checkpoint(): take backward() without inputs"
            )
        x = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        now = rng_state(ctx.device)
        set_rng_state(ctx.random, ctx.device)
        try:
            with torch.enable_grad(), ctx.autocast, saved_by_value():
                y = ctx.f(*x)
        finally:
            set_rng_state(now, ctx.device)
        pairs = [(a, b) for a, b in zip(y, dy, strict=True) if _learns(a, b)]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        return None, None, None, *(t.grad for t in x)


def saved_by_value() -> AbstractContextManager[None]:
    """Inside, autograd keeps the values that a parameter has now.

    By itself it keeps the parameter, which ZeRO's stage 3 takes the values from as soon
    as the module returns (memory/shards.py): backward would read NaN. So the weights of
    a layer that is computed again are there until its backward pass is done.
    """

    def pack(tensor: Tensor) -> Tensor:
        return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def checkpoint(function: Callable, *args, **kwargs):
    """function(*args, **kwargs), of which only the arguments are kept for backward.

    Gradients are those without it, bit for bit where the function computes the same
    bits twice. They come by `.backward()` alone, which runs inside of backward again.

    Args
        function      a layer, for example; must not write into its arguments. Tensors
                      that need a gradient must be arguments, or leaves
        args, kwargs  tensors, also in lists, tuples and dicts, and anything else
    Returns  what it returns; its floating-point tensors need a gradient
    Raises   RuntimeError   in backward, which torch.autograd.grad has called
    Memory   the tensors among the arguments, and the state of the random generators
    Source   Chen et al., arXiv:1604.06174
    """
    if isinstance(function, partial):  # transformers binds a layer's keywords so
        args = (*function.args, *args)
        function, kwargs = function.func, function.keywords | kwargs
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    leaves, tree = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    x = [leaves[place] for place in places]
    for place in places:
        leaves[place] = None  # autograd keeps them, and f gets them
    form = {}

    def f(*x: Tensor) -> tuple:
        filled = list(leaves)
        for place, tensor in zip(places, x, strict=True):
            filled[place] = tensor
        args, kwargs = tree_unflatten(filled, tree)
        y, form["of y"] = tree_flatten(function(*args, **kwargs))
        return tuple(y)

    device = x[0].device if x else torch.device("cpu")
    needed = torch.empty(0, requires_grad=True)  # the result always needs a gradient
    y = Checkpoint.apply(needed, f, device, *x)
    return tree_unflatten(list(y), form["of y"])


def recomputed(model: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """`checkpointed(model)` where it is wanted, and nothing elsewhere."""
    return checkpointed(model) if wanted else nullcontext()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers can checkpoint.

    Raises  ValueError  a model without any
    """
    layers = [
        module
        for module in unwrapped(model).modules()
        if isinstance(module, GradientCheckpointingLayer)
    ]
    if not layers:
        raise ValueError(
            f"this {type(unwrapped(model)).__name__} has no decoder layers that "
            "transformers checkpoints: leave checkpointing off, or call "
            "checkpoint(function, *args) around its parts"
        )
    return layers


@contextmanager
def checkpointed(model: nn.Module, *, every: int = 1) -> Iterator[None]:
    """The model's decoder layers are checkpointed inside, in training mode.

    Afterwards the layers are as they were, also in what they do about it.

    Args
        every   which of them: 1 for all, 2 for every second one from the first on, …
    Raises  ValueError  a model without decoder layers of transformers
    """
    names = {"gradient_checkpointing": True, "_gradient_checkpointing_func": checkpoint}
    layers = decoder_layers(model)[::every]
    before = [
        {n: vars(layer)[n] for n in names if n in vars(layer)} for layer in layers
    ]
    try:
        for layer in layers:
            vars(layer).update(names)
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name in names:
                vars(layer).pop(name, None)
            vars(layer).update(values)


def _learns(y, dy) -> bool:
    """Whether a result has a gradient to pass on."""
    return dy is not None and isinstance(y, Tensor) and y.requires_grad


def _autocast(device: torch.device) -> AbstractContextManager:
    """Autocast as it is set now, to be set so again."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    dtype = torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, torch.is_autocast_enabled(kind))
