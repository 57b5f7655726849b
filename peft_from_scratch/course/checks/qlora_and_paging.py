"""What the exercises of notebook 08, QLoRA and paged optimizers, are compared with.

The first three compare with nf4/ and methods/qlora.py on random weights, the fourth
with a list of when each page was last used, the last with torch's AdamW.
"""

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...nf4 import Quantized, dequantize, quantize
from . import Wrong, close, judged, pulled, unchanged

# (d_out, d_in, r, scale, shape of x without d_in). The first is square, so that what is
# turned round has the same shape; in all, W' is far larger than x and h.
CASES = (
    (48, 48, 3, 2.5, (2, 3)),
    (40, 64, 2, 0.5, (4,)),
    (64, 24, 4, 3.0, (1, 2, 2)),
)


@dataclass(frozen=True)
class Case:
    """A weight W0, its codes, an adapter beside it, an input."""

    W0: Tensor
    q: Quantized
    A: Tensor
    B: Tensor
    scale: float
    x: Tensor

    @property
    def W(self) -> Tensor:  # W'
        return dequantize(self.q)

    @property
    def update(self) -> Tensor:
        return self.scale * (self.B @ self.A)

    def __str__(self):
        (d_out, d_in), r = self.W0.shape, len(self.A)
        return f"d_in={d_in}, d_out={d_out}, r={r}, scale={self.scale}"


def cases() -> Iterator[Case]:
    """Random weights, adapters and inputs, the same at every call."""
    draw = torch.Generator().manual_seed(8)

    def normal(*shape) -> Tensor:
        return torch.randn(shape, generator=draw)

    for d_out, d_in, r, scale, shape in CASES:
        W0 = normal(d_out, d_in)
        A, B = normal(r, d_in) / d_in**0.5, normal(d_out, r)
        yield Case(W0, quantize(W0), A, B, scale, normal(*shape, d_in))


# 8.1 ----------------------------------------------------------------------------------


@judged
def qlora_forward(my_qlora: Callable) -> None:
    """8.1: my_qlora(x, q, A, B, scale) and its gradients; W' is not kept between."""
    for case in cases():
        x, A, B = (t.clone().requires_grad_() for t in (case.x, case.A, case.B))
        with unchanged(x=x, A=A, B=B, packed=case.q.packed), _Kept(case.W) as kept:
            h = my_qlora(x, case.q, A, B, case.scale)
        twin = [t.clone().requires_grad_() for t in (case.x, case.A, case.B)]
        expected = twin[0] @ case.W.T + case.scale * (twin[0] @ twin[1].T @ twin[2].T)
        close(
            h,
            expected.detach(),
            what=f"h, for x of shape {tuple(x.shape)} and {case}",
            mistakes=_wrong_outputs(case),
        )
        kept.demand_none()
        _same_gradients(case, h, expected, (x, A, B), twin)


def _wrong_outputs(case: Case) -> dict[str, Tensor]:
    x, W, A, B, scale = case.x, case.W, case.A, case.B, case.scale
    own = x @ A.T @ B.T
    codes = case.q.codes().view(W.shape).float()
    wrong = {
        "the codes are no weights: dequantize them": x @ codes.T + scale * own,
        "B A is not scaled": x @ W.T + own,
        "the whole of h is scaled, W' x included": scale * (x @ W.T + own),
        "W' x is scaled, in the place of B A x": scale * (x @ W.T) + own,
        "the scale is there twice": x @ W.T + scale**2 * own,
        "the wrong sign: the update is added": x @ W.T - scale * own,
        "the update alone: W' x is missing": scale * own,
        "W' x alone: the update is missing": x @ W.T,
    }
    if W.shape[0] == W.shape[1]:
        wrong["W' was not transposed: x holds rows"] = x @ W + scale * own
        wrong["B A was not transposed: x holds rows"] = x @ W.T + scale * (x @ B @ A)
    return wrong


