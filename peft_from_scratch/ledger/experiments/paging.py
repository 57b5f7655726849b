"""P1: a paged optimizer gives its memory away while a long sequence needs it.

This is arithmetic on show, and no experiment that could have come out otherwise:

    absorbed = min(1, bytes of the states / bytes of the spike)

What a run shows is that the bytes are really given up, and that no weight changes.

Full fine-tuning of a small model, one sequence a step, most of them short and some
long. An ordinary AdamW has its states and a long sequence's activations at once. A
PagedAdamW lends the bytes that a long sequence takes more than a short one. (`lent` is
ours: in QLoRA, the driver of the GPU moves pages when memory runs out.)

    with optimizer.lent(activations of this one - of a short one):
        forward, backward                                  its pages have left
    step                                                   and come back, page by page

Both take the same steps from the same weights. Held are the tensors of the model, its
gradients and activations (meter.Meter) and the pages in the arena; what the paged
states take is in a file, as it would be in a host's memory beside a GPU.

    absorbed = (peak of AdamW - peak of PagedAdamW) / (its spike)         in %
    spike    = peak of AdamW - the same run's peak without long sequences

A spike that is larger than the states cannot be absorbed whole: what is not there
cannot be lent. That is the second kind of run.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from ...core.adapter import trainable
from ...memory.meter import Meter
from ...methods import full
from ...models.load import load_model
from ...paged import PagedAdamW
from ...training.loss import accumulate_gradients
from .. import runs
from ..claim import COMPUTED, Claim, Invalid, Measured, Rule
from ..runs import Run, matches

SEEDS = (0, 1, 2)
SHORT = 32  # tokens
LONG = {"within the states": 192, "beyond the states": 320}
ORDER = "ssLssLLs"  # the steps: s is a short sequence, L a long one
PAGE = 16_384  # bytes
LR = 1e-3


def config(base: str, spike: str, seed: int) -> dict:
    return {
        "experiment": "paging",
        "base": base,
        "base_digest": runs.base_digest(base),
        "spike": spike,
        "short": SHORT,
        "long": LONG[spike],
        "order": ORDER,
        "page": PAGE,
        "lr": LR,
        "seed": seed,
    }


def configs(scale: str) -> list[dict]:
    if scale != "tiny":
        return []
    return [config(scale, spike, seed) for spike in LONG for seed in SEEDS]


def compute(config: dict) -> dict:
    """Take the same steps with AdamW and with PagedAdamW.

    Returns  equal    whether every weight ends up the same, bit for bit
             held     {"adamw", "paged"}: for each step the most bytes at one moment
             states   bytes of the states
             budget   bytes of the arena, when nothing is lent
             lent     for each step, bytes
             exceeded whether the arena was ever larger than what it was allowed
             copied   bytes, both ways
    """
    model, _ = load_model(config["base"], device="cpu")
    full.inject(model)
    ids = sequences(model, config)
    other = deepcopy(model)
    parameters = list(trainable(model).values())
    ordinary = torch.optim.AdamW(parameters, lr=config["lr"], foreach=False)
    learning, peaks = [], []
    for row in ids:
        learned, updated = step_bytes(model, ordinary, row)
        states = state_bytes(ordinary)
        learning.append(learned)
        peaks.append(max(learned + states, updated))
    paged = paged_steps(other, ids, learning, states, config)
    same = zip(model.parameters(), other.parameters(), strict=True)
    return {
        "equal": all(torch.equal(a, b) for a, b in same),
        "held": {"adamw": peaks, "paged": paged.pop("held")},
        "states": states,
        **paged,
    }


def sequences(model: nn.Module, config: dict) -> list[Tensor]:
    """Random tokens: (1, length) for each step."""
    generator = torch.Generator().manual_seed(config["seed"])
    lengths = {"s": config["short"], "L": config["long"]}
    return [
        torch.randint(model.config.vocab_size, (1, lengths[kind]), generator=generator)
        for kind in config["order"]
    ]


def learn_bytes(model: nn.Module, ids: Tensor) -> int:
    """Most bytes at one moment of forward and backward, weights and gradients too."""
    model.zero_grad(set_to_none=True)
    model.train()
    with Meter(model) as meter:
        accumulate_gradients(model, [{"input_ids": ids, "labels": ids}])
    return meter.memory().peak


def step_bytes(model: nn.Module, optimizer, ids: Tensor) -> tuple[int, int]:
    """(learn_bytes, most bytes at one moment of the update, its states included)."""
    learned = learn_bytes(model, ids)
    with Meter(model) as meter:
        optimizer.step()
    return learned, meter.memory().peak


def state_bytes(optimizer) -> int:
    tensors = [t for s in optimizer.state.values() for t in s.values()]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def paged_steps(
    model: nn.Module, ids: list[Tensor], learning: list[int], states: int, config: dict
) -> dict:
    """The same steps, the arena smaller while a sequence is long."""
    page, usual = config["page"], min(learning)
    optimizer = paged_adamw(model, states, config)
    peaks, lent, exceeded = [], [], False
    for row, needed in zip(ids, learning, strict=True):
        lent.append(min(needed - usual, optimizer.budget_bytes - page))
        with optimizer.lent(lent[-1]):
            learned = learn_bytes(model, row)
            arena = arena_bytes(optimizer)
            exceeded |= arena > optimizer.budget_bytes
        with Meter(model) as meter:
            optimizer.step()
        exceeded |= arena_bytes(optimizer) > optimizer.budget_bytes
        peaks.append(max(learned + arena, meter.memory().peak))
    counters = optimizer.counters
    return {
        "held": peaks,
        "budget": optimizer.budget_bytes,
        "lent": lent,
        "exceeded": exceeded or counters.peak_resident_bytes > optimizer.budget_bytes,
        "copied": counters.bytes_in + counters.bytes_out,
    }


def paged_adamw(model: nn.Module, budget_bytes: int, config: dict) -> PagedAdamW:
    return PagedAdamW(
        list(trainable(model).values()),
        lr=config["lr"],
        budget_bytes=budget_bytes,
        page_bytes=config["page"],
    )


def arena_bytes(optimizer) -> int:
    """Of the slots in use: whole ones, whatever their pages hold."""
    rows = optimizer.page_table()
    return sum(row.resident for row in rows) * optimizer.page_bytes


# ----------------------------------------------------------------------- What they say


def absorbed(run: Run) -> float:
    """Percent of the spike; 0 where the weights are not AdamW's or a budget broke."""
    result, order = run.result, run.config["order"]
    peaks = result["held"]
    usual = max(b for b, kind in zip(peaks["adamw"], order, strict=True) if kind == "s")
    spike = max(peaks["adamw"]) - usual
    if spike <= 0:
        raise Invalid(f"{run.key}: the long sequences made no spike")
    if not result["equal"] or result["exceeded"]:
        return 0.0
    return 100 * (max(peaks["adamw"]) - max(peaks["paged"])) / spike


