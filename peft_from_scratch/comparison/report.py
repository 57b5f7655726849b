"""A comparison as a table in the terminal, a picture, and a page to show a friend.

The page is one file: its figures are inside it, it loads nothing and runs nothing.
Model answers are untrusted text: what plotting/pages.py does keeps them harmless, and a
content security policy forbids the browser whatever might still get through.
"""

import json
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import resources
from pathlib import Path

from ..common import atomic
from ..plotting import pages
from . import background, figures, findings
from .advice import advice
from .apart import pair
from .columns import (
    ABSENT,
    LETTERS,
    Column,
    columns_of,
    exact_match,
    found,
    megabytes,
    percent,
)

LABEL = 26  # characters; longer names of methods are wrapped
READABLE = 100  # characters; longer lines of prose are wrapped
BRACKETED = 10  # methods of which each pair is shown with its interval
WIDE, NARROW = 6.5, 4.2  # inches; the figures' widths on a desk and on a phone
COMMAND = "make compare"


def write(result: dict, folder: Path) -> tuple[Path, Path, Path]:
    """Write compare.json, compare.png and compare.html; return their paths."""
    data, picture, document = (
        Path(folder) / f"compare.{kind}" for kind in ("json", "png", "html")
    )
    with atomic.new_file(data) as partial:
        text = json.dumps(result, indent=1, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")
    with atomic.new_file(picture) as partial:
        figures.quality_against_parameters(result).savefig(partial, dpi=200)
    with atomic.new_file(document) as partial:
        partial.write_text(page(result), encoding="utf-8")
    return data, picture, document


# The terminal ------------------------------------------------------------------------


def table(result: dict, width: int | None = None) -> str:
    """The table and what it says, as plain text.

    Columns that do not fit beside each other go to further blocks, a group of columns
    staying together wherever it can.

    Args
        width  characters a line; None takes the terminal's
    """
    width = width or shutil.get_terminal_size((READABLE, 24)).columns
    rows, columns = result["rows"], columns_of(result)
    blocks = [_block(rows, block) for block in _blocks(rows, columns, width)]
    prose = [_prose(*part, min(width, READABLE)) for part in _sections(result)]
    title = [f"{findings.headline(result)}\n{background.setting(result)}"]
    advised = [textwrap.fill(" ".join(advised_for(result)), min(width, READABLE))]
    return "\n\n".join([*title, *filter(None, advised), *blocks, *prose])


def advised_for(result: dict) -> list[str]:
    """The advice, where the rows are the user's own."""
    return advice(result) if result.get("data") else []


def _sections(result: dict) -> list[tuple[str, list[str]]]:
    """(heading, paragraphs) of what stands under the table."""
    settings = [f"{label}: {text}." for label, text in background.settings(result)]
    wall = result.get("wall") or {}
    parts = (
        ("What this run can tell", background.resolution(result)),
        ("Against few-shot prompting", findings.verdicts(result)),
        ("Of equal size, and in equal time", findings.views(result)),
        ("How sure this is", background.certainty(result)),
        ("Settings", settings + background.tuning(result)),
        (
            "Where the time went",
            [background.clock(result), *filter(None, [wall.get("sentence")])],
        ),
        ("Reading the columns", background.notes(result)),
    )
    return [(heading, text) for heading, text in parts if text]


def _prose(heading: str, paragraphs: list[str], width: int) -> str:
    lines = [
        textwrap.fill(text, width, initial_indent="  ", subsequent_indent="    ")
        for text in paragraphs
    ]
    return "\n".join([heading, *lines])


def _blocks(
    rows: list[dict], columns: Sequence[Column], width: int
) -> list[list[Column]]:
    """The columns, in as many blocks as the width asks for."""
    room = width - _label_width(rows)
    blocks: list[list[Column]] = [[]]
    for unit in _units(rows, columns, room):
        if blocks[-1] and sum(_widths(rows, blocks[-1] + unit)) > room:
            blocks.append([])
        blocks[-1].extend(unit)
    return blocks


def _units(
    rows: list[dict], columns: Sequence[Column], room: int
) -> Iterator[list[Column]]:
    """What must not be torn apart: a group; a column, where its group is too wide."""
    for group in grouped(columns).values():
        if sum(_widths(rows, group)) <= room:
            yield group
        else:
            yield from ([column] for column in group)


def grouped(columns: Sequence[Column]) -> dict[str, list[Column]]:
    """{group: its columns}, in the table's order."""
    groups: dict[str, list[Column]] = {}
    for column in columns:
        groups.setdefault(column.group, []).append(column)
    return groups


def _label_width(rows: list[dict]) -> int:
    return min(LABEL, max(len("Method"), *(len(row["label"]) for row in rows)))


def _widths(rows: list[dict], columns: list[Column]) -> list[int]:
    """Characters that each column takes, the gap before it included."""
    return [
        2 + max(len(text) for text in (c.name, c.unit, *(c.cell(row) for row in rows)))
        for c in columns
    ]


def _block(rows: list[dict], columns: list[Column]) -> str:
    first, widths = _label_width(rows), _widths(rows, columns)
    lines = [
        ("", _spanning(columns, widths)),
        ("Method", _aligned([column.name for column in columns], widths)),
        ("", _aligned([column.unit for column in columns], widths)),
    ]
    for row in rows:
        label, *more = textwrap.wrap(row["label"], LABEL)
        lines.append((label, _aligned([c.cell(row) for c in columns], widths)))
        lines.extend((f"  {part}", "") for part in more)
    return "\n".join(f"{label:<{first}}{rest}".rstrip() for label, rest in lines)


def _aligned(cells: list[str], widths: list[int]) -> str:
    return "".join(f"{c:>{width}}" for c, width in zip(cells, widths, strict=True))


def _spanning(columns: list[Column], widths: list[int]) -> str:
    """The names of the groups, each ruled over its columns."""
    spans: Counter[str] = Counter()
    for column, width in zip(columns, widths, strict=True):
        spans[column.group] += width
    return "".join(f"  {f' {group} ':─^{span - 2}}" for group, span in spans.items())


# The page ----------------------------------------------------------------------------


def page(result: dict) -> str:
    """The comparison as one HTML document that loads nothing from anywhere."""
    template = resources.files(__package__).joinpath("page.html")
    return pages.rendered(
        template.read_text(encoding="utf-8"),
        result=result,
        findings=findings,
        background=background,
        advised=advised_for(result),
        about=found(result, "data", "notes") or [],
        main_heads=_main_heads(result),
        main_rows=[(row["label"], _main_cells(row)) for row in result["rows"]],
        under_table=_under_table(result),
        matrix=_matrix(result),
        bracketed=BRACKETED,
        groups=grouped(columns_of(result)),
        marked=marked,
        pictures=_pictures(result),
        answers=sample_answers(result),
        origin=origin(result),
        command=result.get("command", COMMAND),
    )


# The three columns of the first screen: what a method reaches, what its training costs
# once, and what each answer costs from then on.


def _main_heads(result: dict) -> list[tuple[str, str]]:
    name = columns_of(result)[0].name
    lettered = any(row.get("letters") for row in result["rows"])
    return [
        (name, f"%{', letters' * lettered} [95\N{NO-BREAK SPACE}%]"),
        ("Training", "s, peak MB"),
        ("Answering", "s, decoding × base"),
    ]


def _main_cells(row: dict) -> list[dict]:
    """The value of each column, its letters where it has any, and the second line."""
    score, _, ends = exact_match(row).partition(" [")
    ratio, peak = found(row, "decode", "ratio"), found(row, "memory", "peak")
    training = ("none", "")
    if row.get("trainable"):
        training = (_seconds(row, "train"), f"{megabytes(peak)} MB")
    answering = (_seconds(row, "answer"), ABSENT if ratio is None else f"{ratio:.2f} ×")
    return [
        {"value": value, "more": more, "letters": letters}
        for value, more, letters in (
            (score, f"[{ends}" if ends else "", row.get("letters")),
            (*training, None),
            (*answering, None),
        )
    ]


def _seconds(row: dict, part: str) -> str:
    spent = found(row, "seconds", part)
    return ABSENT if spent is None else f"{spent:,.0f}"


def _under_table(result: dict) -> list[str]:
    """What must be read with the three columns."""
    lettered = [LETTERS] if result.get("pairs") else []
    return [*lettered, *background.resolution(result), background.clock(result)]


def _matrix(result: dict) -> list[tuple[str, list[dict | None]]]:
    """(label, a cell for every method) of each row; none where there are no pairs.

    Brackets are left out where they would make the table wider than the page.
    """
    rows = result["rows"] if result.get("pairs") else []

    def cells(row):
        return [_pair_cell(row, pair(result, row["key"], o["key"])) for o in rows]

    matrix = [(row["label"], cells(row)) for row in rows]
    if len(rows) > BRACKETED:
        for cell in filter(None, (cell for _, row in matrix for cell in row)):
            cell["more"] = ""
    return matrix


def _pair_cell(row: dict, compared: dict | None) -> dict | None:
    if compared is None:
        return None
    value, low, high = (
        percent(row, compared[name], "+") for name in ("difference", "low", "high")
    )
    return {"value": value, "more": f"[{low}, {high}]", "apart": compared["apart"]}


def marked(score: float) -> str:
    """A sample's score in words: right, wrong, or a number between."""
    return {1: "✓ right", 0: "✗ wrong"}.get(score, f"{score:.2f}")


def sample_answers(result: dict) -> list[dict]:
    """The sampled test rows, each with its different answers and who gave them."""
    shown: dict[tuple, dict[tuple, list[str]]] = {}
    for row in result["rows"]:
        for sample in row.get("samples") or []:
            given = shown.setdefault((sample["prompt"], sample["expected"]), {})
            answer = sample["answer"], sample["correct"]
            given.setdefault(answer, []).append(row["label"])
    return [
        {"prompt": prompt, "expected": expected, "given": given}
        for (prompt, expected), given in shown.items()
    ]


def origin(result: dict) -> list[tuple[str, str]]:
    """(name, value) of what a reader needs to judge or repeat the comparison."""
    origin_of = result["provenance"]
    packages = origin_of.get("packages") or {}
    commit = origin_of.get("commit")
    if commit and origin_of.get("changed"):
        commit += ", with uncommitted changes"
    entries = {
        "Made": origin_of.get("when"),
        "Command": result.get("command", COMMAND),
        "Commit": commit,
        "Base model": result["base_name"],
        "Seeds": ", ".join(map(str, result["seeds"])),
        "Number format": result["dtype"],
        "Device": origin_of.get("device") or result["device"],
        "Machine": origin_of.get("machine"),
        "Threads": origin_of.get("threads"),
        "System": origin_of.get("platform"),
        "Python": origin_of.get("python"),
        "Packages": ", ".join(f"{name} {number}" for name, number in packages.items()),
    }
    return [(name, str(value or ABSENT)) for name, value in entries.items()]


def _pictures(result: dict) -> list[dict]:
    """Each figure for wide and narrow, light and dark screens, as data URIs."""
    drawn = (
        (figures.quality_against_parameters, findings.quality_in_words),
        (figures.memory_by_kind, findings.memory_in_words),
    )
    if len(findings.loss_by_second(result)) > 1:
        drawn += ((figures.loss_against_seconds, findings.loss_in_words),)
    return [
        {"alt": in_words(result)} | pages.in_four(partial(draw, result), WIDE, NARROW)
        for draw, in_words in drawn
    ]
