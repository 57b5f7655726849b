"""The next token, from the logits of a row."""

import torch
from torch import Tensor

from .requests import Sampling, Token


def choose(logits: Tensor, sampling: Sampling, dice: torch.Generator | None) -> Token:
    """One token.

        p = softmax(logits / temperature), of the most likely tokens that have top_p
        together; temperature 0 takes the largest logit

    Args
        logits  (vocabulary,) float32
        dice    for a temperature above 0
    """
    if sampling.temperature == 0:
        chosen = int(logits.argmax())
    else:
        p = torch.softmax(logits / sampling.temperature, -1)
        chosen = _draw(p, sampling.top_p, dice)
    if sampling.logprobs is None:
        return Token(chosen)
    logprobs = torch.log_softmax(logits, -1)
    values, ids = logprobs.topk(min(sampling.logprobs, len(logits)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(chosen, float(logprobs[chosen]), top)


def _draw(p: Tensor, top_p: float, dice: torch.Generator | None) -> int:
    p, ids = p.sort(descending=True)
    before = p.cumsum(0) - p  # probability of all that are more likely
    p = torch.where(before < top_p, p, 0)
    p[0] = p[0].clamp(min=torch.finfo(p.dtype).tiny)  # top_p = 0 keeps the first
    return int(ids[torch.multinomial(p, 1, generator=dice)])
