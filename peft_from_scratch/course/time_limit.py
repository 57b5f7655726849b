"""A time limit for code that may never end: a learner's loop, for example.

    with time_limit(60):
        answer()            TooLong is raised in here, once the 60 seconds are over

In the main thread on Linux and macOS, the system's alarm interrupts whatever runs, a
sleep included. Elsewhere, in another thread or on Windows, a second thread asks Python
to raise TooLong in this one, which happens between two Python instructions. In both
cases a single long call into C, into torch for example, comes to its own end first.

A bare `except:` catches TooLong as it catches an interrupt; it is then raised again.
A debugger stops the clock: whoever looks around in their code takes their time.
"""

import bdb
import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 0.5  # seconds until TooLong is raised once more, if something caught it
DEBUGGERS = {"bdb", "pdb", "ipdb", "debugpy", "pydevd", "_pydevd_bundle"}


class TooLong(BaseException):
    """The time is over. No Exception, so that `except Exception` does not catch it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooLong in this thread after that many seconds; none where it cannot be.

    An alarm that somebody else has set stays theirs: the second thread is used then.
    """
    in_main = threading.current_thread() is threading.main_thread()
    has_alarm = in_main and hasattr(signal, "setitimer")
    if has_alarm and not any(signal.getitimer(signal.ITIMER_REAL)):
        watched = _by_alarm(seconds)
    else:
        watched = _by_thread(seconds)
    with watched:
        yield


@contextmanager
def _by_alarm(seconds: float) -> Iterator[None]:
    over = threading.Event()

    def ring(_number: int, frame: FrameType | None) -> None:
        if over.is_set():
            return
        if debugged(frame):
            signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
        else:
            raise TooLong

    def stop() -> None:
        over.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)

    handler = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    with _stopped_for_sure(stop):
        yield


@contextmanager
def _by_thread(seconds: float) -> Iterator[None]:
    thread, over = threading.get_ident(), threading.Event()
    raising = threading.Lock()  # so that nothing is raised after `stop`

    def watch() -> None:
        wait = seconds
        while not over.wait(wait):
            in_debugger = debugged(sys._current_frames().get(thread))
            wait = seconds if in_debugger else AGAIN
            with raising:
                if not (in_debugger or over.is_set()):
                    _raise_in(thread, TooLong)

    def stop() -> None:
        over.set()
        with raising:
            _raise_in(thread, None)

    threading.Thread(target=watch, name="time limit", daemon=True).start()
    with _stopped_for_sure(stop):
        yield


@contextmanager
def _stopped_for_sure(stop: Callable[[], None]) -> Iterator[None]:
    """Twice: TooLong may come in the middle of the first call."""
    try:
        try:
            yield
        finally:
            stop()
    finally:
        stop()


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Have Python raise it there; None takes back one that was not raised yet."""
    error = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)


def debugged(frame: FrameType | None) -> bool:
    """Whether a debugger steps through the code, or waits for a command in it."""
    if isinstance(getattr(sys.gettrace(), "__self__", None), bdb.Bdb):
        return True
    while frame:
        if frame.f_globals.get("__name__", "").partition(".")[0] in DEBUGGERS:
            return True
        frame = frame.f_back
    return False
