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

On tiny, LoRA and QLoRA have the same search (rates.py): quarter decades, three seeds
that the comparison does not use, and a grid that grows until no resample of these seeds
chooses one of its ends. What other search seeds would have said is part of every
interval. Each model also reads rows in the format of tiny's pretraining, to tell what
it has forgotten, and a QLoRA that is initialized by LoftQ stands beside, at QLoRA's
rate. On SmolLM2, where a run takes minutes, both have LoRA's rate.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
import torch
from torch import nn

from ...common.statistics import UNBOUNDED, mean_of, share_of
from ...core.adapter import adapters
from ...methods import lora
from ...models.load import load_model
from ...tasks.task import load_task
from ...tasks.templates import encode_rows
from ..claim import LARGE_HOLDS, SMALL_HOLDS, UNDECIDED, Claim, Measured, Rule
from ..intervals import paired
from ..rates import at_own, choices, chosen, resamples, searched, table_of
from ..runs import Run, matches
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

LORA, QLORA, LOFTQ = "lora", "qlora", "qlora-loftq"
MOVED = finetune.TRANSPLANTED
RATES, GROWTH = (3e-3, 6e-3, 1e-2, 2e-2), 4  # tiny: to begin with; rates more at an end
SEARCHED = (10, 11, 12)  # seeds that choose a rate; SEEDS are compared
EVERY = tuple(range(len(SEARCHED)))
GENERAL, GENERAL_ROWS = "gap-0", 200  # the format of tiny's pretraining
TASK_ITEMS, GENERAL_ITEMS = "test_items", "general_items"


def cost_config(method: str, task: str, lr: float, seed: int) -> dict:
    """A run on tiny that also reads rows of the pretraining's format."""
    own = config("tiny", method, task, lr, seed)
    general = {"general": GENERAL, "general_rows": GENERAL_ROWS}
    return own | {"experiment": "four_bit_cost"} | general


def compute(config: dict) -> dict:
    """Fine-tune, and test on the task and on what the model knew before.

    Returns  what finetune.compute returns, and
        general_items  loss of each row of the task `general`; of a transplanted LoRA
                       also in `before`, beside its own base
    """
    model, tokenizer, result = finetune.fine_tuned(config)
    if result["diverged"]:
        return result
    task = load_task(config["general"])
    rows = list(task.test.select(range(config["general_rows"])))
    rows = encode_rows(tokenizer, task.instruction, rows, template=config["template"])
    result[GENERAL_ITEMS] = losses(model, rows)
    if config["method"] == MOVED:
        result["before"][GENERAL_ITEMS] = losses(moved_back(model, config), rows)
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


def search(method: str, task: str):
    """The search of a method on a task of tiny, as rates.searched returns it."""
    return searched(
        lambda lr, seed: config("tiny", method, task, lr, seed),
        RATES,
        SEARCHED,
        GROWTH,
    )


def tiny_cell(task: str) -> list[dict]:
    """A task's configurations on tiny: both searches, then the comparison.

    It is made at every rate that some resample of the search seeds chooses.
    """
    known = [cost_config(name, task, RATE, SEEDS["tiny"][0]) for name in UNTRAINED]
    tables = {}
    for method in (LORA, QLORA):
        own, tables[method] = search(method, task)
        known += own
    if None in tables.values():
        return known
    rates = {MOVED: choices(tables[LORA]), QLORA: choices(tables[QLORA])}
    rates[LOFTQ] = {chosen(tables[QLORA])}
    return known + [
        cost_config(method, task, lr, seed)
        for method, own in rates.items()
        for lr in sorted(own)
        for seed in SEEDS["tiny"]
    ]


def smollm2_cell(task: str) -> list[dict]:
    """A task's configurations on SmolLM2: one rate for all."""
    seeds = SEEDS["smollm2"]
    known = [config("smollm2", name, task, RATE, seeds[0]) for name in UNTRAINED]
    known += [config("smollm2", MOVED, task, RATE, seed) for seed in seeds]
    return known + [merged_config("smollm2", task, RATE, seed) for seed in seeds]


def configs(scale: str) -> list[dict]:
    cell = tiny_cell if scale == "tiny" else smollm2_cell
    return [each for task in TASKS[scale] for each in cell(task)]


# --------------------------------------------------------------------- What they say


