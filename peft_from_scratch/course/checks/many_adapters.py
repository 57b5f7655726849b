"""What the exercises of notebook 13, many adapters, are compared with.

A gathered product is compared with each row computed alone, and its matrix products are
counted as torch dispatches them. A plan is compared with all plans. A prefix cache is
asked in an order that shows what its key forgets, and then at random. our_gather,
our_plan and OurPrefixCache are the lesson's own answers.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ...serving.batch import Version
from ..pictures import page_picture
from . import Wrong, close, judged, unchanged

# 13.1 ---------------------------------------------------------------------------------

MOST = 8  # matrix products of a gathered product, whatever the batch
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot")


def our_gather(x: Tensor, W0: Tensor, A: list, B: list, v: list) -> Tensor:
    """The lesson's own answer to 13.1."""
    r = max(map(len, A))
    wide_A = torch.stack([F.pad(a, (0, 0, 0, r - len(a))) for a in A])
    wide_B = torch.stack([F.pad(b, (0, r - b.shape[1])) for b in B])
    rows = [i for i, adapter in enumerate(v) if adapter is not None]
    own = [v[i] for i in rows]
    h = x @ W0.T
    z = torch.bmm(x[rows], wide_A[own].transpose(1, 2))
    h[rows] += torch.bmm(z, wide_B[own].transpose(1, 2))
    return h


@dataclass(frozen=True)
class Rows:
    """The sizes of a case of 13.1."""

    v: tuple
    ranks: tuple[int, ...]
    tokens: int = 1
    d_in: int = 5
    d_out: int = 7
    dtype: torch.dtype = torch.float32
    scale: float = 1.0

    def drawn(self) -> dict:
        """The arguments of my_gather, with new random content at every call."""
        like = {"dtype": self.dtype}
        normal = lambda *shape: self.scale * torch.randn(*shape, **like)  # noqa: E731
        return {
            "x": normal(len(self.v), self.tokens, self.d_in),
            "W0": normal(self.d_out, self.d_in),
            "A": [normal(r, self.d_in) for r in self.ranks],
            "B": [normal(self.d_out, r) for r in self.ranks],
            "v": list(self.v),
        }

    def __str__(self):
        return f"v={list(self.v)} and ranks {list(self.ranks)}"


CASES = (
    Rows((1, 0, 1), (2, 3)),
    Rows((0, None, 1, 0), (4, 1), tokens=3),
    Rows((2, None, 0, 1, 2), (3, 3, 3)),
    Rows((None, None), (2, 5)),
    Rows((0,), (1,), tokens=2),
    Rows((3, 3), (1, 2, 4, 8), d_in=9, d_out=9),
    Rows((1, None, 0), (6, 2), d_in=4, d_out=4, tokens=4),
    Rows((0, 1), (2, 7), dtype=torch.float64),
    Rows((None, 1, None, 0, 1), (2, 5), scale=30.0),
    Rows((6, 5, 4, 3, 2, 1, 0, None, 6, 11, 7, 8, 9, 10), (*range(1, 13),), tokens=2),
    Rows((1, 0, 1), (2, 3), tokens=2),
    Rows((0, 1, 0), (2, 3), tokens=2),
)


def one_by_one(x, W0, A, B, v) -> Tensor:
    """Each row alone."""
    rows = []
    for row, adapter in zip(x, v, strict=True):
        h = row @ W0.T
        if adapter is not None:
            h = h + row @ A[adapter].T @ B[adapter].T
        rows.append(h)
    return torch.stack(rows)


