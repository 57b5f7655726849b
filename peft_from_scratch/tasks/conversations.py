"""A conversation in the model's own chat template, and which of its text is learned.

A template writes text around the turns, and says nothing about which of that text the
assistant wrote. So the answers are found by comparing what it writes (P) at each place
where an answer is asked for:

    P_k    the turns before the k-th answer, with the header of the answer to come
    P_k+1  the same, that answer, the next question, and again a header
    A_k    what stands after P_k in P_k+1, up to the end token of the turn

A_k must be the content of the turn and its end token; only white space around the
content may be another, since many templates strip it, or write a space before it. Then
every answer is trained after exactly the text that it is asked for with, and whatever
else a template does is refused by name: one that rewrites an answer once the next turn
is there (stripped reasoning, the time of day), that drops a turn, writes text of its
own inside one, or ends it with no token. The last answer has no P after it. It may
stand in the conversation as the template ends it, or as one more question would show
it.

What is learned is tokenized after what stands before it, never together with it:

    tokens(P_k A_k) = tokens(P_k) + tokens of A_k

Where the tokenizer merges letters across that border, A_k is tokenized apart.
"""

from collections.abc import Iterator, Sequence

from jinja2 import TemplateError

from .plain_text import PRIVATE, Turn, hide, read, replaced, tokens

Part = tuple[list[int], bool]  # tokens, and whether they are learned
SHOWN = 60  # characters of a text that an error shows


def render(tokenizer, turns: Sequence[Turn]) -> list[int]:
    """The tokens of turns that end with a question, as the template writes them.

    The template writes its own <bos>, and no second one is added.

    Raises  ValueError  the template leaves a turn out; a text can only be encoded as a
            control token
    """
    _refuse_lost(tokenizer, turns)
    masked, names = hide(tokenizer, turns)
    return tokens(tokenizer, _written(tokenizer, masked), names)


def parts(tokenizer, turns: Sequence[Turn], stop: int) -> list[Part]:
    """The tokens of a conversation in turn: asked, answered, asked, answered, …

    Args
        turns  end with a question, or with an answer
        stop   the token that ends an answer
    Raises  ValueError  what render raises; or the template does not write an answer as
            it stands, or refuses the conversation
    """
    questions = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    try:
        _refuse_lost(tokenizer, questions)
        masked, names = hide(tokenizer, turns)
        texts = list(_texts(tokenizer, masked, names, stop))
    except TemplateError as error:
        raise ValueError(
            f'the chat template refuses this conversation ({error}); use template="raw"'
        ) from None
    return _encoded(tokenizer, texts, names)


def instructed(tokenizer, instruction: str, turns: Sequence[Turn]) -> list[Turn]:
    """The turns, which end with a question, after the instruction as system turn.

    Gemma's template refuses a system turn, others drop it: the first user's turn then
    carries it.
    """
    if not instruction:
        return list(turns)
    system = {"role": "system", "content": instruction}
    try:
        if system not in _lost(tokenizer, [system, *turns]):
            return [system, *turns]
    except TemplateError:
        pass  # another error than "no system turn" comes again without that turn
    first = {**turns[0], "content": f"{instruction}\n\n{turns[0]['content']}"}
    return [first, *turns[1:]]


def end_of_turn(tokenizer) -> int:
    """The first special token that the template writes after an assistant's turn.

    Such as <|im_end|>, <|eot_id|> or <end_of_turn>; without one, the end of sequence.
    """
    mark = "ANSWER"
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": mark}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    after = read(tokenizer, text.rpartition(mark)[2])
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((i for i in after if i in special), tokenizer.eos_token_id)