def rate_of(of_task: Sequence[Run], method: str, drawn: Sequence[int]) -> float:
    """The rate that the drawn search seeds choose; RATE where nothing was searched."""
    own = [run for run in of_task if matches(run, method=method)]
    search_runs = [run for run in own if run.config["seed"] in SEARCHED]
    return chosen(table_of(search_runs), drawn) if search_runs else RATE


def arm(
    all_runs: Sequence[Run],
    method: str,
    task: str,
    drawn: Sequence[int] = EVERY,
    items: str = TASK_ITEMS,
) -> list[Run]:
    """A method's runs on a task, in the order of their seeds, none of the search.

    Args
        method  LORA is the transplanted one before it was moved
        drawn   seeds of the search that choose the rate, by their places in SEARCHED
        items   whose losses stand as `test_items`: the task's, or general text's
    """
    of_task = [run for run in all_runs if matches(run, task=task)]
    lr = rate_of(of_task, LORA if method in (LORA, MOVED) else QLORA, drawn)
    asked = dict(method=MOVED if method == LORA else method, lr=lr)
    own = [run for run in of_task if matches(run, **asked)]
    own = [run for run in own if run.config["seed"] not in SEARCHED]
    own = [at_home(run) for run in own] if method == LORA else own
    own = [
        replace(run, result=run.result | {TASK_ITEMS: run.result[items]}) for run in own
    ]
    return sorted(own, key=lambda run: run.config["seed"])


def at_home(moved: Run) -> Run:
    """The run of a transplanted LoRA as it was beside the full weights."""
    return replace(moved, result=moved.result | moved.result["before"])


def above(
    all_runs: Sequence[Run], method: str, other: str, items: str = TASK_ITEMS
) -> tuple[float, float, float]:
    """Loss of a method minus that of another, each at its own rate; mean of the tasks.

    The interval counts test rows, seeds, and the noise of the search.
    """

    def of(task: str) -> tuple[float, float, float]:
        def sides(drawn):
            return [arm(all_runs, name, task, drawn, items) for name in (method, other)]

        return at_own(sides, len(SEARCHED))

    return mean_of([of(task) for task in tasks_of(all_runs)])


def left(all_runs: Sequence[Run]) -> tuple[float, float, float]:
    """Test loss of QLoRA minus that of LoRA."""
    return above(all_runs, QLORA, LORA)


def damage(all_runs: Sequence[Run]) -> tuple[float, float, float]:
    """Test loss of the transplanted LoRA minus its own beside W0."""
    return above(all_runs, MOVED, LORA)


def compensation(all_runs: Sequence[Run]) -> tuple[float, float, float]:
    """Percent of the damage that training beside W' mends, over tasks, rows, seeds.

    The interval reaches over those of all resamples of the search seeds.
    """
    share, _, _ = mended(all_runs, EVERY)
    spans = [mended(all_runs, drawn) for drawn in different(all_runs)]
    return share, min(low for _, low, _ in spans), max(high for *_, high in spans)


def different(all_runs: Sequence[Run]) -> list[Sequence[int]]:
    """Resamples of the search seeds, one for each set of rates that some choose."""
    by_rates = {}
    for drawn in resamples(len(SEARCHED)):
        rates = [
            rate_of([r for r in all_runs if matches(r, task=task)], method, drawn)
            for task in tasks_of(all_runs)
            for method in (LORA, QLORA)
        ]
        by_rates[tuple(rates)] = drawn
    return list(by_rates.values())


def mended(all_runs: Sequence[Run], drawn: Sequence[int]) -> tuple[float, float, float]:
    """The share that is mended at the rates which these search seeds choose."""
    parts, wholes = [], []
    for task in tasks_of(all_runs):
        full, moved, beside = (
            arm(all_runs, method, task, drawn) for method in (LORA, MOVED, QLORA)
        )
        paired(moved, full), paired(beside, full)  # refuses what does not pair
        items = [np.array([r.result["test_items"] for r in x])
                 for x in (full, moved, beside)]  # fmt: skip
        parts.append(items[1] - items[2])
        wholes.append(items[1] - items[0])
    return share_of(np.concatenate(parts, axis=1), np.concatenate(wholes, axis=1))


def loss_measured(all_runs: Sequence[Run]) -> Measured:
    return Measured(*left(all_runs), _seeds(all_runs), figures(all_runs))


def compensation_measured(all_runs: Sequence[Run]) -> Measured:
    return Measured(*compensation(all_runs), _seeds(all_runs), figures(all_runs))


