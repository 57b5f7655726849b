"""Fused kernels in Triton, each beside its spec in torch.

They are study objects: no layer of the library calls them, and no GPU has run them yet.
LoRA and NF4Linear use torch's own products.

Reading order: language.py (Triton or its absence, the shared pieces), lora.py (the
product and its gradients), nf4.py (the same on a weight in four bits), gather.py (many
adapters in one product, for serving). Without a GPU: trace.py counts what a launch
reads and writes, count.py has the formulas, cases.py names the launches that are
counted and compiled, gpu_targets.py compiles them, roofline.py bounds their times.
"""

from .gather import Plan, Stack, gather_lora
from .language import MissingTriton, choose
from .lora import lora_linear
from .nf4 import nf4_dequantize, nf4_lora_linear

__all__ = [
    "MissingTriton",
    "Plan",
    "Stack",
    "choose",
    "gather_lora",
    "lora_linear",
    "nf4_dequantize",
    "nf4_lora_linear",
]
