"""What the benchmarks share: candidates that take turns, ratios, the file of a result.

The candidates take turns in one process, so that a machine which slows down slows all
of them; a ratio compares two times of one round.

Beside other work, even that is not enough: threads wait for each other, and whoever
has more of them to wait for looks slower. So a machine with a load above 0.5 a core
when a benchmark starts counts as busy. Its ratios are then of processor time, and
nothing is recorded unless --allow-load asks for it; the record says which clock it was.
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
from peft_from_scratch.common.provenance import processor
from peft_from_scratch.comparison.timing import synchronize

WARM_UP = 3  # rounds that are not counted
FEWEST = 7  # counted rounds
RESULTS, OUT = Path(__file__).parent / "results", Path("out")
BUSY = 0.5  # load a core, above which a wall clock is not believed
WALL, PROCESSOR = "wall", "processor"  # clocks; the places of a time in Times

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
    """As `ratios`, by the clock that is believed, with the ratio of processor times."""
    which = (WALL, PROCESSOR).index(clock())
    rows = ratios({n: [lap[which] for lap in laps] for n, laps in times.items()}, first)
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
    busy = f"The machine is busy, {_a_core()}: all of these times are processor time."
    return [
        f"{'median of ' + str(rounds) + ' rounds':30}"
        f"{'seconds':>8}{'ratio':>8}{'lowest':>8}{'highest':>8}{'processor time':>16}",
        *(
            f"{row['name']:30}{row['seconds']:8.3f}{row['ratio']:8.2f}{row['low']:8.2f}"
            f"{row['high']:8.2f}{row['processor_ratio']:16.2f}"
            for row in rows
        ),
        *([busy] if clock() == PROCESSOR else []),
    ]


def verdict(ratio: float, target: float) -> str:
    return f"target, at most {target:.2f}: {'reached' if ratio <= target else 'missed'}"


def load() -> float | None:
    """The load average of the last minute, where the system has one."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


START = load()  # before any work of our own


def clock() -> str:
    """The clock whose ratios are believed: wall, or on a busy machine processor."""
    return PROCESSOR if (START or 0) > BUSY * os.cpu_count() else WALL


def conditions(of_clock: str) -> dict:
    """Under which a result was measured, as JSON can hold it."""
    return {
        "clock": of_clock,
        "load_before": START,
        "load_after": load(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": processor(),
    }


def _a_core() -> str:
    cores = os.cpu_count()
    return f"a load of {START} on {cores} cores, {(START or 0) / cores:.2f} a core"


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
        "--allow-load",
        action="store_true",
        help="record on a busy machine as well, with ratios of processor time",
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
    if asked.record and clock() == PROCESSOR and not asked.allow_load:
        new.error(
            f"the machine is busy, {_a_core()}; nothing is recorded above {BUSY}. Wait "
            "until it is idle, or record ratios of processor time with --allow-load"
        )
    if asked.threads:
        torch.set_num_threads(asked.threads)
    return asked


def write(result: dict, record: bool, place: str | None = None, out: Path = OUT) -> str:
    """Write result and conditions to a folder, or to results/ with a place's name.

    The place is the machine, or what else was measured: a GPU.

    Returns  a line that says where
    """
    elsewhere = place is not None
    place = place or result["provenance"]["machine"].rpartition(",")[0]
    slug = re.sub(r"[^a-z0-9]+", "-", place.lower()).strip("-")
    folder, name = (RESULTS, f"-{slug}") if record else (out, "")
    file = folder / f"{result['benchmark']}{name}.json"
    of_clock = WALL if elsewhere else clock()  # a GPU's work is no processor's
    result = result | {"conditions": conditions(of_clock)}
    with new_file(file) as new:
        new.write_text(json.dumps(result, indent=2) + "\n")
    return f"written to {os.path.relpath(file)}"
