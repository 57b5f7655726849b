"""Start the ranks on this machine, and say which one has failed.

    launch(job, argument, ranks=2)      job(argument) on two new processes

For several machines there is torchrun, which tells a process the same things in its
environment; see group.py. What is here is what torchrun says badly: one error in place
of one from each rank, and the cause in place of what followed from it. When a rank is
killed, the others lose it in the middle of a message, and each has an error of its own.

A child knows when its parent is gone, and ends. The parent passes Ctrl-C on, once: the
children have a process group of their own, where a terminal's Ctrl-C does not reach
them twice.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait

import torch

from ..common import check
from ..memory.collectives import RankLost

GRACE = 10.0  # seconds in which the other ranks may say why they end, too
FORESEEN = (ValueError, OSError, ArithmeticError, KeyboardInterrupt)


class RankFailed(ConnectionError):
    """A rank has ended before its job was done; the others were stopped."""


def launch(job: Callable, *arguments, ranks: int) -> list:
    """What job(*arguments) returns on each of `ranks` new processes of this machine.

    Args
        job        a function of a module, and arguments that pickle
        ranks      how many; each finds its number in the environment, see group.join
    Returns  the results, by rank
    Raises   RankFailed   a rank was killed, or has an error that nobody foresaw
             ValueError, OSError, ArithmeticError   a rank's own, the first that is not
             about another rank
             KeyboardInterrupt  Ctrl-C, once all ranks have ended
    """
    check.whole("ranks", ranks, 1, of="processes")
    context, port = multiprocessing.get_context("spawn"), _free_port()
    started = []
    try:
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            given = (rank, ranks, port, theirs, job, arguments)
            process = context.Process(target=_rank, args=given)
            process.start()
            theirs.close()
            started.append((process, ours))
        answers = _answers(started)
    finally:
        for process, _ in started:
            process.kill()
            process.join()
    return _results(answers)


def _answers(started) -> list[tuple | None]:
    """(kind, value) of each rank; None of one that ended, or was ended, without."""
    answers: list[tuple | None] = [None] * len(started)
    open_ends = {ours: rank for rank, (_, ours) in enumerate(started)}
    end = None  # when the wait is over
    while open_ends and (end is None or time.monotonic() < end):
        left = None if end is None else max(0.0, end - time.monotonic())
        try:
            ready = wait(list(open_ends), left)
        except KeyboardInterrupt:
            _interrupt(process for process, _ in started)
            continue
        for ours in ready:
            rank = open_ends.pop(ours)
            answers[rank] = _answer(started[rank][0], ours)
            if answers[rank][0] != "done":
                end = end or time.monotonic() + GRACE
    for process, _ in started:
        process.join(0.0 if end else GRACE)
    return answers


def _answer(process, ours) -> tuple:
    """What a rank has sent; ("killed", its exit status) where that is nothing."""
    try:
        return pickle.loads(ours.recv_bytes())
    except (EOFError, OSError):
        process.join(GRACE)
        return "killed", process.exitcode


def _results(answers: list[tuple | None]) -> list:
    """The results, or the error that is the cause of the others.

    That is an error about something else than another rank; without one a rank that was
    killed; without that the first complaint about another rank.
    """
    ranks, by_kind = len(answers), {"done": [], "killed": [], "error": []}
    for rank, answer in enumerate(answers):
        if answer is not None:  # None: was still at work when another one failed
            by_kind[answer[0]].append((rank, *answer[1:]))
    for rank, error, text in by_kind["error"]:
        if isinstance(error, FORESEEN):
            raise error
        if not isinstance(error, RankLost | _Followed):
            raise RankFailed(f"rank {rank} of {ranks} has failed:\n{text}")
    for rank, code in by_kind["killed"]:
        raise RankFailed(_killed(rank, ranks, code))
    for rank, error, _ in by_kind["error"]:
        raise RankFailed(f"{error} (on rank {rank} of {ranks})")
    return [result for _, result in by_kind["done"]]


def _killed(rank: int, ranks: int, code: int | None) -> str:
    how = f"exit status {code}"
    if code is not None and code < 0:
        with suppress(ValueError):
            how = signal.Signals(-code).name
    return (
        f"rank {rank} of {ranks} was ended from outside ({how}, as by a system that is "
        "out of memory), and the other ranks were stopped"
    )


class _Followed(RuntimeError):
    """An error that another rank's end has brought about."""


def _rank(rank: int, ranks: int, port: int, end, job: Callable, arguments) -> None:
    """One of the processes: does the job, and sends its answer to the parent."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    try:
        answer = "done", job(*arguments)
    except BaseException as error:
        answer = "error", _portable(error), traceback.format_exc()
    sys.stdout.flush()
    end.send_bytes(pickle.dumps(answer))  # by value: Connection.send shares tensors
    end.close()


def _portable(error: BaseException) -> BaseException:
    """The error itself where it can be sent; where torch lost a peer, what that is."""
    words = str(error)
    lost = isinstance(error, RuntimeError) and not isinstance(error, RankLost)
    if lost and any(text in words for text in OF_LOST_PEERS):
        return _Followed(f"a rank does not answer: {words.splitlines()[0]}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(words)
    return error


# Of gloo's, NCCL's and the store's words for a peer that is gone or does not answer.
OF_LOST_PEERS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "timed out",
    "Broken pipe",
    "Connection refused",
    "gloo/transport",
    "NCCL communicator was aborted",
    "failed to recv",
)


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _interrupt(processes) -> None:
    """Pass Ctrl-C on; on Windows, the console has told the children itself."""
    if os.name != "nt":
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
