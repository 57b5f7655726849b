"""What all candidates of a comparison share: plan, task and base, loaded once."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from ..common.digest import digest, sampled_crc
from ..common.provenance import code_digest
from ..core.decoder import positions
from ..models.load import describe, load_model
from ..tasks.task import Task
from ..tasks.templates import TEMPLATES
from ..training.evaluation import general_loss
from ..training.fitting import row_limit
from .plan import Plan

# The files that make figures: measure.py and tuning.py with all that they import, and
# what a table imports by its name. An edit of any of them has all candidates measured
# again; an edit of a file that only shows results does not.
HERE = Path(__file__).parent
MEASURING = (
    HERE / "measure.py",
    HERE / "tuning.py",
    HERE / "reference.py",
    *sorted((HERE.parent / "methods").glob("*.py")),
)


@dataclass(frozen=True)
class Setup:
    """The plan with what it names; each candidate loads the base itself anew."""

    plan: Plan
    task: Task
    name: str  # the base's own
    description: str
    dtype: str
    device: torch.device
    tokenizer: object
    positions: int | None  # of the base; None where it does not say
    max_tokens: int  # of a row
    templates: tuple[str, ...]  # that the base's tokenizer can write
    fingerprint: str  # of the base's weights, the task's rows and the code

    @cached_property
    def general(self) -> float:
        """The base's loss on general text, in nats per token; read when first asked."""
        return general_loss(*load_model(self.plan.base, device=self.plan.device))


def load_setup(plan: Plan) -> Setup:
    """Load base and task once, so that an error in them ends the job at once."""
    Path(plan.out).mkdir(parents=True, exist_ok=True)
    task = plan.load_task()
    if plan.rows > len(task.test):
        print(f"{task.name} has {len(task.test)} test rows: all of them are answered")
        plan = replace(plan, rows=len(task.test))
    model, tokenizer = load_model(plan.base, device=plan.device)
    splits = [list(getattr(task, name)) for name in ("train", "validation", "test")]
    weights = [sampled_crc(parameter) for parameter in model.parameters()]
    return Setup(
        plan=plan,
        task=task,
        name=model.config.name_or_path,
        description=f"{describe(model)}, seeds {', '.join(map(str, plan.seeds))}",
        dtype=str(model.dtype).removeprefix("torch."),
        device=next(model.parameters()).device,
        tokenizer=tokenizer,
        positions=positions(model),
        max_tokens=row_limit(model, plan.max_tokens),
        templates=TEMPLATES if tokenizer.chat_template else ("raw",),
        fingerprint=digest(weights, task.instruction, splits, code_digest(MEASURING)),
    )
