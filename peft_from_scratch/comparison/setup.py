"""What all rows of a comparison stand on, looked at once: plan, task and base."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from ..common.provenance import code_digest, digest
from ..models.load import describe, load_model
from ..tasks.task import Task, load_task
from ..tasks.templates import TEMPLATES
from ..training.checkpoint import sampled_crc
from ..training.evaluation import general_loss
from .candidates import Plan


@dataclass(frozen=True)
class Ground:
    """The plan with what it names; the base itself is loaded by each row anew."""

    plan: Plan
    task: Task
    name: str  # the base's own
    description: str
    dtype: str
    device: torch.device
    templates: tuple[str, ...]  # that the base's tokenizer can write
    fingerprint: str  # of the base's weights, the task's rows and the code

    @cached_property
    def general(self) -> float:
        """The base's loss on general text, in nats per token; read when first asked."""
        return general_loss(*load_model(self.plan.base, device=self.plan.device))


def look_at(plan: Plan) -> Ground:
    """Load base and task once, so that what is wrong with them is said at once."""
    Path(plan.out).mkdir(parents=True, exist_ok=True)
    task = load_task(plan.task)
    if plan.rows > len(task.test):
        print(f"{task.name} has {len(task.test)} test rows: all of them are answered")
        plan = replace(plan, rows=len(task.test))
    model, tokenizer = load_model(plan.base, device=plan.device)
    splits = [list(getattr(task, name)) for name in ("train", "validation", "test")]
    weights = [sampled_crc(parameter) for parameter in model.parameters()]
    return Ground(
        plan=plan,
        task=task,
        name=model.config.name_or_path,
        description=f"{describe(model)}, seeds {', '.join(map(str, plan.seeds))}",
        dtype=str(model.dtype).removeprefix("torch."),
        device=next(model.parameters()).device,
        templates=TEMPLATES if tokenizer.chat_template else ("raw",),
        fingerprint=digest(weights, task.instruction, splits, code_digest()),
    )
