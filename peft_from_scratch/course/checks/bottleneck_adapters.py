"""What the exercises of notebook 11, bottleneck adapters, are compared with.

The forward pass is tried with every nonlinearity, on several shapes and bases, alone
and in a row of layers, its gradients too; sizes are counted in the library's own
modules; places are those that houlsby.inject chooses. All of them come from
methods/houlsby.py.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator, KeysView, ValuesView
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig
from transformers.pytorch_utils import Conv1D

from ...core import targets
from ...core.adapter import as_matrix
from ...methods import houlsby
from . import Wrong, close, judged, pulled, unchanged

BOTH = houlsby.PLACEMENTS["houlsby"]


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


def models() -> dict[str, nn.Module]:
    """Small random models; one with more than ten layers, whose sides are all equal."""
    shared = dict(vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    llama = dict(
        hidden_size=16,
        num_attention_heads=4,
        head_dim=4,
        tie_word_embeddings=False,
        **shared,
    )
    configs = {
        "a Llama": LlamaConfig(
            num_hidden_layers=2, num_key_value_heads=2, intermediate_size=24, **llama
        ),
        "a GPT-2": GPT2Config(n_embd=16, n_layer=3, n_head=4, n_positions=32, **shared),
        "an OPT": OPTConfig(
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=8,  # with a projection in front, and one behind
            **shared,
        ),
        "a Llama of twelve layers": LlamaConfig(
            num_hidden_layers=12, num_key_value_heads=4, intermediate_size=16, **llama
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10)
        return {
            name: AutoModelForCausalLM.from_config(config).eval()
            for name, config in configs.items()
        }


@judged
def bottleneck_places(my_places: Callable) -> None:
    """11.3: my_places(model): the names of what a bottleneck goes behind, in order."""
    for which, model in models().items():
        expected = list(houlsby.last_projections(model, BOTH))
        with unchanged(model=model):
            got = my_places(model)
        _demand_names(got, expected, model, which)


ORDERED = list | tuple | dict | KeysView | ValuesView  # of names, that may be returned


def _demand_names(got, expected: list[str], model: nn.Module, which: str) -> None:
    if got is None:
        raise Wrong(f"for {which}: got None. Likely mistake: `return` is missing")
    names = list(got) if isinstance(got, ORDERED) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise Wrong(
            f"for {which}: a list of names is needed, not {_kind(got)}. Likely "
            "mistake: the modules, or pairs with them, in the place of their names; or "
            "what has no order, as a set"
        )
    if names == expected:
        return
    likely = _wrong_places(names, expected, model)
    raise Wrong(
        f"for {which}: expected {len(expected)} names: {_shown(expected)}\n"
        f"  got {len(names)}: {_shown(names)}"
        + (f"\nLikely mistake: {likely}" if likely else "")
    )


def _kind(got) -> str:
    if isinstance(got, list | tuple) and got:
        return f"a {type(got).__name__} of {type(got[0]).__name__}"
    return f"a {type(got).__name__}"


def _wrong_places(names: list[str], expected: list[str], model) -> str | None:
    kinds = targets.kinds(model)
    within = [name for name in kinds if name not in expected]
    first = targets.layer_of(model, expected[0])
    last = targets.layer_of(model, expected[-1])
    sublayers = [name.rpartition(".")[0] for name in expected]
    likely = (
        (not names, "no name was found: these models call their parts differently"),
        (
            names == sorted(expected),
            "the order of the alphabet, in which layer 10 comes before layer 2: the "
            "model's own is asked for, layer by layer",
        ),
        (
            sorted(names) == sorted(expected),
            "another order: the model's own, layer by layer",
        ),
        (
            {n.rpartition(".")[2] for n in expected} == set(names),
            "the last parts alone: give each name in full",
        ),
        (len(set(names)) < len(names), "some names are there twice"),
        (
            names == [n for n in expected if kinds[n] == "mlp"],
            "behind the MLP only: that is Pfeiffer's placement. Houlsby's has one "
            "behind attention too",
        ),
        (
            names == [n for n in expected if kinds[n] == "attention"],
            "behind attention only: one stands behind the MLP too",
        ),
        (
            names == [n for n in expected if n.startswith(f"{first}.")],
            "only the first layer",
        ),
        (
            names == [n for n in expected if n.startswith(f"{last}.")],
            "only the last layer",
        ),
        (names == list(kinds), "every projection: only the last of each sublayer"),
        (
            names == [n for n in targets.projections(model)],
            "every projection, the model's head too: only the last of each sublayer",
        ),
        (
            set(names) <= {targets.layer_of(model, n) for n in expected},
            "the layers themselves: the bottleneck sits inside, before each sum",
        ),
        (
            set(names) <= set(sublayers),
            "the modules around them: a projection's own name is needed",
        ),
        (
            set(expected) < set(names) and set(names) - set(expected) <= set(within),
            "too many: only the last projection of each sublayer",
        ),
        (
            bool(names) and set(names) <= set(within),
            "these projections are not the last of their sublayer, so their output "
            "does not join the stream next",
        ),
        (
            bool(set(names) - set(kinds)),
            f"{next((n for n in names if n not in kinds), '')!r} is no projection of a "
            "layer",
        ),
        (
            bool(set(names) & set(within)),
            f"{next((n for n in names if n in within), '')!r} is not the last of its "
            "sublayer",
        ),
        (set(names) < set(expected), "some are missing: two in every layer"),
    )
    return next((text for so, text in likely if so), None)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
