"""What `train`, `chat` and `merge` do on the command line."""

import inspect
import json
from pathlib import Path

import torch
from transformers import TextStreamer

from . import adapter, atomic, evaluate, exchange, figures
from .budget import count
from .methods import full, lora
from .models import describe, load_model
from .recipe import Recipe
from .tasks import load_task
from .templates import encode_prompt, stop_token
from .train import train

METHODS = {"lora": lora, "full": full}
LEARNING_RATES = {"lora": 1e-3, "full": 1e-4}  # near the searched optima of SmolLM2
TEST_ROWS = 100  # answered before and after


def fine_tune(options) -> None:
    """Fine-tune on the rows of `options.data`; adapter and record go to a folder.

    Writes the adapter in PEFT's layout, training.json (recipe, losses, scores) and
    training.png. Stopped and called again, it goes on from its newest checkpoint.
    """
    task = load_task(options.data)
    model, tokenizer = load_model(options.base, device=options.device)
    print(describe(model))
    test = task.test.select(range(min(TEST_ROWS, len(task.test))))
    asked = dict(template=options.template)
    before = evaluate.answer_rows(model, tokenizer, task, test, **asked)
    torch.manual_seed(options.seed)
    METHODS[options.method].inject(model, **_method_options(options))
    print(_counted(model))
    recipe = Recipe(
        steps=options.steps,
        batch=options.batch,
        accumulate=options.accumulate,
        lr=options.lr or LEARNING_RATES[options.method],
        warmup=options.steps // 10,
        seed=options.seed,
        template=options.template,
        validate_every=max(1, options.steps // 5),
    )
    out = Path(options.out)
    history = train(model, tokenizer, task, recipe, checkpoints=out / "checkpoints")
    after = evaluate.answer_rows(model, tokenizer, task, test, **asked)
    exchange.save(model, out)
    _write_record(out, options, recipe, history, before, after)
    print(
        f"exact match on {len(test)} test rows: {_scored(before)} -> {_scored(after)}"
    )
    print(f"adapter, training.json and training.png are in {out}")
    adapted = f"--base {options.base} --adapter {out}"
    print(f"talk to it:  python -m peft_from_scratch chat {adapted}")


def chat(options) -> None:
    """A conversation in the terminal, greedy answers; Ctrl-D or 'exit' ends it."""
    model, tokenizer = load_model(options.base, device=options.device)
    if options.adapter:
        exchange.load(model, options.adapter)
    print(f"{describe(model)}. An empty line forgets the conversation, Ctrl-D ends it.")
    turns = []
    while (said := _ask()) is not None:
        if not said:
            turns = []
            print("(forgotten)")
            continue
        turns.append((said, _reply(model, tokenizer, options.system, said, turns)))


def merge_to_folder(options) -> None:
    """Fold an adapter into its base and write a model that needs no adapter code."""
    out = Path(options.out)
    if out.exists():
        raise FileExistsError(f"{out} is there already; name a new folder")
    model, tokenizer = load_model(options.base, device=options.device)
    names = exchange.load(model, options.adapter)
    errors = adapter.merge(model)
    with atomic.new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    worst = max(errors.values(), default=0.0)
    print(
        f"merged {len(names)} modules; rounding lost {worst:.1e} of the change at most"
    )
    print(f"{out} is a whole model: load it with transformers, or --base {out}")


def _method_options(options) -> dict:
    """Those of the options that the method's inject takes."""
    taken = inspect.signature(METHODS[options.method].inject).parameters
    return {n: getattr(options, n) for n in ("r", "alpha", "targets") if n in taken}


def _counted(model) -> str:
    counted = count(model)
    return f"{counted.trainable:,} of {counted.total:,} parameters train"


def _scored(answers) -> str:
    k, n = sum(answers.correct), len(answers.correct)
    low, high = evaluate.wilson(k, n)
    return f"{k}/{n} (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"


def _write_record(out: Path, options, recipe, history, before, after) -> None:
    record = {
        "base": options.base,
        "method": options.method,
        "recipe": vars(recipe),
        "loss": history.loss,
        "validation": history.validation,
        "correct_before": before.correct,
        "correct_after": after.correct,
    }
    with atomic.new_file(out / "training.json") as file:
        file.write_text(json.dumps(record, indent=1) + "\n")
    with atomic.new_file(out / "training.png") as file:
        figures.training_curve(history).savefig(file, dpi=150)


def _ask() -> str | None:
    try:
        said = input("\nyou> ").strip()
    except EOFError:
        print()
        return None
    return None if said == "exit" else said


@torch.no_grad()
def _reply(model, tokenizer, system, said, turns) -> str:
    template = "chat" if tokenizer.chat_template else "raw"
    ids = encode_prompt(tokenizer, system, said, template=template, examples=turns)
    prompt = torch.tensor([ids], device=model.device)
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=256,
        do_sample=False,
        eos_token_id=stop_token(tokenizer, template),
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True).strip()
