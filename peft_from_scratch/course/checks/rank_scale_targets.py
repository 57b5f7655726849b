"""What the exercises of notebook 05, rank, scale and targets, are compared with.

Every check takes the learner's function, tries it on several shapes, and compares with
methods/lora.py, dora.py and pissa.py, training/ and experiments/scaling.py, which have
the same mathematics in other words.
"""

import copy
import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ...core.adapter import adapters, trainable
from ...ledger.experiments import scaling
from ...methods import dora, lora, pissa
from ...training.config import TrainConfig
from ...training.state import parameter_groups
from . import Hidden, Wrong, close, judged, pulled, unchanged

# (d_in, d_out, r, alpha, shape of x without d_in, size of all numbers). In the first,
# every wrong scale gives another number; in the second, every wrong order of square
# matrices fits. Then: the first with another alpha and with other numbers, a single
# row, narrow, wide, tiny, huge, and a rank above a side.
CASES = (
    (6, 4, 3, 8.0, (2, 3), 1.0),
    (5, 5, 5, 1.5, (4,), 1.0),
    (8, 12, 4, 2.0, (1, 5), 1.0),
    (9, 7, 1, 3.0, (2, 2), 1.0),
    (6, 4, 3, 2.0, (2, 3), 1.0),
    (6, 4, 3, 8.0, (2, 3), 1.0),
    (6, 4, 2, 900.0, (), 1.0),
    (1, 5, 1, 2.0, (3,), 1.0),
    (40, 3, 2, 6.0, (2, 3, 2, 4), 1.0),
    (6, 4, 3, 8.0, (2, 3), 1e-5),
    (5, 7, 2, 4.0, (9,), 1e4),
    (2, 5, 4, 6.0, (3,), 1.0),
)


@dataclass(frozen=True)
class Case:
    """A projection with a LoRA's A and B, in float32, and an input."""

    W0: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    alpha: float
    x: Tensor

    @property
    def r(self) -> int:
        return self.A.shape[0]

    def base(self, *, bias: bool = True) -> nn.Linear:
        d_out, d_in = self.W0.shape
        base = nn.Linear(d_in, d_out, bias=bias)
        with torch.no_grad():
            base.weight.copy_(self.W0)
            if bias:
                base.bias.copy_(self.bias)
        return base.requires_grad_(False)

    def filled(self, module: lora.LoRA) -> lora.LoRA:
        with torch.no_grad():
            module.A.copy_(self.A)
            module.B.copy_(self.B)
        return module

    def __str__(self):
        d_out, d_in = self.W0.shape
        return f"d_in={d_in}, d_out={d_out}, r={self.r}, alpha={self.alpha}"


def cases() -> Iterator[Case]:
    """Random weights and inputs, the same at every call; a bias that is not zero."""
    draw = torch.Generator().manual_seed(5)

    def normal(*shape) -> Tensor:
        return torch.randn(shape, generator=draw)

    for d_in, d_out, r, alpha, shape, size in CASES:
        yield Case(
            size * normal(d_out, d_in),
            size**2 * normal(d_out),
            size * normal(r, d_in),
            normal(d_out, r),
            alpha,
            size * normal(*shape, d_in),
        )


# 5.1 ----------------------------------------------------------------------------------


@judged
def update_size(my_size: Callable) -> None:
    """5.1: my_size(base, A, B, alpha, x, rslora): rms of the update over the base's."""
    for case in cases():
        for rslora in (False, True):
            _judge_size(my_size, case, case.base(), rslora)
            if case.r == 3:
                _judge_size(my_size, case, case.base(bias=False), rslora)
                _judge_size(my_size, case, Hidden(case.base()), rslora)
                hooked = case.base()
                hooked.register_forward_hook(lambda module, inputs, y: 1.5 * y)
                _judge_size(my_size, case, hooked, rslora)
                zero = replace(case, B=torch.zeros_like(case.B))
                _judge_size(my_size, zero, case.base().eval(), rslora)
                with torch.no_grad():
                    _judge_size(my_size, case, case.base().eval(), rslora)