def _texts(tokenizer, turns, names, stop) -> Iterator[tuple[str, bool]]:
    """(text, whether it is learned) of a conversation, in the order of the text."""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    end, done = tokenizer.convert_ids_to_tokens(stop), ""
    for i, following in zip(answers, [*answers[1:], None], strict=False):
        before = _written(tokenizer, turns[:i])
        later = _later(tokenizer, turns, following)
        answer = _answer(before, later, turns[i]["content"], end)
        if answer is None:
            raise _rewritten(tokenizer, turns, i, following, names, end)
        yield before[len(done) :], False
        yield answer, True
        done = before + answer
    if turns[-1]["role"] != "assistant":
        yield _written(tokenizer, turns)[len(done) :], False


def _later(tokenizer, turns, following: int | None) -> Iterator[str]:
    """What the template writes when an answer is there.

    Args
        following  the place of the next answer; None: the answer is the last
    """
    if following is not None:
        yield _written(tokenizer, turns[:following])
    elif turns[-1]["role"] != "assistant":
        yield _written(tokenizer, turns)
    else:
        yield _written(tokenizer, turns, ask=False)
        question = {"role": "user", "content": chr(PRIVATE[-1])}
        yield _written(tokenizer, [*turns, question])


def _answer(before: str, later, content: str, end: str) -> str | None:
    """What follows `before` in one of the later texts, up to the end of the turn.

    None where that is anything but the content, the end token, and white space.
    """
    for text in later:
        rest = text[len(before) :].lstrip()
        tail = rest[len(content.strip()) :].lstrip()
        whole = text.startswith(before) and rest.startswith(content.strip())
        if whole and tail.startswith(end):
            return text[len(before) : len(text) - len(tail) + len(end)]
    return None


def _rewritten(tokenizer, turns, i, following, names, end) -> ValueError:
    """The error for a template that does not write turn i as it stands."""
    before = _written(tokenizer, turns[:i])
    text = next(_later(tokenizer, turns, following))
    same = next(
        (n for n, (a, b) in enumerate(zip(before, text, strict=False)) if a != b),
        min(len(before), len(text)),
    )
    wanted = before[same:] + turns[i]["content"] + end
    number = sum(turn["role"] == "assistant" for turn in turns[: i + 1])
    return ValueError(
        f"the chat template does not write assistant turn {number} as it stands: for "
        f"{_short(wanted, names)} it writes {_short(text[same:], names)}. What is "
        "trained must be what is read later: end the row before the next question, "
        'take out what the template changes, or use template="raw"'
    )


def _short(text, names) -> str:
    """The beginning of a text as an error shows it."""
    return repr(replaced(text[:SHOWN], names))


def _encoded(tokenizer, texts, names) -> list[Part]:
    """The tokens of each text after all those before it."""
    encoded, text, ids = [], "", []
    for more, learned in texts:
        whole = tokens(tokenizer, text + more, names)
        if whole[: len(ids)] == ids:
            encoded.append((whole[len(ids) :], learned))
            text, ids = text + more, whole
        else:  # letters on both sides of the border make one token
            text, ids = more, tokens(tokenizer, more, names)
            encoded.append((ids, learned))
    return encoded


def _refuse_lost(tokenizer, turns) -> None:
    """ValueError for a template that leaves a turn out."""
    if lost := _lost(tokenizer, turns):
        raise ValueError(
            f"this tokenizer's chat template leaves out {lost[0]['role']} turns: "
            f'{lost[0]["content"][:SHOWN]!r} would be lost; use template="raw"'
        )


def _lost(tokenizer, turns) -> list[Turn]:
    """The turns whose content the template does not write; each gets a mark for it."""
    marks = list(map(chr, PRIVATE[: len(turns)]))
    marked = [{**t, "content": m} for t, m in zip(turns, marks, strict=True)]
    text = _written(tokenizer, marked)
    return [t for t, mark in zip(turns, marks, strict=True) if mark not in text]


def _written(tokenizer, turns: Sequence[Turn], *, ask: bool = True) -> str:
    """What the template writes; with `ask`, the header of an answer at the end."""
    return tokenizer.apply_chat_template(
        list(turns), add_generation_prompt=ask, tokenize=False
    )
