"""Laws of checkpoints: a run that was stopped ends in the bits of one that was not."""

import json
import math
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import kill_and_resume
import pytest
import torch
from architectures import build
from kill_and_resume import contents, differences
from model_state import assert_same, refused, values
from planting import law, planted
from safetensors.torch import load_file
from small_runs import ROWS, TASK, TOKENIZER, adapted, recipe, run
from torch import nn

from peft_from_scratch.common import atomic, digest
from peft_from_scratch.methods import lora
from peft_from_scratch.training import checkpoint, loop
from peft_from_scratch.training.checkpoint import checkpoints
from peft_from_scratch.training.state import TrainState

# Rates at which the loss on the validation rows falls first and rises later, so that
# the best weights are neither the last nor those of the newest checkpoint.
RATES = {"lora": 3e-2, "full": 2e-2}
SETTINGS = recipe(validate_every=2, patience=9, checkpoint_every=4, lr=RATES["lora"])
CLOCKS = ("seconds", "step_seconds", "resumed_from")


class Stop(Exception):
    """What ends a run in the middle, at no point that it was prepared for."""


def stop_after(step):
    def look(history):
        if history.steps == step:
            raise Stop

    return look


def outcome(model, history, folder):
    told = {k: v for k, v in asdict(history).items() if k not in CLOCKS}
    return {"result": values(model), "history": told} | contents(folder)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """{method: the outcome of a run in one go}."""
    ends = {}
    for method, architecture in kill_and_resume.CASES.items():
        folder, model = tmp_path_factory.mktemp(method), adapted(method, architecture)
        history = run(model, settings_for(method), checkpoints=folder)
        assert 2 < history.best_step < 8
        ends[method] = outcome(model, history, folder)
    return ends


def settings_for(method):
    return replace(SETTINGS, lr=RATES[method])


@law
@pytest.mark.parametrize("method", kill_and_resume.CASES)
@pytest.mark.parametrize("stops", [(4,), (7,), (5, 6, 9, 11)])
def resumed_run_is_the_straight_run(straight, folder, method="lora", stops=(9,)):
    architecture = kill_and_resume.CASES[method]
    for stop in stops:
        with pytest.raises(Stop):
            run(
                adapted(method, architecture),
                settings_for(method),
                checkpoints=folder,
                on_step=stop_after(stop),
            )
        torch.rand(5)  # a new process has another generator
    model = adapted(method, architecture)
    history = run(model, settings_for(method), checkpoints=folder)
    assert history.resumed_from == stops[-1] - stops[-1] % SETTINGS.checkpoint_every
    assert_same(outcome(model, history, folder), straight[method])


@pytest.mark.parametrize("stop", [4, 7, 11])
def test_a_paged_run_resumes_to_the_bit(tmp_path, stop):
    settings = replace(SETTINGS, paged=0.4)
    straight, model = adapted(), adapted()
    run(straight, settings, checkpoints=tmp_path / "straight")
    with pytest.raises(Stop):
        run(model, settings, checkpoints=tmp_path / "cut", on_step=stop_after(stop))
    resumed = adapted()
    run(resumed, settings, checkpoints=tmp_path / "cut")
    assert_same(values(resumed), values(straight))
    assert_same(contents(tmp_path / "cut"), contents(tmp_path / "straight"))


def test_a_finished_run_is_not_run_again(straight, tmp_path):
    run(adapted(), SETTINGS, checkpoints=tmp_path)
    model = adapted()
    history = run(model, SETTINGS, checkpoints=tmp_path, on_step=stop_after(1))
    assert history.resumed_from == SETTINGS.steps
    assert_same(outcome(model, history, tmp_path), straight["lora"])


