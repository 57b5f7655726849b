"""L4: how many parameters a LoRA has beside one large matrix. Counted, not computed.

A (r, d_in) and B (d_out, r)        r (d_in + d_out) in the place of d_in · d_out
"""

from collections.abc import Sequence

import torch
from torch import nn

from ..adapter import trainable
from ..claim import Claim, Measured, Rule
from ..methods import lora
from ..runs import Run

D_OUT, D_IN, RANK = 4096, 4096, 16


def config(d_out: int = D_OUT, d_in: int = D_IN, r: int = RANK) -> dict:
    return {"experiment": "counting", "d_out": d_out, "d_in": d_in, "r": r}


def compute(config: dict) -> dict:
    """Count the parameters of a LoRA on a projection of the given shape.

    Returns  trainable, full (what full fine-tuning trains), percent (their ratio)
    """
    counted = count(config["d_out"], config["d_in"], config["r"])
    full = config["d_out"] * config["d_in"]
    return {"trainable": counted, "full": full, "percent": 100 * counted / full}


def count(d_out: int, d_in: int, r: int) -> int:
    """The parameters that a LoRA trains beside a Linear of (d_out, d_in): counted.

    The layer is made on torch's meta device, which has shapes and no memory.
    """
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(d_in, d_out, bias=False))
        lora.inject(model, r=r, targets={"0": model[0]})
    return sum(parameter.numel() for parameter in trainable(model).values())


def measured(runs: Sequence[Run]) -> Measured:
    (run,) = runs
    value = run.result["trainable"]
    return Measured(value, value, value, seeds=())


CLAIMS = (
    Claim(
        id="L4",
        notebook="04",
        statement=(
            "On a weight matrix of 4096 x 4096, LoRA of rank 16 trains 131,072 "
            "parameters, 0.78 % of the matrix"
        ),
        rule=Rule(
            words=(
                "Parameters counted in a LoRA of rank 16 beside a 4096 x 4096 layer; "
                "131,072 of 16,777,216 are 0.78 %"
            ),
            unit="parameters",
            verdicts=("refuted here", "confirmed", "refuted here"),
            edges=(131_071.5, 131_072.5),
        ),
        configs=lambda scale: [config()],
        measured=measured,
        measuring=(count,),
    ),
)
