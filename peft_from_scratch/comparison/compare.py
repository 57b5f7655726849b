"""The main job: several ways to adapt one language model, measured side by side.

Each row of the table (rows.py) gets the same base model, task, test rows and seeds, and
the settings that an equal tuning budget found for it (tuning.py); measure.py takes its
figures. A finished row is written at once and kept, and a row in training has
checkpoints: an interrupted comparison goes on where it was. What counts as the same row
includes the base's weights, the task's rows and the code: an edited lora.py is measured
again.
"""

import json
import shlex
import shutil
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

from ..common import atomic
from ..common.provenance import digest, provenance
from ..training import evaluation
from . import estimate, report
from .candidates import Plan, Row
from .measure import PARTS, measure
from .setup import Ground, look_at
from .tuning import RULE, Setting, search, settings_for

# What needs no training: the others' exact match is compared with these rows'.
REFERENCES = ("zero-shot", "few-shot")


def compare(plan: Plan, *, tune: bool = False) -> dict:
    """Measure every row of the plan, write the result to `plan.out` and return it.

    Writes compare.json, compare.png and compare.html; each row's own figures go to
    `plan.out`/rows as soon as they are there, and are not measured again.

    Args
        tune  search the settings first (tuning.py)
    """
    ground = look_at(_without_missing(plan))
    if tune:
        search(ground)
    plan, chosen, measured = ground.plan, ground.plan.chosen(), {}
    print(ground.description)
    if plan.base == Plan.base:
        rates = estimate.measured_rates(ground.device)
        takes = estimate.duration(estimate.compare_seconds(rates, plan))
        print(f"This takes about {takes} on this machine; Ctrl-C keeps what is done.")
    for number, row in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {row.label}")
        # What trains nothing has no luck in it: one seed tells all.
        seeds = plan.seeds if row.inject else plan.seeds[:1]
        measured[row.key] = [_measured_once(ground, row, seed) for seed in seeds]
    result = _result(ground, measured)
    report.write(result, Path(plan.out))
    return result


def _without_missing(plan: Plan) -> Plan:
    """The plan without the rows whose library is not installed; it is said which."""
    missing = [r for r in plan.chosen() if r.library and not find_spec(r.library)]
    for row in missing:
        print(f"left out: {row.label}, since {row.library} is not installed")
    keys = {row.key for row in missing}
    return replace(plan, methods=tuple(m for m in plan.methods if m not in keys))


def _measured_once(ground: Ground, row: Row, seed: int) -> dict:
    """The row's figures, from its file where the same configuration was measured."""
    plan = ground.plan
    setting = settings_for(plan, row, ground.templates)
    configuration = {
        "base": plan.base,
        "task": plan.task,
        "method": row.key,
        "setting": setting.values,
        "seed": seed,
        "rows": plan.rows,
        "steps": plan.steps_of(row),
        "batch": plan.batch if row.inject else 0,
        "paged": plan.paged if row.inject else None,
        "device": ground.device.type,
        "fingerprint": ground.fingerprint,
    }
    key = f"{row.key}-{seed}-{digest(configuration)}"
    file = Path(plan.out) / "rows" / f"{key}.json"
    if file.exists():
        print(f"  seed {seed}: measured before, kept from {file}")
        return json.loads(file.read_text())
    print(f"  seed {seed}: {_told(setting.values)}")
    checkpoints = Path(plan.out) / "checkpoints" / key
    figures = measure(row, ground, setting.values, seed, checkpoints)
    figures |= {
        "key": row.key,
        "label": row.label,
        "library": row.library,
        "settings": setting.values | figures.pop("injected"),
        "settings_from": setting.warning,
        "configuration": configuration,
        "provenance": provenance(seed=seed, device=ground.device),
    }
    with atomic.new_file(file) as partial:
        partial.write_text(json.dumps(figures, indent=1) + "\n")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return figures


def _result(ground: Ground, measured: dict[str, list[dict]]) -> dict:
    """What the table and the page show, from the figures of all rows and seeds."""
    plan = ground.plan
    first = next(iter(measured.values()))[0]
    references = {key: measured[key] for key in REFERENCES if key in measured}
    settings = [settings_for(plan, row, ground.templates) for row in plan.chosen()]
    return {
        "base": plan.base,
        "base_name": ground.name,
        "task": ground.task.name,
        "instruction": ground.task.instruction,
        "rows_tested": plan.rows,
        "seeds": list(plan.seeds),
        "device": ground.device.type,
        "dtype": ground.dtype,
        "plan": asdict(plan),
        "command": command(plan, tuned=not all(s.shipped for s in settings)),
        "tuned": _tuned(settings),
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
            asked += [f"--{field.name}", text]
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
    ends = evaluation.paired_bootstrap(_per_item(seeds), _per_item(reference))
    return dict(zip(("difference", "low", "high"), ends, strict=True))


def _exact(seeds: list[dict]) -> dict:
    """Exact match; the interval counts a test row once, however many the seeds."""
    right = _per_item(seeds)
    k, n = sum(right), len(right)
    low, high = evaluation.wilson(k, n)
    return {"k": k, "n": n, "rate": k / n, "low": low, "high": high}


def _per_item(seeds: list[dict]) -> list[float]:
    """For each test row, the share of seeds that answered it right."""
    return [fmean(item) for item in zip(*(s["correct"] for s in seeds), strict=True)]


def _wall(measured: dict[str, list[dict]]) -> dict:
    """Where the time of the rows went, so that it adds up."""
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
    """How a row's training time comes about: 50 x 1.20 s, or 3 x 50 x 1.20 s."""
    times = f"{len(seeds)} x " if len(seeds) > 1 else ""
    step = fmean(figures["seconds"]["step"] for figures in seeds)
    return f"{times}{seeds[0]['steps']} x {step:.2f} s"


def _tuned(settings: list[Setting]) -> dict:
    """The search behind the settings of all rows."""
    return {
        "runs": sum(setting.runs for setting in settings),
        "file": ", ".join(sorted({setting.file for setting in settings})),
        "when": max(setting.when for setting in settings),
        "rule": RULE,
    }


def _told(setting: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())
