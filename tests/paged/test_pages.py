"""Who is resident and who leaves: the pager against a model, counters, planted bugs."""

import sys
import weakref
from collections import OrderedDict
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from planting import Bug, each_is_caught, law
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from two_optimizers import (
    PAGE,
    Births,
    assert_equal_bits,
    assert_equal_states,
    assert_sound,
    feed,
    paged,
    parameters,
    torchs,
)

from peft_from_scratch import PagedAdamW
from peft_from_scratch.paged import adamw, layout
from peft_from_scratch.paged import optimizer as module
from peft_from_scratch.paged.layout import StatePages
from peft_from_scratch.paged.pages import Counters, Pager
from peft_from_scratch.paged.stores import FileStore, PinnedStore

WORDS = PAGE // 8
LIBRARY = Path(layout.__file__).parent


def pager_of(n, slots):
    """A pager, and n full pages in its store; a page's stamp is its every word."""
    p = torch.zeros(n * WORDS // 2, dtype=torch.float64)
    state_pages = StatePages.of(p, 0, "p", 2, PAGE)
    layout.allocate([state_pages], FileStore)
    pager = Pager(PAGE, slots * PAGE, p.device, pages=state_pages.pages)
    pager.fit()
    return pager, state_pages.pages


def stamp(pager, page, value):
    pager._slot(page.slot, page).fill_(value)
    page.dirty = True


def assert_stamps(pager, stamps):
    found = [pager.peek(page).unique().tolist() for page in pager.pages]
    assert found == [[stamp] for stamp in stamps]


class Model:
    """Least recently used, in ten lines that share nothing with the pager."""

    def __init__(self, slots):
        self.held, self.slots = OrderedDict(), slots  # {page: whether it is dirty}
        self.faults = self.hits = self.written = 0
        self.ahead = set()

    def touch(self, page, *, ahead=False, dirty=False):
        if page not in self.held:
            self.faults += 1
            self.cut(self.slots - 1)
            self.held[page] = False
            self.ahead |= {page} if ahead else set()
        elif not ahead:
            self.hits += page not in self.ahead
        if not ahead:
            self.ahead.discard(page)
        self.held[page] |= dirty
        self.held.move_to_end(page)

    def cut(self, room):
        while len(self.held) > room:
            page, dirty = self.held.popitem(last=False)
            self.ahead.discard(page)
            self.written += dirty

    def resize(self, slots):
        if slots != self.slots:
            self.cut(slots)
            self.written += sum(self.held.values())  # the others move
            self.held = OrderedDict.fromkeys(self.held, False)
        self.slots = slots


N = 9
TRACES = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, N - 1)),
        st.tuples(st.just("write"), st.integers(0, N - 1)),
        st.tuples(st.just("prefetch"), st.integers(0, N - 1)),
        st.tuples(st.just("budget"), st.integers(1, N)),
    ),
    max_size=60,
)


def follows_the_model(trace, slots):
    """One trace on both; after every event the same pages are there, in this order."""
    pager, pages = pager_of(N, slots)
    model, stamps = Model(slots), [0] * N
    for clock, (event, number) in enumerate(trace, 1):
        if event == "budget":
            pager.budget_bytes = number * PAGE
            pager.fit()
            model.resize(number)
        elif event == "prefetch":
            pager.prefetch(pages[number])
            model.touch(number, ahead=True)
        else:
            pager.use(pages[number])
            if event == "write":
                stamp(pager, pages[number], clock)
                stamps[number] = clock
            model.touch(number, dirty=event == "write")
        there = [(page.number, page.dirty) for page in pager.resident]
        assert there == list(model.held.items())
        slots_held = [page.slot for page in pager.resident]
        assert sorted(slots_held + pager.free) == list(range(pager.slots))
        assert len(pager.arena) == pager.slots * WORDS <= pager.budget_bytes // 8
        assert_stamps(pager, stamps)
    counters = pager.counters
    found = counters.faults, counters.hits, counters.write_backs
    assert found == (model.faults, model.hits, model.written)
    assert counters.bytes_out == PAGE * model.written


