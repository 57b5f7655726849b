"""Wrong answers to the exercises of notebook 04; each must be refused by its check."""

from attacks import (
    Attack,
    afterwards,
    every_time_but,
    first,
    fixed,
    remembered,
    returned,
    stale,
    where,
)

from peft_from_scratch.course.checks import lora_from_scratch as checks  # noqa: F401

PREAMBLE = "from transformers.pytorch_utils import Conv1D"

CLASS = """\
class MyLoRA(nn.Module):
    def __init__(self, base, A, B, alpha):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.alpha = alpha

    def forward(self, x):
        {body}
"""


def forward(h, *before):
    body = "\n        ".join([*before, f"return {h}"])
    return CLASS.format(body=body)


BASE, Z = "self.base(x)", "(x @ self.A.T)"
UPDATE = f"{Z} @ self.B.T"
SCALE = "self.alpha / self.A.shape[0]"


def start(A="torch.randn(r, d_in) / math.sqrt(3 * d_in)", B="torch.zeros(d_out, r)"):
    return f"def my_start(d_out, d_in, r):\n    return {A}, {B}\n"


INJECT = """\
def my_inject(model, targets, r, alpha):
    {first}
    names = []
    for name, module in {walk}:
        parent, _, child = name.rpartition(".")
        if {wanted}:
            {inside}
            wrapped = {wrapped}
            {put}
            {keep}
    {last}
    return {back}
"""
PUT = "setattr(model.get_submodule(parent), child, wrapped)"
PROJECTION = "isinstance(module, nn.Linear | Conv1D)"


def inject(
    first="model.requires_grad_(False)",
    walk="list(model.named_modules())",
    wanted=f"child in targets and {PROJECTION}",
    inside="pass",
    wrapped="pfs.lora.LoRA(module, r, alpha)",
    put=PUT,
    keep="names.append(name)",
    last="pass",
    back="names",
):
    return INJECT.format(
        first=first,
        walk=walk,
        wanted=wanted,
        inside=inside,
        wrapped=wrapped,
        put=put,
        keep=keep,
        last=last,
        back=back,
    )


MERGE = """\
def my_merge(base, A, B, alpha):
    update = {update}
    if {turn}:
        update = update.T
    with torch.no_grad():
        {write}
"""


def merge(
    update="alpha / A.shape[0] * (B @ A)",
    turn="isinstance(base, Conv1D)",
    write="base.weight.copy_(base.weight.float() + update)",
):
    return MERGE.format(update=update, turn=turn, write=write)


def spectrum(
    squares="torch.linalg.svdvals(dW).square()",
    energy="squares.cumsum(0) / squares.sum()",
    k="int((energy < held).sum()) + 1",
    back="energy, k",
):
    return f"""\
def my_spectrum(dW, held=0.9):
    squares = {squares}
    energy = {energy}
    k = {k}
    return {back}
"""


