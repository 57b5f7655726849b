"""The rows of the comparison: each is one way to adapt the base model.

To add a method to the table, the tuning and the page, add its row to ROWS.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..memory.meter import Memory
from ..methods import (
    dora,
    full,
    houlsby,
    ia3,
    lora,
    pissa,
    prefix,
    prompt,
    qlora,
)
from ..models.load import load_model
from ..tasks.task import Task
from ..tasks.templates import TEMPLATES
from ..training.config import History, Recipe
from ..training.evaluation import Answers, answer_rows
from ..training.loop import measured_step, train
from . import reference

LEARNING_RATES = {  # half-decade steps; where the best is at an end, more are tried
    "full": (1e-5, 3e-5, 1e-4, 3e-4),
    "added": (1e-3, 3e-3, 1e-2, 3e-2),
    "vectors": (3e-3, 1e-2, 3e-2, 1e-1),
}


@dataclass(frozen=True)
class Row:
    """One way to adapt the model.

    key             its name on the command line and in result files
    label           its name in tables
    inject          makes a loaded model trainable; None where no parameter trains
    learning_rates  the grid that tuning tries
    few_shot        examples stand before the prompt
    times           its optimizer steps, as a multiple of the plan's
    from_text       it starts from the tokens of the task's instruction: inject(start=)
    lr_ratio        of its recipe
    like            whose searched settings serve where it has none of its own
    family          a relative, for a comparison that asks for the whole family
    library         it is that library's way, to stand beside ours; left out where it
                    is not installed
    """

    key: str
    label: str
    inject: Callable[..., object] | None = None
    learning_rates: tuple[float, ...] = ()
    few_shot: bool = False
    times: int = 1
    from_text: bool = False
    lr_ratio: float = 1.0
    like: str | None = None
    family: bool = False
    library: str | None = None


def _low_rank(key: str, label: str, inject: Callable, **options) -> Row:
    rates = LEARNING_RATES["added"]
    return Row(key, label, inject, rates, like="lora", family=True, **options)


ROWS = (
    Row("zero-shot", "Zero-shot"),
    Row("few-shot", "Few-shot", few_shot=True),
    Row("full", "Full fine-tuning", full.inject, LEARNING_RATES["full"]),
    Row("lora", "LoRA, all linear", lora.inject, LEARNING_RATES["added"]),
    Row("qlora", "QLoRA", qlora.inject, LEARNING_RATES["added"], like="lora"),
    Row(
        "qlora-bnb",
        "QLoRA on bitsandbytes",
        reference.qlora,
        LEARNING_RATES["added"],
        like="lora",
        library=reference.LIBRARY,
    ),
    Row(
        "houlsby",
        "Bottleneck adapters",
        partial(houlsby.inject, m=32),
        LEARNING_RATES["added"],
    ),
    Row(
        "prefix",
        "Prefix tuning",
        prefix.inject,
        LEARNING_RATES["added"],
        from_text=True,
    ),
    Row(
        "prompt",
        "Prompt tuning",
        prompt.inject,
        LEARNING_RATES["vectors"],
        times=2,  # it learns slowly
        from_text=True,
    ),
    _low_rank(
        "lora-attention", "LoRA, attention", partial(lora.inject, targets="attention")
    ),
    _low_rank("rslora", "rsLoRA", partial(lora.inject, rslora=True)),
    _low_rank("lora-plus", "LoRA+", lora.inject, lr_ratio=16.0),
    _low_rank("dora", "DoRA", dora.inject),
    _low_rank("pissa", "PiSSA", pissa.inject),
    Row("ia3", "(IA)³", ia3.inject, LEARNING_RATES["vectors"], family=True),
)
USUAL = tuple(row.key for row in ROWS if not row.family)


@dataclass(frozen=True)
class Plan:
    """What is compared, and on what; every result holds it.

    rows      test rows answered by each method; all there are, where they are fewer
    steps     optimizer steps of a trained method, of `batch` rows each; prompt tuning
              takes twice as many (Row.times)
    paged     share of AdamW's states that may be in memory at a time; None: all
    template  "chat" or "raw" for every row; None: as the tuning found, or the one that
              the base has
    device    None picks CUDA, then MPS, then the CPU
    """

    base: str = "smollm2"
    task: str = "orders"
    methods: tuple[str, ...] = USUAL
    seeds: tuple[int, ...] = (0,)
    rows: int = 100
    steps: int = 50
    batch: int = 8
    paged: float | None = None
    template: str | None = None
    device: str | None = None
    out: str = "out"

    def __post_init__(self):
        known = [row.key for row in ROWS]
        for method in self.methods:
            if method not in known:
                raise ValueError(f"{method=} is none of {', '.join(known)}")
        for name in ("rows", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if self.paged is not None:
            Recipe(paged=self.paged)  # refuses a share that is none
        if not self.methods or not self.seeds:
            raise ValueError("name at least one method and one seed")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds={self.seeds}: different ones are needed, from 0 on"
            )
        if self.template not in (None, *TEMPLATES):
            raise ValueError(
                f"template={self.template!r}: allowed are {', '.join(TEMPLATES)}, or "
                "None for the searched one"
            )

    def steps_of(self, row: Row) -> int:
        """Optimizer steps that the row takes; 0 where nothing trains."""
        return self.steps * row.times if row.inject else 0

    def chosen(self) -> list[Row]:
        """The rows that the plan names, in the table's order."""
        return [row for row in ROWS if row.key in self.methods]


@dataclass(frozen=True)
class Adapted:
    """A model adapted by one row, ready to answer."""

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
        )


def adapt(
    row: Row,
    plan: Plan,
    task: Task,
    setting: dict,
    seed: int,
    *,
    checkpoints: Path | None = None,
    search: bool = False,
) -> Adapted:
    """Load the base and adapt it as the row says, with the given setting.

    Args
        setting      {"template": …} and, where the row trains, {"lr": …}; where it is
                     few-shot {"k": …, "order": …}
        checkpoints  where training saves and resumes; None for nowhere
        search       for tuning: look at the validation rows at the end of training, and
                     do not count bytes
    """
    begun = time.perf_counter()
    model, tokenizer = load_model(plan.base, device=plan.device)
    template = setting["template"]
    if row.inject is None:
        examples = (
            few_shot_examples(task, setting["k"], setting["order"])
            if row.few_shot
            else ()
        )
        seconds = time.perf_counter() - begun
        return Adapted(model, tokenizer, template, examples, seconds=seconds)
    torch.manual_seed(seed)
    start = {"start": tokenizer(task.instruction).input_ids} if row.from_text else {}
    row.inject(model, **start)
    steps = plan.steps_of(row)
    recipe = Recipe(
        steps=steps,
        batch=plan.batch,
        lr=setting["lr"],
        lr_ratio=row.lr_ratio,
        paged=plan.paged,
        warmup=steps // 10,
        template=template,
        seed=seed,
        validate_every=steps if search else 0,
        checkpoint_every=25,
    )
    memory = None if search else measured_step(model, tokenizer, task, recipe)
    seconds = time.perf_counter() - begun
    history = train(model, tokenizer, task, recipe, checkpoints=checkpoints)
    return Adapted(model, tokenizer, template, (), history, memory, seconds)


def few_shot_examples(task: Task, k: int, order: int) -> list[tuple[str, str]]:
    """k pairs of the training split; `order` seeds which ones, and in what order."""
    chosen = random.Random(order).sample(range(len(task.train)), k)
    return [(task.train[i]["prompt"], task.train[i]["completion"]) for i in chosen]
