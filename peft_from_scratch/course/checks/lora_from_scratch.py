"""What the exercises of notebook 04, LoRA from scratch, are compared with.

Every check takes the learner's class or function, tries it on several shapes, and
compares with methods/lora.py, which has the same mathematics in other words.
"""

import copy
import math
import numbers
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from ...core.adapter import adapters, as_matrix, as_stored, trainable
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


# What the lesson goes on with while an answer has not passed --------------------------


class LoRA(nn.Module):
    """h = W0 x + (alpha / r) B A x.

    Args
        base   a module: base(x) is W0 x, and the bias where it has one
        A, B   (r, d_in) and (d_out, r), of one dtype; they train
    """

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, alpha: float):
        super().__init__()
        self.base, self.A, self.B = base, nn.Parameter(A), nn.Parameter(B)
        self.scale = alpha / A.shape[0]

    def forward(self, x: Tensor) -> Tensor:  # (…, d_in) -> (…, d_out)
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


def inject(model: nn.Module, targets: Sequence[str], wrap: Callable) -> list[str]:
    """Freeze the model; put wrap(module) in the place of each target; their names."""
    model.requires_grad_(False)
    chosen = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in targets and isinstance(module, nn.Linear | Conv1D)
    }
    for name, module in chosen.items():
        model.set_submodule(name, wrap(module))
    return list(chosen)


@torch.no_grad()
def merge(base: nn.Module, A: Tensor, B: Tensor, alpha: float) -> None:
    """Write W0 + (alpha / r) B A into base.weight, added in float32, rounded once."""
    update = as_stored(base, alpha / A.shape[0] * (B @ A))
    base.weight.copy_(base.weight.float() + update)


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
    """4.2: my_inject(model, targets, wrap) freezes the model and wraps the targets."""
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
        wrap = _Wrap(r, alpha)
        with unchanged(targets=lent):
            got = my_inject(model, lent, wrap)
        where = f"{name}, targets={targets}"
        _demand_wrapped(model, modules, expected, got, where)
        _demand_same_adapters(model, ours, modules, wrap, where)
        _demand_names(got, expected, where)
        _demand_flags(model, ours, where)
        _demand_untouched(model, before, where)
        _demand_rest(rest, _rest(modules), where)
        _demand_own_numbers(model, where)
        returned.append((got, expected, where))
    for got, expected, where in returned:  # one list for all would hold the last names
        _demand_names(got, expected, where)


class _Wrap:
    """What an injection is lent: makes the LoRA of a module, and keeps a list."""

    def __init__(self, r: int, alpha: float):
        self.r, self.alpha = r, alpha
        self.layers: list[lora.LoRA] = []

    def __call__(self, module: nn.Module) -> lora.LoRA:
        self.layers.append(lora.LoRA(module, self.r, self.alpha))
        return self.layers[-1]


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


def _demand_same_adapters(model, ours, modules, wrap, where) -> None:
    for name, wanted in adapters(ours).items():
        adapter = adapters(model)[name]
        if adapter.base is not modules[name]:
            raise Wrong(
                f"for {where}: the LoRA at {name} has another base than the module "
                "that was there. Likely mistake: a copy or a new layer; give the "
                "module itself to wrap"
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
                f"for {where}: expected the LoRA of wrap(module) at {name}; got "
                + ", ".join(f"{key}={value}" for key, value in off.items())
                + ". Likely mistake: a LoRA of your own; wrap(module) makes it"
            )
        if not any(adapter is layer for layer in wrap.layers):
            raise Wrong(
                f"for {where}: the LoRA at {name} is none that wrap returned. Likely "
                "mistake: a LoRA of your own; wrap(module) makes it"
            )
    calls, needed = len(wrap.layers), len(adapters(ours))
    if calls != needed:
        raise Wrong(
            f"for {where}: wrap was called {calls} times for {needed} modules. Likely "
            "mistake: wrap(module) before the name is looked at, or twice; call it "
            "once for each module that is replaced"
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
                "Likely mistake: wrap has set both; leave them"
            )


