"""A conversation with a model in the terminal.

An adapter gets the template and the instruction that it was trained with: the record
that `train` leaves beside it holds both.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import TextStreamer

from ..core.decoder import positions
from ..files import exchange
from ..models.load import describe, load_model
from ..tasks.jsonl import is_unicode
from ..tasks.templates import TEMPLATES, encode_prompt, stop_token

ANSWER_TOKENS = 256  # of a reply, at most
RECORD = "training.json"  # the last file of a run: where it is, the run is finished


def chat(options) -> None:
    """A conversation in the terminal, greedy answers; Ctrl-D or 'exit' ends it.

    --template and --system override what the adapter's record says.
    """
    model, tokenizer = load_model(options.base, device=options.device)
    if options.adapter:
        exchange.load_as_trained(model, options.adapter)
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
    while (message := _ask()) is not None:
        if not message:
            turns = []
            print("(forgotten)")
            continue
        try:
            kept = _fitting(model, tokenizer, instruction, message, turns, template)
        except ValueError as error:  # text that this tokenizer cannot encode
            print(f"({error})")
            continue
        if kept is None:
            print("(this alone is longer than the model can read: say it shorter)")
            continue
        if len(kept) < len(turns):
            print("(longer than the model can read: the oldest turns are forgotten)")
        reply = _reply(model, tokenizer, instruction, message, kept, template)
        turns = [*kept, (message, reply)]


def read_object(path: Path) -> dict:
    """The object in a JSON file; {} where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _manner(options, tokenizer) -> tuple[str, str]:
    """(template, instruction): as asked for, else as in training, else the model's."""
    record = read_object(Path(options.adapter) / RECORD) if options.adapter else {}
    recipe, instruction = record.get("recipe"), record.get("instruction")
    template = recipe.get("template") if isinstance(recipe, dict) else None
    if template not in TEMPLATES:
        template = "chat" if tokenizer.chat_template else "raw"
    if not isinstance(instruction, str):
        instruction = ""
    if options.system is not None:
        instruction = options.system
    return options.template or template, instruction


def _ask() -> str | None:
    """The next typed line, None at the end; bytes that are no text are refused."""
    while True:
        try:
            message = input("\nyou> ").strip()
        except EOFError:
            print()
            return None
        if is_unicode(message):
            return None if message == "exit" else message
        print("(that is not UTF-8 text: set the terminal to UTF-8, or write it anew)")


def _fitting(model, tokenizer, instruction, message, turns, template) -> list | None:
    """The newest turns that leave room for an answer; None if `message` leaves none."""
    limit = positions(model)
    for first in range(len(turns) + 1):
        kept = turns[first:]
        ids = encode_prompt(
            tokenizer, instruction, message, template=template, examples=kept
        )
        if limit is None or len(ids) + _room(limit) <= limit:
            return kept
    return None


def _room(limit: int | None) -> int:
    """Most tokens of an answer; at most half of what the model can read."""
    return ANSWER_TOKENS if limit is None else min(ANSWER_TOKENS, limit // 2)


@torch.no_grad()
def _reply(model, tokenizer, instruction, message, turns, template) -> str:
    ids = encode_prompt(
        tokenizer, instruction, message, template=template, examples=turns
    )
    prompt = torch.tensor([ids], device=model.device)
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=_room(positions(model)),
        do_sample=False,
        eos_token_id=stop_token(tokenizer, template),
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True).strip()
