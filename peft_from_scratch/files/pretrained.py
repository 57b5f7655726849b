"""from_pretrained, without tensors that stay random."""

from torch import nn
from transformers import AutoModelForCausalLM


def whole_model(source, **options) -> nn.Module:
    """AutoModelForCausalLM.from_pretrained(source, **options), if nothing is missing.

    Raises  ValueError  the checkpoint has no values for some of the model's tensors:
            transformers draws those at random, and only warns
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        source, output_loading_info=True, **options
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{source} has no values for {len(missing)} of the model's tensors, which "
            f"would stay random: {', '.join(missing[:3])}"
        )
    return model
