"""The command line: train, chat and merge on a small base, and errors in a sentence."""

import io
import json

import architectures
import pytest
import torch
from transformers import AutoModelForCausalLM

import peft_from_scratch as pfs
from peft_from_scratch.__main__ import main


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    architectures.build("llama").save_pretrained(folder)
    architectures.byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty rows of one's own."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    """The folder of an adapter that the command line trained."""
    out = str(tmp_path_factory.mktemp("adapter"))
    command = ["train", "--data", data, "--base", base, "--out", out, "--steps", "6"]
    assert main([*command, "--lr", "1e-2", "--r", "4", "--targets", "attention"]) == 0
    return out


IDS = torch.arange(64, 80)[None]


def test_train_writes_an_adapter_its_record_and_a_picture(base, trained):
    model, _ = pfs.load_model(base)
    before = model(IDS).logits
    names = pfs.load(model, trained)
    assert {name.rpartition(".")[2] for name in names} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert pfs.trainable(model)[f"{names[0]}.A"].shape[0] == 4
    assert not torch.equal(model(IDS).logits, before)
    with open(f"{trained}/training.json") as file:
        record = json.load(file)
    assert len(record["loss"]) == 6 and record["recipe"]["lr"] == 1e-2
    with open(f"{trained}/training.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_merge_writes_a_model_that_needs_no_adapter(base, trained, tmp_path, capsys):
    out = tmp_path / "merged"
    command = ["merge", "--base", base, "--adapter", trained, "--out", str(out)]
    assert main(command) == 0
    model, _ = pfs.load_model(base)
    pfs.load(model, trained)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert torch.allclose(plain(IDS).logits, model(IDS).logits, atol=1e-5)
    assert main(command) == 1 and "is there already" in capsys.readouterr().err


def test_chat_answers_each_line_and_ends(base, trained, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nagain\nexit\nnever\n"))
    assert main(["chat", "--base", base, "--adapter", trained]) == 0
    said = capsys.readouterr().out
    assert said.count("you>") == 4 and "(forgotten)" in said


def test_bad_rows_are_named_and_nothing_is_trained(base, tmp_path, capsys):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    assert main(["train", "--data", str(file), "--base", base, "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert "line 2" in told and "Traceback" not in told
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["compare", "--methods", "lroa"], "'lroa' is none of"),
        (["compare", "--task", "ordres"], "'ordres' is no task"),
        (["compare", "--seeds", "one"], "such as 0,1,2"),
        (["chat", "--base", "smolm2"], "smollm2"),
        (["chat", "--device", "tpu"], "tpu"),
    ],
)
def test_a_wrong_argument_is_a_sentence(command, told, capsys):
    assert main(command) == 1
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
