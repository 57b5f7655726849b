"""No sentence ranks two methods that are not told apart, and no advice rests on it."""

import functools
import inspect
import random
import re

import pytest
from invented_comparisons import METHODS, comparison
from planting import Bug, each_is_caught, law

from peft_from_scratch.comparison import advice as advising
from peft_from_scratch.comparison import apart, background, findings
from peft_from_scratch.comparison.advice import advice, choice, cost

ABOVE = r"\b(?:beats?|better than|more than|higher than|outperforms?|ahead of)\b"
BELOW = r"\b(?:worse than|less than|lower than|trails|behind)\b"
FIRST = r"\b(?:best|highest|top|leads|wins|most accurate)\b"
LAST = r"\b(?:worst|lowest)\b"
UNSURE = r"\b(?:no|not|none|whether|undecided)\b"


@functools.cache
def results() -> list[dict]:
    """Random results, in which many pairs are told apart and many are not."""
    invented = []
    for seed in range(40):
        dice = random.Random(seed)
        methods = dice.sample(list(METHODS), dice.randint(1, 7))
        seeds, rows = dice.choice((1, 2)), dice.choice((12, 40, 100))
        result = comparison(
            methods, seed=seed, rows=rows, seeds=seeds, whole=dice.random() < 0.7
        )
        for row in result["rows"]:
            size = 1.1 if dice.random() < 0.5 else 3
            row["trainable"] = int(row["trainable"] and size * 10**6)
            row["library"] = "another" if dice.random() < 0.1 else None
            row["curve"] = {"loss": [1, 1, 1, 1, dice.random()], "seconds": [*range(5)]}
        if dice.random() < 0.3:
            result["data"] = {"scorer": "label", "title": "right label", "rows": {}}
        invented.append(result)
    return invented


def beats(result: dict, high: str, low: str) -> bool:
    """Read from the pairs as they stand, without the code that the tests are about."""
    for pair in result["pairs"]:
        if {pair["of"], pair["over"]} == {high, low}:
            ahead = pair["difference"] * (1 if pair["of"] == high else -1)
            return pair["apart"] and ahead > 0
    return False


def sentences(result: dict) -> list[str]:
    """What every public function of these modules says about a result."""
    texts = []
    for module in (findings, background, advising):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            signature = inspect.signature(function)
            says = signature.return_annotation in (str, list[str], str | None)
            own = function.__module__ == module.__name__ and not name.startswith("_")
            curves = name in ("final_losses", "loss_in_words")
            if curves and not findings.loss_by_second(result):
                continue
            if own and says and [*signature.parameters] == ["result"]:
                text = function(result)
                texts += [text] if isinstance(text, str) else text or []
    return [part for text in texts for part in re.split(r"(?<=[.;]) ", text)]


def methods_in(text: str, result: dict) -> list[str]:
    """Keys of the rows that a text names, the longest name first."""
    names = {row["label"].lower(): row["key"] for row in result["rows"]}
    pattern = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    return [names[name] for name in re.findall(rf"\b(?:{pattern})\b", text.lower())]


def rankings(text: str, result: dict) -> list[tuple[str, str]]:
    """(higher, lower) of every pair of methods that a sentence ranks."""
    keys = [row["key"] for row in result["rows"]]
    claims = []
    for words, turned in ((ABOVE, False), (BELOW, True)):
        for match in re.finditer(words, text, re.IGNORECASE):
            before, after = text[: match.start()], text[match.end() :]
            if re.search(UNSURE, before, re.IGNORECASE):
                continue
            pairs = [
                (a, b)
                for a in methods_in(before, result)
                for b in methods_in(after, result)
            ]
            claims += [pair[::-1] for pair in pairs] if turned else pairs
    for words, turned in ((FIRST, False), (LAST, True)):
        if re.search(words, text, re.IGNORECASE):
            pairs = [(a, b) for a in methods_in(text, result) for b in keys if a != b]
            claims += [pair[::-1] for pair in pairs] if turned else pairs
    return claims


@law
def no_sentence_ranks_methods_that_are_not_told_apart():
    ranked = open_pairs = 0
    for result in results():
        open_pairs += sum(not pair["apart"] for pair in result["pairs"])
        for sentence in sentences(result):
            for high, low in rankings(sentence, result):
                ranked += 1
                assert beats(result, high, low), sentence
    assert ranked > 40 and open_pairs > 60  # or there was nothing to get wrong


