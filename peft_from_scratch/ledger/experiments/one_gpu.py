"""Q6: the bill of QLoRA on a 65B model, and the longest sequence that 48 GB can hold.

    fixed    weights     codes, constants, and what stays in 16 bits (constants.py)
             buffer      the largest projection, dequantized for its product
             adapters    A and B of rank 64 beside every projection
             states      AdamW's m and v, float32
    moving   gradients and activations, at the worst moment of a step: counted on a
             model without numbers (memory/meta_model.py) that takes the step at that
             length

The longest sequence is the last one whose sum fits, found by counting steps. That the
sum is right is checked where a real model can take the step: tiny and SmolLM2, in four
bits, followed tensor by tensor. (The sum has the buffer at every moment. NF4Linear lets
go of it while the logits are there, so that a real step may take that much less.)
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import nn
from transformers import LlamaConfig, PretrainedConfig

from ...core.adapter import adapters
from ...core.targets import kinds, projections
from ...memory import meta_model
from ...memory.formulas import adamw_bytes
from ...memory.meter import Meter
from ...methods import lora, qlora
from ...models.load import load_model
from ...training.loss import accumulate_gradients
from .. import runs
from ..claim import COMPUTED, Claim, Invalid, Measured, Rule
from ..runs import Run, matches
from .constants import by_formula
from .counting import SHAPES

SHAPE, RANK = "Llama-65B", 64  # [1] section 4: r = 64 on every projection
# A card of 48 GB has 48 GiB: the 3.5e9 bytes between the two are for a CUDA context,
# workspaces and the allocator's rounding, which no tensor holds.
GPU = 48_000_000_000
LENGTHS = (1024, 2048)  # tokens: counted for every variant, whatever fits
VARIANTS = {  # what the paper does, and three others
    "paper": {},
    "float32 adapters": dict(adapters="float32"),
    "no checkpointing": dict(checkpointing=False),
    "paged": dict(paged=True),  # the states are somewhere else
}
CHECKED = {"tiny": dict(r=16, length=256), "smollm2": dict(r=16, length=96)}
CLOSE = 5.0  # %, that the sum may be off a real step's


def config(**changes) -> dict:
    return {
        "experiment": "one_gpu",
        "shape": SHAPE,
        "r": RANK,
        "adapters": "bfloat16",
        "checkpointing": True,
        "paged": False,
        "gpu": GPU,
    } | changes


def check_config(base: str, checkpointing: bool) -> dict:
    return {
        "experiment": "one_gpu",
        "base": base,
        "base_digest": runs.base_digest(base),
        "adapters": "bfloat16",
        "checkpointing": checkpointing,
        "seed": 0,
        **CHECKED[base],
    }


def configs(scale: str) -> list[dict]:
    checks = [check_config(base, way) for base in CHECKED for way in (True, False)]
    return [*(config(**changes) for changes in VARIANTS.values()), *checks]


def compute(config: dict) -> dict:
    """The longest sequence that fits, or a real step beside the sum.

    Returns  for a shape: tokens (0 if none fits), fixed {weights, buffer, adapters,
             states} in bytes, moving {length: bytes}, a_token (bytes: what one more
             token takes, from the longest sequence to one twice as long)
             for a base: summed, measured: bytes without the states, which no step
             before the first has
    """
    if "base" in config:
        model, _ = load_model(config["base"], device="cpu", dtype="bfloat16")
        fixed, moving = bill(model.config, config)
        summed = sum(fixed.values()) - fixed["states"] + moving(config["length"])
        return {"summed": summed, "measured": real_peak(model, config)}
    fixed, moving = bill(LlamaConfig(**SHAPES[config["shape"]]), config)
    if config["paged"]:
        fixed["states"] = 0
    room = config["gpu"] - sum(fixed.values())
    tokens = longest(moving, room)
    ends = tokens or 1, 2 * (tokens or 1)
    return {
        "tokens": tokens,
        "fixed": fixed,
        "moving": {str(length): moving(length) for length in (*LENGTHS, *ends)},
        "a_token": (moving(ends[1]) - moving(ends[0])) / ends[0],
    }


def bill(shape: PretrainedConfig, config: dict) -> tuple[dict, Callable[[int], int]]:
    """({part: bytes} that are there all the time, length -> bytes that come and go)."""
    model = meta_model.ghost(shape)
    four_bits = by_formula(model, double=True)["formula"]
    modules = projections(model)
    buffer = max(modules[name].weight.nbytes for name in kinds(model))
    lora.inject(model, r=config["r"])
    cast(model, config["adapters"])
    if config["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for m in adapters(model).values() for p in (m.A, m.B)]
    numbers = sum(p.numel() for p in trained)
    fixed = {
        "weights": four_bits,
        "buffer": buffer,
        "adapters": sum(p.nbytes for p in trained),
        "states": adamw_bytes(numbers, len(trained)),
    }

    @lru_cache
    def moving(length: int) -> int:
        step = meta_model.bill(model, "bf16", length=length)
        return step["peak"] - step["weights"] - step["optimizer"]

    return fixed, moving


def cast(model: nn.Module, dtype: str) -> None:
    """A and B of every adapter in this dtype."""
    for module in adapters(model).values():
        for parameter in (module.A, module.B):
            parameter.data = parameter.data.to(getattr(torch, dtype))


def longest(moving: Callable[[int], int], room: int) -> int:
    """The largest length with moving(length) <= room; 0 where not one token fits.

    Between a length that fits and one that does not, the next one to try is where a
    line through both meets the room: bytes grow along a line, or nearly.
    """
    low, high = 0, 1  # fits, does not
    while moving(high) <= room:
        low, high = high, max(LENGTHS[0], 2 * high)
    while low and high - low > 1:
        share = (room - moving(low)) / (moving(high) - moving(low))
        guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        for length in (guess, guess + 1):
            if low < length < high:
                fits = moving(length) <= room
                low, high = (length, high) if fits else (low, length)
    return low


def real_peak(model: nn.Module, config: dict) -> int:
    """Bytes at the worst moment of forward and backward of a real QLoRA, on a CPU."""
    torch.manual_seed(config["seed"])
    qlora.inject(model, r=config["r"], dtype=getattr(torch, config["adapters"]))
    if config["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(model.config.vocab_size, (1, config["length"]))
    model.train()
    with Meter(model) as meter:
        accumulate_gradients(model, [{"input_ids": ids, "labels": ids}])
    return meter.memory().peak


# ----------------------------------------------------------------------- What they say


def measured(all_runs: Sequence[Run]) -> Measured:
    for run in all_runs:
        if "base" in run.config and off(run) > CLOSE:
            raise Invalid(
                f"{run.key}: the sum is {off(run):.1f} % off what a real step takes"
            )
    by_name = {
        name: next(r for r in all_runs if matches(r, **config(**changes)))
        for name, changes in VARIANTS.items()
    }
    tokens = by_name["paper"].result["tokens"]
    return Measured(tokens, tokens, tokens, (), _figures(by_name, all_runs))


def off(run: Run) -> float:
    """How far the sum is off the real step, in %."""
    return 100 * abs(run.result["summed"] / run.result["measured"] - 1)


def _figures(by_name: dict[str, Run], all_runs: Sequence[Run]) -> dict[str, str]:
    paper = by_name["paper"].result
    tokens = {name: f"{run.result['tokens']:,}" for name, run in by_name.items()}
    return {
        "tokens": tokens["paper"],
        "wide": tokens["float32 adapters"],
        "kept": tokens["no checkpointing"],
        "paged": tokens["paged"],
        "fixed": f"{sum(paper['fixed'].values()) / 1e9:.1f}",
        **{name: f"{bytes_ / 1e9:.1f}" for name, bytes_ in paper["fixed"].items()},
        "a_token": f"{paper['a_token'] / 1e6:.2f}",
        "off": f"{max(off(run) for run in all_runs if 'base' in run.config):.1f}",
    }


FITS = (
    "{weights} GB of weights, {buffer} for the dequantized one, {adapters} of adapters "
    "in bfloat16 and {states} of float32 states are {fixed} GB; gradients and "
    "activations, with gradient checkpointing, leave room for one sequence of {tokens} "
    "tokens, at {a_token} MB a token. With adapters in float32 it is {wide}, without "
    "checkpointing {kept}, with the states paged out {paged}. Counted, not run on a "
    "GPU; the same sum is within {off} % of real steps of tiny and SmolLM2"
)
CLAIMS = (
    Claim(
        id="Q6",
        notebook="09",
        statement="QLoRA fine-tunes a 65B model on one GPU of 48 GB",
        rule=Rule(
            words=(
                "The longest sequence whose training step fits into 48e9 bytes, "
                "counted: Llama-65B's projections in NF4 with double quantization, all "
                "else in bfloat16; LoRA of rank 64 on every projection in bfloat16, "
                "AdamW's states in float32 and on the GPU; one sequence a step, "
                "gradient checkpointing, attention without a (t, t) matrix. The paper "
                "trains at 512 tokens; less than 64 are of no use"
            ),
            unit="tokens",
            verdicts=(COMPUTED,),
            edges=(),
        ),
        configs=configs,
        measured=measured,
        say_instead={"computed": FITS},
        number="longest sequence that fits",
        so={
            "computed": (
                "Counted, and not run: a 65B model in four bits fits on 48 GB with one"
                " sequence of {tokens} tokens."
            ),
        },
    ),
)
