"""QLoRA's training step and decoding step against LoRA's and bitsandbytes'.

    python benchmarks/qlora_step.py [--rounds 9] [--threads N] [--record]

Three models with equal adapters train on the same rows in float32:

    LoRA                    on the whole weights
    QLoRA on bitsandbytes   our LoRA beside its Linear4bit
    QLoRA                   ours

The latter two are checked first to compute the same loss and gradients. Bytes are
counted, tensor by tensor (memory/), not read from the system: the same in every run.
The resident set that the system reports stands beside them, each in a process of its
own.

Then they decode, one row and sixteen, a token at a time behind 64 others:

    the base                the whole weights, without adapters
    QLoRA on bitsandbytes   as above, and as it comes
    QLoRA                   ours: each weight dequantized at each step
    QLoRA, kept unpacked    ours inside nf4.unpacked: as many bytes as the base, and
                            checked to give the same bits as the line above

side_by_side.py has the clocks and the ratios.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace

import side_by_side
import torch
from torch import nn

from peft_from_scratch import load_model, lora, nf4, qlora, trainable
from peft_from_scratch.common.provenance import package_version, provenance
from peft_from_scratch.comparison import reference
from peft_from_scratch.memory.meter import measured_step
from peft_from_scratch.tasks.task import load_task
from peft_from_scratch.tasks.templates import encode_rows
from peft_from_scratch.training.batch import batch_of
from peft_from_scratch.training.config import TrainConfig
from peft_from_scratch.training.loss import accumulate_gradients

ROWS, SEED = 8, 0
FULL, THEIRS, OURS = "LoRA", "QLoRA on bitsandbytes", "QLoRA"
INJECT = {FULL: lora.inject, THEIRS: reference.qlora, OURS: qlora.inject}
BASE, KEPT = "the base", "QLoRA, kept unpacked"
DECODED, BEHIND, TOKENS = (1, 16), 64, 4  # rows; tokens before; tokens in one turn
UNPACKED_BYTES = 1 << 30  # the budget: more than all of SmolLM2's weights take
TARGETS = {"training": 0.95, "decoding": 1.0}  # of bitsandbytes' time, at most
CLOSE = 1e-4  # nats, and relative norm of a gradient: rounding in float32
ROUNDING = 1e-6  # relative norm, of equal sums in float32
# glibc's allocator keeps what was freed, unless it is told to give it back.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
RESIDENT = """
import re, sys
import torch
sys.path[:0] = {path!r}
torch.set_num_threads({threads})
from qlora_step import one_step
one_step({base!r}, {name!r})
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def injected(base: str, name: str):
    """(model, tokenizer, task, recipe) of one batch, with adapters that have values."""
    model, tokenizer = load_model(base, device="cpu")
    INJECT[name](model)
    torch.manual_seed(SEED)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.01)
    task = load_task("orders", seed=SEED)
    task = replace(task, train=task.train.select(range(ROWS)))
    template = "chat" if tokenizer.chat_template else "raw"
    recipe = TrainConfig(steps=1, batch=ROWS, template=template)
    return model.train(), tokenizer, task, recipe


def one_step(base: str, name: str) -> None:
    """What a fresh process does, to see what the system says of it."""
    measured_step(*injected(base, name))


def step_of(model: nn.Module, batch):
    """A training step as in training/loop.py: loss, gradients, clipping, AdamW."""
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)

    def run() -> None:
        accumulate_gradients(model, [batch])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def check_equal_work(models: dict[str, nn.Module], batch) -> dict[str, float]:
    """RuntimeError unless both four-bit sides compute the same loss and gradients.

    Returns  how far apart they are: nats, and the largest relative norm over matrices
    """
    losses, gradients = [], []
    for name in (THEIRS, OURS):
        loss, _ = accumulate_gradients(models[name], [batch])
        found = trainable(models[name])
        losses.append(loss)
        gradients.append({n: p.grad.clone() for n, p in found.items()})
        models[name].zero_grad(set_to_none=True)
    theirs, ours = gradients
    apart = {
        "loss": abs(losses[0] - losses[1]),
        "gradients": max(
            ((ours[n] - g).norm() / g.norm()).item() for n, g in theirs.items()
        ),
    }
    for what, distance in apart.items():
        if not distance <= CLOSE:  # a NaN as well
            raise RuntimeError(
                f"{what}: the two sides differ by {distance:.2g}, allowed is {CLOSE}; "
                "they cannot be compared"
            )
    return apart