def _judge_size(my_size, case: Case, base: nn.Module, rslora: bool) -> None:
    """A and B are parameters, as in a LoRA."""
    scale = case.alpha / (math.sqrt(case.r) if rslora else case.r)
    x, A, B = case.x.clone(), nn.Parameter(case.A.clone()), nn.Parameter(case.B.clone())
    plain = isinstance(base, nn.Linear) and base.bias is not None
    if plain and B.any() and not base._forward_hooks:
        layer = lora.LoRA(case.base(), case.r, case.alpha, rslora=rslora)
        expected = _size(case.filled(layer), case.x)
    else:
        expected = (_rms(scale * (x @ case.A.T @ case.B.T)) / _rms(base(x))).item()
    past_hooks = {"the hooks of the base are passed over: call base(x)": 1.5 * expected}
    with unchanged(A=A, B=B, x=x, base=base):
        got = my_size(base, A, B, case.alpha, x, rslora)
    close(
        got.item() if isinstance(got, Tensor) and got.numel() == 1 else got,
        expected,
        what=f"the size, for {case}, rslora={rslora}",
        mistakes=past_hooks | _wrong_sizes(case, rslora),
        tolerance=1e-4,
    )


class _Alone(nn.Module):
    """A model of one module, as `update_ratios` wants one."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.only = module

    def forward(self, x, use_cache):
        return self.only(x)


def _size(module: lora.LoRA, x: Tensor) -> float:
    (size,) = scaling.update_ratios(_Alone(module), {"input_ids": x}).values()
    return size


def _wrong_sizes(case: Case, rslora: bool) -> dict[str, float]:
    if not case.B.any():
        return {}
    r, alpha = case.r, case.alpha
    scale, other = alpha / r, alpha / math.sqrt(r)
    if rslora:
        scale, other = other, scale
    update, before = case.x @ case.A.T @ case.B.T, case.base()(case.x)
    size = (_rms(update) / _rms(before)).item()
    added = scale * update
    d_in, power = case.A.shape[1], 0.5 if rslora else 1.0
    tokens = [each.square().mean(-1).sqrt().mean() for each in (added, before)]
    scales = {
        "r is A.shape[0], even where it is above the other side": (
            alpha / min(r, d_in) ** power
        ),
        "r is A.shape[0], not A.shape[1]": alpha / d_in**power,
        "the two scales are swapped, or one serves for both": other,
        "sqrt(alpha) / r: the root is of r alone": math.sqrt(alpha) / r,
        "sqrt(alpha / r): the root is of r alone": math.sqrt(alpha / r),
        "alpha // r drops what is behind the point": alpha // r,
        "not divided by r": alpha,
        "the scale is missing": 1.0,
        "the scale is there twice": scale**2,
    }
    matrices = scale * (case.B @ case.A).norm() / case.W0.norm()
    plain = _rms(case.x @ case.W0.T)
    wrong = {text: each * size for text, each in scales.items()}
    return wrong | {
        "the sizes of the matrices: what they do to x is asked for": matrices.item(),
        "upside down: the update's size over the base's": 1 / (scale * size),
        "over the output that holds the update: the base's alone is meant": (
            _rms(added) / _rms(before + added)
        ).item(),
        "the base's bias is left out: base(x) is all of it": (
            _rms(added) / plain
        ).item(),
        "standard deviations, which take the mean off: the root of the mean square": (
            (added.std() / before.std()).item()
        ),
        "the mean of the tokens' sizes: each size is over all entries": (
            (tokens[0] / tokens[1]).item()
        ),
        "the root is missing": (scale * size) ** 2,
        "the update alone: divide by the size of base(x)": _rms(added).item(),
        "the mean of absolute values: the root of the mean square is meant": (
            added.abs().mean() / before.abs().mean()
        ).item(),
        "the mean of ratios: each size is over all entries": (
            (added / before).square().mean().sqrt().item()
        ),
    }


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


# 5.2 ----------------------------------------------------------------------------------

# A layer like tiny's or SmolLM2's: grouped queries, an MLP wider than the model.
SHAPES = {
    "q_proj": (96, 96),
    "k_proj": (32, 96),
    "v_proj": (32, 96),
    "o_proj": (96, 96),
    "gate_proj": (256, 96),
    "up_proj": (256, 96),
    "down_proj": (96, 256),
}
ATTENTION, MLP = tuple(SHAPES)[:4], tuple(SHAPES)[4:]
# The same names with other sizes and in another order, names that are parts of others,
# and a large model's names.
SMALLER = {name: (o // 4, i // 2) for name, (o, i) in reversed(SHAPES.items())}
NESTED = {"q": (24, 16), "q_proj": (96, 80), "proj": (8, 40), "q_proj_b": (64, 12)}
LARGE = {"c_attn": (24_576, 8192), "c_proj": (8192, 8192), "gate": (1, 8192)}

# (shapes, targets, layers)
MODELS = (
    *(
        (SHAPES, targets, layers)
        for targets in (ATTENTION, MLP, ("q_proj",), ("q_proj", "v_proj"), [*SHAPES])
        for layers in (3, 1)
    ),
    (SHAPES, ["v_proj", "q_proj", "k_proj"], 32),
    (SHAPES, ("up_proj", "gate_proj"), 3),
    (SHAPES, ("down_proj", "v_proj", "q_proj"), 3),
    (SMALLER, ATTENTION, 3),
    (SMALLER, ["q_proj"], 3),
    (LARGE, ("c_attn", "c_proj"), 80),
    (LARGE, ("gate", "c_proj"), 12),
    (NESTED, ("q",), 2),
    (NESTED, ["q_proj", "proj"], 5),
    (SHAPES, ATTENTION, 3),
)


@judged
def rank_for_budget(my_rank: Callable) -> None:
    """5.2: my_rank(shapes, targets, layers, budget): the largest rank that fits."""
    for shapes, targets, layers in MODELS:
        one = _numbers_at(1, shapes, targets, layers)
        half = _most(shapes, targets) // 2
        budgets = (8 * one + 1, 5 * one, 8 * one - 1, one, one - 1, 900 * one)
        for budget in (*budgets, max(0, half * one - 1), 0, 12_345):
            _judge_rank(my_rank, shapes, targets, layers, budget)


def _judge_rank(my_rank, shapes: dict, targets, layers: int, budget: int) -> None:
    one, most = _numbers_at(1, shapes, targets, layers), _most(shapes, targets)
    expected = min(budget // one, most)
    # The library's own modules have the last word.
    for r, fits in ((expected, True), (expected + 1, False)):
        if 1 <= r <= most:
            assert (_numbers_at(r, shapes, targets, layers) <= budget) == fits
    lent, names = dict(shapes), copy.copy(targets)
    with unchanged(shapes=lent, targets=names):
        got = my_rank(lent, names, layers, budget)
    if isinstance(got, Tensor) and got.numel() == 1:
        got = got.item()
    whole = isinstance(got, numbers.Integral) and not isinstance(got, bool)
    if got == expected and whole:
        return
    asked = f"{', '.join(targets)} in {layers} layers, with {budget:,} numbers to spend"
    raise Wrong(
        f"for {asked}: expected the rank {expected}, got {got!r}. Rank 1 costs "
        f"{one:,} numbers; the smallest side is {most}. Likely mistake: "
        + _wrong_budget(got, expected, shapes, targets, layers, budget)
    )


def _numbers_at(r: int, shapes: dict, targets, layers: int) -> int:
    """Counted on the library's modules, which have shapes and no memory here."""
    count = 0
    with torch.device("meta"):
        for target in targets:
            d_out, d_in = shapes[target]
            layer = lora.LoRA(nn.Linear(d_in, d_out, bias=False), r, 1.0)
            count += sum(p.numel() for p in layer.parameters() if p.requires_grad)
    return layers * count


