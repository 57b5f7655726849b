"""Laws of how rows become tokens, and bugs planted in it that they must catch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from architectures import build, byte_tokenizer
from planting import each_is_caught, law
from tokenizers import processors

from peft_from_scratch.tasks import templates
from peft_from_scratch.tasks.templates import (
    IGNORED,
    TEMPLATES,
    encode_all,
    encode_prompt,
    encode_row,
    encode_rows,
    stop_token,
)
from peft_from_scratch.training import batch
from peft_from_scratch.training.batch import collate

TOKENIZER = byte_tokenizer()
SAY = "Say it twice."
EXAMPLES = [("a", "aa"), ("bc", "bcbc")]
PAIRS = [("x", "xx"), ("two words", '{"twice":[2]}'), ("ünï", "ü ü")]
END = TOKENIZER.eos_token_id


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False).input_ids


def with_template(template):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


def rendered(tokenizer, instruction, turns):
    """A whole conversation by the template's own hand."""
    messages = [{"role": "system", "content": instruction}] if instruction else []
    for i, content in enumerate(turns):
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=len(turns) % 2 == 1
    )


# Laws. Each is run by a test below and, with a bug planted, by the last test.


@law
def labels_are_the_answer_and_its_end():
    for template in TEMPLATES:
        for prompt, completion in PAIRS:
            row = encode_row(TOKENIZER, SAY, prompt, completion, template=template)
            before = encode_prompt(TOKENIZER, SAY, prompt, template=template)
            answer = ids_of(completion if template == "chat" else f" {completion}")
            assert row[0] == before + answer + [END]
            assert row[1] == [-100] * len(before) + answer + [END]


@law
def a_chat_row_is_the_conversation_up_to_its_end():
    for prompt, completion in PAIRS:
        ids, _ = encode_row(TOKENIZER, SAY, prompt, completion, template="chat")
        text = rendered(TOKENIZER, SAY, [prompt, completion])
        assert ids == ids_of(text.removesuffix("\n"))


@law
def examples_are_turns_before_the_prompt():
    chat = encode_prompt(TOKENIZER, SAY, "z", template="chat", examples=EXAMPLES)
    turns = [text for pair in EXAMPLES for text in pair]
    assert chat == ids_of(rendered(TOKENIZER, SAY, [*turns, "z"]))
    raw = encode_prompt(TOKENIZER, SAY, "z", template="raw", examples=EXAMPLES)
    assert raw == ids_of(
        f"{SAY}\n\n"
        "Input: a\nOutput: aa<eos>\n\n"
        "Input: bc\nOutput: bcbc<eos>\n\n"
        "Input: z\nOutput:"
    )


@law
def a_batch_holds_its_rows_even_where_pad_is_the_end_token():
    rows = encode_rows(TOKENIZER, SAY, as_rows(PAIRS), template="raw")
    for pad_id in (END, 0):
        batch = collate(rows, pad_id)
        for i, (ids, labels) in enumerate(rows):
            held = len(ids)
            assert batch["input_ids"][i].tolist()[:held] == ids
            assert batch["labels"][i].tolist()[:held] == labels
            assert batch["labels"][i, held - 1] == END
            assert batch["attention_mask"][i].tolist()[:held] == [1] * held
            assert set(batch["input_ids"][i].tolist()[held:]) <= {pad_id}
            assert set(batch["labels"][i].tolist()[held:]) <= {-100}
            assert set(batch["attention_mask"][i].tolist()[held:]) <= {0}
        assert {t.dtype for t in batch.values()} == {torch.int64}


@law
def the_loss_is_that_of_answer_and_end_given_what_stands_before():
    """transformers shifts labels by itself; here each token is predicted on its own."""
    model = build("llama")
    rows = encode_rows(TOKENIZER, SAY, as_rows(PAIRS), template="chat")
    surprises = []
    for (_, completion), (ids, _) in zip(PAIRS, rows, strict=True):
        for i in range(len(ids) - len(ids_of(completion)) - 1, len(ids)):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:i]])).logits[0, -1]
            surprises.append(F.cross_entropy(logits, torch.tensor(ids[i])).item())
    with torch.no_grad():
        loss = model(**collate(rows, END)).loss.item()
    assert loss == pytest.approx(sum(surprises) / len(surprises), rel=1e-5)


