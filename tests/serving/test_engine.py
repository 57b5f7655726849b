"""The engine: each answer is that of its adapter alone, whatever else goes on."""

import random
import threading
import time
from collections import Counter

import architectures
import pytest
import torch
from planting import Bug, each_is_caught, law
from served import (
    adapter_folder,
    adapter_folders,
    asking,
    greedy,
    run,
    served,
    text_of,
    tokens_of,
)
from torch import nn

from peft_from_scratch import AdapterPool, load_model
from peft_from_scratch.files.adapter_file import WEIGHTS, AdapterFile
from peft_from_scratch.serving import cache as caching
from peft_from_scratch.serving.cache import RowCache, RowsLayer, refuse_unfit
from peft_from_scratch.serving.engine import Engine
from peft_from_scratch.serving.requests import Closed, QueueFull, Sampling
from peft_from_scratch.serving.waiting import Waiting

CAUGHT = (AssertionError, pytest.fail.Exception, IndexError, RuntimeError)


def tiny():
    model, tokenizer = load_model("tiny", device="cpu", dtype="float32")
    return model.eval(), tokenizer


def engine_of(folder, *, fit=None, kinds=None, **options):
    """An engine that nobody started, and the folders of its adapters.

    Args
        fit    how many of the largest adapters fit in memory; None: all
        kinds  names of equal adapters; None: those of served.KINDS
    """
    model, tokenizer = tiny()
    folders = (
        adapter_folders(model, folder)
        if kinds is None
        else {
            name: adapter_folder(model, folder / name, seed=seed, r=4)
            for seed, name in enumerate(kinds)
        }
    )
    budget = 10**9 if fit is None else fit * size_of(folders) + 1
    pool = pool_of(model, folders, budget)
    return Engine(model, tokenizer, pool, **options), folders


def pool_of(model, folders, budget=10**9):
    pool = AdapterPool(model, budget_bytes=budget)
    for name, path in folders.items():
        pool.add(name, path)
    return pool


def mixed(folders, many, seed=0):
    dice = random.Random(seed)
    return [
        asking(
            [dice.randrange(3, 200) for _ in range(dice.randint(1, 40))],
            dice.choice([None, *folders]),
            dice.randint(1, 12),
        )
        for _ in range(many)
    ]


def size_of(folders):
    """Bytes of the largest of them in memory."""
    return max(card.bytes for card in pool_of(tiny()[0], folders).cards())


@law
def answers_are_those_of_each_adapter_alone(folder):
    """Rows join and leave, prompts are read in pieces, adapters leave and come back."""
    engine, folders = engine_of(folder, fit=1, rows=4, piece=7)
    requests = mixed(folders, 24)
    pieces = served(engine, requests)
    reference = tiny()[0]
    for request, its in zip(requests, pieces, strict=True):
        expected = greedy(reference, folders.get(request.adapter), request)
        assert its[-1].reason == "length", its[-1]
        assert tokens_of(its) == expected
        text = engine.tokenizer.decode(expected, skip_special_tokens=True)
        assert text_of(its) == text
        digest = its[-1].version
        assert (digest is None) == (request.adapter is None)
    assert engine.pool.counters.evictions > 3
    assert not any(card.users for card in engine.pool.cards())
    assert engine.pool.bytes <= engine.pool.budget_bytes
    assert engine.running == engine.waiting == 0


@law
def an_answer_that_is_cancelled_disturbs_no_other(folder):
    """In every phase: while it waits, while its prompt is read, while it is written."""
    engine, folders = engine_of(folder, rows=3, piece=5)
    requests = mixed(folders, 12, seed=3)
    pieces = [[] for _ in requests]
    tickets = [
        engine.submit(request, its.append)
        for request, its in zip(requests, pieces, strict=True)
    ]
    dice, turns = random.Random(0), 0
    gone = set(dice.sample(range(12), 6))
    for i in gone:
        for _ in range(dice.randint(0, 9)):
            engine.turn()
            turns += 1
        tickets[i].cancel()
        tickets[i].cancel()
    run(engine, pieces)
    reference = tiny()[0]
    for i, (request, its) in enumerate(zip(requests, pieces, strict=True)):
        expected = greedy(reference, folders.get(request.adapter), request)
        if its[-1].reason != "cancelled":
            assert tokens_of(its) == expected
        else:
            assert i in gone and tokens_of(its) == expected[: len(tokens_of(its))]
    assert {its[-1].reason for its in pieces} == {"cancelled", "length"}
    assert not any(card.users for card in engine.pool.cards())


