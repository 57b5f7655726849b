"""What the exercises of notebook 11, bottleneck adapters, are compared with.

The forward pass is tried with every nonlinearity, on several shapes and bases, alone
and in a row of layers, its gradients too; sizes are counted in the library's own
modules. A fold is compared with the equation, for functions that are straight lines
and for functions that bend. OurBottleneck, our_units and our_fold are the lesson's own
answers.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...core.adapter import as_matrix
from ...methods import houlsby
from . import Wrong, close, judged, pulled, unchanged


@dataclass(frozen=True)
class Sizes:
    """Of a case: what it is made of, before its numbers are drawn."""

    kind: type[nn.Module]  # of the base
    d_in: int
    d: int
    m: int
    nonlinearity: str
    shape: tuple[int, ...]  # of x, without d_in
    bias: bool = True  # of the base
    hooked: bool = False  # the base returns what a hook makes of it
    idle: bool = False  # U and b_U are zero, as they nearly are before training
    scale: float = 1.0  # of x and of all biases
    dtype: torch.dtype = torch.float32


# In the second, D and U have the same shape, so that one in the other's place is told
# as that.
CASES = (
    Sizes(nn.Linear, 6, 4, 3, "tanh", (2, 3)),
    Sizes(nn.Linear, 5, 5, 5, "gelu", (4,)),
    Sizes(Conv1D, 6, 6, 2, "silu", (1, 5)),
    Sizes(nn.Linear, 3, 7, 4, "relu", ()),
    Sizes(Conv1D, 8, 5, 1, "tanh", (2, 2)),
    Sizes(nn.Linear, 4, 4, 2, "gelu", (2, 3), bias=False),
    Sizes(nn.Linear, 4, 6, 3, "silu", (3,), hooked=True),
    Sizes(nn.Linear, 5, 4, 2, "tanh", (2, 3), idle=True),
    Sizes(nn.Linear, 24, 40, 9, "relu", (2, 13), scale=1e3),
    Sizes(nn.Linear, 6, 3, 1, "gelu", (2, 1, 2, 3), bias=False, scale=1e-3),
    Sizes(nn.Linear, 5, 6, 3, "silu", (3, 2), dtype=torch.float64),
)


@dataclass(frozen=True)
class Case:
    """A frozen projection with a bottleneck behind it; the library's is `ours`."""

    base: nn.Module
    parts: dict[str, Tensor]  # D, b_D, U, b_U
    nonlinearity: str
    x: Tensor
    more: str = ""  # what is special in it

    @property
    def sigma(self) -> Callable[[Tensor], Tensor]:
        return houlsby.NONLINEARITIES[self.nonlinearity]

    def ours(self) -> houlsby.Bottleneck:
        m = len(self.parts["b_D"])
        bottleneck = houlsby.Bottleneck(copy.deepcopy(self.base), m, self.nonlinearity)
        with torch.no_grad():
            for name, value in own(bottleneck).items():
                value.copy_(self.parts[name])
        return bottleneck

    def theirs(self, MyBottleneck: type[nn.Module]) -> nn.Module:
        parts = {name: value.clone() for name, value in self.parts.items()}
        return MyBottleneck(copy.deepcopy(self.base), **parts, sigma=self._nameless)

    def _nameless(self, z: Tensor) -> Tensor:
        """σ as a function of somebody's own, none of torch's."""
        return self.sigma(z)

    def __str__(self):
        (m, d), kind = self.parts["D"].shape, type(self.base).__name__
        return f"{kind}{self.more} with d={d}, m={m} and {self.nonlinearity}"


def own(bottleneck: houlsby.Bottleneck) -> dict[str, Tensor]:
    """The library's parameters by the letters of the equation."""
    down, up = bottleneck.down, bottleneck.up
    return {"D": down.weight, "b_D": down.bias, "U": up.weight, "b_U": up.bias}


def cases(rows: tuple[Sizes, ...] = CASES) -> Iterator[Case]:
    """Random weights, biases and inputs, the same at every call."""
    draw = torch.Generator().manual_seed(10)

    def normal(*shape, dtype) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    for row in rows:
        (d, m), like = (row.d, row.m), dict(dtype=row.dtype)
        parts = {
            "D": normal(m, d, **like),
            "b_D": row.scale * normal(m, **like),
            "U": normal(d, m, **like) * (not row.idle),
            "b_U": row.scale * normal(d, **like) * (not row.idle),
        }
        x = row.scale * normal(*row.shape, row.d_in, **like)
        base = _base(row, lambda *shape, like=like: normal(*shape, **like))
        yield Case(base, parts, row.nonlinearity, x, _special(row))


