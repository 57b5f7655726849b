"""What work on SmolLM2 costs on this machine: FLOPs by formula, speed as measured.

    reading a batch      2 (LAYERS tokens + HEAD labels)    FLOPs
    a LoRA step          2 x that: backward passes through the inputs of each product
    a full step          3 x that: and through its weights
    seconds              FLOPs / (efficiency x rate)

The head counts at labelled positions only, as in loss.py. The rate is that of matrix
products of SmolLM2's own shapes, so that caches and threads weigh in as they will.
These are estimates, to plan an afternoon by; an experiment measures.
"""

from dataclasses import dataclass

import torch

from ..memory.formulas import adamw_bytes, lora_parameters
from ..models.speed import DEPTH, HIDDEN, MLP, measured_rate
from ..training.checkpoint import KEPT
from . import tuning
from .candidates import Candidate
from .plan import Plan

VOCABULARY = 49_152
PROJECTIONS = (  # (d_out, d_in) of a layer's: q, k, v, o, gate, up, down
    (HIDDEN, HIDDEN),
    (192, HIDDEN),
    (192, HIDDEN),
    (HIDDEN, HIDDEN),
    (MLP, HIDDEN),
    (MLP, HIDDEN),
    (HIDDEN, MLP),
)
LAYERS = DEPTH * sum(d_out * d_in for d_out, d_in in PROJECTIONS)  # weights
HEAD = VOCABULARY * HIDDEN  # weights; the embedding's too
LORA = lora_parameters(DEPTH * PROJECTIONS, r=8)

# Measured: training and decoding steps reach 0.67 to 0.83 of the products' rate. Norms,
# attention, softmax and the optimizer take the rest. Beside bfloat16's faster products,
# that rest weighs more: 0.3 to 0.5 (a comparison of 8.5 minutes).
EFFICIENCY, EFFICIENCY_IN_HALF = 0.7, 0.35
ACTIVATION_BYTES = 1_206_000  # a token, as meter.measure_step counts a LoRA step
LABEL_BYTES = 3 * 4 * VOCABULARY  # a label: logits, their softmax and their gradient

ROW_TOKENS, ROW_LABELS = 73, 27  # mean of a row of the task orders, chat template
FEW_SHOT_TOKENS = 459  # of its prompt with eight examples
GENERAL_TOKENS = 8 * 256  # that evaluation.general_losses reads
TIMED_STEPS = 110  # one-token steps of timing.against_first, for one row of the table


@dataclass(frozen=True)
class Sizes:
    """Mean tokens of a task's rows; by default of the task orders."""

    tokens: float = ROW_TOKENS  # of a training row
    labels: float = ROW_LABELS  # of these, with a loss: the answer
    few_shot: float = FEW_SHOT_TOKENS  # of a prompt with examples


