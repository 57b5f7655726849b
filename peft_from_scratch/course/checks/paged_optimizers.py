"""What the exercises of notebook 09, paged optimizers, are compared with.

The first check keeps a list of when each page was last used. The second counts the
faults of an order under LRU, and compares them with the fewest that any order can have.
The third compares with torch's AdamW, and the fourth with exact fractions.
"""

import math
import numbers
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise, zip_longest

import torch
from torch import Tensor, nn

from . import Wrong, close, judged, unchanged

# 9.1 ----------------------------------------------------------------------------------


@judged
def lru_pages(MyPages: type) -> None:
    """9.1: MyPages(slots).use(page) -> who left, or None; .resident, .faults."""
    for slots, trace in _traces():
        for _ in _follow(MyPages, slots, trace, ""):
            pass
    (slots, trace), (other, rest) = [*_traces()][-2:]
    what = ", with two tables at a time"
    one, two = _follow(MyPages, slots, trace, what), _follow(MyPages, other, rest, what)
    for _ in zip_longest(one, two):
        pass


def _follow(MyPages: type, slots: int, trace: list[int], more: str) -> Iterator[None]:
    """Use each page of the trace and compare; stops before each."""
    theirs, last, faults = MyPages(slots), {}, 0
    for now, page in enumerate(trace):
        yield
        got = theirs.use(page)
        left = None
        if page not in last:
            faults += 1
            if len(last) == slots:
                left = min(last, key=last.get)
        wrong = _wrong_leavers(last, left, page, trace[:now])
        last.pop(left, None)
        last[page] = now
        where = f"{slots} slots, pages used so far {_shown(trace[: now + 1])}{more}"
        if type(got) is not type(left) or got != left:
            raise Wrong(_who_left(where, left, got, wrong))
        _same_table(theirs, set(last), slots, faults, where)


def _shown(trace: list[int]) -> str:
    return str(trace) if len(trace) < 30 else f"[…, {str(trace[-20:])[1:]}"


def _traces() -> Iterator[tuple[int, list[int]]]:
    """(slots, pages in the order of their use), the telling ones first."""
    yield 5, [5, 4, 6, 2, 9, 5, 6, 1]  # each policy sends another page away
    yield 3, [5, 6, 7, 6, 5, 8, 7]
    yield 1, [3, 3, 4, 3]
    yield 4, [0, 1, 2, 3, 4, 5] * 3  # over and over
    yield 4, [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0] * 2  # back and forth
    yield 9, [*range(7)] * 2  # never full
    dice = random.Random(8)
    for slots, pages, first, uses in (
        (2, 8, 0, 60),
        (3, 8, 0, 60),
        (5, 8, 0, 60),
        (12, 20, 1000, 400),  # numbers above 256: equal ones are not the same object
        (11, 16, 0, 200),
    ):
        yield slots, [first + dice.randrange(pages) for _ in range(uses)]


def _wrong_leavers(last: dict, left, page, before: list) -> dict:
    """{mistake: who leaves by it}"""
    if left is None:
        return {}
    counts = {p: before.count(p) for p in last}
    first = {p: before.index(p) for p in last}
    return {
        "the one used last left: the one used longest ago must": max(
            last, key=last.get
        ),
        "the one that came first left: a hit is a use too": min(first, key=first.get),
        "the one with the lowest number left": min(last),
        "the one with the highest number left": max(last),
        "the one used least often left": min(counts, key=counts.get),
        "the page that came was returned, not the one that left": page,
    }


def _who_left(where, left, got, wrong: dict) -> str:
    likely = [text for text, who in wrong.items() if who == got and got is not None]
    if left is None:
        likely = ["nobody has to leave: the page is there, or a slot is free"]
    elif got is None:
        likely = ["all slots are taken and the page is in none: return who left"]
    if left is not None and got == left:
        likely = [f"the right page, but as a {type(got).__name__}"]
    text = f"who left: {where}\n  expected  {left!r}\n  got       {got!r}"
    return text + (f"\nLikely mistake: {likely[0]}" if likely else "")


