"""One LoRA training step: this library's loop against the plain use of HF PEFT.

    python benchmarks/lora_step.py [--rounds 9] [--threads N] [--dtypes …] [--record]

A step is: collate the rows, forward, backward, clip, AdamW, drop the gradients. Both
sides train the same matrices on the same rows, with the same threads; once with a base
in float32, and once in bfloat16, with adapters in float32. That this is equal work is
checked before any clock runs: the same losses, and, once A and B are copied, the same
gradients, but for rounding: in bfloat16 PEFT rounds W0 x + B A x twice, and we once
(rounding.py). side_by_side.py has the clocks and the ratios.

Between the two ends stand two variants that show where the gain comes from:

    peft                         model(**batch).loss, torch.optim.AdamW as it comes
    peft, our loss               logits at labelled positions only, no mask (loss.py)
    peft, our loss, fused AdamW  and the optimizer of training/
    ours                         and LoRA as one autograd function (methods/lora.py)
"""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import side_by_side
import torch
from side_by_side import WARM_UP, Laps, Times
from torch import Tensor, nn

from peft_from_scratch import load_model, lora, trainable
from peft_from_scratch.common.provenance import package_version, provenance
from peft_from_scratch.tasks.task import Task, load_task
from peft_from_scratch.tasks.templates import encode_rows
from peft_from_scratch.training.batch import Row, batch_of, collate
from peft_from_scratch.training.config import TrainConfig
from peft_from_scratch.training.loop import train
from peft_from_scratch.training.loss import accumulate_gradients

RANK, ALPHA, ROWS, SEED = 8, 16, 8, 0
# How far apart rounding may set the sides: nats, and relative norm of a gradient.
CLOSE = {
    "float32": {"loss": 1e-4, "gradients": 1e-4},
    "bfloat16": {"loss": 0.05, "gradients": 0.2},
}
TARGET = 0.70  # of PEFT's time, at most
OURS, PLAIN = "ours", "peft"


@dataclass(frozen=True)
class Sides:
    """The two models with equal adapters, and the batch that both train on."""

    ours: nn.Module
    theirs: nn.Module
    rows: list[Row]
    pad_id: int
    dtype: str

    @property
    def device(self) -> torch.device:
        return self.theirs.device

    def their_parameters(self) -> dict[str, nn.Parameter]:
        """What PEFT trains, by our names."""
        named = self.theirs.named_parameters()
        return {_our_name(name): p for name, p in named if p.requires_grad}

    def their_loss(self) -> Tensor:
        """The mean over label tokens, as a model of transformers computes it."""
        batch = collate(self.rows, self.pad_id)
        return self.theirs(**{n: x.to(self.device) for n, x in batch.items()}).loss


