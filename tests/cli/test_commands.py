"""The command line: train, chat and merge on a small base, and errors in a sentence."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import architectures
import pytest
import torch
from planting import each_is_caught, law
from transformers import AutoModelForCausalLM

import peft_from_scratch as pfs
from peft_from_scratch.cli import chat, command_line, commands, doctor
from peft_from_scratch.cli.command_line import main
from peft_from_scratch.comparison import compare, report
from peft_from_scratch.comparison.candidates import CANDIDATES
from peft_from_scratch.comparison.plan import OF_DATA, Plan
from peft_from_scratch.files import formats
from peft_from_scratch.ledger.claim import BASES
from peft_from_scratch.methods import METHODS
from peft_from_scratch.tasks import manner, templates
from peft_from_scratch.tasks.task import load_task
from peft_from_scratch.training import (
    chunked_loss,
    evaluation,
    gradient_checkpointing,
)
from peft_from_scratch.training.config import TrainConfig
from peft_from_scratch.training.loop import train

IDS = torch.arange(64, 80)[None]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty rows of one's own."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", sayings())


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    """The folder of an adapter that the command line trained."""
    out = str(tmp_path_factory.mktemp("adapter"))
    options = ("--lr", "1e-2", "--r", "4", "--targets", "attention")
    assert main(training(base, data, out, *options)) == 0
    return out


def sayings():
    return [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(40)]


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def training(base, data, out, *more):
    command = ["train", "--data", str(data), "--base", base, "--out", str(out)]
    return [*command, "--steps", "6", "--dtype", "float32", *more]


def record_of(out):
    return json.loads(Path(out, "training.json").read_text())


# ------------------------------------------------------------------------- train


@pytest.fixture
def answered(monkeypatch):
    """The rows of each call of answer_rows for which a model was asked."""
    asked, calls = [], []
    answer_rows, generate = evaluation.answer_rows, evaluation.generate

    def noting(model, tokenizer, task, rows, **options):
        asked.append(rows)
        return answer_rows(model, tokenizer, task, rows, **options)

    def generating(*args, **options):
        calls.append(asked[-1])
        return generate(*args, **options)

    monkeypatch.setattr(evaluation, "answer_rows", noting)
    monkeypatch.setattr(evaluation, "generate", generating)
    return calls


@pytest.fixture
def refused(base, data, answered, capsys):
    """refused(out, *options) is what a train says that fails before any answer."""

    def run(out, *more, data=data):
        assert main(training(base, data, out, *more)) == 1
        assert not answered
        told = capsys.readouterr().err
        assert "Traceback" not in told
        return told

    return run


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
    record = record_of(trained)
    assert record["dtype"] == "float32"
    assert len(record["loss"]) == 6 and record["recipe"]["lr"] == 1e-2
    assert record["recipe"]["template"] == "chat" and record["instruction"] == ""
    with open(f"{trained}/training.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_an_option_of_another_method_is_named(refused, tmp_path):
    told = refused(tmp_path, "--method", "prompt", "--r", "4")
    assert "--r is no option of --method prompt, which has --n" in told
    assert "has no bias" in refused(tmp_path, "--method", "bitfit")


def test_a_prompt_starts_from_the_instruction(base, tmp_path):
    _, tokenizer = pfs.load_model(base)
    options = Namespace(method="prompt", **dict.fromkeys(commands.OPTIONS))
    task = Namespace(instruction="Say it.")
    found = commands._arguments(options, tokenizer, task)
    assert found == {"start": tokenizer("Say it.").input_ids}
    task.instruction = ""
    assert commands._arguments(options, tokenizer, task) == {}


def test_bad_rows_are_named_and_nothing_is_trained(refused, tmp_path):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    assert "line 2" in refused(out, data=file)
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--lr", "0"), "lr=0.0: allowed"),
        (("--lr", "nan"), "lr=nan: allowed"),
        (("--steps", "0"), "steps=0: allowed"),
        (("--accumulate", "3"), "accumulate=3: allowed"),
        (("--max-tokens", "1"), "max_tokens=1: allowed"),
        (("--chunk", "0"), "chunk=0: allowed"),
        (("--buckets", "0"), "buckets=0: allowed"),
    ],
)
def test_an_impossible_recipe_is_refused_first(refused, tmp_path, option, told):
    assert told in refused(tmp_path / "out", *option, data="not even looked for")


def test_what_is_left_open_is_the_default_of_the_method_and_of_the_recipe(base, data):
    for method in METHODS:
        command = training(base, data, "out", "--method", method.name)
        recipe = commands.train_config(command_line.parser().parse_args(command))
        assert recipe.lr == method.lr and recipe.max_tokens == TrainConfig.max_tokens
        left = TrainConfig(lr=method.lr, warmup=recipe.warmup, steps=recipe.steps)
        for name in commands.OF_MEMORY:
            assert getattr(recipe, name) == getattr(left, name)


def test_a_run_that_keeps_less_learns_the_same(base, data, trained, tmp_path):
    options = ("--lr", "1e-2", "--r", "4", "--targets", "attention")
    less = ("--checkpointing", "--chunk", "5")
    assert main(training(base, data, tmp_path, *options, *less)) == 0
    ours, theirs = record_of(tmp_path), record_of(trained)
    assert ours["recipe"] == theirs["recipe"] | {"checkpointing": True, "chunk": 5}
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_rows_are_put_into_buckets(base, data, tmp_path, capsys):
    assert main(training(base, data, tmp_path, "--buckets", "3")) == 0
    assert record_of(tmp_path)["recipe"]["buckets"] == 3
    assert "of the first 6 steps' tokens are padding" in capsys.readouterr().out


def test_what_the_model_cannot_is_refused_before_any_answer(
    refused, tmp_path, monkeypatch
):
    monkeypatch.setattr(chunked_loss, "can_choose_logits", lambda model: False)
    words = "computes the logits of all positions"
    assert words in refused(tmp_path / "out", "--chunk", "5")
    monkeypatch.setattr(gradient_checkpointing, "GradientCheckpointingLayer", int)
    words = "has no decoder layers that transformers checkpoints"
    assert words in refused(tmp_path / "out", "--checkpointing")


def test_a_folder_that_cannot_be_made_is_refused_first(refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file, file / "below", file / "far" / "below"):
        told = refused(out, data="not even looked for")
        assert f"--out {out}: {file} is a file; name a folder" in told
    assert file.read_text() == "kept"


def test_a_finished_run_is_not_trained_again(refused, trained):
    before = record_of(trained)
    told = refused(trained, data="not even looked for")
    assert f"--out {trained} holds a finished run" in told
    assert record_of(trained) == before


def test_rows_of_all_splits_are_checked_and_named_by_their_line(
    refused, data, tmp_path
):
    task, rows, wrong = load_task(data), sayings(), {}
    for split, completion, reason in (
        ("train", "long " * 30, "the limit is 120"),
        ("validation", "an <eos> inside", "the end token"),
        ("test", "long " * 40, "the limit is 120"),
    ):
        number = int(getattr(task, split)[0]["place"].removeprefix("line "))
        rows[number - 1]["completion"] = completion
        wrong[number] = reason
    file = write_rows(tmp_path / "rows.jsonl", rows)
    told = refused(tmp_path / "out", "--max-tokens", "120", data=file)
    first, *listed = told.splitlines()
    assert first == f"ValueError: {file} has 3 bad rows:"
    for line, number in zip(listed, sorted(wrong), strict=True):
        assert line.startswith(f"  line {number}: ") and wrong[number] in line
    assert not (tmp_path / "out").exists()


def test_rows_longer_than_the_models_context_are_refused(refused, tmp_path):
    """This model reads 256 tokens, less than the default of 512."""
    rows = [{"prompt": f"say {n}", "completion": "x" * 9 * n} for n in range(40)]
    rows[0]["completion"] = "nothing"
    told = refused(tmp_path / "out", data=write_rows(tmp_path / "rows.jsonl", rows))
    assert "the limit is 256" in told and "line 40: " in told
    told = refused(tmp_path / "out", data="orders")  # of no file
    assert "\n  row 2 of train: " in told and "and 3 more" in told
    told = refused(tmp_path / "out", "--max-tokens", "257")
    assert "--max-tokens 257: the model has 256 positions" in told


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_positions_in_front_count_in_the_context(refused, tmp_path, method):
    """Six of the 256 are taken: a row of 250 tokens is the longest."""
    options = ("--method", method, "--n", "6")
    told = refused(tmp_path / "out", *options, "--max-tokens", "251")
    assert "--max-tokens 251: the model has 250 positions left, since 6 are" in told
    rows = [{"prompt": f"say {n}", "completion": "x" * 9 * n} for n in range(40)]
    rows[0]["completion"] = "nothing"
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert "the limit is 250" in refused(tmp_path / "out", *options, data=file)


def test_columns_and_configuration_of_a_data_set_are_chosen(
    base, tmp_path, answered, monkeypatch, capsys
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("one", "two"):
        rows = [{"q": f"say {n}", "a": f"{name} {n}"} for n in range(40)]
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n"
        "- config_name: two\n  data_files: two.jsonl\n---\n"
    )
    command = training(base, folder, tmp_path / "out", "--config", "two")
    assert main(command) == 1
    assert "--prompt and --completion" in capsys.readouterr().err
    assert main([*command, "--prompt", "q", "--completion", "a"]) == 0
    assert answered[0][0]["completion"].startswith("two")


# Every method with what it needs here: the model has no biases, and is 32 wide.
OPTIONS = {
    name: ("--method", name, *(("--m", "4") if name == "houlsby" else ()))
    for name in (method.name for method in METHODS)
    if name != "bitfit"
}


@pytest.mark.parametrize("method", OPTIONS)
def test_what_is_answered_before_training_is_what_the_base_answers(
    method, base, data, tmp_path, monkeypatch
):
    """Though the model is made trainable first. QLoRA's base is the quantized one."""
    model, tokenizer = pfs.load_model(base)
    if method == "qlora":
        pfs.nf4.quantize_model(model)
    task = load_task(data)
    said = evaluation.answer_rows(model, tokenizer, task, task.test, template="chat")
    monkeypatch.setattr(commands, "train", raising(ValueError("not now")))
    assert main(training(base, data, tmp_path, *OPTIONS[method])) == 1
    kept = json.loads((tmp_path / "checkpoints/answers-before.json").read_text())
    assert kept["answers"] == said.answers


