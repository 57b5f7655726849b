"""NF4: weights in four bits, bit for bit those of bitsandbytes, in a little torch.

A float32 weight takes 32 bits. Sixteen values, chosen well, take 4 a weight and keep a
model's answers, if each block of 64 weights may bring its own unit of length:

    code     sixteen values in [-1, 1]                                       codes.py
    absmax   the largest |w| of each block; w / absmax lies in [-1, 1]       blocks.py
    packed   for each weight the number of the nearest value, two a byte     blocks.py
    double   the absmax themselves in 8 bits, since 32 / 64 bit a weight     double.py
             is an eighth of all there is
    linear   a projection that holds those, and multiplies with what they    linear.py
             stand for, one layer at a time
    files    a quantized model on disk, in bitsandbytes' layout, both ways   files.py

4 + 32 / 64 = 4.5 bits a weight become 4 + 8 / 64 + 32 / (64 · 256) = 4.127 with double
quantization. Nothing of this has to do with gradients: they pass through the products
with the dequantized weight, and the codes never train.

Source  Dettmers et al., arXiv:2305.14314v1, sections 2 and 3
"""

from .affine import Affine
from .blocks import Quantized, dequantize, quantize
from .codes import CODES, normal_float
from .files import load, save
from .linear import NF4Linear, dequantize_model, quantize_model, share_buffer

__all__ = [
    "CODES",
    "Affine",
    "NF4Linear",
    "Quantized",
    "dequantize",
    "dequantize_model",
    "load",
    "normal_float",
    "quantize",
    "quantize_model",
    "save",
    "share_buffer",
]
