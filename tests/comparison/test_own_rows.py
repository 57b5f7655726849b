"""A comparison on rows of one's own: all checked, counted, scored as asked."""

import inspect
import json
import re
from pathlib import Path
from statistics import fmean

import pytest
from matplotlib.figure import Figure
from planting import planted

from peft_from_scratch.cli import command_line
from peft_from_scratch.cli.command_line import main
from peft_from_scratch.comparison import (
    adapt,
    compare,
    estimate,
    measure,
    own_rows,
    shots,
    tuning,
)
from peft_from_scratch.comparison.plan import Plan
from peft_from_scratch.comparison.setup import load_setup
from peft_from_scratch.plotting import curves
from peft_from_scratch.tasks.templates import encode_prompt, encode_row
from peft_from_scratch.training import evaluation

PROMPTING = ("zero-shot", "few-shot")


@pytest.fixture
def rows(tmp_path):
    """rows(pairs): the path of a file with these (prompt, completion)."""

    def write(pairs, name="rows.jsonl"):
        lines = [json.dumps({"prompt": p, "completion": c}) for p, c in pairs]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    return write


def sayings(n=40):
    return [(f"say {i}", "odd" if i % 2 else "even") for i in range(n)]


@pytest.fixture
def setup_of(base, rows, tmp_path):
    """setup_of(pairs, **plan): the setup of a comparison on these rows."""

    def load(pairs, **more):
        options = dict(rows=4, steps=2, batch=2, methods=PROMPTING) | more
        plan = Plan(base, rows(pairs), out=str(tmp_path / "out"), **options)
        return load_setup(plan)

    return load


# ------------------------------------------------------------------ what is refused


def refused(setup):
    with pytest.raises(ValueError) as error:
        own_rows.checked(setup)
    return str(error.value)


def test_rows_that_are_too_long_are_named_by_line_and_in_order(setup_of):
    """The splits are shuffled, the list is not."""
    pairs, lines = sayings(), [2, 5, 7, 11, 19, 23, 31, 38]
    for line in lines:
        pairs[line - 1] = (f"say {line} " + "x" * 300, "odd")
    refusal = refused(setup_of(pairs))
    assert "has 8 bad rows" in refusal
    named = re.findall(r"line (\d+): \d+ tokens, the limit is 256", refusal)
    assert list(map(int, named)) == lines


def test_a_row_that_fits_but_for_its_answer_is_refused(setup_of):
    """256 positions. The prompts leave room for the answer, but none for a prefix."""
    small = setup_of([(f"{i:02d} ", "y" * 40) for i in range(40)], template="raw")
    room = evaluation.answer_room(small.tokenizer, small.task.test)
    prompt = encode_prompt(small.tokenizer, "", "00 ", template="raw")
    left = 256 - len(prompt) - room
    for more, methods, fits in (
        (0, ("zero-shot",), True),
        (1, ("zero-shot",), False),
        (0, ("zero-shot", "prompt"), False),
        (-16, ("zero-shot", "prompt"), True),
        (-15, ("zero-shot", "prompt"), False),
    ):
        pairs = [(f"{i:02d} " + "x" * (left + more), "y" * 40) for i in range(40)]
        setup = setup_of(pairs, template="raw", methods=methods)
        if fits:
            assert own_rows.checked(setup) is setup
        else:
            refusal = refused(setup)
            assert "prompt and longest answer: " in refusal
            assert "beside those of a soft prompt" in refusal


def test_nothing_is_trained_on_a_file_with_a_bad_row(base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "measure", lambda *args: pytest.fail("measured"))
    path, out = rows([*sayings(), ("say 50 " + "x" * 400, "odd")]), tmp_path / "out"
    command = ["compare", "--base", base, "--data", path, "--out", str(out)]
    assert main([*command, "--methods", "zero-shot,lora"]) == 1
    assert not (out / "rows").exists() and not (out / "compare.json").exists()


