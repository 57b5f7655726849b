"""Laws of the tasks: no leak, exact scorers, every bad row named; and planted bugs."""

import inspect
import json
import os
import re
from collections import Counter, defaultdict
from contextlib import suppress
from pydoc_data.topics import topics
from random import Random

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import each_is_caught, law

from peft_from_scratch.comparison.plan import Plan
from peft_from_scratch.tasks import jsonl, messages, orders, terms
from peft_from_scratch.tasks import task as task_module
from peft_from_scratch.tasks.task import load_task

SPLITS = ("train", "validation", "test")
COUNTED = {"a": 1, "a pair of": 2, "a dozen": 12} | {
    word: n
    for n, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve".split()
    )
}


def order(row):
    return json.loads(row["completion"])


def read(sentence, item):
    """How many of the item the sentence asks for: a reader that the generator lacks."""
    amounts = "|".join([*sorted(COUNTED, key=len, reverse=True), r"\d+"])
    found = re.findall(rf"\b({amounts}) {item}(?:e?s)?\b", sentence, re.IGNORECASE)
    assert len(found) == 1, f"{item!r} in {sentence!r}: {found}"
    return COUNTED.get(found[0].lower()) or int(found[0])


def words_of(rows, key):
    found = (order(row)[key] for row in rows)
    return {word for each in found for word in (each if key == "items" else [each])}


def known(rows):
    """{(word, relation): answers}, read back from the rows by their wordings."""
    facts = defaultdict(set)
    for row in rows:
        facts[asked(row)[:2]].add(row["completion"])
    return facts


def asked(row):
    """(word, relation, wording) of a prompt."""
    for relation, wordings in terms.WORDINGS.items():
        for wording in wordings:
            before, after = map(re.escape, wording.split("{word}"))
            if found := re.fullmatch(f"{before}(\\w+){after}", row["prompt"]):
                return found[1], relation, wording
    raise AssertionError(f"{row['prompt']!r} is no wording")


# Laws. Each is run by a test below and, with a bug planted, by the last test.


@law
def generated_rows_repeat_with_the_seed_alone():
    for task in (orders, terms):
        assert task.rows(3) == task.rows(3)
        assert task.rows(3) != task.rows(4)


@law
def no_prompt_is_in_two_splits_or_twice():
    for task in (orders, terms):
        for seed in range(3):
            rows = task.rows(seed)
            prompts = Counter(row["prompt"] for split in rows.values() for row in split)
            assert max(prompts.values()) == 1


@law
def no_customer_orders_the_same_items_twice():
    for seed in range(3):
        rows = orders.rows(seed)
        keys = Counter(
            (order(row)["customer"], frozenset(order(row)["items"]))
            for split in rows.values()
            for row in split
        )
        assert max(keys.values()) == 1


@law
def the_test_orders_hold_words_that_training_lacks():
    rows = orders.rows(0)
    unseen = set()
    for key in ("customer", "items", "city"):
        train, validation, test = (words_of(rows[split], key) for split in SPLITS)
        assert test - train
        assert validation - train
        assert not (test - train) & (validation - train)
        unseen |= test - train
    touched = [row for row in rows["test"] if has_one_of(unseen, row)]
    assert len(touched) > len(rows["test"]) / 3


@law
def new_words_are_as_frequent_in_later_splits_as_in_the_test_and_far_more():
    """So their rows are as hard, no word decides, and no split knows another's."""
    for seed in range(3):
        rows = orders.rows(seed)
        new = {split: words_of_one_split(rows, split) for split in rows}
        of_test = share_with(new["test"], rows["test"])
        for later in ("search", "final"):
            assert abs(share_with(new[later], rows[later]) - of_test) < 0.1
            assert len(new[later]) > 4 * len(new["test"])
            for other in set(rows) - {later}:
                assert share_with(new[later], rows[other]) == 0


