"""The HTTP server: OpenAI's routes for many adapters on one base, vLLM's for loading.

A request passes three doors. The first asks for its key and reads its body (door.py),
the second is the wire format (protocol.py), and the third is the name of the model: an
adapter that this key may use, or the base, or 404. An unknown name is never answered by
the base. Then the engine is asked, in its own thread, and its pieces are sent as they
come (answer.py).
"""

import math
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from ...tasks.manner import RECORD, recorded
from ..requests import Closed, QueueFull, Request
from .answer import Answer, Events
from .door import Door, admin_only, inside
from .keys import Key, Keys
from .metrics import Metrics
from .prompts import Prompts
from .protocol import Asked, Chat, Completion, Load, Refused, Unload

LIMITS = {Completion: 16, Chat: 256}  # tokens of an answer where none are asked for


@dataclass(frozen=True)
class Options:
    """What a server is asked to be: `base` is the base's own name.

    adapters       the folder that adapters are loaded from; over HTTP: allow_loading
    keys           who may ask; None: everyone
    positions      tokens of a prompt and its answer together, at most; None: no limit
    queue          choices of one request at most: more would never find room
    timeout        seconds for an answer, waiting included
    body_bytes     of a request at most; prompt_tokens and max_tokens likewise
    """

    base: str
    adapters: Path | None = None
    allow_loading: bool = False
    keys: Keys | None = None
    positions: int | None = None
    queue: int = 64
    timeout: float = 300.0
    body_bytes: int = 1_000_000
    prompt_tokens: int = 32_768
    max_tokens: int = 4_096


class Service:
    """The routes, and what they share."""

    def __init__(self, engine, pool, tokenizer, options: Options):
        self.engine, self.pool, self.options = engine, pool, options
        self.metrics, self.prompts = Metrics(engine, pool), Prompts(tokenizer, pool)
        self.spell = lambda token: tokenizer.decode([token])

    async def completions(self, body: Completion, request: HttpRequest) -> Response:
        return await self.answer(body, request)

    async def chat(self, body: Chat, request: HttpRequest) -> Response:
        return await self.answer(body, request)

    async def answer(self, body: Asked, request: HttpRequest) -> Response:
        key: Key = request.state.key
        answer = Answer(body, self.adapter(body.model, key), self.metrics)
        await run_in_threadpool(self.submit, answer, key.tenant or body.user)
        if body.stream:
            return Events(answer, self.spell)
        return await answer.whole(request, self.spell)

    def adapter(self, model: str, key: Key) -> str | None:
        """The adapter's name, None for the base; 404 for all others.

        An adapter that is for other keys is refused as one that is not there.
        """
        if model in ("base", self.options.base):
            return None
        first, _, rest = model.partition(":")
        name = rest if first in ("base", self.options.base) else model
        if name not in self.pool or not key.may_use(name):
            refuse_model(model)
        return name

    def submit(self, answer: Answer, tenant: str) -> None:
        """Ask the engine for every choice, or for none; in a thread."""
        body, timeout = answer.body, self.options.timeout
        try:
            with engine_errors(body.model):
                prompts, stop_ids = self.prompts.encoded(body, answer.adapter)
                limits = [self.limit(body, len(ids)) for ids in prompts]
                at_most("answers", len(prompts) * body.n, self.options.queue)
                for ids, limit in zip(prompts, limits, strict=True):
                    answer.prompt_tokens += len(ids)
                    for i in range(body.n):
                        how = body.sampling(i), body.stops, stop_ids, tenant, timeout
                        request = Request(tuple(ids), answer.adapter, limit, *how)
                        ticket = self.engine.submit(request, answer.listener())
                        answer.tickets.append(ticket)
        except BaseException:
            answer.end()
            raise

    def limit(self, body: Asked, prompt: int) -> int:
        """Tokens of the answer at most; ValueError for too many, here or there."""
        options, asked = self.options, body.max_completion_tokens or body.max_tokens
        at_most("tokens of the prompt", prompt, options.prompt_tokens)
        at_most("max_tokens", asked or 1, options.max_tokens)
        room = max(1, (options.positions or math.inf) - prompt)
        return asked or min(LIMITS[type(body)], options.max_tokens, room)

    async def models(self, request: HttpRequest) -> dict:
        """The base, and the adapters that this key may use."""
        return {"object": "list", "data": self.cards(request.state.key)}

    async def model(self, model: str, request: HttpRequest) -> dict:
        name = self.adapter(model, request.state.key) or self.options.base
        cards = {card["id"]: card for card in self.cards(request.state.key)}
        return cards.get(name) or refuse_model(model)

    def cards(self, key: Key) -> list[dict]:
        base, length = self.options.base, {"max_model_len": self.options.positions}
        shared = {"object": "model", "owned_by": "peft-from-scratch"} | length
        cards = [{"id": base, "created": 0, "root": base, "parent": None} | shared]
        for card in self.pool.cards():
            named = {"id": card.name, "root": Path(card.folder).name, "parent": base}
            more = {"digest": card.digest, "rank": card.rank, "bytes": card.bytes}
            times = {"created": int(card.added), "resident": card.resident}
            cards += [named | more | times | shared] if key.may_use(card.name) else []
        return cards

    async def load(self, body: Load, request: HttpRequest) -> Response:
        admin_only(request)
        name, path = body.lora_name, body.lora_path
        if name in self.pool and not body.load_inplace:
            raise Refused(400, f"{name} is there: load_inplace=true makes it anew")
        try:
            await run_in_threadpool(self.add, name, path)
        except FileNotFoundError:
            raise Refused(404, f"there is no adapter in {path!r}") from None
        except (ValueError, OSError) as error:
            root = f"{Path(self.options.adapters).resolve()}/"
            raise Refused(400, str(error).replace(root, "")) from None
        except RuntimeError as error:  # no room beside those that are in use
            raise Refused(503, str(error)) from None
        return PlainTextResponse(f"{name} is loaded")

    def add(self, name: str, path: str) -> None:
        """Put the adapter of a folder in `adapters` into the pool.

        Raises  ValueError         the base's name, a path that leads out, a broken file
                FileNotFoundError  no such folder
        """
        if name in ("base", self.options.base):
            raise ValueError(f"{name} is the base: give the adapter another name")
        folder = inside(self.options.adapters, path)
        recorded(folder / RECORD)
        self.pool.add(name, folder)

    async def unload(self, body: Unload, request: HttpRequest) -> Response:
        admin_only(request)
        with engine_errors(body.lora_name):
            await run_in_threadpool(self.pool.remove, body.lora_name)
        return PlainTextResponse(f"{body.lora_name} is unloaded")

    async def health(self) -> Response:
        failed = self.engine.failed
        return JSONResponse({"failed": failed}, 503 if failed else 200)

    async def ready(self) -> Response:
        state = {"running": self.engine.running, "waiting": self.engine.waiting}
        state |= {"loading": self.options.allow_loading}
        return JSONResponse(state, 503 if self.engine.failed else 200)

    async def figures(self, request: HttpRequest) -> Response:
        admin_only(request)  # they name adapters
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self) -> Response:
        headers = {"X-Frame-Options": "DENY", "Cache-Control": "no-cache"}
        return FileResponse(Path(__file__).with_name("page.html"), headers=headers)


