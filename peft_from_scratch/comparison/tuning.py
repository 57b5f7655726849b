"""Settings that every method of the comparison had the same chance to find.

A method's settings are searched on validation rows, never on test rows, and the search
ships with all its runs (data/results/tuning.json). What is searched:

    trained rows    four learning rates, half a decade apart; where the best is at an
                    end of them, the optimum may lie outside, and the next one is tried
    prompting       the template; for few-shot also k and which examples in what order

Prompting is cheap: its whole grid takes less time than one trained row's four runs, so
it gets the whole grid, which favours the baseline. The best exact match wins; a tie
goes to the lower validation loss, or for prompting to the earlier setting.
"""

import itertools
import json
import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from ..common import atomic
from ..common.provenance import ROOT, digest, provenance
from ..tasks.task import Task
from ..tasks.templates import TEMPLATES
from .candidates import Plan, Row, adapt
from .setup import Ground

SHIPPED = ROOT / "data" / "results" / "tuning.json"
VALIDATION_ROWS = 60
SHOTS, ORDERS = (4, 8, 12), (0, 1, 2, 3)
GROWTH = 3  # learning rates that a grid may grow by
RULE = "best exact match on validation, ties by validation loss"
DONOR = "smollm2/orders"  # whose settings serve where nobody has searched


@dataclass(frozen=True)
class Setting:
    """What a row is run with, and where that comes from."""

    values: dict
    file: str
    when: str
    runs: int
    shipped: bool
    warning: str | None = None  # where the search was of something else


def settings_for(
    plan: Plan, row: Row, templates: tuple[str, ...] = TEMPLATES
) -> Setting:
    """The row's searched setting: of this folder, else shipped, else the donor's.

    Where none is its own, that of the row that it is like.

    Args
        templates  those that the base's tokenizer can write
    Raises  ValueError  nobody has searched for this row
    """
    files = Path(plan.out) / "tuning.json", SHIPPED
    places = f"{plan.base}/{plan.task}", DONOR
    for key, place, file in itertools.product((row.key, row.like), places, files):
        search = read(file).get(f"{place}/{key}")
        if search:
            shipped = file == SHIPPED
            name = str(file.relative_to(ROOT)) if shipped else str(file)
            runs, when = len(search["runs"]), search["when"]
            found = Setting(search["chosen"], name, when, runs, shipped)
            warning = _differs(plan, row, place, search)
            if key != row.key:
                warning = f"searched for {key}" + (f"; {warning}" if warning else "")
            return _with_template(replace(found, warning=warning), plan, templates)
    raise ValueError(
        f"no setting was ever searched for {row.key} ({SHIPPED} has none): "
        "run with --tune"
    )


def _differs(plan: Plan, row: Row, searched_on: str, search: dict) -> str | None:
    """What the search was of, where that is not what is measured now."""
    now = {"steps": plan.steps_of(row), "batch": plan.batch}
    ours, theirs = [f"{plan.base}/{plan.task}"], [searched_on]
    for name in ("steps", "batch") if row.inject else ():
        ours.append(f"{name} {now[name]}")
        theirs.append(f"{name} {search.get(name, now[name])}")
    pairs = [(t, o) for t, o in zip(theirs, ours, strict=True) if t != o]
    if not pairs:
        return None
    theirs, ours = map(", ".join, zip(*pairs, strict=True))
    return f"searched on {theirs}, not on {ours}"


def _with_template(setting: Setting, plan: Plan, templates) -> Setting:
    """The setting in the template that was asked for, or that there is."""
    searched = setting.values["template"]
    wanted = plan.template or (searched if searched in templates else templates[0])
    if wanted == searched:
        return setting
    said = [setting.warning, f"searched with the {searched} template"]
    return replace(
        setting,
        values=setting.values | {"template": wanted},
        warning="; ".join(filter(None, said)),
    )


def read(file: Path) -> dict:
    """The searches of a tuning file by "base/task/method"; {} where there is none."""
    return json.loads(file.read_text())["searches"] if file.exists() else {}


