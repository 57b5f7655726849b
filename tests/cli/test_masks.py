"""Laws of `train --show-masks`: what is marked is what is trained, and nothing is."""

import io
import json
import re
import sys

import pytest
from architectures import byte_tokenizer
from planting import each_is_caught, law

from peft_from_scratch.cli import commands, masks
from peft_from_scratch.cli.command_line import main
from peft_from_scratch.tasks import plain_text
from peft_from_scratch.tasks.task import load_task
from peft_from_scratch.tasks.templates import IGNORED, encode_rows
from peft_from_scratch.training import evaluation

TOKENIZER = byte_tokenizer()
CONTROL = plain_text.control_tokens(TOKENIZER, "chat")
CHAT = [
    ("system", "Be brief."),
    ("user", "Say\n\nit: <eos>\x1b[31m"),
    ("assistant", "it\n日本"),
    ("user", "again"),
    ("assistant", "<bos> it"),
]
TURNS = [{"role": role, "content": content} for role, content in CHAT]


class Stream(io.StringIO):
    """A stream with an encoding; a terminal or none."""

    def __init__(self, encoding, terminal=False):
        super().__init__()
        self.coded, self.terminal = encoding, terminal

    encoding = property(lambda self: self.coded)

    def isatty(self):
        return self.terminal


def row(turns=TURNS, template="chat"):
    return encode_rows(TOKENIZER, "", [{"messages": turns}], template=template)[0]


@law
def what_stands_between_the_marks_is_what_is_trained():
    for marks in (masks.PLAIN, masks.ASCII, masks.Marks("\x1b[4;32m", "\x1b[0m", "↵")):
        text = masks.marked(TOKENIZER, row(), CONTROL, marks)
        begin, end = re.escape(marks.begin), re.escape(marks.end)
        line = f"{marks.line_end}\n"
        assert re.findall(f"{begin}(.*?){end}", text, re.DOTALL) == [
            f"it{line}日本<eos>",
            "\\<bos> it<eos>",
        ]
        rest = re.sub(f"{begin}.*?{end}", "…", text, flags=re.DOTALL)
        assert rest == (
            f"<bos>system:Be brief.<eos>{line}<bos>user:Say{line}{line}it: \\<eos>"
            f"\\x1b[31m<eos>{line}<bos>assistant:…{line}"
            f"<bos>user:again<eos>{line}<bos>assistant:…"
        )


@law
def the_counts_are_those_of_the_row():
    for template in ("chat", "raw"):
        ids, labels = row(template=template)
        learned = sum(label != IGNORED for label in labels)
        assert masks.counted((ids, labels)) == (
            f"{len(ids)} tokens, {learned} trained, in 2 assistant turns"
        )
    assert masks.counted(row(TURNS[:3])).endswith("in 1 assistant turn")
    assert masks.counted(([1, 2, 3], [1, IGNORED, 3])) == (
        "3 tokens, 2 trained, in 2 assistant turns"
    )


@law
def the_marks_are_ones_that_the_stream_can_show(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for encoding, plain in (
        ("utf-8", masks.PLAIN),
        ("ascii", masks.ASCII),
        ("cp1252", masks.ASCII),
        (None, masks.ASCII),
    ):
        assert masks.marks_for(Stream(encoding)) == plain
        shown = masks.marks_for(Stream(encoding, terminal=True))
        assert shown == masks.Marks("\x1b[4;32m", "\x1b[0m", plain.line_end)
    monkeypatch.setenv("TERM", "dumb")
    assert masks.marks_for(Stream("utf-8", terminal=True)) == masks.PLAIN
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert masks.marks_for(Stream("utf-8", terminal=True)) == masks.PLAIN


def test_a_first_space_that_a_tokenizer_drops_alone_is_shown():
    """As SentencePiece decodes: a text begins without its space."""

    class Words:
        words = ("<s>", "▁a", "▁b", "▁c", "<e>")

        def decode(self, ids, **_):
            return "".join(self.words[i] for i in ids).replace("▁", " ").lstrip()

    row = [0, 1, 2, 3, 4], [IGNORED, IGNORED, 2, 3, 4]
    text = masks.marked(Words(), row, {"<s>": 0, "<e>": 4}, masks.PLAIN)
    assert text == "<s> a⟦ b c<e>⟧"


# The command


def conversations(n=30):
    return [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"it is {i}"},
                {"role": "user", "content": "again"},
                {"role": "assistant", "content": f"{i} again"},
            ]
        }
        for i in range(n)
    ]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def raising(*_, **__):
    raise AssertionError("something was trained or answered")