@hypothesis.settings(deadline=None, max_examples=150, derandomize=True)
@hypothesis.given(trace=TRACES, slots=st.integers(1, N))
def test_random_traces_follow_the_model(trace, slots):
    follows_the_model(trace, slots)


# ---------------------------------------------------------------------------- Laws


@contextmanager
def an_error_fails_the_law():
    """A planted bug may show as an error of torch's: then, too, the law has failed."""
    try:
        yield
    except (RuntimeError, KeyError, IndexError, TypeError) as error:
        raise AssertionError(str(error)) from error


@law
@an_error_fails_the_law()
def some_traces_follow_the_model():
    generator = torch.Generator().manual_seed(0)
    events = ("read", "write", "write", "prefetch", "budget")
    for slots in (1, 3, N):
        drawn = torch.randint(0, 10**6, (80, 2), generator=generator).tolist()
        trace = [(events[a % 5], b % N + (events[a % 5] == "budget")) for a, b in drawn]
        follows_the_model(trace, slots)


@law
def a_clean_page_is_not_written_back():
    pager, pages = pager_of(4, 2)
    for page in [*pages, *pages]:
        pager.use(page)
    assert pager.counters == Counters(
        faults=8, evictions=6, peak_resident_bytes=2 * PAGE
    )
    stamp(pager, pages[3], 5)
    for page in pages[:3]:
        pager.use(page)
    assert pager.counters.write_backs == 1 and pager.counters.bytes_out == PAGE


@law
def a_page_that_was_never_written_is_not_read():
    pager, pages = pager_of(4, 2)
    pager.arena.fill_(99)
    for page in pages:
        pager.use(page)
    assert pager.counters.bytes_in == 0
    assert_stamps(pager, [0] * 4)


@law
def a_walk_that_starts_over_never_hits():
    pager, pages = pager_of(8, 5)
    for _ in range(3):
        for page in pages:
            pager.use(page)
    assert (pager.counters.faults, pager.counters.hits) == (24, 0)


def training(pages=None, steps=12, **options):
    """Torch's loop and ours after the same steps; the pairs must agree."""
    sides = parameters(), parameters()
    theirs, ours = torchs(sides[0], options), paged(sides[1], pages, **options)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        feed(sides, generator)
        theirs.step()
        ours.step()
        assert_sound(ours)
    return sides, theirs, ours


@law
@an_error_fails_the_law()
def the_bits_are_those_of_torch(options=None):
    for pages in (1, 2, 7, None):
        sides, theirs, ours = training(pages, **(options or {}))
        assert_equal_bits(sides[1], sides[0])
        assert_equal_states(ours.state_dict(), theirs.state_dict())


@law
def back_and_forth_hits_what_there_is_room_for():
    """N - S faults and S hits a step, for N pages and S slots; all written back."""
    p = nn.Parameter(torch.zeros(20 * WORDS))
    p.grad = torch.ones_like(p)
    n, pages = 20, PAGE // 8  # values
    assert p.numel() == n * pages
    for slots in (1, 2, 5, 12, 20, 30):
        optimizer = paged([p], slots)
        room = min(slots, n)
        for step in range(5):
            optimizer.step()
            faults = n + step * (n - room)
            counters = optimizer.counters
            assert (counters.faults, counters.hits) == (faults, step * room)
            assert counters.write_backs == counters.evictions == faults - room
            assert counters.bytes_out == PAGE * (faults - room)
            assert counters.bytes_in == PAGE * (faults - n)  # the first time: zeros
            assert counters.peak_resident_bytes == PAGE * room
            assert sum(row.resident for row in optimizer.page_table()) == room


@law
def no_moment_exceeds_the_budget():
    """Bytes that tensors were born with, counted without asking the optimizer."""
    n = 24
    p = nn.Parameter(torch.zeros(n * WORDS))
    p.grad = torch.ones_like(p)
    for slots in (1, 2, 5, 8):
        with Births() as births:
            optimizer = paged([p], slots)
            for pages in (slots, slots + 3, 1, slots):
                optimizer.budget_bytes = pages * PAGE
                for _ in range(2):
                    optimizer.step()
        most = slots + 3
        run = most // 2  # pages: a value of scratch for two of a page
        step_counts = 64
        assert most * PAGE < births.most <= most * PAGE + run * PAGE // 2 + step_counts


