"""A conversation with a model in the terminal.

An adapter gets the template and the instruction that it was trained with: the record
that `train` leaves beside it holds both. A record that does not say them is refused:
spoken to in another way, an adapter answers worse, and nothing would show why.
"""

import sys
from pathlib import Path

import torch
from transformers import TextStreamer

from ..core.decoder import positions
from ..files import exchange
from ..models.load import AUTO, describe, load_model
from ..tasks.manner import RECORD, recorded
from ..tasks.plain_text import is_unicode
from ..tasks.templates import encode_prompt, stop_token

ANSWER_TOKENS = 256  # of a reply, at most


def chat(options) -> None:
    """A conversation in the terminal, greedy answers; Ctrl-D or 'exit' ends it.

    --template and --system override what the adapter's record says. An adapter without
    a record, which others made, gets the base model's template and no instruction.

    Raises  ValueError  a record that is needed and broken, naming its file
    """
    dtype = options.dtype or AUTO
    model, tokenizer = load_model(options.base, device=options.device, dtype=dtype)
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


def _manner(options, tokenizer) -> tuple[str, str]:
    """(template, instruction): as asked for, else as in training, else the model's."""
    template, instruction = options.template, options.system
    if options.adapter and (template is None or instruction is None):
        try:
            trained = recorded(Path(options.adapter) / RECORD)
        except ValueError as error:
            raise ValueError(f"{error}, or say both --template and --system") from None
        template = trained[0] if template is None else template
        instruction = trained[1] if instruction is None else instruction
    if instruction and not is_unicode(instruction):
        raise ValueError(f"--system {instruction!r} is not UTF-8 text: write it anew")
    return template or _usual(tokenizer), instruction or ""


def stop_of(adapter: str, tokenizer) -> int:
    """The token that ended each answer in the adapter's training.

    Raises  ValueError  a record that is broken; see tasks/manner.py
    """
    template, _ = recorded(Path(adapter) / RECORD)
    return stop_token(tokenizer, template or _usual(tokenizer))


def _usual(tokenizer) -> str:
    """The template for whoever says none."""
    return "chat" if tokenizer.chat_template else "raw"


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