def decode_step(model: nn.Module, rows: int) -> Callable[[], torch.Tensor]:
    """A function that decodes TOKENS tokens a row, each behind the same BEHIND ones."""
    generator = torch.Generator().manual_seed(SEED)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (rows, BEHIND + 1), generator=generator)
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values

    @torch.no_grad()
    def run() -> torch.Tensor:
        for _ in range(TOKENS):
            out = model(ids[:, -1:], past_key_values=cache, use_cache=True)
            cache.crop(-1)
        return out.logits

    return run


def check_equal_answers(steps: dict[str, Callable]) -> float:
    """RuntimeError unless the three QLoRAs compute the same logits.

    Returns  how far ours are from bitsandbytes': the relative norm
    """
    logits = {name: steps[name]() for name in (THEIRS, OURS, KEPT)}
    # A copy of a model lies elsewhere in memory, where a BLAS may round in another way.
    moved = (logits[KEPT] - logits[OURS]).norm() / logits[OURS].norm()
    if not moved <= ROUNDING:
        raise RuntimeError(f"{KEPT}: other logits; the times cannot be compared")
    apart = (logits[OURS] - logits[THEIRS]).norm() / logits[THEIRS].norm()
    if not apart <= CLOSE:
        raise RuntimeError(
            f"logits: the two sides differ by {apart:.2g} of their norm, allowed is "
            f"{CLOSE}; they cannot be compared"
        )
    return apart.item()


def decoding(models: dict[str, nn.Module], base: str, rounds: int) -> dict:
    """{rows: their table}, and the bytes that were kept unpacked."""
    models = {name: models[name].eval() for name in (THEIRS, OURS)}
    sides = {BASE: load_model(base, device="cpu")[0].eval(), **models}
    sides[KEPT] = copy.deepcopy(models[OURS])
    device, tables, apart = torch.device("cpu"), {}, 0.0
    with nf4.unpacked(sides[KEPT], budget_bytes=UNPACKED_BYTES) as kept:
        for rows in DECODED:
            steps = {name: decode_step(side, rows) for name, side in sides.items()}
            apart = max(apart, check_equal_answers(steps))
            times = side_by_side.take_turns(steps, rounds, device)
            rivals = {name: times[name] for name in (THEIRS, OURS, KEPT)}
            tables[str(rows)] = {
                "rows": side_by_side.table(times, BASE),
                "over_bitsandbytes": side_by_side.table(rivals, THEIRS),
            }
        unpacked_bytes = kept.nbytes
    return {
        "behind": BEHIND,
        "tokens_a_turn": TOKENS,
        "apart": apart,
        "unpacked_bytes": unpacked_bytes,
        "by_rows": tables,
    }


def resident(base: str, name: str) -> int | None:
    """Bytes of the resident set at its largest, in a process that makes one step.

    Not ru_maxrss, which starts from what the parent held when it forked. The pages of
    the file that the weights came from are in it: the system may take them back.
    """
    if not sys.platform.startswith("linux"):
        return None
    code = RESIDENT.format(
        path=sys.path, threads=torch.get_num_threads(), base=base, name=name
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | GIVE_BACK,
        capture_output=True,
        text=True,
        check=True,
    )
    return 1024 * int(done.stdout.split()[-1])


