"""What the exercises of notebook 10, bottleneck adapters, are compared with.

The forward pass is tried with every nonlinearity on several shapes, its gradients too;
sizes are counted in the library's own modules; places are those that houlsby.inject
chooses. All of them come from methods/houlsby.py.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig
from transformers.pytorch_utils import Conv1D

from ...core import targets
from ...core.adapter import as_matrix
from ...methods import houlsby
from . import Wrong, close, judged, pulled, unchanged

# (kind of base, d_in, d, m, σ, shape of x without d_in). In the second, D and U have
# the same shape, so that one in the other's place is told as that.
CASES = (
    (nn.Linear, 6, 4, 3, "tanh", (2, 3)),
    (nn.Linear, 5, 5, 5, "gelu", (4,)),
    (Conv1D, 6, 6, 2, "silu", (1, 5)),
    (nn.Linear, 3, 7, 4, "relu", ()),
    (Conv1D, 8, 5, 1, "tanh", (2, 2)),
)
BOTH = houlsby.PLACEMENTS["houlsby"]


@dataclass(frozen=True)
class Case:
    """A frozen projection with a bottleneck behind it; the library's is `ours`."""

    base: nn.Module
    parts: dict[str, Tensor]  # D, b_D, U, b_U
    nonlinearity: str
    x: Tensor

    @property
    def sigma(self) -> Callable[[Tensor], Tensor]:
        return houlsby.NONLINEARITIES[self.nonlinearity]

    def ours(self) -> houlsby.Bottleneck:
        m = len(self.parts["b_D"])
        made = houlsby.Bottleneck(copy.deepcopy(self.base), m, self.nonlinearity)
        with torch.no_grad():
            for name, value in own(made).items():
                value.copy_(self.parts[name])
        return made

    def __str__(self):
        (m, d), kind = self.parts["D"].shape, type(self.base).__name__
        return f"{kind} with d={d}, m={m} and {self.nonlinearity}"


def own(bottleneck: houlsby.Bottleneck) -> dict[str, Tensor]:
    """The library's parameters by the letters of the equation."""
    down, up = bottleneck.down, bottleneck.up
    return {"D": down.weight, "b_D": down.bias, "U": up.weight, "b_U": up.bias}


def cases() -> Iterator[Case]:
    """Random weights, biases and inputs, the same at every call."""
    draw = torch.Generator().manual_seed(10)

    def normal(*shape) -> Tensor:
        return torch.randn(shape, generator=draw)

    for kind, d_in, d, m, nonlinearity, shape in CASES:
        base = kind(d_in, d) if kind is nn.Linear else kind(d, d_in)
        base.weight.data = normal(*base.weight.shape)
        base.bias.data = normal(d)
        base.requires_grad_(False)
        parts = {
            "D": normal(m, d),
            "b_D": normal(m),
            "U": normal(d, m),
            "b_U": normal(d),
        }
        yield Case(base, parts, nonlinearity, normal(*shape, d_in))


# 10.1 ---------------------------------------------------------------------------------


@judged
def bottleneck_forward(MyBottleneck: type[nn.Module]) -> None:
    """10.1: MyBottleneck(base, D, b_D, U, b_U, sigma)(x) is the equation's h."""
    for case in cases():
        parts = {name: value.clone() for name, value in case.parts.items()}
        theirs = MyBottleneck(copy.deepcopy(case.base), **parts, sigma=case.sigma)
        x = case.x.clone()
        with unchanged(x=x):
            got = theirs(x)
        close(
            got,
            case.ours()(case.x).detach(),
            what=f"h, for x of shape {tuple(x.shape)} and a {case}",
            mistakes=_wrong_outputs(case),
        )
        _same_gradients(theirs, case)


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
        "σ is there twice": y + sigma(narrow) @ U.T + b_U,
    }
    if x.shape == y.shape:
        beside = sigma(x @ D.T + b_D) @ U.T + b_U
        wrong["the residual is y, the output of the base, not x"] = x + added + b_U
        wrong["x is added as well: the layer adds it later"] = x + y + added + b_U
        wrong["D reads x: it reads y, what the base returns"] = y + beside
        wrong["the base is left out"] = x + beside
        turned = x @ as_matrix(base) + base.bias
        late = sigma(turned @ D.T + b_D) @ U.T + b_U
        wrong["base.weight was used as it is stored: call self.base(x)"] = turned + late
    if D.shape == U.shape:
        wrong["D and U are swapped: D reads y"] = y + sigma(y @ U.T + b_D) @ D.T + b_U
        straight = sigma(y @ D + b_D) @ U + b_U
        wrong["D and U were not transposed: y holds rows"] = y + straight
    return wrong


