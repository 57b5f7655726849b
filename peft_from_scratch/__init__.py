"""Parameter-efficient fine-tuning, from scratch, to be read.

Reading order: adapter.py (the contract), methods/lora.py (the method everyone uses),
methods/full.py (what it is measured against), the other methods (`ls methods` is the
syllabus), nf4/ before qlora.py, trunk.py before prompt.py and prefix.py, exchange.py
(the file format), train.py (one plain loop), paged/ (its optimizer, within a budget of
bytes), evaluate.py, compare.py (the main job), kernels/ (LoRA's product on a GPU).
"""

from . import kernels, nf4
from .core.adapter import Adapter, CannotMerge, merge, remove, trainable
from .files.exchange import load, save
from .methods import (
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
from .models.load import load_model
from .paged import PagedAdamW

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "CannotMerge",
    "PagedAdamW",
    "bitfit",
    "dora",
    "full",
    "houlsby",
    "ia3",
    "kernels",
    "load",
    "load_model",
    "lora",
    "merge",
    "nf4",
    "pissa",
    "prefix",
    "prompt",
    "qlora",
    "remove",
    "save",
    "trainable",
]
