"""F4: when to fine-tune fully. Loss against rows, near the pretraining and far from it.

Full fine-tuning and LoRA learn a near and a far task from a hundred to 1,600 rows, with
the same number of optimizer steps and early stopping on validation. The learning rate
is searched for each method and task with the same budget, on 400 rows. The claim's ten
thousand would take six times as long: what "many" is here stands in the rule.
"""

from collections.abc import Sequence
from statistics import fmean

from ...common.statistics import mean_of as _means
from ..claim import Claim, Invalid, Measured, Rule
from ..intervals import paired
from ..rates import best_inside, search
from ..runs import Run
from ..runs import matches as _is
from . import finetune

NEAR, FAR, CONTROL = "gap-1", "gap-3", "gap-1-random"
FEW, SOME, MANY = SIZES = (100, 400, 1600)  # training rows
RATES = {"full": (1e-3, 3e-3, 1e-2), "lora": (3e-3, 1e-2, 3e-2)}  # to begin with
SEEDS = (0, 1, 2, 3, 4)
TUNED_ON, TUNED_AT = 0, SOME  # the seed and the rows whose validation chooses the rate
STEPS, BATCH = 100, 16  # MANY rows are seen once, FEW at most 16 times
FOR_FULL = [(FAR, MANY)]  # where the textbook's conditions all hold
FOR_LORA = [(NEAR, FEW), (NEAR, SOME)]  # where none of them does

Cell = tuple[str, int]  # task, rows


def config(task: str, n: int, method: str, lr: float, seed: int) -> dict:
    return finetune.config(
        base="tiny",
        task=task,
        method=method,
        lr=lr,
        seed=seed,
        n=n,
        steps=STEPS,
        batch=BATCH,
        validate_every=20,
        patience=2,
    )


def cells() -> list[Cell]:
    return [(task, n) for task in (NEAR, FAR) for n in SIZES]


def configs(scale: str) -> list[dict]:
    """The searches first; then all seeds at the rates they chose, and the control."""
    if scale != "tiny":
        return []
    known, chosen = [], {}
    for task in (NEAR, FAR):
        for method, rates in RATES.items():
            searched, best = search(
                lambda lr, cell=(task, TUNED_AT, method): config(*cell, lr, TUNED_ON),
                rates,
            )
            known += searched
            chosen[task, method] = best
    if None in chosen.values():
        return known
    for (task, method), lr in chosen.items():
        known += [config(task, n, method, lr, seed) for n in SIZES for seed in SEEDS]
    for method in RATES:
        lr = chosen[NEAR, method]
        known += [config(CONTROL, SOME, method, lr, seed) for seed in SEEDS]
    return list({str(each): each for each in known}.values())  # the searches' seed once


def tuned(all_runs: Sequence[Run], cell: Cell, method: str) -> list[Run]:
    """The runs of a cell at the rate that the search chose; Invalid at a grid's end."""
    task, n = cell
    own = [run for run in all_runs if _is(run, task=task, method=method)]
    searched = [run for run in own if _is(run, n=TUNED_AT, seed=TUNED_ON)]
    best = best_inside({r.config["lr"]: r.result["validation_loss"] for r in searched})
    return [run for run in own if _is(run, n=n, lr=best)]


def advantage(all_runs: Sequence[Run], cell: Cell) -> tuple[float, float, float]:
    """Test loss of LoRA minus that of full fine-tuning, paired: above 0, full wins."""
    return paired(tuned(all_runs, cell, "lora"), tuned(all_runs, cell, "full"))


def measured(all_runs: Sequence[Run]) -> Measured:
    """What the advice gains where it gains least.

    smaller of   loss(LoRA) - loss(full)   where the textbook says full
                 loss(full) - loss(LoRA)   where it does not
    """
    _refuse_learnable_control(all_runs)
    full = [advantage(all_runs, cell) for cell in FOR_FULL]
    lora = [tuple(-x for x in advantage(all_runs, cell)) for cell in FOR_LORA]
    lora = [(value, high, low) for value, low, high in lora]  # the signs have turned
    value, low, high = (min(_means(full)[i], _means(lora)[i]) for i in range(3))
    figures = {
        "full": f"{_means(full)[0]:+.3f}",
        "lora": f"{_means(lora)[0]:+.3f}",
        "near_large": f"{advantage(all_runs, (NEAR, MANY))[0]:+.3f}",
        "far_small": f"{advantage(all_runs, (FAR, FEW))[0]:+.3f}",
    }
    return Measured(value, low, high, SEEDS, figures)


def _refuse_learnable_control(all_runs: Sequence[Run]) -> None:
    """Invalid where labels that say nothing were learned as well as the real ones."""
    for method in RATES:
        real = fmean(
            r.result["test_loss"] for r in tuned(all_runs, (NEAR, SOME), method)
        )
        noise = [
            run.result["test_loss"]
            for run in all_runs
            if (run.config["task"], run.config["method"]) == (CONTROL, method)
        ]
        if not fmean(noise) > real:
            raise Invalid(f"{method} learns random labels as well as the real ones")


INSTEAD = (
    "On a model of a million parameters, full fine-tuning is {full} nats ahead of LoRA "
    "with 1,600 rows of a far task, and LoRA {lora} nats ahead of it with up to "
    "400 rows of a near one. Full is {far_small} nats ahead with a hundred rows of the "
    "far task, and {near_large} with 1,600 of the near one"
)
CLAIMS = (
    Claim(
        id="F4",
        notebook="01",
        statement=(
            "Full fine-tuning is for more than ten thousand examples, tasks far from "
            "the pretraining, and the highest quality"
        ),
        rule=Rule(
            words=(
                "What the advice gains where it gains least: the smaller of LoRA's "
                "test loss minus full fine-tuning's with 1,600 rows of a far task, "
                "and full fine-tuning's minus LoRA's with 100 and 400 rows of a near "
                "one; rates searched for each task and method with the same budget on "
                "400 rows, equal steps, early stopping, paired over seeds and rows; "
                "valid only if random labels are learned worse"
            ),
            unit="nats per token",
            verdicts=("does not hold here", "holds when", "holds"),
            edges=(0.0, 0.02),
        ),
        configs=configs,
        measured=measured,
        say_instead={"does not hold here": INSTEAD, "holds when": INSTEAD},
        number="gain of the advice where it gains least",
        so={
            "undecided": (
                "Do not choose by rows and distance alone: these runs cannot tell, and"
                " full fine-tuning also trains embeddings, norms and head, which LoRA "
                "leaves frozen."
            ),
        },
    ),
)
