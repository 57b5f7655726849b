"""How a row becomes tokens: the prompt, the answer, and which of them carry a loss.

A row is a prompt and a completion, or a conversation of several turns, of which each
answer is learned. What the model sees depends on a choice that is part of every run's
configuration:

    "chat"   the model's own chat template: the instruction as the system turn, examples
             as user and assistant turns, the end-of-turn token after an answer
    "raw"    plain text: "Input: …", "Output: …", the end-of-sequence token after an
             answer; further turns are further pairs, after an empty line

Two promises hold for both. What is learned is tokenized *apart* from what stands before
it, so that an answer is trained after exactly the tokens that generation will start
from. And labels are -100 on the prompt and on padding, nowhere else: the token that
ends an answer is learned, or the model would never stop. (Padding is placed by
counting, never by comparing with the pad token, which in many models is the end token.)

**Text stays text**: letters that spell a control token are encoded as letters
(plain_text.py). Which text of a chat template is an answer is found in
conversations.py.
"""

from collections.abc import Iterator, Sequence

from . import messages
from .conversations import end_of_turn, instructed, parts, render
from .plain_text import Turn, plain, read

TEMPLATES = ("chat", "raw")
IGNORED = -100  # the label that torch's cross_entropy leaves out

Pair = tuple[str, str]  # prompt, completion
Encoded = tuple[list[int], list[int]]  # input_ids, labels


def encode_prompt(
    tokenizer,
    instruction: str,
    prompt: str | Sequence[Turn],
    *,
    template: str,
    examples: Sequence[Pair] = (),
) -> list[int]:
    """The tokens that generation starts from.

    Args
        instruction  what to do, in a sentence; "" for none (a chat template may then
                     put a default system turn of its own). A template without a system
                     turn gets it at the top of the first user turn
        prompt       the row's input; or the turns before the answer,
                     [{"role": "user", "content": "…"}, …], a system turn first or none
        template     "chat" or "raw"
        examples     (prompt, completion) pairs placed before the prompt: few-shot
    Raises  ValueError   an unknown template, "chat" without a chat template or with one
            that leaves a turn out, or text that can only be encoded as a control token;
            of turns, what encode_conversation raises
    """
    _check(tokenizer, template)
    asked = messages.question(prompt) if isinstance(prompt, str) else list(prompt)
    if not isinstance(prompt, str):
        _refuse_no_conversation([*asked, {"role": "assistant", "content": "…"}])
    instruction, asked = _system(instruction, asked)
    turns = [*messages.of_pairs(examples), *asked]
    if template == "raw":
        return _joined(_raw(tokenizer, instruction, turns))[0]
    turns = instructed(tokenizer, instruction, turns)
    if isinstance(prompt, str):
        return render(tokenizer, turns)
    return _joined(parts(tokenizer, turns, end_of_turn(tokenizer)))[0]


def encode_row(
    tokenizer, instruction: str, prompt: str, completion: str, *, template: str
) -> Encoded:
    """A training row: prompt, completion, end token; and its labels.

        input_ids = encode_prompt(…) + completion + [stop]
        labels    = [-100, …, -100]  + completion + [stop]

    Returns  (input_ids, labels), equally long
    Raises   ValueError   the completion spells the end token, which is added by itself;
             and what encode_prompt raises
    """
    before = encode_prompt(tokenizer, instruction, prompt, template=template)
    _refuse_end_inside(tokenizer, completion, stop_token(tokenizer, template))
    return _joined([(before, False), (_answer(tokenizer, completion, template), True)])


def encode_conversation(
    tokenizer, instruction: str, turns: Sequence[Turn], *, template: str
) -> Encoded:
    """A training row of several turns: each of the assistant's is learned.

        input_ids = encode_prompt(turns before the 1st answer) + 1st answer + [stop]
                  + what stands between + 2nd answer + [stop] + …

    Up to each answer these are the tokens that encode_prompt makes of the turns before
    it. Labels are -100 but on the answers and their end tokens.

    Args
        turns  [{"role": "user", "content": "…"}, {"role": "assistant", …}, …], a system
               turn first or none, the assistant's last
    Returns  (input_ids, labels), equally long
    Raises   ValueError   turns out of order, empty, or no text; a system turn beside an
             instruction; an answer that spells the end token; a chat template that does
             not write an answer as it stands, in all places the same
             (conversations.py); and what encode_prompt raises
    """
    _check(tokenizer, template)
    _refuse_no_conversation(turns)
    instruction, turns = _system(instruction, turns)
    stop = stop_token(tokenizer, template)
    for turn in turns:
        if turn["role"] == "assistant":
            _refuse_end_inside(tokenizer, turn["content"], stop)
    if template == "raw":
        return _joined(_raw(tokenizer, instruction, turns))
    turns = [*instructed(tokenizer, instruction, turns[:-1]), turns[-1]]
    return _joined(parts(tokenizer, turns, stop))


