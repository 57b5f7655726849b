"""Kill a training run at random moments, resume it, and compare every bit.

    python tests/helpers/kill_and_resume.py --kills 20

A round trains a small model with dropout, validation and early stopping in a process of
its own, which is killed (SIGKILL, on Windows its equivalent) at a moment drawn from the
whole life of such a process: while it starts, reads a checkpoint, trains, validates or
writes. It is started again until it ends by itself; then everything in its last
checkpoint has to equal that of a run that nobody touched. Rounds follow until the kills
are used up. Exits with 1 if a round differs.
"""

import argparse
import multiprocessing
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file
from small_runs import adapted, recipe, run
from tqdm import tqdm

from peft_from_scratch.common.atomic import TEMPORARY
from peft_from_scratch.training.checkpoint import checkpoints

# Method, architecture: a LoRA with dropout, and a whole model with tied embeddings and
# dropout of its own. Steps span epochs; checkpoints fall between validations.
CASES = {"lora": "llama", "full": "gpt2"}
IN_HALF = {f"{method} in bfloat16": method for method in CASES}
SLOW_TO_IMPORT = [
    "datasets",
    *(f"transformers.models.{name}.modeling_{name}" for name in CASES.values()),
]
SETTINGS = dict(steps=24, validate_every=3, patience=4, checkpoint_every=2)
KILLED = -signal.SIGKILL if hasattr(signal, "SIGKILL") else 1  # exit code


@dataclass(frozen=True)
class Kill:
    """A row of the table."""

    case: str
    round: int
    seconds: float  # after the process was started
    on_disk: str  # the newest checkpoint that it left
    half_written: int  # checkpoints it was in the middle of writing


def child(case: str, folder: Path) -> None:
    """The run; what it knows of earlier processes is in the folder."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # by default a semaphore, which a kill would leak
    method = IN_HALF.get(case, case)
    half, masters = case in IN_HALF, method == "full"
    dtype = torch.bfloat16 if half and not masters else torch.float32
    settings = recipe(**SETTINGS, autocast="bfloat16" if half and masters else None)
    run(adapted(method, CASES[method], dtype=dtype), settings, checkpoints=folder)


def start(case: str, folder: Path) -> multiprocessing.Process:
    """The run in a process of its own, forked where possible after the imports."""
    known = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context(
        "forkserver" if "forkserver" in known else "spawn"
    )
    if "forkserver" in known:
        context.set_forkserver_preload(SLOW_TO_IMPORT)
    process = context.Process(target=child, args=(case, folder))
    process.start()
    return process


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint: weights, moments, best, generators."""
    newest = checkpoints(folder)[-1]
    return {
        f"{file.stem}/{name}": tensor
        for file in newest.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def differences(ours: dict, theirs: dict) -> list[str]:
    """The tensors that are not in both, or not equal in every bit."""
    missing = set(ours) ^ set(theirs)
    both = set(ours) & set(theirs)
    return sorted(missing) + [n for n in both if not torch.equal(ours[n], theirs[n])]


def undisturbed(case: str, folder: Path) -> tuple[dict[str, torch.Tensor], float]:
    """(the end of a run that nobody touches, seconds that its process lived)."""
    start(case, folder).join()  # warms up the fork server
    begin = time.perf_counter()
    process = start(case, folder / "again")
    process.join()
    return contents(folder / "again"), time.perf_counter() - begin


def round_of_kills(
    case: str, folder: Path, number: int, moments: list[float]
) -> Iterator[Kill]:
    """Start the run until it ends by itself, killed at each of `moments` before."""
    for seconds in [*moments, None]:
        process = start(case, folder)
        process.join(seconds)
        process.kill()
        process.join()
        if process.exitcode == 0:
            return
        if seconds is None or process.exitcode != KILLED:
            raise RuntimeError(f"the run failed by itself, exit {process.exitcode}")
        newest = [path.name for path in checkpoints(folder)[-1:]]
        halves = len(list(folder.glob(f"{TEMPORARY}*")))
        yield Kill(case, number, seconds, *newest or ["nothing"], halves)


def trial(case: str, kills: int, folder: Path, draw: random.Random) -> Iterator[Kill]:
    """Rounds of one case until `kills` are used up; AssertionError on a difference."""
    expected, lifetime = undisturbed(case, folder / "undisturbed")
    number = 0
    while kills:
        number += 1
        here = folder / f"round-{number}"
        moments = [draw.uniform(0, lifetime) for _ in range(kills)]
        for kill in round_of_kills(case, here, number, moments):
            kills -= 1
            yield kill
        wrong = differences(contents(here), expected)
        assert not wrong, f"{case}, round {number}: {', '.join(wrong[:3])} differ"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="in all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    print("  ".join(f"{field.name:>12}" for field in fields(Kill)))
    with tempfile.TemporaryDirectory() as folder:
        cases = [*CASES, *IN_HALF]
        for i, case in enumerate(cases):
            share = options.kills // len(cases) + (i < options.kills % len(cases))
            try:
                for kill in trial(case, share, Path(folder, case), draw):
                    row = (
                        f"{v:.2f}" if isinstance(v, float) else v for v in astuple(kill)
                    )
                    print("  ".join(f"{value:>12}" for value in row), flush=True)
            except AssertionError as error:
                print(error)
                return 1
            print(f"{case}: every round ended in the bits of the undisturbed run")
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)
    sys.exit(main())
