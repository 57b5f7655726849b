"""The sweep: every type in a child process of its own, its outcomes as JSON lines.

A child builds the model and runs the checks, and says before each check what it is
about to do. Where it dies or takes too long, the sweep knows which check that was,
calls it crashed, and goes on behind that method with another child.
"""

import itertools
import json
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock

import torch

from . import outcomes, subject, tiny

BUILD = "build"  # the check before all others, and the row of a type that fails it

# A server that has imported everything once, and forks; Windows has none.
SERVER = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if SERVER else "spawn")
if SERVER:
    CONTEXT.set_forkserver_preload([__name__])


def sweep(
    types: list[str],
    methods: list[str],
    out: Path,
    *,
    jobs: int = 1,
    limit: float = 300,
) -> None:
    """Append to `out` what it does not hold yet: a line for each type and method.

    Args
        jobs   children at a time
        limit  seconds that a child may take
    """
    known = {(row["type"], row["method"]) for row in read(out)}
    out.parent.mkdir(parents=True, exist_ok=True)
    writing, began, done = Lock(), time.monotonic(), itertools.count(1)

    def one(kind: str) -> None:
        left = [method for method in methods if (kind, method) not in known]
        if (kind, BUILD) in known:
            left = []
        for row in rows(kind, left, limit):
            if (kind, row["method"]) in known:  # the model itself, looked at again
                continue
            known.add((kind, row["method"]))
            with writing, out.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
        with writing:
            minutes = (time.monotonic() - began) / 60
            line = f"{next(done)} of {len(types)} types, {minutes:.0f} minutes: {kind}"
            print(line, file=sys.stderr, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, types))


def read(out: Path) -> list[dict]:
    """The rows of a file of results; a line that a kill left half is no row."""
    outcomes = []
    for line in out.read_text("utf-8").splitlines() if out.exists() else ():
        with suppress(ValueError):
            outcomes.append(json.loads(line))
    return outcomes


def rows(
    kind: str, methods: list[str], limit: float, work: Callable | None = None
) -> Iterator[dict]:
    """{"type", "method", "outcomes"} of each method, as soon as a child has them.

    A type that cannot be built has one row, of the method BUILD, with the reason.

    Args
        work  what a child does: (pipe, type, methods); None for `child`
    """
    left = list(methods)
    while left:
        method, check, outcomes = BUILD, BUILD, []
        for what, *content in messages(kind, left, limit, work or child):
            if what == "starts":
                if outcomes and content[0] != method:
                    yield {"type": kind, "method": method, "outcomes": outcomes}
                    outcomes = []
                method, check = content
            elif what == "outcome":
                outcomes += content
        [error] = content  # of the last message
        if error:
            outcomes.append({"check": check, "outcome": "crashed", "message": error})
        yield {"type": kind, "method": method, "outcomes": outcomes}
        if method not in left:
            return
        left = left[left.index(method) + 1 :]


def messages(
    kind: str, methods: list[str], limit: float, work: Callable
) -> Iterator[tuple]:
    """What a child says: ("starts", method, check) or ("outcome", …), again and again.

    The last is ("ended", None), or ("ended", why it broke off).
    """
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=work, args=(theirs, kind, methods), daemon=True)
    process.start()
    theirs.close()
    deadline = time.monotonic() + limit
    try:
        while ours.poll(max(0.0, deadline - time.monotonic())):
            message = ours.recv()
            yield message
            if message[0] == "ended":
                return
        yield "ended", f"no end within {limit:g} s"
    except EOFError:
        process.join()
        yield "ended", f"the process died, exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def child(pipe: Connection, kind: str, methods: list[str]) -> None:
    """Build a model of the type, check the methods on it, tell the parent all of it."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        base = tiny.build(kind)
        subject.logits(base, subject.Subject(base, subject.BASE).ids)
    except Exception as error:
        pipe.send(("ended", subject.described(error)))
        return
    results = outcomes.run(base, methods, lambda *at: pipe.send(("starts", *at)))
    for _, outcome in results:
        pipe.send(("outcome", asdict(outcome)))
    pipe.send(("ended", None))