@law
def a_text_starts_with_one_bos():
    adds_bos = byte_tokenizer()
    adds_bos._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", adds_bos.bos_token_id)]
    )
    assert adds_bos("").input_ids == [adds_bos.bos_token_id]
    raw, _ = encode_row(adds_bos, SAY, "x", "xx", template="raw")
    assert raw[0] == adds_bos.bos_token_id
    assert raw.count(adds_bos.bos_token_id) == 1
    chat = encode_prompt(adds_bos, SAY, "x", template="chat")
    written = rendered(adds_bos, SAY, ["x"]).count("<bos>")
    assert chat.count(adds_bos.bos_token_id) == written


def as_rows(pairs):
    return [{"prompt": p, "completion": c} for p, c in pairs]


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_an_instruction_nothing_stands_in_its_place(template):
    ids = encode_prompt(TOKENIZER, "", "x", template=template)
    assert (
        TOKENIZER.decode(ids)
        == {
            "chat": "<bos>user:x<eos>\n<bos>assistant:",
            "raw": "Input: x\nOutput:",
        }[template]
    )


def test_a_template_that_refuses_a_system_turn_gets_it_in_the_first_user_turn():
    refusing = with_template(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}" + TOKENIZER.chat_template
    )
    ids = encode_prompt(refusing, SAY, "x", template="chat", examples=EXAMPLES[:1])
    plain = rendered(TOKENIZER, "", [f"{SAY}\n\na", "aa", "x"])
    assert ids == ids_of(plain)


def test_a_template_that_fails_for_another_reason_is_not_hidden():
    broken = with_template("{{ raise_exception('out of order') }}")
    for instruction in (SAY, ""):
        with pytest.raises(Exception, match="out of order"):
            encode_prompt(broken, instruction, "x", template="chat")