class _Products(TorchDispatchMode):
    """Counts the matrix products that torch computes inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function.__name__.partition(".")[0] in PRODUCTS
        return function(*arguments, **(options or {}))


@judged
def gathered_product(my_gather: Callable) -> None:
    """13.1: my_gather(x, W0, A, B, v) -> (rows, tokens, d_out), in few products."""
    for case in CASES:
        for _ in range(2):
            given = case.drawn()
            with unchanged(**given), _Products() as products:
                h = my_gather(**given)
            close(
                h,
                one_by_one(**given),
                what=f"h for {case}",
                mistakes=_wrong_gathers(**given),
                kind=case.dtype,
            )
            if products.count > MOST:
                raise Wrong(
                    f"h is right for {case}, but in {products.count} matrix products; "
                    f"{MOST} are enough for any batch. Likely mistake: a loop over "
                    "rows or adapters that multiplies; stack A and B, then use bmm"
                )


def _wrong_gathers(x, W0, A, B, v) -> dict[str, Tensor]:
    """{mistake: what it gives}"""
    base = x @ W0.T
    right = one_by_one(x, W0, A, B, v)
    zeros = [0 if adapter is None else adapter for adapter in v]
    last = [-1 if adapter is None else adapter for adapter in v]
    least = min(map(len, A))
    cut_A, cut_B = [a[:least] for a in A], [b[:, :least] for b in B]
    order = sorted(range(len(v)), key=lambda i: (v[i] is None, v[i] or 0))
    table = {
        "only the base: B A x is missing": base,
        "W0 x is missing: the update is added to it": right - base,
        "W0 x is there twice": right + base,
        "all rows have the adapter of the first one": one_by_one(
            x, W0, A, B, [v[0]] * len(v)
        ),
        "all rows have adapter 0": one_by_one(x, W0, A, B, [0] * len(v)),
        "None means no adapter, not adapter 0": one_by_one(x, W0, A, B, zeros),
        "None means no adapter, not the last one": one_by_one(x, W0, A, B, last),
        "larger ranks were cut to the smallest: pad the smaller ones with zeros": (
            one_by_one(x, W0, cut_A, cut_B, v)
        ),
        "the rows came back in the order of their adapters": right[order],
        "the update has the wrong sign": 2 * base - right,
    }
    return {text: h for text, h in table.items() if not torch.equal(h, right)}


# 13.2 ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """The arguments of my_plan."""

    memory: int
    row: int
    adapter: int
    trace: list[str]
    load: float
    seconds: dict[int, float]

    def given(self) -> dict:
        """As keyword arguments, fresh copies."""
        return dict(vars(self), trace=[*self.trace], seconds=dict(self.seconds))

    def time(self, rows: int, slots: int) -> float:
        """Seconds of a plan."""
        loads = page_picture.faults(slots, self.trace)
        return (
            loads * self.load + math.ceil(len(self.trace) / rows) * self.seconds[rows]
        )

    def __str__(self):
        text = (
            f"memory={self.memory}, row={self.row}, adapter={self.adapter}, "
            f"trace={self.trace}, load={self.load}, seconds={self.seconds}"
        )
        return text if len(text) < 260 else f"{text[:257]}…"


def our_plan(memory, row, adapter, trace, load, seconds):
    """The lesson's own answer to 13.2: (rows, slots, time), or None."""
    return _plan(Traffic(memory, row, adapter, trace, load, seconds))


def _plan(
    traffic: Traffic, *, time=Traffic.time, least=lambda rows: rows, row=None, key=None
):
    """The best plan, with a mistake at choice."""
    row = traffic.row if row is None else row
    best = None
    for rows in traffic.seconds:
        slots = (traffic.memory - rows * row) // traffic.adapter
        if slots < max(1, least(rows)):
            continue
        plan = rows, slots, time(traffic, rows, slots)
        if best is None or (key or (lambda p: p[2]))(plan) < (key or (lambda p: p[2]))(
            best
        ):
            best = plan
    return best


@judged
def cheapest_plan(my_plan: Callable) -> None:
    """13.2: my_plan(memory, row, adapter, trace, load, seconds) -> the best plan."""
    for traffic in _traffics():
        given, expected = traffic.given(), _plan(traffic)
        with unchanged(**given):
            got = my_plan(**given)
        _same_plan(got, expected, traffic)


