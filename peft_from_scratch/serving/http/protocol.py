"""OpenAI's wire format: what a client may ask, checked strictly, and errors.

A field that is not served here is refused by name, unless it asks for nothing (null, an
empty list, NOTHING): an answer that ignores a wish looks like one that fulfills it.

Source  platform.openai.com/docs/api-reference: completions, chat, streaming, errors
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...common.check import shortened
from ..requests import Sampling, Token

NOTHING = {  # fields that are not served: values that ask for nothing
    **{"best_of": 1, "echo": False, "suffix": "", "store": False},
    **{"frequency_penalty": 0, "presence_penalty": 0, "tool_choice": "none"},
    **{"response_format": {"type": "text"}, "service_tier": "auto"},
}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
LEAST = -9999.0  # logarithm of a probability of 0: JSON has no −∞


class Refused(Exception):
    """An answer that is an error: its status, and a sentence for the client."""

    def __init__(self, status: int, message: str, code=None, param=None, **headers):
        self.status, kind = status, "invalid_request_error"
        kind = "server_error" if status >= 500 else TYPES.get(status, kind)
        error = {"message": message[:500], "type": kind, "param": param, "code": code}
        self.body = {"error": error}
        self.headers = {key.replace("_", "-"): text for key, text in headers.items()}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class Fields(BaseModel):
    """Fields of exactly these types, and no others."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def only_what_is_served(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        asked = {name: value for name, value in fields.items() if value is not None}
        for name in sorted(asked.keys() - cls.model_fields.keys()):
            if asked[name] not in ([], {}) and asked[name] != NOTHING.get(name):
                words = f"{shortened(name)} is not served here: leave it out"
                raise Refused(400, words, "unsupported_field", name[:100])
        return {name: asked[name] for name in asked.keys() & cls.model_fields.keys()}


def many(item, most: int | None = None, least: int = 1):
    """The type of a list; its first wrong item ends the check."""
    limits = Field(min_length=least, max_length=most, fail_fast=True)
    return Annotated[list[item], limits]


def text(most: int | None, least: int = 1):
    return Annotated[str, Field(min_length=least, max_length=most)]


def whole(least: int, most: int):
    return Annotated[int, Field(ge=least, le=most)]


class StreamOptions(Fields):
    include_usage: bool = False


class Asked(Fields):
    """What both kinds of request have."""

    model: text(300)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: whole(1, 8) = 1
    seed: whole(-(2**63), 2**63 - 1) | None = None
    stop: text(64) | many(text(64), 4, 0) = []
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: whole(1, 2**31) | None = None
    max_completion_tokens: whole(1, 2**31) | None = None
    user: text(256, 0) = ""

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, choice: int) -> Sampling:
        """Of the choice with this number, which adds it to the seed."""
        seed = None if self.seed is None else self.seed + choice
        return Sampling(self.temperature, self.top_p, seed, self.reported)


TokenIds = many(whole(0, 2**31))


class Completion(Asked):
    """POST /v1/completions"""

    prompt: text(None, 0) | many(text(None, 0), 16) | TokenIds | many(TokenIds, 16)
    logprobs: whole(0, 5) | None = None

    @property
    def reported(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt


class Part(Fields):
    type: Literal["text"]
    text: str


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | many(Part, 100)

    @property
    def turn(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = [] if isinstance(self.content, str) else self.content
        words = "".join(part.text for part in parts) if parts else self.content
        return {"role": self.role.replace("developer", "system"), "content": words}


class Chat(Asked):
    """POST /v1/chat/completions"""

    messages: many(Message, 1000)
    logprobs: bool = False
    top_logprobs: whole(0, 20) = 0

    @property
    def reported(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class Unload(Fields):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    lora_name: text(100)


class Load(Unload):
    """POST /v1/load_lora_adapter, as vLLM has it."""

    lora_path: text(500)
    load_inplace: bool = False


def completion_logprobs(
    tokens: Sequence[Token], spell: Callable[[int], str], offset: int
) -> dict:
    """The tokens of a completion; `offset` characters stand before them."""
    texts = [spell(token.id) for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [{spell(i): _finite(p) for i, p in t.top} for t in tokens],
        "text_offset": list(accumulate(map(len, texts), initial=offset))[:-1],
    }


def chat_logprobs(tokens: Sequence[Token], spell: Callable[[int], str]) -> dict:
    """The tokens of a chat's answer; a part of a character has no bytes of its own."""

    def entry(token: int, logprob: float | None, **more) -> dict:
        word = spell(token)
        data = None if "\ufffd" in word else list(word.encode())
        return {"token": word, "logprob": _finite(logprob), "bytes": data, **more}

    tops = [[entry(*top) for top in token.top] for token in tokens]
    pairs = zip(tokens, tops, strict=True)
    return {"content": [entry(t.id, t.logprob, top_logprobs=top) for t, top in pairs]}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)
