"""The table of a comparison, from the figures of all candidates and seeds."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from statistics import fmean

import numpy as np
import torch

from ..common.provenance import processor
from . import intervals
from .letters import letters
from .measure import PARTS
from .plan import Plan
from .setup import Setup
from .tuning import Setting

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
    test = setup.task.test.select(range(plan.rows))
    clusters = setup.task.clusters(test.to_list())
    rows, pairs = compared(measured, clusters)
    searched = [setting for setting in settings.values() if setting.file]
    return {
        "base": plan.base,
        "base_name": setup.base.config.name_or_path,
        "task": setup.task.name,
        "instruction": setup.task.instruction,
        "rows_tested": plan.rows,
        "clusters_tested": len(set(clusters)),
        "seeds": list(plan.seeds),
        "device": setup.device.type,
        "dtype": setup.dtype,
        "plan": asdict(plan),
        "command": command(plan, tuned=not all(s.shipped for s in searched)),
        "tuned": _tuned(searched) if searched else None,
        "machine": _machine(measured),
        "provenance": first["provenance"],
        "rows": rows,
        "pairs": pairs,
        "wall": _wall(measured),
    }


def command(plan: Plan, *, tuned: bool) -> str:
    """What to type to get the same comparison again, the output's folder apart."""
    with_make = _make(plan, tuned)
    if with_make:
        return with_make
    asked = []
    for field in fields(plan):
        value = getattr(plan, field.name)
        if value != field.default and field.name != "out":
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            asked += [f"--{field.name.replace('_', '-')}", text]
    start = [".venv/bin/python", "-m", "peft_from_scratch", "compare"]
    return shlex.join([*start, *(["--tune"] if tuned else []), *asked])


def _make(plan: Plan, tuned: bool) -> str | None:
    """The same with make; None where its variables cannot say all of the plan."""
    variables = {"TUNE": 1} if tuned else {}
    if plan.seeds != Plan.seeds:
        variables["SEEDS"] = len(plan.seeds)
    if plan.rows != Plan.rows:
        variables["ROWS"] = plan.rows
    counted = tuple(range(len(plan.seeds)))
    if replace(plan, seeds=Plan.seeds, rows=Plan.rows, out=Plan.out) != Plan() or (
        plan.seeds != counted
    ):
        return None
    return " ".join(["make compare", *(f"{k}={v}" for k, v in variables.items())])


def compared(
    measured: Mapping[str, list[dict]], clusters: intervals.Clusters = None
) -> tuple[list[dict], list[dict]]:
    """The rows of the table, and every two of them compared.

    A row has the first seed's figures, and the quality over all seeds: `exact`, the
    letters that it shares with what it cannot be told apart from, and the difference
    `against` each reference.

    Args
        clusters  a name for each test row, as in intervals.interval
    """
    scores = {
        key: np.array([figures["correct"] for figures in seeds], dtype=float)
        for key, seeds in measured.items()
    }
    pairs = intervals.pairs(scores, clusters)
    best_first = sorted(scores, key=lambda key: -scores[key].mean())
    shared = letters(best_first, {frozenset((p.of, p.over)) for p in pairs if p.apart})
    luck = intervals.seeds_luck(scores)
    rows = [
        {name: value for name, value in seeds[0].items() if name != "correct"}
        | {
            "exact": _exact(scores[key], luck, clusters),
            "per_seed": [sum(figures["correct"]) for figures in seeds],
            "letters": shared[key],
            "against": _against(key, pairs),
        }
        for key, seeds in measured.items()
    ]
    return rows, [asdict(pair) for pair in pairs]


def _exact(
    scores: np.ndarray, luck: intervals.Luck | None, clusters: intervals.Clusters
) -> dict:
    """The mean score; a test row counts once, however many the seeds."""
    low, high = intervals.interval(scores, luck, clusters)
    seeds, n = scores.shape
    k = float(scores.sum()) / seeds
    return {"k": k, "n": n, "rate": k / n, "low": low, "high": high}


def _against(key: str, pairs: list[intervals.Pair]) -> dict:
    """{reference: the score minus that of the reference, on the same rows}."""
    return {
        pair.over: {"difference": pair.difference, "low": pair.low, "high": pair.high}
        for pair in (*pairs, *map(intervals.turned, pairs))
        if pair.of == key and pair.over in REFERENCES
    }


def _machine(measured: dict[str, list[dict]]) -> dict:
    """What the times were taken on, and the cores that other programs took at most."""
    runs = [figures for seeds in measured.values() for figures in seeds]
    beside = [run["busy_elsewhere"] for run in runs]
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "busy_elsewhere": None if None in beside else max(beside),
    }


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
        "rule": "; or ".join(sorted({setting.rule for setting in settings})),
    }