@law
def the_headline_counts_what_is_told_to_beat_few_shot():
    numbers = {word.lower(): i for i, word in enumerate(background.NUMBERS)}
    for result in results():
        judged = [
            row
            for row in apart.own(apart.trained(result))
            if apart.pair(result, row["key"], "few-shot")
        ]
        beating = sum(beats(result, row["key"], "few-shot") for row in judged)
        text = findings.headline(result).lower()
        if judged and beating > 1:
            word, _, rest = text.partition(" ")
            many = numbers[rest.split()[1]] if word not in ("all", "both") else beating
            assert (beating if word in ("all", "both") else numbers[word]) == beating
            assert many == len(judged)
        elif judged:
            assert ("no fine-tuned" in text) == (beating == 0)


@law
def the_title_names_a_method_only_where_it_leads_alone():
    for result in results():
        rows = apart.measured(result)
        named = methods_in(findings.best(result).partition(";")[0], result)
        alone = len(apart.leaders(result, rows)) == 1
        right = any(row["exact"]["rate"] for row in rows)
        assert len(named) == (alone and right)


@law
def leaders_share_a_letter_and_nothing_beats_them():
    for result in results():
        letters = {row["key"]: row["letters"] for row in result["rows"]}
        first = apart.leaders(result, apart.measured(result))
        shared = set.intersection(*(set(letters[r["key"]]) for r in first))
        assert first and shared
        if len(first) > 1:
            assert f"methods (letter {min(shared)}) reach" in findings.best(result)
        highest = max(result["rows"], key=lambda row: row["exact"]["rate"])
        assert first[0]["exact"]["rate"] == highest["exact"]["rate"]


@law
def nothing_is_told_to_beat_the_advised_method():
    for result in results():
        rows = apart.own(apart.measured(result))
        row = choice(result)
        if not rows:
            assert row is None
            continue
        assert not any(beats(result, o["key"], row["key"]) for o in rows)


@law
def the_advised_method_is_the_cheapest_of_those_not_told_apart():
    """No cheaper row shares its letter, but one that something else speaks against."""
    leaning = 0
    for result in results():
        rows = apart.own(apart.measured(result))
        row = choice(result)
        untrained = [other for other in rows if not other["trainable"]]
        beaten = {
            other["key"]: any(beats(result, o["key"], other["key"]) for o in rows)
            for other in rows
        }
        decided = all(beaten[other["key"]] for other in untrained)
        speaks = beats if decided else ahead_by_itself
        for other in rows:
            if row and cost(other) < cost(row) and other not in untrained:
                pays = all(speaks(result, other["key"], o["key"]) for o in untrained)
                assert beaten[other["key"]] or not pays
        if row and row["trainable"] and not decided:
            leaning += 1
            assert all(ahead_by_itself(result, row["key"], o["key"]) for o in untrained)
        if row and not row["trainable"]:
            for other in rows:  # no training is ahead of every way of prompting
                assert beaten[other["key"]] or not all(
                    ahead_by_itself(result, other["key"], o["key"]) for o in untrained
                )
    assert leaning


def ahead_by_itself(result: dict, of: str, over: str) -> bool:
    """Whether the 95 % interval of this pair alone is above zero."""
    for pair in result["pairs"]:
        if (pair["of"], pair["over"]) == (of, over):
            return pair["low"] > 0
        if (pair["of"], pair["over"]) == (over, of):
            return pair["high"] < 0
    return False


@law
def the_advice_says_prompt_or_fine_tune_and_with_what():
    kinds = set()
    for result in results():
        row, text = choice(result), " ".join(advice(result))
        if row is None or not any(
            r["exact"]["rate"] for r in apart.own(result["rows"])
        ):
            assert text.startswith("Nothing worked")
            continue
        verb = "Fine-tune with" if row["trainable"] else "Prompt"
        untrained = [o for o in apart.own(result["rows"]) if not o["trainable"]]
        if row["trainable"] and not all(
            any(beats(result, o["key"], u["key"]) for o in result["rows"])
            for u in untrained
        ):
            verb = "Probably fine-tune with"
        kinds.add(verb)
        assert text.startswith(verb)
        assert f"Settings of {advising._name(row)}: " in text
        assert background.settings_of(row) in text
        rows = apart.own(apart.measured(result))
        others = [o for o in rows if o["trainable"] and o is not row]
        if "better than every" in text:
            assert all(beats(result, row["key"], o["key"]) for o in others)
        open_ones = [
            o
            for o in others
            if not (
                beats(result, row["key"], o["key"])
                or beats(result, o["key"], row["key"])
            )
        ]
        beaten = re.findall("beaten by another method: (.*?)\\.", text)
        for key in methods_in(" ".join(beaten), result):
            assert any(beats(result, o["key"], key) for o in rows)
        if row["trainable"]:
            assert all(advising._name(o) in text for o in open_ones)
            assert bool(open_ones) == (
                "not told apart from" in text or "Faster" in text
            )
    assert kinds == {"Fine-tune with", "Probably fine-tune with", "Prompt"}


