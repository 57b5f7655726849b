"""An answer on its way: pieces out of the engine's thread, as JSON or as events.

An answer has one or more choices, each a request of the engine. Whatever ends it early
(a client that went away, an error, a stopping server) cancels all of them.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ..requests import Listener, Piece, Token
from .metrics import Metrics
from .protocol import Asked, Chat, Refused, chat_logprobs, completion_logprobs

NO_ANSWER = {  # reasons of a last piece: status and sentence
    "deadline": (504, "the time for this answer was over before it began"),
    "cancelled": (503, "the server is about to stop: ask again later"),
    "removed": (404, "the adapter went away while this request waited"),
    "unreadable": (503, "the adapter cannot be read"),
    "error": (500, "the engine could not finish this answer"),
}


class Choice:
    """What is there of one choice."""

    def __init__(self):
        self.text, self.finish_reason = "", None
        self.tokens: list[Token] = []
        self.first = 0.0  # when its first token came, in seconds
        self.shown = 0  # characters of the tokens that events have shown


class Answer:
    """The choices of one request, and how they look to its client."""

    def __init__(self, body: Asked, adapter: str | None, metrics: Metrics):
        self.body, self.adapter, self.metrics = body, adapter, metrics
        self.prompt_tokens, self.tickets, self.choices = 0, [], []
        self.begun, self._queue = time.monotonic(), asyncio.Queue()
        self._loop, self._chat = asyncio.get_running_loop(), isinstance(body, Chat)
        kind, name = ("chat.completion", "chatcmpl") if self._chat else ("", "cmpl")
        self._frame = {
            "id": f"{name}-{uuid.uuid4().hex}",
            "object": kind or "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": None,
        }

    def listener(self) -> Listener:
        """That of the next choice."""
        index = len(self.choices)
        self.choices.append(Choice())

        def hear(piece: Piece) -> None:
            with suppress(RuntimeError):  # the loop is gone once a server has stopped
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        return hear

    def end(self) -> None:
        """Nobody reads on: what still runs is cancelled."""
        for ticket in self.tickets:
            ticket.cancel()

    async def whole(self, request: HttpRequest, spell: Callable) -> Response:
        """The answer at once; it ends when its client goes away."""
        reading = asyncio.ensure_future(self._read())
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({reading, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return Response(status_code=499)  # nobody sees it
            await reading
        finally:
            self.end()
            reading.cancel()
            gone.cancel()
        pieces = [Piece(choice.text, choice.tokens) for choice in self.choices]
        choices = [self._choice(i, piece, spell) for i, piece in enumerate(pieces)]
        for choice in choices if self._chat else ():
            choice["message"] = {"role": "assistant", "content": choice.pop("text")}
        return JSONResponse(self._frame | {"choices": choices, "usage": self._usage()})

    async def events(self, spell: Callable) -> AsyncIterator[str]:
        """The answer piece by piece, as server-sent events."""
        if self._chat:
            self._frame["object"] = "chat.completion.chunk"
        with_usage, begun = self.body.stream_options.include_usage, set()
        usage = {"usage": None} if with_usage else {}
        try:
            async for i, piece in self._pieces():
                if not (piece.text or piece.reason) and self.body.reported is None:
                    continue  # a token whose text is not certain yet
                choice = self._choice(i, piece, spell)
                if self._chat:
                    role = {} if i in begun else {"role": "assistant"}
                    choice["delta"] = role | {"content": choice.pop("text")}
                begun.add(i)
                yield _event(self._frame | {"choices": [choice]} | usage)
            if with_usage:
                yield _event(self._frame | {"choices": [], "usage": self._usage()})
        except Refused as refused:
            yield _event(refused.body)
        yield "data: [DONE]\n\n"

    async def _read(self) -> None:
        async for _ in self._pieces():
            pass

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the choice, piece) as they come, each noted in `choices`.

        Raises  Refused  a choice ended without an answer
        """
        while any(choice.finish_reason is None for choice in self.choices):
            i, piece = await self._queue.get()
            choice, now = self.choices[i], time.monotonic()
            if piece.tokens and not choice.tokens:
                choice.first = now
                self.metrics.first_token.observe(now - self.begun)
            choice.text += piece.text
            choice.tokens += piece.tokens
            choice.finish_reason = _finish_reason(piece, choice.text)
            self._frame["system_fingerprint"] = piece.version
            self.metrics.count(self.adapter, len(piece.tokens))
            if choice.finish_reason and len(choice.tokens) > 1:
                each = (now - choice.first) / (len(choice.tokens) - 1)
                self.metrics.next_token.observe(each)
            yield i, piece

    def _choice(self, i: int, piece: Piece, spell: Callable) -> dict:
        choice, logprobs = self.choices[i], None
        if self.body.reported is not None and self._chat:
            logprobs = chat_logprobs(piece.tokens, spell)
        elif self.body.reported is not None:
            logprobs = completion_logprobs(piece.tokens, spell, choice.shown)
            choice.shown += sum(map(len, logprobs["tokens"]))
        fields = {"index": i, "text": piece.text, "logprobs": logprobs}
        return fields | {"finish_reason": choice.finish_reason}

    def _usage(self) -> dict[str, int]:
        asked, answered = self.prompt_tokens, sum(len(c.tokens) for c in self.choices)
        counts = {"prompt_tokens": asked, "completion_tokens": answered}
        return counts | {"total_tokens": asked + answered}


class Events(StreamingResponse):
    """An answer's events; where they end, by whomever, the answer ends."""

    def __init__(self, answer: Answer, spell: Callable):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(answer.events(spell), 200, headers, "text/event-stream")
        self.answer = answer

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.end()


def _finish_reason(piece: Piece, text: str) -> str | None:
    """OpenAI's word for the reason. What a deadline cuts is cut as by its length.

    Raises  Refused  there is no answer
    """
    if piece.reason in (None, "stop", "length"):
        return piece.reason
    if piece.reason == "deadline" and text:
        return "length"
    status, sentence = NO_ANSWER[piece.reason]
    why = (piece.error or "").partition("\n")[0]
    raise Refused(status, f"{sentence}: {why}" if why else sentence, piece.reason)


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(value: dict) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n"