def _same_table(theirs, resident: set, slots: int, faults: int, where: str) -> None:
    pages = list(theirs.resident)
    if set(pages) != resident or len(pages) != len(resident):
        more = len(pages) > slots
        likely = (
            "more pages than slots: one must leave before the new one comes"
            if more
            else "a page that leaves must be taken out, one that comes put in, once"
        )
        raise Wrong(
            f"self.resident: {where}\n  expected  {sorted(resident)}\n"
            f"  got       {pages}\nLikely mistake: {likely}; or two tables share one "
            "list"
        )
    if theirs.faults != faults:
        raise Wrong(
            f"self.faults: {where}\n  expected  {faults}\n  got       {theirs.faults}\n"
            "Likely mistake: a use of a page that is not there is a fault, a hit is "
            "none; the first use of a page counts too"
        )
    close(theirs.faults, faults, what=f"self.faults: {where}", kind=int)


# 9.2 ----------------------------------------------------------------------------------

SIZES = (  # pages, slots, optimizer steps: the telling ones first
    *((8, 4, 3), (6, 2, 4), (5, 1, 3), (7, 6, 6), (9, 4, 1), (4, 4, 3), (3, 5, 4)),
    *((1, 1, 3), (12, 5, 11), (16, 15, 8), (300, 40, 4)),
)


@judged
def fewest_faults(my_order: Callable) -> None:
    """9.2: my_order(pages, slots, steps) -> the pages in order, for each step."""
    for pages, slots, steps in SIZES:
        where = f"my_order(pages={pages}, slots={slots}, steps={steps})"
        order = _as_lists(my_order(pages=pages, slots=slots, steps=steps), where)
        _whole_steps(order, pages, steps, where)
        faults = [_faults(slots, order[: step + 1]) for step in range(steps)]
        fewest = pages + (steps - 1) * max(pages - slots, 0)
        if faults[-1] != fewest:
            raise Wrong(
                f"faults of {where}\n  expected  {fewest}, the fewest\n"
                f"  got       {faults[-1]}, by {_order_shown(order)}\n"
                f"Likely mistake: {_why_so_many(order, slots)}"
            )


def _as_lists(order, where: str) -> list[list[int]]:
    """The learner's order: any sequences of whole numbers."""
    if not isinstance(order, Iterable) or isinstance(order, str | Mapping):
        raise Wrong(
            f"{where}\n  expected  a list of lists\n  got       {order!r}\nLikely "
            "mistake: a list is needed, with the list of page numbers of each step"
        )
    steps = [*order]
    rows = [
        [*row] if isinstance(row, Iterable) and not isinstance(row, str) else row
        for row in steps
    ]
    pages = [page for row in rows for page in (row if isinstance(row, list) else [row])]
    whole = all(_is_whole(page) for page in pages)
    if not whole or not all(isinstance(row, list) for row in rows):
        raise Wrong(
            f"{where}\n  expected  a list of lists of whole numbers\n"
            f"  got       {_order_shown(rows)}\nLikely mistake: one list for each "
            "optimizer step is needed, with the numbers of its pages"
        )
    return [[int(page) for page in row] for row in rows]


def _is_whole(page) -> bool:
    if isinstance(page, Tensor):
        return page.numel() == 1 and not page.is_floating_point()
    return isinstance(page, numbers.Integral) and not isinstance(page, bool)


def _whole_steps(order: list[list[int]], pages: int, steps: int, where: str) -> None:
    if len(order) != steps:
        raise Wrong(
            f"optimizer steps of {where}\n  expected  {steps}\n  got       "
            f"{len(order)}\nLikely mistake: one list for each optimizer step is needed"
        )
    for step, row in enumerate(order, 1):
        if sorted(row) != [*range(pages)]:
            raise Wrong(
                f"pages of optimizer step {step}, for {where}\n"
                f"  expected  each of 0 to {pages - 1}, once\n"
                f"  got       {_shown(row)}\nLikely mistake: AdamW updates every page "
                "once in each optimizer step; only their order is free"
            )


