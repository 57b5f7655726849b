"""Laws of records: as they stand or refused by name; and planted bugs."""

import json

import pytest
from planting import each_is_caught, law

from peft_from_scratch.common import records
from peft_from_scratch.comparison import tuning
from peft_from_scratch.course import cards
from peft_from_scratch.ledger import verdicts
from peft_from_scratch.models.load import load_model
from peft_from_scratch.training import checkpoint, evaluation

MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark
RECORD = {"instruction": "Réponds.", "recipe": {"template": "raw", "lr": 1e-3}}

# content of a file: what its error says of it
BROKEN = {
    b"": "not JSON: Expecting value",
    b'{"a": 1': "not JSON: Expecting ',' delimiter",
    b"[" * 100_000: "not JSON: ",
    b"9" * 5_000: "not JSON: ",
    b'{"a": "\xe9"}': "not UTF-8 at byte 8",
    json.dumps(RECORD).encode("utf-16"): "not UTF-8 at byte 1",
    b'{"a": 1, "a": 2}': "ambiguous: the key 'a' stands twice in one object",
    b'{"b": [{"a": 1, "a": 1}]}': "ambiguous: the key 'a' stands twice in one object",
    b"[1]": "not an object but list",
    b"null": "not an object but NoneType",
    MARK + b'"text"': "not an object but str",
}


@law
def a_record_is_read_as_it_stands(folder):
    for mark in (b"", MARK):
        for ascii in (True, False):
            content = json.dumps(RECORD, indent=1, ensure_ascii=ascii)
            for text in (content, content.replace("\n", "\r\n")):
                (folder / "it.json").write_bytes(mark + text.encode())
                assert records.read_object(folder / "it.json") == RECORD


@law
def a_broken_record_is_refused_by_name(folder):
    for content, reason in BROKEN.items():
        file = folder / "it.json"
        file.write_bytes(content)
        with pytest.raises(ValueError) as refused:
            records.read_object(file)
        assert str(refused.value).startswith(f"{file} is {reason}")


def test_every_reader_of_a_record_names_its_file(tmp_path):
    """All that a run or an editor leaves: searches, the ledger, cost cards, answers."""
    readers = {
        "tuning.json": tuning.read,
        "ledger.json": verdicts.read,
        "cards.json": cards.read,
        "answers.json": evaluation._read_answers,
        "state.json": lambda file: checkpoint._read(file.parent),
        "adapter_config.json": lambda file: load_model(str(file.parent)),
    }
    for name, read in readers.items():
        file = tmp_path / name
        for content in (b'{"a": 1', b'{"a": 1, "a": 2}', b'{"a": "\xe9"}'):
            file.write_bytes(content)
            reason = BROKEN.get(content, "not UTF-8")
            with pytest.raises(ValueError, match=f"{name} is {reason}"):
                read(file)


def test_a_record_that_is_not_there_is_another_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        records.read_object(tmp_path / "it.json")


BUGS = {
    "a byte order mark is an error": (
        records.parse,
        "utf-8-sig",
        "utf-8",
        a_record_is_read_as_it_stands,
    ),
    "the second of two keys wins": (
        records.parse,
        ", object_pairs_hook=unique",
        "",
        a_broken_record_is_refused_by_name,
    ),
    "a list is a record": (
        records.read_object,
        "if not isinstance(value, dict):",
        "if False:",
        a_broken_record_is_refused_by_name,
    ),
    "depth is no error of ours": (
        records.parse,
        "except (ValueError, RecursionError) as error:",
        "except ValueError as error:",
        a_broken_record_is_refused_by_name,
    ),
    "an error without the file": (
        records.read,
        'f"{path} is {error}"',
        'f"{error}"',
        a_broken_record_is_refused_by_name,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(
    BUGS, (AssertionError, ValueError, RecursionError, pytest.fail.Exception)
)
