"""Attacks on the check of an exercise: answers that are right once, and gamed since.

Each function here gives a change of the right answer, by what CHECKLIST.md calls the
class of the input: `stale("alpha")(code)` is the source of an answer whose alpha is for
ever what it was in the first call. tests/wrong_answers/ lists them by exercise:

    ATTACKS    {"4.1": {"arguments": {"alpha of the first call": stale("alpha")}, …}}
    ALSO_RIGHT {"4.1": {"arguments": {"by position": another source}, …}}

A class that an exercise has no place for says why, in the place of its table.
"""

import ast
from dataclasses import dataclass

CLASSES = ("arguments", "state", "inputs", "kinds", "randomness", "kernels")
HERE = "{arguments}"


@dataclass(frozen=True)
class Attack:
    """Statements around the call of the right answer, whose value is `result`."""

    before: str = ""
    after: str = ""
    outside: str = ""
    method: str = ""  # of a class, or of a cell with several functions: which one

    def __call__(self, code: str) -> str:
        """The source of an exercise's cell, attacked."""
        nodes = ast.parse(code).body
        named = [n for n in nodes if getattr(n, "name", "") == self.method]
        node = (named or nodes)[-1]
        if isinstance(node, ast.ClassDef):
            return self._of_class(code, node)
        return self._of_function(code, node)

    def _of_function(self, code: str, node: ast.FunctionDef) -> str:
        lines = [f"def {node.name}({ast.unparse(node.args)}):", *self._body(node, "")]
        return "\n".join([code, f"_right = {node.name}", self.outside, *lines, ""])

    def _of_class(self, code: str, node: ast.ClassDef) -> str:
        (function,) = (
            each
            for each in node.body
            if isinstance(each, ast.FunctionDef) and each.name == self.method
        )
        header = f"    def {function.name}({ast.unparse(function.args)}):"
        body = [f"    {line}" for line in self._body(function, function.name)]
        before = [code, f"_Right = {node.name}", self.outside]
        return "\n".join([*before, f"class {node.name}(_Right):", header, *body, ""])

    def _body(self, function: ast.FunctionDef, method: str) -> list[str]:
        names = [each.arg for each in function.args.args if each.arg != "self"]
        called = f"super().{method}" if method else "_right"
        lines = [
            *self.before.replace(HERE, ", ".join(names)).splitlines(),
            f"result = {called}({', '.join(names)})",
            *self.after.replace(HERE, ", ".join(names)).splitlines(),
            "return result",
        ]
        return [f"    {line}" for line in lines]


def stale(name: str, method: str = "") -> Attack:
    """An argument is what it was at first: seen by checks that vary it."""
    first = f"{name} = _first.setdefault({name!r}, {name})"
    return Attack(before=first, outside="_first = {}", method=method)


def fixed(name: str, value: str, method: str = "") -> Attack:
    """An argument is ignored; a value of the notebook stands in its place."""
    return Attack(before=f"{name} = {value}", method=method)


def remembered(key: str, method: str = "") -> Attack:
    """What was computed for the same key comes back: a cache that looks too briefly."""
    return Attack(
        after=f"result = _kept.setdefault({key}, result)",
        outside="_kept = {}",
        method=method,
    )


def every_time_but(number: int, wrong: str, method: str = "") -> Attack:
    """Wrong from this call on; the first is number one."""
    return Attack(
        after=f"if next(_calls) >= {number}:\n    result = {wrong}",
        outside="import itertools\n_calls = itertools.count(1)",
        method=method,
    )


def afterwards(*statements: str, method: str = "") -> Attack:
    """The right result, and something done beside it: x.add_(1) for example."""
    return Attack(after="\n".join(statements), method=method)


def returned(expression: str, method: str = "") -> Attack:
    """The right `result` in another kind, dtype or place."""
    return Attack(after=f"result = {expression}", method=method)


def where(condition: str, wrong: str, method: str = "") -> Attack:
    """The right result but for some inputs, where it is wrong."""
    return Attack(after=f"if {condition}:\n    result = {wrong}", method=method)


def first(*statements: str, method: str = "") -> Attack:
    """The right answer, to other arguments."""
    return Attack(before="\n".join(statements), method=method)