def _base(row: Sizes, normal: Callable[..., Tensor]) -> nn.Module:
    """The frozen projection of a case."""
    if row.kind is nn.Linear:
        base = nn.Linear(row.d_in, row.d, row.bias, dtype=row.dtype)
    else:
        base = Conv1D(row.d, row.d_in).to(row.dtype)
    base.weight.data = normal(*base.weight.shape)
    if row.bias:
        base.bias.data = row.scale * normal(row.d)
    if row.hooked:
        base.register_forward_hook(lambda module, inputs, y: 1.5 * y)
    return base.requires_grad_(False)


def _special(row: Sizes) -> str:
    """What is said of the base of a case, behind its kind."""
    words = {
        " without a bias": not row.bias,
        " with a forward hook": row.hooked,
        " in float64": row.dtype == torch.float64,
        ", U and b_U zero,": row.idle,
    }
    return "".join(text for text, so in words.items() if so)


# 11.1 ---------------------------------------------------------------------------------


class OurBottleneck(nn.Module):
    """The lesson's answer to 11.1: h = y + U sigma(D y + b_D) + b_U, y = base(x)."""

    def __init__(self, base, D, b_D, U, b_U, sigma):
        super().__init__()
        self.base, self.sigma = base, sigma
        self.D, self.b_D = nn.Parameter(D), nn.Parameter(b_D)  # (m, d), (m,)
        self.U, self.b_U = nn.Parameter(U), nn.Parameter(b_U)  # (d, m), (d,)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.sigma(y @ self.D.T + self.b_D) @ self.U.T + self.b_U


@judged
def bottleneck_forward(MyBottleneck: type[nn.Module]) -> None:
    """11.1: MyBottleneck(base, D, b_D, U, b_U, sigma)(x) is the equation's h."""
    for case in cases():
        theirs = case.theirs(MyBottleneck)
        _same_outputs(theirs, case)
        _same_gradients(theirs, case)
    _same_in_a_row(MyBottleneck)


KEPT = "what the call before returned: something is kept from call to call"
MODES = (  # (when, training, gradients)
    ("", True, True),
    (", in eval()", False, True),
    (", under torch.no_grad()", True, False),
)


def _same_outputs(theirs: nn.Module, case: Case) -> None:
    """Of two inputs of one shape; in training, in eval(), and without gradients."""
    second = replace(case, x=case.x.flip(0) - case.x / 2)
    h = None
    for which, each in (("", case), ("a second ", second)):
        earlier = h
        for when, training, grad in MODES:
            theirs.train(training)
            x = each.x.clone()
            lent = {"x": x, "the module": theirs, "what it returned before": h}
            with torch.set_grad_enabled(grad), unchanged(**lent):
                h = theirs(x)
            kept = {} if earlier is None else {KEPT: earlier}
            close(
                h,
                each.ours()(each.x).detach(),
                what=f"h, for {which}x of shape {tuple(x.shape)} and a {case}{when}",
                mistakes=kept | _wrong_outputs(each),
                tolerance=1e-9 if x.dtype == torch.float64 else 1e-5,
                kind=x.dtype,
            )