@law
def the_spike_is_lent_and_comes_back():
    sides = parameters(), parameters()
    theirs, ours = torchs(sides[0], {}), paged(sides[1], 12)
    generator = torch.Generator().manual_seed(5)

    def step():
        feed(sides, generator, skip=0)
        theirs.step()
        ours.step()

    step()
    with ours.lent(9 * PAGE):
        assert ours.budget_bytes == 3 * PAGE
        there = [row for row in ours.page_table() if row.resident]
        assert len(there) == 3 and ours.pager.arena.nbytes == 3 * PAGE
        last = sorted(row.used for row in ours.page_table())[-3:]
        assert sorted(row.used for row in there) == last
        step()
        with ours.lent(2 * PAGE):
            step()
    assert ours.budget_bytes == 12 * PAGE
    step()
    assert sum(row.resident for row in ours.page_table()) == 12
    assert_equal_bits(sides[1], sides[0])
    with pytest.raises(ValueError, match="less than one page"), ours.lent(12 * PAGE):
        pass
    assert ours.budget_bytes == 12 * PAGE


@law
def an_interrupt_anywhere_loses_no_page():
    """KeyboardInterrupt at the first line of the pager's work, at the second, …"""
    for at in range(1, 10**6):
        pager, pages = pager_of(5, 3)
        stamps = [0] * 5
        for number, page in enumerate(pages):
            pager.use(page)
            stamp(pager, page, number + 1)
            stamps[number] = number + 1
        with interrupt(at) as ticking, pager.consistent_on_error():
            pager.use(pages[0])
            pager.prefetch(pages[1])
            pager.budget_bytes = 2 * PAGE
            pager.fit()
            pager.use(pages[2])
        assert_stamps(pager, stamps)
        pager.fit()
        for page in pages:
            pager.use(page)
        assert (
            len(pager.resident) + len(pager.free)
            == pager.slots
            == pager.budget_bytes // PAGE
        )
        assert_stamps(pager, stamps)
        if ticking.lines < at:
            return


NOT_INTERRUPTED = (
    "rebuild_lists",
    "consistent_on_error",
    "synchronize",
    "_synchronize",
)


class interrupt:
    """KeyboardInterrupt at the n-th line that runs in these files; swallowed here."""

    def __init__(self, at, *, files=("pages.py", "stores.py")):
        self.at, self.lines = at, 0
        self.files = {str(LIBRARY / file) for file in files}

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.call)
        return self

    def __exit__(self, kind, *_):
        sys.settrace(self.before)
        return kind is KeyboardInterrupt

    def call(self, frame, event, _):
        skipped = frame.f_code.co_name in NOT_INTERRUPTED
        ours = frame.f_code.co_filename in self.files and not skipped
        return self.line if ours else None

    def line(self, frame, event, _):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.line


STEP = ("pages.py", "stores.py", "layout.py", "optimizer.py", "adamw.py")


def moments_by_page(optimizer):
    """Every page's words as they are now, in the order of the table."""
    return [optimizer.pager.peek(page).clone() for page in optimizer.pager.pages]


