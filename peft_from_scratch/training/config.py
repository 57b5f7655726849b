"""What a training run is asked to do, and what it did.

A `Recipe` is the whole recipe: two runs with the same recipe, rows, model and machine
end in the same bits. Learning rate and data order are pure functions of the step, so
that a resumed run needs no memory of them: its position *is* the step.
"""

import math
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from ..core.adapter import is_finite
from ..tasks.templates import TEMPLATES

SCHEDULES = ("linear", "cosine", "constant")
AT_LEAST = dict(  # the fields that are whole numbers
    steps=1,
    batch=1,
    accumulate=1,
    warmup=0,
    seed=0,
    validate_every=0,
    patience=0,
    checkpoint_every=1,
    max_tokens=2,
)


@dataclass(frozen=True)
class Recipe:
    """How to train; checked when it is made.

    Args
        steps             optimizer steps
        batch             rows of one optimizer step
        accumulate        micro-batches that a step's rows are split into, to save
                          activation bytes; the gradient is the same. Divides batch
        lr                highest learning rate. 1e-3 suits LoRA; full fine-tuning wants
                          3e-5, soft prompts 1e-2
        lr_ratio          rate of each LoRA's B over that of all else. 1 for the same;
                          LoRA+ (arXiv:2402.12354) takes 16
        warmup            steps of linear rise before it; 0 for none
        schedule          after it: "linear" or "cosine" towards 0, or "constant"
        weight_decay      of AdamW, on every trainable tensor
        betas             of AdamW
        paged             share of the bytes of AdamW's states that may be in memory at
                          a time, at least a page: PagedAdamW. None: all of them, and
                          torch's AdamW, whose fused loop rounds a little differently
        clip              largest norm of the whole gradient; None for no clipping
        seed              of the order of the rows, and of dropout
        template          "chat" or "raw": how a row becomes tokens
        max_tokens        longest row, in tokens; a longer one is an error, not cut
        validate_every    steps between two looks at the validation rows; 0 for none
        patience          validations without a new lowest loss before it stops early;
                          the weights of the lowest are then the result. 0: run to the
                          end and keep the last weights
        checkpoint_every  steps between two checkpoints, where a folder is given
    Raises   ValueError   naming the field, its value and what is allowed
    """

    steps: int = 50
    batch: int = 8
    accumulate: int = 1
    lr: float = 1e-3
    lr_ratio: float = 1.0
    warmup: int = 0
    schedule: str = "linear"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    paged: float | None = None
    clip: float | None = 1.0
    seed: int = 0
    template: str = "chat"
    max_tokens: int = 512
    validate_every: int = 0
    patience: int = 0
    checkpoint_every: int = 10

    def __post_init__(self):
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            fits = whole and least <= value < 2**63
            self._allow(name, fits, f"a whole number >= {least}")
        positive = is_finite(self.lr) and self.lr > 0
        self._allow("lr", positive, "a finite number above 0")
        larger = is_finite(self.lr_ratio) and self.lr_ratio > 0
        self._allow("lr_ratio", larger, "a finite number above 0")
        self._allow("warmup", self.warmup < self.steps, f"less than steps={self.steps}")
        self._allow("schedule", self.schedule in SCHEDULES, ", ".join(SCHEDULES))
        self._allow("template", self.template in TEMPLATES, ", ".join(TEMPLATES))
        decay = is_finite(self.weight_decay) and self.weight_decay >= 0
        self._allow("weight_decay", decay, "a finite number >= 0")
        pair = isinstance(self.betas, tuple | list) and len(self.betas) == 2
        betas = pair and all(is_finite(b) and 0 <= b < 1 for b in self.betas)
        self._allow("betas", betas, "two numbers in [0, 1)")
        paged = self.paged is None or (is_finite(self.paged) and 0 < self.paged <= 1)
        self._allow("paged", paged, "a share in (0, 1], or None for no paging")
        clip = self.clip is None or (is_finite(self.clip) and self.clip > 0)
        self._allow("clip", clip, "a finite number above 0, or None for no clipping")
        self._allow(
            "accumulate",
            self.batch % self.accumulate == 0,
            f"a divisor of batch={self.batch}",
        )
        self._allow(
            "patience",
            not self.patience or self.validate_every,
            "0 as long as validate_every=0, since it counts validations",
        )

    def _allow(self, name, fine, allowed) -> None:
        if not fine:
            raise ValueError(f"{name}={getattr(self, name)!r}: allowed is {allowed}")


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of optimizer step number `step`, counted from 0.

        warm-up   lr (step + 1) / warmup                         step < warmup
        linear    lr (1 - p)                                     after it, with
        cosine    lr (1 + cos(pi p)) / 2          p = (step - warmup) / (steps - warmup)
        constant  lr

    The first step already learns and the last one still does: 0 is never reached.
    """
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    p = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
    if recipe.schedule == "linear":
        return recipe.lr * (1 - p)
    if recipe.schedule == "cosine":
        return recipe.lr * (1 + math.cos(math.pi * p)) / 2
    return recipe.lr


def rows_of_step(recipe: Recipe, step: int, rows: int) -> list[int]:
    """Which of `rows` rows optimizer step number `step` (from 0) trains on.

    Each epoch is a permutation of all rows, drawn from (seed, epoch); the steps read
    the epochs one after the other, so that a step may span two of them.
    """
    positions = range(step * recipe.batch, (step + 1) * recipe.batch)
    epochs = range(positions[0] // rows, positions[-1] // rows + 1)
    order = {
        epoch: np.random.default_rng((recipe.seed, epoch)).permutation(rows)
        for epoch in epochs
    }
    return [int(order[position // rows][position % rows]) for position in positions]


@dataclass
class History:
    """What a run did. Lists have one entry a step.

    loss           nats per label token of the step's rows, before its update
    lr             learning rate of the step
    norm           norm of the gradient, before clipping
    tokens         label tokens, each of which counts the same in the loss
    step_seconds   wall-clock time of the step
    validation     (steps done, nats per label token over all validation rows)
    seconds        all of the run: steps, validations and checkpoints; of a resumed run,
                   what its checkpoints know of the parts before
    stopped_early  whether patience ran out before the steps did
    resumed_from   steps that a checkpoint brought along; None for a run in one go
    """

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    stopped_early: bool = False
    resumed_from: int | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return len(self.loss)

    @property
    def median_step_seconds(self) -> float:
        return median(self.step_seconds)

    @property
    def best_step(self) -> int | None:
        """Steps done at the lowest validation loss, the first of equals."""
        if not self.validation:
            return None
        return min(self.validation, key=lambda seen: seen[1])[0]

    @property
    def stale(self) -> int:
        """Validations since the lowest loss."""
        return sum(step > self.best_step for step, _ in self.validation)
