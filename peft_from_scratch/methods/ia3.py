"""(IA)³: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning. Liu et al., arXiv:2205.05638v2.

    keys      l_k ⊙ (W_k x)
    values    l_v ⊙ (W_v x)
    MLP       W_2 (l_ff ⊙ σ(W_1 x))      one trained vector each, ones at the start

Infused Adapter by Inhibiting and Amplifying Inner Activations: nothing is added, what
is there is scaled. Three vectors a layer, and they fold into the weights.
"""

import torch
from torch import Tensor, nn

from ..core import adapter, left_out
from ..core import targets as targeting
from ..core.adapter import Adapter, Plan, as_matrix, as_stored, factory_kwargs, sizes
from ..core.targets import Targets
from .houlsby import last_projections

# Names of key and value projections, fused ones included: structure cannot tell a key
# from a query.
KEYS_AND_VALUES = (
    r"((k|v|key|value|qkv|kv|kv_b)_proj|key|value|c_attn|query_key_value|Wqkv)"
)


class IA3(Adapter):
    """A frozen projection whose output, or whose input, is scaled by a trained vector.

        h = l ⊙ (W0 x + b)      keys and values      l (d_out, 1)        [1] section 3.3
        h = W0 (l ⊙ x) + b      feedforward          l (1, d_in)

    Args
        base         nn.Linear or Conv1D, frozen here.     W0 (d_out, d_in)
        feedforward  scale the input: the MLP's inner activations
    Returns  (…, d_out), dtype of the base's output
    Memory   d_out or d_in parameters, in float32 on a half-precision base
    Departs  A fused projection of queries, keys and values is scaled as a whole, as in
             PEFT. So is the one that latent attention expands to keys and values.
    Source   [1] arXiv:2205.05638v2
    """

    def __init__(self, base: nn.Module, feedforward: bool = False):
        d_out, d_in = sizes(base)
        super().__init__(base)
        like = factory_kwargs(base)
        shape = (1, d_in) if feedforward else (d_out, 1)
        self.l = nn.Parameter(torch.ones(shape, **like))
        self.feedforward = feedforward

    def forward(self, x: Tensor) -> Tensor:
        l = self.l.flatten()  # noqa: E741 (the paper's letter)
        if self.feedforward:
            return self.base((x * l).to(x.dtype))  # W0 (l ⊙ x) + b
        y = self.base(x)  # W0 x + b
        return (y * l).to(y.dtype)  # l ⊙ (W0 x + b)

    def merged(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """l ⊙ W0, by rows for an output (its bias too), by columns for an input."""
        W = as_matrix(self.base).to(dtype) * self.l.to(dtype)
        merged = {"weight": as_stored(self.base, W)}
        if not self.feedforward and self.base.bias is not None:
            merged["bias"] = self.base.bias.to(dtype) * self.l.to(dtype).flatten()
        return merged


def plan(
    model: nn.Module,
    *,
    targets: Targets | None = None,
    feedforward: Targets | None = None,
) -> Plan:
    """The plan of inject, with its arguments; see adapter.plan."""
    kinds = targeting.kinds(model)
    if targets is None:
        targets = _keys_values_and_mlp(model, kinds)
    elif not isinstance(targets, dict):
        targets = targeting.resolve(model, targets)
    if feedforward is None:
        inner = {name for name in targets if kinds.get(name) == "mlp"}
    elif isinstance(feedforward, set):
        inner = feedforward
    else:
        inner = set(targeting.resolve(model, feedforward))
    _refuse_outside(inner, targets)
    names = {module: name for name, module in targets.items()}
    return adapter.plan(
        model,
        lambda base: IA3(base, names[base] in inner),
        targets,
        method="ia3",
        config=dict(feedforward=sorted(inner)),
    )


def inject(
    model: nn.Module,
    *,
    targets: Targets | None = None,
    feedforward: Targets | None = None,
) -> list[str]:
    """Freeze the model; scale keys, values, and what the MLP's last projection reads.

    Args
        targets      the modules to scale, feedforward ones included; None finds keys,
                     values and the last projection of each MLP
        feedforward  those whose input is scaled; None: those outside of attention
    Returns  the names of the wrapped modules
    Raises   ValueError   no match, no key or value projection of a known name; the
             model as it was
    """
    return adapter.apply(model, plan(model, targets=targets, feedforward=feedforward))


def _keys_values_and_mlp(model, kinds) -> dict[str, nn.Module]:
    """Keys and values, by name, and of each layer's MLP the last projection.

    A mixture of experts has none: its keys and values alone are scaled.
    """
    inner = last_projections(model, ("mlp",), needed=False)
    left_out.warn(model)
    attention = [name for name, kind in kinds.items() if kind == "attention"]
    names = {*targeting.matching(KEYS_AND_VALUES, attention), *inner}
    if not names & set(attention):
        raise ValueError(
            f"no projection of this {type(model).__name__}'s attention has a name that "
            f"says key or value; it has {', '.join(attention[:6])}. Name them: targets="
        )
    linear = targeting.projections(model)
    return {name: module for name, module in linear.items() if name in names}


def _refuse_outside(inner, targets) -> None:
    outside = sorted(set(inner) - set(targets))
    if outside:
        raise ValueError(
            f"feedforward names {outside[0]}, which is none of the targets: "
            f"{', '.join(list(targets)[:6])}"
        )