def test_an_early_stop_stays_stopped(tmp_path, monkeypatch):
    losses = iter([2.0, 1.0, 1.5, 1.5])
    monkeypatch.setattr(loop, "mean_loss", lambda *_, **__: next(losses))
    settings = recipe(validate_every=2, patience=2)
    model, again = adapted(), adapted()
    first = run(model, settings, checkpoints=tmp_path)
    second = run(again, settings, checkpoints=tmp_path)
    assert first.stopped_early and first.steps == second.steps == 8
    assert second.stopped_early and second.resumed_from == 8
    assert_same(values(again), values(model))


def test_time_goes_on_counting(tmp_path):
    with pytest.raises(Stop):
        run(adapted(), SETTINGS, checkpoints=tmp_path, on_step=stop_after(5))
    before = json.loads((checkpoints(tmp_path)[-1] / "state.json").read_text())
    history = run(adapted(), SETTINGS, checkpoints=tmp_path)
    assert history.seconds > before["history"]["seconds"] > 0
    assert history.seconds > sum(history.step_seconds)


# Folders in a bad state --------------------------------------------------------------


def stopped(folder, step=9):
    """A folder with two checkpoints, after 4 and 8 steps."""
    with pytest.raises(Stop):
        run(adapted(), SETTINGS, checkpoints=folder, on_step=stop_after(step))
    assert [path.name for path in checkpoints(folder)] == ["step-000004", "step-000008"]
    return folder


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("file", ["trainable", "optimizer", "best", "rng", "state"])
@pytest.mark.parametrize("harm", [cut, flip, lambda file: file.unlink()])
def test_a_broken_checkpoint_is_passed_over(straight, tmp_path, file, harm):
    newest = checkpoints(stopped(tmp_path))[-1]
    (victim,) = newest.glob(f"{file}.*")
    harm(victim)
    model = adapted()
    with pytest.warns(UserWarning, match=r"step-000008 cannot be read"):
        history = run(model, SETTINGS, checkpoints=tmp_path)
    assert history.resumed_from == 4
    assert_same(outcome(model, history, tmp_path), straight["lora"])


@pytest.mark.parametrize("junk", [[], None, "x", {}, {"files": []}, {"files": {}}])
def test_a_state_of_another_shape_is_passed_over(straight, tmp_path, junk):
    newest = checkpoints(stopped(tmp_path))[-1]
    (newest / "state.json").write_text(json.dumps(junk))
    with pytest.warns(UserWarning, match=r"step-000008 cannot be read"):
        assert run(adapted(), SETTINGS, checkpoints=tmp_path).resumed_from == 4


def test_an_altered_history_is_noticed(tmp_path):
    newest = checkpoints(stopped(tmp_path))[-1]
    state = json.loads((newest / "state.json").read_text())
    state["history"]["loss"].pop()
    (newest / "state.json").write_text(json.dumps(state))
    with pytest.warns(UserWarning, match=r"step-000008 cannot be read"):
        run(adapted(), SETTINGS, checkpoints=tmp_path)


def test_what_cannot_be_read_is_put_aside_and_what_is_new_stays(tmp_path):
    """Else two unreadable ones would push every new checkpoint out."""
    for path in checkpoints(stopped(tmp_path)):
        cut(path / "state.json")
    with pytest.warns(UserWarning, match="unreadable-step"), pytest.raises(Stop):
        run(adapted(), SETTINGS, checkpoints=tmp_path, on_step=stop_after(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000004",
        "unreadable-step-000004",
        "unreadable-step-000008",
    ]


def test_folders_of_others_stay_and_are_refused_where_they_are_in_the_way(tmp_path):
    other, model = tmp_path / "step-000002", adapted()
    other.mkdir()
    (other / "model.bin").write_bytes(b"theirs")
    (tmp_path / "step-1.log").write_text("theirs too")
    with refused(model, "step-000002", "a folder of its own"):
        run(model, SETTINGS, checkpoints=tmp_path)
    assert (other / "model.bin").read_bytes() == b"theirs"
    shutil.rmtree(other)
    run(model, SETTINGS, checkpoints=tmp_path)
    assert (tmp_path / "step-1.log").exists()


def test_the_millionth_step_comes_after_the_one_before(tmp_path):
    for steps in (999_999, 1_000_000):
        (tmp_path / f"step-{steps}").mkdir()
        (tmp_path / f"step-{steps}" / "state.json").touch()
    assert checkpoints(tmp_path)[-1].name == "step-1000000"


def test_with_no_readable_checkpoint_the_run_starts_over(straight, tmp_path):
    for path in checkpoints(stopped(tmp_path)):
        cut(path / "state.json")
    model = adapted()
    with pytest.warns(UserWarning, match="cannot be read"):
        history = run(model, SETTINGS, checkpoints=tmp_path)
    assert history.resumed_from is None
    assert_same(outcome(model, history, tmp_path), straight["lora"])


def test_a_failed_write_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch):
    stopped(tmp_path)
    before = contents(tmp_path)

    def full_disk(tensors, file):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        run(adapted(), SETTINGS, checkpoints=tmp_path)
    assert not differences(contents(tmp_path), before)
    assert len(list(tmp_path.iterdir())) == 2


