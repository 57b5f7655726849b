"""Scorers: what counts as right on rows of one's own, and files that others wrote."""

import os
import random
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planting import each_is_caught, law

from peft_from_scratch.tasks import score_file, score_worker, scorers
from peft_from_scratch.tasks.task import load_task

# The package rouge-score 0.1.2: RougeScorer(["rougeL"], use_stemmer=False), fmeasure.
ROUGE = {
    ("the cat is on the mat", "the cat sat on the mat"): 5 / 6,
    ("The CAT!", "the cat sat on the mat"): 0.5,
    ("police killed the gunman", "police kill the gunman"): 0.75,
    ("the gunman kill police", "police kill the gunman"): 0.5,
    ("a b c d e", "e d c b a"): 0.2,
    ("snake_case and 3.14", "snake case and 3 14"): 1.0,
    ("", "a b"): 0.0,
    ("one two three one two three", "one two three"): 2 / 3,
    (
        "Returns the sum of two numbers.",
        "Return the sum of both numbers, as a float.",
    ): 8 / 15,
}


@law
def rouge_l_is_the_packages_on_ascii():
    for (answer, completion), expected in ROUGE.items():
        assert scorers.rouge_l(answer, completion) == pytest.approx(expected, abs=1e-12)


@law
def rouge_l_counts_letters_of_every_script():
    assert scorers.rouge_l("straße ÜBER", "STRASSE über") == 1
    assert scorers.rouge_l("дом на горе", "дом под горой") == pytest.approx(1 / 3)
    assert scorers.rouge_l("caf\u00e9", "cafe\u0301") == 1  # composed or not
    assert scorers.rouge_l("...", "word") == 0


def subsequences(letters):
    return {
        chosen
        for size in range(len(letters) + 1)
        for chosen in combinations(letters, size)
    }


@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_the_longest_common_sequence_is_that_of_all(a, b):
    longest = max(map(len, subsequences(a) & subsequences(b)))
    assert scorers.longest_common(a, b) == longest


SAME_LABEL = (
    ("positive", "Positive"),
    ("Positive.", "positive"),
    ("positive\nThe review praises the film.", "positive"),
    ("  not  relevant !", "Not relevant"),
    ("ＰＯＳＩＴＩＶＥ", "positive"),
    (":-)", ":-)"),
    ("\n\nspam…", "spam"),
)
OTHER_LABEL = (
    ("", "positive"),
    ("It is positive", "positive"),
    ("negative\npositive", "positive"),
    (":-(", ":-)"),
    ("positively", "positive"),
    ("-1", "1"),
)


@law
def a_label_is_the_first_line_without_case_and_punctuation_behind():
    for answer, completion in SAME_LABEL:
        assert scorers.same_label(answer, completion), answer
    for answer, completion in OTHER_LABEL:
        assert not scorers.same_label(answer, completion), answer


def splits_of(*completions):
    rows = [
        {"prompt": f"p{i}", "completion": text, "place": f"line {i}"}
        for i, text in enumerate(completions, 1)
    ]
    return {"train": rows[:-2], "validation": rows[-2:-1], "test": rows[-1:]}


def refused(name, *completions):
    """The reasons that a scorer has against rows with these completions."""
    with pytest.raises(ValueError) as error:
        chosen = scorers.scorer(name)
        scorers.refuse_unfit(chosen, splits_of(*completions), "rows.jsonl")
    return str(error.value)


@law
def a_scorer_that_does_not_suit_the_completions_is_refused():
    told = refused("json", '{"a": 1}', "{'a': 1}", '{"a": 1, "a": 2}', "NaN")
    assert "rows.jsonl, for the scorer json, has 3 bad rows" in told
    for line in ("line 2: the completion is not JSON: ", "line 3", "line 4"):
        assert line in told
    assert told.index("line 2") < told.index("line 3") < told.index("line 4")
    told = refused("rouge-l", "one", "…", "two words", "three")
    assert "line 2: the completion has no word" in told
    told = refused("label", "yes", "no", "yes\nbecause", "no", "yes", "no")
    assert "line 3: the completion has several lines" in told


@law
def labels_are_few():
    for completions in (
        [f"a sentence with the number {i}" for i in range(10)],
        ["always"] * 10,
        [f"label {i % 201}" for i in range(2000)],
    ):
        told = refused("label", *completions)
        assert f"in {len(completions)} rows" in told and "another scorer" in told
    for completions in (["yes", "No."] * 3, [f"label {i % 200}" for i in range(400)]):
        scorers.refuse_unfit(scorers.scorer("label"), splits_of(*completions), "x")


def test_every_name_scores_its_own_completion_fully():
    for name, text in (
        ("exact", "a b"),
        ("json", '{"a": [1]}'),
        ("label", "spam"),
        ("rouge-l", "a few words"),
    ):
        chosen = scorers.scorer(name)
        assert chosen(text, text) == 1 and chosen("other", text) == 0
        assert (chosen(f" {text}\n", text) == 1) and chosen.meaning and chosen.title


def test_an_unknown_scorer_is_refused():
    with pytest.raises(ValueError) as error:
        scorers.scorer("bleu")
    assert "'bleu' is none of exact, json, label, rouge-l, and no path" in str(
        error.value
    )
    with pytest.raises(FileNotFoundError):
        scorers.scorer("there-is-none.py")


# ------------------------------------------------------------- a file of the user's


@pytest.fixture
def written(tmp_path):
    """written(source): the path of a scorer with this source."""

    def write(source, name="mine.py"):
        (tmp_path / name).write_text(source)
        return str(tmp_path / name)

    return write


ROWS = [
    {"prompt": "p", "completion": "right", "place": "line 7"},
    {"prompt": "q", "completion": "wrong", "place": "line 9"},
]


def scores(path, answers=("right", "right"), rows=ROWS):
    return scorers.score_all(scorers.scorer(path), answers, rows)


HALF = "def score(answer, completion):\n    return {}\n"


@law
def a_files_scores_are_what_it_returns(tmp_path):
    for text, expected in (
        ("answer == completion", [True, False]),
        ("0.25 if answer == completion else 0", [0.25, 0.0]),
        ("__import__('numpy').float32(0.5)", [0.5, 0.5]),
        ("__import__('numpy').bool_(True)", [True, True]),
        ("__import__('fractions').Fraction(1, 4)", [0.25, 0.25]),
    ):
        file = tmp_path / "mine.py"
        file.write_text(HALF.format(text))
        got = scores(str(file))
        assert got == expected and list(map(type, got)) == list(map(type, expected))


# What a file does wrong: (source, what the message says)
HOSTILE = {
    "raises": (
        "import json\n\ndef score(a, c):\n    return json.loads(a) == c\n",
        "mine.py (line 4): JSONDecodeError: Expecting value",
    ),
    "exits": (
        "import sys\ndef score(a, c):\n    sys.exit(3)\n",
        "mine.py (line 3): SystemExit: 3, for the answer 'right' to line 7",
    ),
    "ends the process": (
        "import os\ndef score(a, c):\n    os._exit(0)\n",
        "mine.py: ended the process (exit status 0), for the answer 'right' to line 7",
    ),
    "never ends": (
        "def score(a, c):\n    while True: pass\n",
        "mine.py (line 2): took longer than 1 s",
    ),
    "sleeps": (
        "import time\ndef score(a, c):\n    time.sleep(99)\n",
        "mine.py (line 3): took longer than 1 s, for the answer 'right' to line 7",
    ),
    "recurs": (
        "def score(a, c):\n    return score(a, c)\n",
        "mine.py (line 2): RecursionError",
    ),
    "NaN": (HALF.format("float('nan')"), "(line 1): ValueError: nan is no score from"),
    "above 1": (HALF.format("1.5"), "ValueError: 1.5 is no score from 0 to 1, for the"),
    "below 0": (HALF.format("-1"), "ValueError: -1 is no score from 0 to 1"),
    "nothing": (HALF.format("None"), "(line 1): ValueError: None is no score, for"),
    "text": (HALF.format("'yes'"), "ValueError: 'yes' is no score"),
    "complex": (HALF.format("1j"), "1j is no score"),
    "huge": (HALF.format("10**999"), "is no score from 0 to 1"),
    "one argument": (
        "def score(answer):\n    return True\n",
        "takes 1 positional argument but 2 were given",
    ),
    "asks": (HALF.format("input()"), "(line 2): EOFError"),
    "no function": ("scores = 1\n", "it has no function score(answer, completion)"),
    "no Python": (
        "def score(a, c)\n    return 1\n",
        "mine.py (line 1) cannot be used: SyntaxError: expected ':'",
    ),
    "exits at once": ("raise SystemExit\n", "(line 1) cannot be used: SystemExit"),
    "ends at once": (
        "import os; os._exit(5)\n",
        "cannot be used: ended the process (exit status 5)",
    ),
    "loops at once": ("while True: pass\n", "(line 1) cannot be used: took longer"),
    "imports what is not there": (
        "import no_such_module\n",
        "(line 1) cannot be used: ModuleNotFoundError: No module named",
    ),
}