def _same_gradients(case, h, expected, mine, twin) -> None:
    if not (isinstance(h, Tensor) and h.requires_grad):
        raise Wrong(
            "h has the right values, but no gradient passes through it. Likely "
            "mistake: .data, .detach(), torch.no_grad(), or MyProduct.forward(…) in "
            "the place of MyProduct.apply(…)"
        )
    ways = pulled(h, expected)
    through_A = case.scale * (ways @ case.B @ case.A)
    mistakes = {
        "the gradient through W' is missing: the layers below learn by it": through_A,
        "the gradient passes W' only: through A and B it must go too": ways @ case.W,
        "the gradient passes the codes: in backward too they are dequantized": through_A
        + ways @ case.q.codes().view(case.W.shape).float(),
    }
    if case.W.shape[0] == case.W.shape[1]:
        turned = through_A + ways @ case.W.T
        mistakes["W' was transposed in backward: dx is dy W'"] = turned
    for name, got, wanted in zip(("x", "A", "B"), mine, twin, strict=True):
        if got.grad is None:
            raise Wrong(
                f"h has the right values, but no gradient reaches {name}. Likely "
                f"mistake: {name}.detach(), or None in backward() in its place"
            )
        close(
            got.grad,
            wanted.grad,
            what=f"h is right, but not the gradient of {name}, for {case}",
            mistakes=mistakes,
            tolerance=1e-4,
        )


class _Kept(TorchDispatchMode):
    """Which tensors as large as W' are made inside the block, and still held after."""

    def __init__(self, W: Tensor):
        super().__init__()
        self.bytes, self.made = W.nbytes, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        result = operation(*args, **(kwargs or {}))
        for tensor in filter(_is_tensor, tree_leaves(result)):
            held = tensor.untyped_storage()
            if held.nbytes() >= self.bytes and held._cdata not in given:
                self.made.append(weakref.ref(held))
        return result

    def demand_none(self) -> None:
        """Wrong where W' lives on between the passes; the caller holds the graph."""
        gc.collect()
        if any(held() is not None for held in self.made):
            raise Wrong(
                "h has the right values, but W' is still in memory after the forward "
                "pass: that of every layer, until backward. Likely mistake: plain "
                "autograd, save_for_backward(W) or ctx.W; keep ctx.q, and dequantize "
                "again in backward()"
            )


def _is_tensor(value) -> bool:
    return isinstance(value, Tensor)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# 8.2 ----------------------------------------------------------------------------------


@judged
def loftq_start(my_start: Callable) -> None:
    """8.2: my_start(W0, q, r, scale): scale B A is the best rank r of W0 - W'."""
    for case in cases():
        r, scale = len(case.A) + 1, case.scale
        with unchanged(W0=case.W0, packed=case.q.packed):
            found = my_start(case.W0, case.q, r, scale)
        sizes = f"{tuple(case.W0.shape)}, r={r}, scale={scale}"
        A, B = _pair(found, case.W0.shape, r, sizes)
        close(
            scale * (B @ A),
            _best(case.W0 - case.W, r),
            what=f"scale · B A, for W0 of {sizes}",
            mistakes=_wrong_starts(case, r),
            tolerance=1e-4,
        )


def _pair(found, shape, r: int, sizes: str) -> tuple[Tensor, Tensor]:
    if not (isinstance(found, tuple | list) and len(found) == 2):
        raise Wrong(
            f"for W0 of {sizes}: expected two tensors, A and B, in this order; got "
            f"{type(found).__name__}. Likely mistake: `return A, B` is missing"
        )
    wanted = [(r, shape[1]), (shape[0], r)]
    shapes = [tuple(getattr(each, "shape", ())) for each in found]
    if shapes == wanted:
        return found[0].detach(), found[1].detach()
    likely = "another size was used: A reads x, B writes h, r lies between"
    if shapes == wanted[::-1]:
        likely = "`return B, A`"
    elif shapes == [side[::-1] for side in wanted]:
        likely = "both are transposed"
    elif [s[i] for s, i in zip(shapes, (0, 1), strict=True) if len(s) == 2] != [r, r]:
        likely = "not r pieces were kept: U[:, :r], s[:r], Vt[:r]"
    raise Wrong(
        f"for W0 of {sizes}: A and B should have the shapes {wanted}, and have "
        f"{shapes}. Likely mistake: {likely}"
    )


