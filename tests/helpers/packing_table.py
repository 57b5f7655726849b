"""How far packed rows are from separate ones: method x architecture x (loss, gradient).

    PYTHONPATH=tests:tests/helpers python tests/helpers/packing_table.py
    PYTHONPATH=tests:tests/helpers python tests/helpers/packing_table.py prompt gpt2

The second prints the lines that have both words in them. Differences are relative to
the largest value. GPT-2 and OPT compute in float64; the others' norms, and weights in
four bits, in float32.
"""

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from architectures import CONFIGS
from laws.core.contract import Method, fresh
from laws.methods.table import METHODS
from model_state import largest

import peft_from_scratch as pfs
from peft_from_scratch.tasks.templates import IGNORED
from peft_from_scratch.training.batch import batch_of
from peft_from_scratch.training.loss import accumulate_gradients
from peft_from_scratch.training.packing import pack

EXACT = ("gpt2", "opt")
OWN = (6, 2, 9, 4, 3)  # tokens of each row behind the shared prefix
SHARED, PROMPT = 5, 2  # of the prefix, and of each row's prompt behind it
GROUPS = ([[0, 1, 2, 3, 4]], [[1, 2], [0, 3, 4]], [[4], [3], [0, 1, 2]])


@dataclass(frozen=True)
class Difference:
    """The largest over the ways to divide the rows, relative to the largest value."""

    loss: float
    gradients: float


def rows_of(shared=SHARED, own=OWN, prompt=PROMPT):
    """Rows with a shared prefix; the first tokens of their own parts all differ."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randint(90, 300, (count,), generator=generator).tolist()

    front, rows = draw(shared), []
    for number, length in enumerate(own):
        ids = [*front, 80 + number, *draw(length - 1)]
        labelled = min(shared + prompt, len(ids) - 1)
        rows.append((ids, [IGNORED] * labelled + ids[labelled:]))
    return rows


def gradients(model, batches):
    """(nats per label token, {name: gradient}) over all batches together."""
    model.zero_grad()
    mean, _ = accumulate_gradients(model, batches)
    return mean, {name: p.grad.clone() for name, p in pfs.trainable(model).items()}


def difference(model, rows, divisions=GROUPS) -> Difference:
    """Of packed rows from the same rows, one after the other and without padding."""
    weight = model.get_input_embeddings().weight
    like = weight.dtype, weight.device
    alone, expected = gradients(model, [batch_of([row], like[1]) for row in rows])
    most = Difference(0.0, 0.0)
    for groups in divisions:
        packed, found = gradients(model, [pack(rows, groups, *like)])
        most = Difference(
            max(most.loss, abs(packed - alone) / abs(alone)),
            max(most.gradients, largest(found, expected)),
        )
    return most


def model_of(method: Method, architecture: str):
    """An adapted model that one step has moved, without dropout."""
    exact = is_exact(method, architecture)
    dtype = torch.float64 if exact else torch.float32
    return fresh(method, architecture, steps=1, dtype=dtype)[0].eval()


def is_exact(method: Method, architecture: str) -> bool:
    """Whether the model computes in float64 throughout."""
    return architecture in EXACT and method.prepare is None


def bound(method: Method, architecture: str) -> float:
    """What rounding may make of the difference."""
    return 1e-12 if is_exact(method, architecture) else method.merges_within


def cases() -> Iterator[tuple[str, Method, str]]:
    for method in METHODS:
        for architecture in filter(method.architectures.__contains__, CONFIGS):
            yield f"{method.name}-{architecture}", method, architecture


def main(words: list[str]) -> None:
    print(f"{'method':20} {'architecture':12} {'loss':>8} {'gradients':>9}")
    for name, method, architecture in cases():
        if all(word in name for word in words):
            found = difference(model_of(method, architecture), rows_of())
            print(
                f"{method.name:20} {architecture:12} {found.loss:8.1e} "
                f"{found.gradients:9.1e}",
                flush=True,
            )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(sys.argv[1:])