@pytest.mark.parametrize(
    ("method", "described"),
    [("lora", ", bfloat16\n"), ("full", ", float32, autocast to bfloat16\n")],
)
def test_a_train_in_bfloat16_keeps_what_trains_in_float32(
    method, described, base, data, tmp_path, capsys
):
    asked = ["--method", method, "--dtype", "bfloat16"]
    assert main(training(base, data, tmp_path, *asked)) == 0
    assert described in capsys.readouterr().out
    recipe = record_of(tmp_path)["recipe"]
    assert record_of(tmp_path)["dtype"] == "bfloat16"
    assert recipe["autocast"] == (None if method == "lora" else "bfloat16")
    model, _ = pfs.load_model(base, dtype="bfloat16" if method == "lora" else None)
    pfs.load(model, tmp_path)
    assert {p.dtype for p in pfs.trainable(model).values()} == {torch.float32}


def test_a_train_injects_once_and_encodes_each_row_once(
    base, data, tmp_path, monkeypatch
):
    injected, encoded = [], []

    def note(calls, module, name):
        sound = getattr(module, name)

        def noting(*args, **options):
            calls.append(args)
            return sound(*args, **options)

        monkeypatch.setattr(module, name, noting)

    note(injected, pfs.lora, "inject")
    note(encoded, templates, "encode_row")
    assert main(training(base, data, tmp_path)) == 0
    assert (len(injected), len(encoded)) == (1, 40)


