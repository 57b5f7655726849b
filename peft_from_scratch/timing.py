"""What an adapter costs at inference: one decode step against the base model's.

The candidates take turns, round by round, in one process, so that a machine that slows
down slows all of them; the figure is the median of the rounds' ratios, with its range.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Decoding:
    """Milliseconds of a one-token step; its ratio to the base's in the same round."""

    ms: float
    ratio: float
    low: float  # smallest ratio of the rounds
    high: float  # largest ratio of the rounds


def against_first(
    candidates: dict[str, tuple[nn.Module, list[int]]],
    *,
    tokens: int = 12,
    rounds: int = 7,
) -> dict[str, Decoding]:
    """Time greedy decoding of each candidate, in turn, against the first one.

    Args
        candidates  name -> (model, the tokens to start from)
        tokens      decoded in a round; the prompt's own pass is not in the time
        rounds      counted rounds, after one that warms up
    """
    seconds = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, (model, prompt) in candidates.items():
            seconds[name].append(_seconds_a_step(model, prompt, tokens))
    first = next(iter(seconds.values()))[1:]
    return {name: _summary(times[1:], first) for name, times in seconds.items()}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it, so that a clock tells."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _summary(times, first) -> Decoding:
    ratios = [mine / base for mine, base in zip(times, first, strict=True)]
    return Decoding(
        ms=1e3 * statistics.median(times),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
    )


@torch.no_grad()
def _seconds_a_step(model, prompt, tokens) -> float:
    device = next(model.parameters()).device
    ids = torch.tensor([prompt], device=device)
    out = model(ids, attention_mask=torch.ones_like(ids), use_cache=True)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(tokens):
        ids = out.logits[:, -1:].argmax(-1)
        out = model(ids, past_key_values=out.past_key_values, use_cache=True)
    synchronize(device)
    return (time.perf_counter() - start) / tokens
