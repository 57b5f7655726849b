"""Your own rows as a task: a JSONL file, or any data set that `datasets` can load.

One row a line, {"prompt": "…", "completion": "…"}, or a conversation of several turns,
{"messages": [{"role": "user", "content": "…"}, …]} (messages.py). A file may hold both
kinds; a row with all three keys is read as prompt and completion. Other keys are left
alone, empty lines are skipped. A file with a bad row gives no task at all: every bad
row is reported with its line and the reason, so that nothing is trained on by accident.
A good row keeps its place, so that a later error (a row that is too long) can name it.

The rows are cut into train, validation and test *by prompt*, so that no prompt is in
two of them. Prompts that a reader would call the same (see `alike`) stay together: a
test prompt that training has seen with one space more is no test. The prompt of a
conversation is all that stands before its last answer. It stays together with every
conversation that goes on from there, and learns an answer to it. What counts as a right
answer is chosen by name: scorers.py.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from random import Random

from datasets import load_dataset
from datasets.exceptions import DatasetsError

from ..common import records
from . import messages
from .plain_text import is_unicode

LISTED = 20  # bad rows that an error spells out
MINIMUM = 3  # distinct prompts: one for each split
LINE_END = re.compile(rb"\r\n?|\n")  # of Windows, of old Macs, of all others
UNSEEN = re.compile("[\N{VARIATION SELECTOR-1}-\N{VARIATION SELECTOR-16}]")
PAIR = ("prompt", "completion")
Numbered = tuple[str, object]  # where the row stands, the row
Example = dict  # prompt, completion, place; messages of a conversation
Key = messages.Key  # of a row: its prompt, as turns


def read_jsonl(path: str, seed: int) -> dict[str, list[Example]]:
    """The rows of a JSONL file in three splits: 70 % train, 10 % validation, 20 % test.

    Raises  ValueError  another format, bad rows, or fewer than MINIMUM distinct prompts
            OSError     no such file
    """
    data = _read(path)
    _refuse_other_format(data, path)
    return split_rows(check_rows(_lines(data), path), seed, path)


def check_rows(numbered: Iterable[Numbered], source: str) -> dict[Key, Example]:
    """{key: its row} of rows that are all good; identical rows count once.

    Args
        numbered  (place, row); a row that could not be read is its ValueError
    Raises  ValueError  the first LISTED bad rows with place and reason, and how many
    """
    good, bad = {}, []
    for place, row in numbered:
        kept = {} if (reason := _reason(row)) else {**_columns_of(row), "place": place}
        if reason := reason or _contradiction(kept, good):
            bad.append((place, reason))
        else:
            good.setdefault(messages.key(kept), kept)
    refuse_bad(bad, source)
    return good


def refuse_bad(bad: Sequence[tuple[str, str]], source: str) -> None:
    """ValueError with the first LISTED of the (place, reason), where there are any."""
    if not bad:
        return
    lines = [f"{source} has {len(bad)} bad row{'s' if len(bad) > 1 else ''}:"]
    lines += [f"  {place}: {reason}" for place, reason in bad[:LISTED]]
    if len(bad) > LISTED:
        lines.append(f"  … and {len(bad) - LISTED} more")
    raise ValueError("\n".join(lines))


def in_order(bad: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(place, reason) in the order of the file: the splits are shuffled."""
    return sorted(bad, key=lambda each: int(re.search(r"\d+", each[0])[0]))


def split_rows(
    rows: dict[Key, Example], seed: int, source: str
) -> dict[str, list[Example]]:
    """Cut {key: its row} by prompt into train, validation and test.

    Prompts that are alike count as one. A tenth validates, a fifth tests (100 and 300
    prompts at most, one at least), the rest trains. Which prompt goes where depends on
    the seed, not on the order of the rows.
    """
    groups = _groups(rows)
    _require(groups, source)
    order = _draw(groups, len(groups), seed)
    test = _share(groups, 5, 300)
    held_out = test + _share(groups, 10, 100)
    cut = {
        "train": order[held_out:],
        "validation": order[test:held_out],
        "test": order[:test],
    }
    return {split: list(chain(*groups)) for split, groups in cut.items()}


