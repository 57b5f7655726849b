"""The runs of claim F4, full fine-tuning against LoRA by size of the data: their leads.

    lesson.show(*picture(stored, compared, title=…))     leads with their intervals
    live(stored, seeds=(20, 21))                     the rule's number, on short runs

The stored runs are those of ledger/experiments/data_size.py.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.figure import Figure

from ...ledger.experiments import data_size, finetune
from ...ledger.experiments.data_size import FULL, LORA, MARGIN, Cell
from ...ledger.intervals import paired
from ...ledger.runs import Run
from . import lead_picture
from .lead_picture import Interval

AXIS = "Lead of full fine-tuning: LoRA's loss minus its own, nats per token"
SHORT = dict(steps=25, test=60, validation=10)  # of a run that a lesson waits for


def picture(
    stored: Sequence[Run],
    compared: Mapping[str, tuple[Cell, str, str]],
    *,
    title: str,
    subtitle: str = "",
) -> tuple[Figure, str]:
    """The leads of full fine-tuning, a row each, and the same in words.

    Args
        compared  {label: (cell, full fine-tuning's method, the other)}
    """
    spans = {label: data_size.lead(stored, *pair) for label, pair in compared.items()}
    seeds = {label: leads(stored, *pair) for label, pair in compared.items()}
    about = {"title": title, "subtitle": subtitle}
    figure = lead_picture.picture(seeds, spans, x=AXIS, **about)
    return figure, lead_picture.words(spans)


def leads(stored: Sequence[Run], cell: Cell, full: str, other: str) -> list[float]:
    """Test loss of `other` minus that of `full`, on each seed that both have."""
    arms = [data_size.tuned(stored, cell, method) for method in (full, other)]
    ahead, behind = (
        {run.config["seed"]: run.result["test_loss"] for run in arm} for arm in arms
    )
    return [behind[seed] - ahead[seed] for seed in sorted(ahead.keys() & behind.keys())]


def random_answers(stored: Sequence[Run]) -> list[tuple[float, float]]:
    """[(test loss with random answers, with right ones)] of each method of the rule."""
    cell = data_size.NEAR, data_size.SOME
    control = [run for run in stored if run.config["task"] == data_size.CONTROL]
    pairs = []
    for how in (FULL, LORA):
        noise = [run for run in control if run.config["method"] == how]
        arms = noise, data_size.tuned(stored, cell, how)
        pairs.append(tuple(fmean(r.result["test_loss"] for r in arm) for arm in arms))
    return pairs


def live(stored: Sequence[Run], seeds: Sequence[int]) -> Interval:
    """The smaller of the rule's two numbers, with short runs of new seeds.

    The far cell is the rule's, the near one its smallest. Rates are the searched ones.
    """
    far, near = data_size.FOR_FULL[0], data_size.FOR_LORA[0]
    arms = {
        (cell, how): [_short(stored, cell, how, seed) for seed in seeds]
        for cell in (far, near)
        for how in (FULL, LORA)
    }
    for_full = paired(arms[far, LORA], arms[far, FULL])
    for_lora = paired(arms[near, FULL], arms[near, LORA])
    return tuple(map(min, for_full, (end + MARGIN for end in for_lora)))


def _short(stored: Sequence[Run], cell: Cell, how: str, seed: int) -> Run:
    rate = data_size.tuned(stored, cell, how)[0].config["lr"]
    config = data_size.config(*cell, how, rate, seed) | SHORT
    return Run("live", config, finetune.compute(config), {})
