"""Your own rows as a task: a JSONL file, or any data set that `datasets` can load.

One row a line, {"prompt": "…", "completion": "…"}; other keys are left alone, empty
lines are skipped. A file with a bad row gives no task at all: every bad row is reported
with its line and the reason, so that nothing is trained on by accident.

The rows are cut into train, validation and test *by prompt*, so that no prompt is in
two of them. An answer is right when it equals the completion but for space around it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random

from datasets import load_dataset

LISTED = 20  # bad rows that an error spells out
MINIMUM = 20  # distinct prompts
Numbered = tuple[str, object]  # where the row stands, the row


def score(answer: str, completion: str) -> bool:
    return answer.strip() == completion.strip()


def read_jsonl(path: str, seed: int) -> dict[str, list[dict[str, str]]]:
    """The rows of a JSONL file in three splits: 70 % train, 10 % validation, 20 % test.

    Raises  ValueError  bad rows, or fewer than MINIMUM distinct prompts
            OSError     no such file
    """
    return split_rows(check_rows(_lines(path), path), seed, path)


def check_rows(numbered: Iterable[Numbered], source: str) -> dict[str, str]:
    """{prompt: completion} of rows that are all good; identical rows count once.

    Args
        numbered  (place, row); a row that could not be read is its ValueError
    Raises  ValueError  the first LISTED bad rows with place and reason, and how many
    """
    good, places, bad = {}, {}, []
    for place, row in numbered:
        reason = _reason(row) or _contradiction(row, good, places)
        if reason:
            bad.append(f"  {place}: {reason}")
        else:
            good[row["prompt"]] = row["completion"]
            places.setdefault(row["prompt"], place)
    if bad:
        more = [f"  … and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
        count = f"{len(bad)} bad row{'s' if len(bad) > 1 else ''}"
        raise ValueError("\n".join([f"{source} has {count}:", *bad[:LISTED], *more]))
    return good


def split_rows(rows: dict[str, str], seed: int, source: str) -> dict[str, list]:
    """Cut {prompt: completion} by prompt into train, validation and test.

    A tenth validates, a fifth tests (100 and 300 rows at most), the rest trains. Which
    prompt goes where depends on the seed and not on the order of the rows.
    """
    _require(rows, source)
    order = list(_draw(rows, len(rows), seed).items())
    test = min(len(rows) // 5, 300)
    held = test + min(len(rows) // 10, 100)
    return {
        "train": _as_rows(dict(order[held:])),
        "validation": _as_rows(dict(order[test:held])),
        "test": _as_rows(dict(order[:test])),
    }


def read_dataset(
    found: str, seed: int, prompt: str, completion: str, config: str | None = None
) -> dict[str, list[dict[str, str]]]:
    """The rows of a data set in three splits.

    A split "test" of the data set stays the test, with or without its "validation";
    prompts that are in it are taken out of the others. Without one, all rows are cut as
    a file's are.

    Args
        found       an id of the hub, or a folder
        prompt      the column that holds the prompts; completion likewise
        config      the configuration, for data sets that have several
    Raises  ValueError  a column that is not there; bad rows; too few rows
            OSError     no such data set, or no way to reach the hub
    """
    splits = _download(found, config)
    given = {
        name: check_rows(_columns(data, prompt, completion, found), f"{found} ({name})")
        for name, data in splits.items()
    }
    if not {"train", "test"} <= given.keys():
        pooled = {p: c for rows in given.values() for p, c in rows.items()}
        return split_rows(pooled, seed, found)
    train, test = given["train"], given["test"]
    held = given.get("validation") or _draw(train, min(len(train) // 10, 100), seed)
    held = {p: c for p, c in held.items() if p not in test}
    train = {p: c for p, c in train.items() if p not in test and p not in held}
    _require(train, f"{found} (train, without the prompts of the others)")
    splits = {"train": train, "validation": held, "test": test}
    return {name: _as_rows(rows) for name, rows in splits.items()}


def dataset_id(name: str) -> str | None:
    """The id after "hub:", or the path of a folder; None for any other name."""
    if name.startswith("hub:"):
        return name.removeprefix("hub:")
    return name if Path(name).is_dir() else None


def _lines(path) -> Iterable[Numbered]:
    """Each line's row, or the ValueError that says why there is none."""
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if line.strip():
            yield f"line {number}", _parse(line)


def _parse(line):
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 at byte {error.start + 1}")
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON: {error}")


def _columns(data, prompt, completion, source) -> Iterable[Numbered]:
    for column in (prompt, completion):
        if column not in data.column_names:
            raise ValueError(
                f"{source} has no column {column!r}; its columns are "
                f"{', '.join(data.column_names)}: choose with prompt=, completion="
            )
    pairs = zip(data[prompt], data[completion], strict=True)
    for number, (question, answer) in enumerate(pairs, 1):
        yield f"row {number}", {"prompt": question, "completion": answer}


def _download(found, config):
    try:
        splits = load_dataset(found, config)
    except OSError as error:
        raise OSError(
            f"the data set {found!r} cannot be had: {error}. Check the id and the "
            "network; without one, pass a folder or a .jsonl file on this machine"
        ) from error
    return splits


def _reason(row) -> str | None:
    """Why a row cannot be used; None where it can."""
    if isinstance(row, ValueError):
        return str(row)
    if not isinstance(row, dict):
        return f"not an object but {type(row).__name__}"
    for key in ("prompt", "completion"):
        if key not in row:
            return f"no {key!r}; it has {', '.join(map(repr, row)) or 'no key'}"
        if not isinstance(row[key], str):
            return f"{key!r} is not text but {type(row[key]).__name__}"
        if not row[key].strip():
            return f"{key!r} is empty"
        if not _is_unicode(row[key]):
            return f"{key!r} holds half a surrogate pair, which is no text"
    return None


def _is_unicode(text) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _contradiction(row, good, places) -> str | None:
    """Where the row asks what an earlier row asked, and answers otherwise."""
    if good.get(row["prompt"], row["completion"]) == row["completion"]:
        return None
    return f"the prompt of {places[row['prompt']]} with another completion"


def _require(rows, source) -> None:
    if len(rows) < MINIMUM:
        raise ValueError(
            f"{source} has {len(rows)} distinct prompts; at least {MINIMUM} are needed "
            "to cut out a validation and a test split"
        )


def _draw(rows, n, seed) -> dict[str, str]:
    """n of the rows, drawn and shuffled by the seed, whatever order they came in."""
    return {prompt: rows[prompt] for prompt in Random(seed).sample(sorted(rows), n)}


def _as_rows(rows) -> list[dict[str, str]]:
    return [{"prompt": p, "completion": c} for p, c in rows.items()]
