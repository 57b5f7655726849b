"""Cost cards: what a lesson takes, measured where it was built and told for here.

    products = seconds / seconds of one calibration product, both on one machine
    seconds here = products x seconds of one such product here

The product is that of measured_rate: 600 rows through 30 matrices of SmolLM2's shape,
in as many threads as the lesson has. So a card carries over to another machine, as far
as the lesson's time is such products. data/costs.json has a card a lesson, written by
notebooks/build.py in the kernel of the executed notebook.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from IPython import get_ipython

from ..common import atomic, provenance, records, units
from ..comparison import estimate

FILE = provenance.ROOT / "data" / "costs.json"
OVERRIDE = "PFS_COSTS"  # names another such file: the build's, before it is done
ROWS = 600  # of the calibration product
PRODUCT = 2 * ROWS * estimate.HIDDEN * estimate.MLP * estimate.DEPTH  # FLOPs
CALIBRATION = 0.4  # seconds
BEGUN = time.process_time()  # a kernel's seconds until here: torch and we are imported


@dataclass(frozen=True)
class Card:
    """What a lesson took.

    products      calibration products that took as long
    seconds       where it was measured: imports and cells, without thinking
    peak_bytes    resident memory of the process at most
    device_bytes  of the accelerator's memory at most; None on a CPU
    downloads     bytes; 0, since set-up has fetched the base
    """

    products: float
    seconds: float
    peak_bytes: int
    device_bytes: int | None
    downloads: int
    base: str
    device: str
    threads: int
    machine: str
    when: str  # a date

    def here(self, product: float) -> float:
        """Seconds on a machine where one product takes `product` seconds."""
        return self.products * product

    def __str__(self):
        spent = f"{estimate.duration(self.seconds)} and {gigabytes(self.peak_bytes)}"
        if self.device_bytes:
            spent += f", {gigabytes(self.device_bytes)} of the device's"
        where = f"{self.machine}, {self.device}, {threads(self.threads)}"
        return f"{spent}, on {self.when}, with {self.base} on {where}"


def read(file: Path | None = None) -> dict[str, Card]:
    """{notebook's number: its card}; {} where there is no file."""
    file = file or _file()
    if not file.exists():
        return {}
    return {n: Card(**card) for n, card in records.read_object(file).items()}


def write(cards: Mapping[str, Card], file: Path | None = None) -> None:
    """Write all cards, by number."""
    entries = {number: asdict(cards[number]) for number in sorted(cards)}
    with atomic.new_file(file or _file()) as partial:
        partial.write_text(json.dumps(entries, indent=1) + "\n", "utf-8")


def _file() -> Path:
    return Path(os.environ.get(OVERRIDE, FILE))


def measure(clock: "Clock", base: str, device: torch.device, product: float) -> Card:
    """The card of this process so far."""
    seconds = clock.seconds()
    on_gpu = device.type == "cuda"
    return Card(
        products=float(f"{seconds / product:.3g}"),
        seconds=round(seconds, 1),
        peak_bytes=peak_bytes(),
        device_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        downloads=0,
        base=base,
        device=provenance.device_name(device),
        threads=torch.get_num_threads(),
        machine=f"{provenance.processor()}, {os.cpu_count()} cores, "
        f"{provenance.memory_gib():.0f} GiB",
        when=f"{datetime.now(UTC):%Y-%m-%d}",
    )


def product_seconds(device: torch.device) -> float:
    """Seconds of one calibration product on this machine, now."""
    return PRODUCT / estimate.measured_rate(device, ROWS, CALIBRATION)


def peak_bytes() -> int:
    """The most memory this process has had resident, in bytes; 0 where no one tells."""
    try:  # getrusage would tell the memory of the parent that started us, if larger
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def gigabytes(count: int) -> str:
    return f"{units.gigabytes(count, '.2g' if count < units.GB else '.1f')} GB"


class Clock:
    """Seconds of imports and of cells; a learner's thinking between them left out.

    Outside IPython it simply runs on.
    """

    def __init__(self):
        self.spent = BEGUN
        self.since: float | None = time.perf_counter()
        shell = get_ipython()
        if shell is not None:
            shell.events.register("pre_run_cell", lambda *_: self.run())
            shell.events.register("post_run_cell", lambda *_: self.pause())

    def seconds(self) -> float:
        running = 0.0 if self.since is None else time.perf_counter() - self.since
        return self.spent + running

    def run(self) -> None:
        if self.since is None:
            self.since = time.perf_counter()

    def pause(self) -> None:
        self.spent, self.since = self.seconds(), None
