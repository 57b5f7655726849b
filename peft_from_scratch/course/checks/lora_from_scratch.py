"""What the exercises of notebook 04, LoRA from scratch, are compared with.

Every check takes the learner's class or function, tries it on several shapes, and
compares with methods/lora.py, which has the same mathematics in other words.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from ...core.adapter import adapters, as_matrix, trainable
from ...ledger.experiments import spectrum
from ...methods import lora
from . import Wrong, close, judged, pulled, unchanged

# (kind of base, d_in, d_out, r, alpha, shape of x without d_in). In the first, every
# wrong scale gives another number; and a square Conv1D comes before the oblong one,
# with which a transpose too few stops before anything can be said about it.
CASES = (
    (nn.Linear, 6, 4, 3, 8.0, (2, 3)),
    (nn.Linear, 5, 5, 3, 1.5, (4,)),
    (nn.Linear, 8, 8, 8, 2.0, ()),
    (Conv1D, 6, 6, 4, 16.0, (1, 5)),
    (Conv1D, 7, 12, 1, 3.0, (2, 2)),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    def update(self) -> Tensor:  # B A, not scaled
        return self.B @ self.A

    def ours(self) -> lora.LoRA:
        made = lora.LoRA(copy.deepcopy(self.base), self.r, self.alpha)
        with torch.no_grad():
            made.A.copy_(self.A)
            made.B.copy_(self.B)
        return made

    def __str__(self):
        d_out, d_in = self.B.shape[0], self.A.shape[1]
        kind = type(self.base).__name__
        return f"{kind} with d_in={d_in}, d_out={d_out}, r={self.r}, alpha={self.alpha}"


def cases() -> Iterator[Case]:
    """Random weights and inputs, the same at every call; a bias that is not zero."""
    draw = torch.Generator().manual_seed(4)

    def normal(*shape) -> Tensor:
        return torch.randn(shape, generator=draw)

    for kind, d_in, d_out, r, alpha, shape in CASES:
        base = kind(d_in, d_out) if kind is nn.Linear else kind(d_out, d_in)
        base.weight.data = normal(*base.weight.shape)
        base.bias.data = normal(d_out)
        base.requires_grad_(False)
        yield Case(base, normal(r, d_in), normal(d_out, r), alpha, normal(*shape, d_in))


def wrong_scales(alpha: float, r: int) -> dict[str, float]:
    """What stands in the place of alpha / r, by the likely mistake."""
    return {
        "not divided by r: the scale is alpha / r": alpha,
        "no scale: multiply B A by alpha / r": 1.0,
        "alpha is missing: the scale is alpha / r, not 1 / r": 1 / r,
        "alpha // r drops what is behind the point: alpha / r": alpha // r,
        "the scale is there twice": (alpha / r) ** 2,
        "r / alpha in the place of alpha / r": r / alpha,
        "alpha / sqrt(r): that is rsLoRA's scale": alpha / math.sqrt(r),
        "the wrong sign: the update is added": -alpha / r,
    }


# 4.1 ----------------------------------------------------------------------------------


@judged
def lora_forward(MyLoRA: type[nn.Module]) -> None:
    """4.1: MyLoRA(base, A, B, alpha)(x) is h = W0 x + (alpha / r) B A x."""
    for case in cases():
        theirs = MyLoRA(
            copy.deepcopy(case.base), case.A.clone(), case.B.clone(), case.alpha
        )
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
    base, x, A, B = case.base, case.x, case.A, case.B
    before, r, scale = base(x), case.r, case.alpha / case.r
    right = x @ A.T @ B.T
    scales = wrong_scales(case.alpha, r) | {
        "divided by d_in: r is A.shape[0]": case.alpha / A.shape[1],
        "divided by d_out: r is A.shape[0]": case.alpha / B.shape[0],
    }
    wrong = {
        "the update alone: W0 x is missing": scale * right,
        **{text: before + wrong * right for text, wrong in scales.items()},
        "W0 x alone: the update is missing": before,
        "the whole of h is scaled, W0 x included": scale * (before + right),
        "W0 x is scaled, in the place of B A x": scale * before + right,
        "W0 x is there twice: self.base(x) is all of it": 2 * before + scale * right,
        "the bias of the base is lost: call self.base(x)": before
        - base.bias
        + scale * right,
        "the bias of the base is there twice": before + base.bias + scale * right,
    }
    if before.shape == x.shape:
        wrong["x itself was added: h has no shortcut"] = x + before + scale * right
        turned = x @ as_matrix(base) + base.bias + scale * right
        wrong["base.weight was used as it is stored: call self.base(x)"] = turned
        wrong["B A was not transposed: x holds rows"] = before + scale * (x @ B @ A)
    if A.shape == B.shape == (r, r):
        swapped = scale * (x @ B.T @ A.T)
        wrong["A and B are swapped: A reads x first"] = before + swapped
        straight = scale * (x @ A @ B)
        wrong["x A B without the transposes: x holds rows"] = before + straight
    return wrong


def _same_gradients(theirs: nn.Module, case: Case) -> None:
    ours = case.ours()
    x, ours_x = (case.x.clone().requires_grad_() for _ in range(2))
    got, expected = theirs(x), ours(ours_x)
    if not got.requires_grad:
        raise Wrong(
            "h has the right values, but no gradient reaches A and B through it. "
            "Likely mistake: .data, .detach() or torch.no_grad() in forward()"
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
                f"h has the right values, but no gradient reaches {name}. Likely "
                f"mistake: {name}.data, {name}.detach() or a copy in forward()"
            )
        close(
            mine,
            wanted,
            what=f"h is right, but not the gradient of {name}, for a {case}",
            mistakes={"x.detach(): the layers below learn through A too": through_W0},
            tolerance=1e-4,
        )


# 4.2 ----------------------------------------------------------------------------------


@judged
def lora_start(my_start: Callable) -> None:
    """4.2: my_start(d_out, d_in, r): A Gaussian of variance 1 / (3 d_in), B = 0."""
    for seed, (d_out, d_in, r) in enumerate(
        [(64, 2048, 32), (1000, 300, 50), (96, 96, 96)]
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found, again = my_start(d_out, d_in, r), my_start(d_out, d_in, r)
        sizes = f"d_out={d_out}, d_in={d_in}, r={r}"
        if not (isinstance(found, tuple | list) and len(found) == 2):
            raise Wrong(
                f"for {sizes}: expected two tensors, A and B, in this order; got "
                f"{type(found).__name__}. Likely mistake: `return A, B` is missing"
            )
        A, B = found
        wanted = [(r, d_in), (d_out, r)]
        shapes = [tuple(getattr(each, "shape", ())) for each in found]
        if shapes == wanted[::-1] != wanted:
            raise Wrong(
                f"for {sizes}: A should come first and B second. Likely mistake: "
                "`return B, A`"
            )
        for name, got, shape in (("A", A, (r, d_in)), ("B", B, (d_out, r))):
            _demand_shape(name, got, shape, sizes)
        _demand_zero(A, B, sizes)
        _demand_gaussian(A, d_out, d_in, r, sizes)
        if torch.equal(A, again[0]):
            raise Wrong(
                f"for {sizes}: two calls gave the same A. Likely mistake: a seed set "
                "inside the function, or no random numbers at all"
            )


def _demand_shape(name, got, shape, sizes) -> None:
    if not isinstance(got, Tensor):
        raise Wrong(f"for {sizes}: {name} is no tensor but a {type(got).__name__}")
    if not got.is_floating_point():
        raise Wrong(f"for {sizes}: {name} holds {got.dtype}, which cannot be trained")
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
    }

    def near(wanted: float) -> bool:
        return math.isfinite(got) and abs(got - wanted) < 0.05 * wanted

    if not near(expected):
        likely = [text for text, std in others.items() if near(std)]
        raise Wrong(
            f"for {sizes}: the entries of A should have a standard deviation of "
            f"{expected:.4g}, and have {got:.4g}."
            + (f" Likely mistake: {likely[0]}" if likely else "")
        )
    if abs(A.mean()) > 5 * expected / A.numel() ** 0.5:
        raise Wrong(
            f"for {sizes}: the mean of A should be near 0, and is {A.mean():.3g}"
        )
    # Of a Gaussian 4.6 % are that far out; of a uniform draw none are.
    far = (A.abs() > 2 * expected).float().mean().item()
    if not 0.035 < far < 0.056:
        raise Wrong(
            f"for {sizes}: A has the right spread, but {far:.1%} of its entries lie "
            "beyond two standard deviations, where a Gaussian has 4.6 %. Likely "
            "mistake: a uniform draw; torch.randn is Gaussian"
        )
    rank = int(torch.linalg.matrix_rank(A))
    if rank < min(A.shape):
        raise Wrong(
            f"for {sizes}: A has rank {rank}, so the update could never have rank {r}. "
            "Likely mistake: the same row repeated"
        )


# 4.3 ----------------------------------------------------------------------------------


def models() -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """{name: (a small random model, last parts of the names to wrap)}"""
    shared = dict(vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    llama = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
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
        plain = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
        return {
            "a Llama": (
                AutoModelForCausalLM.from_config(llama).eval(),
                ("q_proj", "v_proj", "down_proj"),
            ),
            "a GPT-2, whose projections are Conv1D": (
                AutoModelForCausalLM.from_config(gpt2).eval(),
                ("c_attn", "c_proj"),
            ),
            "a bare nn.Sequential": (plain, ("2",)),
            "a model whose names look alike": (nn.ModuleDict(alike), ("q", "k", "v")),
        }


@judged
def lora_inject(my_inject: Callable) -> None:
    """4.3: my_inject(model, targets, r, alpha) freezes the model and wraps targets."""
    for name, (model, targets) in models().items():
        ours = copy.deepcopy(model)
        chosen = {
            n: m
            for n, m in ours.named_modules()
            if n.rpartition(".")[2] in targets and isinstance(m, nn.Linear | Conv1D)
        }
        expected = lora.inject(ours, r=3, alpha=5.0, targets=chosen)
        before = copy.deepcopy(model.state_dict())
        modules = dict(model.named_modules())
        got = my_inject(model, targets, 3, 5.0)
        where = f"{name}, targets={targets}"
        _demand_wrapped(model, modules, expected, got, where)
        _demand_same_adapters(model, ours, modules, where)
        _demand_names(got, expected, where)
        _demand_flags(model, ours, where)
        _demand_untouched(model, before, where)


def _demand_wrapped(model, modules, expected, got, where) -> None:
    found = adapters(model)
    inside = [n for n in found if ".base" in n]
    if inside:
        raise Wrong(
            f"for {where}: {inside[0]} is a LoRA inside a LoRA. Likely mistake: a "
            "module was wrapped twice, or the LoRA was set as .base of the module; it "
            "belongs into the module's parent"
        )
    missing = [n for n in expected if n not in found]
    extra = [n for n in found if n not in expected]
    if missing or extra:
        likely = _wrong_places(model, modules, missing, extra, got)
        raise Wrong(
            f"for {where}: expected a LoRA at {_names(expected)}; missing at "
            f"{_names(missing)}; too many at {_names(extra)}."
            + (f" Likely mistake: {likely}" if likely else "")
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
                "dropout": getattr(each.dropout, "p", 0.0),
            }
            for each in (adapter, wanted)
        )
        off = {key: value for key, value in seen.items() if value != asked[key]}
        if off:
            raise Wrong(
                f"for {where}: expected LoRA(module, r=3, alpha=5.0) at {name}; got "
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
    shown = _names(list(map(str, got))) if isinstance(got, list | tuple) else None
    raise Wrong(
        f"for {where}: expected the names {_names(expected)}, in the model's order; "
        f"got {shown or type(got).__name__}. Likely mistake: {likely}"
    )


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
    raise Wrong(
        f"for {where}: expected that A and B train and nothing else, "
        f"{len(expected)} tensors; got {len(train)} that do. Too many: "
        f"{_names(extra)}; missing: {_names(missing)}. Likely mistake: {likely}"
    )


def _demand_untouched(model, before, where) -> None:
    for name, now in model.state_dict().items():
        plain = name.replace(".base.", ".")
        if plain in before and not torch.equal(now, before[plain]):
            raise Wrong(f"for {where}: the pretrained {plain} was changed")
    for name, adapter in adapters(model).items():
        if adapter.B.any() or not adapter.A.any():
            off = "B is not zero" if adapter.B.any() else "A is zero"
            raise Wrong(
                f"for {where}: the LoRA at {name} does not start as LoRA does: {off}. "
                "LoRA(…) has set both; leave them"
            )


# 4.4 ----------------------------------------------------------------------------------


@judged
def lora_merge(my_merge: Callable) -> None:
    """4.4: my_merge(base, A, B, alpha) puts W0 + (alpha / r) B A into base.weight."""
    for case in cases():
        for dtype in DTYPES:
            _judge_merge(my_merge, case, dtype)


def _judge_merge(my_merge, case: Case, dtype: torch.dtype) -> None:
    base = copy.deepcopy(case.base).to(dtype)
    held, bias, shape = base.weight, base.bias.clone(), base.weight.shape
    exact = _merged(base, case, torch.float64)
    A, B = case.A.clone(), case.B.clone()
    wrong = _wrong_merges(copy.deepcopy(base), case)
    with unchanged(A=A, B=B):
        my_merge(base, A, B, case.alpha)
    weight = base.weight.detach()
    what = f"base.weight after the merge, in {dtype}, for a {case}"
    if weight.dtype != dtype or weight.shape != shape:
        raise Wrong(
            f"{what}: expected {tuple(shape)} in {dtype}; got {tuple(weight.shape)} in "
            f"{weight.dtype}. A merge leaves shape and dtype as they were: cast back"
        )
    if base.bias is None or not torch.equal(base.bias, bias):
        raise Wrong(f"{what}: the bias was changed; it has no part in a merge")
    # Rounded once, an entry is off by half a step of its dtype at most; what comes
    # before is float32, whose sums depend a little on their order.
    step = torch.finfo(dtype).eps
    close(
        weight.float() if dtype != torch.float32 else weight,
        exact.float(),
        what=what,
        mistakes=wrong,
        tolerance=(8 if dtype == torch.float32 else 3) * step,
    )
    off = (weight != exact.to(dtype)).double().mean().item()
    if dtype != torch.float32 and off > 0.1:
        raise Wrong(
            f"{what}: nearly right, but {off:.0%} of the entries are not the exact sum "
            "rounded once. Likely mistake: the product or the sum was computed in "
            f"{dtype}; compute in float32 and cast back at the very end"
        )
    if base.weight.requires_grad and base.weight is held:
        raise Wrong(f"{what}: the weight trains now; a merge leaves it frozen")
    if base.weight is not held:
        raise Wrong(
            f"{what}: the right numbers, but in a new parameter; a module that shares "
            "the weight would keep the old ones. Write into the weight that is there: "
            "base.weight.copy_(…), within torch.no_grad()"
        )


def _merged(base: nn.Module, case: Case, dtype: torch.dtype) -> Tensor:
    """W0 + scale · B A as the base stores it, by the library."""
    made = lora.LoRA(copy.deepcopy(base), case.r, case.alpha)
    with torch.no_grad():
        made.A.copy_(case.A)
        made.B.copy_(case.B)
        return made.merged(dtype)["weight"]


def _wrong_merges(base: nn.Module, case: Case) -> dict[str, Tensor]:
    W0, update = as_matrix(base).float(), case.alpha / case.r * case.update
    wrong = {
        "nothing was written into base.weight": W0,
        "the update alone: W0 is lost": update,
        **{
            text: W0 + scale * case.update
            for text, scale in wrong_scales(case.alpha, case.r).items()
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
    made = left @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])) @ right.T
    thin = torch.randn(6, 1, generator=draw) @ torch.randn(1, 5, generator=draw)
    tried = {
        "made of the singular values 3, 2, 1, 0.5": made,
        "the same, transposed": made.T.contiguous(),
        "random, square": torch.randn(8, 8, generator=draw),
        "random and a thousand times smaller": 1e-3
        * torch.randn(5, 30, generator=draw),
        "a column times a row": thin,
        "the identity, four pieces of one size": torch.eye(4),
    }
    for name, dW in tried.items():
        for held in (0.9, 0.5, 0.99):
            _judge_spectrum(my_spectrum, dW, held, f"{tuple(dW.shape)}, {name}")


def _judge_spectrum(my_spectrum, dW: Tensor, held: float, name: str) -> None:
    given = dW.clone()
    with unchanged(dW=given):
        found = my_spectrum(given, held)
    if not (isinstance(found, tuple | list) and len(found) == 2):
        raise Wrong(
            f"for dW {name}: expected two things, the energies and a rank; got "
            f"{type(found).__name__}. Likely mistake: `return energy, k`"
        )
    energy, k = found
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
        },
        tolerance=1e-4,
    )
    wanted = spectrum.rank_of_energy(dW, held)
    if isinstance(k, Tensor) and k.numel() == 1:
        k = k.item()
    if k != wanted or isinstance(k, bool):
        raise Wrong(
            f"for dW {name}, held={held}: expected the rank {wanted}, got {k!r}. "
            f"The energies are {_few(expected)}. Likely mistake: "
            + _wrong_rank(k, wanted, expected, held)
        )


def _wrong_rank(k, wanted: int, energy: Tensor, held: float) -> str:
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
    return "not the smallest rank whose energy is at least `held`"


def _few(values: Tensor) -> str:
    shown = ", ".join(f"{value:.3f}" for value in values[:6])
    return f"{shown}, …" if len(values) > 6 else shown
