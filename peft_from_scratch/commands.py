"""What `train`, `chat` and `merge` do on the command line.

`train` leaves in its folder the adapter and training.json, which says how the model was
spoken to (template, instruction); `chat` reads it and speaks to the adapter likewise.
"""

import inspect
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import TextStreamer

from . import adapter, atomic, checkpoint, evaluate, exchange, figures, templates
from .budget import count
from .evaluate import Answers
from .methods import full, lora
from .models import describe, load_model
from .pretrained import quiet_transformers
from .recipe import Recipe
from .task_rows import is_unicode, refuse_bad
from .tasks import Task, load_task
from .templates import TEMPLATES, encode_prompt, stop_token
from .train import train

METHODS = {"lora": lora, "full": full}
LEARNING_RATES = {"lora": 1e-3, "full": 1e-4}  # near the searched optima of SmolLM2
TEST_ROWS = 100  # answered before and after
ANSWER_TOKENS = 256  # of a reply in a chat, at most
RECORD = "training.json"  # the last file of a run: where it is, the run is finished


def fine_tune(options) -> None:
    """Fine-tune on the rows of `options.data`; adapter and record go to a folder.

    Writes the adapter in PEFT's layout, training.png and training.json (recipe,
    instruction, losses, scores), then deletes its checkpoints. Stopped and called
    again, it goes on from the newest of them. All that can be wrong with the arguments
    and the rows is found before the first answer and the first step.
    """
    recipe, out = _recipe(options), Path(options.out)
    _check_out(out)
    task = load_task(options.data, **given(options, "prompt", "completion", "config"))
    model, tokenizer = load_model(options.base, device=options.device)
    print(describe(model))
    torch.manual_seed(options.seed)
    METHODS[options.method].inject(model, **_method_options(options))
    print(_counted(model))
    _check_rows(model, tokenizer, task, recipe, options)
    test = task.test.select(range(min(TEST_ROWS, len(task.test))))

    def answer() -> Answers:
        return evaluate.answer_rows(
            model, tokenizer, task, test, template=recipe.template, progress=True
        )

    # These are the base's answers: B = 0 in a new LoRA, and full fine-tuning starts
    # from the base's own weights.
    checkpoints = out / "checkpoints"
    before = _answers_before(checkpoints, answer)
    history = train(model, tokenizer, task, recipe, checkpoints=checkpoints)
    after = answer()
    exchange.save(model, out)
    _write_record(out, options, task, recipe, history, before, after)
    _remove_checkpoints(checkpoints)
    print(
        f"exact match on {len(test)} test rows: {_scored(before)} -> {_scored(after)}"
    )
    print(f"adapter, {RECORD} and training.png are in {out}")
    adapted = shlex.join(["--base", options.base, "--adapter", str(out)])
    print(f"talk to it:  python -m peft_from_scratch chat {adapted}")


def chat(options) -> None:
    """A conversation in the terminal, greedy answers; Ctrl-D or 'exit' ends it.

    An adapter is spoken to as it was trained: its training.json has the template and
    the instruction, which --template and --system override.
    """
    model, tokenizer = load_model(options.base, device=options.device)
    if options.adapter:
        exchange.load(model, options.adapter)
    template, instruction = _manner(options, tokenizer)
    stop_token(tokenizer, template)  # an impossible template is refused before a turn
    print(
        f"{describe(model)}, template {template}, "
        + (f"instruction {instruction!r}" if instruction else "no instruction")
    )
    print("An empty line forgets the conversation, Ctrl-D ends it.")
    if hasattr(sys.stdin, "reconfigure"):
        # A strict reader would drop the lines that it read together with a bad one.
        sys.stdin.reconfigure(errors="surrogateescape")
    turns = []
    while (said := _ask()) is not None:
        if not said:
            turns = []
            print("(forgotten)")
            continue
        kept = _fitting(model, tokenizer, instruction, said, turns, template)
        if kept is None:
            print("(this alone is longer than the model can read: say it shorter)")
            continue
        if len(kept) < len(turns):
            print("(longer than the model can read: the oldest turns are forgotten)")
        reply = _reply(model, tokenizer, instruction, said, kept, template)
        turns = [*kept, (said, reply)]


def merge_to_folder(options) -> None:
    """Fold an adapter into its base and write a model that needs no adapter code."""
    out = Path(options.out)
    if out.exists():
        raise FileExistsError(f"{out} is there already; name a new folder")
    model, tokenizer = load_model(options.base, device=options.device)
    names = exchange.load(model, options.adapter)
    errors = adapter.merge(model)
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


