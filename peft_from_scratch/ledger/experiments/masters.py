"""F1b: whether full fine-tuning in bf16 can do without float32 master weights.

The textbook's bill for a model "in bf16" has 16 bytes a parameter. One reading needs
but 8: weights, gradients and both moments in two bytes each. This is the run that tells
whether that reading trains:

    recipe   weights   gradients   master   m, v   bytes a parameter
    bf16           2           2        -    2 + 2                 8
    mixed          2           2        4    4 + 4                16
    fp32           4           4        -    4 + 4                16

bf16 has eight significant bits. A step of AdamW moves a weight by about the learning
rate, and a move below half the distance to the next value is rounded away. A master
copy adds up what single steps lose.
"""

from collections.abc import Sequence
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from ...common.statistics import UNBOUNDED, share_of
from ...memory.step_bill import optimizer_class
from ...methods import full
from ...models.load import load_model
from ...tasks.task import load_task
from ...tasks.templates import encode_rows
from ...training.batch import batch_of
from ...training.loss import accumulate_gradients
from .. import runs
from ..claim import HOLDS_WHEN, SMALL_HOLDS, UNDECIDED, Claim, Invalid, Measured, Rule
from ..runs import Run, matches
from . import finetune

PURE, MIXED, FLOAT32 = "bf16", "mixed", "fp32"
RATES = (1e-5, 5e-5)  # the ends of the textbook's range for full fine-tuning
CONTROL = 1e-3  # tiny: moves larger than the distance between two values
SAME = 10.0  # %, that pure bf16 may lose there
SEEDS = {"tiny": (0, 1, 2, 3, 4), "smollm2": (0, 1, 2)}
RECIPES = {"tiny": (PURE, MIXED, FLOAT32), "smollm2": (PURE, MIXED)}
SETTINGS = {
    "tiny": dict(task="gap-1", template="raw", steps=20, batch=16, test=200),
    "smollm2": dict(task="orders", template="chat", steps=8, batch=4, test=24),
}


def config(scale: str, recipe: str, lr: float, seed: int) -> dict:
    return {
        "experiment": "masters",
        "base": scale,
        "base_digest": runs.base_digest(scale),
        "recipe": recipe,
        "lr": lr,
        "seed": seed,
        **SETTINGS[scale],
    }


def live(scale: str, seeds: Sequence[int]) -> list[Run]:
    """Runs of pure bf16 and of master weights, made now and not stored."""
    asked = [
        each
        for each in configs(scale)
        if each["seed"] in seeds and each["recipe"] in (PURE, MIXED)
    ]
    return [Run(f"live {i}", each, compute(each), {}) for i, each in enumerate(asked)]


def configs(scale: str) -> list[dict]:
    rates = (*RATES, CONTROL) if scale == "tiny" else RATES
    return [
        config(scale, recipe, lr, seed)
        for lr in rates
        for recipe in RECIPES[scale]
        for seed in SEEDS[scale]
    ]


def compute(config: dict) -> dict:
    """Fine-tune every weight by one recipe, each row once, at a constant rate.

    Returns  losses in nats per label token
        losses        of each step's rows, before its update
        before_items  of each test row before the first step
        test_items    and after the last one
        changed       share of the weights that are no longer what they were
    """
    dtype = "float32" if config["recipe"] == FLOAT32 else "bfloat16"
    model, tokenizer = load_model(config["base"], device="cpu", dtype=dtype)
    full.inject(model)
    task, template = load_task(config["task"]), config["template"]
    order = np.random.default_rng(config["seed"]).permutation(len(task.train))
    chosen = list(task.train.select(order[: config["steps"] * config["batch"]]))
    test = list(task.test.select(range(config["test"])))
    chosen, test = (
        encode_rows(tokenizer, task.instruction, rows, template=template)
        for rows in (chosen, test)
    )
    start = weights(model)
    before = finetune.item_losses(model, test)
    losses = steps(model, chosen, config)
    after = finetune.item_losses(model, test)
    return {
        "losses": [round(loss, 5) for loss in losses],
        "before_items": [round(loss, 5) for loss in before],
        "test_items": [round(loss, 5) for loss in after],
        "changed": round((weights(model) != start).float().mean().item(), 5),
    }


def steps(model: nn.Module, rows: list, config: dict) -> list[float]:
    """Optimizer steps over the rows, in their order; the loss before each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind = optimizer_class(config["recipe"])
    optimizer = kind(parameters, lr=config["lr"], weight_decay=0.0)
    model.train()
    losses, size = [], config["batch"]
    for first in range(0, len(rows), size):
        batch = batch_of(rows[first : first + size], parameters[0].device)
        loss, _ = accumulate_gradients(model, [batch])
        losses.append(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def weights(model: nn.Module) -> Tensor:
    """All weights, flat, as they are now."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --------------------------------------------------------------------- What they say


def of_recipe(all_runs: Sequence[Run], recipe: str, lr: float) -> list[Run]:
    own = [run for run in all_runs if matches(run, recipe=recipe, lr=lr)]
    return sorted(own, key=lambda run: run.config["seed"])


