"""The build: text form to executed notebook and cost card, or nothing at all."""

import json
import os
import re
import shutil
from pathlib import Path

import build
import nbformat
import pytest
import rules
from planting import assert_caught

from peft_from_scratch.course import cards

SAMPLE = Path(__file__).parents[1] / "sample" / "90_sample.py"
PLAIN = """\
# %% [markdown]
# # Plain

# %%
print("one")
print("two")
"""
CARD = cards.Card(1.0, 2.0, 3, None, 0, "tiny", "cpu", 1, "a machine", "2026-11-30")
NOISY = """\
# %%
import sys
import ipywidgets
from IPython.display import display

for i in range(3):
    print(i, flush=True)
display(ipywidgets.IntSlider())
print("after")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of texts, and no cards."""
    monkeypatch.setenv(cards.OVERRIDE, str(tmp_path / "costs.json"))
    made = tmp_path / "notebooks"
    made.mkdir()
    return made


def write(folder, source, name="50_plain.py"):
    text = folder / name
    text.write_text(source)
    return text


def stored(text):
    return nbformat.read(text.with_suffix(".ipynb"), as_version=4)


def printed(notebook):
    return rules.printed(rules.outputs(notebook))


# ------------------------------------------------------------------------ What it makes


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sample's text, built anew: its notebook and its cards."""
    tmp = tmp_path_factory.mktemp("build")
    text = Path(shutil.copytree(SAMPLE.parent, tmp / "sample")) / SAMPLE.name
    text.with_suffix(".ipynb").unlink()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(cards.OVERRIDE, str(tmp / "costs.json"))
        patched.setenv("PYTHONPATH", str(text.parent), prepend=os.pathsep)
        patched.delenv("CI", raising=False)
        build.build(text, draft=True)  # a draft: the sample is no lesson in size
        return stored(text), cards.read()


def test_a_new_build_differs_from_the_stored_one_in_costs_only(built):
    notebook, _ = built
    before = stored(SAMPLE)
    rules.agrees(notebook, before)
    assert notebook.metadata == before.metadata
    costs = {1, len(notebook.cells) - 1}  # start and receipt
    for at, (new, old) in enumerate(zip(notebook.cells, before.cells, strict=True)):
        if new.cell_type == "code":
            assert new.execution_count == old.execution_count
            assert at in costs or plain(new) == plain(old)


def plain(cell):
    """Outputs without the bytes of pictures, which fonts may change."""
    return [
        {k: v for k, v in output.items() if k != "data"}
        | {"kinds": list(kinds(output))}
        for output in cell.outputs
    ]


def kinds(output):
    return sorted(output.get("data", {}))


def test_a_lesson_without_a_card_is_run_twice_and_the_second_run_is_stored(built):
    """So the receipt compares two runs, and the start speaks of the first."""
    notebook, known = built
    card = known["90"]
    start, *_, receipt = rules.cells(notebook, "code")
    assert f"Measured: {card}." in rules.printed(start.outputs)
    predicted = re.search(r"predicted (\S+) s, took \S+ s", printed(notebook))[1]
    # Another run calibrates anew, and tells two digits.
    assert float(predicted) == pytest.approx(card.seconds, rel=0.5)
    assert "memory: predicted" in rules.printed(receipt.outputs)


def test_a_lesson_with_a_card_keeps_it_unless_another_is_asked_for(folder, monkeypatch):
    runs = []
    monkeypatch.setattr(
        build, "execute", lambda notebook, folder: runs.append(folder) or CARD
    )
    lesson = build.notebook_of(SAMPLE)
    cards.write({"90": CARD})
    assert build.run(lesson, folder) == {} and len(runs) == 1
    assert build.run(lesson, folder, anew=True) == {"90": CARD} and len(runs) == 3
    plain = build.notebook_of(write(folder, PLAIN))
    assert build.run(plain, folder) == {} and len(runs) == 4


def test_a_notebook_says_which_results_it_read(folder):
    source = """\
# %%
from peft_from_scratch.common.provenance import ROOT

text = (ROOT / "data" / "results" / "tuning.json").read_text()
(ROOT / "README.md").read_text()[:0]
"""
    text = write(folder, source)
    build.build(text, draft=True)
    reads = stored(text).metadata[build.RECORD]["reads"]
    assert list(reads) == ["data/results/tuning.json"]
    rules.has_read_what_is_there(stored(text), None)


def test_the_card_holds_what_the_kernel_took(built):
    card = built[1]["90"]
    assert 1 < card.seconds < 300 and card.products > 0
    assert 2e8 < card.peak_bytes < 5e9
    assert (card.base, card.threads, card.downloads) == ("tiny", 1, 0)


