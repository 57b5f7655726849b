"""LoftQ's initialization against PEFT's own pieces: its NF4 and its decomposition."""

import pytest
import torch

bnb = pytest.importorskip("bitsandbytes")
loftq_utils = pytest.importorskip("peft.utils.loftq_utils")

from architectures import build  # noqa: E402

from peft_from_scratch.core.adapter import adapters, as_matrix  # noqa: E402
from peft_from_scratch.core.targets import projections  # noqa: E402
from peft_from_scratch.methods import loftq  # noqa: E402


def of_peft(W, r):
    """One turn of loftq_init, which PEFT runs on a GPU alone: (W', B A).

    Flat, because bitsandbytes reads rows shorter than a block wrongly on a CPU.
    """
    options = dict(blocksize=64, quant_type="nf4")
    codes, state = bnb.functional.quantize_4bit(W.flatten(), **options)
    plain = bnb.functional.dequantize_4bit(codes, state).view(W.shape)
    halves = loftq_utils._low_rank_decomposition(W - plain, reduced_rank=r)
    return plain, halves["L"] @ halves["R"]


def test_a_model_starts_where_pefts_would():
    base, model = build("llama"), build("llama")
    loftq.inject(model, r=4, alpha=12, double=False)
    for name, module in adapters(model).items():
        plain, update = of_peft(as_matrix(projections(base)[name]).detach(), 4)
        assert torch.allclose(module.base.weight, plain, atol=1e-6)
        assert torch.allclose(module.delta(torch.float32), update, atol=1e-5)
