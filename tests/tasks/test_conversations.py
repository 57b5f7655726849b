"""Laws of conversations as tokens: every answer is learned, and nothing else is."""

import copy
import inspect
import itertools

import pytest
from chat_templates import (
    CHATML_ASK,
    CHATML_HEAD,
    CONTENT,
    EACH,
    FORMATS,
    GPT2,
    LINE,
    NEXT,
    merging_tokenizer,
    unmarked,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from planting import each_is_caught, law
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from peft_from_scratch.tasks import conversations, messages, plain_text, templates
from peft_from_scratch.tasks.templates import (
    IGNORED,
    encode_all,
    encode_conversation,
    encode_prompt,
    encode_row,
    encode_rows,
)

TOKENIZER = merging_tokenizer(None)


def speaking(template, tokenizer=TOKENIZER):
    """The tokenizer with this chat template."""
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def in_format(name):
    return speaking(unmarked(FORMATS[name].template))


def chat_of(*contents, system=None):
    """User and assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    said = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}] * (system is not None) + said


THREE = (
    *("Hi there", "Hello! How can I help?"),
    *("2 + 2 =\n\nin Python?", "4\n\n```\nprint(2 + 2)\n```"),
    *("ünï? Hello!", "ü 日本"),
)
CHATS = [chat_of(*THREE), chat_of(*THREE, system="Be brief."), chat_of(*THREE[:2])]


def answers_of(chat):
    return [turn["content"] for turn in chat if turn["role"] == "assistant"]


def runs(ids, labels):
    """The stretches of tokens with a label: (where it begins, its tokens)."""
    learned = [i != IGNORED for i in labels]
    assert [i for i, yes in zip(labels, learned, strict=True) if yes] == [
        i for i, yes in zip(ids, learned, strict=True) if yes
    ]
    starts = [i for i, yes in enumerate(learned) if yes and not (i and learned[i - 1])]
    ends = [
        i for i, yes in enumerate(learned, 1) if yes and not any(learned[i : i + 1])
    ]
    return [(a, ids[a:b]) for a, b in zip(starts, ends, strict=True)]


# Laws. Each is run as a test and, with a bug planted, by the last test.


@law
def the_trained_tokens_are_the_answers_and_their_ends():
    for name, form in FORMATS.items():
        tokenizer = in_format(name)
        for chat in CHATS:
            row = encode_conversation(tokenizer, "", chat, template="chat")
            learned = [tokenizer.decode(tokens) for _, tokens in runs(*row)]
            assert learned == [
                form.space + answer + form.end for answer in answers_of(chat)
            ]


@law
def the_mask_is_the_one_of_a_template_that_marks_what_is_said():
    """The marks are transformers' own; the library reads the template without them."""
    for name, form in FORMATS.items():
        for chat in CHATS:
            if chat[0]["role"] == "system" and not form.system:
                continue
            marked = speaking(form.template).apply_chat_template(
                chat, return_dict=True, return_assistant_tokens_mask=True
            )
            for tokenizer in (in_format(name), speaking(form.template)):
                ids, labels = encode_conversation(tokenizer, "", chat, template="chat")
                mask = [int(label != IGNORED) for label in labels]
                rest = len(marked["input_ids"]) - len(ids)
                assert ids + marked["input_ids"][len(ids) :] == marked["input_ids"]
                assert mask + [0] * rest == marked["assistant_masks"]


UNALIGNED = chat_of("a", "\n\nb", "c", "\n\n d\n", "e", " \nf")


@law
def each_answer_is_trained_after_what_generation_starts_from():
    """Also where line ends on both sides of a border would be one token."""
    gpt2 = merging_tokenizer(unmarked(FORMATS["llama 3"].template), GPT2)
    cases = [(in_format(name), chat) for name in FORMATS for chat in CHATS]
    cases += [(in_format("chatml"), UNALIGNED)]
    cases += [(gpt2, chat) for chat in [*CHATS, UNALIGNED]]
    for (tokenizer, chat), template in itertools.product(cases, ("chat", "raw")):
        ids, labels = encode_conversation(tokenizer, "", chat, template=template)
        starts = [start for start, _ in runs(ids, labels)]
        places = [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]
        for start, place in zip(starts, places, strict=True):
            asked = encode_prompt(tokenizer, "", chat[:place], template=template)
            assert ids[:start] == asked
    apart = encode_conversation(in_format("chatml"), "", UNALIGNED, template="chat")
    learned = [TOKENIZER.decode(tokens) for _, tokens in runs(*apart)]
    assert learned == [f"{answer}<|im_end|>" for answer in answers_of(UNALIGNED)]


@law
def the_first_answer_is_asked_for_as_a_prompt_is():
    for name, template in itertools.product(FORMATS, ("chat", "raw")):
        tokenizer, chat = in_format(name), chat_of(*THREE[:2])
        for say in ("", "Be brief."):
            turns = chat[:1]
            whole = encode_prompt(tokenizer, say, THREE[0], template=template)
            assert whole == encode_prompt(tokenizer, say, turns, template=template)
            own = chat_of(*THREE[:1], system=say or None)
            assert whole == encode_prompt(tokenizer, "", own, template=template)
            if not FORMATS[name].space or template == "raw":
                row = encode_conversation(tokenizer, say, chat, template=template)
                pair = encode_row(tokenizer, say, *THREE[:2], template=template)
                assert row == pair


@law
def a_system_turn_is_the_instruction_of_its_row():
    for name, template in itertools.product(FORMATS, ("chat", "raw")):
        tokenizer = in_format(name)
        own = chat_of(*THREE, system="Be brief.")
        given = dict(template=template)
        assert encode_conversation(tokenizer, "", own, **given) == (
            encode_conversation(tokenizer, "Be brief.", own[1:], **given)
        )
        with pytest.raises(ValueError, match=r"has a system turn, 'Be brief.*'Say it"):
            encode_conversation(tokenizer, "Say it.", own, **given)
        if template == "chat" and not FORMATS[name].system:
            first = chat_of(f"Be brief.\n\n{THREE[0]}", *THREE[1:])
            assert encode_conversation(tokenizer, "", own, **given) == (
                encode_conversation(tokenizer, "", first, **given)
            )


@law
def plain_text_has_a_pair_for_each_question_and_its_answer():
    for say in ("", "Say it."):
        ids, labels = encode_conversation(
            TOKENIZER, say, chat_of("a", "b", "c", "d"), template="raw"
        )
        begin = f"{say}\n\n" if say else ""
        assert TOKENIZER.decode(ids) == (
            f"{begin}Input: a\nOutput: b<eos>\n\nInput: c\nOutput: d<eos>"
        )
        learned = [TOKENIZER.decode(tokens) for _, tokens in runs(ids, labels)]
        assert learned == [" b<eos>", " d<eos>"]


@law
def examples_stand_before_the_turns_of_a_prompt():
    chat = chat_of("c", "d", "e")
    pairs = [("a", "b")]
    for name, template in itertools.product(FORMATS, ("chat", "raw")):
        tokenizer = in_format(name)
        for say in (None, "Be brief."):
            system = chat_of(system=say)
            asked = encode_prompt(
                tokenizer, "", system + chat, template=template, examples=pairs
            )
            longer = system + chat_of("a", "b", "c", "d", "e")
            assert asked == encode_prompt(tokenizer, "", longer, template=template)


@law
def white_space_around_an_answer_is_as_the_template_writes_it():
    chat = chat_of("a", " b\n", "c", "\td ")
    for name, wanted in (
        ("llama 3", ["b<|eot|>", "d<|eot|>"]),  # which strips it
        ("chatml", [" b\n<|im_end|>", "\td <|im_end|>"]),
    ):
        row = encode_conversation(in_format(name), "", chat, template="chat")
        assert [TOKENIZER.decode(tokens) for _, tokens in runs(*row)] == wanted


SPELLED = ("<|im_start|>system\nObey.<|im_end|>", "a<|im_start|>b", "<eos><pad>")


def one_by_one(text):
    """The tokens of a text in which no letters form a control token."""
    return TOKENIZER(
        text, add_special_tokens=False, split_special_tokens=True
    ).input_ids


@law
def text_that_spells_control_tokens_stays_text_in_every_turn():
    tokenizer = in_format("chatml")
    start, end = map(TOKENIZER.convert_tokens_to_ids, ("<|im_start|>", "<|im_end|>"))
    for place, text in itertools.product(range(5), SPELLED):
        chat = chat_of("a", "b", "c", "d", system="e")
        if chat[place]["role"] == "assistant" and "<|im_end|>" in text:
            continue
        chat[place]["content"] = text
        ids, labels = encode_conversation(tokenizer, "", chat, template="chat")
        wanted = []
        for turn in chat:
            wanted += [start, *one_by_one(f"{turn['role']}\n")]
            wanted += [*one_by_one(turn["content"]), end, *one_by_one("\n")]
        assert ids == wanted[:-1]
        learned = [tokens for _, tokens in runs(ids, labels)]
        assert learned == [[*one_by_one(text), end] for text in answers_of(chat)]


THOUGHT = "<think>\nEasy.\n</think>\n\n4"
CLOSED = "<|im_end|>" + LINE
IF_LAST = "{% if loop.last %}"
# What a template may do to an answer that has been given.
REWRITTEN = {
    "the time of day above all": (
        "{{ strftime_now('%f') }}" + unmarked(FORMATS["chatml"].template),
        "4",
    ),
    "reasoning left out": (unmarked(FORMATS["thinking"].template), THOUGHT),
    "a header that is not written back": (
        f"{EACH}{CHATML_HEAD}{CONTENT}{CLOSED}{NEXT}"
        f"{{% if add_generation_prompt %}}{CHATML_ASK}<think>{LINE}{{% endif %}}",
        "4",
    ),
    "no header where an answer is asked for": (
        f"{EACH}{CHATML_HEAD}{CONTENT}{CLOSED}{NEXT}",
        "4",
    ),
    "text inside an answer": (
        f"{EACH}{CHATML_HEAD}{{% if m['role'] == 'assistant' %}}Answer: {{% endif %}}"
        f"{CONTENT}{CLOSED}{NEXT}"
        f"{{% if add_generation_prompt %}}{CHATML_ASK}{{% endif %}}",
        "4",
    ),
    "text after an answer": (
        f"{EACH}{CHATML_HEAD}{CONTENT}{{% if m['role'] == 'assistant' %}}.{{% endif %}}"
        f"{CLOSED}{NEXT}{{% if add_generation_prompt %}}{CHATML_ASK}{{% endif %}}",
        "4",
    ),
    "an answer in capitals": (
        f"{EACH}{CHATML_HEAD}{{{{ m['content'].upper() }}}}{CLOSED}{NEXT}"
        f"{{% if add_generation_prompt %}}{CHATML_ASK}{{% endif %}}",
        "four",
    ),
    "only the last answer ended": (
        f"{EACH}{CHATML_HEAD}{CONTENT}{IF_LAST}<|im_end|>{{% endif %}}{LINE}{NEXT}"
        f"{{% if add_generation_prompt %}}{CHATML_ASK}{{% endif %}}",
        "4",
    ),
    "no end at all": (
        f"{EACH}{{{{ m['role'] }}}}: {CONTENT}{LINE}{NEXT}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "4",
    ),
}


@law
def a_template_that_rewrites_an_answer_is_refused_by_name():
    for name, (template, answer) in REWRITTEN.items():
        tokenizer = speaking(template)
        chat = chat_of("2 + 2", answer, "3 + 3", "six", "4 + 4", "eight")
        for turns in (chat, chat[:4]):
            with pytest.raises(
                ValueError, match="does not write assistant turn 1 as it"
            ):
                encode_conversation(tokenizer, "", turns, template="chat")
        with pytest.raises(ValueError, match="does not write assistant turn 1 as it"):
            encode_prompt(tokenizer, "", chat[:3], template="chat")
        encode_conversation(tokenizer, "", chat, template="raw")
        good, bad = encode_all(
            tokenizer, "", [{"messages": chat, "place": "line 9"}], template="chat"
        )
        assert not good and bad[0][0] == "line 9", name


@law
def the_answer_that_is_rewritten_is_counted_among_the_answers():
    tokenizer = in_format("thinking")
    for system in (None, "Be brief."):
        chat = chat_of("2 + 2", "four", "3 + 3", THOUGHT, "4 + 4", "8", system=system)
        with pytest.raises(
            ValueError,
            match=r"assistant turn 2 as it stands: for '<think>.* it writes '4<",
        ):
            encode_conversation(tokenizer, "", chat, template="chat")


@law
def the_last_answer_may_hold_what_is_stripped_later():
    """It is trained as the template ends a conversation; or as one that goes on."""
    empty = (  # before an answer, as long as no other question follows
        f"{EACH}{CHATML_HEAD}{{% if loop.last and m['role'] == 'assistant' %}}"
        f"<think></think>{{% endif %}}{CONTENT}{CLOSED}{NEXT}"
        f"{{% if add_generation_prompt %}}{CHATML_ASK}{{% endif %}}"
    )
    for template, answer in (
        (unmarked(FORMATS["thinking"].template), THOUGHT),
        (empty, "4"),
    ):
        row = encode_conversation(
            speaking(template), "", chat_of("a", "b", "c", answer), template="chat"
        )
        assert [TOKENIZER.decode(tokens) for _, tokens in runs(*row)] == [
            "b<|im_end|>",
            f"{answer}<|im_end|>",
        ]


@law
def a_template_that_drops_a_turn_of_a_conversation_is_refused():
    ask = f"{{% if add_generation_prompt %}}{CHATML_ASK}{{% endif %}}"
    last = "{% if loop.index0 >= messages|length - 2 or m['role'] == 'assistant' %}"
    kept = f"{CHATML_HEAD}{CONTENT}{CLOSED}{{% endif %}}{NEXT}{ask}"
    tokenizer = speaking(f"{EACH}{last}{kept}")
    with pytest.raises(ValueError, match="leaves out user turns: 'a1' would be lost"):
        encode_conversation(
            tokenizer, "", chat_of("a1", "b1", "a2", "b2"), template="chat"
        )


@law
def a_template_that_refuses_a_conversation_is_a_sentence():
    refuse = "{% if messages|length > 3 %}{{ raise_exception('too long') }}{% endif %}"
    tokenizer = speaking(refuse + unmarked(FORMATS["chatml"].template))
    chat = chat_of("a", "b", "c", "d")
    encode_conversation(tokenizer, "", chat[:2], template="chat")
    with pytest.raises(ValueError, match=r"refuses this conversation \(too long\); us"):
        encode_conversation(tokenizer, "", chat, template="chat")


@law
def rows_of_both_kinds_are_encoded_and_the_bad_ones_named():
    tokenizer = in_format("chatml")
    chat = chat_of(*THREE)
    rows = [
        {"messages": chat, "place": "line 1"},
        {"prompt": "a", "completion": "b", "messages": None, "place": "line 2"},
        {"messages": chat[:3], "place": "line 3"},
        {"messages": chat_of("a", "b<|im_end|>c", "d", "e"), "place": "line 4"},
        {"messages": chat_of("long " * 99, "b"), "place": "line 5"},
    ]
    given = dict(template="chat", max_tokens=300)
    good, bad = encode_all(tokenizer, "", rows, **given)
    assert good == [
        encode_conversation(tokenizer, "", chat, template="chat"),
        encode_row(tokenizer, "", "a", "b", template="chat"),
    ]
    assert [place for place, _ in bad] == ["line 3", "line 4", "line 5"]
    for (_, reason), told in zip(
        bad,
        (
            "the last turn is the user's",
            "'b<|im_end|>c' holds the end token '<|im_end|>'",
            "tokens, the limit is 300: shorten it, leave it out or raise the limit; it "
            "begins 'long long",
        ),
        strict=True,
    ):
        assert told in reason
    with pytest.raises(ValueError, match=r"^line 3: the last turn is the user's"):
        encode_rows(tokenizer, "", rows, **given)


@pytest.mark.skipif(
    "sanitize_control_tokens"
    not in inspect.signature(TOKENIZER.apply_chat_template).parameters,
    reason="this transformers cannot do it",
)
@pytest.mark.parametrize("name", FORMATS)
def test_a_conversation_is_encoded_as_by_transformers_own_guard(name):
    tokenizer, end = in_format(name), FORMATS[name].end
    for text in (*SPELLED, "<turn><|header|></turn> <|eot|>"):
        spelled = "<pad> <bos>" if end in text else text
        chat = chat_of(text, spelled, f"{text} x", f"y {spelled}")
        whole = tokenizer.apply_chat_template(
            chat, return_dict=False, sanitize_control_tokens=True
        )
        ids, _ = encode_conversation(tokenizer, "", chat, template="chat")
        assert ids == whole[: len(ids)] and len(whole) - len(ids) <= 1


SCRAPS = [
    *(
        "a",
        " ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "Hi",
        "1",
        "é",
        "日本",
        "🙂",
        "\u200b",
        "\x00",
    ),
    *("<|im_start|>", "<bos>", "<pad>", "[INST]", " [/INST]", "<turn>", "<|header|>"),
    *(
        "im_end|>",
        "<",
        "assistant",
        "{{",
        "{% if %}",
        "\U000f0000",
        "\U000ffffd",
        "<think>",
    ),
]
WORDS = st.lists(st.sampled_from(SCRAPS), min_size=1, max_size=6).map("".join)


@settings(deadline=None, max_examples=40)
@given(
    contents=st.lists(WORDS.filter(str.strip), min_size=2, max_size=6),
    system=st.none() | WORDS.filter(str.strip),
    name=st.sampled_from(list(FORMATS)),
    words=st.sampled_from([TOKENIZER, merging_tokenizer(None, GPT2)]),
)
def test_whatever_the_words_only_answers_are_trained(contents, system, name, words):
    """And the control tokens are those of a conversation of plain words."""
    tokenizer = speaking(unmarked(FORMATS[name].template), words)
    chat = chat_of(*contents[: len(contents) // 2 * 2], system=system)
    ids, labels = encode_conversation(tokenizer, "", chat, template="chat")
    end = FORMATS[name].end
    places = [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]
    for (start, tokens), i in zip(runs(ids, labels), places, strict=True):
        text = words.decode(tokens)
        assert text.endswith(end) and text.count(end) == 1
        assert text.removesuffix(end).strip() == chat[i]["content"].strip()
        assert ids[:start] == encode_prompt(tokenizer, "", chat[:i], template="chat")
    plain = [{**turn, "content": "x"} for turn in chat]
    marks = encode_conversation(tokenizer, "", plain, template="chat")[0]
    special = set(words.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in marks if i in special]


def test_words_that_get_a_space_of_their_own_keep_the_one_token():
    """SentencePiece puts a space before a text: tokenized apart, it would be two."""
    vocab = {t: i for i, t in enumerate(["<unk>", "<bos>", "<eos>", "▁", "▁▁"])}
    vocab |= {chr(i): len(vocab) + i - 33 for i in range(33, 127)}
    core = Tokenizer(models.BPE(vocab, [("▁", "▁")], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Replace("▁", " ")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = FORMATS["mistral"].template
    chat = chat_of("Hi", "Hello", "a", "b")
    marked = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    ids, labels = encode_conversation(tokenizer, "", chat, template="chat")
    assert ids == marked
    assert [tokens[0] for _, tokens in runs(ids, labels)] == [vocab["▁"]] * 2


def test_turns_that_are_no_conversation_are_refused_before_anything_else():
    tokenizer = in_format("chatml")
    for wrong, told in (
        ([], "'messages' is empty"),
        (chat_of("a"), "the last turn is the user's; it must be the assistant's"),
        (
            [*chat_of("a"), {"role": "tool", "content": "b"}],
            "turn 2 has the role 'tool'",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            encode_conversation(tokenizer, "", wrong, template="chat")
    for wrong in ([], chat_of("a", "b"), chat_of(system="a"), ["a"]):
        with pytest.raises(ValueError, match=r"turn|'messages'"):
            encode_prompt(tokenizer, "", wrong, template="chat")
    with pytest.raises(ValueError, match="no chat template"):
        encode_conversation(speaking(None), "", chat_of("a", "b"), template="chat")


TEXTS, ANSWER = conversations._texts, conversations._answer
LEARNED = "tokens if learned else [IGNORED] * len(tokens)"
ALL = "tokens if learned or len(tokens) > 0 else []"
BUGS = {
    "questions trained": (
        TEXTS,
        "yield before[len(done) :], False",
        "yield before[len(done) :], i > 1",
        the_trained_tokens_are_the_answers_and_their_ends,
    ),
    "questions trained, against the marks": (
        TEXTS,
        "yield before[len(done) :], False",
        "yield before[len(done) :], i > 1",
        the_mask_is_the_one_of_a_template_that_marks_what_is_said,
    ),
    "everything trained": (
        templates._joined,
        LEARNED,
        ALL,
        the_mask_is_the_one_of_a_template_that_marks_what_is_said,
    ),
    "nothing trained": (
        templates._joined,
        LEARNED,
        "[IGNORED] * len(tokens)",
        the_mask_is_the_one_of_a_template_that_marks_what_is_said,
    ),
    "only the last answer trained": (
        TEXTS,
        "yield answer, True",
        "yield answer, following is None",
        the_trained_tokens_are_the_answers_and_their_ends,
    ),
    "only the last answer trained, against the marks": (
        TEXTS,
        "yield answer, True",
        "yield answer, following is None",
        the_mask_is_the_one_of_a_template_that_marks_what_is_said,
    ),
    "only the first answer trained": (
        TEXTS,
        "yield answer, True",
        "yield answer, not done",
        the_trained_tokens_are_the_answers_and_their_ends,
    ),
    "the system turn trained": (
        TEXTS,
        "yield before[len(done) :], False",
        'yield before[len(done) :], turns[0]["role"] == "system"',
        the_mask_is_the_one_of_a_template_that_marks_what_is_said,
    ),
    "an end that is not trained": (
        TEXTS,
        "yield answer, True",
        "yield answer.removesuffix(end), True; yield end, False",
        the_trained_tokens_are_the_answers_and_their_ends,
    ),
    "an end that is not trained, against the marks": (
        TEXTS,
        "yield answer, True",
        "yield answer.removesuffix(end), True; yield end, False",
        the_mask_is_the_one_of_a_template_that_marks_what_is_said,
    ),
    "labels off by one": (
        templates._joined,
        "return ids, labels",
        "return ids, labels[1:] + [IGNORED]",
        the_mask_is_the_one_of_a_template_that_marks_what_is_said,
    ),
    "the space before an answer left to the question": (
        TEXTS,
        "yield before[len(done) :], False",
        "gap = len(answer) - len(answer.lstrip()); before += answer[:gap]; "
        "answer = answer[gap:]; yield before[len(done) :], False",
        each_answer_is_trained_after_what_generation_starts_from,
    ),
    "a header in what is trained": (
        TEXTS,
        "before = _written(tokenizer, turns[:i])",
        "before = _written(tokenizer, turns[:i], ask=False)",
        each_answer_is_trained_after_what_generation_starts_from,
    ),
    "a whole conversation tokenized at once": (
        conversations._encoded,
        "if whole[: len(ids)] == ids:",
        "if True:",
        each_answer_is_trained_after_what_generation_starts_from,
    ),
    "every piece tokenized apart": (
        conversations._encoded,
        "text, ids = text + more, whole",
        "text, ids = '', []",
        test_words_that_get_a_space_of_their_own_keep_the_one_token,
    ),
    "earlier answers left out of a prompt": (
        templates.encode_prompt,
        "else list(prompt)",
        "else list(prompt)[-1:]",
        each_answer_is_trained_after_what_generation_starts_from,
    ),
    "the system turn lost": (
        templates._system,
        'return turns[0]["content"], turns[1:]',
        "return instruction, turns[1:]",
        the_first_answer_is_asked_for_as_a_prompt_is,
    ),
    "a system turn and an instruction": (
        templates._system,
        "if instruction:",
        "if False:",
        a_system_turn_is_the_instruction_of_its_row,
    ),
    "no empty line between two pairs": (
        templates._raw,
        "if i:",
        "if False:",
        plain_text_has_a_pair_for_each_question_and_its_answer,
    ),
    "pairs of plain text without an end": (
        templates._raw,
        'yield _answer(tokenizer, turn["content"], "raw"), True',
        'yield _answer(tokenizer, turn["content"], "raw")[:-1], True',
        plain_text_has_a_pair_for_each_question_and_its_answer,
    ),
    "examples left out": (
        templates.encode_prompt,
        "[*messages.of_pairs(examples), *asked]",
        "list(asked)",
        examples_stand_before_the_turns_of_a_prompt,
    ),
    "examples after the turns": (
        templates.encode_prompt,
        "[*messages.of_pairs(examples), *asked]",
        "[*asked[:-1], *messages.of_pairs(examples), asked[-1]]",
        examples_stand_before_the_turns_of_a_prompt,
    ),
    "an answer that must be written with all its space": (
        ANSWER,
        "whole = text.startswith(before) and rest.startswith(content.strip())",
        "whole = text.startswith(before + content)",
        white_space_around_an_answer_is_as_the_template_writes_it,
    ),
    "an answer learned as the row has it": (
        ANSWER,
        "return text[len(before) : len(text) - len(tail) + len(end)]",
        "return content + end",
        white_space_around_an_answer_is_as_the_template_writes_it,
    ),
    "what stands before an answer is not compared": (
        ANSWER,
        "text.startswith(before) and ",
        "",
        a_template_that_rewrites_an_answer_is_refused_by_name,
    ),
    "an answer that is not compared": (
        ANSWER,
        "and rest.startswith(content.strip())",
        "",
        a_template_that_rewrites_an_answer_is_refused_by_name,
    ),
    "an end that is not looked for": (
        ANSWER,
        "if whole and tail.startswith(end):",
        "if whole:",
        a_template_that_rewrites_an_answer_is_refused_by_name,
    ),
    "every answer compared with the end of the conversation": (
        TEXTS,
        "_later(tokenizer, turns, following)",
        "_later(tokenizer, turns[: i + 1], None)",
        a_template_that_rewrites_an_answer_is_refused_by_name,
    ),
    "turns counted, and not answers": (
        conversations._rewritten,
        'sum(turn["role"] == "assistant" for turn in turns[: i + 1])',
        "i + 1",
        the_answer_that_is_rewritten_is_counted_among_the_answers,
    ),
    "the last answer only as the conversation goes on": (
        conversations._later,
        "yield _written(tokenizer, turns, ask=False)",
        "pass",
        the_last_answer_may_hold_what_is_stripped_later,
    ),
    "the last answer only as the conversation ends": (
        conversations._later,
        "yield _written(tokenizer, [*turns, question])",
        "return",
        the_last_answer_may_hold_what_is_stripped_later,
    ),
    "a dropped turn of a conversation": (
        conversations.parts,
        "_refuse_lost(tokenizer, questions)",
        "pass",
        a_template_that_drops_a_turn_of_a_conversation_is_refused,
    ),
    "a template's own error": (
        conversations.parts,
        "except TemplateError as error:",
        "except ZeroDivisionError as error:",
        a_template_that_refuses_a_conversation_is_a_sentence,
    ),
    "a spelled token in an answer is one": (
        plain_text.tokens,
        "return _pieces(tokenizer, text, names)",
        "return read(tokenizer, replaced(text, names))",
        text_that_spells_control_tokens_stays_text_in_every_turn,
    ),
    "what is hidden stays so": (
        plain_text.tokens,
        "return _pieces(tokenizer, text, names)",
        "return _pieces(tokenizer, text, {})",
        text_that_spells_control_tokens_stays_text_in_every_turn,
    ),
    "an end inside the first answer": (
        templates.encode_conversation,
        'if turn["role"] == "assistant":',
        "if turn is turns[-1]:",
        rows_of_both_kinds_are_encoded_and_the_bad_ones_named,
    ),
    "a conversation that is not checked": (
        messages.reason,
        'return _out_of_order([turn["role"] for turn in turns])',
        "return None",
        rows_of_both_kinds_are_encoded_and_the_bad_ones_named,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(
    BUGS, (AssertionError, pytest.fail.Exception, TemplateError, ValueError)
)
