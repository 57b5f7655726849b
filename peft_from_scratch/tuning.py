"""Settings that every method of the comparison had the same chance to find.

A method's settings are searched on validation rows, never on test rows, and the search
ships with all its runs (data/results/tuning.json). What is searched:

    trained rows    four learning rates, half a decade apart
    prompting       the template; for few-shot also k and which examples in what order

Prompting is cheap: its whole grid takes less time than one trained row's four runs, so
it gets the whole grid, which favours the baseline. The best exact match wins; a tie
goes to the lower validation loss, or for prompting to the earlier setting. A best
learning rate at an end of its grid is an error: the optimum may lie outside.
"""

import itertools
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from . import atomic, evaluate
from .provenance import ROOT, provenance
from .rows import Plan, Row, adapt
from .tasks import Task, load_task
from .templates import TEMPLATES

SHIPPED = ROOT / "data" / "results" / "tuning.json"
VALIDATION_ROWS = 60
SHOTS, ORDERS = (4, 8, 12), (0, 1)
RULE = "best exact match on validation, ties by validation loss"
DONOR = "smollm2/orders"  # whose settings serve where nobody has searched


@dataclass(frozen=True)
class Setting:
    """What a row is run with, and where that comes from."""

    values: dict
    searched_on: str  # "base/task" of the search
    file: str
    when: str
    runs: int


def settings_for(plan: Plan, row: Row) -> Setting:
    """The row's searched setting: of this folder, else shipped, else the donor's.

    Raises  ValueError  nobody has searched for this row
    """
    for searched_on in (f"{plan.base}/{plan.task}", DONOR):
        for file in (Path(plan.out) / "tuning.json", SHIPPED):
            search = read(file).get(f"{searched_on}/{row.key}")
            if search:
                return Setting(
                    search["chosen"],
                    searched_on,
                    file.name,
                    search["when"],
                    len(search["runs"]),
                )
    raise ValueError(
        f"no setting was ever searched for {row.key} ({SHIPPED} has none): "
        "run with --tune"
    )


def read(file: Path) -> dict:
    """The searches of a tuning file by "base/task/method"; {} where there is none."""
    return json.loads(file.read_text())["searches"] if file.exists() else {}


def grid(row: Row) -> list[dict]:
    """Every setting that the search tries for a row."""
    if row.inject:
        return [{"template": "chat", "lr": lr} for lr in row.learning_rates]
    if row.few_shot:
        axes = itertools.product(TEMPLATES, SHOTS, ORDERS)
        return [{"template": t, "k": k, "order": o} for t, k, o in axes]
    return [{"template": template} for template in TEMPLATES]


def search(plan: Plan) -> Path:
    """Search every chosen row's grid on validation; write, and return, the tuning file.

    Each run is written as soon as it is done: an interrupted search goes on.
    """
    task = load_task(plan.task)
    file = Path(plan.out) / "tuning.json"
    for row in plan.chosen():
        runs = [_run_once(plan, row, setting, task) for setting in grid(row)]
        best = choose(row, runs)
        searches = read(file) | {
            f"{plan.base}/{plan.task}/{row.key}": {
                "chosen": best["setting"],
                "rule": RULE,
                "when": f"{datetime.now(UTC):%Y-%m-%d}",
                "validation_rows": VALIDATION_ROWS,
                "steps": plan.steps if row.inject else 0,
                "batch": plan.batch if row.inject else 0,
                "runs": runs,
            }
        }
        _write(file, {"searches": searches, "provenance": provenance(seed=0)})
        print(f"{row.label}: best of {len(runs)} is {best['setting']}")
    return file


def choose(row: Row, runs: list[dict]) -> dict:
    """The best run; ValueError where its learning rate is at an end of the grid."""
    best = max(runs, key=lambda run: (run["correct"], -(run["loss"] or 0)))
    rates = [run["setting"]["lr"] for run in runs if row.inject]
    if rates and best["setting"]["lr"] in (min(rates), max(rates)):
        raise ValueError(
            f"{row.key}: the best learning rate {best['setting']['lr']:g} is an end of "
            f"the grid {', '.join(f'{lr:g}' for lr in sorted(rates))}: widen "
            "rows.LEARNING_RATES and search again"
        )
    return best


def _run_once(plan, row, setting, task) -> dict:
    key = "-".join(
        str(part) for part in (plan.base, plan.task, row.key, *setting.values())
    )
    file = Path(plan.out) / "tuning" / f"{key.replace('/', '_')}-{plan.steps}.json"
    if not file.exists():
        _write(file, _run(plan, row, setting, task))
    return json.loads(file.read_text())


def _run(plan: Plan, row: Row, setting: dict, task: Task) -> dict:
    ready = adapt(row, plan, task, setting, seed=0, search=True)
    rows = task.validation.select(range(min(VALIDATION_ROWS, len(task.validation))))
    answers = evaluate.answer_rows(
        ready.model,
        ready.tokenizer,
        task,
        rows,
        template=ready.template,
        examples=ready.examples,
    )
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
