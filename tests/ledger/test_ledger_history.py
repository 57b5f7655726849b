"""What becomes of a verdict whose rule, or whose runs, were meddled with."""

import pytest
from planting import assert_caught, law

from peft_from_scratch.cli.command_line import main
from peft_from_scratch.ledger import history, runs
from peft_from_scratch.ledger import verdicts as ledger
from peft_from_scratch.ledger.experiments import counting


def row(rule_hash="aa", verdict="holds", id="Z1", value=1.0):
    return {
        "id": id,
        "rule": f"the rule {rule_hash}",
        "rule_hash": rule_hash,
        "scale": "tiny",
        "measured": value,
        "interval": [value, value],
        "seeds": [0, 1],
        "verdict": verdict,
        "condition": None,
    }


@law
def the_old_verdict_of_a_replaced_rule_is_kept(tmp_path):
    file = tmp_path / "ledger.json"
    ledger.write([row("aa"), row("zz", id="Z2")], file)
    assert history.read(file) == []
    ledger.write([row("aa", value=2.0), row("zz", id="Z2")], file)  # runs, no rule
    assert history.read(file) == []
    ledger.write([row("bb", "undecided"), row("zz", id="Z2")], file)
    ledger.write([row("cc"), row("zz", id="Z2")], file)
    entries = history.read(file)
    assert len(entries) == 2
    first, second = entries
    assert (first["id"], first["rule_hash"], first["replaced_by"]) == ("Z1", "aa", "bb")
    assert (first["verdict"], first["measured"]) == ("holds", 2.0)
    assert first["rule"] == "the rule aa" and first["interval"] == [2.0, 2.0]
    assert (second["rule_hash"], second["replaced_by"]) == ("bb", "cc")
    assert second["verdict"] == "undecided"
    assert list(first) == ["id", "until", "replaced_by", *history.KEPT]


@pytest.mark.parametrize(
    ("function", "right", "wrong"),
    [
        (ledger.write, "history.replaced(before, rows)", "[]"),
        (history.replaced, "for row in before", "for row in now"),
        (history.append, "[*entries_before, *new]", "[*new]"),
    ],
)
def test_a_planted_loss_of_a_verdict_is_caught(function, right, wrong, tmp_path):
    folders = iter(range(9))

    def with_a_folder():
        the_old_verdict_of_a_replaced_rule_is_kept(tmp_path / str(next(folders)))

    assert_caught(function, right, wrong, with_a_folder)


def test_a_rule_without_a_verdict_leaves_no_entry():
    before = [row("aa", "not run yet"), row("bb", id="Z2")]
    assert history.replaced(before, [row("cc"), row("bb", id="Z2")]) == []
    assert history.replaced([row("aa")], []) == []  # the claim is gone


def test_the_same_change_is_written_once(tmp_path):
    """A write that was broken off between the two files is made again."""
    file = tmp_path / "ledger.json"
    for _ in range(2):
        history.append(history.replaced([row("aa")], [row("bb")]), file)
    assert len(history.read(file)) == 1


def test_the_shipped_history_is_of_claims_and_in_order():
    entries = history.read(ledger.FILE)
    assert entries and {entry["id"] for entry in entries} <= set(ledger.CLAIMS)
    days = [entry["until"] for entry in entries]
    assert days == sorted(days)
    assert all(entry["rule_hash"] != entry["replaced_by"] for entry in entries)
    assert all(entry["verdict"] != "not run yet" for entry in entries)


# ------------------------------------------------------------------ Rules and runs


@pytest.fixture
def own_ledger(tmp_path, monkeypatch):
    """A ledger's file for a test to write; of T1 alone, which is quick."""
    monkeypatch.setattr(ledger, "CLAIMS", {"T1": ledger.claim("T1")}, raising=False)
    monkeypatch.setattr(ledger, "FILE", tmp_path / "ledger.json")
    return tmp_path / "ledger.json"


def test_a_rule_that_was_edited_after_its_runs_is_named(
    own_ledger, capsys, monkeypatch
):
    """A constant of the rule is another one than when the runs were judged."""
    for _ in range(2):
        assert main(["ledger", "T1"]) == 0
    assert "its rule is not the one" not in capsys.readouterr().out
    (before,) = ledger.read()
    monkeypatch.setitem(counting.BOUNDS, "prefix", 100)
    edited = ledger.claim("T1").rule_hash
    assert edited != before["rule_hash"]
    assert main(["ledger", "T1"]) == 0
    shown = capsys.readouterr().out
    assert f"(hash {before['rule_hash']}, now {edited})" in shown
    assert "T1: its rule" in shown and "commit the rule before its runs" in shown
    (entry,) = history.read(own_ledger)
    assert (entry["rule_hash"], entry["replaced_by"]) == (before["rule_hash"], edited)
    assert entry["measured"] == before["measured"] != ledger.read()[0]["measured"]
    assert main(["ledger", "T1"]) == 0  # it is said once: the file has the new rule
    assert "its rule is not the one" not in capsys.readouterr().out


def test_results_that_are_exchanged_between_arms_change_the_verdict(
    tmp_path, monkeypatch
):
    """K2: runs with one rounding get the results of those with two, and back."""
    claim, other = ledger.claim("K2"), {"once": "twice", "twice": "once"}
    configs = claim.configs("tiny")
    assert {config["way"] for config in configs} >= set(other)
    swapped = [
        (config, runs.stored(config | {"way": other.get(way, way)}).result)
        for config in configs
        for way in [config["way"]]
    ]
    before = ledger.judge(claim, "tiny")
    monkeypatch.setattr(runs, "FOLDER", tmp_path)
    for config, result in swapped:
        runs.write(config, result)
    after = ledger.judge(claim, "tiny")
    assert before.verdict == "holds when"
    assert after.verdict != before.verdict
