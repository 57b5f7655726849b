"""What bfloat16 leaves of a LoRA update: one rounding against two.

    python benchmarks/rounding.py [--rounds 9] [--threads N] [--record]

A small update is lost where it is added to a product that was rounded to bfloat16. Two
measurements show how much is lost, and what avoiding it costs.

**One projection**, of SmolLM2's shapes. Each way to compute h = W0 x + scale · B A x
gets its time, as a ratio to the plain product x W0ᵀ, and the share of the update that
is left in h: the projection of h(B) - h(0) on the exact update. The ways:

    the plain product         x W0ᵀ, for comparison; nothing of the update
    two roundings             the update is added to a rounded product: the equation as
                              it is written, and HF PEFT's
    ours                      the product accumulates on the update (lora_fast.py)
    ours, float32 x, A, B     the same, the small products in float32
    one product               [x, x Aᵀ] · [W0 | scale · B]ᵀ, in a buffer with r more
                              columns
    float32 product           x and W0 converted, all of it in float32, rounded once

**Training.** The loss of SmolLM2 at each step on eight orders, at two learning rates,
in float32 and in bfloat16: ours, two roundings, and PEFT. With --record the curves go
into docs/rounding.svg as well.
"""

import json
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import side_by_side
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from peft_from_scratch import load_model, lora, trainable
from peft_from_scratch.common.atomic import new_file
from peft_from_scratch.common.provenance import package_version, provenance
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.methods import lora_fast
from peft_from_scratch.plotting import theme
from peft_from_scratch.plotting.draw import frame, legend, name_y, point
from peft_from_scratch.tasks.task import load_task
from peft_from_scratch.tasks.templates import encode_rows
from peft_from_scratch.training.batch import batch_of
from peft_from_scratch.training.config import TrainConfig
from peft_from_scratch.training.loop import train
from peft_from_scratch.training.loss import accumulate_gradients

RANK, ALPHA, SEED = 8, 16, 0
SCALE = ALPHA / RANK
SHAPES = [(640, 576, 1536), (640, 1536, 576), (640, 576, 192), (1, 576, 1536)]
SIZES = [5e-5, 2e-4, 2e-2]  # of B: after one step at 1e-4, a few, after training
VALUES = 2**20  # of h, that a share is measured on: its noise is then below 0.01
PLAIN, TWICE, OURS = "the plain product", "two roundings", "ours"
WIDE, ONE, FLOAT32 = "ours, float32 x, A, B", "one product", "float32 product"
ROWS, RATES = 8, (1e-4, 3e-3)
SERIES = {
    "float32": (theme.GREY, "o"),
    "bfloat16, one rounding (ours)": (theme.BLUE, "s"),
    "bfloat16, two roundings": (theme.ORANGE, "D"),
    "bfloat16, HF PEFT": (theme.PURPLE, "^"),
}
FULL, OUR_CURVE, EQUATION, PEFT = SERIES
LINE = dict(linestyle="-", linewidth=1.5, markersize=5)
STYLES = dict.fromkeys(SERIES, LINE) | {  # where two lines coincide, both are seen
    FULL: LINE | dict(linewidth=7, alpha=0.5, marker=""),
    PEFT: LINE | dict(linestyle="--", markersize=3.5),
}
FIGURE = Path(__file__).parents[1] / "docs" / "rounding.svg"


# One projection ----------------------------------------------------------------------


def ways(W: Tensor, A: Tensor, buffer: Tensor) -> dict[str, Callable]:
    """{name: function of x and B}. The buffer (d_out, d_in + r) begins with W."""
    base = nn.Linear(*reversed(W.shape), bias=False, dtype=W.dtype)
    base.weight = nn.Parameter(W, requires_grad=False)
    d_in = W.shape[1]

    def twice(x, B):
        y = base(x)
        return (y + SCALE * F.linear(F.linear(x.float(), A), B)).to(y.dtype)

    def wide(x, B):
        few, lora_fast.FEW = lora_fast.FEW, len(x) + 1
        try:
            return lora_fast.low_rank_sum(base, x, x, A, B, SCALE)
        finally:
            lora_fast.FEW = few

    def one(x, B):
        buffer[:, d_in:] = SCALE * B
        return F.linear(torch.cat([x, F.linear(x, A.to(x.dtype))], 1), buffer)

    def in_float32(x, B):
        update = SCALE * F.linear(F.linear(x.float(), A), B)
        return (F.linear(x.float(), W.float()) + update).to(x.dtype)

    return {
        PLAIN: lambda x, B: base(x),
        TWICE: twice,
        OURS: lambda x, B: lora_fast.low_rank_sum(base, x, x, A, B, SCALE),
        WIDE: wide,
        ONE: one,
        FLOAT32: in_float32,
    }


