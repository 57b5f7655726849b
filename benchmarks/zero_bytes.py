"""ZeRO, FSDP2 and DeepSpeed on real ranks: the bytes that a rank keeps and sends.

    python benchmarks/zero_bytes.py [--model tiny] [--ranks 2 4] [--record]

For full fine-tuning and LoRA, on each number of ranks, with each engine and in each
stage, one optimizer step is made on processes that form a gloo group on this machine.
DeepSpeed is left out where it is not installed.

    kept    weights, gradients and optimizer states of rank 0, by the storages of its
            tensors, after backward and with the states there: formulas.zero_bytes, and
            formulas.fsdp2_bytes of FSDP2, which cuts by rows
    sent    by rank 0 in the step, by our own ZeRO: formulas.zero_traffic. For stage 3
            the formula counts every weight twice, for forward and for backward.
            Backward reads no embedding, and no weight that no gradient passes through;
            a tied one counts for each of its modules

In bfloat16, full fine-tuning keeps float32 masters: 2 Ψ + 14 Ψ / N bytes in stage 2, in
which DeepSpeed's estimator says 2 Ψ + 18 Ψ / N. It counts float32 gradients besides.
FSDP2 has no masters of its own, and is counted in float32 alone.

No time is measured: ranks that share the cores of one machine say nothing of it. So a
busy machine changes no number, and --rounds and --allow-load have no effect on them.
"""

import multiprocessing
import os
import sys
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from tempfile import TemporaryDirectory

import side_by_side
import torch
import torch.distributed as dist
from torch import nn

import peft_from_scratch as pfs
from peft_from_scratch.common.provenance import provenance
from peft_from_scratch.memory import formulas, zero
from peft_from_scratch.parallel import fsdp2

METHODS, STAGES, SEED, LENGTH = ("full", "lora"), (1, 2, 3), 0, 16
KINDS = ("weights", "gradients", "optimizer")
HAS_DEEPSPEED = find_spec("deepspeed") is not None


def cases() -> list[tuple[str, int | None, str, str]]:
    """(engine, stage, method, dtype) of every count."""
    staged = ["zero", "deepspeed"] if HAS_DEEPSPEED else ["zero"]
    rows = [(e, s, m, "float32") for e in staged for m in METHODS for s in STAGES]
    rows += [(e, s, "full", "bfloat16") for e in staged for s in STAGES]
    return rows + [("fsdp2", None, method, "float32") for method in METHODS]


def counted(base: str, engine: str, stage: int | None, method: str, dtype: str) -> dict:
    """What this rank keeps and sends, and the formulas, as JSON can hold it."""
    model, _ = pfs.load_model(base, device="cpu", dtype=dtype)
    torch.manual_seed(SEED)
    getattr(pfs, method).inject(model)
    shapes = {
        flag: [[*p.shape] for p in model.parameters() if p.requires_grad == flag]
        for flag in (True, False)
    }
    torch.manual_seed(SEED + dist.get_rank())
    ids = torch.randint(3, model.config.vocab_size, (1, LENGTH))
    kept, sent = STEPS[engine](model, stage, ids)
    trains, frozen = (
        [*map(torch.Size.numel, map(torch.Size, s))] for s in shapes.values()
    )
    sizes = dict(ranks=dist.get_world_size())
    if engine == "fsdp2":
        expected = formulas.fsdp2_bytes(shapes[True], shapes[False], **sizes)
    else:
        sizes |= {"stage": stage, "itemsize": getattr(torch, dtype).itemsize}
        expected = formulas.zero_bytes(trains, frozen, **sizes)
    row = {
        "engine": engine,
        "method": method,
        "dtype": dtype,
        "ranks": sizes["ranks"],
        "stage": stage,
        "trainable": sum(trains),
        "frozen": sum(frozen),
        "kept": kept,
        "kept_formula": expected,
    }
    if engine == "zero":
        row["sent"] = sent
        row["sent_formula"] = formulas.zero_traffic(
            trains, **sizes, gathered=(trains + frozen) * 2
        )
    return row | _estimated(row)


