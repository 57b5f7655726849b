"""tiny: its world, its corpus, its pretraining, and the model that ships."""

import json
from collections import Counter
from random import Random

import pytest
import torch
from planting import each_is_caught, law
from safetensors.torch import load_file

from peft_from_scratch.models import load, tiny
from peft_from_scratch.tasks import gap, world
from peft_from_scratch.tasks.templates import IGNORED, encode_prompt, encode_row
from tools import corpus, pretrain, tiny_card

MIXES = (corpus.MIX, corpus.LATER_MIX)


@pytest.fixture(scope="module")
def tokenizer():
    return load.load_model("tiny", device="cpu")[1]


@pytest.fixture(scope="module")
def model():
    return load.load_model("tiny", device="cpu")[0]


# ---------------------------------------------------------------- what it was taught


@law
def every_document_repeats_with_its_seed():
    for kind in corpus.MIX:
        assert kind(Random(3)) == kind(Random(3))
        assert len({kind(Random(i)) for i in range(20)}) > 10


@law
def a_tale_answers_itself():
    random = Random(0)
    for _ in range(300):
        text, answer = corpus.tale_pair(random, 3)
        assert answer.lower() in text.lower()


@law
def strangers_share_nothing():
    for i in range(100):
        fields = [event.fields() for event in corpus.strangers(Random(i), 3)]
        assert all(len({f[name] for f in fields}) == 3 for name in fields[0])


@law
def a_record_holds_its_sentence():
    random = Random(0)
    for _ in range(100):
        text, written = corpus.record_pair(random)
        fields = dict(part.split(" ", 1) for part in written.split(", "))
        assert fields["who"] in text and fields["where"] in text
        assert world.DEEDS[fields["did"]] in text and fields["what"] in text.lower()


@law
def a_format_is_one_format():
    for i in range(100):
        pairs = corpus.format_pairs(Random(i), 5)
        marks = {mark for mark in corpus.SEPARATORS if mark in pairs[0][1]}
        assert marks
        counts = [[answer.count(mark) for mark in marks] for _, answer in pairs]
        assert counts.count(counts[0]) == 5


@law
def pretraining_tells_the_kinds_of_every_other_thing_alone():
    random, told = Random(0), Counter()
    for _ in range(300):
        text = corpus.kinds(random)
        told |= Counter(t for t in world.THINGS if t in text.lower())
    assert {t for t in told if t in world.TOLD} == world.TOLD
    texts = [corpus.kinds(Random(i)) for i in range(200)]
    for thing in set(world.THINGS) - world.TOLD:
        assert not any(f" {thing} is a " in text for text in texts)


@law
def new_formats_are_none_of_the_pretraining():
    """gap-1 is new: no answer of pretraining has two kinds of marks."""
    written = gap.new_format(world.event(Random(0)))
    marks = [mark for mark in corpus.SEPARATORS if mark in written]
    assert len(marks) == 3
    for i in range(500):
        for _, answer in corpus.format_pairs(Random(i), 3):
            assert sum(mark in answer for mark in marks) <= 1