# 4.3 ----------------------------------------------------------------------------------


@judged
def lora_merge(my_merge: Callable) -> None:
    """4.3: my_merge(base, A, B, alpha) puts W0 + (alpha / r) B A into base.weight."""
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


# 4.4 ----------------------------------------------------------------------------------

BUDGET = 20  # calls of loss_at


@dataclass(frozen=True)
class Search:
    """Test losses of one fine-tuned model, and which share of the gain is wanted.

    curve   loss with all updates cut to rank 1, 2, …, full rank
    losses  of "nothing", "random", "update" and "everything"
    """

    name: str
    curve: tuple[float, ...]
    losses: dict[str, float]
    share: float = 0.95

    @property
    def full_rank(self) -> int:
        return len(self.curve)

    @property
    def wanted(self) -> int | None:
        """The right answer."""
        curve = self.curve
        return smallest_rank(
            lambda k: curve[k - 1], len(curve), self.losses, self.share
        )

    def kept(self, loss: float, *, bottom="nothing", top="update") -> float:
        """Share of the gain from `bottom` to `top` that a loss has; inf without one."""
        gain = self.losses[bottom] - self.losses[top]
        return (self.losses[bottom] - loss) / gain if gain else math.inf

    def __str__(self):
        losses = ", ".join(f"{key} {loss:.4g}" for key, loss in self.losses.items())
        about = f"full_rank={self.full_rank}, share={self.share}"
        return f"{self.name}: {about}, losses {losses}"


def searches() -> Iterator[Search]:
    """Models whose answers differ; then measurements that mean nothing.

    In each, ranks from the wanted one on keep the share and the ranks below do not. The
    losses between them go up and down, as measured ones do.
    """
    yield _searched("like SmolLM2", 2, 576, (1.456, 1.462, 0.0217, 0.0239))
    yield _searched("like tiny", 19, 128, (6.66, 6.69, 0.357, 0.02))
    yield _searched("one direction", 1, 64, (2.0, 2.1, 0.5, 0.4))
    yield _searched("no low rank", 33, 33, (3.0, 3.0, 1.0, 0.5), 0.9)
    yield _searched("a single column", 1, 1, (3.0, 3.2, 1.0, 0.9))
    yield _searched("a high rank", 301, 576, (3.0, 3.1, 1.0, 0.2), 0.9)
    yield _searched("half of the gain", 7, 40, (2.5, 2.6, 0.1, 0.05), 0.5)
    yield _searched("nearly all", 150, 200, (900.0, 910.0, 300.0, 310.0), 0.99)
    yield _searched("small losses", 5, 48, (3.14e-4, 3.2e-4, 1.26e-4, 2e-5))
    yield _searched("random updates destroy", 12, 96, (2.0, 9.0, 1.0, 0.9))
    yield _searched("random updates help a little", 12, 96, (2.0, 1.97, 1.0, 0.9))
    yield _searched("the same, with less wanted", 9, 96, (2.0, 1.9, 1.0, 0.9), 0.85)
    exact = {"nothing": 8.0, "random": 7.5, "update": 4.0, "everything": 2.0}
    yield Search("exactly the share", (7.0, 5.0, 4.5, 4.0), exact, 0.75)
    yield Search("the example", (7.0, 5.0, 4.25, 4.0), exact | {"random": 8.5}, 0.9)
    for name, update, random in (
        ("random updates help as well", 1.0, 1.9),
        ("no gain at all", 2.0, 4.0),
        ("the updates do harm", 2.5, 1.9),
        ("the updates do harm, random ones more", 2.5, 4.0),
    ):
        losses = dict(nothing=2.0, random=random, update=update, everything=0.2)
        yield Search(name, (1.5, 1.2, 1.04, update), losses)
    tie = exact | {"random": 7.0}
    yield Search("random updates keep 1 - share", (7.0, 5.0, 4.5, 4.0), tie, 0.75)


