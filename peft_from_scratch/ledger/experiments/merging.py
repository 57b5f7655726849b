"""M2: what the one rounding of a merge does to a trained LoRA.

    W = round(W0 + scale · B A)          error = ‖logits - adapted‖ / ‖adapted - base‖

The logits of the merged model stand against those of the adapted one, which is computed
in float64 from the same weights and the same A and B. The unit is what the adapter
does: a model that is 100 % off is as far away as the one without it. A random update of
the same norms, merged in the place of the trained one, is the control. The unmerged
model, computed in the same format, is the baseline: it is not exact either.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from functools import partial
from statistics import fmean, median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...common.statistics import over_seeds
from ...core.adapter import (
    adapters,
    as_matrix,
    as_stored,
    disabled,
    remove,
    trainable,
)
from ...core.merge import merge
from ...models.load import load_model
from ...tasks.task import load_task
from ...tasks.templates import encode_rows
from ...training.batch import batch_of
from .. import runs
from ..claim import FAILS, HOLDS, HOLDS_WHEN, UNDECIDED, Claim, Invalid, Measured, Rule
from ..runs import Run
from . import finetune

SEEDS = {"tiny": (0, 1, 2, 3, 4), "smollm2": (0, 1, 2)}
SETTINGS = {  # short: a run has to stay under a minute
    "tiny": dict(task="gap-1", lr=1e-2, n=1000, steps=100, batch=16, rows=16),
    "smollm2": dict(task="orders", lr=3e-3, n=600, steps=16, batch=4, rows=2),
}
FORMATS = ("float32", "bfloat16")  # of the weights
FORMAT = "bfloat16"  # which M2 is about: models ship in it
CYCLES, CYCLED = 10, 20  # of merging and unmerging; modules on which they are counted
CONTROL, LEARNED = 50.0, 0.5  # %, that the control must exceed; share of the loss left


def config(base: str, seed: int, **changes) -> dict:
    """A training of `base`, to be merged in each format."""
    return {
        "experiment": "merging",
        "base": base,
        "base_digest": runs.base_digest(base),
        "r": 8,
        "alpha": 16,
        **SETTINGS.get(base, {}),
        "seed": seed,
        **changes,
    }


def configs(scale: str) -> list[dict]:
    return [config(scale, seed) for seed in SEEDS[scale]]


def compute(config: dict) -> dict:
    """Train a LoRA, and merge it in each format.

    Returns  {format: {
        weights     error of the merged weights alone, computed in float64, %
        control     the same of a random update of the same norms, %
        merged      error of the merged model, computed in the format, %
        unmerged    error of the adapted model, computed in the format, %: the baseline
        losses      {base, adapted, weights, control, merged, unmerged}: nats per label
                    token
        size        ‖ΔW‖ / ‖W0‖, %, the median over modules
        lost        what rounding lost of ΔW, %, the median over modules
        off, drift  after one cycle of merging and unmerging, after two, …: see cycles
    }}
    """
    model, tokenizer = load_model(config["base"], device="cpu")
    task = load_task(config["task"])
    chosen = finetune.config(
        base=config["base"],
        method="lora",
        test=config["rows"],
        validation=1,
        **{n: config[n] for n in ("task", "lr", "n", "steps", "batch", "r", "alpha")},
        seed=config["seed"],
    )
    rows = finetune.chosen_rows(task, chosen)
    finetune.train_model(model, tokenizer, task.instruction, rows, chosen)
    template = chosen["template"]
    test = encode_rows(tokenizer, task.instruction, rows["test"], template=template)
    deltas = {n: m.delta(torch.float64).detach() for n, m in adapters(model).items()}
    return {name: _in_format(model, deltas, test, name, config) for name in FORMATS}


def _in_format(model, deltas: dict[str, Tensor], rows, name: str, config) -> dict:
    """What merging in one format comes to; see compute."""
    adapted = in_format(model, getattr(torch, name))
    exact = deepcopy(adapted).double()
    truth = logits(exact, rows)
    with disabled(exact):
        base = logits(exact, rows)
    del exact
    outputs = {"unmerged": logits(adapted, rows)}
    bare = deepcopy(adapted)
    remove(bare)
    weights = {n: as_matrix(bare.get_submodule(n)).detach().clone() for n in deltas}
    lost = merge(adapted)
    outputs["merged"] = logits(adapted, rows)
    outputs["weights"] = logits(adapted.double(), rows)
    add_random(bare, deltas, config["r"], config["seed"])
    outputs["control"] = logits(bare.double(), rows)
    effect = _distance(truth, base)
    errors = {
        what: _rounded(100 * _distance(each, truth) / effect)
        for what, each in outputs.items()
    }
    outputs |= {"base": base, "adapted": truth}
    sizes = [deltas[n].norm() / W.double().norm() for n, W in weights.items()]
    return {
        **errors,
        "losses": {what: loss(each, rows) for what, each in outputs.items()},
        "size": _rounded(100 * median(map(float, sizes))),
        "lost": _rounded(100 * median(lost.values())),
        **cycles(weights, deltas),
    }


def in_format(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose weights are in a format; A and B stay in float32, as they train."""
    copy = deepcopy(model).eval()
    trained = {id(parameter) for parameter in trainable(copy).values()}
    for parameter in copy.parameters():
        if id(parameter) not in trained:
            parameter.data = parameter.data.to(dtype)
    return copy