def set_up(base: str, task: Task, dtype: str, template: str) -> tuple[Sides, object]:
    """Both sides on their own copies of the base, with the same random A and B."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # speaks at import
    import peft

    ours, tokenizer = load_model(base, dtype=dtype)
    theirs, _ = load_model(base, dtype=dtype)
    torch.manual_seed(SEED)
    lora.inject(ours, r=RANK, alpha=ALPHA)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    rows = encode_rows(tokenizer, task.instruction, task.train, template=template)
    theirs = peft.get_peft_model(theirs, config).train()
    sides = Sides(ours.train(), theirs, rows, tokenizer.pad_token_id, dtype)
    copies = sides.their_parameters()
    if copies.keys() != trainable(ours).keys():
        raise RuntimeError("the two sides do not train the same matrices")
    with torch.no_grad():
        for name, parameter in trainable(ours).items():
            if name.endswith(".B"):  # at zero it would hide A from loss and gradient
                parameter.normal_(std=0.01)
            copies[name].copy_(parameter)
    return sides, tokenizer


def check_equal_work(sides: Sides) -> dict[str, float]:
    """RuntimeError unless both sides compute the same loss and the same gradients.

    Returns  how far apart they are: nats, and the largest relative norm over matrices
    """
    ours, _ = accumulate_gradients(sides.ours, [batch_of(sides.rows, sides.device)])
    theirs = sides.their_loss()
    theirs.backward()
    copies = sides.their_parameters()
    apart = {
        "loss": abs(ours - theirs.item()),
        "gradients": max(
            ((p.grad - copies[name].grad).norm() / copies[name].grad.norm()).item()
            for name, p in trainable(sides.ours).items()
        ),
    }
    for what, distance in apart.items():
        close = CLOSE[sides.dtype][what]
        if not distance <= close:  # a NaN as well
            raise RuntimeError(
                f"{what}: the two sides differ by {distance:.2g}, allowed is {close} "
                f"in {sides.dtype}; their times cannot be compared"
            )
    sides.ours.zero_grad(set_to_none=True)
    sides.theirs.zero_grad(set_to_none=True)
    return apart


def steps_of_peft(sides: Sides, recipe: TrainConfig) -> dict[str, Callable[[], None]]:
    """The plain use of PEFT first, then the variants, each with its own optimizer."""
    parameters = list(sides.their_parameters().values())
    inner = sides.theirs.get_base_model()  # what takes logits_to_keep

    def plain_loss() -> None:
        sides.their_loss().backward()

    def our_loss() -> None:
        accumulate_gradients(inner, [batch_of(sides.rows, sides.device)])

    def step(backward, **options) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(
            parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, **options
        )

        def run() -> None:
            backward()
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            optimizer.zero_grad()

        return run

    return {
        PLAIN: step(plain_loss),
        "peft, our loss": step(our_loss),
        "peft, our loss, fused AdamW": step(our_loss, fused=True),
    }


def take_turns(sides: Sides, tokenizer, task: Task, recipe: TrainConfig) -> Times:
    """The times of every counted round, ours last.

    Our side is `train` as it ships: the others run between two of its steps.
    """
    steps = steps_of_peft(sides, recipe)
    laps = Laps((*steps, OURS), sides.device)

    def others(_) -> None:
        laps.lap(OURS)
        for name, step in steps.items():
            step()
            laps.lap(name)

    train(sides.ours, tokenizer, task, recipe, progress=False, on_step=others)
    return laps.counted()


def report(result: dict) -> str:
    """The result as text, for a terminal."""
    made = result["provenance"]
    lines = [
        f"{result['base']}: {ROWS} rows of {result['tokens']} tokens, LoRA r={RANK}, "
        f"{made['threads']} threads, {made['device']}, {made['machine']}",
        f"load average before the run: {result['load']}",
    ]
    for case in result["cases"]:
        loss, gradients = case["apart"]["loss"], case["apart"]["gradients"]
        lines += [
            "",
            f"{case['dtype']}: equal work; losses differ by {loss:.1g} nats, gradients "
            f"by {gradients:.1g} of their norm",
            *side_by_side.lines(case["rows"], result["rounds"]),
            side_by_side.verdict(case["rows"][-1]["ratio"], TARGET),
        ]
    return "\n".join(lines)


def measure(base: str, rounds: int, dtypes: Sequence[str] = tuple(CLOSE)) -> dict:
    """All of the benchmark, as JSON can hold it."""
    load = side_by_side.load()
    task = load_task("orders", seed=SEED)
    task = replace(task, train=task.train.select(range(ROWS)))  # each step's batch
    template = "chat" if load_model(base)[1].chat_template else "raw"
    recipe = TrainConfig(
        steps=WARM_UP + rounds, batch=ROWS, seed=SEED, template=template
    )
    cases = []
    for dtype in dtypes:
        sides, tokenizer = set_up(base, task, dtype, template)
        apart = check_equal_work(sides)
        times = take_turns(sides, tokenizer, task, recipe)
        rows = side_by_side.table(times, PLAIN)
        cases.append({"dtype": dtype, "apart": apart, "rows": rows})
    return {
        "benchmark": "lora_step",
        "base": base,
        "tokens": max(len(ids) for ids, _ in sides.rows),
        "rounds": rounds,
        "load": load,
        "cases": cases,
        "peft": package_version("peft"),
        "provenance": provenance(seed=SEED, device=sides.device),
    }


def main(arguments: list[str]) -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", default="smollm2", help="as load_model takes it")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=list(CLOSE),
        choices=list(CLOSE),
        help="of the base's weights",
    )
    asked = side_by_side.parsed(parser, arguments)
    result = measure(asked.model, asked.rounds, asked.dtypes)
    print(
        report(result),
        side_by_side.write(result, asked.record, out=asked.out),
        sep="\n",
    )


def _our_name(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    return name.replace("lora_", "").replace(".default.weight", "")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    main(sys.argv[1:])