@law
@pytest.mark.parametrize("case", HOSTILE)
def what_a_file_does_wrong_is_said_with_its_line_and_the_row(
    case, tmp_path, monkeypatch
):
    monkeypatch.setattr(score_file, "SECONDS", 1.0)
    source, told = HOSTILE[case]
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(ValueError) as error:
        scores(str(file))
    assert told in str(error.value) and str(file) in str(error.value)
    assert "Traceback" not in str(error.value)


def test_the_row_that_fails_is_named_not_the_first(written):
    path = written("def score(a, c):\n    return 1 / len(a)\n")
    with pytest.raises(ValueError, match="for the answer '' to line 9, whose compl"):
        scores(path, ("x", ""))


def test_what_a_file_prints_is_no_score(written, capfd):
    path = written(
        "import os, sys\nprint('{}')\ndef score(a, c):\n    print('{\"score\": 1}')\n"
        "    os.system('echo {}')\n    sys.stdout.flush()\n    return 0.5\n"
    )
    assert scores(path) == [0.5, 0.5]
    assert capfd.readouterr().err.count('{"score": 1}') == 2


def test_threads_that_a_file_leaves_do_not_hold_the_run(written):
    path = written(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(99,)).start()\n"
        + HALF.format("True")
    )
    start = time.perf_counter()
    assert scores(path) == [True, True]
    assert time.perf_counter() - start < 20


def test_a_file_changes_nothing_in_the_run(written):
    path = written(
        "import os, random, signal\nrandom.seed(0)\nos.environ['MARK'] = '1'\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\nos.chdir('/')\n"
        + HALF.format("True")
    )
    state, here = random.getstate(), os.getcwd()
    handler = signal.getsignal(signal.SIGINT)
    scores(path)
    assert random.getstate() == state and os.getcwd() == here
    assert "MARK" not in os.environ and signal.getsignal(signal.SIGINT) is handler


def test_a_file_may_import_what_lies_beside_it(written, monkeypatch):
    written("LIMIT = 3\n", "task.py")  # a name that the package has as well
    path = written("import task\n" + HALF.format("len(answer) > task.LIMIT"))
    assert scores(path) == [True, True]
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    assert scores(path) == [True, True]


