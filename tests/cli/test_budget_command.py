"""`budget` on the command line: its JSON, its text, its refusals; all offline."""

import json

import pytest

from peft_from_scratch.cli import command_line
from peft_from_scratch.cli.command_line import main
from peft_from_scratch.memory import setups

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "master",
    "activations",
    "logits",
    "adapter",
)


def answered(capsys, *arguments):
    """The JSON of one call."""
    assert main(["budget", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def folder(tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 500,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_json_has_whole_bytes_that_add_up(folder, capsys):
    for method in ("full", "lora", "qlora"):
        bill = answered(capsys, "--config", str(folder), "--method", method)
        assert all(isinstance(bill[name], int) for name in (*PARTS, "total", "peak"))
        assert bill["total"] == sum(bill[name] for name in PARTS)
        assert bill["low"] <= bill["expected"] == bill["peak"] <= bill["high"]
        assert bill["peak"] == max(bill["timeline"].values())


def test_a_file_and_its_folder_are_one_model(folder, capsys):
    by_folder = answered(capsys, "--config", str(folder))
    by_file = answered(capsys, "--config", str(folder / "config.json"))
    del by_folder["inputs"], by_file["inputs"]
    assert by_folder == by_file


def test_options_arrive(folder, capsys):
    config = ("--config", str(folder))
    plain = answered(capsys, *config)
    for more, name in (
        (("--batch", "2"), "activations"),
        (("--seq", "600"), "logits"),
        (("--r", "16"), "adapter"),
        (("--dtype", "float32"), "weights"),
        (("--attention", "eager"), "activations"),
    ):
        assert answered(capsys, *config, *more)[name] > plain[name]
    fewer = answered(capsys, *config, "--checkpointing")
    assert fewer["activations"] < plain["activations"]
    fewer = answered(capsys, *config, "--zero", "3", "--ranks", "4")
    assert fewer["weights"] < plain["weights"] / 3
    fewer = answered(capsys, *config, "--labels", "100")
    assert fewer["logits"] * 511 == plain["logits"] * 100
    pairs = answered(capsys, *config, "--phase", "dpo", "--method", "full")
    assert pairs["reference"] == 2 * pairs["parameters"]
    call = (*config, "--phase", "group", "--labels", "100", "--group")
    four, two = (answered(capsys, *call, answers) for answers in ("4", "2"))
    assert four["keys_and_values"] == 2 * two["keys_and_values"]
    cache = answered(capsys, *config, "--phase", "generate")
    assert cache["keys_and_values"] == 512 * 2 * 2 * 64 * 2
    assert cache["optimizer"] == cache["gradients"] == 0


def test_fit_says_what_fits_and_what_saves_most(folder, capsys):
    call = ["--config", str(folder), "--method", "full", "--fit", "2MB"]
    fit = answered(capsys, *call)["fit"]
    assert fit["bytes"] == 2_000_000
    saved = [change["saved"] for change in fit["changes"]]
    assert saved == sorted(saved, reverse=True)
    assert main(["budget", *call]) == 0
    text = capsys.readouterr().out
    assert "does not fit in 2.00 MB" in text
    assert f"Most is saved by: {fit['changes'][0]['name']}." in text


def test_text_has_table_bar_timeline_and_what_is_not_counted(folder, capsys):
    assert main(["budget", "--config", str(folder)]) == 0
    text = capsys.readouterr().out
    parts = ("weights", "logits", "<- peak", "At the peak", "Not counted:")
    for words in (*parts, "low", "expected", "high"):
        assert words in text
    assert text.isascii()


def test_out_draws_and_refuses_another_suffix(folder, capsys):
    out = folder / "bill.png"
    assert main(["budget", "--config", str(folder), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    wrong = str(folder / "bill.txt")
    assert main(["budget", "--config", str(folder), "--out", wrong]) == 1
    assert "a .png, .svg or .pdf is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nobody/nothing"], "the hub client's cache"),
        (["--config", "tiny", "--m", "3"], "--m is no option of --method lora"),
        (["--config", "tiny", "--zero", "2"], "say --ranks N"),
        (["--config", "tiny", "--fit", "much"], "a size above 0"),
        (["--config", "tiny", "--batch", "0"], "batch=0"),
        (["--config", "tiny", "--labels", "512"], "labels=512"),
        (["--config", "tiny", "--group", "4"], "is for --phase group"),
        (["--config", "tiny", "--method", "bitfit"], "has no bias"),
    ],
)
def test_a_refusal_is_one_sentence(arguments, words, capsys):
    assert main(["budget", *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_the_parser_knows_the_librarys_recipes():
    assert set(command_line.RECIPES) == set(setups.RECIPES)
    assert set(command_line.PHASES) == set(setups.PHASES)
