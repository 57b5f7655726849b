"""Q4: what four bits cost a fine-tuned model, and whether the adapters made up for it.

Three models that differ in one thing at a time, on the same rows:

    LoRA          trained beside W0                        tested beside W0
    transplanted  the same A and B                         tested beside W' = NF4(W0)
    QLoRA         trained beside W'                        tested beside W'

    damage        = loss(transplanted) - loss(LoRA)        what four bits do to it
    left          = loss(QLoRA) - loss(LoRA)               what they cost in the end
    compensation  = 1 - left / damage                      what training beside W' mends

A small `left` is the first half of the sentence. That it is small *because* adapters
compensate is the second, and another question: a small damage needs no mending. The
base, its four-bit form, and a QLoRA with random adapters that never train stand beside.

On tiny, LoRA and QLoRA have the same search: quarter decades, the mean validation loss
of three seeds, and no verdict where the best rate is at an end. Each model also reads
rows of tiny's pretraining, to tell what it has forgotten. A QLoRA that is initialized
by LoftQ stands beside, at QLoRA's rate. On SmolLM2, where a run takes minutes, both
have LoRA's rate (four_bit_training.py).
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
import torch
from torch import nn

from ...common.grid import GROWTH, at_an_end, rate_past
from ...common.statistics import UNBOUNDED, mean_of, share_of
from ...core.adapter import adapters
from ...methods import lora
from ...models.load import load_model
from ...tasks.task import load_task
from ...tasks.templates import encode_rows
from ..claim import LARGE_HOLDS, SMALL_HOLDS, Claim, Invalid, Measured, Rule
from ..intervals import paired
from ..runs import Run, matches, stored
from . import finetune
from .four_bit_training import (
    RATE,
    SEEDS,
    TASKS,
    UNTRAINED,
    config,
    merged_config,
    tasks_of,
)

RATES = (6e-3, 1e-2, 2e-2)  # tiny, for each method and task; the search may grow
PARTS = 4  # of a decade
SEARCHED = (0, 1, 2)  # seeds whose validation chooses the rate
LOFTQ = "qlora-loftq"
GENERAL, GENERAL_ROWS = "gap-0", 200  # the format of tiny's pretraining


def cost_config(method: str, task: str, lr: float, seed: int) -> dict:
    """A run on tiny that also reads rows of the pretraining's format."""
    own = config("tiny", method, task, lr, seed)
    general = {"general": GENERAL, "general_rows": GENERAL_ROWS}
    return own | {"experiment": "four_bit_cost"} | general


def compute(config: dict) -> dict:
    """Fine-tune, and test on the task and on what the model knew before.

    Returns  what finetune.compute returns, and
        general_items  loss of each row of the task `general`
        before         of a transplanted LoRA also has those, beside its own base
    """
    model, tokenizer, result = finetune.fine_tuned(config)
    if result["diverged"]:
        return result
    task = load_task(config["general"])
    rows = list(task.test.select(range(config["general_rows"])))
    rows = encode_rows(tokenizer, task.instruction, rows, template=config["template"])
    result["general_items"] = losses(model, rows)
    if config["method"] == finetune.TRANSPLANTED:
        result["before"]["general_items"] = losses(moved_back(model, config), rows)
    return result


def losses(model: nn.Module, rows: list) -> list[float]:
    return [round(loss, 5) for loss in finetune.item_losses(model, rows)]


@torch.no_grad()
def moved_back(model: nn.Module, config: dict) -> nn.Module:
    """The transplanted LoRA beside the full weights again, where it was trained."""
    home, _ = load_model(config["base"], device="cpu")
    lora.inject(home, r=config["r"], alpha=config["alpha"], targets=config["targets"])
    trained = adapters(model)
    for name, module in adapters(home).items():
        module.A.copy_(trained[name].A)
        module.B.copy_(trained[name].B)
    return home


# ------------------------------------------------------------------------- The runs


def searched(method: str, task: str) -> tuple[list[dict], float | None]:
    """(configurations of the search as far as they are known, the rate it chose).

    Raises  Invalid  the best is at an end of the grid after GROWTH more rates
    """
    rates, growth = list(RATES), GROWTH
    while True:
        by_rate = {
            rate: [config("tiny", method, task, rate, seed) for seed in SEARCHED]
            for rate in rates
        }
        known = [each for configs in by_rate.values() for each in configs]
        if None in map(stored, known):
            return known, None
        losses = {rate: validation(configs) for rate, configs in by_rate.items()}
        best = min(rates, key=lambda rate: losses[rate])
        beyond = rate_past(best, rates, PARTS)
        if beyond is None:
            return known, best
        if growth == 0:
            raise Invalid(f"{at_an_end(best, rates)}: the optimum may lie outside")
        rates.append(beyond)
        growth -= 1


def validation(configs: Sequence[dict]) -> float:
    """Mean validation loss of stored runs; infinite where one diverged."""
    losses = [stored(each).result["validation_loss"] for each in configs]
    return float("inf") if None in losses else fmean(losses)