@pytest.mark.parametrize("slots", [1, 6])
def test_a_step_interrupted_anywhere_loses_no_page(slots):
    """A page is as before or as after; only those in work may be in between.

    And the state dict of before takes the optimizer back to where it was.
    """

    def ready():
        ps = parameters()[:4]
        optimizer = paged(ps, slots)
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            feed([ps], generator, skip=0)
            optimizer.step()
        feed([ps], generator, skip=0)
        return ps, optimizer

    done = ready()
    before = moments_by_page(done[1])
    done[1].step()
    after = moments_by_page(done[1])
    assert not any(map(torch.equal, before, after))
    at, run = 1, max(1, slots // 2)
    while True:
        ps, optimizer = ready()
        saved, weights = optimizer.state_dict(), [p.detach().clone() for p in ps]
        with interrupt(at, files=STEP) as ticking:
            optimizer.step()
        if ticking.lines < at:
            break
        assert_sound(optimizer)
        between = [
            page
            for page, *states in zip(
                moments_by_page(optimizer), before, after, strict=True
            )
            if not any(torch.equal(page, state) for state in states)
        ]
        assert len(between) <= run
        optimizer.load_state_dict(saved)
        with torch.no_grad():
            for p, weight in zip(ps, weights, strict=True):
                p.copy_(weight)
        optimizer.step()
        assert_equal_bits(ps, done[0])
        at += 5
    assert at > 300


# ----------------------------------------------------- CUDA's store, with a stand-in


class Late(TorchDispatchMode):
    """A stream as late as can be: what is asked of it waits until it must be done.

    It keeps no memory alive: a copy to or from a tensor that is gone is an error. An
    event is (its stream, the number of things that were asked of it before).
    """

    def __init__(self):
        super().__init__()
        self.asked, self.done, self.waited_for_kernels, self.copies = [], 0, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation._schema.name in ("aten::copy_", "aten::zero_"):
            self.copies += 1
            views = [view for view in map(weak, args) if view is not None]
            self.asked.append(lambda: operation(*(view() for view in views)))
            return args[0]
        return operation(*args, **(kwargs or {}))

    def wait_stream(self, kernels):
        assert kernels is Kernels
        self.waited_for_kernels += 1

    def record_event(self):
        return self, len(self.asked)

    def wait_event(self, event):
        self.asked.append(partial(Kernels.wait_event, event))

    def synchronize(self):
        self.do(len(self.asked))

    def do(self, count):
        while self.done < count:
            self.done += 1
            self.asked[self.done - 1]()


class Kernels:
    """The stream of the kernels, which do at once what is asked of them."""

    @staticmethod
    def wait_event(event):
        stream, count = event
        stream.do(count)


def weak(tensor):
    """A function that returns this view again, where its memory is still there."""
    if not isinstance(tensor, torch.Tensor):
        return None
    held = weakref.ref(tensor.untyped_storage())
    like = tensor.storage_offset(), tensor.shape, tensor.stride()
    dtype = tensor.dtype

    def again():
        assert held() is not None, "the memory was given back before the copy was made"
        return torch.empty(0, dtype=dtype).set_(held(), *like)

    return again


class LateStore(PinnedStore):
    """PinnedStore on a CPU, with late streams."""

    def __init__(self, words, _):
        self.words = torch.full((max(words, 1),), -1)  # never zero: it is not cleared
        self.device, self.last_out, (self.inward, self.outward) = None, None, LATE

    def place(self, page):
        return self.words[page.place : page.place + page.words]


LATE = Late(), Late()  # in, out


@law
def a_late_stream_changes_no_bit(monkeypatch):
    for stream in LATE:
        stream.__init__()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda _: Kernels)
        patch.setattr(torch.cuda, "stream", lambda stream: stream)
        patch.setattr(module, "FileStore", LateStore)
        for pages in (1, 2, 7):
            sides = parameters(), parameters()
            theirs, ours = torchs(sides[0], {}), paged(sides[1], pages)
            generator = torch.Generator().manual_seed(5)
            for step in range(8):
                feed(sides, generator)
                theirs.step()
                ours.step()
                if step == 5:
                    ours.budget_bytes = 3 * PAGE
            assert_equal_bits(sides[1], sides[0])
            assert_equal_states(ours.state_dict(), theirs.state_dict())
    for stream in LATE:
        assert stream.copies == stream.waited_for_kernels > 100


def test_a_cuda_parameter_gets_page_locked_memory(monkeypatch):
    """Which store is taken: of the device alone, for there is none here."""
    made = []
    monkeypatch.setattr(module, "PinnedStore", lambda words, device: made.append(words))
    optimizer = paged([nn.Parameter(torch.zeros(64))])
    optimizer.pager.device = None
    p = nn.Parameter(torch.zeros(64))
    monkeypatch.setattr(module, "check_parameter", lambda *_: None)
    group = {"params": [Elsewhere(p)], "amsgrad": False}
    optimizer._lay_out([group], {})
    assert made == [64]


