"""The process that runs a user's scorer; see score_file.py. It imports only Python's.

Reads {"path", "source", "seconds", "pairs"} as JSON and writes lines of JSON: one when
the file is loaded, {"loaded": true}, and one for each pair as soon as it is scored,
{"score": 0.5}. The first {"error": "…", "line": 12} is the last line.
"""

import faulthandler
import json
import numbers
import os
import signal
import sys
import traceback
from types import ModuleType


def run() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: end without a word
    asked = json.load(sys.stdin)
    results = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    os.dup2(2, 1)  # what the scorer prints is no result
    sys.path.insert(0, os.path.dirname(os.path.abspath(asked["path"])))
    write(results, asked)
    results.flush()
    os._exit(0)  # whatever threads the scorer has left running


def write(results, asked: dict) -> None:
    """A line for each pair, up to the first error."""
    path, score = asked["path"], None
    for pair in [None, *asked["pairs"]]:
        faulthandler.dump_traceback_later(asked["seconds"], exit=True, file=results)
        try:
            if pair is None:
                score = load(path, asked["source"].encode("latin-1"))
                result = {"loaded": True}
            else:
                result = {"score": checked(score(*pair))}
        except BaseException as error:  # SystemExit as well
            line = line_of(error, path) or first_line(score)
            result = {"error": in_words(error), "line": line}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(result), file=results)
        if "error" in result:
            return


def load(path: str, source: bytes):
    """The function `score` of the file."""
    module = ModuleType("scorer")
    module.__file__ = path
    sys.modules["scorer"] = module
    exec(compile(source, path, "exec"), module.__dict__)
    score = getattr(module, "score", None)
    if not callable(score):
        raise ValueError("it has no function score(answer, completion)")
    return score


def checked(value) -> bool | float:
    """The score as Python's own number; ValueError for what is none."""
    if hasattr(value, "item"):  # a number of numpy, or of torch
        value = value.item()
    if isinstance(value, bool):
        return value
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{value!r:.60} is no score")
    if not 0 <= value <= 1:  # NaN is not, either
        raise ValueError(f"{value!r:.60} is no score from 0 to 1")
    return float(value)


def in_words(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg}"
    text = str(error).strip().splitlines()
    name = type(error).__name__
    return f"{name}: {text[0][:200]}" if text else name


def line_of(error: BaseException, path: str) -> int | None:
    """The line of the file that the error comes from; None where it is not in it."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((f.lineno for f in reversed(frames) if f.filename == path), None)


def first_line(function) -> int | None:
    """Where the function begins; None before it is loaded, and for other callables."""
    return getattr(getattr(function, "__code__", None), "co_firstlineno", None)


if __name__ == "__main__":
    run()
