"""What a training run would learn, to look at before it: `train --show-masks 3`.

A row is printed as the model reads it, from the tokens and back, with its control
tokens. What carries a loss is underlined in a terminal, and stands between ⟦ and ⟧ in a
pipe or a log; [[ and ]] where the encoding lacks these. Line ends are marked. A
backslash stands before letters that only spell a control token.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from typing import TextIO

from ..tasks import plain_text
from ..tasks.templates import IGNORED, Encoded, placed

UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a terminal would obey them


@dataclass(frozen=True)
class Marks:
    """What stands around trained tokens, and before a line end."""

    begin: str
    end: str
    line_end: str


PLAIN = Marks("⟦", "⟧", "↵")
ASCII = Marks("[[", "]]", "\\n")


def show(tokenizer, rows, encoded: Sequence[Encoded], n: int, template: str) -> None:
    """Print the first n rows with the trained tokens marked, and the sums over all.

    Args
        rows     of a task's split
        encoded  the same rows, as encode_rows makes them
    """
    marks = marks_for(sys.stdout)
    control = plain_text.control_tokens(tokenizer, template)
    print(
        f"{marks.begin}Trained tokens{marks.end} look like this. {marks.line_end} is a "
        "line end; a backslash stands before letters that only spell a control token."
    )
    for (place, _), row in islice(zip(placed(rows), encoded, strict=True), n):
        print(f"\n{place}: {counted(row)}")
        print(marked(tokenizer, row, control, marks))
    labels = [label for _, row in encoded for label in row]
    learned = sum(label != IGNORED for label in labels)
    print(
        f"\nThat was {min(n, len(encoded))} of {len(encoded)} training rows. All of "
        f"them: {len(labels):,} tokens, {learned:,} trained "
        f"({100 * learned / len(labels):.0f} %). No training was done."
    )


def marks_for(stream: TextIO) -> Marks:
    """Underlined green in a terminal; else signs that the stream's encoding has."""
    plain = PLAIN if _has(stream, "".join(vars(PLAIN).values())) else ASCII
    colors = "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    if stream.isatty() and colors:
        return Marks("\x1b[4;32m", "\x1b[0m", plain.line_end)
    return plain


def counted(row: Encoded) -> str:
    """How many tokens a row has, how many of them are trained, in how many turns."""
    ids, labels = row
    learned = [label != IGNORED for label in labels]
    turns = sum(yes and not before for before, yes in pairwise([False, *learned]))
    return (
        f"{len(ids)} tokens, {sum(learned)} trained, in {turns} assistant turn"
        f"{'' if turns == 1 else 's'}"
    )


def marked(tokenizer, row: Encoded, control: dict[str, int], marks: Marks) -> str:
    """The text of a row with marks around what is trained.

    Args
        control  {token: id} of the control tokens, which are not text
    """
    ids, labels = row
    parts, start = [], 0
    for learned, group in groupby(labels, key=lambda label: label != IGNORED):
        end = start + len(list(group))
        text = "".join(_pieces(tokenizer, ids, start, end, control))
        text = text.replace("\n", f"{marks.line_end}\n")
        parts.append(f"{marks.begin}{text}{marks.end}" if learned else text)
        start = end
    return "".join(parts)


def _pieces(tokenizer, ids, start, end, control) -> Iterator[str]:
    """The text of ids[start:end]: control tokens as they are, else letters."""
    names = {i: token for token, i in control.items()}
    is_control = [i in names for i in ids[start:end]]
    for yes, group in groupby(is_control):
        after = start + len(list(group))
        if yes:
            yield "".join(names[i] for i in ids[start:after])
        else:
            yield _letters(_decoded(tokenizer, ids, start, after), control)
        start = after


def _decoded(tokenizer, ids, start, end) -> str:
    """The text that these tokens add: alone, some tokenizers drop their first space."""
    before, whole = _decode(tokenizer, ids[:start]), _decode(tokenizer, ids[:end])
    if whole.startswith(before):
        return whole[len(before) :]
    return _decode(tokenizer, ids[start:end])


def _decode(tokenizer, ids) -> str:
    return tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def _letters(text, control) -> str:
    """Text with unseen characters escaped, and what only spells a control token."""
    text = UNSEEN.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
    return plain_text.replaced(text, {token: f"\\{token}" for token in control})


def _has(stream: TextIO, signs: str) -> bool:
    """Whether the stream's encoding can write these."""
    try:
        signs.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
