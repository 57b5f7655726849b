"""A quantized model on disk, in the layout that transformers and bitsandbytes read.

    config.json          the model's own, with what bitsandbytes needs to know;
                         generation_config.json and, if given, a tokenizer beside it
    model.safetensors    <module>.weight                   (n / 2, 1) uint8, packed
                         <module>.weight.absmax            constants, in 32 or 8 bits
                         <module>.weight.quant_map         (16,) the code book
                         <module>.weight.nested_absmax, .nested_quant_map   with double
                         <module>.weight.quant_state.bitsandbytes__nf4      JSON, bytes

`save` writes it and `load` reads it, ours or another program's, with equal bits, and
without ever holding a weight in full. A file from a stranger is hostile until proven
otherwise: every shape, size and number is checked before a module is made of it.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from ..common import atomic
from ..common.check import is_finite, is_whole, shortened
from ..common.quiet import quiet_transformers
from ..core import adapter
from ..core.adapter import is_transposed, replace_modules, sizes
from ..core.targets import PROJECTIONS, unwrapped
from ..nf4.blocks import DTYPES, Quantized
from ..nf4.codes import book
from ..nf4.double import BLOCK, DoubleQuantized
from ..nf4.linear import NF4Linear, share_buffer
from .untrusted import LARGEST_BLOCK, parse_json, read_json, read_safetensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"
STATE = "quant_state.bitsandbytes__"
CPU = torch.device("cpu")
IN_FILES = ("nf4", "fp4")  # the code books that bitsandbytes has
DTYPE = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def save(
    model: nn.Module,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a quantized model of transformers to a folder, whole or not at all.

    Args
        tokenizer  written beside it; then load_model(directory) gives both
    Raises  ValueError  adapters on the model, nothing quantized in it, or something
            that the layout has no place for: another code book or another recipe
    """
    model = unwrapped(model)
    if adapter.is_injected(model):
        raise ValueError(
            f"this {type(model).__name__} carries adapters: save those with "
            "peft_from_scratch.save(model, dir), and the model after remove()"
        )
    modules = _quantized_modules(model)
    if not modules:
        raise ValueError(
            f"this {type(model).__name__} has nothing in four bits: quantize_model() "
            "it first, or use its own save_pretrained()"
        )
    tensors = _unquantized_tensors(model, modules)
    for name, module in modules.items():
        tensors |= {f"{name}.{key}": t for key, t in _tensors_of(name, module).items()}
    quantization = {"quantization_config": _quantization_config(model, modules)}
    config = model.config.to_dict() | quantization
    atomic.sweep(directory)
    with TemporaryDirectory() as others:
        with atomic.clear_about_disk(others):
            for part in (model.generation_config, tokenizer):
                if part is not None:
                    part.save_pretrained(others)
        beside = sorted(path.name for path in Path(others).iterdir())
        with atomic.new_files(directory, (CONFIG, WEIGHTS, *beside)) as new:
            shutil.copytree(others, new, dirs_exist_ok=True)
            save_file(tensors, new / WEIGHTS, {"format": "pt"})
            text = json.dumps(config, indent=2, sort_keys=True, default=str)
            (new / CONFIG).write_text(text + "\n", encoding="utf-8")


def load(
    directory: str | Path, device: str | torch.device = "cpu", dtype=None
) -> nn.Module:
    """The quantized model of a folder, in eval mode, codes and constants bit for bit.

    Args
        dtype  of what is not quantized; None for that of the config. Codes have none
    Raises   FileNotFoundError  a file is not there
             ValueError         a file that is broken, incomplete or not four-bit, or a
             tensor that does not fit the model; the message names it
    Memory   the model as it is on disk; no weight is ever held in full
    """
    directory = Path(directory)
    tensors = _read_tensors(directory)
    _refuse_not_four_bit(directory)
    with quiet_transformers(), _without_memory():
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype or config.dtype or torch.float32
        )
        if (directory / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
    model.config.name_or_path = str(directory)
    _load_quantized(model, tensors)
    _load_unquantized(model, tensors, dtype)
    return model.requires_grad_(True).to(device).eval()


def _quantized_modules(model: nn.Module) -> dict[str, NF4Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}


def _names_of_codes(modules: dict[str, NF4Linear]) -> set[str]:
    """The names of the tensors that hold codes and constants."""
    return {f"{name}.{key}" for name, m in modules.items() for key in m._buffers}


def _unquantized_tensors(model, modules) -> dict[str, Tensor]:
    """What is not in four bits, each tied tensor once."""
    inside = _names_of_codes(modules)
    tensors, pointers = {}, set()
    for name, tensor in model.state_dict().items():
        if name not in inside and tensor.data_ptr() not in pointers:
            pointers.add(tensor.data_ptr())
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def _tensors_of(name: str, module: NF4Linear) -> dict[str, Tensor]:
    """The tensors of one projection, by their names after the module's."""
    q = module.quantized
    doubled = isinstance(q.absmax, DoubleQuantized)
    if q.codebook not in IN_FILES or (doubled and q.absmax.codebook != "dynamic"):
        raise ValueError(
            f"{name}: the layout has no place for code={q.codebook!r}, "
            f"double={module.constant_codebook!r}; it knows {', '.join(IN_FILES)}, "
            "double True or False"
        )
    state = {
        "quant_type": q.codebook,
        "blocksize": q.block,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    tensors = {
        "weight": q.packed[:, None],
        "weight.absmax": q.absmax.codes if doubled else q.absmax,
        "weight.quant_map": book(q.codebook, CPU).values,
    }
    if doubled:
        state |= {
            "nested_blocksize": BLOCK,
            "nested_dtype": "float32",
            "nested_offset": q.absmax.offset.item(),
        }
        tensors["weight.nested_absmax"] = q.absmax.nested_absmax
        tensors["weight.nested_quant_map"] = book("dynamic", CPU).values
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"weight.{STATE}{q.codebook}"] = text
    return {key: tensor.cpu().clone() for key, tensor in tensors.items()}


def _quantization_config(model: nn.Module, modules: dict[str, NF4Linear]) -> dict:
    """The quantization_config that transformers reads."""
    first = next(iter(modules.values()))
    compute = first.compute_dtype or model.dtype
    kept = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PROJECTIONS) and name not in modules
    ]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": first.codebook,
        "bnb_4bit_use_double_quant": first.constant_codebook is not None,
        "bnb_4bit_compute_dtype": str(compute).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": kept,
    }


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files."""
    files = sorted(directory.glob("*.safetensors"))
    if not files or not (directory / CONFIG).is_file():
        raise FileNotFoundError(
            f"{directory} needs a {CONFIG} and a {WEIGHTS} (or its parts)"
        )
    tensors = {}
    for file in files:
        tensors |= read_safetensors(file)[0]
    return tensors


def is_four_bit(directory: Path) -> bool:
    """Whether the config of a folder describes a model in four bits of bitsandbytes."""
    settings = _settings(directory)
    method = settings.get("quant_method")
    return method == "bitsandbytes" and settings.get("load_in_4bit") is True


def _settings(directory: Path) -> dict:
    """The quantization_config of a folder's config; empty where there is none.

    Raises  ValueError  a config that is no JSON object
    """
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(
            f"{directory / CONFIG} holds {shortened(config)}, and no config"
        )
    settings = config.get("quantization_config")
    return settings if isinstance(settings, dict) else {}


def _refuse_not_four_bit(directory: Path) -> None:
    if not is_four_bit(directory):
        method = _settings(directory).get("quant_method")
        raise ValueError(
            f"{directory / CONFIG} describes no model in four bits of bitsandbytes "
            f"(quant_method={shortened(method)}); load_model() reads plain ones"
        )


@contextmanager
def _without_memory() -> Iterator[None]:
    """Models that are built inside have parameters without memory; buffers are real."""
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _load_quantized(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Exchange the projections that the files hold in four bits; take their tensors."""
    states = [k for k in tensors if f".weight.{STATE}" in k]
    if not states:
        raise ValueError("the files hold no projection in four bits")
    for key in states:
        name = key.partition(f".weight.{STATE}")[0]
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"this model has no {shortened(name)}, which {shortened(key)} names"
            ) from None
        q = _quantized_of(name, module, tensors)  # its bias has no memory yet
        linear = NF4Linear(q, module.bias, transposed=is_transposed(module))
        replace_modules(model, {module: linear})
    share_buffer(model)


