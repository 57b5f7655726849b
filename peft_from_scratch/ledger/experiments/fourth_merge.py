"""M4b: the merge that stays in four bits and keeps small updates.

Two of the merges of a QLoRA end in four bits. They differ in what the update is added
to before the sum is rounded:

    requantized   NF4(W' + ΔW)    W' lies on the sixteen values: a ΔW below half the
                                  distance to the next one is rounded back
    quantized     NF4(W0 + ΔW)    W0 lies between them: some weights pass a middle, so
                                  that a small ΔW is kept on average

The second needs W0, the weights before they were quantized, and rounds them anew: the
adapter meets rounding errors other than those that it was trained beside.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from statistics import fmean, median

import torch
from torch import Tensor, nn

from ...common.statistics import mean_of
from ...core.adapter import adapters, as_matrix
from ...methods import qlora
from ...models.load import load_model
from ...nf4 import dequantize, dequantize_model, quantize_model
from ...tasks.task import load_task
from ...tasks.templates import encode_rows
from ..claim import FAILS, HOLDS, UNDECIDED, Claim, Measured, Rule
from ..intervals import paired
from ..runs import Run, matches
from . import finetune, four_bit_training
from .four_bit_training import RATE, SEEDS, TASKS, tasks_of, weight_bytes

FOURTH = "quantized"
IN_FOUR_BITS = ("requantized", FOURTH)
WAYS = {"tiny": (*qlora.ONTO, FOURTH), "smollm2": IN_FOUR_BITS}
SETTINGS = {
    "tiny": four_bit_training.SETTINGS["tiny"],
    "smollm2": dict(n=600, steps=12, batch=4, test=100, validation=10),
}


def config(scale: str, task: str, lr: float, seed: int) -> dict:
    trained = finetune.config(
        base=scale,
        task=task,
        method="qlora",
        lr=lr,
        seed=seed,
        r=8,
        alpha=16,
        **SETTINGS[scale],
    )
    return trained | {"experiment": "fourth_merge", "merges": list(WAYS[scale])}


def compute(config: dict) -> dict:
    """Train a QLoRA, and merge it in each of the ways that the configuration names.

    Returns  what finetune.compute returns, and
        bytes   of the weights, adapters not counted
        norm    ‖ΔW‖ / ‖W'‖, the median over modules
        merges  {way: {test_items, test_loss, bytes, kept}}: the share of the update
                that is in the merged weight, <W - W', ΔW> / ‖ΔW‖², the median
    """
    model, tokenizer, result = finetune.fine_tuned(config)
    if result["diverged"]:
        return result
    base, _ = load_model(config["base"], device="cpu")
    task = load_task(config["task"])
    rows = finetune.chosen_rows(task, config)["test"]
    rows = encode_rows(tokenizer, task.instruction, rows, template=config["template"])
    updates = {name: parts(module) for name, module in adapters(model).items()}
    merges = {}
    for way in config["merges"]:
        model_of_way = merged(model, way, base)
        losses = finetune.item_losses(model_of_way, rows)
        merges[way] = {
            "test_items": [round(loss, 5) for loss in losses],
            "test_loss": round(fmean(losses), 6),
            "bytes": weight_bytes(model_of_way),
            "kept": median(shares_kept(model_of_way, updates)),
        }
    norms = [(dW.norm() / W.norm()).item() for W, dW in updates.values()]
    return result | {
        "bytes": weight_bytes(model),
        "norm": median(norms),
        "merges": merges,
    }


def merged(model: nn.Module, way: str, original: nn.Module) -> nn.Module:
    """A copy of the model whose adapters are merged in this way."""
    copy = deepcopy(model)
    onto = "original" if way == FOURTH else way
    qlora.merge(copy, onto, original if onto == "original" else None)
    if way == FOURTH:
        quantize_model(copy)
    return copy


@torch.no_grad()
def parts(module: nn.Module) -> tuple[Tensor, Tensor]:
    """W' and ΔW of an adapter beside four bits, each (d_out, d_in)."""
    return dequantize(module.base.quantized), module.delta(torch.float32)


@torch.no_grad()
def shares_kept(
    model: nn.Module, updates: dict[str, tuple[Tensor, Tensor]]
) -> list[float]:
    """<W - W', ΔW> / ‖ΔW‖² of each weight W of a merged model, which leaves four bits.

    Args
        updates  {module name: (W', ΔW)}
    """
    dequantize_model(model)
    shares = []
    for name, (before, dW) in updates.items():
        change = as_matrix(model.get_submodule(name)) - before
        shares.append(((change * dW).sum() / dW.square().sum()).item())
    return shares


