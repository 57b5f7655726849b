"""Length buckets: every row once an epoch, steps of similar length, less padding."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_state import assert_same, values
from planting import Bug, each_is_caught, law
from small_runs import TASK, TOKENIZER, adapted, recipe, run

from peft_from_scratch.training import attention, batch, buckets, config, loop
from peft_from_scratch.training.buckets import padded_share
from peft_from_scratch.training.config import TrainConfig, rows_of_step
from peft_from_scratch.training.packing import Packing, packing_for

CPU = torch.device("cpu")
PADDED = Packing(CPU, torch.float32)  # nothing is packed
LENGTHS = np.random.default_rng(3).lognormal(4, 0.7, 53).astype(int).tolist()
ROWS = [([0] * length, [-100] + [0] * (length - 1)) for length in LENGTHS]


def order(settings, steps, lengths=LENGTHS):
    """The rows that so many steps read, one after the other."""
    rows = [
        rows_of_step(settings, step, len(lengths), lengths) for step in range(steps)
    ]
    assert all(len(each) == settings.batch for each in rows)
    return [i for each in rows for i in each]


@law
@pytest.mark.parametrize("batch_size", [1, 4, 7, 53, 60])
@pytest.mark.parametrize("count", [2, 5, 1000])
def an_epoch_has_each_row_once(batch_size=7, count=5):
    """Whether or not the steps divide it; and every epoch is another permutation."""
    settings = TrainConfig(batch=batch_size, buckets=count)
    read = order(settings, 53)
    epochs = [tuple(read[i : i + 53]) for i in range(0, 53 * batch_size, 53)]
    assert all(sorted(epoch) == list(range(53)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)


@law
def the_order_is_a_function_of_seed_and_step():
    settings = TrainConfig(batch=4, buckets=5)
    last = rows_of_step(settings, 40, 53, LENGTHS)
    assert order(settings, 41)[-4:] == last, "a step asked for by itself is another one"
    assert order(replace(settings, seed=1), 13) != order(settings, 13)
    # One bucket is the order that runs had before there were buckets.
    plain = np.random.default_rng((0, 0)).permutation(53)[:52].tolist()
    assert order(replace(settings, buckets=1), 13) == plain


@law
def a_steps_rows_come_from_one_bucket():
    """Where buckets are whole steps: no step has the lengths of two."""
    lengths = list(np.random.default_rng(0).permutation(48))  # all of them different
    settings = TrainConfig(batch=4, buckets=3)
    for start in range(0, 36, 12):
        steps = [rows_of_step(settings, start + i, 48, lengths) for i in range(12)]
        places = [{lengths[i] // 16 for i in rows} for rows in steps]
        assert all(len(place) == 1 for place in places)
        assert Counter(place for (place,) in places) == {0: 4, 1: 4, 2: 4}
        assert places != sorted(places, key=min), "from short to long, as they were"


@law
def a_step_of_two_epochs_reads_short_rows():
    settings = TrainConfig(batch=8, buckets=6)  # 53 rows: 6 steps and 5 rows
    for step in range(60):
        if step * 8 // 53 < (step * 8 + 7) // 53:
            rows = rows_of_step(settings, step, 53, LENGTHS)
            assert max(LENGTHS[i] for i in rows) <= sorted(LENGTHS)[2 * 53 // 6]


@law
def padding_falls_with_buckets():
    """Counted token by token, against the batches themselves."""
    shares = []
    for count in (1, 3, 9):
        settings = TrainConfig(batch=8, accumulate=2, buckets=count)
        parts = [p for s in range(20) for p in loop.micro_batches(ROWS, settings, s)]
        read = sum(batch.batch_of(rows, CPU)["input_ids"].numel() for rows in parts)
        own = sum(len(ids) for rows in parts for ids, _ in rows)
        shares.append(padded_share(PADDED, parts))
        assert shares[-1] == pytest.approx((read - own) / read)
    assert all(after < 0.9 * before for before, after in pairwise(shares))


@law
def of_packed_rows_the_shared_prefix_is_no_padding():
    """Two rows behind one prefix of 3 tokens: 8 places, of which one is padding."""
    rows = [([1, 2, 3, *own], [-100] * 4 + own[1:]) for own in ([4, 5, 6], [7, 8])]

    class Two(Packing):
        def groups(self, rows):
            return [[0], [1]]

    assert padded_share(Two(CPU, torch.float32), [rows]) == pytest.approx(1 / 12)

    class One(Packing):
        def groups(self, rows):
            return [[0, 1]]

    assert padded_share(One(CPU, torch.float32), [rows]) == 0


@law
def micro_batches_of_a_step_are_of_similar_length():
    """Which rows stand together in a micro-batch changes no gradient."""
    settings = TrainConfig(batch=8, accumulate=4, buckets=2)
    for step in range(6):
        parts = loop.micro_batches(ROWS, settings, step)
        longest = [max(len(ids) for ids, _ in rows) for rows in parts]
        shortest = [min(len(ids) for ids, _ in rows) for rows in parts]
        assert all(a <= b for a, b in zip(longest, shortest[1:], strict=False))


class Stop(Exception):
    pass


@law
def a_run_in_buckets_goes_on_in_the_same_bits(folder):
    settings = recipe(buckets=3, checkpointing=True, chunk=7)

    def stop(history):
        if history.steps == 6:
            raise Stop

    straight, resumed = adapted(), adapted()
    run(straight, settings)
    with pytest.raises(Stop):
        run(adapted(), settings, checkpoints=folder, on_step=stop)
    history = run(resumed, settings, checkpoints=folder)
    assert history.resumed_from == 4
    assert_same(values(resumed), values(straight))


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@law
def the_run_says_what_its_buckets_save():
    history = run(adapted(), recipe(steps=4, buckets=4))
    rows = loop.encode_splits(TOKENIZER, TASK, recipe())[0]
    packing = packing_for(adapted(), rows)
    shares = []
    for count in (1, 4):
        steps = recipe(steps=4, buckets=count)
        parts = [p for s in range(4) for p in loop.micro_batches(rows, steps, s)]
        shares.append(f"{padded_share(packing, parts):.1%}")
    words = f"{shares[1]} of the first 4 steps' tokens are padding, {shares[0]} in one"
    assert words in history.packing
    assert "padding" not in run(adapted(), recipe(steps=4)).packing


def test_the_longest_rows_decide_how_attention_goes():
    """The first step of a run in buckets may be its shortest."""
    model = adapted(dtype=torch.bfloat16)
    short, long = [5] * 10, [5] * 90
    rows = [(ids, ids) for ids in [short] * 6 + [long] * 3]
    packed = packing_for(model, rows)

    class Packs(Packing):
        def length(self, rows):
            return sum(len(ids) for ids, _ in rows)

    packs = Packs(CPU, torch.bfloat16, packed.per_token, packed.per_pair, True)
    for count, expected in ((1, "eager"), (2, "sdpa")):
        settings = TrainConfig(batch=3, buckets=count)
        with attention.written_out(model, settings, packs, rows, [rows[:3]]):
            assert model.config._attn_implementation == expected


def test_buckets_and_nothing_to_bucket():
    task = SimpleNamespace(**vars(TASK) | {"train": TASK.train[:1]})
    settings = recipe(steps=3, warmup=0, buckets=4)
    history = loop.train(adapted(), TOKENIZER, task, settings, progress=False)
    assert history.steps == 3


BUGS = {
    "rows twice, and others never": Bug(
        buckets.in_buckets,
        "near[first:ends]])",
        "near[: ends - first]])",
        an_epoch_has_each_row_once,
    ),
    "the steps are cut where they do not begin": Bug(
        config._order,
        "-epoch * rows % config.batch",
        "0",
        a_step_of_two_epochs_reads_short_rows,
    ),
    "from short to long": Bug(
        buckets.in_buckets,
        "steps = generator.permutation(near[ends:].reshape(-1, batch))",
        "steps = near[ends:].reshape(-1, batch)",
        a_steps_rows_come_from_one_bucket,
    ),
    "sorted by number": Bug(
        buckets.in_buckets,
        "np.asarray(lengths)[order]",
        "order",
        a_steps_rows_come_from_one_bucket,
    ),
    "an order from nowhere": Bug(
        config._order,
        "np.random.default_rng((config.seed, epoch))",
        "np.random.default_rng()",
        the_order_is_a_function_of_seed_and_step,
    ),
    "the prefix of every row": Bug(
        buckets.padded_share,
        "len(packing.groups(rows)) * shared",
        "0 * shared",
        of_packed_rows_the_shared_prefix_is_no_padding,
    ),
    "a step's rows as they come": Bug(
        loop.micro_batches,
        "chosen.sort(",
        "sorted(chosen, ",
        micro_batches_of_a_step_are_of_similar_length,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS)