def grid(row: Row, templates: tuple[str, ...] = TEMPLATES) -> list[dict]:
    """Every setting that the search tries for a row, in the order of preference."""
    if row.inject:
        template = "chat" if "chat" in templates else "raw"
        return [{"template": template, "lr": lr} for lr in row.learning_rates]
    if row.few_shot:
        axes = itertools.product(templates, SHOTS, ORDERS)
        return [{"template": t, "k": k, "order": o} for t, k, o in axes]
    return [{"template": template} for template in templates]


def search(ground: Ground) -> Path:
    """Search every chosen row's grid on validation; write, and return, the tuning file.

    Each run is written as soon as it is done: an interrupted search goes on.

    Raises  ValueError  the best learning rate is still at an end after GROWTH more
    """
    plan = ground.plan
    templates = (plan.template,) if plan.template else ground.templates
    file = Path(plan.out) / "tuning.json"
    for row in plan.chosen():
        print(f"searching: {row.label}")
        runs = [_run_once(ground, row, s) for s in grid(row, templates)]
        while (beyond := next_rate(runs)) and len(runs) < len(grid(row)) + GROWTH:
            runs.append(_run_once(ground, row, runs[0]["setting"] | {"lr": beyond}))
        best = choose(row, runs)
        searches = read(file) | {
            f"{plan.base}/{plan.task}/{row.key}": {
                "chosen": best["setting"],
                "rule": RULE,
                "when": f"{datetime.now(UTC):%Y-%m-%d}",
                "validation_rows": VALIDATION_ROWS,
                "steps": plan.steps_of(row),
                "batch": plan.batch if row.inject else 0,
                "runs": runs,
            }
        }
        _write(file, {"searches": searches, "provenance": provenance(seed=0)})
        print(f"  best of {len(runs)}: {best['setting']}")
    return file


def best_of(runs: list[dict]) -> dict:
    """The most right answers; of equals the lowest loss, then the first."""
    return max(runs, key=lambda run: (run["correct"], -(run["loss"] or 0)))


def next_rate(runs: list[dict]) -> float | None:
    """The rate half a decade beyond the best, where that is at an end; else None."""
    rates = [run["setting"]["lr"] for run in runs if "lr" in run["setting"]]
    best = best_of(runs)["setting"].get("lr")
    if not rates or min(rates) < best < max(rates):
        return None
    halves = round(2 * math.log10(best)) + (1 if best == max(rates) else -1)
    return float(f"{10 ** (halves / 2):.0e}")


def choose(row: Row, runs: list[dict]) -> dict:
    """The best run; ValueError where its learning rate is at an end of those tried."""
    best = best_of(runs)
    if next_rate(runs):
        rates = sorted(run["setting"]["lr"] for run in runs)
        raise ValueError(
            f"{row.key}: the best learning rate {best['setting']['lr']:g} is an end of "
            f"the grid {', '.join(f'{lr:g}' for lr in rates)}, so that the optimum may "
            "lie outside; with more --steps the rates differ more clearly"
        )
    return best


def _run_once(ground: Ground, row: Row, setting: dict) -> dict:
    plan = ground.plan
    asked = (
        ground.fingerprint,
        ground.device.type,
        plan.steps,
        plan.batch,
        VALIDATION_ROWS,
    )
    said = "-".join(str(part) for part in (row.key, *setting.values()))
    file = Path(plan.out) / "tuning" / f"{said}-{digest(asked, plan.base)}.json"
    if not file.exists():
        _write(file, _run(plan, row, setting, ground.task))
    run = json.loads(file.read_text())
    print(f"  {setting}: {run['correct']} of {run['rows']}")
    return run


def _run(plan: Plan, row: Row, setting: dict, task: Task) -> dict:
    ready = adapt(row, plan, task, setting, seed=0, search=True)
    rows = task.validation.select(range(min(VALIDATION_ROWS, len(task.validation))))
    answers = ready.answer(task, rows)
    return {
        "setting": setting,
        "correct": sum(answers.correct),
        "rows": len(answers.correct),
        "loss": ready.history.validation[-1][1] if ready.history else None,
        "seconds": answers.seconds + (ready.history.seconds if ready.history else 0),
    }


def _write(file: Path, content: dict) -> None:
    with atomic.new_file(file) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
