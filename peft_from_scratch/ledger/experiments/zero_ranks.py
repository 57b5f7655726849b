"""F3 and Y3: the bytes that a rank keeps under ZeRO, counted on real ranks.

N processes form a group (gloo), and take two steps of full fine-tuning in each stage.
After the second backward pass, every rank adds up the storages that it keeps. With
bfloat16 weights and float32 states of Ψ parameters, the paper has (arXiv:1910.02054):

    stage   weights     gradients   states        a rank keeps
    none    2 Ψ         2 Ψ         12 Ψ          16 Ψ
    1       2 Ψ         2 Ψ         12 Ψ / N      4 Ψ + 12 Ψ / N
    2       2 Ψ         2 Ψ / N     12 Ψ / N      2 Ψ + 14 Ψ / N
    3       2 Ψ / N     2 Ψ / N     12 Ψ / N      16 Ψ / N

That the ranks learn the same as one rank is the control, in float32: there the rows of
all ranks go through one model and one AdamW.

The processes are forked from a server that has imported torch, where the system can do
that; else they are started anew, which takes seconds. They end with their job.
"""

import multiprocessing
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import nn

from ...core.adapter import trainable
from ...memory import zero
from ...memory.formulas import zero_bytes
from ...memory.meter import Meter
from ...memory.step_bill import optimizer_class
from ...methods import full
from ...models.load import load_model
from ...training.loss import accumulate_gradients
from .. import runs
from ..claim import FAILS, HOLDS, LARGE_HOLDS, Claim, Invalid, Measured, Rule
from ..runs import Run

RANKS, STAGES = (2, 4), (1, 2, 3)
LENGTH, RATE = 16, 1e-3  # tokens of each rank's row; of AdamW
ITEMSIZE = {"mixed": 2, "float32": 4}
RECIPES = {"tiny": ("mixed", "float32"), "smollm2": ("mixed",)}
KINDS = ("weights", "gradients", "optimizer")
CLOSE = 1e-2  # of the update's norm
START, ANSWER = 120, 600  # seconds: until all ranks are there; for their job
PRELOADED = ("torch.distributed", "transformers.models.llama.modeling_llama")


def config(base: str, recipe: str, ranks: int) -> dict:
    return {
        "experiment": "zero_ranks",
        "base": base,
        "base_digest": runs.base_digest(base),
        "recipe": recipe,
        "ranks": ranks,
        "length": LENGTH,
        "seed": 0,
    }


def configs(scale: str) -> list[dict]:
    return [
        config(scale, recipe, ranks) for recipe in RECIPES[scale] for ranks in RANKS
    ]


def compute(config: dict) -> dict:
    """Bytes on every rank, in each stage.

    Returns  parameters, tensors   of the model; tied ones once
             formula  {stage: {"weights", "gradients", "optimizer"}}, padding included
             ranks    {stage: [of each rank: the same, "sent" (bytes in the second
                      step), "peak" (bytes at one moment of its update) and, in
                      float32, "off": distance of its weights from one rank's, in
                      units of the update's norm]}
    """
    model, _ = load_model(config["base"], device="cpu")
    sizes = [p.numel() for p in model.parameters()]
    itemsize = ITEMSIZE[config["recipe"]]
    formula = {
        str(stage): zero_bytes(
            sizes, ranks=config["ranks"], stage=stage, itemsize=itemsize
        )
        for stage in STAGES
    }
    del model
    return {
        "parameters": sum(sizes),
        "tensors": len(sizes),
        "formula": formula,
        "ranks": by_stage(on_ranks(config["ranks"], config)),
    }


def by_stage(of_ranks: Sequence[Mapping]) -> dict[str, list[dict]]:
    """{stage: [of each rank]} of what the ranks report, one report a rank."""
    return {stage: [report[stage] for report in of_ranks] for stage in of_ranks[0]}


# --------------------------------------------------------------------- On a real rank


def job(config: Mapping) -> dict[str, dict]:
    """What this rank keeps in each stage; every rank of the group calls it."""
    return {str(stage): of_stage(config, stage) for stage in STAGES}


def of_stage(config: Mapping, stage: int) -> dict:
    """Two steps of one stage; see compute."""
    model = fresh(config)
    if stage == 3:
        zero.shard(model, timeout=ANSWER)
    own = trainable(model).values()
    optimizer = zero.Optimizer(own, stage, lr=RATE, timeout=ANSWER)
    for step in range(2):
        optimizer.zero_grad()
        accumulate_gradients(model, [row_of(config, step, dist.get_rank())])
        if step == 0:
            optimizer.step()
            sent = optimizer.ring.sent
    kept = zero.bytes_kept(model, optimizer)
    with Meter(model) as meter:
        optimizer.step()
    report = kept | {"sent": optimizer.ring.sent - sent, "peak": meter.memory().peak}
    if config["recipe"] == "float32":
        report["off"] = distance(model, config)
    return report


