"""Long sequences: layers computed twice, and the loss in chunks of tokens.

    python benchmarks/long_sequences.py [--rounds 9] [--threads N] [--record]

Four questions, of LoRA:

    step       what do chunks of the loss, and layers that are computed twice, cost in
               time, and what do they save, beside what the memory bill predicts?
    limit      does a step finish whose plain form dies for want of memory? Processes of
               their own, RLIMIT_DATA as in beyond_memory.py, Linux only. The limit is
               the geometric mean of what the bill predicts for both
    depth      bytes and time over layers and tokens: no layer computed twice, every
               second one, and all
    padding    the share of tokens that are padding, with and without length buckets

The steps are those of `train()`. That all candidates do equal work is checked first:
the same loss, and the same gradients but for rounding.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import beyond_memory
import side_by_side
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_from_scratch import load_model, lora, trainable
from peft_from_scratch.common.provenance import provenance
from peft_from_scratch.memory import timeline
from peft_from_scratch.memory.budget import Budget, bill
from peft_from_scratch.memory.meter import measure_step
from peft_from_scratch.memory.setups import Setup
from peft_from_scratch.tasks.task import load_task
from peft_from_scratch.tasks.templates import encode_rows
from peft_from_scratch.training.batch import Row, batch_of
from peft_from_scratch.training.buckets import padded_share
from peft_from_scratch.training.chunked_loss import loss_of
from peft_from_scratch.training.config import TrainConfig
from peft_from_scratch.training.gradient_checkpointing import checkpointed, recomputed
from peft_from_scratch.training.loop import micro_batches, optimizer_steps, train
from peft_from_scratch.training.loss import accumulate_gradients, micro_batch_loss
from peft_from_scratch.training.packing import Packing, packing_for
from peft_from_scratch.training.state import new_state

RANDOM = "random"  # a small Llama with SmolLM2's vocabulary, for a quick look
VOCABULARY = 49_152
PLAIN, CHUNKS, TWICE, BOTH = "plain", "chunks", "layers twice", "both"
WAYS = {  # fields of TrainConfig
    PLAIN: (),
    CHUNKS: ("chunk",),
    TWICE: ("checkpointing",),
    BOTH: ("chunk", "checkpointing"),
}
TARGET = 1.0  # of the plain step's time, at most, for the loss in chunks
ROWS, LENGTH, CHUNK = 2, 257, 128  # of the steps that are timed
LONG, STEPS = 1025, 2  # tokens of the row under the limit; steps that it is taken
DEPTHS, LENGTHS, EVERY = (4, 12), (256, 1024), {"none": 0, "every second": 2, "all": 1}
BUCKETS, BATCH = (1, 4, 16), 8
CLOSE = {"float32": 1e-4, "bfloat16": 0.05}  # relative, of the loss and of gradients
RECIPES = {"float32": "float32", "bfloat16": "mixed"}  # of the bill
SEED, LR = 0, 1e-5


def model_of(base: str, dtype: str = "float32", layers: int = 4) -> nn.Module:
    """The base with a LoRA on every projection, whose B is no longer zero."""
    torch.manual_seed(SEED)
    if base == RANDOM:
        model = small(layers, VOCABULARY).to(getattr(torch, dtype))
    else:
        model = load_model(base, dtype=dtype)[0]
    lora.inject(model)
    for name, parameter in trainable(model).items():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.01)
    return model.train()


def small(layers: int, vocabulary: int) -> nn.Module:
    """A random Llama of 256 units."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


