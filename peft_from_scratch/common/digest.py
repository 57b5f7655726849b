"""Short numbers that tell two values, tensors or files apart."""

import hashlib
import json
import zlib
from pathlib import Path

import torch
from torch import Tensor

SAMPLE = 1024  # values of a tensor that sampled_crc reads


def digest(*parts) -> str:
    """Sixteen hexadecimal digits of SHA-256 over the parts, which JSON can hold."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tensor_crc(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes: equal bits, equal number."""
    values = tensor.detach().cpu().contiguous()
    return zlib.crc32(values.flatten().view(torch.uint8).numpy())


def sampled_crc(tensor: Tensor) -> int:
    """CRC-32 of at most SAMPLE values, evenly spaced: tells two models apart fast."""
    values = tensor.detach().flatten()
    return tensor_crc(values[:: max(1, len(values) // SAMPLE)][:SAMPLE])


def file_crc(path: Path) -> int:
    """CRC-32 of a file, read a megabyte at a time."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc
