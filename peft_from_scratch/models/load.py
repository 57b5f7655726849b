"""Load a base model: one with a short name, any hub id, or any local folder.

A named model needs no model hub: `smollm2` (smollm2.py) is the default everywhere, and
`tiny` (tiny.py) is a toy that ships with the repository, for sweeps over many seeds.
Only safetensors are read, and no code that comes with a model is ever run.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
)
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..common import check, records
from ..common.quiet import quiet_transformers
from ..core.adapter import vocabulary
from ..core.counting import count
from ..files import quantized
from ..files.pretrained import whole_model
from . import minilm, smollm2, speed, tiny

DTYPES = {
    name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")
}
AUTO = "auto"  # the dtype in which the device is fastest


@dataclass(frozen=True)
class Named:
    """A base model with a short name."""

    folder: Callable[..., Path]  # makes it where it is not there; takes every_byte
    published_as: str  # what a saved adapter names as its base


NAMED = {
    "smollm2": Named(smollm2.folder, "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "tiny": Named(tiny.folder, tiny.PUBLISHED_AS),
}


def load_model(
    name: str | Path = "smollm2",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, in eval mode, on its device.

    Args
        name    "smollm2" or "tiny"; a hub id, owner/name; or the path of a folder. One
                with a model in four bits, nf4.save's or bitsandbytes', gives NF4Linear
                projections
        device  "cpu", "cuda", "cuda:1", "mps"; None: see pick_device
        dtype   of the weights: a torch.dtype or its name, float32, bfloat16, float16
                or float64. "auto": bfloat16 where the device multiplies much faster in
                it, else float32 (speed.py). None: float32 everywhere, so that results
                compare
    Returns  (model, tokenizer). `model.pfs_vocab_size` is the number of rows of its
             input embedding, by which save() notices a vocabulary resized since
    Raises   ValueError       no such name, device or dtype; an adapter's folder; a
                              checkpoint that leaves tensors random
             ConnectionError  it is not on this machine and cannot be fetched
             OSError          the cache cannot be written, or the folder not read; it
                              holds no tokenizer
    Memory   parameters x itemsize bytes
    Note     tokenizer.pad_token may be the end token (for smollm2 it is): mask padding
             by the attention mask, never by comparing token ids
    """
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    source, local = _locate(name)
    options = {"local_files_only": local, "trust_remote_code": False}
    with quiet_transformers(), _clear_about_hub(source, local):
        model = _model(source, dtype, options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if name in NAMED:
        model.name_or_path = model.config._name_or_path = NAMED[name].published_as
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.pfs_vocab_size = vocabulary(model)
    return model.to(device).eval(), tokenizer


def _model(source: str, dtype: torch.dtype, options: dict) -> nn.Module:
    folder = Path(source)
    if (folder / quantized.CONFIG).is_file() and quantized.is_four_bit(folder):
        _refuse_no_tokenizer(folder)
        return quantized.load(folder, dtype=dtype)
    # transformers looks for an adapter too
    of_adapter = {"local_files_only": options["local_files_only"]}
    return whole_model(
        source, dtype=dtype, use_safetensors=True, adapter_kwargs=of_adapter, **options
    )


def prepare() -> None:
    """Have every named model, and the weights that lessons look at, on this machine.

    For set-up, so that lessons need no network. An existing copy is read to the last
    byte, and converted again if a byte is wrong.
    """
    for folder in (*(named.folder for named in NAMED.values()), minilm.folder):
        folder(every_byte=True)


def describe(model: nn.Module) -> str:
    """One line for the head of a run: which base, how large, where, in which dtype."""
    name = model.config._name_or_path or type(model).__name__
    dtype = dtype_name(model.dtype)
    return f"{name}, {count(model).total:,} parameters, {model.device}, {dtype}"


def dtype_name(dtype: str | torch.dtype) -> str:
    """As configurations and the command line write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def devices() -> list[torch.device]:
    """Every device of this machine, the one to prefer first."""
    cuda = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    mps = [torch.device("mps")] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, torch.device("cpu")]


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; else the best that is here: cuda, then mps, then cpu.

    Raises  ValueError  it is not here; the message names those that are
    """
    here = devices()
    if device is None:
        return here[0]
    with suppress(RuntimeError):  # raised for what is no device's name at all
        asked = torch.device(device)
        if any((d.type, d.index or 0) == (asked.type, asked.index or 0) for d in here):
            return asked
    names = ", ".join(map(str, here))
    raise ValueError(f"device={str(device)!r} is not here; here are {names}")


def pick_dtype(
    dtype: str | torch.dtype | None = None, device: torch.device | None = None
) -> torch.dtype:
    """The dtype, or the one of that name; float32 for None.

    Args
        device  for "auto": the one that shall be fast; None: pick_device's
    Raises  ValueError  none that weights can be loaded in; the message names those
    """
    if dtype == AUTO:
        return speed.fast_dtype(device or pick_device()).dtype
    name = "float32" if dtype is None else dtype_name(dtype)
    check.one_of("dtype", name, (AUTO, *DTYPES))
    return DTYPES[name]


def _locate(name) -> tuple[str, bool]:
    """(what to give from_pretrained, whether to keep it from looking beyond here)."""
    if name in NAMED:
        return str(NAMED[name].folder()), True
    folder = Path(name).expanduser()
    if folder.is_dir():
        _refuse_adapter(folder)
        return str(folder), True
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        return str(name), not _on_hub(str(name))
    near = difflib.get_close_matches(str(name), NAMED, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(
        f"no model is called {str(name)!r}{hint}. Allowed: {', '.join(NAMED)}; a hub "
        "id, which has the form owner/name; or the path of a folder that exists"
    )


def _refuse_adapter(folder) -> None:
    """transformers would quietly load the adapter's base, with peft's modules on it."""
    file = folder / "adapter_config.json"
    if file.exists():
        base = records.read_object(file).get("base_model_name_or_path")
        raise ValueError(
            f"{folder} holds an adapter, not a model: load its base ({base}), then the "
            f"adapter onto that with load(model, {str(folder)!r})"
        )


def _refuse_no_tokenizer(folder) -> None:
    """transformers would make an empty one for some models, and say nothing."""
    if not any(re.search("token|vocab", file.name) for file in folder.iterdir()):
        raise OSError(
            f"{folder} holds a model and no tokenizer: save it with nf4.save(model, "
            "folder, tokenizer), or take the model alone with nf4.load(folder)"
        )


def _on_hub(name: str) -> bool:
    """Whether the hub answers for this id: one request, not a minute of retries.

    False where it cannot be reached; a copy in the hub client's cache may still do.
    """
    try:
        config = huggingface_hub.hf_hub_url(name, "config.json")
        huggingface_hub.get_hf_file_metadata(config, timeout=10)
    except GatedRepoError:
        return True  # transformers will say where to ask for access
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name!r} is no folder here and no model on the hub, unless a private"
            " one; for that, log in with `hf auth login`"
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(
            f"{name!r} on the hub has no config.json, so it is no transformers model; "
            "if it is an adapter, load its base and then the adapter's folder onto that"
        ) from error
    except Exception:  # httpx's or requests', by the hub client's version
        return False
    return True


@contextmanager
def _clear_about_hub(source: str, local: bool) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if os.path.isdir(source) or not local:
            raise
        raise ConnectionError(
            f"{source!r} is no folder here and is not in the hub client's cache, and "
            f"{huggingface_hub.constants.ENDPOINT} cannot be reached. Check the "
            "network (HTTPS_PROXY, HF_ENDPOINT, HF_HUB_OFFLINE), give a folder with "
            f"a model, or take one that needs no hub: {', '.join(NAMED)}"
        ) from error