def _wrong_outputs(case: Case) -> dict[str, Tensor]:
    base, x, sigma = case.base, case.x, case.sigma
    D, b_D, U, b_U = case.parts.values()
    y = base(x)
    before = y @ D.T + b_D
    narrow = sigma(before)
    added = narrow @ U.T
    wrong = {
        "the residual is missing: y itself is added": added + b_U,
        "y alone: the bottleneck is missing": y,
        "y is there twice": 2 * y + added + b_U,
        "the sign: the bottleneck is added": y - (added + b_U),
        "b_U is missing": y + added,
        "b_D is missing": y + sigma(y @ D.T) @ U.T + b_U,
        "both biases are missing": y + sigma(y @ D.T) @ U.T,
        "b_D is added behind σ: it belongs inside": y
        + (sigma(y @ D.T) + b_D) @ U.T
        + b_U,
        "b_U stands inside σ: it is added last": y + sigma(added + b_U),
        "σ is missing: what is left is a matrix": y + before @ U.T + b_U,
        "σ comes after U: it stands between D and U": y + sigma(before @ U.T + b_U),
        "σ of the whole sum: it stands between D and U": sigma(y + added + b_U),
        "σ comes before D: it stands between D and U": y
        + (sigma(y) @ D.T + b_D) @ U.T
        + b_U,
        "D was reshaped, which turns nothing round: D.T": y
        + sigma(y @ D.reshape(D.T.shape) + b_D) @ U.T
        + b_U,
        "U was reshaped, which turns nothing round: U.T": y
        + narrow @ U.reshape(U.T.shape)
        + b_U,
        "y is normed before D: D reads y as it is": y
        + sigma(nn.functional.layer_norm(y, y.shape[-1:]) @ D.T + b_D) @ U.T
        + b_U,
        "what goes into σ is added behind it as well": y
        + (before + narrow) @ U.T
        + b_U,
        **{
            f"always F.{other.__name__}, not self.sigma": y + other(before) @ U.T + b_U
            for other in (nn.functional.gelu, nn.functional.relu)
            if other is not sigma
        },
        "σ is there twice": y + sigma(narrow) @ U.T + b_U,
    }
    if base._forward_hooks:
        plain = base.forward(x)
        late = sigma(plain @ D.T + b_D) @ U.T + b_U
        wrong["the hooks of the base are passed over: call self.base(x)"] = plain + late
    if x.shape == y.shape:
        beside = sigma(x @ D.T + b_D) @ U.T + b_U
        wrong["the residual is y, the output of the base, not x"] = x + added + b_U
        wrong["x is added as well: the layer adds it later"] = x + y + added + b_U
        wrong["D reads x: it reads y, what the base returns"] = y + beside
        wrong["the base is left out"] = x + beside
        turned = x @ as_matrix(base) + (0 if base.bias is None else base.bias)
        late = sigma(turned @ D.T + b_D) @ U.T + b_U
        wrong["base.weight was used as it is stored: call self.base(x)"] = turned + late
    if D.shape == U.shape:
        wrong["D and U are swapped: D reads y"] = y + sigma(y @ U.T + b_D) @ D.T + b_U
        straight = sigma(y @ D + b_D) @ U + b_U
        wrong["D and U were not transposed: y holds rows"] = y + straight
    return wrong


def _same_gradients(theirs: nn.Module, case: Case) -> None:
    theirs.train()
    ours = case.ours()
    x, ours_x = (case.x.clone().requires_grad_() for _ in range(2))
    got, expected = theirs(x), ours(ours_x)
    if not got.requires_grad:
        raise Wrong(
            "h has the right values, but no gradient reaches D and U through it. "
            "Likely mistake: .data, .detach() or torch.no_grad() in forward()"
        )
    ways = pulled(got, expected).to(x.dtype)
    past = ways @ as_matrix(case.base)  # as if nothing but the residual led back
    _compare_gradients({"": (theirs, ours, case)}, f"for a {case}")
    close(
        torch.zeros_like(x) if x.grad is None else x.grad,
        ours_x.grad,
        what=f"h is right, but not the gradient of x, for a {case}",
        mistakes={CUT: past, STOPPED: torch.zeros_like(x)},
        tolerance=1e-4,
    )


STOPPED = "torch.no_grad() around self.base(x): its weight is frozen, x is not"
CUT = "y.detach(): the layers below learn through D too"


def _compare_gradients(layers: dict, where: str) -> None:
    """Of D, b_D, U and b_U; `layers` {which: (theirs, ours, case)}."""
    for which, (theirs, ours, case) in layers.items():
        for name, value in own(ours).items():
            mine = _parameter(theirs, name, case).grad
            if mine is None:
                raise Wrong(
                    f"h has the right values, but no gradient reaches {name}{which}, "
                    f"{where}. Likely mistake: {name}.data, .detach() or a copy in "
                    f"forward(){_shortcut(case)}"
                )
            close(
                mine,
                value.grad,
                what=f"h is right, but not the gradient of {name}{which}, {where}",
                tolerance=1e-4,
            )


def _shortcut(case: Case) -> str:
    idle = not case.parts["U"].any()
    return "; or y alone while U is zero, which is where training begins" * idle


