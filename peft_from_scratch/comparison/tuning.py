"""Settings that every candidate of the comparison had the same chance to find.

A candidate's settings are searched on validation rows, never on test rows, and the
search ships with all its runs (data/results/tuning.json). What is searched:

    what trains     four learning rates, half a decade apart; where the best is at an
                    end of them, the optimum may lie outside, and the next one is tried
    prompting       the template; for few-shot also k and which examples in what order

Prompting is cheap: its whole grid takes less time than the four runs of one candidate
that trains, so it gets the whole grid, which favors the baseline. The best exact match
wins; a tie goes to the lower validation loss, or for prompting to the earlier setting.
Where nobody has searched, a method trains at its row's `lr` in the table of methods,
and the result says so.
"""

import itertools
import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from ..common import atomic, records
from ..common.digest import digest
from ..common.grid import GROWTH, at_an_end, rate_past
from ..common.provenance import ROOT, provenance
from ..methods import named
from ..tasks import scorers
from ..tasks.templates import TEMPLATES
from . import shots
from .adapt import adapt
from .candidates import Candidate
from .plan import Plan
from .setup import Setup

SHIPPED = ROOT / "data" / "results" / "tuning.json"
VALIDATION_ROWS = 60
SHOTS, ORDERS = (4, 8, 12), (0, 1, 2, 3)
RULE = "best exact match on validation, ties by validation loss"
FALLBACK_SEARCH = "smollm2/orders"  # serves a base and task without a search


@dataclass(frozen=True)
class Setting:
    """What a candidate is run with, and where that comes from."""

    values: dict
    file: str | None  # None: nobody has searched
    when: str | None
    runs: int
    shipped: bool
    warning: str | None = None  # where the search was of something else, or of nothing


def settings_for(
    plan: Plan, candidate: Candidate, templates: tuple[str, ...] = TEMPLATES
) -> Setting:
    """The candidate's setting: searched in this folder, else shipped, else elsewhere.

    In this order: its own search on this base and task, its own FALLBACK_SEARCH, those
    two of `settings_from`, and the method's learning rate without any search.

    Args
        templates  those that the base's tokenizer can write
    Raises  ValueError  nobody has searched for a candidate that trains nothing
    """
    setting = _searched(plan, candidate) or _unsearched(candidate, templates)
    return _with_template(setting, plan, templates)


def _searched(plan: Plan, candidate: Candidate) -> Setting | None:
    files = Path(plan.out) / "tuning.json", SHIPPED
    places = f"{plan.base}/{plan.task}", FALLBACK_SEARCH
    keys = candidate.key, candidate.settings_from
    for key, place, file in itertools.product(keys, places, files):
        search = read(file).get(f"{place}/{key}")
        if search:
            shipped = file == SHIPPED
            name = str(file.relative_to(ROOT)) if shipped else str(file)
            warning = _differs(plan, candidate, place, search)
            if key != candidate.key:
                warning = f"searched for {key}" + (f"; {warning}" if warning else "")
            runs, when = len(search["runs"]), search["when"]
            return Setting(search["chosen"], name, when, runs, shipped, warning)
    return None


def _unsearched(candidate: Candidate, templates: tuple[str, ...]) -> Setting:
    """The method's own learning rate, with a warning."""
    if not candidate.trains:
        raise ValueError(
            f"no setting was ever searched for {candidate.key} ({SHIPPED} has none): "
            "run with --tune"
        )
    values = {"template": _first(templates), "lr": named(candidate.method).lr}
    warning = "never searched: the method's default learning rate"
    return Setting(values, None, None, 0, False, warning)


def _first(templates: tuple[str, ...]) -> str:
    return "chat" if "chat" in templates else "raw"


def _differs(
    plan: Plan, candidate: Candidate, searched_on: str, search: dict
) -> str | None:
    """The search's base, task, steps and batch, where they are not this plan's."""
    now = {"steps": plan.steps_of(candidate), "batch": plan.batch}
    ours, theirs = [f"{plan.base}/{plan.task}"], [searched_on]
    if searched_on == ours[0]:
        ours.append(f"scorer {plan.scorer}")
        theirs.append(f"scorer {search.get('scorer')}")
    for name in ("steps", "batch") if candidate.trains else ():
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
    warnings = [setting.warning, f"searched with the {searched} template"]
    return replace(
        setting,
        values=setting.values | {"template": wanted},
        warning="; ".join(filter(None, warnings)),
    )


def read(file: Path) -> dict:
    """The searches of a tuning file by "base/task/method"; {} where there is none."""
    if not file.exists():
        return {}
    searches = records.read_object(file).get("searches")
    if not isinstance(searches, dict):
        raise ValueError(f"{file} has no object 'searches', as a search writes it")
    return searches


