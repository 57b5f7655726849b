"""A job on several ranks: processes that form a gloo group, on this machine.

A server that has imported what takes seconds forks the processes, where the system can.
It was started before any test ran, so a bug that a test has planted is not in it: the
code of the modules in CHANGED is sent along with the job.
"""

import inspect
import marshal
import multiprocessing
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from tqdm import tqdm

SLOW_TO_IMPORT = ["torch.distributed", "transformers.models.gpt2.modeling_gpt2"]
SLOW_TO_IMPORT += ["transformers.models.llama.modeling_llama", "rank_jobs"]
SLOW_TO_IMPORT += ["engine_jobs"]
CHANGED = [
    *(f"memory.{name}" for name in ("collectives", "shards", "zero")),
    *(
        f"parallel.{name}"
        for name in ("state", "group", "twin", "zero_engine", "fsdp2")
    ),
    *(
        f"training.{name}"
        for name in ("loop", "checkpoint", "state", "gradient_checkpointing")
    ),
]
START = 90  # seconds in which all ranks must have started; a busy machine takes some
LOST = "no answer"  # of a rank that ended without one


def on_ranks(
    size: int, job: Callable, *arguments, dies: int | None = None, seconds: float = 120
) -> list:
    """What job(*arguments) returns on each rank.

    Args
        dies     the rank that may end without an answer, which is then LOST
        seconds  to wait for an answer
    Raises  AssertionError   where one of them does, with its traceback
            RuntimeError     for any other error, and where an answer does not come
    """
    context = _context()
    with TemporaryDirectory() as folder:
        ends, processes, code = [], [], _code()
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            given = (rank, size, f"file://{folder}/store", code, theirs, job, arguments)
            processes.append(context.Process(target=_rank, args=given, daemon=True))
            processes[-1].start()
            theirs.close()
            ends.append(ours)
        answers = [_answer(end, seconds) for end in ends]
        for process in processes:
            process.join(5)
            process.kill()
    for rank, (_, result) in enumerate(answers):
        if result == LOST and rank != dies:
            answers[rank] = "RuntimeError", f"no answer within {seconds} s"
    for kind in (AssertionError, RuntimeError):
        for rank, (sort, text) in enumerate(answers):
            if sort == kind.__name__:
                raise kind(f"on rank {rank} of {size}:\n{text}")
    return [result for _, result in answers]


def _context():
    known = multiprocessing.get_all_start_methods()
    if "forkserver" not in known:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_TO_IMPORT)
    return context


def _answer(end, seconds: float) -> tuple[str, object]:
    try:
        return end.recv() if end.poll(seconds) else ("", LOST)
    except EOFError:
        return "", LOST


def _rank(rank, size, store, code, end, job, arguments) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    for (module, name), changed in code.items():
        _function(import_module(module), name).__code__ = marshal.loads(changed)
    try:
        dist.init_process_group(
            "gloo",
            init_method=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=START),
        )
        end.send(("", job(*arguments)))
    except AssertionError:
        end.send(("AssertionError", traceback.format_exc()))
    except Exception:
        end.send(("RuntimeError", traceback.format_exc()))
    end.close()
    dist.destroy_process_group()


def _code() -> dict[tuple[str, str], bytes]:
    """{(module, name): code} of every function of the modules in CHANGED."""
    code = {}
    for name in CHANGED:
        module = import_module(f"peft_from_scratch.{name}")
        for owner in [module, *vars(module).values()]:
            if getattr(owner, "__module__", module.__name__) == module.__name__:
                for each in vars(owner).values() if hasattr(owner, "__dict__") else ():
                    _note(code, module, each)
    return code


def _note(code: dict, module, value) -> None:
    value = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else 0
    written = inspect.isfunction(value) and value.__module__ == module.__name__
    # not functions in functions, nor those that torch.compile leaves in a module
    if written and _function(module, value.__qualname__) is value:
        code[module.__name__, value.__qualname__] = marshal.dumps(value.__code__)


def _function(module, name: str):
    """What a child finds under this name in its own copy of the module, or None."""
    value = module
    for part in name.split("."):
        value = getattr(value, "__dict__", {}).get(part)
    return inspect.unwrap(getattr(value, "__func__", value)) if value else None
