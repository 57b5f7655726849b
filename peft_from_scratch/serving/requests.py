"""What a client asks of the engine, and what comes back: plain values, no model.

A request names an adapter by a version that the pool has pinned for it. Its answer
comes as pieces of text, one after each decoding step that completes some, and ends with
the reason why.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Reason = Literal[
    "stop",  # a stop token or stop text
    "length",  # max_tokens
    "cancelled",  # by its client, or by the end of the server
    "deadline",
    "removed",  # the adapter, while the request waited for it
    "unreadable",  # the adapter, whose folder has changed or broken
    "error",  # the model failed
]


class QueueFull(RuntimeError):
    """So many requests wait already that another one would wait too long.

    retry_after  seconds after which to ask again
    """

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(
            f"{waiting} requests wait already: ask again in {retry_after} s"
        )
        self.retry_after = retry_after


class Closed(RuntimeError):
    """The engine takes no more requests: it is about to stop."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Args
        temperature  0: the most likely token
        top_p        only of the most likely tokens, as many as have this probability
                     together
        seed         of the random numbers; None: another one for each request
        logprobs     how many of the most likely tokens are reported with each token,
                     besides its own; None: none, and not its own either
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    Args
        prompt      token ids, at least one
        adapter     the name under which the pool knows it; None: the base alone
        max_tokens  where an answer that does not end is cut
        stop        texts that end an answer; not part of it
        stop_ids    tokens that end an answer; not part of it
        tenant      who asks: the scheduler is fair between tenants
        deadline    seconds after which the answer is cut, waiting included
    """

    prompt: tuple[int, ...]
    adapter: str | None = None
    max_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    tenant: str = ""
    deadline: float = math.inf


@dataclass(frozen=True)
class Token:
    """A chosen token: its id, its log-probability, and the most likely ones.

    logprob  natural logarithm, under the model's own distribution (temperature 1)
    top      (id, logprob), most likely first; as many as Sampling.logprobs asks for
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    text     what is certain by now: never half a character, nor the start of a stop
             text that may still follow
    tokens   chosen since the last piece
    reason   why the answer ends with this piece; None while it goes on
    error    what went wrong, in a sentence, for the last three reasons
    version  digest of the adapter that wrote it; None for the base
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    reason: Reason | None = None
    error: str | None = None
    version: str | None = None


Listener = Callable[[Piece], None]  # called in the engine's thread: must not wait
