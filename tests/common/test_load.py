"""Cores that other programs keep busy: our own work does not count, theirs does."""

import subprocess
import sys
import time

import pytest

from peft_from_scratch.common import load
from peft_from_scratch.common.load import OtherPrograms

SECOND = 100  # ticks of /proc/stat


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Counters that a test sets: seconds on the clock, of all processors, of ours."""
    counters = {"clock": 0.0, "user": 0, "idle": 0, "ours": 0.0}
    stat = tmp_path / "stat"

    def write(**now):
        counters.update(now)
        user, idle = (round(counters[name] * SECOND) for name in ("user", "idle"))
        stat.write_text(f"cpu  {user} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 2 3\n")

    monkeypatch.setattr(load, "STAT", stat)
    monkeypatch.setattr(load.os, "sysconf", lambda name: SECOND)
    monkeypatch.setattr(load.os, "times", lambda: (counters["ours"], 0, 0, 0, 0))
    monkeypatch.setattr(load.time, "monotonic", lambda: counters["clock"])
    write()
    return write


@pytest.mark.parametrize(("theirs", "cores"), [(0, 0.0), (5, 0.5), (20, 2.0)])
def test_only_the_work_of_others_counts(machine, theirs, cores):
    others = OtherPrograms()
    machine(clock=10.0, user=10 + theirs, idle=40, ours=10.0)
    assert others.cores() == pytest.approx(cores)


def test_ticks_that_ours_are_ahead_of_are_no_negative_load(machine):
    others = OtherPrograms()
    machine(clock=10.0, user=9.9, ours=10.0)
    assert others.cores() == 0


def test_where_the_system_does_not_tell_nothing_is_known(machine, monkeypatch):
    others = OtherPrograms()
    machine(clock=10.0)
    monkeypatch.setattr(load, "STAT", load.STAT.with_name("none"))
    assert others.cores() is None and OtherPrograms().cores() is None


@pytest.mark.skipif(not load.STAT.exists(), reason="there is no /proc/stat")
def test_a_busy_neighbor_shows():
    spin = "import time; end = time.time() + 4\nwhile time.time() < end: pass"
    process = subprocess.Popen([sys.executable, "-c", spin])
    others = OtherPrograms()
    time.sleep(2)
    assert others.cores() > 0.2  # a whole one, where the machine is else idle
    process.kill()
    process.wait()
