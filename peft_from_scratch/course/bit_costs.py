"""What four bits save and cost, in bytes and steps: for lessons to show.

steps = Steps(base, method, task, …)      a run that can be watched step by step
held(model)                               bytes by what holds them
kept(product, x)                          bytes that autograd keeps for backward
above_lora()                              losses of Q4's runs on tiny above LoRA's
"""

import time
from collections.abc import Callable
from statistics import median
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from ..core.adapter import trainable
from ..ledger.experiments import four_bit_cost
from ..ledger.intervals import nested_bootstrap, over_seeds
from ..ledger.runs import stored
from ..memory.meter import Memory, measure_step
from ..models.load import load_model
from ..tasks.task import load_task
from ..tasks.templates import encode_rows
from ..training.batch import batch_of
from ..training.loss import accumulate_gradients

PARTS = {  # of a tensor's name -> what it is; the first that is found counts
    "packed": "codes",
    "absmax": "constants",
    "A": "adapters",
    "B": "adapters",
    "embed_tokens": "embedding",
}


class Steps:
    """The first steps of a training, on the first rows of a task, in their order.

    Args
        base    model: a short name, a hub id or a folder
        method  a module with inject: methods.lora, methods.qlora; of rank r
        rows    of a step

    memory  Memory of the first step, which allocates the optimizer's state
    losses  of each step, before its update, nats per label token
    """

    def __init__(
        self,
        base: str,
        method: ModuleType,
        task: str,
        *,
        template: str = "chat",
        rows: int = 4,
        r: int = 8,
        lr: float = 2e-3,
        seed: int = 0,
    ):
        self.model, tokenizer = load_model(base, device="cpu")
        loaded = load_task(task)
        first = loaded.train.select(range(min(64, len(loaded.train))))
        encoded = encode_rows(tokenizer, loaded.instruction, first, template=template)
        self.batches = [encoded[i : i + rows] for i in range(0, len(encoded), rows)]
        torch.manual_seed(seed)
        method.inject(self.model, r=r, alpha=2 * r)
        parameters = trainable(self.model).values()
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        self.losses: list[float] = []
        self.times: list[float] = []
        self.memory: Memory = measure_step(self.model, self.step)
        self.times.clear()  # being measured takes time

    @property
    def seconds(self) -> float:
        """The median of the steps so far, but for the first."""
        return median(self.times)

    def step(self) -> None:
        """Take one more step."""
        begun = time.perf_counter()
        batch = self.batches[len(self.losses) % len(self.batches)]
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = accumulate_gradients(self.model, [batch_of(batch, "cpu")])
        self.optimizer.step()
        self.losses.append(loss)
        self.times.append(time.perf_counter() - begun)


def held(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's tensors by what they are; a tied one counts once.

    Returns  bytes of "codes", "constants", "adapters", "embedding", "weights" (matrices
             that are not in four bits) and "others" (norms and biases)
    """
    sizes = dict.fromkeys([*dict.fromkeys(PARTS.values()), "weights", "others"], 0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        words = name.replace("_", ".").split(".") + name.split(".")
        plain = "weights" if tensor.dim() > 1 else "others"
        kind = next((kind for part, kind in PARTS.items() if part in words), plain)
        sizes[kind] += tensor.nbytes
    return sizes


def kept(product: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that autograd keeps of product(x) until the backward pass; x is not one."""
    sizes = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata != x.untyped_storage()._cdata:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        product(x)
    return sum(sizes.values())


def above_lora() -> dict[tuple[str, str], tuple[float, float, float]]:
    """Of Q4's shipped runs on tiny, losses above LoRA's, each with its interval.

    Returns  {(method, rows): (nats per token, low, high)}, on the task and on general
             text, the format of tiny's pretraining; the mean of the three tasks
    Raises   LookupError  a run that is not stored
    """
    shipped = [stored(each) for each in four_bit_cost.configs("tiny")]
    if None in shipped:
        raise LookupError(
            f"{shipped.count(None)} of Q4's runs on tiny are not stored; `python -m "
            "peft_from_scratch ledger Q4 --run --base tiny` makes them"
        )
    methods = {"transplant": four_bit_cost.MOVED, "QLoRA": four_bit_cost.QLORA}
    rows = {
        "task": four_bit_cost.TASK_ITEMS,
        "general text": four_bit_cost.GENERAL_ITEMS,
    }
    return {
        (name, text): four_bit_cost.above(shipped, method, four_bit_cost.LORA, items)
        for text, items in rows.items()
        for name, method in methods.items()
    }


def span(rows) -> tuple[float, float, float]:
    """mean, low, high of (seeds, items): at each end the wider one of two intervals.

    As intervals.paired has it, for arrays in the place of stored runs.
    """
    mean, *seeds = over_seeds(np.mean(rows, axis=1).tolist())
    _, *drawn = nested_bootstrap(rows)
    return mean, min(seeds[0], drawn[0]), max(seeds[1], drawn[1])