ORDERS = Sizes()


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrix products with so many rows at once."""

    many: float  # 600: a training step, a prompt
    some: float  # 32: a batch of answers
    one: float  # 1: a chat
    efficiency: float = EFFICIENCY  # share of them that whole steps reach


def measured_rates(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    seconds: float = 0.4,
) -> Rates:
    """The calibration: `seconds` for each of three sizes."""
    sizes = (600, 32, 1)
    rates = (measured_rate(device, rows, seconds, dtype) for rows in sizes)
    return Rates(*rates, EFFICIENCY if dtype.itemsize >= 4 else EFFICIENCY_IN_HALF)


def reading_flops(tokens: float, labels: float) -> float:
    """One forward pass, with logits at `labels` positions."""
    return 2 * (LAYERS * tokens + HEAD * labels)


def step_flops(rows: int, *, full: bool, sizes: Sizes = ORDERS) -> float:
    """One training step on rows of a task."""
    read = reading_flops(rows * sizes.tokens, rows * sizes.labels)
    return (3 if full else 2) * read


def step_bytes(rows: int, *, full: bool, sizes: Sizes = ORDERS) -> float:
    """Peak bytes of one such step in float32: at the end of forward, or of backward.

    weights + optimizer + max(activations, gradients)
    """
    trained = LAYERS + HEAD if full else LORA
    weights = 4 * (LAYERS + HEAD + (0 if full else LORA))
    a_row = sizes.tokens * ACTIVATION_BYTES + sizes.labels * LABEL_BYTES
    activations = rows * a_row
    return weights + adamw_bytes(trained, 0) + max(activations, 4 * trained)


def checkpoint_bytes(*, full: bool) -> int:
    """Most on disk at once: two checkpoints and one being written; weights, moments."""
    trained = LAYERS + HEAD if full else LORA
    return (KEPT + 1) * (4 * trained + adamw_bytes(trained, 0))


def step_seconds(
    rates: Rates, rows: int, *, full: bool, sizes: Sizes = ORDERS
) -> float:
    return step_flops(rows, full=full, sizes=sizes) / (rates.efficiency * rates.many)


def answer_seconds(
    rates: Rates, rows: int, prompt_tokens: float, sizes: Sizes = ORDERS
) -> float:
    """To answer so many rows of a task, in batches of 32."""
    reading = reading_flops(rows * prompt_tokens, rows)
    writing = reading_flops(rows * sizes.labels, rows * sizes.labels)
    return (reading / rates.many + writing / rates.some) / rates.efficiency


def chat_tokens_a_second(rates: Rates) -> float:
    return rates.efficiency * rates.one / reading_flops(1, 1)


def train_seconds(rates: Rates, steps: int, rows: int, *, full: bool) -> float:
    """`train`: its steps, and 100 test rows answered before and after."""
    answers = 2 * answer_seconds(rates, 100, ROW_TOKENS - ROW_LABELS)
    return steps * step_seconds(rates, rows, full=full) + answers


def compare_seconds(rates: Rates, plan: Plan, sizes: Sizes = ORDERS) -> float:
    """`compare`: training, answers, general text before and after, and timing."""
    reading = reading_flops(GENERAL_TOKENS, GENERAL_TOKENS) / (
        rates.efficiency * rates.many
    )
    timing = TIMED_STEPS / chat_tokens_a_second(rates)
    total = reading
    for candidate in plan.chosen():
        once = _answering(rates, candidate, plan.rows, sizes) + timing
        if candidate.trains:
            once += _training(rates, candidate, plan, sizes) + reading
        total += once * (len(plan.seeds) if candidate.trains else 1)
    return total


def tuning_seconds(rates: Rates, plan: Plan, sizes: Sizes = ORDERS) -> float:
    """The search of all settings: every run trains, where it does, and answers."""
    total = 0.0
    for candidate in plan.chosen():
        once = _answering(rates, candidate, tuning.ROWS, sizes)
        if candidate.trains:
            once += _training(rates, candidate, plan, sizes)
        total += tuning.fewest_runs(candidate) * once
    return total


def _answering(rates: Rates, candidate: Candidate, rows: int, sizes: Sizes) -> float:
    """The examples of few-shot are read once, for all rows."""
    alone = sizes.tokens - sizes.labels
    shared = sizes.few_shot - alone if candidate.few_shot else 0
    return answer_seconds(rates, rows, alone, sizes) + _reading(rates, shared)


def _reading(rates: Rates, tokens: float) -> float:
    return reading_flops(tokens, 1) / (rates.efficiency * rates.many)


def _training(rates: Rates, candidate: Candidate, plan: Plan, sizes: Sizes) -> float:
    full = candidate.method == "full"
    step = step_seconds(rates, plan.batch, full=full, sizes=sizes)
    return plan.steps_of(candidate) * step


def duration(seconds: float) -> str:
    """Two digits, in the unit that suits: 0.42 s, 75 s, 12 min, 3.1 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.6 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} s"