@torch.no_grad()
def add_random(model: nn.Module, deltas: dict[str, Tensor], r: int, seed: int) -> None:
    """Add a random update of rank r to each weight, with the trained one's norm."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    for name, delta in deltas.items():
        update = draw(delta.shape[0], r) @ draw(r, delta.shape[1])
        update *= delta.norm() / update.norm()
        module = model.get_submodule(name)
        W = as_matrix(module).double() + update
        module.weight.copy_(as_stored(module, W))


def cycles(weights: dict[str, Tensor], deltas: dict[str, Tensor]) -> dict:
    """Weights after cycles of merging and unmerging, with one rounding each time.

        W ← round(W + ΔW)      W ← round(W - ΔW)

    Returns  off    [share of the weights whose bits differ from W0's, %], by cycle
             drift  [‖W - W0‖ / ‖ΔW‖, %]; both on about CYCLED modules
    """
    names = list(weights)[:: max(1, len(weights) // CYCLED)]
    before = {n: weights[n] for n in names}
    total = sum(W.numel() for W in before.values())
    whole = _distance([deltas[n] for n in names], [0 * deltas[n] for n in names])
    now, off, drift = dict(before), [], []
    for _ in range(CYCLES):
        for sign in (1, -1):
            now = {n: (W.double() + sign * deltas[n]).to(W.dtype)
                   for n, W in now.items()}  # fmt: skip
        changed = sum((now[n] != before[n]).sum().item() for n in names)
        moved = _distance([now[n].double() for n in names], before.values())
        off.append(_rounded(100 * changed / total))
        drift.append(_rounded(100 * moved / whole))
    return {"off": off, "drift": drift}


@torch.no_grad()
def logits(model: nn.Module, rows) -> list[Tensor]:
    """The logits of each row alone, (t, vocabulary), in float64."""
    device = next(model.parameters()).device
    ids = [batch_of([row], device)["input_ids"] for row in rows]
    return [model(each).logits[0].double() for each in ids]


def loss(outputs: Sequence[Tensor], rows) -> float:
    """Nats per label token, of the labels of all rows together."""
    labels = [batch_of([row], "cpu")["labels"][0, 1:] for row in rows]
    each = torch.cat([logits[:-1] for logits in outputs])
    return round(F.cross_entropy(each, torch.cat(labels)).item(), 6)


def _distance(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """The norm of the difference of all tensors together."""
    pairs = zip(a, b, strict=True)
    return sum((x - y).square().sum().item() for x, y in pairs) ** 0.5


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def of_format(all_runs: Sequence[Run], name: str, what: str) -> list[float]:
    """A figure of each run, in one format."""
    return [run.result[name][what] for run in all_runs]


def measured(all_runs: Sequence[Run]) -> Measured:
    """Error of weights merged in bfloat16; Invalid where a control fails."""
    for run in all_runs:
        own = run.result[FORMAT]
        if own["control"] <= CONTROL:
            raise Invalid(f"{run.key}: a random update is off by {own['control']} %")
        if own["losses"]["adapted"] > LEARNED * own["losses"]["base"]:
            raise Invalid(f"{run.key}: the adapter has not learned")
    value = partial(of_format, all_runs)
    figures = {
        "bf16": f"{fmean(value(FORMAT, 'weights')):.2g}",
        "fp32": f"{fmean(value('float32', 'weights')):.1g}",
        "merged": f"{fmean(value(FORMAT, 'merged')):.2g}",
        "unmerged": f"{fmean(value(FORMAT, 'unmerged')):.2g}",
        "control": f"{fmean(value(FORMAT, 'control')):.0f}",
        "size": f"{fmean(value(FORMAT, 'size')):.2g}",
        "lost": f"{fmean(value(FORMAT, 'lost')):.2g}",
        "off": f"{fmean(each[0] for each in value(FORMAT, 'off')):.0f}",
    }
    seeds = tuple(run.config["seed"] for run in all_runs)
    return Measured(*over_seeds(value(FORMAT, "weights")), seeds, figures)


INSTEAD = (
    "Rounding the merged weights to bfloat16 moves the logits by {bf16} % of what the "
    "adapter does to them, to float32 by {fp32} %. Computed in bfloat16, the merged "
    "model is {merged} % off and the unmerged one {unmerged} %. The update's norm is "
    "{size} % of the weight's, and rounding loses {lost} % of it. After unmerging, "
    "{off} % of the weights are not what they were"
)
CLAIMS = (
    Claim(
        id="M2",
        notebook="06",
        statement=(
            "LoRA adapters can be merged into the base weights, W = W0 + BA, and the "
            "model computes the same"
        ),
        rule=Rule(
            words=(
                "Distance of the logits of a LoRA merged into bfloat16 weights from "
                "those of the adapted model, both computed in float64, in % of the "
                "distance between the adapted model and the base; rank 8 at every "
                "projection, on test rows; mean over seeds; valid only if a random "
                "update of the same norms is off by more than 50 %, and if training "
                "has halved the loss"
            ),
            unit="%",
            verdicts=(HOLDS, HOLDS_WHEN, FAILS),
            edges=(1.0, 10.0),
        ),
        configs=configs,
        measured=measured,
        number=(
            "how far a merge in bfloat16 moves the logits, as a share of how far the "
            "adapter moves them"
        ),
        condition=(
            "the rounding of the format may be ignored: {fp32} % of the adapter's "
            "effect in float32, {bf16} % in bfloat16"
        ),
        so={
            HOLDS: (
                "Merging moves the logits by {bf16} % of the adapter's effect in "
                "bfloat16, and by {fp32} % in float32."
            ),
            HOLDS_WHEN: (
                "Merging is as exact as the number format: it moves {bf16} % of the "
                "adapter's effect in bfloat16, {fp32} % in float32."
            ),
            UNDECIDED: (
                "In bfloat16 merging moves the logits by about {bf16} % of the "
                "adapter's effect, in float32 by {fp32} %."
            ),
            FAILS: (
                "Merge into float32: in bfloat16 merging moves {bf16} % of the "
                "adapter's effect, in float32 {fp32} %."
            ),
        },
        say_instead=dict.fromkeys((HOLDS, HOLDS_WHEN, FAILS, UNDECIDED), INSTEAD),
    ),
)
