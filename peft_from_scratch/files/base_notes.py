"""What an adapter file notes of the base model that the adapter was trained on.

    vocab_size   rows of the input embedding: an adapter for others does not fit
    base_bits    how the base's projections were quantized; nothing where they were not

An update that was trained beside 4-bit weights compensates for their rounding errors.
On the weights in full precision it gives another model, so the notes travel along. PEFT
writes no such notes, and reads over them.
"""

import json
from collections.abc import Mapping

import torch
from torch import nn

from ..common.check import shortened
from ..core import adapter
from ..core.adapter import as_matrix
from ..core.matrices import relative_error
from ..core.targets import kinds, projections
from ..methods.lora import LoRA
from ..methods.qlora import MergeError
from ..nf4 import NF4Linear, dequantize, quantize
from ..nf4.blocks import check_options
from .untrusted import LARGEST_BLOCK, parse_json

VOCAB_SIZE, BASE_BITS = NOTES = ("vocab_size", "base_bits")
UNKNOWN = "None"  # the vocabulary's size, in older files of models without one
OPTIONS = {"code", "block", "double"}  # of nf4.quantize


def of_model(model: nn.Module) -> dict[str, str]:
    """The notes that a file of this model's adapters gets."""
    notes = {VOCAB_SIZE: adapter.vocabulary(model), BASE_BITS: base_bits(model)}
    return {name: str(note) for name, note in notes.items() if note is not None}


def base_bits(model: nn.Module) -> str | None:
    """How the base's weights are quantized, as JSON; None where they are not."""
    quantized = [m for m in model.modules() if isinstance(m, NF4Linear)]
    if not quantized:
        return None
    q = quantized[0]
    bits = {
        "code": q.codebook,
        "block": q.block,
        "double": q.constant_codebook or False,
    }
    full = _kept_in_full(model, quantized)
    return json.dumps(bits | ({"exclude": full} if full else {}))


def read_bits(note: str | None) -> dict | None:
    """The arguments of nf4.quantize_model that base_bits notes; None without a note.

    Raises  ValueError  the note is none of ours
    """
    if note is None:
        return None
    try:
        bits = parse_json(note, "the note")
        _check_bits(bits)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the file notes base_bits={shortened(note)}, which is not implemented: "
            f"{error}"
        ) from None
    return bits


def refuse_other_vocabulary(model: nn.Module, notes: Mapping[str, str]) -> None:
    """ValueError where the file's vocabulary has another size than the model's."""
    noted, rows = notes.get(VOCAB_SIZE), adapter.vocabulary(model)
    if noted not in (None, UNKNOWN, str(rows)) and rows is not None:
        raise ValueError(
            f"the adapter was trained on a vocabulary of {noted} rows, this model has "
            f"{rows}: load the base model it was made for, or resize its rows"
        )


def warning_of_bits(
    model: nn.Module, notes: Mapping[str, str], source: object
) -> str | None:
    """A warning that the wrapped weights are not those that were trained beside.

    Args
        source  of the adapter, for the text
    Returns  the text; None where the weights are the same, or the file does not say
    """
    here = base_bits(model)
    text, bits = other_bits(here, notes, source), read_bits(notes.get(BASE_BITS))
    if text is None or here:
        return text
    error = base_error(model, **bits)
    return (
        f"{text}: they differ by {error.weight:.1%} of their norm, which is "
        f"{error.update:.2g} times that of the update. For the model that was "
        "trained, nf4.quantize_model() first"
    )


def other_bits(
    here: str | None, notes: Mapping[str, str], source: object
) -> str | None:
    """That an adapter was trained beside other bits than these; None where it was not.

    Args
        here  the base's bits, as base_bits says them
    """
    note = notes.get(BASE_BITS)
    bits = read_bits(note)
    trained = f"the adapter from {source} was trained beside weights in"
    if bits and not here:
        return (
            f"{trained} four bits ({shortened(note)}), and this model has them in full"
        )
    if bits and bits != read_bits(here):
        return (
            f"{trained} other bits ({shortened(note)}) than this "
            f"model's ({shortened(here)}): load its base in full, and "
            "nf4.quantize_model() it as the file says"
        )
    return None


@torch.no_grad()
def base_error(model: nn.Module, **bits) -> MergeError:
    """How far the wrapped weights are from what quantizing would make of them.

    That is the error of an update W0 + ΔW that was trained as W' + ΔW, over all wrapped
    modules together.
    """
    lost = trained = changed = 0.0
    full = bits.pop("exclude", [])
    wrapped = adapter.adapters(model)
    for module in [m for name, m in wrapped.items() if name not in full]:
        W0 = as_matrix(module.base).float()
        rounded = dequantize(quantize(W0, **bits))
        update = module.delta(torch.float32) if isinstance(module, LoRA) else 0 * W0
        lost += (W0 - rounded).square().sum().item()
        trained += (rounded + update).square().sum().item()
        changed += update.square().sum().item()
    return MergeError(
        relative_error(lost, trained) ** 0.5, relative_error(lost, changed) ** 0.5
    )


def _check_bits(bits: object) -> None:
    """ValueError or TypeError unless these are arguments of nf4.quantize_model."""
    if not isinstance(bits, dict) or set(bits) - {"exclude"} != OPTIONS:
        raise ValueError(f"needed are {', '.join(sorted(OPTIONS))}")
    excluded = bits.get("exclude", [])
    if not isinstance(excluded, list) or not all(isinstance(n, str) for n in excluded):
        raise ValueError("exclude is no list of names")
    if bits["block"] > LARGEST_BLOCK:
        raise ValueError(f"block is larger than {LARGEST_BLOCK}")
    check_options(**{name: bits[name] for name in OPTIONS})


def _kept_in_full(model: nn.Module, quantized: list[NF4Linear]) -> list[str]:
    """The layers' other projections, by their names before adapters stood there."""
    inside = projections(model)
    of_adapters = {
        module
        for wrapped in adapter.adapters(model).values()
        for name, module in wrapped.named_modules()
        if name.partition(".")[0] != "base"
    }
    full = {inside[name] for name in kinds(model)} - set(quantized) - of_adapters
    original = adapter.original_names(model)
    return [
        original[f"{name}.weight"].removesuffix(".weight")
        for name, module in model.named_modules()
        if module in full
    ]
