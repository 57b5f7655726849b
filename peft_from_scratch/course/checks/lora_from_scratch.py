"""What the exercises of notebook 04, LoRA from scratch, are compared with.

Every check takes the learner's class or function, tries it on several shapes, and
compares with methods/lora.py, which has the same mathematics in other words.
"""

import copy
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from ...core.adapter import adapters, as_matrix, trainable
from ...ledger.experiments import spectrum
from ...methods import lora
from . import UNKNOWN, Hidden, Wrong, close, judged, pulled, unchanged

# (kind of base, d_in, d_out, r, alpha, shape of x without d_in, bias, size of all
# numbers). In the first, every wrong scale gives another number; and a square Conv1D
# comes before the oblong one, with which a transpose too few stops before anything can
# be said about it. Then: the first with another alpha, wide, narrow, tall, long, with
# tiny and with huge numbers, as many rows as columns, and a rank above a side.
CASES = (
    (nn.Linear, 6, 4, 3, 7.0, (2, 3), True, 1.0),
    (nn.Linear, 5, 5, 3, 1.5, (4,), True, 1.0),
    (nn.Linear, 8, 8, 8, 2.0, (), True, 1.0),
    (Conv1D, 6, 6, 4, 16.0, (1, 5), True, 1.0),
    (Conv1D, 7, 12, 1, 3.0, (2, 2), True, 1.0),
    (nn.Linear, 6, 4, 3, 2.0, (2, 3), False, 1.0),
    (nn.Linear, 40, 3, 2, 6.0, (2, 3, 2, 4), True, 1.0),
    (nn.Linear, 1, 5, 1, 2.0, (3,), False, 1.0),
    (nn.Linear, 3, 120, 2, 5.0, (7,), True, 1.0),
    (Conv1D, 5, 3, 2, 10.0, (200,), True, 1.0),
    (nn.Linear, 6, 4, 3, 8.0, (2, 3), False, 1e-5),
    (Conv1D, 6, 6, 4, 16.0, (1, 5), True, 1e3),
    (nn.Linear, 6, 4, 3, 8.0, (6,), False, 1.0),
    (nn.Linear, 2, 5, 4, 6.0, (3,), True, 1.0),
    (Conv1D, 5, 2, 3, 6.0, (3,), True, 1.0),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """A frozen projection with a LoRA, in float32; the library's is `ours`."""

    base: nn.Module
    A: Tensor
    B: Tensor
    alpha: float
    x: Tensor

    @property
    def r(self) -> int:
        return self.A.shape[0]

    @property
    def bias(self) -> Tensor:
        none = torch.zeros(self.B.shape[0])
        return none if self.base.bias is None else self.base.bias

    def at(self, dtype: torch.dtype) -> "Case":
        base = copy.deepcopy(self.base).to(dtype)
        A, B, x = (tensor.to(dtype) for tensor in (self.A, self.B, self.x))
        return Case(base, A, B, self.alpha, x)

    @property
    def update(self) -> Tensor:  # B A, not scaled
        return self.B @ self.A

    def ours(self) -> lora.LoRA:
        layer = lora.LoRA(copy.deepcopy(self.base), self.r, self.alpha)
        with torch.no_grad():
            layer.A.copy_(self.A)
            layer.B.copy_(self.B)
        return layer

    def __str__(self):
        d_out, d_in = self.B.shape[0], self.A.shape[1]
        kind = type(self.base).__name__
        return f"{kind} with d_in={d_in}, d_out={d_out}, r={self.r}, alpha={self.alpha}"


def cases() -> Iterator[Case]:
    """Random weights and inputs, the same at every call; a bias that is not zero."""
    draw = torch.Generator().manual_seed(4)

    def normal(*shape) -> Tensor:
        return torch.randn(shape, generator=draw)

    for kind, d_in, d_out, r, alpha, shape, bias, size in CASES:
        base = kind(d_in, d_out) if kind is nn.Linear else kind(d_out, d_in)
        base.weight.data = size * normal(*base.weight.shape)
        base.bias.data = size**2 * normal(d_out)
        base.bias = base.bias if bias else None
        base.requires_grad_(False)
        A, B = size * normal(r, d_in), normal(d_out, r)
        yield Case(base, A, B, alpha, size * normal(*shape, d_in))


def wrong_scales(case: Case) -> dict[str, float]:
    """What stands in the place of alpha / r, by the likely mistake."""
    alpha, r, (d_out, d_in) = case.alpha, case.r, case.update.shape
    return {
        "not divided by r: the scale is alpha / r": alpha,
        "no scale: multiply B A by alpha / r": 1.0,
        "alpha is missing: the scale is alpha / r, not 1 / r": 1 / r,
        "alpha // r drops what is behind the point: alpha / r": alpha // r,
        "alpha / r is rounded: it need not be whole": round(alpha / r),
        "r is A.shape[0], even where it is above the other side": alpha
        / min(r, d_out, d_in),
        "divided by d_in: r is A.shape[0]": alpha / d_in,
        "divided by d_out: r is A.shape[0]": alpha / d_out,
        "the scale is there twice": (alpha / r) ** 2,
        "r / alpha in the place of alpha / r": r / alpha,
        "alpha / sqrt(r): that is rsLoRA's scale": alpha / math.sqrt(r),
        "the wrong sign: the update is added": -alpha / r,
    }


# 4.1 ----------------------------------------------------------------------------------


@judged
def lora_forward(MyLoRA: type[nn.Module]) -> None:
    """4.1: MyLoRA(base, A, B, alpha)(x) is h = W0 x + (alpha / r) B A x."""
    tried = list(cases())
    layers = [_built(MyLoRA, case) for case in tried]
    # All layers are there before the first is used: no two share anything.
    for case, theirs in zip(tried, layers, strict=True):
        _same_output(theirs, case)
        _same_gradients(theirs, case)
    for case, theirs in list(zip(tried, layers, strict=True))[:5]:
        _after_a_step(theirs, case)
        _in_other_modes(theirs, case)
    for case in tried[:2]:
        zero = replace(case, B=torch.zeros_like(case.B))
        _same_gradients(_built(MyLoRA, zero), zero, "while B is zero: ")
        _same_output(_built(MyLoRA, replace(case, base=Hidden(case.base))), case)
        hooked = replace(case, base=copy.deepcopy(case.base))
        hooked.base.register_forward_hook(lambda module, inputs, y: 1.5 * y)
        _same_output(_built(MyLoRA, hooked), hooked, "where the base has a hook: ")
        _same_output(_built(MyLoRA, case.at(torch.float64)), case.at(torch.float64))


def _built(MyLoRA: type[nn.Module], case: Case) -> nn.Module:
    return MyLoRA(copy.deepcopy(case.base), case.A.clone(), case.B.clone(), case.alpha)


def _same_output(theirs: nn.Module, case: Case, when: str = "") -> None:
    x = case.x.clone()
    with unchanged(x=x, A=theirs.A, B=theirs.B, base=theirs.base):
        got = theirs(x)
    scale = case.alpha / case.r
    close(
        got,
        (case.base(case.x) + scale * (case.x @ case.A.T @ case.B.T)).detach(),
        what=f"{when}h, for x of shape {tuple(x.shape)} and a {case}",
        mistakes=_wrong_outputs(case),
        tolerance=1e-9 if x.dtype == torch.float64 else 1e-5,
        kind=x.dtype,
    )


def _after_a_step(theirs: nn.Module, case: Case) -> None:
    """A and B get other numbers, in the same tensors, as from an optimizer."""
    step = replace(case, A=case.A.flip(0) + 0.5, B=0.5 - case.B, x=1 - case.x)
    with torch.no_grad():
        theirs.A.copy_(step.A)
        theirs.B.copy_(step.B)
    theirs.zero_grad()
    when = "after A and B were trained: "
    _same_output(theirs, step, when)
    _same_gradients(theirs, step, when)


def _in_other_modes(theirs: nn.Module, case: Case) -> None:
    now = replace(case, A=theirs.A.detach(), B=theirs.B.detach())
    with torch.no_grad():
        _same_output(theirs, now, "in torch.no_grad(): ")
    _same_output(theirs.eval(), now, "in eval(): ")
    _same_output(theirs.train(), now, "in train(): ")


def _wrong_outputs(case: Case) -> dict[str, Tensor]:
    base, x, A, B = case.base, case.x, case.A, case.B
    before, r, scale = base(x), case.r, case.alpha / case.r
    right = x @ A.T @ B.T
    scales = wrong_scales(case)
    wrong = {
        "the update alone: W0 x is missing": scale * right,
        **{text: before + wrong * right for text, wrong in scales.items()},
        "A was reshaped, which turns nothing round: A.T": before
        + scale * (x @ A.reshape(A.T.shape) @ B.T),
        "B was reshaped, which turns nothing round: B.T": before
        + scale * (x @ A.T @ B.reshape(B.T.shape)),
        "the hooks of the base are passed over: call self.base(x)": base.forward(x)
        + scale * right,
        "W0 x alone: the update is missing": before,
        "the whole of h is scaled, W0 x included": scale * (before + right),
        "W0 x is scaled, in the place of B A x": scale * before + right,
        "W0 x is there twice: self.base(x) is all of it": 2 * before + scale * right,
        "the bias of the base is lost: call self.base(x)": before
        - case.bias
        + scale * right,
        "the bias of the base is there twice": before + case.bias + scale * right,
    }
    if before.shape == x.shape and x.dtype == torch.float32:
        wrong["x itself was added: h has no shortcut"] = x + before + scale * right
        turned = x @ as_matrix(base) + case.bias + scale * right
        wrong["base.weight was used as it is stored: call self.base(x)"] = turned
        wrong["B A was not transposed: x holds rows"] = before + scale * (x @ B @ A)
    if A.shape == B.shape == (r, r):
        swapped = scale * (x @ B.T @ A.T)
        wrong["A and B are swapped: A reads x first"] = before + swapped
        straight = scale * (x @ A @ B)
        wrong["x A B without the transposes: x holds rows"] = before + straight
    return wrong


def _same_gradients(theirs: nn.Module, case: Case, when: str = "") -> None:
    ours = case.ours()
    x, ours_x = (case.x.clone().requires_grad_() for _ in range(2))
    got, expected = theirs(x), ours(ours_x)
    if not got.requires_grad:
        raise Wrong(
            f"{when}h has the right values, but no gradient reaches A and B through "
            "it. Likely mistake: .data, .detach() or torch.no_grad() in forward()"
        )
    ways = pulled(got, expected)
    through_W0 = ways @ as_matrix(case.base)
    for name, mine, wanted in (
        ("A", theirs.A.grad, ours.A.grad),
        ("B", theirs.B.grad, ours.B.grad),
        ("x", x.grad, ours_x.grad),
    ):
        if mine is None:
            raise Wrong(
                f"{when}h has the right values, but no gradient reaches {name}. "
                f"Likely mistake: {name}.data, {name}.detach() or a copy in forward()"
            )
        close(
            mine,
            wanted,
            what=f"{when}h is right, but not the gradient of {name}, for a {case}",
            mistakes={
                "x.detach(): the layers below learn through A too": through_W0,
                "torch.no_grad() around self.base(x): its weight is frozen, x is not": (
                    ours_x.grad - through_W0
                ),
            },
            tolerance=1e-4,
        )


# 4.2 ----------------------------------------------------------------------------------


# (d_out, d_in, r): large enough to see how A is distributed; and small ones
LARGE = ((64, 2048, 32), (1000, 300, 50), (96, 96, 96), (8, 5000, 4))
SMALL = ((5, 1, 1), (1, 6, 1), (7, 3, 2), (4, 9, 1), (9, 4, 6))


@judged
def lora_start(my_start: Callable) -> None:
    """4.2: my_start(d_out, d_in, r): A Gaussian of variance 1 / (3 d_in), B = 0."""
    for d_out, d_in, r in (*LARGE, *SMALL):
        sizes = f"d_out={d_out}, d_in={d_in}, r={r}"
        pairs = [my_start(d_out, d_in, r) for _ in range(3)]
        for pair in pairs:
            _demand_pair(pair, d_out, d_in, r, sizes)
        if (d_out, d_in, r) in LARGE:
            _demand_gaussian(pairs[0][0], d_out, d_in, r, sizes)
        _demand_own(pairs, sizes)
        _demand_torchs_seed(my_start, (d_out, d_in, r), sizes)


def _demand_pair(pair, d_out: int, d_in: int, r: int, sizes: str) -> None:
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise Wrong(
            f"for {sizes}: expected two tensors, A and B, in this order; got "
            f"{type(pair).__name__}. Likely mistake: `return A, B` is missing"
        )
    wanted = [(r, d_in), (d_out, r)]
    shapes = [tuple(getattr(each, "shape", ())) for each in pair]
    if shapes == wanted[::-1] != wanted:
        raise Wrong(
            f"for {sizes}: A should come first and B second. Likely mistake: "
            "`return B, A`"
        )
    for name, got, shape in zip("AB", pair, wanted, strict=True):
        _demand_shape(name, got, shape, sizes)
    _demand_zero(*pair, sizes)


def _demand_own(pairs: list, sizes: str) -> None:
    """Several layers of one size: each with numbers of its own, in its own memory."""
    for i, (A, B) in enumerate(pairs):
        for other, _ in pairs[:i]:
            if torch.equal(A, other):
                raise Wrong(
                    f"for {sizes}: two calls gave the same A. Likely mistake: a seed "
                    "set inside the function, or no random numbers at all"
                )
        with torch.no_grad():
            B.data[0, 0] = 1.0  # a first step of training
        if int((B != 0).sum()) != 1 or any(b.any() for _, b in pairs[i + 1 :]):
            raise Wrong(
                f"for {sizes}: a number was written into one place of B, and others "
                "changed too. Likely mistake: one tensor for several B, or expand(); "
                "torch.zeros(d_out, r) in each call makes a new one"
            )


def _demand_torchs_seed(my_start: Callable, sizes: tuple, shown: str) -> None:
    """torch.manual_seed decides what A is: else no run could be repeated."""
    with torch.random.fork_rng(devices=[]):
        drawn = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            drawn.append(my_start(*sizes)[0])
    if not torch.equal(*drawn[:2]) or torch.equal(*drawn[1:]):
        raise Wrong(
            f"for {shown}: torch.manual_seed before the call does not decide what A "
            "is. Likely mistake: a generator of your own, a seed inside, or random "
            "numbers that are not torch's"
        )


def _demand_shape(name, got, shape, sizes) -> None:
    if not isinstance(got, Tensor):
        raise Wrong(
            f"for {sizes}: {name} is no tensor but a {type(got).__name__}. Likely "
            f"mistake: nothing was computed for {name}, or .numpy() too many"
        )
    if got.dtype != torch.float32:
        raise Wrong(
            f"for {sizes}: {name} holds {got.dtype}; float32 is needed, the dtype of a "
            "model that trains. Likely mistake: a dtype of your own"
        )
    if tuple(got.shape) != shape:
        turned = tuple(got.shape) == shape[::-1]
        likely = "the two sides are swapped" if turned else "another size was used"
        raise Wrong(
            f"for {sizes}: {name} should have the shape {shape}, and has "
            f"{tuple(got.shape)}. Likely mistake: {likely}; A reads x, B writes h"
        )


def _demand_zero(A: Tensor, B: Tensor, sizes: str) -> None:
    a, b = bool(A.any()), bool(B.any())
    if a and not b:
        return
    likely = {
        (False, False): "both are zero: then both gradients are zero, for ever",
        (True, True): "B is random too: then B A is not zero, and h not W0 x",
        (False, True): "A is zero and B random: the wrong way round",
    }[a, b]
    raise Wrong(
        f"for {sizes}: expected B all zeros and A not; got a largest |A| of "
        f"{A.abs().max():.3g} and a largest |B| of {B.abs().max():.3g}. Likely "
        f"mistake: {likely}"
    )


def _demand_gaussian(A: Tensor, d_out, d_in, r, sizes) -> None:
    got, expected = A.std().item(), (3 * d_in) ** -0.5
    others = {  # standard deviation -> what leads to it
        "torch.randn has a standard deviation of 1: scale it": 1.0,
        "the variance was taken for the standard deviation: take its root": expected**2,
        "the 3 is missing: the variance is 1 / (3 d_in)": d_in**-0.5,
        "d_out in the place of d_in: A reads x, which has d_in entries": (3 * d_out)
        ** -0.5,
        "r in the place of d_in": (3 * r) ** -0.5,
        "sqrt(3 / d_in) in the place of sqrt(1 / (3 d_in))": (3 / d_in) ** 0.5,
        "the 3 belongs under the root; or A is uniform between ±1 / sqrt(3 d_in), "
        "which is no standard deviation": expected / 3**0.5,
        "multiplied by sqrt(3 d_in): divide": 1 / expected,
        "a variance of 2 / d_in or 2 / (r + d_in) is He's or Xavier's; LoRA's is "
        "1 / (3 d_in)": (2 / d_in) ** 0.5,
        "0.02 for every width; A's variance is 1 / (3 d_in)": 0.02,
    }

    def near(wanted: float) -> bool:
        return math.isfinite(got) and abs(got - wanted) < 0.05 * wanted

    if not near(expected):
        likely = [text for text, std in others.items() if near(std)]
        raise Wrong(
            f"for {sizes}: the entries of A should have a standard deviation of "
            f"{expected:.4g}, and have {got:.4g}."
            + f" Likely mistake: {likely[0] if likely else UNKNOWN}"
        )
    if abs(A.mean()) > 5 * expected / A.numel() ** 0.5:
        raise Wrong(
            f"for {sizes}: the mean of A should be near 0, and is {A.mean():.3g}. "
            "Likely mistake: torch.rand, or absolute values; torch.randn is meant"
        )
    # Of a Gaussian 4.6 % are that far out; of a uniform draw none are.
    far = (A.abs() > 2 * expected).float().mean().item()
    if not 0.035 < far < 0.056:
        raise Wrong(
            f"for {sizes}: A has the right spread, but {far:.1%} of its entries lie "
            "beyond two standard deviations, where a Gaussian has 4.6 %. Likely "
            f"mistake: {'a uniform' if far < 0.01 else 'another'} draw; torch.randn is "
            "Gaussian"
        )
    rank = int(torch.linalg.matrix_rank(A))
    if rank < min(A.shape):
        raise Wrong(
            f"for {sizes}: A has rank {rank}, so the update could never have rank {r}. "
            "Likely mistake: the same row repeated"
        )
    _demand_independent(A.detach() / expected, sizes)


def _demand_independent(A: Tensor, sizes: str) -> None:
    """Of entries with a standard deviation of 1: tails, and no pattern among them."""
    r, d_in = A.shape
    columns = (A.T @ A / r).fill_diagonal_(0).abs()
    spread = A.square().mean(1).std().item()  # of a Gaussian sqrt(2 / d_in)
    patterns = {
        "no entry lies beyond three standard deviations: the tails are cut off": (
            A.abs().max() < 3
        ),
        # The mean fourth power of a Gaussian is 3, give or take sqrt(96 / numel).
        "a few entries are too large: a mixture, or another distribution": (
            A.pow(4).mean() > 3 + 60 / A.numel() ** 0.5
        ),
        "few different numbers: one row or column was used again": (
            len(A.unique()) < 0.9 * A.numel()
        ),
        "neighbors are alike: sorted, or one made of the other": (
            (A[:, 1:] * A[:, :-1]).mean().abs() > 6 / A.numel() ** 0.5
        ),
        "one column is another one, or its negative": r > 90 and columns.max() > 0.7,
        "all rows have the same length: divided by it": (
            r > 30 and spread < 0.3 * (2 / d_in) ** 0.5
        ),
    }
    for likely, is_so in patterns.items():
        if is_so:
            raise Wrong(
                f"for {sizes}: A has the right spread, but its entries are not drawn "
                f"independently from a Gaussian. Likely mistake: {likely}"
            )


# 4.3 ----------------------------------------------------------------------------------


def models() -> dict[str, tuple[nn.Module, Sequence[str], int, float]]:
    """{name: (a small random model, last parts of the names to wrap, r, alpha)}

    The first twice, with other targets, r and alpha, the last time while it trains.
    """
    shared = dict(vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    llama = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=11,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        tie_word_embeddings=False,
        **shared,
    )
    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=32, **shared)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        alike = {name: nn.Linear(4, 4) for name in ("kq", "q", "q_up")}
        alike |= {"k": nn.ModuleDict({"out": nn.Linear(4, 4)}), "v": nn.Embedding(4, 4)}
        alike["deep"] = nn.ModuleDict({"q": nn.Linear(4, 6, bias=False)})
        for name in ("d", "e", "f", "g"):  # deep.g.f.e.d.q
            alike["deep"] = nn.ModuleDict({name: alike["deep"]})
        alike["norm"] = nn.BatchNorm1d(4)
        alike["conv"] = nn.Conv1d(2, 2, 3)
        parts = {name: nn.Linear(4, 4) for name in ("q_proj", "proj", "q", "A", "B")}
        plain = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
        small = AutoModelForCausalLM.from_config(llama).eval()
        return {
            "a Llama": (small, ("q_proj", "v_proj", "down_proj"), 3, 5.0),
            "a GPT-2, whose projections are Conv1D": (
                AutoModelForCausalLM.from_config(gpt2).eval(),
                ("c_attn", "c_proj"),
                3,
                16.0,
            ),
            "a bare nn.Sequential": (plain, ["2"], 2, 5.0),
            "a model whose names look alike": (
                nn.ModuleDict(alike),
                ["q", "k", "v"],
                4,
                5.0,
            ),
            "a model in which a name is a part of a target": (
                nn.ModuleDict(parts | {"own": _Own()}),
                ["q_proj"],
                2,
                3.0,
            ),
            "a Llama in training": (
                copy.deepcopy(small).train(),
                ["up_proj", "q_proj", "k_proj"],
                1,
                12.0,
            ),
        }


