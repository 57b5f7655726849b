"""What would make a step fit: single changes to a setup, and what each of them saves.

Each change is judged alone, by the peak of the bill that has it. The peak and not the
total counts: a change that shortens a row of the bill saves nothing where another
moment of the step is the highest.

A card of 24 GB has 24 GiB. Here it has 24e9 bytes: the difference, 7 %, is for what no
tensor holds (CUDA's context, workspaces, the allocator's rounding).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from .budget import Budget, bill
from .pieces import MEASURED
from .setups import GROUP, LEARNING, RECIPES, Setup
from .weighing import Weighed, weigh

CARDS = (8, 16, 24, 48, 80)  # GB
UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}
CHUNK, RANKS = 256, 8  # label tokens at a time; devices that ZeRO is tried on
MOST_ROWS = 2**16


@dataclass(frozen=True)
class Change:
    """A changed setup: its peak, and what it saves, in bytes on one device."""

    name: str
    setup: Setup
    peak: int
    saved: int


def size_in_bytes(text: str) -> int:
    """Bytes of "16GB", "24 GiB" or "16", which means GB.

    Raises  ValueError  anything else
    """
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    unit = (parts[2] or "GB").upper() if parts else ""
    if unit not in UNITS or not float(parts[1]):
        raise ValueError(
            f"--fit {text!r}: a size above 0 such as 16GB or 24GiB is needed"
        )
    return int(float(parts[1]) * UNITS[unit])


def changes(config: PretrainedConfig, budget: Budget) -> tuple[list[Change], list[str]]:
    """The single changes that lower the peak, and the names of those that do not.

    Returns  (changes, the one that saves most first; names)
    """
    known = {_key(budget.setup): budget.weighed}
    rows, idle = [], []
    for name, setup in _candidates(budget.setup):
        try:
            peak = bill(config, setup, _weighed(config, setup, known)).peak
        except ValueError:
            continue  # a model that this change is impossible for
        if peak < budget.peak:
            rows.append(Change(name, setup, peak, budget.peak - peak))
        else:
            idle.append(name)
    return sorted(rows, key=lambda row: -row.saved), idle


def most_rows(config: PretrainedConfig, budget: Budget, room: int) -> int | None:
    """The largest batch whose peak is within `room` bytes; 0 where one row is too much.

    None where activations have no formula: each try would be a measurement.
    """
    if budget.way == MEASURED:
        return None

    def fits(rows: int) -> bool:
        setup = replace(budget.setup, batch=rows)
        return bill(config, setup, budget.weighed).peak <= room

    low, high = 0, 1  # fits, does not
    while high <= MOST_ROWS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _candidates(s: Setup) -> Iterator[tuple[str, Setup]]:
    """(name, changed setup) of all that can be changed alone."""
    if s.phase in LEARNING:
        if not s.checkpointing:
            yield "gradient checkpointing", replace(s, checkpointing=True)
        if s.chunk is None and s.label_tokens > CHUNK:
            words = f"the loss in chunks of {CHUNK} tokens"
            yield words, replace(s, chunk=CHUNK)
        if s.method == "full":
            yield "LoRA", replace(s, method="lora", options={})
        if s.ranks == 1:
            for stage in (1, 2, 3):
                name = f"ZeRO-{stage} on {RANKS} GPUs"
                yield name, replace(s, zero=stage, ranks=RANKS)
    if s.method in ("full", "lora", "dora", "pissa"):
        options = {} if s.method == "full" else s.options
        yield "QLoRA", replace(s, method="qlora", options=options)
    if s.attention == "eager":
        yield "attention in one kernel (sdpa)", replace(s, attention="sdpa")
    if s.dtype in ("float32", "autocast"):
        yield "bfloat16 weights (mixed)", replace(s, dtype="mixed")
    if s.dtype == "mixed" and s.method in ("full", "bitfit"):
        words = "no float32 master copy (bf16-pure)"
        yield words, replace(s, dtype="bf16-pure")
    if s.phase == "group" and (s.group or GROUP) > 1:
        answers = (s.group or GROUP) // 2
        yield f"half the answers ({answers})", replace(s, group=answers)
    if s.batch > 1:
        yield f"half the batch ({s.batch // 2})", replace(s, batch=s.batch // 2)
    if s.length > 128:
        labels = s.labels and max(1, s.labels // 2)
        shorter = replace(s, length=s.length // 2, labels=labels)
        yield f"half the length ({s.length // 2})", shorter


def _key(setup: Setup) -> tuple:
    options = tuple(sorted(setup.options.items()))
    return setup.method, options, RECIPES[setup.dtype].base


def _weighed(config: PretrainedConfig, setup: Setup, known: dict) -> Weighed:
    """What this method trains, counted once for each method and dtype."""
    key = _key(setup)
    if key not in known:
        how = key[2], setup.attention
        known[key], _ = weigh(config, key[0], setup.options, *how)
    return known[key]
