"""Settings that every candidate of the comparison had the same chance to find.

A candidate's settings are searched on rows of their own, made as the test's are, and
never on test rows (tasks/task.py). The search ships with all its runs
(data/results/tuning.json). What is searched:

    prompting       the template; for few-shot also k and which examples in what order
    what trains     the learning rate, in two stages
                    screen  four rates, half a decade apart, with the first seed; while
                            the best is at an end of them, one rate past it
                    climb   the best and its neighbors, a quarter of a decade away, with
                            all SEEDS; while the best is at an end of them, one past it

The most answers right win, of all seeds; a tie goes to the lower loss, or for prompting
to the earlier setting. No seed of the search is one of the comparison: a rate that won
by a lucky start does not take that start along. Prompting is cheap: its whole grid
takes less time than the runs of one candidate that trains, so it gets the whole grid,
which favors the baseline. Where nobody has searched, a method trains at its row's `lr`
in the table of methods, and the result says so.
"""

import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from ..common import atomic, records
from ..common.digest import digest
from ..common.grid import at_an_end, grown, is_inside, neighbor
from ..common.provenance import ROOT, provenance
from ..methods import named
from ..tasks import scorers
from ..tasks.templates import TEMPLATES
from ..training.guards import Diverged
from . import shots
from .adapt import adapt
from .candidates import Candidate
from .plan import Plan
from .setup import Setup

SHIPPED = ROOT / "data" / "results" / "tuning.json"
ROWS = 150  # answered in each run
SEEDS = (10, 11, 12)
SHOTS, ORDERS = (4, 8, 12), (0, 1, 2, 3)
RULE = "most answers right on the search rows, ties by the loss on them"
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
    tried: tuple[tuple[float, float], ...] = ()  # (rate, share right) with all seeds
    rule: str = RULE  # by which the search chose


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
            return Setting(
                search["chosen"],
                name,
                when,
                runs,
                shipped,
                warning,
                _tried(search["runs"]),
                search.get("rule", RULE),
            )
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
    ours, theirs = [f"{plan.base}/{Path(plan.task).name}"], [searched_on]
    if searched_on == f"{plan.base}/{plan.task}":
        theirs = ours.copy()
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
    """Search every chosen candidate's settings on the search rows; write the file.

    Each run is written as soon as it is done: an interrupted search goes on.

    Returns  the tuning file
    Raises   ValueError  the best learning rate is still at an end after GROWTH more
    """
    plan, setup = setup.plan, _on_search_rows(setup)
    file = Path(plan.out) / "tuning.json"
    for candidate in plan.chosen():
        print(f"searching: {candidate.label}")
        runs = _runs(setup, candidate)
        chosen = choose(candidate, runs)
        searches = read(file) | {
            f"{plan.base}/{plan.task}/{candidate.key}": {
                "chosen": chosen,
                "rule": RULE,
                "when": f"{datetime.now(UTC):%Y-%m-%d}",
                "rows": len(setup.task.validation),
                "scorer": plan.scorer,
                "dtype": setup.dtype,
                "steps": plan.steps_of(candidate),
                "batch": plan.batch if candidate.trains else 0,
                "runs": runs,
            }
        }
        _write(file, {"searches": searches, "provenance": provenance(seed=SEEDS[0])})
        print(f"  best of {len(runs)} runs: {chosen}")
    return file


def _on_search_rows(setup: Setup) -> Setup:
    """The setup with ROWS of the search rows in place of the validation rows."""
    rows = setup.task.search
    rows = rows.select(range(min(ROWS, len(rows))))
    return replace(setup, task=replace(setup.task, validation=rows))


def _runs(setup: Setup, candidate: Candidate) -> list[dict]:
    """All runs of the candidate's search, in the order in which they were made."""
    plan = setup.plan
    templates = (plan.template,) if plan.template else setup.templates
    settings = _fitting(setup, grid(candidate, templates))
    run = partial(_run_once, setup, candidate)
    if not candidate.trains:
        return [run(setting, SEEDS[0]) for setting in settings]
    rates = [setting["lr"] for setting in settings]
    return rate_runs(lambda lr, seed: run(settings[0] | {"lr": lr}, seed), rates)