class _Own(nn.Module):
    """A module whose own parameters have the names of a LoRA's."""

    def __init__(self):
        super().__init__()
        self.A, self.B = (nn.Parameter(torch.ones(2)) for _ in range(2))


@judged
def lora_inject(my_inject: Callable) -> None:
    """4.3: my_inject(model, targets, r, alpha) freezes the model and wraps targets."""
    returned = []
    for name, (model, targets, r, alpha) in models().items():
        ours = copy.deepcopy(model)
        chosen = {
            n: m
            for n, m in ours.named_modules()
            if n.rpartition(".")[2] in targets and isinstance(m, nn.Linear | Conv1D)
        }
        expected = lora.inject(ours, r=r, alpha=alpha, targets=chosen)
        before = copy.deepcopy(model.state_dict())
        modules = dict(model.named_modules())
        rest = _rest(modules)
        lent = list(targets) if isinstance(targets, list) else targets
        with unchanged(targets=lent):
            got = my_inject(model, lent, r, alpha)
        where = f"{name}, targets={targets}, r={r}, alpha={alpha}"
        _demand_wrapped(model, modules, expected, got, where)
        _demand_same_adapters(model, ours, modules, where)
        _demand_names(got, expected, where)
        _demand_flags(model, ours, where)
        _demand_untouched(model, before, where)
        _demand_rest(rest, _rest(modules), where)
        _demand_own_numbers(model, where)
        returned.append((got, expected, where))
    for got, expected, where in returned:  # one list for all would hold the last names
        _demand_names(got, expected, where)