def tiny_cell(task: str) -> list[dict]:
    """A task's configurations on tiny: both searches, then all seeds at their rates."""
    known, seeds = [], SEEDS["tiny"]
    known += [cost_config(name, task, RATE, seeds[0]) for name in UNTRAINED]
    of_lora, lr = searched("lora", task)
    if lr is not None:
        moved = finetune.TRANSPLANTED
        known += [cost_config(moved, task, lr, seed) for seed in seeds]
    of_qlora, lr = searched("qlora", task)
    if lr is not None:
        known += [
            cost_config(name, task, lr, seed)
            for name in ("qlora", LOFTQ)
            for seed in seeds
        ]
    return known + of_lora + of_qlora


def smollm2_cell(task: str) -> list[dict]:
    """A task's configurations on SmolLM2: one rate for all."""
    seeds = SEEDS["smollm2"]
    known = [config("smollm2", name, task, RATE, seeds[0]) for name in UNTRAINED]
    moved = finetune.TRANSPLANTED
    known += [config("smollm2", moved, task, RATE, seed) for seed in seeds]
    return known + [merged_config("smollm2", task, RATE, seed) for seed in seeds]


def configs(scale: str) -> list[dict]:
    cell = tiny_cell if scale == "tiny" else smollm2_cell
    return [each for task in TASKS[scale] for each in cell(task)]


# --------------------------------------------------------------------- What they say


def trio(all_runs: Sequence[Run], task: str) -> tuple[list[Run], list[Run], list[Run]]:
    """(LoRA, transplanted, QLoRA): a run each seed, in the order of the seeds."""
    moved = of_method(all_runs, finetune.TRANSPLANTED, task)
    beside = of_method(all_runs, "qlora", task)
    return [at_home(run) for run in moved], moved, beside


def of_method(all_runs: Sequence[Run], method: str, task: str) -> list[Run]:
    """A method's runs on a task, those of a search left out."""
    own = [
        run
        for run in all_runs
        if matches(run, method=method, task=task)
        and not (method == "qlora" and matches(run, experiment="finetune"))
    ]
    return sorted(own, key=lambda run: run.config["seed"])


def at_home(moved: Run) -> Run:
    """The run of a transplanted LoRA as it was beside the full weights."""
    return replace(moved, result=moved.result | moved.result["before"])


def left(all_runs: Sequence[Run]) -> tuple[float, float, float]:
    """Test loss of QLoRA minus that of LoRA, paired; the mean of the tasks."""
    trios = [trio(all_runs, task) for task in tasks_of(all_runs)]
    return mean_of([paired(beside, full) for full, _, beside in trios])


def damage(all_runs: Sequence[Run]) -> tuple[float, float, float]:
    """Test loss of the transplanted LoRA minus its own beside W0, likewise."""
    trios = [trio(all_runs, task) for task in tasks_of(all_runs)]
    return mean_of([paired(moved, full) for full, moved, _ in trios])


def compensation(all_runs: Sequence[Run]) -> tuple[float, float, float]:
    """Percent of the damage that training beside W' mends, over tasks, rows, seeds."""
    mended, damaged = [], []
    for full, moved, beside in (trio(all_runs, task) for task in tasks_of(all_runs)):
        paired(moved, full), paired(beside, full)  # refuses what does not pair
        items = [np.array([r.result["test_items"] for r in x])
                 for x in (full, moved, beside)]  # fmt: skip
        mended.append(items[1] - items[2])
        damaged.append(items[1] - items[0])
    return share_of(np.concatenate(mended, axis=1), np.concatenate(damaged, axis=1))


def loss_measured(all_runs: Sequence[Run]) -> Measured:
    return Measured(*left(all_runs), _seeds(all_runs), figures(all_runs))


def compensation_measured(all_runs: Sequence[Run]) -> Measured:
    return Measured(*compensation(all_runs), _seeds(all_runs), figures(all_runs))


def _seeds(all_runs: Sequence[Run]) -> tuple[int, ...]:
    return tuple(sorted({run.config["seed"] for run in all_runs}))


def figures(all_runs: Sequence[Run]) -> dict[str, str]:
    trios = [trio(all_runs, task) for task in tasks_of(all_runs)]
    means = {
        name: fmean(run.result["test_loss"] for group in trios for run in group[i])
        for i, name in enumerate(("lora", "transplanted", "qlora"))
    }
    for name in UNTRAINED:
        own = [r.result["test_loss"] for r in all_runs if matches(r, method=name)]
        means[name.replace("-", "_")] = fmean(own)
    spans = {"left": left(all_runs), "damage": damage(all_runs)}
    return (
        {name: f"{loss:.3f}" for name, loss in means.items()}
        | {name: signed(span) for name, span in spans.items()}
        | {"mended": share_sentence(*compensation(all_runs))}
        | {"more": on_tiny(all_runs)}
    )


def signed(span: tuple[float, float, float]) -> str:
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*span)