def items(all_runs: Sequence[Run], name: str = "test_items") -> np.ndarray:
    """(seeds, test rows)"""
    return np.array([run.result[name] for run in all_runs])


def lost(
    all_runs: Sequence[Run], lr: float, recipe: str = PURE, beside: str = MIXED
) -> tuple[float, float, float]:
    """Test loss of a recipe above another's, in % of what the other learns."""
    own, other = (of_recipe(all_runs, name, lr) for name in (recipe, beside))
    learned = items(other, "before_items") - items(other)
    return share_of(items(own) - items(other), learned)


def measured(all_runs: Sequence[Run]) -> Measured:
    """What pure bf16 loses at the rate where it loses more.

    Raises  Invalid  it loses as much where the moves are large: then it is not that
                     small moves are rounded away
    """
    control = None
    if of_recipe(all_runs, PURE, CONTROL):
        control = lost(all_runs, CONTROL)
        if control[0] > SAME:
            raise Invalid(
                f"at a rate of {CONTROL:g}, pure bf16 loses {control[0]:.0f} % as "
                "well: the size of a step does not decide"
            )
    low, high = (lost(all_runs, lr) for lr in RATES)
    figures = {
        "low": share(low),
        "high": share(high),
        "control": _control_sentence(control),
        "full": _full_sentence(all_runs),
        "changed_pure": _changed(all_runs, PURE),
        "changed_mixed": _changed(all_runs, MIXED),
    }
    seeds = tuple(sorted({run.config["seed"] for run in all_runs}))
    return Measured(*max(low, high), seeds, figures)


def share(span: tuple[float, float, float]) -> str:
    if span[2] - span[1] >= UNBOUNDED:
        return "a share that cannot be told"
    return "{:.0f} % [{:.0f}, {:.0f}]".format(*span)


def _changed(all_runs: Sequence[Run], recipe: str) -> str:
    own = of_recipe(all_runs, recipe, RATES[0])
    return f"{100 * fmean(run.result['changed'] for run in own):.0f}"


def _control_sentence(control: tuple[float, float, float] | None) -> str:
    if control is None:
        return "The control, a rate of 1e-3, was run on tiny"
    return f"At a rate of 1e-3, the control, it loses {share(control)}"


def _full_sentence(all_runs: Sequence[Run]) -> str:
    if not of_recipe(all_runs, FLOAT32, RATES[0]):
        return "Weights in float32 were run on tiny"
    behind = share(lost(all_runs, RATES[0], MIXED, FLOAT32))
    return (
        "Mixed precision itself, whose model computes with a rounded copy, is behind "
        f"weights in float32 by {behind} at 1e-5"
    )


INSTEAD = (
    "Pure bf16 loses {low} of what float32 master weights learn at a rate of 1e-5, and "
    "{high} at 5e-5. After the steps at 1e-5, {changed_pure} % of its weights have "
    "moved, and {changed_mixed} % with master weights. {control}. {full}"
)
CLAIMS = (
    Claim(
        id="F1b",
        notebook="01",
        source="ours: a reading of F1",
        statement=(
            "Full fine-tuning in bf16 needs no float32 copy of the weights: eight "
            "bytes a parameter do"
        ),
        rule=Rule(
            words=(
                "Test loss of full fine-tuning with weights, gradients and AdamW's "
                "moments in bf16, minus that with float32 master weights and moments, "
                "in percent of what the latter learns, at rates of 1e-5 and 5e-5, the "
                "ends of the textbook's range: the larger of the two; constant rate, "
                "each row once; tiny on a new format, 20 steps of 16 rows and 200 test "
                "rows, valid only if bf16 loses at most a tenth at a rate of 1e-3; "
                "SmolLM2 on order sentences, 8 steps of 4 rows and 24 test rows; "
                "paired over seeds and rows"
            ),
            unit="%",
            verdicts=SMALL_HOLDS,
            edges=(10.0, 50.0),
        ),
        configs=configs,
        measured=measured,
        say_instead=dict.fromkeys((*SMALL_HOLDS, UNDECIDED), INSTEAD),
        number="share of the learning that pure bf16 loses, at its worse rate",
        condition="a loss of up to half of the learning is acceptable",
        so={
            "holds": (
                "At the textbook's rates, pure bf16 learns what float32 master weights "
                "do: it loses {low} at 1e-5."
            ),
            HOLDS_WHEN: (
                "Pure bf16 trains, and loses {low} of the learning at a rate of 1e-5, "
                "where small steps are rounded away."
            ),
            "does not hold here": (
                "Keep float32 master weights: at 1e-5, pure bf16 loses {low} of what "
                "they learn. So it is 16 bytes a parameter."
            ),
            UNDECIDED: (
                "Pure bf16 loses {low} of what master weights learn at a rate of 1e-5; "
                "how much, these runs cannot tell."
            ),
        },
    ),
)
