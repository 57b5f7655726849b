"""L2: why A starts Gaussian and B zero, and not both random or both zero.

    h = W0 x + scale · B A x
    dA = scale · Bᵀ dh xᵀ        zero as long as B is
    dB = scale · dh (A x)ᵀ       zero as long as A is

Each start is put into the same base and trained for some steps with the same rows:

    gaussian-zero   A Gaussian, B zero: the method's own
    both-random     A and B Gaussian: the model starts somewhere else
    both-zero       A and B zero: both gradients are zero, and stay so
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...common.scoped import seeded
from ...core.adapter import adapters, trainable
from ...methods import lora
from ...models.load import load_model
from ...tasks.task import load_task
from ...tasks.templates import encode_rows
from ...training.batch import batch_of
from ...training.config import TrainConfig, learning_rate, rows_of_step
from ...training.loss import accumulate_gradients
from .. import runs
from ..claim import FAILS, HOLDS, Claim, Invalid, Measured, Rule
from ..runs import Run
from .finetune import chosen_rows, item_losses, randomize

STARTS = ("gaussian-zero", "both-random", "both-zero")
SETTINGS = {  # at each scale: what is trained on, and how
    "tiny": dict(task="gap-1", lr=1e-2, batch=16, template="raw"),
    "smollm2": dict(task="orders", lr=1e-3, batch=4, template="chat"),
}
SEEDS = {"tiny": (0, 1, 2, 3, 4), "smollm2": (0, 1, 2)}
STEPS, PROBES = 20, 8  # optimizer steps; rows whose logits are compared


def config(scale: str, start: str, seed: int, **changes) -> dict:
    return {
        "experiment": "starts",
        "base": scale,
        "base_digest": runs.base_digest(scale),
        **SETTINGS[scale],
        "start": start,
        "r": 8,
        "alpha": 16,
        "steps": STEPS,
        "seed": seed,
        "n": 400,
        "validation": 40,
        "test": PROBES,
        **changes,
    }


def compute(config: dict) -> dict:
    """Put one start into the base, and train it.

    Returns  logit_difference  largest |logit - base's logit| before any step
        logit_size             largest |logit| of the base there, to compare with
        losses                 of each step's rows, before its update, nats/label token
        before, after          loss on the validation rows, mean over rows
        base                   the same of the base without any adapter
        still_zero             [A, B]: whether every entry still is exactly zero
        largest_gradient       of all steps
    """
    model, tokenizer = load_model(config["base"], device="cpu")
    task = load_task(config["task"])
    rows = chosen_rows(task, config)
    encoded = {
        split: encode_rows(
            tokenizer, task.instruction, part, template=config["template"]
        )
        for split, part in rows.items()
    }
    base_logits = logits(model, encoded["test"])
    base = _mean(item_losses(model, encoded["validation"]))
    torch.manual_seed(config["seed"])
    lora.inject(model, r=config["r"], alpha=config["alpha"])
    begin(model, config["start"])
    result = {
        "logit_difference": largest_difference(
            logits(model, encoded["test"]), base_logits
        ),
        "logit_size": max(each.abs().max().item() for each in base_logits),
        "base": base,
        "before": _mean(item_losses(model, encoded["validation"])),
    }
    losses, gradient = _train(model, encoded["train"], config)
    return result | {
        "losses": [round(loss, 5) for loss in losses],
        "largest_gradient": gradient,
        "after": _mean(item_losses(model, encoded["validation"])),
        "still_zero": [_all_zero(model, name) for name in "AB"],
    }


@torch.no_grad()
def begin(model: nn.Module, start: str) -> None:
    """Give every injected LoRA of the model one of STARTS."""
    if start not in STARTS:
        raise ValueError(f"{start=}: allowed are {', '.join(STARTS)}")
    if start == "both-random":
        randomize(model)
    if start == "both-zero":
        for adapter in adapters(model).values():
            adapter.A.zero_()


@torch.no_grad()
def logits(model: nn.Module, rows) -> list[Tensor]:
    """The logits of every position of each row, one row at a time."""
    device = next(model.parameters()).device
    return [model(batch_of([row], device)["input_ids"]).logits for row in rows]


def largest_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest |a - b| of all entries: 0.0 only where every bit is equal."""
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def _train(model, rows, config) -> tuple[list[float], float]:
    """(loss of each step, largest |gradient| of all), by AdamW without any checks.

    The library's train() stops after three steps that move nothing. The steps of
    both-zero move nothing, and this experiment has to show it.
    """
    recipe = TrainConfig(steps=config["steps"], batch=config["batch"], lr=config["lr"],
                    seed=config["seed"])  # fmt: skip
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    device, losses, largest = parameters[0].device, [], 0.0
    with seeded(recipe.seed, device):
        for step in range(recipe.steps):
            chosen = [rows[i] for i in rows_of_step(recipe, step, len(rows))]
            loss, _ = accumulate_gradients(model, [batch_of(chosen, device)])
            losses.append(loss)
            largest = max(largest, *(p.grad.abs().max().item() for p in parameters))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return losses, largest


def _all_zero(model, name) -> bool:
    return not any(getattr(a, name).any() for a in adapters(model).values())


def _mean(values) -> float:
    return round(sum(values) / len(values), 6)


def configs(scale: str) -> list[dict]:
    return [
        config(scale, start, seed) for start in STARTS for seed in SEEDS[scale]
    ]  # fmt: skip


def measured(all_runs: Sequence[Run]) -> Measured:
    """Largest logit difference of the method's own start, over all seeds.

    Invalid unless the controls show that the measurement can tell: both-random must
    start elsewhere, and both-zero must never learn.
    """
    starts = {
        name: [r for r in all_runs if r.config["start"] == name] for name in STARTS
    }
    if not all(run.result["logit_difference"] > 0 for run in starts["both-random"]):
        raise Invalid("both-random starts at the pretrained weights: not measured")
    for run in starts["both-zero"]:
        if run.result["largest_gradient"] or run.result["still_zero"] != [True, True]:
            raise Invalid("both-zero has a gradient: something else was measured")
    differences = [run.result["logit_difference"] for run in starts["gaussian-zero"]]
    seeds = tuple(run.config["seed"] for run in starts["gaussian-zero"])
    return Measured(max(differences), min(differences), max(differences), seeds)


CLAIMS = (
    Claim(
        id="L2",
        notebook="04",
        statement=(
            "With A Gaussian and B zero, training starts from exactly the pretrained "
            "weights"
        ),
        rule=Rule(
            words=(
                "Largest difference of any logit between the base and the base with "
                "LoRA before its first step, over eight rows and all seeds; bit-equal "
                "means zero; valid only if both random differs and both zero never "
                "gets a gradient"
            ),
            unit="(of a logit)",
            verdicts=(HOLDS, FAILS),
            edges=(0.0,),
        ),
        configs=configs,
        measured=measured,
        number="largest difference of a logit",
        so={"holds": "With B = 0, LoRA starts at exactly the pretrained model."},
    ),
)