def test_rows_are_looked_at_in_every_template(monkeypatch):
    """A search may choose either: the chat template's marks take room."""
    looked = []

    def noting(setup, template):
        looked.append(template)
        return []

    class Looked:
        task = type("Task", (), {"name": "x", "score": own_rows.Scorer})
        templates = ("chat", "raw")
        plan = Plan(methods=("lora",))

    monkeypatch.setattr(own_rows, "_bad_rows", noting)
    monkeypatch.setattr(own_rows, "is_own", lambda setup: True)
    monkeypatch.setattr(own_rows, "_without_few_shot", lambda setup: setup)
    own_rows.checked(Looked)
    assert looked == ["chat", "raw"]


# ---------------------------------------------------------------- what is announced


def test_the_announcement_counts_rows_and_says_what_they_cannot_tell(setup_of):
    setup = setup_of(sayings(), scorer="label")
    notes = own_rows.notes(setup)
    assert notes[0].startswith(f"{setup.task.name}: 28 rows train, 4 validate, 8 test.")
    assert "Training reads a row 0.14 times" in notes[0]  # 2 steps of 2, 28 rows
    assert notes[1].startswith("Scored by label. Share of the test rows whose answer")
    assert notes[2].startswith("No instruction: zero-shot is not told what to do")
    assert notes[3].startswith("Only 4 test rows: with 2 right, ")
    assert "from 15 to 85 %" in notes[3]  # Wilson's interval of 2 of 4
    told = own_rows.notes(setup_of(sayings(), instruction="Odd or even?"))
    assert not [note for note in told if "instruction" in note]
    many = own_rows.notes(setup_of(sayings(200), rows=30))
    assert not [note for note in many if note.startswith("Only")]
    alone = own_rows.notes(setup_of(sayings(), methods=("lora",)))
    assert not [note for note in alone if "instruction" in note]


def test_contradictions_and_labels_without_training_are_told(setup_of):
    pairs = [*sayings(), ("Same  Thing", "odd"), ("same thing", "even")]
    (note,) = [n for n in own_rows.notes(setup_of(pairs)) if "spaces alone" in n]
    assert note.startswith("Once, prompts that differ in case or spaces alone")
    assert "line 41" in note and "line 42" in note
    pairs = sayings()
    setup = setup_of(pairs)
    at = int(setup.task.test[0]["place"].split()[1]) - 1
    pairs[at] = (pairs[at][0], "rare")
    (note,) = [
        n for n in own_rows.notes(setup_of(pairs, scorer="label")) if "rare" in n
    ]
    assert "no training row has" in note


def test_a_generated_task_has_no_notes(base, tmp_path):
    setup = load_setup(Plan(base, "terms", PROMPTING, rows=4, out=str(tmp_path)))
    assert own_rows.notes(setup) == [] and own_rows.data(setup, []) == {}
    assert own_rows.checked(setup) is setup


def test_the_cost_is_from_the_files_own_tokens(setup_of):
    pairs = [(f"say {i} " + "x" * (i % 30), "y" * (1 + i % 7)) for i in range(40)]
    setup = setup_of(pairs, template="raw", instruction="Say it.")
    sizes, task = own_rows.sizes(setup), setup.task
    encoded = [
        encode_row(
            setup.tokenizer, "Say it.", row["prompt"], row["completion"], template="raw"
        )
        for row in task.train
    ]
    assert sizes.tokens == fmean(len(ids) for ids, _ in encoded)
    assert sizes.labels == fmean(len(row["completion"]) + 2 for row in task.train)
    k = shots.fitted(setup, {"template": "raw", "k": 8, "order": 0})["k"]
    examples = adapt.few_shot_examples(task, k, 0)
    prompt = encode_prompt(
        setup.tokenizer,
        "Say it.",
        task.test[0]["prompt"],
        template="raw",
        examples=examples,
    )
    assert sizes.few_shot == len(prompt)


