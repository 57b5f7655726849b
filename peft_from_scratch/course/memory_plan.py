"""Will it fit, and which single change makes the most room?

    tokens = floor((budget - what is held all the time) / bytes of one token)

    line(2048, moving(2048), 4096, moving(4096))     (bytes of one token, bytes of none)
    plan(parts, a_token, budget, changes)            (tokens, best change, its tokens)

A change multiplies parts of the bill. {"states": 0} pages the states out; {"adapters":
0.25, "states": 0.25} trains a quarter of the rank. The change that frees the most bytes
does not always make room for the most tokens: where much room is left, fewer bytes a
token are worth more.
"""

import math
from collections.abc import Mapping

A_TOKEN = "a token"  # the key of a change that multiplies the bytes of one token


def line(n: int, bytes_n: float, m: int, bytes_m: float) -> tuple[float, float]:
    """The line through two bills of other lengths: (bytes of one token, of none).

    Raises  ValueError  equal lengths
    """
    if n == m:
        raise ValueError(f"two bills of {n} tokens: a line needs two lengths")
    slope = (bytes_m - bytes_n) / (m - n)
    return slope, bytes_n - n * slope


def fitting(parts: Mapping[str, float], a_token: float, budget: float) -> int:
    """Tokens of the longest sequence that fits; 0 where not one token does."""
    return max(0, math.floor((budget - sum(parts.values())) / a_token))


def changed(
    parts: Mapping[str, float], a_token: float, change: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """(parts, bytes of one token) after one change.

    Raises  ValueError  it multiplies something that is no part of the bill
    """
    if unknown := set(change) - {*parts, A_TOKEN}:
        raise ValueError(
            f"the change multiplies {sorted(unknown)}; the bill has "
            f"{', '.join([*parts, A_TOKEN])}"
        )
    new = {name: size * change.get(name, 1) for name, size in parts.items()}
    return new, a_token * change.get(A_TOKEN, 1)


def plan(
    parts: Mapping[str, float],
    a_token: float,
    budget: float,
    changes: Mapping[str, Mapping[str, float]],
) -> tuple[int, str | None, int]:
    """The longest sequence now, the best single change, and the longest with it.

    Args
        parts    {name: bytes} that are held all the time
        a_token  bytes that each token of the sequence adds
        budget   bytes of the GPU
        changes  {name: {part, or "a token": factor}}; each is judged alone
    Returns  (tokens, name, tokens with it); of equal ones the first, and (tokens, None,
             tokens) where no change makes room for one token more
    """
    tokens = best_tokens = fitting(parts, a_token, budget)
    best = None
    for name, change in changes.items():
        longest = fitting(*changed(parts, a_token, change), budget)
        if longest > best_tokens:
            best, best_tokens = name, longest
    return tokens, best, best_tokens
