"""A merged model on disk answers as the adapted one did: three chat templates.

The reader of the folder is transformers alone, with its own template code and its own
generate(): nothing of this project tells it how the adapter was trained.
"""

import json
from argparse import Namespace

import architectures
import pytest
import torch
from chat_templates import FORMATS, merging_tokenizer, unmarked
from planting import each_is_caught, law
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_from_scratch as pfs
from peft_from_scratch.cli import commands
from peft_from_scratch.tasks.templates import encode_prompt, encode_rows, stop_token
from peft_from_scratch.training.batch import batch_of
from peft_from_scratch.training.generation import generate

TEMPLATES = ("chatml", "llama 3", "gemma")
ASKED = ["the sun", "hello", "user said", "to the sun"]
ROWS = [{"prompt": text, "completion": text[::-1]} for text in ASKED]
MOST = 24  # tokens of an answer


def base_model(folder, template):
    """(the folder of a small tied model with this template, its tokenizer)"""
    tokenizer = merging_tokenizer(unmarked(FORMATS[template].template))
    torch.manual_seed(0)
    settings = architectures.GATED | dict(vocab_size=len(tokenizer))
    config = architectures.Qwen3Config(**settings, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


def trained(base, folder):
    """An adapter that has learned to answer and to stop, with the record of `train`."""
    model, tokenizer = pfs.load_model(base)
    torch.manual_seed(0)
    pfs.lora.inject(model, r=8, alpha=32)
    optimizer = torch.optim.Adam(pfs.trainable(model).values(), lr=1e-2)
    batch = batch_of(encode_rows(tokenizer, "", ROWS, template="chat"), model.device)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pfs.save(model, folder)
    record = {"recipe": {"template": "chat"}, "instruction": ""}
    (folder / "training.json").write_text(json.dumps(record))
    return model


def merged(base, adapter, out):
    paths = dict(base=str(base), adapter=str(adapter), out=str(out))
    commands.merge_to_folder(Namespace(**paths, gguf=None, device=None))
    return AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)


@law
@pytest.mark.parametrize("template", TEMPLATES)
def a_merged_model_answers_as_the_adapted_one(folder, template="chatml"):
    base, tokenizer = base_model(folder / "base", template)
    adapted = trained(base, folder / "adapter")
    plain, theirs = merged(base, folder / "adapter", folder / "out")
    stop = stop_token(tokenizer, "chat")
    prompts = [encode_prompt(tokenizer, "", q, template="chat") for q in ASKED]
    answers = generate(adapted, tokenizer, prompts, stop_id=stop, max_new_tokens=MOST)
    assert stop != tokenizer.eos_token_id and len(set(answers)) > 1
    for question, ids, answer in zip(ASKED, prompts, answers, strict=True):
        turns = [{"role": "user", "content": question}]
        asked = theirs.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert asked["input_ids"][0].tolist() == ids
        written = plain.generate(**asked, max_new_tokens=MOST, do_sample=False)
        new = written[0, len(ids) :].tolist()
        assert new[-1] == stop and stop not in new[:-1]
        assert theirs.decode(new, skip_special_tokens=True) == answer


@law
def tied_embeddings_stay_one_tensor(folder):
    base, _ = base_model(folder / "base", "chatml")
    trained(base, folder / "adapter")
    plain, _ = merged(base, folder / "adapter", folder / "out")
    assert plain.config.tie_word_embeddings
    head, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    assert head.weight.data_ptr() == embedding.weight.data_ptr()
    stored = load_file(folder / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored
    before = load_file(base / "model.safetensors")
    assert stored.keys() == before.keys()
    name = "model.embed_tokens.weight"
    assert torch.equal(stored[name], before[name])


@pytest.mark.parametrize(
    ("ends", "expected"), [(None, [7]), (2, [2, 7]), ([2, 7], [2, 7]), (7, 7)]
)
def test_the_end_of_training_joins_the_ends_that_there_are(ends, expected):
    model = architectures.build("llama")
    model.generation_config.eos_token_id = ends
    commands._end_at(model, 7)
    assert model.generation_config.eos_token_id == expected


test_a_planted_bug_is_caught = each_is_caught(
    {
        "the base's end alone": (
            commands.merge_to_folder,
            "_end_at(model, stop_of(options.adapter, tokenizer))",
            "pass",
            a_merged_model_answers_as_the_adapted_one,
        ),
        "no tokenizer of its own template": (
            commands.merge_to_folder,
            "tokenizer.save_pretrained(folder)",
            "tokenizer.chat_template = '{{ messages[0].content }}'; "
            "tokenizer.save_pretrained(folder)",
            a_merged_model_answers_as_the_adapted_one,
        ),
        "the adapter is left out": (
            commands.merge_to_folder,
            "errors = merge(model)",
            "errors = {}; __import__('peft_from_scratch').remove(model)",
            a_merged_model_answers_as_the_adapted_one,
        ),
        "the head is stored apart": (
            commands.merge_to_folder,
            "errors = merge(model)",
            "errors = merge(model); model.config.tie_word_embeddings = False; "
            "model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())",
            tied_embeddings_stay_one_tensor,
        ),
    }
)
