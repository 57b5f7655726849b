"""Wrong answers to the exercises of notebook 04; each must be refused by its check."""

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