def raising(error):
    def function(*args, **options):
        raise error

    return function


def test_rows_are_scored_and_told_what_to_do_as_asked(base, data, tmp_path, capsys):
    """Scores between 0 and 1 have another interval than counts."""
    mine = tmp_path / "mine.py"
    mine.write_text("def score(answer, completion):\n    return 0.5\n")
    asked = ("--instruction", "Repeat it.", "--scorer")
    assert main(training(base, data, tmp_path / "one", *asked, str(mine))) == 0
    told = f"score by {mine} on 8 test rows: 0.500 (95 % interval 0.500 to 0.500) -> "
    assert told in capsys.readouterr().out
    record = record_of(tmp_path / "one")
    assert record["instruction"] == "Repeat it." and record["scorer"] == str(mine)
    assert record["correct_after"] == [0.5] * 8
    assert main(training(base, data, tmp_path / "two", *asked, "rouge-l")) == 0
    assert "ROUGE-L on 8 test rows: " in capsys.readouterr().out
    assert main(training(base, data, tmp_path / "three", *asked, "json")) == 1
    assert "for the scorer json, has 40 bad rows" in capsys.readouterr().err


def test_a_scorer_that_raises_costs_neither_training_nor_answers(
    base, data, tmp_path, answered, monkeypatch, capsys
):
    flag, mine, trained = tmp_path / "flag", tmp_path / "mine.py", []
    mine.write_text(
        "from pathlib import Path\n"
        "def score(answer, completion):\n"
        f"    if Path({str(flag)!r}).exists():\n"
        "        raise RuntimeError('not today')\n"
        "    return True\n"
    )

    def then_fail(*args, **more):
        history = train(*args, on_step=trained.append, **more)
        flag.touch()
        return history

    monkeypatch.setattr(commands, "train", then_fail)
    out, asked = tmp_path / "out", ("--scorer", str(mine))
    assert main(training(base, data, out, *asked)) == 1
    error = capsys.readouterr().err
    assert "mine.py (line 4): RuntimeError: not today, for the answer" in error
    assert len(answered) == 2 and trained
    mine.write_text("def score(answer, completion):\n    return True\n")
    answered.clear()
    trained.clear()
    assert main(training(base, data, out, *asked)) == 0
    assert not answered and not trained
    assert record_of(out)["correct_after"] == [True] * 8
    assert not (out / "checkpoints").exists()