def _same_plan(got, expected, traffic: Traffic) -> None:
    where = f"my_plan({traffic})"
    likely = _likely_plan(got, traffic)
    shown = f"{where}\n  expected  {expected}\n  got       {got!r}\nLikely mistake: "
    if got is None or expected is None:
        if got is not expected:
            why = "a plan fits, and None was returned"
            if expected is None:
                why = "no plan fits, so the answer is None"
            raise Wrong(shown + (likely or why))
        return
    if not isinstance(got, tuple | list) or len(got) != 3:
        raise Wrong(shown + "three values are needed: rows, slots, time")
    rows, slots, time = got
    close(rows, rows if _is_key(rows, traffic) else expected[0], what=where, kind=int)
    close(slots, int(slots), what=f"slots, for {where}", kind=int)
    if rows * traffic.row + slots * traffic.adapter > traffic.memory:
        raise Wrong(shown + (likely or "rows and slots together need too much memory"))
    if slots < rows:
        raise Wrong(shown + "each row may need an adapter of its own: slots >= rows")
    true = traffic.time(rows, slots)
    if true > expected[2] * (1 + 1e-9):
        raise Wrong(
            shown + (likely or f"this plan takes {true:g} s: another is faster")
        )
    mistakes = {likely: time} if likely else {}
    close(time, true, what=f"the time of the plan, for {where}", mistakes=mistakes)


def _is_key(rows, traffic: Traffic) -> bool:
    return not isinstance(rows, bool) and rows in traffic.seconds


def _likely_plan(got, traffic: Traffic) -> str | None:
    """The mistake that gives what we got."""
    if not (got is None or isinstance(got, tuple | list)):
        return None

    def distinct(traffic, rows, slots):
        groups = math.ceil(len(traffic.trace) / rows)
        return len(set(traffic.trace)) * traffic.load + groups * traffic.seconds[rows]

    def rounded_down(traffic, rows, slots):
        groups = len(traffic.trace) // rows
        return traffic.time(rows, slots) + traffic.seconds[rows] * (
            groups - math.ceil(len(traffic.trace) / rows)
        )

    def no_loads(traffic, rows, slots):
        return math.ceil(len(traffic.trace) / rows) * traffic.seconds[rows]

    def every_request(traffic, rows, slots):
        return no_loads(traffic, rows, slots) + len(traffic.trace) * traffic.load

    def loads_alone(traffic, rows, slots):
        return page_picture.faults(slots, traffic.trace) * traffic.load

    plans = {
        "every request was counted as a load: one that finds its adapter in a slot "
        "is a hit": _plan(traffic, time=every_request),
        "each adapter was counted as one load: one that had to leave is loaded again": (
            _plan(traffic, time=distinct)
        ),
        "the last group counts too, though it is not full: round up": _plan(
            traffic, time=rounded_down
        ),
        "the loads from disk were left out of the time": _plan(traffic, time=no_loads),
        "the seconds of the groups were left out of the time": _plan(
            traffic, time=loads_alone
        ),
        "the most rows were chosen: rows take memory from the pool": _plan(
            traffic, key=lambda plan: -plan[0]
        ),
        "the most slots were chosen: slots take memory from the rows": _plan(
            traffic, key=lambda plan: -plan[1]
        ),
        "each row may need an adapter of its own: slots >= rows": _plan(
            traffic, least=lambda rows: 1
        ),
        "the memory of the rows was forgotten": _plan(traffic, row=0),
    }
    right = _plan(traffic)
    got = tuple(got) if got is not None else None
    return next((t for t, plan in plans.items() if plan == got and plan != right), None)