def _most(shapes: dict, targets) -> int:
    return min(min(shapes[target]) for target in targets)


def _wrong_budget(got, expected: int, shapes, targets, layers, budget) -> str:
    if got is None:
        return "`return` is missing"
    if not isinstance(got, numbers.Integral) or isinstance(got, bool):
        return f"a whole number is needed, not a {type(got).__name__}: round down, //"
    sides = [shapes[target] for target in targets]
    one = layers * sum(map(sum, sides))
    costs = {
        "B is forgotten: d_out counts too": sum(i for _, i in sides) * layers,
        "A is forgotten: d_in counts too": sum(o for o, _ in sides) * layers,
        "d_in · d_out is the full matrix; LoRA trains r (d_in + d_out)": (
            sum(o * i for o, i in sides) * layers
        ),
        "the number of layers is left out": sum(o + i for o, i in sides),
        "every projection was counted, not the targets alone": (
            sum(o + i for o, i in shapes.values()) * layers
        ),
        "a name that has a target in it is no target: names are equal or not": (
            sum(sum(shapes[n]) for n in shapes if any(t in n for t in targets)) * layers
        ),
        "the first target was counted, and no other": sum(sides[0]) * layers,
        "the targets were taken as square": 2 * sum(i for _, i in sides) * layers,
    }
    if got > _most(shapes, targets):
        return "a rank above the smallest side adds nothing that a lower one has not"
    if got == 1 and expected == 0:
        return "not even rank 1 fits: return 0"
    if got == expected - 1 and budget == expected * one:
        return "one too few: a rank that spends exactly the budget fits"
    for text, cost in costs.items():
        if got == min(budget // cost, _most(shapes, targets)):
            return text
    if got == expected + 1:
        return "rounded up: this rank spends more than there is"
    return "the largest r with r (d_in + d_out), summed over targets and layers, inside"


# 5.3 ----------------------------------------------------------------------------------


@judged
def dora_forward(my_dora: Callable) -> None:
    """5.3: my_dora(x, W0, A, B, m, scale) is m / ‖V‖ ⊙ (V x), ‖V‖ held constant."""
    for i, case in enumerate(cases()):
        _judge_dora(my_dora, case, torch.linspace(0.5, 2, len(case.W0)))
        if i < 2:
            # A direction turned round and one that is off; B as at the start.
            signs = torch.linspace(-1, 1, len(case.W0)).round()
            _judge_dora(my_dora, case, signs)
            zero = replace(case, B=torch.zeros_like(case.B))
            _judge_dora(my_dora, zero, torch.linspace(0.5, 2, len(case.W0)))
            _double_dora(my_dora, case)
            for frozen in ("A", "m"):
                _judge_dora(my_dora, case, signs.square() + 0.5, frozen=frozen)


def _judge_dora(my_dora, case: Case, factors: Tensor, *, frozen: str = "") -> None:
    """m is what it starts as, times these factors; one of the tensors may be frozen."""
    scale = case.alpha / case.r
    ours = case.filled(dora.DoRA(case.base(bias=False), case.r, case.alpha))
    m = ours.m.detach() * factors
    ours.m.data.copy_(m)
    lent = {"x": case.x, "W0": case.W0, "A": case.A, "B": case.B, "m": m}
    lent = {name: each.clone() for name, each in lent.items()}
    for grad_mode in (torch.enable_grad(), torch.no_grad()):
        with unchanged(**lent), grad_mode:
            got = my_dora(*lent.values(), scale)
        close(
            got,
            ours(case.x).detach(),
            what=f"h, for x of shape {tuple(case.x.shape)} and {case}",
            mistakes=_wrong_doras(case, m, scale),
            tolerance=1e-4,
            kind=torch.float32,
        )
    _same_dora_gradients(my_dora, ours, case, m, scale, frozen)


def _double_dora(my_dora: Callable, case: Case) -> None:
    """In float64, by the equation."""
    scale = case.alpha / case.r
    x, W0, A, B = (t.double() for t in (case.x, case.W0, case.A, case.B))
    V, m = W0 + scale * (B @ A), torch.linspace(0.5, 2, len(W0), dtype=torch.float64)
    close(
        my_dora(x, W0, A, B, m, scale),
        (m / V.square().sum(1).sqrt()) * (x @ V.T),
        what=f"h, in float64, for {case}",
        tolerance=1e-10,
        kind=torch.float64,
    )


def _wrong_doras(case: Case, m: Tensor, scale: float) -> dict[str, Tensor]:
    x, W0, update = case.x, case.W0, scale * (case.B @ case.A)
    V = W0 + update
    rows, before = V.norm(dim=1), W0.norm(dim=1)
    wrong = {
        "m is missing: that is LoRA": x @ V.T,
        "m is left out: every row has the length one": x @ V.T / rows,
        "not divided by the length of V's rows": x @ V.T * m,
        "the length of W0's rows: V is W0 and the update": x @ V.T * m / before,
        "the length of the update's rows: V is W0 and the update": (
            x @ V.T * m / update.norm(dim=1)
        ),
        "m / ‖V‖ times W0 x: the update is missing": x @ W0.T * m / rows,
        "W0 x is not scaled: m / ‖V‖ is for both parts": (
            x @ W0.T + x @ update.T * m / rows
        ),
        "the update is not scaled by m / ‖V‖: it is for both parts": (
            x @ W0.T * m / rows + x @ update.T
        ),
        "m is added: it multiplies": x @ V.T / rows + m,
        "one length for the whole matrix: one a row is meant": x @ V.T * m / V.norm(),
        "the squared length: take the root": x @ V.T * m / rows**2,
        "the sum of absolute values: the length is the root of a sum of squares": (
            x @ V.T * m / V.abs().sum(1)
        ),
        "the largest entry of a row: the length is the root of a sum of squares": (
            x @ V.T * m / V.abs().amax(1)
        ),
        "the root of a mean square: the length is the root of a sum": (
            x @ V.T * m / V.square().mean(1).sqrt()
        ),
        "x has the length one: V's rows are divided by theirs": (
            nn.functional.normalize(x, dim=-1) @ V.T * m / rows
        ),
        "the length of the output: V's rows are divided by theirs": (
            nn.functional.normalize(x @ V.T, dim=-1) * m
        ),
        "the first entry of m for all: each output has its own": x @ V.T * m[0] / rows,
        "upside down: m over the length": x @ V.T * rows / m,
    }
    bare = W0 + case.B @ case.A
    wrong["the scale is missing: V is W0 + scale · B A"] = (
        x @ bare.T * m / bare.norm(dim=1)
    )
    wrong["the scale is missing in ‖V‖"] = x @ V.T * m / bare.norm(dim=1)
    if W0.shape[0] == W0.shape[1]:
        wrong["the length of columns: a row of W0 makes an output"] = (
            x @ V.T * m / V.norm(dim=0)
        )
        wrong["V was not transposed: x holds rows"] = x @ V * m / rows
        swapped = W0 + scale * (case.A @ case.B)
        if case.A.shape == case.B.shape:
            wrong["A B in the place of B A"] = x @ swapped.T * m / swapped.norm(dim=1)
    return wrong


def _same_dora_gradients(
    my_dora, ours: dora.DoRA, case: Case, m, scale, frozen: str
) -> None:
    leaves = {"x": case.x, "A": case.A, "B": case.B, "m": m}
    mine = {n: each.clone().requires_grad_(n != frozen) for n, each in leaves.items()}
    x, W0 = case.x.clone().requires_grad_(), case.W0
    got = my_dora(mine["x"], W0, mine["A"], mine["B"], mine["m"], scale)
    if not got.requires_grad:
        raise Wrong(
            "h has the right values, but no gradient reaches A, B and m through it. "
            "Likely mistake: the whole of h is detached, not ‖V‖ alone"
        )
    expected = ours(x)
    ways = pulled(got, expected)
    V = {name: case.__dict__[name].clone().requires_grad_() for name in "AB"}
    W = W0 + scale * (V["B"] @ V["A"])
    ((case.x @ W.T * m / W.norm(dim=1)) * ways).sum().backward()
    wanted = {"x": x.grad, "A": ours.A.grad, "B": ours.B.grad, "m": ours.m.grad}
    for name, grad in wanted.items():
        if name == frozen:
            continue
        if mine[name].grad is None:
            raise Wrong(
                f"h has the right values, but no gradient reaches {name}. Likely "
                f"mistake: .detach(), .data or torch.no_grad() on more than ‖V‖"
            )
        named = {}
        if name in V:
            named["‖V‖ was not detached: here it is a constant"] = V[name].grad
        close(
            mine[name].grad,
            grad,
            what=f"h is right, but not the gradient of {name}, for {case}"
            + f", where {frozen} is frozen" * bool(frozen),
            mistakes=named,
            tolerance=1e-3,
        )


# 5.4 ----------------------------------------------------------------------------------


FLOAT, DOUBLE = torch.float32, torch.float64
# (d_out, d_in, r, alpha, size of W0, dtype): the first again with another alpha and
# with other numbers; of full rank, narrow, wide, tiny, huge
PISSAS = (
    (7, 9, 2, 8.0, 1.0, FLOAT),
    (8, 8, 3, 1.5, 1.0, FLOAT),
    (12, 6, 1, 3.0, 1.0, FLOAT),
    (10, 10, 5, 5.0, 1.0, FLOAT),
    (7, 9, 2, 3.0, 1.0, FLOAT),
    (7, 9, 2, 8.0, 1.0, FLOAT),
    (6, 6, 6, 3.0, 1.0, FLOAT),
    (1, 9, 1, 2.0, 1.0, FLOAT),
    (9, 1, 1, 2.0, 1.0, FLOAT),
    (30, 50, 12, 1.2, 1.0, FLOAT),
    (8, 6, 2, 4.0, 1e-5, FLOAT),
    (8, 6, 2, 4.0, 1e4, FLOAT),
    (7, 5, 2, 3.0, 1.0, DOUBLE),
)


@judged
def pissa_start(my_pissa: Callable) -> None:
    """5.4: my_pissa(W0, r, scale): (W_res, A, B), from the largest directions."""
    draw = torch.Generator().manual_seed(6)
    for d_out, d_in, r, alpha, size, dtype in PISSAS:
        W0 = size * torch.randn(d_out, d_in, generator=draw)
        _judge_pissa(my_pissa, W0.to(dtype), r, alpha, alpha / r)
    trains = nn.Parameter(torch.randn(6, 4, generator=draw))
    _judge_pissa(my_pissa, trains, 2, 3.0, 1.5)


class Start(NamedTuple):
    """What PiSSA starts with."""

    W_res: Tensor
    A: Tensor
    B: Tensor


def _start(W0: Tensor, r: int, alpha: float) -> Start:
    """By the library, whose files allow half of the full rank; above that by numpy."""
    W0 = W0.detach()
    if 2 * r <= min(W0.shape):
        base = nn.Linear(W0.shape[1], W0.shape[0], bias=False)
        base.weight.data.copy_(W0)
        ours = pissa.PiSSA(base, r, alpha)
        ours.on_attach()
        return Start(*(t.detach() for t in (base.weight, ours.A, ours.B)))
    U, S, Vt = map(torch.from_numpy, numpy.linalg.svd(W0.numpy(), full_matrices=False))
    root = (S[:r] * r / alpha) ** 0.5
    return Start((U[:, r:] * S[r:]) @ Vt[r:], root[:, None] * Vt[:r], U[:, :r] * root)


def _judge_pissa(my_pissa, W0: Tensor, r: int, alpha: float, scale: float) -> None:
    where = f"W0 of {tuple(W0.shape)}, r={r}, scale={scale:.3g}"
    ours = _start(W0, r, alpha)
    given = W0.detach().clone().requires_grad_(W0.requires_grad)
    W0 = W0.detach()
    with unchanged(W0=given):
        parts = my_pissa(given, r, scale)
    if not (isinstance(parts, tuple | list) and len(parts) == 3):
        raise Wrong(
            f"for {where}: expected three tensors, W_res, A and B, in this order; got "
            f"{type(parts).__name__}. Likely mistake: `return W_res, A, B`"
        )
    W_res, A, B = parts
    wanted = {"W_res": W0.shape, "A": ours.A.shape, "B": ours.B.shape}
    for (name, shape), each in zip(wanted.items(), parts, strict=True):
        if not isinstance(each, Tensor) or each.shape != shape:
            got = tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise Wrong(
                f"for {where}: expected {name} of shape {tuple(shape)}, got {got}. "
                "Likely mistake: A (r, d_in) and B (d_out, r) are swapped or turned; "
                "torch gives Vᵀ, whose rows are the directions that W0 reads"
            )
    update = scale * (ours.B @ ours.A)
    close(
        scale * (B @ A),
        update,
        what=f"scale · B A at the start, for {where}",
        mistakes=_wrong_starts(W0, r, scale),
        tolerance=1e-3,
    )
    if r < min(W0.shape):
        close(
            W_res,
            ours.W_res,
            what=f"the residual W_res, for {where}",
            mistakes={
                "nothing was taken out: the model would count its largest part twice": (
                    W0
                ),
                "added: the principal part is taken out": W0 + update,
                "the principal part itself: the residual is what is left": update,
                "the scale is missing: W_res = W0 - scale · B A": W0 - update / scale,
            },
            tolerance=1e-3,
        )
    close(
        (W_res + scale * (B @ A)).detach(),
        W0,
        what=f"W_res + scale · B A, for {where}",
        tolerance=1e-12 if W0.dtype == DOUBLE else 1e-5,
    )
    for name, part in zip(wanted, parts, strict=True):
        if part.dtype != W0.dtype:
            raise Wrong(
                f"for {where}: {name} is {part.dtype}, and W0 {W0.dtype}. Likely "
                "mistake: a dtype of your own; a model has one"
            )
    _demand_shared(A, B, ours, where)


def _wrong_starts(W0: Tensor, r: int, scale: float) -> dict[str, Tensor]:
    U, S, Vt = torch.linalg.svd(W0, full_matrices=False)
    top = U[:, :r] @ S[:r].diag() @ Vt[:r]
    wrong = {
        "not divided by the scale: W0 is larger or smaller than B A": scale * top,
        "divided by the scale twice: each of A and B by its root": top / scale,
        "S in A and in B: each has the root": (
            U[:, :r] @ S[:r].square().diag() @ Vt[:r] / scale
        ),
        "without S: each of A and B has its root": U[:, :r] @ Vt[:r],
        "the root is in one of them alone": U[:, :r] @ S[:r].sqrt().diag() @ Vt[:r],
        "the smallest directions: torch sorts from large to small": (
            U[:, -r:] @ S[-r:].diag() @ Vt[-r:]
        ),
        "the whole of W0: cut off after r": W0,
    }
    for text, value in list(wrong.items())[2:6]:
        wrong[f"{text}; or the scale is not as asked"] = scale * value
    wide, _, tall = torch.linalg.svd(W0)
    wrong["torch gives Vᵀ, whose rows are meant: its columns were taken"] = (
        U[:, :r] @ S[:r].diag() @ tall.T[:r]
    )
    wrong["the rows of U were taken: its columns are meant"] = (
        wide[:r].T @ S[:r].diag() @ Vt[:r]
    )
    if W0.shape[0] == W0.shape[1]:
        wrong["U and V are swapped"] = top.T
    return wrong


def _demand_shared(A: Tensor, B: Tensor, ours: Start, where: str) -> None:
    """Each direction's size in A and in B; its sign is free."""
    sizes = {"A": (A.norm(dim=1), ours.A.norm(dim=1))}
    sizes["B"] = (B.norm(dim=0), ours.B.norm(dim=0))
    for name, (mine, theirs) in sizes.items():
        close(
            mine,
            theirs,
            what=f"B A is right, but not how A and B share it: the size of each "
            f"direction in {name}, for {where}",
            mistakes={
                "all of S is in this one: each has its root": theirs.square(),
                "the other has all of S: each has its root": torch.ones_like(theirs),
            },
            tolerance=1e-3,
        )
    # B A fixes the pair but for an invertible r by r matrix between them.
    for name, mine, theirs in (("A", A, ours.A), ("B", B.T, ours.B.T)):
        close(
            (mine @ mine.T).detach(),
            theirs @ theirs.T,
            what=f"B A is right, but the directions in {name} are mixed, for {where}",
            tolerance=1e-3,
        )


# 5.5 ----------------------------------------------------------------------------------


def _small_model() -> nn.Module:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=11,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        attention_bias=True,
    )
    return AutoModelForCausalLM.from_config(config)