def _best(D: Tensor, r: int) -> Tensor:
    """The best approximation of rank r."""
    U, s, Vt = torch.linalg.svd(D, full_matrices=False)
    return U[:, :r] * s[:r] @ Vt[:r]


def _wrong_starts(case: Case, r: int) -> dict[str, Tensor]:
    D, scale = case.W0 - case.W, case.scale
    right = _best(D, r)
    U, s, Vt = torch.linalg.svd(D, full_matrices=False)
    return {
        "the wrong sign: W0 - W', not W' - W0": -right,
        "the scale is forgotten: divide the pieces by it": scale * right,
        "divided by the scale in A and in B: once is enough": right / scale,
        "the SVD of W0, not of what quantizing took from it": _best(case.W0, r),
        "the SVD of W', not of W0 - W'": _best(case.W, r),
        "the singular values are missing": U[:, :r] @ Vt[:r],
        "the singular values are there twice: their roots in A and B, or all in one": (
            U[:, :r] * s[:r] ** 2 @ Vt[:r]
        ),
        "their roots are in one of the two alone": U[:, :r] * s[:r].sqrt() @ Vt[:r],
        "the smallest pieces were kept, not the largest": (
            U[:, -r:] * s[-r:] @ Vt[-r:]
        ),
        "one piece too few": _best(D, r - 1),
        "B A is zero: that is LoRA's own start": torch.zeros_like(D),
    }


# 8.3 ----------------------------------------------------------------------------------


@judged
def merge_errors(my_errors: Callable) -> None:
    """8.3: my_errors(W0, q, A, B, scale): (original, requantized), in updates."""
    for case in cases():
        with unchanged(W0=case.W0, A=case.A, B=case.B, packed=case.q.packed):
            got = my_errors(case.W0, case.q, case.A, case.B, case.scale)
        close(
            got,
            _errors(case),
            what=f"(original, requantized), for {case}",
            mistakes=_wrong_errors(case),
            tolerance=1e-4,
        )


def _errors(
    case: Case, *, update=None, truth=None, whole=None, again=None
) -> tuple[float, float]:
    """The two errors; or what another update, truth, norm or requantized one makes."""
    update = case.update if update is None else update
    trained = case.W + update
    truth = trained if truth is None else truth
    whole = update.norm() if whole is None else whole
    requantized = dequantize(quantize(trained if again is None else again))
    merges = (case.W0 + update, requantized)
    return tuple(((W - truth).norm() / whole).item() for W in merges)


def _wrong_errors(case: Case) -> dict[str, tuple]:
    W0, W, update = case.W0, case.W, case.update
    right, trained = _errors(case), W + update
    return {
        "divided by the weight's norm: the update's is asked for": _errors(
            case, whole=trained.norm()
        ),
        "compared with W0 + ΔW: the adapter was trained beside W'": _errors(
            case, truth=W0 + update
        ),
        "compared with W', without the update": _errors(case, truth=W),
        "compared with W0": _errors(case, truth=W0),
        "requantized W0 + ΔW, not W' + ΔW": _errors(case, again=W0 + update),
        "requantized without the update": _errors(case, again=W),
        "the update is not scaled": _errors(case, update=case.B @ case.A),
        "squared: take the root of the sums of squares": tuple(e**2 for e in right),
        "sums of the absolute values: norms are asked for": tuple(
            ((m - trained).abs().sum() / update.abs().sum()).item()
            for m in (W0 + update, dequantize(quantize(trained)))
        ),
        "not divided by ‖ΔW‖": _errors(case, whole=torch.tensor(1.0)),
        "the two are swapped": right[::-1],
    }


# 8.4 ----------------------------------------------------------------------------------


