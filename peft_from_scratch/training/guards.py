"""Errors for what fails silently elsewhere.

refuse_other_flags   something trains that inject() froze, or the other way round
refuse_not_finite    a loss or a gradient is NaN or infinite
refuse_unmoved       a trainable tensor that three steps have not moved
"""

import math

from torch import Tensor, nn

from ..common.digest import tensor_crc

MOVED_AFTER = 3  # steps: a LoRA's B moves in the first, A, behind B = 0, in the second


class Diverged(FloatingPointError):
    """A loss or a gradient is not a finite number; the message holds step and rate."""


def refuse_other_flags(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """ValueError unless exactly the declared trainable parameters require gradients."""
    if not parameters:
        raise ValueError(
            f"this {type(model).__name__} has nothing to train: inject adapters first, "
            "with lora.inject(model) for example, or full.inject(model)"
        )
    declared = {id(parameter) for parameter in parameters.values()}
    named = dict(model.named_parameters())
    wrong = [n for n, p in named.items() if p.requires_grad != (id(p) in declared)]
    if wrong:
        raise ValueError(
            f"{wrong[0]} has requires_grad={named[wrong[0]].requires_grad}, against "
            f"what inject() declared, and so have {len(wrong) - 1} more; leave the "
            "flags to inject()"
        )


def refuse_not_finite(
    loss: float, norm: float, *, step: int, steps: int, lr: float
) -> None:
    """Diverged if a step's loss or the norm of its gradient is no finite number."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(
            f"step {step} of {steps}, learning rate {lr:.3g}: "
            f"the loss is {loss} and the norm of the gradient {norm}. The weights "
            "are those before this step. Try a tenth of the rate, more warm-up, or "
            "float32"
        )


def fingerprints(parameters: dict[str, nn.Parameter]) -> dict[str, int]:
    """A checksum of each parameter, to see later whether it has moved."""
    return {name: tensor_crc(parameter) for name, parameter in parameters.items()}


def refuse_unmoved(
    parameters: dict[str, nn.Parameter],
    moments: dict[str, dict[str, Tensor]],
    before: dict[str, int],
) -> None:
    """RuntimeError naming the tensors that the first steps did not move, and why.

    Weight decay alone moves a tensor that learns nothing. So the optimizer's first
    moment counts as well: it is zero where every gradient was.

    Args
        moments  {name: AdamW's state of the parameter}
        before   their fingerprints before the first step
    """
    now, reasons = fingerprints(parameters), {}
    for name, parameter in parameters.items():
        moment = moments.get(name, {}).get("exp_avg")
        if moment is None:
            reasons[name] = "no gradient reached it"
        elif not moment.any():
            reasons[name] = "its gradient is zero"
        elif now[name] == before[name]:
            reasons[name] = f"its updates vanish in {parameter.dtype}"
    if reasons:
        first = "; ".join(f"{n}: {why}" for n, why in list(reasons.items())[:3])
        raise RuntimeError(
            f"{len(reasons)} of {len(now)} trainable tensors did not move in "
            f"{MOVED_AFTER} steps ({first}). Known causes: an adapter on a module that "
            "the forward pass does not use; reentrant gradient checkpointing over "
            "frozen embeddings; a rate whose updates half precision rounds away"
        )