def share_with(words, rows):
    """The share of rows that hold one of the words."""
    return sum(has_one_of([f'"{word}"' for word in words], row) for row in rows) / len(
        rows
    )


@law
def the_comparison_is_scored_on_rows_of_its_own():
    """Far more clusters than the test's; rows of your own have the one test."""
    task = Plan(rows=300).load_task()
    assert task.test.to_list() == task.final.to_list() == orders.rows(0)["final"]
    counted = {
        split: len(set(task.clusters(rows))) for split, rows in orders.rows(0).items()
    }
    assert counted["final"] == 176 and counted["test"] == 119
    largest = Counter(task.clusters(task.final.to_list())).most_common(1)[0][1]
    assert largest < 10
    assert load_task("terms").final.to_list() == terms.rows(0)["test"]


def words_of_one_split(rows, split):
    """The words that no other split has."""
    own = set()
    for key in ("customer", "items", "city"):
        others = (words_of(rows[other], key) for other in rows if other != split)
        own |= words_of(rows[split], key).difference(*others)
    return own


@law
def rows_of_one_cluster_share_a_new_word():
    """And a row without one is alone; of two new words, the more frequent counts."""
    task = load_task("orders")
    rows = task.test.to_list()
    names = task.clusters(rows)
    new = words_of_one_split(orders.rows(0), "test")
    frequency = Counter(
        word for row in rows for word in new if has_one_of([f'"{word}"'], row)
    )
    for name, row in zip(names, rows, strict=True):
        own = [word for word in new if has_one_of([f'"{word}"'], row)]
        if own:
            assert frequency[name] == max(frequency[word] for word in own)
        else:
            assert name == row["prompt"]
    assert len(new) == 17 and len(set(names)) < len(rows) / 2


@law
def rows_of_ones_own_whose_prompts_are_alike_are_one_cluster():
    rows = [{"prompt": text} for text in ("A  lamp", "a lamp", "two lamps")]
    one, same, other = jsonl.clusters(rows)
    assert one == same != other


def has_one_of(words, row):
    return any(word in row["completion"] for word in words)


@law
def an_order_says_what_its_sentence_says():
    for split in orders.rows(1).values():
        for row in split:
            sentence, value = row["prompt"], order(row)
            assert list(value) == ["customer", "items", "city", "day"]
            assert row["completion"] == json.dumps(value, separators=(",", ":"))
            assert value["customer"] in sentence and value["city"] in sentence
            for item, n in value["items"].items():
                assert read(sentence, item) == n
            days = [day for day in orders.DAYS if day in sentence]
            assert days == [value["day"]]


@law
def a_term_is_tested_in_words_that_training_did_not_use_for_it():
    for seed in range(3):
        rows = terms.rows(seed)
        trained = known(rows["train"])
        wordings = {asked(row)[2] for row in rows["train"]}
        taught = {asked(row) for row in rows["train"]}
        for split in ("validation", "test"):
            for row in rows[split]:
                word, relation, wording = asked(row)
                assert trained[word, relation] == {row["completion"]}  # it was taught
                assert (word, relation, wording) not in taught  # not in these words
                assert wording in wordings  # which are known from other words


@law
def every_fact_has_six_wordings_in_three_splits():
    rows = terms.rows(0)
    for split, share in terms.SHARES.items():
        counts = Counter(asked(row)[:2] for row in rows[split])
        assert len(counts) == terms.WORDS * len(terms.WORDINGS)
        assert set(counts.values()) == {share}
    partner = {
        word: next(iter(answer))
        for (word, relation), answer in known(rows["train"]).items()
        if relation == terms.PARTNER
    }
    assert all(partner[partner[word]] == word != partner[word] for word in partner)


def keyed(rows):
    return {messages.key(row): row for row in rows}


