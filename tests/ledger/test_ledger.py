"""Verdicts are computed: rules that partition the line, rows that follow from runs."""

import bisect
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planting import assert_caught, law

from peft_from_scratch.cli import command_line
from peft_from_scratch.cli.command_line import main
from peft_from_scratch.ledger import experiments, runs
from peft_from_scratch.ledger import verdicts as ledger
from peft_from_scratch.ledger.claim import (
    OF_BANDS,
    VERDICTS,
    Claim,
    Invalid,
    Measured,
    Rule,
)

FIELDS = (
    "id notebook statement rule rule_hash scale measured interval seeds verdict "
    "condition so say_instead runs scales"
).split()
RULE = Rule("the rank", "%", ("holds", "holds when", "does not hold here"), (10, 30))
finite = st.floats(-1e6, 1e6)
edges = st.lists(finite, min_size=1, max_size=4, unique=True).map(sorted)


# ------------------------------------------------------------------------- Rules


def rule_with(edges):
    return Rule("w", "%", tuple(OF_BANDS[i % 4] for i in range(len(edges) + 1)), edges)


@given(edges, finite)
def test_every_value_is_in_exactly_one_band(edges, value):
    rule = rule_with(tuple(edges))
    ends = [float("-inf"), *edges, float("inf")]
    holding = [i for i in range(len(ends) - 1) if ends[i] < value <= ends[i + 1]]
    assert holding == [rule.band(value)]
    assert rule.verdict(value, value, value) == rule.verdicts[holding[0]]


@law
@given(edges, st.lists(finite, min_size=3, max_size=3).map(sorted))
def an_interval_decides_only_where_one_verdict_holds_all_of_it(edges, points):
    rule = rule_with(tuple(edges))
    low, value, high = points
    touched = range(bisect.bisect_left(edges, low), bisect.bisect_left(edges, high) + 1)
    verdicts = {rule.verdicts[i] for i in touched}
    expected = verdicts.pop() if len(verdicts) == 1 else "undecided"
    assert rule.verdict(value, low, high) == expected


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("self.band(low)", "self.band(value)"), ("self.band(high)", "self.band(value)")],
)
def test_a_planted_verdict_of_the_mean_alone_is_caught(right, wrong):
    assert_caught(
        Rule.verdict,
        right,
        wrong,
        an_interval_decides_only_where_one_verdict_holds_all_of_it,
    )


def test_examples_of_verdicts():
    assert RULE.verdict(5, 1, 10) == "holds"
    assert RULE.verdict(5, 1, 10.1) == "undecided"
    assert RULE.verdict(20, 10.1, 30) == "holds when"
    assert RULE.verdict(31, 30.1, 99) == "does not hold here"
    assert RULE.verdict(20, 5, 40) == "undecided"
    outside = Rule(
        "w", "", ("does not hold here", "holds", "does not hold here"), (1, 2)
    )
    assert outside.verdict(1.5, 0, 3) == "undecided"


@pytest.mark.parametrize(
    ("verdicts", "edges"),
    [
        (("holds", "does not hold here"), (1, 2)),
        (("holds", "does not hold here"), (float("nan"),)),
        (("holds", "does not hold here"), (float("inf"),)),
        (("holds", "does not hold here", "holds"), (2, 1)),
        (("holds", "does not hold here", "holds"), (1, 1)),
        (("holds", "undecided"), (1,)),
        (("holds", "true"), (1,)),
    ],
)
def test_a_rule_with_a_gap_an_overlap_or_another_verdict_is_refused(verdicts, edges):
    with pytest.raises(ValueError, match=r"edges=|is no verdict"):
        Rule("w", "%", verdicts, edges)


@pytest.mark.parametrize(
    "three", [(1, 2, 3), (4, 2, 3), (float("nan"), 0, 1), (1, 0, float("inf"))]
)
def test_an_interval_that_is_none_is_refused(three):
    with pytest.raises(ValueError, match="low <= measured <= high"):
        RULE.verdict(*three)


def test_arithmetic_has_one_band_and_no_interval():
    rule = Rule("the rank", "%", ("computed",), ())
    assert rule.computed and not RULE.computed
    assert rule.verdict(7, 7, 7) == "computed"
    assert str(rule) == "the rank; computed, in %"
    with pytest.raises(ValueError, match="edges="):
        Rule("the rank", "%", ("computed",), (1,))
    with pytest.raises(ValueError, match="is no verdict"):
        Rule("the rank", "%", ("computed", "holds"), (1,))


