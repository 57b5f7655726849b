"""What a training run is asked to do, and what it did.

Two runs with the same TrainConfig, rows, model and machine end in the same bits.
Learning rate and data order are pure functions of the step, so that a resumed run needs
no memory of them: its position *is* the step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from ..common import check
from ..tasks.templates import TEMPLATES
from .buckets import in_buckets

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
    buckets=1,
)


@dataclass(frozen=True)
class TrainConfig:
    """How to train; every field is checked at construction.

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
                          a time, at least a page: PagedAdamW, with the bits of
                          torch's fused AdamW. None: all of them, and that AdamW
        autocast          "bfloat16": compute in it, from weights that stay in float32.
                          None: compute in the dtype of the weights
        clip              largest norm of the whole gradient; None for no clipping
        seed              of the order of the rows, and of dropout
        template          "chat" or "raw": how a row becomes tokens
        max_tokens        longest row, in tokens; a longer one is an error, not cut
        validate_every    steps between two looks at the validation rows; 0 for none
        patience          validations without a new lowest loss before it stops early;
                          the weights of the lowest are then the result. 0: run to the
                          end and keep the last weights
        checkpoint_every  steps between two checkpoints, where a folder is given
        checkpointing     keep each layer's input alone, and compute the layer again in
                          backward (gradient_checkpointing.py); the gradient is the same
        chunk             label tokens whose logits are there at a time, for fewer bytes
                          (chunked_loss.py); the gradient is the same. None: all
        buckets           groups of about as many rows, by length; a step's rows come
                          from one (buckets.py). 1: from everywhere
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
    autocast: str | None = None
    clip: float | None = 1.0
    seed: int = 0
    template: str = "chat"
    max_tokens: int = 512
    validate_every: int = 0
    patience: int = 0
    checkpoint_every: int = 10
    checkpointing: bool = False
    chunk: int | None = None
    buckets: int = 1

    def __post_init__(self):
        for name, least in AT_LEAST.items():
            fits = check.is_whole(getattr(self, name), least, 2**63 - 1)
            self._allow(name, fits, f"a whole number >= {least}")
        for name in ("lr", "lr_ratio"):
            check.number(name, getattr(self, name), "a finite number above 0", above=0)
        self._allow("warmup", self.warmup < self.steps, f"less than steps={self.steps}")
        self._allow("schedule", self.schedule in SCHEDULES, ", ".join(SCHEDULES))
        self._allow("template", self.template in TEMPLATES, ", ".join(TEMPLATES))
        check.number("weight_decay", self.weight_decay, "a finite number >= 0", least=0)
        pair = isinstance(self.betas, tuple | list) and len(self.betas) == 2
        betas = pair and all(check.is_finite(b) and 0 <= b < 1 for b in self.betas)
        self._allow("betas", betas, "two numbers in [0, 1)")
        if self.paged is not None:
            share = check.is_finite(self.paged) and 0 < self.paged <= 1
            self._allow("paged", share, "a share in (0, 1], or None for no paging")
        autocast = self.autocast in (None, "bfloat16")
        self._allow("autocast", autocast, "bfloat16, or None")
        if self.clip is not None:
            words = "a finite number above 0, or None for no clipping"
            check.number("clip", self.clip, words, above=0)
        check.flag("checkpointing", self.checkpointing)
        some = self.chunk is None or check.is_whole(self.chunk, 1, 2**63 - 1)
        words = "a whole number of label tokens >= 1, or None for all at once"
        self._allow("chunk", some, words)
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

    def _allow(self, name: str, fine: bool, allowed: str) -> None:
        check.require(fine, name, getattr(self, name), f"allowed is {allowed}")


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of optimizer step number `step`, counted from 0.

        warm-up   lr (step + 1) / warmup                         step < warmup
        linear    lr (1 - p)                                     after it, with
        cosine    lr (1 + cos(pi p)) / 2          p = (step - warmup) / (steps - warmup)
        constant  lr

    The first step already learns and the last one still does: 0 is never reached.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    p = (step - config.warmup) / (config.steps - config.warmup)
    if config.schedule == "linear":
        return config.lr * (1 - p)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * p)) / 2
    return config.lr


def rows_of_step(
    config: TrainConfig, step: int, rows: int, lengths: Sequence[int] | None = None
) -> list[int]:
    """Which of `rows` rows optimizer step number `step` (from 0) trains on.

    Each epoch is a permutation of all rows, drawn from (seed, epoch); the steps read
    the epochs one after the other, so that a step may span two of them.

    Args
        lengths  tokens of each row, where the recipe has buckets
    """
    positions = range(step * config.batch, (step + 1) * config.batch)
    epochs = range(positions[0] // rows, positions[-1] // rows + 1)
    order = {epoch: _order(config, epoch, rows, lengths) for epoch in epochs}
    return [int(order[position // rows][position % rows]) for position in positions]


def _order(config: TrainConfig, epoch: int, rows: int, lengths) -> np.ndarray:
    """The rows in the order in which an epoch reads them."""
    generator = np.random.default_rng((config.seed, epoch))
    order = generator.permutation(rows)
    if config.buckets == 1:
        return order
    first = -epoch * rows % config.batch  # they end a step of the epoch before
    sizes = dict(buckets=config.buckets, batch=config.batch, first=first)
    return in_buckets(order, lengths, generator, **sizes)


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
    packing        what the model reads of a step, in words: packed rows, or padded ones
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
    packing: str = ""

    def record(self, loss, lr, norm, tokens, seconds) -> None:
        """Append the figures of an optimizer step that has just been done."""
        self.loss.append(loss)
        self.lr.append(lr)
        self.norm.append(norm)
        self.tokens.append(tokens)
        self.step_seconds.append(seconds)

    def finished(self, steps: int) -> bool:
        """Whether no step is left of a run of `steps`."""
        return self.stopped_early or self.steps == steps

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