def test_noise_is_left_out(folder):
    text = write(folder, NOISY)
    assert not build.build(text, draft=True)
    notebook = stored(text)
    (cell,) = notebook.cells
    assert [output.text for output in cell.outputs] == ["0\n1\n2\nafter\n"]
    assert "widgets" not in notebook.metadata
    assert "execution" not in cell.metadata
    assert "version" not in notebook.metadata.language_info
    nbformat.validate(notebook)


def test_a_cell_keeps_its_name_where_another_is_put_in_above(folder):
    def names(source):
        return {c.source: c.id for c in build.notebook_of(write(folder, source)).cells}

    before, after = names(PLAIN), names("# %%\nx = 1\n\n" + PLAIN)
    assert before.items() <= after.items()
    twice = build.notebook_of(write(folder, "# %%\nx = 1\n\n# %%\nx = 1\n"))
    assert twice.cells[0].id != twice.cells[1].id
    assert all(re.fullmatch(r"[\w-]{1,64}", i) for i in (*after.values(),))


# ----------------------------------------------------------------- What it leaves alone


@pytest.fixture
def no_rules(monkeypatch):
    monkeypatch.setattr(build, "RULES", ())


def test_a_cell_that_fails_leaves_the_old_notebook(folder, no_rules, capsys):
    text = write(folder, PLAIN)
    assert build.build(text)
    before = text.with_suffix(".ipynb").read_bytes()
    write(folder, PLAIN + "\n# %%\n1 / 0\n")
    assert build.main([], folder) == 1
    assert text.with_suffix(".ipynb").read_bytes() == before
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {"50_plain.py", "50_plain.ipynb"}


def test_a_broken_rule_leaves_the_old_notebook_and_card(folder, monkeypatch, capsys):
    def rule(notebook, text):
        assert "one" not in rules.source(notebook), "no ones"

    monkeypatch.setattr(build, "RULES", (rule,))
    ran = {"50": json.loads('{"a": 1}')}
    monkeypatch.setattr(build, "run", lambda notebook, folder, anew: ran)
    text = write(folder, PLAIN)
    assert build.main([], folder) == 1
    assert not text.with_suffix(".ipynb").exists() and not cards.read()
    assert "    rule: no ones" in capsys.readouterr().out


def test_one_that_fails_does_not_keep_the_others(folder, no_rules):
    write(folder, "# %%\n1 / 0\n", "10_bad.py")
    text = write(folder, PLAIN)
    assert build.main([], folder) == 1
    assert "one\ntwo\n" in printed(stored(text))


# -------------------------------------------------------------------------------- Check


def test_check_tells_what_is_stale_and_runs_nothing(folder, monkeypatch, capsys):
    monkeypatch.setattr(build, "NotebookClient", None)
    monkeypatch.setattr(build, "TEXT_RULES", ())
    monkeypatch.setattr(build, "RULES", ())

    def check(source):
        text = write(folder, source)
        status = build.main(["--check"], folder)
        return status, capsys.readouterr().out.split(": ")[1].strip(), text

    *said, text = check(PLAIN)
    assert said == [1, "not built yet"]
    nbformat.write(build.notebook_of(text), text.with_suffix(".ipynb"))
    assert check(PLAIN)[:2] == (0, "up to date")
    assert check(PLAIN.replace("two", "three"))[:2] == (1, "stale")
    assert check(PLAIN.replace("# %%\np", '# %% tags=["a"]\np'))[:2] == (1, "stale")


def test_check_tells_rules_that_a_text_breaks(folder, capsys):
    write(folder, PLAIN)
    assert build.main(["--check"], folder) == 1
    said = capsys.readouterr().out
    for rule in ("is_compared", "has_a_quiz", "starts_and_ends", "has_lesson_size"):
        assert f"    {rule}: " in said


def test_no_such_text_is_said(folder):
    with pytest.raises(SystemExit, match="starts with"):
        build.main(["07"], folder)


# ------------------------------------------------------------------------------ planted


def test_planted_pieces_of_a_stream_are_kept(folder):
    assert_caught(
        build._strip,
        "_stream(output) == _stream(kept[-1])",
        "False",
        lambda: test_noise_is_left_out(folder),
    )


def test_planted_names_by_number(folder):
    assert_caught(
        build._name,
        "digest(cell.cell_type, cell.source)[:8]",
        "len(taken)",
        lambda: test_a_cell_keeps_its_name_where_another_is_put_in_above(folder),
    )


def test_planted_a_broken_rule_is_only_told(folder, monkeypatch, capsys):
    assert_caught(
        build.build,
        "if wrong and not draft:",
        "if False:",
        lambda: test_a_broken_rule_leaves_the_old_notebook_and_card(
            folder, monkeypatch, capsys
        ),
        errors=(AssertionError, AttributeError, TypeError),
    )
