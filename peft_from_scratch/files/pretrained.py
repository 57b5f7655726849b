"""from_pretrained, without its noise and without tensors that stay random."""

from collections.abc import Iterator
from contextlib import contextmanager

import transformers
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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no warnings of transformers while the block runs."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
