"""Save and load: between an injected model and an adapter folder, ours or PEFT's.

`load` reads the folder, plans the injection that its config asks for, compares the
tensors with the plan, and only then changes the model. A model that does not fit is
refused untouched. Module names come from the tensors' keys, not from patterns in the
config.
"""

import inspect
import re
import warnings
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import conversion_mapping

from ..common.check import is_whole
from ..core import adapter
from ..core.targets import (
    exact_regex,
    is_quantized,
    named_modules,
    named_parameters,
    per_module,
    shortened,
    unwrapped,
)
from ..methods.lora_config import DEFAULTS
from ..nf4 import quantize_model
from . import base_notes, formats, patterns
from .adapter_file import CONFIG, WEIGHTS, AdapterFile
from .formats import PREFIX, Format
from .untrusted import refuse_unusable

# What transformers calls its table of models whose experts were fused: PEFT reads it.
CONVERTED = "_MODEL_TO_CONVERSION_PATTERN"
FUSED = re.compile(r"\bgate_up_proj$")  # one parameter for a layer's experts
TAKEN = re.compile(r"(^|\.)(gate|gate_proj|up_proj|down_proj|w1|w2|w3)$")


def save(model: nn.Module, directory: str | Path) -> None:
    """Write the adapter, and only the adapter, to `directory`.

    Warns   UserWarning  PEFT would take the file's modules for experts of the model
    Raises  ValueError  no adapter; a tensor that is not finite; a vocabulary that was
            resized, whose new rows an adapter file would silently lose. The folder then
            holds what it held before, as it does where the disk fails
    """
    model = unwrapped(model)
    row = formats.of_method(adapter.injected(model).method)
    _refuse_resized(model)
    tensors = _written(model, row)
    refuse_unusable(tensors, "this model")
    base = getattr(getattr(model, "config", None), "name_or_path", None) or None
    fields = formats.general_fields(row.peft_type, base, task_type(model))
    config = fields | row.config(model)
    AdapterFile(config, tensors, base_notes.of_model(model)).write(directory)
    _warn_of_pefts_experts(model)