@pytest.mark.parametrize(
    ("after", "end"),
    [("<r7>\n", "<r7>"), ("\n<r8><eos>", "<r8>"), ("<eos>", "<eos>"), ("\n", "<eos>")],
)
def test_the_stop_token_is_the_first_special_token_after_an_answer(after, end):
    tokenizer = with_template(
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
        + f"{{{{ {after!r} }}}}"
        + "{% endfor %}"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<r7>", "<r8>"]})
    wanted = tokenizer.convert_tokens_to_ids(end)
    assert stop_token(tokenizer, "chat") == wanted
    assert stop_token(tokenizer, "raw") == END
    assert encode_row(tokenizer, "", "x", "y", template="chat")[0][-1] == wanted


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_end_token_inside_a_completion_is_refused(template):
    with pytest.raises(ValueError, match=r"'a<eos>b' holds the end token '<eos>'"):
        encode_row(TOKENIZER, SAY, "x", "a<eos>b", template=template)


def test_a_row_that_is_too_long_is_named_and_never_cut():
    rows = as_rows([("short", "a"), ("long " * 9, "b")])
    length = len(encode_row(TOKENIZER, SAY, "long " * 9, "b", template="raw")[0])
    encoded = encode_rows(TOKENIZER, SAY, rows, template="raw", max_tokens=length)
    assert [len(ids) for ids, _ in encoded][1] == length
    with pytest.raises(ValueError, match=f"row 2: {length} tokens.*'long long"):
        encode_rows(TOKENIZER, SAY, rows, template="raw", max_tokens=length - 1)


def test_every_bad_row_is_found_and_named_by_its_place():
    rows = as_rows([("a", "b"), ("long " * 99, "b"), ("c", "d<eos>e"), ("f", "g")])
    rows[1]["place"] = "line 31"
    rows.append({"prompt": None, "completion": "x", "place": "line 7"})
    asked = dict(template="chat", max_tokens=99)
    good, bad = encode_all(TOKENIZER, SAY, rows, **asked)
    assert good == encode_rows(TOKENIZER, SAY, [rows[0], rows[3]], **asked)
    assert [place for place, _ in bad] == ["line 31", "row 3", "line 7"]
    for (_, reason), told in zip(
        bad,
        ("tokens, the limit is 99", "holds the end token", "is no text"),
        strict=True,
    ):
        assert told in reason
    for (place, reason), since in zip(bad, (0, 2, 3), strict=True):
        with pytest.raises(ValueError) as refused:
            encode_rows(TOKENIZER, SAY, rows[since:], **asked)
        assert str(refused.value) == f"{place.replace('row 3', 'row 1')}: {reason}"
    assert encode_all(TOKENIZER, SAY, rows[:1], **asked) == (good[:1], [])
    with pytest.raises(ValueError, match=r"^template='chatml' is none of"):
        encode_rows(TOKENIZER, SAY, rows, template="chatml")


def test_the_choice_of_template_is_explicit_and_checked():
    with pytest.raises(TypeError, match="template"):
        encode_prompt(TOKENIZER, SAY, "x")
    with pytest.raises(ValueError, match="template='chatml' is none of chat, raw"):
        encode_prompt(TOKENIZER, SAY, "x", template="chatml")
    base = with_template(None)
    for ask in (
        lambda: encode_prompt(base, SAY, "x", template="chat"),
        lambda: stop_token(base, "chat"),
    ):
        with pytest.raises(ValueError, match=r"no chat template.*template=.raw"):
            ask()
    endless = copy.deepcopy(TOKENIZER)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        stop_token(endless, "raw")


ROW, RAW = templates.encode_row, templates._raw
BUGS = {
    "labels shifted by one": (
        ROW,
        "[IGNORED] * len(before) + answer",
        "([IGNORED] * len(before) + answer)[1:] + [IGNORED]",
        the_loss_is_that_of_answer_and_end_given_what_stands_before,
    ),
    "end token without a label": (
        ROW,
        "[IGNORED] * len(before) + answer",
        "[IGNORED] * len(before) + answer[:-1] + [IGNORED]",
        the_loss_is_that_of_answer_and_end_given_what_stands_before,
    ),
    "no end token": (
        templates._answer,
        "[*_plain(tokenizer, text), stop_token(tokenizer, template)]",
        "_plain(tokenizer, text)",
        a_chat_row_is_the_conversation_up_to_its_end,
    ),
    "prompt with labels": (
        ROW,
        "[IGNORED] * len(before) + answer",
        "before + answer",
        the_loss_is_that_of_answer_and_end_given_what_stands_before,
    ),
    "prompt and completion tokenized apart, prompt without its last token": (
        ROW,
        "return before + answer, [IGNORED] * len(before) + answer",
        "return before[:-1] + answer, [IGNORED] * (len(before) - 1) + answer",
        a_chat_row_is_the_conversation_up_to_its_end,
    ),
    "padding on the left": (
        batch.right_pad,
        "each + [value] * (longest - len(each))",
        "[value] * (longest - len(each)) + each",
        a_batch_holds_its_rows_even_where_pad_is_the_end_token,
    ),
    "labels of padding found by comparing with pad": (
        batch.collate,
        "right_pad([labels for _, labels in rows], IGNORED)",
        "right_pad("
        "[[IGNORED if i == pad_id else i for i in l] for _, l in rows], IGNORED)",
        the_loss_is_that_of_answer_and_end_given_what_stands_before,
    ),
    "padding with labels": (
        batch.collate,
        "right_pad([labels for _, labels in rows], IGNORED)",
        "right_pad([labels for _, labels in rows], pad_id)",
        the_loss_is_that_of_answer_and_end_given_what_stands_before,
    ),
    "examples in reverse": (
        RAW,
        "for question, answer in examples:",
        "for question, answer in reversed(examples):",
        examples_are_turns_before_the_prompt,
    ),
    "bos again before every piece": (
        templates._plain,
        "add_special_tokens=False",
        "add_special_tokens=True",
        a_text_starts_with_one_bos,
    ),
    "no bos": (RAW, "_start(tokenizer)", "[]", a_text_starts_with_one_bos),
    "instruction dropped": (
        templates._chat,
        "if instruction else []",
        "if False else []",
        a_chat_row_is_the_conversation_up_to_its_end,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)


def test_the_ignored_label_is_the_one_that_torch_leaves_out():
    logits = torch.randn(2, 5)
    both = F.cross_entropy(logits, torch.tensor([3, IGNORED]))
    assert both == F.cross_entropy(logits[:1], torch.tensor([3]))