def _seeds(all_runs: Sequence[Run]) -> tuple[int, ...]:
    """Seeds that are compared; those of the search are not among them."""
    return tuple(sorted({run.config["seed"] for run in all_runs} - set(SEARCHED)))


def figures(all_runs: Sequence[Run]) -> dict[str, str]:
    names = {"lora": LORA, "transplanted": MOVED, "qlora": QLORA}
    means = {name: mean_loss(all_runs, method) for name, method in names.items()}
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


def mean_loss(all_runs: Sequence[Run], method: str, items: str = TASK_ITEMS) -> float:
    """Over tasks, seeds and rows, at the rate that the whole search chose."""
    return fmean(
        fmean(run.result[TASK_ITEMS])
        for task in tasks_of(all_runs)
        for run in arm(all_runs, method, task, items=items)
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
    """What only tiny's runs have: each task, rates, LoftQ, and general text."""
    if not any(matches(run, method=LOFTQ) for run in all_runs):
        return "LoftQ and general text were tried on tiny alone"
    by_task, loftq, rates = [], [], []
    for task in tasks_of(all_runs):
        full, beside, initialized = (
            arm(all_runs, method, task) for method in (LORA, QLORA, LOFTQ)
        )
        by_task.append(f"{task} {paired(beside, full)[0]:+.4f}")
        rates.append(f"{full[0].config['lr']:g} and {beside[0].config['lr']:g}")
        loftq.append(paired(initialized, beside))
    return (
        f"By task: {', '.join(by_task)}; rates of LoRA and QLoRA: {', '.join(rates)}. "
        "At QLoRA's rate, LoftQ's initialization ends "
        f"{signed(mean_of(loftq))} nats from QLoRA. {general_sentence(all_runs)}"
    )


def general_sentence(all_runs: Sequence[Run]) -> str:
    """Losses in the format of the pretraining, and QLoRA's minus LoRA's."""
    base, nf4_base = (
        fmean(
            fmean(run.result[GENERAL_ITEMS])
            for run in all_runs
            if matches(run, method=name)
        )
        for name in UNTRAINED[:2]
    )
    names = {"LoRA": LORA, "the transplanted one": MOVED, "QLoRA": QLORA}
    listed = ", ".join(
        f"{name} {mean_loss(all_runs, method, GENERAL_ITEMS):.3f}"
        for name, method in names.items()
    )
    span = above(all_runs, QLORA, LORA, GENERAL_ITEMS)
    return (
        "On rows in the format of the pretraining the base has a loss of "
        f"{base:.3f}, its four-bit form {nf4_base:.3f}, {listed}: QLoRA is "
        f"{signed(span)} from LoRA there"
    )


INSTEAD = (
    "QLoRA ends {left} nats from LoRA ({qlora} and {lora}). A LoRA trained beside the "
    "full weights and moved to the four-bit ones as it is loses {damage}. {mended}. "
    "Untrained, the base is at {base} "
    "and its four-bit form at {nf4_base}; random adapters beside it that never train, "
    "at {qlora_frozen}. {more}. (SmolLM2's weights had been in another four-bit "
    "format before: on it, NF4 rounds for the second time)"
)
SETTING = (
    "tiny: mean of three tasks, a new format, new words, a new language, 100 steps of "
    "16 rows, the rate searched for each method and task in quarter decades by the "
    "validation loss of three seeds that are not compared; SmolLM2: order sentences to "
    "JSON, 50 steps of 8 rows, LoRA's searched rate for both; paired over seeds and "
    "200 test rows a task; the interval has the noise of the search"
)
VERDICTS = (*SMALL_HOLDS, UNDECIDED)
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
        say_instead=dict.fromkeys(VERDICTS, INSTEAD),
        number="loss of QLoRA above that of LoRA",
        so={
            "holds": (
                "QLoRA's loss is {left} nats from LoRA's, within what we call minimal."
            ),
            UNDECIDED: (
                "QLoRA's loss is {left} nats from LoRA's. Whether that is minimal, "
                "these runs cannot tell."
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
        say_instead=dict.fromkeys(VERDICTS, INSTEAD),
        number="share of the damage that is mended",
        so={
            UNDECIDED: (
                "The runs cannot tell whether training beside four bits mends most of "
                "the damage, or little of it."
            ),
        },
    ),
)
