"""The moments of one training step, and what is there at each of them.

A bill that only adds up its rows is too high: gradients are complete when the
activations are gone. So the step is followed, moment by moment, and its peak is the
largest sum at one of them:

    loading             weights, and the tensor that is being read
    forward             what is there all the time, and all that autograd keeps
    loss                the same, and three float32 copies of the logits, or of a chunk
    head's gradient     the logits' gradient becomes that of the head's weight
    backward begins     one layer's temporaries; with checkpointing, that layer again
    first layer         backward is there: nearly all gradients, one layer's tensors
    backward ends       all gradients; a tied weight's come in two parts
    optimizer step      gradients, states, and the optimizer's temporaries

Held all the time are weights, adapter, master copy and the optimizer's states: a step
that is not the first finds the states there.
"""

from dataclasses import dataclass

PARTS = (
    "weights",
    "adapter",
    "master",
    "optimizer",
    "gradients",
    "activations",
    "logits",
    "transients",
)
DURING = (
    "forward",
    "loss",
    "head's gradient",
    "backward begins",
    "first layer",
    "backward ends",
)


@dataclass(frozen=True)
class Pieces:
    """Bytes that the moments are put together from, on one device.

    lasting       {weights, adapter, master, optimizer}
    gradients  of all that trains
    kept       by autograd when the logits are there; ids and labels included
    layer      that one layer keeps
    again      the same, where a checkpointed layer is made again; else 0
    passing    temporaries of one layer's backward pass
    logits     at their worst moment
    dlogits    the logits' gradient alone, in the dtype of activations
    summed     of a loss in chunks, until its last: its rows, the head's gradient so far
    head       gradient of the head's weight; 0 where it is frozen
    table      gradient of the embedding; 0 where it is frozen
    embedding  the second part of a tied weight's gradient; 0 otherwise
    buffer     a weight dequantized for one product
    gathered   layers that ZeRO-3 has whole for the moment
    bucket     gradients on their way to other ranks
    update     temporaries of the optimizer
    loading    what loading needs beside the weights
    """

    lasting: dict[str, int]
    gradients: int
    kept: int
    layer: int
    again: int
    passing: int
    logits: int
    dlogits: int
    summed: int
    head: int
    table: int
    embedding: int
    buffer: int
    gathered: int
    bucket: int
    update: int
    loading: int


def moments(p: Pieces) -> dict[str, dict[str, int]]:
    """{moment: {part: bytes}} of a training step, in their order."""
    running = p.buffer + p.gathered
    begun = p.embedding  # of a tied weight: it is not in .grad before both parts are
    return {
        "loading": {"weights": p.lasting["weights"], "transients": p.loading},
        "forward": p.lasting | {"activations": p.kept, "transients": running},
        "loss": p.lasting
        | {"activations": p.kept, "logits": p.logits, "transients": p.summed},
        "head's gradient": p.lasting
        | {"activations": p.kept, "logits": p.dlogits}
        | {"gradients": p.head - begun, "transients": begun + p.summed},
        "backward begins": p.lasting
        | {"activations": p.kept + p.again, "gradients": p.head - begun}
        | {"transients": p.passing + running + begun},
        "first layer": p.lasting
        | {"activations": p.layer, "gradients": p.gradients - p.table}
        | {"transients": p.passing + running + begun + p.bucket},
        "backward ends": p.lasting
        | {"gradients": p.gradients - p.embedding}
        | {"transients": 2 * p.embedding + p.bucket + p.gathered},
        "optimizer step": p.lasting
        | {"gradients": p.gradients, "transients": p.update},
    }


def peak(steps: dict[str, dict[str, int]]) -> tuple[str, int]:
    """(the moment, its bytes): the first of the largest."""
    name = max(steps, key=lambda moment: sum(steps[moment].values()))
    return name, sum(steps[name].values())


def activations(steps: dict[str, dict[str, int]]) -> int:
    """The most at one moment of all that is no weight, gradient or state.

    What meter.Memory.activations counts in forward and backward.
    """
    passing = ("activations", "logits", "transients")
    return max(
        sum(steps[name].get(part, 0) for part in passing)
        for name in DURING
        if name in steps
    )