def invented(scores: dict, apart_pairs: set, seconds: dict) -> dict:
    """A result with these scores in percent, of which these pairs are told apart."""
    result = comparison(list(scores))
    for row in result["rows"]:
        row["exact"]["rate"] = scores[row["key"]] / 100
        row["seconds"] |= {"train": seconds.get(row["key"], 0), "answer": 20.0}
    for pair in result["pairs"]:
        keys = pair["of"], pair["over"]
        difference = (scores[keys[0]] - scores[keys[1]]) / 100
        told = keys in apart_pairs or keys[::-1] in apart_pairs
        wide = 0.04 if told else 0.3
        pair |= {
            "difference": difference,
            "low": difference - wide,
            "high": difference + wide,
            "apart": told,
        }
    return result


def test_training_must_pay():
    """LoRA trains faster than PiSSA, but is not told apart from few-shot prompting."""
    scores = {"few-shot": 50, "lora": 60, "pissa": 70}
    seconds = {"lora": 10, "pissa": 20}
    result = invented(scores, {("few-shot", "pissa")}, seconds)
    text = " ".join(advice(result))
    assert text.startswith(
        "Fine-tune with PiSSA: it is better than few-shot prompting, by 16 to 24 "
    )
    assert (
        "Faster to train, but not told apart from prompting: LoRA on all linear" in text
    )


def test_the_cheaper_of_two_that_are_not_told_apart_is_advised_and_why():
    scores = {"few-shot": 50, "lora": 70, "full": 75}
    apart_pairs = {("few-shot", "lora"), ("few-shot", "full")}
    result = invented(scores, apart_pairs, {"lora": 10, "full": 40})
    text = " ".join(advice(result))
    assert text.startswith(
        "Fine-tune with LoRA on all linear layers: it is better than"
    )
    assert "not told apart from Full fine-tuning, but trains faster: 10 s" in text
    assert (
        "Undecided is not equal: the 95 % interval of Full fine-tuning minus LoRA on "
        "all linear layers is -25 to +35 points." in text
    )
    result["pairs"][-1]["apart"] = True
    assert advice(result)[0].startswith("Fine-tune with Full fine-tuning")


def test_where_prompting_gets_nothing_right_few_rows_do_not_advise_it():
    result = invented({"few-shot": 0, "lora": 33}, set(), {"lora": 10})
    (pair,) = result["pairs"]
    turn = 1 if pair["of"] == "lora" else -1
    pair |= {"low": turn * 0.33 - 0.2, "high": turn * 0.33 + 0.2}
    result |= {"pairs": [pair], "rows_tested": 30}
    assert advice(result)[0] == (
        "Probably fine-tune with LoRA on all linear layers: by itself, its 95 % "
        "interval is 13 to 53 points above few-shot prompting. Allowing for all 1 "
        "pairs of methods, that is undecided: more than 30 test rows would tell."
    )
    pair |= {"low": turn * 0.33 - 0.4, "high": turn * 0.33 + 0.4}
    assert advice(result)[0].startswith("Prompt: no fine-tuned method is shown to beat")


@law
def what_the_advised_method_forgets_is_told_with_the_equal_one_that_spares_most():
    scores = {"few-shot": 50, "lora": 70, "full": 75, "dora": 71, "pissa": 90}
    apart_pairs = {("few-shot", key) for key in ("lora", "full", "dora")}
    seconds = {"lora": 10, "full": 40, "dora": 50, "pissa": 60}
    result = invented(scores, apart_pairs, seconds)
    lost = {"lora": (0.3, 0.4), "full": (0.0, 0.05), "dora": (0.1, 0.2)}
    for row in result["rows"]:
        low, high = lost.get(row["key"], (0.0, 0.01))
        row["forgetting"] = {"change": (low + high) / 2, "low": low, "high": high}
    for pair in result["pairs"]:  # PiSSA is told apart from all others, and loses
        if "pissa" in (pair["of"], pair["over"]):
            turn = -1 if pair["of"] == "pissa" else 1
            pair |= {"difference": 0.2 * turn, "low": 0.2 * turn - 0.05}
            pair |= {"high": 0.2 * turn + 0.05, "apart": True}
    assert (
        "the loss on general text rose by 0.30 to 0.40 nats a token; with Full "
        "fine-tuning, which is not told apart from it, by 0.00 to 0.05."
    ) in " ".join(advice(result))
    by_key = {row["key"]: row for row in result["rows"]}
    by_key["full"]["forgetting"]["high"] = 0.35
    by_key["dora"]["forgetting"]["high"] = 0.35
    assert "0.30 to 0.40 nats a token." in " ".join(advice(result))
    by_key["lora"]["forgetting"]["low"] = 0.05  # perhaps nothing was lost
    assert "general text" not in " ".join(advice(result))


