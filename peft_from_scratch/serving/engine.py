"""Continuous batching: answers to many requests, each with an adapter of its own.

The engine is a loop in a thread of its own. A turn of it:

    admit    the next request whose adapter is in memory takes a free place; the
             adapters of others are read in the background
    read     one piece of one prompt goes through the model
    decode   every row gets its next token, all rows in one pass (batch.py, cache.py)

So a new request joins between two decoding steps, and a long prompt holds up the
others by a piece at a time. Where more adapters are wanted than fit, requests whose
adapter is in memory go first, until the one that waits longest has waited `patience`
seconds: from then on nobody overtakes it.

A failure ends what it touches: one request, or the rows of one pass. The loop goes on.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from math import ceil

import torch
from torch import nn

from ..common.check import one_of, whole
from ..core.decoder import positions
from ..training.packing import window
from .batch import Batch
from .cache import RowCache, layers_of, refuse_unfit
from .pool import AdapterPool, PoolFull
from .requests import Closed, Listener, QueueFull, Request, Token
from .sampling import choose
from .text import Text
from .waiting import POLICIES, Ticket, Waiting

LOG = logging.getLogger(__name__)
IDLE = 0.05  # seconds between two looks at deadlines, where there is nothing to do


class Engine:
    """Answers requests for a model and the adapters of a pool.

    Args
        pool      of this model
        rows      answers that are written at the same time
        queue     requests that may wait besides
        piece     tokens of a prompt that are read in one turn
        longest   tokens of prompt and answer, at most
        policy    "fair" between tenants, or "first come"
        patience  seconds after which a request is not overtaken any more
    Raises   ValueError   an argument out of its range; a model that cannot read rows of
             different lengths together
    Memory   keys and values of rows + 1 places, each as long as the longest row
             (RowCache), and a copy of the adapter of each row (Batch)
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        pool: AdapterPool,
        *,
        rows: int = 16,
        queue: int = 64,
        piece: int = 64,
        longest: int = 2048,
        policy: str = "fair",
        patience: float = 2.0,
    ):
        sizes = {"rows": rows, "queue": queue, "piece": piece, "longest": longest}
        for name, value in sizes.items():
            whole(name, value, 1)
        one_of("policy", policy, POLICIES)
        model.eval()
        refuse_unfit(model)
        self.model, self.tokenizer, self.pool = model, tokenizer, pool
        self.rows, self.queue, self.piece, self.patience = rows, queue, piece, patience
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.limit = min(positions(model) or longest, window(model), longest)
        self.failed: str | None = None
        self._waiting = Waiting(policy)
        self._numbers = count()
        self._changed = threading.Condition()
        self._closing: float | None = None  # when those that still run are ended
        self._thread = threading.Thread(target=self._run, daemon=True, name="engine")
        self._loader = ThreadPoolExecutor(1, "adapters")
        self._load: tuple[str, Future] | None = None  # read in the background
        self._pace = 0.0  # seconds a token takes, lately
        self._start_over()

    def _start_over(self) -> None:
        """Nothing runs: empty places for all rows."""
        self._cache = RowCache(layers_of(self.model), self.rows + 1)
        self._batch = Batch()
        self._running: list[Ticket] = []  # the row of each is its place in the cache
        self._reader: Ticket | None = None  # its prompt is at the place behind them
        self._dice: dict[Ticket, torch.Generator] = {}

    # ------------------------------------------------------------- From other threads

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Ask for an answer; its pieces come to the listener, in the engine's thread.

        Raises  ValueError  no tokens, some that the model does not know, or too many
                KeyError    an adapter that the pool does not know
                QueueFull   too many wait; Closed   the engine takes no more
        """
        self._refuse_unfit_prompt(request)
        if request.adapter is not None:
            self.pool.is_resident(request.adapter)  # KeyError for an unknown one
        text = Text(self.tokenizer, request.stop)
        with self._changed:
            if self._closing is not None or self.failed:
                raise Closed(self.failed or "the server is about to stop")
            if len(self._waiting) >= self.queue:
                raise QueueFull(len(self._waiting), self._retry_after())
            now = time.monotonic()
            ticket = Ticket(request, listener, next(self._numbers), now, text)
            self._waiting.add(ticket, self._tenants())
            self._changed.notify()
        return ticket

    def _refuse_unfit_prompt(self, request: Request) -> None:
        whole("max_tokens", request.max_tokens, 1, of="tokens")
        prompt = request.prompt
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token")
        strange = [i for i in prompt if not 0 <= i < self.vocabulary]
        if strange:
            raise ValueError(
                f"the prompt has the token {strange[0]}; this model knows those from 0 "
                f"to {self.vocabulary - 1}"
            )
        if len(prompt) + request.max_tokens > self.limit:
            raise ValueError(
                f"the prompt's {len(prompt)} tokens and max_tokens="
                f"{request.max_tokens} are more than the {self.limit} that are "
                "read here: shorten one of them"
            )

    def _retry_after(self) -> int:
        """Seconds until a place in the queue is free, by the present pace."""
        tokens = sum(t.request.max_tokens for t in self._waiting.tickets)
        return min(60, max(1, ceil(self._pace * tokens / self.rows / 2)))

    def start(self) -> None:
        self._thread.start()

    def close(self, seconds: float = 10.0) -> None:
        """Take no more requests, and end those that still run after so many seconds."""
        with self._changed:
            self._closing = time.monotonic() + seconds
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds + 5)
        else:
            self._end_all("cancelled", None)
        self._loader.shutdown(wait=False, cancel_futures=True)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running) + (self._reader is not None)

    @property
    def served(self) -> dict[str, int]:
        """{tenant: tokens that were read and written for it}"""
        with self._changed:
            return dict(self._waiting.served)

    def adapters(self) -> tuple[set[str], set[str]]:
        """Names of adapters whose requests (run, wait)."""
        with self._changed:
            names = [
                {t.request.adapter for t in tickets if t.request.adapter is not None}
                for tickets in (self._at_work(), self._waiting.tickets)
            ]
        return tuple(names)

    # ------------------------------------------------------------- The loop

    def _run(self) -> None:
        try:
            while not self._is_over():
                if not self.turn():
                    with self._changed:
                        self._changed.wait(IDLE)
        except BaseException as error:
            self.failed = f"the engine has stopped: {type(error).__name__}: {error}"
            raise
        finally:
            self._end_all("error" if self.failed else "cancelled", self.failed)

    def _is_over(self) -> bool:
        if self._closing is None:
            return False
        return time.monotonic() > self._closing or not (self.running or self.waiting)

    def turn(self) -> bool:
        """One turn of the loop; whether anything was done."""
        with self._changed:
            self._drop_unwanted()
            self._admit()
        began, written = time.monotonic(), len(self._running)
        worked = self._read() | self._decode()
        if written:
            self._pace = 0.9 * self._pace + 0.1 * (time.monotonic() - began)
        return worked

    def _drop_unwanted(self) -> None:
        """End what was cancelled or is overdue, waiting or at work."""
        now = time.monotonic()

        def reason(ticket: Ticket):
            if ticket.cancelled:
                return "cancelled"
            return "deadline" if ticket.overdue(now) else None

        for ticket in self._waiting.take_all(lambda t: reason(t) is not None):
            ticket.end(reason(ticket))
        for ticket in self._at_work():
            if why := reason(ticket):
                self._leave(ticket, why)

    def _admit(self) -> None:
        """Let the next request take the place in which prompts are read.

        And have the next adapter that is not in memory read meanwhile: one at a time,
        so that none leaves before it was used.
        """
        self._notice_load()
        if self._reader is None and len(self._running) < self.rows:
            any(self._begins(ticket) for ticket in self._candidates())
        if self._load is None:
            ticket = next(filter(self._misses, self._candidates()), None)
            if ticket is not None:
                name = ticket.request.adapter
                self._load = name, self._loader.submit(self._fetch, name)

    def _misses(self, ticket: Ticket) -> bool:
        """Whether its adapter is not in memory."""
        try:
            name = ticket.request.adapter
            return name is not None and not self.pool.is_resident(name)
        except KeyError:  # removed in the meantime: the next turn refuses it
            return False

    def _candidates(self) -> list[Ticket]:
        """Those that may be next: one alone, once it has waited for too long."""
        first = self._waiting.longest_blocked()
        if first and time.monotonic() - first.blocked > self.patience:
            return [first]
        return self._waiting.in_order()

    def _begins(self, ticket: Ticket) -> bool:
        """Begin with a request, unless it has to wait for its adapter."""
        name, version = ticket.request.adapter, None
        if name is not None:
            try:
                if self.pool.is_resident(name):
                    fetched = ticket.blocked is not None
                    version = self.pool.acquire(name, fetched=fetched)
            except (KeyError, ValueError, OSError) as error:
                self._refuse(ticket, error)
                return False
            if version is None:
                ticket.blocked = ticket.blocked or time.monotonic()
                return False
        self._waiting.take(ticket)
        self._waiting.count(ticket.request.tenant, len(ticket.request.prompt))
        if not self._running:
            self._start_over()  # a cache that one long prompt made large is small again
        ticket.version, self._reader = version, ticket
        self._cache.lengths[len(self._running)] = 0
        return True

    def _fetch(self, name: str) -> None:
        try:
            self.pool.fetch(name)
        finally:
            with self._changed:
                self._changed.notify()

    def _notice_load(self) -> None:
        """Forget the adapter that was read once it is in use, or nobody wants it.

        If it could not be read, the requests for it are refused.
        """
        if self._load is None or not self._load[1].done():
            return
        name, future = self._load
        wanting = [t for t in self._waiting.tickets if t.request.adapter == name]
        error = future.exception()
        if error is not None and not isinstance(error, PoolFull):
            for ticket in wanting:
                self._refuse(ticket, error)
        used = any(t.request.adapter == name for t in self._at_work())
        if error is not None or used or not any(map(self._is_ready, wanting)):
            self._load = None

    def _is_ready(self, ticket: Ticket) -> bool:
        return ticket.request.adapter in self.pool and not self._misses(ticket)

    def _refuse(self, ticket: Ticket, error: BaseException) -> None:
        """End a request whose adapter cannot be had; paths stay in the log."""
        name = ticket.request.adapter
        LOG.warning("the adapter %s cannot be read: %s", name, error)
        self._waiting.take(ticket)
        if name in self.pool:
            words = f"the folder of {name!r} has changed or broken: add it again"
            ticket.end("unreadable", error=words)
        else:
            ticket.end("removed", error=f"{name!r} was removed")

    # ------------------------------------------------------------- Through the model

    def _read(self) -> bool:
        """A piece of the prompt that is being read; whether there was one."""
        ticket = self._reader
        if ticket is None:
            return False
        prompt = ticket.request.prompt[ticket.read : ticket.read + self.piece]
        try:
            with self.pool.slots.using(Batch([ticket.version])):
                place = len(self._running)
                logits = self._cache.forward(self.model, place, [list(prompt)])
        except Exception as error:
            with self._changed:
                self._leave(ticket, "error", error=_sentence(error))
            return True
        ticket.read += len(prompt)
        if ticket.read == len(ticket.request.prompt):
            with self._changed:
                self._reader = None
                self._batch.append(ticket.version)
                self._running.append(ticket)
            self._write(ticket, logits[0])
        return True

    def _decode(self) -> bool:
        """The next token of every row; whether there was one."""
        tickets = list(self._running)
        if not tickets:
            return False
        try:
            with self.pool.slots.using(self._batch):
                logits = self._cache.forward(self.model, 0, [[t.last] for t in tickets])
        except Exception as error:
            self._end_all("error", _sentence(error), waiting=False)
            return True
        for ticket, row in zip(tickets, logits, strict=True):
            self._write(ticket, row)
        return True

    def _write(self, ticket: Ticket, logits: torch.Tensor) -> None:
        """Choose a row's next token and hand on what has become certain by it."""
        request = ticket.request
        try:
            token = choose(logits, request.sampling, self._generator(ticket))
        except Exception as error:  # logits that are no numbers
            self._leave(ticket, "error", error=_sentence(error))
            return
        if token.id in request.stop_ids:
            self._leave(ticket, "stop")
            return
        ticket.last, ticket.count = token.id, ticket.count + 1
        with self._changed:
            self._waiting.count(request.tenant, 1)
        text = ticket.text.push(token.id)
        if ticket.text.stopped:
            ticket.give(text)
            self._leave(ticket, "stop", (token,))
        elif ticket.count >= request.max_tokens:
            ticket.give(text)
            self._leave(ticket, "length", (token,))
        else:
            ticket.give(text, (token,))

    def _generator(self, ticket: Ticket) -> torch.Generator | None:
        sampling = ticket.request.sampling
        if sampling.temperature == 0:
            return None
        if ticket not in self._dice:
            dice = torch.Generator(self.model.device)
            seed = sampling.seed
            dice.seed() if seed is None else dice.manual_seed(seed)
            self._dice[ticket] = dice
        return self._dice[ticket]

    def _leave(
        self, ticket: Ticket, reason, tokens: Sequence[Token] = (), error=None
    ) -> None:
        """End a ticket that is at work; the last row takes its place."""
        with self._changed:
            if ticket is self._reader:
                self._reader = None
            elif ticket in self._running:
                row, last = self._running.index(ticket), len(self._running) - 1
                self._batch.drop(row)
                self._running[row] = self._running[last]
                self._running.pop()
                self._cache.move(last, row)
                if self._reader is not None:  # its place is the one behind the rows
                    self._cache.move(last + 1, last)
            else:
                return
            self._dice.pop(ticket, None)
        if ticket.version is not None:
            self.pool.release(ticket.version)
        ticket.end(reason, tuple(tokens), error)

    def _end_all(self, reason, error: str | None, waiting: bool = True) -> None:
        """End everything at work, with empty places afterwards; perhaps all."""
        with self._changed:
            gone, tickets = self._at_work(), []
            if waiting:
                tickets = self._waiting.take_all(lambda ticket: True)
            self._start_over()
        for ticket in gone:
            if ticket.version is not None:
                self.pool.release(ticket.version)
        for ticket in [*gone, *tickets]:
            ticket.end(reason, error=error)

    def _at_work(self) -> list[Ticket]:
        return [*self._running, *([self._reader] if self._reader else [])]

    def _tenants(self) -> set[str]:
        tickets = [*self._at_work(), *self._waiting.tickets]
        return {ticket.request.tenant for ticket in tickets}


def _sentence(error: Exception) -> str:
    LOG.error("a pass through the model failed", exc_info=error)
    return f"the model failed ({type(error).__name__}): nothing else was disturbed"
