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

from peft_from_scratch.course import cards, lesson
from peft_from_scratch.course.cards import Card
from peft_from_scratch.ledger import verdicts

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
    monkeypatch.setattr(lesson, "WORK", tmp_path / "work")
    monkeypatch.setattr(lesson, "current", None)


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
    begun.predict("4.1", guess=30, unit="%")
    begun.measured("4.1", 12.4)
    begun.predict("4.2", guess="it falls")
    begun.measured("4.2", torch.tensor(1234.5))
    said = capsys.readouterr().out
    assert "4.1: you guessed 30 %, measured 12.4 %" in said
    assert "4.2: you guessed it falls, measured 1,234" in said
    with pytest.raises(KeyError, match=r"made were: 4.1, 4.2"):
        begun.measured("4.3", 1)


def test_guesses_of_a_learner_are_kept_and_those_of_the_course_are_not(
    tmp_path, monkeypatch
):
    begun = lesson.start("04")
    monkeypatch.chdir(tmp_path)
    begun.predict("4.0", guess=1)
    assert not (tmp_path / "work").exists()

    (tmp_path / "work" / "deeper").mkdir(parents=True)
    for folder in ("work", "work/deeper"):
        monkeypatch.chdir(tmp_path / folder)
        begun.predict("4.1", guess=30, unit="%")
        begun.measured("4.1", 12.4)
        lesson.start("05").predict("5.1", guess=2)
    kept = json.loads((tmp_path / "work" / lesson.GUESSES).read_text())
    assert kept["04"]["4.1"] == {"guess": 30, "unit": "%", "measured": 12.4}
    assert kept["05"]["5.1"] == {"guess": 2, "unit": ""}
    left = {p.name for p in (tmp_path / "work").iterdir()}
    assert left == {lesson.GUESSES, "predictions.lock", "deeper"}


def test_guesses_of_two_notebooks_at_once_are_all_kept(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    lessons = [lesson.start(f"{n:02}") for n in range(4)]

    def guess(begun):
        for i in range(10):
            begun.predict(f"{begun.number}.{i}", guess=i)

    threads = [threading.Thread(target=guess, args=(begun,)) for begun in lessons]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = json.loads((tmp_path / "work" / lesson.GUESSES).read_text())
    assert [len(kept[begun.number]) for begun in lessons] == [10] * 4


def test_a_broken_file_of_guesses_is_named_and_kept(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / lesson.GUESSES).write_text("{")
    with pytest.raises(ValueError, match="move it away"):
        lesson.start("04").predict("4.1", guess=1)
    assert (tmp_path / "work" / lesson.GUESSES).read_text() == "{"


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


def test_a_live_verdict_must_be_the_shipped_one(capsys):
    begun = lesson.start("90", model="tiny")
    begun.live("S1", 6, 5.5, 6.5)
    said = capsys.readouterr().out
    assert "S1, live on tiny: 6 [5.5, 6.5] in all: confirmed" in said
    assert "shipped for tiny: confirmed" in said
    with pytest.raises(
        AssertionError, match=r"live is 'refuted here', shipped is 'conf"
    ):
        begun.live("S1", 9, 8, 10)


def test_a_live_verdict_may_be_undecided():
    lesson.start("90", model="tiny").live("S1", 6, 4, 8)


def test_an_undecided_ledger_contradicts_no_live_verdict(monkeypatch):
    begun = lesson.start("90", model="tiny")
    row = {"scales": {"tiny": {"verdict": "undecided"}}}
    monkeypatch.setattr(begun, "_shipped", lambda id: row)
    begun.live("S1", 9, 8, 10)


def test_no_live_verdict_hides_behind_one_that_was_not_run():
    begun = lesson.start("90", model="tiny")
    with pytest.raises(AssertionError, match="shipped is 'not run yet'"):
        begun.live("S1", 6, 6, 6, scale="smollm2")
    with pytest.raises(AssertionError, match="shipped is 'not run yet'"):
        lesson.start("90").live("S1", 6, 6, 6)


def test_another_base_has_no_shipped_verdict(capsys):
    lesson.start("90", model="owner/name").live("S1", 9, 9, 9)
    assert "not compared" in capsys.readouterr().out


def test_an_unknown_claim_and_a_ledger_without_it_are_said(monkeypatch, tmp_path):
    begun = lesson.start("90", model="tiny")
    with pytest.raises(ValueError, match="claims are S1"):
        begun.verdict("L99")
    monkeypatch.setattr(verdicts, "FILE", tmp_path / "none.json")
    with pytest.raises(LookupError, match="ledger S1 --run"):
        begun.verdict("S1")


def test_a_verdict_is_the_same_words_whatever_the_base(capsys):
    for model in ("tiny", "owner/name"):
        begun = lesson.start("90", model=model)
        capsys.readouterr()
        begun.verdict("S1")
        said = capsys.readouterr().out
        assert (
            said == "S1: confirmed (tiny)\nSay instead: Twice three is 6, everywhere.\n"
        )


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
        "verdict in (shipped, UNDECIDED)",
        "shipped in (shipped, UNDECIDED)",
        lambda: test_a_live_verdict_must_be_the_shipped_one(capsys),
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
