"""The stored runs on rank, scale and targets, as figures with their finding in words.

    lesson.show(*search_grid(searches))       every method at every learning rate
    lesson.show(*sizes(sized, live))          size and loss by rank, LoRA and rsLoRA
    lesson.show(*alphas(tuned))               loss by alpha times learning rate
    lesson.show(*targets(cells))              targets at equal budgets, by task
    lesson.show(*excess_by_rank(ranked))      what each rank loses, by task

    records(trial, *methods)                  runs as plain dicts, for a judge

The runs come from the store (ledger/runs.py); tuning_pictures.py draws.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from matplotlib.figure import Figure

from ...common.statistics import over_seeds
from ...ledger.experiments import family, own_rates, rank_and_place, scaling
from ...ledger.intervals import paired
from ...ledger.rates import at_best, chosen
from ...ledger.runs import Run, matches
from ...plotting import curves
from . import tuning_pictures

METHODS = {"LoRA": "lora", "rsLoRA": "rslora"}
LIVE = "your run, 20 steps"
Row = tuple[float, float, float, float]  # x, mean, lowest, highest


# Learning rates -----------------------------------------------------------------------


def search_grid(searches: Mapping[str, Mapping]) -> tuple[Figure, str]:
    """All methods of a search, at all learning rates that it tried.

    Args
        searches  {method: its search, as data/results/family_search.json has it}; the
                  first method's best learning rate is the shared one
    """
    right = {
        name: {run["setting"]["lr"]: run["correct"] for run in search["runs"]}
        for name, search in searches.items()
    }
    own = {name: search["chosen"]["lr"] for name, search in searches.items()}
    shared, rows = next(iter(own.values())), _rows(searches)
    figure = tuning_pictures.rate_grid(
        right,
        own,
        of=rows,
        shared=shared,
        title="At one learning rate the methods differ; at their own, they hardly do",
        subtitle=(
            f"Share of {rows} validation rows right. Star: the method's own best. "
            "Dashed: one for all."
        ),
    )
    at_one = ", ".join(f"{n} {by_rate.get(shared)}" for n, by_rate in right.items())
    at_own = ", ".join(f"{n} {by_rate[own[n]]}" for n, by_rate in right.items())
    return figure, (
        f"Rows right of {rows}. At {shared:g}: {at_one}. At its own best learning "
        f"rate: {at_own}."
    )


def _rows(searches: Mapping[str, Mapping]) -> int:
    (rows,) = {run["rows"] for search in searches.values() for run in search["runs"]}
    return rows


def records(trial: Sequence[Run], *methods: str) -> Iterator[dict]:
    """A trial as dicts of method, lr, seed, validation (loss) and test (loss).

    Seed 0 is the whole search: at each rate the means over its seeds. Rates at which a
    method diverged in the search are left out.

    Args
        trial    runs of family.configs
        methods  of those, the ones wanted
    """
    for run in trial:
        if run.config["method"] in methods and run.config["seed"] in family.COMPARED:
            yield _record([run], seed=run.config["seed"])
    for method in methods:
        search = [
            run
            for run in trial
            if matches(run, method=method) and run.config["seed"] in family.SEARCHED
        ]
        for lr in sorted({run.config["lr"] for run in search}):
            at_rate = [run for run in search if run.config["lr"] == lr]
            if not any(run.result["diverged"] for run in at_rate):
                yield _record(at_rate, seed=0)


def _record(runs: Sequence[Run], seed: int) -> dict:
    names = {"validation": "validation_loss", "test": "test_loss"}
    losses = {n: fmean(run.result[loss] for run in runs) for n, loss in names.items()}
    about = {name: runs[0].config[name] for name in ("method", "lr")}
    return about | {"seed": seed} | losses


# Scales -------------------------------------------------------------------------------


def two_scales(sides: Mapping[str, Mapping[str, Sequence]]) -> tuple[Figure, str]:
    """The size of an update by rank, for two ways in which its directions add up.

    Args
        sides  {how the directions lie: {scale: [(rank, size), …]}}
    """
    figure = tuning_pictures.panels(
        sides,
        x=("Rank r, directions",) * 2,
        y=("Size, share of the output",) * 2,
        log=("xy", "xy"),
        same_y=True,
        title="Each scale keeps the size of the update in one of two cases",
    )
    phrases = []
    for side, by_scale in sides.items():
        growth = (f"{n} {rows[-1][1] / rows[0][1]:.2f}" for n, rows in by_scale.items())
        phrases.append(f"{side}: {', '.join(growth)}")
    return figure, f"Size at the last rank over that at rank 1. {'; '.join(phrases)}."


def sizes(
    sized: Sequence[Run], live: Mapping[int, Sequence[float]]
) -> tuple[Figure, str]:
    """The size of the update and the test loss by rank, at one learning rate.

    Args
        sized  runs of scaling.size_configs
        live   {rank: sizes that were just measured}
    """
    size = {name: _by_rank(sized, m, "ratio") for name, m in METHODS.items()}
    size[LIVE] = [(r, fmean(own)) for r, own in live.items()]
    loss = {name: _by_rank(sized, m, "test_loss") for name, m in METHODS.items()}
    figure = tuning_pictures.panels(
        {"How large the update is": size, "What it costs": loss},
        x=("Rank r, directions",) * 2,
        y=("Size, share of the output", "Test loss, nats per token"),
        control=(LIVE,),
        title="At one learning rate, LoRA's update shrinks with the rank",
        subtitle=f"tiny on {scaling.TASK} at {scaling.SIZED_AT:g}. Bars: five seeds.",
    )
    powers = (
        f"{name} r^{over_seeds(scaling.exponents(sized, method))[0]:+.2f}"
        for name, method in METHODS.items()
    )
    ends = (
        f"{n} {rows[0][1]:.2f} at rank {rows[0][0]}, {rows[-1][1]:.2f} at {rows[-1][0]}"
        for n, rows in loss.items()
    )
    return figure, f"Size: {', '.join(powers)}. Test loss: {'; '.join(ends)}."


def _by_rank(sized: Sequence[Run], method: str, quantity: str) -> list[Row]:
    return [
        _spread(
            r, [x.result[quantity] for x in sized if matches(x, method=method, r=r)]
        )
        for r in scaling.SIZED
    ]


def _spread(x: float, values: Sequence[float]) -> Row:
    return x, fmean(values), min(values), max(values)


def alphas(tuned: Sequence[Run]) -> tuple[Figure, str]:
    """Validation loss by alpha times learning rate, a curve for each alpha.

    Args
        tuned  runs of own_rates.alpha_configs
    """
    by_product, phrases = {}, []
    for alpha, pool in own_rates.alpha_pools(tuned).items():
        rows = {
            lr: _spread(alpha * lr, losses)
            for lr, losses in sorted(pool.table.items())
            if max(losses) < math.inf
        }
        by_product[f"alpha {alpha}"] = list(rows.values())
        lr = chosen(pool.table)
        product, mean, low, high = rows[lr]
        phrases.append(
            f"alpha {alpha}: learning rate {lr:g}, product {product:.2g}, "
            f"loss {mean:.2f} ({low:.2f} to {high:.2f})"
        )
    figure = tuning_pictures.panels(
        {"": by_product},
        x=("Alpha times learning rate, dimensionless",),
        y=("Validation loss, nats per token",),
        title="The product of alpha and learning rate does not fix the loss",
        subtitle="LoRA of rank 8. Bars: the three seeds of the search.",
    )
    return figure, f"Learning rates of the lowest mean. {'; '.join(phrases)}."


# Targets and ranks --------------------------------------------------------------------


def at_targets(
    pool: Sequence[Run], places: Mapping[str, tuple[str, int]]
) -> dict[str, dict[str, list[Run]]]:
    """{task: {place: its runs at the learning rate that was found for it}}.

    Args
        places  {label: (targets, rank)}
    Raises   LookupError  no runs of a place; the message holds targets, rank and task
    """
    cells = {}
    for task in rank_and_place.GAPS:
        cells[task] = {}
        for name, (targets, r) in places.items():
            wanted = dict(task=task, targets=targets, r=r, n=rank_and_place.N)
            own = [run for run in pool if matches(run, **wanted)]
            if not own:
                raise LookupError(f"no stored runs of {targets}, rank {r}, on {task}")
            cells[task][name] = at_best(own)
    return cells


def targets(cells: Mapping[str, Mapping[str, Sequence[Run]]]) -> tuple[Figure, str]:
    """Each place's test loss minus that of the first one, by task.

    Args
        cells  as at_targets returns them
    """
    first = next(iter(next(iter(cells.values()))))
    against = {
        task: {
            name: paired(runs, by[first]) for name, runs in by.items() if name != first
        }
        for task, by in cells.items()
    }
    figure = tuning_pictures.forest(
        against,
        x=f"Test loss minus that of {first}, nats per token",
        sides=(f"← {first} is worse", f"{first} is better →"),
        title=f"At equal parameters, {first} falls behind on the far tasks",
        subtitle="Mean of five paired seeds in tiny, with its 95 % interval.",
    )
    phrases = (
        f"{task} " + ", ".join(f"{name} {d[0]:+.3f}" for name, d in rows.items())
        for task, rows in against.items()
    )
    return figure, f"Minus {first}, nats per token: {'; '.join(phrases)}."


def excess_by_rank(ranked: Sequence[Run]) -> tuple[Figure, str]:
    """Mean test loss of each rank above that of the task's best one, by task.

    Args
        ranked  runs of rank_and_place.rank_configs
    """
    series = {}
    for task in rank_and_place.GAPS:
        means = {}
        for r in rank_and_place.RANKS:
            wanted = dict(task=task, r=r, n=rank_and_place.N)
            own = at_best([run for run in ranked if matches(run, **wanted)])
            means[r] = fmean(run.result["test_loss"] for run in own)
        best = min(means.values())
        series[task] = [(r, mean - best) for r, mean in means.items()]
    figure = curves.lines(
        series,
        x="Rank r, directions",
        y="Test loss above the best rank's, nats per token",
        title="The farther the task, the more a low rank loses",
        subtitle="LoRA on all linear layers of tiny, mean of five seeds.",
        log="x",
        names="foot",
        width=6.0,
        height=1.9,
    )
    phrases = ", ".join(f"{task} {rows[0][1]:.2f}" for task, rows in series.items())
    return figure, f"Rank {rank_and_place.RANKS[0]} above the best rank: {phrases}."
