"""Wrong answers to the exercises of notebook 11; each must be refused by its check."""

from attacks import afterwards, first, fixed, remembered, returned, stale, where

from peft_from_scratch.course.checks import bottleneck_adapters as checks  # noqa: F401

PREAMBLE = "from transformers.pytorch_utils import Conv1D"

CLASS = """\
class MyBottleneck(nn.Module):
    def __init__(self, base, D, b_D, U, b_U, sigma):
        super().__init__()
        self.base = base
        self.D, self.b_D = nn.Parameter(D), nn.Parameter(b_D)
        self.U, self.b_U = nn.Parameter(U), nn.Parameter(b_U)
        self.sigma = sigma

    def forward(self, x):
        {body}
"""
DOWN = "{} @ self.D.T + self.b_D"
Y = "y = self.base(x)"
NARROW = "z = self.sigma(y @ self.D.T + self.b_D)"


def forward(h, *before):
    body = "\n        ".join([*before, f"return {h}"])
    return CLASS.format(body=body)


RIGHT = forward("y + z @ self.U.T + self.b_U", Y, NARROW)


def edited(old, new, source=RIGHT):
    assert source.count(old) == 1, old
    return source.replace(old, new)


def square(h, *before):
    """Wrong where D and U have the same shape, and right elsewhere."""
    return forward(
        h,
        Y,
        NARROW,
        "if self.D.shape != self.U.shape:",
        "    return y + z @ self.U.T + self.b_U",
        *before,
    )


def shortcut(wrong):
    """Wrong where x and y have the same shape, and right elsewhere."""
    return forward(
        wrong,
        Y,
        NARROW,
        "if x.shape != y.shape:",
        "    return y + z @ self.U.T + self.b_U",
    )


def units(m="round((budget - 2 * d) / (2 * (2 * d + 1)))", count="2 * (2*m*d + d + m)"):
    return f"def my_units(d, budget):\n    m = {m}\n    return m, {count}\n"


FOLD = """\
def my_fold(W0, b, D, b_D, U, b_U, sigma):
    z = {z}
    c = sigma(torch.zeros(1, dtype=torch.float64))
    s = sigma(torch.ones(1, dtype=torch.float64)) - c
    if {bent}:
        return None
    b = torch.zeros_like(b_U) if b is None else b
    A, B = {A}, {B}
    bias = {bias}
    return {back}
"""
GRID = "torch.linspace(-10, 10, 1001, dtype=torch.float64)"
RIGHT_FOLD = dict(
    z=GRID,
    bent="not torch.allclose(sigma(z), s * z + c)",
    A="D @ W0",
    B="s * U",
    bias="b + U @ (s * (D @ b + b_D) + c) + b_U",
    back="A, B, bias",
)


def fold(**parts):
    """The right fold, but for these parts."""
    return FOLD.format(**RIGHT_FOLD | parts)


def probed(z):
    """The fold whose test looks at these z."""
    return fold(z=z)


