"""Laws of rows of several turns: bad ones named, no leak, the last answer scored."""

import json
from types import SimpleNamespace

import pytest
import torch
from architectures import build, byte_tokenizer
from datasets import Dataset
from planting import each_is_caught, law

from peft_from_scratch.comparison import measure
from peft_from_scratch.comparison.adapt import few_shot_examples
from peft_from_scratch.tasks import jsonl, messages, task
from peft_from_scratch.tasks.task import load_task
from peft_from_scratch.tasks.templates import (
    IGNORED,
    encode_conversation,
    encode_prompt,
    encode_rows,
    stop_token,
)
from peft_from_scratch.training import evaluation, packing
from peft_from_scratch.training.evaluation import answer_rows
from peft_from_scratch.training.generation import generate
from peft_from_scratch.training.loss import mean_loss
from peft_from_scratch.training.packing import packing_for

SPLITS = ("train", "validation", "test")
TOKENIZER = byte_tokenizer()


def chat_of(*contents, system=None):
    """User and assistant in turn."""
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    return [{"role": "system", "content": system}] * (system is not None) + turns


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines))
    return str(path)


def chats(n=30, **more):
    return [
        {"messages": chat_of(f"p{i}", f"c{i}", f"q{i}", f"d{i}", **more)}
        for i in range(n)
    ]


def rows_of(loaded):
    return [row for split in SPLITS for row in getattr(loaded, split)]


@law
def conversations_of_a_file_become_rows(folder):
    loaded = load_task(write(folder / "rows.jsonl", chats()), seed=5)
    assert [len(getattr(loaded, split)) for split in SPLITS] == [21, 3, 6]
    assert loaded.train.column_names == ["prompt", "completion", "messages", "place"]
    for row in rows_of(loaded):
        i = int(row["completion"][1:])
        assert row["messages"] == chats()[i]["messages"]
        assert row["prompt"] == f"user: p{i}\n\nassistant: c{i}\n\nuser: q{i}"
        assert row["place"] == f"line {i + 1}"
        assert messages.prompt_of(row) == row["messages"][:3]
        assert loaded.score(f" d{i}\n", row["completion"])


@law
def a_conversation_of_one_question_has_its_words_as_prompt(folder):
    rows = [{"messages": chat_of(f"p{i}", f"c{i}")} for i in range(30)]
    loaded = load_task(write(folder / "rows.jsonl", rows))
    pairs = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(30)]
    plain = load_task(write(folder / "pairs.jsonl", pairs))
    for split in SPLITS:  # and the same rows go into the same splits
        for name in ("prompt", "completion", "place"):
            assert getattr(loaded, split)[name][:] == getattr(plain, split)[name][:]


@law
def a_file_may_hold_both_kinds(folder):
    pairs = [{"prompt": f"x{i}", "completion": "y"} for i in range(20)]
    loaded = load_task(write(folder / "rows.jsonl", [*pairs, *chats(20)]))
    for row in rows_of(loaded):
        if row["completion"] == "y":
            assert row.get("messages") is None
            assert messages.prompt_of(row) == row["prompt"]
        else:
            assert len(messages.prompt_of(row)) == 3
    for split in SPLITS:
        assert len(encode_rows(TOKENIZER, "", getattr(loaded, split), template="chat"))


@law
def a_row_of_all_three_keys_is_a_prompt_and_its_completion(folder):
    rows = [{"prompt": f"x{i}", "completion": "y", "messages": 3} for i in range(9)]
    loaded = load_task(write(folder / "rows.jsonl", rows))
    assert loaded.train.column_names == ["prompt", "completion", "place"]
    rows = [{"prompt": f"x{i}", **chats()[i]} for i in range(9)]
    loaded = load_task(write(folder / "rows.jsonl", rows))
    assert {len(row["messages"]) for row in rows_of(loaded)} == {4}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


