"""Engines: two ranks train as one, go on as any number, and say who has failed.

Every law starts its own ranks, which are forked from a server: see helpers/ranks.py.
Losses, norms and weights are in float64, and equal one rank's within 1e-9.
"""

import time
from functools import partial
from importlib.util import find_spec

import engine_jobs as jobs
import launch_jobs
import pytest
import torch
from planting import each_is_caught, law
from ranks import on_ranks

from peft_from_scratch.parallel import engines, twin
from peft_from_scratch.parallel.fsdp2 import FSDP2State
from peft_from_scratch.parallel.launch import RankFailed, launch
from peft_from_scratch.parallel.state import RankState
from peft_from_scratch.training import checkpoint, loop

ENGINES = [("zero", 1), ("zero", 2), ("zero", 3), ("fsdp2", None)]


@law
def two_ranks_train_as_one():
    """Rows of different label tokens, micro-batches, clipping, validation."""
    on_ranks(2, jobs.trains_as_one_rank, "zero", 1, "lora")


@law
def fsdp2_trains_as_one_rank():
    on_ranks(2, jobs.trains_as_one_rank, "fsdp2", None, "lora")


@pytest.mark.parametrize("engine, stage", ENGINES)
def test_full_fine_tuning_is_that_of_one_rank(engine, stage):
    """Tied weights and transposed ones."""
    on_ranks(2, jobs.trains_as_one_rank, engine, stage, "full")


@pytest.mark.parametrize("stage", [2, 3])
def test_lora_is_that_of_one_rank(stage):
    on_ranks(2, jobs.trains_as_one_rank, "zero", stage, "lora")


@pytest.mark.parametrize(
    "engine, stage, changes",
    [
        ("zero", 3, dict(checkpointing=True, buckets=2)),
        ("fsdp2", None, dict(checkpointing=True, buckets=2)),
        ("zero", 2, dict(chunk=3)),
    ],
)
def test_bytes_saved_for_time_change_nothing(engine, stage, changes):
    job = partial(jobs.trains_as_one_rank, **changes)
    on_ranks(2, job, engine, stage, "full" if "chunk" in changes else "lora")


def test_what_ranks_cannot_share_is_refused():
    on_ranks(2, jobs.what_cannot_be_divided_is_refused)


@pytest.mark.parametrize("engine, stage", [("zero", 2), ("fsdp2", None)])
def test_qlora_is_that_of_one_rank(engine, stage):
    """In float32, in which the four-bit base computes: within 1e-5."""
    on_ranks(2, jobs.trains_as_one_rank, engine, stage, "qlora", torch.float32, 1e-5)


def test_a_four_bit_base_stays_whole_under_fsdp2():
    on_ranks(2, jobs.qlora_base_stays_whole)


def test_weights_that_another_library_has_packed_are_refused():
    on_ranks(1, jobs.packed_weights_are_refused)


@law
def a_checkpoint_loads_on_another_number_of_ranks(folder):
    """Two ranks to one, one process to two, and from one engine to the other."""
    on_ranks(2, jobs.train_until, "zero", 2, "lora", 3, str(folder / "two"))
    jobs.go_on(None, None, "lora", folder / "two")
    jobs.train_until(None, None, "lora", 3, folder / "one")
    on_ranks(2, jobs.go_on, "zero", 3, "lora", str(folder / "one"))


@law
def fsdp2_goes_on_from_any_number_of_ranks(folder):
    on_ranks(2, jobs.train_until, "fsdp2", None, "full", 3, str(folder / "two"))
    jobs.go_on(None, None, "full", folder / "two")
    jobs.train_until(None, None, "full", 3, folder / "one")
    on_ranks(2, jobs.go_on, "fsdp2", None, "full", str(folder / "one"))


@law
def rank_0_alone_writes(folder):
    assert on_ranks(2, jobs.only_rank_0_writes, str(folder)) == [2, 0]


@law
def ranks_draw_apart_and_again_the_same():
    first, second = on_ranks(2, jobs.dropout_of_the_steps)
    for drawn in (first, second):
        assert drawn[:2] == drawn[2:] and drawn[0] != drawn[1]
    assert first[0] != second[0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_fsdp2_keeps_the_bytes_of_its_formula(ranks):
    for method in ("full", "lora"):
        on_ranks(ranks, jobs.fsdp2_bytes_are_the_formulas, method)


# ---------------------------------------------------------------------------- Launching


def test_the_cause_is_told_and_nobody_hangs():
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=r"^r=0: allowed"):
        launch(launch_jobs.dies, 0, "raises", ranks=2)
    with pytest.raises(RankFailed, match=r"rank 1 of 2 was ended .*SIGKILL"):
        launch(launch_jobs.dies, 1, "killed", ranks=2)
    assert time.perf_counter() - begin < 60
    assert launch(launch_jobs.shares, (2, 5), ranks=2) == [(0, 7), (1, 7)]