def test_leftovers_of_killed_writes_are_swept(tmp_path):
    leftover = stopped(tmp_path) / ".partial-x1"
    shutil.copytree(checkpoints(tmp_path)[-1], leftover)
    run(adapted(), SETTINGS, checkpoints=tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step-000008",
        "step-000012",
    ]
    assert len(list(tmp_path.iterdir())) == checkpoint.KEPT


# Another configuration ---------------------------------------------------------------


def other_rank():
    model = build("llama")
    lora.inject(model, r=3, alpha=8, dropout=0.1)
    return model


def other_alpha():
    model = build("llama")
    lora.inject(model, r=4, alpha=16, dropout=0.1)
    return model


def other_base():
    model = adapted()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.001)
    return model


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (adapted, {"lr": 1e-3}, ["recipe.lr is 0.03 there, 0.001 here"]),
        (adapted, {"steps": 13}, ["recipe.steps is 12 there, 13 here"]),
        (other_rank, {}, ["method.r is 4 there, 3 here", "[3, 32]", "; and "]),
        (other_alpha, {}, ["method.alpha is 8 there, 16 here"]),
        (other_base, {}, ["frozen is "]),
        (lambda: adapted("full"), {}, ["method.name is lora there, full here"]),
    ],
)
def test_another_configuration_is_refused(tmp_path, make, changes, words):
    settings = replace(SETTINGS, **changes)
    model, folder = make(), stopped(tmp_path)
    with refused(model, *words, str(folder), "a folder of its own"):
        run(model, settings, checkpoints=folder)


def test_other_rows_are_refused(tmp_path):
    task = SimpleNamespace(**(vars(TASK) | {"train": ROWS[1:]}))
    with refused(adapted(), "rows is"):
        loop.train(adapted(), TOKENIZER, task, SETTINGS, checkpoints=stopped(tmp_path))


def test_the_pace_of_checkpoints_may_change(straight, tmp_path):
    settings = replace(SETTINGS, checkpoint_every=5)
    model = adapted()
    history = run(model, settings, checkpoints=stopped(tmp_path))
    assert history.resumed_from == 8
    assert_same(outcome(model, history, tmp_path), straight["lora"])


# Tensors that safetensors alone would refuse or mix up -------------------------------


def test_views_of_one_storage_and_half_precision_come_back(tmp_path):
    flat = torch.arange(12, dtype=torch.bfloat16)
    shared = {"a": nn.Parameter(flat[:6].view(2, 3)), "b": nn.Parameter(flat[6:])}
    shared["t"] = nn.Parameter(torch.randn(3, 2).T)
    optimizer = torch.optim.AdamW(shared.values())
    folder = checkpoint.save(
        TrainState(shared, optimizer, torch.device("cpu")), tmp_path, {}
    )
    loaded = load_file(folder / "trainable.safetensors")
    assert_same(loaded, {name: shared[name].detach() for name in loaded})
    assert loaded.keys() == shared.keys()