def _quantized_of(
    name: str, module: nn.Module, tensors: dict[str, Tensor]
) -> Quantized:
    """One projection's tensors, checked against each other and against its shape."""
    key = next(k for k in tensors if k.startswith(f"{name}.weight.{STATE}"))
    state = _read_state(key, _take(tensors, key))
    code = key.rpartition("__")[2]
    shape, block, dtype = (state.get(k) for k in ("shape", "blocksize", "dtype"))
    if not isinstance(module, PROJECTIONS) or shape != list(sizes(module)):
        raise ValueError(
            f"{key}: shape={shortened(shape)} does not fit {name}: {module}"
        )
    known = state.get("quant_type") == code in IN_FILES and dtype in list(DTYPE)
    if not (is_whole(block, 1, LARGEST_BLOCK) and known):
        raise ValueError(f"{key}: {shortened(state)} is not implemented")
    shape, start = sizes(module), f"{name}.weight"  # whole numbers, and not 32.0
    n = math.prod(shape)
    packed = _take_sized(tensors, start, torch.uint8, -(-n // 2))
    _take_codebook(tensors, f"{start}.quant_map", code)
    blocks = -(-n // block)
    if "nested_offset" not in state:
        absmax = _take_sized(tensors, f"{start}.absmax", torch.float32, blocks)
    else:
        absmax = _double_quantized_of(tensors, start, state, blocks)
    return Quantized(packed, absmax, torch.Size(shape), DTYPE[dtype], block, code)


def _double_quantized_of(
    tensors, start: str, state: dict, blocks: int
) -> DoubleQuantized:
    offset = state["nested_offset"]
    fits = state.get("nested_blocksize") == BLOCK and is_finite(offset)
    if not fits or state.get("nested_dtype") != "float32":
        raise ValueError(f"{start}: {shortened(state)} is not implemented")
    _take_codebook(tensors, f"{start}.nested_quant_map", "dynamic")
    codes = _take_sized(tensors, f"{start}.absmax", torch.uint8, blocks)
    nested = f"{start}.nested_absmax"
    nested_absmax = _take_sized(tensors, nested, torch.float32, -(-blocks // BLOCK))
    offset = torch.tensor(offset, dtype=torch.float32)
    doubled = DoubleQuantized(codes, nested_absmax, offset, "dynamic")
    if not doubled.dequantize().isfinite().all():
        raise ValueError(f"{start}: its constants are not finite numbers")
    return doubled


def _read_state(key: str, text: Tensor) -> dict:
    state = parse_json(bytes(text.to(torch.uint8).tolist()), key)
    if not isinstance(state, dict):
        raise ValueError(f"{key} holds {shortened(state)}, and not a state")
    return state


def _take_sized(tensors, key: str, dtype: torch.dtype, count: int) -> Tensor:
    """The tensor of this name, flat, taken out; ValueError where it does not fit."""
    tensor = _take(tensors, key)
    if tensor.dtype != dtype or tensor.numel() != count:
        raise ValueError(
            f"{key} holds {tensor.numel()} values of {tensor.dtype}; needed are "
            f"{count} of {dtype}"
        )
    if dtype.is_floating_point and not tensor.isfinite().all():
        raise ValueError(f"{key} holds values that are not finite numbers")
    return tensor.flatten()


def _take_codebook(tensors, key: str, code: str) -> None:
    values = book(code, CPU).values
    if not torch.equal(_take_sized(tensors, key, torch.float32, len(values)), values):
        raise ValueError(f"{key} is not the code book of {code!r}")


def _take(tensors, key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"the files lack {key}")
    return tensors.pop(key)


def _load_unquantized(model: nn.Module, tensors: dict[str, Tensor], dtype) -> None:
    """Fill in what is left: embeddings, norms, heads, biases."""
    filled = _names_of_codes(_quantized_modules(model))
    expected = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in filled
    }
    values = {
        name: tensor.to(dtype) if dtype else tensor for name, tensor in tensors.items()
    }
    for name, tensor in values.items():
        if name not in expected:
            raise ValueError(
                f"the files hold {shortened(name)}, which the model has not"
            )
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, the model needs "
                f"{tuple(expected[name].shape)}"
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(
                f"{name} ({tensor.dtype}) holds values that are not finite numbers"
            )
    model.load_state_dict(values, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ValueError(f"the files lack {missing[0]} ({len(missing)} such tensors)")
