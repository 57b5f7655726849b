"""A real server of HTTP on this machine, in a thread."""

import socket
import threading
from contextlib import contextmanager

import uvicorn
from fake_serving import wait_for


@contextmanager
def listening(app):
    """A uvicorn server on a free port of this machine; its address."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        place.listen(256)
        address = f"http://127.0.0.1:{place.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, args=([place],))
        thread.start()
        try:
            assert wait_for(lambda: server.started, 10)
            yield address
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