@judged
def loraplus_groups(my_groups: Callable) -> None:
    """5.5: my_groups(model, lr, ratio): groups in which every B has lr · ratio."""
    returned = []
    for name, options in {
        "LoRA on q_proj and v_proj": dict(targets=("q_proj", "v_proj")),
        "LoRA on every projection, whose biases train": dict(bias="lora_only"),
        "LoRA on the head and o_proj": dict(targets=("lm_head", "o_proj")),
    }.items():
        model = _small_model().train(not returned)
        lora.inject(model, r=2, alpha=4, **options)
        for lr, ratio in ((1e-3, 16), (2e-2, 3.0), (5e-3, 0.5), (1e-7, 1), (1e-3, 2.5)):
            where = f"{name}, lr={lr}, ratio={ratio}"
            with unchanged(model=model):
                got = my_groups(model, lr, ratio)
                got = list(got) if isinstance(got, Iterator) else got
            _judge_groups(got, model, lr, ratio, where)
            returned.append((got, model, lr, ratio, where))
    for each in returned:  # one list for all calls would now hold the last groups
        _judge_groups(*each)


def _judge_groups(got, model, lr: float, ratio: float, where: str) -> None:
    names = {id(p): n for n, p in model.named_parameters()}
    parameters = trainable(model)
    recipe = TrainConfig(steps=1, lr=lr, lr_ratio=ratio)
    wanted = {
        names[id(p)]: lr * group["ratio"]
        for group in parameter_groups(model, parameters, recipe)
        for p in group["params"]
    }
    if not isinstance(got, list | tuple) or not all(isinstance(g, dict) for g in got):
        raise Wrong(
            f"for {where}: expected a list of dicts, got {type(got).__name__}. Likely "
            'mistake: each group is {"params": […], "lr": …}'
        )
    if not all({"params", "lr"} <= set(group) for group in got):
        raise Wrong(
            f'for {where}: a group without "params" or without "lr". Likely mistake: '
            "another key; AdamW would take its own rate, and say nothing"
        )
    _demand_rates_alone(got, where)
    pairs = [(p, float(g["lr"])) for g in got for p in _listed(g["params"])]
    rates = {names.get(id(p), "?"): rate for p, rate in pairs}
    if "?" in rates:
        raise Wrong(
            f"for {where}: a tensor that is none of the model's. Likely mistake: a "
            "copy, .data or .detach(); the optimizer moves what it is given"
        )
    if len(pairs) != len(rates):
        raise Wrong(
            f"for {where}: a parameter is there twice; AdamW refuses that. Likely "
            "mistake: what is fast was not left out of the slow group"
        )
    extra, missing = sorted(set(rates) - set(wanted)), sorted(set(wanted) - set(rates))
    if extra or missing:
        likely = (
            "frozen parameters were given too: requires_grad"
            if extra
            else _lost(missing)
        )
        raise Wrong(
            f"for {where}: expected the {len(wanted)} tensors that train, got "
            f"{len(rates)}. Too many: {_few(extra)}; missing: {_few(missing)}. Likely "
            f"mistake: {likely}"
        )
    _demand_ordered(got, where)
    fast = {names[id(module.B)] for module in adapters(model).values()}
    off = [n for n in wanted if not math.isclose(rates[n], wanted[n], rel_tol=1e-6)]
    if off:
        raise Wrong(
            f"for {where}: {off[0]} has the rate {rates[off[0]]:.4g}, expected "
            f"{wanted[off[0]]:.4g}. Likely mistake: "
            + _wrong_rates(rates, fast, lr, ratio)
        )