@judged
def lru_pages(MyPages: type) -> None:
    """8.4: MyPages(slots).use(page) -> who left, or None; .resident, .faults."""
    for slots, trace in _traces():
        theirs, last, faults = MyPages(slots), {}, 0
        for now, page in enumerate(trace):
            got = theirs.use(page)
            left = None
            if page not in last:
                faults += 1
                if len(last) == slots:
                    left = min(last, key=last.get)
            wrong = _wrong_leavers(last, left, page, trace[:now])
            last.pop(left, None)
            last[page] = now
            where = f"{slots} slots, pages used so far {trace[: now + 1]}"
            if type(got) is not type(left) or got != left:
                raise Wrong(_who_left(where, left, got, wrong))
            _same_table(theirs, set(last), slots, faults, where)


def _traces() -> Iterator[tuple[int, list[int]]]:
    """(slots, pages in the order of their use), the telling ones first."""
    yield 5, [5, 4, 6, 2, 9, 5, 6, 1]  # each policy sends another page away
    yield 3, [5, 6, 7, 6, 5, 8, 7]
    yield 1, [3, 3, 4, 3]
    yield 4, [0, 1, 2, 3, 4, 5] * 3  # over and over
    yield 4, [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0] * 2  # back and forth
    dice = random.Random(8)
    for slots in (2, 3, 5):
        yield slots, [dice.randrange(8) for _ in range(60)]


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
    told = f"who left: {where}\n  expected  {left!r}\n  got       {got!r}"
    return told + (f"\nLikely mistake: {likely[0]}" if likely else "")


def _same_table(theirs, resident: set, slots: int, faults: int, where: str) -> None:
    found = list(theirs.resident)
    if set(found) != resident or len(found) != len(resident):
        more = len(found) > slots
        likely = (
            "more pages than slots: one must leave before the new one comes"
            if more
            else "a page that leaves must be taken out, one that comes put in, once"
        )
        raise Wrong(
            f"self.resident: {where}\n  expected  {sorted(resident)}\n"
            f"  got       {found}\nLikely mistake: {likely}"
        )
    if theirs.faults != faults:
        raise Wrong(
            f"self.faults: {where}\n  expected  {faults}\n  got       {theirs.faults}\n"
            "Likely mistake: a use of a page that is not there is a fault, a hit is "
            "none; the first use of a page counts too"
        )


# 8.5 ----------------------------------------------------------------------------------

SETTINGS = dict(lr=0.05, beta1=0.8, beta2=0.95, eps=1e-3, decay=0.1)


class Store:
    """Slow memory: of each page m and v, a tensor (2, n). Counts the copies."""

    def __init__(self, pages: int, n: int):
        self.pages = torch.zeros(pages, 2, n)
        self.reads = self.writes = 0

    def read(self, page: int) -> Tensor:
        """A copy of the page."""
        self.reads += 1
        return self.pages[page].clone()

    def write(self, page: int, states: Tensor) -> None:
        self.writes += 1
        self.pages[page].copy_(states)


@judged
def paged_adamw(MyPager: type) -> None:
    """8.5: MyPager(store): bring(page), update(p, g, t, …); AdamW's weights."""
    for pages, n, walk in (
        (1, 5, [[0], [0], [0]]),
        (3, 4, [[0, 1, 2]] * 4),
        (3, 4, [[0, 1, 2], [2, 1, 0], [0, 1, 2]]),
        (2, 6, [[1, 0]] * 3),
    ):
        told = f"{pages} pages of {n} values, walks {walk}"
        store, pager, p, grads = _begin(MyPager, pages, n, len(walk))
        reads = writes = 0
        held = None
        for t, (order, g) in enumerate(zip(walk, grads, strict=True), 1):
            for page in order:
                pager.bring(page)
                if page != held:
                    reads, writes = reads + 1, writes + (held is not None)
                _same_counts(store, reads, writes, told)
                pager.update(p[page], g[page].clone(), t, **SETTINGS)
                held = page
        _same_weights(p, grads, told)
        _same_when_only_looked_at(pager, store, pages, told)


