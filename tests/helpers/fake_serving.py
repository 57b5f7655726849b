"""A stand-in for the engine and the pool: what it writes, a test decides.

    python tests/helpers/fake_serving.py serve --adapters DIR …

is the command line with both in place of the real ones, and half a second a piece.
"""

import queue
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

from peft_from_scratch.serving.requests import Closed, Piece, QueueFull, Token


@dataclass
class Card:
    name: str
    folder: Path
    digest: str = "0" * 16
    rank: int = 8
    bytes: int = 1000
    resident: bool = True
    added: float = 1.5e9


class FakePool:
    """Names of adapters, without any."""

    def __init__(self, *names):
        self.table = {name: Card(name, Path("adapters", name)) for name in names}
        self.bytes, self.budget_bytes = 2000, 8000
        self.counters = SimpleNamespace(hits=5, misses=4, evictions=3, loads=2)
        self.wrong = None  # what the next add raises

    def __contains__(self, name):
        return name in self.table

    def cards(self):
        return list(self.table.values())

    def add(self, name, folder):
        if self.wrong:
            raise self.wrong
        if not (Path(folder) / "adapter_config.json").exists():
            raise FileNotFoundError(f"{folder} has no adapter_config.json")
        self.table[name] = Card(name, Path(folder), digest="1" * 16)

    def remove(self, name):
        del self.table[name]


@dataclass
class Ticket:
    request: object
    listener: object
    cancelled: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    def cancel(self):
        self.cancelled.set()


class FakeEngine:
    """Answers one request after another, in a thread: the adapter's name, four times.

    pieces  (request) -> the pieces of its answer; a test may set another one
    go      cleared, no request gets another piece until it is set or the ticket is
            cancelled
    """

    def __init__(self, pool, room=64):
        self.pool, self.room = pool, room
        self.tickets, self.served, self.failed = [], {}, None
        self.go, self.pieces = threading.Event(), words
        self.go.set()
        self.closed, self.limit, self._queue = False, 100, queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def waiting(self):
        return self._queue.qsize()

    @property
    def running(self):
        return sum(not ticket.done.is_set() for ticket in self.tickets) - self.waiting

    def adapters(self):
        open_ = [t.request.adapter for t in self.tickets if not t.done.is_set()]
        return set(), {name for name in open_ if name}

    def start(self):
        self._thread.start()

    def close(self, seconds):
        self.closed = True
        end = time.monotonic() + seconds
        while self.go.is_set() and self.running and time.monotonic() < end:
            time.sleep(0.005)
        self.go.set()
        for ticket in self.tickets:
            ticket.cancel()
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(5)

    def submit(self, request, listener):
        if self.closed:
            raise Closed("the engine takes no more requests")
        if request.adapter is not None and request.adapter not in self.pool:
            raise KeyError(request.adapter)
        if not request.prompt:
            raise ValueError("the prompt has no token")
        if self.waiting >= self.room:
            raise QueueFull(self.waiting, 7)
        self.tickets.append(Ticket(request, listener))
        self._queue.put(self.tickets[-1])
        return self.tickets[-1]

    def _run(self):
        while (ticket := self._queue.get()) is not None:
            for piece in self.pieces(ticket.request):
                while not self.go.wait(0.005) and not ticket.cancelled.is_set():
                    pass
                if ticket.cancelled.is_set():
                    ticket.listener(Piece(reason="cancelled"))
                    break
                ticket.listener(piece)
            ticket.done.set()


def words(request):
    """The adapter's name as often as tokens are asked for, four times at most."""
    name, n = request.adapter or "base", min(request.max_tokens, 4)
    for i in range(n):
        text = f" {name}" if i else name
        reason = None if i < n - 1 else "length" if n < 4 else "stop"
        yield Piece(text, (token(300 + i, request),), reason, version="abc")


def token(id, request):
    """A token; with as many alternatives as were asked for."""
    most = request.sampling.logprobs
    if most is None:
        return Token(id)
    return Token(id, -0.5, tuple((400 + i, -1.0 - i) for i in range(most)))


def wait_for(condition, seconds=5.0):
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(condition())


def main():
    """The command line with stand-ins, slow enough for a signal to come in between."""
    from peft_from_scratch.cli.command_line import main

    def slowly(request):
        for piece in words(request):
            time.sleep(0.5)
            yield piece

    def engine_for(model, tokenizer, pool, rows, queue):
        engine = FakeEngine(pool, queue)
        engine.pieces = slowly
        return engine

    for name, member, value in (
        ("engine", "Engine", engine_for),
        ("pool", "AdapterPool", lambda model, budget_bytes, root: FakePool()),
    ):
        module = ModuleType(name)
        setattr(module, member, value)
        sys.modules[f"peft_from_scratch.serving.{name}"] = module
    return main()


if __name__ == "__main__":
    sys.exit(main())