def test_every_decided_claim_has_a_sentence_to_take_away():
    """Of 25 words at most; and what "holds when" holds under is said."""
    for row in ledger.read():
        for at in row["scales"].values():
            if at["verdict"] == row["verdict"] and row["verdict"] != "not run yet":
                assert at["so"], row["id"]
                assert len(at["so"].split()) <= 25, at["so"]
                assert "{" not in at["so"]
            if at["verdict"] == "holds when":
                assert at["condition"] and "{" not in at["condition"]
        assert ledger.claim(row["id"]).number, row["id"]


def test_what_cannot_be_tested_still_has_figures_where_runs_are_stored(
    tmp_path, monkeypatch
):
    reason = "It is {middle} %, and a time needs a GPU"
    claim = made(untestable={"tiny": reason}, so={"cannot be tested here": "Time it."})
    monkeypatch.setattr(runs, "FOLDER", tmp_path)
    before = ledger.judge(claim, "tiny")
    assert before.verdict == "cannot be tested here" and len(before.missing) == 1
    runs.write(claim.configs("tiny")[0], {"value": 7})
    after = ledger.judge(claim, "tiny")
    assert after.say_instead == "It is 7 %, and a time needs a GPU"
    assert after.so == "Time it." and after.measured is None and not after.missing


def test_a_rule_says_its_bands():
    assert str(RULE) == (
        "the rank; up to 10 %: holds, to 30 %: holds when, above: does not hold here"
    )


# ------------------------------------------------------------------------- Claims


def one(found):
    return Measured(1.0, 1.0, 1.0, seeds=(0,))


def other(found):
    return Measured(2.0, 2.0, 2.0, seeds=(0,))