def _traffics() -> Iterator[Traffic]:
    """The telling ones first."""
    turns = ["a", "b", "c", "d"] * 6
    few = {1: 1.0, 2: 1.2, 4: 1.6, 8: 2.4}
    yield Traffic(100, 10, 10, ["a", "b", "a", "c", "a"], 3.0, {1: 1.0, 2: 1.5, 4: 2.5})
    yield Traffic(60, 10, 10, turns, 2.0, few)  # more slots are worth fewer rows
    yield Traffic(60, 10, 10, turns, 0.01, few)  # more rows are worth the loads
    yield Traffic(60, 10, 10, ["a"] * 24, 2.0, few)
    yield Traffic(19, 10, 10, ["a", "b"], 1.0, few)  # nothing fits
    yield Traffic(20, 10, 10, ["a", "b", "a"], 1.0, few)  # one row fits, and no more
    yield Traffic(45, 1, 10, turns, 0.0, few)  # slots, not bytes, limit the rows
    yield Traffic(200, 10, 10, ["a", "b", "c"] * 3, 1.0, {4: 2.0, 2: 1.9, 1: 1.8})
    yield Traffic(90, 7, 9, ["a", "b", "c", "a", "d", "b"] * 3, 0.5, {3: 1.0, 5: 1.4})
    yield Traffic(30, 10, 10, [], 1.0, {1: 1.0})
    dice = random.Random(13)
    for number in range(40):
        names = [f"n{i}" for i in range(dice.randint(1, 12))]
        trace = [dice.choice(names) for _ in range(dice.randint(1, 60))]
        sizes = dice.sample((1, 2, 3, 4, 6, 8, 16, 32), dice.randint(1, 6))
        yield Traffic(
            memory=dice.randint(20, 900),
            row=dice.randint(1, 40),
            adapter=dice.randint(1, 40),
            trace=trace,
            load=dice.choice((0.0, 0.01, 0.3, 2.0)),
            seconds={n: 1 + dice.random() * n / (2 + number % 5) for n in sizes},
        )


# 13.3 ---------------------------------------------------------------------------------


class OurPrefixCache:
    """The lesson's own answer to 13.3."""

    def __init__(self):
        self.kept = {}

    def keep(self, version: Version | None, tokens, cache) -> None:
        self.kept[_content(version), tuple(tokens)] = cache

    def find(self, version: Version | None, prompt):
        for n in range(len(prompt) - 1, 0, -1):
            key = _content(version), tuple(prompt[:n])
            if key in self.kept:
                return n, self.kept[key]
        return 0, None


def _content(version: Version | None) -> str | None:
    return None if version is None else version.digest