def test_a_crc_tells_bits_apart():
    x = torch.randn(5000)
    y = x.clone()
    y[4000] = torch.nextafter(x[4000], torch.tensor(math.inf))
    assert digest.tensor_crc(x) == digest.tensor_crc(x.clone())
    assert digest.tensor_crc(x) != digest.tensor_crc(y)
    assert digest.sampled_crc(x) != digest.sampled_crc(x + 1e-6)


# SIGKILL -----------------------------------------------------------------------------


def killed_after(count, patch):
    """As a kill would, end the removal of a folder after `count` of its files."""
    remove = shutil.rmtree

    def part(folder, *, ignore_errors=False):
        files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        for file in files[:count]:
            file.unlink()
        if files:  # what has nothing to remove is not what the kill is for
            raise KeyboardInterrupt
        remove(folder, ignore_errors)

    patch.setattr(atomic.shutil, "rmtree", part)


@law
@pytest.mark.parametrize("count", range(6))
def a_checkpoint_half_removed_is_no_strangers(folder, count, straight):
    stopped(folder)  # two are there: the next one removes the first
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(count, patch)
        run(adapted(), SETTINGS, checkpoints=folder)
    model = adapted()
    history = run(model, SETTINGS, checkpoints=folder)
    assert_same(outcome(model, history, folder), straight["lora"])
    assert not list(folder.glob(f"{atomic.TEMPORARY}*"))


def test_a_removal_in_place_is_caught(straight, tmp_path):
    bug = planted(
        checkpoint.save, "atomic.remove_folder(old)", "atomic.shutil.rmtree(old)"
    )
    with bug, pytest.raises(ValueError, match="no checkpoint of a run of ours"):
        a_checkpoint_half_removed_is_no_strangers(tmp_path, 5, straight)


@pytest.mark.parametrize("case", ["lora", *kill_and_resume.IN_HALF])
def test_killed_runs_end_in_the_same_bits(case, tmp_path):
    kills = list(kill_and_resume.trial(case, 3, tmp_path, random.Random(0)))
    assert len(kills) == 3


# Planted bugs ------------------------------------------------------------------------

BUGS = {
    "the moments not restored": (
        checkpoint._restore,
        'files["optimizer"].items()',
        "{}.items()",
    ),
    "one moment not restored": (
        checkpoint._restore,
        "[kind] = value",
        '[kind] = value if kind != "exp_avg_sq" else 0 * value',
    ),
    "the generators not restored": (
        checkpoint._restore,
        'set_rng_state(files["rng"], state.device)',
        "pass",
    ),
    "the generators not written": (
        checkpoint._files,
        "rng_state(state.device)",
        '{"cpu": torch.Generator().get_state()}',
    ),
    "the schedule restarted": (
        loop.optimizer_steps,
        "learning_rate(config, step)",
        "learning_rate(config, step - (history.resumed_from or 0))",
    ),
    "the position in the data restarted": (
        loop.optimizer_steps,
        "in micro_batches_of(step)",
        "in micro_batches_of(step - (history.resumed_from or 0))",
    ),
    "the weights not restored": (
        checkpoint._restore,
        'state.load_weights(files["trainable"])',
        "pass",
    ),
    "the best weights not restored": (
        checkpoint._restore,
        'files["best"]',
        "dict(state.trainable)",
    ),
    "the validations forgotten": (
        checkpoint._restore,
        '[tuple(each) for each in history["validation"]]',
        "[]",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, straight, tmp_path):
    with planted(*BUGS[bug]), pytest.raises((AssertionError, KeyError, ValueError)):
        resumed_run_is_the_straight_run(straight, tmp_path)


def test_a_checkpoint_that_is_not_checked_is_caught(straight, tmp_path):
    bug = planted(checkpoint._read, "if file_crc(file) != crc:", "if False:")
    with bug, pytest.raises((AssertionError, pytest.fail.Exception)):
        test_a_broken_checkpoint_is_passed_over(straight, tmp_path, "trainable", flip)