def measure(base: str, rounds: int) -> dict:
    """All of the benchmark, as JSON can hold it."""
    load, models, memory = side_by_side.load(), {}, {}
    for name in INJECT:
        models[name], tokenizer, task, recipe = injected(base, name)
        counted = asdict(measured_step(models[name], tokenizer, task, recipe))
        memory[name] = counted | {"resident": resident(base, name)}
    template = recipe.template
    rows = encode_rows(tokenizer, task.instruction, task.train, template=template)
    device = torch.device("cpu")
    batch = batch_of(rows, device)
    apart = check_equal_work(models, batch)
    steps = {name: step_of(model, batch) for name, model in models.items()}
    times = side_by_side.take_turns(steps, rounds, device)
    rivals = {name: times[name] for name in (THEIRS, OURS)}
    return {
        "benchmark": "qlora_step",
        "base": base,
        "dtype": "float32",
        "tokens": max(len(ids) for ids, _ in rows),
        "rounds": rounds,
        "load": load,
        "apart": apart,
        "rows": side_by_side.table(times, FULL),
        "over_bitsandbytes": side_by_side.table(rivals, THEIRS),
        "decoding": decoding(models, base, rounds),
        "memory": memory,
        "bitsandbytes": package_version("bitsandbytes"),
        "provenance": provenance(seed=SEED, device=device),
    }


def over_lora(memory: dict, name: str, kind: str) -> int | None:
    """Bytes of a kind, minus those of the LoRA step; negative where it takes fewer."""
    ours, full = memory[name][kind], memory[FULL][kind]
    return None if ours is None or full is None else ours - full


def report(result: dict) -> str:
    """The result as text, for a terminal."""
    made, memory = result["provenance"], result["memory"]
    said = [
        f"{result['base']}: {ROWS} rows of {result['tokens']} tokens, r=8, "
        f"{made['threads']} threads, {made['device']}, {made['machine']}",
        f"load average before the run: {result['load']}",
        f"equal work of the two QLoRAs: losses differ by {result['apart']['loss']:.1g} "
        f"nats, gradients by {result['apart']['gradients']:.1g} of their norm",
        *side_by_side.lines(result["rows"], result["rounds"]),
        "training step over bitsandbytes': "
        + _verdict(result["over_bitsandbytes"], OURS, TARGETS["training"]),
        *_decoding_lines(result["decoding"], result["rounds"]),
        "",
        f"{'MB':30}{'weights':>10}{'activations':>12}{'peak':>10}{'resident':>10}",
    ]
    for name, held in memory.items():
        cells = [held[k] for k in ("weights", "activations", "peak", "resident")]
        texts = ["—" if c is None else f"{c / 1e6:,.1f}" for c in cells]
        said.append(
            f"{name:30}{texts[0]:>10}{texts[1]:>12}{texts[2]:>10}{texts[3]:>10}"
        )
    ours, theirs = (over_lora(memory, name, "peak") for name in (OURS, THEIRS))
    kept = "reached" if ours <= theirs else "missed"
    return "\n".join(
        [
            *said,
            f"peak over LoRA's: ours {ours / 1e6:+,.1f} MB, bitsandbytes' "
            f"{theirs / 1e6:+,.1f} MB; target, no more: {kept}",
        ]
    )


def _decoding_lines(decoded: dict, rounds: int) -> list[str]:
    """The tables of the decoding steps, and what was kept for the last row."""
    texts = []
    for rows, tables in decoded["by_rows"].items():
        texts += [
            "",
            f"decoding, {rows} row(s), {decoded['tokens_a_turn']} tokens:",
            *side_by_side.lines(tables["rows"], rounds),
            f"{KEPT}, over bitsandbytes': "
            + _verdict(tables["over_bitsandbytes"], KEPT, TARGETS["decoding"]),
        ]
    kept = decoded["unpacked_bytes"] / 1e6
    return [*texts, f"{KEPT}: {kept:,.1f} MB of weights beside those in four bits"]


def _verdict(rows: list[dict], name: str, target: float) -> str:
    ratio = next(row["ratio"] for row in rows if row["name"] == name)
    return f"{ratio:.2f}; {side_by_side.verdict(ratio, target)}"


def main(arguments: list[str]) -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", default="smollm2", help="as load_model takes it")
    asked = side_by_side.parsed(parser, arguments)
    result = measure(asked.model, asked.rounds)
    print(
        report(result),
        side_by_side.write(result, asked.record, out=asked.out),
        sep="\n",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
