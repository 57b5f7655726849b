"""L5, L6: where LoRA goes, and how large it is, against the distance to pretraining.

The dial of tiny's tasks, from a format that it knows to a cipher, is the domain gap.
For each gap and each LoRA the learning rate is searched with the same budget.
"""

from collections.abc import Sequence
from statistics import fmean

from ...common.statistics import over_seeds
from ..claim import LARGE_HOLDS, SMALL_HOLDS, Claim, Measured, Rule
from ..intervals import paired
from ..rates import at_best, tuned
from ..runs import Run, matches
from . import finetune

GAPS = ("gap-0", "gap-1", "gap-2", "gap-3", "gap-4")
SEEDS = (0, 1, 2, 3, 4)
RATES = (3e-3, 1e-2, 3e-2)
N, STEPS, BATCH = 1000, 100, 16
RANKS, ROBUST, NEAR_ENOUGH = (1, 4, 16, 64), 16, 0.05  # L6; nats
# L6's last part: few rows, seen often, at the rates searched with many.
FEW = dict(task="gap-2", n=100, steps=300)
# L5. On tiny, 12 x 1,024 = 8 x 1,536 = 12,288 parameters a layer; 5 x 2,560 = 12,800.
PLACES = {"attention": ("attention", 12), "mlp": ("mlp", 8), "both": ("all-linear", 5)}
EVERYWHERE = ("all-linear", 12)  # the rank of attention's, on every projection


def config(task: str, targets: str, r: int, lr: float, seed: int, **other) -> dict:
    asked = dict(n=N, steps=STEPS, batch=BATCH) | other
    return finetune.config(
        base="tiny",
        task=task,
        method="lora",
        r=r,
        alpha=2 * r,
        targets=targets,
        lr=lr,
        seed=seed,
        **asked,
    )


def _cell(task, targets, r):
    return tuned(lambda lr, seed: config(task, targets, r, lr, seed), RATES, SEEDS)


def _of(all_runs: Sequence[Run], task: str, targets: str, r: int) -> list[Run]:
    """The cell's runs at its searched rate."""
    wanted = dict(task=task, targets=targets, r=r, n=N)
    return at_best([run for run in all_runs if matches(run, **wanted)])


# ------------------------------------------------------------------- L5: the place


def place_configs(scale: str) -> list[dict]:
    if scale != "tiny":
        return []
    places = (*PLACES.values(), EVERYWHERE)
    return [c for task in GAPS for place in places for c in _cell(task, *place)[0]]


def wins(all_runs: Sequence[Run], place: tuple, other: tuple) -> list[float]:
    """For each seed, percent of the gaps on which `place` has the lower test loss."""
    lost = {
        (task, at): {
            r.config["seed"]: r.result["test_loss"] for r in _of(all_runs, task, *at)
        }
        for task in GAPS
        for at in (place, other)
    }
    return [
        100 * fmean(lost[task, place][seed] < lost[task, other][seed] for task in GAPS)
        for seed in SEEDS
    ]


def place_measured(all_runs: Sequence[Run]) -> Measured:
    value, low, high = over_seeds(wins(all_runs, PLACES["attention"], PLACES["mlp"]))
    better = {
        task: paired(
            _of(all_runs, task, *PLACES["mlp"]),
            _of(all_runs, task, *PLACES["attention"]),
        )[0]
        for task in GAPS
    }
    absolute = over_seeds(wins(all_runs, EVERYWHERE, PLACES["attention"]))[0]
    figures = {
        "near": f"{better[GAPS[1]]:+.2f}",
        "far": f"{better[GAPS[3]]:+.2f}",
        "wins": f"{value:.0f}",
        "absolute": f"{absolute:.0f}",
    }
    return Measured(value, max(low, 0.0), min(high, 100.0), SEEDS, figures)


# -------------------------------------------------------------------- L6: the rank


