"""Planting bugs: a law is trusted after it has been seen to fail."""

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest


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


def assert_caught(function, right, wrong, law, *, errors=AssertionError) -> None:
    """With the bug planted, the law fails; a test of its own runs it on sound code."""
    with planted(function, right, wrong), pytest.raises(errors):
        law()


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