def test_prompting_is_advised_where_no_training_is_shown_to_pay():
    scores = {"zero-shot": 10, "few-shot": 50, "lora": 60}
    result = invented(scores, {("zero-shot", "few-shot"), ("zero-shot", "lora")}, {})
    result["rows"][1]["seconds"]["answer"] = 90.0
    text = " ".join(advice(result))
    assert text.startswith(
        "Prompt: no fine-tuned method is shown to beat few-shot prompting."
    )
    assert "it took 90 s, and 20 s with LoRA on all linear layers" in text


def test_a_name_with_a_comma_reads_as_one():
    assert advising._name({"label": "LoRA, all linear", "trainable": 1}) == (
        "LoRA (all linear)"
    )


@pytest.mark.parametrize("words", ["beats", "is better than", "answers more than"])
def test_the_parser_sees_a_ranking(words):
    result = comparison(["few-shot", "lora", "qlora"])
    label = "LoRA on all linear layers"
    assert rankings(f"{label} {words} QLoRA.", result) == [("lora", "qlora")]
    assert rankings(f"{label} is not told to beat QLoRA.", result) == []
    assert rankings("QLoRA is the best.", result) == [
        ("qlora", "few-shot"),
        ("qlora", "lora"),
    ]


BUGS = {
    "a higher score is better": Bug(
        apart.better,
        'compared and compared["apart"] and',
        "compared and",
        no_sentence_ranks_methods_that_are_not_told_apart,
    ),
    "the other side is not turned": Bug(
        apart._turned,
        '-compared["difference"]',
        'compared["difference"]',
        the_advised_method_is_the_cheapest_of_those_not_told_apart,
    ),
    "the verdict is that of the interval alone": Bug(
        apart.verdict,
        'if better(result, row["key"], REFERENCE)',
        'if pair(result, row["key"], REFERENCE)["low"] > 0',
        the_headline_counts_what_is_told_to_beat_few_shot,
    ),
    "the title names the highest": Bug(
        findings.best,
        "if len(first) == 1",
        "if first",
        the_title_names_a_method_only_where_it_leads_alone,
    ),
    "leaders may be beaten": Bug(
        apart.leaders,
        'better(result, other["key"], row["key"])',
        'better(result, row["key"], other["key"])',
        leaders_share_a_letter_and_nothing_beats_them,
    ),
    "the cheapest of all is advised": Bug(
        choice,
        "first = leaders(result, rows)",
        "first = rows",
        nothing_is_told_to_beat_the_advised_method,
    ),
    "the costliest is advised": Bug(
        choice,
        "min(paid or first[:1]",
        "max(paid or first[:1]",
        the_advised_method_is_the_cheapest_of_those_not_told_apart,
    ),
    "training need not pay": Bug(
        choice,
        "paid = [row for row in first if",
        "paid = [row for row in first if 1 or",
        test_training_must_pay,
    ),
    "training that is ahead of one way of prompting is advised": Bug(
        advising._leaning,
        "and all(",
        "and any(",
        the_advised_method_is_the_cheapest_of_those_not_told_apart,
    ),
    "prompting that got nothing right is advised": Bug(
        choice,
        "_leaning(result, first, rows) or first",
        "first",
        the_advised_method_is_the_cheapest_of_those_not_told_apart,
    ),
    "another that forgets as much is named": Bug(
        advising._forgets,
        "and _forgetting(other)[1] < low",
        "",
        what_the_advised_method_forgets_is_told_with_the_equal_one_that_spares_most,
    ),
    "a method that loses is named": Bug(
        advising._forgets,
        'and not told_apart(result, row["key"], other["key"])',
        "",
        what_the_advised_method_forgets_is_told_with_the_equal_one_that_spares_most,
    ),
    "forgetting is told where it is none": Bug(
        advising._forgets,
        "low <= FORGETS",
        "low <= 0",
        what_the_advised_method_forgets_is_told_with_the_equal_one_that_spares_most,
    ),
    "prompting is never advised": Bug(
        choice,
        "if any(",
        "if False and any(",
        test_prompting_is_advised_where_no_training_is_shown_to_pay,
    ),
}
test_a_planted_bug_is_caught = each_is_caught(BUGS)
