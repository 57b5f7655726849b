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
"""

from collections.abc import Sequence

from jinja2 import TemplateError

TEMPLATES = ("chat", "raw")
IGNORED = -100  # the label that torch's cross_entropy leaves out

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
                     put a default system turn of its own)
        prompt       the row's input
        template     "chat" or "raw"
        examples     (prompt, completion) pairs placed before the prompt: few-shot
    Raises  ValueError   an unknown template, or "chat" without a chat template
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
    Raises   ValueError   the completion holds the end token, and would teach the model
             to stop in the middle
    """
    before = encode_prompt(tokenizer, instruction, prompt, template=template)
    stop = stop_token(tokenizer, template)
    answer = _answer(tokenizer, completion, template)
    if stop in answer[:-1]:
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
    system = [{"role": "system", "content": instruction}] if instruction else []
    try:
        return _render(tokenizer, system + turns)
    except TemplateError:
        if not system:
            raise
    # Gemma's template, for one, refuses a system turn: the first user turn carries it.
    turns[0]["content"] = f"{instruction}\n\n{turns[0]['content']}"
    return _render(tokenizer, turns)


def _render(tokenizer, turns) -> list[int]:
    # The template writes its own <bos>; apply_chat_template does not add a second one.
    return tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def _raw(tokenizer, instruction, prompt, examples) -> list[int]:
    ids = _start(tokenizer)
    if instruction:
        ids += _plain(tokenizer, f"{instruction}\n\n")
    for question, answer in examples:
        ids += _plain(tokenizer, f"Input: {question}\nOutput:")
        ids += _answer(tokenizer, answer, "raw") + _plain(tokenizer, "\n\n")
    return ids + _plain(tokenizer, f"Input: {prompt}\nOutput:")


def _answer(tokenizer, completion, template) -> list[int]:
    """The completion's tokens and the end token."""
    text = completion if template == "chat" else f" {completion}"
    return [*_plain(tokenizer, text), stop_token(tokenizer, template)]


def _start(tokenizer) -> list[int]:
    """[bos] where this tokenizer begins every text with it, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []


def _plain(tokenizer, text) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