def measured(all_runs: Sequence[Run]) -> Measured:
    """The least that was absorbed of a spike which the states could make room for."""
    shares = {
        spike: [absorbed(r) for r in all_runs if matches(r, spike=spike)]
        for spike in LONG
    }
    within, beyond = shares.values()
    one, other = (next(r for r in all_runs if matches(r, spike=s)) for s in LONG)
    figures = {
        "within": f"{min(within):.0f}",
        "beyond": f"{min(beyond):.0f}",
        "states": _mb(one.result["states"]),
        "adamw": _mb(max(one.result["held"]["adamw"])),
        "paged": _mb(max(one.result["held"]["paged"])),
        "small": _mb(max(one.result["lent"])),
        "large": _mb(_spike(other)),
        "copied": _mb(one.result["copied"] / len(one.config["order"])),
    }
    return Measured(min(within), min(within), max(within), SEEDS, figures)


def _spike(run: Run) -> int:
    peaks = run.result["held"]["adamw"]
    return max(peaks) - min(peaks)


def _mb(bytes_: float) -> str:
    return f"{bytes_ / 1e6:.1f}"


NAMES = (
    "What absorbs the spike is a paged optimizer; PagedAttention is another thing, a "
    "cache of keys and values in a serving engine. On tiny, {within} % of a spike of "
    "{small} MB is absorbed: {paged} MB in place of {adamw}, with AdamW's weights to "
    "the last bit, for {copied} MB copied a step. The states, {states} MB, are all "
    "that can leave: of a spike of {large} MB it is {beyond} %. (The states of a LoRA "
    "are small, and so is what they can make room for)"
)
CLAIMS = (
    Claim(
        id="P1",
        notebook="09",
        statement=(
            '"Paged attention", which moves optimizer states to the CPU, absorbs '
            "memory spikes of long sequences"
        ),
        rule=Rule(
            words=(
                "Share of a memory spike that a paged AdamW absorbs, in a training of "
                "tiny whose spike is smaller than the states; the least over seeds. 0 "
                "if one weight differs from AdamW's in one bit, or the resident pages "
                "ever exceed their budget"
            ),
            unit="%",
            verdicts=(COMPUTED,),
            edges=(),
        ),
        configs=configs,
        measured=measured,
        say_instead={"computed": NAMES},
        number="share that is absorbed of a spike smaller than the states",
        so={
            "computed": (
                "A paged optimizer can free its own states for a spike, and no more. "
                "PagedAttention is something else: a cache of keys and values."
            ),
        },
    ),
)
