"""serve: its options, its sentences, and how it ends."""

import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from peft_from_scratch.cli.command_line import main, parser
from peft_from_scratch.cli.serve import bytes_in

ROOT = Path(__file__).parents[2]
KEY = "shop-0123456789abcdef"


@pytest.fixture
def shelf(tmp_path):
    """A folder with one adapter, another folder and a file."""
    for name in ("orders", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "orders" / "adapter_config.json").write_text("{}")
    (tmp_path / "keys.json").write_text(json.dumps({KEY: {"tenant": "shop"}}))
    return tmp_path


@contextmanager
def started(shelf, *more):
    """(process, address) of a server with a stand-in for the engine."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    helper = str(ROOT / "tests/helpers/fake_serving.py")
    command = [
        sys.executable,
        helper,
        "serve",
        "--base",
        "tiny",
        "--adapters",
        str(shelf),
    ]
    process = subprocess.Popen(
        [*command, "--adapters", str(shelf), "--port", str(port), *more],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert "adapters: orders" in process.stdout.readline()
        address = process.stdout.readline().strip()
        assert address == f"http://127.0.0.1:{port}"
        yield process, address
    finally:
        process.kill()
        process.communicate()


def test_a_signal_ends_it_after_the_answers_that_run(shelf):
    with started(shelf, "--keys", str(shelf / "keys.json")) as (process, address):
        bearer = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=address, headers=bearer, timeout=20) as client:
            listed = client.get("/v1/models").json()["data"]
            assert [card["id"] for card in listed] == ["tiny", "orders"]
            assert httpx.get(f"{address}/v1/models").status_code == 401
            body = {"model": "orders", "prompt": "hello", "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                process.terminate()
                rest = list(lines)
        assert "orders" in first and rest[-2] == "data: [DONE]"
        assert len([line for line in rest if "orders" in line]) == 3
        assert process.wait(10) == 0
        assert process.stderr.read() == ""


def test_an_idle_server_ends_at_once(shelf):
    with started(shelf) as (process, address):
        assert httpx.get(f"{address}/ready").json()["loading"] is False
        before = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0 and time.monotonic() - before < 5


def test_options_are_checked_before_anything_is_loaded(shelf, capsys):
    for option, value, words in (
        ("--port", "0", "--port=0: allowed"),
        ("--rows", "0", "--rows=0: allowed"),
        ("--queue", "-1", "--queue=-1: allowed"),
        ("--timeout", "0", "--timeout=0.0: allowed"),
        ("--budget", "much", "--budget='much': allowed"),
        ("--adapters", str(shelf / "none"), "is no folder"),
        ("--keys", str(shelf / "none"), "No such file"),
        ("--keys", str(shelf / "orders/adapter_config.json"), "one key or more"),
    ):
        command = ["serve", "--base", "none", "--adapters", str(shelf), option, value]
        assert main(command) == 1
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error, error


def test_what_is_missing_is_said_in_a_sentence(shelf, capsys, monkeypatch):
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        with monkeypatch.context() as patch:
            for module in list(sys.modules):
                if module.startswith("peft_from_scratch.serving."):
                    patch.delitem(sys.modules, module)
            patch.setitem(sys.modules, name, None)
            assert main(["serve", "--adapters", str(shelf)]) == 1
        error = capsys.readouterr().err
        assert f'{name} is missing: pip install "peft-from-scratch[serve]"' in error


def test_defaults_and_bytes():
    options = parser().parse_args(["serve", "--adapters", "x"])
    assert (options.host, options.port) == ("127.0.0.1", 8000)
    assert (options.rows, options.queue, options.timeout) == (16, 64, 300)
    assert not options.allow_loading and options.keys is None
    for text, count in (
        ("256MB", 256_000_000),
        ("1.5 GiB", 3 * 2**29),
        ("12kb", 12_000),
        ("1000", 1000),
    ):
        assert bytes_in(text) == count
    for text in ("", "MB", "-1", "1 TB", "1e9"):
        with pytest.raises(ValueError, match="--budget"):
            bytes_in(text)
