"""What `train` and `merge` do on the command line.

`train` leaves in its folder the adapter and training.json, which says how the model was
spoken to (template, instruction); chat.py reads it and speaks to the adapter likewise.
"""

import inspect
import json
import os
import re
import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import torch

from ..common import atomic, records
from ..common.quiet import quiet_transformers
from ..common.statistics import wilson
from ..comparison.figures import training_curve
from ..core import adapter
from ..core.counting import count
from ..core.decoder import positions, positions_in_words
from ..core.merge import merge
from ..files import exchange
from ..methods import named
from ..models.load import describe, load_model
from ..nf4 import dequantize_model
from ..tasks import templates
from ..tasks.jsonl import refuse_bad
from ..tasks.task import Task, load_task
from ..training import checkpoint, evaluation
from ..training.batch import Row
from ..training.config import TrainConfig
from ..training.evaluation import Answers
from ..training.loop import train
from .chat import RECORD

OPTIONS = ("r", "alpha", "targets", "m", "n")  # of the methods' inject
TEST_ROWS = 100  # answered before and after


def fine_tune(options) -> None:
    """Fine-tune on the rows of `options.data`; adapter and record go to a folder.

    Writes the adapter in PEFT's layout, training.png and training.json (recipe,
    instruction, losses, scores), then deletes its checkpoints. Stopped and called
    again, it goes on from the newest of them. All that can be wrong with the arguments
    and the rows is found before the first answer and the first step.
    """
    config, out = _config(options), Path(options.out)
    _check_out(out)
    task = load_task(options.data, **given(options, "prompt", "completion", "config"))
    model, tokenizer = load_model(options.base, device=options.device)
    print(describe(model))
    arguments = _arguments(options, tokenizer, task)
    torch.manual_seed(options.seed)
    named(options.method).module.inject(model, **arguments)
    print(_counted(model))
    encoded = _encode(model, tokenizer, task, config, options)
    test = task.test.select(range(min(TEST_ROWS, len(task.test))))

    def answer() -> Answers:
        return evaluation.answer_rows(
            model, tokenizer, task, test, template=config.template, progress=True
        )

    checkpoints = out / "checkpoints"
    with _base_alone(model):
        before = _answers_before(checkpoints, len(test), answer)
    history = train(
        model, tokenizer, task, config, encoded=encoded, checkpoints=checkpoints
    )
    print(history.packing)
    after = answer()
    exchange.save(model, out)
    _write_record(out, options, task, config, history, before, after)
    _remove_checkpoints(checkpoints)
    print(
        f"exact match on {len(test)} test rows: {_scored(before)} -> {_scored(after)}"
    )
    print(f"adapter, {RECORD} and training.png are in {out}")
    adapted = shlex.join(["--base", options.base, "--adapter", str(out)])
    print(f"talk to it:  python -m peft_from_scratch chat {adapted}")


def merge_to_folder(options) -> None:
    """Fold an adapter into its base and write a model that needs no adapter code."""
    out = Path(options.out)
    if out.exists():
        raise FileExistsError(f"{out} is there already; name a new folder")
    model, tokenizer = load_model(options.base, device=options.device)
    names = exchange.load_as_trained(model, options.adapter)
    errors = merge(model)
    dequantize_model(model)  # what was in four bits and had no adapter
    with atomic.new_folder(out) as folder, quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    worst = max(errors.values(), default=0.0)
    print(
        f"merged {len(names)} modules; rounding lost {worst:.1e} of the change at most"
    )
    print(f"{out} is a whole model: load it with transformers, or --base {out}")


def given(options, *names: str) -> dict:
    """Those of the options that were written; the others keep the library's default."""
    return {n: getattr(options, n) for n in names if getattr(options, n) is not None}


# ------------------------------------------------------------------------- train


def _config(options) -> TrainConfig:
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
        **given(options, "max_tokens", "paged"),
    )


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


def _encode(
    model, tokenizer, task: Task, config: TrainConfig, options
) -> tuple[list[Row], list[Row]]:
    """Training and validation rows as tokens; the test rows are only checked.

    Raises  ValueError  an empty split, or a list of the bad rows of all three
    """
    limit, most = config.max_tokens, positions(model)
    if most is not None and limit > most:
        if options.max_tokens is not None:
            raise ValueError(
                f"--max-tokens {limit}: the model has {positions_in_words(model)}; "
                "allowed is that many at most"
            )
        limit = most
    encoded, bad = {}, []
    for split in ("train", "validation", "test"):
        rows = getattr(task, split)
        if not len(rows):
            raise ValueError(f"{task.name} has no rows left for its {split} split")
        encoded[split], bad_rows = templates.encode_all(
            tokenizer,
            task.instruction,
            rows,
            template=config.template,
            max_tokens=limit,
        )
        # A generated row has no place in a file, only one in its split.
        of_split = "" if "place" in rows.column_names else f" of {split}"
        bad += [(place + of_split, reason) for place, reason in bad_rows]
    # The splits are shuffled; this is the order of the file again.
    bad.sort(key=lambda each: int(re.search(r"\d+", each[0])[0]))
    refuse_bad(bad, task.name)
    return encoded["train"], encoded["validation"]


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


def _answers_before(
    checkpoints: Path, rows: int, answer: Callable[[], Answers]
) -> Answers:
    """The answers before training; of a run that was stopped, those it had then.

    So a resumed run asks nothing twice, and where the checkpoints are another run's,
    train() refuses them at once and not after minutes of answering. A file that cannot
    be read is said, and the rows are answered again, by the same model.
    """
    file = checkpoints / "answers-before.json"
    if checkpoint.checkpoints(checkpoints) and file.exists():
        try:
            return _kept_answers(file, rows)
        except ValueError as error:
            print(f"{error}: the test rows are answered again")
    before = answer()
    with atomic.new_file(file) as new:
        new.write_text(json.dumps(asdict(before)))
    return before


def _kept_answers(file: Path, rows: int) -> Answers:
    """The answers to this many rows in a file; ValueError for another content."""
    kept = records.read_object(file)
    lists = [kept.get(name) for name in ("answers", "correct")]
    fine = [isinstance(each, list) and len(each) == rows for each in lists]
    if not all(fine) or kept.keys() != {"answers", "correct", "seconds"}:
        raise ValueError(f"{file} does not hold the answers to {rows} rows")
    return Answers(**kept)


def _scored(answers) -> str:
    k, n = sum(answers.correct), len(answers.correct)
    low, high = wilson(k, n)
    return f"{k}/{n} (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"


def _write_record(out: Path, options, task, config, history, before, after) -> None:
    """The picture, and last the record, whose presence says that the run is over."""
    with atomic.new_file(out / "training.png") as file:
        training_curve(history).savefig(file, dpi=150)
    record = {
        "base": options.base,
        "data": options.data,
        "method": options.method,
        "instruction": task.instruction,
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
    (folder / "answers-before.json").unlink(missing_ok=True)
    with suppress(OSError):  # not empty: then it is not only ours
        folder.rmdir()
