"""`train --engine … --ranks N`: one process's adapter, and errors in a sentence."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

from peft_from_scratch.cli.command_line import ENGINES, main
from peft_from_scratch.parallel.engines import NAMES


@pytest.fixture
def command(base, tmp_path):
    """command(out, *options) is a training of a small base on forty rows."""
    rows = [{"prompt": f"say {n}", "completion": "so" * (1 + n % 5)} for n in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixed = ["--data", str(data), "--base", base, "--dtype", "float32", "--steps", "4"]
    sizes = ["--batch", "4", "--accumulate", "2", "--r", "4", "--targets", "attention"]

    def line(out, *options):
        return ["train", *fixed, *sizes, "--out", str(tmp_path / out), *options]

    return line


def test_two_ranks_leave_the_adapter_of_one_process(command, tmp_path, capfd):
    assert main(command("one")) == 0
    capfd.readouterr()
    more = ("--engine", "zero", "--stage", "2", "--ranks", "2")
    assert main(command("two", *more)) == 0
    shown = capfd.readouterr().out
    assert shown.count("2 ranks train together by zero, stage 2") == 1
    assert shown.count("training.png are in") == 1, "a rank besides rank 0 has printed"

    one, two = (tmp_path / name for name in ("one", "two"))
    records = [json.loads((f / "training.json").read_text()) for f in (one, two)]
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], abs=1e-4)
    assert records[0]["correct_after"] == records[1]["correct_after"]
    adapters = [load_file(f / "adapter_model.safetensors") for f in (one, two)]
    for name, tensor in adapters[0].items():
        assert (tensor - adapters[1][name]).abs().max() < 1e-4, name
    assert sorted(p.name for p in two.iterdir()) == sorted(
        p.name for p in one.iterdir()
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--ranks", "2"), "several ranks, or a stage of ZeRO, and no engine"),
        (("--stage", "1"), "and no engine: say --engine zero or fsdp2 or deepspeed"),
        (("--engine", "fsdp2", "--stage", "1"), "fsdp2 has no stages"),
        (("--engine", "zero", "--ranks", "0"), "ranks=0"),
        (("--engine", "zero", "--ranks", "4"), "batch=4: allowed is a multiple of 8"),
        (("--engine", "zero", "--paged", "0.5"), "paged=0.5"),
    ],
)
def test_what_cannot_be_is_one_sentence(command, options, sentence, capsys):
    assert main(command("out", *options)) == 1
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error


def test_ranks_of_torchrun_are_not_started_again(command, monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert main(command("out", "--engine", "zero", "--ranks", "4")) == 1
    assert "2 ranks are started already" in capsys.readouterr().err
    assert main(command("out")) == 1
    assert "no engine" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is here")
def test_a_missing_deepspeed_is_said_at_once(command, capsys):
    assert main(command("out", "--engine", "deepspeed", "--ranks", "2")) == 1
    assert "pip install 'peft-from-scratch[deepspeed]'" in capsys.readouterr().err
    assert not Path(command("out")[-1]).exists()


def test_the_command_line_knows_the_engines():
    assert ENGINES == NAMES
