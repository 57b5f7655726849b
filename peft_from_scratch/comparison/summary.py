"""The table of a comparison, from the figures of all candidates and seeds."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, fields
from statistics import fmean

from ..common import statistics
from .measure import PARTS
from .plan import Plan
from .setup import Setup
from .tuning import RULE, Setting

# What needs no training: the others' exact match is compared with these candidates'.
REFERENCES = ("zero-shot", "few-shot")


def summary(
    setup: Setup, settings: Mapping[str, Setting], measured: Mapping[str, list[dict]]
) -> dict:
    """What the table and the page show, as JSON can hold it.

    Args
        settings  {key: the candidate's setting}
        measured  {key: the candidate's figures for each seed}
    """
    plan = setup.plan
    first = next(iter(measured.values()))[0]
    references = {key: measured[key] for key in REFERENCES if key in measured}
    searched = [setting for setting in settings.values() if setting.file]
    return {
        "base": plan.base,
        "base_name": setup.base.config.name_or_path,
        "task": setup.task.name,
        "instruction": setup.task.instruction,
        "rows_tested": plan.rows,
        "seeds": list(plan.seeds),
        "device": setup.device.type,
        "dtype": setup.dtype,
        "plan": asdict(plan),
        "command": command(plan, tuned=not all(s.shipped for s in searched)),
        "tuned": _tuned(searched) if searched else None,
        "provenance": first["provenance"],
        "rows": [_row(seeds, references) for seeds in measured.values()],
        "wall": _wall(measured),
    }


def command(plan: Plan, *, tuned: bool) -> str:
    """What to type to get the same comparison again, the output's folder apart."""
    asked = []
    for field in fields(plan):
        value = getattr(plan, field.name)
        if value != field.default and field.name != "out":
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            asked += [f"--{field.name.replace('_', '-')}", text]
    if not asked:
        return "make compare TUNE=1" if tuned else "make compare"
    start = [".venv/bin/python", "-m", "peft_from_scratch", "compare"]
    return shlex.join([*start, *(["--tune"] if tuned else []), *asked])


def _row(seeds: list[dict], references: dict[str, list[dict]]) -> dict:
    """One row of the table: the first seed's figures, the quality over all seeds."""
    row = {name: value for name, value in seeds[0].items() if name != "correct"}
    row["exact"] = _exact(seeds)
    row["per_seed"] = [sum(figures["correct"]) for figures in seeds]
    row["against"] = {
        key: _difference(seeds, reference)
        for key, reference in references.items()
        if reference is not seeds
    }
    return row


def _difference(seeds: list[dict], reference: list[dict]) -> dict:
    """Exact match minus that of the reference, paired by test row."""
    ends = statistics.paired_bootstrap(_per_item(seeds), _per_item(reference))
    return dict(zip(("difference", "low", "high"), ends, strict=True))


def _exact(seeds: list[dict]) -> dict:
    """Exact match; the interval counts a test row once, however many the seeds."""
    right = _per_item(seeds)
    k, n = sum(right), len(right)
    low, high = statistics.wilson(k, n)
    return {"k": k, "n": n, "rate": k / n, "low": low, "high": high}


def _per_item(seeds: list[dict]) -> list[float]:
    """For each test row, the share of seeds that answered it right."""
    return [fmean(item) for item in zip(*(s["correct"] for s in seeds), strict=True)]


def _wall(measured: dict[str, list[dict]]) -> dict:
    """Where the time of all candidates went, so that it adds up."""
    runs = [figures for seeds in measured.values() for figures in seeds]
    spent = {part: sum(run["seconds"][part] for run in runs) for part in PARTS}
    trained = [seeds for seeds in measured.values() if seeds[0]["steps"]]
    steps = " + ".join(map(_steps, trained)) or "no step"
    total = sum(spent.values())
    return {
        **spent,
        "total": total,
        "sentence": (
            f"Training took {steps} = {spent['train']:.0f} s; answering {len(runs)} x "
            f"{len(runs[0]['correct'])} test rows {spent['answer']:.0f} s; reading "
            f"general text {spent['general']:.0f} s; timing single decoding steps "
            f"{spent['decode']:.0f} s; loading, saving and counting bytes "
            f"{spent['prepare'] + spent['count']:.0f} s; in all {total:.0f} s."
        ),
    }


def _steps(seeds: list[dict]) -> str:
    """How a training time comes about: 50 x 1.20 s, or 3 x 50 x 1.20 s."""
    times = f"{len(seeds)} x " if len(seeds) > 1 else ""
    step = fmean(figures["seconds"]["step"] for figures in seeds)
    return f"{times}{seeds[0]['steps']} x {step:.2f} s"


def _tuned(settings: list[Setting]) -> dict:
    """The search behind the settings."""
    return {
        "runs": sum(setting.runs for setting in settings),
        "file": ", ".join(sorted({setting.file for setting in settings})),
        "when": max(setting.when for setting in settings),
        "rule": RULE,
    }