def _searched(
    name: str, wanted: int, full_rank: int, losses: Sequence[float], share=0.95
) -> Search:
    """A curve whose ranks keep the share from `wanted` on; seeded by its numbers."""
    draw = torch.Generator().manual_seed(1000 * full_rank + wanted)
    wiggle = torch.rand(full_rank, generator=draw, dtype=torch.float64).tolist()
    nothing, random, update, everything = losses
    curve = []
    for k, noise in enumerate(wiggle, 1):
        below = share * (k / wanted) ** 0.3 * (0.97 + 0.02 * noise)
        above = share + (1.002 - share) * (0.2 + 0.8 * noise)
        kept = below if k < wanted else above
        curve.append(nothing - kept * (nothing - update))
    curve[-1] = update
    named = dict(nothing=nothing, random=random, update=update, everything=everything)
    return Search(name, tuple(curve), named, share)


def smallest_rank(
    loss_at: Callable, full_rank: int, losses: dict[str, float], share: float = 0.95
) -> int | None:
    """The smallest rank that keeps `share` of the projections' gain, by halving.

    Args
        loss_at  rank, 1 to full_rank -> test loss with all updates cut to that rank
        losses   of "nothing", "random", "update", "everything", nats per token
    Returns  None where the updates gain nothing, or random ones keep 1 - share of it
    """
    nothing = losses["nothing"]
    gain = nothing - losses["update"]
    if gain <= 0 or nothing - losses["random"] >= (1 - share) * gain:
        return None
    low, high = 1, full_rank
    while low < high:
        middle = (low + high) // 2
        if nothing - loss_at(middle) >= share * gain:
            high = middle
        else:
            low = middle + 1
    return low


@judged
def lora_smallest_rank(my_smallest_rank: Callable) -> None:
    """4.4: my_smallest_rank(loss_at, full_rank, losses, share): a rank, or None."""
    cases = list(searches())
    for case in [*cases, *cases[:2]]:  # once more: nothing is kept between calls
        _judge_search(my_smallest_rank, case, case.share)
    for case in (case for case in cases if case.share == 0.95):
        _judge_search(my_smallest_rank, case)


def _judge_search(my_smallest_rank: Callable, case: Search, *share: float) -> None:
    """Without a share, it is to be 0.95."""
    loss_at, calls = _lent(case)
    losses = dict(case.losses)
    with unchanged(losses=losses):
        got = my_smallest_rank(loss_at, case.full_rank, losses, *share)
    _demand_budget(calls, case)
    wanted = case.wanted
    one = isinstance(got, Tensor) and got.numel() == 1
    value = got.item() if one else got
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if value != wanted or not (whole or value is None):
        raise Wrong(
            f"{case}\nexpected {_with_gain(wanted, case)}, got "
            f"{_with_gain(value, case)}. Likely mistake: "
            + _wrong_search(value, wanted, case)
        )


def _lent(case: Search) -> tuple[Callable[[int], float], list[int]]:
    """(loss_at, the ranks that it was asked for)"""
    calls: list[int] = []

    def loss_at(k: int) -> float:
        if not isinstance(k, numbers.Integral) or not 1 <= k <= case.full_rank:
            raise Wrong(
                f"{case}\nloss_at({k!r}) was called: ranks are whole numbers from 1 to "
                f"{case.full_rank}. Likely mistake: an end of the interval that is no "
                "rank, or / in the place of //"
            )
        calls.append(int(k))
        _demand_budget(calls, case)
        return case.curve[k - 1]

    return loss_at, calls


def _demand_budget(calls: list[int], case: Search) -> None:
    if len(calls) > BUDGET:
        asked = ", ".join(map(str, calls[:4]))
        raise Wrong(
            f"{case}\nloss_at was called more than {BUDGET} times, for the ranks "
            f"{asked}, … Likely mistake: one rank after the other is tried. If rank k "
            "keeps the share, so does every larger one: each call can halve what is "
            "left"
        )