@law
def rows_of_ones_own_keep_every_prompt_in_one_split():
    rows = keyed(
        {"prompt": f"p{i}", "completion": str(i), "place": f"line {i + 1}"}
        for i in range(57)
    )
    splits = jsonl.split_rows(rows, 0, "here")
    assert {split: len(made) for split, made in splits.items()} == {
        "train": 41,
        "validation": 5,
        "test": 11,
    }
    together = [row for split in SPLITS for row in splits[split]]
    assert keyed(together) == rows
    assert len(together) == len(rows)
    backwards = dict(reversed(rows.items()))
    assert jsonl.split_rows(backwards, 0, "here") == splits
    assert jsonl.split_rows(rows, 1, "here") != splits


LOOKS = {  # ways to write one prompt; each changes what a reader does not notice
    "a space at the end": lambda text: f"{text} ",
    "a line end": lambda text: f"{text}\r\n",
    "two spaces": lambda text: text.replace(" ", "  "),
    "a space that does not break": lambda text: text.replace(" ", "\u00a0"),
    "a space of Chinese": lambda text: text.replace(" ", "\u3000"),
    "a tab": lambda text: text.replace(" ", "\t"),
    "é as e and an accent": lambda text: text.replace("é", "e\u0301"),
    "capitals": str.upper,
    "wide letters": lambda text: text.replace("c", "\uff43"),
    "a ligature": lambda text: text.replace("fi", "\ufb01"),
    "a space of no width": lambda text: text.replace(" ", " \u200b"),
    "a byte order mark": lambda text: f"\ufeff{text}",
    "a soft hyphen": lambda text: text.replace("café", "ca\u00adfé"),
    "a heart that asks for color": lambda text: text.replace("\u2764", "\u2764\ufe0f"),
}


@law
def prompts_that_look_the_same_are_in_one_split():
    for name, look in LOOKS.items():
        rows, number = {}, {}
        for i in range(40):
            plain = f"café {i} \u2764 five fields of straße"
            for prompt in (plain, look(plain)):
                row = {"prompt": prompt, "completion": "x", "place": ""}
                rows |= keyed([row])
                number[prompt] = i
        assert len(rows) == 80, name
        splits = jsonl.split_rows(rows, 0, "here")
        seen = {s: {number[row["prompt"]] for row in splits[s]} for s in SPLITS}
        assert [len(seen[s]) for s in SPLITS] == [28, 4, 8], name
        assert [len(splits[s]) for s in SPLITS] == [56, 8, 16], name
        assert set.union(*seen.values()) == set(range(40)), name


@law
def json_is_right_only_as_a_whole():
    right = '{"a":1,"b":[true,null]}'
    assert orders.score('{"b": [true, null], "a": 1}\n', right)
    for wrong in (
        '{"a":1,"b":[true,null],"c":0}',  # a superset
        '{"a":1}',
        '{"a":1.0,"b":[true,null]}',
        '{"a":true,"b":[true,null]}',
        '{"a":1,"b":[1,null]}',
        '{"a":"1","b":[true,null]}',
        '{"a":1,"b":[null,true]}',
        '{"a":2,"a":1,"b":[true,null]}',  # a key twice
        f"{right} Done.",
        f"{right}{right}",
        f"```{right}```",
        "{'a':1,'b':[True,None]}",  # Python, not JSON
        '{"a":NaN,"b":[true,null]}',
        "",
        "[" * 100_000,
        "9" * 10_000,
    ):
        assert not orders.score(wrong, right), wrong[:40]
    assert not orders.score("NaN", "NaN")


@pytest.mark.parametrize(
    ("name", "sizes"), [("orders", (600, 100, 300)), ("terms", (480, 160, 320))]
)
def test_a_generated_task_has_its_columns_and_sizes(name, sizes):
    task = load_task(name, seed=2)
    for split, size in zip(SPLITS, sizes, strict=True):
        data = getattr(task, split)
        assert isinstance(data, Dataset)
        assert data.column_names == ["prompt", "completion"]
        assert len(data) == size
        assert all(task.score(row["completion"], row["completion"]) for row in data)
    assert list(task.train) == {"orders": orders, "terms": terms}[name].rows(2)["train"]


