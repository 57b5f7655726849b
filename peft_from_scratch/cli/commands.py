"""What `train` and `merge` do on the command line.

`train` leaves in its folder the adapter and training.json, which says how the model was
spoken to (template, instruction); chat.py reads it and speaks to the adapter likewise.
"""

import inspect
import json
import os
import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch

from ..common import atomic
from ..common.check import whole
from ..common.quiet import quiet_transformers
from ..common.statistics import are_counts, of_scores
from ..comparison.figures import training_curve
from ..comparison.plan import OF_DATA
from ..core import adapter
from ..core.counting import count
from ..core.merge import merge
from ..files import exchange
from ..methods import named
from ..models.load import (
    AUTO,
    describe,
    dtype_name,
    load_model,
    pick_device,
    pick_dtype,
)
from ..nf4 import dequantize_model
from ..parallel.group import Group
from ..tasks.manner import RECORD
from ..tasks.scorers import Score, title
from ..tasks.task import Task, load_task
from ..training import checkpoint, evaluation
from ..training.abilities import refuse_unable
from ..training.config import TrainConfig
from ..training.evaluation import Answers
from ..training.fitting import encode_task, row_limit
from ..training.loop import train
from ..training.precision import autocast_of, loaded_in
from ..training.state import Engine, alone
from . import masks
from .chat import stop_of

OPTIONS = ("r", "alpha", "targets", "m", "n")  # of the methods' inject
OF_MEMORY = ("checkpointing", "chunk", "buckets")  # of TrainConfig
TEST_ROWS = 100  # answered before and after
BEFORE, AFTER = "answers-before.json", "answers-after.json"  # beside the checkpoints


def fine_tune(options, engine: Engine = alone, group: Group | None = None) -> None:
    """Fine-tune on the rows of `options.data`; adapter and record go to a folder.

    Writes the adapter in PEFT's layout, training.png and training.json (recipe,
    instruction, losses, scores), then deletes its checkpoints. Stopped and called
    again, it goes on from the newest of them. All that can be wrong with the arguments
    and the rows is found before the first answer and the first step. With
    --show-masks, which needs no folder, the rows are shown instead.

    On several ranks (cli/ranks.py) rank 0 answers, writes and shows; the other ranks
    wait for its answers, and train.
    """
    first = group is None or group.rank == 0
    config, out = train_config(options), _out(options)
    task = load_task(options.data, **given(options, *OF_DATA))
    dtype = pick_dtype(options.dtype or AUTO, pick_device(options.device))
    method, of_base = options.method, dtype_name(dtype)
    model, tokenizer = load_model(
        options.base, device=options.device, dtype=loaded_in(method, of_base)
    )
    config = replace(config, autocast=autocast_of(method, of_base))
    print(describe(model) + (f", autocast to {of_base}" if config.autocast else ""))
    arguments = _arguments(options, tokenizer, task)
    torch.manual_seed(options.seed)
    named(options.method).module.inject(model, **arguments)
    refuse_unable(model, config)
    print(_counted(model))
    encoded = encode_task(
        tokenizer,
        task,
        template=config.template,
        max_tokens=row_limit(model, options.max_tokens),
    )
    if out is None:
        n, template = options.show_masks, config.template
        masks.show(tokenizer, task.train, encoded["train"], n, template)
        return
    test = task.test.select(range(min(TEST_ROWS, len(task.test))))
    checkpoints = out / "checkpoints"

    def answer(keep: str) -> Answers:
        return evaluation.answer_rows(
            model,
            tokenizer,
            task,
            test,
            template=config.template,
            progress=True,
            keep=checkpoints / keep,
        )

    if first:
        with _base_alone(model):
            before = answer(BEFORE)
    if group is not None:
        group.meet()
    history = train(
        model,
        tokenizer,
        task,
        config,
        encoded=(encoded["train"], encoded["validation"]),
        checkpoints=checkpoints,
        progress=first,
        engine=engine,
    )
    if not first:
        return
    print(history.packing)
    after = answer(AFTER)
    exchange.save(model, out)
    _write_record(out, options, of_base, task, config, history, before, after)
    _remove_checkpoints(checkpoints)
    print(
        f"{title(task.score)} on {len(test)} test rows: "
        f"{_scored(before.correct, after.correct)}"
    )
    print(f"adapter, {RECORD} and training.png are in {out}")
    adapted = shlex.join(["--base", options.base, "--adapter", str(out)])
    print(f"talk to it:  python -m peft_from_scratch chat {adapted}")