def _faults(slots: int, order: Sequence[Sequence[int]]) -> int:
    """Under LRU."""
    resident, faults = OrderedDict(), 0  # the page used longest ago first
    for page in (page for row in order for page in row):
        faults += page not in resident
        resident[page] = None
        resident.move_to_end(page)
        if len(resident) > slots:
            resident.popitem(last=False)
    return faults


def _order_shown(order) -> str:
    text = str(order[:3]) if isinstance(order, list) else repr(order)
    return text if len(text) < 120 else f"{text[:117]}…"


def _why_so_many(order: list[list[int]], slots: int) -> str:
    """The first optimizer step that begins without its resident pages."""
    if all(row == order[0] for row in order):
        return (
            "every optimizer step has the same order, so that LRU throws out each page "
            "just before its next use"
        )
    for step, (before, row) in enumerate(pairwise(order), 2):
        resident = set(before[-slots:])
        if set(row[: len(resident)]) != resident:
            first = sorted(resident)
            return (
                f"optimizer step {step} does not begin with the pages that step "
                f"{step - 1} has left in the slots, {_shown(first)}"
            )
    return "a step must begin with the pages that the step before left in the slots"


# 9.3 ----------------------------------------------------------------------------------


class Store:
    """Slow memory: of each page m and v, a tensor (2, n). Counts the copies."""

    def __init__(self, pages: Tensor, first: int = 0):
        self.pages, self.first = pages.clone(), first  # number of the first page
        self.reads = self.writes = 0

    def read(self, page: int) -> Tensor:
        """A copy of the page."""
        self.reads += 1
        return self.pages[page - self.first].clone()

    def write(self, page: int, states: Tensor) -> None:
        self.writes += 1
        self.pages[page - self.first].copy_(states)


@dataclass(frozen=True)
class Walk:
    """Pages of n values, in the order of their updates at each step; how to update."""

    pages: int
    n: int
    order: list[list[int]]
    lr: float = 0.05
    beta1: float = 0.8
    beta2: float = 0.95
    eps: float = 1e-3
    decay: float = 0.1
    done: int = 0  # steps before the first, whose m and v are in the store
    size: float = 1.0  # of the gradients
    first: int = 0  # number of the first page
    steady: bool = True  # the same rate, betas, eps and decay at each step

    def settings(self, t: int) -> dict[str, float]:
        """Of the step number t."""
        names = ("lr", "beta1", "beta2", "eps", "decay")
        turn = 1 if self.steady else 1 - 0.2 * (t % 3)
        return {name: turn * getattr(self, name) for name in names}

    def begin(self) -> tuple[Tensor, Tensor, Tensor]:
        """(p (pages, n), gradients (steps, pages, n), m and v (pages, 2, n))"""
        draw = torch.Generator().manual_seed(self.pages * self.n + self.done)
        p = torch.randn(self.pages, self.n, generator=draw)
        shape = (len(self.order), self.pages, self.n)
        grads = self.size * torch.randn(shape, generator=draw)
        if len(grads) > 5:
            grads[3, 1] = 0  # m and v change all the same
        states = self.size * torch.randn(self.pages, 2, self.n, generator=draw)
        states[:, 1] = states[:, 1] ** 2
        return p, grads, states * bool(self.done)

    def __str__(self):
        shown = f"{self.order[:3]}" + (", …" if len(self.order) > 3 else "")
        more = f", after {self.done} steps before" if self.done else ""
        size = "" if self.size == 1 else f", gradients of the size of {self.size:g}"
        return f"{self.pages} pages of {self.n} values, walks {shown}{more}{size}"