# A run that is stopped


@pytest.fixture
def stopped(base, data, tmp_path):
    """stopped(*options): a folder in which a run got a Ctrl-C after three steps."""

    def press(history):
        if history.steps == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def run(*options):
        def pressing(*args, **more):
            return train(*args, on_step=press, **more)

        out = tmp_path / "stopped"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(commands, "train", pressing)
            assert main(training(base, data, out, *options)) == 130
        return out

    return run


@pytest.mark.parametrize("method", OPTIONS)
def test_a_stopped_run_goes_on_and_leaves_no_checkpoints(
    method, base, data, tmp_path, stopped, answered, capsys
):
    whole, options = tmp_path / "whole", OPTIONS[method]
    assert main(training(base, data, whole, *options)) == 0
    assert sorted(os.listdir(whole)) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
        "training.png",
    ]
    out = stopped(*options)
    assert "The same command goes on" in capsys.readouterr().err
    assert list((out / "checkpoints").glob("step-*"))
    assert not (out / "training.json").exists()
    (out / "checkpoints" / "mine").write_text("kept")
    answered.clear()
    assert main(training(base, data, out, *options)) == 0
    assert len(answered) == 1  # those before are kept
    assert record_of(out) == record_of(whole)
    assert os.listdir(out / "checkpoints") == ["mine"]