def of_runs(found):
    values = [run.result["value"] for run in found]
    middle = sorted(values)[len(values) // 2]
    figures = {"middle": f"{middle:g}"}
    return Measured(
        middle, min(values), max(values), tuple(range(len(values))), figures
    )


def made(**changes):
    settings = dict(
        id="Z1",
        notebook="99",
        statement="Everything is small",
        rule=RULE,
        configs=lambda scale: [{"experiment": "z", "base": scale, "seed": 0}],
        measured=of_runs,
        say_instead={"does not hold here": "It is {middle} %"},
    )
    return Claim(**(settings | changes))


def test_the_rule_hash_follows_words_bands_grid_and_measuring_code():
    hashes = [
        made().rule_hash,
        made(rule=Rule("the ranks", RULE.unit, RULE.verdicts, RULE.edges)).rule_hash,
        made(rule=Rule(RULE.words, "nats", RULE.verdicts, RULE.edges)).rule_hash,
        made(rule=Rule(RULE.words, "%", RULE.verdicts, (10, 31))).rule_hash,
        made(rule=Rule(RULE.words, "%", RULE.verdicts[::-1], (10, 30))).rule_hash,
        made(measured=one).rule_hash,
        made(measured=other).rule_hash,
        made(configs=lambda scale: []).rule_hash,
        made(untestable={"tiny": "It takes a larger one"}).rule_hash,
    ]
    assert len(set(hashes)) == len(hashes)
    assert made(id="Z2", statement="x", say_instead={}).rule_hash == hashes[0]
    assert made(untestable={"tiny": "No"}).rule_hash == hashes[-1]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A run store of its own; store(scale, value, …) puts the claim's runs into it."""
    monkeypatch.setattr(runs, "FOLDER", tmp_path)

    def put(scale, value, seed=0):
        config = {"experiment": "z", "base": scale, "seed": seed}
        runs.write(config, {"value": value})
        return runs.key(config)

    return put


def test_without_runs_a_claim_is_not_run_yet(store):
    row = ledger.row(made())
    assert row["verdict"] == "not run yet" and row["scale"] is None
    assert row["runs"] == row["seeds"] == [] and row["measured"] is None
    assert {at["verdict"] for at in row["scales"].values()} == {"not run yet"}


def test_the_row_is_that_of_the_largest_scale_that_has_a_verdict(store):
    tiny = store("tiny", 5)
    row = ledger.row(made())
    assert (row["scale"], row["verdict"], row["runs"]) == ("tiny", "holds", [tiny])
    assert row["scales"]["smollm2"]["verdict"] == "not run yet"

    large = store("smollm2", 50)
    row = ledger.row(made())
    assert (row["scale"], row["verdict"]) == ("smollm2", "does not hold here")
    assert row["say_instead"] == "It is 50 %" and row["runs"] == [large]
    assert row["scales"]["tiny"]["verdict"] == "holds"
    assert row["scales"]["tiny"]["runs"] == [tiny]


def test_an_undecided_larger_scale_counts_too(store):
    def configs(scale):
        seeds = (0, 1) if scale == "smollm2" else (0,)
        return [{"experiment": "z", "base": scale, "seed": seed} for seed in seeds]

    store("tiny", 5)
    store("smollm2", 5, seed=0)
    assert ledger.row(made(configs=configs))["scale"] == "tiny"  # one seed is missing
    store("smollm2", 15, seed=1)
    row = ledger.row(made(configs=configs))
    assert (row["scale"], row["verdict"]) == ("smollm2", "undecided")
    assert row["interval"] == [5, 15] and row["seeds"] == [0, 1]


def test_a_claim_that_cannot_be_tested_says_why(store):
    store("tiny", 5)
    row = ledger.row(made(untestable={"smollm2": "It takes 10 billion parameters"}))
    assert row["verdict"] == "cannot be tested here"
    assert row["say_instead"] == "It takes 10 billion parameters"


def test_invalid_runs_decide_nothing(store):
    def measured(found):
        raise Invalid("the best rate is an end of the grid")

    store("tiny", 5)
    claim = made(measured=measured)
    assert ledger.row(claim)["verdict"] == "not run yet"
    (first, second) = ledger.reasons(claim)
    assert "tiny: the best rate is an end" in first
    assert "smollm2: 1 runs are missing (z)" in second


def test_missing_runs_are_made_once_and_a_search_may_ask_for_more(store, monkeypatch):
    def configs(scale):
        first = {"experiment": "z", "base": scale, "seed": 0}
        if runs.stored(first) is None:
            return [first]
        return [first, first | {"seed": runs.stored(first).result["value"]}]

    computed = []

    def compute(config):
        computed.append((config["base"], config["seed"]))
        return {"value": 7}

    monkeypatch.setattr(experiments, "compute", compute)
    monkeypatch.setitem(ledger.CLAIMS, "Z1", made(configs=configs))
    for _ in range(2):
        ledger.make_runs(["Z1"])
    assert computed == [("tiny", 0), ("tiny", 7), ("smollm2", 0), ("smollm2", 7)]
    assert ledger.row(ledger.claim("Z1"))["verdict"] == "holds"


def test_workers_share_the_runs_and_none_is_made_twice(store, monkeypatch, capsys):
    """Each run by one worker, and a search's second run by whoever it belongs to."""

    def configs(scale):
        first = [{"experiment": "z", "base": scale, "seed": seed} for seed in range(9)]
        if any(runs.stored(each) is None for each in first):
            return first
        return [*first, {"experiment": "z", "base": scale, "seed": "more"}]

    computed = []

    def compute(config):
        computed.append((config["base"], config["seed"]))
        return {"value": 7}

    monkeypatch.setattr(experiments, "compute", compute)
    monkeypatch.setitem(ledger.CLAIMS, "Z1", made(configs=configs))
    shares = []
    for shard in [f"{worker}/3" for worker in (2, 0, 1)] * 2:
        before = len(computed)
        main(["ledger", "Z1", "--run", "--shard", shard])
        shares.append(len(computed) - before)
    assert len(computed) == len(set(computed)) == 20
    assert all(shares[:3]) and sum(shares) == 20
    assert "worker 1/3 is done; 0 runs are missing" in capsys.readouterr().out
    for shard in ("3/3", "a", "1/0", "1/3/", "1"):
        assert main(["ledger", "Z1", "--run", "--shard", shard]) == 1
    assert main(["ledger", "Z1", "--shard", "0/3"]) == 1
    assert "add --run" in capsys.readouterr().err


def test_a_new_claim_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "brand_new.py").write_text(
        "from peft_from_scratch.ledger.claim import Claim, Measured, Rule\n"
        "def measured(found): return Measured(1, 1, 1, ())\n"
        "CLAIMS = (Claim(id='Z9', notebook='98', statement='s', measured=measured,\n"
        "  rule=Rule('w', '%', ('holds', 'does not hold here'), (2,)),\n"
        "  configs=lambda scale: [{'experiment': 'brand_new'}]),)\n"
        "def compute(config): return {}\n"
    )
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(tmp_path)])
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "runs")
    found = ledger.discover()
    monkeypatch.delitem(sys.modules, "peft_from_scratch.ledger.experiments.brand_new")
    assert list(found) == [*ledger.CLAIMS, "Z9"]