WALKS = (
    Walk(1, 5, [[0], [0], [0]]),
    Walk(3, 4, [[0, 1, 2]] * 4),
    Walk(3, 4, [[0, 1, 2], [2, 1, 0], [0, 1, 2]]),
    Walk(2, 6, [[1, 0]] * 3),
    Walk(3, 4, [[0, 1, 2]] * 3, 0.01, 0.5, 0.7, 0.1, 0.0),
    Walk(2, 9, [[0, 1]] * 6, decay=0.5, done=4, steady=False),
    Walk(
        13, 1, [[*range(13)]] * 2 + [[*range(12, -1, -1)]] * 10, beta1=0.9, beta2=0.99
    ),
    Walk(2, 4, [[0, 1]] * 3, eps=1e-9, size=1e-6),
    Walk(2, 4, [[1, 0]] * 3, size=1e4),
    # Above 256 equal numbers are not the same object.
    Walk(3, 4, [[0, 1, 2], [2, 1, 0], [0, 1, 2]], first=1000),
)


@judged
def paged_adamw(MyPager: type) -> None:
    """9.3: MyPager(store): bring(page), update(p, g, t, …); AdamW's weights."""
    for walk in WALKS:
        for _ in _updates(MyPager, walk, str(walk)):
            pass
    one, two = (replace(WALKS[1], n=n) for n in (4, 6))
    where = f"two pagers at a time, each with {one}"
    for _ in zip_longest(_updates(MyPager, one, where), _updates(MyPager, two, where)):
        pass
    _same_after_a_change(MyPager)


def _updates(MyPager: type, walk: Walk, where: str) -> Iterator[None]:
    """Take the walk and compare; stops before each update."""
    p, grads, states = walk.begin()
    store, first = Store(states, walk.first), p.clone()
    pager, reads, writes, here = MyPager(store), 0, 0, None
    for t, order in enumerate(walk.order, walk.done + 1):
        for page in order:
            yield
            pager.bring(walk.first + page)
            if page != here:
                reads, writes = reads + 1, writes + (here is not None)
            _same_counts(store, reads, writes, where)
            _update(pager, store, p, grads[t - walk.done - 1], page, t, walk)
            here = page
    _same_weights(p, first, grads, states, walk, where)
    _same_when_only_looked_at(pager, store, walk, where)
    _same_states(store, first, grads, states, walk, where)


def _update(pager, store: Store, p: Tensor, g: Tensor, page: int, t: int, walk) -> None:
    """Of one page: nothing else may change."""
    others = [each for i, each in enumerate(p) if i != page]
    g, before, writes = g[page].clone(), store.pages.clone(), store.writes
    with unchanged(g=g, **{"another page of p": others}):
        pager.update(p[page], g, t, **walk.settings(t))
    if store.writes != writes or not torch.equal(store.pages, before):
        raise Wrong(
            f"for {walk}: an update of page {page} changed the store. Likely mistake: "
            "nothing is written when nobody leaves; the slot holds a copy of its own"
        )


def _same_weights(p, first, grads, states, walk: Walk, where: str) -> None:
    mistakes = {
        text: _adamw(first, grads, states, walk, **{name: True})
        for text, name in (
            ("no bias correction: divide m and v by 1 - beta ** t", "bare"),
            ("m is lost between the steps", "forget_m"),
            ("v is lost between the steps: both states are in the page", "forget_v"),
            ("weight decay is missing: p shrinks by lr · decay", "no_decay"),
            ("weight decay went into the gradient: that is Adam's L2", "l2"),
            ("eps was added under the root", "under"),
            ("v moves by beta1: it has a beta of its own, beta2", "one_beta"),
            ("t counts the updates of all pages: it is the step's number", "each"),
            ("the states before the first step were lost: read them", "afresh"),
            ("t was counted from one on: the step's number is given", "count"),
        )
    }
    expected, _ = _torch_adamw(first, grads, states, walk)
    close(
        p,
        expected,
        what=f"the weights after step {walk.done + len(grads)}, for {where}",
        mistakes={text: q for text, q in mistakes.items() if not q.equal(expected)},
        tolerance=1e-4,
    )


