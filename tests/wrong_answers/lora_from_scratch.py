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


INJECT = """\
def my_inject(model, targets, wrap):
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
    wrapped="wrap(module)",
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


SEARCH = """\
def my_smallest_rank(loss_at, full_rank, losses, share={default}):
    nothing = losses["{bottom}"]
    gain = nothing - losses["{top}"]
    if {void}:
        return {none}
    low, high = {ends}
    while low < high:
        middle = {middle}
        if {keeps}:
            high = {down}
        else:
            low = {up}
    return {back}
"""
CONTROL = "nothing - losses['random'] >= (1 - share) * gain"


def search(
    default="0.95",
    bottom="nothing",
    top="update",
    void=f"gain <= 0 or {CONTROL}",
    none="None",
    ends="1, full_rank",
    middle="(low + high) // 2",
    keeps="nothing - loss_at(middle) >= share * gain",
    down="middle",
    up="middle + 1",
    back="low",
):
    return SEARCH.format(
        default=default,
        bottom=bottom,
        top=top,
        void=void,
        none=none,
        ends=ends,
        middle=middle,
        keeps=keeps,
        down=down,
        up=up,
        back=back,
    )


LINEAR = """\
def my_smallest_rank(loss_at, full_rank, losses, share=0.95):
    nothing = losses["nothing"]
    gain = nothing - losses["update"]
    if gain <= 0 or nothing - losses["random"] >= (1 - share) * gain:
        return None
    for k in {ranks}:
        if nothing - loss_at(k) {at_least} share * gain:
            return k
