"""A scorer in a Python file of the user's own, run in a process of its own.

    # mine.py
    def score(answer, completion):
        return answer.strip().lower() == completion.strip().lower()

The file is the user's code and runs as `python mine.py` would: it may import what is
installed and what lies beside it. It runs in another process (score_worker.py), so that
nothing in it can stop, seed or slow down a training run: an endless loop ends after
SECONDS, `exit()` and a crash are errors with a line number, and what it prints goes to
the terminal. Answers are sent in one go, and a process is started for each go.

The file is read once. A later edit changes nothing in a run that has begun, and the
run's configuration holds the digest of what was read.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import score_worker
from .templates import placed

SECONDS = 60.0  # that the score of one row may take
# What a model may answer to any row. A scorer that fails on it would fail in an hour.
ODD_ANSWERS = ("", "I am sorry, but I cannot answer that.", '{"a": [1, "', "0")


@dataclass(frozen=True)
class ScoreFile:
    """The file's path and its content."""

    path: str
    source: bytes

    def scores(
        self, pairs: Sequence[tuple[str, str]], places: Sequence[str]
    ) -> list[bool | float]:
        """The score of each (answer, completion).

        Raises  ValueError  the file holds no score(), raises, ends, takes too long, or
                returns what is no score: with the file's line, and the row
        """
        loaded, results, rest = self._run(pairs)
        if loaded != {"loaded": True}:
            raise self._loading(loaded or self._ended(rest))
        for place, pair, result in zip(places, pairs, results, strict=False):
            if "error" in result:
                raise self._error(result, place, pair)
        done = len(results)
        if done == len(pairs):
            return [result["score"] for result in results]
        raise self._error(self._ended(rest), places[done], pairs[done])

    def unfit(self, rows: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
        """[]: no row is unfit for a file that runs.

        Answers are tried that a model may give, and each row's own completion.

        Raises  ValueError  it fails on one of them, or each completion is wrong by it
        """
        places = [place for place, _ in placed(rows)]
        first = rows[0]["completion"]
        self.scores([(odd, first) for odd in ODD_ANSWERS], places[:1] * 4)
        own = [(row["completion"], row["completion"]) for row in rows]
        if not any(self.scores(own, places)):
            raise ValueError(
                f"the scorer {self.path} gives 0 to each of {len(own)} test rows' own "
                "completions: with it no answer can be right"
            )
        return []

    def _run(self, pairs) -> tuple[dict | None, list[dict], str]:
        """How loading went, each pair's result, and all else that was written."""
        asked = {
            "path": self.path,
            "source": self.source.decode("latin-1"),  # a byte a letter
            "seconds": SECONDS,
            "pairs": list(pairs),
        }
        done = subprocess.run(
            [sys.executable, "-P", score_worker.__file__],
            input=json.dumps(asked),
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
            errors="replace",
        )
        lines = done.stdout.splitlines()
        results = [json.loads(line) for line in lines if line.startswith("{")]
        rest = "\n".join(line for line in lines if not line.startswith("{"))
        loaded = results.pop(0) if results else None
        return loaded, results, rest or f"exit status {done.returncode}"

    def _ended(self, rest: str) -> dict:
        """Why the process ended in the middle of a row, as one of its results."""
        if "Timeout" not in rest:
            return {"error": f"ended the process ({rest})", "line": None}
        shown = self.path.encode("ascii", "backslashreplace").decode()
        ours = [at for at in rest.splitlines() if f'File "{shown}", line ' in at]
        line = ours[0].partition(", line ")[2].split()[0] if ours else None
        return {"error": f"took longer than {SECONDS:g} s", "line": line}

    def _loading(self, result) -> ValueError:
        return ValueError(f"{self._at(result)} cannot be used: {result['error']}")

    def _error(self, result, place, pair) -> ValueError:
        return ValueError(
            f"{self._at(result)}: {result['error']}, for the answer {_short(pair[0])} "
            f"to {place}, whose completion is {_short(pair[1])}. score() has to return "
            "True, False, or a number from 0 to 1, whatever a model answers"
        )

    def _at(self, result) -> str:
        at = f" (line {result['line']})" if result["line"] else ""
        return f"the scorer {self.path}{at}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")
