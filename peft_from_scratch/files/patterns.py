"""How an adapter file names modules: reading what strangers wrote, and writing it.

A regex of twenty characters can keep Python busy for years on one module's name, and
nothing interrupts it. So a pattern that could is matched in a process of its own, which
is stopped after a few seconds. Plain names, as most files hold, need no process.
"""

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence

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


def select(
    patterns: Sequence[str], names: Iterable[str], *, ends: bool = False
) -> list[set[str]]:
    """For each pattern, the names that it matches as a whole.

    Args
        ends  a pattern may also match what follows a dot, as in PEFT's rank_pattern
    Raises  ValueError  one that is no regex, or that takes too long
    """
    names = list(names)
    whole = [ENDS.format(pattern) if ends else pattern for pattern in patterns]
    if not any(map(REPEATS.search, patterns)):
        found = [[n for n in names if _fits(p, n)] for p in whole]
    else:
        found = _apart(whole, names, patterns)
    return [set(each) for each in found]


def resolved(field: str, pattern: dict | None, names: Iterable[str]) -> dict:
    """A file's {pattern: value} with the exact pattern of each module instead.

    The first pattern that matches a module decides, as in PEFT.
    """
    refuse_no_mapping(field, pattern)
    found = select(list(pattern or {}), names, ends=True)
    values = {}
    for selected, value in zip(found, (pattern or {}).values(), strict=True):
        values = dict.fromkeys(map(exact_regex, sorted(selected)), value) | values
    return values


def selected(field: str, pattern, names: Iterable[str]) -> set[str]:
    """The names that a field of a file's config selects: a list of ends, or a regex."""
    if isinstance(pattern, list | None):
        ends = tuple(f".{end}" for end in pattern or ())
        return {name for name in names if f".{name}".endswith(ends)}
    if not isinstance(pattern, str):
        raise ValueError(f"{field}={shortened(pattern)} is no list and no regex")
    return select([pattern], names)[0]


def alone(name: str, names: Iterable[str]) -> str:
    """The name; as a regex where it is also the end of another one's."""
    shared = any(other.endswith(f".{name}") for other in names)
    return exact_regex(name) if shared else name


def shortest(model: nn.Module, wrapped: Collection[str]) -> list[str] | str:
    """What selects the wrapped modules by PEFT's rule: ends, whole names, a regex."""
    every = [name for name, _ in named_modules(model)]
    for ends in ({name.rpartition(".")[2] for name in wrapped}, set(wrapped)):
        if {n for n in every if _ends_with_one(n, ends)} == set(wrapped):
            return sorted(ends)
    return "|".join(map(re.escape, wrapped))


def _fits(pattern, name) -> bool:
    try:
        return bool(re.fullmatch(pattern, name))
    except re.error as error:
        raise ValueError(f"{shortened(pattern)} is no regex: {error}") from None


def _apart(whole, names, patterns) -> list[list[str]]:
    command = [sys.executable, "-I", "-S", "-c", CHILD]
    asked = json.dumps([whole, names])
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"a pattern of {shortened(list(patterns))} takes more than {SECONDS:.0f} s to "
            "match this model's module names; write the names out instead"
        ) from None
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise ValueError(
            f"{shortened(list(patterns))} holds what is no regex: {reason}"
        )
    return json.loads(done.stdout)


def _ends_with_one(name, ends) -> bool:
    parts = name.split(".")
    return any(".".join(parts[i:]) in ends for i in range(len(parts)))
