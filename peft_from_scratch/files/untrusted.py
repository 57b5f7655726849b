"""JSON and safetensors of a stranger: their content, or a ValueError that says why not.

Nothing in these two formats runs when it is read. They can still be broken, cut off, of
another kind, nested until Python's stack ends, or full of NaN. Each of that becomes one
kind of error here, so that no caller has to know what a parser raises.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common import records

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of adapters
LFS = b"version https://git-lfs"
LARGEST_BLOCK = 2**31  # values that share a constant: no weight has as many


def read_json(path: Path) -> object:
    """The value that a JSON file holds.

    Raises  ValueError  no UTF-8, no JSON, nested too deep, or a key twice
            OSError     no such file
    """
    return parse_json(path.read_bytes(), path)


def parse_json(content: bytes | str, where: object) -> object:
    """The value of a JSON text; `where` names its place in the ValueError.

    Bytes are in UTF-8, UTF-16 or UTF-32, as their first ones say.
    """
    try:
        if isinstance(content, bytes):
            encoding = json.detect_encoding(content)
            content = content if "-8" in encoding else content.decode(encoding)
        return records.parse(content)
    except ValueError as error:
        raise ValueError(f"{where} is {error}") from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file.

    Raises  ValueError  a file that cannot be read as one
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        reason = (
            "a pointer of Git LFS, git lfs pull" if _is_lfs_pointer(path) else error
        )
        raise ValueError(f"{path} is no readable safetensors file: {reason}") from None


def _is_lfs_pointer(path: Path) -> bool:
    """Whether the file only says where Git's large file storage has the real one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def refuse_unusable(tensors: Mapping[str, Tensor], where: object) -> None:
    """ValueError for a tensor of another dtype than DTYPES, or with NaN or infinity."""
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
