"""A base model adapted by one candidate, ready to answer."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..memory.meter import Memory, measured_step
from ..models.load import pick_dtype
from ..tasks.messages import pairs
from ..tasks.task import Task
from ..training.config import History, TrainConfig
from ..training.evaluation import Answers, answer_rows
from ..training.loop import train
from ..training.precision import autocast_of, loaded_in
from .candidates import Candidate
from .setup import Setup

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

    def answer(self, task: Task, rows, keep: Path | None = None) -> Answers:
        """Answer some rows of the task, in the template and after the examples."""
        return answer_rows(
            self.model,
            self.tokenizer,
            task,
            rows,
            template=self.template,
            examples=self.examples,
            progress=True,
            keep=keep,
            unpacked_bytes=UNPACKED_BYTES,
        )


def adapt(
    candidate: Candidate,
    setup: Setup,
    setting: dict,
    seed: int,
    *,
    checkpoints: Path | None = None,
    search: bool = False,
) -> Adapted:
    """Load the base and adapt it by the candidate, with the given setting.

    Weights of the model's own are trained in float32 (training/precision.py), and the
    result is rounded to the dtype of the comparison, in which it then answers.

    Args
        setting      {"template": …} and, where the candidate trains, {"lr": …}; where
                     it is few-shot {"k": …, "order": …}
        checkpoints  where training saves and resumes; None for nowhere
        search       for tuning: look at the validation rows at the end of training, and
                     do not count bytes
    """
    begun, task = time.perf_counter(), setup.task
    model, tokenizer = setup.load(loaded_in(candidate.method, setup.dtype))
    if not candidate.trains:
        examples = _examples(candidate, task, setting)
        seconds = time.perf_counter() - begun
        return Adapted(model, tokenizer, setting["template"], examples, seconds=seconds)
    torch.manual_seed(seed)
    candidate.inject(model, **_init(candidate, tokenizer, task))
    config = _config(candidate, setup, setting, seed, search)
    memory = None if search else measured_step(model, tokenizer, task, config)
    seconds = time.perf_counter() - begun
    history = train(model, tokenizer, task, config, checkpoints=checkpoints)
    if config.autocast:
        _round(model, setup.dtype)
    return Adapted(model, tokenizer, config.template, (), history, memory, seconds)


@torch.no_grad()
def _round(model: nn.Module, dtype: str) -> None:
    """Parameters to this dtype, and no buffer: rotary frequencies need float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(pick_dtype(dtype))


def _examples(candidate: Candidate, task: Task, setting: dict) -> Sequence:
    if not candidate.few_shot:
        return ()
    return few_shot_examples(task, setting["k"], setting["order"])


def _init(candidate: Candidate, tokenizer, task: Task) -> dict:
    """Arguments of the injection that depend on the task."""
    if not (candidate.init_from_instruction and task.instruction):
        return {}
    return {"start": tokenizer(task.instruction).input_ids}


def _config(
    candidate: Candidate, setup: Setup, setting: dict, seed: int, search: bool
) -> TrainConfig:
    plan = setup.plan
    steps = plan.steps_of(candidate)
    return TrainConfig(
        steps=steps,
        batch=plan.batch,
        lr=setting["lr"],
        lr_ratio=candidate.lr_ratio,
        paged=plan.paged,
        autocast=autocast_of(candidate.method, setup.dtype),
        warmup=steps // 10,
        template=setting["template"],
        seed=seed,
        validate_every=steps if search else 0,
        checkpoint_every=25,
        **({} if plan.max_tokens is None else {"max_tokens": plan.max_tokens}),
    )


def few_shot_examples(task: Task, k: int, order: int) -> list[tuple[str, str]]:
    """The pairs of k training rows; `order` seeds which ones, and in what order.

    A row is one pair; a conversation is a pair for each of its answers, and gives them
    without a system turn of its own.
    """
    chosen = random.Random(order).sample(range(len(task.train)), k)
    return [pair for i in chosen for pair in pairs(task.train[i])]