def of_zero(model: nn.Module, stage: int, ids) -> tuple:
    """(kept, sent) of a step of our own ZeRO, the second, which finds states."""
    if stage == 3:
        zero.shard(model)
    optimizer = zero.Optimizer(pfs.trainable(model).values(), stage)
    for _ in range(2):
        optimizer.zero_grad()
        before = optimizer.ring.sent
        model(ids, labels=ids, use_cache=False).loss.backward()
        kept = zero.bytes_kept(model, optimizer)
        optimizer.step()
    return kept, optimizer.ring.sent - before


def of_fsdp2(model: nn.Module, stage: None, ids) -> tuple:
    """(kept, None) of torch's fully_shard."""
    fsdp2.cut(model)
    optimizer = torch.optim.AdamW(pfs.trainable(model).values())
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        kept = zero.bytes_kept(model, optimizer)
        optimizer.step()
    return kept, None


def of_deepspeed(model: nn.Module, stage: int, ids) -> tuple:
    """(kept, None) of DeepSpeed."""
    import deepspeed

    parameters = list(pfs.trainable(model).values())
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": parameters[0].dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 2**16,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(parameters),
        model_parameters=parameters,
        config=settings,
        dist_init_required=False,
    )[0]
    for _ in range(2):
        engine.backward(engine(ids, labels=ids, use_cache=False).loss)
        kept = kept_by_deepspeed(engine)
        engine.step()
    engine.destroy()
    return kept, None


STEPS = {"zero": of_zero, "fsdp2": of_fsdp2, "deepspeed": of_deepspeed}


def kept_by_deepspeed(engine) -> dict[str, int]:
    """{"weights", "gradients", "optimizer"}; float32 copies count for the optimizer."""
    owner = engine.optimizer
    parameters = list(engine.module.parameters())
    weights = [*parameters, *(p.ds_tensor for p in parameters if hasattr(p, "ds_id"))]
    gradients = [p.grad for p in parameters]
    gradients += list(tensors_in(owner.averaged_gradients))
    copies = "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"
    states = [t for name in copies for t in getattr(owner, name, [])]
    states += list(tensors_in(owner.optimizer.state))
    every = zip(KINDS, (weights, gradients, states), strict=True)
    return {kind: bytes_of(filter(torch.is_tensor, tensors)) for kind, tensors in every}


def tensors_in(values):
    """Every tensor in nested dicts and lists."""
    if torch.is_tensor(values):
        yield values
    elif isinstance(values, dict):
        for each in values.values():
            yield from tensors_in(each)
    elif isinstance(values, list | tuple):
        for each in values:
            yield from tensors_in(each)


def bytes_of(tensors) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {}
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = local.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _estimated(row: dict) -> dict:
    """What DeepSpeed's own estimator says of stage 2 in bfloat16, where it is asked."""
    if (row["engine"], row["stage"], row["dtype"]) != ("deepspeed", 2, "bfloat16"):
        return {}
    from deepspeed.runtime.zero import stage_1_and_2 as theirs

    _, device = theirs.estimate_zero2_model_states_mem_needs(
        row["trainable"], num_gpus_per_node=row["ranks"], cpu_offload=False
    )
    return {"deepspeed_estimate": device}


def of_rank(rank: int, ranks: int, store: str, base: str, results) -> None:
    """All counts on one rank; rank 0 sends them to the parent."""
    torch.set_num_threads(1)
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    dist.init_process_group(
        "gloo",
        init_method=store,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=5),
    )
    rows = [counted(base, *case) for case in cases()]
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
    heads = [*KINDS, "kept", "formula", "sent", "formula"]
    table = [f"{'bytes of rank 0':44}" + "".join(f"{head:>12}" for head in heads)]
    for row in rows:
        kept, formula = row["kept"], sum(row["kept_formula"].values())
        figures = [*kept.values(), sum(kept.values()), formula]
        figures += [row[key] for key in ("sent", "sent_formula") if key in row]
        stage = f", stage {row['stage']}" if row["stage"] else ""
        name = f"{row['engine']}{stage}, {row['method']} in {row['dtype']}"
        name += f", {row['ranks']} ranks"
        table.append(f"{name:44}" + "".join(f"{f:>12,}" for f in figures))
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
        "deepspeed": version("deepspeed") if HAS_DEEPSPEED else None,
        "provenance": provenance(seed=SEED),
    }
    place = side_by_side.write(result, asked.record, out=asked.out)
    print(*lines(rows), place, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
