"""F4: when to fine-tune fully. Loss against rows, near the pretraining and far from it.

Full fine-tuning and LoRA differ twice: in the rank of the update, and in what trains,
since LoRA leaves embeddings, norms and head frozen. So there are four arms:

                          projections        embeddings, norms, head
    full                  full rank          train
    full-projections      full rank          frozen
    lora-and-rest         rank 8             train
    lora                  rank 8             frozen

The rule compares the two arms that differ in the rank alone, full-projections and lora.
All learn a near and a far task from a hundred to 1,600 rows, with the same number of
optimizer steps and early stopping on validation. The learning rate is searched for each
arm and task with the same budget, on 400 rows. The claim's ten thousand would take six
times as long: what "many" is here stands in the rule.
"""

from collections.abc import Sequence
from statistics import fmean

from ...common.statistics import mean_of as _means
from ..claim import FAILS, HOLDS, Claim, Invalid, Measured, Rule
from ..intervals import paired
from ..rates import best_inside, search
from ..runs import Run
from ..runs import matches as _is
from . import finetune

NEAR, FAR, CONTROL = "gap-1", "gap-3", "gap-1-random"
FEW, SOME, MANY = SIZES = (100, 400, 1600)  # training rows
ALL, FULL, BOTH, LORA = "full", "full-projections", "lora-and-rest", "lora"
RATES = {  # to begin with
    ALL: (1e-3, 3e-3, 1e-2),
    FULL: (1e-3, 3e-3, 1e-2),
    BOTH: (1e-3, 3e-3, 1e-2),
    LORA: (3e-3, 1e-2, 3e-2),
}
MARGIN = 0.02  # nats per token that LoRA may be behind and still be no worse
SEEDS = (0, 1, 2, 3, 4)
DECIDING = tuple(range(20))  # for the two arms and the cells that the rule reads
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
    for method in (FULL, LORA):
        known += [
            config(task, n, method, chosen[task, method], seed)
            for task, n in (*FOR_FULL, *FOR_LORA)
            for seed in DECIDING
        ]
    for method in (FULL, LORA):
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


def lead(
    all_runs: Sequence[Run], cell: Cell, full: str = FULL, other: str = LORA
) -> tuple[float, float, float]:
    """Test loss of `other` minus that of `full`, paired: above 0, full is ahead.

    On the seeds that both have.
    """
    arms = [tuned(all_runs, cell, method) for method in (other, full)]
    both = set.intersection(*({run.config["seed"] for run in arm} for arm in arms))
    return paired(*([r for r in arm if r.config["seed"] in both] for arm in arms))


def measured(all_runs: Sequence[Run]) -> Measured:
    """What the advice gains where it gains least.

    smaller of   loss(LoRA) - loss(full)             where the textbook says full
                 loss(full) - loss(LoRA) + MARGIN    where it does not
    """
    _refuse_learnable_control(all_runs)
    far = _means([lead(all_runs, cell) for cell in FOR_FULL])
    value, low, high = _means([lead(all_runs, cell) for cell in FOR_LORA])
    near = (MARGIN - value, MARGIN - high, MARGIN - low)  # the signs have turned
    least = (min(far[i], near[i]) for i in range(3))
    return Measured(*least, DECIDING, _figures(all_runs))


def _figures(all_runs: Sequence[Run]) -> dict[str, str]:
    """The leads that the texts name, with their intervals."""
    near = _means([lead(all_runs, cell) for cell in FOR_LORA])
    both = _means([lead(all_runs, cell, ALL) for cell in FOR_LORA])
    leads = {
        "far": lead(all_runs, (FAR, MANY)),
        "near": near,
        "far_all": lead(all_runs, (FAR, MANY), ALL),
        "near_all": both,
        "far_rest": lead(all_runs, (FAR, MANY), ALL, BOTH),
        "far_small": lead(all_runs, (FAR, FEW)),
        "near_large": lead(all_runs, (NEAR, MANY)),
    }
    return {
        name: "{:+.3f} [{:+.3f}, {:+.3f}]".format(*of) for name, of in leads.items()
    }


def _refuse_learnable_control(all_runs: Sequence[Run]) -> None:
    """Invalid where labels that say nothing were learned as well as the real ones."""
    for method in (FULL, LORA):
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
    "On a model of a million parameters, where the same projections train, full "
    "fine-tuning is {far} nats ahead of LoRA with 1,600 examples of a far task, and "
    "{near} with up to 400 of a near one. Far with a hundred examples it is "
    "{far_small}, near with 1,600 {near_large}. Where full fine-tuning also trains "
    "embeddings, norms and head, and LoRA does not, it is {far_all} far and {near_all} "
    "near. Where both train them, it is {far_rest} far"
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
                "What the advice gains where it gains least, in test loss between full "
                "fine-tuning of the projections and LoRA of rank 8 on the same ones; "
                "with 1,600 examples of a far task, LoRA's loss minus the other; with "
                "100 and 400 examples of a near task, the other minus LoRA's, plus a "
                "margin of 0.02 by which LoRA may be behind; learning rates searched "
                "for each arm and task with the same budget on 400 examples, equal "
                "optimizer steps, early stopping, paired over twenty seeds and test "
                "rows; valid only if random labels are learned worse"
            ),
            unit="nats per token",
            verdicts=(FAILS, HOLDS),
            edges=(0.0,),
        ),
        configs=configs,
        measured=measured,
        say_instead={
            "does not hold here": INSTEAD,
            "holds": INSTEAD,
            "undecided": INSTEAD,
        },
        number="the smaller of the two gains, far and near, that the advice promises",
        so={
            "holds": (
                "With few examples near home LoRA is no worse; with many far away, "
                "full fine-tuning of the same weights is {far} nats ahead."
            ),
            "does not hold here": (
                "Full fine-tuning of the matrices that LoRA adapts is {far} nats ahead "
                "on the far task, and {near} on the near one."
            ),
            "undecided": (
                "These runs cannot tell: on a far task with many examples, full "
                "fine-tuning of the matrices that LoRA adapts is {far} nats ahead."
            ),
        },
    ),
)
