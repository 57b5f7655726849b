"""Text stays text: what a row spells never becomes a control token.

A row about chat models may spell `<|im_start|>`. That token begins a turn, and only the
chat template may write it: the letters of a row are encoded as letters. Where a
tokenizer cannot do this, the text is refused.

The control tokens are those that the tokenizer calls special and, in a chat, whatever
the template writes between two turns. A tokenizer finds them in any text that it reads.
So a text of its own is read with the search switched off (`plain`); and in a rendered
conversation each spelled token is hidden behind a character while the template writes
(`hide`), and put back as letters afterwards (`tokens`).
"""

import re
from collections.abc import Iterable, Sequence

PRIVATE = range(0xF0000, 0xFFFFE)  # code points that no text uses: Unicode's plane 15

Turn = dict[str, str]  # role, content
Names = dict[str, str]  # {character: what is to be written for it, as text}


def is_unicode(text: str) -> bool:
    """False for text with half a surrogate pair, which no tokenizer takes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def plain(tokenizer, text: str, template: str) -> list[int]:
    """The tokens of a text that is data: letters that spell a control token stay.

    Raises  ValueError  this tokenizer makes a control token of letters all the same
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    if not tokenizer.added_tokens_decoder.keys().isdisjoint(ids):
        control = control_tokens(tokenizer, template)
        unknown = tokenizer.unk_token_id  # of letters that it does not know
        if spelled := [t for t, i in control.items() if i in ids and i != unknown]:
            raise _not_text(spelled)
    return ids


def read(tokenizer, text: str) -> list[int]:
    """The tokens of a text, control tokens included, without bos and eos around it."""
    return tokenizer(text, add_special_tokens=False).input_ids


def hide(tokenizer, turns: Sequence[Turn]) -> tuple[list[Turn], Names]:
    """The turns with a character for each control token that they spell; and for what.

    Raises  ValueError  a control token is spelled in a way that cannot be hidden
    """
    contents = [turn["content"] for turn in turns]
    spelled = _spelled(tokenizer, contents)
    if not spelled:
        return list(turns), {}
    free = (chr(i) for i in PRIVATE if not any(chr(i) in text for text in contents))
    marks = dict(zip(spelled, free, strict=False))
    masked = [{**turn, "content": replaced(turn["content"], marks)} for turn in turns]
    if still := _spelled(tokenizer, [turn["content"] for turn in masked]):
        raise _not_text(still)
    return masked, {mark: token for token, mark in marks.items()}


def tokens(tokenizer, text: str, names: Names) -> list[int]:
    """The tokens of a rendered conversation, what `hide` hid in it as letters.

    Raises  ValueError  the tokenizer finds other control tokens in it than stand there
    """
    if not names:
        return read(tokenizer, text)
    if _pieces(tokenizer, text, {}) != read(tokenizer, text):
        raise _not_text(list(names.values()))
    return _pieces(tokenizer, text, names)


def control_tokens(tokenizer, template: str) -> dict[str, int]:
    """{token: its id} of what a text must not become.

    The special tokens; and, where the chat template marks the turns with others, these.
    """
    added = tokenizer.added_tokens_decoder
    marks = _turn_marks(tokenizer) if template == "chat" else set()
    return {
        token.content: i for i, token in added.items() if token.special or i in marks
    }


def replaced(text: str, names: Names) -> str:
    """The text with each of the names' keys exchanged for its value."""
    if not names:
        return text
    return re.sub(any_of(names), lambda match: names[match[0]], text)


def any_of(words: Iterable[str]) -> str:
    """A pattern of these words, longer ones first."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


def _pieces(tokenizer, text, names) -> list[int]:
    """The tokens of a rendered conversation, cut at its control tokens."""
    control, ids = control_tokens(tokenizer, "chat"), []
    for piece in re.split(f"({any_of(control)})", text):
        if piece in control:
            ids.append(control[piece])
        elif piece:
            ids += plain(tokenizer, replaced(piece, names), "chat")
    return ids


def _spelled(tokenizer, texts: Sequence[str]) -> list[str]:
    """The control tokens that the texts of a conversation would become."""
    ids = {i for text in texts for i in read(tokenizer, text)}
    if tokenizer.added_tokens_decoder.keys().isdisjoint(ids):
        return []
    control = control_tokens(tokenizer, "chat")
    unknown = tokenizer.unk_token_id  # also of letters that it does not know
    return [
        token
        for token, i in control.items()
        if i in ids and (i != unknown or any(token in text for text in texts))
    ]


def _turn_marks(tokenizer) -> set[int]:
    """The tokens that the template writes between an answer and the next prompt."""
    roles = ("user", "assistant", "user")
    marks = list(map(chr, PRIVATE[: len(roles)]))
    turns = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return {*read(tokenizer, text.partition(marks[1])[2].partition(marks[2])[0])}


def _not_text(spelled: Sequence[str]) -> ValueError:
    return ValueError(
        f"the text spells {spelled[0]!r}, a control token that this tokenizer cannot "
        "encode as letters: take it out or write it in another way"
    )