def _begin(MyPager, pages: int, n: int, steps: int):
    draw = torch.Generator().manual_seed(pages * n)
    store = Store(pages, n)
    p = torch.randn(pages, n, generator=draw)
    grads = torch.randn(steps, pages, n, generator=draw)
    return store, MyPager(store), p, grads


def _start(grads: Tensor) -> Tensor:
    """The weights that _begin drew, with these sizes."""
    _, pages, n = grads.shape
    return torch.randn(pages, n, generator=torch.Generator().manual_seed(pages * n))


def _same_weights(p: Tensor, grads: Tensor, told: str) -> None:
    steps = len(grads)
    mistakes = {
        text: _adamw(grads, **{name: value})
        for text, name, value in (
            ("no bias correction: divide m and v by 1 - beta ** t", "corrected", False),
            ("m is lost between the steps", "forget_m", True),
            ("v is lost between the steps: both states are in the page", "forget_v", 1),
            ("weight decay is missing: p shrinks by lr · decay", "decay", 0.0),
            ("weight decay went into the gradient: that is Adam's L2", "l2", True),
            ("eps was added under the root", "under", True),
            ("v moves by beta1: it has a beta of its own, beta2", "pace", 0.8),
            ("t counts the updates of all pages: it is the step's number", "each", 1),
        )
    }
    close(
        p,
        _torch_adamw(grads),
        what=f"the weights after step {steps}, for {told}",
        mistakes=mistakes,
        tolerance=1e-4,
    )


def _torch_adamw(grads: Tensor) -> Tensor:
    s = SETTINGS
    p = torch.nn.Parameter(_start(grads))
    optimizer = torch.optim.AdamW(
        [p], s["lr"], (s["beta1"], s["beta2"]), s["eps"], s["decay"], foreach=False
    )
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def _adamw(
    grads: Tensor,
    *,
    corrected=True,
    forget_m=False,
    forget_v=False,
    decay=SETTINGS["decay"],
    l2=False,
    under=False,
    pace=SETTINGS["beta2"],
    each=False,
) -> Tensor:
    """AdamW in its equations, with a mistake at choice."""
    lr, beta1, beta2, eps = (SETTINGS[n] for n in ("lr", "beta1", "beta2", "eps"))
    p = _start(grads)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        g = g + decay * p if l2 else g
        m = beta1 * (0 if forget_m else m) + (1 - beta1) * g
        v = pace * (0 if forget_v else v) + (1 - pace) * g**2
        count = torch.tensor(float(t))
        if each:  # the pages take their turns
            count = (t - 1) * len(p) + torch.arange(1.0, len(p) + 1)[:, None]
        low, high = (1 - beta1**count, 1 - beta2**count) if corrected else (1, 1)
        root = (v / high + eps).sqrt() if under else (v / high).sqrt() + eps
        p = (p if l2 else p * (1 - lr * decay)) - lr * (m / low) / root
    return p


def _same_counts(store: Store, reads: int, writes: int, told: str) -> None:
    if store.reads != reads:
        raise Wrong(
            f"pages read from the store, for {told}\n  expected  {reads}\n"
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
            f"pages written back, for {told}\n  expected  {writes}\n"
            f"  got       {store.writes}\nLikely mistake: {likely}"
        )


def _same_when_only_looked_at(pager, store: Store, pages: int, told: str) -> None:
    """Pages that are brought and not updated are clean: dropped, not written."""
    pager.bring(0)
    pager.bring(pages - 1)
    writes, kept = store.writes, store.pages.clone()
    for page in [*range(pages), *range(pages)]:
        pager.bring(page)
    late = store.writes - writes
    if late:
        raise Wrong(
            f"for {told}, and then looked at without an update: {late} clean pages "
            "were written back. Likely mistake: only a dirty page is written; a page "
            "that was just read is clean"
        )
    if not torch.equal(kept, store.pages):
        raise Wrong(
            f"for {told}: looking at pages changed the store. Likely mistake: another "
            "page's states were written, or to another page's place"
        )
