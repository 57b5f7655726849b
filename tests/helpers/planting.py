"""Laws, and the planting of bugs: a law is trusted after it has been seen to fail.

A law is a function that raises AssertionError where it is broken. With `@law` pytest
runs it as a test, under the law's own name; a `Bug` names the law that must notice it,
and `each_is_caught` makes a test of a table of bugs.
"""

import inspect
import linecache
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


def law(function: Callable) -> Callable:
    """The function as a test, which stays a function that others may call.

    It stands above any `parametrize`. An argument that pytest sets may have a default,
    for those who call the law by hand: pytest, which refuses this, is not shown it.
    """
    function.__test__ = True
    marks = getattr(function, "pytestmark", [])
    filled = {name for mark in marks for name in _argument_names(mark)}
    signature = inspect.signature(function)
    function.__signature__ = signature.replace(
        parameters=[
            p.replace(default=p.empty) if p.name in filled else p
            for p in signature.parameters.values()
        ]
    )
    return function


def _argument_names(mark) -> list[str]:
    """The arguments that a `parametrize` sets; none for another mark."""
    if mark.name != "parametrize":
        return []
    names = mark.args[0]
    return names.replace(",", " ").split() if isinstance(names, str) else list(names)


@contextmanager
def planted(function: Callable, right: str, wrong: str) -> Iterator[None]:
    """Inside, `function` runs with one piece of its source exchanged: a bug.

    The code object is exchanged, so that every module which imported the function has
    the bug. A piece that does not occur exactly once is an error: the bug would be
    planted nowhere, and the law that "caught" it would have failed for another reason.
    """
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{right!r} occurs {source.count(right)} times"
    sound = function.__code__
    function.__code__ = _compiled(function, source.replace(right, wrong))
    try:
        yield
    finally:
        function.__code__ = sound


@contextmanager
def planted_kernel(module, name: str, right: str, wrong: str) -> Iterator[None]:
    """As `planted`, for a Triton kernel or a piece of one, as `module` knows it.

    Triton reads a kernel's source again when it runs it: the changed source gets a file
    of its own among the lines that Python remembers.
    """
    sound = getattr(module, name)
    source = textwrap.dedent(inspect.getsource(sound.fn))
    assert source.count(right) == 1, f"{right!r} occurs {source.count(right)} times"
    source, file, made = source.replace(right, wrong), f"<planted {name}: {wrong}>", {}
    linecache.cache[file] = len(source), None, source.splitlines(True), file
    exec(compile(source, file, "exec"), module.__dict__, made)
    setattr(module, name, made[name])
    try:
        yield
    finally:
        setattr(module, name, sound)
        del linecache.cache[file]


def assert_caught(function, right, wrong, law, *, errors=AssertionError) -> None:
    """With the bug planted, the law fails; a test of its own runs it on sound code."""
    with planted(function, right, wrong), pytest.raises(errors):
        law()


@dataclass(frozen=True)
class Bug:
    """A row of a table of bugs, and who must notice."""

    function: Callable  # the function whose source is changed …
    right: str  # … here …
    wrong: str  # … to this
    law: Callable  # must fail; called with what it asks for of folder and monkeypatch


def assert_law_catches(
    bug: Bug, folder: Path, monkeypatch, *, errors=AssertionError
) -> None:
    """The bug's law fails with the bug planted, and holds on sound code.

    The second is left to the law's own test where that makes the very same call.
    """
    for place in ("sound", "planted"):
        (folder / place).mkdir()

    def hold(place):
        asked = inspect.signature(bug.law).parameters
        offered = {"folder": folder / place, "monkeypatch": monkeypatch}
        bug.law(**{key: value for key, value in offered.items() if key in asked})

    if not _has_its_own_test(bug.law):
        hold("sound")
    with planted(bug.function, bug.right, bug.wrong), pytest.raises(errors):
        hold("planted")


def _has_its_own_test(law: Callable) -> bool:
    """Whether pytest runs the law with no arguments but those of its fixtures."""
    marks = getattr(law, "pytestmark", [])
    return getattr(law, "__test__", False) and not any(map(_argument_names, marks))


def each_is_caught(bugs: dict[str, Bug | tuple], errors=AssertionError) -> Callable:
    """A test with one case per row of a table of bugs: {what is wrong: its Bug}."""

    @pytest.mark.parametrize("bug", bugs.values(), ids=bugs)
    def test_a_planted_bug_is_caught(bug, tmp_path, monkeypatch):
        row = bug if isinstance(bug, Bug) else Bug(*bug)
        assert_law_catches(row, tmp_path, monkeypatch, errors=errors)

    return test_a_planted_bug_is_caught


def _compiled(function, source):
    """The code of `source`, inside a function that lends it the same closure."""
    cells = ", ".join(function.__code__.co_freevars)  # __class__, where super() is used
    body = textwrap.indent(source, "    ")
    made = {}
    exec(
        f"def lend({cells}):\n{body}\n    return {function.__name__}",
        dict(function.__globals__),
        made,
    )
    lent = made["lend"](*function.__code__.co_freevars)
    return inspect.unwrap(lent).__code__