def rank_configs(scale: str) -> list[dict]:
    """Every gap and rank; then few rows at the rates that were searched with many."""
    if scale != "tiny":
        return []
    cells = {(task, r): _cell(task, "all-linear", r) for task in GAPS for r in RANKS}
    known = [c for configs, _ in cells.values() for c in configs]
    for r in RANKS[-2:]:
        lr = cells[FEW["task"], r][1]
        if lr is not None:
            known += [
                config(targets="all-linear", r=r, lr=lr, seed=s, **FEW) for s in SEEDS
            ]
    return known


def rank_measured(all_runs: Sequence[Run]) -> Measured:
    """Test loss of rank 16 over that of the gap's best rank, where that is largest."""
    excess, needed = {}, {}
    for task in GAPS:
        cells = {r: _of(all_runs, task, "all-linear", r) for r in RANKS}
        known = {
            r: fmean(run.result["validation_loss"] for run in cell)
            for r, cell in cells.items()
        }
        best = min(RANKS, key=known.get)
        excess[task] = paired(cells[ROBUST], cells[best])
        needed[task] = next(r for r in RANKS if known[r] <= known[best] + NEAR_ENOUGH)
    worst = max(GAPS, key=lambda task: excess[task][0])
    figures = {
        "excess": f"{excess[worst][0]:+.3f}",
        "needed": ", ".join(f"{task}: {r}" for task, r in needed.items()),
        "overfit": f"{overfit(all_runs)[0]:+.3f}",
    }
    return Measured(*excess[worst], SEEDS, figures)


def overfit(all_runs: Sequence[Run]) -> tuple[float, float, float]:
    """Test loss of rank 64 minus that of rank 16, with a hundred rows seen 48 times."""
    few = [run for run in all_runs if run.config["n"] == FEW["n"]]
    small, large = ([x for x in few if x.config["r"] == r] for r in RANKS[-2:])
    return paired(large, small)


PLACE = (
    "At equal parameters attention's projections end with the lower loss on {wins} % "
    "of the gaps: MLP minus attention is {near} nats on a new format, {far} on a new "
    "language. LoRA everywhere, at attention's rank, beats attention alone on "
    "{absolute} %"
)
RANK = (
    "Rank 16 costs {excess} nats over the best rank where it costs most. The smallest "
    "rank within 0.05 nats of the best, by gap: {needed}. With a hundred rows, rank 64 "
    "minus rank 16 is {overfit} nats"
)
CLAIMS = (
    Claim(
        id="L5",
        notebook="05",
        statement=(
            "Attention projections give the best accuracy per parameter; all linear "
            "layers are better in absolute terms"
        ),
        rule=Rule(
            words=(
                "Share of five tasks, near to far, on which LoRA on attention alone "
                "has a lower test loss than LoRA on the MLP alone at the same number "
                "of parameters; the learning rate searched for each, mean over seeds"
            ),
            unit="%",
            verdicts=LARGE_HOLDS,
            edges=(50.0, 90.0),
        ),
        configs=place_configs,
        measured=place_measured,
        say_instead={"does not hold here": PLACE, "holds when": PLACE},
        number="tasks on which attention beats the MLP",
        so={
            "does not hold here": (
                "At equal parameters neither attention nor the MLP always wins. Adapt "
                "all linear layers."
            ),
        },
    ),
    Claim(
        id="L6",
        notebook="05",
        statement=(
            "A rank of 16 is robust; a higher one overfits; a larger domain gap needs "
            "a higher one"
        ),
        rule=Rule(
            words=(
                "Test loss of rank 16 minus that of the best rank of 1, 4, 16 and 64, "
                "chosen on validation, on the one of five tasks where that is largest; "
                "the learning rate searched for each rank and task, paired over seeds "
                "and rows"
            ),
            unit="nats per token",
            verdicts=SMALL_HOLDS,
            edges=(0.05, 0.2),
        ),
        configs=rank_configs,
        measured=rank_measured,
        say_instead={"does not hold here": RANK, "holds when": RANK},
        number="loss of rank 16 above that of the best rank",
        so={
            "undecided": (
                "Where rank 16 was worst, its loss was {excess} nats above the best "
                "rank's. Five seeds cannot tell whether that matters."
            ),
        },
    ),
)
