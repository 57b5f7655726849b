"""What an adapter costs at inference: one decode step against the base model's.

The candidates take turns, round by round, in one process, so that a machine that slows
down slows all of them; the figure is the median of the rounds' ratios, with its range.
Each round has an order of its own. In one fixed order, a candidate finds the caches as
the same neighbor always leaves them: on two cores, a base timed twice was 2 to 10 %
faster in one place than in the other.
"""

import statistics
import time
from dataclasses import dataclass
from random import Random

import torch
from torch import nn

from ..models.speed import synchronize


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
    tokens: int = 8,
    rounds: int = 5,
) -> dict[str, Decoding]:
    """Time greedy decoding of each candidate, in turn, against the first one.

    Args
        candidates, tokens, rounds  as step_seconds
    """
    seconds = step_seconds(candidates, tokens=tokens, rounds=rounds)
    first = next(iter(seconds.values()))
    return {name: _summary(times, first) for name, times in seconds.items()}


def step_seconds(
    candidates: dict[str, tuple[nn.Module, list[int]]],
    *,
    tokens: int = 12,
    rounds: int = 7,
    batch: int = 1,
) -> dict[str, list[float]]:
    """{name: seconds of a decoding step, in each round}; in a round each has its turn.

    The order changes from round to round, and is the same in every call.

    Args
        candidates  name -> (model, the tokens to start from)
        tokens      decoded in a round; the prompt's own pass is not in the time
        rounds      counted rounds, after one that warms up
        batch       how many sequences a step decodes, all from the same tokens
    """
    seconds, shuffled = {name: [] for name in candidates}, Random(0)
    for _ in range(rounds + 1):
        for name in shuffled.sample(list(candidates), len(candidates)):
            model, prompt = candidates[name]
            seconds[name].append(_seconds_a_step(model, [prompt] * batch, tokens))
    return {name: times[1:] for name, times in seconds.items()}


def _summary(times, first) -> Decoding:
    ratios = [mine / base for mine, base in zip(times, first, strict=True)]
    return Decoding(
        ms=1e3 * statistics.median(times),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
    )


@torch.no_grad()
def _seconds_a_step(model, prompts, tokens) -> float:
    device = next(model.parameters()).device
    ids = torch.tensor(prompts, device=device)
    out = model(ids, attention_mask=torch.ones_like(ids), use_cache=True)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(tokens):
        ids = out.logits[:, -1:].argmax(-1)
        out = model(ids, past_key_values=out.past_key_values, use_cache=True)
    synchronize(device)
    return (time.perf_counter() - start) / tokens