def encode_rows(
    tokenizer, instruction: str, rows, *, template: str, max_tokens: int = 512
) -> list[Encoded]:
    """Every row of a split; a row that is too long is an error, not cut.

    Args
        rows        iterable of {"prompt": …, "completion": …}, for encode_row, or
                    {"messages": […]}, for encode_conversation; rows of one's own also
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
) -> tuple[list[Encoded], list[tuple[str, str]]]:
    """Every row of a split as encode_rows makes it, and what is wrong with the others.

    Args     those of encode_rows
    Returns  the encoded rows without the bad ones; and (place, reason) of each of those
    """
    _check(tokenizer, template)
    encoded, bad = [], []
    for place, row in placed(rows):
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
    return tokenizer.eos_token_id if template == "raw" else end_of_turn(tokenizer)


def placed(rows) -> Iterator[tuple[str, dict]]:
    """(where it stands, row): in its file, where the row says so, else in `rows`."""
    for number, row in enumerate(rows, 1):
        yield row.get("place", f"row {number}"), row


def _encode(tokenizer, instruction, row, template, max_tokens) -> Encoded:
    """The tokens of a row's columns; ValueError with the reason for a bad row."""
    if row.get("messages") is not None:
        ids, labels = encode_conversation(
            tokenizer, instruction, row["messages"], template=template
        )
        begins = row["messages"][0]["content"]
    else:
        for column in ("prompt", "completion"):
            if not isinstance(row.get(column), str):
                raise ValueError(f"{column}={row.get(column)!r} is no text")
        begins = row["prompt"]
        ids, labels = encode_row(
            tokenizer, instruction, begins, row["completion"], template=template
        )
    if len(ids) > max_tokens:
        raise ValueError(
            f"{len(ids)} tokens, the limit is {max_tokens}: shorten it, leave it out "
            f"or raise the limit; it begins {begins[:60]!r}"
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


def _refuse_no_conversation(turns) -> None:
    if reason := messages.reason(turns):
        raise ValueError(reason)


def _system(instruction, turns) -> tuple[str, Sequence[Turn]]:
    """(instruction, the other turns): a system turn is the instruction of its row."""
    if turns[0]["role"] != "system":
        return instruction, turns
    if instruction:
        raise ValueError(
            f"the row has a system turn, {turns[0]['content'][:60]!r}, and the task an "
            f"instruction, {instruction[:60]!r}: leave one of them out"
        )
    return turns[0]["content"], turns[1:]


def _refuse_end_inside(tokenizer, completion, stop) -> None:
    """ValueError for an answer that spells the token which will end it."""
    if stop in read(tokenizer, completion):
        raise ValueError(
            f"the completion {completion[:60]!r} holds the end token "
            f"{tokenizer.decode([stop])!r} as text; take it out, it is added by itself"
        )


def _raw(tokenizer, instruction, turns) -> Iterator[tuple[list[int], bool]]:
    """(tokens, whether they are learned) of turns as Input: and Output: pairs."""
    yield _start(tokenizer), False
    if instruction:
        yield plain(tokenizer, f"{instruction}\n\n", "raw"), False
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            yield _answer(tokenizer, turn["content"], "raw"), True
            continue
        if i:
            yield plain(tokenizer, "\n\n", "raw"), False
        yield plain(tokenizer, f"Input: {turn['content']}\nOutput:", "raw"), False


def _joined(parts) -> Encoded:
    """Input ids and labels of (tokens, whether they are learned), one after another."""
    ids, labels = [], []
    for tokens, learned in parts:
        ids += tokens
        labels += tokens if learned else [IGNORED] * len(tokens)
    return ids, labels


def _answer(tokenizer, completion, template) -> list[int]:
    """The completion's tokens and the end token."""
    text = completion if template == "chat" else f" {completion}"
    return [*plain(tokenizer, text, template), stop_token(tokenizer, template)]


def _start(tokenizer) -> list[int]:
    """[bos] where this tokenizer begins every text with it, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []
