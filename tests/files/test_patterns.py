"""Regexes of strangers: what matches, what takes too long, what is put back."""

import os
import re
import signal
import subprocess
import threading
import time

import pytest
from laws.files.refused_files import YEARS

from peft_from_scratch.files import patterns
from peft_from_scratch.files.patterns import match_all

NAMES = ["a.q_proj", "a.k_proj", "b.a.q_proj", "model.layers.0.self_attn.q_proj"]
PATTERNS = ["q_proj", r".*\.(q|k)_proj", "a.q_proj", r"(?:b\.)?a\.k_proj", "", "^a.*$"]
needs_alarm = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="Windows has no interval timers"
)


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.4)


def in_a_thread(call):
    """What the call returns, or raises, in a thread that is not the main one."""
    outcome = []

    def run():
        try:
            outcome.append(call())
        except ValueError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome[0]


@pytest.mark.parametrize("ends", [False, True])
def test_a_pattern_matches_what_fullmatch_does(ends):
    whole = [rf"(?:.*\.)?(?:{p})" if ends else p for p in PATTERNS]
    expected = [{name for name in NAMES if re.fullmatch(p, name)} for p in whole]
    assert match_all(PATTERNS, NAMES, ends=ends) == expected
    assert in_a_thread(lambda: match_all(PATTERNS, NAMES, ends=ends)) == expected


def test_a_pattern_that_takes_years_is_refused_in_time(brief):
    started = time.monotonic()
    with pytest.raises(ValueError, match="takes more than"):
        match_all([YEARS], NAMES)
    assert time.monotonic() - started < 5


def test_a_pattern_that_takes_years_is_refused_in_a_thread(brief):
    assert "takes more than" in str(in_a_thread(lambda: match_all([YEARS], NAMES)))


@pytest.mark.parametrize("pattern", ["(", "[", "a{99999999999999999999}", "(" * 5000])
def test_what_is_no_regex_is_refused_everywhere(pattern):
    with pytest.raises(ValueError, match="no regex"):
        match_all([pattern], NAMES)
    assert "no regex" in str(in_a_thread(lambda: match_all([pattern], NAMES)))


@needs_alarm
@pytest.mark.parametrize("pattern", ["q_proj|x.*", YEARS])
def test_handler_and_timer_are_those_of_before(pattern, brief):
    def somebodys(signum, frame):
        pass

    before = signal.signal(signal.SIGALRM, somebodys)
    signal.setitimer(signal.ITIMER_REAL, 50, 60)
    try:
        try:
            match_all([pattern], NAMES)
        except ValueError:
            assert pattern == YEARS
        assert signal.getsignal(signal.SIGALRM) is somebodys
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 40 < left < 50 and interval == 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@needs_alarm
def test_a_timer_that_ran_out_meanwhile_goes_off_after(brief):
    rings = []
    before = signal.signal(signal.SIGALRM, lambda signum, frame: rings.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(ValueError, match="takes more than"):
            match_all([YEARS], NAMES)
        time.sleep(0.05)
        assert rings == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@needs_alarm
def test_control_c_interrupts_a_match():
    """Sent by another process: a match holds the lock that a thread would need."""
    send = f"sleep 0.5; kill -INT {os.getpid()}"
    with subprocess.Popen(["sh", "-c", send]), pytest.raises(KeyboardInterrupt):
        match_all([YEARS], NAMES)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
