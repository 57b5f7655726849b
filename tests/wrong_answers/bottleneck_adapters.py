"""Wrong answers to the exercises of notebook 11; each must be refused by its check."""

from attacks import first, remembered

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


PLACES = """\
def my_places(model):
    last = {{}}
    for name, kind in pfs.targets.kinds(model).items():
        {inside}
    return {back}
"""
KEEP = "last[pfs.targets.layer_of(model, name), kind] = name"


def places(inside=KEEP, back="list(last.values())"):
    return PLACES.format(inside=inside, back=back)


def named(*parts):
    """By the ends of names."""
    return f"""\
def my_places(model):
    return [n for n, _ in model.named_modules() if n.split(".")[-1] in {parts!r}]
"""


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
        "the last two of each layer": places(
            "last.setdefault(pfs.targets.layer_of(model, name), []).append(name)",
            "[name for names in last.values() for name in names[-2:]]",
        ),
        "a set of names": places(back="list(set(last.values()))"),
        "all zeros": places(back="[0] * len(last)"),
        "an empty list": places(back="[]"),
        "after q_proj": named("q_proj", "down_proj"),
        "up_proj for down_proj": named(
            "o_proj", "up_proj", "c_proj", "out_proj", "fc2"
        ),
        "fc1 for fc2": named("o_proj", "down_proj", "c_proj", "out_proj", "fc1"),
        "a Llama's names alone": named("o_proj", "down_proj"),
        "a GPT-2's missing": named("o_proj", "down_proj", "out_proj", "fc2"),
        "an OPT's missing": named("o_proj", "down_proj", "c_proj"),
        "the MLP alone": places(f"if kind == 'mlp': {KEEP}"),
        "attention alone": places(f"if kind == 'attention': {KEEP}"),
        "the last of each layer": places(
            "last[pfs.targets.layer_of(model, name)] = name"
        ),
        "the last of each kind": places("last[kind] = name"),
        "the first of each sublayer": places(
            "last.setdefault((pfs.targets.layer_of(model, name), kind), name)"
        ),
        "every projection": places(back="list(pfs.targets.kinds(model))"),
        "every projection and the head": places(
            back="list(pfs.targets.projections(model))"
        ),
        "those of the stream's width": places(
            "if min(model.get_submodule(name).weight.shape) == "
            "model.config.hidden_size: last[name] = name"
        ),
        "the layers": places(
            "layer = pfs.targets.layer_of(model, name); last[layer] = layer"
        ),
        "the sublayers": places(
            back="[name.rpartition('.')[0] for name in last.values()]"
        ),
        "last parts": places(
            back="[name.rpartition('.')[2] for name in last.values()]"
        ),
        "the head as well": places(back="[*last.values(), 'lm_head']"),
        "the first layer alone": places(back="list(last.values())[:2]"),
        "the last layer alone": places(back="list(last.values())[-2:]"),
        "from last to first": places(back="list(last.values())[::-1]"),
        "kind by kind": places(back="sorted(last.values(), key=lambda n: 'mlp' in n)"),
        "each one twice": places(back="[n for n in last.values() for _ in range(2)]"),
        "keys and values": places(back="list(last.items())"),
        "the modules": places(back="[model.get_submodule(n) for n in last.values()]"),
        "their number": places(back="len(last)"),
        "one text": places(back="' '.join(last.values())"),
        "an injection": places(
            back="pfs.houlsby.inject(model, m=4)",
        ),
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
            "two layers": places(back="list(last.values())[:4]"),
            "three layers": places(back="list(last.values())[:6]"),
            "the first model for all": remembered("0"),
        },
        "state": {
            "kept by class": remembered("type(model)"),
            "kept in a dictionary outside": (
                "last = {}\n" + places().replace("    last = {}\n", "")
            ),
            "the weights are frozen": first("model.requires_grad_(False)"),
            "the model trains": first("model.train()"),
            "a weight is changed": first("next(model.parameters()).data.mul_(2)"),
            "hooks are left": first(
                "for m in model.modules(): m.register_forward_hook(lambda *a: None)"
            ),
        },
        "inputs": {
            "in the order of the alphabet": places(back="sorted(last.values())"),
            "nine layers": places(
                back="[n for n in last.values() if not any("
                "part.isdigit() and int(part) > 9 for part in n.split('.'))]"
            ),
            "of one digit": places(
                back="[n for n in last.values() if any(len(p) == 1 and p.isdigit()"
                " for p in n.split('.'))]"
            ),
            "what returns the hidden size, first": places(
                "if model.get_submodule(name).weight.shape[0] =="
                " model.config.hidden_size: last.setdefault("
                "(pfs.targets.layer_of(model, name), kind), name)"
            ),
            "narrow to wide": named(
                "o_proj", "down_proj", "c_proj", "out_proj", "fc2", "project_out"
            ),
        },
        "kinds": {
            "a set": places(back="set(last.values())"),
            "names and modules": places(
                back="{n: model.get_submodule(n) for n in last.values()}.items()"
            ),
            "names in pairs": places(
                back="list(zip(list(last.values())[::2], list(last.values())[1::2]))"
            ),
            "bytes": places(back="[n.encode() for n in last.values()]"),
        },
        "randomness": NOTHING_DRAWN,
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
            "from the last to the first": places(
                "last.setdefault((pfs.targets.layer_of(model, name), kind), "
                "[]).append(name)",
                "[names[-1] for names in last.values()]",
            ),
        },
        "state": {
            "by an injection into a copy": (
                "def my_places(model):\n"
                "    import copy\n"
                "    return pfs.houlsby.inject(copy.deepcopy(model), m=2)\n"
            ),
        },
        "inputs": {
            "by the ends of names": """\
def my_places(model):
    ends = ("n.o_proj", "p.down_proj", "n.c_proj", "p.c_proj", "n.out_proj", ".fc2")
    return [name for name, _ in model.named_modules() if name.endswith(ends)]
""",
            "layer by layer": (
                "def my_places(model):\n"
                "    kinds, names = pfs.targets.kinds(model), []\n"
                "    layers = {pfs.targets.layer_of(model, n): 0 for n in kinds}\n"
                "    for layer in layers:\n"
                "        for kind in ('attention', 'mlp'):\n"
                "            names.append([n for n in kinds if kinds[n] == kind\n"
                "                          and n.startswith(layer + '.')][-1])\n"
                "    return names\n"
            ),
        },
        "kinds": {
            "values of a dictionary": places(back="last.values()"),
            "keys of a dictionary": places(back="dict.fromkeys(last.values())"),
            "a tuple": places(back="tuple(last.values())"),
        },
    },
}