USER, SAID = turn("user", "a"), turn("assistant", "b")
BAD = [
    ("abc", "'messages' is not a list but str"),
    (None, "'messages' is not a list but NoneType"),
    ({"role": "user"}, "'messages' is not a list but dict"),
    ([], "'messages' is empty"),
    (["a"], "turn 1 is not an object but str"),
    ([{}], "turn 1 has no 'role'; it has no key"),
    ([{"from": "human", "value": "a"}], "turn 1 has no 'role'; it has 'from', 'value'"),
    ([USER, {"role": "assistant"}], "turn 2 has no 'content'; it has 'role'"),
    ([turn("human", "a")], "turn 1 has the role 'human'; allowed are system, user, as"),
    ([turn(["user"], "a")], "turn 1 has the role ['user']; allowed are"),
    ([USER, turn("tool", "a")], "turn 2 has the role 'tool'; allowed are system, user"),
    (
        [USER, turn("assistant", None, tool_calls=[{"id": 1}])],
        "turn 2 has 'tool_calls', which would be passed over",
    ),
    ([USER, turn("assistant", "b", weight=0)], "turn 2 has 'weight', which would be"),
    (
        [USER, turn("assistant", "b", reasoning_content="hm")],
        "turn 2 has 'reasoning_content', which would be passed over",
    ),
    (
        [turn("user", [{"type": "text", "text": "a"}]), SAID],
        "turn 1 has a list of parts as its 'content', as of images; allowed is text",
    ),
    (
        [USER, turn("assistant", None)],
        "turn 2 (assistant): 'content' is not text but N",
    ),
    ([USER, turn("assistant", 3)], "turn 2 (assistant): 'content' is not text but int"),
    ([USER, turn("assistant", " \n")], "turn 2 (assistant): 'content' is empty"),
    ([turn("system", ""), USER, SAID], "turn 1 (system): 'content' is empty"),
    ([turn("user", ""), SAID], "turn 1 (user): 'content' is empty"),
    ([turn("user", "\ud800"), SAID], "turn 1 (user): 'content' holds half a surrogate"),
    ([SAID], "turn 1 is the assistant's, where the user's is due"),
    ([SAID, USER, SAID], "turn 1 is the assistant's, where the user's is due"),
    ([USER, USER, SAID], "turn 2 is the user's, where the assistant's is due"),
    ([USER, SAID, SAID], "turn 3 is the assistant's, where the user's is due"),
    (
        [USER, turn("system", "s"), SAID],
        "turn 2 is the system's, where the assistant's",
    ),
    ([turn("system", "s")] * 2 + [USER, SAID], "turn 2 is the system's, where the use"),
    (
        [turn("system", "s")],
        "the last turn is the system's; it must be the assistant's",
    ),
    ([USER], "the last turn is the user's; it must be the assistant's"),
    ([USER, SAID, USER], "the last turn is the user's; it must be the assistant's"),
]


@law
def a_bad_conversation_is_named_with_its_line_and_its_reason(folder):
    for wrong, told in BAD:
        rows = [*chats(), {"messages": wrong}]
        with pytest.raises(ValueError) as refused:
            load_task(write(folder / "rows.jsonl", rows))
        first, second = str(refused.value).split("\n")
        assert first == f"{folder / 'rows.jsonl'} has 1 bad row:"
        assert second.startswith(f"  line 31: {told}"), second


@law
def what_a_turn_has_besides_is_left_alone_where_it_says_nothing(folder):
    rows = chats()
    for row in rows:
        row["messages"][1] |= {"tool_calls": None, "id": 7, "date": "today"}
    loaded = load_task(write(folder / "rows.jsonl", rows))
    assert {tuple(t) for r in rows_of(loaded) for t in r["messages"]} == {
        ("role", "content")
    }


@law
def two_answers_to_one_conversation_are_refused(folder):
    again = {"messages": chat_of("p2", "c2", "q2", "other")}
    with pytest.raises(
        ValueError, match="line 31: the prompt of line 3 with another c"
    ):
        load_task(write(folder / "rows.jsonl", [*chats(), again]))
    same = chats()[2]  # counts once
    assert len(rows_of(load_task(write(folder / "rows.jsonl", [*chats(), same])))) == 30
    other = {"messages": chat_of("p2", "other", "q2", "d")}  # is another conversation
    loaded = load_task(write(folder / "rows.jsonl", [*chats(), other]))
    assert len(rows_of(loaded)) == 31


def split_of(loaded):
    """{completion: its split}"""
    return {
        row["completion"]: split for split in SPLITS for row in getattr(loaded, split)
    }


def families(n=40):
    """Rows of n families, each a conversation in several lengths and looks."""
    rows = []
    for i in range(n):
        words = (f"Hi {i}", f"a{i}", f"more of {i}?", f"b{i}", f"and {i}?", f"c{i}")
        rows.append({"messages": chat_of(*words)})
        rows.append({"messages": chat_of(f"hi  {i}\u200b", f"d{i}")})
        rows.append({"messages": chat_of(f"HI {i}", "x", f"More  of {i}?", f"e{i}")})
        rows.append({"prompt": f"hi {i} ", "completion": f"f{i}"})
    return rows


