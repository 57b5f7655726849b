"""F2: what gradient checkpointing saves of a training step, and what it costs.

    the bill   16 bytes a parameter: weights, gradients, states      the same, both ways
    the rest   L k bytes of activations, or checkpointed L i + k     and the logits
    FLOPs      6 N a token for full fine-tuning, or 8 N              LoRA: 4 N, or 6 N

A step's peak is the bill and the rest, at its worst moment. So checkpointing shortens
the part that grows with tokens, and saves much of the peak where tokens are many. From
how many on is measured: real steps of rows that double in length, each with and without
checkpointing, followed tensor by tensor.

Depth is varied in models of the same shape with random weights. Times are the
process's own, and so leave out what other programs take. They are ratios of steps that
take turns; the step without checkpointing, timed again, is their control.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from random import Random

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ...common.statistics import of_median
from ...core.adapter import trainable
from ...memory.step_bill import optimizer_class, step_bill
from ...methods import full, lora
from ...models.load import load_model
from ...training.gradient_checkpointing import checkpointed
from ...training.loss import accumulate_gradients
from .. import runs
from ..claim import SMALL_HOLDS, Claim, Invalid, Measured, Rule
from ..runs import Run, matches

LENGTHS = {"tiny": (16, 32, 64, 128, 256, 512), "smollm2": (64, 128, 256, 512, 1024)}
DEPTHS = {"tiny": (4, 8, 16, 32), "smollm2": ()}  # layers
DEEP = 256  # tokens, where the depth is varied
TIMED = {"tiny": dict(length=256, rounds=15), "smollm2": dict(length=128, rounds=9)}
METHODS = {"full": full.inject, "lora": lora.inject}
ROWS = ("weights", "gradients", "optimizer")  # of the textbook's bill
WITHOUT, WITH, AGAIN = "without", "checkpointed", "without, again"
WORTH = 10.0  # % of the step's peak
CLOSE = 1e-6  # of the gradients' norm


def config(base: str, **changes) -> dict:
    """What is asked of a run: bytes at a length and a depth, or seconds of a method."""
    return {
        "experiment": "recomputing",
        "base": base,
        "base_digest": runs.base_digest(base),
        "batch": 1,
        "seed": 0,
        **changes,
    }


def configs(scale: str) -> list[dict]:
    bytes_ = [config(scale, length=length, layers=None) for length in LENGTHS[scale]]
    deep = [config(scale, length=DEEP, layers=layers) for layers in DEPTHS[scale]]
    times = [config(scale, method=name, **TIMED[scale]) for name in METHODS]
    return [*bytes_, *deep, *times]


def compute(config: dict) -> dict:
    """One step with and without checkpointing, counted; or many of them, timed.

    Returns  {"without", "checkpointed": the bytes of step_bill, "gap": distance of the
             gradients, of their norm}; or {"seconds": {way: [of each round]}}
    """
    if "method" in config:
        model, _ = load_model(config["base"], device="cpu")
        torch.manual_seed(config["seed"])
        METHODS[config["method"]](model)
        return {"seconds": timed(model, config["length"], config["rounds"])}
    counted, gradients = {}, []
    for way in (WITHOUT, WITH):
        model = loaded(config["base"], config["layers"])
        full.inject(model)
        counted[way], own = bytes_of_step(model, way, config["length"])
        gradients.append(own)
    one, other = gradients
    return counted | {"gap": ((one - other).norm() / one.norm()).item()}


def loaded(base: str, layers: int | None) -> nn.Module:
    """The base in bfloat16; or a random model of its shape, with so many layers."""
    model, _ = load_model(base, device="cpu", dtype="bfloat16")
    if layers is None:
        return model
    shape = model.config
    shape.num_hidden_layers, shape.layer_types = layers, None
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)


def bytes_of_step(
    model: nn.Module, way: str, length: int, recipe: str = "mixed"
) -> tuple[dict[str, int], Tensor]:
    """(step_bill of a step on random tokens, its gradients in one row).

    Args
        model  injected, without states; its weights move
        way    WITHOUT or WITH
    """
    parameters = list(trainable(model).values())
    optimizer = optimizer_class(recipe)(parameters, lr=1e-5)
    model.train()
    with ways()[way](model):
        bill = step_bill(model, learning(model, length), optimizer)
    return bill, torch.cat([p.grad.float().flatten() for p in parameters])


def ways() -> dict[str, Callable]:
    """{way: the context in which a model takes its step}"""
    nothing = lambda model: nullcontext()  # noqa: E731
    return {WITHOUT: nothing, WITH: checkpointed, AGAIN: nothing}


def learning(model: nn.Module, length: int) -> Callable[[], object]:
    """A function that takes forward and backward of one row of random tokens."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=draw)
    batch = {"input_ids": ids.to(next(model.parameters()).device)}
    return lambda: accumulate_gradients(model, [batch | {"labels": batch["input_ids"]}])


def timed(model: nn.Module, length: int, rounds: int) -> dict[str, list[float]]:
    """{way: seconds of forward and backward, in each round}; the ways take turns.

    Seconds of the CPU, in this process. The first round warms up and is left out.
    """
    model.train()
    learn, dice = learning(model, length), Random(0)
    around, seconds = ways(), {way: [] for way in ways()}
    for _ in range(rounds + 1):
        for way in dice.sample(list(around), len(around)):
            start = time.process_time()
            with around[way](model):
                learn()
            seconds[way].append(round(time.process_time() - start, 6))
            for parameter in model.parameters():
                parameter.grad = None
    return {way: each[1:] for way, each in seconds.items()}


