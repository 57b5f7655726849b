"""Q2, Q3: what double quantization is for, and what a model takes in four bits.

    bytes of a projection of n weights = n / 2                        the codes
                                       + 4 · n / 64                   constants, or
                                       + n / 64 + 4 · n / (64 · 256) + 4    doubled

Nothing of this concerns gradients. They pass through the product with the dequantized
weight, whichever way its constants are kept; here they are compared with those of a
model that holds the same weights as plain numbers.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from ...core.adapter import adapters, replace_modules
from ...core.targets import kinds, projections
from ...memory.meta_model import ghost
from ...methods import lora
from ...models.load import load_model
from ...nf4 import NF4Linear, quantize_model
from .. import runs
from ..claim import COMPUTED, Claim, Invalid, Measured, Rule
from ..runs import Run, matches
from . import finetune
from .counting import SHAPES

SEEDS = (0, 1, 2)
LARGE = "Llama-65B"
BLOCK = 64
SMALL = ("tiny", "smollm2")  # held in four bits, and their bytes counted
CLAIMED = {"four bits": 33.0, "fp16": 130.0}  # GB
BATCH, LENGTH = 2, 32  # random tokens that gradients are taken of
SEEN = 0.1  # %, that other weights must change a gradient at least


def gradient_config(base: str, double: bool, seed: int) -> dict:
    return {
        "experiment": "constants",
        "what": "gradients",
        "base": base,
        "base_digest": runs.base_digest(base),
        "double": double,
        "seed": seed,
    }


def bytes_config(model: str, double: bool) -> dict:
    known = {} if model in SHAPES else {"base_digest": runs.base_digest(model)}
    return {
        "experiment": "constants",
        "what": "bytes",
        "base": model,
        **known,
        "double": double,
    }


def compute(config: dict) -> dict:
    """Gradients through a model in four bits, or its bytes; see the two functions."""
    if config["what"] == "gradients":
        return gradients(config)
    if config["base"] in SHAPES:
        model = ghost(LlamaConfig(**SHAPES[config["base"]]), "float16")
        return by_formula(model, config["double"])
    model, _ = load_model(config["base"], device="cpu")
    return by_formula(model, config["double"]) | tensor_bytes(model, config["double"])


# --------------------------------------------------------------------------- Gradients


def gradients(config: dict) -> dict:
    """Gradients of a model in four bits, against those of the same weights in float32.

    Returns  error    ‖g - g'‖ / ‖g'‖ in %, over A and B of a LoRA beside every
                      projection and over the embedded tokens: g' of a model that holds
                      the dequantized weights as plain numbers
             control  the same for g' of the model before it was quantized: what
                      another weight makes of a gradient
    """
    base, _ = load_model(config["base"], device="cpu")
    packed = deepcopy(base)
    quantize_model(packed, block=BLOCK, double=config["double"])
    plain = deepcopy(packed)
    inside = {m: m.plain() for m in plain.modules() if isinstance(m, NF4Linear)}
    replace_modules(plain, inside)
    vectors = [gradient(model, config["seed"]) for model in (packed, plain, base)]
    return {
        "error": _difference(vectors[0], vectors[1]),
        "control": _difference(vectors[0], vectors[2]),
    }


def gradient(model: nn.Module, seed: int) -> Tensor:
    """All gradients of a LoRA with random A and B, and of the embedded tokens, flat."""
    torch.manual_seed(seed)
    lora.inject(model, r=4)
    finetune.randomize(model)
    trained = [p for m in adapters(model).values() for p in (m.A, m.B)]
    ids = torch.randint(model.config.vocab_size, (BATCH, LENGTH))
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [x, *trained])])


def _difference(a: Tensor, b: Tensor) -> float:
    return 100 * ((a.double() - b.double()).norm() / b.double().norm()).item()


# ------------------------------------------------------------------------------- Bytes


def four_bit_bytes(n: int, double: bool, block: int = BLOCK) -> dict[str, int]:
    """{"codes", "constants"}: bytes of n weights in four bits, whole blocks counted."""
    blocks = -(-n // block)
    constants = blocks + 4 * -(-blocks // 256) + 4 if double else 4 * blocks
    return {"codes": -(-n // 2), "constants": constants}


def by_formula(model: nn.Module, double: bool) -> dict:
    """Bytes of a model whose projections are in four bits, by the formula.

    Returns  weights    of the projections inside its layers, a number
             codes, constants    bytes of those
             rest       bytes of all other parameters, as they are
             formula    the sum of the three
             whole      bytes of all parameters as they are
    """
    modules = projections(model)
    inside = [modules[name].weight for name in kinds(model)]
    bytes_ = [four_bit_bytes(W.numel(), double) for W in inside]
    whole = sum(p.nbytes for p in model.parameters())
    parts = {
        "codes": sum(b["codes"] for b in bytes_),
        "constants": sum(b["constants"] for b in bytes_),
        "rest": whole - sum(W.nbytes for W in inside),
    }
    numbers = sum(W.numel() for W in inside)
    total = sum(parts.values())
    return {"weights": numbers, **parts, "formula": total, "whole": whole}


def tensor_bytes(model: nn.Module, double: bool) -> dict:
    """{"held": bytes}: the tensors of a model once its projections are in four bits."""
    quantize_model(model, block=BLOCK, double=double)
    packed = [m for m in model.modules() if isinstance(m, NF4Linear)]
    buffers = [b for m in packed for b in m.buffers(recurse=False)]
    return {"held": sum(t.nbytes for t in [*model.parameters(), *buffers])}


# ----------------------------------------------------------------------- What they say


def gradient_configs(scale: str) -> list[dict]:
    both = (False, True)
    known = [gradient_config(scale, double, s) for double in both for s in SEEDS]
    return known + [bytes_config(scale, double) for double in both]


def gradients_measured(all_runs: Sequence[Run]) -> Measured:
    """The error of gradients without double quantization: the largest over seeds."""
    taken = [run for run in all_runs if matches(run, what="gradients")]
    blind = [run for run in taken if run.result["control"] < SEEN]
    if blind:
        raise Invalid(f"{blind[0].key}: other weights gave the same gradients")
    errors = {
        double: [r.result["error"] for r in taken if matches(r, double=double)]
        for double in (False, True)
    }
    counted = {r.config["double"]: r for r in all_runs if matches(r, what="bytes")}
    figures = {
        "without": f"{max(errors[False]):.1g}",
        "with_it": f"{max(errors[True]):.1g}",
        "single": f"{constant_bits(counted[False]):.3f}",
        "doubled": f"{constant_bits(counted[True]):.3f}",
        "control": f"{min(run.result['control'] for run in taken):.0f}",
    }
    without = errors[False]
    return Measured(max(without), min(without), max(without), SEEDS, figures)


def constant_bits(run: Run) -> float:
    """Bits a weight that the constants take."""
    return 8 * run.result["constants"] / run.result["weights"]


def bytes_configs(scale: str) -> list[dict]:
    return [
        bytes_config(model, double)
        for model in (LARGE, *SMALL)
        for double in (True, False)
    ]


def bytes_measured(all_runs: Sequence[Run]) -> Measured:
    """How far the worse of the two figures is off, in %."""
    for run in all_runs:
        if run.result.get("held", run.result["formula"]) != run.result["formula"]:
            raise Invalid(f"{run.key}: the formula is not what the tensors hold")
    doubled, single = (
        next(r for r in all_runs if matches(r, base=LARGE, double=double)).result
        for double in (True, False)
    )
    off = {
        "four bits": doubled["formula"] / 1e9 / CLAIMED["four bits"] - 1,
        "fp16": doubled["whole"] / 1e9 / CLAIMED["fp16"] - 1,
    }
    figures = {
        "whole": _gb(doubled["whole"]),
        "total": _gb(doubled["formula"]),
        "packed": _gb(doubled["codes"] + doubled["constants"]),
        "rest": f"{doubled['rest'] / 1e9:.2f}",
        "single": _gb(single["formula"]),
    }
    value = 100 * max(map(abs, off.values()))
    return Measured(value, value, value, (), figures)


def _gb(bytes_: int) -> str:
    return f"{bytes_ / 1e9:.1f}"


BACKWARD = (
    "The claim is wrong as stated: the two have nothing to do with each other. "
    "Gradients pass through the product with the dequantized weight: without double "
    "quantization they differ by {without} % from those of a model that holds the same "
    "weights as plain numbers, with it by {with_it} % (other weights change them by "
    "{control} % or more). What double quantization does is shrink the constants, from "
    "{single} to {doubled} bits a weight"
)
COUNTED = (
    "{whole} GB in fp16 become {total} GB with double quantization and {single} GB "
    "without: {packed} GB for the projections in four bits, and {rest} GB for what "
    "stays in 16 bits, embeddings, head and norms. Adapters, gradients, optimizer "
    "and activations come on top"
)
CLAIMS = (
    Claim(
        id="Q2",
        notebook="07",
        statement=(
            "Double quantization is how one backpropagates through quantized weights"
        ),
        rule=Rule(
            words=(
                "Relative error of gradients through a model in NF4 without double "
                "quantization, against a model that holds the dequantized weights as "
                "plain numbers: those of a LoRA on every projection and of the "
                "embedded tokens, the largest over seeds. Zero by arithmetic: the "
                "gradient passes through the dequantized weight, in which no constant "
                "is left. Runs in which other weights change nothing do not count"
            ),
            unit="%",
            verdicts=(COMPUTED,),
            edges=(),
        ),
        configs=gradient_configs,
        measured=gradients_measured,
        say_instead={COMPUTED: BACKWARD},
        number="error of the gradients without double quantization",
        so={
            COMPUTED: (
                "Double quantization only shrinks the constants, from {single} to "
                "{doubled} bits a weight. Gradients pass through the dequantized "
                "weight either way."
            ),
        },
    ),
    Claim(
        id="Q3",
        notebook="07",
        statement="A 65B model takes about 130 GB in fp16 and about 33 GB with QLoRA",
        rule=Rule(
            words=(
                "Bytes of Llama-65B's parameters in fp16 against 130 GB, and with its "
                "projections in NF4 with double quantization and all else in fp16 "
                "against 33 GB, counted: the error of the worse one. The formula is "
                "what small models' tensors hold, or the runs are invalid"
            ),
            unit="%",
            verdicts=(COMPUTED,),
            edges=(),
        ),
        configs=bytes_configs,
        measured=bytes_measured,
        say_instead={"computed": COUNTED},
        number="error of the less exact of the two figures",
        so={
            "computed": (
                "65B parameters take {whole} GB in fp16 and {total} GB in NF4, of "
                "which {rest} GB stay in 16 bits."
            ),
        },
    ),
)