def _rest(modules: dict[str, nn.Module]) -> dict[str, tuple]:
    """What an injection leaves alone, of each module that was there."""
    return {
        name: (
            module.training,
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            [n for n, b in module._buffers.items() if b is not None],
            [p.dtype for p in module._parameters.values() if p is not None],
        )
        for name, module in modules.items()
    }


def _demand_rest(before: dict[str, tuple], now: dict[str, tuple], where: str) -> None:
    kinds = ("mode, train() or eval()", "hooks", "buffers", "dtype")
    for name, old in before.items():
        for kind, was, new in zip(kinds, old, now[name], strict=True):
            if was != new:
                raise Wrong(
                    f"for {where}: the {kind} of {name or 'the model'} was changed. "
                    "Likely mistake: more than the three steps: freeze, wrap, put in"
                )


def _demand_own_numbers(model: nn.Module, where: str) -> None:
    """No two LoRAs start with the same A; each is drawn on its own."""
    drawn = [adapter.A for adapter in adapters(model).values()]
    for i, A in enumerate(drawn):
        if any(torch.equal(A, other) for other in drawn[:i]):
            raise Wrong(
                f"for {where}: two LoRAs have the same A. Likely mistake: a seed set "
                "before each of them, or one A for several"
            )


def _demand_wrapped(model, modules, expected, got, where) -> None:
    wrapped = adapters(model)
    inside = [n for n in wrapped if ".base" in n]
    if inside:
        raise Wrong(
            f"for {where}: {inside[0]} is a LoRA inside a LoRA. Likely mistake: a "
            "module was wrapped twice, or the LoRA was set as .base of the module; it "
            "belongs into the module's parent"
        )
    missing = [n for n in expected if n not in wrapped]
    extra = [n for n in wrapped if n not in expected]
    if missing or extra:
        likely = _wrong_places(model, modules, missing, extra, got)
        raise Wrong(
            f"for {where}: expected a LoRA at {_names(expected)}; missing at "
            f"{_names(missing)}; too many at {_names(extra)}."
            + f" Likely mistake: {likely or UNKNOWN}"
        )