@law
def a_changed_file_is_another_scorer_and_a_running_one_keeps_what_it_read(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(HALF.format("0.25"))
    first = scorers.scorer(str(file))
    assert first("a", "a") == 0.25
    file.write_text(HALF.format("0.75"))  # as long, in the same second
    second = scorers.scorer(str(file))
    assert first("a", "a") == 0.25 and second("a", "a") == 0.75
    assert first.identity != second.identity
    assert second.identity == scorers.scorer(str(file)).identity
    assert not list(tmp_path.glob("__pycache__"))


def test_a_file_in_another_encoding_is_read_as_python_reads_it(tmp_path):
    file = tmp_path / "mine.py"
    text = "# coding: latin-1\ndef score(a, c):\n    return a == 'caf\u00e9'\n"
    file.write_bytes(text.encode("latin-1"))
    assert scores(str(file), ("caf\u00e9", "caf\u00e9\U0001f600")) == [True, False]


@law
def a_file_is_tried_before_anything_is_trained(tmp_path):
    file, rows = tmp_path / "mine.py", tmp_path / "rows.jsonl"
    rows.write_text(
        "\n".join(f'{{"prompt": "p{i}", "completion": "{i}"}}' for i in range(9))
    )
    for text, told in (
        (
            "float(answer == completion) if int(answer) else 0",
            "invalid literal for int",
        ),
        ("answer != completion", "gives 0 to each of 1 test rows' own"),
        ("1 / (completion != answer)", "ZeroDivisionError"),
    ):
        file.write_text(HALF.format(text))
        with pytest.raises(ValueError) as error:
            load_task(str(rows), scorer=str(file))
        assert told in str(error.value)
    file.write_text(HALF.format("0.9 * (answer == completion)"))
    task = load_task(str(rows), scorer=str(file), instruction="Count.")
    assert task.score("1", "1") == 0.9 and task.instruction == "Count."


def test_ctrl_c_ends_a_score_without_a_word_of_the_process(written, tmp_path):
    """The terminal sends it to both processes."""
    begun = tmp_path / "begun"
    path = written(
        "import time\ndef score(a, c):\n"
        f"    open({str(begun)!r}, 'w').close()\n    time.sleep(99)\n"
    )
    code = (
        "import sys\nfrom peft_from_scratch.tasks.scorers import scorer\n"
        "try:\n    scorer(sys.argv[1])('a', 'a')\n"
        "except KeyboardInterrupt:\n    print('stopped')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert out == "stopped\n" and error == ""


def test_generated_tasks_keep_their_scorer_and_instruction():
    for more in ({"scorer": "label"}, {"instruction": "Do."}):
        with pytest.raises(ValueError, match="'terms' has an instruction and a scorer"):
            load_task("terms", **more)


test_a_planted_bug_is_caught = each_is_caught(
    {
        "the answer's words on both sides": (
            scorers.rouge_l,
            "common / len(theirs)",
            "common / len(ours)",
            rouge_l_is_the_packages_on_ascii,
        ),
        "a bag of words": (
            scorers.longest_common,
            "return row[-1]",
            "return len(set(a) & set(b))",
            rouge_l_is_the_packages_on_ascii,
        ),
        "ASCII alone": (
            scorers.words,
            "WORD.findall(",
            "re.findall('[a-z0-9]+', ",
            rouge_l_counts_letters_of_every_script,
        ),
        "letters in two pieces": (
            scorers.words,
            'unicodedata.normalize("NFKC", text)',
            "text",
            rouge_l_counts_letters_of_every_script,
        ),
        "the last line": (
            scorers.label,
            "lines[0].casefold()",
            "lines[-1].casefold()",
            a_label_is_the_first_line_without_case_and_punctuation_behind,
        ),
        "a label of punctuation is no label": (
            scorers.label,
            " or line",
            "",
            a_label_is_the_first_line_without_case_and_punctuation_behind,
        ),
        "punctuation in front": (
            scorers.label,
            "line.rstrip(",
            "line.strip(",
            a_label_is_the_first_line_without_case_and_punctuation_behind,
        ),
        "a label may be anywhere": (
            scorers.same_label,
            "label(answer) == label(completion)",
            "label(completion) in label(answer)",
            a_label_is_the_first_line_without_case_and_punctuation_behind,
        ),
        "JSON for no JSON": (
            scorers._reason_against_json,
            'return f"the completion is not JSON: {error}"',
            "return None",
            a_scorer_that_does_not_suit_the_completions_is_refused,
        ),
        "a label of two lines": (
            scorers._reason_against_label,
            "== 1",
            ">= 1",
            a_scorer_that_does_not_suit_the_completions_is_refused,
        ),
        "one label": (
            scorers._no_labels,
            "len(counts) < 2",
            "len(counts) < 1",
            labels_are_few,
        ),
        "every row a label": (
            scorers._no_labels,
            "len(rows) / 2",
            "len(rows)",
            labels_are_few,
        ),
        "a thousand labels": (
            scorers._no_labels,
            "min(MOST_LABELS, len(rows) / 2)",
            "len(rows) / 2",
            labels_are_few,
        ),
    },
    (AssertionError, pytest.fail.Exception),
)


def test_a_bug_planted_in_the_worker_is_caught(tmp_path, monkeypatch):
    """The worker is another process: the bugs stand in a copy of its file."""
    source = Path(score_worker.__file__).read_text()
    copy = tmp_path / "worker.py"
    monkeypatch.setattr(score_worker, "__file__", str(copy))
    for right, wrong, case in (
        ("except BaseException", "except Exception", "exits"),
        ("not 0 <= value <= 1", "value > 1", "below 0"),
        ("not 0 <= value <= 1", "value < 0", "above 1"),
        ("not 0 <= value <= 1", "value < 0 or value > 1", "NaN"),
        (" or first_line(score)", "", "nothing"),
        ("reversed(frames)", "frames[:0]", "raises"),
    ):
        assert source.count(right) == 1, right
        copy.write_text(source.replace(right, wrong))
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            what_a_file_does_wrong_is_said_with_its_line_and_the_row(
                case, tmp_path, monkeypatch
            )
    copy.write_text(source)
    what_a_file_does_wrong_is_said_with_its_line_and_the_row(
        "exits", tmp_path, monkeypatch
    )