def test_checkpoints_of_another_run_are_refused_before_answering(
    refused, stopped, answered
):
    out = stopped()
    answered.clear()
    told = refused(out, "--lr", "0.5")
    assert "holds checkpoints of another run: recipe.lr is 0.001 there" in told


def test_answers_of_a_run_without_a_checkpoint_are_not_taken_over(
    base, data, tmp_path, answered
):
    """Nothing says which base and rows they are of."""
    left = tmp_path / "checkpoints" / "answers-before.json"
    left.parent.mkdir()
    left.write_text(json.dumps({"asked": "", "answers": [], "seconds": 1.0}))
    assert main(training(base, data, tmp_path)) == 0
    assert len(answered) == 2
    assert len(record_of(tmp_path)["correct_before"]) == len(answered[0])


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b'{"asked": "", "answers": [3], "seconds": 1}',
        b'{"asked": "", "answers": 3, "seconds": 1}',
        b'{"asked": "", "answers": [], "seconds": 1, "more": 1}',
    ],
    ids=range(7),
)
def test_answers_that_cannot_be_read_are_asked_for_again_and_said(
    content, base, data, stopped, answered, capsys
):
    out = stopped()
    file = out / "checkpoints" / "answers-before.json"
    first = json.loads(file.read_text())["answers"]
    right = [
        s.strip() == r["completion"] for s, r in zip(first, answered[0], strict=True)
    ]
    file.write_bytes(content)
    answered.clear()
    assert main(training(base, data, out)) == 0
    assert len(answered) == 2
    assert f"{file} " in capsys.readouterr().out
    assert record_of(out)["correct_before"] == right


# ------------------------------------------------------------------------- merge


def test_merge_writes_a_model_that_needs_no_adapter(base, trained, tmp_path, capsys):
    out = tmp_path / "merged"
    command = ["merge", "--base", base, "--adapter", trained, "--out", str(out)]
    assert main(command) == 0
    assert capsys.readouterr().err == ""  # no bar of transformers either
    model, _ = pfs.load_model(base)
    pfs.load(model, trained)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert torch.allclose(plain(IDS).logits, model(IDS).logits, atol=1e-5)
    assert main(command) == 1 and "is there already" in capsys.readouterr().err


# ------------------------------------------------------------------------- chat


@pytest.fixture
def talk(base, monkeypatch, capsys):
    """talk(lines, *options): what a chat prints, and the prompts that it encoded."""

    def run(lines, *options):
        prompts, encode = [], templates.encode_prompt

        def noting(*args, **more):
            prompts.append(encode(*args, **more))
            return prompts[-1]

        raw = lines if isinstance(lines, bytes) else lines.encode()
        stdin = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin", stdin)
            patch.setattr(chat, "encode_prompt", noting)
            assert main(["chat", "--base", base, *options]) == 0
        return capsys.readouterr().out, prompts

    return run


@pytest.fixture
def adapter(trained, tmp_path):
    """adapter(record): the trained adapter with another training.json."""

    def write(record):
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(trained, folder)
        (folder / "training.json").unlink()
        if record is not None:
            (folder / "training.json").write_text(record)
        return str(folder)

    return write


def test_chat_answers_each_line_and_ends(talk, trained):
    said, prompts = talk("hello\n\nagain\nexit\nnever\n", "--adapter", trained)
    assert said.count("you>") == 4 and "(forgotten)" in said
    assert prompts[-1] == prompt("again", "", "chat")


def prompt(said, instruction, template):
    tokenizer = architectures.byte_tokenizer()
    return templates.encode_prompt(tokenizer, instruction, said, template=template)