def _wrong_places(model, modules, missing, extra, got) -> str:
    last = {n.rpartition(".")[2] for n in missing}
    if extra:
        if {n.rpartition(".")[2] for n in extra} == last:
            return "the LoRA was put into the model; setattr is for the module's parent"
        if not set(extra) <= set(modules):
            return "the LoRA has a place of its own; it belongs into the module's"
        return (
            "modules that no target names were wrapped. The last part of a name is to "
            "be one of the targets, and not to have one in it"
        )
    kinds = {type(modules[n]) for n in missing}
    if kinds == {Conv1D}:
        return "Conv1D was left out: GPT-2's projections are no nn.Linear"
    if any(isinstance(_at(model, n), lora.LoRA) for n in missing):
        return "one LoRA stands in several places: make a new one for each module"
    if not adapters(model):
        if got:
            return "the LoRA was made, but not put into the model's tree: setattr"
        return "no module was found: compare the last part of each name with targets"
    if all(".1." in n for n in missing):
        return "only the first layer was walked"
    return ""


def _at(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules(remove_duplicate=False)).get(name)


def _names(names) -> str:
    """The first names, and how many there are."""
    shown = ", ".join(names[:3]) or "none"
    return f"{shown}, … ({len(names)} in all)" if len(names) > 3 else shown