def application(engine, pool, tokenizer, options: Options) -> FastAPI:
    """The server as an ASGI application; it starts the engine, and closes it."""
    service = Service(engine, pool, tokenizer, options)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        engine.start()
        yield
        await run_in_threadpool(engine.close, 0)

    app = FastAPI(
        title="PEFT from scratch", docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.state.service, app.router.route_class = service, Door
    app.state.keys, app.state.body_bytes = options.keys, options.body_bytes
    for kind in (Refused, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, error_response)
    app.post("/v1/completions")(service.completions)
    app.post("/v1/chat/completions")(service.chat)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{model:path}")(service.model)
    if options.allow_loading and options.adapters is not None:
        app.post("/v1/load_lora_adapter")(service.load)
        app.post("/v1/unload_lora_adapter")(service.unload)
    app.get("/health")(service.health)
    app.get("/ready")(service.ready)
    app.get("/metrics")(service.figures)
    app.get("/")(service.page)
    return app


async def error_response(request: HttpRequest, error: Exception) -> Response:
    """Every error as OpenAI's body; of a bug, only that there is one."""
    if isinstance(error, RequestValidationError):
        errors = [(str((*e["loc"], "body")[1])[:100], e["msg"]) for e in error.errors()]
        name = errors[0][0]
        about = dict.fromkeys(words for field, words in errors if field == name)
        words = f"{name}: {'; or '.join(about)}"
        error = Refused(400, words, "invalid_value", name)
    elif isinstance(error, HTTPException):
        error = Refused(error.status_code, str(error.detail))
    elif not isinstance(error, Refused):
        error = Refused(500, "the server has a fault: its log says more")
    return error.response()


@contextmanager
def engine_errors(model: str) -> Iterator[None]:
    """What the engine raises, as an answer."""
    try:
        yield
    except QueueFull as error:
        after = str(error.retry_after)
        raise Refused(429, str(error), "queue_full", Retry_After=after) from None
    except Closed as error:
        raise Refused(503, str(error), "closed", Retry_After="10") from None
    except KeyError:  # also where it was unloaded a moment ago
        refuse_model(model)
    except ValueError as error:
        raise Refused(400, str(error)) from None


def refuse_model(model: str) -> NoReturn:
    words = f"there is no model {model[:100]!r} here: GET /v1/models lists them"
    raise Refused(404, words, "model_not_found", "model") from None


def at_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise ValueError(f"{name}: {value}, where {most} are allowed at most")