# ----------------------------------------------------------------------- What they say


def saved(result: Mapping) -> float:
    """What checkpointing saves of the step's peak, in %."""
    return 100 * (1 - result[WITH]["peak"] / result[WITHOUT]["peak"])


def activations(result: Mapping) -> float:
    """Activations and temporaries when checkpointed, in % of those without."""
    return 100 * result[WITH]["activations"] / result[WITHOUT]["activations"]


def bill_change(result: Mapping) -> float:
    """How far weights, gradients and states differ between the ways, at most, in %."""
    both = [(result[WITH][row], result[WITHOUT][row]) for row in ROWS]
    return max(100 * abs(one / other - 1) for one, other in both)


def slower(seconds: Mapping, way: str = WITH) -> tuple[float, float, float]:
    """Time of a way in units of the step without, round by round: median, interval."""
    pairs = zip(seconds[way], seconds[WITHOUT], strict=True)
    return of_median([mine / base for mine, base in pairs])


def threshold(shares: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """From how many tokens on WORTH % are saved: value, and the lengths around it.

    Args
        shares  (tokens, % saved) by rising length; between two, a line
    Raises   Invalid  the longest row does not save as much
    """
    short = [place for place, (_, share) in enumerate(shares) if share < WORTH]
    if not short:
        tokens = float(shares[0][0])
        return tokens, tokens, tokens
    at = short[-1]
    if at + 1 == len(shares):
        raise Invalid(
            f"{shares[at][0]} tokens save {shares[at][1]:.1f} % of the peak: longer "
            f"rows are needed to see where {WORTH:g} % begin"
        )
    (low, below), (high, above) = shares[at], shares[at + 1]
    part = (WORTH - below) / (above - below)
    return low + part * (high - low), float(low), float(high)


def measured(all_runs: Sequence[Run]) -> Measured:
    """Tokens of a step from which on checkpointing saves WORTH % of its peak."""
    counted = [run for run in all_runs if "layers" in run.config]
    for run in counted:
        change = bill_change(run.result)
        if change > 0.1 or run.result["gap"] > CLOSE:
            raise Invalid(
                f"{run.key}: checkpointed, the bill differs by {change:.2g} % and the "
                f"gradients by {run.result['gap']:.2g} of their norm"
            )
    rows = [run for run in counted if matches(run, layers=None)]
    rows.sort(key=lambda run: run.config["length"])
    shares = [(run.config["length"], saved(run.result)) for run in rows]
    last = rows[-1]
    figures = {
        "longest": f"{last.config['length']:,}",
        "saved": f"{shares[-1][1]:.0f}",
        "shortest": f"{shares[0][0]:,}",
        "least": f"{shares[0][1]:.0f}",
        "kept": f"{activations(last.result):.0f}",
    }
    for run in all_runs:
        if "method" in run.config:
            name, seconds = run.config["method"], run.result["seconds"]
            figures[name] = f"{slower(seconds)[0]:.2f}"
            figures[f"{name}_again"] = f"{slower(seconds, AGAIN)[0]:.2f}"
    value, low, high = threshold(shares)
    figures["tokens"] = f"{value:.0f}"
    return Measured(value, low, high, (0,), figures)


INSTEAD = (
    "The three rows of the 112 GB stay as they are: weights, gradients and states take "
    "the same bytes with checkpointing. What it saves are activations, which that bill "
    "leaves out: on {longest} tokens the largest sum of activations, logits and "
    "temporaries is {kept} % of what it was, and the step's peak falls by {saved} %; "
    "on {shortest} tokens by {least} %. The step takes {full} times as long for full "
    "fine-tuning and {lora} times for LoRA (without checkpointing, timed again: "
    "{full_again} and {lora_again})"
)
CLAIMS = (
    Claim(
        id="F2",
        notebook="02",
        statement=(
            "Gradient checkpointing reduces the memory of full fine-tuning, 112 GB for "
            "a 7B model"
        ),
        rule=Rule(
            words=(
                "The tokens of a step from which on checkpointing every layer saves a "
                "tenth of the step's peak; real steps of full fine-tuning in mixed "
                "precision, one row, its length doubled each time; the interval is the "
                "longest length that saves less and the next one; void unless weights, "
                "gradients and states take the same bytes, and the gradients are the "
                "same"
            ),
            unit="tokens",
            verdicts=SMALL_HOLDS,
            edges=(64.0, 4096.0),
        ),
        configs=configs,
        measured=measured,
        number="tokens of a step from which on a tenth of its peak is saved",
        condition=(
            "a step reads some {tokens} tokens or more at a time; the 112 GB "
            "themselves stay as they are"
        ),
        say_instead={
            "holds": INSTEAD,
            "holds when": INSTEAD,
            "does not hold here": INSTEAD,
        },
        so={
            "holds": (
                "Checkpointing saves activations, not the 112 GB; here they are most "
                "of the peak: on {longest} tokens it falls by {saved} %."
            ),
            "holds when": (
                "Checkpointing leaves the 112 GB alone. It saves activations, which "
                "matter from some {tokens} tokens a step on."
            ),
            "does not hold here": (
                "Checkpointing saves activations, and in these steps they are a small "
                "part of the peak."
            ),
        },
    ),
)
