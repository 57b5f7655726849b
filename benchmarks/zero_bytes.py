"""ZeRO on real ranks: the bytes that a rank keeps, and those that it sends in a step.

    python benchmarks/zero_bytes.py [--model tiny] [--ranks 2 4] [--record]

For full fine-tuning and LoRA, on each number of ranks and in each stage, one optimizer
step is made on processes that form a gloo group on this machine. Two counts stand
beside their formulas:

    kept    weights, gradients and optimizer states of rank 0, by the storages of its
            tensors, after backward and with the states there: formulas.zero_bytes
    sent    by rank 0 in the step: formulas.zero_traffic. For stage 3 the formula counts
            every weight twice, for forward and for backward. Backward reads no
            embedding, and no weight that no gradient passes through; a tied one counts
            for each of its modules

No time is measured: ranks that share the cores of one machine say nothing of it. So a
busy machine changes no number, and --rounds and --allow-load have no effect on them.
"""

import multiprocessing
import sys
from datetime import timedelta
from tempfile import TemporaryDirectory

import side_by_side
import torch
import torch.distributed as dist

import peft_from_scratch as pfs
from peft_from_scratch.common.provenance import provenance
from peft_from_scratch.memory import formulas, zero

METHODS, STAGES, SEED, LENGTH = ("full", "lora"), (1, 2, 3), 0, 16


def counted(base: str, method: str, stage: int) -> dict:
    """What this rank keeps and sends, and the formulas, as JSON can hold it."""
    model, _ = pfs.load_model(base, device="cpu")
    torch.manual_seed(SEED)
    getattr(pfs, method).inject(model)
    if stage == 3:
        zero.shard(model)
    optimizer = zero.Optimizer(pfs.trainable(model).values(), stage)
    torch.manual_seed(SEED + dist.get_rank())
    ids = torch.randint(3, model.config.vocab_size, (1, LENGTH))
    for _ in range(2):  # the second one finds the states
        optimizer.zero_grad()
        before = optimizer.ring.sent
        model(ids, labels=ids, use_cache=False).loss.backward()
        kept = zero.bytes_kept(model, optimizer)
        optimizer.step()
    ranks = dist.get_world_size()
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    frozen = [p.numel() for p in model.parameters() if not p.requires_grad]
    return {
        "method": method,
        "ranks": ranks,
        "stage": stage,
        "trainable": sum(trainable),
        "frozen": sum(frozen),
        "kept": kept,
        "kept_formula": formulas.zero_bytes(
            trainable, frozen, ranks=ranks, stage=stage
        ),
        "sent": optimizer.ring.sent - before,
        "sent_formula": formulas.zero_traffic(
            trainable, ranks=ranks, stage=stage, gathered=(trainable + frozen) * 2
        ),
    }


def of_rank(rank: int, ranks: int, store: str, base: str, results) -> None:
    """All counts on one rank; rank 0 sends them to the parent."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=store,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=5),
    )
    rows = [counted(base, method, stage) for method in METHODS for stage in STAGES]
    if rank == 0:
        results.send(rows)
    dist.destroy_process_group()


def on(ranks: int, base: str) -> list[dict]:
    """The rows of rank 0 of so many ranks."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        processes = [
            context.Process(target=of_rank, args=(rank, ranks, store, base, theirs))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        theirs.close()
        rows = ours.recv()
        for process in processes:
            process.join()
    return rows


def lines(rows: list[dict]) -> list[str]:
    """The counts as a table, for a terminal."""
    table = [
        f"{'bytes of rank 0':22}{'weights':>12}{'gradients':>12}{'optimizer':>12}"
        f"{'kept':>12}{'formula':>12}{'sent':>12}{'formula':>12}"
    ]
    for row in rows:
        kept = row["kept"]
        figures = [
            *kept.values(),
            sum(kept.values()),
            sum(row["kept_formula"].values()),
        ]
        figures += row["sent"], row["sent_formula"]
        name = f"{row['method']}, {row['ranks']} ranks, stage {row['stage']}"
        table.append(f"{name:22}" + "".join(f"{f:>12,}" for f in figures))
    return table


def main(arguments: list[str]) -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", default="tiny", help="as load_model takes it")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    asked = side_by_side.parsed(parser, arguments)
    rows = [row for ranks in asked.ranks for row in on(ranks, asked.model)]
    result = {
        "benchmark": "zero_bytes",
        "base": asked.model,
        "tokens": LENGTH,
        "rows": rows,
        "provenance": provenance(seed=SEED),
    }
    place = side_by_side.write(result, asked.record, out=asked.out)
    print(*lines(rows), place, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
