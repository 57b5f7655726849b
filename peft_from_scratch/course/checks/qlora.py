"""What the exercises of notebook 08, QLoRA, are compared with.

The first compares with nf4/ on random weights. The last accepts every threshold at
which about half of an update is kept, however it was found.
"""

import gc
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...nf4 import Quantized, dequantize, quantize
from . import Wrong, close, judged, unchanged

KEPT = "what the call before returned: something is kept from call to call"
BEFORE = "what was returned before"


@dataclass(frozen=True)
class Sizes:
    """Of a case, before its numbers are drawn."""

    d_out: int
    d_in: int
    r: int
    scale: float
    shape: tuple[int, ...] = (3,)  # of x, without d_in
    options: dict = field(default_factory=dict)  # of quantize
    idle: bool = False  # B is zero, where LoRA begins
    size: float = 1.0  # of W0


# The first is square, so that what is turned round has the same shape.
CASES = (
    Sizes(48, 48, 3, 2.5, (2, 3)),
    Sizes(40, 64, 2, 0.5, (4,)),
    Sizes(64, 24, 4, 3.0, (1, 2, 2)),
    Sizes(56, 40, 1, -0.7, (5,), dict(block=32, double=False)),
    Sizes(30, 70, 6, 0.01, (9,), dict(code="int4")),
    Sizes(48, 24, 3, 2.0, (2, 3), idle=True),
    Sizes(50, 90, 9, 0.05, (3,), dict(block=128), size=1e-3),
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

    @property
    def of_q(self) -> list[Tensor]:
        return tensors(self.q)

    def h(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return x @ self.W.T + self.scale * (x @ A.T @ B.T)

    def __str__(self):
        (d_out, d_in), r = self.W0.shape, len(self.A)
        return f"d_in={d_in}, d_out={d_out}, r={r}, scale={self.scale}"


def tensors(q: Quantized) -> list[Tensor]:
    """All tensors of q."""
    absmax = q.absmax
    constants = [absmax] if isinstance(absmax, Tensor) else vars(absmax).values()
    return [q.packed, *(t for t in constants if isinstance(t, Tensor))]


def cases(rows: tuple[Sizes, ...] = CASES, seed: int = 8) -> Iterator[Case]:
    """Random weights, adapters and inputs, the same at every call."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape) -> Tensor:
        return torch.randn(shape, generator=draw)

    for row in rows:
        W0 = row.size * normal(row.d_out, row.d_in)
        A, B = normal(row.r, row.d_in) / row.d_in**0.5, normal(row.d_out, row.r)
        q, x = quantize(W0, **row.options), normal(*row.shape, row.d_in)
        yield Case(W0, q, A, B * (not row.idle), row.scale, x)


def pairs_of_cases() -> Iterator[tuple[Case, Case]]:
    """Each case, and one of the same sizes with other numbers."""
    return zip(cases(), cases(seed=9), strict=True)


# 8.1 ----------------------------------------------------------------------------------


@judged
def qlora_forward(my_qlora: Callable) -> None:
    """8.1: my_qlora(x, q, A, B, scale) and its gradients; W' is not kept between."""
    pairs = [*pairs_of_cases()]  # alive to the end: no id(q) comes a second time
    for first, second in pairs:
        h = _judge_output(my_qlora, first, "", None)
        _judge_output(my_qlora, second, "second ", h)
    _demand_nothing_kept(my_qlora)
    for case, _ in pairs:
        for train in TRAIN:
            _judge_gradients(my_qlora, case, train)
    _judge_in_a_row(my_qlora)


def _judge_output(my_qlora, case: Case, which: str, before) -> Tensor:
    x, A, B = (t.clone().requires_grad_() for t in (case.x, case.A, case.B))
    with unchanged(x=x, A=A, B=B, q=case.of_q, **{BEFORE: before}):
        h = my_qlora(x, case.q, A, B, case.scale)
    close(
        h,
        case.h(case.x, case.A, case.B),
        what=f"h, for {which}x of shape {tuple(x.shape)} and {case}",
        mistakes={KEPT: before} | _wrong_outputs(case),
        kind=x.dtype,
    )
    return h


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


TRAIN = (  # (what trains, of x, A and B; of which class A and B are)
    ((True, True, True), torch.Tensor),
    ((False, True, True), nn.Parameter),
    ((True, False, True), torch.Tensor),
)


def _judge_gradients(my_qlora, case: Case, train) -> None:
    flags, kind = train
    trained = dict(zip(("x", "A", "B"), flags, strict=True))
    lent, twin = _leaves(case, trained, kind), _leaves(case, trained, kind)
    h = my_qlora(lent["x"], case.q, lent["A"], lent["B"], case.scale)
    some = ", ".join(name for name, so in trained.items() if so)
    where = f"for {case}" + ("" if all(flags) else f", where only {some} train")
    if not (isinstance(h, Tensor) and h.requires_grad):
        raise Wrong(
            f"h has the right values, but no gradient passes through it, {where}. "
            "Likely mistake: .data, .detach(), torch.no_grad(), or "
            "MyProduct.forward(…) in the place of MyProduct.apply(…)"
        )
    expected = case.h(**twin)
    dy = torch.arange(1.0, expected.numel() + 1).view(expected.shape).cos()
    names = [name for name, so in trained.items() if so]
    with unchanged(dy=dy, q=case.of_q):
        got = _gradients(h, [lent[name] for name in names], dy)
    wanted = _gradients(expected, [twin[name] for name in names], dy)
    for name, mine, theirs in zip(names, got, wanted, strict=True):
        if mine is None:
            raise Wrong(_no_gradient(name, where, case))
        close(
            mine,
            theirs,
            what=f"h is right, but not the gradient of {name}, {where}",
            mistakes=_wrong_gradients(case, dy),
            tolerance=1e-4,
        )


def _leaves(case: Case, trained: dict[str, bool], kind: type) -> dict[str, Tensor]:
    tensors = {name: getattr(case, name).clone() for name in trained}
    return {
        name: nn.Parameter(tensor, trained[name])
        if kind is nn.Parameter and name != "x"
        else tensor.requires_grad_(trained[name])
        for name, tensor in tensors.items()
    }


def _gradients(h: Tensor, inputs: list[Tensor], dy: Tensor) -> tuple:
    return torch.autograd.grad(h, inputs, dy, allow_unused=True)


def _no_gradient(name: str, where: str, case: Case) -> str:
    likely = f"{name}.detach(), or None in backward() in its place"
    if not case.B.any():
        likely = "a shortcut where B is zero, which is where training begins"
    return (
        f"h has the right values, but no gradient reaches {name}, {where}. Likely "
        f"mistake: {likely}"
    )


def _wrong_gradients(case: Case, dy: Tensor) -> dict[str, Tensor]:
    """Of x."""
    through_A = case.scale * (dy @ case.B @ case.A)
    codes = case.q.codes().view(case.W.shape).float()
    mistakes = {
        "the gradient through W' is missing: the layers below learn by it": through_A,
        "the gradient passes W' only: through A and B it must go too": dy @ case.W,
        "the gradient passes the codes: in backward too they are dequantized": through_A
        + dy @ codes,
    }
    if case.W.shape[0] == case.W.shape[1]:
        turned = through_A + dy @ case.W.T
        mistakes["W' was transposed in backward: dx is dy W'"] = turned
    return mistakes


def _judge_in_a_row(my_qlora) -> None:
    """Two layers, the first of them used twice, before one backward pass."""
    one, two = cases((Sizes(32, 32, 3, 0.5, (2, 3)), Sizes(32, 32, 2, -1.5)))
    where = "with two layers, the first used once more, before one backward pass"

    def run(first: Callable, second: Callable) -> tuple[Tensor, list[Tensor]]:
        leaves = [t.clone().requires_grad_() for c in (one, two) for t in (c.A, c.B)]
        x = one.x.clone().requires_grad_()
        h = first(second(first(x, *leaves[:2]), *leaves[2:]), *leaves[:2])
        return h, [x, *leaves]

    def layer(case: Case) -> Callable:
        return lambda x, A, B: my_qlora(x, case.q, A, B, case.scale)

    h, mine = run(layer(one), layer(two))
    expected, theirs = run(one.h, two.h)
    close(h, expected.detach(), what=f"h {where}")
    dy = torch.arange(1.0, h.numel() + 1).view(h.shape).cos()
    names = ("x", "A of the first", "B of the first", "A of the second", "B of it")
    for name, got, wanted in zip(
        names, _gradients(h, mine, dy), _gradients(expected, theirs, dy), strict=True
    ):
        if got is None or not torch.allclose(
            got, wanted, 1e-3, 1e-3 * wanted.abs().max()
        ):
            raise Wrong(
                f"h is right, but not the gradient of {name}, {where}. Likely mistake: "
                "what backward() needs is kept in the class or outside, where the next "
                "layer writes over it: keep it on ctx"
            )


def _demand_nothing_kept(my_qlora) -> None:
    """Wrong where W' lives on between the passes; the caller holds the graph."""
    (case,) = cases((Sizes(192, 256, 4, 0.5),))
    x, A, B = (t.clone().requires_grad_() for t in (case.x, case.A, case.B))
    tracemalloc.start()  # arrays and lists; tensors are seen by _Storages
    try:
        with _Storages() as storages:
            h = my_qlora(x, case.q, A, B, case.scale)
        gc.collect()
        traced, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    bytes_ = traced + storages.alive(h, case.B @ case.A, case.update)
    if bytes_ >= case.W.nbytes / 4:
        raise Wrong(
            "h has the right values, but W' is still in memory after the forward "
            f"pass, or something as large: {bytes_:,} bytes are kept, and W' has "
            f"{case.W.nbytes:,}. Every layer keeps as much until backward. Likely "
            "mistake: plain autograd, save_for_backward(W) or ctx.W; keep ctx.q, and "
            "dequantize again in backward()"
        )


class _Storages(TorchDispatchMode):
    """Which tensors are made inside the block, and still alive after."""

    def __init__(self):
        super().__init__()
        self.made = {}  # their places in memory: weak references

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        for tensor in filter(_is_tensor, tree_leaves(result)):
            if _storage(tensor) not in given:
                storage = tensor.untyped_storage()
                self.made[_storage(tensor)] = weakref.ref(storage)
        return result

    def alive(self, *besides: Tensor) -> int:
        """Bytes of those that are, without `besides` and what has the same numbers."""
        places = [_storage(tensor) for tensor in besides]
        sides = [t.reshape(-1) for b in besides for t in (b, b.T) if b.dim() == 2]
        total = 0
        for place, reference in self.made.items():
            storage = reference()
            if storage is None or place in places:
                continue
            mine = torch.empty(0).set_(storage)
            same = (mine.shape == s.shape and torch.allclose(mine, s) for s in sides)
            total += 0 if any(same) else storage.nbytes()
        return total


def _is_tensor(value) -> bool:
    return isinstance(value, Tensor)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# 8.2 ----------------------------------------------------------------------------------

SHAPES = ((6, 6), (5, 9), (1, 12), (40, 24))
SIZES = (1.0, 1e-4, 300.0)  # of the update
KEEPS = (0.3, -0.4, 1.7)  # of the update, besides noise


@judged
def share_kept(my_kept: Callable) -> None:
    """8.2: my_kept(before, after, update): <after - before, update> / ‖update‖²."""
    returned = None
    for row in product(SHAPES, SIZES, KEEPS):
        before, after, update = _merge(*row)
        earlier = returned
        with unchanged(before=before, after=after, update=update):
            returned = my_kept(before, after, update)
        close(
            returned,
            _share(before, after, update),
            what=f"the share kept, for weights of shape {row[0]}",
            mistakes={KEPT: earlier} | _wrong_shares(before, after, update),
            tolerance=1e-3,
        )
    W, update = torch.zeros(2, 2), torch.eye(2)
    close(my_kept(W, W, update), 0.0, what="the share kept, where nothing changed")
    close(my_kept(W, update, update), 1.0, what="the share kept, where all of it is")


def _merge(shape, size: float, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """(before, after, update): a share of the update is in `after`, and noise."""
    before, update = 3 * size * torch.randn(shape), size * torch.randn(shape)
    return before, before + share * update + 0.5 * size * torch.randn(shape), update


def _share(before: Tensor, after: Tensor, update: Tensor) -> float:
    before, after, update = (each.double() for each in (before, after, update))
    return (((after - before) * update).sum() / update.square().sum()).item()


def _wrong_shares(before: Tensor, after: Tensor, update: Tensor) -> dict[str, float]:
    change = after - before
    inner, whole, size = (change * update).sum(), update.square().sum(), change.norm()
    wrong = {
        "`before` is not taken off": (after * update).sum() / whole,
        "`after` is left out": (before * update).sum() / whole,
        "before - after: the wrong sign": -inner / whole,
        "divided by ‖update‖: by its square": inner / whole.sqrt(),
        "divided by the norm of the change": inner / size**2,
        "a cosine: both norms are in it, in the place of ‖update‖²": inner
        / (size * whole.sqrt()),
        "‖after - before‖ / ‖update‖ counts rounding noise, too: take the scalar "
        "product with the update": size / whole.sqrt(),
        "a ratio of squared norms counts rounding noise, too: take the scalar product "
        "with the update": size**2 / whole,
        "‖after - (before + update)‖ / ‖update‖ is the error, not the share": (
            change - update
        ).norm()
        / whole.sqrt(),
        "not divided by ‖update‖²": inner,
        "percent: a share of 1 is all of it": 100 * inner / whole,
        "the mean of the ratios, entry by entry": (change / update).mean(),
    }
    return {text: value.item() for text, value in wrong.items()}


# 8.3 ----------------------------------------------------------------------------------

ENOUGH = (0.4, 0.6)  # shares kept at a threshold that is right
SAME = "the same t as for the weight before: it depends on q, on A and on B"
CLEARLY = (0.47, 0.53)  # values that another search for one half ends at


@dataclass(frozen=True)
class Direction:
    """Codes, and the direction of an update."""

    name: str
    q: Quantized
    A: Tensor
    B: Tensor

    def update(self, t: float) -> Tensor:
        """t ‖W'‖ B A / ‖B A‖, in double precision: (d_out, d_in)."""
        W, BA = self.W.double(), self.B.double() @ self.A.double()
        return t * W.norm() * BA / BA.norm()

    @property
    def W(self) -> Tensor:  # W'
        return dequantize(self.q)

    def requantized(self, t: float) -> Tensor:
        return dequantize(quantize((self.W + self.update(t)).float()))

    def kept(self, t: float) -> float:
        return _share(self.W, self.requantized(t), self.update(t))


def directions() -> Iterator[Direction]:
    """Weights and updates whose thresholds lie between 0.01 and 0.07.

    The second, third and fourth differ from the first in one argument each.
    """
    W, A, B = torch.randn(128, 192), torch.randn(4, 192), torch.randn(128, 4)
    q = quantize(W)
    few_columns, few_rows = A * (torch.arange(192) < 6), B.clone()
    few_rows[5:] = 0
    yield Direction("normal weights", q, A, B)
    outliers = W * (1 + 30 * (torch.rand(W.shape) < 0.005))
    yield Direction("weights with outliers", quantize(outliers), A, B)
    yield Direction("an update of six columns", q, few_columns, B)
    yield Direction("an update of five rows", q, A, few_rows)
    yield Direction("normal weights, again", q, A, B)
    uniform = quantize(2 * torch.rand(128, 128) - 1)
    yield Direction(
        "uniform weights", uniform, torch.randn(8, 128), torch.randn(128, 8)
    )
    small, tiny_A = quantize(1e-3 * torch.randn(64, 320)), 1e-3 * torch.randn(16, 320)
    yield Direction("small weights", small, tiny_A, torch.randn(64, 16))
    large, large_A = quantize(50 * torch.randn(96, 80)), 1e3 * torch.randn(1, 80)
    yield Direction("large weights", large, large_A, torch.randn(96, 1))


@judged
def merge_threshold(my_threshold: Callable) -> None:
    """8.3: my_threshold(q, A, B): the norm ratio at which half of ΔW is kept."""
    number = None
    for case in directions():
        earlier = number
        with unchanged(A=case.A, B=case.B, q=tensors(case.q)):
            t = my_threshold(case.q, case.A, case.B)
        number = _positive(t, case)
        _judge_threshold(number, case, earlier)


def _positive(t, case: Direction) -> float:
    """The answer as a number; Wrong where it is none above zero."""
    try:
        if isinstance(t, str | bytes | bool):
            raise TypeError
        number = float(t)
    except (TypeError, ValueError, RuntimeError):
        likely = "`return` is missing" if t is None else "return one number, t"
        raise Wrong(
            f"t, for {case.name}: expected a number above zero, got "
            f"{type(t).__name__}. Likely mistake: {likely}"
        ) from None
    if not 0 < number < float("inf"):
        raise Wrong(
            f"t, for {case.name}: expected a finite number above zero, got {number}. "
            "Likely mistake: a division by zero, or a search that never found a side"
        )
    return number


def _judge_threshold(t: float, case: Direction, earlier: float | None) -> None:
    low, high = ENOUGH
    share = case.kept(t)
    if low <= share <= high:
        return
    raise Wrong(
        f"t, for {case.name}, {tuple(case.W.shape)}\n"
        f"  expected  a t at which {low:.0%} to {high:.0%} of the update is kept\n"
        f"  got       {t:.4g}, at which {share:.1%} of it is kept\n"
        f"Likely mistake: {SAME if t == earlier else _likely(t, share, case)}"
    )


def _likely(t: float, share: float, case: Direction) -> str:
    named = _wrong_measures(t, case) | _wrong_units(t, case)
    for text, value in named.items():
        if CLEARLY[0] <= value <= CLEARLY[1]:
            return text
    if share > ENOUGH[1]:
        return "t is too large: at a smaller one half is kept. Is the grid too coarse?"
    return (
        "t is too small: at a larger one half is kept. Is the grid too coarse, did the "
        "search go to the wrong side, or is W' left out of the sum that is requantized?"
    )


def _wrong_units(t: float, case: Direction) -> dict[str, float]:
    """What is kept if t was another unit."""
    W, BA = case.W.norm().item(), (case.B @ case.A).norm().item()
    return {
        "t is a ratio: 0.05, not 5 %": case.kept(t / 100),
        "‖ΔW‖ itself was returned: divide it by ‖W'‖": case.kept(t / W),
        "the factor of B A was returned: t is ‖ΔW‖ / ‖W'‖": case.kept(t * BA / W),
        "‖ΔW‖² / ‖W'‖² was returned: take its root": case.kept(t**0.5),
        "‖W'‖ / ‖ΔW‖ was returned: t is the inverse": case.kept(1 / t),
    }


def _wrong_measures(t: float, case: Direction) -> dict[str, float]:
    """Other measures at this t, that could have been taken for the share kept."""
    W, update, after = case.W.double(), case.update(t), case.requantized(t).double()
    change, size = after - W, update.norm()
    changed = (quantize((W + update).float()).codes() != case.q.codes()).double()
    cosine = (change * update).sum() / (change.norm() * size).clamp(min=1e-30)
    measures = {
        "‖W - W'‖ / ‖ΔW‖ is one half there. It counts rounding noise, too: take the "
        "scalar product with ΔW": change.norm() / size,
        "‖W - (W' + ΔW)‖ / ‖ΔW‖ is one half there. That is the error: take the share "
        "of ΔW that is kept": (change - update).norm() / size,
        "half of the codes change there: measure the share of ΔW": changed.mean(),
        "the cosine of W - W' and ΔW is one half there: divide by ‖ΔW‖² alone": cosine,
        "the root of the share is one half there: one half of the share itself is "
        "asked for": max(case.kept(t), 0.0) ** 0.5,
    }
    return {text: float(value) for text, value in measures.items()}


# 8.4 ----------------------------------------------------------------------------------

SEPARATE, DEQUANTIZED = "separate", "dequantized"
REQUANTIZED, FROM_ORIGINAL = "requantized", "original, quantized"
WAYS = (SEPARATE, DEQUANTIZED, REQUANTIZED, FROM_ORIGINAL)
ADAPTER, HALF = 10, 160  # MB beyond the base in four bits


@dataclass(frozen=True)
class Device:
    """What decides how a QLoRA is merged for a device."""

    ratio: float  # ‖ΔW‖ / ‖W'‖ in percent
    room: int  # MB beside the base in four bits
    original: bool  # whether W0 is at hand
    extra: bool = True  # whether the adapter's products are allowed

    def why_not(self, way: str) -> str:
        """What speaks against a way; "" where nothing does but a better one."""
        if way == FROM_ORIGINAL and not self.original:
            return "W0 is not at hand"
        if way == SEPARATE and not self.extra:
            return "the adapter's own products are too slow there"
        needed = {SEPARATE: ADAPTER, DEQUANTIZED: HALF}.get(way, 0)
        if needed > self.room:
            return f"it needs {needed} MB, and there is room for {self.room}"
        if way == REQUANTIZED and self.ratio < 2:
            return f"at {self.ratio} % requantizing keeps almost nothing of the update"
        return ""


DEVICES = {
    "phone": (Device(0.9, 40, False), SEPARATE),
    "watch": (Device(28, 1, False), REQUANTIZED),
    "camera": (Device(0.9, 1, True), FROM_ORIGINAL),
    "server": (Device(1.2, 400, False, extra=False), DEQUANTIZED),
    "laptop": (Device(12, 40, True), SEPARATE),
}


@judged
def merge_choices(my_choices: Callable) -> None:
    """8.4: my_choices(): {device: way to merge}."""
    choices = my_choices()
    if not isinstance(choices, dict) or set(choices) != set(DEVICES):
        got = list(choices) if isinstance(choices, dict) else type(choices).__name__
        likely = "`return` is missing" if choices is None else "a device is left out"
        raise Wrong(
            f"expected a dict of {', '.join(DEVICES)}; got {got}. Likely mistake: "
            f"{likely}"
        )
    for name, (device, right) in DEVICES.items():
        choice = choices[name]
        if choice not in WAYS:
            raise Wrong(
                f"{name}: got {choice!r}. Likely mistake: a misspelled word; allowed "
                f"are {', '.join(WAYS)}"
            )
        if choice != right:
            better = "an exact way fits: the adapter may stay separate"
            raise Wrong(
                f"{name}: {choice!r} is not the best. Likely mistake: "
                f"{device.why_not(choice) or better}"
            )
