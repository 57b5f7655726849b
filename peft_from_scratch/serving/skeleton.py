"""A model's modules without its numbers: what an adapter is checked against.

While a model serves, slots stand in front of its projections, so that no injection can
be planned on it. Its skeleton has the same modules, under the same names, of the same
sizes, and takes no memory.
"""

import copy

from torch import nn


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model whose tensors are all on torch's device "meta"."""
    empty = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False)
        for p in model.parameters()
    }
    empty |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, empty)
