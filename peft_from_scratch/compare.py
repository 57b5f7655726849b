"""The main job: several ways to adapt one language model, measured side by side.

Each row of the table (rows.py) gets the same base model, task, test rows and seeds, and
the settings that an equal tuning budget found for it (tuning.py); measure.py takes its
figures. A finished row is written at once and kept, and a row in training has
checkpoints: an interrupted comparison goes on where it was.
"""

import hashlib
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from . import __version__, atomic, evaluate, report
from .measure import measure
from .models import load_model, pick_device
from .provenance import provenance
from .rows import Plan, Row
from .tasks import Task, load_task
from .tuning import RULE, Setting, settings_for

REFERENCE = "few-shot"  # the row that the others' exact match is compared with


def compare(plan: Plan) -> dict:
    """Measure every row of the plan, write the result to `plan.out` and return it.

    Writes compare.json, compare.png and compare.html; each row's own figures go to
    `plan.out`/rows as soon as they are there, and are not measured again.
    """
    start = time.perf_counter()
    task = load_task(plan.task)
    if plan.rows > len(task.test):
        raise ValueError(
            f"rows={plan.rows}: {task.name} has {len(task.test)} test rows"
        )
    measured = {
        row.key: [_measured_once(plan, row, seed, task) for seed in plan.seeds]
        for row in plan.chosen()
    }
    result = _result(plan, task, measured)
    result["wall"] = _wall(result["rows"], time.perf_counter() - start)
    report.write(result, Path(plan.out))
    return result


def _measured_once(plan: Plan, row: Row, seed: int, task: Task) -> dict:
    """The row's figures, from its file where the same configuration was measured."""
    setting = settings_for(plan, row)
    device = pick_device(plan.device)
    configuration = {
        "base": plan.base,
        "task": plan.task,
        "method": row.key,
        "setting": setting.values,
        "seed": seed,
        "rows": plan.rows,
        "steps": plan.steps if row.inject else 0,
        "batch": plan.batch if row.inject else 0,
        "device": device.type,
        "version": __version__,
    }
    key = f"{row.key}-{seed}-{_digest(configuration)}"
    file = Path(plan.out) / "rows" / f"{key}.json"
    if file.exists():
        print(f"{row.label}: measured before, kept from {file}")
        return json.loads(file.read_text())
    print(f"{row.label}, seed {seed}: {_told(setting.values)}")
    start = time.perf_counter()
    checkpoints = Path(plan.out) / "checkpoints" / key
    figures = measure(row, plan, task, setting.values, seed, checkpoints)
    figures["seconds"]["total"] = time.perf_counter() - start
    figures |= {
        "key": row.key,
        "label": row.label,
        "settings": setting.values | figures.pop("injected"),
        "settings_from": _foreign(setting, plan),
        "configuration": configuration,
        "provenance": provenance(seed=seed, device=device),
    }
    with atomic.new_file(file) as partial:
        partial.write_text(json.dumps(figures, indent=1) + "\n")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return figures


def _result(plan: Plan, task: Task, measured: dict[str, list[dict]]) -> dict:
    """What the table and the page show, from the figures of all rows and seeds."""
    first = next(iter(measured.values()))[0]
    reference = measured.get(REFERENCE)
    model, _ = load_model(plan.base, device=plan.device)
    return {
        "base": plan.base,
        "base_name": model.config.name_or_path,
        "task": task.name,
        "instruction": task.instruction,
        "rows_tested": plan.rows,
        "seeds": list(plan.seeds),
        "device": next(model.parameters()).device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "plan": asdict(plan),
        "tuned": _tuned([settings_for(plan, row) for row in plan.chosen()]),
        "provenance": first["provenance"],
        "rows": [_row(seeds, reference) for seeds in measured.values()],
    }


def _row(seeds: list[dict], reference: list[dict] | None) -> dict:
    """One row of the table: the first seed's figures, the quality over all seeds."""
    row = {name: value for name, value in seeds[0].items() if name != "correct"}
    row["exact"] = _exact(seeds)
    row["per_seed"] = [sum(figures["correct"]) for figures in seeds]
    row["against_few_shot"] = None
    if reference and reference is not seeds:
        difference, low, high = evaluate.paired_bootstrap(
            _per_item(seeds), _per_item(reference)
        )
        row["against_few_shot"] = {"difference": difference, "low": low, "high": high}
    return row


def _exact(seeds: list[dict]) -> dict:
    """Exact match; the interval counts a test row once, however many the seeds."""
    right = _per_item(seeds)
    k, n = sum(right), len(right)
    low, high = evaluate.wilson(k, n)
    return {"k": k, "n": n, "rate": k / n, "low": low, "high": high}


def _per_item(seeds: list[dict]) -> list[float]:
    """For each test row, the share of seeds that answered it right."""
    return [fmean(item) for item in zip(*(s["correct"] for s in seeds), strict=True)]


def _wall(rows: list[dict], seconds: float) -> dict:
    """Where the time of the rows went, so that it adds up."""
    seeds = len(rows[0]["per_seed"])
    training = seeds * sum(row["seconds"]["train"] for row in rows)
    answering = seeds * sum(row["seconds"]["answer"] for row in rows)
    total = seeds * sum(row["seconds"]["total"] for row in rows)
    steps = " + ".join(
        f"{row['steps']} x {row['seconds']['step']:.2f} s"
        for row in rows
        if row["steps"]
    )
    return {
        "total": total,
        "training": training,
        "answering": answering,
        "other": total - training - answering,
        "this_run": seconds,
        "sentence": (
            f"Training took {steps or 'no step'} = {training:.0f} s; answering "
            f"{len(rows)} x {rows[0]['exact']['n']} test rows {answering:.0f} s; "
            f"everything else {total - training - answering:.0f} s; "
            f"in all {total:.0f} s."
        ),
    }


def _tuned(settings: list[Setting]) -> dict:
    """The search behind the settings of all rows."""
    return {
        "runs": sum(setting.runs for setting in settings),
        "file": ", ".join(sorted({setting.file for setting in settings})),
        "when": max(setting.when for setting in settings),
        "rule": RULE,
    }


def _foreign(setting: Setting, plan: Plan) -> str | None:
    """A warning where the setting was searched on another base or task."""
    here = f"{plan.base}/{plan.task}"
    if setting.searched_on == here:
        return None
    return f"searched on {setting.searched_on}, not on {here}"


def _told(setting: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def _digest(configuration: dict) -> str:
    text = json.dumps(configuration, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
