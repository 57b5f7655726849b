"""One LoRA training step: this library's loop against the plain use of HF PEFT.

    python benchmarks/lora_step.py [--rounds 9] [--threads N] [--record]

A step is: collate the rows, forward, backward, clip, AdamW, drop the gradients. Both
sides train the same matrices on the same rows in float32, with the same threads. That
this is equal work is checked before any clock runs: the same losses, and, once A and B
are copied, the same gradients. The candidates then take turns in one process, so that a
machine which slows down slows all of them; a ratio compares two times of one round.

Between the two ends stand two variants that show where the gain comes from:

    peft                         model(**batch).loss, torch.optim.AdamW as it comes
    peft, our loss               logits at labelled positions only, no mask (loss.py)
    peft, our loss, fused AdamW  and the optimizer of train.py
    ours                         and LoRA as one autograd function (methods/lora.py)
"""

import argparse
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from peft_from_scratch import load_model, lora, trainable
from peft_from_scratch.atomic import new_file
from peft_from_scratch.loss import Row, accumulate_gradients, batch_of
from peft_from_scratch.provenance import package_version, provenance
from peft_from_scratch.recipe import Recipe
from peft_from_scratch.tasks import Task, load_task
from peft_from_scratch.templates import collate, encode_rows
from peft_from_scratch.timing import synchronize
from peft_from_scratch.train import train

RANK, ALPHA, ROWS, SEED = 8, 16, 8, 0
WARM_UP = 3  # rounds that are not counted
CLOSE = 1e-4  # nats, and relative norm of a gradient: rounding in float32
TARGET = 0.70  # of PEFT's time, at most
OURS, PLAIN = "ours", "peft"
RESULTS, OUT = Path(__file__).parent / "results", Path("out")


@dataclass(frozen=True)
class Sides:
    """The two models with equal adapters, and the batch that both train on."""

    ours: nn.Module
    theirs: nn.Module
    rows: list[Row]
    pad_id: int

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


def set_up(base: str, task: Task) -> tuple[Sides, object]:
    """Both sides on their own copies of the base, with the same random A and B."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # speaks at import
    import peft

    ours, tokenizer = load_model(base)
    theirs, _ = load_model(base)
    torch.manual_seed(SEED)
    lora.inject(ours, r=RANK, alpha=ALPHA)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    rows = encode_rows(tokenizer, task.instruction, task.train, template="chat")
    theirs = peft.get_peft_model(theirs, config).train()
    sides = Sides(ours.train(), theirs, rows, tokenizer.pad_token_id)
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
        if not distance <= CLOSE:  # a NaN as well
            raise RuntimeError(
                f"{what}: the two sides differ by {distance:.2g}, allowed is {CLOSE}; "
                "their times cannot be compared"
            )
    sides.ours.zero_grad(set_to_none=True)
    sides.theirs.zero_grad(set_to_none=True)
    return apart


def steps_of_peft(sides: Sides, recipe: Recipe) -> dict[str, Callable[[], None]]:
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


def take_turns(
    sides: Sides, tokenizer, task: Task, recipe: Recipe
) -> dict[str, list[tuple[float, float]]]:
    """(seconds, seconds of processor time) of every counted round, by candidate.

    Our side is `train` as it ships: the others run between two of its steps.
    """
    steps = steps_of_peft(sides, recipe)
    times = {name: [] for name in (OURS, *steps)}
    before = _clocks(sides.device)

    def lap(name: str) -> None:
        nonlocal before
        now = _clocks(sides.device)
        times[name].append((now[0] - before[0], now[1] - before[1]))
        before = now

    def others(_) -> None:
        lap(OURS)
        for name, step in steps.items():
            step()
            lap(name)

    train(sides.ours, tokenizer, task, recipe, progress=False, on_step=others)
    return {name: laps[WARM_UP:] for name, laps in times.items()}


def table(times: dict[str, list[tuple[float, float]]]) -> list[dict]:
    """A row a candidate: median seconds, and its ratio to PEFT's in the same round."""
    rows = []
    for name in sorted(times, key=lambda name: name == OURS):  # ours last
        pairs = list(zip(times[name], times[PLAIN], strict=True))
        ratios = [mine[0] / plain[0] for mine, plain in pairs]
        rows.append(
            {
                "name": name,
                "seconds": median(seconds for seconds, _ in times[name]),
                "ratio": median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "processor_ratio": median(mine[1] / plain[1] for mine, plain in pairs),
            }
        )
    return rows


def report(result: dict) -> str:
    """The result as text, for a terminal."""
    made = result["provenance"]
    said = [
        f"{result['base']}: {ROWS} rows of {result['tokens']} tokens, LoRA r={RANK}, "
        f"{made['threads']} threads, {made['device']}, {made['machine']}",
        f"load average before the run: {result['load']}",
        f"equal work: losses differ by {result['apart']['loss']:.1g} nats, gradients "
        f"by {result['apart']['gradients']:.1g} of their norm",
        f"{'median of ' + str(result['rounds']) + ' rounds':30}"
        f"{'seconds':>8}{'ratio':>8}{'lowest':>8}{'highest':>8}{'processor time':>16}",
    ]
    for row in result["rows"]:
        said.append(
            f"{row['name']:30}{row['seconds']:8.3f}{row['ratio']:8.2f}{row['low']:8.2f}"
            f"{row['high']:8.2f}{row['processor_ratio']:16.2f}"
        )
    ratio = result["rows"][-1]["ratio"]
    verdict = "reached" if ratio <= TARGET else "missed"
    return "\n".join([*said, f"target, at most {TARGET:.2f}: {verdict}"])


def measure(base: str, rounds: int) -> dict:
    """All of the benchmark, as JSON can hold it."""
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    task = load_task("orders", seed=SEED)
    task = replace(task, train=task.train.select(range(ROWS)))  # each step's batch
    recipe = Recipe(steps=WARM_UP + rounds, batch=ROWS, seed=SEED, template="chat")
    sides, tokenizer = set_up(base, task)
    apart = check_equal_work(sides)
    times = take_turns(sides, tokenizer, task, recipe)
    return {
        "benchmark": "lora_step",
        "base": base,
        "tokens": max(len(ids) for ids, _ in sides.rows),
        "rounds": rounds,
        "load": load,
        "apart": apart,
        "rows": table(times),
        "peft": package_version("peft"),
        "provenance": provenance(seed=SEED, device=sides.device),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="counted; at least 7")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--model", default="smollm2", help="as load_model takes it")
    parser.add_argument(
        "--record", action="store_true", help=f"write to {RESULTS.name}/, for git"
    )
    asked = parser.parse_args(arguments)
    if asked.rounds < 7 or (asked.threads or 1) < 1:
        parser.error("--rounds: at least 7; --threads: at least 1")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    result = measure(asked.model, asked.rounds)
    machine = result["provenance"]["machine"].rpartition(",")[0]
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    folder, name = (RESULTS, f"-{slug}") if asked.record else (OUT, "")
    file = folder / f"lora_step{name}.json"
    with new_file(file) as new:
        new.write_text(json.dumps(result, indent=2) + "\n")
    print(report(result), f"written to {os.path.relpath(file)}", sep="\n")


def _our_name(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    return name.replace("lora_", "").replace(".default.weight", "")


def _clocks(device: torch.device) -> tuple[float, float]:
    synchronize(device)
    return time.perf_counter(), time.process_time()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    main(sys.argv[1:])