def share_sentence(share: float, low: float, high: float) -> str:
    """The sentence on the compensation: no number where the interval has no ends."""
    if high - low >= UNBOUNDED:
        return (
            "What training beside four bits mends of that cannot be told: seeds differ "
            "by more than it"
        )
    return (
        f"Training beside four bits mends {share:.0f} % [{low:.0f}, {high:.0f}] of it"
    )


def on_tiny(all_runs: Sequence[Run]) -> str:
    """What only tiny's runs have: each task, LoftQ, rates, and general text."""
    own = [run for run in all_runs if matches(run, experiment="four_bit_cost")]
    if not own:
        return "LoftQ and general text were tried on tiny alone"
    by_task, loftq, rates = [], [], []
    for task in tasks_of(own):
        full, _, beside = trio(own, task)
        by_task.append(f"{task} {paired(beside, full)[0]:+.4f}")
        loftq.append(paired(of_method(own, LOFTQ, task), beside))
        rates.append(f"{full[0].config['lr']:g} and {beside[0].config['lr']:g}")
    return (
        f"By task: {', '.join(by_task)}; rates of LoRA and QLoRA {', '.join(rates)}. "
        f"Initialized by LoftQ, QLoRA ends {signed(mean_of(loftq))} nats from itself. "
        f"{general_sentence(own)}"
    )


def general_sentence(own: Sequence[Run]) -> str:
    """Losses on the format of the pretraining, and QLoRA's above LoRA's."""
    trios = [trio(own, task) for task in tasks_of(own)]
    means = {
        name: fmean(mean for group in trios for mean in map(general, group[i]))
        for i, name in enumerate(("LoRA", "the transplanted one", "QLoRA"))
    }
    untrained = [
        fmean(general(run) for run in own if matches(run, method=name))
        for name in UNTRAINED[:2]
    ]
    above = mean_of(
        [paired(of_general(beside), of_general(full)) for full, _, beside in trios]
    )
    listed = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    return (
        "On rows in the format of the pretraining the base has a loss of "
        f"{untrained[0]:.3f}, its four-bit form {untrained[1]:.3f}, {listed}: QLoRA "
        f"is {signed(above)} from LoRA there"
    )


def general(run: Run) -> float:
    return fmean(run.result["general_items"])


def of_general(group: Sequence[Run]) -> list[Run]:
    """The same runs, tested on general text in place of the task."""
    return [
        replace(run, result=run.result | {"test_items": run.result["general_items"]})
        for run in group
    ]


INSTEAD = (
    "QLoRA ends {left} nats from LoRA ({qlora} and {lora}). A LoRA trained beside the "
    "full weights and moved to the four-bit ones as it is loses {damage}. {mended}. "
    "Untrained, the base is at {base} "
    "and its four-bit form at {nf4_base}; random adapters beside it that never train, "
    "at {qlora_frozen}. {more}. (SmolLM2's weights had been in four bits before: on "
    "it, NF4 rounds what was rounded already)"
)
SETTING = (
    "tiny: mean of three tasks, a new format, new words, a new language, 100 steps of "
    "16 rows, the rate searched for each method and task in quarter decades by the "
    "validation loss of three seeds; "
    "SmolLM2: order sentences to JSON, 50 steps of 8 rows, LoRA's searched rate for "
    "both; paired over seeds and 200 test rows a task"
)
EVERY = (*SMALL_HOLDS, "undecided")
CLAIMS = (
    Claim(
        id="Q4",
        notebook="08",
        statement="The quality loss of a 4-bit base under LoRA is minimal",
        rule=Rule(
            words=f"Test loss of QLoRA minus that of LoRA, r = 8; {SETTING}",
            unit="nats per token",
            verdicts=SMALL_HOLDS,
            edges=(0.02, 0.1),
        ),
        configs=configs,
        measured=loss_measured,
        say_instead=dict.fromkeys(EVERY, INSTEAD),
        number="loss of QLoRA above that of LoRA",
        so={
            "holds": (
                "QLoRA's loss is {left} nats from LoRA's, within what we call minimal."
            ),
            "undecided": (
                "QLoRA's loss is {left} nats above LoRA's: about the edge of what we "
                "call minimal."
            ),
        },
    ),
    Claim(
        id="Q4b",
        notebook="08",
        statement=(
            "The quality loss of a 4-bit base is minimal because the LoRA adapters "
            "compensate for it"
        ),
        rule=Rule(
            words=(
                "How much of the damage is mended: damage is the test loss of a LoRA "
                "trained beside the full weights and moved to the four-bit ones, minus "
                "its loss where it was trained; mended is the loss of the moved one "
                f"minus that of QLoRA, trained beside four bits; {SETTING}"
            ),
            unit="%",
            verdicts=LARGE_HOLDS,
            edges=(10.0, 50.0),
        ),
        configs=configs,
        measured=compensation_measured,
        say_instead=dict.fromkeys(EVERY, INSTEAD),
        number="share of the damage that is mended",
        so={
            "undecided": (
                "The runs cannot tell whether training beside four bits mends most of "
                "the damage, or little of it."
            ),
        },
    ),
)