def _with_gain(answer, case: Search) -> str:
    """The answer, and what it keeps if it is a rank."""
    is_rank = isinstance(answer, numbers.Integral) and 1 <= answer <= case.full_rank
    if not is_rank or case.losses["update"] >= case.losses["nothing"]:
        return _in_a_line(repr(answer))
    return f"{answer} ({_percent(case.kept(case.curve[answer - 1]))} of the gain)"


def _percent(share: float) -> str:
    return f"{100 * max(share, 0.0):.1f}".removesuffix(".0") + " %"


def _wrong_search(got, wanted: int | None, case: Search) -> str:
    if wanted is None:
        return _should_be_void(case)
    if got is None:
        return _should_not_be_void(case)
    if isinstance(got, bool) or not isinstance(got, numbers.Number):
        return f"a rank is asked for, an int or None, no {type(got).__name__}"
    if got == wanted:
        return f"a whole number is asked for, no {type(got).__name__}"
    for likely, answers in _other_searches(case).items():
        if got in answers:
            return likely
    if got == case.full_rank:
        return "the full rank: it keeps everything, but is it the smallest?"
    if got > wanted and got & (got - 1) == 0:
        return "only powers of two were tried; the answer may lie between two of them"
    if abs(got - wanted) == 1:
        return "one rank off: which end of the interval is known to keep the share?"
    return "this is not the smallest rank that keeps the share of the gain"


def _should_be_void(case: Search) -> str:
    if case.losses["update"] >= case.losses["nothing"]:
        return "the updates lower no loss, so there is no gain to keep: return None"
    random, allowed = _percent(case.kept(case.losses["random"])), 1 - case.share
    return (
        f"the control fails, and was not asserted. Random updates keep {random} of the "
        f"gain, and less than {_percent(allowed)} is allowed: return None"
    )


def _should_not_be_void(case: Search) -> str:
    random, allowed = case.kept(case.losses["random"]), 1 - case.share
    if random < 0 and abs(random) >= allowed:
        return (
            "random updates raise the loss here, so they keep nothing of the gain: "
            "compare without abs(). Or `return` is missing"
        )
    return (
        "`return` is missing, or a valid measurement was taken for void. The updates "
        f"lower the loss, and random ones keep {_percent(random)} of that gain. Less "
        f"than {_percent(allowed)} is allowed"
    )


def _other_searches(case: Search) -> dict[str, set[int]]:
    """{likely mistake: the ranks that it leads to}"""
    losses, share = case.losses, case.share
    nothing, update = losses["nothing"], losses["update"]
    rules = {
        "at least `share`: a rank that keeps exactly as much is enough": lambda loss: (
            case.kept(loss) > share
        ),
        "'everything' has trained embeddings and norms too. The projections' gain goes "
        "from 'nothing' to 'update'": lambda loss: (
            case.kept(loss, top="everything") >= share
        ),
        "the gain was counted from 'random'; the pretrained model is 'nothing'": (
            lambda loss: case.kept(loss, bottom="random") >= share
        ),
        "a share of the pretrained loss was taken, not of the gain": (
            lambda loss: loss <= (1 - share) * nothing
        ),
        "the loss was compared with that of the whole update, not the gain": (
            lambda loss: loss <= update / share
        ),
        "share was ignored: 0.95 is only its default": lambda loss: (
            case.kept(loss) >= 0.95
        ),
    }
    return {
        likely: {_first(rule, case), _halved(rule, case)} - {case.wanted}
        for likely, rule in rules.items()
    }


def _first(rule: Callable[[float], bool], case: Search) -> int | None:
    return next((k for k, loss in enumerate(case.curve, 1) if rule(loss)), None)


def _halved(rule: Callable[[float], bool], case: Search) -> int:
    return bisect_left(case.curve, True, hi=case.full_rank - 1, key=rule) + 1
