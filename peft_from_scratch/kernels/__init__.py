"""Fused kernels in Triton, each beside its spec in torch.

Reading order: language.py (Triton or its absence, the shared pieces), lora.py (the
product and its gradients), gather.py (many adapters in one product, for serving).
"""

from .gather import Plan, Stack, gather_lora
from .language import MissingTriton, choose
from .lora import lora_linear

__all__ = [
    "MissingTriton",
    "Plan",
    "Stack",
    "choose",
    "gather_lora",
    "lora_linear",
]