"""


def linear(ranks="range(1, full_rank + 1)", at_least=">="):
    return LINEAR.format(ranks=ranks, at_least=at_least)


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
        "its own LoRA": inject(wrapped="pfs.lora.LoRA(module)"),
        "its own LoRA of that rank": inject(
            wrapped="pfs.lora.LoRA(module, wrap(module).A.shape[0], 5.0)"
        ),
        "its own LoRA, just like it": inject(
            wrapped="(lambda w: pfs.lora.LoRA(module, w.A.shape[0], w.alpha))"
            "(wrap(module))"
        ),
        "wrap itself": inject(wrapped="wrap", put="vars(module)['lora'] = wrapped"),
        "the name is wrapped": inject(wrapped="wrap(name)"),
        "a copy is wrapped": inject(
            first="import copy\n    model.requires_grad_(False)",
            wrapped="wrap(copy.deepcopy(module))",
        ),
        "wrapped twice": inject(inside="wrap(module)"),
        "everything is wrapped, to be sure": inject(
            walk="[(n, m) for n, m in model.named_modules()"
            f" if not {PROJECTION.replace('module', 'm')} or wrap(m)]"
        ),
        "one LoRA for all": inject(
            first="model.requires_grad_(False)\n    same = {}",
            wrapped="same.get(child) or same.setdefault(child, wrap(module))",
        ),
        "a new layer inside": inject(wrapped="wrap(nn.Linear(*module.weight.shape))"),
        "a LoRA in a LoRA": inject(
            put=f"wrapped.base = wrap(module)\n            {PUT}",
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
    "4.3": {
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
    "4.4": {
        "all zeros": search(back="0"),
        "the control is not asserted": search(void="gain <= 0"),
        "no gain is not noticed": search(void=CONTROL),
        "nothing is asserted": search(void="False"),
        "the update is its own control": search(
            void="gain <= 0 or nothing - losses['update'] >= (1 - share) * gain"
        ),
        "the control may gain nothing": search(
            void="gain <= 0 or losses['random'] < nothing"
        ),
        "the control may keep the share": search(
            void="gain <= 0 or nothing - losses['random'] >= share * gain"
        ),
        "the control may keep a twentieth": search(
            void="gain <= 0 or nothing - losses['random'] >= 0.05 * gain"
        ),
        "the control may keep just as much": search(
            void="gain <= 0 or nothing - losses['random'] > (1 - share) * gain"
        ),
        "the control without its sign": search(
            void="gain <= 0 or abs(nothing - losses['random']) >= (1 - share) * gain"
        ),
        "the gain of everything": search(top="everything"),
        "the gain from random": search(
            bottom="random", void="losses['nothing'] <= losses['update']"
        ),
        "a share of the loss": search(keeps="loss_at(middle) <= (1 - share) * nothing"),
        "near the whole update's loss": search(
            keeps="loss_at(middle) <= losses['update'] / share"
        ),
        "one rank after the other": linear(),
        "from the full rank down": linear("range(full_rank, 0, -1)", "<"),
        "powers of two": linear("[2**i for i in range(10) if 2**i <= full_rank]"),
        "in tens": linear("range(10, full_rank + 1, 10)"),
        "rank 8": "def my_smallest_rank(loss_at, full_rank, losses, share=0.95):\n"
        "    return 8\n",
        "the full rank": search(back="full_rank"),
        "above, never at": search(keeps="nothing - loss_at(middle) > share * gain"),
        "one too many": search(back="min(low + 1, full_rank)"),
        "one too few": search(back="low - 1"),
        "from rank zero": search(ends="-1, full_rank"),
        "halves that are no ranks": search(middle="(low + high) / 2"),
        "the middle is thrown away": search(down="middle - 1"),
        "an end too early": search(ends="1, full_rank - 1"),
        "the other half": search(keeps="nothing - loss_at(middle) < share * gain"),
        "the loss": search(back="loss_at(low)"),
        "the share that is kept": search(back="(nothing - loss_at(low)) / gain"),
        "zero for void": search(none="0"),
        "an error for void": search(none="1 / 0"),
        "always 0.95": search(keeps="nothing - loss_at(middle) >= 0.95 * gain"),
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
            "wrap of the first call": stale("wrap"),
            "wrap is LoRA": fixed("wrap", "pfs.lora.LoRA"),
            "wrap is the first model's": fixed(
                "wrap", "lambda module: pfs.lora.LoRA(module, 3, 5.0)"
            ),
            "the notebook's targets": fixed("targets", "['q_proj', 'v_proj']"),
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
                "            return wrap(module)\n",
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
    "4.3": {
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
    "4.4": {
        "arguments": {
            "loss_at of the first call": stale("loss_at"),
            "full_rank of the first call": stale("full_rank"),
            "losses of the first call": stale("losses"),
            "share of the first call": stale("share"),
            "share is 0.95": fixed("share", "0.95"),
            "the full rank of SmolLM2": fixed("full_rank", "576"),
            "another default": search(default="0.9"),
            "no default": search().replace("share=0.95", "share"),
        },
        "state": {
            "kept by size": remembered("(full_rank, share)"),
            "kept by share": remembered("share"),
            "the losses are used up": afterwards("losses.clear()"),
            "the losses are rounded": first(
                "for key in losses:\n    losses[key] = round(losses[key], 2)"
            ),
            "wrong from the eighth call on": every_time_but(8, "1"),
            "a seed is left": afterwards("torch.manual_seed(0)"),
            "float64 left on": afterwards("torch.set_default_dtype(torch.float64)"),
        },
        "inputs": {
            "small losses are none": where("losses['nothing'] < 1e-3", "None"),
            "four digits": first(
                "losses = {key: round(loss, 4) for key, loss in losses.items()}"
            ),
            "large losses diverged": where("losses['nothing'] > 100", "None"),
            "ranks up to 256": where("full_rank > 256", "min(result or 256, 256)"),
            "never the full rank": where("result == full_rank", "None"),
            "never rank one": where("result == 1", "2"),
            "the embeddings must help": where(
                "losses['everything'] > losses['update']", "None"
            ),
        },
        "kinds": {
            "a float": returned("result if result is None else float(result)"),
            "a text": returned("str(result)"),
            "a list": returned("[result]"),
            "with the losses": returned("(result, losses)"),
            "a float tensor": returned(
                "result if result is None else torch.tensor(float(result))"
            ),
            "False for void": returned("result or False"),
            "NaN for void": returned("result or math.nan"),
            "the full rank for void": returned("result or full_rank"),
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
            "found again by its name": inject(wrapped="wrap(model.get_submodule(name))")
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
    "4.3": {
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
    "4.4": {
        "arguments": {
            "the control first": search(
                void="losses['random'] <= nothing - (1 - share) * gain or gain <= 0"
            )
        },
        "state": {
            "each rank once": search(
                ends="1, full_rank\n    known = {{}}",
                keeps="nothing - known.setdefault(middle, loss_at(middle))"
                " >= share * gain",
            ).replace("{{}}", "{}")
        },
        "inputs": {
            "doubled, then halved": search(
                ends="1, 1\n"
                "    while high < full_rank and nothing - loss_at(high) < share * gain:"
                "\n        low, high = high + 1, min(2 * high, full_rank)"
            ),
            "between a rank that fails and one that keeps": search(
                ends="0, full_rank", up="middle", back="high"
            ).replace("low < high", "high - low > 1"),
        },
        "kinds": {
            "a tensor of one": returned(
                "result if result is None else torch.tensor(result)"
            ),
            "numpy's": returned("result if result is None else np.int64(result)"),
        },
    },
}