@law
def a_prompt_is_read_on_where_another_answer_ends(folder):
    """Its keys and values move to the place that has become the next one."""
    engine, folders = engine_of(folder, kinds="ab", rows=4, piece=5)
    requests = [asking([5, 6], "a", 30), asking([7], None, 30)]
    requests.append(asking(range(3, 43), "b", 4))
    pieces = [[] for _ in requests]
    first = engine.submit(requests[0], pieces[0].append)
    engine.submit(requests[1], pieces[1].append)
    engine.turn()
    engine.turn()
    engine.submit(requests[2], pieces[2].append)
    for _ in range(4):
        engine.turn()
    first.cancel()
    run(engine, pieces)
    for request, its in zip(requests[1:], pieces[1:], strict=True):
        expected = greedy(tiny()[0], folders.get(request.adapter), request)
        assert tokens_of(its) == expected


@law
def a_reload_leaves_running_answers_their_version(folder):
    engine, folders = engine_of(folder, kinds="ab", rows=4)
    model = tiny()[0]
    old = greedy(model, folders["a"], asking([5, 6, 7], "a", 12))
    pieces = [[], []]
    engine.submit(asking([5, 6, 7], "a", 12), pieces[0].append)
    for _ in range(4):
        engine.turn()
    adapter_folder(model, folders["a"], seed=99, r=4)
    engine.pool.add("a", folders["a"])
    engine.submit(asking([5, 6, 7], "a", 12), pieces[1].append)
    run(engine, pieces)
    new = greedy(model, folders["a"], asking([5, 6, 7], "a", 12))
    assert tokens_of(pieces[0]) == old != new == tokens_of(pieces[1])
    assert pieces[0][-1].version != pieces[1][-1].version
    engine.pool.remove("a")
    with pytest.raises(KeyError, match="'a'"):
        engine.submit(asking([5], "a"), print)


@law
def long_prompts_do_not_hold_up_the_others(folder):
    """A row gets a token in every turn while another's prompt is read."""
    engine, _ = engine_of(folder, kinds="a", rows=4, piece=8)
    first, second = [], []
    engine.submit(asking([5, 6], None, 30), first.append)
    engine.turn()
    engine.submit(asking(range(3, 83), "a", 2), second.append)
    for _ in range(9):
        before = len(tokens_of(first))
        engine.turn()
        assert len(tokens_of(first)) == before + 1 and not second
    run(engine, [first, second])


@law
def whoever_was_served_least_comes_first(folder):
    """A tenant with forty requests does not keep one with four waiting."""
    order = {}
    for policy in ("fair", "first come"):
        engine, _ = engine_of(folder / policy, kinds="a", rows=2, policy=policy)
        ends = []
        pieces = [[] for _ in range(24)]
        for i, its in enumerate(pieces):
            tenant = "hot" if i < 20 else "quiet"

            def listen(piece, its=its, tenant=tenant, ends=ends):
                its.append(piece)
                ends += [tenant] if piece.reason else []

            engine.submit(asking([5, 6, 7], None, 4, tenant=tenant), listen)
        run(engine, pieces)
        assert engine.served == {"hot": 20 * 7, "quiet": 4 * 7}
        order[policy] = [i for i, tenant in enumerate(ends) if tenant == "quiet"][-1]
    assert order["first come"] == 23 and order["fair"] < 12


@law
def nobody_comes_back_with_a_credit():
    """Who was away is level with the least served of those that are there."""
    waiting = Waiting()
    for tenant in ("busy", "busier"):
        waiting.add(ticket_of(tenant), {"busy", "busier"} - {tenant})
        waiting.count(tenant, 1000 + 500 * (tenant == "busier"))
    waiting.add(ticket_of("away"), {"busy", "busier"})
    waiting.count("away", 1)
    assert [t.request.tenant for t in waiting.in_order()] == ["busy", "away", "busier"]
    assert waiting.served == {"busy": 1000, "busier": 1500, "away": 1}


def ticket_of(tenant, number=[0]):  # noqa: B006
    from peft_from_scratch.serving.text import Text
    from peft_from_scratch.serving.waiting import Ticket

    number[0] += 1
    request = asking([1], tenant=tenant)
    return Ticket(request, print, number[0], 0.0, Text(None))


@law
def a_request_is_not_overtaken_for_ever(folder):
    """Requests of adapters in memory go first, until one has waited for `patience`."""
    engine, _ = engine_of(folder, fit=1, kinds="ab", rows=2, patience=0.0)
    engine.pool.release(engine.pool.acquire("a"))
    pieces = [[] for _ in range(10)]
    names = ["a", "a", "b", *"aaaaaaa"]
    ends = []
    for name, its in zip(names, pieces, strict=True):

        def listen(piece, its=its, name=name):
            its.append(piece)
            ends.extend([name] if piece.reason else [])

        engine.submit(asking([5, 6], name, 3), listen)
    for _ in range(5000):
        if len(ends) == 10:
            break
        if not engine.turn():
            time.sleep(0.001)
    assert ends.index("b") <= 4 and Counter(ends) == {"a": 9, "b": 1}