def test_an_adapter_is_spoken_to_as_it_was_trained(
    base, data, talk, tmp_path, monkeypatch, capsys
):
    """From the command that trains to the tokens of the chat, by the hint it prints."""
    task = replace(load_task(data), instruction="Say it.")
    out = tmp_path / "an adapter"
    with monkeypatch.context() as patch:
        patch.setattr(commands, "load_task", lambda *args, **options: task)
        assert main(training(base, data, out, "--template", "raw")) == 0
    assert f"chat --base {base} --adapter '{out}'" in capsys.readouterr().out
    said, prompts = talk("hello\n", "--adapter", str(out))
    assert "template raw, instruction 'Say it.'\n" in said
    assert prompts[-1] == prompt("hello", "Say it.", "raw")
    for options, instruction, template in (
        (("--system", "Sing."), "Sing.", "raw"),
        (("--system", ""), "", "raw"),
        (("--template", "chat"), "Say it.", "chat"),
    ):
        _, prompts = talk("hello\n", "--adapter", str(out), *options)
        assert prompts[-1] == prompt("hello", instruction, template)


def test_an_adapter_without_a_record_is_spoken_to_as_the_base(talk, adapter):
    said, prompts = talk("hello\n", "--adapter", adapter(None))
    assert "template chat, no instruction\n" in said
    assert prompts[-1] == prompt("hello", "", "chat")


def test_a_record_that_an_editor_of_windows_wrote_is_read(talk, adapter):
    record = {"instruction": "Répète.", "recipe": {"template": "raw"}}
    text = json.dumps(record, ensure_ascii=False, indent=1).replace("\n", "\r\n")
    said, prompts = talk("hello\n", "--adapter", adapter(f"\ufeff{text}"))
    assert "template raw, instruction 'Répète.'\n" in said
    assert prompts[-1] == prompt("hello", "Répète.", "raw")


RAW = '"recipe": {"template": "raw"}'
BROKEN_RECORDS = {  # content of training.json: what is said of it
    "{": "{file} is not JSON: Expecting property name",
    f'{{{RAW}, "instruc': "{file} is not JSON: Unterminated string",
    "[" * 100_000: "{file} is not JSON: ",
    "[]": "{file} is not an object but list",
    "{}": "recipe.template in {file}=None: allowed is 'chat' or 'raw'",
    '{"recipe": 3, "instruction": ""}': "recipe.template in {file}=None: allowed is",
    '{"recipe": {"template": "chatml"}}': "recipe.template in {file}='chatml'",
    '{"recipe": {"template": ["raw"]}}': "recipe.template in {file}=['raw']",
    f"{{{RAW}}}": "instruction in {file}=None: allowed is text",
    f'{{{RAW}, "instruction": 4}}': "instruction in {file}=4: allowed is text",
    f'{{{RAW}, "instruction": "\\ud800"}}': "instruction in {file}='\\ud800': allowed",
    f'{{{RAW}, "recipe": {{}}}}': "{file} is ambiguous: the key 'recipe' stands twice",
}


@pytest.mark.parametrize("record", BROKEN_RECORDS, ids=range(len(BROKEN_RECORDS)))
def test_a_broken_record_is_refused_unless_all_is_said(
    record, base, talk, adapter, capsys
):
    """The first message would go to a model that is spoken to in another way."""
    folder = adapter(record)
    for some in ((), ("--template", "raw"), ("--system", "")):
        assert main(["chat", "--base", base, "--adapter", folder, *some]) == 1
        said, error = capsys.readouterr()
        told = BROKEN_RECORDS[record].format(file=f"{folder}/training.json")
        assert error.startswith(f"ValueError: {told}")
        assert "say both --template and --system" in error
        assert "you>" not in said and "Traceback" not in error
    both = ("--template", "raw", "--system", "Say it.")
    _, prompts = talk("hello\n", "--adapter", folder, *both)
    assert prompts[-1] == prompt("hello", "Say it.", "raw")