def test_long_rows_cost_more():
    rates, plan = estimate.Rates(1e11, 1e10, 1e9), Plan()
    short, long = (estimate.Sizes(n, n / 4, 8 * n) for n in (50, 400))
    for cost in (estimate.compare_seconds, estimate.tuning_seconds):
        assert cost(rates, plan, long) > 4 * cost(rates, plan, short) / 2
        assert cost(rates, plan) == cost(rates, plan, estimate.ORDERS)
    step = estimate.step_seconds(rates, 8, full=False, sizes=long)
    assert step == 8 * estimate.step_seconds(rates, 8, full=False, sizes=short)


# --------------------------------------------------------------------------- few-shot


def few_shot(k, order=0, template="raw"):
    return {"template": template, "k": k, "order": order}


def test_as_many_examples_stand_there_as_fit(setup_of):
    """256 positions; in them the examples, the prompt and the answer."""
    for length in range(24, 36, 3):
        setup = setup_of([(f"{i:02d} " + "x" * length, "yy") for i in range(40)])
        k = shots.fitted(setup, few_shot(12))["k"]
        assert 0 < k < 12
        assert tokens(setup, length, k) <= 256 < tokens(setup, length, k + 1)
        assert shots.fitted(setup, few_shot(1)) == few_shot(1)
    trained = {"template": "raw", "lr": 1.0}
    assert shots.fitted(setup, trained) == trained


def tokens(setup, length, k):
    """Those of a prompt of this length after k examples, and of its answer."""
    examples, prompt = adapt.few_shot_examples(setup.task, k, 0), "00 " + "x" * length
    ids = encode_prompt(setup.tokenizer, "", prompt, template="raw", examples=examples)
    return len(ids) + evaluation.answer_room(setup.tokenizer, setup.task.test)


def test_there_are_no_more_examples_than_training_rows(setup_of):
    setup = setup_of([(str(i), "a") for i in range(4)])
    assert shots.fitted(setup, few_shot(12))["k"] == len(setup.task.train) == 2


def test_the_examples_take_a_bounded_share_of_memory(setup_of, monkeypatch):
    setup = setup_of(sayings())
    monkeypatch.setattr(shots, "MOST_TOKENS", 60)
    assert shots.fitted(setup, few_shot(4))["k"] < 4


def test_the_search_tries_what_fits_each_once(setup_of, capsys):
    pairs = [(f"{i:02d} " + "x" * 30, "yy") for i in range(40)]
    setup = setup_of(pairs, template="raw")
    (candidate,) = [c for c in setup.plan.chosen() if c.few_shot]
    most = shots.fitted(setup, few_shot(12))["k"]
    tried = tuning._fitting(setup, tuning.grid(candidate, ("raw",)))
    assert {setting["k"] for setting in tried} == {most}  # below 4: one for each order
    assert [setting["order"] for setting in tried] == list(tuning.ORDERS)
    assert f"at most {most} examples fit" in capsys.readouterr().out


def test_where_not_one_example_fits_few_shot_is_left_out(setup_of, capsys):
    pairs = [(f"{i:02d} " + "x" * 100, "yyyy") for i in range(40)]
    setup = own_rows.checked(setup_of(pairs))
    assert setup.plan.methods == ("zero-shot",)
    assert "left out: few-shot, since not one example fits" in capsys.readouterr().out


# ------------------------------------------------------------------- the whole of it


@pytest.fixture
def run(base, rows, tmp_path, monkeypatch, capsys):
    """run(*options): the result of a comparison on the command line, and its output."""
    monkeypatch.chdir(tmp_path)
    path = rows(sayings())

    def compared(*options, methods="zero-shot,few-shot,lora"):
        sizes = ("--rows", "8", "--steps", "2", "--batch", "2")
        command = ["compare", "--base", base, "--data", path, "--methods", methods]
        status = main([*command, *sizes, *options])
        result = tmp_path / "out" / "rows" / "compare.json"
        output = capsys.readouterr()
        return status, result.exists() and json.loads(result.read_text()), output

    return compared


