"""The ledger as a page: all of it is there, and it is that of the ledger's file."""

import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from figure_overlaps import assert_apart

from peft_from_scratch.cli.command_line import main
from peft_from_scratch.ledger import history, page, planned, verdicts
from peft_from_scratch.ledger.claim import VERDICTS
from peft_from_scratch.plotting.theme import LIGHT
from tools import ledger_page

STALE = "the ledger changed: python -m tools.ledger_page makes the page anew"
LIMIT = 600_000  # bytes of the page in docs/ with its pictures


@pytest.fixture(scope="module")
def whole():
    return ledger_page.account()


@pytest.fixture(scope="module")
def entries(whole):
    return {entry.id: entry for group in whole.groups.values() for entry in group}


@pytest.fixture(scope="module")
def document(whole):
    return page.html(whole)


def test_the_page_in_docs_is_that_of_the_ledger(whole):
    assert ledger_page.PAGE.read_text("utf-8") == ledger_page.text(whole), STALE
    drawn = ledger_page.pictures(whole)
    files = {file.stem: file for file in ledger_page.PICTURES.iterdir()}
    assert set(files) == set(drawn), STALE
    for id, svg in drawn.items():
        assert files[id].read_text("utf-8") == svg, (id, STALE)
    size = sum(file.stat().st_size for file in [ledger_page.PAGE, *files.values()])
    assert size < LIMIT


def test_every_link_of_the_page_in_docs_leads_somewhere():
    text = ledger_page.PAGE.read_text("utf-8")
    headings = {line[4:].lower() for line in text.splitlines() if line[:4] == "### "}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings
        else:
            assert (ledger_page.PAGE.parent / target).exists(), target


def test_every_claim_stands_once_and_the_newer_ones_apart(whole, entries):
    ids = [entry.id for group in whole.groups.values() for entry in group]
    assert len(ids) == len(set(ids))
    assert set(ids) == {*verdicts.CLAIMS, *(each.id for each in planned.PLANNED)}
    chapter, newer = whole.groups.values()
    assert {"F1", "L1", "Q4b", "C1"} <= {entry.id for entry in chapter}
    assert {"K1", "K2", "X1", "Y2", "Y3", "X6"} <= {entry.id for entry in newer}
    assert all(entry.source == page.CHAPTER for entry in chapter)
    assert all(re.search("arXiv:|ours|Machines", entry.source) for entry in newer)
    assert not [entry for entry in chapter if entry.id[0] in "KXY"]


def test_the_score_counts_every_claim(whole, entries):
    counted = Counter(entry.kind for entry in entries.values())
    assert set(counted) <= set(page.SCORE) == set(VERDICTS)
    assert whole.score.startswith(f"Of {len(entries)} claims, {counted['holds']} hold")
    for kind, (one, more, _) in page.SCORE.items():
        words = one if counted[kind] == 1 else more
        assert f" {counted[kind]} {words}" in whole.score
        assert len(whole.ids[kind]) == counted[kind]
    decided = sum(counted[kind] for kind in verdicts.OF_BANDS)
    assert f"{decided} of {len(entries)} claims are decided" in whole.chance


def test_a_claim_is_told_as_its_row_has_it(entries):
    for row in verdicts.read():
        entry, details = entries[row["id"]], dict(entries[row["id"]].details)
        assert (entry.kind, entry.so) == (row["verdict"], row["so"] or "")
        assert entry.verdict.startswith(row["verdict"])
        assert details["Rule hash"] == row["rule_hash"]
        assert details["Rule"].startswith(row["rule"][:1].upper() + row["rule"][1:20])
        assert ("Say instead" in details) == bool(row["say_instead"])
        assert (entry.picture() is None) == (row["interval"] is None)
        assert bool(entry.more) == (row["verdict"] == "undecided")
        if row["runs"]:
            assert details["Runs"].startswith(f"{len(row['runs'])},")
        assert entry.lesson[1].startswith(f"notebooks/{row['notebook']}_")
    for entry in history.read(verdicts.FILE):
        past = " ".join(entries[entry["id"]].past)
        assert entry["verdict"] in past and entry["rule_hash"] in past


def test_no_gap_is_left_in_a_text(whole, document):
    for text in (document, ledger_page.text(whole)):
        visible = re.sub(r"data:[^\"]*", "", text)
        assert "None" not in re.sub(r"None of", "", visible)
        assert "{" not in visible.partition("</style>")[2]


class _Shown(HTMLParser):
    """What a page loads, links to and names."""

    def __init__(self, document):
        super().__init__()
        self.tags, self.ids, self.loaded, self.links, self.alts = [], [], [], [], []
        self.feed(document)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []
        self.loaded += [values[name] for name in ("src", "srcset") if name in values]
        self.alts += [values["alt"]] if tag == "img" else []


def test_the_page_loads_nothing_and_its_links_lead_somewhere(document, entries):
    shown = _Shown(document)
    assert "script" not in shown.tags and shown.tags.count("h1") == 1
    assert shown.loaded and all(u.startswith("data:image/svg") for u in shown.loaded)
    assert len(shown.ids) == len(set(shown.ids)) and set(shown.ids) == set(entries)
    for target in shown.links:
        if target.startswith("#"):
            assert target[1:] in entries
        else:
            assert target.startswith("../")  # from out/
            assert (page.ROOT / target[3:]).exists(), target
    assert all(alt.startswith("Number line of") for alt in shown.alts)
    assert len(shown.alts) == sum(e.picture() is not None for e in entries.values())


def test_a_verdict_is_told_by_more_than_its_color(document):
    signs = [sign for *_, sign in page.SCORE.values()]
    assert len(set(signs)) == len(signs)
    for kind, (*_, sign) in page.SCORE.items():
        words = f'class="k-{kind.replace(" ", "-")}">{sign} {kind}'
        assert words in document, kind


@pytest.mark.parametrize("width", [page.INCHES_WIDE, page.NARROW])
def test_no_number_line_writes_one_name_over_another(entries, width):
    for entry in entries.values():
        if (figure := entry.picture(LIGHT, width)) is not None:
            assert_apart(figure)


def test_a_claim_without_a_row_is_not_run_yet():
    whole = page.account([], [])
    entries = [entry for group in whole.groups.values() for entry in group]
    assert {entry.kind for entry in entries} == {"not run yet"}
    assert {entry.id for entry in entries} >= set(verdicts.CLAIMS)


def test_a_planned_claim_has_no_experiment_and_stands_once():
    """It leaves planned.py when its experiment comes."""
    ids = [each.id for each in planned.PLANNED]
    assert len(ids) == len(set(ids))
    both = set(ids) & set(verdicts.CLAIMS)
    assert not both, f"{both} have experiments: take them out of ledger/planned.py"
    for each in planned.PLANNED:
        verdicts.order(each)  # an id is a letter, a number and perhaps a half
        assert page._lesson(each.notebook)[0].startswith(f"Lesson {each.notebook}, ")


def test_the_source_of_a_claim_changes_no_rule():
    stored = {row["id"]: row["rule_hash"] for row in verdicts.read()}
    sourced = [claim for claim in verdicts.CLAIMS.values() if claim.source]
    assert sourced
    for claim in sourced:
        assert claim.rule_hash == stored[claim.id]


def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verdicts, "rows", verdicts.read)
    monkeypatch.chdir(tmp_path)
    assert main(["ledger", "L4", "--page"]) == 0
    assert f"the page: {tmp_path / page.FILE}" in capsys.readouterr().out
    whole = ledger_page.account()
    assert (tmp_path / "out" / "ledger.html").read_text("utf-8") == page.html(whole)
