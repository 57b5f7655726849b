"""Output that is not UTF-8: every command ends well, with ? for what is lacking."""

import io
import json
import sys

from invented_comparisons import comparison
from planting import each_is_caught, law

from peft_from_scratch.cli import command_line, doctor
from peft_from_scratch.cli.command_line import main
from peft_from_scratch.comparison import compare, estimate
from peft_from_scratch.ledger import verdicts
from peft_from_scratch.models import wheels

ENCODINGS = ("ascii", "cp1252", "cp437", "iso8859-2")
STRANGE = "é → … ✓ 日本 \u2028 🙂"


def said(command, encoding, monkeypatch, *, errors="strict", lines=()):
    """(exit status, output, errors) of a command whose streams have this encoding."""
    streams = {
        name: io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
        for name in ("stdout", "stderr")
    }
    stdin = io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        try:
            status = main(command)
        except SystemExit as end:  # argparse's
            status = end.code
    for stream in streams.values():
        stream.flush()
    said = (stream.buffer.getvalue() for stream in streams.values())
    return status, *(text.decode(encoding, "surrogateescape") for text in said)


def assert_said_in(encodings, command, status, monkeypatch, **more):
    """The output is what UTF-8 has, with ? for each letter that the encoding lacks."""
    ended, *wanted = said(command, "utf-8", monkeypatch, **more)
    assert ended == status
    for encoding in encodings:
        ended, *got = said(command, encoding, monkeypatch, **more)
        assert ended == status
        assert got == [
            text.encode(encoding, "replace").decode(encoding) for text in wanted
        ]
    return wanted


@law
def what_an_encoding_lacks_is_replaced(monkeypatch):
    def told(*_, **options):
        print(STRANGE)
        print(STRANGE, file=sys.stderr)

    monkeypatch.setattr(doctor, "run", told)
    out, error = assert_said_in(ENCODINGS, ["doctor"], 0, monkeypatch)
    assert out == error == STRANGE + "\n"


@law
def an_error_is_a_sentence_in_every_encoding(monkeypatch):
    def fails(*_, **options):
        raise ValueError(STRANGE)

    monkeypatch.setattr(doctor, "run", fails)
    _, error = assert_said_in(ENCODINGS, ["doctor"], 1, monkeypatch)
    assert error == f"ValueError: {STRANGE}\n"


@law
def half_a_letter_is_replaced_in_utf8_as_well(monkeypatch):
    """A name of a file that is no UTF-8 comes as half surrogate pairs."""
    monkeypatch.setattr(doctor, "run", lambda: print("a\udce9\ud800b \ud800"))
    for encoding in ("utf-8", *ENCODINGS):
        ended, out, _ = said(["doctor"], encoding, monkeypatch)
        assert (ended, out) == (0, "a??b ?\n")


@law
def a_name_keeps_its_bytes_where_python_writes_them(monkeypatch):
    """In the C locale of Linux: surrogateescape, and no other letter is an error."""
    monkeypatch.setattr(doctor, "run", lambda: print("é日a\udce9\udcffb\ud800"))
    for encoding, other in (("ascii", "??"), ("iso8859-1", "é?")):
        ended, out, _ = said(
            ["doctor"], encoding, monkeypatch, errors="surrogateescape"
        )
        assert ended == 0
        wanted = other.encode("latin-1") + b"a\xe9\xffb?\n"
        assert out == wanted.decode(encoding, "surrogateescape")


def test_the_choice_of_who_runs_it_stays(monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda: print("é"))
    _, out, _ = said(["doctor"], "ascii", monkeypatch, errors="backslashreplace")
    assert out == "\\xe9\n"


def test_the_help_is_shown(monkeypatch):
    for command in ("doctor", "compare", "train", "chat", "merge", "ledger", "work"):
        assert_said_in(ENCODINGS, [command, "--help"], 0, monkeypatch)


def test_the_table_of_a_comparison_is_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "compare", lambda plan, tune: comparison())
    out, _ = assert_said_in(ENCODINGS, ["compare"], 0, monkeypatch)
    assert not out.isascii()


def test_the_ledger_and_the_doctor_are_shown(monkeypatch):
    rates = estimate.Rates(many=80e9, some=50e9, one=8e9)
    monkeypatch.setattr(estimate, "measured_rates", lambda device, dtype: rates)
    monkeypatch.setattr(doctor, "busy", list)  # how busy it is may change meanwhile
    assert_said_in(ENCODINGS, ["doctor"], doctor.run(), monkeypatch)
    monkeypatch.setattr(verdicts, "rows", verdicts.read)  # as shipped
    monkeypatch.setattr(wheels, "intact", lambda place, **options: True)
    claim = next(iter(verdicts.CLAIMS))
    assert_said_in(["ascii"], ["ledger", claim], 0, monkeypatch)


def test_a_chat_is_shown(base, monkeypatch):
    command = ["chat", "--base", base, "--system", STRANGE]
    lines = ["é", "", "日本", "exit"]
    out, _ = assert_said_in(["ascii"], command, 0, monkeypatch, lines=lines)
    assert out.count("you>") == 4


def test_a_train_says_where_it_is(base, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"say {i}", "completion": f"{i}"}) + "\n"
            for i in range(40)
        )
    )
    out = tmp_path / "été 日本"
    command = ["train", "--data", str(rows), "--base", base, "--out", str(out)]
    ended, told, error = said([*command, "--steps", "2"], "ascii", monkeypatch)
    assert ended == 0 and "?t? ??" in told and "Traceback" not in error
    assert (out / "training.json").exists()


BUGS = {
    "what an encoding lacks is an error": (
        command_line._replace_what_cannot_be_shown,
        '{"strict": "replace", ',
        "{",
        what_an_encoding_lacks_is_replaced,
    ),
    "errors are left out": (
        command_line._replace_what_cannot_be_shown,
        "(sys.stdout, sys.stderr)",
        "(sys.stdout,)",
        an_error_is_a_sentence_in_every_encoding,
    ),
    "half surrogate pairs are left out": (
        command_line._replace_what_cannot_be_shown,
        '{"strict": "replace", ',
        '{"strict": "surrogateescape", ',
        half_a_letter_is_replaced_in_utf8_as_well,
    ),
    "the bytes of names are lost": (
        command_line._replace_what_cannot_be_shown,
        '"surrogateescape": "bytes of names, else ?"',
        '"surrogateescape": "replace"',
        a_name_keeps_its_bytes_where_python_writes_them,
    ),
    "what Python writes as it is stays an error": (
        command_line._replace_what_cannot_be_shown,
        '"surrogateescape": "bytes of names, else ?"',
        '"none": ""',
        a_name_keeps_its_bytes_where_python_writes_them,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS, (AssertionError, UnicodeError))
