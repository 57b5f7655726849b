"""The general kind of run: fine-tune a base on a task by one method, and measure it.

    result = finetune.run(base="tiny", task="gap-2", method="lora", lr=1e-2, seed=0,
                          n=1000, steps=100, batch=16, r=8, alpha=16)

`run` keeps the result in the run store; `compute(config(…))` does not, which is what a
lesson wants that runs it live. Two methods with the same seed see the same training
rows in the same order and are tested on the same rows: their results can be paired,
row by row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from ...common import scoped
from ...common.digest import digest
from ...core import adapter, counting
from ...core.adapter import adapters, remove
from ...core.targets import resolve
from ...methods import METHODS, loftq, lora, named
from ...models.load import load_model
from ...nf4 import quantize_model
from ...tasks.task import Task, load_task
from ...tasks.templates import encode_rows
from ...training.batch import Row, batch_of
from ...training.config import History, TrainConfig
from ...training.evaluation import answer_rows
from ...training.guards import Diverged
from ...training.loop import train
from ...training.loss import token_losses
from .. import runs

ALIASES = {"n": "positions"}  # a run's n is its training rows


@dataclass(frozen=True)
class Kind:
    """What a configuration's "method" stands for: a method of the table, or a variant.

    A method is here by its name. So a new method in the table, or another label and
    color of one, changes no rule's hash (rule_hash.py).

    Args
        method   name of one of the table; None: nothing is injected
        options  further arguments of the injection
        inject   takes the place of the method's inject
    """

    method: str | None
    options: Mapping[str, object] = field(default_factory=dict)
    inject: Callable | None = None

    @property
    def hyper(self) -> dict[str, object]:
        """The method's entries in a configuration, with their defaults."""
        if self.method is None:
            return {}
        hyper = named(self.method).hyper
        return {ALIASES.get(name, name): value for name, value in hyper.items()}

    def injected(self, model: nn.Module, config: dict) -> None:
        """Inject the method into the model as the configuration says."""
        inject = self.inject or (self.method and named(self.method).module.inject)
        if inject:
            names = named(self.method).hyper if self.method else ()
            values = {name: config[ALIASES.get(name, name)] for name in names}
            inject(model, **self.options, **values)


def full_projections(model: nn.Module) -> None:
    """Let the weights and biases of the projections train, and nothing else."""
    names = sorted(_of_projections(model))
    adapter.apply(model, adapter.plan(model, None, {}, base_params=names))


def lora_and_the_rest(model: nn.Module, **options) -> None:
    """LoRA at the projections; embeddings, norms and head train as they are."""
    inside = _of_projections(model)
    rest = [name for name, _ in model.named_parameters() if name not in inside]
    adapter.apply(model, replace(lora.plan(model, **options), base_params=tuple(rest)))


def _of_projections(model: nn.Module) -> set[str]:
    """Names of the parameters of what LoRA adapts: all projections but the head."""
    return {
        f"{name}.{parameter}"
        for name, module in resolve(model, LORA["targets"]).items()
        for parameter, _ in module.named_parameters(recurse=False)
    }


LORA = dict(named("lora").hyper)
VARIANTS: dict[str, Kind] = {
    "base": Kind(None),  # nothing is added and nothing trains
    "full-projections": Kind(None, inject=full_projections),
    "lora-and-rest": Kind("lora", inject=lora_and_the_rest),
    "rslora": Kind("lora", {"rslora": True}),
    "lora-frozen": Kind("lora"),  # control: A and B random, and never trained
    "qlora-loftq": Kind("qlora", inject=loftq.inject),  # starts at what NF4 lost
    "qlora-bf16": Kind("qlora", {"dtype": torch.bfloat16}),
    "qlora-frozen": Kind("qlora"),  # control, as lora-frozen
    "nf4-base": Kind(None, inject=quantize_model),  # in four bits, and nothing trains
    "lora-transplanted": Kind("lora"),  # trained in full, tested in four bits
}
FROZEN = ("lora-frozen", "qlora-frozen")
UNTRAINED = ("base", "nf4-base", *FROZEN)
TRANSPLANTED = "lora-transplanted"
RECIPE = ("warmup", "schedule", "weight_decay", "clip", "validate_every", "patience")
TEST, VALIDATION = 200, 100  # rows
LAST = 10  # steps whose mean is the training loss at the end


def kind_of(method: str) -> Kind:
    """The variant, or the method of the table, of this name.

    Raises  ValueError  there is neither; the message holds the names
    """
    if method in VARIANTS:
        return VARIANTS[method]
    try:
        return Kind(named(method).name)
    except ValueError:
        raise ValueError(f"{method=}: allowed are {_every_name()}") from None


def _every_name() -> str:
    methods = (method.name for method in METHODS)
    return ", ".join(dict.fromkeys(["base", *methods, *VARIANTS]))


def run(**arguments) -> dict:
    """The result of config(**arguments), kept in the run store."""
    chosen = config(**arguments)
    return runs.result(chosen, lambda: compute(chosen))


def config(
    *,
    base: str,
    task: str,
    method: str,
    lr: float,
    seed: int = 0,
    n: int = 1000,
    steps: int = 100,
    batch: int = 16,
    test: int = TEST,
    validation: int = VALIDATION,
    exact: bool = False,
    template: str | None = None,
    **hyper,
) -> dict:
    """The configuration of a run, with every default filled in.

    Args
        method      the name of a method, or one of VARIANTS
        seed        draws the rows, their order and the adapter's start
        n           training rows; a smaller n has a part of the rows of a larger one
        test        test rows, the first ones; and `validation` rows likewise
        exact       also let the model answer the test rows, and score the answers
        template    None: "raw" for tiny, which knows no other, else "chat"
        hyper       of the method (lora: r, alpha, targets), and of the recipe: warmup
                    (a tenth of the steps by default), schedule, weight_decay, clip,
                    validate_every, patience
    Raises   ValueError   an unknown method, or a hyperparameter that neither has
    """
    defaults = kind_of(method).hyper
    allowed = (*defaults, *RECIPE)
    if unknown := [name for name in hyper if name not in allowed]:
        raise ValueError(
            f"{unknown[0]}={hyper[unknown[0]]!r} is no argument of method={method!r} "
            f"nor of the recipe; allowed are {', '.join(allowed)}"
        )
    recipe = {"warmup": steps // 10} | {k: v for k, v in hyper.items() if k in RECIPE}
    return {
        "experiment": "finetune",
        "base": base,
        "base_digest": runs.base_digest(base),
        "task": task,
        "method": method,
        **{name: hyper.get(name, value) for name, value in defaults.items()},
        "lr": float(lr),
        "seed": seed,
        "n": n,
        "steps": steps,
        "batch": batch,
        **recipe,
        "template": template or ("raw" if base == "tiny" else "chat"),
        "test": test,
        "validation": validation,
        "exact": exact,
    }


def compute(config: dict) -> dict:
    """Run one configuration.

    Returns  losses are means over rows of nats per label token, the end token included
        test_items       loss of each test row, in their order; test_loss: their mean
        validation_loss  of the weights that the run ends with
        validation       [steps done, loss] of each look on the way, token by token
        train_loss       mean of the last ten steps' losses, before their updates
        correct          1 or 0 for each test row, where `exact` is asked for
        steps, best_step, stopped_early, seconds, step_seconds (median)
        trainable, total parameters
        rows_digest      of all rows of the task that were used
        before           of a transplanted LoRA, the losses beside its own base
        diverged         the message, where the loss was no number; losses are then null
    """
    model, _, result = fine_tuned(config)
    del model
    return result


def fine_tuned(config: dict) -> tuple[nn.Module, object, dict]:
    """(model, tokenizer, result) of one configuration, for uses of the weights."""
    model, tokenizer = load_model(config["base"], device=config.get("device", "cpu"))
    task = load_task(config["task"])
    rows = chosen_rows(task, config)
    history, diverged = train_model(model, tokenizer, task.instruction, rows, config)
    result = {
        **sizes_of(model),
        **curve_of(history),
        "rows_digest": digest(task.instruction, rows),
        "diverged": diverged,
    }
    tested = partial(
        measured, model, tokenizer, task, rows, config, lost=bool(diverged)
    )
    if config["method"] == TRANSPLANTED:
        result["before"] = tested()
        transplant(model, config)
    return model, tokenizer, result | tested()


def chosen_rows(task: Task, config: dict) -> dict[str, list[dict]]:
    """{split: rows}: n training rows drawn by the seed, the first of the others.

    Raises  ValueError  the task has fewer rows than asked for
    """
    asked = {"train": config["n"]} | {s: config[s] for s in ("validation", "test")}
    for split, rows in asked.items():
        if rows > len(getattr(task, split)):
            raise ValueError(
                f"{split}: {rows} rows asked for; {task.name} has "
                f"{len(getattr(task, split))}"
            )
    order = np.random.default_rng(config["seed"]).permutation(len(task.train))
    train_rows = task.train.select(order[: config["n"]])
    others = {s: getattr(task, s).select(range(asked[s])) for s in list(asked)[1:]}
    return {s: list(part) for s, part in {"train": train_rows, **others}.items()}


def train_model(
    model: nn.Module, tokenizer, instruction: str, rows: dict, config: dict
) -> tuple[History, str | None]:
    """Inject the method and train; (history, why it diverged, or None)."""
    torch.manual_seed(config["seed"])
    kind_of(config["method"]).injected(model, config)
    if config["method"] in FROZEN:
        randomize(model)
    if config["method"] in UNTRAINED:
        return History(), None
    split = SimpleNamespace(instruction=instruction, **rows)
    try:
        return train(model, tokenizer, split, recipe(config), progress=False), None
    except Diverged as error:
        return History(), str(error)


def recipe(config: dict) -> TrainConfig:
    """The recipe of a configuration."""
    names = ("steps", "batch", "lr", "seed", "template", *RECIPE)
    return TrainConfig(**{name: config[name] for name in names if name in config})


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give every LoRA a random B, as large as a random A of its shape would start."""
    for each in adapters(model).values():
        nn.init.normal_(each.B, std=(3 * each.B.shape[1]) ** -0.5)


@torch.no_grad()
def transplant(model: nn.Module, config: dict) -> None:
    """Put the model's LoRA, as it is, beside the same base in four bits."""
    trained = {n: (m.A.clone(), m.B.clone()) for n, m in adapters(model).items()}
    remove(model)
    kind_of("qlora").injected(model, config)
    for name, module in adapters(model).items():
        for parameter, value in zip((module.A, module.B), trained[name], strict=True):
            parameter.copy_(value)


def measured(model, tokenizer, task, rows, config, *, lost: bool) -> dict:
    """Losses on validation and test rows; exact answers where they are asked for."""
    if lost:
        return {"validation_loss": None, "test_loss": None, "test_items": None}
    template, instruction = config["template"], task.instruction
    encoded = {
        split: encode_rows(tokenizer, instruction, rows[split], template=template)
        for split in ("validation", "test")
    }
    losses = {split: item_losses(model, encoded[split]) for split in encoded}
    result = {
        "validation_loss": _mean(losses["validation"]),
        "test_loss": _mean(losses["test"]),
        "test_items": [round(loss, 5) for loss in losses["test"]],
    }
    if config["exact"]:
        answers = answer_rows(model, tokenizer, task, rows["test"], template=template)
        result["correct"] = [int(right) for right in answers.correct]
    return result


@torch.no_grad()
def item_losses(model: nn.Module, rows: list[Row], *, batch: int = 32) -> list[float]:
    """Nats per label token of each row, in their order, with dropout off.

    Args
        rows  as templates.encode_rows makes them
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # little padding
    losses = [0.0] * len(rows)
    with scoped.mode(model, training=False):
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            padded = batch_of([rows[i] for i in part], device)
            each, labelled = token_losses(model, padded)
            means = (each.sum(1) / labelled.sum(1)).tolist()
            for i, loss in zip(part, means, strict=True):
                losses[i] = loss
    return losses


def sizes_of(model) -> dict:
    count = counting.count(model)
    return {"trainable": count.trainable, "total": count.total}


def curve_of(history: History) -> dict:
    last = history.loss[-LAST:]
    return {
        "train_loss": _mean(last) if last else None,
        "validation": [[step, round(loss, 5)] for step, loss in history.validation],
        "steps": history.steps,
        "best_step": history.best_step,
        "stopped_early": history.stopped_early,
        "seconds": round(history.seconds, 2),
        "step_seconds": round(history.median_step_seconds, 4) if last else None,
    }


def _mean(values) -> float:
    return round(float(np.mean(values)), 6)