def alike(prompt: str) -> str:
    """What all prompts share that a reader would call the same.

    The text in Unicode's compatible form (NFKC), in small letters, without characters
    that nobody sees, and with one space where there is any.
    """
    if not prompt.isascii():
        seen = (c for c in prompt if unicodedata.category(c) != "Cf")
        prompt = unicodedata.normalize("NFKC", UNSEEN.sub("", "".join(seen)))
    return " ".join(prompt.casefold().split())


def clusters(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """A name for each row: rows whose prompts are alike have the same."""
    return [alike(row["prompt"]) for row in rows]


def read_dataset(
    dataset: str, seed: int, prompt: str, completion: str, config: str | None = None
) -> dict[str, list[Example]]:
    """The rows of a data set in three splits.

    A split "test" of the data set stays the test, with or without its "validation";
    prompts that are in it, or alike, are taken out of the others. Without one, all rows
    are cut as a file's are.

    Args
        dataset     an id of the hub, or a folder
        prompt      the column that holds the prompts; completion likewise. Where these
                    are not chosen and not both there, a column `messages` is read
        config      the configuration, for data sets that have several
    Raises  ValueError  a file that cannot be read as data, a column that is not there,
            bad rows, too few rows
            OSError     no such data set, or no way to reach the hub
    """
    splits = {}
    for name, data in _download(dataset, config).items():
        numbered = _columns(data, prompt, completion, dataset, name)
        splits[name] = check_rows(numbered, f"{dataset} ({name})")
    if not {"train", "test"} <= splits.keys():
        pooled = {key: row for rows in splits.values() for key, row in rows.items()}
        return split_rows(pooled, seed, dataset)
    train, test = splits["train"], splits["test"]
    validation = splits.get("validation") or _tenth(train, seed)
    validation = _without(validation, test)
    train = _without(train, test | validation)
    _require(_groups(train), f"{dataset} (train, without the prompts of the others)")
    cut = {"train": train, "validation": validation, "test": test}
    return {name: list(rows.values()) for name, rows in cut.items()}


def dataset_id(name: str) -> str | None:
    """The id after "hub:", or the path of a folder; None for any other name."""
    if name.startswith("hub:"):
        return name.removeprefix("hub:")
    return name if Path(name).is_dir() else None


def _read(path) -> bytes:
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder: name the .jsonl file in it, or rename the folder; "
            "one without .jsonl at the end of its name is read as a data set"
        )
    if not file.exists():
        raise FileNotFoundError(
            f"{path} does not exist: check the name, which is looked for from "
            f"{Path.cwd()}"
        )
    return file.read_bytes()


def _refuse_other_format(data, path) -> None:
    """ValueError for what would give the same reason once a line."""
    # JSON starts with ASCII, so that in UTF-16 one of its first two bytes is 0.
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:2]:
        raise ValueError(f"{path} looks like UTF-16: save it as UTF-8")
    if re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", data):
        raise ValueError(
            f"{path} is a JSON array: write one object a line, such as "
            '{"prompt": "…", "completion": "…"}, without brackets around them all'
        )


def _lines(data) -> Iterable[Numbered]:
    """Each line's row, or the ValueError that says why there is none."""
    for number, line in enumerate(LINE_END.split(data), 1):
        if line.strip():
            yield f"line {number}", _parse(line)


def _parse(line):
    try:
        return records.parse(line)
    except ValueError as error:
        return error


def _columns(data, prompt, completion, source, split) -> Iterable[Numbered]:
    """(place, row) of one split of a data set.

    Raises  ValueError  a column that is not there
    """
    chosen = (prompt, completion)
    if chosen == PAIR and _is_conversation(data.column_names):
        for number, turns in enumerate(data["messages"], 1):
            yield f"row {number} of {split}", {"messages": turns}
        return
    for column in chosen:
        if column not in data.column_names:
            raise ValueError(
                f"{source} has no column {column!r}; its columns are "
                f"{', '.join(data.column_names)}: choose with prompt= and completion=, "
                "--prompt and --completion on the command line, or name the column of "
                "conversations messages"
            )
    pairs = zip(data[prompt], data[completion], strict=True)
    for number, (question, answer) in enumerate(pairs, 1):
        place = f"row {number} of {split}"
        yield place, {"prompt": question, "completion": answer}