def test_the_invented_words_are_in_no_prose():
    prose = set(re.findall(r"\w+", " ".join(topics.values()).lower()))
    for seed in range(5):
        words = {word for word, _ in terms.facts(Random(seed))}
        assert len(words) == terms.WORDS
        assert not words & prose


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(VALUES, VALUES)
def test_json_of_equal_values_and_types_is_right(one, other):
    def same(a, b):
        if isinstance(a, list) and isinstance(b, list):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return type(a) is type(b) and a == b and str(a) == str(b)  # -0.0 is not 0.0

    finite = '"' not in json.dumps([one, other]).replace("Infinity", '"')
    spaced, compact = json.dumps(one, indent=1), json.dumps(one)
    assert orders.score(spaced, compact) or not finite
    if finite:
        assert orders.score(json.dumps(other), compact) == same(one, other)


@pytest.mark.parametrize(
    "answer", ["bone", " Bone.", "a bone", "THE bone\n", "An  bone ."]
)
def test_a_term_is_right_in_any_case_with_an_article_and_a_full_stop(answer):
    assert terms.score(answer, "bone")


@pytest.mark.parametrize(
    "answer", ["", "bones", "bone brass", "not bone", "a", "b one"]
)
def test_a_term_is_wrong_with_anything_more_or_less(answer):
    assert not terms.score(answer, "bone")


# Rows from people


def write(path, *lines):
    path.write_bytes(b"\n".join(as_bytes(line) for line in lines))
    return str(path)


def as_bytes(line):
    if isinstance(line, dict):
        line = json.dumps(line)
    return line if isinstance(line, bytes) else line.encode()


def good(n=30):
    return [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(n)]


def prompts(task):
    return [row["prompt"] for split in SPLITS for row in getattr(task, split)]


def test_rows_of_a_file_become_a_task(tmp_path):
    task = load_task(write(tmp_path / "rows.jsonl", *good()), seed=5)
    assert sorted(prompts(task)) == sorted(row["prompt"] for row in good())
    assert task.train.column_names == ["prompt", "completion", "place"]
    for split in SPLITS:
        for row in getattr(task, split):
            assert row["place"] == f"line {int(row['prompt'][1:]) + 1}"
    assert task.instruction == ""
    row = task.test[0]
    assert row["completion"] == "c" + row["prompt"][1:]
    assert task.score(f" {row['completion']}\n", row["completion"])
    assert not task.score(row["completion"].upper(), row["completion"])