@law
def what_a_run_left_is_never_read_as_nothing(folder):
    file = folder / "training.json"
    assert manner.recorded(file) == (None, None)
    for content, told in BROKEN_RECORDS.items():
        file.write_text(content)
        with pytest.raises(ValueError) as refused:
            manner.recorded(file)
        assert str(refused.value).startswith(told.format(file=file))
    whole = {"asked": "0", "answers": ["a"], "seconds": 1.0}
    file.write_text(json.dumps(whole))
    assert evaluation._kept(file, "0") == (["a"], 1.0)
    assert evaluation._kept(file, "1") is None
    for change in ({"answers": [1]}, {"answers": "a"}, {"more": 1}):
        file.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match="does not hold the answers"):
            evaluation._read_answers(file)


test_a_planted_bug_is_caught = each_is_caught(
    {
        "a broken record is as none": (
            manner.recorded,
            "except ValueError as error:",
            "except ValueError as error:\n        return None, None",
            what_a_run_left_is_never_read_as_nothing,
        ),
        "any template will do": (
            manner.recorded,
            "require(template in TEMPLATES,",
            "require(True,",
            what_a_run_left_is_never_read_as_nothing,
        ),
        "any instruction will do": (
            manner.recorded,
            "isinstance(instruction, str) and is_unicode(instruction)",
            "True",
            what_a_run_left_is_never_read_as_nothing,
        ),
        "the answers to other rows are taken over": (
            evaluation._kept,
            'record["asked"] == asked',
            "True",
            what_a_run_left_is_never_read_as_nothing,
        ),
    },
    (AssertionError, pytest.fail.Exception),
)


def test_a_system_that_is_no_text_is_refused(base, capsys):
    assert main(["chat", "--base", base, "--system", "r\udce9ponds"]) == 1
    assert "--system 'r\\udce9ponds' is not UTF-8 text" in capsys.readouterr().err


def test_a_message_that_cannot_be_encoded_is_asked_for_again(talk, monkeypatch):
    fitting = chat._fitting

    def refusing(*args):
        if args[3] == "bad":
            raise ValueError("the text spells '<s>'")
        return fitting(*args)

    monkeypatch.setattr(chat, "_fitting", refusing)
    said, _ = talk("hello\nbad\nagain\n")
    assert "(the text spells '<s>')\n" in said
    assert said.count("you>") == 4 and "(forgotten)" not in said


def test_a_chat_longer_than_the_context_forgets_its_oldest_turns(talk):
    """256 positions, half of them for the answer."""
    said, prompts = talk("\n".join(["a" * 80, "b" * 80, "c" * 200, "d" * 9]))
    assert said.count("the oldest turns are forgotten") == 2
    assert said.count("this alone is longer than the model can read") == 1
    assert prompt("b" * 80, "", "chat") in prompts  # without the turn before it
    assert said.count("you>") == 5
    assert len(prompts[-1]) <= 128


def test_the_newest_turns_that_fit_are_kept(base):
    model, tokenizer = pfs.load_model(base)
    for n in range(1, 12):
        turns = [(f"q{i}", "a" * n) for i in range(20)]
        kept = chat._fitting(model, tokenizer, "", "now", turns, "raw")
        assert 0 < len(kept) < 20 and kept == turns[-len(kept) :]
        lengths = [
            len(
                templates.encode_prompt(
                    tokenizer, "", "now", template="raw", examples=e
                )
            )
            for e in (kept, turns[-len(kept) - 1 :])
        ]
        assert lengths[0] <= 128 < lengths[1]


def test_bytes_that_are_no_text_are_asked_for_again(talk):
    said, prompts = talk(b"hel\xfflo\n\xff\nhello\n")
    assert said.count("that is not UTF-8 text") == 2
    assert {tuple(each) for each in prompts} == {tuple(prompt("hello", "", "chat"))}


# ------------------------------------------------------------------------- compare


@pytest.fixture
def planned(monkeypatch):
    """planned(*options): the plan that compare would follow, and whether it tunes."""

    def run(*options):
        asked = []
        with monkeypatch.context() as patch:
            patch.setattr(
                compare, "compare", lambda plan, tune: asked.extend([plan, tune])
            )
            patch.setattr(report, "table", lambda result: "")
            assert main(["compare", *options]) == 0
        return tuple(asked)

    return run


