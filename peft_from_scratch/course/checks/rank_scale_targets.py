"""What the exercises of notebook 05, rank, scale and targets, are compared with.

Every check takes the learner's function, tries it on several shapes, and compares with
methods/lora.py and dora.py and with experiments/scaling.py, which have the same
mathematics in other words. The lesson uses `update_size_by`, `winner` and `rank_within`
where the learner's own function has not passed.
"""

import copy
import math
import numbers
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...common.statistics import over_seeds
from ...ledger.experiments import scaling
from ...methods import dora, lora
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


@torch.no_grad()
def update_size_by(base: nn.Module, A, B, alpha: float, x: Tensor, rslora: bool):
    """rms(scale B A x) / rms(base(x)), a float: what exercise 5.1 asks for."""
    scale = alpha / (math.sqrt(len(A)) if rslora else len(A))
    return (_rms(scale * (x @ A.T @ B.T)) / _rms(base(x))).item()


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


def winner(runs: Sequence[Mapping]) -> str:
    """The better of two methods at their own learning rates, if the runs show one.

    A method's own learning rate has its lowest validation loss with seed 0. There the
    methods are compared by test loss, seed by seed.

    Args
        runs  dicts with method, lr, seed, validation (loss) and test (loss)
    Returns  "search further" where an own learning rate is at an end of its method's
             grid; "undecided" where the interval of the mean difference holds zero;
             else the name of the method with the lower test loss
    """
    names = sorted({run["method"] for run in runs})
    at_own = {}
    for name in names:
        own = [run for run in runs if run["method"] == name]
        losses = {run["lr"]: run["validation"] for run in own if run["seed"] == 0}
        best = min(losses, key=losses.get)
        if best in (min(losses), max(losses)):
            return "search further"
        at_own[name] = {run["seed"]: run["test"] for run in own if run["lr"] == best}
    first, second = at_own.values()
    pairs = [first[seed] - second[seed] for seed in first if seed in second]
    _, low, high = over_seeds(pairs)
    if low <= 0 <= high:
        return "undecided"
    return names[0] if high < 0 else names[1]


@dataclass(frozen=True)
class Contest:
    """Runs of two methods, the right answer, and the mistake that it is made for."""

    runs: list[dict]
    right: str
    mistake: str


GRID = (1e-3, 3e-3, 1e-2, 3e-2)
VALLEY = (1.4, 0.9, 0.5, 1.1)  # validation losses; the lowest is inside
LOWER = (1.3, 0.8, 0.4, 1.0)
NOISE = (0.00, 0.03, -0.04, 0.05, -0.02)  # of each seed, the same for both methods
JITTER = (0.004, -0.003, 0.002, -0.004, 0.001)  # of a pair


def _method(name, valley=VALLEY, tests=None, *, grid=GRID, seeds=range(5), level=0.0):
    """A search with seed 0, then all seeds at the rate that it chose.

    Args
        valley  validation losses over the grid
        tests   {learning rate: test losses by seed}; None: `level` and some noise
    """
    tests = tests or {}
    runs = []
    best = grid[valley.index(min(valley))]
    for lr, loss in zip(grid, valley, strict=True):
        for seed in seeds:
            if seed and lr != best and lr not in tests:
                continue
            plain = loss + level + NOISE[seed % 5]
            test = tests[lr][seed] if lr in tests else plain
            parts = {"method": name, "lr": lr, "seed": seed}
            runs.append(parts | {"validation": loss + NOISE[seed % 5], "test": test})
    return runs


def _jittered(level: float, noise: float = 1.0) -> list[float]:
    return [level + noise * (n + j) for n, j in zip(NOISE, JITTER, strict=True)]


def _plain_contests() -> Iterator[Contest]:
    lower = _method("dora", LOWER, {1e-2: _jittered(0.4)})
    higher = _method("lora", tests={1e-2: _jittered(0.5)})
    direct = "the method with the lower test loss wins"
    yield Contest(higher + lower, "dora", direct)
    renamed = [run | {"method": f"z-{run['method']}"} for run in lower]
    yield Contest(renamed + higher, "z-dora", direct)
    level = _method("pissa", tests={1e-2: [0.3, 0.6, 0.4, 0.2, 0.5]})
    other = _method("lora", tests={1e-2: [0.4, 0.4, 0.3, 0.5, 0.5]})
    means = (
        "the means were compared without their interval: where it holds zero, the "
        "answer is 'undecided'"
    )
    yield Contest(level + other, "undecided", means)
    few = [[0.30, 0.36, 0.31], [0.40, 0.40, 0.41]]
    yield Contest(
        [
            run
            for name, tests in zip(("pissa", "lora"), few, strict=True)
            for run in _method(name, tests={1e-2: tests}, seeds=range(3))
        ],
        "undecided",
        "1.96 standard errors are too few for a handful of seeds: over_seeds takes "
        "Student's t",
    )