def fresh(config: Mapping) -> nn.Module:
    """The base, all of which trains."""
    dtype = {"mixed": "bfloat16", "float32": "float32"}[config["recipe"]]
    model, _ = load_model(config["base"], device="cpu", dtype=dtype)
    full.inject(model)
    return model.train()


def row_of(config: Mapping, step: int, rank: int) -> dict:
    """A rank's row of random tokens, all of them labels."""
    draw = torch.Generator().manual_seed(1000 * step + rank)
    ids = torch.randint(3, 1000, (1, config["length"]), generator=draw)
    return {"input_ids": ids, "labels": ids}


def distance(model: nn.Module, config: Mapping) -> float:
    """How far the weights are from those of one rank that reads all rows.

    In units of how far the two steps have moved them.
    """
    alone, start = fresh(config), fresh(config)
    optimizer = optimizer_class("fp32")(
        trainable(alone).values(), lr=RATE, weight_decay=1e-2
    )
    for step in range(2):
        optimizer.zero_grad()
        rows = [row_of(config, step, rank) for rank in range(config["ranks"])]
        accumulate_gradients(alone, rows)
        optimizer.step()
    with zero.whole(model), torch.no_grad():
        models = (model, alone, start)
        three = zip(*(each.parameters() for each in models), strict=True)
        pairs = [((w - a).norm(), (a - s).norm()) for w, a, s in three]
    off, moved = (sum(float(n) ** 2 for n in each) for each in zip(*pairs, strict=True))
    return (off / moved) ** 0.5


def on_ranks(size: int, config: Mapping) -> list[dict]:
    """What job(config) returns on each of `size` ranks, processes of this machine.

    Raises  RuntimeError  a rank failed or did not answer, with what it said
    """
    context = starting()
    with TemporaryDirectory() as folder:
        ends, processes = [], []
        try:
            for rank in range(size):
                ours, theirs = context.Pipe(duplex=False)
                given = rank, size, f"file://{folder}/store", theirs, dict(config)
                processes.append(context.Process(target=rank_main, args=given))
                processes[-1].daemon = True
                processes[-1].start()
                theirs.close()
                ends.append(ours)
            return [_answer(end, rank, size) for rank, end in enumerate(ends)]
        finally:
            for process in processes:
                process.join(5)
                process.kill()


def starting():
    """How processes are started here: forked from a server that has imported torch."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *PRELOADED])
    return context


def rank_main(rank: int, size: int, store: str, end, config: Mapping) -> None:
    """A rank's whole life: join the group, do the job, report, leave."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=START),
        )
        end.send(("", job(config)))
        dist.destroy_process_group()
    except Exception:
        end.send((traceback.format_exc(), None))
    end.close()


def _answer(end, rank: int, size: int) -> dict:
    """What a rank reports."""
    try:
        error, report = end.recv() if end.poll(ANSWER) else ("no answer", None)
    except EOFError:
        error, report = "it ended without an answer", None
    if error:
        raise RuntimeError(f"rank {rank} of {size} failed: {error}")
    return report


# ----------------------------------------------------------------------- What they say


def total(report: Mapping) -> int:
    """Weights, gradients and states of one rank, in bytes."""
    return sum(report[kind] for kind in KINDS)


def by_paper(parameters: int, ranks: int, stage: int, itemsize: int = 2) -> float:
    """Bytes that a rank keeps by the paper's formula, without padding."""
    states = 2 * max(itemsize, 4) + (4 if itemsize == 2 else 0)
    parts = itemsize, itemsize, states
    first = 3, 2, 1  # the stage from which on a part is cut
    shares = [1 / ranks if stage >= cut else 1 for cut in first]
    return parameters * sum(a * b for a, b in zip(parts, shares, strict=True))


def reached(run: Run, stage: int) -> float:
    """The saving on the rank that keeps the most, in % of the paper's."""
    parameters, ranks = run.result["parameters"], run.config["ranks"]
    whole = by_paper(parameters, 1, 0)
    most = max(map(total, run.result["ranks"][str(stage)]))
    return 100 * (whole - most) / (whole - by_paper(parameters, ranks, stage))


def factor(run: Run, name: str = "") -> float:
    """c, where a rank of stage 2 holds 2 Ψ + c Ψ / N bytes; of the fullest rank.

    Args
        name  "peak": at the worst moment of the update; else what is kept
    """
    parameters, ranks = run.result["parameters"], run.config["ranks"]
    reports = run.result["ranks"]["2"]
    most = max(report[name] if name else total(report) for report in reports)
    return ranks * (most - 2 * parameters) / parameters


def mixed(all_runs: Sequence[Run]) -> list[Run]:
    """The runs that count bytes; Invalid where those in float32 did not learn alike."""
    for run in all_runs:
        reports = [each for stage in run.result["ranks"].values() for each in stage]
        off = max((report.get("off", 0.0) for report in reports), default=0.0)
        if off > CLOSE:
            raise Invalid(
                f"{run.key}: the ranks' weights are {off:.2g} of an update away from "
                "those of one rank that reads all rows"
            )
    return [run for run in all_runs if run.config["recipe"] == "mixed"]


