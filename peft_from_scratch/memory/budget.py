"""The memory bill of a training step, predicted from a config.json, offline.

    bill(read_config("smollm2"), Setup(method="lora", batch=8, length=512))

    weights    frozen ones and trained ones; QLoRA's projections as NF4 has them
               (formulas.nf4_bytes), its embedding, norms and head as they are
    gradients, master copy, optimizer
               so many bytes a trained parameter: setups.py has the table
    activations
               a formula (activations.py) or a measurement on the meta device; the bill
               says which
    logits     12 bytes · label tokens · vocabulary: log-softmax in float32, the
               gradient of the loss by it, and the gradient of the logits

ZeRO over N ranks divides optimizer and master copy by N from stage 1 on, gradients from
stage 2 on, weights in stage 3, frozen ones too (arXiv:1910.02054, section 3).

The parts add up to a total. They are not all there at one moment: the peak, which has
to fit, is the largest moment of the step (timeline.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from . import timeline
from .phases import Moments, before_learning
from .pieces import BY_FORMULA, LOGITS, lasting_bytes, pieces_of
from .setups import LEARNING, RECIPES, Setup
from .timeline import Pieces
from .weighing import Weighed, weigh

NOT_COUNTED = (
    "CUDA's context and libraries, and workspaces inside kernels",
    "what the allocator rounds up or cannot reuse (fragmentation)",
    "communication buffers of NCCL",
    "the Python process, the tokenizer and the data",
)


@dataclass(frozen=True)
class Budget:
    """A bill. Bytes on one device.

    parts          {weights, gradients, optimizer, master, activations, logits,
                   adapter}; keys_and_values as well where answers are generated,
                   reference where DPO or group sampling needs a second model
    moments        {moment: {part: bytes}}: timeline.py
    low, high      the peak where implementations differ: `because` says in what
    transients     {what: bytes} of temporaries
    way            how activations were had: BY_FORMULA or MEASURED
    weighed        what trains and what is frozen, on all ranks together
    not_counted    sentences
    """

    setup: Setup
    parts: dict[str, int]
    moments: dict[str, dict[str, int]]
    low: int
    high: int
    because: tuple[str, ...]
    transients: dict[str, int]
    way: str
    weighed: Weighed
    not_counted: tuple[str, ...]

    @property
    def total(self) -> int:
        """The sum of the parts, which are not all there at one moment."""
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        """The largest sum at one moment."""
        return timeline.peak(self.moments)[1]


def bill(
    config: PretrainedConfig, setup: Setup, weighed: Weighed | None = None
) -> Budget:
    """Predict the bytes of a step of this model, on one device.

    Args
        weighed  weigh(…) of the same model, method and options, if it is known already
    Raises   ValueError  an option that the method lacks; a model that the method cannot
             adapt, or that cannot run without numbers
    """
    recipe = RECIPES[setup.dtype]
    if weighed is None:
        how = recipe.base, setup.attention
        weighed, _ = weigh(config, setup.method, setup.options, *how)
    lasting = lasting_bytes(setup, recipe, weighed)
    if setup.phase not in LEARNING:
        return _forward_only(config, setup, recipe, weighed, lasting)
    pieces, way = pieces_of(config, setup, recipe, weighed, lasting)

    def moments_of(pieces: Pieces) -> Moments:
        learning = timeline.moments(pieces)
        first = before_learning(config, setup, recipe, weighed, pieces.lasting)
        return {"loading": learning["loading"]} | first | learning

    moments = moments_of(pieces)
    low, high, because = _range(recipe, weighed, pieces, moments_of)
    return Budget(
        setup=setup,
        parts={
            "weights": lasting["weights"],
            "gradients": pieces.gradients,
            "optimizer": lasting["optimizer"],
            "master": lasting["master"],
            "activations": pieces.kept,
            "logits": pieces.logits,
            "adapter": lasting["adapter"],
            **_of_phase(lasting, moments),
        },
        moments=moments,
        low=low,
        high=high,
        because=because,
        transients={
            "loading, beside the weights": pieces.loading,
            "a layer's backward pass": pieces.passing,
            "a layer made again": pieces.again,
            "a dequantized weight": pieces.buffer,
            "a tied weight's second gradient": pieces.embedding,
            "layers gathered by ZeRO-3": pieces.gathered,
            "gradients on their way": pieces.bucket,
            "the optimizer's temporaries": pieces.update,
        },
        way=way,
        weighed=weighed,
        not_counted=_not_counted(config, setup, weighed),
    )


def _of_phase(lasting: dict, moments: Moments) -> dict[str, int]:
    """What DPO and group sampling have besides: a reference, keys and values."""
    cache = max(at.get("keys_and_values", 0) for at in moments.values())
    more = {"reference": lasting["reference"], "keys_and_values": cache}
    return {part: size for part, size in more.items() if size}


def _range(recipe, w: Weighed, pieces: Pieces, moments_of: Callable):
    """(low, high, what makes the difference)"""
    lasting = pieces.lasting
    scores = pieces.logits // LOGITS
    alone = lasting | {"reference": 0}
    fused = recipe.compute * scores
    least = replace(pieces, lasting=alone, update=0, logits=fused)
    most = replace(
        pieces,
        update=4 * (w.own + w.added),
        logits=pieces.logits + recipe.compute * scores,
        loading=lasting["weights"] + lasting["reference"],
    )
    ends = (timeline.peak(moments_of(p))[1] for p in (least, most))
    read = ", and what the reference says, computed beforehand"
    return *ends, (
        "low: a fused optimizer, and a fused loss without float32 logits"
        + (read if lasting["reference"] else ""),
        "high: an optimizer that updates all tensors at once (foreach), a loss that "
        "keeps the model's logits, and a model that is loaded twice",
    )


def _forward_only(config, setup, recipe, w: Weighed, lasting) -> Budget:
    """The bill of one forward pass without saved tensors, or of generating."""
    first = before_learning(config, setup, recipe, w, lasting)
    moments = {"loading": timeline.loading(lasting, w.tensor)} | first
    parts = dict.fromkeys(("gradients", "optimizer", "master"), 0)
    parts |= {"weights": lasting["weights"], "adapter": lasting["adapter"]}
    for part in ("activations", "logits", "keys_and_values"):
        parts[part] = max(at.get(part, 0) for at in first.values())
    peak = timeline.peak(moments)[1]
    transients = max(at.get("transients", 0) for at in first.values())
    return Budget(
        setup=setup,
        parts=parts,
        moments=moments,
        low=peak,
        high=peak + lasting["weights"] - min(w.tensor, lasting["weights"]),
        because=("high: a model that is loaded twice",),
        transients={"loading": w.tensor, "in a pass": transients},
        way=BY_FORMULA,
        weighed=w,
        not_counted=_not_counted(config, setup, w),
    )


def _not_counted(config, setup: Setup, w: Weighed) -> tuple[str, ...]:
    """What is left out, and what a reader might take for counted."""
    lines = list(NOT_COUNTED)
    if setup.method == "pissa":
        lines.append("PiSSA's copies of the original weights, which remove() needs")
    if setup.method == "qlora":
        lines.append(
            "the 16-bit base, where the model is loaded whole before it is quantized"
        )
    if setup.method == "qlora" and w.active < w.total:
        lines.append(
            "experts in four bits: a layer has them in one stacked tensor, which stays "
            "as it is"
        )
    if getattr(config, "attention_dropout", 0):
        lines.append("dropout in attention (attention_dropout)")
    if w.active < w.total:
        lines.append("uneven loads of experts: tokens are taken to spread evenly")
    return tuple(lines)