def _rate_contests() -> Iterator[Contest]:
    better = _method("dora", LOWER, {1e-2: _jittered(0.4)})
    tempting = {3e-3: _jittered(0.1), 1e-2: _jittered(0.5)}
    yield Contest(
        _method("lora", tests=tempting) + better,
        "dora",
        "the learning rate was chosen by test loss: choose by validation loss, or the "
        "test rows are no test any more",
    )
    all_rates = {1e-3: _jittered(0.1), 1e-2: _jittered(0.5), 3e-2: _jittered(0.1)}
    also = {1e-2: _jittered(0.4), 3e-3: _jittered(2.0)}
    yield Contest(
        _method("lora", tests=all_rates) + _method("dora", LOWER, also),
        "dora",
        "runs at other learning rates were counted too: compare at the own one alone",
    )
    shared = {3e-3: _jittered(0.9), 1e-2: _jittered(0.5, 2)}
    early = {3e-3: _jittered(0.5), 1e-2: _jittered(1.3)}
    yield Contest(
        _method("lora", tests=shared)
        + _method("lora-plus", (1.2, 0.5, 0.9, 1.4), early),
        "undecided",
        "both were compared at one learning rate: that is the confound. Each method "
        "has its own",
    )
    runs = _method("lora", tests={3e-3: _jittered(0.2), 1e-2: _jittered(0.6)})
    swayed = [
        run | {"validation": 3.0} if run["lr"] == 1e-2 and run["seed"] else run
        for run in runs
    ]
    yield Contest(
        swayed + better,
        "dora",
        "the learning rate was not chosen with seed 0 alone: the search ran with no "
        "other seed",
    )


def _end_contests() -> Iterator[Contest]:
    inside = _method("lora", tests={1e-2: _jittered(0.5)})
    low, high = (0.4, 0.9, 1.1, 1.4), (1.4, 1.0, 0.9, 0.4)
    for valley, where in ((low, "lowest"), (high, "highest")):
        best = GRID[valley.index(min(valley))]
        ahead = _method("dora", valley, {best: _jittered(0.1)})
        text = (
            f"the best learning rate is the {where} that was tried, so a better one "
            "may lie outside: the answer is 'search further'"
        )
        yield Contest(inside + ahead, "search further", text)
        yield Contest(ahead + inside, "search further", text)
    short = _method("dora", (0.9, 0.4), {1e-2: _jittered(0.1)}, grid=GRID[1:3])
    yield Contest(
        inside + short,
        "search further",
        "an end of the grid is one of that method's own grid, not of both together",
    )
    wide = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    losses = (1.9, 1.4, 0.3, 0.5, 1.1, 2.0)
    yield Contest(
        _method("dora", losses, {3e-3: _jittered(0.2)}, grid=wide)
        + _method("lora", (0.9, 0.5, 1.1), {1e-2: _jittered(0.5)}, grid=GRID[1:]),
        "dora",
        "a grid of another length or other rates: each method has its own",
    )


def _pair_contests() -> Iterator[Contest]:
    crossed = _method("dora", tests={1e-2: _jittered(0.7)})
    crossed = [run | {"validation": run["validation"] - 0.3} for run in crossed]
    yield Contest(
        crossed + _method("lora", tests={1e-2: _jittered(0.5)}),
        "lora",
        "the winner was taken by validation loss, which chose the learning rate: "
        "compare test losses",
    )
    close_pair = {
        name: _method(name, tests={1e-2: [10 * n + level + j for n, j in both]})
        for name, level, both in (
            ("lora", 0.52, [(n, 0.0) for n in NOISE]),
            ("dora", 0.50, list(zip(NOISE, JITTER, strict=True))),
        )
    }
    unpaired = "the seeds were not paired: subtract the two losses of each seed"
    forward = close_pair["lora"] + close_pair["dora"]
    yield Contest(forward, "dora", unpaired)
    turned = close_pair["lora"] + close_pair["dora"][::-1]
    order = "the runs were paired in the order of the list: pair equal seeds"
    yield Contest(turned, "dora", order)
    more = {1e-2: {**dict(enumerate(_jittered(0.5))), 7: 3.0, 9: 3.0}}
    fewer = {1e-2: {**dict(enumerate(_jittered(0.6)))}}
    alone = "seeds that only one method has make no pair: leave them out"
    for longer, shorter in (("dora", "lora"), ("lora", "dora")):
        runs = _method(longer, tests=more, seeds=(0, 1, 2, 3, 4, 7, 9))
        yield Contest(runs + _method(shorter, tests=fewer), longer, alone)


