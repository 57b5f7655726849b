"""Every figure of one candidate of the comparison, for one seed."""

import tempfile
import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import nn

from ..common.load import OtherPrograms
from ..common.statistics import over_seeds
from ..core import adapter
from ..core.counting import count as count_parameters
from ..core.merge import merge
from ..files import exchange
from ..memory.meter import measure_step
from ..nf4 import unpacked
from ..tasks.messages import prompt_of
from ..tasks.task import Task
from ..tasks.templates import encode_prompt, stop_token
from ..training import evaluation
from ..training.config import History
from . import timing
from .adapt import UNPACKED_BYTES, Adapted, adapt
from .candidates import Candidate
from .setup import Setup

KEEP_BELOW = 100e6  # bytes; a larger adapter (a whole model) is measured, not kept
SAMPLES = 3  # test rows whose answers are shown
# What a candidate's seconds are made of. Training includes the seconds of an
# interrupted run before, which its checkpoint knows.
PARTS = ("prepare", "train", "answer", "count", "general", "decode")


def measure(
    candidate: Candidate, setup: Setup, setting: dict, seed: int, checkpoints: Path
) -> dict:
    """Adapt the base by one candidate and measure it; plain data, as JSON can hold it.

    Memory is the bytes of a training step, where the candidate trains, else of
    answering one batch. Decoding and merging are measured against an untouched copy of
    the base.
    """
    plan, task, others = setup.plan, setup.task, OtherPrograms()
    ready = adapt(candidate, setup, setting, seed, checkpoints=checkpoints)
    test = task.test.select(range(plan.rows))
    answers = ready.answer(task, test, checkpoints / "answers.json")
    history, clock = ready.history, Clock()
    adapter_folder = Path(plan.out) / "adapters" / f"{candidate.key}-{seed}"
    figures = {
        "correct": answers.correct,
        "samples": _samples(test, answers),
        **_size(ready),
        "injected": _injected(ready.model, candidate, task),
        "steps": history.steps if history else 0,
        "curve": _curve(history),
        "batch": plan.batch if history else 0,
        "disk_bytes": _store(ready, adapter_folder),
    }
    prepare = ready.seconds + clock.lap()
    figures["memory"] = _memory(ready, task, test)
    count = clock.lap()
    figures["forgetting"] = _forgetting(setup.general, ready)
    general = clock.lap()
    figures |= _inference(setup.base, ready, task, test)
    seconds = {
        "prepare": prepare,
        "train": history.seconds if history else 0.0,
        "answer": answers.seconds,
        "count": count,
        "general": general,
        "decode": clock.lap(),
    }
    step = history.seconds / history.steps if history else 0.0
    return figures | {
        "seconds": seconds | {"step": step},
        "busy_elsewhere": others.cores(),
    }


class Clock:
    """Wall-clock seconds from one call of `lap` to the next."""

    def __init__(self):
        self.last = time.perf_counter()

    def lap(self) -> float:
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def _samples(test, answers) -> list[dict]:
    return [
        {
            "prompt": test[i]["prompt"],
            "expected": test[i]["completion"],
            "answer": answers.answers[i],
            "correct": answers.correct[i],
        }
        for i in range(min(SAMPLES, len(test)))
    ]


def _size(ready: Adapted) -> dict:
    counted = count_parameters(ready.model)
    return {
        "trainable": counted.trainable,
        "total": counted.total,
        "share": counted.share,
    }


def _injected(model: nn.Module, candidate: Candidate, task: Task) -> dict:
    """The arguments of the injection that a reader wants to see beside the figures."""
    config = adapter.injected(model).config if adapter.is_injected(model) else {}
    shown = {name: config[name] for name in ("r", "alpha", "m", "n") if name in config}
    if candidate.init_from_instruction and task.instruction:
        shown["start"] = "the instruction's tokens"
    if candidate.lr_ratio != 1:
        shown["lr_ratio"] = candidate.lr_ratio
    return shown


def _curve(history: History | None) -> dict | None:
    """Loss of each step before its update, and the seconds when it was known."""
    if history is None:
        return None
    seconds = np.cumsum(history.step_seconds)
    return {
        "loss": [round(loss, 4) for loss in history.loss],
        "seconds": [round(float(second), 2) for second in seconds],
    }


def _memory(ready: Adapted, task: Task, test) -> dict:
    if ready.memory:
        return {**asdict(ready.memory), "when": "training"}
    prompts = [_prompt(ready, task, test, i) for i in range(min(32, len(test)))]
    shared = evaluation.shared_tokens(prompts)
    memory = measure_step(
        ready.model,
        lambda: evaluation.generate(
            ready.model,
            ready.tokenizer,
            [prompt[shared:] for prompt in prompts],
            stop_id=stop_token(ready.tokenizer, ready.template),
            max_new_tokens=2,
            prefix=prompts[0][:shared],
        ),
    )
    return {**asdict(memory), "when": "answering"}


def _forgetting(before: list[float], ready: Adapted) -> dict:
    """Loss on general text, and its change with the interval over its windows."""
    if ready.history is None:
        return {"before": fmean(before), "after": fmean(before), "change": 0.0}
    after = evaluation.general_losses(ready.model, ready.tokenizer)
    changes = [now - then for now, then in zip(after, before, strict=True)]
    change, low, high = over_seeds(changes)
    ends = {"change": change, "low": low, "high": high}
    return {"before": fmean(before), "after": fmean(after), **ends}


def _store(ready: Adapted, folder: Path) -> int:
    """Save the adapter and return its bytes on disk; 0 where nothing trained."""
    if ready.history is None:
        return 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        exchange.save(ready.model, scratch)
        size = sum(file.stat().st_size for file in Path(scratch).iterdir())
    if size < KEEP_BELOW:
        exchange.save(ready.model, folder)
    return size


def _inference(base: nn.Module, ready: Adapted, task: Task, test) -> dict:
    """Decoding time against the base, adapted and merged; the error of merging."""
    prompt = _prompt(ready, task, test, 0)
    candidates = {
        "base": (base, _prompt(ready, task, test, 0, examples=())),
        "adapted": (ready.model, prompt),
    }
    merge = {"possible": None, "reason": "nothing was added to the weights"}
    if adapter.adapters(ready.model):
        merged, merge = _merged(ready.model, prompt)
        if merged is not None:
            candidates["merged"] = (merged, prompt)
    with unpacked(ready.model, budget_bytes=UNPACKED_BYTES):  # as when it answers
        timed = timing.against_first(candidates)
    decode = asdict(timed["adapted"]) | {"base_ms": timed["base"].ms}
    decode["merged"] = asdict(timed["merged"]) if "merged" in timed else None
    return {"decode": decode, "merge": merge}


@torch.no_grad()
def _merged(model: nn.Module, prompt: list[int]) -> tuple[nn.Module | None, dict]:
    """A merged copy (None where that cannot be) and how far its logits are off."""
    merged = deepcopy(model)
    try:
        errors = merge(merged)
    except adapter.CannotMerge as reason:
        return None, {"possible": False, "reason": str(reason)}
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    difference = (merged(ids).logits - model(ids).logits).abs().max().item()
    return merged, {
        "possible": True,
        "reason": None,
        "logit_error": difference,
        "weight_error": max(errors.values()),
    }


def _prompt(ready: Adapted, task: Task, rows, i: int, examples=None) -> list[int]:
    return encode_prompt(
        ready.tokenizer,
        task.instruction,
        prompt_of(rows[i]),
        template=ready.template,
        examples=ready.examples if examples is None else examples,
    )