def _demand_same_adapters(model, ours, modules, where) -> None:
    for name, wanted in adapters(ours).items():
        adapter = adapters(model)[name]
        if adapter.base is not modules[name]:
            raise Wrong(
                f"for {where}: the LoRA at {name} has another base than the module "
                "that was there. Likely mistake: a copy or a new layer; give the "
                "module itself to LoRA(…)"
            )
        seen, asked = (
            {
                "kind": type(each).__name__,
                "r": each.A.shape[0],
                "alpha": each.alpha,
                "scale": each.scale,
                "dtype": each.A.dtype,
                "dropout": getattr(each.dropout, "p", 0.0),
            }
            for each in (adapter, wanted)
        )
        off = {key: value for key, value in seen.items() if value != asked[key]}
        if off:
            raise Wrong(
                f"for {where}: expected LoRA(module, r, alpha) at {name}; got "
                + ", ".join(f"{key}={value}" for key, value in off.items())
                + ". Likely mistake: LoRA(module, r, alpha), in this order, and no more"
            )


def _demand_names(got, expected, where) -> None:
    if isinstance(got, list | tuple) and list(got) == expected:
        return
    if not isinstance(got, list | tuple):
        likely = f"a list of names is needed, not a {type(got).__name__}"
        if got is None:
            likely = "`return names` is missing"
    elif sorted(map(str, got)) == sorted(expected):
        likely = "another order than that of model.named_modules()"
    else:
        likely = "the names are those of named_modules(), from the model down, whole"
    shown = (
        _names([_in_a_line(each) for each in got])
        if isinstance(got, list | tuple)
        else None
    )
    raise Wrong(
        f"for {where}: expected the names {_names(expected)}, in the model's order; "
        f"got {shown or type(got).__name__}. Likely mistake: {likely}"
    )