BUGS = {
    "another event's answer": (
        corpus.tale_pair,
        "random.choice(events))",
        "event(random))",
        a_tale_answers_itself,
    ),
    "strangers that meet": (
        corpus.strangers,
        "== count for name",
        "> 0 for name",
        strangers_share_nothing,
    ),
    "a format an answer": (
        corpus.format_pairs,
        "between.join(parts)",
        "random.choice(SEPARATORS).join(parts)",
        a_format_is_one_format,
    ),
    "all kinds are told": (
        corpus.kinds,
        "sorted(TOLD)",
        "sorted(KIND_OF)",
        pretraining_tells_the_kinds_of_every_other_thing_alone,
    ),
    "the record of somebody else": (
        corpus.record_pair,
        "record(subject)",
        "record(event(random))",
        a_record_holds_its_sentence,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)


def test_answers_are_always_learned_and_questions_of_some(tokenizer):
    rows = [row for part in corpus.batches(tokenizer, 0, 5, 200) for row in part]
    assert len(rows) == 200
    whole = 0
    for ids, labels in rows:
        pairs = list(zip(ids, labels, strict=True))
        assert all(label in (IGNORED, token) for token, label in pairs)
        assert labels[-1] == tokenizer.eos_token_id
        text = tokenizer.decode([t for t, label in pairs if label != IGNORED])
        dialogue = "Output" in tokenizer.decode(ids)
        whole += dialogue and "Input" in text
        if not dialogue:
            assert labels == ids
    asked = sum("Output" in tokenizer.decode(ids) for ids, _ in rows)
    assert 0.1 < whole / asked < 0.35


def test_a_step_reads_the_same_again_and_no_other_steps_rows(tokenizer):
    first = corpus.batches(tokenizer, 0, 1, 24)
    assert first == corpus.batches(tokenizer, 0, 1, 24)
    assert first != corpus.batches(tokenizer, 0, 2, 24)
    assert first != corpus.batches(tokenizer, 1, 1, 24)


def test_it_reads_rows_as_tasks_write_them(tokenizer):
    """Pretraining's dialogues are, token by token, what the template "raw" makes."""
    asked, answer = corpus.record_pair(Random(1))
    ours = tokenizer(corpus.dialogue([(asked, answer)])).input_ids
    theirs, _ = encode_row(tokenizer, "", asked, answer, template="raw")
    assert ours == theirs
    pairs = corpus.format_pairs(Random(1), 3)
    ours = tokenizer(corpus.dialogue(pairs)).input_ids
    *examples, (last, _) = pairs
    prompt = encode_prompt(tokenizer, "", last, template="raw", examples=examples)
    assert ours[: len(prompt)] == prompt


@pytest.mark.parametrize("level", range(4))
def test_the_dial_is_made_of_tokens_that_it_has_read(tokenizer, level):
    """A tied head never learned to tell the others apart, and LoRA leaves it frozen."""
    random, read = Random(1), Counter()
    texts = [corpus.document(random, mix) for mix in MIXES for _ in range(1500)]
    for ids in tokenizer(texts).input_ids:
        read.update(ids)
    write = gap.LEVELS[f"gap-{level}"]
    texts = [" " + write(world.event(random)) for _ in range(200)]
    ids = [token for row in tokenizer(texts).input_ids for token in row]
    assert sum(read[token] < 2 for token in ids) / len(ids) < 0.02


# ------------------------------------------------------------------- how it was trained


def test_the_tokenizer_ships_as_it_is_made(tokenizer):
    made = pretrain.new_tokenizer(0)
    assert made.get_vocab() == tokenizer.get_vocab()
    assert len(made) == tiny.VOCABULARY


def test_words_are_whole_after_a_space_and_in_quotes(tokenizer):
    for word in ("Ada", "Oslo", "lamp", "Friday"):
        for text in (f" {word}", f'"{word}"'):
            assert any(
                token.strip("Ġ") == word for token in tokenizer.tokenize(text)
            ), text


def test_pretraining_repeats_and_resumes_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "BATCH", 4)
    monkeypatch.setattr(pretrain, "SAVED_EVERY", 2)
    monkeypatch.setattr(pretrain, "TOKENIZER_TEXTS", 500)
    whole, _, told = pretrain.pretrained(tmp_path / "a", steps=4)
    assert told["steps"] == 4 and told["parameters"] == 984_192
    again = interrupted(tmp_path / "b", monkeypatch)
    assert [*(tmp_path / "a.run" / "state").iterdir()]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def interrupted(out, monkeypatch):
    """The model of a run that was stopped after its third step, and begun again."""
    step, taken = pretrain._step, []

    def until_the_third(*arguments):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(step(*arguments))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "_step", until_the_third)
        pretrain.pretrained(out, steps=4)
    model, _, told = pretrain.pretrained(out, steps=4)
    assert told["steps"] == 4
    return model


def test_a_model_below_the_gate_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "BATCH", 2)
    monkeypatch.setattr(pretrain, "EXAMS", 4)
    monkeypatch.setattr(pretrain, "TOKENIZER_TEXTS", 500)
    out = tmp_path / "tiny"
    assert pretrain.main(["--out", str(out), "--steps", "2"]) == 1
    assert "not written: copying, answering" in capsys.readouterr().out
    assert not out.exists()


# ---------------------------------------------------------------------- what ships


def test_it_is_the_model_that_is_described(model):
    assert sum(p.numel() for p in model.parameters()) == 984_192
    assert model.config.tie_word_embeddings and model.dtype == torch.float32
    assert model.name_or_path == tiny.PUBLISHED_AS


def test_it_can_do_what_its_gate_asks(model, tokenizer, monkeypatch):
    """On questions that neither pretraining nor the gate has asked."""
    monkeypatch.setattr(pretrain, "EXAMS", 60)
    found = pretrain.abilities(model, tokenizer, seed=1)
    for name, least in pretrain.GATES.items():
        assert found[name] >= least - 0.12, found  # 60 questions: 2 sd are 0.1


def test_what_pretraining_measured_passes_its_gate():
    told = json.loads(tiny_card.MEASURED.read_text("utf-8"))
    assert all(told["abilities"][n] >= least for n, least in pretrain.GATES.items())
    assert told["steps"] == pretrain.STEPS and told["seed"] == 0


def test_six_checkpoints_lead_to_it(model):
    folders = tiny.checkpoints()
    assert len(folders) == len(pretrain.KEPT) == 6
    told = json.loads(tiny_card.MEASURED.read_text("utf-8"))
    losses = [row["loss"] for row in told["checkpoints"]]
    assert losses == sorted(losses, reverse=True)
    assert told["held_out_loss"] < losses[-1]
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    for folder in folders:
        loaded, _ = load.load_model(folder, device="cpu")
        assert {n: t.shape for n, t in loaded.state_dict().items()} == shapes
        stored = load_file(folder / "model.safetensors")
        assert {t.dtype for t in stored.values()} == {torch.bfloat16}


def test_the_card_is_what_was_measured():
    assert tiny_card.FILE.read_text("utf-8") == tiny_card.text(), (
        "write it again: python -m tools.tiny_card"
    )


def test_without_the_repositorys_data_it_says_where_tiny_is(monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="ships with the repository"):
        load.load_model("tiny")
