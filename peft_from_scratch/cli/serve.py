"""A server for many adapters on one base, until Ctrl-C or SIGTERM.

Then it takes no more requests, gives those that run ten seconds, and exits with 0.
"""

import asyncio
import re
import signal
import sys
from pathlib import Path

from ..common.check import number, require, whole

GRACE = 10  # seconds for what still runs
SPARE = 256  # connections besides those of answers
UNITS = {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(options) -> None:
    """Serve the adapters of a folder: its subfolders with an adapter_config.json.

    Raises  ValueError  options out of range, FastAPI missing, a broken adapter or keys
            OSError     no such folder
    """
    folder, budget = _checked(options)
    try:
        import uvicorn

        from ..serving.http.keys import read_keys
        from ..serving.http.server import Options, application
    except ModuleNotFoundError as error:
        raise ValueError(
            f'{error.name} is missing: pip install "peft-from-scratch[serve]"'
        ) from None
    keys = None if options.keys is None else read_keys(options.keys)
    from ..models.load import AUTO, describe, load_model
    from ..serving.engine import Engine
    from ..serving.pool import AdapterPool

    dtype = options.dtype or AUTO
    model, tokenizer = load_model(options.base, device=options.device, dtype=dtype)
    pool = AdapterPool(model, budget_bytes=budget, root=folder)
    engine = Engine(model, tokenizer, pool, rows=options.rows, queue=options.queue)
    settings = Options(
        base=Path(options.base).name if Path(options.base).is_dir() else options.base,
        adapters=folder,
        allow_loading=options.allow_loading,
        keys=keys,
        positions=engine.limit,
        queue=options.queue,
        timeout=options.timeout,
    )
    app = application(engine, pool, tokenizer, settings)
    names = [file.parent.name for file in sorted(folder.glob("*/adapter_config.json"))]
    for name in names:
        app.state.service.add(name, name)
    print(f"{describe(model)}; adapters: {', '.join(names) or 'none'}")
    if keys is None and options.host not in LOOPBACK:
        print("No --keys: everyone who reaches this machine may ask.", file=sys.stderr)
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        timeout_graceful_shutdown=GRACE + 2,
        limit_concurrency=options.rows + options.queue + SPARE,
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            if self.started:
                print(f"http://{options.host}:{options.port}", flush=True)

        async def shutdown(self, sockets=None) -> None:
            closing = asyncio.to_thread(engine.close, GRACE)
            await asyncio.gather(closing, super().shutdown(sockets))

    for name in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal that ended it once more: it has been obeyed.
        signal.signal(name, lambda *_: None)
    Server(config).run()


def bytes_in(text: str) -> int:
    """The bytes of "256MB", "1.5 GiB" or "1000000"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", text.upper())
    require(match is not None, "--budget", text, "allowed are bytes, such as 256MB")
    return int(float(match[1]) * UNITS.get(match[2], 1))


def _checked(options) -> tuple[Path, int]:
    """(folder of the adapters, bytes in memory); ValueError for what cannot be."""
    whole("--port", options.port, 1, 65535)
    whole("--rows", options.rows, 1, of="requests in a batch")
    whole("--queue", options.queue, 1, of="requests that wait")
    words = "seconds above 0"
    number("--timeout", options.timeout, words, above=0)
    folder = Path(options.adapters)
    if not folder.is_dir():
        raise NotADirectoryError(f"--adapters {folder} is no folder")
    return folder, bytes_in(options.budget)