def _random_contests() -> Iterator[Contest]:
    """Other sizes, numbers, names and orders; the answer by `winner`."""
    draw = random.Random(5)
    for _ in range(60):
        names = draw.sample(("lora", "rslora", "dora", "pissa", "lora-plus", "q"), 2)
        seeds, shift = range(draw.randint(2, 14)), draw.choice((0.0, 0.2, 0.4))
        runs = []
        for name, level in zip(names, (1.0, 1.0 + shift), strict=True):
            grid = sorted(draw.sample([1e-4, 3e-4, *GRID, 1e-1], draw.randint(3, 6)))
            best = grid[draw.randrange(1, len(grid) - 1) if draw.random() < 0.9 else 0]
            valley = tuple(0.7 if lr == best else draw.uniform(0.8, 2) for lr in grid)
            tests = [level + draw.gauss(0, 0.1) for _ in seeds]
            runs += _method(name, valley, {best: tests}, grid=grid, seeds=seeds)
        size = 10 ** draw.uniform(-3, 3)
        for run in runs:
            run |= {loss: size * run[loss] for loss in ("validation", "test")}
        draw.shuffle(runs)
        yield Contest(runs, winner(runs), UNNAMED)


UNNAMED = (
    "none that this check knows. The case is random: other names, seeds, rates and "
    "sizes of loss than before, in any order"
)


def _contests() -> Iterator[Contest]:
    for several in (
        _plain_contests,
        _rate_contests,
        _end_contests,
        _pair_contests,
        _random_contests,
    ):
        yield from several()


@judged
def fair_winner(my_winner: Callable) -> None:
    """5.2: my_winner(runs): the better method at its own rate, or why none is known."""
    for contest in _contests():
        assert winner(contest.runs) == contest.right
        lent = [dict(run) for run in contest.runs]
        with unchanged(runs=lent):
            got = my_winner(lent)
        if type(got) is str and got == contest.right:
            continue
        if got is None:
            likely = "`return` is missing"
        elif not isinstance(got, str):
            likely = f"a text is needed, not a {type(got).__name__}"
        else:
            likely = contest.mistake
        raise Wrong(
            f"for {_table(contest.runs)}\n  expected  {contest.right!r}\n"
            f"  got       {got!r}\nLikely mistake: {likely}"
        )


def _table(runs: Sequence[Mapping]) -> str:
    """Each method's validation losses with seed 0, and its test losses by seed."""
    lines = []
    for name in sorted({run["method"] for run in runs}):
        own = sorted(
            (run for run in runs if run["method"] == name),
            key=lambda run: (run["lr"], run["seed"]),
        )
        searched = ", ".join(
            f"{run['lr']:g}: {run['validation']:.3g}" for run in own if not run["seed"]
        )
        lines.append(f"  {name}, validation loss with seed 0: {searched}")
        for lr in sorted({run["lr"] for run in own}):
            at = [run for run in own if run["lr"] == lr]
            if len(at) > 1:
                tests = ", ".join(f"{r['seed']}: {r['test']:.3g}" for r in at)
                lines.append(f"  {name}, test loss at {lr:g} by seed: {tests}")
    return "these runs:\n" + "\n".join(lines)


# 5.3 ----------------------------------------------------------------------------------

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


def rank_within(shapes: Mapping, targets: Sequence[str], layers: int, budget: int):
    """The largest rank whose LoRA fits the budget: what exercise 5.3 asks for."""
    one = layers * sum(sum(shapes[target]) for target in targets)
    return min(budget // one, _most(shapes, targets))


@judged
def rank_for_budget(my_rank: Callable) -> None:
    """5.3: my_rank(shapes, targets, layers, budget): the largest rank that fits."""
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


# 5.4 ----------------------------------------------------------------------------------


@judged
def dora_forward(my_dora: Callable) -> None:
    """5.4: my_dora(x, W0, A, B, m, scale) is m / ‖V‖ ⊙ (V x), ‖V‖ held constant."""
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
