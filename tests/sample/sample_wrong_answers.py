"""Wrong answers to the exercises of the sample lesson."""

import sample_lesson as checks  # noqa: F401  the runner asks for it

PREAMBLE = "two = 2"


def _twice(answer):
    return f"def my_twice(x):\n    return {answer}"


def _power(init, call):
    return f"""\
class MyPower:
    def __init__(self, k):
        self.k = {init}

    def __call__(self, x):
        return {call}
"""


MUTANTS = {
    "90.1": {
        "all zeros": _twice("x * 0"),
        "once": _twice("x.clone()"),
        "the square": _twice("x ** two"),
        "in place": _twice("x.add_(x)"),
        "the sum": _twice("(x + x).sum()"),
    },
    "90.2": {
        "all zeros": _power("k", "x * 0"),
        "times k": _power("k", "x * self.k"),
        "k ignored": _power("2", "x ** self.k"),
        "a list": _power("k", "(x ** self.k).tolist()"),
    },
}