def test_an_adapter_that_was_read_is_used_before_it_leaves(folder):
    """Eight adapters for a pool of two: each is read once for its two requests."""
    engine, _ = engine_of(folder, fit=2, kinds="abcdefgh", rows=2)
    for card in engine.pool.cards():
        card.content = None
    before = engine.pool.counters.loads
    pieces = [[] for _ in range(16)]
    for name, its in zip("aabbccddeeffgghh", pieces, strict=True):
        engine.submit(asking([5, 6], name, 3), its.append)
    for _ in range(20_000):
        if all(its and its[-1].reason for its in pieces):
            break
        if not engine.turn():
            time.sleep(0.001)
    assert {its[-1].reason for its in pieces} == {"length"}
    assert engine.pool.counters.loads - before == 8


@law
def rows_go_on_while_a_slow_folder_is_read(folder, monkeypatch):
    """The folder is read until five turns have written their tokens."""
    engine, _ = engine_of(folder, kinds="ab", rows=2)
    for card in engine.pool.cards():
        card.content = card.content if card.name == "a" else None
    reading, written = threading.Event(), threading.Event()
    read = AdapterFile.read.__func__

    def slow(cls, path):
        reading.set()
        assert written.wait(30), "nobody wrote while the folder was read"
        return read(cls, path)

    monkeypatch.setattr(AdapterFile, "read", classmethod(slow))
    pieces = [[], []]
    engine.submit(asking([5, 6], "a", 12), pieces[0].append)
    engine.submit(asking([5, 6], "b", 2), pieces[1].append)
    engine.turn()
    assert reading.wait(30)
    for _ in range(5):
        engine.turn()
    assert len(tokens_of(pieces[0])) >= 6 and not pieces[1]
    written.set()
    run(engine, pieces, turns=100_000)
    assert pieces[1][-1].reason == "length"


def test_requests_of_resident_adapters_go_first(folder):
    """With much patience, one whose adapter has no room waits for the others."""
    engine, _ = engine_of(folder, fit=1, kinds="ab", rows=2, patience=1000)
    engine.pool.release(engine.pool.acquire("a"))
    pieces, ends = [[] for _ in range(6)], []
    for name, its in zip("ab" + "aaaa", pieces, strict=True):

        def listen(piece, its=its, name=name):
            its.append(piece)
            ends.extend([name] if piece.reason else [])

        engine.submit(asking([5, 6], name, 6), listen)
    run(engine, pieces)
    assert ends[-1] == "b"