# ------------------------------------------------------------------------- The runs


def rate(scale: str, task: str) -> tuple[list[dict], float | None]:
    """(configurations of the search, the rate it chose): those of Q4."""
    if scale != "tiny":
        return [], RATE
    return four_bit_training.rate(scale, "qlora", task)


def configs(scale: str) -> list[dict]:
    known = []
    for task in TASKS[scale]:
        searched, lr = rate(scale, task)
        known += searched
        if lr is not None:
            known += [config(scale, task, lr, seed) for seed in SEEDS[scale]]
    return known


# --------------------------------------------------------------------- What they say


def trained(all_runs: Sequence[Run]) -> list[Run]:
    return [run for run in all_runs if matches(run, experiment="fourth_merge")]


def cost(all_runs: Sequence[Run], way: str) -> tuple[float, float, float]:
    """Test loss after a merge minus that before it, paired; the mean of the tasks."""
    own, triples = trained(all_runs), []
    for task in tasks_of(own):
        before = [run for run in own if matches(run, task=task)]
        after = [replace(r, result=r.result | r.result["merges"][way]) for r in before]
        triples.append(paired(after, before))
    return mean_of(triples)


def measured(all_runs: Sequence[Run]) -> Measured:
    own = trained(all_runs)
    seeds = tuple(sorted({run.config["seed"] for run in own}))
    kept = {
        way: 100 * median(r.result["merges"][way]["kept"] for r in own)
        for way in IN_FOUR_BITS
    }
    bytes_ = fmean(r.result["merges"][FOURTH]["bytes"] / r.result["bytes"] for r in own)
    figures = {
        "fourth": "{:+.4f} [{:+.4f}, {:+.4f}]".format(*cost(own, FOURTH)),
        "requantized": "{:+.4f} [{:+.4f}, {:+.4f}]".format(*cost(own, "requantized")),
        "kept": f"{kept[FOURTH]:.0f}",
        "kept_requantized": f"{kept['requantized']:.1f}",
        "norm": f"{100 * median(r.result['norm'] for r in own):.1f}",
        "bytes": f"{bytes_:.2f}",
        "short": f"{cost(own, FOURTH)[0]:+.3f}",
        "short_requantized": f"{cost(own, 'requantized')[0]:+.3f}",
    }
    return Measured(*cost(own, FOURTH), seeds, figures)


INSTEAD = (
    "The update has {norm} % of the weights' norm. Added to the original weights and "
    "quantized, {kept} % of it is kept, and the loss changes by {fourth} nats. Added "
    "to the dequantized weights and quantized, {kept_requantized} % is kept, and the "
    "loss changes by {requantized}. Both take {bytes} times the bytes of the 4-bit base"
)
CLAIMS = (
    Claim(
        id="M4b",
        notebook="08",
        source="ours: a fourth merge beside M4",
        statement=(
            "A QLoRA can be merged into four bits without loss: its update is added to "
            "the original weights, and the sum is quantized"
        ),
        rule=Rule(
            words=(
                "Test loss of a QLoRA whose update was added to the weights from "
                "before they were quantized, the sum rounded to NF4, minus its test "
                "loss before merging; tiny on three tasks, after 100 steps of 16 rows; "
                "SmolLM2 on order sentences, after 12 steps of 4 rows; paired over "
                "seeds and 200 test rows a task, on SmolLM2 100"
            ),
            unit="nats per token",
            verdicts=(HOLDS, FAILS),
            edges=(0.02,),
        ),
        configs=configs,
        measured=measured,
        say_instead=dict.fromkeys((HOLDS, FAILS, UNDECIDED), INSTEAD),
        number="loss after this merge above that before merging",
        so={
            HOLDS: (
                "To merge and stay in four bits, add the update to the original "
                "weights, then quantize: {short} nats, against {short_requantized} "
                "onto the dequantized ones."
            ),
            FAILS: (
                "Quantizing the original weights plus the update loses {short} nats, "
                "against {short_requantized} onto the dequantized ones: keep the "
                "adapter separate."
            ),
            UNDECIDED: (
                "Quantizing the original weights plus the update changes the loss by "
                "{short} nats, about the edge of what we call no loss."
            ),
        },
    ),
)