def test_own_rows_end_in_the_same_page_in_a_folder_of_their_own(run, tmp_path):
    status, result, output = run("--scorer", "label", "--instruction", "Odd or even?")
    assert status == 0
    assert result["data"] == {
        "file": str(tmp_path / "rows.jsonl"),
        "rows": {"train": 28, "validation": 4, "test": 8},
        "scorer": "label",
        "title": "right label",
        "meaning": "Share of the test rows whose answer names the right label.",
        "notes": result["data"]["notes"],
    }
    assert result["instruction"] == "Odd or even?"
    for note in result["data"]["notes"]:
        assert note in output.out
    assert (tmp_path / "out" / "rows" / "compare.html").stat().st_size > 1000
    assert "--scorer label --instruction 'Odd or even?'" in result["command"]


def test_rows_without_an_instruction_are_compared(run):
    """Prompt tuning then starts from words of the vocabulary."""
    status, result, _ = run(methods="zero-shot,prompt,prefix")
    assert status == 0 and len(result["rows"]) == 3
    assert not [row for row in result["rows"] if "start" in row["settings"]]


def test_scores_between_reach_the_result(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(answer, completion):\n"
        "    return 1.0 if answer == completion else 0.25\n"
    )
    status, result, _ = run("--scorer", "mine.py", methods="zero-shot")
    assert status == 0
    kept = [json.loads(f.read_text()) for f in (tmp_path / "out").rglob("zero-*.json")]
    assert kept[0]["correct"] == [0.25] * 8
    assert result["rows"][0]["exact"]["rate"] == 0.25


def test_a_changed_scorer_measures_again_and_an_unchanged_one_does_not(
    run, tmp_path, monkeypatch
):
    measured = []
    sound = compare.measure

    def noting(*args):
        measured.append(args[0].key)
        return sound(*args)

    monkeypatch.setattr(compare, "measure", noting)
    mine = tmp_path / "mine.py"
    source = "def score(answer, completion):\n    return {}\n"
    for text in ("0.5", "0.5", "0.75"):
        mine.write_text(source.format(text))
        assert run("--scorer", "mine.py", methods="zero-shot")[0] == 0
    assert measured == ["zero-shot"] * 2


FAILS_LATER = """
from pathlib import Path
def score(answer, completion):
    if Path({!r}).exists() and answer != completion:
        raise RuntimeError("not today")
    return answer == completion
"""


def test_a_scorer_that_raises_loses_neither_training_nor_answers(
    run, tmp_path, monkeypatch
):
    """It fails on what a trained model answers, after all that was tried before."""
    calls = []
    for module, name in ((evaluation, "generate"), (adapt, "train")):
        sound = getattr(module, name)

        def noting(*args, sound=sound, name=name, **options):
            calls.append(name)
            result = sound(*args, **options)
            if name == "train":
                calls[-1] += f" {len(result.step_seconds)}"
            return result

        monkeypatch.setattr(module, name, noting)
    flag, sound = tmp_path / "flag", measure.adapt

    def then_fail(*args, **options):
        ready = sound(*args, **options)
        flag.touch()
        return ready

    monkeypatch.setattr(measure, "adapt", then_fail)
    (tmp_path / "mine.py").write_text(FAILS_LATER.format(str(flag)))
    status, _, output = run("--scorer", "mine.py", methods="lora")
    assert status == 1 and "mine.py (line 5): RuntimeError: not today" in output.err
    assert "to line " in output.err
    assert calls == ["train 2", "generate"]
    (tmp_path / "mine.py").write_text("def score(a, c):\n    return a == c\n")
    flag.unlink()
    steps = []
    monkeypatch.setattr(
        adapt,
        "train",
        lambda *args, sound=adapt.train, **options: sound(
            *args, **options, on_step=steps.append
        ),
    )
    calls.clear()
    assert run("--scorer", "mine.py", methods="lora")[0] == 0
    assert steps == [] and "generate" not in calls  # nothing trained, nothing answered
    assert not list((tmp_path / "out/rows/checkpoints").glob("*"))


