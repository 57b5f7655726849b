"""A learner's code that never ends: it is stopped, in every thread, and told so."""

import pdb
import signal
import sys
import threading
import time

import pytest
from planting import assert_caught

from peft_from_scratch.course import checks, time_limit
from peft_from_scratch.course.checks import Wrong, judged
from peft_from_scratch.course.time_limit import TooLong

SOON = 0.1
IN_TIME = 3  # seconds: far below pytest's patience, far above SOON


CELL = """\
def loop():
    while True:
        pass

def loop_that_catches_exceptions():
    while True:
        try:
            x = 1
        except Exception:
            x = 2

def loop_within_a_call():
    def step(i):
        return i + 1
    i = 0
    while i >= 0:
        i = step(i)
"""
names = {}
exec(compile(CELL, "a cell", "exec"), names)
loop = names["loop"]
LOOPS = [value for name, value in names.items() if name.startswith("loop")]
LIMITS = (time_limit._by_alarm, time_limit._by_thread)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("endless", LOOPS)
def test_an_endless_loop_is_stopped(endless, limit):
    begun = time.monotonic()
    with pytest.raises(TooLong), limit(SOON):
        endless()
    assert time.monotonic() - begun < IN_TIME


def test_a_sleep_is_interrupted_in_the_main_thread():
    begun = time.monotonic()
    with pytest.raises(TooLong), time_limit.time_limit(SOON):
        time.sleep(60)
    assert time.monotonic() - begun < IN_TIME


def test_nothing_is_raised_once_the_code_has_ended():
    for limit in LIMITS:
        for _ in range(50):
            with limit(0.5):
                pass
        with limit(SOON):
            pass
    time.sleep(2 * SOON)
    assert not any(signal.getitimer(signal.ITIMER_REAL))


def test_the_handler_of_others_is_put_back():
    before = signal.getsignal(signal.SIGALRM)
    with time_limit.time_limit(5):
        assert signal.getsignal(signal.SIGALRM) is not before
    assert signal.getsignal(signal.SIGALRM) is before


def test_an_alarm_of_others_is_left_alone():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    signal.setitimer(signal.ITIMER_REAL, SOON)
    try:
        with pytest.raises(TooLong), time_limit.time_limit(3 * SOON):
            loop()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung == [1]


def in_a_thread(function):
    """What it raised there; None where it returned."""
    errors = []

    def call():
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(IN_TIME)
    assert not thread.is_alive(), "it still runs"
    return errors[0] if errors else None


@judged
def never_ending(answer):
    answer()


@pytest.mark.parametrize("endless", LOOPS)
@pytest.mark.parametrize("call", [lambda f: f(), in_a_thread], ids=["main", "other"])
def test_a_check_tells_of_an_endless_loop(endless, call, monkeypatch):
    monkeypatch.setattr(checks, "SECONDS", SOON)

    def refused():
        with pytest.raises(Wrong) as caught:
            never_ending(endless)
        lines = str(caught.value).splitlines()
        assert lines[0] == "your code had not come to an end after 0.1 seconds"
        assert "of its cell, in " in lines[1]
        assert lines[-1].startswith("Likely mistake: a loop whose end is never reached")

    error = call(refused)
    assert error is None, error


def test_a_platform_without_alarms_is_served_by_a_thread(monkeypatch):
    monkeypatch.delattr(signal, "setitimer")
    with pytest.raises(TooLong), time_limit.time_limit(SOON):
        loop()


def wait_as_a_debugger(seconds):
    """In a frame of the module pdb, as if it waited for a command."""
    names = {"time": time, "seconds": seconds, "__name__": "pdb"}
    exec("time.sleep(seconds)", names)


@pytest.mark.parametrize("limit", LIMITS)
def test_a_debugger_stops_the_clock(limit):
    with limit(SOON):
        wait_as_a_debugger(4 * SOON)
    with pytest.raises(TooLong), limit(SOON):
        wait_as_a_debugger(2 * SOON)
        loop()


def test_stepping_with_pdb_is_debugging(monkeypatch):
    stepping = pdb.Pdb(nosigint=True).trace_dispatch
    monkeypatch.setattr(sys, "gettrace", lambda: stepping)
    assert time_limit.debugged(None)
    monkeypatch.undo()
    assert not time_limit.debugged(None)


def test_planted_exceptions_that_a_loop_catches_end_nothing():
    """TooLong as an Exception: `except Exception` in the loop would take them all."""
    assert issubclass(TooLong, BaseException) and not issubclass(TooLong, Exception)


def test_planted_the_handler_of_others_is_lost():
    before = signal.getsignal(signal.SIGALRM)
    try:
        assert_caught(
            time_limit._by_alarm,
            "signal.signal(signal.SIGALRM, handler)",
            "pass",
            test_the_handler_of_others_is_put_back,
        )
    finally:
        signal.signal(signal.SIGALRM, before)


def test_planted_the_debugger_is_not_seen():
    for limit in LIMITS:
        assert_caught(
            time_limit.debugged,
            "in DEBUGGERS",
            "in ()",
            lambda limit=limit: test_a_debugger_stops_the_clock(limit),
            errors=TooLong,
        )
