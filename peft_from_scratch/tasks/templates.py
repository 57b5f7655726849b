"""How a row becomes tokens: the prompt, the answer, and which of them carry a loss.

A row is a prompt and a completion. What the model sees depends on a choice that is part
of every run's configuration:

    "chat"   the model's own chat template: the instruction as the system turn, examples
             as user and assistant turns, the end-of-turn token after an answer
    "raw"    plain text: "Input: …", "Output: …", the end-of-sequence token after an
             answer

Two promises hold for both. Prompt and completion are tokenized *apart* and joined, so
that a training row starts with exactly the tokens that generation will start from.
And labels are -100 on the prompt and on padding, nowhere else: the token that ends an
answer is learned, or the model would never stop. (Padding is placed by counting, never
by comparing with the pad token, which in many models is the end token.)

**Text stays text.** A row about chat models may spell `<|im_start|>`. That token begins
a turn, and only the template may write it: in an instruction, a prompt, an example or a
completion its letters are encoded as letters. Where a tokenizer cannot do this, the row
is refused.
"""

import re
from collections.abc import Iterable, Sequence

from jinja2 import TemplateError

TEMPLATES = ("chat", "raw")
IGNORED = -100  # the label that torch's cross_entropy leaves out
PRIVATE = range(0xF0000, 0xFFFFE)  # code points that no text uses: Unicode's plane 15

Pair = tuple[str, str]  # prompt, completion


def encode_prompt(
    tokenizer,
    instruction: str,
    prompt: str,
    *,
    template: str,
    examples: Sequence[Pair] = (),
) -> list[int]:
    """The tokens that generation starts from.

    Args
        instruction  what to do, in a sentence; "" for none (a chat template may then
                     put a default system turn of its own). A template without a system
                     turn gets it at the top of the first user turn
        prompt       the row's input
        template     "chat" or "raw"
        examples     (prompt, completion) pairs placed before the prompt: few-shot
    Raises  ValueError   an unknown template, "chat" without a chat template or with one
            that leaves a turn out, or text that can only be encoded as a control token
    """
    _check(tokenizer, template)
    if template == "chat":
        return _chat(tokenizer, instruction, prompt, examples)
    return _raw(tokenizer, instruction, prompt, examples)


def encode_row(
    tokenizer, instruction: str, prompt: str, completion: str, *, template: str
) -> tuple[list[int], list[int]]:
    """A training row: prompt, completion, end token; and its labels.

        input_ids = encode_prompt(…) + completion + [stop]
        labels    = [-100, …, -100]  + completion + [stop]

    Returns  (input_ids, labels), equally long
    Raises   ValueError   the completion spells the end token, which is added by itself;
             and what encode_prompt raises
    """
    before = encode_prompt(tokenizer, instruction, prompt, template=template)
    stop = stop_token(tokenizer, template)
    answer = _answer(tokenizer, completion, template)
    if stop in _read(tokenizer, completion):
        raise ValueError(
            f"the completion {completion[:60]!r} holds the end token "
            f"{tokenizer.decode([stop])!r} as text; take it out, it is added by itself"
        )
    return before + answer, [IGNORED] * len(before) + answer


def encode_rows(
    tokenizer, instruction: str, rows, *, template: str, max_tokens: int = 512
) -> list[tuple[list[int], list[int]]]:
    """encode_row for every row of a split; a row that is too long is an error, not cut.

    Args
        rows        iterable of {"prompt": …, "completion": …}; rows of one's own also
                    say where they stand, {…, "place": "line 31"}
        max_tokens  the longest row that is accepted, in tokens
    Raises  ValueError   naming the place of the first row that is too long, has no text
            as its prompt or completion, or holds the end token; without a place, its
            number, counted from 1
    """
    encoded, bad = encode_all(
        tokenizer, instruction, rows, template=template, max_tokens=max_tokens
    )
    if bad:
        place, reason = bad[0]
        raise ValueError(f"{place}: {reason}")
    return encoded


