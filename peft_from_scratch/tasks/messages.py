"""Rows of several turns: {"messages": [{"role": …, "content": …}, …]}.

A conversation is a system turn or none, then user and assistant in turn, the assistant
last. Training learns every assistant turn. Evaluation asks for the last one: what
stands before it is the row's prompt, and its content the completion.
"""

from collections.abc import Iterator, Mapping, Sequence

from .plain_text import Turn, is_unicode

ROLES = ("system", "user", "assistant")
# Keys of a turn that say what it means; to pass over them would train something else.
MEANT = (
    "tool_calls",
    "tool_call_id",
    "function_call",
    "reasoning",
    "reasoning_content",
    "thinking",
    "weight",
)
Key = tuple[tuple[str, str], ...]  # (role, content) of the turns before the last answer


def reason(turns: object) -> str | None:
    """The reason why these are no conversation to learn from; None where they are."""
    if not isinstance(turns, list | tuple):
        return f"'messages' is not a list but {type(turns).__name__}"
    if not turns:
        return "'messages' is empty"
    for number, turn in enumerate(turns, 1):
        if wrong := _wrong_turn(turn):
            return f"turn {number} {wrong}"
    return _out_of_order([turn["role"] for turn in turns])


def columns(turns: Sequence[Turn]) -> dict:
    """The columns of a row: its turns, and what is asked and answered last, as text."""
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    *before, answer = turns
    return {
        "prompt": transcript(before),
        "completion": answer["content"],
        "messages": turns,
    }


def transcript(turns: Sequence[Turn]) -> str:
    """The turns to be read by people; of a single question, its own words."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def prompt_of(row: Mapping) -> str | list[Turn]:
    """What encode_prompt takes of a row: its prompt, or the turns before its answer."""
    return row["prompt"] if row.get("messages") is None else row["messages"][:-1]


def pairs(row: Mapping) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a row, without its system turn: for few-shot."""
    if row.get("messages") is None:
        return [(row["prompt"], row["completion"])]
    contents = [turn["content"] for turn in row["messages"] if turn["role"] != "system"]
    return list(zip(contents[::2], contents[1::2], strict=True))


def of_pairs(pairs: Sequence[tuple[str, str]]) -> Iterator[Turn]:
    """The turns of (question, answer) pairs."""
    for asked, answered in pairs:
        yield from question(asked)
        yield {"role": "assistant", "content": answered}


def question(prompt: str) -> list[Turn]:
    """A prompt as a conversation of one turn."""
    return [{"role": "user", "content": prompt}]


def key(row: Mapping) -> Key:
    """What tells rows apart: all that stands before the last answer."""
    asked = prompt_of(row)
    turns = question(asked) if isinstance(asked, str) else asked
    return tuple((turn["role"], turn["content"]) for turn in turns)


def beginnings(asked: Key) -> list[Key]:
    """What this conversation asks in its course, the first question first; itself last.

    Another row that asks one of these is a conversation which this one goes on with.
    """
    ends = [i for i, (role, _) in enumerate(asked, 1) if role == "user"]
    return [asked[:end] for end in ends]


def shared_system(splits: Mapping[str, list[dict]]) -> tuple[str, dict[str, list]]:
    """(instruction, splits): a system turn that all rows share is their instruction.

    So the record of a training run holds it, and `chat` speaks to the adapter with it.
    """
    rows = [row for split in splits.values() for row in split]
    first = {key(row)[0] for row in rows}
    role, content = next(iter(first), ("", ""))
    if len(first) != 1 or role != "system":
        return "", dict(splits)
    return content, {
        split: [row | columns(row["messages"][1:]) for row in rows]
        for split, rows in splits.items()
    }


def _wrong_turn(turn) -> str | None:
    """What is wrong with one turn, as what follows its number."""
    if not isinstance(turn, Mapping):
        return f"is not an object but {type(turn).__name__}"
    for name in ("role", "content"):
        if name not in turn:
            return f"has no {name!r}; it has {', '.join(map(repr, turn)) or 'no key'}"
    role, content = turn["role"], turn["content"]
    if meant := next((name for name in MEANT if turn.get(name) is not None), None):
        return f"has {meant!r}, which would be passed over: take it out, or the row"
    if role not in ROLES:
        return f"has the role {role!r}; allowed are {', '.join(ROLES)}"
    if isinstance(content, list):
        return "has a list of parts as its 'content', as of images; allowed is text"
    if not isinstance(content, str):
        return f"({role}): 'content' is not text but {type(content).__name__}"
    if not content.strip():
        return f"({role}): 'content' is empty"
    if not is_unicode(content):
        return f"({role}): 'content' holds half a surrogate pair, which is no text"
    return None


def _out_of_order(roles: list[str]) -> str | None:
    """The reason against roles that are not user and assistant in turn."""
    first = 1 if roles[0] == "system" else 0
    for i, role in enumerate(roles[first:]):
        wanted = ("user", "assistant")[i % 2]
        if role != wanted:
            place = f"turn {first + i + 1} is the {role}'s"
            return (
                f"{place}, where the {wanted}'s is due: after a system turn or none "
                "they alternate, the user's first"
            )
    if roles[-1] != "assistant":
        return f"the last turn is the {roles[-1]}'s; it must be the assistant's"
    return None
