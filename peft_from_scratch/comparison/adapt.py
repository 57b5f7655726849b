"""A base model adapted by one candidate, ready to answer."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..memory.meter import Memory, measured_step
from ..models.load import load_model
from ..tasks.task import Task
from ..training.config import History, TrainConfig
from ..training.evaluation import Answers, answer_rows
from ..training.loop import train
from .candidates import Candidate
from .plan import Plan

# That weights in four bits may take, dequantized, while a model answers: fewer seconds,
# the same answers. The memory that is reported is of a training step, without them.
UNPACKED_BYTES = 1 << 30


@dataclass(frozen=True)
class Adapted:
    """A model adapted by one candidate, ready to answer."""

    model: nn.Module
    tokenizer: object
    template: str
    examples: Sequence[tuple[str, str]] = ()  # the few-shot part of every prompt
    history: History | None = None  # None where nothing trained
    memory: Memory | None = None  # of a training step, counted
    seconds: float = 0.0  # that all of this took but for the training

    def answer(self, task: Task, rows) -> Answers:
        """Answer some rows of the task, in the template and after the examples."""
        return answer_rows(
            self.model,
            self.tokenizer,
            task,
            rows,
            template=self.template,
            examples=self.examples,
            progress=True,
            unpacked_bytes=UNPACKED_BYTES,
        )


def adapt(
    candidate: Candidate,
    plan: Plan,
    task: Task,
    setting: dict,
    seed: int,
    *,
    checkpoints: Path | None = None,
    search: bool = False,
) -> Adapted:
    """Load the base and adapt it by the candidate, with the given setting.

    Args
        setting      {"template": …} and, where the candidate trains, {"lr": …}; where
                     it is few-shot {"k": …, "order": …}
        checkpoints  where training saves and resumes; None for nowhere
        search       for tuning: look at the validation rows at the end of training, and
                     do not count bytes
    """
    begun = time.perf_counter()
    model, tokenizer = load_model(plan.base, device=plan.device)
    if not candidate.trains:
        examples = _examples(candidate, task, setting)
        seconds = time.perf_counter() - begun
        return Adapted(model, tokenizer, setting["template"], examples, seconds=seconds)
    torch.manual_seed(seed)
    candidate.inject(model, **_init(candidate, tokenizer, task))
    config = _config(candidate, plan, setting, seed, search)
    memory = None if search else measured_step(model, tokenizer, task, config)
    seconds = time.perf_counter() - begun
    history = train(model, tokenizer, task, config, checkpoints=checkpoints)
    return Adapted(model, tokenizer, config.template, (), history, memory, seconds)


def _examples(candidate: Candidate, task: Task, setting: dict) -> Sequence:
    if not candidate.few_shot:
        return ()
    return few_shot_examples(task, setting["k"], setting["order"])


def _init(candidate: Candidate, tokenizer, task: Task) -> dict:
    """Arguments of the injection that depend on the task."""
    if not candidate.init_from_instruction:
        return {}
    return {"start": tokenizer(task.instruction).input_ids}


def _config(
    candidate: Candidate, plan: Plan, setting: dict, seed: int, search: bool
) -> TrainConfig:
    steps = plan.steps_of(candidate)
    return TrainConfig(
        steps=steps,
        batch=plan.batch,
        lr=setting["lr"],
        lr_ratio=candidate.lr_ratio,
        paged=plan.paged,
        warmup=steps // 10,
        template=setting["template"],
        seed=seed,
        validate_every=steps if search else 0,
        checkpoint_every=25,
    )


def few_shot_examples(task: Task, k: int, order: int) -> list[tuple[str, str]]:
    """k pairs of the training split; `order` seeds which ones, and in what order."""
    chosen = random.Random(order).sample(range(len(task.train)), k)
    return [(task.train[i]["prompt"], task.train[i]["completion"]) for i in chosen]