def _demand_rates_alone(groups, where: str) -> None:
    """The rates are numbers, and all else is as AdamW has it by itself."""
    usual = torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).defaults
    for group in groups:
        if not isinstance(group["lr"], numbers.Real | Tensor):
            raise Wrong(
                f"for {where}: a rate is a {type(group['lr']).__name__}. Likely "
                'mistake: quotes, or a list; "lr" is a number'
            )
        for key in set(group) & set(usual) - {"lr"}:
            if group[key] != usual[key]:
                raise Wrong(
                    f"for {where}: a group has {key}={group[key]}, where AdamW has "
                    f"{usual[key]}. Likely mistake: more than two rates was changed"
                )


def _demand_ordered(groups, where: str) -> None:
    """AdamW takes no set: an optimizer's state is saved in the order of the groups."""
    if any(isinstance(group["params"], set | frozenset) for group in groups):
        raise Wrong(
            f'for {where}: "params" is a set, which AdamW refuses. Likely mistake: '
            "a set of parameters; make a list, and compare by id()"
        )


def _listed(params) -> list:
    return [params] if isinstance(params, Tensor) else list(params)


def _lost(missing: list[str]) -> str:
    ends = {name.rpartition(".")[2] for name in missing}
    if ends == {"bias"}:
        return "what trains and is neither A nor B was left out; it is slow, as A is"
    if ends <= {"A", "B"} and len(ends) == 1:
        return f"the group of {ends.pop()} is missing: it would never move"
    return "everything that trains is in one group or the other"


