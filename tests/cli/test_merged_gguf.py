"""`merge --gguf`: the file answers as the adapted model did, or nothing is written."""

import json

import architectures
import pytest
import torch
from adapter_files import contents
from chat_templates import FORMATS, merging_tokenizer, unmarked
from full_disk import files_of_at_most
from gguf import GGUFReader
from planting import each_is_caught, law
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import peft_from_scratch as pfs
from peft_from_scratch.cli import command_line, commands
from peft_from_scratch.cli.command_line import main
from peft_from_scratch.files import gguf_file
from peft_from_scratch.tasks.templates import encode_prompt, encode_rows, stop_token
from peft_from_scratch.training.batch import batch_of
from peft_from_scratch.training.generation import generate

ASKED = ["the sun", "hello", "user said", "to the sun"]
ROWS = [{"prompt": text, "completion": text[::-1]} for text in ASKED]
MOST = 24  # tokens of an answer


def base_model(folder, config=LlamaConfig):
    """(the folder of a small tied model with a chat template, its tokenizer)"""
    tokenizer = merging_tokenizer(unmarked(FORMATS["chatml"].template))
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    torch.manual_seed(0)
    settings = architectures.GATED | dict(vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(
        config(**settings, tie_word_embeddings=True)
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def trained(base, folder, steps=60):
    """An adapter that has learned to answer and to stop, with the record of `train`."""
    model, tokenizer = pfs.load_model(base)
    torch.manual_seed(0)
    pfs.lora.inject(model, r=8, alpha=32)
    optimizer = torch.optim.Adam(pfs.trainable(model).values(), lr=1e-2)
    batch = batch_of(encode_rows(tokenizer, "", ROWS, template="chat"), model.device)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pfs.save(model, folder)
    record = {"recipe": {"template": "chat"}, "instruction": ""}
    (folder / "training.json").write_text(json.dumps(record))
    return model


def merge(folder, *options):
    """What the command line returns for the base and the adapter of this folder."""
    paths = ["--base", str(folder / "base"), "--adapter", str(folder / "adapter")]
    return main(["merge", *paths, *options])


@law
def a_gguf_file_answers_as_the_adapted_model(folder):
    tokenizer = base_model(folder / "base")
    adapted = trained(folder / "base", folder / "adapter")
    file = folder / "new" / "it.gguf"
    assert merge(folder, "--gguf", str(file)) == 0
    plain = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ends = ends_in(file)
    stop = stop_token(tokenizer, "chat")
    prompts = [encode_prompt(tokenizer, "", q, template="chat") for q in ASKED]
    answers = generate(adapted, tokenizer, prompts, stop_id=stop, max_new_tokens=MOST)
    assert stop != tokenizer.eos_token_id and len(set(answers)) > 1
    for question, ids, answer in zip(ASKED, prompts, answers, strict=True):
        asked = theirs.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        assert asked["input_ids"][0].tolist() == ids
        options = dict(max_new_tokens=MOST, do_sample=False, eos_token_id=ends)
        new = plain.generate(**asked, **options)[0, len(ids) :].tolist()
        assert new[-1] == stop and stop not in new[:-1]
        assert theirs.decode(new, skip_special_tokens=True) == answer


def ends_in(file):
    """The tokens at which llama.cpp ends an answer; transformers reads eos alone."""
    names = GGUFReader(file).fields
    keys = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]
    return [names[key].contents() for key in keys if key in names]


@pytest.fixture
def place(tmp_path):
    """A folder with a base and an adapter of one step."""
    base_model(tmp_path / "base")
    trained(tmp_path / "base", tmp_path / "adapter", steps=1)
    return tmp_path


def test_folder_and_file_hold_the_same_model(place, capsys):
    out, file = place / "out", place / "it.gguf"
    assert merge(place, "--out", str(out), "--gguf", str(file)) == 0
    printed, warned = capsys.readouterr()
    assert warned == "" and "llama-cli" in printed and f"--base {out}" in printed
    ids = torch.arange(40, 90)[None]
    one = AutoModelForCausalLM.from_pretrained(out)
    two = AutoModelForCausalLM.from_pretrained(place, gguf_file=file.name)
    assert torch.equal(one(ids).logits, two(ids).logits)


def test_a_dtype_is_the_files(place):
    for dtype in gguf_file.DTYPES:
        file = place / f"{dtype}.gguf"
        assert merge(place, "--gguf", str(file), "--gguf-dtype", dtype) == 0
        kinds = {t.tensor_type for t in GGUFReader(file).tensors if len(t.shape) > 1}
        assert kinds == {gguf_file.DTYPES[dtype][1]}


def refused(place, capsys, sentence, *options):
    before = contents(place)
    assert merge(place, *options) == 1
    assert sentence in capsys.readouterr().err
    assert contents(place) == before


def test_what_is_there_already_is_left_alone(place, capsys):
    there, new = place / "there.gguf", place / "new"
    there.write_text("mine")
    both = ("--out", str(new), "--gguf", str(there))
    refused(place, capsys, f"{there} is there already; name a new file", *both)


def test_without_a_place_nothing_is_loaded(place, capsys, monkeypatch):
    monkeypatch.setattr(commands, "load_model", lambda *args, **more: 1 / 0)
    refused(place, capsys, "--out, a GGUF file with --gguf, or both")


def test_a_refused_file_leaves_no_folder_either(tmp_path, capsys):
    base_model(tmp_path / "base", architectures.Qwen3Config)
    trained(tmp_path / "base", tmp_path / "adapter", steps=1)
    both = ("--out", str(tmp_path / "out"), "--gguf", str(tmp_path / "new" / "it"))
    refused(tmp_path, capsys, "and this is 'qwen3'", *both)


def test_a_full_disk_ends_in_a_sentence(place, capsys):
    file = place / "it.gguf"
    with files_of_at_most(20_000):
        refused(place, capsys, f"{file} cannot be written", "--gguf", str(file))


def test_the_parsers_dtypes_are_those_of_the_file(capsys):
    parser = command_line.parser()
    for dtype in gguf_file.DTYPES:
        command = ["merge", "--adapter", "a", "--gguf-dtype", dtype]
        assert parser.parse_args(command).gguf_dtype == dtype
    with pytest.raises(SystemExit):
        parser.parse_args(["merge", "--adapter", "a", "--gguf-dtype", "q8_0"])
    listed = capsys.readouterr().err
    assert all(dtype in listed for dtype in gguf_file.DTYPES)


test_a_planted_bug_is_caught = each_is_caught(
    {
        "the base's end alone": (
            commands.merge_to_folder,
            "_end_at(model, stop_of(options.adapter, tokenizer))",
            "pass",
            a_gguf_file_answers_as_the_adapted_model,
        ),
        "the adapter is left out": (
            commands.merge_to_folder,
            "errors = merge(model)",
            "errors = {}; __import__('peft_from_scratch').remove(model)",
            a_gguf_file_answers_as_the_adapted_model,
        ),
        "rows of queries and keys as they are": (
            gguf_file._tensors,
            "_neighbors(tensor, count) if count else tensor",
            "tensor",
            a_gguf_file_answers_as_the_adapted_model,
        ),
    }
)