def _torch_adamw(first, grads, states, walk: Walk) -> tuple[Tensor, Tensor]:
    """(p, m and v) by torch."""
    p = nn.Parameter(first.clone())
    optimizer = torch.optim.AdamW([p], foreach=False)
    m, v = states.unbind(1)
    optimizer.state[p] = {
        "step": torch.tensor(float(walk.done)),
        "exp_avg": m.clone(),
        "exp_avg_sq": v.clone(),
    }
    for t, g in enumerate(grads, walk.done + 1):
        lr, beta1, beta2, eps, decay = walk.settings(t).values()
        settings = dict(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
        optimizer.param_groups[0].update(settings)
        p.grad = g.clone()
        optimizer.step()
    state = optimizer.state[p]
    return p.detach(), torch.stack([state["exp_avg"], state["exp_avg_sq"]], 1)


def _adamw(
    first: Tensor,
    grads: Tensor,
    states: Tensor,
    walk: Walk,
    *,
    bare=False,
    forget_m=False,
    forget_v=False,
    no_decay=False,
    l2=False,
    under=False,
    one_beta=False,
    each=False,
    afresh=False,
    count=False,
) -> Tensor:
    """AdamW in its equations, with a mistake at choice."""
    p, (m, v) = first, (0 * states if afresh else states).unbind(1)
    for t, g in enumerate(grads, 1 if count else walk.done + 1):
        lr, beta1, beta2, eps, decay = walk.settings(t).values()
        g = g + decay * p if l2 else g
        pace = beta1 if one_beta else beta2
        m = beta1 * (0 if forget_m else m) + (1 - beta1) * g
        v = pace * (0 if forget_v else v) + (1 - pace) * g**2
        number = torch.tensor(float(t))
        if each:  # the pages take their turns
            number = (t - 1) * len(p) + torch.arange(1.0, len(p) + 1)[:, None]
        low, high = (1, 1) if bare else (1 - beta1**number, 1 - beta2**number)
        root = (v / high + eps).sqrt() if under else (v / high).sqrt() + eps
        p = p if l2 or no_decay else p * (1 - lr * decay)
        p = p - lr * (m / low) / root
    return p


def _same_counts(store: Store, reads: int, writes: int, where: str) -> None:
    if store.reads != reads:
        raise Wrong(
            f"pages read from the store, for {where}\n  expected  {reads}\n"
            f"  got       {store.reads}\nLikely mistake: a page that is in the slot "
            "already is not read again, and every other one is, once"
        )
    if store.writes != writes:
        likely = (
            "a page that leaves after an update is dirty, and must be written back"
            if store.writes < writes
            else "nothing is written when nobody leaves; and once when somebody does"
        )
        raise Wrong(
            f"pages written back, for {where}\n  expected  {writes}\n"
            f"  got       {store.writes}\nLikely mistake: {likely}"
        )


def _same_when_only_looked_at(pager, store: Store, walk: Walk, where: str) -> None:
    """Pages that are brought and not updated are clean: dropped, not written."""
    last = walk.pages - 1
    pager.bring(walk.first)
    pager.bring(walk.first + last)
    writes, before = store.writes, store.pages.clone()
    for page in [*range(last + 1), *range(last + 1)]:
        pager.bring(walk.first + page)
    late = store.writes - writes
    if late:
        raise Wrong(
            f"for {where}, and then looked at without an update: {late} clean pages "
            "were written back. Likely mistake: only a dirty page is written; a page "
            "that was just read is clean"
        )
    if not torch.equal(before, store.pages):
        raise Wrong(
            f"for {where}: looking at pages changed the store. Likely mistake: another "
            "page's states were written, or to another page's place"
        )


def _same_states(store: Store, first, grads, states, walk: Walk, where: str) -> None:
    """Of all pages; where there is only one, it is in the slot."""
    _, expected = _torch_adamw(first, grads, states, walk)
    if walk.pages > 1:
        close(
            store.pages,
            expected,
            what=f"m and v in the store after the last step, for {where}",
            tolerance=1e-5,
        )


def _same_after_a_change(MyPager: type) -> None:
    """Somebody else writes to the store: a page that was away is read from there."""
    walk = Walk(3, 4, [[0, 1, 2]])
    p, (g,), states = walk.begin()
    store = Store(states)
    pager = MyPager(store)
    for page in range(3):
        pager.bring(page)
        pager.update(p[page], g[page].clone(), 1, **walk.settings(1))
    changed = torch.rand(2, 4, generator=torch.Generator().manual_seed(8))
    store.pages[0] = changed
    first = p[:1].clone()
    pager.bring(0)
    pager.update(p[0], g[0].clone(), 2, **walk.settings(2))
    later = replace(walk, done=1)
    expected, _ = _torch_adamw(first, g[None, :1], changed[None], later)
    close(
        p[:1],
        expected,
        what="the weights of page 0, whose m and v the store has got from elsewhere",
        mistakes={
            "pages are kept beside the slot: what the store holds counts": _adamw(
                first,
                g[None, :1],
                (1 - torch.tensor([[0.8], [0.95]]))
                * torch.stack([g[:1], g[:1] ** 2], 1),
                later,
            )
        },
        tolerance=1e-4,
    )


# 9.4 ----------------------------------------------------------------------------------

A_TOKEN = "a token"


@dataclass(frozen=True)
class Bill:
    """The arguments of my_plan."""

    parts: dict[str, int]
    a_token: int
    budget: int
    changes: dict[str, dict[str, float]]

    def given(self) -> dict:
        """As keyword arguments, fresh copies."""
        changes = {name: dict(change) for name, change in self.changes.items()}
        return dict(vars(self), parts=dict(self.parts), changes=changes)

    def __str__(self):
        text = (
            f"parts={self.parts}, a_token={self.a_token}, budget={self.budget}, "
            f"changes={self.changes}"
        )
        return text if len(text) < 300 else f"{text[:297]}…"


def _tokens(
    parts: Mapping,
    a_token,
    budget,
    change: Mapping | None = None,
    *,
    whole=math.floor,
    least=0,
) -> int:
    """Tokens that fit after a change, in exact fractions."""
    change = change or {}
    fixed = sum(
        Fraction(size) * Fraction(change.get(p, 1)) for p, size in parts.items()
    )
    one = Fraction(a_token) * Fraction(change.get(A_TOKEN, 1))
    return max(least, whole((budget - fixed) / one))


def _plan(bill: Bill, tokens_of: Callable = _tokens, *, last=False, always=False):
    """(tokens, best change, tokens with it), with a mistake at choice."""
    now = tokens_of(bill.parts, bill.a_token, bill.budget)
    best, most = None, -1 if always else now
    for name, change in bill.changes.items():
        longest = tokens_of(bill.parts, bill.a_token, bill.budget, change)
        if longest > most or (last and longest == most > now):
            best, most = name, longest
    return (now, best, most) if best else (now, None, now)


@judged
def best_change(my_plan: Callable) -> None:
    """9.4: my_plan(parts, a_token, budget, changes) -> (tokens, best, tokens then)."""
    for bill in _bills():
        given, expected = bill.given(), _plan(bill)
        with unchanged(**given):
            got = my_plan(**given)
        _same_plan(got, expected, bill)


def _same_plan(got, expected: tuple, bill: Bill) -> None:
    where = f"my_plan({bill})"
    if not isinstance(got, tuple | list) or len(got) != 3:
        raise Wrong(
            f"{where}\n  expected  {expected}\n  got       {got!r}\nLikely mistake: "
            "three values are needed: tokens, the name of the best change, tokens then"
        )
    tokens, best, most = got
    mistakes = _other_plans(bill)
    whole = {text: plan for text, plan in mistakes.items() if _is_plan(got, plan)}
    mistakes = whole | mistakes  # first those that explain all three values
    named = {text: plan[0] for text, plan in mistakes.items()}
    close(
        tokens, expected[0], what=f"tokens now, for {where}", mistakes=named, kind=int
    )
    if best != expected[1] or type(best) is not type(expected[1]):
        likely = [text for text, plan in mistakes.items() if plan[1] == best]
        raise Wrong(
            f"the best change, for {where}\n  expected  {expected[1]!r}, with "
            f"{expected[2]:,} tokens\n  got       {best!r}"
            + (f"\nLikely mistake: {likely[0]}" if likely else "")
        )
    named = {text: plan[2] for text, plan in mistakes.items()}
    what = f"tokens with the best change, for {where}"
    close(most, expected[2], what=what, mistakes=named, kind=int)


def _is_plan(got, plan: tuple) -> bool:
    """Whether the learner's three values are those of this mistake."""
    kinds = isinstance(got[0], numbers.Number) and isinstance(got[2], numbers.Number)
    return kinds and isinstance(got[1], str | None) and tuple(got) == plan


def _other_plans(bill: Bill) -> dict[str, tuple]:
    """{mistake: what it gives}, only those that differ from what is right."""
    exact, count = _plan(bill), bill.parts

    def frees(parts, a_token, budget, change=None):
        longest = _tokens(parts, a_token, budget, change)
        freed = sum(size * (1 - (change or {}).get(p, 1)) for p, size in parts.items())
        return freed, longest

    by_bytes = max(
        bill.changes,
        key=lambda name: frees(*_of(bill), bill.changes[name]),
        default=None,
    )
    table = {
        "the change that frees the most bytes was chosen: compare the tokens, since a "
        "change can also make each token cheaper": (
            exact[0],
            by_bytes,
            _tokens(*_of(bill), bill.changes.get(by_bytes)),
        ),
        "the bytes of one token did not change: 'a token' is a factor of a_token": (
            _plan(bill, lambda p, a, b, c=None: _tokens(p, a, b, _only(c, p)))
        ),
        "only 'a token' changed: a change also multiplies the parts": (
            _plan(bill, lambda p, a, b, c=None: _tokens(p, a, b, _only(c, [A_TOKEN])))
        ),
        "a factor was taken for what is saved: 0.25 leaves a quarter": (
            _plan(bill, lambda p, a, b, c=None: _tokens(p, a, b, _turned(c)))
        ),
        "a token that fits in part was counted: round down": (
            _plan(bill, lambda *args: _tokens(*args, whole=math.ceil))
        ),
        "the nearest whole number was taken: round down": (
            _plan(bill, lambda *args: _tokens(*args, whole=round))
        ),
        "less than nothing fits: 0 is the least": (
            _plan(bill, lambda *args: _tokens(*args, least=-math.inf))
        ),
        "of equal changes the last was chosen: the first is asked for": (
            _plan(bill, last=True)
        ),
        "no change makes room for one token more, so the best is None": (
            _plan(bill, always=True)
        ),
        "the changes were made one on top of the other: each is judged alone": (
            _all_in_turn(bill)
        ),
        "the gain was returned: the tokens that fit then are asked for": (
            *exact[:2],
            exact[2] - exact[0],
        ),
    }
    if len(count) > 1:
        for name in (next(iter(count)), [*count][-1]):
            fewer = {part: size for part, size in count.items() if part != name}
            table[f"a part is missing from the sum, {name!r}"] = _plan(
                replace(bill, parts=fewer)
            )
    return {text: plan for text, plan in table.items() if plan != exact}


def _of(bill: Bill) -> tuple:
    return bill.parts, bill.a_token, bill.budget


def _only(change: Mapping | None, names: Iterable[str]) -> dict:
    return {name: each for name, each in (change or {}).items() if name in names}


def _turned(change: Mapping | None) -> dict:
    turned = {name: 1 - Fraction(each) for name, each in (change or {}).items()}
    return {name: each for name, each in turned.items() if each > 0 or name != A_TOKEN}


def _all_in_turn(bill: Bill) -> tuple:
    """As if each change were made on top of those before it."""
    so_far, best, now = {}, None, _tokens(*_of(bill))
    most = now
    for name, change in bill.changes.items():
        so_far = {
            key: so_far.get(key, 1) * change.get(key, 1) for key in {**so_far, **change}
        }
        longest = _tokens(*_of(bill), so_far)
        if longest > most:
            best, most = name, longest
    return now, best, most


PARTS = {"weights": 30, "buffer": 2, "adapters": 4, "states": 8}


def _bills() -> Iterator[Bill]:
    """The telling ones first; factors are exact in binary, so that floor is."""
    page, cheap = {"states": 0}, {A_TOKEN: 0.5}
    rank = {"adapters": 0.25, "states": 0.25}
    yield Bill(PARTS, 2, 60, {"half a token": cheap})  # 8, then 16
    yield Bill(PARTS, 2, 61, {"rank": rank})  # 8, then 13
    yield Bill(PARTS, 2, 60, {"page": page, "half a token": cheap})  # 8, then 12, 16
    yield Bill(PARTS, 2, 48, {"page": page, "half a token": cheap})  # 2, then 6, 4
    yield Bill(PARTS, 2, 49, {"half a token": cheap, "page": page})
    yield Bill(PARTS, 2, 52, {"half": {"states": 0.5}, "none": {"adapters": 0}})  # ties
    yield Bill(PARTS, 4, 47, {"rank": rank, "page": page, "wide": {"adapters": 2}})
    yield Bill(PARTS, 3, 43, {"page": page, "rank": rank})  # nothing fits now
    yield Bill(PARTS, 3, 20, {"page": page, "rank": rank, "cheap": cheap})  # nor then
    yield Bill(PARTS, 2, 60, {"wide": {"adapters": 2}, "long": {A_TOKEN: 4}})
    yield Bill(PARTS, 2, 60, {})
    yield Bill(PARTS, 5, 58, {"a": {"buffer": 0.5}, "b": {"buffer": 0}})  # no gain: a
    both = {"states": 0, A_TOKEN: 2}
    yield Bill(PARTS, 2, 60, {"both": both, "first": cheap, "second": cheap})
    yield Bill({"weights": 7}, 3, 27, {"x": {"weights": 0.5}, "y": {A_TOKEN: 0.75}})
    yield Bill(
        {"weights": 34_458_929_344, "states": 6_396_318_080, "adapters": 1_599_078_400},
        1_756_696,
        48_000_000_000,
        {"page": page, "rank": rank, "half a token": cheap, "none": {}},
    )
    dice = random.Random(9)
    for number in range(40):
        names = [f"part {i}" for i in range(1 + number % 12)]
        parts = {name: dice.randrange(1, 10**6) for name in names}
        changes = {
            f"change {i}": {
                name: dice.choice((0, 0.25, 0.5, 0.75, 2))
                for name in dice.sample(names, min(len(names), 2))
            }
            | dice.choice(({}, {}, {A_TOKEN: dice.choice((0.25, 0.5, 0.75, 1.5))}))
            for i in range(dice.randrange(1, 14))
        }
        budget = int(sum(parts.values()) * dice.choice((0.7, 1.01, 1.5, 4)))
        yield Bill(parts, dice.randrange(1, 3000), budget, changes)