def rows_of(count: int, length: int, words: int) -> list[Row]:
    """Random rows with a label at every token."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, words, (count, length), generator=generator).tolist()
    return [(row, row) for row in ids]


def recipe(way: str, chunk: int, **settings) -> TrainConfig:
    options = {"chunk": chunk, "checkpointing": True}
    chosen = {name: options[name] for name in WAYS[way]}
    return TrainConfig(lr=LR, schedule="constant", **settings, **chosen)


# ------------------------------------------------------------------------- step


def check_equal_work(model: nn.Module, rows: list[Row], chunk: int, dtype: str) -> dict:
    """RuntimeError unless all ways have the plain loss and the plain gradients.

    Returns  {way: how far apart: relative}
    """
    batch, tokens = batch_of(rows, model.device), sum(len(ids) - 1 for ids, _ in rows)
    results = {}
    for way in WAYS:
        config = recipe(way, chunk)
        model.zero_grad()
        with recomputed(model, config.checkpointing):
            loss = micro_batch_loss(model, batch, tokens, loss_of(config.chunk))
            loss.backward()
        gradients = [p.grad.flatten() for p in trainable(model).values()]
        results[way] = loss.item(), torch.cat(gradients)
    model.zero_grad(set_to_none=True)
    expected, gradient = results[PLAIN]
    apart = {
        way: max(abs(loss / expected - 1), ((g - gradient).norm() / gradient.norm()))
        for way, (loss, g) in results.items()
    }
    for way, distance in apart.items():
        if not distance <= CLOSE[dtype]:  # a NaN as well
            raise RuntimeError(
                f"{way}: loss or gradients differ by {distance:.2g} in {dtype}, "
                f"allowed is {CLOSE[dtype]}; the times cannot be compared"
            )
    return {way: float(distance) for way, distance in apart.items()}


def steps_of(model, rows, chunk: int, steps: int) -> dict[str, Callable[[], object]]:
    """{way: takes a step of the loop}: each way has an optimizer of its own."""
    packing = Packing(model.device, model.dtype)  # padded: rows are of one length

    def step_of(way: str) -> Callable[[], object]:
        config = recipe(way, chunk, steps=steps, batch=len(rows))
        state = new_state(model, config)
        loop = optimizer_steps(model, state, config, lambda _: [rows], packing)

        def step():
            with recomputed(model, config.checkpointing):
                next(loop)

        return step

    return {way: step_of(way) for way in WAYS}


def step_times(base: str, dtype: str, rounds: int, sizes: Sequence[int]) -> dict:
    """Time and bytes of a step, each way, beside the bill."""
    count, length, chunk = sizes
    model = model_of(base, dtype)
    rows = rows_of(count, length, model.config.vocab_size)
    apart = check_equal_work(model, rows, chunk, dtype)
    steps = steps_of(model, rows, chunk, rounds + side_by_side.WARM_UP + 1)
    times = side_by_side.take_turns(steps, rounds, model.device)
    held = {way: measure_step(model, step) for way, step in steps.items()}
    billed = bills(model, dtype, count, length, chunk)
    return {
        "dtype": dtype,
        "rows": count,
        "length": length,
        "chunk": chunk,
        "apart": apart,
        "times": side_by_side.table(times, PLAIN),
        "bytes": {
            way: {"measured": held[way].peak, "predicted": peak_of_step(billed[way])}
            for way in WAYS
        },
    }


def bills(model: nn.Module, dtype: str, rows: int, length: int, chunk: int) -> dict:
    options = {"chunk": chunk, "checkpointing": True}
    setup = Setup("lora", RECIPES[dtype], rows, length, device=model.device.type)
    return {
        way: bill(
            model.config, replace(setup, **{name: options[name] for name in names})
        )
        for way, names in WAYS.items()
    }


def peak_of_step(billed: Budget) -> int:
    """The largest moment of the bill after loading."""
    moments = {n: each for n, each in billed.moments.items() if n != "loading"}
    return timeline.peak(moments)[1]


# ------------------------------------------------------------------------- limit


def under_limit(base: str, length: int, chunk: int) -> dict:
    """What became of each process; {} where the system has no such limit."""
    if not sys.platform.startswith("linux"):
        return {}
    model = model_of(base)
    billed = bills(model, "float32", 1, length, chunk)
    needed = {way: _beside_weights(billed[way]) for way in (PLAIN, BOTH)}
    room = int(math.sqrt(needed[PLAIN] * needed[BOTH]))
    asked = {"no limit": (PLAIN, 0), PLAIN: (PLAIN, room), BOTH: (BOTH, room)}
    outcomes = {
        name: outcome(base, length, chunk, way, limit)
        for name, (way, limit) in asked.items()
    }
    expected = outcomes["no limit"].get("losses", [])
    losses = outcomes[BOTH].get("losses", [])
    pairs = zip(losses, expected, strict=False)
    apart = max((abs(a / b - 1) for a, b in pairs), default=None)
    return {
        "length": length,
        "chunk": chunk,
        "needed": needed,
        "room": room,
        "outcomes": outcomes,
        "apart": apart,
    }


def _beside_weights(billed: Budget) -> int:
    """Bytes at the peak that a step allocates itself."""
    return peak_of_step(billed) - billed.parts["weights"] - billed.parts["adapter"]


def outcome(base: str, length: int, chunk: int, way: str, room: int) -> dict:
    """A process of its own: {"losses": …}, or {"died": its last line}."""
    command = [sys.executable, __file__, "--model", base, "--only", way]
    command += ["--length", str(length), "--chunk", str(chunk), "--room", str(room)]
    environment = beyond_memory.ENVIRONMENT
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"died": lines[-1] if lines else f"exit code {done.returncode}"}


def long_run(base: str, length: int, chunk: int, way: str, room: int) -> dict:
    """In such a process: train() on one long row."""
    torch.set_num_threads(1)  # a thread's stack would count
    model = model_of(base)
    short = rows_of(1, 9, model.config.vocab_size)
    encoded = rows_of(1, length, model.config.vocab_size), []
    for rows in (short, encoded[0]):  # the first imports what would count as the step's
        config = recipe(way, chunk, steps=STEPS, batch=1, max_tokens=length)
        if room and rows is not short:
            beyond_memory.limit_data(room)
        history = train(model, None, None, config, encoded=(rows, []), progress=False)
    return {"losses": history.loss}


# ------------------------------------------------------------------------- depth


def over_depth(rounds: int, depths=DEPTHS, lengths=LENGTHS) -> list[dict]:
    """Bytes of activations and time, over layers and tokens."""
    cells = []
    for layers in depths:
        model = small(layers, 1024)
        lora.inject(model)
        model.train()
        for length in lengths:
            batch = batch_of(rows_of(1, length, 1024), model.device)

            def step_of(every: int, batch=batch, model=model):
                def step():
                    model.zero_grad(set_to_none=True)
                    twice = checkpointed(model, every=every) if every else nullcontext()
                    with twice:
                        accumulate_gradients(model, [batch])

                return step

            steps = {name: step_of(every) for name, every in EVERY.items()}
            times = side_by_side.take_turns(steps, rounds, model.device)
            held = {n: measure_step(model, s).activations for n, s in steps.items()}
            table = side_by_side.table(times, "none")
            cells.append(
                {"layers": layers, "length": length, "bytes": held, "times": table}
            )
    return cells


# ------------------------------------------------------------------------- padding


def padding(base: str) -> list[dict]:
    """The share of padding of an epoch of the task orders, padded and packed."""
    model, tokenizer = load_model("tiny" if base == RANDOM else base)
    task = load_task("orders", seed=SEED)
    template = "chat" if tokenizer.chat_template else "raw"
    rows = encode_rows(tokenizer, task.instruction, task.train, template=template)
    ways = {"padded": Packing(model.device, model.dtype)}
    ways["packed"] = packing_for(model, rows)
    cells = []
    for accumulate in (1, 4):
        for buckets in BUCKETS:
            sizes = dict(batch=BATCH, accumulate=accumulate, buckets=buckets)
            config = TrainConfig(steps=len(rows) // BATCH, **sizes)
            steps = [micro_batches(rows, config, step) for step in range(config.steps)]
            parts = [part for step in steps for part in step]
            cells += [
                sizes | {"way": way, "share": padded_share(packing, parts)}
                for way, packing in ways.items()
            ]
    return cells


# ------------------------------------------------------------------------- report


def report(result: dict) -> str:
    """The result as text, for a terminal."""
    made = result["provenance"]
    lines = [f"{result['base']}: {made['threads']} threads, {made['machine']}"]
    for case in result["cases"]:
        lines += [
            "",
            f"{case['dtype']}: {case['rows']} rows of {case['length']} tokens, chunks "
            f"of {case['chunk']}; losses and gradients differ by "
            f"{max(case['apart'].values()):.1g}",
            *side_by_side.lines(case["times"], result["rounds"]),
            *_bytes(case["bytes"]),
            f"{CHUNKS}, {side_by_side.verdict(case['times'][1]['ratio'], TARGET)}",
        ]
    if limit := result["limit"]:
        lines += ["", *_limit(limit)]
    lines += ["", "activations of one row, and the ratio of times to none twice"]
    for cell in result["depth"]:
        each = (
            f"{row['name']}: {cell['bytes'][row['name']] / 1e6:.0f} MB, "
            f"{row['ratio']:.2f}"
            for row in cell["times"]
        )
        lines.append(
            f"{cell['layers']} layers, {cell['length']} tokens: {'; '.join(each)}"
        )
    lines += ["", f"padding on the task orders, steps of {BATCH} rows"]
    for cell in result["padding"]:
        parts = f"{cell['accumulate']} micro-batches, {cell['buckets']} buckets"
        lines.append(f"{cell['way']}, {parts}: {cell['share']:.1%}")
    return "\n".join(lines)


def _bytes(held: dict) -> list[str]:
    plain = held[PLAIN]
    return [
        f"{way:14}peak {each['measured'] / 1e6:7.0f} MB, predicted "
        f"{each['predicted'] / 1e6:7.0f}; less than plain by "
        f"{(plain['measured'] - each['measured']) / 1e6:6.0f}, predicted "
        f"{(plain['predicted'] - each['predicted']) / 1e6:6.0f}"
        for way, each in held.items()
    ]


def _limit(limit: dict) -> list[str]:
    needed = (f"{way} {size / 1e6:.0f} MB" for way, size in limit["needed"].items())
    lines = [
        f"a row of {limit['length']} tokens, room for {limit['room'] / 1e6:.0f} MB "
        f"beside the weights; predicted: {', '.join(needed)}"
    ]
    for name, done in limit["outcomes"].items():
        losses = ", ".join(f"{loss:.6f}" for loss in done.get("losses", ()))
        lines.append(f"{name:14}{'losses ' + losses if losses else done['died']}")
    return lines


def measure(
    base: str,
    rounds: int,
    dtypes: Sequence[str] = tuple(CLOSE),
    sizes: Sequence[int] = (ROWS, LENGTH, CHUNK),
    long: int = LONG,
    shapes: Sequence[Sequence[int]] = (DEPTHS, LENGTHS),
) -> dict:
    """All of the benchmark, as JSON can hold it."""
    return {
        "benchmark": "long_sequences",
        "base": base,
        "rounds": rounds,
        "cases": [step_times(base, dtype, rounds, sizes) for dtype in dtypes],
        "limit": under_limit(base, long, sizes[-1]),
        "depth": over_depth(rounds, *shapes),
        "padding": padding(base),
        "provenance": provenance(seed=SEED, device=torch.device("cpu")),
    }


def main(arguments: list[str]) -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument(
        "--model", default="smollm2", help=f"as load_model, or {RANDOM}"
    )
    parser.add_argument("--dtypes", nargs="+", default=[*CLOSE], choices=[*CLOSE])
    parser.add_argument("--length", type=int, default=LONG, help="under the limit")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="label tokens")
    parser.add_argument("--only", choices=[*WAYS], help=argparse.SUPPRESS)
    parser.add_argument("--room", type=int, default=0, help=argparse.SUPPRESS)
    asked = side_by_side.parsed(parser, arguments)
    if asked.only:
        settings = asked.model, asked.length, asked.chunk, asked.only, asked.room
        print(json.dumps(long_run(*settings)))
        return
    sizes = ROWS, LENGTH, asked.chunk
    result = measure(asked.model, asked.rounds, asked.dtypes, sizes, asked.length)
    print(
        report(result),
        side_by_side.write(result, asked.record, out=asked.out),
        sep="\n",
    )
    outcomes = result["limit"].get("outcomes")
    if outcomes and ("died" in outcomes[BOTH] or "died" not in outcomes[PLAIN]):
        sys.exit("the limit did not tell the two apart on this system")


if __name__ == "__main__":
    main(sys.argv[1:])