def _in_a_line(value) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"


def _demand_flags(model, ours, where) -> None:
    train = {n for n, p in model.named_parameters() if p.requires_grad}
    expected = set(trainable(ours))
    if train == expected:
        return
    extra, missing = sorted(train - expected), sorted(expected - train)
    if not train:
        likely = "the model was frozen after the LoRAs were in it: freeze it first"
    elif missing:
        likely = "A or B was frozen: both train"
    else:
        likely = "the base was left trainable: model.requires_grad_(False), at first"
        if all(name.endswith(("A", "B")) for name in extra):
            likely = (
                "what trains was chosen by its name; freeze all, then put in the LoRAs"
            )
    raise Wrong(
        f"for {where}: expected that A and B train and nothing else, "
        f"{len(expected)} tensors; got {len(train)} that do. Too many: "
        f"{_names(extra)}; missing: {_names(missing)}. Likely mistake: {likely}"
    )


def _demand_untouched(model, before, where) -> None:
    for name, now in model.state_dict().items():
        plain = name.replace(".base.", ".")
        if plain in before and not torch.equal(now, before[plain]):
            raise Wrong(
                f"for {where}: the pretrained {plain} was changed. Likely mistake: a "
                "weight that was written to, or a new module in the place of the old"
            )
    for name, adapter in adapters(model).items():
        if adapter.B.any() or not adapter.A.any():
            off = "B is not zero" if adapter.B.any() else "A is zero"
            raise Wrong(
                f"for {where}: the LoRA at {name} does not start as LoRA does: {off}. "
                "Likely mistake: LoRA(…) has set both; leave them"
            )


