"""From texts to tokens: as the adapter was trained, in one thread at a time."""

import copy
import threading
from pathlib import Path

from ...tasks.manner import RECORD, recorded
from ...tasks.plain_text import plain
from ...tasks.templates import encode_prompt, stop_token
from .protocol import Asked, Chat, Refused


class Prompts:
    """A tokenizer's copy, since encoding sets fields of it, which decoding reads."""

    def __init__(self, tokenizer, pool):
        self.reader, self.pool = copy.deepcopy(tokenizer), pool
        self._reading = threading.Lock()

    def encoded(self, body: Asked, adapter: str | None) -> tuple[list, tuple]:
        """The tokens of each prompt, and those that end an answer.

        Letters that spell a control token stay letters; its id is what stands for it.
        """
        with self._reading:
            if isinstance(body, Chat):
                return self._chat(body, adapter)
            reader = self.reader
            start = [i for i in reader("").input_ids[:1] if i == reader.bos_token_id]
            prompts = [
                start + plain(reader, asked, "raw") if isinstance(asked, str) else asked
                for asked in body.prompts
            ]
            known = len(reader)
            if (largest := max(max(ids, default=0) for ids in prompts)) >= known:
                raise ValueError(f"token {largest}: the model has 0 to {known - 1}")
            return prompts, tuple(i for i in [reader.eos_token_id] if i is not None)

    def _chat(self, body: Chat, adapter: str | None) -> tuple[list, tuple]:
        """A system message takes the place of the adapter's instruction."""
        template, instruction = self.manner(adapter)
        turns = [message.turn for message in body.messages]
        if turns[0]["role"] == "system":
            instruction = ""
        ids = encode_prompt(self.reader, instruction, turns, template=template)
        return [ids], (stop_token(self.reader, template),)

    def manner(self, adapter: str | None) -> tuple[str, str]:
        """(template, instruction) as in training, which `chat` keeps to as well."""
        cards = self.pool.cards() if adapter else ()
        folders = [Path(card.folder) for card in cards if card.name == adapter]
        own = "chat" if self.reader.chat_template else "raw"
        try:
            template, words = recorded(folders[0] / RECORD) if folders else (own, "")
        except (ValueError, OSError):
            words = f"{adapter}'s {RECORD} does not say how to speak to it"
            raise Refused(500, words) from None
        return template or own, words or ""