def test_what_editors_do_to_a_file_does_no_harm(tmp_path):
    """A byte order mark, CRLF, empty lines, other keys, a line separator in a text."""
    rows = [row | {"note": 1} for row in good()]
    rows[3]["prompt"] = "one\u2028two"
    lines = [as_bytes(json.dumps(row, ensure_ascii=False)) + b"\r" for row in rows]
    lines[0] = b"\xef\xbb\xbf" + lines[0]
    task = load_task(write(tmp_path / "rows.jsonl", *lines, b"", b"  \r", rows[0]))
    assert "one\u2028two" in prompts(task)
    assert len(prompts(task)) == len(set(prompts(task))) == 30  # identical rows are one


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n"])
def test_lines_end_as_on_any_system_and_keep_their_numbers(end, tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [as_bytes(row) for row in good()]
    file.write_bytes(end.join(lines))
    task = load_task(str(file))
    places = {row["prompt"]: row["place"] for s in SPLITS for row in getattr(task, s)}
    assert places == {f"p{i}": f"line {i + 1}" for i in range(30)}
    file.write_bytes(end.join([*lines[:7], b"no row", b"", *lines[7:], b"[]"]))
    with pytest.raises(ValueError) as refused:
        load_task(str(file))
    told = str(refused.value).split("\n")
    assert told[1].startswith("  line 8: not JSON: Expecting value")
    assert told[2:] == ["  line 33: not an object but list"]


def test_prompts_that_look_the_same_are_too_few_to_split(tmp_path):
    rows = [{"prompt": "p" + " " * i, "completion": "c"} for i in range(30)]
    with pytest.raises(
        ValueError, match=r"1 distinct prompts.*differ in case, in spac"
    ):
        load_task(write(tmp_path / "rows.jsonl", *rows))


BAD = {
    "{'prompt': 1}": "not JSON: Expecting property name",
    '{"prompt": "p", "completion": "c"} x': "not JSON: Extra data",
    "[" * 100_000: "not JSON: ",
    '["p", "c"]': "not an object but list",
    "null": "not an object but NoneType",
    '{"prompt": "p"}': "no 'completion'; it has 'prompt'",
    '{"completion": "c"}': "no 'prompt'; it has 'completion'",
    "{}": "no 'prompt'; it has no key",
    '{"prompt": 1, "completion": "c"}': "'prompt' is not text but int",
    '{"prompt": "p", "completion": null}': "'completion' is not text but NoneType",
    '{"prompt": "p", "completion": " "}': "'completion' is empty",
    '{"prompt": "", "completion": "c"}': "'prompt' is empty",
    '{"prompt": "\\ud800", "completion": "c"}': "'prompt' holds half a surrogate",
    b'{"prompt": "\xff", "completion": "c"}': "not UTF-8 at byte 13",
    '{"prompt": "p", "completion": "c", "completion": "d"}': (
        "ambiguous: the key 'completion' stands twice"
    ),
    '{"prompt": "q", "prompt": "p", "completion": "c"}': (
        "ambiguous: the key 'prompt' stands twice"
    ),
    '{"prompt": "p", "completion": "c", "of": {"n": 1, "n": 1}}': (
        "ambiguous: the key 'n' stands twice"
    ),
    '{"prompt": "p", "completion": NaN}': "'completion' is not text but float",
    '{"prompt": "p", "completion": "a\tb"}': "not JSON: Invalid control character",
    '{"prompt": "p2", "completion": "x"}': "the prompt of line 3 with another comp",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_with_its_line_and_its_reason(line, tmp_path):
    path = write(tmp_path / "rows.jsonl", *good(), line)
    with pytest.raises(ValueError) as refused:
        load_task(path)
    first, second = str(refused.value).split("\n")
    assert first == f"{path} has 1 bad row:"
    assert second.startswith(f"  line 31: {BAD[line]}")


def test_every_bad_row_is_counted_and_twenty_are_listed(tmp_path):
    lines = [line for row in good() for line in (row, "[]")]
    path = write(tmp_path / "rows.jsonl", *lines)
    with pytest.raises(ValueError) as refused:
        load_task(path)
    first, *listed, last = str(refused.value).split("\n")
    assert first == f"{path} has 30 bad rows:"
    assert listed == [f"  line {2 * i}: not an object but list" for i in range(1, 21)]
    assert last == "  … and 10 more"


def test_too_few_rows_are_refused_with_the_minimum(tmp_path):
    path = write(tmp_path / "rows.jsonl", *good(2), *good(2))
    with pytest.raises(ValueError, match="2 distinct prompts; at least 3 are needed"):
        load_task(path)
    three = load_task(write(tmp_path / "rows.jsonl", *good(3)))
    assert [len(three.train), len(three.validation), len(three.test)] == [1, 1, 1]
    with pytest.raises(ValueError, match="0 distinct prompts"):
        load_task(write(tmp_path / "empty.jsonl"))
    missing = f"none.jsonl does not exist: .* from {re.escape(os.getcwd())}"
    with pytest.raises(FileNotFoundError, match=missing):
        load_task(str(tmp_path / "none.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(IsADirectoryError, match=r"is a folder: name the \.jsonl file"):
        load_task(str(tmp_path / "folder.jsonl"))


ARRAY = [{"prompt": "p", "completion": "c"}] * 30
OTHER_FORMATS = {
    "UTF-16 with a mark": ("{}\n".encode("utf-16"), "UTF-16: save it as UTF-8"),
    "UTF-16 LE": ("{}\n".encode("utf-16-le"), "UTF-16: save it as UTF-8"),
    "UTF-16 BE": ("{}\n".encode("utf-16-be"), "UTF-16: save it as UTF-8"),
    "an array": (json.dumps(ARRAY).encode(), "a JSON array: write one object a line"),
    "a printed array": (
        b"\xef\xbb\xbf" + json.dumps(ARRAY, indent=1).encode(),
        "a JSON array: write one object a line",
    ),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_a_file_in_another_format_is_one_sentence(name, tmp_path):
    data, told = OTHER_FORMATS[name]
    with pytest.raises(ValueError, match=told) as refused:
        load_task(write(tmp_path / "rows.jsonl", data))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["orders", "rows.jsonl"])
def test_columns_are_only_chosen_where_there_is_a_choice(name):
    for choice in ({"prompt": "q"}, {"completion": "a"}, {"config": "one"}):
        with pytest.raises(ValueError, match=f"'{name}' is no data set of the hub"):
            load_task(name, **choice)


def test_a_name_that_is_no_task_lists_what_is():
    with pytest.raises(ValueError, match=r"'order' is no task: .*'orders', 'terms'"):
        load_task("order")


# Data sets, with a folder in the place of the hub


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that `datasets` can load; its cache stays in it as well."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "data"
    path.mkdir()
    return path


def qa(numbers, answer="a"):
    return [json.dumps({"q": f"q{i}", "a": f"{answer}{i}", "n": i}) for i in numbers]


@pytest.mark.parametrize("prefix", ["", "hub:"])
def test_columns_of_a_data_set_are_chosen(folder, prefix):
    write(folder / "rows.jsonl", *qa(range(40)))
    task = load_task(f"{prefix}{folder}", prompt="q", completion="a")
    assert sorted(prompts(task)) == sorted(f"q{i}" for i in range(40))
    assert len(task.train), len(task.test) == (28, 8)
    assert task.train[0]["completion"] == "a" + task.train[0]["prompt"][1:]
    number = int(task.train[0]["prompt"][1:]) + 1
    assert task.train[0]["place"] == f"row {number} of train"
    for wrong in (dict(prompt="q"), dict(prompt="x", completion="a")):
        with pytest.raises(
            ValueError, match=r"no column '(completion|x)'.* q, a, n: ch"
        ):
            load_task(f"{prefix}{folder}", **wrong)
    with pytest.raises(
        ValueError, match=r"\(train\) has 40 bad rows:\n  row 1 of train: 'c"
    ):
        load_task(f"{prefix}{folder}", prompt="q", completion="n")


@pytest.mark.parametrize("has_validation", [False, True])
def test_a_test_split_stays_the_test_and_leaves_the_others(folder, has_validation):
    write(folder / "train.jsonl", *qa(range(50)))
    write(folder / "test.jsonl", *qa(range(45, 60), answer="other "))
    if has_validation:
        write(folder / "validation.jsonl", *qa([*range(8), 50]))
    task = load_task(str(folder), prompt="q", completion="a")
    assert task.test["prompt"][:] == [f"q{i}" for i in range(45, 60)]
    assert task.test[0]["completion"] == "other 45"
    assert len(prompts(task)) == len(set(prompts(task))) == 60
    assert len(task.train) + len(task.validation) == 45
    if has_validation:
        assert task.validation["prompt"][:] == [f"q{i}" for i in range(8)]
    else:
        assert 4 <= len(task.validation) <= 5


def test_a_prompt_that_looks_like_one_of_the_test_leaves_the_others(folder):
    def asked(name, prompts):
        rows = [json.dumps({"prompt": p, "completion": "c"}) for p in prompts]
        write(folder / f"{name}.jsonl", *rows)

    asked("train", [f"P{i} " for i in range(50)])
    asked("test", [f"p{i}" for i in range(45, 60)])
    asked("validation", [f"p\u200b{i}" for i in range(40, 50)])
    task = load_task(str(folder))
    assert len(task.test) == 15
    assert task.validation["prompt"][:] == [f"p\u200b{i}" for i in range(40, 45)]
    assert task.train["prompt"][:] == [f"P{i} " for i in range(40)]


def test_one_configuration_of_several_is_chosen(folder):
    for name, numbers in (("one", range(30)), ("two", range(100, 130))):
        write(folder / f"{name}.jsonl", *qa(numbers))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n"
        "- config_name: two\n  data_files: two.jsonl\n---\n"
    )
    task = load_task(str(folder), prompt="q", completion="a", config="two")
    assert "q100" in prompts(task) and "q0" not in prompts(task)
    with pytest.raises(ValueError, match=r"one.*two"):
        load_task(str(folder), prompt="q", completion="a")


def test_a_data_set_that_cannot_be_had_is_one_sentence(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    advice = "Check the id and the network; without one, pass a folder"
    with pytest.raises(OSError, match=f"'owner/name' cannot be had: .*{advice}"):
        load_task("hub:owner/name")


@pytest.mark.parametrize(
    ("name", "lines", "told"),
    [
        ("rows.jsonl", [*qa(range(30)), "not json"], "JSON parse error"),
        ("rows.csv", ["q,a", "1,2", "1,2,3,4"], "line 3"),
        ("rows.parquet", ["no parquet"], "Parquet magic bytes"),
        ("rows.jsonl", [], "a file is empty"),
    ],
)
def test_a_data_set_with_a_broken_file_is_one_sentence(folder, name, lines, told):
    write(folder / name, *lines)
    with pytest.raises(ValueError, match=f"data set '.*' cannot be read: .*{told}"):
        load_task(str(folder), prompt="q", completion="a")


def test_code_beside_the_data_is_never_run(folder):
    ran = folder / "ran"
    (folder / f"{folder.name}.py").write_text(f"open({str(ran)!r}, 'w')")
    write(folder / "rows.jsonl", *qa(range(40)))
    with suppress(Exception):  # refused or ignored: either will do
        load_task(str(folder), prompt="q", completion="a")
    assert not ran.exists()
    assert "trust_remote_code" not in inspect.getsource(jsonl)


BUGS = {
    "a leak between the splits": (
        orders._split,
        "if key not in taken:",
        "if True:",
        no_customer_orders_the_same_items_twice,
    ),
    "each split only knows its own rows": (
        orders._split,
        "examples = []",
        "examples, taken = [], set()",
        no_customer_orders_the_same_items_twice,
    ),
    "no words of the test's own": (
        orders._word,
        "split in words and",
        "False and",
        the_test_orders_hold_words_that_training_lacks,
    ),
    "test words in training": (
        orders._word,
        'words[split if own else "shared"]',
        'words["test" if random.random() < 0.25 else "shared"]',
        the_test_orders_hold_words_that_training_lacks,
    ),
    "a dozen is ten": (
        orders._amount,
        '12: ["a dozen"]',
        '10: ["a dozen"]',
        an_order_says_what_its_sentence_says,
    ),
    "number words off by one": (
        orders._amount,
        "NUMBERS[n]",
        "NUMBERS[n - 1]",
        an_order_says_what_its_sentence_says,
    ),
    "the seed is ignored": (
        terms.rows,
        'Random(f"terms {seed}")',
        "Random(0)",
        generated_rows_repeat_with_the_seed_alone,
    ),
    "a term tested in the words of training": (
        terms.rows,
        "prompts.pop()",
        "random.choice(prompts)",
        a_term_is_tested_in_words_that_training_did_not_use_for_it,
    ),
    "wordings that training never shows": (
        terms.rows,
        "random.shuffle(prompts)",
        "pass",
        a_term_is_tested_in_words_that_training_did_not_use_for_it,
    ),
    "a term with two answers": (
        terms.rows,
        '"completion": answer',
        '"completion": random.choice([answer, "bone"])',
        a_term_is_tested_in_words_that_training_did_not_use_for_it,
    ),
    "partners in one direction": (
        terms.facts,
        "(other, PARTNER): one",
        "(other, PARTNER): other",
        every_fact_has_six_wordings_in_three_splits,
    ),
    "a search among the words of others": (
        orders._word,
        "split if own else",
        '(split if split != "search" else "final") if own else',
        new_words_are_as_frequent_in_later_splits_as_in_the_test_and_far_more,
    ),
    "a comparison on the test of claims": (
        task_module._task,
        'data.setdefault("final", data["test"])',
        'data["final"] = data["test"]',
        the_comparison_is_scored_on_rows_of_its_own,
    ),
    "every word is new": (
        orders._new_words,
        'known["shared"].split()',
        "()",
        rows_of_one_cluster_share_a_new_word,
    ),
    "the rarer of two new words": (
        orders.clusters,
        "max(words",
        "min(words",
        rows_of_one_cluster_share_a_new_word,
    ),
    "clusters of equal prompts only": (
        jsonl.clusters,
        'alike(row["prompt"])',
        'row["prompt"]',
        rows_of_ones_own_whose_prompts_are_alike_are_one_cluster,
    ),
    "a search harder than the test": (
        orders._word,
        "OWN_WORDS",
        '{"search": 0.5}.get(split, 0.25)',
        new_words_are_as_frequent_in_later_splits_as_in_the_test_and_far_more,
    ),
    "splits that overlap": (
        jsonl.split_rows,
        "order[held_out:]",
        "order[test:]",
        rows_of_ones_own_keep_every_prompt_in_one_split,
    ),
    "splits that depend on the order of the rows": (
        jsonl._groups,
        "sorted(rows)",
        "list(rows)",
        rows_of_ones_own_keep_every_prompt_in_one_split,
    ),
    "prompts cut apart by a space": (
        jsonl.alike,
        '" ".join(prompt.casefold().split())',
        "prompt.casefold()",
        prompts_that_look_the_same_are_in_one_split,
    ),
    "prompts cut apart by case": (
        jsonl.alike,
        ".casefold()",
        "",
        prompts_that_look_the_same_are_in_one_split,
    ),
    "prompts cut apart by the form of Unicode": (
        jsonl.alike,
        'unicodedata.normalize("NFKC", UNSEEN.sub("", "".join(seen)))',
        'UNSEEN.sub("", "".join(seen))',
        prompts_that_look_the_same_are_in_one_split,
    ),
    "prompts cut apart by how an emoji looks": (
        jsonl.alike,
        'UNSEEN.sub("", "".join(seen))',
        '"".join(seen)',
        prompts_that_look_the_same_are_in_one_split,
    ),
    "prompts cut apart by what nobody sees": (
        jsonl.alike,
        'unicodedata.category(c) != "Cf"',
        "True",
        prompts_that_look_the_same_are_in_one_split,
    ),
    "all prompts are alike": (
        jsonl.alike,
        '" ".join(prompt.casefold().split())',
        "prompt.casefold()[:6]",
        prompts_that_look_the_same_are_in_one_split,
    ),
    "a superset is right": (
        orders.score,
        "canonical(answer) == canonical(completion)",
        "json.loads(answer) | json.loads(completion) == json.loads(answer)",
        json_is_right_only_as_a_whole,
    ),
    "parsed values compared by ==": (
        orders.canonical,
        "json.dumps(value, sort_keys=True)",
        "value",
        json_is_right_only_as_a_whole,
    ),
    "a key twice": (
        orders.canonical,
        "object_pairs_hook=unique, ",
        "",
        json_is_right_only_as_a_whole,
    ),
    "NaN": (
        orders.canonical,
        ", parse_constant=_refuse",
        "",
        json_is_right_only_as_a_whole,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