class Elsewhere:
    """A parameter that says it is on CUDA."""

    def __init__(self, p):
        self.p, self.device = p, torch.device("cuda", 0)

    def __getattr__(self, name):
        return getattr(self.p, name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_the_bits_are_those_of_torch():
    sides = [[nn.Parameter(p.detach().cuda()) for p in parameters()] for _ in range(2)]
    theirs, ours = torchs(sides[0], {}), paged(sides[1], 7)
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        for pair in zip(*sides, strict=True):
            gradient = torch.randn(pair[0].shape, generator=generator).cuda()
            for p in pair:
                p.grad = gradient.clone()
        theirs.step()
        ours.step()
    assert_equal_bits(sides[1], sides[0])


# ---------------------------------------------------------------------------- Bugs

amsgrad = partial(the_bits_are_those_of_torch, dict(amsgrad=True))
maximize = partial(the_bits_are_those_of_torch, dict(maximize=True))

BUGS = {
    "the most recently used leaves": Bug(
        Pager._bring,
        "next(iter(self.resident))",
        "next(reversed(self.resident))",
        some_traces_follow_the_model,
    ),
    "first in, first out": Bug(
        Pager._touch,
        "self.resident.move_to_end(page)",
        "pass",
        some_traces_follow_the_model,
    ),
    "the dirty bit is forgotten": Bug(
        PagedAdamW._bring,
        "page.dirty = True",
        "page.dirty = False",
        the_bits_are_those_of_torch,
    ),
    "written back without being dirty": Bug(
        Pager._write_back,
        "if page.dirty:",
        "if True:",
        a_clean_page_is_not_written_back,
    ),
    "never written back": Bug(
        Pager._write_back, "if page.dirty:", "if False:", the_bits_are_those_of_torch
    ),
    "dirty for ever": Bug(
        Pager._write_back,
        "page.dirty = False",
        "pass",
        some_traces_follow_the_model,
    ),
    "always taken for zero": Bug(
        Pager._write_back,
        "page.stored = True",
        "pass",
        the_bits_are_those_of_torch,
    ),
    "zeros are not written": Bug(
        FileStore.read,
        "slot.zero_()",
        "pass",
        a_page_that_was_never_written_is_not_read,
    ),
    "the store is read for zeros": Bug(
        Pager._place,
        "page.bytes if page.stored else 0",
        "page.bytes",
        a_page_that_was_never_written_is_not_read,
    ),
    "a place off by a word": Bug(
        FileStore.place,
        "self.words[page.place : page.place + page.words]",
        "self.words[page.place + 1 : page.place + page.words + 1]",
        some_traces_follow_the_model,
    ),
    "places overlap": Bug(
        layout.allocate, "words + page.words", "words + 1", the_bits_are_those_of_torch
    ),
    "the slice begins one value early": Bug(
        StatePages.of.__func__,
        "state_pages.pages.append(Page(number, start,",
        "state_pages.pages.append(Page(number, max(0, start - 1),",
        the_bits_are_those_of_torch,
    ),
    "the second state is not paged": Bug(
        StatePages.of.__func__,
        "size = states * (stop - start)",
        "size = (stop - start)",
        the_bits_are_those_of_torch,
    ),
    "the second state is the first": Bug(
        Pager.rows, "first + j * n", "first", the_bits_are_those_of_torch
    ),
    "prefetch takes the place of what is in use": Bug(
        PagedAdamW._bring,
        "if self.pager.slots > 1:",
        "if True:",
        the_bits_are_those_of_torch,
    ),
    "runs that leave no room for the next": Bug(
        PagedAdamW._walk,
        "pager.slots // 2",
        "pager.slots",
        the_bits_are_those_of_torch,
    ),
    "neighbours that are none": Bug(
        layout.neighbours,
        "return page.slot - page.number, page.stop - page.start",
        "return page.stop - page.start",
        the_bits_are_those_of_torch,
    ),
    "the walk starts over": Bug(
        PagedAdamW._walk,
        "self._walks += 1",
        "self._walks += 2",
        back_and_forth_hits_what_there_is_room_for,
    ),
    "the step counts twice": Bug(
        PagedAdamW._walk, "step.add_(1)", "step.add_(2)", the_bits_are_those_of_torch
    ),
    "the count starts at zero": Bug(
        PagedAdamW._walk,
        "step.item() + 1",
        "step.item() or 1",
        the_bits_are_those_of_torch,
    ),
    "one page over the budget": Bug(
        Pager.fit,
        "self.budget_bytes // self.page_bytes",
        "self.budget_bytes // self.page_bytes + 1",
        some_traces_follow_the_model,
    ),
    "two arenas at once": Bug(
        Pager.fit,
        "self.slots, self.free, self.arena = 0, [], None",
        "self.slots, self.free, old = 0, [], self.arena",
        no_moment_exceeds_the_budget,
    ),
    "what moves is not written back first": Bug(
        Pager.fit,
        "self._write_back(page)",
        "pass",
        some_traces_follow_the_model,
    ),
    "what is lent does not come back": Bug(
        PagedAdamW.lent.__wrapped__,
        "self.budget_bytes += bytes",
        "pass",
        the_spike_is_lent_and_comes_back,
    ),
    "a spike drives out the newest": Bug(
        Pager.fit,
        "next(iter(self.resident))",
        "next(reversed(self.resident))",
        the_spike_is_lent_and_comes_back,
    ),
    "a prefetched page counts as a hit": Bug(
        Pager.use,
        "elif not page.ahead:",
        "else:",
        back_and_forth_hits_what_there_is_room_for,
    ),
    "the slot is given before the page is out": Bug(
        Pager._evict,
        "self._write_back(page)\n    slot, page.slot = page.slot, None",
        "slot, page.slot = page.slot, None",
        an_interrupt_anywhere_loses_no_page,
    ),
    "an interrupted list is not mended": Bug(
        Pager.rebuild_lists,
        "self.free = [",
        "_ = [",
        an_interrupt_anywhere_loses_no_page,
    ),
    "nobody waits for the page": Bug(
        Pager.use, "page.store.wait_for(page)", "pass", a_late_stream_changes_no_bit
    ),
    "the arena goes before the copies are made": Bug(
        Pager.fit, "self._synchronize()", "pass", a_late_stream_changes_no_bit
    ),
    "a copy does not wait for the kernels": Bug(
        PinnedStore._on,
        "stream.wait_stream(torch.cuda.current_stream(self.device))",
        "pass",
        a_late_stream_changes_no_bit,
    ),
    "a page comes in before the last one is out": Bug(
        PinnedStore.read,
        "if self.last_out is not None:",
        "if False:",
        a_late_stream_changes_no_bit,
    ),
    "half of the streams are waited for": Bug(
        PinnedStore.synchronize,
        "self.outward.synchronize()",
        "pass",
        a_late_stream_changes_no_bit,
    ),
    "the largest v is not kept": Bug(
        adamw.SlicedAdamW.__call__,
        "torch.maximum(v_max, v, out=v_max)",
        "torch.maximum(v_max, v)",
        amsgrad,
    ),
    "the wrong way up": Bug(
        adamw.SlicedAdamW.__call__,
        "if self.maximize:",
        "if False:",
        maximize,
    ),
    "decay after the step": Bug(
        adamw.SlicedAdamW.__call__,
        "p.addcdiv_(m, denominator, value=-self.step_size)",
        "p.addcdiv_(m, denominator, value=-self.step_size).mul_(self.decay)",
        the_bits_are_those_of_torch,
    ),
    "ε inside of the root": Bug(
        adamw.SlicedAdamW.__call__,
        "torch.sqrt(v, out=denominator).div_(self.sqrt_bias2).add_(self.eps)",
        "torch.sqrt(v + self.eps, out=denominator).div_(self.sqrt_bias2)",
        the_bits_are_those_of_torch,
    ),
    "a copy is not brought back": Bug(
        adamw.SlicedAdamW.finish,
        "self.parameter.copy_(",
        "(",
        the_bits_are_those_of_torch,
    ),
    "a gradient in its own order": Bug(
        layout.in_order,
        "if t.stride() != p.stride():",
        "if False:",
        the_bits_are_those_of_torch,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