def encode_all(
    tokenizer, instruction: str, rows, *, template: str, max_tokens: int = 512
) -> tuple[list[tuple[list[int], list[int]]], list[tuple[str, str]]]:
    """encode_row for every row of a split, and what is wrong with the others.

    Args     those of encode_rows
    Returns  the encoded rows without the bad ones; and (place, reason) of each of those
    """
    _check(tokenizer, template)
    encoded, bad = [], []
    for place, row in _placed(rows):
        try:
            encoded.append(_encode(tokenizer, instruction, row, template, max_tokens))
        except ValueError as error:
            bad.append((place, str(error)))
    return encoded, bad


def stop_token(tokenizer, template: str) -> int:
    """The token that ends an answer: learned in training, and generation stops at it.

    raw: the end-of-sequence token. chat: the first special token that the template
    writes after an assistant's turn, such as <|im_end|>, <|eot_id|> or <end_of_turn>.
    """
    _check(tokenizer, template)
    if template == "raw":
        return tokenizer.eos_token_id
    mark = "ANSWER"
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": mark}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    after = tokenizer(text.rpartition(mark)[2], add_special_tokens=False).input_ids
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((i for i in after if i in special), tokenizer.eos_token_id)


def _placed(rows):
    """(where it stands, row): in its file, where the row says so, else in `rows`."""
    for number, row in enumerate(rows, 1):
        yield row.get("place", f"row {number}"), row


def _encode(tokenizer, instruction, row, template, max_tokens):
    """encode_row of a row's columns; ValueError with the reason for a bad row."""
    for column in ("prompt", "completion"):
        if not isinstance(row.get(column), str):
            raise ValueError(f"{column}={row.get(column)!r} is no text")
    ids, labels = encode_row(
        tokenizer, instruction, row["prompt"], row["completion"], template=template
    )
    if len(ids) > max_tokens:
        raise ValueError(
            f"{len(ids)} tokens, the limit is {max_tokens}: shorten it, leave it out "
            f"or raise the limit; it begins {row['prompt'][:60]!r}"
        )
    return ids, labels


def _check(tokenizer, template):
    if template not in TEMPLATES:
        raise ValueError(f"{template=} is none of {', '.join(TEMPLATES)}")
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError(
            "this tokenizer has no chat template, as is usual for base models; "
            'use template="raw"'
        )
    if template == "raw" and tokenizer.eos_token_id is None:
        raise ValueError(
            "this tokenizer has no end-of-sequence token to end answers with"
        )


def _chat(tokenizer, instruction, prompt, examples) -> list[int]:
    turns = []
    for question, answer in examples:
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer})
    turns.append({"role": "user", "content": prompt})
    if instruction:
        turns = _instructed(tokenizer, instruction, turns)
    if lost := _lost(tokenizer, turns):
        raise ValueError(
            f"this tokenizer's chat template leaves out {lost[0]['role']} turns: "
            f'{lost[0]["content"][:60]!r} would be lost; use template="raw"'
        )
    return _render(tokenizer, turns)


def _instructed(tokenizer, instruction, turns) -> list[dict]:
    """The turns with the instruction before them, or in the first one.

    Gemma's template refuses a system turn, others drop it: the user's turn carries it.
    """
    system = {"role": "system", "content": instruction}
    try:
        if system not in _lost(tokenizer, [system, *turns]):
            return [system, *turns]
    except TemplateError:
        pass  # another error than "no system turn" comes again without that turn
    first = {**turns[0], "content": f"{instruction}\n\n{turns[0]['content']}"}
    return [first, *turns[1:]]


def _lost(tokenizer, turns) -> list[dict]:
    """The turns whose content the template does not write; each gets a mark for it."""
    marks = list(map(chr, PRIVATE[: len(turns)]))
    marked = [{**t, "content": m} for t, m in zip(turns, marks, strict=True)]
    text = _written(tokenizer, marked)
    return [t for t, mark in zip(turns, marks, strict=True) if mark not in text]


def _written(tokenizer, turns) -> str:
    return tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=False
    )


