"""Temporaries inside one layer: estimates, where activations.py has exact sums.

They decide a peak where nothing else is there: with checkpointing and a small
vocabulary, or where no training keeps anything.
"""

from .shapes import Shape
from .steps import Step, Trains


def passing(shape: Shape, step: Step, trains: Trains) -> int:
    """Bytes of the temporaries in one layer's backward pass, an estimate.

    The gradients of the MLP's product and of its input are there together, or, in
    Llama's RMSNorm, four float32 copies of the hidden state. Attention that is written
    out has two gradients of its probabilities, when the MLP's tensors are gone.
    """
    s, d, f = step.itemsize, shape.d, shape.f
    size = s * (f + d) if trains.weights else 2 * s * f
    if shape.kind == "llama" and not step.checkpointing:
        size = max(size, 16 * d)
    if step.attention == "eager":
        pairs, llama = shape.heads * step.length, shape.kind == "llama"
        gone = (4 if llama else 1 + shape.gelu) * s * f
        gone += s * pairs if llama and s < 4 else 0  # probabilities in bfloat16
        size = max(size, 2 * (4 if llama else s) * pairs - gone)
    return size * step.tokens


def forward_alone(shape: Shape, step: Step) -> int:
    """Bytes of the temporaries of a forward pass that keeps nothing, an estimate.

    The residual stream, what the norm makes of it, and the MLP's widest moment: four
    tensors of f units. Attention that is written out is wider where rows are long: its
    scores are there in 16 bits and, for the softmax, twice in float32.
    """
    s = step.itemsize
    size = 4 * s * shape.f
    if step.attention == "eager":
        scores = 10 * shape.heads * step.length
        size = max(size, scores + 3 * s * shape.queries)
    return (size + 2 * s * shape.d) * step.tokens
