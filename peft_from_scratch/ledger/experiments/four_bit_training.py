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

The QLoRA runs also merge what they trained, in the three ways of methods/qlora.py:
four_bit_merging.py judges those.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from statistics import fmean, median

import numpy as np
from torch import nn

from ...common.statistics import UNBOUNDED, mean_of, share_of
from ...core.adapter import trainable
from ...methods import qlora
from ...models.load import load_model
from ...nf4 import NF4Linear
from ...tasks.task import load_task
from ...tasks.templates import encode_rows
from ..claim import LARGE_HOLDS, SMALL_HOLDS, Claim, Measured, Rule
from ..intervals import paired
from ..rates import search
from ..runs import Run, matches
from . import finetune

SEEDS = {"tiny": (0, 1, 2, 3, 4), "smollm2": (0, 1, 2)}
TASKS = {"tiny": ("gap-1", "gap-2", "gap-3"), "smollm2": ("orders",)}
SETTINGS = {
    "tiny": dict(n=1000, steps=100, batch=16),
    "smollm2": dict(n=600, steps=50, batch=8, validation=20),
}
RATES = (3e-3, 1e-2, 3e-2)  # tiny, for each method and task; the search may grow
RATE = 3e-3  # smollm2: LoRA's in data/results/tuning.json, for all
UNTRAINED = ("base", "nf4-base", "qlora-frozen")


def config(scale: str, method: str, task: str, lr: float, seed: int) -> dict:
    return finetune.config(
        base=scale,
        task=task,
        method=method,
        lr=lr,
        seed=seed,
        **SETTINGS[scale],
        **({} if method in UNTRAINED[:2] else dict(r=8, alpha=16)),
    )


def merged_config(scale: str, task: str, lr: float, seed: int) -> dict:
    """A QLoRA run that also merges."""
    return config(scale, "qlora", task, lr, seed) | {"experiment": "four_bit_training"}


def compute(config: dict) -> dict:
    """Train a QLoRA, and merge it in three ways.

    Returns  what finetune.compute returns, and
        bytes    of the weights, adapters not counted
        merges   {onto: {test_items, test_loss, bytes, weight, update}}: the last two
                 are MergeErrors, the median over modules
    """
    model, tokenizer, result = finetune.fine_tuned(config)
    if result["diverged"]:
        return result
    base, _ = load_model(config["base"], device="cpu")
    rows = finetune.chosen_rows(load_task(config["task"]), config)["test"]
    instruction = load_task(config["task"]).instruction
    rows = encode_rows(tokenizer, instruction, rows, template=config["template"])
    merges = {}
    for onto in qlora.ONTO:
        merged = deepcopy(model)
        errors = qlora.merge(merged, onto, base if onto == "original" else None)
        losses = finetune.item_losses(merged, rows)
        merges[onto] = {
            "test_items": [round(loss, 5) for loss in losses],
            "test_loss": round(fmean(losses), 6),
            "bytes": weight_bytes(merged),
            "weight": median(error.weight for error in errors.values()),
            "update": median(error.update for error in errors.values()),
        }
    return result | {"bytes": weight_bytes(model), "merges": merges}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's own weights: packed ones with constants, no adapters."""
    added = {id(parameter) for parameter in trainable(model).values()}
    own = [p for p in model.parameters() if id(p) not in added]
    packed = [m for m in model.modules() if isinstance(m, NF4Linear)]
    buffers = [b for m in packed for b in m.buffers(recurse=False)]
    return sum(tensor.nbytes for tensor in [*own, *buffers])


# ------------------------------------------------------------------------- The runs


def rate(scale: str, method: str, task: str) -> tuple[list[dict], float | None]:
    """(configurations of the search, the rate it chose)."""
    if scale != "tiny":
        return [], RATE
    seed = SEEDS[scale][0]
    return search(lambda lr: config(scale, method, task, lr, seed), RATES)


def cell(scale: str, task: str) -> list[dict]:
    """A task's configurations, as far as they are known."""
    seeds = SEEDS[scale]
    known = [config(scale, name, task, RATE, seeds[0]) for name in UNTRAINED]
    of_lora, lr = rate(scale, "lora", task)
    if lr is not None:
        transplanted = finetune.TRANSPLANTED
        known += [config(scale, transplanted, task, lr, seed) for seed in seeds]
    of_qlora, lr = rate(scale, "qlora", task)
    if lr is not None:
        known += [merged_config(scale, task, lr, seed) for seed in seeds]
    return known + of_lora + of_qlora


def configs(scale: str) -> list[dict]:
    return [each for task in TASKS[scale] for each in cell(scale, task)]


# --------------------------------------------------------------------- What they say


def tasks_of(all_runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.config["task"] for run in all_runs))


def trio(all_runs: Sequence[Run], task: str) -> tuple[list[Run], list[Run], list[Run]]:
    """(LoRA, transplanted, QLoRA): a run each seed, in the order of the seeds."""
    of = sorted(
        (run for run in all_runs if matches(run, task=task)),
        key=lambda run: run.config["seed"],
    )
    moved = [run for run in of if matches(run, method=finetune.TRANSPLANTED)]
    beside = [run for run in of if matches(run, experiment="four_bit_training")]
    full = [replace(run, result=run.result | run.result["before"]) for run in moved]
    return full, moved, beside


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
    losses = {
        name: fmean(run.result["test_loss"] for group in trios for run in group[i])
        for i, name in enumerate(("lora", "transplanted", "qlora"))
    }
    for name in UNTRAINED:
        own = [r.result["test_loss"] for r in all_runs if matches(r, method=name)]
        losses[name.replace("-", "_")] = fmean(own)
    spans = {"left": left(all_runs), "damage": damage(all_runs)}
    return (
        {name: f"{loss:.3f}" for name, loss in losses.items()}
        | {
            name: f"{v:+.4f} [{lo:+.4f}, {hi:+.4f}]"
            for name, (v, lo, hi) in spans.items()
        }
        | {"mended": share_sentence(*compensation(all_runs))}
    )


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


INSTEAD = (
    "QLoRA ends {left} nats from LoRA ({qlora} and {lora}). A LoRA trained beside the "
    "full weights and moved to the four-bit ones as it is loses {damage}. {mended}. "
    "Untrained, the base is at {base} "
    "and its four-bit form at {nf4_base}; random adapters beside it that never train, "
    "at {qlora_frozen}. (SmolLM2's weights had been in four bits before: on it, NF4 "
    "rounds what was rounded already)"
)
SETTING = (
    "tiny: mean of three tasks, a new format, new words, a new language, 100 steps of "
    "16 rows, the rate searched for each method and task with the same budget; "
    "SmolLM2: order sentences to JSON, 50 steps of 8 rows, LoRA's searched rate for "
    "both; paired over seeds and 200 test rows a task"
)
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
        say_instead=dict.fromkeys(
            ("holds", "holds when", "does not hold here", "undecided"), INSTEAD
        ),
        number="loss of QLoRA above that of LoRA",
        so={
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
        say_instead=dict.fromkeys(
            ("holds", "holds when", "does not hold here", "undecided"), INSTEAD
        ),
        number="share of the damage that is mended",
        so={
            "undecided": (
                "The runs cannot tell whether training beside four bits mends most of "
                "the damage, or little of it."
            ),
        },
    ),
)