def test_other_weights_do_not_get_the_kept_answers(setup_of, tmp_path, monkeypatch):
    setup = setup_of(sayings())
    keep = tmp_path / "answers.json"
    (zero,) = [c for c in setup.plan.chosen() if not c.few_shot]
    ready = adapt.adapt(zero, setup, {"template": "raw"}, 0)
    first = ready.answer(setup.task, setup.task.test, keep)
    asked = []
    sound = evaluation.generate
    monkeypatch.setattr(
        evaluation, "generate", lambda *a, **k: asked.append(1) or sound(*a, **k)
    )
    again = ready.answer(setup.task, setup.task.test, keep)
    assert again == first and not asked
    next(ready.model.parameters()).data[0, 0] += 1
    ready.answer(setup.task, setup.task.test, keep)
    assert len(asked) == 1
    ready.answer(setup.task, setup.task.validation, keep)
    assert len(asked) == 2


def test_data_and_task_exclude_each_other(run, capsys):
    status, _, output = run("--task", "orders")
    assert status == 1 and "--data and --task exclude each other" in output.err


def test_data_that_is_none_is_refused(base, capsys):
    for data in ("orders", "rows.csv", "there/is/none"):
        assert main(["compare", "--base", base, "--data", data]) == 1
        told = capsys.readouterr().err
        assert f"--data {data}: a .jsonl file is needed" in told


def test_the_results_of_own_rows_have_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    own = command_line.own_data
    assert own("a/b/my rows.jsonl", {})["out"] == str(Path("out", "my rows"))
    assert own("hub:owner/name", {})["out"] == str(Path("out", "owner-name"))
    assert own("rows.jsonl", {"out": "mine"}) == {"out": "mine", "task": "rows.jsonl"}
    assert own("~/rows.jsonl", {})["task"] == str(tmp_path / "rows.jsonl")


