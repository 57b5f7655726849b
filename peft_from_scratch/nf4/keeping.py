"""Weights in four bits that stay dequantized while a model answers, within a budget.

A decoding step has few rows, so that dequantizing a weight takes longer than the
product with it. An answer takes many such steps, with the same weights each time:

    with nf4.unpacked(model, budget_bytes=512 << 20) as kept:
        ...                                     answers, with gradients or without
    kept.nbytes                                 0: all of it was freed

Inside, a layer that dequantizes its weight keeps the result if the budget has room for
it. The next products take it from there: the same values, so the same bits. The layers
that come after the budget is spent dequantize as before, for each product.

The price is memory, of which four bits are there to save: d_out d_in itemsize bytes a
layer, the same as without quantization, in parallel to the codes. So nothing in the
library does this in a training step.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..common.check import whole
from .linear import NF4Linear


@contextmanager
def unpacked(model: nn.Module, *, budget_bytes: int) -> Iterator["Unpacked"]:
    """Inside the block, layers in four bits keep their dequantized weights.

    Weights are kept in the order in which the layers are used, and freed at the end of
    the block, also after an error. A block inside another one changes nothing for the
    layers of both: the outer budget counts. A weight that was loaded, moved or changed
    inside the block is dequantized anew; a copy of the model keeps nothing.

    Args
        budget_bytes  that the dequantized weights may take together, at most; 0 for
                      none. All of a model's take d_out d_in itemsize a layer
    Yields   Unpacked: `nbytes` says what they take now
    Raises   ValueError   a budget that is no whole number from 0 on
    """
    whole("budget_bytes", budget_bytes, 0)
    kept = Unpacked(budget_bytes)
    layers = [
        module
        for module in model.modules()
        if isinstance(module, NF4Linear) and module.unpacked is None
    ]
    try:
        for layer in layers:
            layer.unpacked = kept
        yield kept
    finally:
        for layer in layers:
            layer.unpacked = None
        kept.free()


class Unpacked:
    """The dequantized weights that a block keeps.

    budget_bytes  that they may take
    nbytes        that they take now
    """

    def __init__(self, budget_bytes: int):
        self.budget_bytes, self.nbytes = budget_bytes, 0
        self._weights: dict[tuple, tuple] = {}  # (W', what it was made of)
        self._lock = threading.Lock()

    def weight(
        self, layer: NF4Linear, dtype: torch.dtype, stream: tuple
    ) -> Tensor | None:
        """W' (d_out, d_in) of the layer; None where the budget has no room for it.

        A stream of a GPU has its own: what one stream writes, another may not read yet.
        """
        key, codes = (layer, stream), [*layer._buffers.values()]
        state = dtype, *((id(t), _version(t)) for t in codes)
        with self._lock:
            W, of_state, _ = self._weights.get(key, (None, None, None))
            if of_state == state:
                return W
            if W is not None:  # of another dtype, or of codes that are gone
                self._drop(key)
            if self.nbytes + layer.values * dtype.itemsize > self.budget_bytes:
                return None
            shape = (layer.out_features, layer.in_features)
            with torch.inference_mode(False):  # else of no use in training
                W = torch.empty(shape, dtype=dtype, device=layer.device)
            layer.dequantize_into(W)
            self._weights[key] = W, state, codes  # so that no other tensor has their id
            self.nbytes += W.nbytes
            return W

    def free(self) -> None:
        """Let go of all weights."""
        with self._lock:
            for key in list(self._weights):
                self._drop(key)

    def _drop(self, key: tuple) -> None:
        self.nbytes -= self._weights.pop(key)[0].nbytes

    def __deepcopy__(self, memo) -> None:
        return None  # what a copy of the layer has: it is in no block

    def __reduce__(self):
        return type(None), ()


def _version(tensor: Tensor) -> int:
    """How often it was written to; one of inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version