@pytest.mark.parametrize(("number", "shown"), [("2", 2), ("99", 21)])
def test_masks_are_shown_and_nothing_is_trained(
    number, shown, base, tmp_path, monkeypatch
):
    data, out = write(tmp_path / "rows.jsonl", conversations()), Stream("utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(commands, "train", raising)
        patch.setattr(evaluation, "answer_rows", raising)
        patch.setattr(sys, "stdout", out)
        patch.chdir(tmp_path)
        command = ["train", "--data", data, "--base", base, "--show-masks", number]
        assert main(command) == 0
    text = out.getvalue()
    rows = load_task(data).train
    encoded = encode_rows(TOKENIZER, "Be brief.", rows, template="chat")
    total = sum(len(ids) for ids, _ in encoded)
    learned = sum(label != IGNORED for _, labels in encoded for label in labels)
    sums = f"{total:,} tokens, {learned:,} trained ({100 * learned / total:.0f} %)"
    assert f"That was {shown} of 21 training rows. All of them: {sums}. No " in text
    places = re.findall(r"^(line \d+): (.*)", text, re.MULTILINE)
    assert (
        places
        == [
            (row["place"], masks.counted(one))
            for row, one in zip(rows, encoded, strict=True)
        ][:shown]
    )
    for row in rows.select(range(shown)):
        i = int(row["place"].removeprefix("line ")) - 1
        assert f"assistant:⟦it is {i}<eos>⟧↵\n" in text
        assert f"assistant:⟦{i} again<eos>⟧\n" in text
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_row_that_cannot_be_trained_is_named_and_no_mask_shown(
    base, tmp_path, capsys
):
    rows = conversations()
    rows[4]["messages"].pop()
    data = write(tmp_path / "rows.jsonl", rows)
    command = ["train", "--data", data, "--base", base, "--show-masks", "2"]
    assert main(command) == 1
    told = capsys.readouterr()
    assert "  line 5: the last turn is the user's" in told.err and not told.out
    rows = conversations()
    rows[4]["messages"][2]["content"] = "a <eos> inside"
    write(tmp_path / "rows.jsonl", rows)
    assert main(command) == 1
    told = capsys.readouterr()
    assert "  line 5: the completion 'a <eos> inside' holds the end" in told.err
    assert "tokens" not in told.out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "--out is missing: name a folder for the adapter"),
        (("--show-masks", "0"), "--show-masks=0: allowed is a whole number of rows fr"),
        (("--show-masks", "-1"), "--show-masks=-1: allowed is a whole number of rows"),
    ],
)
def test_what_is_missing_or_impossible_is_said_first(options, told, capsys):
    assert main(["train", "--data", "not even looked for", *options]) == 1
    assert told in capsys.readouterr().err


def test_conversations_are_trained_and_spoken_to_with_their_system_turn(
    base, tmp_path, capsys, monkeypatch
):
    data, out = write(tmp_path / "rows.jsonl", conversations()), tmp_path / "out"
    command = ["train", "--data", data, "--base", base, "--out", str(out)]
    assert main([*command, "--steps", "6", "--lr", "1e-2"]) == 0
    assert "on 6 test rows" in capsys.readouterr().out
    assert json.loads((out / "training.json").read_text())["instruction"] == "Be brief."
    monkeypatch.setattr("builtins.input", lambda _: "exit")
    assert main(["chat", "--base", base, "--adapter", str(out)]) == 0
    assert "template chat, instruction 'Be brief.'" in capsys.readouterr().out


MARKED, PIECES = masks.marked, masks._pieces
BUGS = {
    "marks around what is not trained": (
        MARKED,
        "if learned else text",
        "if not learned else text",
        what_stands_between_the_marks_is_what_is_trained,
    ),
    "marks off by one": (
        MARKED,
        "_pieces(tokenizer, ids, start, end, control)",
        "_pieces(tokenizer, ids, max(0, start - 1), end - 1, control)",
        what_stands_between_the_marks_is_what_is_trained,
    ),
    "line ends that are not seen": (
        MARKED,
        'f"{marks.line_end}\\n"',
        '"\\n"',
        what_stands_between_the_marks_is_what_is_trained,
    ),
    "control tokens left out": (
        PIECES,
        '"".join(names[i] for i in ids[start:after])',
        '""',
        what_stands_between_the_marks_is_what_is_trained,
    ),
    "letters that look like a control token": (
        masks._letters,
        'f"\\\\{token}"',
        "token",
        what_stands_between_the_marks_is_what_is_trained,
    ),
    "what a terminal obeys": (
        masks._letters,
        'UNSEEN.sub(lambda match: f"\\\\x{ord(match[0]):02x}", text)',
        "text",
        what_stands_between_the_marks_is_what_is_trained,
    ),
    "each stretch decoded alone": (
        masks._decoded,
        "if whole.startswith(before):",
        "if False:",
        test_a_first_space_that_a_tokenizer_drops_alone_is_shown,
    ),
    "tokens counted as turns": (
        masks.counted,
        "yes and not before",
        "yes",
        the_counts_are_those_of_the_row,
    ),
    "the first turn of a row that begins with it": (
        masks.counted,
        "[False, *learned]",
        "learned",
        the_counts_are_those_of_the_row,
    ),
    "signs that the encoding lacks": (
        masks.marks_for,
        "else ASCII",
        "else PLAIN",
        the_marks_are_ones_that_the_stream_can_show,
    ),
    "colors in a pipe": (
        masks.marks_for,
        "stream.isatty() and colors",
        "colors",
        the_marks_are_ones_that_the_stream_can_show,
    ),
    "colors where none are wanted": (
        masks.marks_for,
        '"NO_COLOR" not in os.environ',
        "True",
        the_marks_are_ones_that_the_stream_can_show,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS)