def _same_gradients(theirs: nn.Module, case: Case) -> None:
    ours = case.ours()
    x, ours_x = (case.x.clone().requires_grad_() for _ in range(2))
    got, expected = theirs(x), ours(ours_x)
    if not got.requires_grad:
        raise Wrong(
            "h has the right values, but no gradient reaches D and U through it. "
            "Likely mistake: .data, .detach() or torch.no_grad() in forward()"
        )
    ways = pulled(got, expected)
    past = ways @ as_matrix(case.base)  # as if nothing but the residual led back
    wanted = {name: value.grad for name, value in own(ours).items()}
    for name, grad in {**wanted, "x": ours_x.grad}.items():
        mine = x.grad if name == "x" else getattr(theirs, name).grad
        if mine is None:
            raise Wrong(
                f"h has the right values, but no gradient reaches {name}. Likely "
                f"mistake: {name}.data, .detach() or a copy in forward()"
            )
        close(
            mine,
            grad,
            what=f"h is right, but not the gradient of {name}, for a {case}",
            mistakes={"y.detach(): the layers below learn through D too": past},
            tolerance=1e-4,
        )


# 10.2 ---------------------------------------------------------------------------------

BUDGETS = (  # (d, numbers of a LoRA in a layer)
    (576, 81_408),
    (128, 20_480),
    (64, 5_000),
    (32, 700),
    (96, 2 * (2 * 96 * 24 + 96 + 24)),  # met exactly
)


@judged
def bottleneck_units(my_units: Callable) -> None:
    """10.2: my_units(d, budget): the m closest to the budget of a layer, its count."""
    for d, budget in BUDGETS:
        m = min(range(1, d + 1), key=lambda m: abs(_formula(d, m) - budget))
        got, expected = my_units(d, budget), (m, 2 * counted(d, m))
        wrong = _wrong_units(d, budget)
        what = f"(m, count), for d={d} and a budget of {budget:,} a layer"
        if not _two_numbers(got):
            close(got, expected, what=what)
        if tuple(got) != expected:
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
    made = houlsby.Bottleneck(nn.Linear(1, d, device="meta"), m)
    return sum(p.numel() for p in made.parameters() if p.requires_grad)


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


def _with(d: int, m: int) -> tuple[int, int]:
    return m, _formula(d, m)


# 10.3 ---------------------------------------------------------------------------------


def models() -> dict[str, nn.Module]:
    """Small random models, two or three layers each."""
    shared = dict(vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    configs = {
        "a Llama": LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            tie_word_embeddings=False,
            **shared,
        ),
        "a GPT-2": GPT2Config(n_embd=16, n_layer=3, n_head=4, n_positions=32, **shared),
        "an OPT": OPTConfig(
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            **shared,
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
    """10.3: my_places(model): the names of what a bottleneck goes behind, in order."""
    for said, model in models().items():
        expected = list(houlsby.last_projections(model, BOTH))
        before = [name for name, _ in model.named_modules()]
        got = my_places(model)
        if [name for name, _ in model.named_modules()] != before:
            raise Wrong(
                f"for {said}: the model was changed. Likely mistake: only names are "
                "asked for; nothing is to be put in"
            )
        _demand_names(got, expected, model, said)


def _demand_names(got, expected: list[str], model: nn.Module, said: str) -> None:
    if got is None:
        raise Wrong(f"for {said}: got None. Likely mistake: `return` is missing")
    names = list(got) if isinstance(got, list | tuple | dict) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise Wrong(f"for {said}: a list of names is needed, not {_kind(got)}")
    if names == expected:
        return
    likely = _wrong_places(names, expected, model)
    raise Wrong(
        f"for {said}: expected {len(expected)} names: {_shown(expected)}\n"
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
    told = (
        (not names, "no name was found: these models call their parts differently"),
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
    return next((text for true, text in told if true), None)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
