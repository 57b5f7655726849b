"""Lessons: start, guesses, figures with words, verdicts, cost cards, the receipt."""

import json
import os
import random
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace

import numpy
import pytest
import sample_lesson
import torch
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.figure import Figure
from planting import assert_caught

from peft_from_scratch.course import cards, checks, guesses, lesson
from peft_from_scratch.course.cards import Card
from peft_from_scratch.ledger import verdicts
from peft_from_scratch.ledger.claim import Rule

CARD = Card(
    products=100.0,
    seconds=40.0,
    peak_bytes=2_000_000_000,
    device_bytes=None,
    downloads=0,
    base="tiny",
    device="cpu",
    threads=1,
    machine="A machine",
    when="2026-11-24",
)


@pytest.fixture(autouse=True)
def course(tmp_path, monkeypatch):
    """No card, a known speed, the sample's ledger; a course folder of one's own."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv(lesson.VARIABLE, raising=False)
    monkeypatch.setenv(cards.OVERRIDE, str(tmp_path / "costs.json"))
    monkeypatch.setattr(cards, "product_seconds", lambda device: 0.5)
    monkeypatch.setattr(verdicts, "CLAIMS", {"S1": sample_lesson.CLAIM})
    file = os.path.join(os.path.dirname(sample_lesson.__file__), "ledger.json")
    monkeypatch.setattr(verdicts, "FILE", type(verdicts.FILE)(file))
    monkeypatch.setattr(guesses, "WORK", tmp_path / "work")
    monkeypatch.setattr(lesson, "current", None)


@pytest.fixture
def displayed(monkeypatch):
    """What a lesson displays, in order: pictures, and bundles of texts."""
    shown = []
    monkeypatch.setattr(lesson, "display", lambda each, raw=False: shown.append(each))
    return shown


def drawn():
    return random.random(), numpy.random.rand(), torch.rand(1).item()


# ----------------------------------------------------------------------------- start


def test_start_fixes_every_seed_and_says_what_it_uses(capsys):
    lesson.start("04", model="tiny")
    first = drawn()
    lesson.start("04", model="tiny")
    assert drawn() == first
    lesson.start("04", model="tiny", seed=1)
    assert all(a != b for a, b in zip(drawn(), first, strict=True))
    said = capsys.readouterr().out
    device = lesson.load.pick_device()
    assert f"Lesson 04: tiny, {device}, float32, one thread, seed 0." in said
    assert "no card" in said


def test_the_base_is_asked_for_or_named_by_the_environment(monkeypatch):
    assert lesson.start("04").base == "smollm2"
    monkeypatch.setenv(lesson.VARIABLE, "tiny")
    assert lesson.start("04").base == "tiny"
    assert lesson.start("04", model="smollm2").base == "smollm2"


def test_start_tells_the_cost_for_this_machine(capsys):
    cards.write({"04": CARD, "05": replace(CARD, products=1.0)})
    lesson.start("04", model="tiny")
    said = capsys.readouterr().out
    assert "about 50 s here" in said  # 100 products of half a second
    assert f"Measured: {CARD}." in said
    assert str(CARD).startswith(
        "40 s and 2.0 GB, on 2026-11-24, with tiny on A machine"
    )


def test_load_model_is_fresh_each_time(base, capsys):
    begun = lesson.start("04", model=base)
    (one, _), (two, _) = begun.load_model(), begun.load_model()
    one, two = one.get_input_embeddings().weight, two.get_input_embeddings().weight
    assert one.data_ptr() != two.data_ptr() and torch.equal(one, two)
    assert str(one.device.type) == begun.device.type
    assert "parameters" in capsys.readouterr().out


# --------------------------------------------------------------------------- guesses


def test_a_guess_is_shown_beside_what_is_measured(capsys):
    begun = lesson.start("04")
    begun.predict("4.1", low=10, high=30, unit="%")
    begun.measured("4.1", 12.4)
    begun.predict("4.2", low=1, high=1)
    begun.measured("4.2", torch.tensor(1234.5))
    said = capsys.readouterr().out
    assert "4.1: your guess is 10 to 30 %" in said
    assert "4.1: measured 12.4 %. Your range, 10 to 30, holds it." in said
    assert "4.2: measured 1,234. Your range was 1." in said
    with pytest.raises(KeyError, match=r"asked for were: 4.1, 4.2"):
        begun.measured("4.3", 1)


def test_a_lesson_runs_without_guesses_and_says_so(capsys):
    begun = lesson.start("04")
    begun.predict("4.1", None, None, unit="%")
    begun.measured("4.1", 12.4)
    begun.calibration()
    said = capsys.readouterr().out
    assert "4.1: no guess yet. Put two numbers in place of None" in said
    assert "4.1: measured 12.4 %\n" in said and "You made no guess" in said


@pytest.mark.parametrize(
    "ends", [(3, 1), (1, None), (None, 1), ("1", "2"), (True, 2), (0, float("nan"))]
)
def test_a_guess_that_is_no_range_is_refused(ends):
    with pytest.raises(ValueError, match="the lower one first"):
        lesson.start("04").predict("4.1", *ends)


def test_guesses_of_a_learner_are_kept_and_those_of_the_course_are_not(
    tmp_path, monkeypatch
):
    begun = lesson.start("04")
    monkeypatch.chdir(tmp_path)
    begun.predict("4.0", 1, 2)
    assert not (tmp_path / "work").exists()

    (tmp_path / "work" / "deeper").mkdir(parents=True)
    for folder in ("work", "work/deeper"):
        monkeypatch.chdir(tmp_path / folder)
        begun.predict("4.1", 10, 30, unit="%")
        begun.measured("4.1", 12.4)
        lesson.start("05").predict("5.1", 2, 3)
    kept = json.loads((tmp_path / "work" / guesses.FILE).read_text())
    assert kept["04"]["4.1"] == dict(low=10, high=30, unit="%", measured=12.4)
    assert kept["05"]["5.1"] == dict(low=2, high=3, unit="", measured=None)
    left = {p.name for p in (tmp_path / "work").iterdir()}
    assert left == {guesses.FILE, "predictions.lock", "deeper"}


def test_guesses_of_two_notebooks_at_once_are_all_kept(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    lessons = [lesson.start(f"{n:02}") for n in range(4)]

    def guess(begun):
        for i in range(10):
            begun.predict(f"{begun.number}.{i}", i, i)

    threads = [threading.Thread(target=guess, args=(begun,)) for begun in lessons]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = json.loads((tmp_path / "work" / guesses.FILE).read_text())
    assert [len(kept[begun.number]) for begun in lessons] == [10] * 4


def test_a_broken_file_of_guesses_is_named_and_kept(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / guesses.FILE).write_text("{")
    with pytest.raises(ValueError, match="move it away"):
        lesson.start("04").predict("4.1", 1, 2)
    assert (tmp_path / "work" / guesses.FILE).read_text() == "{"


def test_calibration_counts_the_ranges_that_held(capsys, displayed):
    begun = lesson.start("04")
    for i, (low, high, value) in enumerate(
        [(0, 1, 0.5), (0, 1, 7), (5, 5, 5), (5, 5, 4), (0, 1, 1)]
    ):
        begun.predict(f"4.{i}", low, high)
        begun.measured(f"4.{i}", value)
    begun.predict("4.8", 1, 2)  # never measured
    begun.predict("4.9", None, None)
    begun.measured("4.9", 1)
    begun.calibration()
    assert len(displayed) == 1
    said = capsys.readouterr().out.replace("\n", " ")
    assert "3 of your 5 ranges held what was measured. Nine of ten were" in said


@pytest.mark.parametrize(
    ("hits", "n", "narrow"), [(4, 10, True), (8, 10, False), (10, 10, False)]
)
def test_ranges_are_called_too_narrow_where_chance_does_not_explain_it(hits, n, narrow):
    judged = {
        f"{i}": guesses.Guess(0, 1, "", 0.5 if i < hits else 2.0) for i in range(n)
    }
    assert ("too narrow" in guesses.words(judged)) == narrow


def test_a_point_of_the_calibration_stands_where_the_value_fell():
    places = [guesses.Guess(2, 4, "", x).place for x in (2, 3, 4, 5, 99, -99)]
    assert places == [-1, 0, 1, 2, guesses.FAR, -guesses.FAR]


# ------------------------------------------------------------------ the learner's code


def test_the_learners_code_is_used_once_its_check_passed(capsys):
    begun = lesson.start("90", model="tiny")

    def mine(x):
        return x + x

    def theirs(x):
        return 2 * x

    assert begun.mine(mine, theirs) is theirs
    assert "has not passed its check" in capsys.readouterr().out
    with pytest.raises(checks.Wrong):
        sample_lesson.twice(lambda x: x)
    assert begun.mine(mine, theirs) is theirs
    sample_lesson.twice(mine)
    assert begun.mine(mine, theirs) is mine
    assert begun.mine(lambda x: x + x, theirs) is theirs  # another one
    assert (
        "mine has passed its check: the lesson uses it from here on."
        in capsys.readouterr().out
    )


def blank(x):
    raise NotImplementedError("exercise 90.1: your code here")


def test_a_quick_run_passes_over_blanks_and_over_nothing_else(capsys):
    lesson.start("90", model="tiny", quick=True)
    sample_lesson.twice(blank)
    assert "Passed over" in capsys.readouterr().out
    assert not checks.has_passed(blank)
    with pytest.raises(checks.Wrong):
        sample_lesson.twice(lambda x: x)
    lesson.start("90", model="tiny")
    with pytest.raises(checks.NotDone):
        sample_lesson.twice(blank)


# --------------------------------------------------------------------------- figures


def test_a_figure_has_its_finding_as_alternative_text_and_in_print(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(lesson, "display", shown.append)
    lesson.start("04").show(Figure(figsize=(3, 2)), "It falls.")
    data, metadata = shown[0]._repr_mimebundle_() or ({}, {})
    assert metadata["image/png"]["alt"] == "It falls."
    assert data["image/png"]
    assert capsys.readouterr().out.endswith("It falls.\n")
    assert shown[0].data[:4] == b"\x89PNG"
    assert int.from_bytes(shown[0].data[16:20]) == 300  # 3 inches of 100 dots


# ---------------------------------------------------------------------------- claims


def test_a_control_holds_or_the_measurement_is_void(capsys):
    begun = lesson.start("90", model="tiny")
    begun.control("Merged and base take the same time.", True)
    said = capsys.readouterr().out
    assert "Control: Merged and base take the same time. So it is.\n" in said
    assert said.count("(A control is what must be so") == 1
    begun.control("Merged and base take the same time.", True)
    assert "(A control" not in capsys.readouterr().out  # explained once
    with pytest.raises(AssertionError, match="void: Merged and base"):
        begun.control("Merged and base take the same time.", torch.tensor(False))


def test_a_live_run_says_no_verdict_and_must_not_contradict(capsys):
    begun = lesson.start("90", model="tiny")
    capsys.readouterr()
    begun.live("S1", 6, 5.5, 6.5)
    said = capsys.readouterr().out
    assert said == (
        "S1 in this run, on tiny: 6 [5.5, 6.5] in all\n"
        "  Shipped runs: 6 [5.9, 6.1] in all\n"
        "  (Shipped runs were made earlier and come with the course. The verdict rests "
        "on them\n  alone. Brackets hold an interval.)\n"
    )
    begun.live("S1", 6, 5.5, 6.5)
    assert "(Shipped" not in capsys.readouterr().out  # explained once
    with pytest.raises(
        AssertionError, match=r"says 'does not hold here' \(9\), the shipped runs"
    ):
        begun.live("S1", 9, 8, 10)


def test_a_live_run_may_be_undecided():
    lesson.start("90", model="tiny").live("S1", 6, 4, 8)


def test_an_undecided_ledger_contradicts_no_live_run(monkeypatch):
    begun = lesson.start("90", model="tiny")
    row = begun._shipped("S1")
    row["scales"]["tiny"] |= {"verdict": "undecided", "interval": [4.0, 8.0]}
    monkeypatch.setattr(begun, "_shipped", lambda id: row)
    begun.live("S1", 9, 8, 10)


def test_a_count_must_be_the_shipped_one(monkeypatch):
    begun = lesson.start("90", model="tiny")
    rule = Rule("Twice three", "in all", ("computed",), ())
    monkeypatch.setitem(verdicts.CLAIMS, "S1", replace(sample_lesson.CLAIM, rule=rule))
    begun.live("S1", 6, 6, 6)
    with pytest.raises(AssertionError, match="the shipped runs"):
        begun.live("S1", 7, 7, 7)


def test_what_concerns_no_base_is_said_of_none(monkeypatch, capsys):
    begun = lesson.start("90", model="tiny")
    row = begun._shipped("S1")
    row["scales"]["smollm2"] = row["scales"]["tiny"]
    monkeypatch.setattr(begun, "_shipped", lambda id: row)
    begun.live("S1", 6, 6, 6)
    assert "S1 in this run: 6 in all" in capsys.readouterr().out


def test_no_live_run_hides_behind_one_that_was_not_made():
    begun = lesson.start("90", model="tiny")
    with pytest.raises(AssertionError, match="S1 was not run on smollm2"):
        begun.live("S1", 6, 6, 6, scale="smollm2")
    with pytest.raises(AssertionError, match="S1 was not run on smollm2"):
        lesson.start("90").live("S1", 6, 6, 6)


def test_another_base_has_nothing_to_compare(capsys):
    lesson.start("90", model="owner/name").live("S1", 9, 9, 9)
    assert "nothing to compare" in capsys.readouterr().out


def test_an_unknown_claim_and_a_ledger_without_it_are_said(monkeypatch, tmp_path):
    begun = lesson.start("90", model="tiny")
    with pytest.raises(ValueError, match="claims are S1"):
        begun.verdict("L99")
    monkeypatch.setattr(verdicts, "FILE", tmp_path / "none.json")
    with pytest.raises(LookupError, match="ledger S1 --run"):
        begun.verdict("S1")


def test_a_verdict_is_the_same_card_whatever_the_base(displayed):
    for model in ("tiny", "owner/name"):
        displayed.clear()
        lesson.start("90", model=model).verdict("S1")
        head, picture, body = displayed
        assert head["text/plain"] == (
            "S1: holds (measured on tiny, of one million parameters)"
        )
        assert body["text/plain"] == (
            "The product: 6 in all, 95 % interval 5.9 to 6.1.\n"
            "So: Twice three is 6, everywhere."
        )
        assert "**Verdict card · S1 · Twice three is six**" in head["text/markdown"]
        assert "The rule of S1" in picture._repr_mimebundle_()[1]["image/png"]["alt"]
        assert "**So:** Twice three" in body["text/markdown"]
        assert "On SmolLM2-135M: not run yet." in body["text/markdown"]


def test_a_rule_is_printed_in_lines(capsys):
    begun = lesson.start("90", model="tiny")
    capsys.readouterr()
    begun.rule("S1")
    assert capsys.readouterr().out.splitlines() == [
        "S1, the rule, written before the runs; the card below has all of it.",
        "Its number: The product.",
        "The verdict is that of the band that holds the whole interval:",
        "- up to 5 in all: does not hold here",
        "- 5 to 7 in all: holds",
        "- above 7 in all: does not hold here",
        "- where no band does: undecided",
    ]


def test_a_rule_says_that_holds_when_needs_a_condition(monkeypatch, capsys):
    begun = lesson.start("90", model="tiny")
    rule = Rule("Twice three", "x", ("holds", "holds when", "wrong as stated"), (1, 2))
    monkeypatch.setitem(verdicts.CLAIMS, "S1", replace(sample_lesson.CLAIM, rule=rule))
    capsys.readouterr()
    begun.rule("S1")
    said = capsys.readouterr().out.splitlines()
    assert said[3:6] == [
        "- up to 1 times: holds",
        "- 1 to 2 times: holds when …, under a condition that the card names",
        "- above 2 times: wrong as stated",
    ]


def test_a_rule_of_arithmetic_says_so(monkeypatch, capsys):
    begun = lesson.start("90", model="tiny")
    rule = Rule("Twice three; counted", "apples", ("computed",), ())
    monkeypatch.setitem(verdicts.CLAIMS, "S1", replace(sample_lesson.CLAIM, rule=rule))
    capsys.readouterr()
    begun.rule("S1")
    assert capsys.readouterr().out.splitlines() == [
        "S1, the rule, written before the runs; the card below has all of it.",
        "Its number: The product.",
        "It is arithmetic, counted in apples: the verdict is just computed.",
    ]


# ------------------------------------------------------------------ cards and receipt


def took(begun, monkeypatch, **fields):
    monkeypatch.setattr(begun, "bill", lambda: replace(CARD, **fields))


def test_the_receipt_compares_with_the_card_of_this_machine(monkeypatch, capsys):
    cards.write({"04": CARD})
    begun = lesson.start("04", model="tiny")
    took(begun, monkeypatch, seconds=61.0, peak_bytes=2_100_000_000)
    begun.receipt()
    said = capsys.readouterr().out
    assert "time:   predicted 50 s, took 61 s" in said
    assert "memory: predicted 2.0 GB, took 2.1 GB" in said


def test_without_a_card_of_its_base_the_receipt_only_tells(monkeypatch, capsys):
    begun = lesson.start("04", model="tiny")
    took(begun, monkeypatch, seconds=61.0)
    begun.receipt()
    cards.write({"04": CARD})
    begun = lesson.start("04", model="smollm2")
    took(begun, monkeypatch, seconds=61.0, peak_bytes=10**12)
    monkeypatch.setenv("CI", "true")
    begun.receipt()
    assert "This run: 61 s, 2.0 GB at most." in capsys.readouterr().out


@pytest.mark.parametrize(
    "seconds, gigabytes, warns, fails",
    [
        (99, 2.6, False, False),
        (101, 2.6, True, False),
        (99, 2.61, False, True),
    ],
)
def test_in_ci_much_time_warns_and_much_memory_fails(
    seconds, gigabytes, warns, fails, monkeypatch, recwarn
):
    cards.write({"04": CARD})
    begun = lesson.start("04", model="tiny")
    peak = int(gigabytes * 1e9)
    took(begun, monkeypatch, seconds=float(seconds), peak_bytes=peak)
    begun.receipt()
    assert not recwarn.list  # at a learner's desk
    monkeypatch.setenv("CI", "true")
    if fails:
        with pytest.raises(AssertionError, match=r"more than 1\.25 times the 2\.0 GB"):
            begun.receipt()
    else:
        begun.receipt()
    assert bool(recwarn.list) == warns


def test_a_card_comes_back_as_it_was_written():
    cards.write({"05": replace(CARD, device_bytes=5), "04": CARD})
    assert list(cards.read()) == ["04", "05"]
    assert cards.read()["05"] == replace(CARD, device_bytes=5)


def test_a_bill_is_measured():
    begun = lesson.start("04", model="tiny")
    time.sleep(0.3)
    bill = begun.bill()
    assert bill.products == pytest.approx(bill.seconds / 0.5, abs=0.11)
    assert bill.seconds >= 0.3
    assert (bill.base, bill.downloads, bill.threads) == ("tiny", 0, 1)
    assert bill.peak_bytes > 1e8


def test_a_product_takes_what_it_takes(monkeypatch):
    """Against a clock, for the same matrices one after the other."""
    monkeypatch.undo()
    x = torch.randn(cards.ROWS, cards.estimate.HIDDEN)
    layers = [
        torch.randn(cards.estimate.MLP, cards.estimate.HIDDEN)
        for _ in range(cards.estimate.DEPTH)
    ]
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for W in layers:
            torch.nn.functional.linear(x, W)
        fastest = min(fastest, time.perf_counter() - start)
    assert 0.4 < cards.product_seconds(torch.device("cpu")) / fastest < 1.5


def test_peak_memory_is_of_this_process_and_not_of_its_parent():
    """A parent with much in memory starts a process that takes a known amount."""
    mine = torch.ones(400_000_000, dtype=torch.uint8)
    code = (
        "from peft_from_scratch.course.cards import peak_bytes\nimport torch\n"
        "a = peak_bytes()\nx = torch.ones(200_000_000, dtype=torch.uint8)\n"
        "del x\nprint(a, peak_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert mine.sum() and cards.peak_bytes() > 400_000_000
    assert 190_000_000 < after - before < 260_000_000


@pytest.fixture
def shell(monkeypatch):
    shell = InteractiveShell()
    monkeypatch.setattr(cards, "get_ipython", lambda: shell)
    return shell


def test_the_clock_counts_cells_and_not_the_time_between_them(shell, monkeypatch):
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(cards.time, "perf_counter", lambda: now.seconds)
    monkeypatch.setattr(cards, "BEGUN", 3.0)
    names = shell.user_ns
    names["now"], names["Clock"] = now, cards.Clock
    shell.run_cell("clock = Clock(); now.seconds += 1")
    now.seconds += 1000  # a learner thinks
    shell.run_cell("now.seconds += 10")
    now.seconds += 1000
    shell.run_cell("now.seconds += 100; read = clock.seconds()")
    assert names["read"] == 3 + 1 + 10 + 100
    assert names["clock"].seconds() == names["read"]


# --------------------------------------------------------------------------- planted


def test_planted_a_broken_live_experiment_goes_unseen(capsys):
    assert_caught(
        lesson.Lesson.live,
        "len(decided) <= 1",
        "len(decided) <= 2",
        lambda: test_a_live_run_says_no_verdict_and_must_not_contradict(capsys),
        errors=pytest.fail.Exception,
    )


def test_planted_thinking_counts_as_work(shell, monkeypatch):
    assert_caught(
        cards.Clock.pause,
        "self.spent, self.since = self.seconds(), None",
        "pass",
        lambda: test_the_clock_counts_cells_and_not_the_time_between_them(
            shell, monkeypatch
        ),
    )


def test_planted_the_card_is_told_as_measured_elsewhere(capsys):
    assert_caught(
        cards.Card.here,
        "self.products * product",
        "self.seconds",
        lambda: test_start_tells_the_cost_for_this_machine(capsys),
    )
