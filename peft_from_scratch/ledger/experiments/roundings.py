"""K2: in bfloat16, where a LoRA's update is rounded away, and what that costs.

    twice   h = round(round(W0 x) + scale · B A x)    the equation as it is written
    once    h = round(W0 x + scale · B A x)           methods/lora_fast.py

A rounded W0 x lies on a value of bfloat16, and an update below half the distance to the
next one is rounded back. Before it is rounded, W0 x lies anywhere between two values,
so that a small update tips some of them over, and is kept on average.

Each run trains a LoRA on one batch for a few steps, in float32 or in bfloat16 with one
or two roundings, from the same start. At a large rate, where updates are soon larger
than that distance, both ways should do the same: the control.
"""

from collections.abc import Sequence
from statistics import fmean, median
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from ...common.statistics import UNBOUNDED, share_of
from ...core.adapter import adapters
from ...methods import lora
from ...models.load import load_model
from ...tasks.task import load_task
from ...tasks.templates import encode_rows
from ...training.batch import batch_of
from ...training.config import TrainConfig
from ...training.loop import train
from .. import runs
from ..claim import HOLDS_WHEN, LARGE_HOLDS, UNDECIDED, Claim, Invalid, Measured, Rule
from ..runs import Run, matches
from . import finetune

FLOAT32, TWICE, ONCE = WAYS = ("float32", "twice", "once")
SMALL, LARGE = RATES = (1e-4, 3e-3)  # the textbook's lowest for LoRA, and a control
SEEDS = {"tiny": (0, 1, 2, 3, 4), "smollm2": (0, 1, 2)}
SETTINGS = {
    "tiny": dict(task="gap-2", template="raw", steps=8, batch=16, test=200),
    "smollm2": dict(task="orders", template="chat", steps=8, batch=4, test=24),
}
SAME = 10.0  # %, that two roundings may lose at the large rate


def config(scale: str, way: str, lr: float, seed: int) -> dict:
    return {
        "experiment": "roundings",
        "base": scale,
        "base_digest": runs.base_digest(scale),
        "way": way,
        "r": 8,
        "alpha": 16,
        "lr": lr,
        "seed": seed,
        **SETTINGS[scale],
    }


def configs(scale: str) -> list[dict]:
    return [
        config(scale, way, lr, seed)
        for lr in RATES
        for way in WAYS
        for seed in SEEDS[scale]
    ]


def compute(config: dict) -> dict:
    """Train a LoRA on one batch in one of three ways, and see what is left of it.

    Returns  losses in nats per label token
        losses        of the batch, before each step
        before_items  of each test row before the first step, computed in the same way
        test_items    and after the last one
        size, kept    of each projection after the last step: the update's root mean
                      square, in units of the output's last place (the median); and the
                      share of the update that is in the output
    """
    dtype = "float32" if config["way"] == FLOAT32 else "bfloat16"
    model, tokenizer = load_model(config["base"], device="cpu", dtype=dtype)
    torch.manual_seed(config["seed"])
    lora.inject(model, r=config["r"], alpha=config["alpha"])
    if config["way"] == TWICE:
        round_twice(model)
    task, template = load_task(config["task"]), config["template"]
    order = np.random.default_rng(config["seed"]).permutation(len(task.train))
    batch = task.train.select(order[: config["batch"]])
    test = list(task.test.select(range(config["test"])))
    test = encode_rows(tokenizer, task.instruction, test, template=template)
    split = SimpleNamespace(instruction=task.instruction, train=batch, validation=[])
    before = finetune.item_losses(model, test)
    history = train(model, tokenizer, split, recipe(config), progress=False)
    after = finetune.item_losses(model, test)
    rows = encode_rows(tokenizer, task.instruction, list(batch), template=template)
    size, kept = survival(model, batch_of(rows, torch.device("cpu")))
    return {
        "losses": [round(loss, 5) for loss in history.loss],
        "before_items": [round(loss, 5) for loss in before],
        "test_items": [round(loss, 5) for loss in after],
        "size": [round(each, 4) for each in size],
        "kept": [round(each, 4) for each in kept],
    }


def recipe(config: dict) -> TrainConfig:
    names = ("steps", "batch", "lr", "seed", "template")
    return TrainConfig(schedule="constant", **{name: config[name] for name in names})


def round_twice(model: nn.Module) -> None:
    """Let every LoRA compute its equation: a hook that looks at W0 x forbids less."""
    for layer in adapters(model).values():
        layer.base.register_forward_hook(_look)


def _look(module: nn.Module, args: tuple, out: Tensor) -> None:
    """Look at an output, and leave it as it is."""


@torch.no_grad()
def survival(model: nn.Module, batch: dict) -> tuple[list[float], list[float]]:
    """(sizes, shares) of the updates on a batch, a number each projection.

    size   rms(u) / median(ulp(h))      u = scale · B A x, in float64
    share  <h(B) - h(0), u> / ‖u‖²      h as the model computes it
    """
    inputs, sizes, shares = {}, [], []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0]})
        )
        for name, layer in adapters(model).items()
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    for name, layer in adapters(model).items():
        x, B = inputs[name], layer.B.clone()
        exact = layer.scale * (x.double() @ layer.A.double().T @ B.double().T)
        whole = layer(x)
        layer.B.zero_()
        without = layer(x)
        layer.B.copy_(B)
        change = whole.double() - without.double()
        shares.append(((change * exact).sum() / exact.square().sum()).item())
        rms = exact.square().mean().sqrt()
        sizes.append((rms / last_place(without).median()).item())
    return sizes, shares


