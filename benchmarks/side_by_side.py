"""What the benchmarks share: candidates that take turns, ratios, the file of a result.

The candidates take turns in one process, so that a machine which slows down slows all
of them; a ratio compares two times of one round.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from peft_from_scratch.common.atomic import new_file
from peft_from_scratch.comparison.timing import synchronize

WARM_UP = 3  # rounds that are not counted
FEWEST = 7  # counted rounds
RESULTS, OUT = Path(__file__).parent / "results", Path("out")

Times = dict[str, list[tuple[float, float]]]  # (seconds, of processor time), by round


class Laps:
    """A stopwatch that is handed from candidate to candidate."""

    def __init__(self, names, device: torch.device):
        self.device = device
        self.times: Times = {name: [] for name in names}
        self.before = self._clocks()

    def lap(self, name: str) -> None:
        """The time since the last lap was this candidate's."""
        now = self._clocks()
        self.times[name].append((now[0] - self.before[0], now[1] - self.before[1]))
        self.before = now

    def counted(self) -> Times:
        return {name: laps[WARM_UP:] for name, laps in self.times.items()}

    def _clocks(self) -> tuple[float, float]:
        synchronize(self.device)
        return time.perf_counter(), time.process_time()


def take_turns(
    candidates: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> Times:
    """Every candidate's times in `rounds` counted rounds."""
    laps = Laps(candidates, device)
    for _ in range(WARM_UP + rounds):
        for name, step in candidates.items():
            step()
            laps.lap(name)
    return laps.counted()


def table(times: Times, first: str) -> list[dict]:
    """As `ratios`, with the ratio of the processor times."""
    walls = {name: [seconds for seconds, _ in laps] for name, laps in times.items()}
    rows = ratios(walls, first)
    for row in rows:
        pairs = zip(times[row["name"]], times[first], strict=True)
        row["processor_ratio"] = median(mine[1] / other[1] for mine, other in pairs)
    return rows


def ratios(seconds: dict[str, list[float]], first: str) -> list[dict]:
    """A row a candidate: median seconds, and its ratio to the first's in its round."""
    rows = []
    for name, mine in seconds.items():
        each = [a / b for a, b in zip(mine, seconds[first], strict=True)]
        rows.append(
            {
                "name": name,
                "seconds": median(mine),
                "ratio": median(each),
                "low": min(each),
                "high": max(each),
            }
        )
    return rows


def lines(rows: list[dict], rounds: int) -> list[str]:
    """The table as text, for a terminal."""
    return [
        f"{'median of ' + str(rounds) + ' rounds':30}"
        f"{'seconds':>8}{'ratio':>8}{'lowest':>8}{'highest':>8}{'processor time':>16}",
        *(
            f"{row['name']:30}{row['seconds']:8.3f}{row['ratio']:8.2f}{row['low']:8.2f}"
            f"{row['high']:8.2f}{row['processor_ratio']:16.2f}"
            for row in rows
        ),
    ]


def verdict(ratio: float, target: float) -> str:
    return f"target, at most {target:.2f}: {'reached' if ratio <= target else 'missed'}"


def load() -> float | None:
    """The load average of the last minute, where the system has one."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def parser(doc: str) -> argparse.ArgumentParser:
    """What every benchmark takes."""
    new = argparse.ArgumentParser(description=doc.splitlines()[0])
    new.add_argument(
        "--rounds", type=int, default=9, help=f"counted; at least {FEWEST}"
    )
    new.add_argument("--threads", type=int, help="of torch; default: its own choice")
    new.add_argument(
        "--record", action="store_true", help=f"write to {RESULTS.name}/, for git"
    )
    new.add_argument(
        "--out", type=Path, default=OUT, help="folder of a result that is not recorded"
    )
    return new


def parsed(new: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The arguments, checked; the number of threads is set."""
    asked = new.parse_args(arguments)
    if asked.rounds < FEWEST or (asked.threads is not None and asked.threads < 1):
        new.error(f"--rounds: at least {FEWEST}; --threads: at least 1")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    return asked


def write(result: dict, record: bool, place: str | None = None, out: Path = OUT) -> str:
    """Write the result to a folder, or to results/ with a place's name in its own.

    The place is the machine, or what else was measured: a GPU.

    Returns  a line that says where
    """
    place = place or result["provenance"]["machine"].rpartition(",")[0]
    slug = re.sub(r"[^a-z0-9]+", "-", place.lower()).strip("-")
    folder, name = (RESULTS, f"-{slug}") if record else (out, "")
    file = folder / f"{result['benchmark']}{name}.json"
    with new_file(file) as new:
        new.write_text(json.dumps(result, indent=2) + "\n")
    return f"written to {os.path.relpath(file)}"
