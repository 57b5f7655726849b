"""L4, T1: how many parameters a method trains. Counted, not computed.

    A (r, d_in) and B (d_out, r)   r (d_in + d_out) in the place of d_in · d_out
    a prefix of n positions        n · 2 · layers · h_kv · d
    a prompt of n positions        n · d_model

The models are made on torch's meta device, which has shapes and no memory.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ...core import counting
from ...core.adapter import trainable
from ...methods import lora, prefix, prompt
from ..claim import COMPUTED, Claim, Measured, Rule
from ..runs import Run, matches

D_OUT, D_IN, RANK = 4096, 4096, 16
# T1. Llama's shapes, arXiv:2302.13971v1 table 2; SmolLM2's, from its configuration.
SHAPES = {
    "SmolLM2-135M": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "Llama-7B": dict(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    ),
    "Llama-65B": dict(
        hidden_size=8192,
        intermediate_size=22016,
        num_hidden_layers=80,
        num_attention_heads=64,
        vocab_size=32000,
    ),
}
# Positions: what Li and Liang settle on for tables and for summaries
# (arXiv:2101.00190v1, figure 4); what Lester et al. find enough and
# their default (arXiv:2104.08691v2).
POSITIONS = {"prefix": (10, 200), "prompt": (20, 100)}
BOUNDS = {"prefix": 0.1, "prompt": 0.01}  # the textbook's, in percent


def config(d_out: int = D_OUT, d_in: int = D_IN, r: int = RANK) -> dict:
    return {"experiment": "counting", "d_out": d_out, "d_in": d_in, "r": r}


def soft_config(method: str, shape: str, n: int) -> dict:
    return {"experiment": "counting", "method": method, "shape": shape, "n": n}


def compute(config: dict) -> dict:
    """Count the parameters of a LoRA on a projection, or of a soft prompt on a model.

    Returns  trainable, full (what full fine-tuning trains), percent (their ratio)
    """
    if "shape" in config:
        counted, full = count_soft(config["method"], config["shape"], config["n"])
    else:
        counted = count(config["d_out"], config["d_in"], config["r"])
        full = config["d_out"] * config["d_in"]
    return {"trainable": counted, "full": full, "percent": 100 * counted / full}


def count(d_out: int, d_in: int, r: int) -> int:
    """The parameters that a LoRA trains beside a Linear of (d_out, d_in): counted."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(d_in, d_out, bias=False))
        lora.inject(model, r=r, targets={"0": model[0]})
    return sum(parameter.numel() for parameter in trainable(model).values())


def measured(runs: Sequence[Run]) -> Measured:
    (run,) = runs
    value = run.result["trainable"]
    return Measured(value, value, value, seeds=())


def count_soft(method: str, shape: str, n: int) -> tuple[int, int]:
    """(parameters of n positions, parameters of the model they stand before)."""
    config = LlamaConfig(**SHAPES[shape])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        return SOFT[method](model.model, config, n).P.numel(), counting.count(
            model
        ).total


def _prefix(trunk: nn.Module, config: LlamaConfig, n: int) -> nn.Module:
    # Without inject, which asks the trunk for its attention by a pass through it.
    heads = config.num_key_value_heads
    return prefix.Prefix(trunk, (config.num_hidden_layers, heads, config.head_dim), n)


def _prompt(trunk: nn.Module, config: LlamaConfig, n: int) -> nn.Module:
    return prompt.Prompt(trunk, n, "random")


SOFT = {"prefix": _prefix, "prompt": _prompt}


def soft_configs(scale: str) -> list[dict]:
    return [
        soft_config(method, shape, n)
        for method, lengths in POSITIONS.items()
        for shape in SHAPES
        for n in lengths
    ]


def soft_measured(runs: Sequence[Run]) -> Measured:
    """In how many percent of the cases the share is below the textbook's bound."""
    within = [r.result["percent"] < BOUNDS[r.config["method"]] for r in runs]
    value = 100 * sum(within) / len(within)
    return Measured(value, value, value, (), _longest(runs) | _most(runs))


def _longest(runs: Sequence[Run]) -> dict[str, str]:
    """{"prefix_7": …}: the most positions within the bound; Llama-7B and SmolLM2."""
    figures = {}
    for method in SOFT:
        for short, shape in (("7", "Llama-7B"), ("smol", "SmolLM2-135M")):
            run = next(r for r in runs if matches(r, method=method, shape=shape))
            a_position = run.result["percent"] / run.config["n"]
            figures[f"{method}_{short}"] = f"{int(BOUNDS[method] / a_position)}"
    return figures


def _most(runs: Sequence[Run]) -> dict[str, str]:
    """{"prefix_most": …}: the largest share of each method, in percent."""
    shares = {
        m: [r.result["percent"] for r in runs if matches(r, method=m)] for m in SOFT
    }
    return {f"{method}_most": f"{max(of):.2g}" for method, of in shares.items()}


COUNTS = (
    "The share grows with the length. On Llama-7B, a prefix stays below its bound up "
    "to {prefix_7} positions, and a prompt up to {prompt_7} vectors. On SmolLM2, the "
    "limits are {prefix_smol} and {prompt_smol}. At the papers' longest lengths, the "
    "largest shares are {prefix_most} % and {prompt_most} %"
)
CLAIMS = (
    Claim(
        id="L4",
        notebook="04",
        statement=(
            "On a weight matrix of 4096 x 4096, LoRA of rank 16 trains 131,072 "
            "parameters, 0.78 % of the matrix"
        ),
        rule=Rule(
            words=(
                "Parameters counted in a LoRA of rank 16 beside a 4096 x 4096 layer; "
                "131,072 of 16,777,216 are 0.78 %"
            ),
            unit="parameters",
            verdicts=(COMPUTED,),
            edges=(),
        ),
        configs=lambda scale: [config()],
        measured=measured,
        number="parameters",
        so={"computed": "LoRA of rank r adds r (d_in + d_out) parameters to a matrix."},
    ),
    Claim(
        id="T1",
        notebook="12",
        statement=(
            "Prefix tuning trains less than 0.1 % of the parameters, prompt tuning "
            "less than 0.01 %"
        ),
        rule=Rule(
            words=(
                "Percent of twelve cases within the bounds, counted: a prefix of 10 "
                "and of 200 positions, a prompt of 20 and of 100, the papers' own "
                "lengths, on the shapes of SmolLM2-135M, Llama-7B and Llama-65B"
            ),
            unit="%",
            verdicts=(COMPUTED,),
            edges=(),
        ),
        configs=soft_configs,
        measured=soft_measured,
        say_instead={"computed": COUNTS},
        number="cases within the bounds",
        so={
            "computed": (
                "The share depends on the length: on Llama-7B, up to {prefix_7} "
                "positions of a prefix or {prompt_7} vectors of a prompt stay below "
                "the bounds."
            ),
        },
    ),
)