def rate_runs(run: Callable[[float, int], dict], rates: list[float]) -> list[dict]:
    """All runs of the search of a learning rate: the screen, then the climb.

    Args
        run    (rate, seed) -> the run's figures
        rates  of the screen
    """
    runs = {}

    def score(lr: float, seeds: tuple[int, ...]) -> tuple[float, float]:
        for seed in seeds:
            if (lr, seed) not in runs:
                runs[lr, seed] = run(lr, seed)
        return _score([runs[lr, seed] for seed in seeds])

    screened = partial(score, seeds=SEEDS[:1])
    best = max(grown(screened, rates), key=screened)
    beside = [neighbor(best, away, parts=4) for away in (-1, 0, 1)]
    grown(partial(score, seeds=SEEDS), beside, parts=4)
    return list(runs.values())


def fewest_runs(candidate: Candidate) -> int:
    """Runs of a search where the best of the screen stays the best."""
    climb = 3 * len(SEEDS) - 1 if candidate.trains else 0
    return len(grid(candidate)) + climb


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


def _score(runs: list[dict]) -> tuple[float, float]:
    """Answers right, and minus the loss: what is higher is better."""
    losses = [math.inf if run["loss"] is None else run["loss"] for run in runs]
    return sum(run["correct"] for run in runs), -sum(losses)


def _surest(runs: list[dict]) -> dict[tuple, list[dict]]:
    """{setting: its runs} of the settings with the most seeds."""
    by_setting: dict[tuple, list[dict]] = {}
    for run in runs:
        by_setting.setdefault(tuple(run["setting"].items()), []).append(run)
    most = max(map(len, by_setting.values()))
    return {s: of_it for s, of_it in by_setting.items() if len(of_it) == most}


def _rate(setting: tuple) -> float | None:
    return dict(setting).get("lr")


def _tried(runs: list[dict]) -> tuple[tuple[float, float], ...]:
    """(rate, share of the answers that were right) of the rates with the most seeds."""
    shares = {
        _rate(setting): sum(r["correct"] for r in of_it) / sum(r["rows"] for r in of_it)
        for setting, of_it in _surest(runs).items()
    }
    return () if None in shares else tuple(sorted(shares.items()))


def choose(candidate: Candidate, runs: list[dict]) -> dict:
    """The best setting of those with the most seeds.

    Raises  ValueError  its learning rate is at an end of those tried
    """
    sure = _surest(runs)
    best = dict(max(sure, key=lambda setting: _score(sure[setting])))
    rates = [_rate(setting) for setting in sure]
    if None not in rates and not is_inside(best["lr"], rates):
        raise ValueError(
            f"{candidate.key}: {at_an_end(best['lr'], rates)}, so that the optimum may "
            "lie outside; with more --steps the rates differ more clearly"
        )
    return best


def _run_once(setup: Setup, candidate: Candidate, setting: dict, seed: int) -> dict:
    """The run's figures, from its file where the same run was made before."""
    plan = setup.plan
    hashed = (
        setup.fingerprint,
        setup.device.type,
        setup.dtype,
        plan.steps,
        plan.batch,
        len(setup.task.validation),
        scorers.identity(setup.task.score),
    )
    name = "-".join(str(part) for part in (candidate.key, *setting.values(), seed))
    file = Path(plan.out) / "tuning" / f"{name}-{digest(hashed, plan.base)}.json"
    if not file.exists():
        _write(file, _run(setup, candidate, setting, seed))
    run = records.read_object(file)
    print(f"  {setting}, seed {seed}: {run['correct']:.4g} of {run['rows']}")
    return run


def _run(setup: Setup, candidate: Candidate, setting: dict, seed: int) -> dict:
    """Train, where the candidate does, and answer. What diverges has nothing right."""
    task, begun = setup.task, time.perf_counter()
    run = {"setting": setting, "seed": seed, "rows": len(task.validation)}
    try:
        ready = adapt(candidate, setup, setting, seed, search=True)
    except Diverged as error:
        figures = {"correct": 0, "loss": None, "diverged": str(error)}
    else:
        correct = sum(ready.answer(task, task.validation).correct)
        loss = ready.history.validation[-1][1] if ready.history else None
        figures = {"correct": correct, "loss": loss}
    return run | figures | {"seconds": time.perf_counter() - begun}


def _write(file: Path, content: dict) -> None:
    with atomic.new_file(file) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
