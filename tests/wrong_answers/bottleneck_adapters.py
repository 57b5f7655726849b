"""Wrong answers to the exercises of notebook 10; each must be refused by its check."""

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
    "10.1": {
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
    "10.2": {
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
    "10.3": {
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