def test_the_queue_has_an_end(folder):
    engine, _ = engine_of(folder, kinds="a", rows=1, queue=2)
    for _ in range(2):
        engine.submit(asking([5]), print)
    with pytest.raises(QueueFull, match="2 requests wait already") as full:
        engine.submit(asking([5]), print)
    assert 1 <= full.value.retry_after <= 60


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (asking([]), "empty"),
        (asking([5, 10**6]), "token 1000000"),
        (asking([-1]), "token -1"),
        (asking([5], max_tokens=0), "max_tokens"),
        (asking([5] * 300, max_tokens=10**6), "shorten one of them"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(folder, request_, message):
    engine, _ = engine_of(folder, kinds="a")
    with pytest.raises(ValueError, match=message):
        engine.submit(request_, print)
    assert engine.waiting == 0


def test_stop_tokens_stop_texts_and_deadlines_end_an_answer(folder):
    engine, _ = engine_of(folder, kinds="a")
    whole = greedy(tiny()[0], None, asking([5, 6, 7], max_tokens=12))
    text = engine.tokenizer.decode(whole)
    cut = text[len(text) // 2 : len(text) // 2 + 3]
    requests = [
        asking([5, 6, 7], max_tokens=12, stop_ids=(whole[4],)),
        asking([5, 6, 7], max_tokens=12, stop=("never there", cut)),
        asking([5, 6, 7], max_tokens=12, deadline=-1.0),
    ]
    pieces = served(engine, requests)
    assert [its[-1].reason for its in pieces] == ["stop", "stop", "deadline"]
    assert tokens_of(pieces[0]) == whole[: whole.index(whole[4])]
    assert text_of(pieces[1]) == text[: text.index(cut)]
    assert tokens_of(pieces[2]) == []


def test_drawn_answers_repeat_with_their_seed(folder):
    """Whatever else is in the batch, and one seed differs from another."""
    engine, _ = engine_of(folder, kinds="a", rows=4)
    drawn = [
        asking([5, 6, 7], "a", 12, sampling=Sampling(temperature=1.0, seed=seed))
        for seed in (1, 2, 1)
    ]
    others = [asking([9, 9], None, 5)] * 3
    first = [tokens_of(its) for its in served(engine, drawn)]
    again = [tokens_of(its) for its in served(engine, others + drawn)][3:]
    assert first == again and first[0] == first[2] != first[1]


def test_a_failing_pass_ends_its_rows_and_nothing_else(folder, monkeypatch):
    engine, folders = engine_of(folder, kinds="ab", rows=4)
    forward, fail = RowCache.forward, [True]

    def broken(self, model, first, tokens):
        if fail and len(tokens) == 2:
            fail.clear()
            raise RuntimeError("a cosmic ray")
        return forward(self, model, first, tokens)

    monkeypatch.setattr(RowCache, "forward", broken)
    requests = [asking([5, 6], name, 6) for name in ("a", "b", "a")]
    pieces = [[] for _ in requests]
    for request, its in zip(requests[:2], pieces, strict=False):
        engine.submit(request, its.append)
    run(engine, pieces[:2])
    assert [its[-1].reason for its in pieces[:2]] == ["error", "error"]
    assert "RuntimeError" in pieces[0][-1].error
    assert "cosmic" not in pieces[0][-1].error
    assert not any(card.users for card in engine.pool.cards())
    engine.submit(requests[2], pieces[2].append)
    run(engine, pieces[2:])
    assert tokens_of(pieces[2]) == greedy(tiny()[0], folders["a"], requests[2])


def test_a_listener_that_fails_ends_its_own_answer(folder):
    engine, folders = engine_of(folder, kinds="a")
    pieces = []

    def gone(piece):
        raise ConnectionError("the client is gone")

    engine.submit(asking([5, 6], "a", 50), gone)
    engine.submit(asking([5, 6], "a", 6), pieces.append)
    run(engine, [pieces])
    assert engine.running == 0
    assert tokens_of(pieces) == greedy(tiny()[0], folders["a"], asking([5, 6], "a", 6))


def test_an_adapter_that_broke_on_disk_ends_its_requests(folder, caplog):
    """With no path in what a client sees; what is in memory answers on."""
    engine, folders = engine_of(folder, fit=1, kinds="ab")
    engine.pool.release(engine.pool.acquire("a"))
    (folders["b"] / WEIGHTS).write_bytes(b"broken")
    (folders["a"] / WEIGHTS).unlink()
    pieces = served(engine, [asking([5], "b"), asking([5], "a"), asking([5])])
    assert [its[-1].reason for its in pieces] == ["unreadable", "length", "length"]
    assert "add it again" in pieces[0][-1].error
    assert str(folder) not in pieces[0][-1].error and str(folder) in caplog.text


def test_an_adapter_that_is_removed_ends_the_requests_that_wait_for_it(folder):
    engine, _ = engine_of(folder, fit=1, kinds="ab", rows=1)
    engine.pool.release(engine.pool.acquire("a"))
    pieces = [[], [], []]
    for name, its in zip(("a", "b", None), pieces, strict=True):
        engine.submit(asking([5, 6], name, 4), its.append)
    engine.turn()
    for name in "ab":  # the first is in use, and goes on
        engine.pool.remove(name)
    run(engine, pieces)
    assert [its[-1].reason for its in pieces] == ["length", "removed", "length"]


def test_a_thread_answers_until_it_is_closed(folder):
    engine, folders = engine_of(folder, kinds="ab", rows=4)
    engine.start()
    requests = [asking([5, 6, 7], name, 8) for name in ("a", "b", None) * 3]
    pieces, done = [[] for _ in requests], threading.Event()
    for request, its in zip(requests, pieces, strict=True):

        def listen(piece, its=its):
            its.append(piece)
            if all(other and other[-1].reason for other in pieces):
                done.set()

        engine.submit(request, listen)
    assert done.wait(60)
    reference = tiny()[0]
    for request, its in zip(requests, pieces, strict=True):
        expected = greedy(reference, folders.get(request.adapter), request)
        assert tokens_of(its) == expected
    late = []
    engine.submit(asking([5], None, 200), late.append)
    engine.close(seconds=0.0)
    assert late[-1].reason in ("cancelled", "length")
    assert not engine._thread.is_alive() and engine.failed is None
    with pytest.raises(Closed):
        engine.submit(requests[0], print)


def test_closing_lets_running_answers_end(folder):
    engine, _ = engine_of(folder, kinds="a")
    pieces = []
    engine.submit(asking([5], None, 20), pieces.append)
    engine.start()
    engine.close(seconds=30)
    assert pieces[-1].reason == "length" and len(tokens_of(pieces)) == 20


# ------------------------------------------------------------------------- The cache


@law
def rows_of_different_lengths_have_the_logits_of_each_alone(folder):
    """Four architectures in float64, through pieces, growth and a row that moves."""
    for name in ("llama", "gpt2", "opt", "qwen"):
        model = architectures.build(name, dtype=torch.float64)
        bound = 1e-12 if name in ("gpt2", "opt") else 1e-5  # others' norms are float32
        cache = RowCache(caching.layers_of(model), 3)
        dice = random.Random(0)
        rows = [[dice.randrange(3, 300) for _ in range(n)] for n in (90, 5, 33)]
        for place, row in enumerate(rows):
            for start in range(0, len(row), 20):
                cache.forward(model, place, [row[start : start + 20]])
        cache.move(2, 0)
        rows = [rows[2], rows[1]]
        for _ in range(3):
            new = [dice.randrange(3, 300) for _ in rows]
            rows = [[*row, token] for row, token in zip(rows, new, strict=True)]
            logits = cache.forward(model, 0, [[token] for token in new])
            for row, got in zip(rows, logits, strict=True):
                with torch.no_grad():
                    expected = model(torch.tensor([row])).logits[0, -1].float()
                assert (got - expected).abs().max() <= max(
                    bound * expected.abs().max(), 2e-6 * expected.abs().max()
                )


class Deaf(nn.Module):
    """A model that hears neither mask nor positions."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None, position_ids=None, **others):
        return self.model(input_ids, **others)


@law
def a_model_that_does_not_hear_the_mask_is_refused():
    model = architectures.build("llama")
    refuse_unfit(model)
    with pytest.raises(ValueError, match="cannot be served"):
        refuse_unfit(Deaf(model))


def test_a_model_that_remembers_by_other_means_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    )
    with pytest.raises(ValueError, match="cannot be served"):
        refuse_unfit(model.eval())


BUGS = {
    "the reader's place is not moved": Bug(
        Engine._leave,
        "self._cache.move(last + 1, last)",
        "pass",
        a_prompt_is_read_on_where_another_answer_ends,
    ),
    "the batch keeps the order of arrival": Bug(
        Engine._leave,
        "self._running[row] = self._running[last]\n            self._running.pop()",
        "self._running.pop(row)",
        an_answer_that_is_cancelled_disturbs_no_other,
    ),
    "an answer that ended keeps its adapter": Bug(
        Engine._leave,
        "self.pool.release(ticket.version)",
        "pass",
        answers_are_those_of_each_adapter_alone,
    ),
    "prompts are read whole": Bug(
        Engine._read,
        "ticket.read : ticket.read + self.piece",
        "ticket.read :",
        long_prompts_do_not_hold_up_the_others,
    ),
    "the order of arrival for all": Bug(
        Waiting.in_order,
        "self._level.get(t.request.tenant, 0), t.number",
        "t.number",
        whoever_was_served_least_comes_first,
    ),
    "credit for an absence": Bug(
        Waiting.add,
        "max(self._level.get(tenant, 0), least)",
        "self._level.get(tenant, 0)",
        nobody_comes_back_with_a_credit,
    ),
    "patience without end": Bug(
        Engine._candidates,
        "> self.patience",
        "> 1e9",
        a_request_is_not_overtaken_for_ever,
    ),
    "what lies behind a row's end is seen": Bug(
        RowCache._mask,
        "> self.positions[:, None, :, None]",
        "> self.positions.max()",
        rows_of_different_lengths_have_the_logits_of_each_alone,
    ),
    "keys at the end of the longest row": Bug(
        RowsLayer.update,
        "kept[places, :, rows.positions]",
        "kept[places, :, rows.positions.amax(0)]",
        rows_of_different_lengths_have_the_logits_of_each_alone,
    ),
    "a move that forgets the length": Bug(
        RowCache.move,
        "self.lengths[target] = self.lengths[source]",
        "pass",
        rows_of_different_lengths_have_the_logits_of_each_alone,
    ),
    "models are believed": Bug(
        caching.refuse_unfit,
        "if (distance >",
        "if False and (distance >",
        a_model_that_does_not_hear_the_mask_is_refused,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS, errors=CAUGHT)