MUTANTS = {
    "4.1": {
        "A reshaped": forward(
            f"{BASE} + {SCALE} * (x @ self.A.reshape(self.A.T.shape) @ self.B.T)"
        ),
        "B reshaped": forward(
            f"{BASE} + {SCALE} * ({Z} @ self.B.reshape(self.B.T.shape))"
        ),
        "alpha / d_out": forward(f"{BASE} + self.alpha / len(self.B) * ({UPDATE})"),
        "alpha / r rounded": forward(f"{BASE} + round({SCALE}) * ({UPDATE})"),
        "the base without a gradient": forward(
            f"y + {SCALE} * ({UPDATE})", "with torch.no_grad():", f"    y = {BASE}"
        ),
        "all zeros": forward(f"0 * ({BASE} + {UPDATE})"),
        "no 1 / r": forward(f"{BASE} + self.alpha * ({UPDATE})"),
        "no scale": forward(f"{BASE} + {UPDATE}"),
        "no alpha": forward(f"{BASE} + {UPDATE} / self.A.shape[0]"),
        "alpha / sqrt(r)": forward(
            f"{BASE} + self.alpha / math.sqrt(self.A.shape[0]) * ({UPDATE})"
        ),
        "r / alpha": forward(f"{BASE} + self.A.shape[0] / self.alpha * ({UPDATE})"),
        "alpha / d_in": forward(f"{BASE} + self.alpha / self.A.shape[1] * ({UPDATE})"),
        "alpha // r": forward(f"{BASE} + self.alpha // self.A.shape[0] * ({UPDATE})"),
        "the scale twice": forward(f"{BASE} + ({SCALE}) ** 2 * ({UPDATE})"),
        "always alpha 16": forward(f"{BASE} + 16 / self.A.shape[0] * ({UPDATE})"),
        "h is scaled": forward(f"{SCALE} * ({BASE} + {UPDATE})"),
        "W0 x is scaled": forward(f"{SCALE} * {BASE} + {UPDATE}"),
        "the sign": forward(f"{BASE} - {SCALE} * ({UPDATE})"),
        "A and B swapped": forward(
            f"{BASE} + {SCALE} * (x @ self.B.T @ self.A.T)",
            "if self.A.shape != self.B.shape:",
            f"    return {BASE} + {SCALE} * ({UPDATE})",
        ),
        "x A B, no transposes": forward(
            f"{BASE} + {SCALE} * (x @ self.A @ self.B)",
            "if self.A.shape != self.B.shape:",
            f"    return {BASE} + {SCALE} * ({UPDATE})",
        ),
        "A x summed up": forward(
            f"{BASE} + {SCALE} * ({Z}.sum(-1, True) @ self.B.T[:1])"
        ),
        "ignores A": forward(f"{BASE} + {SCALE} * (x[..., :1] @ self.B.T[:1])"),
        "ignores B": forward(f"{BASE} + {SCALE} * {Z}.sum(-1, True)"),
        "ignores x": forward(f"{BASE} + {SCALE} * (self.B @ self.A).sum(1)"),
        "W0 x alone": forward(BASE),
        "the update alone": forward(f"{SCALE} * ({UPDATE})"),
        "W0 x twice": forward(f"2 * {BASE} + {SCALE} * ({UPDATE})"),
        "after the base": forward(f"{BASE} + {SCALE} * ({BASE} @ self.B @ self.A)"),
        "x itself is added": forward(
            "x + h if x.shape == h.shape else h",
            f"h = {BASE} + {SCALE} * ({UPDATE})",
        ),
        "the bias is lost": forward(
            f"W0x + {SCALE} * ({UPDATE})", f"W0x = {BASE} - self.base.bias"
        ),
        "the bias twice": forward(f"{BASE} + self.base.bias + {SCALE} * ({UPDATE})"),
        "base.weight as it is stored": forward(
            f"x @ self.base.weight.T + self.base.bias + {SCALE} * ({UPDATE})"
        ),
        "F.linear on base.weight": forward(
            "F.linear(x, self.base.weight + update, self.base.bias)",
            f"update = {SCALE} * self.B @ self.A",
        ),
        "B A turned for every layer": forward(
            f"{BASE} + {SCALE} * (x @ (self.B @ self.A))",
            "if len(self.B) != self.A.shape[1]:",
            f"    return {BASE} + {SCALE} * ({UPDATE})",
        ),
        "x is cut off": forward(
            f"{BASE} + {SCALE} * (x.detach() @ self.A.T @ self.B.T)"
        ),
        "x is changed": forward(f"h + {Z} @ self.B.T", f"h = {BASE}", f"x *= {SCALE}"),
        "x is changed, then used": forward(
            f"{BASE} + {Z} @ self.B.T", f"x.mul_({SCALE})"
        ),
        "A and B are cut off": forward(f"{BASE} + {SCALE} * ({UPDATE}).detach()"),
        "no gradient at all": forward(
            "h",
            "with torch.no_grad():",
            f"    h = {BASE} + {SCALE} * ({UPDATE})",
        ),
        "A's numbers, not A": forward(
            f"{BASE} + {SCALE} * (x @ self.A.data.T @ self.B.T)"
        ),
        "B's numbers, not B": forward(f"{BASE} + {SCALE} * ({Z} @ self.B.data.T)"),
        "a nonlinear path": forward(f"{BASE} + {SCALE} * (F.relu{Z} @ self.B.T)"),
        "rows are flattened": forward(
            "h.flatten(0, -2) if h.dim() > 1 else h",
            f"h = {BASE} + {SCALE} * ({UPDATE})",
        ),
        "the first row for all": forward(
            f"{BASE} + {SCALE} * (x[:1] @ self.A.T @ self.B.T)",
            "if x.dim() == 1:",
            f"    return {BASE} + {SCALE} * ({UPDATE})",
        ),
        "dropout": forward(f"{BASE} + {SCALE} * ({UPDATE})", "x = F.dropout(x, 0.1)"),
    },
    "4.2": {
        "He's": start("nn.init.kaiming_normal_(torch.empty(r, d_in))"),
        "Xavier's": start("nn.init.xavier_normal_(torch.empty(r, d_in))"),
        "peft's, which is uniform": start(
            "nn.init.kaiming_uniform_(torch.empty(r, d_in), a=5**0.5)"
        ),
        "Laplace's": start(
            "torch.distributions.Laplace(0.0, (6 * d_in) ** -0.5).sample((r, d_in))"
        ),
        "all zeros": start(A="torch.zeros(r, d_in)"),
        "B random": start(B="torch.randn(d_out, r) / math.sqrt(3 * r)"),
        "B nearly zero": start(B="1e-6 * torch.randn(d_out, r)"),
        "B in the place of A": start("torch.zeros(r, d_in)", "torch.randn(d_out, r)"),
        "B, A": (
            "def my_start(d_out, d_in, r):\n"
            "    A = torch.randn(r, d_in) / math.sqrt(3 * d_in)\n"
            "    return torch.zeros(d_out, r), A\n"
        ),
        "variance one": start("torch.randn(r, d_in)"),
        "the variance, not its root": start("torch.randn(r, d_in) / (3 * d_in)"),
        "no 3": start("torch.randn(r, d_in) / math.sqrt(d_in)"),
        "the 3 outside of the root": start("torch.randn(r, d_in) / 3 / d_in**0.5"),
        "3 / d_in": start("torch.randn(r, d_in) * math.sqrt(3 / d_in)"),
        "the width of d_out": start("torch.randn(r, d_in) / math.sqrt(3 * d_out)"),
        "r for d_in": start("torch.randn(r, d_in) / math.sqrt(3 * r)"),
        "of both sides": start("torch.randn(r, d_in) * math.sqrt(2 / (r + d_in))"),
        "a fixed size": start("0.02 * torch.randn(r, d_in)"),
        "multiplied": start("torch.randn(r, d_in) * math.sqrt(3 * d_in)"),
        "uniform, of the variance": start(
            "(2 * torch.rand(r, d_in) - 1) / math.sqrt(d_in)"
        ),
        "uniform, of the bound": start(
            "(2 * torch.rand(r, d_in) - 1) / math.sqrt(3 * d_in)"
        ),
        "never below zero": start("torch.rand(r, d_in) / math.sqrt(3 * d_in)"),
        "its absolute value": start("torch.randn(r, d_in).abs() / math.sqrt(3 * d_in)"),
        "A as wide as d_out": start("torch.randn(r, d_out) / math.sqrt(3 * d_in)"),
        "A turned": start("torch.randn(d_in, r) / math.sqrt(3 * d_in)"),
        "B turned": start(B="torch.zeros(r, d_out)"),
        "B as tall as d_in": start(B="torch.zeros(d_in, r)"),
        "A square": start("torch.randn(d_in, d_in) / math.sqrt(3 * d_in)"),
        "one row repeated": start(
            "torch.randn(1, d_in).repeat(r, 1) / math.sqrt(3 * d_in)"
        ),
        "one column repeated": start(
            "torch.randn(r, 1).repeat(1, d_in) / math.sqrt(3 * d_in)"
        ),
        "signs": start("torch.randn(r, d_in).sign() / math.sqrt(3 * d_in)"),
        "two of a kind": start(
            "torch.randn(r, d_in // 2).repeat(1, 2) / math.sqrt(3 * d_in)"
        ),
        "half of it zero": start(
            "torch.randn(r, d_in) * (torch.arange(d_in) % 2) / math.sqrt(1.5 * d_in)"
        ),
        "the same every time": start(
            "torch.randn(r, d_in, generator=torch.Generator().manual_seed(0))"
            " / math.sqrt(3 * d_in)"
        ),
        "a seed in it": (
            "def my_start(d_out, d_in, r):\n"
            "    torch.manual_seed(0)\n"
            "    A = torch.randn(r, d_in) / math.sqrt(3 * d_in)\n"
            "    return A, torch.zeros(d_out, r)\n"
        ),
        "whole numbers": start("torch.randn(r, d_in).long()"),
        "A alone": (
            "def my_start(d_out, d_in, r):\n"
            "    return torch.randn(r, d_in) / math.sqrt(3 * d_in)\n"
        ),
    },
    "4.3": {
        "trains what is named A or B": inject(
            first="pass",
            last="for n, p in model.named_parameters():\n"
            "        p.requires_grad = n.endswith(('.A', '.B'))",
        ),
        "never at the top": inject(
            wanted=f"parent and child in targets and {PROJECTION}"
        ),
        "frozen by no_grad alone": inject(first="torch.no_grad()"),
        "all zeros": inject(
            first="model.requires_grad_(False)\n"
            "    for parameter in model.parameters():\n"
            "        parameter.zero_()"
        ),
        "A zero too": inject(put=f"wrapped.A.data.zero_()\n            {PUT}"),
        "B random": inject(put=f"wrapped.B.data.normal_()\n            {PUT}"),
        "nothing is frozen": inject(first="pass"),
        "freezes last": inject(first="pass", last="model.requires_grad_(False)"),
        "freezes what it wraps alone": inject(
            first="pass", inside="module.requires_grad_(False)"
        ),
        "freezes weights, not biases": inject(
            first="[m.weight.requires_grad_(False) for m in model.modules()"
            " if hasattr(m, 'weight')]"
        ),
        "freezes by the name lora": inject(
            first="pass",
            last="[p.requires_grad_('lora' in n) for n, p in model.named_parameters()]",
        ),
        "B alone trains": inject(put=f"wrapped.A.requires_grad_(False); {PUT}"),
        "biases train": inject(
            last="[p.requires_grad_() for n, p in model.named_parameters()"
            " if n.endswith('bias')]"
        ),
        "misses Conv1D": inject(
            wanted="child in targets and isinstance(module, nn.Linear)"
        ),
        "misses Linear": inject(
            wanted="child in targets and isinstance(module, Conv1D)"
        ),
        "all that is linear": inject(wanted=PROJECTION),
        "a target within the whole name": inject(
            wanted=f"any(t in name for t in targets) and {PROJECTION}"
        ),
        "a target within the last part": inject(
            wanted=f"any(t in child for t in targets) and {PROJECTION}"
        ),
        "a target within the end": inject(
            wanted=f"name.endswith(tuple(targets)) and {PROJECTION}"
        ),
        "any part of the name": inject(
            wanted=f"set(name.split('.')) & set(targets) and {PROJECTION}"
        ),
        "whatever bears the name": inject(
            wanted="child in targets and hasattr(module, 'weight')"
        ),
        "the head as well": inject(
            wanted=f"child in (*targets, 'lm_head') and {PROJECTION}"
        ),
        "the first layer alone": inject(
            wanted=f"child in targets and {PROJECTION} and '.1.' not in name"
        ),
        "the first match alone": inject(
            wanted=f"child in targets and {PROJECTION} and not names"
        ),
        "the first target alone": inject(
            wanted=f"child == targets[0] and {PROJECTION}"
        ),
        "the layers' names alone": inject(
            wanted=f"child in targets and '.' in name and {PROJECTION}"
        ),
        "never put in": inject(put="pass"),
        "put beside it": inject(
            put="setattr(model.get_submodule(parent), child + '_lora', wrapped)"
        ),
        "put into the model": inject(put="setattr(model, child, wrapped)"),
        "put in as .base": inject(put="module.base = wrapped"),
        "alpha left out": inject(wrapped="pfs.lora.LoRA(module, r)"),
        "r and alpha swapped": inject(wrapped="pfs.lora.LoRA(module, int(alpha), r)"),
        "rank 1 always": inject(wrapped="pfs.lora.LoRA(module, 1, alpha)"),
        "rsLoRA": inject(wrapped="pfs.lora.LoRA(module, r, alpha, rslora=True)"),
        "dropout": inject(wrapped="pfs.lora.LoRA(module, r, alpha, dropout=0.5)"),
        "one LoRA for all": inject(
            first="model.requires_grad_(False)\n    same = {}",
            wrapped="same.setdefault(child, pfs.lora.LoRA(module, r, alpha))",
        ),
        "a new layer inside": inject(
            wrapped="pfs.lora.LoRA(nn.Linear(*module.weight.shape), r, alpha)"
        ),
        "a LoRA in a LoRA": inject(
            wrapped="pfs.lora.LoRA(pfs.lora.LoRA(module, r, alpha).base, r, alpha)",
            put=f"wrapped.base = pfs.lora.LoRA(module, r, alpha)\n            {PUT}",
        ),
        "a copy is changed": inject(
            first="import copy\n    model = copy.deepcopy(model).requires_grad_(False)"
        ),
        "the count": inject(back="len(names)"),
        "the model": inject(back="model"),
        "the last parts": inject(keep="names.append(child)"),
        "names with .base": inject(keep="names.append(name + '.base')"),
        "names by target": inject(back="sorted(names, key=lambda n: n[-4:])"),
        "names from last to first": inject(
            walk="reversed(list(model.named_modules()))"
        ),
        "half of the names": inject(back="names[: len(names) // 2]"),
        "a set": inject(back="set(names)"),
        "a text": inject(back="', '.join(names)"),
    },
    "4.4": {
        "reshaped, not turned": merge(
            turn="False",
            write="base.weight.copy_(base.weight.float()"
            " + update.reshape(base.weight.shape))",
        ),
        "alpha / d_out": merge("alpha / B.shape[0] * (B @ A)"),
        "into a copy": merge(write="base.weight.detach().float().add_(update)"),
        "all zeros": merge(write="base.weight.zero_()"),
        "nothing is written": merge(write="base.weight + update"),
        "returned, not written": merge(write="return base.weight.float() + update"),
        "no transpose": merge(turn="False"),
        "always a transpose": merge(turn="base.weight.shape == update.T.shape"),
        "a transpose for Linear": merge(
            turn="isinstance(base, nn.Linear)"
            " and base.weight.shape == update.T.shape"
            " or isinstance(base, Conv1D) and base.weight.shape != update.shape"
        ),
        "a transpose where the shapes need one": merge(
            turn="base.weight.shape != update.shape"
        ),
        "Linear alone": merge(
            write="isinstance(base, nn.Linear)"
            " and base.weight.copy_(base.weight.float() + update)"
        ),
        "A B": merge("alpha / A.shape[0] * (A @ B if A.shape == B.shape else B @ A)"),
        "A transposed B transposed": merge(
            "alpha / A.shape[0] * ((A.T @ B.T).T if A.shape != B.shape else A.T @ B.T)"
        ),
        "no 1 / r": merge("alpha * (B @ A)"),
        "no scale": merge("B @ A"),
        "no alpha": merge("B @ A / A.shape[0]"),
        "alpha / sqrt(r)": merge("alpha / math.sqrt(A.shape[0]) * (B @ A)"),
        "divided by d_in": merge("alpha / A.shape[1] * (B @ A)"),
        "the scale twice": merge("(alpha / A.shape[0]) ** 2 * (B @ A)"),
        "subtracted": merge(write="base.weight.copy_(base.weight.float() - update)"),
        "merged twice": merge(
            write="base.weight.copy_(base.weight.float() + 2 * update)"
        ),
        "W0 is lost": merge(write="base.weight.copy_(update)"),
        "ignores A": merge("alpha / A.shape[0] * (B @ torch.ones_like(A))"),
        "rounds twice": merge(write="base.weight += update.to(base.weight.dtype)"),
        "rounds W0 first": merge(
            write="base.weight.copy_(base.weight.half().float() + update)"
        ),
        "the gradient stays on": merge(
            write="base.weight.requires_grad_().copy_(base.weight.float() + update)"
        ),
        "rounds A and B": merge(
            "alpha / A.shape[0] * (B.to(base.weight.dtype) @ A.to(base.weight.dtype))"
        ),
        "rounds the product": merge(
            "alpha / A.shape[0] * (B @ A).to(base.weight.dtype)"
        ),
        "rounds by way of bfloat16": merge(
            write="base.weight.copy_((base.weight.float() + update).bfloat16())"
        ),
        "rounds down": merge(
            write="base.weight.copy_((base.weight.float() + update)"
            " * (1 - torch.finfo(base.weight.dtype).eps))"
        ),
        "float32 afterwards": merge(
            write="base.weight = nn.Parameter(base.weight.float() + update)"
        ),
        "the whole module in float32": merge(
            write="base.float().weight.copy_(base.weight + update)"
        ),
        "another parameter": merge(
            write="base.weight = nn.Parameter("
            "(base.weight.float() + update).to(base.weight.dtype))"
        ),
        "the other orientation": merge(
            write="base.weight.data = (base.weight.float() + update)"
            ".to(base.weight.dtype).T"
        ),
        "the bias is scaled": merge(
            write="base.weight.copy_(base.weight.float() + update); base.bias *= 2"
        ),
        "the bias is dropped": merge(
            write="base.weight.copy_(base.weight.float() + update); base.bias = None"
        ),
        "B is scaled in place": merge("B.mul_(alpha / A.shape[0]) @ A"),
        "one row too few": merge(
            write="base.weight[1:] = (base.weight.float() + update)[1:]"
            ".to(base.weight.dtype)"
        ),
    },
    "4.5": {
        "all zeros": spectrum(energy="0 * squares", k="0"),
        "s, not squared": spectrum("torch.linalg.svdvals(dW)"),
        "squared twice": spectrum("torch.linalg.svdvals(dW).pow(4)"),
        "no cumsum": spectrum(energy="squares / squares.sum()"),
        "no total": spectrum(energy="squares.cumsum(0)"),
        "divided by the largest": spectrum(energy="squares.cumsum(0) / squares[0]"),
        "a mean": spectrum(energy="squares.cumsum(0) / squares.mean()"),
        "the root": spectrum(energy="(squares.cumsum(0) / squares.sum()).sqrt()"),
        "the smallest first": spectrum("torch.linalg.svdvals(dW).square().flip(0)"),
        "from rank zero": spectrum(
            energy="(squares.cumsum(0) - squares) / squares.sum()"
        ),
        "what is lost": spectrum(energy="1 - squares.cumsum(0) / squares.sum()"),
        "eigenvalues": spectrum(
            "(torch.linalg.eigvals(dW).abs().square().sort(descending=True)[0]"
            " if dW.shape[0] == dW.shape[1] else torch.linalg.svdvals(dW).square())"
        ),
        "eigenvalues of the symmetric part": spectrum(
            "torch.linalg.svdvals((dW + dW.T) if dW.shape[0] == dW.shape[1]"
            " else dW).square()"
        ),
        "the sides of the matrix": spectrum("dW.square().sum(0)"),
        "the sides, sorted": spectrum(
            "dW.square().sum(0).sort(descending=True)[0][: min(dW.shape)]"
        ),
        "padded to the larger side": spectrum(
            "F.pad(torch.linalg.svdvals(dW).square(),"
            " (0, max(dW.shape) - min(dW.shape)))"
        ),
        "one short": spectrum(back="energy[:-1], k"),
        "a zero in front": spectrum(back="F.pad(energy, (1, 0)), k"),
        "percent": spectrum(back="100 * energy, k"),
        "the index": spectrum(k="int((energy < held).sum())"),
        "one too many": spectrum(k="int((energy < held).sum()) + 2"),
        "counts those above": spectrum(k="int((energy >= held).sum())"),
        "the full rank": spectrum(k="len(energy)"),
        "the numerical rank": spectrum(k="int(torch.linalg.matrix_rank(dW))"),
        "nine tenths always": spectrum(k="int((energy < 0.9).sum()) + 1"),
        "above, never at": spectrum(k="int((energy <= held).sum()) + 1"),
        "held by the root": spectrum(k="int((energy.sqrt() < held).sum()) + 1"),
        "held by s": spectrum(
            k="int((squares.sqrt().cumsum(0) / squares.sqrt().sum() < held).sum()) + 1"
        ),
        "the first alone": spectrum(k="1"),
        "the share of the full rank": spectrum(
            k="(int((energy < held).sum()) + 1) / len(energy)"
        ),
        "the two swapped": spectrum(back="k, energy"),
        "the rank alone": spectrum(back="k"),
        "the energy alone": spectrum(back="energy"),
        "a list": spectrum(back="energy.tolist(), k"),
        "dW is divided in place": spectrum(
            "torch.linalg.svdvals(dW.div_(dW.norm())).square()"
        ),
        "a column too few": spectrum("torch.linalg.svdvals(dW[:, :-1]).square()"),
    },
}