@law
def a_conversation_stays_with_what_it_goes_on_from(folder):
    loaded = load_task(write(folder / "rows.jsonl", families()), seed=3)
    split = split_of(loaded)
    assert len(split) == 160
    # "HI", "x", … is another conversation from its second turn on, and begins alike.
    for i in range(40):
        assert len({split[f"{letter}{i}"] for letter in "cdef"}) == 1
    assert [len(getattr(loaded, name)) for name in SPLITS] == [112, 16, 32]


@law
def conversations_that_only_begin_alike_are_cut_apart(folder):
    """The same question first, and no row that asks it last: 40 prompts, not one."""
    rows = [{"messages": chat_of("Hello", "Hi!", f"q{i}", f"c{i}")} for i in range(40)]
    loaded = load_task(write(folder / "rows.jsonl", rows))
    assert [len(getattr(loaded, name)) for name in SPLITS] == [28, 4, 8]


@law
def rows_of_a_test_split_take_their_conversations_from_the_others(folder, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    data = folder / "data"
    data.mkdir(exist_ok=True)
    others = [{"messages": chat_of(f"p{i}", f"c{i}")} for i in range(50)]
    longer = [{"messages": chat_of(f"P{i} ", "x", "more", f"y{i}")} for i in (1, 2)]
    shorter = [{"messages": chat_of(f"s{i}", f"z{i}")} for i in (1, 2)]
    write(data / "train.jsonl", [*others[3:], *longer, *shorter])
    going_on = chat_of("s2", "z", "more", "end")
    write(data / "test.jsonl", [*others[:3], {"messages": going_on}])
    loaded = load_task(str(data))
    assert sorted(loaded.test["completion"][:]) == ["c0", "c1", "c2", "end"]
    rest = {*loaded.train["completion"][:], *loaded.validation["completion"][:]}
    assert rest == {f"c{i}" for i in range(3, 50)} | {"z1"}
    assert loaded.train[0]["place"].endswith(" of train")


@law
def a_column_of_conversations_is_read_where_none_is_chosen(folder, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    data = folder / "data"
    data.mkdir(exist_ok=True)
    rows = [{"prompt": f"p{i}", "a": f"x{i}", **chats()[i]} for i in range(30)]
    write(data / "rows.jsonl", rows)
    loaded = load_task(str(data))
    assert {len(row["messages"]) for row in rows_of(loaded)} == {4}
    chosen = load_task(str(data), completion="a")
    assert chosen.train.column_names == ["prompt", "completion", "place"]
    with pytest.raises(ValueError, match=r"no column 'b'.*name the column of conv"):
        load_task(str(data), completion="b")
    rows[4]["messages"] = rows[4]["messages"][:3]
    write(data / "rows.jsonl", rows)
    with pytest.raises(ValueError, match="row 5 of train: the last turn is the user's"):
        load_task(str(data))


@law
def a_system_turn_that_all_rows_share_is_the_instruction(folder):
    rows = chats(system="Be brief.")
    loaded = load_task(write(folder / "rows.jsonl", rows))
    assert loaded.instruction == "Be brief."
    for row in rows_of(loaded):
        assert row["messages"][0]["role"] == "user" and "system" not in row["prompt"]
        i = int(row["completion"][1:])
        for template in ("chat", "raw"):
            given = dict(template=template)
            assert encode_rows(TOKENIZER, "Be brief.", [row], **given) == [
                encode_conversation(TOKENIZER, "", rows[i]["messages"], **given)
            ]
    rows[3]["messages"][0]["content"] = "Be long."
    for kept in (
        rows,
        [*chats(system="Be brief."), {"prompt": "a", "completion": "b"}],
    ):
        loaded = load_task(write(folder / "rows.jsonl", kept))
        assert loaded.instruction == ""
        with_turn = [r for r in rows_of(loaded) if r.get("messages") is not None]
        assert {row["messages"][0]["role"] for row in with_turn} == {"system"}
        assert with_turn[0]["prompt"].startswith("system: Be ")


CHATS = [
    {**messages.columns(turns), "place": "line 1"}
    for turns in (
        chat_of("a", "b", "c", "dd"),
        chat_of("e", "ff", system="Say it."),
        chat_of("g", "hh", "i", "j", "k", "l"),
    )
]


@law
def the_last_answer_is_what_is_asked_for_and_scored():
    """After all turns before it, the row's own system turn included."""
    model = build("llama")
    asked = SimpleNamespace(instruction="", score=lambda *pair: pair)
    pair = {"prompt": "m", "completion": "n"}
    for template in ("chat", "raw"):
        for examples in ((), [("x", "xx")]):
            given = dict(template=template, examples=examples)
            prompts = [
                encode_prompt(TOKENIZER, "", row["messages"][:-1], **given)
                for row in CHATS
            ]
            prompts.append(encode_prompt(TOKENIZER, "", "m", **given))
            alone = [
                generate(
                    model,
                    TOKENIZER,
                    [prompt],
                    stop_id=stop_token(TOKENIZER, template),
                    max_new_tokens=2 + 8,
                )[0].strip()
                for prompt in prompts
            ]
            scored = answer_rows(model, TOKENIZER, asked, [*CHATS, pair], **given)
            assert scored.answers == alone and len(set(alone)) > 1
            assert [right for _, right in scored.correct] == ["dd", "ff", "l", "n"]


@law
def a_training_row_begins_with_the_prompt_of_its_evaluation():
    for template in ("chat", "raw"):
        encoded = encode_rows(TOKENIZER, "", CHATS, template=template)
        for row, (ids, labels) in zip(CHATS, encoded, strict=True):
            asked = encode_prompt(
                TOKENIZER, "", messages.prompt_of(row), template=template
            )
            answer = [*TOKENIZER.encode(row["completion"]), TOKENIZER.eos_token_id]
            assert ids[: len(asked)] == asked
            assert ids[-len(answer) :] == labels[-len(answer) :] == answer


@law
def a_conversation_is_an_example_with_each_of_its_answers():
    rows = [{**row, "messages": row["messages"]} for row in CHATS]
    rows.append({"prompt": "m", "completion": "n", "messages": None, "place": ""})
    held = SimpleNamespace(train=Dataset.from_list(rows))
    found = few_shot_examples(held, 4, order=0)
    assert sorted(found) == [
        *(("a", "b"), ("c", "dd"), ("e", "ff"), ("g", "hh"), ("i", "j"), ("k", "l")),
        ("m", "n"),
    ]
    assert found.index(("c", "dd")) == found.index(("a", "b")) + 1


@law
def bytes_and_decoding_times_are_those_of_whole_conversations():
    ready = SimpleNamespace(tokenizer=TOKENIZER, template="chat", examples=[("x", "y")])
    asked = SimpleNamespace(instruction="")
    for i, row in enumerate(CHATS):
        assert measure._prompt(ready, asked, CHATS, i) == encode_prompt(
            TOKENIZER, "", row["messages"][:-1], template="chat", examples=[("x", "y")]
        )


@law
def the_loss_is_the_surprise_of_each_answer_and_its_end():
    """Padded, and packed: rows that begin with the same answer learn it once each."""
    model = build("llama", dtype=torch.float64)
    began = ("a", "b", "c", "dd")
    chats = [chat_of(*began), chat_of(*began, "e", "f"), chat_of(*began[:3], "gg")]
    rows = encode_rows(
        TOKENIZER, "Say it.", [{"messages": chat} for chat in chats], template="chat"
    )
    surprises = []
    for ids, labels in rows:
        places = [i for i, label in enumerate(labels) if label != IGNORED]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        surprises += [-logits[i - 1, ids[i]].item() for i in places]
    learned = sum(len(turn["content"]) + 1 for chat in chats for turn in chat[1::2])
    assert len(surprises) == learned
    expected = sum(surprises) / learned
    packed = packing_for(model, rows)
    assert packed.works and len(packed.groups(rows)) < len(rows)
    for collate in (None, packed.batch):
        loss = mean_loss(model, rows, collate=collate)
        assert loss == pytest.approx(expected, rel=1e-12)


REASON = messages._wrong_turn
BUGS = {
    "turns with anything else kept": (
        messages.columns,
        '[{"role": turn["role"], "content": turn["content"]} for turn in turns]',
        "list(turns)",
        what_a_turn_has_besides_is_left_alone_where_it_says_nothing,
    ),
    "tool calls passed over": (
        REASON,
        "turn.get(name) is not None",
        "False",
        a_bad_conversation_is_named_with_its_line_and_its_reason,
    ),
    "an empty turn": (
        REASON,
        "if not content.strip():",
        "if False:",
        a_bad_conversation_is_named_with_its_line_and_its_reason,
    ),
    "any first turn": (
        messages._out_of_order,
        "if role != wanted:",
        "if i and role != wanted:",
        a_bad_conversation_is_named_with_its_line_and_its_reason,
    ),
    "a question at the end": (
        messages._out_of_order,
        'if roles[-1] != "assistant":',
        "if False:",
        a_bad_conversation_is_named_with_its_line_and_its_reason,
    ),
    "conversations before pairs": (
        jsonl._is_conversation,
        "and not all(name in names for name in PAIR)",
        "",
        a_row_of_all_three_keys_is_a_prompt_and_its_completion,
    ),
    "conversations only where nothing else is": (
        jsonl._is_conversation,
        "not all(name in names for name in PAIR)",
        "not any(name in names for name in PAIR)",
        a_row_of_all_three_keys_is_a_prompt_and_its_completion,
    ),
    "the column of conversations before those that are chosen": (
        jsonl._columns,
        "chosen == PAIR and ",
        "",
        a_column_of_conversations_is_read_where_none_is_chosen,
    ),
    "a prompt without the turns before": (
        messages.prompt_of,
        'row["messages"][:-1]',
        'row["messages"][-2:-1]',
        conversations_of_a_file_become_rows,
    ),
    "rows told apart by their last question": (
        messages.key,
        "for turn in turns)",
        "for turn in turns[-1:])",
        two_answers_to_one_conversation_are_refused,
    ),
    "rows told apart by their answers too": (
        messages.key,
        "asked = prompt_of(row)",
        'asked = row["messages"]',
        two_answers_to_one_conversation_are_refused,
    ),
    "a conversation cut from what it goes on from": (
        jsonl._groups,
        "messages.beginnings(_alike(key))",
        "[_alike(key)]",
        a_conversation_stays_with_what_it_goes_on_from,
    ),
    "a conversation with the longest that it goes on from": (
        jsonl._groups,
        "min(shared, key=len)",
        "max(shared, key=len)",
        a_conversation_stays_with_what_it_goes_on_from,
    ),
    "conversations that begin alike together": (
        jsonl._groups,
        "if each in asked",
        "",
        conversations_that_only_begin_alike_are_cut_apart,
    ),
    "turns compared as they are written": (
        jsonl._alike,
        "alike(content)",
        "content",
        a_conversation_stays_with_what_it_goes_on_from,
    ),
    "a test conversation gone on with in training": (
        jsonl._without,
        "and taken.isdisjoint(messages.beginnings(_alike(key)))",
        "",
        rows_of_a_test_split_take_their_conversations_from_the_others,
    ),
    "the beginning of a test conversation in training": (
        jsonl._without,
        "_alike(key) not in begun",
        "True",
        rows_of_a_test_split_take_their_conversations_from_the_others,
    ),
    "a shared system turn that stays in the rows": (
        messages.shared_system,
        'row | columns(row["messages"][1:])',
        "row",
        a_system_turn_that_all_rows_share_is_the_instruction,
    ),
    "a system turn of some rows for all": (
        messages.shared_system,
        "len(first) != 1 or ",
        "",
        a_system_turn_that_all_rows_share_is_the_instruction,
    ),
    "the columns of the first row for all": (
        task._data,
        "for row in rows for name in row",
        "for row in rows[:1] for name in row",
        a_file_may_hold_both_kinds,
    ),
    "the last question alone is asked": (
        evaluation.answer_rows,
        "prompt_of(row)",
        'row["messages"][-2]["content"] if row.get("messages") else row["prompt"]',
        the_last_answer_is_what_is_asked_for_and_scored,
    ),
    "a transcript is asked": (
        evaluation.answer_rows,
        "prompt_of(row)",
        'row["prompt"]',
        the_last_answer_is_what_is_asked_for_and_scored,
    ),
    "an answer that several rows begin with is shared": (
        packing.shared_length,
        "min(common, *(_first_label(labels) - 1 for _, labels in rows))",
        "common",
        the_loss_is_the_surprise_of_each_answer_and_its_end,
    ),
    "a transcript is measured": (
        measure._prompt,
        "prompt_of(rows[i])",
        'rows[i]["prompt"]',
        bytes_and_decoding_times_are_those_of_whole_conversations,
    ),
    "the last answer of an example alone": (
        messages.pairs,
        "return list(zip(contents[::2], contents[1::2], strict=True))",
        "return [tuple(contents[-2:])]",
        a_conversation_is_an_example_with_each_of_its_answers,
    ),
    "a system turn in an example": (
        messages.pairs,
        'if turn["role"] != "system"',
        "",
        a_conversation_is_an_example_with_each_of_its_answers,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(
    BUGS, (AssertionError, pytest.fail.Exception, ValueError, KeyError, TypeError)
)
