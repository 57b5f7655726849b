"""Parameters of a LoRA, bytes of AdamW and of NF4, by formula: no model is needed."""

import math
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


def nf4_bytes(values: int, block: int = 64, double: bool = True) -> int:
    """Bytes of a tensor in NF4: two codes a byte, and a constant for each block.

    ⌈n / 2⌉ + 4 ⌈n / block⌉                                  with float32 constants
    ⌈n / 2⌉ + ⌈n / block⌉ + 4 ⌈blocks / 256⌉ + 4             double: constants in 8 bits
    """
    blocks = math.ceil(values / block)
    constants = blocks + 4 * math.ceil(blocks / 256) + 4 if double else 4 * blocks
    return math.ceil(values / 2) + constants