def merge_to_folder(options) -> None:
    """Fold an adapter into its base and write a model that needs no adapter code.

    Its generation config ends answers where they ended in training: a base model's own
    end token is often another one than that of the chat template.
    """
    out = Path(options.out)
    if out.exists():
        raise FileExistsError(f"{out} is there already; name a new folder")
    model, tokenizer = load_model(options.base, device=options.device)
    names = exchange.load_as_trained(model, options.adapter)
    errors = merge(model)
    dequantize_model(model)  # what was in four bits and had no adapter
    if tokenizer.chat_template or tokenizer.eos_token_id is not None:
        _end_at(model, stop_of(options.adapter, tokenizer))
    with atomic.new_folder(out) as folder, quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    worst = max(errors.values(), default=0.0)
    print(
        f"merged {len(names)} modules; rounding lost {worst:.1e} of the change at most"
    )
    print(f"{out} is a whole model: load it with transformers, or --base {out}")


def _end_at(model, stop: int) -> None:
    """Let generate() end an answer at this token, too."""
    config = model.generation_config
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if stop not in ends:
        config.eos_token_id = [*ends, stop]


def given(options, *names: str) -> dict:
    """Those of the options that were written; the others keep the library's default."""
    return {n: getattr(options, n) for n in names if getattr(options, n) is not None}


# ------------------------------------------------------------------------- train


def train_config(options) -> TrainConfig:
    """The recipe that the options ask for."""
    lr = named(options.method).lr if options.lr is None else options.lr
    return TrainConfig(
        steps=options.steps,
        batch=options.batch,
        accumulate=options.accumulate,
        lr=lr,
        warmup=options.steps // 10,
        seed=options.seed,
        template=options.template,
        validate_every=max(1, options.steps // 5),
        **given(options, "max_tokens", "paged", *OF_MEMORY),
    )


def _out(options) -> Path | None:
    """The folder for the adapter; None where masks are shown and nothing is trained."""
    if options.show_masks is not None:
        whole("--show-masks", options.show_masks, 1, of="rows")
        return None
    if options.out is None:
        raise ValueError(
            "--out is missing: name a folder for the adapter; only --show-masks N, "
            "which trains nothing, needs none"
        )
    _check_out(Path(options.out))
    return Path(options.out)


def _check_out(out: Path) -> None:
    """An OSError unless `out` is, or can become, a folder without a finished run."""
    if (out / RECORD).exists():
        raise FileExistsError(
            f"--out {out} holds a finished run ({RECORD}): name another folder, or "
            "delete this one"
        )
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--out {out}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out}: nothing can be written to {there}")


def _base_alone(model) -> AbstractContextManager[None]:
    """The model without its adapters inside: a new soft prompt has other answers.

    What trains the base's own weights, as full fine-tuning does, has no adapters, and
    has changed nothing before the first step.
    """
    return adapter.disabled(model) if adapter.adapters(model) else nullcontext()


def _arguments(options, tokenizer, task: Task) -> dict:
    """The options that were given, for the method's inject; where it can, from text.

    Raises  ValueError  one that this method does not have
    """
    taken = inspect.signature(named(options.method).module.inject).parameters
    arguments = given(options, *OPTIONS)
    for name in arguments:
        if name not in taken:
            has = [f"--{o}" for o in OPTIONS if o in taken]
            raise ValueError(
                f"--{name} is no option of --method {options.method}, which has "
                f"{', '.join(has) or 'none'}"
            )
    if "start" in taken and task.instruction:
        arguments["start"] = tokenizer(task.instruction).input_ids
    return arguments


def _counted(model) -> str:
    counted = count(model)
    return f"{counted.trainable:,} of {counted.total:,} parameters train"


def _scored(*scores: Sequence[Score]) -> str:
    """ "before -> after": right ones of all, or mean scores; each with its interval."""
    if not all(map(are_counts, scores)):
        means = [map("{:.3f}".format, of_scores(each)) for each in scores]
        texts = ("{} (95 % interval {} to {})".format(*each) for each in means)
    else:
        texts = map(_counted_right, scores)
    return " -> ".join(texts)


def _counted_right(scores: Sequence[Score]) -> str:
    _, low, high = of_scores(scores)
    interval = f"95 % interval {100 * low:.0f} to {100 * high:.0f} %"
    return f"{sum(scores):.0f}/{len(scores)} ({interval})"


def _write_record(
    out: Path, options, dtype: str, task, config, history, before, after
) -> None:
    """The picture, and last the record, whose presence says that the run is over."""
    with atomic.new_file(out / "training.png") as file:
        training_curve(history).savefig(file, dpi=150)
    record = {
        "base": options.base,
        "data": options.data,
        "method": options.method,
        "dtype": dtype,
        "instruction": task.instruction,
        "scorer": options.scorer,
        "recipe": vars(config),
        "loss": history.loss,
        "validation": history.validation,
        "correct_before": before.correct,
        "correct_after": after.correct,
    }
    with atomic.new_file(out / RECORD) as file:
        file.write_text(json.dumps(record, indent=1) + "\n")


def _remove_checkpoints(folder: Path) -> None:
    """Delete what the run kept for going on, and nothing that others put there."""
    for path in checkpoint.checkpoints(folder):
        atomic.remove_folder(path)
    for name in (BEFORE, AFTER):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # not empty: then it is not only ours
        folder.rmdir()
