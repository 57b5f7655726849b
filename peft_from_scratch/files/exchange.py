"""Adapters on disk, in the layout of Hugging Face PEFT, both ways.

    adapter_config.json          what was injected, in PEFT's field names
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight …, nothing else

A method that PEFT lacks (bottleneck adapters, BitFit, full fine-tuning) is written in
the same layout, with a type of our own.

A file from a stranger is hostile until proven otherwise: no pickle, no code, every key,
shape and value checked before the model changes. A config field that is not implemented
and not at its default is refused by name, never ignored. Module names come from the
tensors' keys, not from patterns in the config.
"""

import json
import warnings
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..common import atomic
from ..core import adapter
from ..core.decoder import DecoderAdapter
from ..core.targets import exact_regex, is_quantized, named_modules, shortened
from ..methods import (
    bitfit,
    dora,
    full,
    houlsby,
    ia3,
    lora,
    pissa,
    prefix,
    prompt,
    qlora,
)
from ..nf4 import quantize_model
from . import patterns

# What a file can say it is -> the method that reads it, and each method by its name.
READERS = {m.PEFT_TYPE: m for m in (lora, full, houlsby, prefix, prompt, ia3, bitfit)}
OTHERS = (dora, pissa, qlora)  # written as one of those
WRITERS = {m.__name__.rpartition(".")[2]: m for m in (*READERS.values(), *OTHERS)}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
METADATA = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type"}
METADATA |= {"peft_version", "revision", "task_type"}  # say nothing about the weights
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROWS, BITS = "vocab_size", "base_bits"  # what a file notes of its base, beside tensors


def save(model: nn.Module, directory: str | Path) -> None:
    """Write the adapter, and only the adapter, to `directory`.

    Raises  ValueError  no adapter; a tensor that is not finite; a vocabulary that was
            resized, whose new rows an adapter file would silently lose. The folder then
            holds what it held before, as it does where the disk fails
    """
    model = adapter.unwrap_compiled(model)
    injection = adapter.injected(model)
    rows = _refuse_resized(model)
    method = _writer(injection.method)
    values = {
        f"{_place(name, module)}{key}": value
        for name, module in adapter.adapters(model).items()
        for key, value in module.file_tensors().items()
    } | _own_keys(model)
    tensors = {key: value.detach().cpu().contiguous() for key, value in values.items()}
    _refuse_not_finite(tensors, "this model")
    base = getattr(model, "config", None)
    config = {
        "peft_type": method.PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(base, "name_or_path", None) or None,
        "inference_mode": True,
        **method.to_peft(model),
    }
    write(directory, config, tensors, {ROWS: str(rows), BITS: qlora.base_bits(model)})


def write(
    directory: str | Path, config: dict, tensors: dict[str, Tensor], notes: dict
) -> None:
    """Write an adapter folder, whole or not at all.

    Args
        notes  what the file says of the base, as text: ROWS, BITS; None where nobody
               knows, or there is nothing to say
    """
    known = {key: text for key, text in notes.items() if text is not None}
    metadata = {"format": "pt"} | known
    atomic.sweep(directory)  # what a killed save left
    with atomic.new_files(directory, (CONFIG, WEIGHTS)) as new:
        save_file(tensors, new / WEIGHTS, metadata)
        text = json.dumps(config, indent=2, sort_keys=True)
        (new / CONFIG).write_text(text + "\n", encoding="utf-8")


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
    model = adapter.unwrap_compiled(model)
    adapter.refuse_second(model)
    directory = Path(directory)
    config = read_config(directory / CONFIG)
    method = _reader(config)
    tensors, notes = read_tensors(directory / WEIGHTS)
    qlora.read_bits(notes.get(BITS))  # refused, if need be, before the model changes
    _refuse_other_vocabulary(model, notes.get(ROWS))
    names = adapted(tensors, method)
    arguments = method.from_peft(
        {key: value for key, value in config.items() if key not in METADATA}, names
    )
    modules = _modules(model, names)
    _refuse_absent(model, config, names, tensors, directory / WEIGHTS)
    before = _probe(model)
    if method.FILE_SUFFIXES:
        arguments["targets"] = modules
    injected = method.inject(model, **arguments)
    try:
        expected = _file_keys(model)
        _refuse_mismatch(model, expected, tensors, directory / WEIGHTS)
        idle = _fill(model, expected, tensors, before)
    except BaseException:
        kept = None not in adapter.injected(model).originals.values()
        (adapter.remove if kept else adapter.unwrap_adapters)(model)
        raise
    if idle:
        warnings.warn(
            f"the adapter from {directory} changes no logit of this model: it is "
            "untrained, or was made for another one",
            stacklevel=2,
        )
    _warn_of_bits(model, directory, notes.get(BITS))
    return injected