def _render(tokenizer, turns) -> list[int]:
    """The tokens of a conversation; the template's control tokens and no others.

    The template writes its own <bos>, and no second one is added.
    """
    contents = [turn["content"] for turn in turns]
    spelled = _spelled(tokenizer, contents)
    if not spelled:
        return _read(tokenizer, _written(tokenizer, turns))
    # Hidden behind a character each, they are not taken for the template's own.
    free = (chr(i) for i in PRIVATE if not any(chr(i) in text for text in contents))
    hidden = dict(zip(spelled, free, strict=False))
    masked = [{**turn, "content": _replaced(turn["content"], hidden)} for turn in turns]
    text = _written(tokenizer, masked)
    still = _spelled(tokenizer, [turn["content"] for turn in masked])
    if still or _pieces(tokenizer, text, {}) != _read(tokenizer, text):
        raise _not_text(still or spelled)
    return _pieces(tokenizer, text, {mark: token for token, mark in hidden.items()})


def _pieces(tokenizer, text, names) -> list[int]:
    """The tokens of a rendered conversation, cut at its control tokens.

    Args
        names  {character: what is to be written for it, as text}
    """
    control, ids = _control_tokens(tokenizer, "chat"), []
    for piece in re.split(f"({_any_of(control)})", text):
        if piece in control:
            ids.append(control[piece])
        elif piece:
            ids += _plain(tokenizer, _replaced(piece, names), "chat")
    return ids


def _raw(tokenizer, instruction, prompt, examples) -> list[int]:
    ids = _start(tokenizer)
    if instruction:
        ids += _plain(tokenizer, f"{instruction}\n\n", "raw")
    for question, answer in examples:
        ids += _plain(tokenizer, f"Input: {question}\nOutput:", "raw")
        ids += _answer(tokenizer, answer, "raw") + _plain(tokenizer, "\n\n", "raw")
    return ids + _plain(tokenizer, f"Input: {prompt}\nOutput:", "raw")


def _answer(tokenizer, completion, template) -> list[int]:
    """The completion's tokens and the end token."""
    text = completion if template == "chat" else f" {completion}"
    return [*_plain(tokenizer, text, template), stop_token(tokenizer, template)]


def _start(tokenizer) -> list[int]:
    """[bos] where this tokenizer begins every text with it, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []


def _plain(tokenizer, text, template) -> list[int]:
    """The tokens of a text that is data: letters that spell a control token stay."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    if not tokenizer.added_tokens_decoder.keys().isdisjoint(ids):
        control = _control_tokens(tokenizer, template)
        unknown = tokenizer.unk_token_id  # of letters that it does not know
        if spelled := [t for t, i in control.items() if i in ids and i != unknown]:
            raise _not_text(spelled)
    return ids


def _read(tokenizer, text) -> list[int]:
    """The tokens of a text, control tokens included, without bos and eos around it."""
    return tokenizer(text, add_special_tokens=False).input_ids


def _spelled(tokenizer, texts: Sequence[str]) -> list[str]:
    """The control tokens that the texts of a conversation would become."""
    ids = {i for text in texts for i in _read(tokenizer, text)}
    if tokenizer.added_tokens_decoder.keys().isdisjoint(ids):
        return []
    control = _control_tokens(tokenizer, "chat")
    unknown = tokenizer.unk_token_id  # also of letters that it does not know
    return [
        token
        for token, i in control.items()
        if i in ids and (i != unknown or any(token in text for text in texts))
    ]


def _control_tokens(tokenizer, template) -> dict[str, int]:
    """{token: its id} of what a text must not become.

    The special tokens; and, where the chat template marks the turns with others, these.
    """
    added = tokenizer.added_tokens_decoder
    marks = _turn_marks(tokenizer) if template == "chat" else set()
    return {
        token.content: i for i, token in added.items() if token.special or i in marks
    }


def _turn_marks(tokenizer) -> set[int]:
    """The tokens that the template writes between an answer and the next prompt."""
    roles = ("user", "assistant", "user")
    marks = list(map(chr, PRIVATE[: len(roles)]))
    turns = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return {*_read(tokenizer, text.partition(marks[1])[2].partition(marks[2])[0])}


def _replaced(text, names) -> str:
    if not names:
        return text
    return re.sub(_any_of(names), lambda match: names[match[0]], text)


def _any_of(words: Iterable[str]) -> str:
    """A pattern of these words, longer ones first."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


def _not_text(tokens) -> ValueError:
    return ValueError(
        f"the text spells {tokens[0]!r}, a control token that this tokenizer cannot "
        "encode as letters: take it out or write it in another way"
    )