NOTHING_DRAWN = "nothing is drawn: a random answer is refused by its values"
NO_KERNEL = "no kernel is written"

CACHED = """\
class MyLoRA(nn.Module):
    {of_class}

    def __init__(self, base, A, B, alpha):
        super().__init__()
        self.base, self.A, self.B = base, nn.Parameter(A), nn.Parameter(B)
        self.alpha, self.update = alpha, None
        {init}

    def forward(self, x):
        {forward}
"""


def cached(forward, of_class="pass", init="pass"):
    return CACHED.format(of_class=of_class, init=init, forward=forward)


ATTACKS = {  # the right answer but for one class of input; see attacks.py
    "4.1": {
        "arguments": {
            "alpha of the first layer": stale("alpha", "__init__"),
            "alpha is 8": fixed("alpha", "8.0", "__init__"),
            "A of the first layer": stale("A", "__init__"),
            "B of the first layer": stale("B", "__init__"),
            "base of the first layer": stale("base", "__init__"),
            "x of the first call": stale("x", "forward"),
            "r is 3": forward(f"{BASE} + self.alpha / 3 * ({UPDATE})"),
        },
        "state": {
            "the hooks of the base are passed over": forward(
                f"self.base.forward(x) + {SCALE} * ({UPDATE})"
            ),
            "the update of the first call": cached(
                "if self.update is None:\n"
                "            self.update = self.alpha / len(self.A) * self.B @ self.A\n"
                "        return self.base(x) + x @ self.update.T"
            ),
            "the numbers of the first call": cached(
                "if self.update is None:\n"
                "            self.update = self.A.detach().clone()\n"
                "        A = self.A + (self.update - self.A).detach()\n"
                "        return self.base(x) + self.alpha / len(A) * x @ A.T @ self.B.T"
            ),
            "alpha of the class": cached(
                "return self.base(x) + MyLoRA.shared / len(self.A)"
                " * (x @ self.A.T @ self.B.T)",
                init="MyLoRA.shared = alpha",
            ),
            "base of the class": cached(
                "return MyLoRA.shared(x) + self.alpha / len(self.A)"
                " * (x @ self.A.T @ self.B.T)",
                init="MyLoRA.shared = base",
            ),
            "A and B of the class": cached(
                "A, B = MyLoRA.shared\n"
                "        return self.base(x) + self.alpha / len(A) * (x @ A.T @ B.T)",
                init="MyLoRA.shared = self.A, self.B",
            ),
            "kept by shape": remembered("x.shape", "forward"),
            "the scale shrinks at each call": first(
                "self.alpha = self.alpha * 0.999", method="forward"
            ),
            "B zero, no path": forward(
                f"{BASE} + {SCALE} * ({UPDATE}) if self.B.any() else {BASE}"
            ),
            "nothing in eval()": forward(
                f"{BASE} + {SCALE} * ({UPDATE}) if self.training else {BASE}"
            ),
            "nothing in no_grad()": forward(
                f"{BASE} + {SCALE} * ({UPDATE}) if torch.is_grad_enabled() else {BASE}"
            ),
            "a base without a bias fails": forward(
                f"{BASE} + 0 * self.base.bias + {SCALE} * ({UPDATE})"
            ),
            "the base's weight is read": forward(
                f"{BASE} + 0 * self.base.weight.sum() + {SCALE} * ({UPDATE})"
            ),
            "the base is thawed": afterwards(
                "self.base.requires_grad_(True)", method="forward"
            ),
            "A and B are frozen": afterwards(
                "self.A.requires_grad_(False)", method="forward"
            ),
            "the base sleeps": afterwards("self.base.eval()", method="forward"),
            "A shrinks": afterwards("self.A.data.mul_(0.999)", method="forward"),
            "the base moves": afterwards(
                "next(self.base.parameters()).data.add_(0.001)", method="forward"
            ),
            "x moves": afterwards("x.data.add_(0.001)", method="forward"),
            "autograd left off": afterwards(
                "torch.set_grad_enabled(False)", method="forward"
            ),
        },
        "inputs": {
            "r is the smaller side": forward(
                f"{BASE} + self.alpha / min(self.A.shape) * ({UPDATE})"
            ),
            "columns where x is as tall as wide": forward(
                f"{BASE} + {SCALE} * ({UPDATE})",
                "if x.dim() == 2 and x.shape[0] == self.A.shape[1]:",
                f"    return {BASE} + {SCALE} * (self.B @ self.A @ x).T",
            ),
            "small updates are none": forward(
                f"{BASE} + {SCALE} * ({UPDATE}) * (({UPDATE}).abs() > 1e-4)"
            ),
            "x is clamped": first("x = x.clamp(-50, 50)", method="forward"),
            "four sides are too many": where("x.ndim > 3", "self.base(x)", "forward"),
            "no more than eight wide": where(
                "x.shape[-1] > 30", "self.base(x)", "forward"
            ),
            "one entry wide": where("x.shape[-1] == 1", "self.base(x)", "forward"),
            "a long row": where("x.numel() > 400", "self.base(x)", "forward"),
        },
        "kinds": {
            "float32": returned("result.float()", "forward"),
            "float64": returned("result.double()", "forward"),
            "by way of float32": returned("result.float().to(x.dtype)", "forward"),
            "by way of bfloat16": returned("result.bfloat16().to(x.dtype)", "forward"),
            "with the base's": returned("(result, self.base(x))", "forward"),
            "a parameter": returned("nn.Parameter(result)", "forward"),
        },
        "randomness": {
            "dropout in train()": forward(
                f"{BASE} + {SCALE} * (F.dropout(x, 0.05, self.training)"
                " @ self.A.T @ self.B.T)"
            ),
            "a little noise": returned(
                "result + 1e-3 * result.std() * torch.randn_like(result)", "forward"
            ),
        },
        "kernels": NO_KERNEL,
    },
    "4.2": {
        "arguments": {
            "r of the first call": stale("r"),
            "d_in of the first call": stale("d_in"),
            "d_out of the first call": stale("d_out"),
            "the width of the notebook": start(
                "torch.randn(r, d_in) / math.sqrt(3 * 576)"
            ),
        },
        "state": {
            "one B for all": start(
                B="_zeros.setdefault((d_out, r), torch.zeros(d_out, r))"
            )
            + "\n_zeros = {}\n",
            "A of the call before": Attack(
                after="_all.append(result[0])\n"
                "same = [A for A in _all if A.shape == result[0].shape]\n"
                "result = same[-1 if len(same) % 3 else 0], result[1]",
                outside="_all = []",
            ),
            "no longer after eight": every_time_but(9, "(0 * result[0], result[1])"),
            "a seed is left": afterwards("torch.manual_seed(r)"),
            "float64 left on": afterwards("torch.set_default_dtype(torch.float64)"),
            "autograd left off": afterwards("torch.set_grad_enabled(False)"),
        },
        "inputs": {
            "rank one is zero": where("r == 1", "(0 * result[0], result[1])"),
            "one input": where("d_in == 1", "(0 * result[0], result[1])"),
            "wide ones are uniform": where(
                "d_in > 4000", "(torch.rand(r, d_in), result[1])"
            ),
            "r above d_in": where("r > d_in", "(result[0][:d_in], result[1])"),
        },
        "kinds": {
            "float64": returned("(result[0].double(), result[1].double())"),
            "A in bfloat16": returned("(result[0].bfloat16(), result[1])"),
            "B in half precision": returned("(result[0], result[1].half())"),
            "B is one number": returned("(result[0], torch.zeros(1).expand(d_out, r))"),
            "B is one row": returned("(result[0], torch.zeros(1, r).expand(d_out, r))"),
            "arrays": returned("tuple(x.numpy() for x in result)"),
            "no B": returned("(result[0], None)"),
            "a dict": returned("dict(A=result[0], B=result[1])"),
        },
        "randomness": {
            "a few are four times as large": start(
                "torch.randn(r, d_in) * (1 + 3 * (torch.rand(r, d_in) < 0.01))"
                " / math.sqrt(3 * d_in) / 1.075"
            ),
            "a generator of its own": start(
                "torch.randn(r, d_in, generator=_own) / math.sqrt(3 * d_in)"
            )
            + "\n_own = torch.Generator().manual_seed(0)\n",
            "a generator made anew": start(
                "torch.randn(r, d_in, generator=torch.Generator().manual_seed(r))"
                " / math.sqrt(3 * d_in)"
            ),
            "another seed each time": Attack(
                before="state = torch.get_rng_state()\ntorch.manual_seed(next(_seeds))",
                after="torch.set_rng_state(state)",
                outside="import itertools\n_seeds = itertools.count()",
            ),
            "numpy's": start(
                "torch.tensor(np.random.randn(r, d_in)).float() / math.sqrt(3 * d_in)"
            ),
            "one row, rolled": returned(
                "(torch.stack([result[0][0].roll(i) for i in range(r)]), result[1])"
            ),
            "its own mirror": returned(
                "(torch.cat([result[0][:, : d_in // 2],"
                " -result[0][:, : d_in - d_in // 2]], 1), result[1])"
            ),
            "no tails": returned(
                "(result[0].clamp(-2.6 / (3 * d_in) ** 0.5, 2.6 / (3 * d_in) ** 0.5),"
                " result[1])"
            ),
            "sorted": returned("(result[0].sort(1).values, result[1])"),
            "rows of one size": returned(
                "(result[0] / result[0].norm(dim=1, keepdim=True) / 3**0.5, result[1])"
            ),
            "a sum of uniform draws": start(
                "(torch.rand(3, r, d_in).sum(0) - 1.5) * 2 / math.sqrt(3 * d_in)"
            ),
        },
        "kernels": NO_KERNEL,
    },
    "4.3": {
        "arguments": {
            "r is 3": fixed("r", "3"),
            "alpha is 5": fixed("alpha", "5.0"),
            "alpha is 16": fixed("alpha", "16"),
            "r of the first call": stale("r"),
            "alpha of the first call": stale("alpha"),
            "alpha is twice r": fixed("alpha", "alpha if alpha == 5.0 else 2 * r"),
            "targets of the first call": stale("targets"),
            "model of the first call": stale("model"),
        },
        "state": {
            "names of all models": Attack(
                after="_names.extend(result)\nresult = _names", outside="_names = []"
            ),
            "one list for all": Attack(
                after="_names[:] = result\nresult = _names", outside="_names = []"
            ),
            "the model trains": afterwards("model.train()"),
            "the model sleeps": afterwards("model.eval()"),
            "the projections sleep": inject(inside="module.eval()"),
            "a hook is left": inject(
                inside="module.register_forward_hook(lambda *_: None)"
            ),
            "buffers are lost": afterwards(
                "for m in model.modules():\n"
                "    for name in list(m._buffers):\n"
                "        m._buffers[name] = None"
            ),
            "a seed is left": afterwards("torch.manual_seed(0)"),
            "autograd left off": afterwards("torch.set_grad_enabled(False)"),
            "the targets are used up": afterwards(
                "targets.clear() if isinstance(targets, list) else None"
            ),
        },
        "inputs": {
            "a name is a part of a target": inject(
                wanted=f"child and child in ' '.join(targets) and {PROJECTION}"
            ),
            "in alphabetical order within a parent": inject(
                back="sorted(names, key=lambda n:"
                " ([*where].index(n.rpartition('.')[0]), n))",
                first="where = dict(model.named_modules())\n"
                "    model.requires_grad_(False)",
            ),
            "names in the order of the alphabet": returned("sorted(result)"),
            "ten layers at most": inject(
                wanted=f"child in targets and {PROJECTION} and '.1' + '0.' not in name"
            ),
            "numbers of one digit": inject(
                wanted=f"child in targets and {PROJECTION} and"
                " not re.search(r'\\.\\d\\d', name)",
                first="import re\n    model.requires_grad_(False)",
            ),
            "with a bias alone": inject(
                wanted=f"child in targets and {PROJECTION} and"
                " (module.bias is not None or 'proj' in name)"
            ),
            "square ones alone once": inject(
                wanted=f"child in targets and {PROJECTION} and"
                " min(module.weight.shape) > 1 and max(module.weight.shape) < 60"
            ),
            "targets are a tuple": inject(
                wanted=f"child in targets and {PROJECTION}"
                " and isinstance(targets, tuple)"
            ),
            "what trained before still trains": inject(
                first="before = [p for p in model.parameters()]\n"
                "    model.requires_grad_(False)\n"
                "    [p.requires_grad_() for p in before if p.ndim == 3]"
            ),
            "no deeper than six": inject(
                wanted=f"child in targets and {PROJECTION} and name.count('.') < 5"
            ),
        },
        "kinds": {
            "a generator": returned("iter(result)"),
            "a dict": returned("dict.fromkeys(result)"),
            "an array": returned("np.array(result)"),
            "pairs": returned("[(name, None) for name in result]"),
            "the model too": returned("(model, result)"),
            "lines": returned("'\\n'.join(result)"),
            "float64 A and B": inject(
                keep="names.append(name)\n            wrapped.A.data ="
                " wrapped.A.data.double()"
            ),
            "the base in bfloat16": inject(inside="module.to(torch.bfloat16)"),
        },
        "randomness": {
            "one seed for all layers": inject(
                wrapped="seeded(module)",
            ).replace(
                "    names = []\n",
                "    names = []\n"
                "    def seeded(module):\n"
                "        with torch.random.fork_rng():\n"
                "            torch.manual_seed(0)\n"
                "            return pfs.lora.LoRA(module, r, alpha)\n",
                1,
            ),
            "A of the first": inject(
                keep="names.append(name)\n"
                "            wrapped.A.data = A.setdefault(wrapped.A.shape,"
                " wrapped.A.data).clone()",
                first="A = {}\n    model.requires_grad_(False)",
            ),
            "one A for all": inject(
                keep="names.append(name)\n"
                "            wrapped.A.data = A.setdefault(wrapped.A.shape,"
                " wrapped.A.data)",
                first="A = {}\n    model.requires_grad_(False)",
            ),
        },
        "kernels": NO_KERNEL,
    },
    "4.4": {
        "arguments": {
            "alpha of the first call": stale("alpha"),
            "alpha is 16": fixed("alpha", "16.0"),
            "A of the first call": stale("A"),
            "B of the first call": stale("B"),
            "base of the first call": stale("base"),
        },
        "state": {
            "once a module": Attack(
                before="if base in _merged:\n    return None\n_merged.append(base)",
                outside="_merged = []",
            ),
            "trained ones alone": first(
                "if not B.any():\n    base.weight.data.zero_()"
            ),
            "a graph stays": merge(
                write="base.weight.requires_grad_(False).copy_("
                "base.weight.float() + update)"
            ).replace("with torch.no_grad()", "if True"),
            "the weight trains": afterwards("base.weight.requires_grad_(True)"),
            "the bias trains": afterwards(
                "base.bias.requires_grad_(True) if base.bias is not None else None"
            ),
            "a bias is needed": afterwards("base.bias.data.add_(0)"),
            "A is used up": afterwards("A.data.zero_()"),
            "B is frozen": afterwards("B.requires_grad_(False)"),
            "base changes its mode": afterwards("base.train(not base.training)"),
            "a hook is left": afterwards(
                "base.register_forward_pre_hook(lambda *_: None)"
            ),
            "a buffer is left": afterwards("base.register_buffer('merged', A)"),
            "autograd left off": afterwards("torch.set_grad_enabled(False)"),
        },
        "inputs": {
            "r is the smaller side": merge("alpha / min(A.shape) * (B @ A)"),
            "turned where the memory is": merge(turn="not base.weight.is_contiguous()"),
            "rank one": where("len(A) == 1", "base.weight.data.add_(1e-3)"),
            "small updates are none": merge(
                update="alpha / A.shape[0] * (B @ A) * ((B @ A).abs() > 1e-4)"
            ),
            "large ones are clamped": merge(
                update="(alpha / A.shape[0] * (B @ A)).clamp(-500, 500)"
            ),
            "narrow ones are left": where(
                "1 in base.weight.shape", "base.weight.data.sub_(1)"
            ),
            "wide ones are left": where(
                "max(base.weight.shape) > 100", "base.weight.data.sub_(1)"
            ),
        },
        "kinds": {
            "float64 becomes float32": afterwards(
                "base.weight.data = base.weight.data.float() if"
                " base.weight.dtype == torch.float64 else base.weight.data"
            ),
            "bfloat16 becomes half": afterwards(
                "base.weight.data = base.weight.data.half() if"
                " base.weight.dtype == torch.bfloat16 else base.weight.data"
            ),
            "a tensor, no parameter": afterwards(
                "W = base.weight.data\ndel base.weight\nbase.weight = W"
            ),
            "rounded by way of half": merge(
                write="base.weight.copy_((base.weight.float() + update).half())"
            ),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "4.5": {
        "arguments": {
            "held is 0.9": fixed("held", "0.9"),
            "held of the first call": stale("held"),
            "dW of the first call": stale("dW"),
            "another default": "def my_spectrum(dW, held=0.95):\n"
            "    squares = torch.linalg.svdvals(dW).square()\n"
            "    energy = squares.cumsum(0) / squares.sum()\n"
            "    return energy, int((energy < held).sum()) + 1\n",
            "no default": "def my_spectrum(dW, held):\n"
            "    squares = torch.linalg.svdvals(dW).square()\n"
            "    energy = squares.cumsum(0) / squares.sum()\n"
            "    return energy, int((energy < held).sum()) + 1\n",
        },
        "state": {
            "kept by shape": remembered("(dW.shape, held)"),
            "energy kept by shape": Attack(
                after="energy = _kept.setdefault(dW.shape, result[0])\n"
                "result = energy, int((energy < held).sum()) + 1",
                outside="_kept = {}",
            ),
            "dW is normed": afterwards("dW.data.div_(dW.norm())"),
            "dW is asked for gradients": afterwards("dW.requires_grad_(True)"),
            "float64 left on": afterwards("torch.set_default_dtype(torch.float64)"),
            "autograd is needed": first("assert not dW.requires_grad"),
        },
        "inputs": {
            "four digits": spectrum(back="energy.round(decimals=4), k"),
            "two digits for the rank": spectrum(
                k="int((energy.round(decimals=2) < held).sum()) + 1"
            ),
            "without the mean": spectrum("torch.linalg.svdvals(dW - dW.mean(0)) ** 2"),
            "small ones are no rank": spectrum(
                "(lambda s: (s * (s > 1e-4)).square())(torch.linalg.svdvals(dW))"
            ),
            "a small number below": spectrum(
                energy="squares.cumsum(0) / (squares.sum() + 1e-6)"
            ),
            "ten at most": returned("(result[0][:10], min(result[1], 10))"),
            "ranks up to eight": returned("(result[0], min(result[1], 8))"),
            "one row": where("1 in dW.shape", "(result[0], 0)"),
            "large ones overflow": spectrum(
                "torch.linalg.svdvals(dW).half().square().float()"
            ),
            "by the middle of two": returned(
                "(result[0], max(result[1], 1 + (held > .98)))"
            ),
        },
        "kinds": {
            "a float": returned("(result[0], float(result[1]))"),
            "an array": returned("(result[0].numpy(), result[1])"),
            "half precision": returned("(result[0].half(), result[1])"),
            "a text": returned("(result[0], str(result[1]))"),
            "a float tensor": returned("(result[0], torch.tensor(float(result[1])))"),
            "no rank": returned("(result[0], None)"),
            "a column": returned("(result[0][:, None], result[1])"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
}

ALSO_RIGHT = {
    "4.1": {
        "arguments": {
            "r of B": forward(f"{BASE} + self.alpha / self.B.shape[1] * ({UPDATE})")
        },
        "state": {
            "the scale in __init__": cached(
                "return self.base(x) + self.scale * x @ self.A.T @ self.B.T",
                init="self.scale = alpha / len(A)",
            ),
            "the update anew in each call": cached(
                "self.update = self.alpha / len(self.A) * self.B @ self.A\n"
                "        return self.base(x) + x @ self.update.T"
            ),
        },
        "inputs": {
            "in place, onto the base's output": forward(
                "y", f"y = {BASE}", f"y += {SCALE} * ({UPDATE})"
            ),
            "einsum": forward(
                f"{BASE} + {SCALE} * torch.einsum"
                "('...i,ri,or->...o', x, self.A, self.B)"
            ),
            "matmul": forward(
                f"{BASE} + torch.matmul(x.matmul(self.A.mT), self.B.mT) * ({SCALE})"
            ),
        },
        "kinds": {
            "in the base's dtype": returned("result.to(self.base(x).dtype)", "forward")
        },
        "randomness": {
            "dropout of nothing": forward(
                f"{BASE} + {SCALE} * (F.dropout(x, 0.0) @ self.A.T @ self.B.T)"
            )
        },
    },
    "4.2": {
        "arguments": {
            "by keyword": start("torch.randn(size=(r, d_in)) * (3 * d_in) ** -0.5")
        },
        "state": {"zeros_like": start(B="torch.zeros_like(torch.empty(d_out, r))")},
        "inputs": {
            "initialized in place": start(
                "nn.init.normal_(torch.empty(r, d_in), std=(3 * d_in) ** -0.5)",
                "nn.init.zeros_(torch.empty(d_out, r))",
            ),
            "a loop": start(
                "torch.stack([torch.randn(d_in) for _ in range(r)]) / (3 * d_in) ** 0.5"
            ),
        },
        "kinds": {
            "a list": returned("[*result]"),
            "a parameter": returned("tuple(map(nn.Parameter, result))"),
        },
        "randomness": {
            "B first": "def my_start(d_out, d_in, r):\n"
            "    B = torch.empty(d_out, r)\n"
            "    nn.init.zeros_(B)\n"
            "    A = nn.init.normal_(torch.empty(r, d_in), 0, (3 * d_in) ** -0.5)\n"
            "    return A, B\n",
            "a distribution": start(
                "torch.distributions.Normal(0.0, (3 * d_in) ** -0.5).sample((r, d_in))"
            ),
        },
    },
    "4.3": {
        "arguments": {
            "by keyword": inject(wrapped="pfs.lora.LoRA(base=module, alpha=alpha, r=r)")
        },
        "state": {
            "two walks": inject(
                walk="[*model.named_modules()]",
                first="[p.requires_grad_(False) for p in model.parameters()]",
            )
        },
        "inputs": {
            "a set of targets": inject(
                first="targets = set(targets)\n    model.requires_grad_(False)"
            )
        },
        "kinds": {
            "a tuple": returned("tuple(result)"),
            "a list": returned("[*result]"),
        },
        "randomness": {
            "from last to first": inject(
                walk="list(model.named_modules())[::-1]", back="names[::-1]"
            )
        },
    },
    "4.4": {
        "arguments": {"r of B": merge(update="alpha / B.shape[1] * (B @ A)")},
        "state": {
            "detached": merge(update="alpha / len(A) * (B.detach() @ A.detach())"),
            "all in no_grad": """\
@torch.no_grad()
def my_merge(base, A, B, alpha):
    update = alpha / len(A) * (B @ A)
    update = update.T if type(base) is Conv1D else update
    base.weight.copy_(update + base.weight)
    return base
""",
        },
        "inputs": {
            "onto the data": merge(write="base.weight.data += update"),
            "through a view": merge(
                turn="False",
                write="W = base.weight.T if isinstance(base, Conv1D) else base.weight\n"
                "        W[:] = W.float() + update",
            ),
            "in float64": merge(
                update="alpha / A.shape[0] * (B.double() @ A.double())",
                write="base.weight.copy_(base.weight.double() + update)",
            ),
        },
        "kinds": {
            "cast by hand": merge(
                write="base.weight.data.copy_("
                "(base.weight.float() + update).to(base.weight.dtype))"
            )
        },
    },
    "4.5": {
        "arguments": {"by keyword": spectrum("torch.linalg.svdvals(A=dW) ** 2")},
        "state": {
            "detached": spectrum("torch.linalg.svdvals(dW.detach().clone()).square()")
        },
        "inputs": {
            "of the Gram matrix": spectrum(
                "torch.linalg.eigvalsh((dW @ dW.T if len(dW) < dW.shape[1] else"
                " dW.T @ dW).double()).flip(0).clamp(min=0)"
            ),
            "searched": spectrum(k="torch.searchsorted(energy, held).item() + 1"),
            "normed first": spectrum(
                "(lambda s: (s / s.max()).square())(torch.linalg.svdvals(dW))"
            ),
        },
        "kinds": {
            "a list": returned("[*result]"),
            "a tensor of one": returned("(result[0], torch.tensor(result[1]))"),
            "numpy's": returned("(result[0], np.int64(result[1]))"),
        },
    },
}