def test_what_is_left_open_in_a_comparison_is_the_plans_default(planned):
    assert planned() == (Plan(), False)


def test_a_comparison_follows_its_options(planned):
    plan, _ = planned("--methods", "few-shot, lora", "--seeds", "1, 2", "--batch", "4")
    assert plan == Plan(methods=("few-shot", "lora"), seeds=(1, 2), batch=4)
    plan, _ = planned("--task", "terms", "--rows", "7", "--steps", "9", "--out", "out2")
    assert plan == Plan(task="terms", rows=7, steps=9, out="out2")
    assert planned("--template", "raw", "--tune") == (Plan(template="raw"), True)


# ------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["compare", "--methods", "lroa"], "'lroa' is none of"),
        (["compare", "--task", "ordres"], "'ordres' is no task"),
        (["compare", "--seeds", "one"], "such as 0,1,2"),
        (["chat", "--base", "smolm2"], "smollm2"),
        (["chat", "--device", "tpu"], "tpu"),
        (["train", "--data", "no.jsonl", "--out", "o"], "no.jsonl does not exist"),
    ],
)
def test_a_wrong_argument_is_a_sentence(command, told, capsys):
    assert main(command) == 1
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


def test_a_rate_too_small_to_move_anything_is_a_sentence(base, data, tmp_path, capsys):
    assert main(training(base, data, tmp_path, "--lr", "1e-30")) == 1
    error = capsys.readouterr().err
    assert "did not move" in error and "larger --lr" in error


def test_too_little_memory_is_a_sentence(base, data, tmp_path, monkeypatch, capsys):
    for allocate in (
        lambda *args, **options: torch.empty(2**60),
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
    ):
        monkeypatch.setattr(commands, "train", allocate)
        assert main(training(base, data, tmp_path)) == 1
        error = capsys.readouterr().err
        assert "memory" in error and "smaller --batch" in error


def test_a_runtime_error_that_nobody_foresaw_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(chat, "chat", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["chat"])


@pytest.mark.parametrize(
    ("command", "place", "goes_on"),
    [
        ("train --data d --out o", (commands, "fine_tune"), True),
        ("compare", (compare, "compare"), True),
        ("chat", (chat, "chat"), False),
        ("merge --adapter a --out o", (commands, "merge_to_folder"), False),
        ("doctor", (doctor, "run"), False),
    ],
)
def test_only_what_goes_on_says_so_when_it_is_stopped(
    command, place, goes_on, monkeypatch, capsys
):
    monkeypatch.setattr(*place, raising(KeyboardInterrupt()))
    assert main(command.split()) == 130
    told = "\nStopped.\n"
    if goes_on:
        told = "\nStopped. The same command goes on where this one was.\n"
    assert capsys.readouterr().err == told


# ------------------------------------------------------------------------- parser


def test_names_written_out_for_the_parser_are_the_librarys():
    assert command_line.TEMPLATES == templates.TEMPLATES
    assert command_line.BASES == BASES
    assert command_line.OF_DATA == OF_DATA


def test_the_parser_knows_every_method_and_every_candidate(capsys):
    for method in METHODS:
        command = training("base", "data", "out", "--method", method.name)
        assert command_line.parser().parse_args(command).method == method.name
    with pytest.raises(SystemExit):
        command_line.parser().parse_args(["compare", "--help"])
    said = "".join(capsys.readouterr().out.split())
    assert ",".join(candidate.key for candidate in CANDIDATES) in said


def test_what_can_be_trained_can_be_saved():
    assert set(formats.FORMATS) == {method.name for method in METHODS}


def test_parsing_imports_nothing_heavy():
    code = (
        "import sys; from peft_from_scratch.cli import command_line;"
        "command_line.parser();"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib'};"
        "print(heavy & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