def _warn_of_bits(model: nn.Module, directory: Path, note: str | None) -> None:
    """UserWarning where the wrapped weights are not those that were trained beside."""
    bits, here = qlora.read_bits(note), qlora.base_bits(model)
    trained = f"the adapter from {directory} was trained beside weights in"
    if bits and not here:
        error = qlora.base_error(model, **bits)
        warnings.warn(
            f"{trained} four bits ({shortened(note)}), and this model has them in full: "
            f"they differ by {error.weight:.1%} of their norm, which is "
            f"{error.update:.2g} times that of the update. For the model that was "
            "trained, nf4.quantize_model() first",
            stacklevel=3,
        )
    elif bits and bits != qlora.read_bits(here):
        warnings.warn(
            f"{trained} other bits ({shortened(note)}) than this "
            f"model's ({shortened(here)}): load its base in full, and "
            "nf4.quantize_model() it as the file says",
            stacklevel=3,
        )


def load_as_trained(model: nn.Module, directory: str | Path) -> list[str]:
    """load(), on a base that is first put into the bits that the adapter knew it in.

    For a model that nobody else needs: quantizing it cannot be undone.
    """
    model = adapter.unwrap_compiled(model)
    _, notes = read_tensors(Path(directory) / WEIGHTS)
    bits = qlora.read_bits(notes.get(BITS))
    if bits and not is_quantized(model):
        kept = [exact_regex(name) for name in bits.pop("exclude", [])]
        quantize_model(model, **bits, exclude=kept or None)
    return load(model, directory)


@torch.no_grad()
def _fill(model, expected, tensors, before: Tensor | None) -> bool:
    """Copy the tensors into the model; True where its logits are still `before`."""
    for key, parameter in expected.items():
        parameter.copy_(tensors[key])
    return before is not None and torch.equal(before, _probe(model))


def _writer(name: str) -> ModuleType:
    if name not in WRITERS:
        raise ValueError(f"adapters of the method {name!r} have no file format")
    return WRITERS[name]


def _reader(config: dict) -> ModuleType:
    """The method of a file: PEFT writes DoRA as a LoRA with one field more."""
    method = READERS[config["peft_type"]]
    return dora if method is lora and config.get("use_dora") is True else method


def _file_keys(model: nn.Module) -> dict[str, nn.Parameter]:
    """{key in the file: parameter} of everything that the injection trains."""
    return {
        f"{_place(name, module)}{key}": module.get_parameter(inner)
        for name, module in adapter.adapters(model).items()
        for inner, key in module.file_names.items()
    } | _own_keys(model)


def _place(name: str, module: adapter.Adapter) -> str:
    """What stands before the name of an adapter's tensor in a file."""
    return "" if isinstance(module, DecoderAdapter) else f"{PREFIX}{name}."


def _own_keys(model: nn.Module) -> dict[str, nn.Parameter]:
    """The same of the tensors that the model itself owns."""
    wrapped, keys = adapter.adapters(model), {}
    for name, parameter in adapter.base_parameters(model).items():
        owner, _, last = name.rpartition(".")
        stored = f"{owner}.base_layer.{last}" if owner in wrapped else name
        keys[PREFIX + stored] = parameter
    return keys


def adapted(tensors: dict[str, Tensor], method: ModuleType) -> list[str]:
    """The modules that the file's keys name."""
    names = {}
    for key in tensors:
        for suffix in method.FILE_SUFFIXES:
            if key.startswith(PREFIX) and key.endswith(f".{suffix}"):
                names[key.removeprefix(PREFIX).removesuffix(f".{suffix}")] = None
    return list(names)