def measured_saving(all_runs: Sequence[Run]) -> Measured:
    """F3: the smallest share of the paper's saving that a stage reaches."""
    shares = {
        (run.config["ranks"], stage): reached(run, stage)
        for run in mixed(all_runs)
        for stage in STAGES
    }
    most = max(mixed(all_runs), key=lambda run: run.config["ranks"])
    figures = {
        f"stage{stage}": f"{max(map(total, reports)) / most.result['parameters']:.1f}"
        for stage, reports in most.result["ranks"].items()
    }
    figures |= {"ranks": str(most.config["ranks"])}
    low, high = min(shares.values()), max(shares.values())
    return Measured(low, low, max(low, high), (), figures)


def measured_factor(all_runs: Sequence[Run]) -> Measured:
    """Y3: c of 2 Ψ + c Ψ / N, kept between backward and update in stage 2."""
    factors = [factor(run) for run in mixed(all_runs)]
    peaks = [factor(run, "peak") for run in mixed(all_runs)]
    value = fmean(factors)
    figures = {"factor": f"{value:.2f}", "peak": f"{max(peaks):.1f}"}
    return Measured(value, min(factors), max(factors), (), figures)


SAVING = (
    "On {ranks} ranks, a rank keeps {stage1}, {stage2} and {stage3} bytes a parameter "
    "in stages 1, 2 and 3, and 16 without ZeRO. Each stage cuts another row: states, "
    "then gradients, then weights. Activations are not cut: they belong to a rank's "
    "own rows. Counted on processes of one machine, with this library's zero.py; "
    "docs/many_devices.md has DeepSpeed and FSDP2"
)
FACTOR = (
    "Between backward and update, a rank of stage 2 keeps 2 P + {factor} P / N bytes "
    "with this library's zero.py. At the worst moment of its update it is 2 P + {peak} "
    "P / N, since one tensor at a time has float32 copies. DeepSpeed's estimator says "
    "18 in the place of 14: it also counts float32 gradients of the whole part. "
    "docs/many_devices.md has what DeepSpeed and FSDP2 themselves keep"
)
CLAIMS = (
    Claim(
        id="F3",
        notebook="02",
        statement=(
            "ZeRO reduces the 112 GB of a 7B model's full fine-tuning across several "
            "GPUs"
        ),
        rule=Rule(
            words=(
                "Bytes of weights, gradients and states that ZeRO saves on a rank, as "
                "a share of what the paper's formula says, counted between backward "
                "and update on real ranks in mixed precision; the smallest and the "
                "largest share over stages 1 to 3 and over 2 and 4 ranks; void unless "
                "in float32 the ranks' weights are those of one rank that reads all "
                "rows"
            ),
            unit="% of the paper's saving",
            verdicts=LARGE_HOLDS,
            edges=(50.0, 95.0),
        ),
        configs=configs,
        measured=measured_saving,
        number="smallest share of the paper's saving that a stage reaches",
        condition="padding and tensors that stay whole are a small part of the model",
        say_instead={
            "holds": SAVING,
            "holds when": SAVING,
            "does not hold here": SAVING,
        },
        so={
            "holds": (
                "On {ranks} ranks, stages 1, 2 and 3 leave {stage1}, {stage2} and "
                "{stage3} of 16 bytes a parameter; activations stay."
            ),
            "holds when": (
                "On {ranks} ranks, stages 1, 2 and 3 leave {stage1}, {stage2} and "
                "{stage3} of 16 bytes a parameter; activations stay."
            ),
            "does not hold here": (
                "On {ranks} ranks a rank keeps {stage1}, {stage2} and {stage3} bytes a "
                "parameter: less is saved than the formula says."
            ),
        },
    ),
    Claim(
        id="Y3",
        notebook="02",
        source="arXiv:1910.02054",
        statement="In stage 2 of ZeRO, each of N ranks holds 2 P + 14 P / N bytes",
        rule=Rule(
            words=(
                "c, where a rank of stage 2 keeps 2 P + c P / N bytes of weights, "
                "gradients and states between backward and update; counted on the "
                "fullest of 2 and of 4 real ranks in mixed precision, P parameters; "
                "the interval is the range of both; void as F3 is"
            ),
            unit="bytes a parameter of the part",
            verdicts=(FAILS, HOLDS, FAILS),
            edges=(13.5, 14.5),
        ),
        configs=configs,
        measured=measured_factor,
        number="c, where a rank keeps 2 P + c P / N bytes",
        say_instead={"holds": FACTOR, "does not hold here": FACTOR},
        so={
            "holds": (
                "A rank of stage 2 keeps 2 P + {factor} P / N bytes. The 18 of "
                "DeepSpeed's estimator counts float32 gradients, too."
            ),
            "does not hold here": (
                "A rank of stage 2 keeps 2 P + {factor} P / N bytes here: "
                "implementations differ in what they hold."
            ),
        },
    ),
)
