"""Parameter-efficient fine-tuning, from scratch, to be read.

Reading order: adapter.py (the contract), methods/lora.py (the method everyone uses),
methods/full.py (what it is measured against), the other methods (`ls methods` is the
syllabus), nf4/ before qlora.py, trunk.py before prompt.py and prefix.py, files/ (what
is on disk, and distrust of it), training/ (one plain loop), paged/ (its optimizer,
within a budget of bytes), compare.py (the main job), kernels/ (LoRA's product on a
GPU).
"""

from . import kernels, nf4
from .core.adapter import Adapter, CannotMerge, merge, remove, trainable
from .files import quantized
from .files.exchange import load, save
from .methods import METHODS, named
from .models.load import load_model
from .paged import PagedAdamW

nf4.save, nf4.load = quantized.save, quantized.load  # public there, written in files/

__version__ = "0.1.0"
_METHODS = [method.name for method in METHODS]
__all__ = [
    "Adapter",
    "CannotMerge",
    "PagedAdamW",
    "kernels",
    "load",
    "load_model",
    "merge",
    "nf4",
    "remove",
    "save",
    "trainable",
    *_METHODS,
]


def __getattr__(name: str):
    """pfs.lora, and so on for each method: its file, imported when first asked for."""
    if name in _METHODS:
        return named(name).module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