def _parameter(theirs: nn.Module, name: str, case: Case) -> Tensor:
    """A parameter of this name, or else the one that holds its numbers."""
    by_name = getattr(theirs, name, None)
    if isinstance(by_name, nn.Parameter):
        return by_name
    for parameter in theirs.parameters():
        if parameter.shape == case.parts[name].shape and torch.equal(
            parameter, case.parts[name]
        ):
            return parameter
    raise Wrong(
        f"no parameter holds {name}. Likely mistake: nn.Parameter(…) is missing in "
        "__init__(), which the cell came with"
    )


def _same_in_a_row(MyBottleneck: type[nn.Module]) -> None:
    """Two layers, the first of them used twice, before one backward pass."""
    one, two = cases(
        (
            Sizes(nn.Linear, 6, 6, 3, "tanh", (2, 5)),
            Sizes(nn.Linear, 6, 6, 3, "gelu", (2, 5)),
        )
    )
    theirs = [case.theirs(MyBottleneck) for case in (one, two)]
    ours = [case.ours() for case in (one, two)]
    got, expected = (first(second(first(one.x))) for first, second in (theirs, ours))
    where = "with two layers, the first used once more, before one backward pass"
    what = f"h of three bottlenecks after each other, {where}"
    kept = {"something is kept in the class or in the layer from call to call": got}
    close(got, expected.detach(), what=what, mistakes=kept, kind=one.x.dtype)
    pulled(got, expected)
    layers = zip(
        (" of the first", " of the second"), theirs, ours, (one, two), strict=True
    )
    _compare_gradients({which: rest for which, *rest in layers}, where)


# 11.2 ---------------------------------------------------------------------------------

BUDGETS = (  # (d, numbers of a LoRA in a layer)
    (576, 81_408),
    (128, 20_480),
    (64, 5_000),
    (32, 700),
    (96, 2 * (2 * 96 * 24 + 96 + 24)),  # met exactly
    (100, 792),  # the closest in difference is not the closest in ratio
    (64, 9_000),  # a second budget for one d
    (300, 5_000),  # a second d for one budget
    (50, 320),
    (8, 2 * (2 * 8 * 8 + 8 + 8)),  # all that is allowed: m = d
    (1, 8),
    (8191, 50_017_299),  # more than float32 counts
)


def budgets() -> Iterator[tuple[int, int]]:
    """Those above, and some at random; each has one answer."""
    yield from BUDGETS
    dice = random.Random(10)
    for _ in range(30):
        d = dice.randint(2, 300)
        m = dice.randint(1, d)
        yield d, _formula(d, m) + dice.randint(-2 * d, 2 * d)  # a step is 4 d + 2


def our_units(d: int, budget: int) -> tuple[int, int]:
    """The lesson's own answer to 11.2: (m, count)."""
    m = round((budget - 2 * d) / (2 * (2 * d + 1)))
    return m, _formula(d, m)


@judged
def bottleneck_units(my_units: Callable) -> None:
    """11.2: my_units(d, budget): the m closest to the budget of a layer, its count."""
    for d, budget in budgets():
        m = min(range(1, d + 1), key=lambda m: abs(_formula(d, m) - budget))
        got, expected = my_units(d, budget), (m, 2 * counted(d, m))
        wrong = _wrong_units(d, budget)
        what = f"(m, count), for d={d} and a budget of {budget:,} a layer"
        if not _two_numbers(got) or tuple(got) == expected:
            close(got, expected, what=what, kind=int)
        else:
            likely = [text for text, pair in wrong.items() if tuple(got) == pair]
            likely += [text for text, pair in wrong.items() if got[0] == pair[0] != m]
            raise Wrong(
                f"{what}\n  expected  {m}, {expected[1]:,}\n"
                f"  got       {got[0]:,}, {got[1]:,}"
                + (f"\nLikely mistake: {likely[0]}" if likely else "")
            )


def _two_numbers(got) -> bool:
    return (
        isinstance(got, tuple | list)
        and len(got) == 2
        and all(isinstance(n, int | float) and not isinstance(n, bool) for n in got)
    )


def counted(d: int, m: int) -> int:
    """What a bottleneck of the library trains behind a projection to d numbers."""
    bottleneck = houlsby.Bottleneck(nn.Linear(1, d, device="meta"), m)
    return sum(p.numel() for p in bottleneck.parameters() if p.requires_grad)


def _formula(d: int, m: int) -> int:
    return 2 * (2 * m * d + d + m)


def _wrong_units(d: int, budget: int) -> dict[str, tuple[float, float]]:
    exact = (budget - 2 * d) / (2 * (2 * d + 1))
    right = round(exact)
    one = round((budget - d) / (2 * d + 1))
    bare = round(budget / (4 * d))
    half = round((budget - 2 * d) / (2 * (d + 1)))
    return {
        "m is a whole number: round it": (exact, _formula(d, exact)),
        "rounded down: the next m up comes closer": _with(d, math.floor(exact)),
        "rounded up: the next m down comes closer": _with(d, math.ceil(exact)),
        "one bottleneck a layer: there are two": (one, 2 * one * d + d + one),
        "one bottleneck in the count: a layer has two": (right, _formula(d, right) / 2),
        "the closest in ratio; the difference counts": _with(
            d, min(_around(exact), key=lambda m: abs(math.log(_formula(d, m) / budget)))
        ),
        "no biases: neither the 2 d nor the m of b_D is counted for m": _with(d, bare),
        "four bottlenecks a layer: there are two": (
            round((budget - 4 * d) / (4 * (2 * d + 1))),
            None,
        ),
        "the biases are missing": (bare, 4 * bare * d),
        "the biases are missing in the count": (right, 4 * right * d),
        "b_U is missing: one bias for each of the d outputs": (
            right,
            2 * (2 * right * d + right),
        ),
        "b_D is missing: one bias for each of the m units": (
            right,
            2 * (2 * right * d + d),
        ),
        "D or U is missing: both have m d numbers": (half, 2 * (half * d + d + half)),
        "D or U is missing in the count": (right, 2 * (right * d + d + right)),
        "the budget in the place of the count": (right, budget),
    }


def _around(exact: float) -> tuple[int, int]:
    return math.floor(exact), math.ceil(exact)


def _with(d: int, m: int) -> tuple[int, int]:
    return m, _formula(d, m)


# 11.3 ---------------------------------------------------------------------------------

REACH = 10.0  # sigma has to be a straight line for z from -REACH to REACH
DOUBLE = torch.float64
LINES = {  # name: (sigma, slope, offset)
    "z": (lambda z: 1.0 * z, 1.0, 0.0),
    "z / 2": (lambda z: z / 2, 0.5, 0.0),
    "5 - 2 z": (lambda z: 5 - 2 * z, -2.0, 5.0),
    "0.7": (lambda z: torch.full_like(z, 0.7), 0.0, 0.7),
    "z, cut off beyond -50 and 50": (lambda z: z.clamp(-50, 50), 1.0, 0.0),
}
BENDS = {  # name: (sigma, the likely mistake where it was folded)
    "gelu": (
        nn.functional.gelu,
        "nothing tests sigma, or the test tries large z only, where GELU is nearly z",
    ),
    "relu": (
        torch.relu,
        "the test tries one sign only: ReLU is straight on each side of zero",
    ),
    "z, cut off beyond -5 and 5": (
        lambda z: z.clamp(-5, 5),
        "the test tries small z only",
    ),
    "z, and 2 z - 9 from 9 on": (
        lambda z: z + torch.relu(z - 9),
        "the test does not reach z = 10, or its tolerance is too wide",
    ),
    "z, and 2 z + 9 below -9": (
        lambda z: z - torch.relu(-z - 9),
        "the test does not reach z = -10, or its tolerance is too wide",
    ),
    "z + sin(2 pi z)": (
        lambda z: z + torch.sin(2 * math.pi * z),
        "the test tries whole and half numbers only, where the sine is zero",
    ),
    "100 tanh(z / 100)": (
        lambda z: 100 * torch.tanh(z / 100),
        "the test's tolerance is too wide: this sigma is off by 0.03 at z = 10",
    ),
    "z + z³ / 1000": (
        lambda z: z + z**3 / 1000,
        "the test compares only z and -z, or its tolerance is too wide",
    ),
    "|z|": (torch.abs, "the test tries one sign only"),
}
SHAPES = (  # d_in, d, m, whether the projection has a bias, scale of the numbers
    (5, 6, 2, True, 1.0),
    (5, 6, 2, False, 1.0),
    (6, 6, 3, True, 1.0),
    (4, 4, 4, True, 1.0),
    (7, 3, 1, True, 1e3),
    (3, 12, 2, False, 1e-3),
)


def our_fold(W0, b, D, b_D, U, b_U, sigma):
    """The lesson's own answer to 11.3: (A, B, bias), or None where sigma bends."""
    z = torch.linspace(-REACH, REACH, 1001, dtype=DOUBLE)
    offset = sigma(torch.zeros(1, dtype=DOUBLE))
    slope = sigma(torch.ones(1, dtype=DOUBLE)) - offset
    if not torch.allclose(sigma(z), slope * z + offset):
        return None
    b = torch.zeros_like(b_U) if b is None else b
    return D @ W0, slope * U, b + U @ (slope * (D @ b + b_D) + offset) + b_U


@dataclass(frozen=True)
class Fold:
    """A projection with a bottleneck after it, and the name of the bottleneck's σ."""

    lent: dict[str, Tensor | None]  # W0, b, D, b_D, U, b_U
    sigma: str

    @property
    def function(self) -> Callable[[Tensor], Tensor]:
        return (LINES | BENDS)[self.sigma][0]

    def __str__(self):
        (d, d_in), m = self.lent["W0"].shape, len(self.lent["b_D"])
        bias = "" if self.lent["b"] is not None else " and b = None"
        return f"sigma(z) = {self.sigma}, with {d_in=}, {d=}, {m=}{bias}"


def folds() -> Iterator[Fold]:
    """Each straight line on every shape, and each bend on two; random numbers."""
    draw = torch.Generator().manual_seed(11)
    plan = [(name, shape) for name in LINES for shape in SHAPES]
    plan += [(name, shape) for name in BENDS for shape in SHAPES[:2]]
    plan += [("z", SHAPES[0]), ("gelu", SHAPES[0])]  # other numbers, the same shapes
    for name, (d_in, d, m, has_bias, scale) in plan:
        sizes = dict(W0=(d, d_in), b=(d,), D=(m, d), b_D=(m,), U=(d, m), b_U=(d,))
        lent: dict[str, Tensor | None] = {
            letter: scale * torch.randn(size, generator=draw, dtype=DOUBLE)
            for letter, size in sizes.items()
        }
        yield Fold(lent | ({} if has_bias else {"b": None}), name)


@judged
def bottleneck_fold(my_fold: Callable) -> None:
    """11.3: my_fold(W0, b, D, b_D, U, b_U, sigma): (A, B, bias), or None."""
    for case in folds():
        with unchanged(**case.lent):
            answer = my_fold(**case.lent, sigma=case.function)
        if case.sigma in BENDS:
            _demand_none(answer, case)
        else:
            _demand_fold(answer, case)


def _demand_none(answer, case: Fold) -> None:
    if answer is not None:
        raise Wrong(
            f"{case}\n  expected  None: this sigma is not s z + c from -10 to 10, so "
            f"no A, B and bias do the same for every x\n  got       a "
            f"{type(answer).__name__}\nLikely mistake: {BENDS[case.sigma][1]}"
        )


def _demand_fold(answer, case: Fold) -> None:
    A, B, bias = _three_tensors(answer, case)
    _, slope, offset = LINES[case.sigma]
    _demand_shapes(A, B, case)
    exact = dict(tolerance=1e-9, kind=DOUBLE)
    change = slope * case.lent["U"] @ case.lent["D"] @ case.lent["W0"]
    mistakes = _wrong_changes(case, slope, offset)
    close(B @ A, change, what=f"B @ A, for {case}", mistakes=mistakes, **exact)
    right = _bias(case, slope, offset)
    mistakes = _wrong_biases(case, slope, offset)
    close(bias, right, what=f"bias, for {case}", mistakes=mistakes, **exact)


def _three_tensors(answer, case: Fold) -> tuple[Tensor, Tensor, Tensor]:
    if answer is None:
        offset = LINES[case.sigma][2]
        why = (
            "sigma(0) is not zero here. An offset is no bend: compare sigma(z) with "
            "s z + sigma(0)"
            if offset
            else "`return` is missing; or the test for a straight line rejects "
            "rounding errors, or looks beyond -10 to 10"
        )
        raise Wrong(
            f"{case}\n  expected  (A, B, bias): this sigma is a straight line\n"
            f"  got       None\nLikely mistake: {why}"
        )
    if not isinstance(answer, tuple | list) or len(answer) != 3:
        raise Wrong(
            f"{case}\n  expected  (A, B, bias)\n  got       a "
            f"{type(answer).__name__}\nLikely mistake: return all 3, or None"
        )
    for name, each in zip(("A", "B", "bias"), answer, strict=True):
        if not isinstance(each, Tensor) or each.dtype != DOUBLE:
            kind = each.dtype if isinstance(each, Tensor) else type(each).__name__
            raise Wrong(
                f"{name}, for {case}\n  expected  a tensor of torch.float64\n"
                f"  got       {kind}\nLikely mistake: a dtype of your own, or a number "
                "in place of a vector"
            )
    return tuple(answer)


def _demand_shapes(A: Tensor, B: Tensor, case: Fold) -> None:
    (d, d_in), m = case.lent["W0"].shape, len(case.lent["b_D"])
    shapes = tuple(A.shape), tuple(B.shape)
    k = A.shape[0] if A.ndim == 2 else 0
    if shapes == ((k, d_in), (d, k)) and k <= m:
        return
    likely = "A (k, d_in) reads x, and B (d, k) writes to the output"
    if shapes == ((d, m), (m, d_in)):
        likely = "A and B are swapped"
    elif shapes == ((k, d_in), (d, k)):
        likely = "the change has rank m at most, so m rows in A are enough"
    elif shapes[0] == (m, d):
        likely = "A has the shape of D, which reads y. LoRA's A reads x: put W0 into it"
    elif {(m, d_in), (d, m)} == {shapes[0][::-1], shapes[1][::-1]}:
        likely = "transposed"
    raise Wrong(
        f"the shapes of A and B, for {case}\n  expected  ({m}, {d_in}) and ({d}, {m})\n"
        f"  got       {shapes[0]} and {shapes[1]}\nLikely mistake: {likely}"
    )


def _wrong_changes(case: Fold, slope: float, offset: float) -> dict[str, Tensor]:
    W0, D, U = (case.lent[name] for name in ("W0", "D", "U"))
    step = U @ D @ W0
    wrong = {
        "the slope s of sigma is missing": step,
        "the slope s is there twice, in A and in B": slope**2 * step,
        "s is sigma(1) - sigma(0), not sigma(1)": (slope + offset) * step,
        "the whole weight: B A is only what is added to W0": W0 + slope * step,
    }
    if W0.shape[0] == W0.shape[1]:
        wrong["W0 is missing: D reads y, and LoRA's A reads x"] = slope * U @ D
        wrong["W0 is transposed"] = slope * U @ D @ W0.T
    return wrong


def _bias(case: Fold, slope: float, offset: float, *, without: str = "") -> Tensor:
    """The folded projection's bias; `without` one of b, b_D, b_U, or b inside D."""
    b, D, b_D, U, b_U = (case.lent[n] for n in ("b", "D", "b_D", "U", "b_U"))
    b = torch.zeros_like(b_U) if b is None else b
    inner = b_D * (without != "b_D") + D @ b * (without != "D b")
    outer = b * (without != "b") + b_U * (without != "b_U")
    return outer + U @ (slope * inner + offset)


def _wrong_biases(case: Fold, slope: float, offset: float) -> dict[str, Tensor]:
    right = _bias(case, slope, offset)
    without = {name: _bias(case, slope, offset, without=name) for name in LEFT_OUT}
    return {LEFT_OUT[name]: value for name, value in without.items()} | {
        "LoRA's part alone: it has no bias": torch.zeros_like(right),
        "the projection's own b alone: the bottleneck adds to it": case.lent["b"],
        "c = sigma(0) is missing": _bias(case, slope, 0.0),
        "c passes through U too": _bias(case, slope, 0.0) + offset,
        "the slope s of sigma is missing in the bias": _bias(case, 1.0, offset),
    }


LEFT_OUT = {
    "b": "b itself is missing: it is still added to y",
    "D b": "D b is missing: b is a part of y, and D reads y",
    "b_D": "b_D is missing: it passes through sigma and U",
    "b_U": "b_U is missing",
}
