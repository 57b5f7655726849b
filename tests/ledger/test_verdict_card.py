"""Verdict cards: the ledger's row in words, the same ones in every form."""

from dataclasses import replace

import pytest
import sample_lesson

from peft_from_scratch.ledger import verdicts
from peft_from_scratch.ledger.claim import OF_BANDS, Rule
from peft_from_scratch.ledger.verdict_card import VerdictCard, figure_of, sentence

ROWS = {row["id"]: row for row in verdicts.read()}


def at(**changes):
    tiny = {
        "measured": 6.0,
        "interval": [5.9, 6.1],
        "seeds": [0, 1],
        "verdict": "holds",
        "condition": None,
        "so": "Twice three is 6.",
        "say_instead": None,
        "runs": ["s-1"],
    } | changes
    none = dict.fromkeys(tiny) | {"verdict": "not run yet", "runs": [], "seeds": []}
    scales = {"tiny": tiny, "smollm2": none}
    return {"id": "S1", "rule": "the rule", "scale": "tiny", **tiny, "scales": scales}


def card(guess=None, **changes):
    return VerdictCard(sample_lesson.CLAIM, at(**changes), guess)


@pytest.mark.parametrize("id", ROWS)
def test_every_shipped_claim_has_a_card_without_a_gap(id):
    each = VerdictCard(verdicts.claim(id), ROWS[id])
    texts = str(each), each.headline(), each.body()
    for text in texts:
        assert "{" not in text and "None" not in text
    assert each.verdict in texts[0].replace("\n  ", " ") and each.verdict in texts[1]
    assert (each.picture() is None) == (ROWS[id]["interval"] is None)
    assert all(len(line) <= 88 for line in texts[0].splitlines())


def test_a_card_says_claim_verdict_number_and_what_to_take_away():
    assert str(card()) == (
        "S1: holds (measured on tiny, of one million parameters)\n"
        "The product: 6 in all, 95 % interval 5.9 to 6.1.\n"
        "So: Twice three is 6."
    )


def test_holds_when_says_when():
    words = card(verdict="holds when", condition="three is a number").headline()
    assert "Verdict: **holds when three is a number**" in words


def test_a_count_has_no_interval_and_names_no_base():
    rule = Rule("Twice three", "in all", ("computed",), ())
    row = at(verdict="computed", interval=None)
    counted = VerdictCard(replace(sample_lesson.CLAIM, rule=rule), row)
    assert str(counted).startswith("S1: computed\nThe product: 6 in all.")
    assert counted.picture() is None


def test_what_was_never_run_has_a_card_too():
    row = at(measured=None, interval=None, verdict="not run yet", so=None, runs=[])
    assert str(VerdictCard(sample_lesson.CLAIM, row)) == "S1: not run yet"


def test_undecided_is_explained_on_the_card():
    assert (
        "does not mean that there is no difference" in card(verdict="undecided").body()
    )
    assert "does not mean" not in card().body()


def test_the_same_runs_for_every_base_are_of_none():
    row = at()
    row["scales"]["smollm2"] = row["scales"]["tiny"]
    assert VerdictCard(sample_lesson.CLAIM, row).where == ""


def drawn(figure, gid):
    (axes,) = figure.axes
    return [a for a in axes.get_children() if a.get_gid() == gid]


@pytest.mark.parametrize("guess", [None, (5.5, 5.8), (-1e9, 0.0), (99.0, 100.0)])
def test_the_picture_has_bands_interval_and_the_readers_guess(guess):
    figure = card(guess).picture()
    (axes,) = figure.axes
    left, right = axes.get_xlim()
    assert left < 5 and right > 7
    words = [text.get_text() for text in axes.texts]
    assert words.count("does not hold here") == 2 and words.count("holds") == 1
    assert {"5", "7"} <= set(words)
    (point,) = drawn(figure, "measured")
    assert list(point.get_xdata()) == [6.0]
    (line,) = drawn(figure, "interval")
    assert [x for x, _ in line.get_segments()[0]] == [5.9, 6.1]
    brackets = drawn(figure, "guess")
    assert len(brackets) == bool(guess)
    for bracket in brackets:
        assert all(left <= x <= right for x in bracket.get_xdata())
    assert any("your guess" in word for word in words) == bool(guess)


def test_every_band_has_a_color_of_its_own():
    from peft_from_scratch.plotting.number_line import COLORS

    assert set(COLORS) == set(OF_BANDS) and len(set(COLORS.values())) == len(COLORS)


def test_numbers_and_sentences():
    assert [figure_of(x) for x in (3, 0.12345, 1234.5, 2.0, "x", True)] == [
        "3",
        "0.123",
        "1,234",
        "2",
        "x",
        "True",
    ]
    assert sentence("loss of A.") == "Loss of A." and sentence("rank") == "Rank."