def _download(dataset, config):
    try:
        return load_dataset(dataset, config)
    except OSError as error:
        raise OSError(
            f"the data set {dataset!r} cannot be had: {error}. Check the id and the "
            "network; without one, pass a folder or a .jsonl file on this machine"
        ) from error
    except (DatasetsError, ValueError, StopIteration) as error:
        # The outer error only says that there was one; StopIteration: an empty file.
        why = error.__cause__ or error
        raise ValueError(
            f"the data set {dataset!r} cannot be read: {str(why) or 'a file is empty'}"
        ) from error


def _reason(row) -> str | None:
    """The reason why a row cannot be used; None for a good row."""
    if isinstance(row, ValueError):
        return str(row)
    if not isinstance(row, dict):
        return f"not an object but {type(row).__name__}"
    if _is_conversation(row):
        return messages.reason(row["messages"])
    for key in PAIR:
        if key not in row:
            return f"no {key!r}; it has {', '.join(map(repr, row)) or 'no key'}"
        if not isinstance(row[key], str):
            return f"{key!r} is not text but {type(row[key]).__name__}"
        if not row[key].strip():
            return f"{key!r} is empty"
        if not is_unicode(row[key]):
            return f"{key!r} holds half a surrogate pair, which is no text"
    return None


def _is_conversation(names) -> bool:
    """Whether a row of these keys, a data set of these columns, holds conversations."""
    return "messages" in names and not all(name in names for name in PAIR)


def _columns_of(row) -> Example:
    """The columns of a good row, without its place."""
    if _is_conversation(row):
        return messages.columns(row["messages"])
    return {name: row[name] for name in PAIR}


def _contradiction(row, good) -> str | None:
    """The reason against a row with an earlier row's prompt and another completion."""
    earlier = good.get(messages.key(row), row)
    if earlier["completion"] == row["completion"]:
        return None
    return f"the prompt of {earlier['place']} with another completion"


def _require(groups, source) -> None:
    if len(groups) < MINIMUM:
        raise ValueError(
            f"{source} has {len(groups)} distinct prompts; at least {MINIMUM} are "
            "needed for a training, a validation and a test split; some hundred teach "
            "more. Prompts that differ in case, in spaces, or in what cannot be seen, "
            "count as one"
        )


def _groups(rows) -> list[list[Example]]:
    """The rows whose prompts are alike, together; the same whatever order they had.

    A conversation is with the shortest one that it goes on with.
    """
    asked, groups = {_alike(key) for key in rows}, {}
    for key in sorted(rows):
        shared = [each for each in messages.beginnings(_alike(key)) if each in asked]
        groups.setdefault(min(shared, key=len), []).append(rows[key])
    return list(groups.values())


def _alike(key: Key) -> Key:
    """What the keys of all rows share whose turns a reader would call the same."""
    return tuple((role, alike(content)) for role, content in key)


def _without(rows, others) -> dict[Key, Example]:
    """The rows with no prompt that is alike to one of the others.

    And no conversation that goes on with one of them, or that one of them goes on with.
    """
    taken = set(map(_alike, others))
    begun = {each for key in taken for each in messages.beginnings(key)}
    return {
        key: row
        for key, row in rows.items()
        if _alike(key) not in begun
        and taken.isdisjoint(messages.beginnings(_alike(key)))
    }


def _tenth(rows, seed) -> dict[Key, Example]:
    """A tenth of the rows to validate with."""
    groups = _groups(rows)
    drawn = _draw(groups, _share(groups, 10, 100), seed)
    return {messages.key(row): row for row in chain(*drawn)}


def _share(groups, part, most) -> int:
    return min(max(1, len(groups) // part), most)


def _draw(groups, n, seed) -> list[list[Example]]:
    """n of the groups, drawn and shuffled by the seed."""
    return Random(seed).sample(groups, n)