def _modules(model, names) -> dict[str, nn.Module]:
    """The modules of these names; ValueError for one that the model has not."""
    found = dict(named_modules(model))
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(
            f"the file adapts {shortened(unknown[0])} ({len(unknown)} such), which this "
            f"{type(model).__name__} does not have; it was made for another model"
        )
    return {name: module for name, module in found.items() if name in names}


def read_config(path: Path) -> dict:
    """The config of a file, of a type that is known here."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist as a file: name the folder that holds {CONFIG} and "
            f"{WEIGHTS}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in READERS:
        raise ValueError(
            f"{path}: peft_type={shortened(kind)} is not implemented; known are "
            f"{', '.join(READERS)}"
        )
    return config


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, notes) of a file: finite numbers, and what was written with them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the adapter has no weights")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from None
    _refuse_not_finite(tensors, path)
    return tensors, metadata


def _refuse_not_finite(tensors, where) -> None:
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(
                f"{key} in {where} is of {tensor.dtype}; allowed are {allowed}"
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"{key} in {where} holds values that are not finite numbers"
            )


def _refuse_absent(model, config, names, tensors, path) -> None:
    """ValueError where the config selects, by PEFT's rule, a module without tensors."""
    every = [name for name, _ in named_modules(model)]
    wanted, unwanted = (
        patterns.selected(field, config.get(field), every)
        for field in ("target_modules", "exclude_modules")
    )
    for name in every:
        if name in wanted and name not in unwanted and name not in names:
            start = f"{PREFIX}{name}."
            other = [key for key in tensors if key.startswith(start)]
            but = f" (it has {other[0]}, which is not implemented)" if other else ""
            raise ValueError(
                f"{path} lacks {name}, which {CONFIG} names as a target{but}"
            )


def _refuse_mismatch(model, expected, tensors, path) -> None:
    missing = [key for key in expected if key not in tensors]
    extra = [key for key in tensors if key not in expected]
    extra = [key for key in extra if not _is_of_base(model, key, tensors[key])]
    for word, keys in (
        ("lacks", missing),
        ("holds, beyond what its config says,", extra),
    ):
        if keys:
            raise ValueError(f"{path} {word} {keys[0]} ({len(keys)} such tensors)")
    for key, parameter in expected.items():
        if parameter.shape != tensors[key].shape:
            raise ValueError(
                f"{path}: {key} has shape {tuple(tensors[key].shape)}, this model and "
                f"the config need {tuple(parameter.shape)}"
            )
        if not tensors[key].to(parameter.dtype).isfinite().all():
            raise ValueError(
                f"{path}: {key} holds values beyond the range of {parameter.dtype}"
            )


def _is_of_base(model, key, tensor) -> bool:
    """Whether PEFT has copied a weight of the base, as it does beside an adapted head.

    One that differs is no copy: it was trained, and the file asks for another base.
    """
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    for now, before in adapter.original_names(model).items():
        if before == name:
            held = model.get_parameter(now)
            return torch.equal(held.cpu(), tensor.to(held.dtype))
    return False


def _refuse_resized(model) -> int | None:
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
    return now


def _refuse_other_vocabulary(model, rows: str | None) -> None:
    now = adapter.vocabulary(model)
    if rows is not None and rows != str(now):
        raise ValueError(
            f"the adapter was trained on a vocabulary of {rows} rows, this model has "
            f"{now}: load the base model it was made for, or resize its rows"
        )


@torch.no_grad()
def _probe(model) -> Tensor | None:
    """The logits of fixed tokens in eval mode; None for a model that gives none."""
    rows = adapter.vocabulary(model)
    if rows is None:
        return None
    modes = {module: module.training for module in model.modules()}
    ids = torch.arange(8, device=next(model.parameters()).device)[None] * 7 % rows
    try:
        mask = torch.ones_like(ids)
        out = model.eval()(ids, attention_mask=mask, use_cache=False)
        return getattr(out, "logits", None)
    finally:
        for module, mode in modes.items():
            module.training = mode