# 4.4 ----------------------------------------------------------------------------------


@judged
def lora_merge(my_merge: Callable) -> None:
    """4.4: my_merge(base, A, B, alpha) puts W0 + (alpha / r) B A into base.weight."""
    for i, case in enumerate(cases()):
        usual = 1e-4 < case.A.abs().max() < 1e2  # what float16 holds
        for dtype in DTYPES if usual else (torch.float32,):
            base = copy.deepcopy(case.base).to(dtype).train(i % 2 == 0)
            _judge_merge(my_merge, base, case, trains=i % 2 == 0)
        zero = replace(case, B=torch.zeros_like(case.B))
        _judge_merge(my_merge, base, zero, trains=True)
        _judge_merge(my_merge, base, case, trains=i % 2 == 1)  # once more


def _judge_merge(my_merge, base: nn.Module, case: Case, *, trains: bool) -> None:
    """Into this base, which may hold another update already; A and B may train."""
    pretrained, shape, dtype = base.weight, base.weight.shape, base.weight.dtype
    exact = _merged(base, case, torch.float64)
    A, B = (t.clone().requires_grad_(trains) for t in (case.A, case.B))
    wrong = _wrong_merges(copy.deepcopy(base), case)
    bias, rest = _clone(base.bias), _all_but_weight(base)
    with unchanged(A=A, B=B):
        my_merge(base, A, B, case.alpha)
    weight = base.weight.detach()
    what = f"base.weight after the merge, in {dtype}, for a {case}"
    if weight.dtype != dtype or weight.shape != shape:
        raise Wrong(
            f"{what}: expected {tuple(shape)} in {dtype}; got {tuple(weight.shape)} in "
            f"{weight.dtype}. A merge leaves shape and dtype as they were: cast back"
        )
    if (base.bias is None) != (bias is None) or (
        bias is not None and not torch.equal(base.bias, bias)
    ):
        raise Wrong(
            f"{what}: the bias was changed; it has no part in a merge. Likely mistake: "
            "a loop over all parameters; base.weight alone is meant"
        )
    # Rounded once, an entry is off by half a step of its dtype at most; what comes
    # before is float32, whose sums depend a little on their order.
    wide = dtype in (torch.float32, torch.float64)
    step = torch.finfo(torch.float32 if wide else dtype).eps
    close(
        weight.float(),
        exact.float(),
        what=what,
        mistakes=wrong,
        tolerance=(8 if wide else 3) * step,
    )
    off = (weight != exact.to(dtype)).double().mean().item()
    if not wide and off > 0.1 and weight.numel() > 20:
        raise Wrong(
            f"{what}: nearly right, but {off:.0%} of the entries are not the exact sum "
            "rounded once. Likely mistake: the product or the sum was computed in "
            f"{dtype}; compute in float32 and cast back at the very end"
        )
    if base.weight.requires_grad and base.weight is pretrained:
        raise Wrong(
            f"{what}: the weight trains now; a merge leaves it frozen. Likely mistake: "
            "no `with torch.no_grad():` around copy_, or requires_grad_(True)"
        )
    if base.weight is not pretrained:
        raise Wrong(
            f"{what}: the right numbers, but in a new parameter; a module that shares "
            "the weight would keep the old ones. Write into the weight that is there: "
            "base.weight.copy_(…), within torch.no_grad()"
        )
    if _all_but_weight(base) != rest:
        raise Wrong(
            f"{what}: the right numbers, but something else of the base was changed. "
            "Likely mistake: its mode, a flag of its bias, a hook or a buffer; write "
            "into base.weight and nothing else"
        )


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _all_but_weight(base: nn.Module) -> tuple:
    names = [*dict(base.named_parameters()), *dict(base.named_buffers())]
    trains = base.bias is not None and base.bias.requires_grad
    hooks = len(base._forward_hooks), len(base._forward_pre_hooks)
    return names, trains, base.training, hooks


def _merged(base: nn.Module, case: Case, dtype: torch.dtype) -> Tensor:
    """W0 + scale · B A as the base stores it, by the library."""
    layer = lora.LoRA(copy.deepcopy(base), case.r, case.alpha)
    with torch.no_grad():
        layer.A.copy_(case.A)
        layer.B.copy_(case.B)
        return layer.merged(dtype)["weight"]


def _wrong_merges(base: nn.Module, case: Case) -> dict[str, Tensor]:
    W0, update = as_matrix(base).float(), case.alpha / case.r * case.update
    wrong = {
        "nothing was written into base.weight": W0,
        "the update alone: W0 is lost": update,
        **{
            text: W0 + scale * case.update for text, scale in wrong_scales(case).items()
        },
        "the update was added twice": W0 + 2 * update,
    }
    if case.A.shape == case.B.shape:
        swapped = W0 + case.alpha / case.r * (case.A @ case.B)
        wrong["A B in the place of B A"] = swapped
    turned = isinstance(base, Conv1D)
    wrong = {text: W.T if turned else W for text, W in wrong.items()}
    if update.shape[0] == update.shape[1]:
        stored = base.weight.float()
        likely = (
            "the transpose is missing: Conv1D stores its weight as (d_in, d_out)"
            if turned
            else "a transpose too many: nn.Linear stores (d_out, d_in)"
        )
        wrong[likely] = stored + (update if turned else update.T)
    return wrong