def _recipe(options) -> Recipe:
    lr = LEARNING_RATES[options.method] if options.lr is None else options.lr
    return Recipe(
        steps=options.steps,
        batch=options.batch,
        accumulate=options.accumulate,
        lr=lr,
        warmup=options.steps // 10,
        seed=options.seed,
        template=options.template,
        validate_every=max(1, options.steps // 5),
        **given(options, "max_tokens"),
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


def _check_rows(model, tokenizer, task: Task, recipe: Recipe, options) -> None:
    """ValueError for an empty split, and one that lists the bad rows of all three."""
    limit, positions = recipe.max_tokens, _positions(model)
    if positions is not None and limit > positions:
        if options.max_tokens is not None:
            raise ValueError(
                f"--max-tokens {limit}: the model has {positions} positions; allowed "
                "is that many at most"
            )
        limit = positions
    bad = []
    for split in ("train", "validation", "test"):
        rows = getattr(task, split)
        if not len(rows):
            raise ValueError(f"{task.name} has no rows left for its {split} split")
        found = templates.bad_rows(
            tokenizer,
            task.instruction,
            rows,
            template=recipe.template,
            max_tokens=limit,
        )
        # A generated row has no place in a file, only one in its split.
        of_split = "" if "place" in rows.column_names else f" of {split}"
        bad += [(place + of_split, reason) for place, reason in found]
    # The splits are shuffled; this is the order of the file again.
    bad.sort(key=lambda each: int(re.search(r"\d+", each[0])[0]))
    refuse_bad(bad, task.name)


def _method_options(options) -> dict:
    """Those of the options that the method's inject takes."""
    taken = inspect.signature(METHODS[options.method].inject).parameters
    return {n: getattr(options, n) for n in ("r", "alpha", "targets") if n in taken}


def _counted(model) -> str:
    counted = count(model)
    return f"{counted.trainable:,} of {counted.total:,} parameters train"


def _answers_before(checkpoints: Path, answer: Callable[[], Answers]) -> Answers:
    """The answers before training; of a run that was stopped, those it had then.

    So a resumed run asks nothing twice, and where the checkpoints are another run's,
    train() refuses them at once and not after minutes of answering.
    """
    file = checkpoints / "answers-before.json"
    kept = _read_json(file) if checkpoint.checkpoints(checkpoints) else {}
    if kept:
        return Answers(**kept)
    before = answer()
    with atomic.new_file(file) as new:
        new.write_text(json.dumps(asdict(before)))
    return before


def _scored(answers) -> str:
    k, n = sum(answers.correct), len(answers.correct)
    low, high = evaluate.wilson(k, n)
    return f"{k}/{n} (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"


def _write_record(out: Path, options, task, recipe, history, before, after) -> None:
    """The picture, and last the record, whose presence says that the run is over."""
    with atomic.new_file(out / "training.png") as file:
        figures.training_curve(history).savefig(file, dpi=150)
    record = {
        "base": options.base,
        "data": options.data,
        "method": options.method,
        "instruction": task.instruction,
        "recipe": vars(recipe),
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
        shutil.rmtree(path)
    (folder / "answers-before.json").unlink(missing_ok=True)
    with suppress(OSError):  # not empty: then it is not only ours
        folder.rmdir()


# ------------------------------------------------------------------------- chat


def _manner(options, tokenizer) -> tuple[str, str]:
    """(template, instruction): as asked for, else as in training, else the model's."""
    record = _read_json(Path(options.adapter) / RECORD) if options.adapter else {}
    recipe, instruction = record.get("recipe"), record.get("instruction")
    template = recipe.get("template") if isinstance(recipe, dict) else None
    if template not in TEMPLATES:
        template = "chat" if tokenizer.chat_template else "raw"
    if not isinstance(instruction, str):
        instruction = ""
    if options.system is not None:
        instruction = options.system
    return options.template or template, instruction


def _read_json(path: Path) -> dict:
    """The object in a JSON file; {} where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _ask() -> str | None:
    """What was typed; None at the end. Bytes that are no text are asked for again."""
    while True:
        try:
            said = input("\nyou> ").strip()
        except EOFError:
            print()
            return None
        if is_unicode(said):
            return None if said == "exit" else said
        print("(that is not UTF-8 text: set the terminal to UTF-8, or write it anew)")


def _fitting(model, tokenizer, instruction, said, turns, template) -> list | None:
    """The newest turns that leave room for an answer; None if `said` alone does not."""
    positions = _positions(model)
    for first in range(len(turns) + 1):
        kept = turns[first:]
        ids = encode_prompt(
            tokenizer, instruction, said, template=template, examples=kept
        )
        if positions is None or len(ids) + _room(positions) <= positions:
            return kept
    return None


def _positions(model) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _room(positions: int | None) -> int:
    """Tokens for an answer; a small model's are shared with what it is told."""
    return ANSWER_TOKENS if positions is None else min(ANSWER_TOKENS, positions // 2)


@torch.no_grad()
def _reply(model, tokenizer, instruction, said, turns, template) -> str:
    ids = encode_prompt(tokenizer, instruction, said, template=template, examples=turns)
    prompt = torch.tensor([ids], device=model.device)
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=_room(_positions(model)),
        do_sample=False,
        eos_token_id=stop_token(tokenizer, template),
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True).strip()