def test_importing_the_ledger_imports_no_experiment():
    code = (
        "import sys; from peft_from_scratch.ledger import experiments, verdicts;"
        "known = [n for n in sys.modules if n.startswith(experiments.__name__ + '.')];"
        "assert not known, known; assert 'L1' in verdicts.CLAIMS and verdicts.claims()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=runs.provenance.ROOT)


def test_an_unknown_claim_names_the_known():
    with pytest.raises(ValueError, match=r"'X9'; claims are .*L1"):
        ledger.claim("X9")


@pytest.mark.parametrize(
    ("verdicts", "expected", "most"), [(2, "0.1", 1), (14, "0.7", 2), (50, "2.5", 5)]
)
def test_how_many_verdicts_could_flip(verdicts, expected, most):
    """The quantiles are those of the binomial distribution's tables."""
    sampled = {"verdict": "holds", "interval": [1.0, 2.0]}
    counted = {"verdict": "holds", "interval": [1.0, 1.0]}
    waiting = {"verdict": "not run yet", "interval": None}
    told = ledger.could_flip([sampled] * verdicts + [counted, waiting])
    assert f"{verdicts + 1} of {verdicts + 2} claims are decided" in told
    assert f"{expected} of the {verdicts} are expected" in told
    assert f"no more than {most}." in told
    assert "cannot flip" in ledger.could_flip([counted])


# ------------------------------------------------------------------------- Shipped


def test_the_shipped_ledger_is_what_the_shipped_runs_say():
    shipped, computed = ledger.read(), ledger.rows()
    assert [row["id"] for row in shipped] == [row["id"] for row in computed]
    for before, now in zip(shipped, computed, strict=True):
        assert_same(before, now)


def assert_same(before, now):
    if isinstance(now, dict):
        assert list(before) == list(now)
        for name in now:
            assert_same(before[name], now[name])
    elif isinstance(now, list):
        assert len(before) == len(now)
        for old, new in zip(before, now, strict=True):
            assert_same(old, new)
    elif isinstance(now, float):
        assert before == pytest.approx(now, rel=1e-4)
    else:
        assert before == now


def test_the_shipped_rows_have_the_agreed_fields():
    for row in ledger.read():
        assert list(row) == FIELDS
        assert list(row["scales"]) == ["tiny", "smollm2"]
        for at in row["scales"].values():
            assert at["verdict"] in VERDICTS
            assert at["runs"] or at["verdict"] not in OF_BANDS
        if row["scale"]:
            own = row["scales"][row["scale"]]
            assert {name: row[name] for name in own} == own
        for key in row["runs"]:
            assert (runs.FOLDER / f"{key}.json").exists()


def test_the_ledger_is_written_only_where_it_changes(tmp_path):
    file = tmp_path / "ledger.json"
    rows = [ledger.row(ledger.claim("L4"))]
    assert ledger.write(rows, file) and not ledger.write(rows, file)
    assert ledger.read(file) == json.loads(file.read_text()) == rows
    assert ledger.write([*rows, *rows], file)
    assert ledger.read(tmp_path / "none.json") == []


# ------------------------------------------------------------------------- Command


def test_the_command_shows_the_table(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "FILE", tmp_path / "ledger.json")
    assert command_line.main(["ledger", "L4", "--base", "smollm2"]) == 0
    shown = capsys.readouterr().out
    assert "131,072" in shown and "computed *" in shown and "L1" not in shown
    assert len(ledger.read()) == len(ledger.CLAIMS)  # the file is always whole
    assert command_line.main(["ledger", "X9"]) == 1
    assert "no claim is called 'X9'" in capsys.readouterr().err


def test_the_command_makes_missing_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "FILE", tmp_path / "ledger.json")
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "runs")
    assert command_line.main(["ledger", "L4"]) == 0
    assert "not run yet" in capsys.readouterr().out
    assert command_line.main(["ledger", "L4", "--run", "--base", "tiny"]) == 0
    assert "computed" in capsys.readouterr().out


def test_the_command_line_names_the_scales_of_the_library():
    from peft_from_scratch.ledger.claim import BASES

    assert command_line.BASES == BASES
