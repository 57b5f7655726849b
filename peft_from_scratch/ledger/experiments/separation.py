"""Whether tiny tells methods apart: differences between them against those of seeds.

A toy on which all methods come out alike, or on which a seed matters more than a
method, could decide no claim. Each method learns a near and a far task with five seeds,
at the learning rate that the same search finds for it; what counts is the difference to
LoRA of rank 8, paired over seeds and test rows. The model's card has the table.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ...common.statistics import over_seeds
from ..claim import Invalid
from ..intervals import paired
from ..rates import search
from ..runs import Run, stored
from . import finetune

TASKS = ("gap-1", "gap-3")  # near the pretraining, and far from it
SEEDS = (0, 1, 2, 3, 4)
RATES = {"full": (1e-3, 3e-3, 1e-2), "lora": (3e-3, 1e-2, 3e-2)}  # to begin with
REFERENCE = "LoRA, rank 8"
CONTENDERS: dict[str, dict] = {  # alpha is twice r
    "nothing trained": dict(method="base"),
    "frozen random LoRA": dict(method="lora-frozen", r=8, alpha=16),
    "LoRA, rank 1": dict(method="lora", r=1, alpha=2),
    REFERENCE: dict(method="lora", r=8, alpha=16),
    "full": dict(method="full"),
}
ANY_RATE = 1e-3  # of what does not train


@dataclass(frozen=True)
class Row:
    """One method on one task: test losses in nats per label token."""

    task: str
    method: str
    trainable: int
    lr: float | None
    loss: tuple[float, float, float]  # mean over seeds, low, high
    over: tuple[float, float, float] | None  # its loss minus the reference's, paired
    seconds: float  # of a run, training alone

    @property
    def told_apart(self) -> bool:
        return self.over is not None and not self.over[1] <= 0 <= self.over[2]


def config(task: str, method: str, lr: float, seed: int) -> dict:
    return finetune.config(
        base="tiny", task=task, lr=lr, seed=seed, **CONTENDERS[method]
    )


def configs() -> list[dict]:
    """Those known so far: the searches, and all seeds at the rates that they chose."""
    known = []
    for task in TASKS:
        for method in CONTENDERS:
            searched, lr = _searched(task, method)
            known += searched
            if lr is not None:
                known += [config(task, method, lr, seed) for seed in SEEDS]
    return list({str(each): each for each in known}.values())


def rows() -> Iterator[Row]:
    """The table, from the stored runs.

    Raises  Invalid  a run is missing, or the best rate lies at the end of its grid
    """
    for task in TASKS:
        reference = _runs(task, REFERENCE)
        for method in CONTENDERS:
            yield _row(task, method, reference)


def _row(task: str, method: str, reference: list[Run]) -> Row:
    own_runs = _runs(task, method)
    results = [run.result for run in own_runs]
    trains = CONTENDERS[method]["method"] not in finetune.UNTRAINED
    return Row(
        task,
        method,
        results[0]["trainable"] if trains else 0,
        own_runs[0].config["lr"] if trains else None,
        over_seeds([result["test_loss"] for result in results]),
        None if method == REFERENCE else paired(own_runs, reference),
        sum(result["seconds"] for result in results) / len(results),
    )


def _runs(task: str, method: str) -> list[Run]:
    _, lr = _searched(task, method)
    own_runs = [lr and stored(config(task, method, lr, seed)) for seed in SEEDS]
    if None in own_runs:
        raise Invalid(f"runs of {method} on {task} are missing")
    return own_runs


def _searched(task: str, method: str) -> tuple[list[dict], float | None]:
    kind = CONTENDERS[method]["method"]
    if kind in finetune.UNTRAINED:
        return [], ANY_RATE
    return search(lambda lr: config(task, method, lr, SEEDS[0]), RATES[kind])
