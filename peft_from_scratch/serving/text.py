"""Tokens become text piece by piece, and no piece has to be taken back.

Two things are only certain later. A token can end within a character, whose bytes the
next token completes. And the end of the text so far can be the start of a stop text:
it is held back until the next tokens decide.
"""

from collections.abc import Sequence

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no whole character
WINDOW = (
    8  # tokens before a piece that are decoded with it, since spaces depend on them
)


class Text:
    """The text of an answer, as far as it is certain.

    Args
        tokenizer  of transformers
        stop       texts that end the answer, and are no part of it
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._decoded = 0  # tokens whose text is in `_pending` or was given
        self._pending = ""  # decoded, and perhaps the start of a stop text
        self.stopped = False

    def push(self, token: int) -> str:
        """One token more; the text that has become certain by it."""
        self._ids.append(token)
        new = self._new_text()
        if new.endswith(BROKEN) and len(self._ids) - self._decoded < WINDOW:
            return ""
        self._decoded = len(self._ids)
        self._pending += new
        return self._certain()

    def end(self) -> str:
        """The rest, where the answer ends without a stop text."""
        if self.stopped:
            return ""
        rest, self._pending = self._pending + self._new_text(), ""
        self._decoded = len(self._ids)
        return rest

    def _new_text(self) -> str:
        """What the tokens that are not decoded yet add to those before them."""
        first = max(0, self._decoded - WINDOW)
        before = self._decode(self._ids[first : self._decoded])
        return self._decode(self._ids[first:])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _certain(self) -> str:
        ends = [i for stop in self._stop if (i := self._pending.find(stop)) >= 0]
        if ends:
            self.stopped = True
            text, self._pending = self._pending[: min(ends)], ""
            return text
        kept = max((_overlap(self._pending, stop) for stop in self._stop), default=0)
        cut = len(self._pending) - kept
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """How long the longest end of the text is with which `stop` begins."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)
