"""Notebook 04's checks: what the common mistakes are told, and what else is right.

That every mutant is refused is tested in test_exercises.py. Here stands what a refusal
should say, and answers that differ from the notebook's and are as good.
"""

import build
from exercise_checks import checked
from try_answers import lesson

LESSON = lesson(build.FOLDER / "04_lora_from_scratch.py")

TOLD = {  # exercise: {mutant: what its learner must read}
    "4.1": {
        "all zeros": "all entries are zero",
        "no 1 / r": "not divided by r",
        "no scale": "no scale: multiply",
        "no alpha": "alpha is missing",
        "alpha // r": "drops what is behind the point",
        "alpha / d_in": "divided by d_in",
        "the sign": "the wrong sign",
        "A and B swapped": "A and B are swapped",
        "x A B, no transposes": "without the transposes",
        "W0 x alone": "the update is missing",
        "the update alone": "W0 x is missing",
        "W0 x twice": "W0 x is there twice",
        "h is scaled": "the whole of h is scaled",
        "the bias is lost": "the bias of the base is lost",
        "base.weight as it is stored": "call self.base(x)",
        "x is changed": "x itself was changed",
        "A and B are cut off": "no gradient reaches A",
        "x is cut off": "the layers below learn through A too",
    },
    "4.2": {
        "all zeros": "both are zero",
        "B random": "B is random too",
        "B in the place of A": "the wrong way round",
        "B, A": "`return B, A`",
        "A turned": "the two sides are swapped",
        "variance one": "has a standard deviation of 1",
        "the variance, not its root": "take its root",
        "no 3": "the 3 is missing",
        "the width of d_out": "d_out in the place of d_in",
        "uniform, of the variance": "a uniform draw",
        "a seed in it": "two calls gave the same A",
        "A alone": "`return A, B` is missing",
    },
    "4.3": {
        "freezes last": "freeze it first",
        "freezes what it wraps alone": "the base was left trainable",
        "nothing is frozen": "the base was left trainable",
        "B alone trains": "A or B was frozen",
        "misses Conv1D": "Conv1D was left out",
        "a target within the last part": "not to have one in it",
        "never put in": "setattr",
        "put into the model": "setattr is for the module's parent",
        "put in as .base": "a LoRA inside a LoRA",
        "the first layer alone": "only the first layer was walked",
        "one LoRA for all": "make a new one for each module",
        "alpha left out": "got alpha=16",
        "the count": "a list of names is needed, not a int",
        "names from last to first": "another order",
        "nothing at all": "no module was found",
    },
    "4.4": {
        "nothing is written": "nothing was written",
        "returned, not written": "nothing was written",
        "no transpose": "the transpose is missing: Conv1D",
        "a transpose where the shapes need one": "the transpose is missing: Conv1D",
        "always a transpose": "a transpose too many: nn.Linear",
        "no 1 / r": "not divided by r",
        "subtracted": "the wrong sign",
        "merged twice": "added twice",
        "W0 is lost": "W0 is lost",
        "rounds twice": "cast back at the very end",
        "rounds A and B": "cast back at the very end",
        "another parameter": "Write into the weight that is there",
        "the bias is scaled": "the bias was changed",
    },
    "4.5": {
        "s, not squared": "s in the place of s squared",
        "no cumsum": "not summed up",
        "no total": "not divided by the total",
        "from rank zero": "index 0 is rank 1",
        "the smallest first": "the smallest come first",
        "the index": "one too few: index 0",
        "counts those above": "the ranks at or above",
        "above, never at": "holds exactly as much is enough",
        "one too many": "one too many",
    },
}
FORWARD = """\
class MyLoRA(nn.Module):
    def __init__(self, base, A, B, alpha):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scale = alpha / B.shape[1]

    def forward(self, x):
        {}
"""
START = "def my_start(d_out, d_in, r):\n    {}\n"
INJECT = "def my_inject(model, targets, r, alpha):\n    {}\n"
MERGE = "def my_merge(base, A, B, alpha):\n    {}\n"
SPECTRUM = "def my_spectrum(dW, held=0.9):\n    {}\n"
RIGHT = {  # exercise: {name: another right answer}
    "4.1": {
        "F.linear": FORWARD.format(
            "return self.base(x) + F.linear(F.linear(x, self.A), self.B) * self.scale"
        ),
        "einsum": FORWARD.format(
            "z = torch.einsum('...i,ri->...r', x, self.A)\n"
            "        z = torch.einsum('...r,or->...o', z, self.B)\n"
            "        return torch.add(self.base(x), z, alpha=self.scale)"
        ),
        "the whole of B A": FORWARD.format(
            "return self.scale * (x @ (self.B @ self.A).T) + self.base(x)"
        ),
        "columns": FORWARD.format(
            "columns = x.reshape(-1, x.shape[-1]).T\n"
            "        update = (self.B @ (self.A @ columns)).T * self.scale\n"
            "        return self.base(x) + update.reshape(*x.shape[:-1], -1)"
        ),
        "into the base's own output": FORWARD.format(
            "h = self.base(x)\n"
            "        h += self.scale * (x @ self.A.T @ self.B.T)\n"
            "        return h"
        ),
    },
    "4.2": {
        "normal_": START.format(
            "A = torch.empty(r, d_in).normal_(std=(3 * d_in) ** -0.5)\n"
            "    return A, torch.empty(d_out, r).zero_()"
        ),
        "torch.normal, a list": START.format(
            "A = torch.normal(0.0, math.sqrt(1 / (3 * d_in)), (r, d_in))\n"
            "    return [A, torch.zeros((d_out, r))]"
        ),
        "parameters": START.format(
            "A, B = nn.Parameter(torch.empty(r, d_in)), torch.zeros(d_out, r)\n"
            "    nn.init.normal_(A, std=1 / math.sqrt(3 * d_in))\n"
            "    return A, nn.Parameter(B)"
        ),
        "turned, and turned back": START.format(
            "A = (torch.randn(d_in, r) / d_in**0.5 / 3**0.5).T\n"
            "    return A, torch.zeros(r, d_out).T"
        ),
    },
    "4.3": {
        "no list before the walk": INJECT.format(
            "for parameter in model.parameters():\n"
            "        parameter.requires_grad = False\n"
            "    names = []\n"
            "    for name, module in model.named_modules():\n"
            "        *parents, last = name.split('.')\n"
            "        if last in targets and isinstance(module, (nn.Linear, Conv1D)):\n"
            "            new = pfs.lora.LoRA(module, r=r, alpha=alpha)\n"
            "            setattr(model.get_submodule('.'.join(parents)), last, new)\n"
            "            names.append(name)\n"
            "    return names"
        ),
        "child by child": INJECT.format(
            "model.requires_grad_(False)\n"
            "    def walk(parent, before):\n"
            "        for last, child in list(parent.named_children()):\n"
            "            if last in targets and type(child) in (nn.Linear, Conv1D):\n"
            "                setattr(parent, last, pfs.lora.LoRA(child, r, alpha))\n"
            "                yield before + last\n"
            "            else:\n"
            "                yield from walk(child, f'{before}{last}.')\n"
            "    return list(walk(model, ''))"
        ),
        "frozen after, A and B thawed": INJECT.format(
            "chosen = [(n, m) for n, m in model.named_modules()\n"
            "        if any(n == t or n.endswith('.' + t) for t in targets)\n"
            "        and isinstance(m, (nn.Linear, Conv1D))]\n"
            "    for n, m in chosen:\n"
            "        model.set_submodule(n, pfs.lora.LoRA(m, r, alpha))\n"
            "    model.requires_grad_(False)\n"
            "    for n, m in chosen:\n"
            "        new = model.get_submodule(n)\n"
            "        new.A.requires_grad_(), new.B.requires_grad_()\n"
            "    return tuple(n for n, _ in chosen)"
        ),
    },
    "4.4": {
        "in float64, by .data": MERGE.format(
            "dW = B.double() @ A.double() * alpha / B.shape[1]\n"
            "    if not isinstance(base, nn.Linear):\n"
            "        dW = dW.T\n"
            "    W = base.weight.data\n"
            "    base.weight.data = (W.double() + dW).to(W.dtype)"
        ),
        "einsum, the scale on B": MERGE.format(
            "turn = 'or,ri->io' if isinstance(base, Conv1D) else 'or,ri->oi'\n"
            "    dW = torch.einsum(turn, alpha / len(A) * B, A)\n"
            "    with torch.no_grad():\n"
            "        base.weight[:] = torch.add(dW, base.weight)"
        ),
        "added in place where that is exact": MERGE.format(
            "dW = alpha / len(A) * (B @ A)\n"
            "    dW = dW.t() if type(base).__name__ == 'Conv1D' else dW\n"
            "    with torch.no_grad():\n"
            "        base.weight += dW"
        ),
    },
    "4.5": {
        "a loop": SPECTRUM.format(
            "s = torch.linalg.svdvals(dW)\n"
            "    total = float((s ** 2).sum())\n"
            "    energy = torch.tensor([float((s[: i + 1] ** 2).sum()) / total\n"
            "        for i in range(len(s))])\n"
            "    for k, each in enumerate(energy.tolist(), 1):\n"
            "        if each >= held:\n"
            "            return energy, k"
        ),
        "searchsorted, float64": SPECTRUM.format(
            "_, s, _ = torch.linalg.svd(dW.double(), full_matrices=False)\n"
            "    energy = torch.cumsum(s * s, 0) / dW.double().norm() ** 2\n"
            "    return energy, torch.searchsorted(energy, held) + 1"
        ),
        "argmax, a list": SPECTRUM.format(
            "squares = torch.linalg.svd(dW).S.pow(2)\n"
            "    energy = torch.cumsum(squares / squares.sum(), dim=0)\n"
            "    return [energy, (energy >= held).int().argmax().item() + 1]"
        ),
        "eigenvalues of the smaller square": SPECTRUM.format(
            "square = dW @ dW.T if dW.shape[0] < dW.shape[1] else dW.T @ dW\n"
            "    squares = torch.linalg.eigvalsh(square).clamp(min=0).flip(0)\n"
            "    energy = squares.cumsum(0) / squares.sum()\n"
            "    return energy, 1 + sum(each < held for each in energy.tolist())"
        ),
    },
}


(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)
