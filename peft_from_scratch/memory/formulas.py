"""Parameters of a LoRA, bytes of AdamW and of NF4, by formula: no model is needed."""

import math
from collections.abc import Iterable, Sequence

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


def zero_bytes(
    trainable: Iterable[int],
    frozen: Iterable[int] = (),
    *,
    ranks: int,
    stage: int,
    itemsize: int = 4,
) -> dict[str, int]:
    """Bytes that ZeRO leaves on each rank, between backward and the optimizer's step.

        weights     Ψ itemsize                 in stage 3 its parts, and a placeholder
        gradients   Ψ itemsize                 in stages 2 and 3 its parts
        optimizer   its parts of m and v, and of a float32 master where itemsize is 2
        a part      ceil(numel / ranks) values of each tensor

    Args
        trainable, frozen   values of each tensor; only the trainable ones are updated
        ranks               N
    Returns  {"weights", "gradients", "optimizer"}; the padding is in it
    """
    trainable, frozen = list(trainable), list(frozen)
    part = sum(-(-numel // ranks) for numel in trainable)
    every, every_part = sum(trainable) + sum(frozen), 0
    for numel in trainable + frozen:
        every_part += -(-numel // ranks) + 1  # the placeholder that keeps its shape
    states = 2 * max(itemsize, 4) + (4 if itemsize == 2 else 0)
    return {
        "weights": (every_part if stage == 3 else every) * itemsize,
        "gradients": (part if stage > 1 else sum(trainable)) * itemsize,
        "optimizer": part * states + STEP_BYTES * len(trainable),
    }


def fsdp2_bytes(
    trainable: Iterable[Sequence[int]],
    frozen: Iterable[Sequence[int]] = (),
    *,
    rank: int = 0,
    ranks: int,
    itemsize: int = 4,
) -> dict[str, int]:
    """Bytes that FSDP2 leaves on a rank, between backward and the optimizer's step.

    A tensor is cut by rows: rank r has rows r c to (r + 1) c of it, c = ceil(rows / N),
    as far as there are so many. torch keeps weights padded to c rows on every rank, and
    gradients and states as they are.

    Args
        trainable, frozen   shape of each tensor
        rank                the rank that is counted; rank 0 has the most
        ranks               N
    Returns  {"weights", "gradients", "optimizer"}
    """
    own = padded = tensors = 0
    for shape in trainable:
        row, c = math.prod(shape[1:]), -(-shape[0] // ranks)
        own += row * min(max(shape[0] - rank * c, 0), c)
        padded, tensors = padded + row * c, tensors + 1
    padded += sum(math.prod(s[1:]) * -(-s[0] // ranks) for s in frozen)
    return {
        "weights": padded * itemsize,
        "gradients": own * itemsize,
        "optimizer": 2 * own * max(itemsize, 4) + STEP_BYTES * tensors,
    }


def zero_traffic(
    trainable: Iterable[int],
    *,
    ranks: int,
    stage: int,
    itemsize: int = 4,
    gathered: Iterable[int] = (),
) -> int:
    """Bytes that each rank sends in one step of ZeRO with one backward pass.

        (N - 1) ceil(numel / N) itemsize     for each tensor and each time that it is
                                             reduce-scattered or gathered

    A trainable tensor is reduce-scattered once. In stages 1 and 2 it is gathered once,
    after its update, so that all of it is 2 Ψ (N - 1) / N values. In stage 3 a tensor,
    trainable or frozen, is gathered for forward, and for backward if backward reads it:
    3 Ψ (N - 1) / N if all train and backward reads all.

    Args
        gathered  stage 3: the values of each tensor, once for each time it is gathered
    """
    moved = [*trainable] * (2 if stage < 3 else 1) + [*gathered] * (stage == 3)
    return sum((ranks - 1) * -(-numel // ranks) * itemsize for numel in moved)


def nf4_bytes(values: int, block: int = 64, double: bool = True) -> int:
    """Bytes of a tensor in NF4: two codes a byte, and a constant for each block.

    ⌈n / 2⌉ + 4 ⌈n / block⌉                                  with float32 constants
    ⌈n / 2⌉ + ⌈n / block⌉ + 4 ⌈blocks / 256⌉ + 4             double: constants in 8 bits
    """
    blocks = math.ceil(values / block)
    constants = blocks + 4 * math.ceil(blocks / 256) + 4 if double else 4 * blocks
    return math.ceil(values / 2) + constants
