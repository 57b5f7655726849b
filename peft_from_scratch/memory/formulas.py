"""Parameters of a LoRA and bytes of AdamW, by formula: no model is needed."""

from collections.abc import Iterable

STEP_BYTES = 4  # torch's AdamW counts the steps of each tensor in a float32 scalar


def lora_parameters(shapes: Iterable[tuple[int, int]], r: int) -> int:
    """Parameters of a LoRA on projections of the given (d_out, d_in).

    sum over the projections of  r (d_in + d_out)
    """
    return sum(r * (d_in + d_out) for d_out, d_in in shapes)


def adamw_bytes(parameters: int, tensors: int, itemsize: int = 4) -> int:
    """Bytes of AdamW's state: two moments a parameter and a step count a tensor.

    2 · parameters · itemsize + 4 · tensors
    """
    return 2 * parameters * itemsize + STEP_BYTES * tensors
