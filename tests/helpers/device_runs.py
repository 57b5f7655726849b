"""Cases in processes of their own, on the device of pretend_device.py.

    python tests/helpers/device_runs.py                 by hand: every case
    python tests/helpers/device_runs.py gpt2 dora       those with both in their names

A process that dies takes one case with it: the others run in the next process.
"""

import importlib
import inspect
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]
CASES = "laws.device.cases"  # a module with CASES, {name: law}
PROCESSES = 2
LONGEST = 1800  # seconds, for all cases of a process


@dataclass(frozen=True)
class Outcome:
    """How a case ended: after how many seconds of the CPU, by which error if any."""

    seconds: float
    error: str | None


def shared(names: Sequence[str], folder: Path) -> dict[str, Outcome]:
    """{name: its outcome}, run once by the first of several processes that ask.

    Args
        folder  known to all of them; the first makes it
    """
    done = folder / "outcomes.json"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + LONGEST
        while not done.exists():
            assert time.monotonic() < deadline, f"no {done} after {LONGEST} seconds"
            time.sleep(0.2)
        return {n: Outcome(**each) for n, each in json.loads(done.read_text()).items()}
    outcomes = run(names, folder)
    new = folder / "new.json"
    new.write_text(json.dumps({n: asdict(each) for n, each in outcomes.items()}))
    new.rename(done)
    return outcomes


def run(names: Sequence[str], folder: Path, cases: str = CASES) -> dict[str, Outcome]:
    """{name: its outcome}, of cases that share PROCESSES processes."""
    shares = [names[first::PROCESSES] for first in range(PROCESSES)]
    reports = [folder / f"share {first}" for first in range(PROCESSES)]
    with ThreadPoolExecutor(PROCESSES) as threads:
        parts = threads.map(_run_share, shares, reports, [cases] * PROCESSES)
        return {name: outcome for part in parts for name, outcome in part.items()}


def _run_share(names, report: Path, cases: str) -> dict[str, Outcome]:
    """The outcomes of one share, in as many processes as it takes."""
    outcomes = {}
    while left := [name for name in names if name not in outcomes]:
        report.write_text("")
        end = _end_of_process(left, report, cases)
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        outcomes |= {line.pop("name"): Outcome(**line) for line in lines}
        if end is not None or len(outcomes) < len(names):
            at = next((name for name in left if name not in outcomes), left[-1])
            outcomes[at] = Outcome(0.0, f"the process ended in this case: {end}")
    return outcomes


def _end_of_process(names, report: Path, cases: str) -> str | None:
    """Run cases in a process; None where it ended well, else how, and what it said."""
    command = [sys.executable, str(Path(__file__)), "--report", str(report), cases]
    path = [str(TESTS.parent), str(TESTS), str(TESTS / "helpers"), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(names),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired as error:
        return f"it took longer than {LONGEST} seconds\n{error.output}"
    return (
        f"status {done.returncode}\n{done.stdout[-4000:]}" if done.returncode else None
    )


# ------------------------------------------------------- in the process of the cases


def report(names: Sequence[str], cases: dict, file) -> None:
    """Run cases, and write a line on each as soon as it has ended."""
    for name in names:
        begun, error = time.process_time(), None
        try:
            hold(cases[name])
        except Exception:
            error = traceback.format_exc()
        seconds = time.process_time() - begun
        print(
            json.dumps({"name": name, "seconds": seconds, "error": error}),
            file=file,
            flush=True,
        )


def hold(law) -> None:
    """Call a law, with seed 0, and with a monkeypatch if it asks for one.

    LoRA adds in place, there and on the CPU, as it does on a GPU. Without this the
    device's tensors, which are a subclass, would get the plain equation.
    """
    import pytest  # not before the process has its device
    import torch

    from peft_from_scratch.methods import lora_fast

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.setattr(
            lora_fast, "is_safe", lambda base, _: not base._forward_hooks
        )
        takes = "monkeypatch" in inspect.signature(law).parameters
        law(monkeypatch) if takes else law()


def main(arguments: list[str]) -> None:
    os.environ["LAWS_DEVICE"] = "pretend"
    import pretend_device
    import torch

    torch.set_num_threads(1)
    if arguments[:1] == ["--report"]:
        cases = importlib.import_module(arguments[2]).CASES
        with open(arguments[1], "a") as file:
            report(json.load(sys.stdin), cases, file)
    else:
        cases = importlib.import_module(CASES).CASES
        report([n for n in cases if all(w in n for w in arguments)], cases, sys.stdout)
    pretend_device.leave(0)


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent), str(TESTS)]
    main(sys.argv[1:])
