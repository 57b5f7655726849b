"""NF4: weights in four bits, bit for bit those of bitsandbytes, in a little torch.

A float32 weight takes 32 bits. Four bits a weight are enough to keep a model's answers,
if the sixteen values are chosen well and if each block of 64 weights stores its own
scale, the largest absolute value. Read spec.py first: it is the whole algorithm.

    spec      quantize and dequantize, one statement an equation              spec.py
    codes     sixteen values in [-1, 1], and where they come from             codes.py
    blocks    the same arithmetic as the spec, fast: what the library calls   blocks.py
    double    the scales of the blocks, in 8 bits: in 32 they would be an     double.py
              eighth of all bytes
    linear    a projection in four bits, dequantized for one product at a     linear.py
              time; a whole model of such projections
    keeping   weights that stay dequantized while a model answers, within    keeping.py
              a budget of bytes
    affine    for comparison: four bits with two constants a block            affine.py

The scales take 32 / 64 bits a weight, so a weight takes 4.5 bits. With double
quantization the scales take 8 / 64 + 32 / (64 · 256) bits, and a weight 4.127.
Gradients pass through the products with the dequantized weight; the codes never train.

nf4.save and nf4.load write and read a model in four bits. They are in the room above,
files/quantized.py, since they know whole models; the package makes them available here.
What knows of models imports transformers, and is imported when it is asked for.

Source  Dettmers et al., arXiv:2305.14314v1, sections 2 and 3
"""

from ..common import lazy
from .affine import Affine
from .blocks import Quantized, dequantize, quantize
from .codes import CODES, normal_float

OF_MODELS = lazy.homes(
    {
        "nf4.linear": (
            "NF4Linear",
            "dequantize_model",
            "quantize_model",
            "share_buffer",
        ),
        "nf4.keeping": ("Unpacked", "unpacked"),
        "files.quantized": ("load", "save"),
    }
)

__all__ = [
    "CODES",
    "Affine",
    "Quantized",
    "dequantize",
    "normal_float",
    "quantize",
    *OF_MODELS,
]

__getattr__, _, _ = lazy.names({}, OF_MODELS)