def test_a_score_that_the_completions_do_not_reach_is_told(setup_of, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def score(a, c):\n    return 0.8 * (a == c)\n")
    (note,) = [
        note
        for note in own_rows.notes(setup_of(sayings(), scorer=str(mine)))
        if "completions reach" in note
    ]
    assert "reach 0.80 on average" in note


def conversation(i, system=None):
    turns = [
        {"role": "user", "content": f"say {i}"},
        {"role": "assistant", "content": "even" if i % 2 else "odd"},
        {"role": "user", "content": f"and {i + 1}?"},
        {"role": "assistant", "content": "odd" if i % 2 else "even"},
    ]
    first = [{"role": "system", "content": system}] if system else []
    return {"messages": [*first, *turns]}


@pytest.fixture
def chats_of(base, tmp_path):
    """chats_of(rows, **plan): the setup of a comparison on conversations."""

    def load(rows, **more):
        file = tmp_path / "chats.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        options = dict(rows=4, steps=2, batch=2, methods=PROMPTING) | more
        return load_setup(Plan(base, str(file), out=str(tmp_path / "out"), **options))

    return load


def test_conversations_are_counted_up_to_their_last_answer(chats_of):
    setup = chats_of([conversation(i) for i in range(40)], template="raw")
    ids, labels = own_rows._encode(setup, "test", "raw")[0][0]
    row = setup.task.test[0]
    prompt = encode_prompt(setup.tokenizer, "", row["messages"][:-1], template="raw")
    assert own_rows._prompt(labels) == len(prompt)
    assert ids[: len(prompt)] == prompt
    assert own_rows.checked(setup).plan.methods == PROMPTING


def test_a_system_turn_is_an_instruction(chats_of):
    def told(rows, **more):
        notes = own_rows.notes(chats_of(rows, **more))
        return [note for note in notes if note.startswith("No instruction")]

    assert told([conversation(i) for i in range(40)])
    assert not told([conversation(i, "Odd or even?") for i in range(40)])
    assert not told([conversation(i, f"Odd {i}?") for i in range(40)])
    assert not told([conversation(i) for i in range(40)], instruction="Odd?")
    with pytest.raises(ValueError, match="have a system turn, 'Odd or even"):
        chats_of([conversation(i, "Odd or even?") for i in range(40)], instruction="?")


BUGS = {
    "more examples than fit": (
        shots.fitted,
        "k -= 1",
        "break",
        test_as_many_examples_stand_there_as_fit,
    ),
    "no room for the answer": (
        shots._fits,
        "with_examples + room <= most",
        "with_examples <= most",
        test_as_many_examples_stand_there_as_fit,
    ),
    "no example where not all fit": (
        shots.fitted,
        "k -= 1",
        "k = 0",
        test_as_many_examples_stand_there_as_fit,
    ),
    "more examples than rows": (
        shots.fitted,
        'min(values["k"], len(setup.task.train))',
        'values["k"]',
        test_there_are_no_more_examples_than_training_rows,
    ),
    "examples without a bound": (
        shots._fits,
        " and with_examples - alone <= MOST_TOKENS",
        "",
        test_the_examples_take_a_bounded_share_of_memory,
    ),
    "a setting twice": (
        tuning._fitting,
        "fitted not in fitting",
        "True",
        test_the_search_tries_what_fits_each_once,
    ),
    "one template is enough": (
        own_rows.checked,
        "_templates(setup):",
        "_templates(setup)[:1]:",
        test_rows_are_looked_at_in_every_template,
    ),
    "an answer needs no room": (
        own_rows._bad_rows,
        "_prompt(labels) + room",
        "_prompt(labels)",
        test_a_row_that_fits_but_for_its_answer_is_refused,
    ),
    "a soft prompt takes no position": (
        own_rows._positions,
        '.get("n", 0)',
        '.get("none", 0)',
        test_a_row_that_fits_but_for_its_answer_is_refused,
    ),
    "bad rows in the order of the splits": (
        own_rows.checked,
        "in_order(bad.items())",
        "list(bad.items())",
        test_rows_that_are_too_long_are_named_by_line_and_in_order,
    ),
    "a prompt up to the first answer": (
        own_rows._prompt,
        "max(i for i, each in enumerate(labels, 1) if each == IGNORED)",
        "sum(each == IGNORED for each in labels)",
        test_conversations_are_counted_up_to_their_last_answer,
    ),
    "a system turn is none": (
        own_rows._has_system_turn,
        'row.get("messages") or',
        "None or",
        test_a_system_turn_is_an_instruction,
    ),
    "labels are all completions": (
        own_rows.sizes,
        "_labels(labels)",
        "len(labels)",
        test_the_cost_is_from_the_files_own_tokens,
    ),
    "answers of other weights": (
        evaluation.answer_rows,
        "_weights(model), ",
        "",
        test_other_weights_do_not_get_the_kept_answers,
    ),
    "answers to other prompts": (
        evaluation.answer_rows,
        "prompts, most)",
        "most)",
        test_other_weights_do_not_get_the_kept_answers,
    ),
    "a changed scorer is the same run": (
        compare._configuration,
        "scorers.identity(setup.task.score)",
        "None",
        test_a_changed_scorer_measures_again_and_an_unchanged_one_does_not,
    ),
    "another scorer is another training": (
        compare._measured_once,
        '{**configuration, "scorer": None}',
        "configuration",
        test_a_scorer_that_raises_loses_neither_training_nor_answers,
    ),
    "an instruction of no words": (
        adapt._init,
        " and task.instruction",
        "",
        test_rows_without_an_instruction_are_compared,
    ),
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught(bug, request):
    function, right, wrong, holds = bug
    names = inspect.signature(holds).parameters
    fixtures = {name: request.getfixturevalue(name) for name in names}
    with (
        planted(function, right, wrong),
        pytest.raises((AssertionError, ValueError, pytest.fail.Exception)),
    ):
        holds(**fixtures)


@pytest.mark.parametrize("losses", [(2.8, 3.8), (1.2, 9.0), (2.0, 30.0)])
def test_losses_within_a_decade_have_a_picture(losses):
    """Long rows train slowly: between 1 and 10 a logarithmic axis has no major tick."""
    figure = Figure()
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.plot([1, 50, 90], [losses[0], 3.1, losses[1]])
    curves._scale(axes, [1, 50, 90])
    assert 0 < axes.get_position().x0 < 0.5