# 4.5 ----------------------------------------------------------------------------------


@judged
def lora_spectrum(my_spectrum: Callable) -> None:
    """4.5: my_spectrum(dW, held): energy at ranks 1, 2, …; the smallest for `held`."""
    draw = torch.Generator().manual_seed(4)
    left, _ = torch.linalg.qr(torch.randn(7, 4, generator=draw))
    right, _ = torch.linalg.qr(torch.randn(9, 4, generator=draw))
    of_rank_four = left @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])) @ right.T
    thin = torch.randn(6, 1, generator=draw) @ torch.randn(1, 5, generator=draw)
    tried = {
        "made of the singular values 3, 2, 1, 0.5": of_rank_four,
        "the same, transposed": of_rank_four.T.contiguous(),
        "random, square": torch.randn(8, 8, generator=draw),
        "random and a thousand times smaller": 1e-3
        * torch.randn(5, 30, generator=draw),
        "a column times a row": thin,
        "the identity, four pieces of one size": torch.eye(4),
        "random, of another draw": torch.randn(7, 9, generator=draw),
        "random, of many ranks": torch.randn(14, 30, generator=draw),
        "a row": torch.randn(1, 9, generator=draw),
        "a column": torch.randn(9, 1, generator=draw),
        "random and tiny": 1e-6 * torch.randn(6, 6, generator=draw),
        "random and huge": 1e4 * torch.randn(6, 6, generator=draw),
        "a parameter": nn.Parameter(torch.randn(5, 4, generator=draw)),
    }
    for name, dW in tried.items():
        for held in (0.9, 0.5, 0.99, 0.2, None):
            _judge_spectrum(my_spectrum, dW, held, f"{tuple(dW.shape)}, {name}")


def _judge_spectrum(my_spectrum, dW: Tensor, held: float | None, name: str) -> None:
    """held=None: left out, so that it is 0.9."""
    given = dW.detach().clone().requires_grad_(dW.requires_grad)
    dW = dW.detach()
    with unchanged(dW=given):
        pair = my_spectrum(given) if held is None else my_spectrum(given, held)
    held = 0.9 if held is None else held
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise Wrong(
            f"for dW {name}: expected two things, the energies and a rank; got "
            f"{type(pair).__name__}. Likely mistake: `return energy, k`"
        )
    energy, k = pair
    s = torch.linalg.svdvals(dW)
    squares = s.square()
    expected = spectrum.energy(dW).float()
    before = torch.cat([torch.zeros(1), expected[:-1]])
    close(
        energy.float() if isinstance(energy, Tensor) else energy,
        expected,
        what=f"the energy at each rank, for dW {name}",
        mistakes={
            "s in the place of s squared": s.cumsum(0) / s.sum(),
            "not summed up: cumsum": squares / squares.sum(),
            "not divided by the total": squares.cumsum(0),
            "the smallest come first: sort from large to small": squares.flip(0).cumsum(
                0
            )
            / squares.sum(),
            "what is lost, not what is held": 1 - expected,
            "index 0 is rank 1, not rank 0: it holds the first piece": before,
            "the sum of the squares is the total, not the largest": squares.cumsum(0)
            / squares[0],
            "in percent; a share lies between 0 and 1": 100 * expected,
            "the root of it: squared norms are compared": expected.sqrt(),
            "rounded: leave that to whoever prints it": expected.round(decimals=4),
        },
        tolerance=2e-5,
    )
    wanted = spectrum.rank_of_energy(dW, held)
    if isinstance(k, Tensor) and k.numel() == 1:
        k = k.item()
    if k != wanted or not isinstance(k, numbers.Integral) or isinstance(k, bool):
        raise Wrong(
            f"for dW {name}, held={held}: expected the rank {wanted}, got {k!r}. "
            f"The energies are {_few(expected)}. Likely mistake: "
            + _wrong_rank(k, wanted, expected, held)
        )


def _wrong_rank(k, wanted: int, energy: Tensor, held: float) -> str:
    if isinstance(k, str) or k is None:
        return f"a whole number is asked for, no {type(k).__name__}"
    if k == wanted + 1 and energy[wanted - 1] == held:
        return "at least `held`: a rank that holds exactly as much is enough"
    if k == len(energy):
        return "the full rank: count only as far as `held` is reached"
    if k == int((energy >= held).sum()):
        return "the ranks at or above `held` were counted, not those up to it"
    if k == wanted - 1:
        return "one too few: index 0 of the energies is rank 1"
    if k == wanted + 1:
        return "one too many: the first rank that holds enough counts"
    if isinstance(k, float) and 0 < k < 1:
        return "a share of the full rank; the rank itself is asked for"
    if k == wanted:
        return f"a whole number is asked for, no {type(k).__name__}: int(…)"
    return "not the smallest rank whose energy is at least `held`"


def _few(values: Tensor) -> str:
    shown = ", ".join(f"{value:.3f}" for value in values[:6])
    return f"{shown}, …" if len(values) > 6 else shown
