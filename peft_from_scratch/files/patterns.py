"""How an adapter file names modules: reading what strangers wrote, and writing it.

A regex of twenty characters can keep Python busy for years on one module's name. So a
pattern that repeats anything gets a few seconds. On the main thread an alarm interrupts
the match. Other threads, and Windows, cannot set one: there the match runs in a Python
process of its own, which can be stopped. Plain names, as most files hold, need neither.
"""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..core.targets import (
    ENDS,
    exact_regex,
    named_modules,
    refuse_no_mapping,
    shortened,
)

SECONDS = 5.0  # for all patterns of one field together
REPEATS = re.compile(r"[*+?{(]")  # without one of these, matching takes no detours
CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
print(json.dumps([[n for n in names if re.fullmatch(p, n)] for p in patterns]))
"""


def match_all(
    patterns: Sequence[str], names: Iterable[str], *, ends: bool = False
) -> list[set[str]]:
    """For each pattern, the names that it matches as a whole.

    Args
        ends  a pattern may also match what follows a dot, as in PEFT's rank_pattern
    Raises  ValueError  one that is no regex, or that takes too long
    """
    names = list(names)
    whole = [ENDS.format(pattern) if ends else pattern for pattern in patterns]
    repeats = any(map(REPEATS.search, patterns))
    try:
        return (_matches_in_time if repeats else _matches)(whole, names)
    except (TimeoutError, subprocess.TimeoutExpired):
        raise ValueError(
            f"a pattern of {shortened(list(patterns))} takes more than {SECONDS:.0f} s "
            "to match this model's module names; write the names out instead"
        ) from None
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{shortened(list(patterns))} holds what is no regex: {error}"
        ) from None


def exact_patterns(field: str, pattern: dict | None, names: Iterable[str]) -> dict:
    """A file's {pattern: value} with the exact pattern of each module instead.

    The first pattern that matches a module decides, as in PEFT.
    """
    refuse_no_mapping(field, pattern)
    matches = match_all(list(pattern or {}), names, ends=True)
    values = {}
    for matched, value in zip(matches, (pattern or {}).values(), strict=True):
        values = dict.fromkeys(map(exact_regex, sorted(matched)), value) | values
    return values


def matches_field(field: str, pattern, names: Iterable[str]) -> set[str]:
    """The names that a field of a file's config selects: a list of ends, or a regex."""
    if isinstance(pattern, list | None):
        ends = tuple(f".{end}" for end in pattern or ())
        return {name for name in names if f".{name}".endswith(ends)}
    if not isinstance(pattern, str):
        raise ValueError(f"{field}={shortened(pattern)} is no list and no regex")
    return match_all([pattern], names)[0]


def unambiguous(name: str, names: Iterable[str]) -> str:
    """The name; as a regex where it is also the end of another one's."""
    shared = any(other.endswith(f".{name}") for other in names)
    return exact_regex(name) if shared else name


def target_modules_of(model: nn.Module, wrapped: Collection[str]) -> list[str] | str:
    """What selects the wrapped modules by PEFT's rule: ends, whole names, a regex."""
    every = [name for name, _ in named_modules(model)]
    for ends in ({name.rpartition(".")[2] for name in wrapped}, set(wrapped)):
        if {n for n in every if _ends_with_one(n, ends)} == set(wrapped):
            return sorted(ends)
    return "|".join(map(re.escape, wrapped))


def _matches(patterns: Sequence[str], names: Sequence[str]) -> list[set[str]]:
    return [{n for n in names if re.fullmatch(p, n)} for p in patterns]


def _matches_in_time(patterns: Sequence[str], names: Sequence[str]) -> list[set[str]]:
    """_matches; TimeoutError or subprocess.TimeoutExpired after SECONDS."""
    if not _can_set_an_alarm():
        return _matches_of_a_child(patterns, names)
    with _alarm(SECONDS):
        return _matches(patterns, names)


def _matches_of_a_child(
    patterns: Sequence[str], names: Sequence[str]
) -> list[set[str]]:
    """_matches from a Python process of its own; its last words as a re.error."""
    child = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CHILD],
        input=json.dumps([patterns, names]),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if child.returncode:
        raise re.error(child.stderr.strip().rpartition("\n")[2])
    return [set(matches) for matches in json.loads(child.stdout)]


def _can_set_an_alarm() -> bool:
    """Whether this is POSIX's main thread, with a handler that can be put back."""
    return (
        hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGALRM)
        is not None  # None: set by other than Python
    )


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """A TimeoutError in the block after so many seconds.

    The handler and timer of before are put back. A timer that has run out in the
    meantime goes off when the block has ended.
    """
    armed = True

    def interrupt(signum, frame):
        if armed:
            raise TimeoutError

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, interrupt)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            left = max(left - (time.monotonic() - started), 1e-6)
            signal.setitimer(signal.ITIMER_REAL, left, interval)


def _ends_with_one(name, ends) -> bool:
    parts = name.split(".")
    return any(".".join(parts[i:]) in ends for i in range(len(parts)))