def _wrong_rates(rates: dict, fast: set, lr: float, ratio: float) -> str:
    def same(a: float, b: float) -> bool:
        return math.isclose(a, b, rel_tol=1e-6)

    b = {rates[n] for n in fast}
    a = {rates[n] for n in rates if n.endswith(".A")}
    others = {rates[n] for n in rates if n not in fast and not n.endswith(".A")}
    if all(same(x, lr) for x in a | b | others):
        return "one rate for all: that is LoRA; B is the fast one"
    if all(same(x, lr * ratio) for x in a | b):
        return "A has the fast rate too: only B's is multiplied"
    if all(same(x, lr * ratio) for x in a) and all(same(x, lr) for x in b):
        return "A and B are swapped: B is the fast one"
    if all(same(x, lr) for x in a | b):
        return "one rate for A and B: that is LoRA; B is the fast one"
    if all(same(x, lr / ratio) for x in b):
        return "divided by the ratio: B's rate is lr · ratio"
    if all(same(x, lr / ratio) for x in a):
        return "A was slowed down: its rate is lr, and B's is lr · ratio"
    if all(same(x, ratio) for x in b):
        return "the ratio is no rate: B's is lr · ratio"
    if all(same(x, lr + ratio) for x in b):
        return "the ratio is added: B's rate is lr · ratio"
    if all(same(x, lr * ratio) for x in others) and others:
        return "the biases are slow, as A is: only B's rate is multiplied"
    return "A and all else have lr, every B has lr · ratio"


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:2]) or "none"
    return f"{shown}, … ({len(names)} in all)" if len(names) > 2 else shown