class Kept:
    """Stands for keys and values: told apart by identity alone."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self):
        return f"<{self.text}>"


def _version(name: str, digest: str) -> Version:
    return Version(name, digest, {})


NOTHING = (0, None)


@judged
def prefix_cache(MyPrefixCache: type) -> None:
    """13.3: keep(version, tokens, cache); find(version, prompt) -> (n, cache)."""
    _told_by_content(MyPrefixCache)
    _as_long_as_it_may_be(MyPrefixCache)
    _on_its_own(MyPrefixCache)
    for seed in range(4):
        _at_random(MyPrefixCache, seed)


def _asked(mine, version, prompt, expected, why: str) -> None:
    """Wrong where find() does not give (n, cache); `why` is the likely mistake."""
    with unchanged(prompt=prompt):
        got = mine.find(version, prompt)
    pair = isinstance(got, tuple | list) and len(got) == 2
    same = pair and type(got[0]) is int and got[0] == expected[0]
    if not (same and got[1] is expected[1]):
        who = "the base" if version is None else f"{version.name}, {version.digest}"
        if not pair:
            why = "find() returns two values: how many tokens, and their cache"
        raise Wrong(
            f"find({prompt}) under {who}\n  expected  {expected}\n  got       {got!r}\n"
            f"Likely mistake: {why}"
        )


def _told_by_content(MyPrefixCache: type) -> None:
    mine, prompt = MyPrefixCache(), [5, 6, 7, 8]
    first, second = _version("json", "digest 1"), _version("json", "digest 2")
    renamed, legal = _version("json-v1", "digest 1"), _version("legal", "digest 3")
    kept = Kept("read under digest 1")
    mine.keep(first, [5, 6, 7], kept)
    _asked(mine, first, prompt, (3, kept), "what was kept is not there")
    _asked(mine, second, prompt, NOTHING, "the name is the key: its content is new")
    _asked(mine, legal, prompt, NOTHING, "the adapter is missing in the key")
    _asked(mine, None, prompt, NOTHING, "an adapter's cache was used for the base")
    why = "the name is in the key: the same content under another name is the same"
    _asked(mine, renamed, prompt, (3, kept), why)
    base = Kept("read by the base")
    mine.keep(None, [5, 6], base)
    _asked(mine, None, prompt, (2, base), "the base's own cache is not there")
    _asked(mine, legal, prompt, NOTHING, "the base's cache was used for an adapter")
    newer = Kept("read under digest 2")
    mine.keep(second, [5, 6, 7], newer)
    _asked(mine, second, prompt, (3, newer), "a new content cannot be kept")
    _asked(mine, first, prompt, (3, kept), "a new content took the old one's place")


def _as_long_as_it_may_be(MyPrefixCache: type) -> None:
    mine, version = MyPrefixCache(), _version("a", "digest a")
    caches = {n: Kept(f"{n} tokens") for n in (1, 3, 2, 5)}
    for n, cache in caches.items():
        mine.keep(version, [4, 4, 7, 0, 9][:n], cache)
    longest = "the longest one that begins the prompt is asked for"
    _asked(mine, version, [4, 4, 7, 1], (3, caches[3]), longest)
    _asked(mine, version, [4, 4, 8, 0, 9], (2, caches[2]), longest)
    _asked(mine, version, [4, 4, 7, 0, 9, 2], (5, caches[5]), longest)
    why = "at least one token of the prompt must be left to read"
    _asked(mine, version, [4, 4, 7], (2, caches[2]), why)
    _asked(mine, version, [4], NOTHING, why)
    _asked(mine, version, [], NOTHING, "an empty prompt has no beginning")
    why = "the kept tokens must be the beginning of the prompt, in the same order"
    _asked(mine, version, [7, 4, 4], NOTHING, why)
    _asked(mine, version, [9, 4, 4, 7], NOTHING, why)
    _asked(mine, version, [0, 0, 0, 0], NOTHING, why)
    long = Kept("a long one")
    mine.keep(version, [*range(20, 60)], long)
    _asked(mine, version, [*range(20, 64)], (40, long), longest)
    fresh = Kept("read again")
    mine.keep(version, [4, 4], fresh)
    _asked(mine, version, [4, 4, 1], (2, fresh), "what is kept again replaces the old")


def _on_its_own(MyPrefixCache: type) -> None:
    mine, version = MyPrefixCache(), _version("a", "digest a")
    lent, cache = [1, 2], Kept("two tokens")
    with unchanged(tokens=lent):
        mine.keep(version, lent, cache)
    lent[:] = [8, 9]
    why = "the list belongs to the caller, who changes it later: copy the tokens"
    _asked(mine, version, [1, 2, 3], (2, cache), why)
    _asked(mine, version, [8, 9, 3], NOTHING, why)
    _asked(
        MyPrefixCache(), version, [1, 2, 3], NOTHING, "two caches share what is kept"
    )
    _asked(mine, version, (1, 2, 3), (2, cache), "a tuple of tokens is a prompt too")
    mine.keep(version, (3, 4), cache)
    _asked(mine, version, [3, 4, 5], (2, cache), "a tuple of tokens can be kept too")


def _at_random(MyPrefixCache: type, seed: int) -> None:
    dice, mine, ours = random.Random(seed), MyPrefixCache(), OurPrefixCache()
    versions = [None]
    versions += [_version(dice.choice("ab"), f"digest {i}") for i in range(5)]
    for number in range(150):
        version = dice.choice(versions)
        tokens = [dice.randrange(2) for _ in range(dice.randint(0, 14))]
        if dice.random() < 0.4 and tokens:
            cache = Kept(f"number {number}")
            mine.keep(version, tokens, cache)
            ours.keep(version, tokens, cache)
        else:
            why = "the content's digest and the exact tokens are the key"
            _asked(mine, version, tokens, ours.find(version, tokens), why)
