"""Full fine-tuning: Improving Language Understanding by Generative Pre-Training.
Radford et al., OpenAI 2018, section 3.2.

    W ← W0 + ΔW        ΔW (d_out, d_in) free, for every parameter; nothing is wrapped

The baseline that every other method is measured against, and the declared exception of
the contract: it trains the model's own tensors, so that `remove` needs the originals.
"""

from torch import nn

from ..core import adapter
from ..core.adapter import Plan
from ..core.targets import QuantizedLinear, named_modules, named_parameters


def plan(model: nn.Module, *, keep_original: bool = False) -> Plan:
    """The plan of inject, with its arguments; see adapter.plan."""
    for name, module in named_modules(model):
        if isinstance(module, QuantizedLinear):
            raise ValueError(
                f"{name} is a {type(module).__name__}: full fine-tuning moves every "
                "weight, and codes cannot be moved. Load the base in full, or put "
                "adapters beside it"
            )
    return adapter.plan(
        model,
        None,
        {},
        method="full",
        base_params=[name for name, _ in named_parameters(model)],
        keep_originals=keep_original,
    )


def inject(model: nn.Module, *, keep_original: bool = False) -> list[str]:
    """Let every parameter of the model train.

    Args
        keep_original  keep a copy of all weights, so that remove() can restore them
    Returns  the names of the trained parameters; tied weights count once
    Raises   ValueError   weights in four bits, which cannot train
    Memory   with keep_original, the model's bytes once more
    """
    return adapter.apply(model, plan(model, keep_original=keep_original))