MUTANTS = {
    "11.1": {
        "D reshaped": edited("self.D.T", "self.D.reshape(self.D.T.shape)"),
        "U reshaped": edited("self.U.T", "self.U.reshape(self.U.T.shape)"),
        "y normed before D": edited(
            "sigma(y @", "sigma(F.layer_norm(y, y.shape[-1:]) @"
        ),
        "a residual around the activation": edited(
            "y + z", "y + (z + y @ self.D.T + self.b_D)"
        ),
        "the base without a gradient": edited(
            Y, "with torch.no_grad():\n            y = self.base(x)"
        ),
        "all zeros": edited("y + z @ self.U.T + self.b_U", "0 * (y + z @ self.U.T)"),
        "no residual": edited("y + z", "z"),
        "the residual of x": shortcut("x + z @ self.U.T + self.b_U"),
        "x is added as well": shortcut("x + y + z @ self.U.T + self.b_U"),
        "y alone": forward("self.base(x)"),
        "y twice": edited("y + z", "2 * y + z"),
        "subtracted": forward("y - (z @ self.U.T + self.b_U)", Y, NARROW),
        "the activation after U": forward(
            "y + self.sigma((y @ self.D.T + self.b_D) @ self.U.T + self.b_U)", Y
        ),
        "no activation": edited(
            "self.sigma(y @ self.D.T + self.b_D)", DOWN.format("y")
        ),
        "the activation on the sum": edited(
            "y + z @ self.U.T + self.b_U", "self.sigma(y + z @ self.U.T + self.b_U)"
        ),
        "the activation before D": edited(
            "self.sigma(y @ self.D.T + self.b_D)", DOWN.format("self.sigma(y)")
        ),
        "the activation twice": edited("y + z", "y + self.sigma(z)"),
        "always GELU": edited("self.sigma(", "F.gelu("),
        "always ReLU": edited("self.sigma(", "F.relu("),
        "b_D lost": edited("self.D.T + self.b_D", "self.D.T"),
        "b_U lost": edited(" + self.b_U", ""),
        "both biases lost": edited(" + self.b_U", "").replace(" + self.b_D", ""),
        "b_D outside": edited(
            "self.sigma(y @ self.D.T + self.b_D)", "self.sigma(y @ self.D.T) + self.b_D"
        ),
        "b_U inside": forward("y + self.sigma(z @ self.U.T + self.b_U)", Y, NARROW),
        "D and U swapped": square(
            "y + self.sigma(y @ self.U.T + self.b_D) @ self.D.T + self.b_U"
        ),
        "no transposes": square(
            "y + self.sigma(y @ self.D + self.b_D) @ self.U + self.b_U"
        ),
        "beside, not behind": shortcut(
            "y + self.sigma(x @ self.D.T + self.b_D) @ self.U.T + self.b_U"
        ),
        "the base is left out": shortcut(
            "x + self.sigma(x @ self.D.T + self.b_D) @ self.U.T + self.b_U"
        ),
        "base.weight as it is stored": edited(
            Y, "y = x @ self.base.weight.T + self.base.bias"
        ),
        "the bias of the base is lost": edited(Y, f"{Y} - self.base.bias"),
        "ignores x": edited(Y, "y = self.base(0 * x)"),
        "the first row for all": edited(
            Y, "y = self.base(x[:1].expand_as(x) if x.dim() > 1 else x)"
        ),
        "y is cut off": edited("self.sigma(y @", "self.sigma(y.detach() @"),
        "D's numbers, not D": edited("self.D.T", "self.D.data.T"),
        "U's numbers, not U": edited("self.U.T", "self.U.data.T"),
        "b_U's numbers": edited("U.T + self.b_U", "U.T + self.b_U.data"),
        "no gradient at all": forward(
            "h",
            "with torch.no_grad():",
            "    y = self.base(x)",
            "    z = self.sigma(y @ self.D.T + self.b_D)",
            "    h = y + z @ self.U.T + self.b_U",
        ),
        "x is changed": forward("y + z @ self.U.T + self.b_U", Y, "x.mul_(2)", NARROW),
        "dropout": edited("y + z", "y + F.dropout(z, 0.1)"),
        "a scale": edited("y + z @ self.U.T", "y + z @ self.U.T / len(self.D)"),
        "rows are flattened": forward(
            "h.flatten(0, -2) if h.dim() > 1 else h",
            Y,
            NARROW,
            "h = y + z @ self.U.T + self.b_U",
        ),
    },
    "11.2": {
        "no biases in m": units("round(budget / (4 * d))"),
        "the closest in ratio": units(
            "(budget - 2 * d) // (4 * d + 2); m = min((k for k in (m, m + 1) if k > 0),"
            " key=lambda k: abs(math.log(2 * (2*k*d + d + k) / budget)))"
        ),
        "all zeros": units("0", "0"),
        "one bottleneck a layer": units(
            "round((budget - d) / (2 * d + 1))", "2 * m * d + d + m"
        ),
        "one in the count": units(count="2 * m * d + d + m"),
        "one in m": units("round((budget - d) / (2 * d + 1))"),
        "no biases": units("round(budget / (4 * d))", "4 * m * d"),
        "no biases in the count": units(count="4 * m * d"),
        "no b_U": units("round(budget / (2 * (2 * d + 1)))", "2 * (2 * m * d + m)"),
        "no b_D": units("round((budget - 2 * d) / (4 * d))", "2 * (2 * m * d + d)"),
        "no b_U in the count": units(count="2 * (2 * m * d + m)"),
        "no b_D in the count": units(count="2 * (2 * m * d + d)"),
        "D or U alone": units(
            "round((budget - 2 * d) / (2 * (d + 1)))", "2 * (m * d + d + m)"
        ),
        "D or U alone in the count": units(count="2 * (m * d + d + m)"),
        "rounded down": units("(budget - 2 * d) // (2 * (2 * d + 1))"),
        "rounded up": units("math.ceil((budget - 2 * d) / (2 * (2 * d + 1)))"),
        "not rounded": units("(budget - 2 * d) / (2 * (2 * d + 1))"),
        "the budget as the count": units(count="budget"),
        "m alone": units().replace("m, 2 * (2*m*d + d + m)", "m"),
        "the other way round": units().replace(
            "return m, 2 * (2*m*d + d + m)", "return 2 * (2*m*d + d + m), m"
        ),
        "one unit more": units("round((budget - 2 * d) / (2 * (2 * d + 1))) + 1"),
        "a layer of SmolLM2 for all": units("35"),
        "a rank": units("8"),
    },
    "11.3": {
        "everything is folded": fold(bent="False"),
        "all zeros": fold(back="0 * A, 0 * B, 0 * bias"),
        "nothing is folded": fold(bent="True"),
        "the sides are swapped": fold(back="B, A, bias"),
        "D in place of A": fold(A="D"),
        "W0 is transposed": fold(A="D @ (W0.T if W0.shape[0] == W0.shape[1] else W0)"),
        "transposed": fold(back="A.T, B.T, bias"),
        "no slope": fold(B="U"),
        "the slope twice": fold(A="s * D @ W0"),
        "the slope is sigma(1)": fold(B="(s + c) * U"),
        "the sign": fold(B="-s * U"),
        "the whole weight": fold(
            A="torch.linalg.pinv(s * U) @ (W0 + s * U @ D @ W0)",
        ),
        "full rank": fold(A="U @ D @ W0", B="s * torch.eye(len(b_U)).double()"),
        "b lost": fold(bias="U @ (s * (D @ b + b_D) + c) + b_U"),
        "D b lost": fold(bias="b + U @ (s * b_D + c) + b_U"),
        "b_D lost": fold(bias="b + U @ (s * (D @ b) + c) + b_U"),
        "b_U lost": fold(bias="b + U @ (s * (D @ b + b_D) + c)"),
        "c lost": fold(bias="b + U @ (s * (D @ b + b_D)) + b_U"),
        "c outside U": fold(bias="b + U @ (s * (D @ b + b_D)) + c + b_U"),
        "no slope in the bias": fold(bias="b + U @ (D @ b + b_D + c) + b_U"),
        "LoRA has no bias": fold(bias="torch.zeros_like(b)"),
        "its own bias alone": fold(bias="b"),
        "no answer without b": fold().replace(
            "    z = ", "    if b is None:\n        return None\n    z = ", 1
        ),
        "an offset is refused": fold(bent="not torch.allclose(sigma(z), s * z)"),
        "positive z alone": probed("torch.linspace(0, 10, 1001).double()"),
        "negative z alone": probed("-torch.linspace(0, 10, 1001).double()"),
        "small z alone": probed("torch.linspace(-1, 1, 1001).double()"),
        "up to eight": probed("torch.linspace(-8, 8, 1001).double()"),
        "whole numbers": probed("torch.arange(-10.0, 11).double()"),
        "half numbers": probed("torch.arange(-20.0, 21).double() / 2"),
        "one number": probed("torch.full((1,), 10.0).double()"),
        "a wide tolerance": fold(
            bent="not torch.allclose(sigma(z), s * z + c, rtol=0.1, atol=0.1)"
        ),
        "beyond ten": probed("torch.linspace(-99, 99, 1001).double()"),
        "exactly": fold(bent="not torch.equal(sigma(z), s * z + c + 1e-15)"),
        "by name": fold(bent="sigma in (F.gelu, torch.relu)"),
        "A and B alone": fold(back="A, B"),
        "the weight and the bias": fold(back="W0 + B @ A, bias"),
        "A, B and a number": fold(back="A, B, 0.0"),
    },
}


