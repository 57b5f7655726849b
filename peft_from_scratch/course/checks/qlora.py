"""What the exercises of notebook 08, QLoRA, are compared with.

All compare with nf4/ and methods/qlora.py, on random weights.
"""

import gc
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

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
        """All tensors of q."""
        absmax = self.q.absmax
        constants = [absmax] if isinstance(absmax, Tensor) else vars(absmax).values()
        return [self.q.packed, *(t for t in constants if isinstance(t, Tensor))]

    def h(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return x @ self.W.T + self.scale * (x @ A.T @ B.T)

    def __str__(self):
        (d_out, d_in), r = self.W0.shape, len(self.A)
        return f"d_in={d_in}, d_out={d_out}, r={r}, scale={self.scale}"


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


@judged
def loftq_start(my_start: Callable) -> None:
    """8.2: my_start(W0, q, r, scale): scale B A is the best rank r of W0 - W'."""
    for first, second in pairs_of_cases():
        for r in (len(first.A) + 1, min(12, *first.W0.shape)):
            product = _judge_start(my_start, first, r, None)
            _judge_start(my_start, second, r, product)
    (small,) = cases((Sizes(6, 20, 2, 0.5),))
    for r in (1, 6):  # one piece, and all of them
        _judge_start(my_start, small, r, None)
    U, _, Vt = torch.linalg.svd(small.W0, full_matrices=False)
    steep = small.W + U * 0.4 ** torch.arange(6.0) @ Vt  # little is left at the end
    _judge_start(my_start, replace(small, W0=steep), 6, None)


def _judge_start(my_start, case: Case, r: int, before) -> Tensor:
    with unchanged(W0=case.W0, q=case.of_q):
        answer = my_start(case.W0, case.q, r, case.scale)
    sizes = f"{tuple(case.W0.shape)}, r={r}, scale={case.scale}"
    A, B = _pair(answer, case.W0.shape, r, sizes)
    product = case.scale * (B @ A)
    close(
        product,
        _best(case.W0 - case.W, r),
        what=f"scale · B A, for W0 of {sizes}",
        mistakes={KEPT: before} | _wrong_starts(case, r),
        tolerance=1e-4,
    )
    return product


def _pair(answer, shape, r: int, sizes: str) -> tuple[Tensor, Tensor]:
    """A and B, detached, in double precision; Wrong where they are something else."""
    if not (isinstance(answer, tuple | list) and len(answer) == 2):
        raise Wrong(
            f"for W0 of {sizes}: expected two tensors, A and B, in this order; got "
            f"{type(answer).__name__}. Likely mistake: `return A, B` is missing"
        )
    for name, each in zip("AB", answer, strict=True):
        if not isinstance(each, Tensor) or not each.is_floating_point():
            kind = each.dtype if isinstance(each, Tensor) else type(each).__name__
            raise Wrong(
                f"for W0 of {sizes}: {name} should be a tensor of real numbers, and is "
                f"{kind}. Likely mistake: .numpy(), .tolist() or another dtype"
            )
    wanted = [(r, shape[1]), (shape[0], r)]
    shapes = [tuple(each.shape) for each in answer]
    if shapes == wanted:
        return answer[0].detach().double(), answer[1].detach().double()
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
    again = dequantize(quantize(case.W0))
    wrong = {
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
        "the means of the columns were taken off; D is W0 - W' itself": _best(
            D - D.mean(0), r
        ),
        "the codes were made again from W0 - s B A: one round is asked for": _best(
            case.W0 - dequantize(quantize(case.W0 - right)), r
        ),
        "B A is zero: that is LoRA's own start": torch.zeros_like(D),
        "W' was made again from W0: dequantize the codes that you are given": _best(
            case.W0 - again, r
        ),
    }
    return {text: value for text, value in wrong.items() if not value.equal(right)}


# 8.3 ----------------------------------------------------------------------------------


@judged
def merge_errors(my_errors: Callable) -> None:
    """8.3: my_errors(W0, q, A, B, scale): (original, requantized), in updates."""
    for first, second in zip(_merges(8), _merges(9), strict=True):
        got = None
        for case in (first, second):
            before = got
            with unchanged(W0=case.W0, A=case.A, B=case.B, q=case.of_q):
                got = my_errors(case.W0, case.q, case.A, case.B, case.scale)
            close(
                got,
                _errors(case),
                what=f"(original, requantized), for {case}",
                mistakes={KEPT: before} | _wrong_errors(case),
                tolerance=1e-4,
            )


def _merges(seed: int) -> Iterator[Case]:
    """Codes made with the defaults, of a weight that is not quite W0."""
    rows = [replace(row, options={}, idle=False) for row in CASES]
    for case in cases(tuple(rows), seed):
        draw = torch.Generator().manual_seed(seed)
        noise = case.W0.std() * torch.randn(case.W0.shape, generator=draw)
        yield replace(case, W0=case.W0 + 0.05 * noise)


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
        "requantized without the update, and W0 in the place of W'": _errors(
            case, again=W0
        ),
        "the update is not scaled": _errors(case, update=case.B @ case.A),
        "squared: take the root of the sums of squares": tuple(e**2 for e in right),
        "sums of the absolute values: norms are asked for": tuple(
            ((m - trained).abs().sum() / update.abs().sum()).item()
            for m in (W0 + update, dequantize(quantize(trained)))
        ),
        "‖B‖ times ‖A‖ is more than ‖B A‖: the norm of their product": _errors(
            case, whole=abs(case.scale) * case.B.norm() * case.A.norm()
        ),
        "a difference of norms: the norm of the difference is asked for": tuple(
            ((m.norm() - trained.norm()).abs() / update.norm()).item()
            for m in (W0 + update, dequantize(quantize(trained)))
        ),
        "not divided by ‖ΔW‖": _errors(case, whole=torch.tensor(1.0)),
        "the two are swapped": right[::-1],
        "W' was made again from W0: dequantize the codes that you are given": _errors(
            replace(case, q=quantize(W0))
        ),
    }
