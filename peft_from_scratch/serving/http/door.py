"""What a client gets past before anything is done for it: key, body, folder.

Door asks for the key first, then reads the body, and only then does a route see either.
"""

import asyncio
import json
from pathlib import Path

from fastapi import Request as HttpRequest
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from ...common import records
from .keys import Key, Keys
from .protocol import Refused

OPEN = {"/", "/health", "/ready"}  # routes without a key
ANYONE = Key.model_construct(tenant="", admin=True)  # where there are no keys
SECONDS = 30  # in which a body must be there


class Door(APIRoute):
    """A route behind the door. The application's state has `keys` and `body_bytes`."""

    def get_route_handler(self):
        handle = super().get_route_handler()

        async def guarded(request: HttpRequest) -> Response:
            state = request.app.state
            # The route's own path: older Starlettes read request.url from Host.
            keys = None if self.path in OPEN else state.keys
            request.state.key = key_of(request, keys)
            try:
                if request.method == "POST":
                    request._body = await body_of(request, state.body_bytes)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody sees it
            return await handle(request)

        return guarded


def key_of(request: HttpRequest, keys: Keys | None) -> Key:
    if keys is None:
        return ANYONE
    key = keys.of(request.headers.get("authorization", ""))
    if key is None:
        words = "a key is needed that this server knows: Authorization: Bearer …"
        raise Refused(401, words, "invalid_api_key", WWW_Authenticate="Bearer")
    return key


async def body_of(request: HttpRequest, most: int) -> bytes:
    """The body; of one that is too long, no more than that is read."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind.strip().lower() != "application/json":
        raise Refused(415, "the body must be application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise Refused(413, f"the body is longer than {most} bytes")
        value = records.parse(bytes(body))
        # JSON's text can spell what JSON has not: NaN, 1e999, half a character.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except TimeoutError:
        raise Refused(408, f"no whole body came in {SECONDS} s") from None
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no plain JSON: {error}") from None
    return bytes(body)


def admin_only(request: HttpRequest) -> None:
    if not request.state.key.admin:
        raise Refused(403, "this takes a key with admin: true", "admin_only")


def inside(root: Path, path: str) -> Path:
    """The folder with this relative path, which lies in `root` with all that is in it.

    Raises  ValueError         a path that leads out, by itself or by a symbolic link
            FileNotFoundError  no such folder
    """
    root, asked = Path(root).resolve(), Path(path)
    if asked.is_absolute() or ".." in asked.parts or not asked.parts:
        raise ValueError(f"{path!r}: allowed is a folder in the adapters' folder")
    try:
        folder = (root / asked).resolve()
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {path!r}")
        places = [folder, *(file.resolve() for file in folder.rglob("*"))]
    except RuntimeError:
        raise ValueError(f"{path!r} is a loop of links") from None
    if not all(place.is_relative_to(root) for place in places):
        raise ValueError(f"{path!r} leads out of the adapters' folder by a link")
    return folder