def task_type(model: nn.Module) -> str | None:
    """What PEFT calls the use of such a model; None for one that generates no text."""
    if not hasattr(model, "generate"):
        return None
    paired = getattr(model.config, "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if paired else "CAUSAL_LM"


def _warn_of_pefts_experts(model: nn.Module) -> None:
    """Say so where PEFT takes the file's projections for those of a mixture's experts.

    Since transformers 5 holds experts as one parameter, PEFT turns targets of these
    names into that parameter, whatever module is meant.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in getattr(conversion_mapping, CONVERTED, [kind]):
        return
    fused = [n for n, p in named_parameters(model) if p.dim() >= 3 and FUSED.search(n)]
    taken = [name for name in adapter.adapters(model) if TAKEN.search(name)]
    if fused and taken:
        warnings.warn(
            f"PEFT takes {taken[0]} ({len(taken)} such) of this file for experts, "
            f"{fused[0]}: it warns of missing keys and gives other logits. Here load() "
            "gives the saved ones. For PEFT, leave these modules out (exclude=…)",
            stacklevel=3,
        )


def load(model: nn.Module, directory: str | Path) -> list[str]:
    """Inject what the folder holds, ours or PEFT's, and fill it with the saved values.

    Returns  the names of the adapted modules
    Warns    UserWarning   the loaded adapter changes no logit (an untrained one), or it
             was trained beside weights in four bits, and this model has them in full,
             or in other bits
    Raises   ValueError   a broken, incomplete, superfluous, misshapen or non-finite
             file, a field that is not implemented, a model that does not fit; the model
             is then as it was
             FileNotFoundError   one of the two files is not there
    """
    return _load(model, AdapterFile.read(directory))


def load_as_trained(model: nn.Module, directory: str | Path) -> list[str]:
    """load(), on a base that is first put into the bits that the adapter knew it in.

    For a model that nobody else needs: quantizing it cannot be undone.
    """
    model = unwrapped(model)
    file = AdapterFile.read(directory)
    bits = base_notes.read_bits(file.notes.get(base_notes.BASE_BITS))
    if bits and not is_quantized(model):
        full = [exact_regex(name) for name in bits.pop("exclude", [])]
        quantize_model(model, **bits, exclude=full or None)
    return _load(model, file)


def _load(model: nn.Module, file: AdapterFile) -> list[str]:
    """Inject what a file holds and fill it with the file's values; see load."""
    adapter.refuse_synchronized(model)
    model = unwrapped(model)
    _refuse_empty(model)
    file, plan = fitting(model, file)
    parameters = _parameters(file.format, plan.adapters, _base_params(model, plan))
    before = _probe(model)
    names = adapter.apply(model, plan)
    try:
        _copy(file.tensors, parameters)
        idle = _is_idle(model, before)
    except BaseException:
        _undo(model)
        raise
    if idle:
        _warn(
            f"the adapter from {file.folder} changes no logit of this model: it is "
            "untrained, or was made for another one"
        )
    if text := base_notes.warning_of_bits(model, file.notes, file.folder):
        _warn(text)
    return names


def fitting(model: nn.Module, file: AdapterFile) -> tuple[AdapterFile, adapter.Plan]:
    """The file under the model's names, and the injection that it asks for.

    Both are checked against each other, tensor by tensor. A model without numbers (on
    meta) does as well, but for a file that holds copies of the model's own weights.

    Returns  the plan's adapters have random values, as before a training
    Raises   ValueError   as load(); the model is as it was
    """
    base_notes.refuse_other_vocabulary(model, file.notes)
    file = _without_module(model, file)
    plan = _plan(model, file)
    parameters = _parameters(file.format, plan.adapters, _base_params(model, plan))
    _refuse_misfits(model, file, parameters)
    return file, plan


def _refuse_empty(model: nn.Module) -> None:
    """ValueError for a model without weights, in which a file's would be lost."""
    adapter.refuse_unfit(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"this {type(model).__name__} is on the device meta and has no weights: "
            "the adapter's would be lost. Load the model first"
        )


def _plan(model: nn.Module, file: AdapterFile) -> adapter.Plan:
    """The injection that a file asks for; ValueError where the model does not fit."""
    arguments, modules = file.arguments(), _modules(model, file.modules)
    _refuse_larger_ranks(file, arguments, modules)
    _refuse_absent(model, file)
    targets = {"targets": modules} if file.format.by_module else {}
    return file.format.plan(model, **arguments, **targets)


def _undo(model: nn.Module) -> None:
    """Take the adapters off, and put back the originals that the injection kept."""
    originals = adapter.injected(model).originals.values()
    (adapter.unwrap_adapters if None in originals else adapter.remove)(model)


def _warn(text: str) -> None:
    """UserWarning at the line that called load()."""
    warnings.warn(text, stacklevel=4)


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Fill each parameter with the tensor of its key."""
    for key, parameter in parameters.items():
        parameter.copy_(tensors[key])


def _is_idle(model: nn.Module, before: Tensor | None) -> bool:
    """Whether the model's logits are still those of `before`; False without logits."""
    return before is not None and torch.equal(before, _probe(model))


@torch.no_grad()
def _probe(model: nn.Module) -> Tensor | None:
    """The logits of fixed tokens in eval mode; None for a model that gives none.

    Of the usual arguments, those that the model's forward has.
    """
    rows = adapter.vocabulary(model)
    if rows is None:
        return None
    modes = {module: module.training for module in model.modules()}
    ids = torch.arange(8, device=next(model.parameters()).device)[None] * 7 % rows
    try:
        usual = {"attention_mask": torch.ones_like(ids), "use_cache": False}
        known = inspect.signature(model.forward).parameters
        any_name = any(p.kind is p.VAR_KEYWORD for p in known.values())
        given = {k: v for k, v in usual.items() if any_name or k in known}
        out = model.eval()(ids, **given)
        return getattr(out, "logits", None)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _written(model: nn.Module, row: Format) -> dict[str, Tensor]:
    """{key in the file: value, on the CPU} of everything that the injection trains."""
    wrapped = adapter.adapters(model)
    values = _keys_of_base(adapter.base_parameters(model), wrapped)
    for name, module in wrapped.items():
        values |= row.written(name, module)
    return {key: _whole(value.detach()) for key, value in values.items()}


def _whole(value: Tensor) -> Tensor:
    """The tensor on the CPU; of a sharded one all parts, so that every process asks."""
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    if whole.is_meta:
        raise ValueError(
            "the adapter's values are offloaded (on meta): take accelerate's hooks off "
            "with remove_hook_from_submodules(model), then save"
        )
    return whole.cpu().contiguous()


def _parameters(
    row: Format,
    adapters: Mapping[str, nn.Module],
    base_params: Mapping[str, nn.Parameter],
) -> dict[str, nn.Parameter]:
    """{key in the file: parameter} of everything that an injection trains."""
    parameters = _keys_of_base(base_params, adapters)
    for name, module in adapters.items():
        parameters |= row.parameters(name, module)
    return parameters


def _base_params(model: nn.Module, plan: adapter.Plan) -> dict[str, nn.Parameter]:
    """The model's own parameters that a plan lets train, by name."""
    named = named_parameters(model, remove_duplicate=False)
    return {name: p for name, p in named if name in plan.base_params}


def _keys_of_base(
    base_params: Mapping[str, nn.Parameter], wrapped: Container[str]
) -> dict[str, nn.Parameter]:
    """{key in the file: parameter}; PEFT writes "base_layer" in a wrapped module."""
    keys = {}
    for name, parameter in base_params.items():
        owner, _, last = name.rpartition(".")
        stored = f"{owner}.base_layer.{last}" if owner in wrapped else name
        keys[PREFIX + stored] = parameter
    return keys


def _without_module(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """The file, without the "module." of a DataParallel that PEFT had wrapped.

    Where the model has none of its names as they are, and all of them without it.
    """
    here, extra = dict(named_modules(model)), f"{PREFIX}module."
    names = file.modules
    if not names or not all(key.startswith(extra) for key in file.tensors):
        return file
    if any(n in here or n.removeprefix("module.") not in here for n in names):
        return file
    plain = {PREFIX + k.removeprefix(extra): t for k, t in file.tensors.items()}
    return replace(file, tensors=plain)


def _modules(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The modules of these names; ValueError for one that the model has not."""
    modules = dict(named_modules(model))
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(
            f"the file adapts {shortened(unknown[0])} ({len(unknown)} such), which "
            f"this {type(model).__name__} does not have; it was made for another model"
        )
    return {name: module for name, module in modules.items() if name in names}


def _refuse_absent(model: nn.Module, file: AdapterFile) -> None:
    """ValueError where the config selects, by PEFT's rule, a module without tensors."""
    every = [name for name, _ in named_modules(model)]
    wanted, unwanted = (
        patterns.matches_field(field, file.config.get(field), every)
        for field in ("target_modules", "exclude_modules")
    )
    names = file.modules
    for name in every:
        if name in wanted and name not in unwanted and name not in names:
            other = [k for k in file.tensors if k.startswith(f"{PREFIX}{name}.")]
            but = f" (it has {other[0]}, which is not implemented)" if other else ""
            raise ValueError(
                f"{file.folder / WEIGHTS} lacks {name}, which {CONFIG} names as a "
                f"target{but}"
            )


def _refuse_larger_ranks(file: AdapterFile, arguments: Mapping, modules: Mapping):
    """ValueError where a config asks for a larger rank than the file's A has.

    Before the adapters are made: a hostile rank may be larger than the memory.
    """
    if "A" not in file.format.tensors:
        return
    usual = arguments.get("r", DEFAULTS["r"])
    pattern = arguments.get("rank_pattern")
    for name, r in per_module("rank_pattern", pattern, modules, usual).items():
        key = file.format.key(name, file.format.tensors["A"])
        shape = tuple(file.tensors[key].shape) if key in file.tensors else ()
        if shape and is_whole(r, 1) and r > shape[0]:
            raise ValueError(
                f"{file.folder / WEIGHTS}: {key} has shape {shape}, the config's rank "
                f"needs {(r, *shape[1:])}"
            )


def _refuse_misfits(model, file: AdapterFile, parameters: Mapping[str, Tensor]) -> None:
    """ValueError where the tensors are not those of the parameters, key and shape."""
    others = {k: tensor for k, tensor in file.tensors.items() if k not in parameters}
    copies = [key for key, tensor in others.items() if _is_of_base(model, key, tensor)]
    file.refuse_other_keys(parameters, ignored=copies)
    file.refuse_other_shapes(parameters, "this model and the config need")


def _is_of_base(model, key, tensor) -> bool:
    """Whether PEFT has copied a weight of the base, as it does beside an adapted head.

    One that differs is no copy: it was trained, and the file asks for another base.
    """
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    for now, before in adapter.original_names(model).items():
        if before == name:
            parameter = model.get_parameter(now)
            same = tensor.to(parameter.dtype)
            return not parameter.is_meta and torch.equal(parameter.cpu(), same)
    return False


def _refuse_resized(model: nn.Module) -> None:
    """ValueError where the vocabulary has changed since the injection or loading."""
    now = adapter.vocabulary(model)
    for then in (
        adapter.injected(model).vocabulary,
        getattr(model, "pfs_vocab_size", now),
    ):
        if now != then:
            raise ValueError(
                f"the vocabulary was resized from {then} to {now} rows; an adapter "
                "file has no place for the new rows and would lose them. Save the "
                "whole model (merge, then model.save_pretrained), or resize back"
            )
