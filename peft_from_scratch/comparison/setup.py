"""What all candidates of a comparison share: plan, task and base, loaded once."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..common.digest import digest, sampled_crc
from ..common.provenance import code_digest
from ..core.decoder import positions
from ..models import speed
from ..models.load import AUTO, describe, dtype_name, load_model, pick_device
from ..tasks.task import Task
from ..tasks.templates import TEMPLATES
from ..training.evaluation import general_losses
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
    """The plan with what it names, and what its candidates share."""

    plan: Plan
    task: Task
    base: nn.Module  # untouched: what every candidate is timed against
    tokenizer: PreTrainedTokenizerBase
    description: str
    dtype: str  # of the base: what the plan's "auto" has become
    why_dtype: str | None  # None where it was asked for
    device: torch.device
    positions: int | None  # of the base; None where it does not say
    max_tokens: int  # of a row
    templates: tuple[str, ...]  # that the base's tokenizer can write
    fingerprint: str  # of the base's weights, the task's rows and the code

    @cached_property
    def general(self) -> list[float]:
        """The base's losses on general text, nats per token; read when first asked."""
        return general_losses(self.base, self.tokenizer)

    def load(
        self, dtype: str | None = None
    ) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """A model of its own for one candidate, which may change it.

        Args
            dtype  None: that of the comparison
        """
        plan = self.plan
        return load_model(plan.base, device=plan.device, dtype=dtype or self.dtype)


def load_setup(plan: Plan) -> Setup:
    """Load base and task once, so that an error in them ends the job at once."""
    Path(plan.out).mkdir(parents=True, exist_ok=True)
    task = plan.load_task()
    if plan.rows > len(task.test):
        print(f"{task.name} has {len(task.test)} test rows: all of them are answered")
        plan = replace(plan, rows=len(task.test))
    device = pick_device(plan.device)
    why = speed.fast_dtype(device).reason if plan.dtype == AUTO else None
    model, tokenizer = load_model(plan.base, device=device, dtype=plan.dtype)
    names = "train", "validation", "test", "search"
    splits = [list(getattr(task, name)) for name in names]
    weights = [sampled_crc(parameter) for parameter in model.parameters()]
    return Setup(
        plan=plan,
        task=task,
        base=model,
        tokenizer=tokenizer,
        description=f"{describe(model)}, seeds {', '.join(map(str, plan.seeds))}",
        dtype=dtype_name(model.dtype),
        why_dtype=why,
        device=device,
        positions=positions(model),
        max_tokens=row_limit(model, plan.max_tokens),
        templates=TEMPLATES if tokenizer.chat_template else ("raw",),
        fingerprint=digest(weights, task.instruction, splits, code_digest(MEASURING)),
    )