def last_place(h: Tensor) -> Tensor:
    """The unit in the last place of each number: the distance to the next larger one.

    |h| = m 2^e, 1/2 <= m < 1      ulp = 2^(e - 1) eps      eps 2^-7 in bfloat16
    """
    half = torch.full(h.shape, torch.finfo(h.dtype).eps / 2, dtype=torch.float64)
    return torch.ldexp(half, torch.frexp(h.double())[1])


# --------------------------------------------------------------------- What they say


def of_way(all_runs: Sequence[Run], way: str, lr: float) -> list[Run]:
    own = [run for run in all_runs if matches(run, way=way, lr=lr)]
    return sorted(own, key=lambda run: run.config["seed"])


def items(all_runs: Sequence[Run], name: str = "test_items") -> np.ndarray:
    """(seeds, test rows)"""
    return np.array([run.result[name] for run in all_runs])


def lost(
    all_runs: Sequence[Run], lr: float, way: str = TWICE, beside: str = ONCE
) -> tuple[float, float, float]:
    """Test loss of one way above that of another, in % of what float32 learns."""
    full = of_way(all_runs, FLOAT32, lr)
    learned = items(full, "before_items") - items(full)
    behind = items(of_way(all_runs, way, lr)) - items(of_way(all_runs, beside, lr))
    return share_of(behind, learned)


def measured(all_runs: Sequence[Run]) -> Measured:
    """What two roundings lose at the small rate, and one does not.

    Raises  Invalid  two roundings lose as much where updates are large: then it is not
                     their size that matters
    """
    control = lost(all_runs, LARGE)
    if control[0] > SAME:
        raise Invalid(
            f"at a rate of {LARGE:g}, two roundings lose {control[0]:.0f} % as well: "
            "the size of the update does not decide"
        )
    figures = {
        "lost": share(lost(all_runs, SMALL)),
        "once": share(lost(all_runs, SMALL, ONCE, FLOAT32)),
        "control": share(control),
        "learned": f"{_learned(all_runs):.3f}",
    }
    for name, lr in (("small", SMALL), ("large", LARGE)):
        twice, once = (of_way(all_runs, way, lr) for way in (TWICE, ONCE))
        figures |= {
            f"size_{name}": f"{middle(once, 'size'):.2f}",
            f"twice_{name}": f"{100 * middle(twice, 'kept'):.0f}",
            f"once_{name}": f"{100 * middle(once, 'kept'):.0f}",
        }
    seeds = tuple(sorted({run.config["seed"] for run in all_runs}))
    return Measured(*lost(all_runs, SMALL), seeds, figures)


def _learned(all_runs: Sequence[Run]) -> float:
    full = of_way(all_runs, FLOAT32, SMALL)
    return float((items(full, "before_items") - items(full)).mean())


def middle(own: Sequence[Run], name: str) -> float:
    """The median over projections, the mean of the seeds."""
    return fmean(median(run.result[name]) for run in own)


def share(span: tuple[float, float, float]) -> str:
    if span[2] - span[1] >= UNBOUNDED:
        return "a share that cannot be told"
    return "{:.0f} % [{:.0f}, {:.0f}]".format(*span)


INSTEAD = (
    "At a rate of 0.0001, float32 lowers the test loss by {learned} nats in eight "
    "steps. Two roundings lose {lost} of that against one, and one loses {once} "
    "against float32. The update of a projection then is {size_small} units in the "
    "last place of its output (the median): with two roundings {twice_small} % of it "
    "is left, with one {once_small} %. At a rate of 0.003 it is {size_large} units, of "
    "which {twice_large} and {once_large} % are left, and two roundings lose {control}"
)
CLAIMS = (
    Claim(
        id="K2",
        notebook="10",
        source="ours",
        statement=(
            "In bf16, adding LoRA's update to an output that is rounded already loses "
            "small updates; one rounding of the sum keeps them"
        ),
        rule=Rule(
            words=(
                "Test loss of a LoRA (r = 8, every projection) in bf16 whose update is "
                "added to a rounded output, minus that with one rounding of the sum, "
                "in percent of what the same steps in float32 learn; eight optimizer "
                "steps on one batch at a rate of 1e-4, the lowest that the textbook "
                "has for LoRA; A and B in float32; tiny on new words, 16 rows and 200 "
                "test rows; SmolLM2 on order sentences, 4 rows and 24 test rows; "
                "paired over seeds and rows; valid only if two roundings lose at most "
                "a tenth at a rate of 3e-3, where updates are large"
            ),
            unit="%",
            verdicts=LARGE_HOLDS,
            edges=(10.0, 50.0),
        ),
        configs=configs,
        measured=measured,
        say_instead=dict.fromkeys((*LARGE_HOLDS, UNDECIDED), INSTEAD),
        number="share of the learning that two roundings lose against one",
        condition="a loss of {lost} of what float32 learns counts",
        so={
            "holds": (
                "In bf16, add the update before the output is rounded: at small rates, "
                "two roundings lose {lost} of what float32 learns."
            ),
            HOLDS_WHEN: (
                "In bf16, two roundings lose {lost} of what float32 learns in eight "
                "small steps; one rounding loses {once}."
            ),
            "does not hold here": (
                "Two roundings lose {lost} of what float32 learns: too little to "
                "notice, although {twice_small} % of the updates are left."
            ),
            UNDECIDED: (
                "Two roundings keep {twice_small} % of small updates and one "
                "{once_small} %; whether the loss shows it, these runs cannot tell."
            ),
        },
    ),
)
