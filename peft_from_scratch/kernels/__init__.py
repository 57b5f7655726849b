"""Fused kernels in Triton, each beside its spec in torch.

Reading order: language.py (Triton or its absence, the shared pieces), lora.py (the
product and its gradients).
"""

from .language import MissingTriton, choose
from .lora import lora_linear

__all__ = ["MissingTriton", "choose", "lora_linear"]