def grid(candidate: Candidate, templates: tuple[str, ...] = TEMPLATES) -> list[dict]:
    """Every setting that the search tries first, in the order of preference."""
    if candidate.trains:
        return [{"template": _first(templates), "lr": lr} for lr in candidate.rates]
    if candidate.few_shot:
        axes = itertools.product(templates, SHOTS, ORDERS)
        return [{"template": t, "k": k, "order": o} for t, k, o in axes]
    return [{"template": template} for template in templates]


def search(setup: Setup) -> Path:
    """Search every chosen candidate's grid on validation; write the tuning file.

    Each run is written as soon as it is done: an interrupted search goes on.

    Returns  the tuning file
    Raises   ValueError  the best learning rate is still at an end after GROWTH more
    """
    plan = setup.plan
    file = Path(plan.out) / "tuning.json"
    for candidate in plan.chosen():
        print(f"searching: {candidate.label}")
        runs = _runs(setup, candidate)
        best = choose(candidate, runs)
        searches = read(file) | {
            f"{plan.base}/{plan.task}/{candidate.key}": {
                "chosen": best["setting"],
                "rule": RULE,
                "when": f"{datetime.now(UTC):%Y-%m-%d}",
                "validation_rows": VALIDATION_ROWS,
                "scorer": plan.scorer,
                "steps": plan.steps_of(candidate),
                "batch": plan.batch if candidate.trains else 0,
                "runs": runs,
            }
        }
        _write(file, {"searches": searches, "provenance": provenance(seed=0)})
        print(f"  best of {len(runs)}: {best['setting']}")
    return file


def _runs(setup: Setup, candidate: Candidate) -> list[dict]:
    """The runs of the candidate's grid, and of up to GROWTH rates beyond its ends."""
    plan = setup.plan
    templates = (plan.template,) if plan.template else setup.templates
    settings = _fitting(setup, grid(candidate, templates))
    runs = [_run_once(setup, candidate, setting) for setting in settings]
    most = len(grid(candidate)) + GROWTH
    while (beyond := next_rate(runs)) and len(runs) < most:
        setting = runs[0]["setting"] | {"lr": beyond}
        runs.append(_run_once(setup, candidate, setting))
    return runs


def _fitting(setup: Setup, settings: list[dict]) -> list[dict]:
    """The settings with as many examples as fit before the rows, each of them once."""
    fitting = []
    for setting in settings:
        fitted = shots.fitted(setup, setting)
        if fitted not in fitting and fitted.get("k") != 0:
            fitting.append(fitted)
    if len(fitting) < len(settings):
        most = max(setting["k"] for setting in fitting)
        print(f"  at most {most} examples fit before these rows")
    return fitting


def best_of(runs: list[dict]) -> dict:
    """The highest sum of scores; of equals the lowest loss, then the first."""
    return max(runs, key=lambda run: (run["correct"], -(run["loss"] or 0)))


def next_rate(runs: list[dict]) -> float | None:
    """The rate half a decade beyond the best, where that is at an end; else None."""
    rates = [run["setting"]["lr"] for run in runs if "lr" in run["setting"]]
    best = best_of(runs)["setting"].get("lr")
    return rate_past(best, rates) if rates else None


def choose(candidate: Candidate, runs: list[dict]) -> dict:
    """The best run; ValueError where its learning rate is at an end of those tried."""
    best = best_of(runs)
    if next_rate(runs):
        rates = [run["setting"]["lr"] for run in runs]
        raise ValueError(
            f"{candidate.key}: {at_an_end(best['setting']['lr'], rates)}, so that the "
            "optimum may lie outside; with more --steps the rates differ more clearly"
        )
    return best


def _run_once(setup: Setup, candidate: Candidate, setting: dict) -> dict:
    """The run's figures, from its file where the same run was made before."""
    plan = setup.plan
    hashed = (
        setup.fingerprint,
        setup.device.type,
        setup.dtype,
        plan.steps,
        plan.batch,
        VALIDATION_ROWS,
        scorers.identity(setup.task.score),
    )
    name = "-".join(str(part) for part in (candidate.key, *setting.values()))
    file = Path(plan.out) / "tuning" / f"{name}-{digest(hashed, plan.base)}.json"
    if not file.exists():
        _write(file, _run(setup, candidate, setting))
    run = records.read_object(file)
    print(f"  {setting}: {run['correct']:.4g} of {run['rows']}")
    return run


def _run(setup: Setup, candidate: Candidate, setting: dict) -> dict:
    task = setup.task
    ready = adapt(candidate, setup, setting, seed=0, search=True)
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
