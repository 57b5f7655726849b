"""Long work says how far it is, in a log file as well as in a terminal."""

import sys

import pytest

from peft_from_scratch.common import progress
from peft_from_scratch.common.progress import EVERY, Lines, bar


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_half_minute(clock, capsys):
    with bar("train", "step", 20) as shown:
        assert isinstance(shown, Lines)
        for _ in range(20):
            clock[0] += 10
            shown.set_postfix_str("loss 1.234")
            shown.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 200 // EVERY
    assert lines[0].startswith("train:")
    assert "3/20" in lines[0] and "loss 1.234" in lines[0]
    assert "02:50" in lines[0]  # left: 17 steps of 10 s


def test_a_resumed_run_counts_from_where_it_was(clock, capsys):
    with bar("train", "step", 20, done=10) as shown:
        for _ in range(3):
            clock[0] += 10
            shown.update()
    assert "13/20" in (line := capsys.readouterr().err)
    assert "01:10" in line  # 7 steps of 10 s, not of 30 s / 13


def test_what_takes_less_than_half_a_minute_writes_nothing(clock, capsys):
    with bar("answer", "row", 5) as shown:
        for _ in range(5):
            clock[0] += 5
            shown.update()
    assert not capsys.readouterr().err


def test_nothing_is_shown_where_nobody_asked(clock, capsys):
    with bar("answer", "row", 5, shown=False) as hidden:
        clock[0] += 60
        hidden.update()
    assert not isinstance(hidden, Lines)
    assert not capsys.readouterr().err


def test_a_terminal_gets_the_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with bar("answer", "row", 5) as shown:
        assert not isinstance(shown, Lines)