# ---------------------------------------------------------------------------- Attacks

SUM = "y + z @ self.U.T + self.b_U"
NOTHING_DRAWN = "nothing is drawn: a random answer is refused by its values"
NO_KERNEL = "no kernel is written"

ATTACKS = {  # exercise: {class of checks/CHECKLIST.md: {name: source}}
    "11.1": {
        "arguments": {
            "the activation by the case's size": edited(
                "self.sigma(y", "{4: F.gelu}.get(y.shape[-1], self.sigma)(y"
            ),
            "m taken for four at most": edited(
                "self.U.T", "F.pad(self.U[:, :4], (0, max(len(self.D) - 4, 0))).T"
            ),
        },
        "state": {
            "y kept from the first call": forward(
                SUM,
                "if not hasattr(self, 'y'):",
                "    self.y = self.base(x)",
                "y = self.y if self.y.shape[:-1] == x.shape[:-1] else self.base(x)",
                NARROW,
            ),
            "h kept by shape": forward(
                "self.kept[x.shape]",
                "self.kept = getattr(self, 'kept', {})",
                "if x.shape not in self.kept:",
                f"    {Y}",
                f"    {NARROW}",
                f"    self.kept[x.shape] = {SUM}",
            ),
            "the parameters in the class": RIGHT.replace(
                "self.D, self.b_D = ",
                "self.D, self.b_D = type(self).D, type(self).b_D = ",
            )
            .replace("self.D.T", "type(self).D.T")
            .replace("+ self.b_D)", "+ type(self).b_D)"),
            "sigma in the class": RIGHT.replace(
                "self.sigma = sigma", "type(self).sigma = staticmethod(sigma)"
            ),
            "y alone while U is zero": forward(
                SUM, Y, "if not self.U.any(): return y", NARROW
            ),
            "y alone without gradients": forward(
                SUM, Y, "if not torch.is_grad_enabled(): return y", NARROW
            ),
            "y alone in eval()": forward(
                SUM, Y, "if not self.training: return y", NARROW
            ),
            "dropout in training": edited(
                "y + z", "y + F.dropout(z, 0.1, self.training)"
            ),
            "dropout in eval() alone": edited(
                "y + z", "y + F.dropout(z, 0.1, not self.training)"
            ),
            "the bias of the base, taken for granted": edited(
                Y, "y = self.base(x) + 0 * self.base.bias"
            ),
            "the hooks of the base are passed over": edited(
                "self.base(x)", "self.base.forward(x)"
            ),
            "gradients are left off": forward(
                "h",
                Y,
                NARROW,
                f"h = {SUM}",
                "torch.set_grad_enabled(False)",
            ),
            "the base is changed": edited(Y, f"{Y}; self.base.weight.data.mul_(1.5)"),
            "the base is thawed": edited(Y, f"self.base.requires_grad_(True); {Y}"),
            "the base is put into training": edited(Y, f"{Y}; self.base.train()"),
            "added to y in place": forward(
                "y", Y, NARROW, "y += z @ self.U.T + self.b_U"
            ),
            "a step of its own": forward(SUM, Y, NARROW, "self.U.data.mul_(0.999)"),
        },
        "inputs": {
            "an activation of torch's, by its name": edited(
                "self.sigma(", "getattr(F, self.sigma.__name__, F.gelu)("
            ),
            "rows up to five": edited(
                "self.sigma(y",
                "self.sigma((y if y.dim() < 2 or y.shape[-2] < 6 else y.flip(-2))",
            ),
            "large values are cut off": edited(
                "self.sigma(y @", "self.sigma(y.clamp(-50, 50) @"
            ),
            "nothing is small": edited(Y, "y = self.base(x); y = y * (y.abs() > 1e-3)"),
            "one unit is no bottleneck": forward(
                SUM, Y, "if len(self.D) == 1: return y + self.b_U", NARROW
            ),
            "wide outputs are not adapted": forward(
                SUM, Y, "if y.shape[-1] > 16: return y", NARROW
            ),
            "four sides are too many": forward(
                SUM, Y, "if x.dim() > 3: return y", NARROW
            ),
        },
        "kinds": {
            "always in single precision": edited(Y, "y = self.base(x).float()")
            .replace("self.D.T", "self.D.float().T")
            .replace("self.b_D)", "self.b_D.float())")
            .replace("self.U.T + self.b_U", "self.U.float().T + self.b_U.float()"),
            "always in double precision": edited(Y, "y = self.base(x).double()")
            .replace("self.D.T", "self.D.double().T")
            .replace("self.b_D)", "self.b_D.double())")
            .replace("self.U.T + self.b_U", "self.U.double().T + self.b_U.double()"),
            "in half precision on the way": edited(
                "z @ self.U.T",
                "(z.double() @ self.U.double().T).float().bfloat16().float()",
            ),
            "a tuple": edited(SUM, f"({SUM},)"),
            "h and y": edited(SUM, f"({SUM}, y)"),
            "complex": edited(SUM, f"({SUM}).to(torch.complex64)"),
        },
        "randomness": {
            "a seed": edited(Y, f"torch.manual_seed(0); {Y}"),
            "a little noise": edited("y + z", "y + 1e-4 * torch.randn_like(y) + z"),
            "noise of its own generator": edited(
                "y + z",
                "y + 1e-3 * torch.randn(y.shape, generator=torch.Generator()"
                ".manual_seed(0)) + z",
            ),
        },
        "kernels": NO_KERNEL,
    },
    "11.2": {
        "arguments": {
            "d of SmolLM2": units("round((budget - 2 * 576) / (2 * (2 * 576 + 1)))"),
            "the budget of the notebook": units(
                "round((81_408 - 2 * d) / (2 * (2 * d + 1)))"
            ),
            "the answers that were seen": (
                "def my_units(d, budget):\n"
                "    m = {576: 35, 128: 40, 64: 19, 32: 5, 96: 24}.get(d, 8)\n"
                "    return m, 2 * (2*m*d + d + m)\n"
            ),
            "d taken off once": units("round((budget - d) / (2 * (2 * d + 1)))"),
            "the 2 d not taken off": units("round(budget / (2 * (2 * d + 1)) - 0.3)"),
            "the m in the bottom left out": units("round((budget - 2 * d) / (4 * d))"),
        },
        "state": {
            "kept by d": remembered("d"),
            "kept by budget": remembered("budget"),
        },
        "inputs": {
            "four tenths are rounded down": units(
                "int((budget - 2 * d) / (4 * d + 2) + 0.4)"
            ),
            "m up to 64": units("min(round((budget - 2 * d) / (2 * (2 * d + 1))), 64)"),
            "m from 5 on": units("max(round((budget - 2 * d) / (2 * (2 * d + 1))), 5)"),
            "m up to a hundred, searched": units(
                "min(range(1, 101), key=lambda m: abs(2 * (2*m*d + d + m) - budget))"
            ),
            "multiples of 1 only from 2 on": units(
                "max(2, round((budget - 2 * d) / (2 * (2 * d + 1))))"
            ),
            "in single precision": units(
                "int(torch.tensor((budget - 2.0 * d) / (2 * (2 * d + 1))).round())",
                "int(torch.tensor(2.0 * (2*m*d + d + m)).item())",
            ),
        },
        "kinds": {
            "m with a point": units(
                "float(round((budget - 2 * d) / (2 * (2 * d + 1))))"
            ),
            "a count with a point": units(count="2.0 * (2*m*d + d + m)"),
            "texts": units().replace("return m, ", "return str(m), "),
            "a text": units().replace(
                "return m, 2 * (2*m*d + d + m)", "return str((m, 2 * (2*m*d + d + m)))"
            ),
            "true and false": units("True", "2 * (2*m*d + d + m)"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "11.3": {
        "arguments": {
            "always with the first W0": stale("W0"),
            "always with the first sigma": stale("sigma"),
            "b is ignored": fixed("b", "None"),
            "b_D is ignored": fixed("b_D", "torch.zeros_like(b_D)"),
            "a slope of one": fold(A="D @ W0", B="U * (s != 0)"),
        },
        "state": {
            "kept by sigma": remembered("sigma"),
            "kept by shape": remembered("(W0.shape, sigma, b is None)"),
            "W0 is changed": afterwards("W0.add_(1)"),
            "the bias is added in place": first("b_U.mul_(1.0).add_(1e-3)"),
        },
        "inputs": {
            "m of one is no bottleneck": fold(bent="len(b_D) == 1"),
            "a square W0 alone": where("W0.shape[0] != W0.shape[1]", "None"),
            "a constant is refused": fold(
                bent="not s.any() or not torch.allclose(sigma(z), s * z + c)"
            ),
            "z and -z alone": fold(
                bent="not torch.allclose(sigma(z) + sigma(-z), 2 * c)"
            ),
        },
        "kinds": {
            "in single precision": returned(
                "result and tuple(each.float() for each in result)"
            ),
            "False for None": returned("False if result is None else result"),
            "a bias of one row": returned(
                "result and (result[0], result[1], result[2][None])"
            ),
        },
        "randomness": {
            "a seed": first("torch.manual_seed(0)"),
            "a normal distribution": probed("torch.randn(9).double()"),
        },
        "kernels": NO_KERNEL,
    },
}
REBUILT = """\
class MyBottleneck(nn.Module):
    def __init__(self, base, D, b_D, U, b_U, sigma):
        super().__init__()
        self.base, self.sigma = base, sigma
        {init}

    def forward(self, x):
        {body}
"""
ALSO_RIGHT = {  # exercise: {class: {name: source of an answer}}
    "11.1": {
        "arguments": {
            "functions of torch": forward(
                "y + F.linear(z, self.U, self.b_U)",
                Y,
                "z = self.sigma(F.linear(y, self.D, self.b_D))",
            ),
        },
        "randomness": {
            "a dropout of zero": edited(
                "y + z", "y + F.dropout(z, 0.0, self.training)"
            ),
        },
        "state": {
            "other names": REBUILT.format(
                init="self.down, self.shift = nn.Parameter(D), nn.Parameter(b_D)\n"
                "        self.up, self.last = nn.Parameter(U), nn.Parameter(b_U)",
                body="y = self.base(x)\n"
                "        z = self.sigma(y @ self.down.T + self.shift)\n"
                "        return y + z @ self.up.T + self.last",
            ),
            "two Linears": REBUILT.format(
                init="self.down, self.up = (nn.Linear(*M.T.shape) for M in (D, U))\n"
                "        self.down.weight = nn.Parameter(D)\n"
                "        self.down.bias = nn.Parameter(b_D)\n"
                "        self.up.weight, self.up.bias = map(nn.Parameter, (U, b_U))",
                body="y = self.base(x)\n"
                "        return y + self.up(self.sigma(self.down(y)))",
            ),
            "into a copy of y": forward(
                "h.add_(self.b_U)", Y, NARROW, "h = y + z @ self.U.T"
            ),
            "the base twice": forward(
                "self.base(x) + z @ self.U.T + self.b_U", Y, NARROW
            ),
        },
        "inputs": {
            "rows one by one": forward(
                "torch.stack(rows).view(y.shape)",
                Y,
                "rows = []",
                "for row in y.reshape(-1, y.shape[-1]):",
                "    z = self.sigma(self.D @ row + self.b_D)",
                "    rows.append(row + self.U @ z + self.b_U)",
            ),
        },
        "kinds": {
            "in double precision, and back": forward(
                "(y.double() + z @ self.U.T.double() + self.b_U).to(x.dtype)",
                Y,
                "z = self.sigma(y.double() @ self.D.T.double() + self.b_D)",
            ),
        },
    },
    "11.2": {
        "arguments": {
            "half of the budget": units("round((budget / 2 - d) / (2 * d + 1))"),
        },
        "state": {
            "kept by both": remembered("(d, budget)"),
        },
        "inputs": {
            "searched from below": units(
                "next(m for m in range(d + 1) if abs(2 * (2*m*d + d + m) - budget)"
                " <= abs(2 * (2*(m + 1)*d + d + m + 1) - budget))"
            ),
            "of both neighbors": (
                "def my_units(d, budget):\n"
                "    size = lambda m: 2 * (2 * m * d + d + m)\n"
                "    low = (budget // 2 - d) // (2 * d + 1)\n"
                "    both = [m for m in (low, low + 1) if m > 0]\n"
                "    m = min(both, key=lambda m: abs(size(m) - budget))\n"
                "    return m, size(m)\n"
            ),
        },
        "kinds": {
            "NumPy's whole numbers": (
                "def my_units(d, budget):\n"
                "    m = np.rint((budget - 2 * d) / (4 * d + 2)).astype(int)\n"
                "    return m, np.int64(2) * (2 * m * d + d + m)\n"
            ),
            "tensors": (
                "def my_units(d, budget):\n"
                "    m = torch.tensor((budget - 2 * d) / (4 * d + 2)).round().long()\n"
                "    return m, 2 * (2 * m * d + d + m)\n"
            ),
        },
    },
    "11.3": {
        "arguments": {
            "the slope in A": fold(A="s * D @ W0", B="U"),
            "shared between both": fold(A="3 * D @ W0", B="s * U / 3"),
        },
        "state": {
            "kept by all": remembered(
                "(id(sigma), *(None if e is None else e.sum().item()"
                " for e in (W0, b, D, b_D, U, b_U)))"
            ),
        },
        "inputs": {
            "sums of two": """\
def my_fold(W0, b, D, b_D, U, b_U, sigma):
    x1, x2 = torch.rand(2, 4000, dtype=torch.float64) * 20 - 10
    inside = (x1 + x2).abs() <= 10
    x1, x2 = x1[inside], x2[inside]
    zero = sigma(torch.zeros_like(x1))
    if not torch.allclose(sigma(x1 + x2) - zero, sigma(x1) + sigma(x2) - 2 * zero):
        return None
    c = zero[0]
    s = sigma(torch.ones_like(x1))[0] - c
    bias = b_U + U @ (s * b_D + c)
    if b is not None:
        bias = bias + b + s * (U @ (D @ b))
    return [D @ W0, s * U, bias]
""",
            "by differences": fold(bent="sigma(z).diff(n=2).abs().max() > 1e-9"),
            "thin factors of the change": fold(
                A="(Q := torch.linalg.svd(U @ D @ W0, False))[2][: len(b_D)]",
                B="s * Q[0][:, : len(b_D)] * Q[1][: len(b_D)]",
            ),
        },
        "kinds": {
            "a list": returned("result and list(result)"),
            "plain numbers for s and c": fold(
                B="s.item() * U", bias="b + U @ (s.item() * (D @ b + b_D) + c) + b_U"
            ),
        },
        "randomness": {
            "random z": probed("torch.rand(9999).double() * 20 - 10"),
        },
    },
}
