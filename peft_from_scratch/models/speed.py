"""How fast a device multiplies matrices of SmolLM2's shapes, and in which dtype most.

bfloat16 halves the bytes of a model. Whether it also saves time depends on the chip:
processors with instructions for it multiply four times as fast as in float32, others
imitate it and are slower. So nothing is looked up here: both are measured.
"""

import math
import time
from dataclasses import dataclass
from functools import lru_cache

import torch

HIDDEN, MLP, DEPTH = 576, 1536, 30  # SmolLM2-135M's sizes
ROWS = 600  # tokens of a training step
WORTH_IT = 1.5  # times float32's rate, from which on bfloat16 is chosen


@dataclass(frozen=True)
class Choice:
    """The dtype that a device computes in, and why, for the head of a run."""

    dtype: torch.dtype
    reason: str


def fast_dtype(device: torch.device) -> Choice:
    """bfloat16 where this device multiplies much faster in it; else float32.

    On a CPU, both are measured, once a process: 0.4 s. CUDA says itself whether it has
    bfloat16. On MPS nobody has measured it, and float32 stays.
    """
    if device.type == "cpu":
        return _measured_on_cpu(torch.get_num_threads())
    if device.type == "cuda" and torch.cuda.is_bf16_supported(
        including_emulation=False
    ):
        return Choice(torch.bfloat16, "this GPU multiplies bfloat16 matrices")
    return Choice(torch.float32, f"no fast bfloat16 is known on this {device.type}")


@lru_cache
def _measured_on_cpu(threads: int) -> Choice:
    """The choice for the CPU; other threads, another measurement."""
    device = torch.device("cpu")
    full, half = (
        measured_rate(device, ROWS, 0.2, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    rates = f"{half / 1e9:.0f} GFLOP/s in bfloat16, {full / 1e9:.0f} in float32"
    fast = half >= WORTH_IT * full
    dtype = torch.bfloat16 if fast else torch.float32
    return Choice(dtype, f"this CPU's products reach {rates}")


def measured_rate(
    device: torch.device,
    rows: int,
    seconds: float,
    dtype: torch.dtype = torch.float32,
) -> float:
    """FLOP/s of x W^T, with a W of its own for each layer, each at its fastest.

    x (rows, 576), W (1536, 576). Fastest, since other programs only ever slow it down.
    """
    kind = {"device": device, "dtype": dtype}
    x = torch.randn(rows, HIDDEN, **kind)
    layers = [torch.randn(MLP, HIDDEN, **kind) for _ in range(DEPTH)]
    fastest = [math.inf] * DEPTH
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or math.isinf(fastest[-1]):
        for layer, W in enumerate(layers):
            start = time.perf_counter()
            torch.nn.functional.linear(x, W)
            synchronize(device)
            fastest[layer] = min(fastest[layer], time.perf_counter() - start)
    return 2 * rows * HIDDEN * MLP * DEPTH / sum(fastest)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it, so that a clock tells."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
