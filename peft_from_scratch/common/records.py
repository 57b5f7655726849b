"""Records: JSON that a run, an editor or a stranger left on the disk.

A record that cannot be read is an error that names its file, never an empty record:
what it said would be lost in silence. JSON of two meanings is refused as well: of a key
that stands twice, Python's parser keeps the second and says nothing. A byte order mark,
which editors on Windows write before the text, changes nothing and is skipped.
"""

import json
from pathlib import Path


class _Ambiguous(ValueError):
    """JSON that two parsers may read in two ways."""


def read_object(path: Path) -> dict:
    """The object that a JSON file holds.

    Raises  ValueError  the file is no UTF-8, no JSON, ambiguous or no object
            OSError     it cannot be opened
    """
    value = read(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not an object but {type(value).__name__}")
    return value


def read(path: Path) -> object:
    """The value that a JSON file holds; the errors are those of read_object."""
    try:
        return parse(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from None


def parse(content: bytes | str) -> object:
    """The value of a JSON text.

    Raises  ValueError  what the text is: "not UTF-8 …", "not JSON: …", "ambiguous: …"
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        return json.loads(text, object_pairs_hook=unique)
    except _Ambiguous:
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def unique(pairs: list[tuple[str, object]]) -> dict:
    """The object of these pairs; ValueError for a key that stands twice."""
    entries: dict[str, object] = {}
    for key, value in pairs:
        if key in entries:
            raise _Ambiguous(f"ambiguous: the key {key!r} stands twice in one object")
        entries[key] = value
    return entries
