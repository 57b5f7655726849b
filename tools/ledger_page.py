"""docs/ledger.md: the ledger as a page, made from its file and never typed.

    python -m tools.ledger_page     writes it, and a number line for each claim

The content is that of `python -m peft_from_scratch ledger --page`. A test holds page
and pictures to data/ledger.json and data/ledger_history.json.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from peft_from_scratch.common import atomic
from peft_from_scratch.common.marks import markdown
from peft_from_scratch.common.provenance import ROOT
from peft_from_scratch.ledger import history, page, verdicts
from peft_from_scratch.ledger.page import SCORE, Account, Entry
from peft_from_scratch.plotting.theme import svg

PAGE = ROOT / "docs" / "ledger.md"
PICTURES = PAGE.with_suffix("")
MADE = "<!-- made by `python -m tools.ledger_page`; not edited by hand -->"


def account() -> Account:
    """What the shipped ledger says."""
    return page.account(verdicts.read(), history.read(verdicts.FILE))


def text(whole: Account) -> str:
    """The page in GitHub's Markdown."""
    blocks = [
        "# The claims ledger",
        MADE,
        f"{whole.about} {whole.score} {whole.chance}",
        _index(whole),
    ]
    for title, entries in whole.groups.items():
        blocks.append(f"## {title}")
        for entry in entries:
            blocks += _blocks(entry, whole)
    return "\n\n".join(blocks) + "\n"


def pictures(whole: Account) -> dict[str, str]:
    """{id: SVG} of every claim that has a number line."""
    entries = (entry for entries in whole.groups.values() for entry in entries)
    return {
        entry.id: svg(figure, small=True)
        for entry in entries
        if (figure := entry.picture()) is not None
    }


def _index(whole: Account) -> str:
    lines = [
        (f"{SCORE[kind][-1]} {kind}", " ".join(f"[{id}](#{id.lower()})" for id in ids))
        for kind, ids in whole.ids.items()
        if ids
    ]
    return markdown(("verdict", "claims"), lines)


def _blocks(entry: Entry, whole: Account) -> Iterator[str]:
    """A claim, block by block."""
    where = f" (measured on {entry.where})" if entry.where else ""
    yield f"### {entry.id}"
    yield f"**{entry.statement}.** {entry.sign} **{entry.verdict}**{where}"
    if entry.picture() is not None:
        yield f"![{entry.alt}]({PICTURES.name}/{entry.id}.svg)"
    if entry.number:
        yield entry.number
    if entry.so:
        yield f"**So:** {entry.so}"
    if entry.more:
        yield entry.more
    if entry.details:
        lines = [f"- {name}: {words}" for name, words in entry.details]
        yield _folded("What to say instead, the rule, seeds and runs", lines)
    if entry.past:
        lines = [f"- {words}" for words in (*entry.past, whole.old_words) if words]
        yield _folded(f"Verdicts under former rules: {len(entry.past)}", lines)
    lesson, path = entry.lesson
    link = f"[{lesson}](../{path})" if path else f"{lesson}, to be written"
    yield f"{link}. Source: {entry.source}."


def _folded(title: str, lines: list[str]) -> str:
    inside = "\n".join(lines)
    return f"<details><summary>{title}</summary>\n\n{inside}\n\n</details>"


def write(file: Path = PAGE) -> None:
    """The page and its pictures, from the shipped ledger."""
    whole = account()
    folder = file.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    files = {folder / f"{id}.svg": drawn for id, drawn in pictures(whole).items()}
    for path, content in {**files, file: text(whole)}.items():
        with atomic.new_file(path) as partial:
            partial.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    write()