def test_a_run_whose_rank_was_killed_goes_on(folder):
    with pytest.raises(RankFailed, match=r"rank 1 of 2 was ended .*SIGKILL"):
        launch(jobs.is_killed_in_training, folder, ranks=2)
    jobs.go_on(None, None, "lora", folder)


# ---------------------------------------------------------------------------- Refusals


def test_engines_are_named_and_refused():
    with pytest.raises(ValueError, match="engine='ddp': allowed are zero, fsdp2"):
        engines.engine_of("ddp")
    with pytest.raises(ValueError, match="fsdp2 has no stages"):
        engines.engine_of("fsdp2", 2)
    with pytest.raises(ValueError, match="stage=4"):
        engines.engine_of("zero", 4)
    with pytest.raises(ValueError, match="process group, and there is none"):
        jobs.run(jobs.model_of("lora"), jobs.SETTINGS, engine=engines.engine_of("zero"))


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is here")
def test_a_missing_deepspeed_is_one_sentence():
    with pytest.raises(ValueError, match=r"not installed: pip install .*\[deepspeed\]"):
        engines.engine_of("deepspeed", 2)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_deepspeed_trains_as_one_rank(method, stage):
    """In float32, within 1e-4."""
    on_ranks(
        2, jobs.trains_as_one_rank, "deepspeed", stage, method, torch.float32, 1e-4
    )


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_goes_on_from_any_number_of_ranks(stage, folder):
    narrow = torch.float32
    two, one = str(folder / "two"), str(folder / "one")
    on_ranks(2, jobs.train_until, "deepspeed", stage, "lora", 3, two, narrow)
    jobs.go_on(None, None, "lora", two, narrow, 1e-4)
    jobs.train_until(None, None, "lora", 3, one, narrow)
    on_ranks(2, jobs.go_on, "deepspeed", stage, "lora", one, narrow, 1e-4)


BUGS = {
    "a mean of means": (
        loop.optimizer_steps,
        "state.total(sum(map(label_tokens, batches)))",
        "state.ranks * sum(map(label_tokens, batches))",
        two_ranks_train_as_one,
    ),
    "a part divided by the ranks twice": (
        RankState.backward,
        "(part * self.ranks).backward()",
        "part.backward()",
        two_ranks_train_as_one,
    ),
    "everybody's rows are rank 0's": (
        RankState.share,
        "self.rank * size : (self.rank + 1) * size",
        "0 * size : size",
        two_ranks_train_as_one,
    ),
    "the loss of one's own rows": (
        loop.optimizer_steps,
        "state.total(total.item())",
        "total.item()",
        two_ranks_train_as_one,
    ),
    "the model does not get its weights back": (
        twin.give_back,
        "p.data = value",
        "pass",
        fsdp2_trains_as_one_rank,
    ),
    "no clipping under FSDP2": (
        FSDP2State.clip,
        "nn.utils.clip_grad_norm_(parameters, max_norm)",
        "nn.utils.get_total_norm([p.grad for p in parameters])",
        fsdp2_trains_as_one_rank,
    ),
    "moments that start again": (
        FSDP2State.load_moments,
        "value.clone()",
        "value.zero_()",
        fsdp2_goes_on_from_any_number_of_ranks,
    ),
    "weights that start again": (
        checkpoint._restore,
        'state.load_weights(files["trainable"])',
        "pass",
        a_checkpoint_loads_on_another_number_of_ranks,
    ),
    "every rank writes": (
        checkpoint.save,
        "if state.rank > 0:",
        "if False:",
        rank_0_alone_writes,
    ),
    "the same dropout on every rank": (
        RankState.begin_step,
        "config.seed, self.history.steps, self.rank",
        "config.seed, self.history.steps",
        ranks_draw_apart_and_again_the_same,
    ),
    "the same dropout in every step": (
        RankState.begin_step,
        "config.seed, self.history.steps, self.rank",
        "config.seed, self.rank",
        ranks_draw_apart_and_again_the_same,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS)
