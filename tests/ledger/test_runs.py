"""The run store: the same configuration once, half a file never."""

import json

import pytest
from architectures import build, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from planting import assert_caught, law

from peft_from_scratch.ledger import runs

CONFIG = {"experiment": "finetune", "base": "b", "lr": 1e-3, "seed": 0, "r": [1, 2]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "runs")
    return runs.FOLDER


def never():
    raise AssertionError("computed again")


# ------------------------------------------------------------------------- Keys


def test_the_key_is_that_of_the_values_in_any_order():
    turned = dict(reversed(CONFIG.items())) | {"r": (1, 2)}
    assert runs.key(turned) == runs.key(CONFIG)
    assert runs.key(CONFIG).startswith("finetune-")
    assert len(runs.key(CONFIG)) == len("finetune-") + 16


def test_a_key_stays_what_it_was():
    """Another way of hashing would make every shipped run a stranger."""
    assert runs.key({"experiment": "counting", "r": 1}) == "counting-fcb3585b7d848351"


@given(st.sampled_from(sorted(CONFIG)), st.integers(1, 99))
def test_every_changed_or_missing_field_is_another_run(name, value):
    changed = CONFIG | {name: f"other{value}" if name == "experiment" else value}
    assert runs.key(changed) != runs.key(CONFIG)
    fewer = {n: v for n, v in CONFIG.items() if n != name}
    if name != "experiment":
        assert runs.key(fewer) != runs.key(CONFIG)


@pytest.mark.parametrize("experiment", [None, "", "../up", "a-b", 3])
def test_an_experiment_without_a_name_is_refused(experiment):
    with pytest.raises(ValueError, match=r"experiment=.*experiments/"):
        runs.key({"experiment": experiment})


# ------------------------------------------------------------------------- Results


def test_a_result_is_computed_once(folder):
    assert runs.result(CONFIG, lambda: {"loss": 0.5}) == {"loss": 0.5}
    assert runs.result(CONFIG, never) == {"loss": 0.5}
    (file,) = folder.iterdir()
    assert set(json.loads(file.read_text())) == {"config", "result", "provenance"}


def test_an_interrupted_grid_goes_on_where_it_was(folder):
    grid = [CONFIG | {"seed": seed} for seed in range(5)]
    computed = []

    def sweep(stop_at):
        for config in grid:

            def compute(seed=config["seed"]):
                if seed == stop_at:
                    raise KeyboardInterrupt
                computed.append(seed)
                return {"seed": seed}

            runs.result(config, compute)

    with pytest.raises(KeyboardInterrupt):
        sweep(stop_at=3)
    sweep(stop_at=None)
    assert computed == [0, 1, 2, 3, 4]
    assert [run.result["seed"] for run in runs.select(base="b")] != []


@pytest.mark.parametrize("keep", [0, 1, 40, -2])
def test_a_torn_file_is_computed_again(folder, keep):
    runs.result(CONFIG, lambda: {"loss": 0.5})
    (file,) = folder.iterdir()
    file.write_text(file.read_text()[:keep])

    assert runs.stored(CONFIG) is None and runs.select() == []
    assert runs.result(CONFIG, lambda: {"loss": 0.25}) == {"loss": 0.25}
    assert runs.result(CONFIG, never) == {"loss": 0.25}


@pytest.mark.parametrize("text", ["null", "[]", '{"config": {}}', '{"result": 1}'])
def test_a_file_of_another_kind_is_no_run(folder, text):
    runs.result(CONFIG, lambda: {"loss": 0.5})
    (file,) = folder.iterdir()
    file.write_text(text)
    assert runs.stored(CONFIG) is None and runs.select() == []


@law
def a_file_under_another_runs_name_is_not_taken(folder):
    runs.result(CONFIG, lambda: {"loss": 0.5})
    other = CONFIG | {"seed": 1}
    (folder / f"{runs.key(CONFIG)}.json").rename(folder / f"{runs.key(other)}.json")
    assert runs.stored(other) is None


def test_the_planted_trust_in_names_is_caught(folder):
    assert_caught(
        runs._read,
        "key(config) == file.stem",
        "True",
        lambda: a_file_under_another_runs_name_is_not_taken(folder),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_what_json_cannot_hold_is_refused_and_leaves_nothing(folder, value):
    with pytest.raises(ValueError, match="JSON cannot hold this result"):
        runs.result(CONFIG, lambda: {"loss": value})
    assert not folder.exists() or not list(folder.iterdir())


def test_select_compares_every_field(folder):
    for seed in (0, 1):
        for method in ("full", "lora"):
            config = CONFIG | {"seed": seed, "method": method}
            runs.result(config, lambda: {})
    runs.result(CONFIG | {"experiment": "bill"}, lambda: {})
    assert len(runs.select()) == 5
    assert len(runs.select(experiment="finetune")) == 4
    assert [r.config["seed"] for r in runs.select(method="lora", seed=1)] == [1]
    assert runs.select(method="dora") == []


# ------------------------------------------------------------------------- Bases


def test_a_base_is_known_by_its_weights_and_its_tokenizer(tmp_path):
    folder = tmp_path / "base"
    model = build("llama")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    first = runs.base_digest(str(folder))
    assert runs.base_digest(str(folder)) == first

    model.lm_head.weight.data[0, 0] += 1e-3
    model.save_pretrained(folder)
    second = runs.base_digest(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    assert len({first, second, runs.base_digest(str(folder))}) == 3


def test_smollm2_is_known_without_being_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_FROM_SCRATCH_CACHE", str(tmp_path))
    assert len(runs.base_digest("smollm2")) == 16


# ------------------------------------------------------------------------- Shipped


def test_every_shipped_run_is_whole_and_small():
    files = sorted(runs.FOLDER.glob("*"))
    assert {file.stem for file in files} == {run.key for run in runs.select()}
    for file in files:
        assert file.stat().st_size < 60_000, file.name
