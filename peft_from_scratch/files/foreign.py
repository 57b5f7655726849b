"""Adapter folders as other tools leave them: names and parts put in order, or refused.

A file may have been written from inside a compiled or distributed model, with the name
of the adapter in its keys, without PEFT's prefix, or in parts. Where all keys tell the
same story, the plain names are put back. What cannot be read safely is refused with the
reason, and with what to do. A pickle is never opened: it runs code when it is read.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..common.check import shortened
from ..core.targets import INSIDE
from .formats import PREFIX, Format
from .untrusted import read_safetensors

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
PART = re.compile(r"-(\d+)-of-(\d+)$")


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of the weights' file, or of all its parts together.

    Raises  FileNotFoundError   neither is there, or not every part
            ValueError          a file that is no safetensors file, a key in two parts
    """
    if path.is_file():
        return read_safetensors(path)
    parts = sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"))
    if not parts:
        raise FileNotFoundError(
            f"{path} does not exist: {_reason_for_no_weights(path.parent)}"
        )
    _refuse_missing_parts(path, parts)
    tensors, metadata = {}, {}
    for part in parts:
        more, notes = read_safetensors(part)
        if twice := tensors.keys() & more.keys():
            raise ValueError(f"{part} holds {min(twice)}, as a part before it does")
        tensors |= more
        metadata |= notes
    return tensors, metadata


def folders_inside(folder: Path, config: str) -> str:
    """A sentence that names the folders inside that hold an adapter; "" without any."""
    inside = sorted(path.parent.name for path in folder.glob(f"*/{config}"))
    names = ", ".join(inside[:6])
    return f". It holds folders that do: {names}; name one of those" if inside else ""


def plain_keys(
    tensors: Mapping[str, Tensor], row: Format, where: object
) -> dict[str, Tensor]:
    """The tensors under the keys that PEFT's format has for them.

    Put back are: names that other tools' wrappers add, PEFT's prefix where no key has
    it or all have it twice, and keys that hold the name of one adapter.

    Raises  ValueError  several adapters in one file, or two keys that become the same
    """
    keys = {key: _without_wrappers(key) for key in tensors}
    if row.by_module or not row.tensors:
        keys = _with_one_prefix(keys)
    keys = _without_adapter_name(keys, row, where)
    if len(set(keys.values())) < len(keys):
        plain = list(keys.values())
        twice = next(key for key in plain if plain.count(key) > 1)
        raise ValueError(
            f"{where} holds {shortened(twice)} more than once, under names of other "
            "tools' wrappers: keep one of them"
        )
    return {keys[key]: tensor for key, tensor in tensors.items()}


def _reason_for_no_weights(folder: Path) -> str:
    """Why there are no weights, and what to do."""
    pickles = sorted(path.name for end in PICKLES for path in folder.glob(end))
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which runs code when it is read, and is not "
            "opened. Where it can be trusted, load it with PEFT and save_pretrained() "
            "it again: that writes safetensors"
        )
    return "the adapter has no weights"


def _refuse_missing_parts(path: Path, parts: list[Path]) -> None:
    """FileNotFoundError unless these are the parts 1 to n of n."""
    numbers = [PART.search(part.stem).groups() for part in parts]
    total = int(numbers[0][1])
    present = sorted(int(number) for number, of in numbers if int(of) == total)
    if present != list(range(1, total + 1)) or len(present) < len(parts):
        raise FileNotFoundError(
            f"{path} does not exist, and of its {total} parts only "
            f"{', '.join(part.name for part in parts[:6])} are there: add the others"
        )


def _without_wrappers(key: str) -> str:
    plain = ".".join(part for part in key.split(".") if part not in INSIDE)
    return plain.removeprefix("module.") if f"module.{PREFIX}" in plain else plain


def _with_one_prefix(keys: dict[str, str]) -> dict[str, str]:
    """{key: plain key}, each of which begins with PEFT's prefix, once."""
    root = PREFIX.partition(".")[0] + "."
    if not any(key.startswith(root) for key in keys.values()):
        return {key: PREFIX + plain for key, plain in keys.items()}
    while keys and all(plain.startswith(2 * PREFIX) for plain in keys.values()):
        keys = {key: plain.removeprefix(PREFIX) for key, plain in keys.items()}
    return keys


def _without_adapter_name(
    keys: dict[str, str], row: Format, where: object
) -> dict[str, str]:
    """{key: plain key}, without the name that PEFT gives an adapter in memory."""
    plain, names = dict(keys), set()
    for tensor in row.tensors.values():
        first, dot, last = tensor.partition(".")
        named = re.compile(rf"\.{first}\.([^.]+){dot and '[.]'}{last}$")
        if not dot:  # a parameter of its own, which PEFT holds in a module
            named = re.compile(rf"\.{first}\.([^.]+)(?:\.weight)?$")
        for key, now in keys.items():
            if (match := named.search(now)) and not now.endswith(f".{tensor}"):
                names.add(match[1])
                plain[key] = f"{now[: match.start()]}.{tensor}"
    if len(names) > 1:
        raise ValueError(
            f"{where} holds several adapters, {shortened(sorted(names))}: keep the "
            "tensors of one, as PEFT's save_pretrained() does"
        )
    return plain