@torch.no_grad()
def of_shape(shape: tuple[int, int, int], rounds: int) -> dict:
    """Times and shares of every way, for x (tokens, d_in) and W0 (d_out, d_in)."""
    tokens, d_in, d_out = shape
    torch.manual_seed(SEED)
    W = (torch.randn(d_out, d_in) / d_in**0.5).bfloat16()
    A, direction = torch.randn(RANK, d_in) / (3 * d_in) ** 0.5, torch.randn(d_out, RANK)
    buffer = torch.cat([W, torch.zeros(d_out, RANK, dtype=W.dtype)], 1)
    candidates = ways(W, A, buffer)
    x, B, repeat = torch.randn(tokens, d_in).bfloat16(), 2e-4 * direction, 1
    repeat = max(1, 2**20 // (tokens * d_out))  # a lap of some milliseconds at least

    def lap(way):
        for _ in range(repeat):
            way(x, B)

    laps = {name: lambda way=way: lap(way) for name, way in candidates.items()}
    times = side_by_side.take_turns(laps, rounds, torch.device("cpu"))
    rows = side_by_side.table(times, PLAIN)
    for row in rows:
        row["seconds"] /= repeat
        row["shares"] = shares(candidates[row["name"]], tokens, A, direction)
    return {"shape": shape, "rows": rows}


def shares(way: Callable, tokens: int, A: Tensor, direction: Tensor) -> list[float]:
    """For each of SIZES: what h has of an update, projected on the exact one."""
    left, exact = torch.zeros(len(SIZES)), torch.zeros(len(SIZES))
    torch.manual_seed(SEED + 1)  # rows of x must not be those of W0 or A
    for _ in range(max(1, VALUES // (tokens * len(direction)))):
        x = torch.randn(tokens, A.shape[1]).bfloat16()
        without = way(x, 0 * direction).double()
        for i, size in enumerate(SIZES):
            B = size * direction
            update = SCALE * x.double() @ A.double().T @ B.double().T
            left[i] += ((way(x, B).double() - without) * update).sum().item()
            exact[i] += update.square().sum().item()
    return (left / exact).tolist()


# Training ----------------------------------------------------------------------------


def curves(base: str, steps: int) -> list[dict]:
    """[{rate, series, losses}]: the loss before each step, and after the last one."""
    rows, constant = [], dict(batch=ROWS, schedule="constant", seed=SEED)
    template = "chat" if load_model(base)[1].chat_template else "raw"
    for rate in RATES:
        recipe = TrainConfig(steps + 1, lr=rate, template=template, **constant)
        for series in SERIES:
            run = of_peft if series == PEFT else ours
            losses = run(base, recipe, series)
            print(f"{rate:.0e} {series:32}", *(f"{loss:.3f}" for loss in losses))
            rows.append({"rate": rate, "series": series, "losses": losses})
    return rows


def ours(base: str, recipe: TrainConfig, series: str) -> list[float]:
    """With a hook on each base, LoRA computes its equation, which rounds twice."""
    dtype = "float32" if series == FULL else "bfloat16"
    model, tokenizer = load_model(base, device="cpu", dtype=dtype)
    torch.manual_seed(SEED)
    lora.inject(model, r=RANK, alpha=ALPHA)
    if series == EQUATION:
        for layer in adapters(model).values():
            layer.base.register_forward_hook(lambda module, args, out: None)
    return train(model, tokenizer, _task(), recipe, progress=False).loss


def of_peft(base: str, recipe: TrainConfig, series: str) -> list[float]:
    """PEFT's model on the same loss, with the same start, rows and optimizer."""
    import peft

    model, tokenizer = load_model(base, device="cpu", dtype="bfloat16")
    torch.manual_seed(SEED)
    lora.inject(model, r=RANK, alpha=ALPHA)
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    model, _ = load_model(base, device="cpu", dtype="bfloat16")
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(model, config).train()
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    with torch.no_grad():
        for mine, copy in zip(start.values(), parameters, strict=True):
            copy.copy_(mine)
    task = _task()
    rows = encode_rows(
        tokenizer, task.instruction, task.train, template=recipe.template
    )
    options = dict(lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
    optimizer = torch.optim.AdamW(parameters, **options)
    losses = []
    for _ in range(recipe.steps):
        batch = batch_of(rows, torch.device("cpu"))
        loss, _ = accumulate_gradients(theirs.get_base_model(), [batch])
        losses.append(loss)
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _task():
    task = load_task("orders", seed=SEED)
    return replace(task, train=task.train.select(range(ROWS)))


def figure(rows: list[dict], width: float = 7.4) -> Figure:
    """Two panels, one a rate; each has the losses of every series."""
    with theme.style():
        handles = [
            point(mark, theme.LIGHT, label=name, **STYLES[name])
            for name, mark in SERIES.items()
        ]
        page, first = frame(
            "In bfloat16, two roundings lose small LoRA updates",
            "SmolLM2-135M, LoRA of rank 8 on every projection, one batch of eight "
            "rows. With one rounding, bfloat16 follows float32 at both rates.",
            width,
            2.6,
            0.95,
            theme.LIGHT,
        )
        box, gap = first.get_position(), 0.07
        half = (box.width - gap) / 2
        first.set_position((box.x0, box.y0, half, box.height))
        place = (box.x0 + half + gap, box.y0, half, box.height)
        for rate, axes in zip(RATES, (first, page.add_axes(place)), strict=True):
            for row in rows:
                if row["rate"] == rate:
                    steps = range(len(row["losses"]))
                    look, style = SERIES[row["series"]], STYLES[row["series"]]
                    line = point(look, theme.LIGHT, steps, row["losses"], **style)
                    axes.add_line(line)
            axes.autoscale_view()
            axes.set_ylim(0, 1.6)
            axes.set_xlabel(f"Optimizer steps, at a rate of {rate:g}")
            axes.grid(axis="y")
        name_y(first, "Training loss, nats per label token")
        legend(page, handles)
    return page


# The benchmark -----------------------------------------------------------------------


def report(result: dict) -> str:
    """The result as text, for a terminal."""
    made = result["provenance"]
    lines = [
        f"{made['threads']} threads, {made['machine']}; load average before the run: "
        f"{result['load']}; share of an update left, B of "
        + ", ".join(f"{size:g}" for size in SIZES)
    ]
    for part in result["projections"]:
        tokens, d_in, d_out = part["shape"]
        head, *rows = side_by_side.lines(part["rows"], result["rounds"])
        lines += ["", f"{tokens} x {d_in} → {d_out}", head]
        for text, row in zip(rows, part["rows"], strict=True):
            lines.append(text + "  " + " ".join(f"{s:5.2f}" for s in row["shares"]))
    return "\n".join(lines)


def measure(base: str, rounds: int, steps: int) -> dict:
    """All of the benchmark, as JSON can hold it."""
    load = side_by_side.load()
    return {
        "benchmark": "rounding",
        "base": base,
        "rounds": rounds,
        "load": load,
        "sizes": SIZES,
        "projections": [of_shape(shape, rounds) for shape in SHAPES],
        "curves": curves(base, steps),
        "peft": package_version("peft"),
        "provenance": provenance(seed=SEED),
    }


def main(arguments: list[str]) -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", default="smollm2", help="as load_model takes it")
    parser.add_argument("--steps", type=int, default=8, help="of training")
    parser.add_argument(
        "--draw",
        type=Path,
        help=f"only draw this result file's curves to {FIGURE.name}",
    )
    asked = side_by_side.parsed(parser, arguments)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # speaks at import
    if asked.draw:
        result = json.loads(asked.draw.read_text("utf-8"))
    else:
        result = measure(asked.model, asked.rounds, asked.steps)
        place = side_by_side.write(result, asked.record, out=asked.out)
        print(report(result), place, sep="\n")
    file = FIGURE if asked.record else asked.out / FIGURE.name
    with new_file(file) as new:
        new.write_text(theme.svg(figure(result["curves"])), encoding="utf-8")
    print(f"drawn to {file}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    main(sys.argv[1:])
