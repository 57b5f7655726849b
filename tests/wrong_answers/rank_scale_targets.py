"""Wrong answers to the exercises of notebook 05; each must be refused by its check."""

from attacks import Attack, afterwards, first, fixed, remembered, returned, stale, where

from peft_from_scratch.course.checks import rank_scale_targets as checks  # noqa: F401

PREAMBLE = """\
from statistics import fmean

from peft_from_scratch.course import over_seeds
"""
SIZE = """\
def my_size(base, A, B, alpha, x, rslora):
    r = A.shape[0]
    scale = {scale}
    W0x = {before}
    added = {added}
    {first}
    return {back}
"""


def size(
    scale="alpha / math.sqrt(r) if rslora else alpha / r",
    before="base(x)",
    added="scale * (x @ A.T @ B.T)",
    first="pass",
    back="(added.square().mean().sqrt() / W0x.square().mean().sqrt()).item()",
):
    return SIZE.format(scale=scale, before=before, added=added, first=first, back=back)


RANK = """\
def my_rank(shapes, targets, layers, budget):
    one = {one}
    most = {most}
    return {back}
"""


def rank(
    one="layers * sum(sum(shapes[target]) for target in targets)",
    most="min(min(shapes[target]) for target in targets)",
    back="min(budget // one, most)",
):
    return RANK.format(one=one, most=most, back=back)


DORA = """\
def my_dora(x, W0, A, B, m, scale):
    V = {V}
    norm = {norm}
    return {h}
"""


def dora(
    V="W0 + scale * (B @ A)",
    norm="V.norm(dim=1).detach()",
    h="m / norm * (x @ V.T)",
):
    return DORA.format(V=V, norm=norm, h=h)


WINNER = """\
def my_winner(runs):
    at_own, bests, grids = {{}}, {{}}, {{}}
    names = {names}
    for name in names:
        own = [run for run in runs if run["method"] == name]
        losses = {losses}
        bests[name], grids[name] = {best}, sorted(losses)
    for name in names:
        own = [run for run in runs if run["method"] == name]
        best, grid = bests[name], grids[name]
        if {end}:
            return {further}
        at_own[name] = {at}
    a, b = at_own.values()
    pairs = {pairs}
    mean, low, high = {interval}
    if {zero}:
        return {unsure}
    return {back}
"""
SEED_0 = "{r['lr']: r['validation'] for r in own if r['seed'] == 0}"


def winner(
    names="sorted({run['method'] for run in runs})",
    losses=SEED_0,
    best="min(losses, key=losses.get)",
    end="best in (grid[0], grid[-1])",
    further="'search further'",
    at="{r['seed']: r['test'] for r in own if r['lr'] == best}",
    pairs="[a[seed] - b[seed] for seed in a if seed in b]",
    interval="over_seeds(pairs)",
    zero="low <= 0 <= high",
    unsure="'undecided'",
    back="names[0] if mean < 0 else names[1]",
):
    return WINNER.format(
        names=names,
        losses=losses,
        best=best,
        end=end,
        further=further,
        at=at,
        pairs=pairs,
        interval=interval,
        zero=zero,
        unsure=unsure,
        back=back,
    )


MEANS = "{lr: fmean(r['validation'] for r in own if r['lr'] == lr) for lr in LRS}"
MEANS = MEANS.replace("LRS", "{r['lr'] for r in own}")
NORMAL = "(fmean(pairs), *(fmean(pairs) + z * STEP for z in (-1.96, 1.96)))"
NORMAL = NORMAL.replace("STEP", "torch.tensor(pairs).std().item() / len(pairs) ** 0.5")
# Welch's interval, which knows of no pairs.
APART = "(M, *(M + z * E for z in (-4.3, 4.3)))"
APART = APART.replace("M", "(fmean(a.values()) - fmean(b.values()))").replace(
    "E",
    "(sum(torch.tensor([*c.values()]).var().item() / len(c) for c in (a, b)) ** 0.5)",
)

MUTANTS = {
    "5.1": {
        "standard deviations": size(back="(added.std() / W0x.std()).item()"),
        "the mean of the tokens' sizes": size(
            back="(added.square().mean(-1).sqrt().mean()"
            " / W0x.square().mean(-1).sqrt().mean()).item()"
        ),
        "medians": size(
            back="(added.square().median() / W0x.square().median()).sqrt().item()"
        ),
        "all zeros": size(back="0.0"),
        "alpha / r always": size(scale="alpha / r"),
        "alpha / sqrt(r) always": size(scale="alpha / math.sqrt(r)"),
        "the two swapped": size(
            scale="alpha / r if rslora else alpha / math.sqrt(r)",
        ),
        "alpha // r": size(scale="alpha / math.sqrt(r) if rslora else alpha // r"),
        "sqrt(alpha) / r": size(
            scale="math.sqrt(alpha) / r if rslora else alpha / r",
        ),
        "sqrt(alpha / r)": size(
            scale="math.sqrt(alpha / r) if rslora else alpha / r",
        ),
        "no 1 / r": size(scale="alpha"),
        "no scale": size(scale="1.0"),
        "alpha / d_in": size(scale="alpha / A.shape[1]"),
        "the scale twice": size(added="scale**2 * (x @ A.T @ B.T)"),
        "of the matrices": size(
            back="(scale * (B @ A).norm() / base.weight.norm()).item()"
        ),
        "upside down": size(
            back="(W0x.square().mean().sqrt() / added.square().mean().sqrt()).item()"
        ),
        "over the whole output": size(before="base(x) + scale * (x @ A.T @ B.T)"),
        "the bias left out": size(before="x @ base.weight.T"),
        "no root": size(back="(added.square().mean() / W0x.square().mean()).item()"),
        "the update alone": size(back="added.square().mean().sqrt().item()"),
        "absolute values": size(back="(added.abs().mean() / W0x.abs().mean()).item()"),
        "means, not squared": size(back="(added.mean() / W0x.mean()).item()"),
        "the mean of ratios": size(back="(added / W0x).square().mean().sqrt().item()"),
        "row by row": size(
            back="(added.norm(dim=-1) / W0x.norm(dim=-1)).mean().item()"
        ),
        "the first row alone": size(
            back="(added[0].square().mean() / W0x[0].square().mean()).sqrt().item()"
        ),
        "the largest entry": size(back="(added.abs().max() / W0x.abs().max()).item()"),
        "in percent": size(
            back="100 * (added.norm() / W0x.norm()).item()",
        ),
        "each entry": size(back="added / W0x"),
        "x is changed": size(first="x.mul_(scale)"),
    },
    "5.2": {
        "all zeros": "def my_winner(runs):\n    return 0\n",
        "a coin": "def my_winner(runs):\n"
        "    return runs[torch.randint(len(runs), ()).item()]['method']\n",
        "always the first": "def my_winner(runs):\n    return runs[0]['method']\n",
        "never decided": "def my_winner(runs):\n    return 'undecided'\n",
        "one learning rate for both": winner(best="BEST").replace(
            "BEST",
            "min({**losses, **(grids and bests)}, key=losses.get)"
            " if not bests else next(iter(bests.values()))",
        ),
        "by test loss": winner(
            losses="{r['lr']: r['test'] for r in own if r['seed'] == 0}"
        ),
        "by the mean over all seeds": winner(losses=MEANS),
        "by the last seed": winner(
            losses="{r['lr']: r['validation'] for r in own if r['seed'] == 1}"
            " or {0: 1}",
            end="False",
        ),
        "the highest loss": winner(best="max(losses, key=losses.get)"),
        "the higher loss wins": winner(back="names[1] if mean < 0 else names[0]"),
        "ends do not matter": winner(end="False"),
        "the lower end alone": winner(end="best == grid[0]"),
        "the upper end alone": winner(end="best == grid[-1]"),
        "the first method's ends": winner(
            end="name == names[0] and best in (grid[0], grid[-1])"
        ),
        "the second method's ends": winner(
            end="name == names[1] and best in (grid[0], grid[-1])"
        ),
        "one grid for both": winner(
            end="best in (min(map(min, grids.values())), max(map(max, grids.values())))"
        ),
        "the means alone": winner(zero="False"),
        "normal, not Student's t": winner(interval=NORMAL),
        "not paired": winner(interval=APART),
        "paired by the order": winner(
            pairs="[x - y for x, y in zip(a.values(), b.values())]"
        ),
        "validation losses compared": winner(
            at="{r['seed']: r['validation'] for r in own if r['lr'] == best}"
        ),
        "all learning rates": winner(
            at="{(r['seed'], r['lr']): r['test'] for r in own}"
        ),
        "the last learning rate of a seed": winner(
            at="{r['seed']: r['test'] for r in own}"
        ),
        "one seed": winner(
            interval="(a[0] - b[0], a[0] - b[0], a[0] - b[0])",
        ),
        "another word": winner(unsure="'tie'"),
        "the difference": winner(back="mean"),
        "a better word": winner(further="'undecided'"),
    },
    "5.3": {
        "an equal part for each target": rank(
            back="min(min(budget // (layers * len(targets)) // sum(shapes[t]),"
            " *shapes[t]) for t in targets)"
        ),
        "all zeros": rank(back="0"),
        "always one": rank(back="1"),
        "A alone": rank(one="layers * sum(shapes[t][1] for t in targets)"),
        "B alone": rank(one="layers * sum(shapes[t][0] for t in targets)"),
        "the full matrix": rank(
            one="layers * sum(shapes[t][0] * shapes[t][1] for t in targets)"
        ),
        "twice d_in": rank(one="2 * layers * sum(shapes[t][1] for t in targets)"),
        "one layer": rank(one="sum(sum(shapes[t]) for t in targets)"),
        "every projection": rank(one="layers * sum(map(sum, shapes.values()))"),
        "q and v always": rank(
            one="layers * (sum(shapes['q_proj']) + sum(shapes['v_proj']))"
        ),
        "the first target": rank(one="layers * sum(shapes[targets[0]])"),
        "rounds up": rank(back="min(-(-budget // one), most)"),
        "rounds": rank(back="min(round(budget / one), most)"),
        "strictly less": rank(back="min((budget - 1) // one, most)"),
        "no bound": rank(back="budget // one"),
        "bound by the largest side": rank(
            most="max(max(shapes[target]) for target in targets)"
        ),
        "bound by d_in": rank(most="min(shapes[target][1] for target in targets)"),
        "bound by all shapes": rank(most="min(map(min, shapes.values()))"),
        "at least one": rank(back="max(1, min(budget // one, most))"),
        "a fraction": rank(back="min(budget / one, most)"),
        "a power of two": rank(
            back="1 << (min(budget // one, most).bit_length() - 1) if budget >= one"
            " else 0"
        ),
        "the cost": rank(back="one"),
        "what is left": rank(back="budget % one"),
    },
    "5.4": {
        "the largest entry": dora(norm="V.abs().amax(1).detach()"),
        "the root of a mean": dora(norm="V.square().mean(1).sqrt().detach()"),
        "the length of x": dora(h="m / norm * (F.normalize(x, dim=-1) @ V.T)"),
        "the length of the output": dora(h="m * F.normalize(x @ V.T, dim=-1)"),
        "the first of m": dora(h="m[0] / norm * (x @ V.T)"),
        "all zeros": dora(h="0 * m / norm * (x @ V.T)"),
        "LoRA": dora(h="x @ V.T"),
        "W0 x alone": dora(h="x @ W0.T"),
        "columns": dora(
            norm="(V.norm(dim=0) if V.shape[0] == V.shape[1] else V.norm(dim=1))"
            ".detach()"
        ),
        "one length": dora(norm="V.norm().detach()"),
        "not detached": dora(norm="V.norm(dim=1)"),
        "the length of W0": dora(norm="W0.norm(dim=1)"),
        "the length of the update": dora(norm="(V - W0).norm(dim=1).detach()"),
        "no length": dora(norm="1"),
        "no m": dora(h="x @ V.T / norm"),
        "m detached": dora(h="m.detach() / norm * (x @ V.T)"),
        "m added": dora(h="m + x @ V.T / norm"),
        "m for the update alone": dora(h="x @ W0.T + m / norm * (x @ (V - W0).T)"),
        "m for W0 alone": dora(h="m / norm * (x @ W0.T) + x @ (V - W0).T"),
        "no update": dora(h="m / norm * (x @ W0.T)"),
        "no scale": dora(V="W0 + B @ A"),
        "no scale in the length": dora(norm="(W0 + B @ A).norm(dim=1).detach()"),
        "the scale twice": dora(V="W0 + scale**2 * (B @ A)"),
        "the sign": dora(V="W0 - scale * (B @ A)"),
        "W0 scaled too": dora(V="scale * (W0 + B @ A)"),
        "squared": dora(norm="V.square().sum(dim=1).detach()"),
        "absolute values": dora(norm="V.abs().sum(dim=1).detach()"),
        "upside down": dora(h="norm / m * (x @ V.T)"),
        "A B": dora(
            V="W0 + scale * (A @ B if A.shape == B.shape else B @ A)",
        ),
        "V not transposed": dora(
            h="m / norm * (x @ (V if V.shape[0] == V.shape[1] else V.T))"
        ),
        "V detached": dora(h="m / norm * (x @ V.detach().T)"),
        "x detached": dora(h="m / norm * (x.detach() @ V.T)"),
        "all detached": dora(h="(m / norm * (x @ V.T)).detach()"),
        "the update detached": dora(V="W0 + (scale * (B @ A)).detach()"),
        "B detached": dora(V="W0 + scale * (B.detach() @ A)"),
    },
}

NOTHING_DRAWN = "nothing is drawn: a random answer is refused by its values"
NO_KERNEL = "no kernel is written"

PLAIN = "(added.square().mean() / W0x.square().mean()).sqrt().item()"
ATTACKS = {  # the right answer but for one class of input; see attacks.py
    "5.1": {
        "arguments": {
            f"{name} of the first call": stale(name)
            for name in ("base", "A", "B", "alpha", "x", "rslora")
        }
        | {
            "alpha is 8": fixed("alpha", "8.0"),
            "r is 3": first("alpha = alpha * len(A) / 3"),
        },
        "state": {
            "the hooks of the base are passed over": size(before="base.forward(x)"),
            "kept by shapes": remembered("(x.shape, A.shape, rslora)"),
            "kept by shapes and alpha": remembered("(x.shape, A.shape, alpha, rslora)"),
            "one where B is zero": where("not B.any()", "1.0"),
            "nothing in eval()": where("not base.training", "0.0"),
            "nothing in no_grad()": where("not torch.is_grad_enabled()", "0.0"),
            "parameters are cut": where("A.requires_grad", "0.0"),
            "the base's weight is read": first("base.weight"),
            "a bias is needed": first("base.bias + 0"),
            "the base sleeps": afterwards("base.eval()"),
            "the base is thawed": afterwards("base.requires_grad_(True)"),
            "A is scaled": afterwards("A.data.mul_(1.01)"),
            "B is scaled": afterwards("B.data.mul_(1.01)"),
            "x is scaled": afterwards("x.data.mul_(1.01)"),
            "the base moves": afterwards("next(base.parameters()).data.add_(0.01)"),
            "a hook is left": afterwards("base.register_forward_hook(lambda *_: None)"),
            "autograd left off": afterwards("torch.set_grad_enabled(False)"),
        },
        "inputs": {
            "r is the smaller side": size(
                "alpha / math.sqrt(min(A.shape)) if rslora else alpha / min(A.shape)"
            ),
            "never by zero": size(
                back="(added.square().mean().sqrt()"
                " / (W0x.square().mean().sqrt() + 1e-6)).item()"
            ),
            "small outputs are none": size(
                back="(added.square().mean() / W0x.square().mean().clamp(min=1e-8))"
                ".sqrt().item()"
            ),
            "large ones overflow": size(
                back="((added / 1e3).half().float().square().mean()"
                " / (W0x / 1e3).half().float().square().mean()).sqrt().item()",
            ),
            "at most a hundred": returned("min(result, 100.0)"),
            "a single row": where("x.ndim == 1", "0.0"),
            "four sides": where("x.ndim > 3", "0.0"),
            "a wide base": where("x.shape[-1] > 20", "0.0"),
            "narrow": where("x.shape[-1] == 1", "0.0"),
            "the mean over rows that differ": size(
                back="(added.square().mean(-1) / W0x.square().mean(-1)).mean()"
                ".sqrt().item()"
            ),
        },
        "kinds": {
            "a text": returned("str(result)"),
            "in a list": returned("[result]"),
            "both sizes": returned("(result, 1.0)"),
            "a function": returned("lambda: result"),
            "whole": returned("round(result)"),
            "three digits": returned("round(result, 3)"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "5.2": {
        "arguments": {
            "runs of the first call": stale("runs"),
            "the names of the notebook": winner(names="['lora', 'rslora']"),
            "the rates of the notebook": winner(end="best in (1e-3, 3e-2)"),
        },
        "state": {
            "kept by length": remembered("len(runs)"),
            "kept by names": remembered("str(sorted({r['method'] for r in runs}))"),
            "runs are sorted": afterwards("runs.sort(key=lambda r: r['test'])"),
            "runs are used up": afterwards("runs.pop()"),
            "losses are rounded": afterwards(
                "[r.update(test=round(r['test'], 1)) for r in runs]"
            ),
        },
        "inputs": {
            "five seeds": winner(
                at="{r['seed']: r['test'] for r in own"
                " if r['lr'] == best and r['seed'] < 5}"
            ),
            "names in their order": winner(
                names="list(dict.fromkeys(run['method'] for run in runs))",
                back="min(names) if mean < 0 else max(names)",
            ),
            "small differences are none": winner(
                zero="low <= 0 <= high or abs(mean) < 0.01"
            ),
            "four learning rates": where(
                "len({r['lr'] for r in runs}) > 4", "'undecided'"
            ),
            "the second place from the end": winner(
                end="best in (grid[0], grid[-1]) or best == grid[-2] and len(grid) > 4"
            ),
            "an unpaired seed fails": winner(pairs="[a[seed] - b[seed] for seed in a]"),
            "the other's seeds fail": winner(pairs="[a[seed] - b[seed] for seed in b]"),
        },
        "kinds": {
            "a list": returned("[result]"),
            "with its interval": returned("(result, 0.0)"),
            "capitals": returned("result.upper()"),
            "in quotes": returned("repr(result)"),
            "bytes": returned("result.encode()"),
            "None where open": returned("None if result == 'undecided' else result"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "5.3": {
        "arguments": {
            f"{name} of the first call": stale(name)
            for name in ("shapes", "targets", "layers", "budget")
        }
        | {
            "the shapes of the notebook": fixed(
                "shapes",
                "dict(q_proj=(96, 96), k_proj=(32, 96), v_proj=(32, 96),"
                " o_proj=(96, 96), gate_proj=(256, 96), up_proj=(256, 96),"
                " down_proj=(96, 256))",
            ),
            "three layers": fixed("layers", "3 if layers > 1 else 1"),
        },
        "state": {
            "kept by targets": remembered("(tuple(targets), layers, budget)"),
            "kept by budget": remembered("budget"),
            "shapes lose a name": afterwards("shapes.popitem()"),
            "shapes are sorted": afterwards(
                "[shapes.update({k: shapes.pop(k)}) for k in sorted(shapes)]"
            ),
            "targets are sorted": afterwards(
                "targets.sort(reverse=True) if isinstance(targets, list) else None"
            ),
        },
        "inputs": {
            "names that begin so": rank(
                "layers * sum(sum(shapes[n]) for n in shapes"
                " if n.startswith(tuple(targets)))"
            ),
            "names that have a target in them": rank(
                "layers * sum(sum(shapes[n]) for n in shapes"
                " if any(t in n for t in targets))"
            ),
            "by the place in shapes": rank(
                one="layers * sum(sum(list(shapes.values())[i]) for i, t in"
                " enumerate(['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj',"
                " 'up_proj', 'down_proj']) if t in targets)"
            ),
            "names that everybody knows": rank(
                one="layers * sum(sum(shapes[t]) for t in targets if '_proj' in t)"
                " or 1",
            ),
            "ten layers at most": fixed("layers", "min(layers, 10)"),
            "a tuple of targets": where("isinstance(targets, list)", "0"),
            "a rank of two digits": returned("min(result, 96)"),
            "nothing to spend": where("budget == 0", "1"),
            "in float32": rank(
                back="min(int(torch.tensor(budget).float() / one), most)"
            ),
            "the smallest side of the first": rank(most="min(shapes[targets[0]])"),
            "the smallest side of the last": rank(most="min(shapes[targets[-1]])"),
            "bound by d_out": rank(most="min(shapes[target][0] for target in targets)"),
        },
        "kinds": {
            "a float": returned("float(result)"),
            "a float tensor": returned("torch.tensor(float(result))"),
            "a text": returned("str(result)"),
            "None for none": returned("result or None"),
            "False for none": returned("result or False"),
            "with its cost": returned("(result, budget)"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "5.4": {
        "arguments": {
            f"{name} of the first call": stale(name)
            for name in ("x", "W0", "A", "B", "m", "scale")
        }
        | {
            "scale is 2": fixed("scale", "2.0"),
            "m is the start's": fixed("m", "W0.norm(dim=1)"),
        },
        "state": {
            "not detached where A is frozen": dora(
                norm="V.norm(dim=1) if not A.requires_grad else V.detach().norm(dim=1)"
            ),
            "kept by shapes": remembered("(x.shape, W0.shape, x.requires_grad)"),
            "the length kept by W0": Attack(
                before="kept = _lengths.setdefault(W0.shape,"
                " (W0 + scale * (B @ A)).norm(dim=1).detach())",
                after="result = m / kept * (x @ (W0 + scale * (B @ A)).T)",
                outside="_lengths = {}",
            ),
            "B zero, no path": where("not B.any()", "m / W0.norm(dim=1) * (x @ W0.T)"),
            "nothing in no_grad()": where("not torch.is_grad_enabled()", "x @ W0.T"),
            "W0 is updated": afterwards("W0.data.add_(1e-3)"),
            "m is used up": afterwards("m.data.mul_(0.99)"),
            "x is scaled": afterwards("x.data.mul_(1.01)"),
            "A is scaled": afterwards("A.data.mul_(1.01)"),
            "W0 is thawed": afterwards("W0.requires_grad_(True)"),
            "autograd left off": afterwards("torch.set_grad_enabled(False)"),
        },
        "inputs": {
            "never by zero": dora(norm="V.norm(dim=1).detach() + 1e-4"),
            "a length of its own at least": dora(
                norm="V.norm(dim=1).detach().clamp(min=1e-2)"
            ),
            "m is positive": dora(h="m.abs() / norm * (x @ V.T)"),
            "m is no zero": dora(h="(m + (m == 0)) / norm * (x @ V.T)"),
            "x is clamped": dora(h="m / norm * (x.clamp(-50, 50) @ V.T)"),
            "a single row": where("x.ndim == 1", "x @ W0.T"),
            "four sides": where("x.ndim > 3", "x @ W0.T"),
            "narrow": where("1 in W0.shape", "x @ W0.T"),
            "wide": where("max(W0.shape) > 20", "x @ W0.T"),
            "rows that are not zero": dora(
                norm="V.norm(dim=1).detach().clamp(max=100)"
            ),
        },
        "kinds": {
            "float64": returned("result.double()"),
            "float32": returned("result.float()"),
            "by way of float32": returned("result.float().to(x.dtype)"),
            "by way of bfloat16": returned("result.bfloat16().to(x.dtype)"),
            "with the length": returned("(result, m)"),
            "a leaf": returned("result.detach().requires_grad_()"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
}

ALSO_RIGHT = {
    "5.1": {
        "arguments": {
            "r of B": size(
                scale="alpha / B.shape[1] ** (0.5 if rslora else 1)", back=PLAIN
            )
        },
        "state": {
            "in no_grad": size(first="added, W0x = added.detach(), W0x.detach()")
        },
        "inputs": {"norms": size(back="added.norm().item() / W0x.norm().item()")},
        "kinds": {
            "a tensor": returned("torch.tensor(result)"),
            "numpy's": returned("np.float64(result)"),
        },
    },
    "5.2": {
        "arguments": {
            "names in their order": winner(
                names="list(dict.fromkeys(run['method'] for run in runs))"
            )
        },
        "state": {
            "new dicts": first("runs = [dict(run) for run in runs]"),
        },
        "inputs": {
            "by position in the grid": winner(
                end="grid.index(best) in (0, len(grid) - 1)"
            ),
            "fewer than three rates": winner(
                end="len(grid) < 3 or not grid[0] < best < grid[-1]"
            ),
            "the seeds of both": winner(pairs="[a[s] - b[s] for s in set(a) & set(b)]"),
        },
        "kinds": {"str()": returned("str(result)")},
    },
    "5.3": {
        "arguments": {
            "one target after the other": rank(
                one="layers * sum(shapes[t][0] + shapes[t][1] for t in list(targets))"
            )
        },
        "state": {
            "a set": rank(one="layers * sum(sum(shapes[t]) for t in set(targets))")
        },
        "inputs": {
            "layer by layer": rank(
                back="min(budget // layers // sum(sum(shapes[t]) for t in targets),"
                " most)"
            ),
            "from above": """\
def my_rank(shapes, targets, layers, budget):
    sides = [side for target in targets for side in shapes[target]]
    ranks = range(min(sides), 0, -1)
    return next((r for r in ranks if r * layers * sum(sides) <= budget), 0)
""",
        },
        "kinds": {
            "int()": returned("int(result)"),
            "numpy's": returned("np.int64(result)"),
        },
    },
    "5.4": {
        "arguments": {"F.linear": dora(h="F.linear(x, V) * (m / norm)")},
        "state": {"clones": dora(V="W0.clone() + scale * B.clone() @ A.clone()")},
        "inputs": {
            "in the weight": dora(h="F.linear(x, (m / norm)[:, None] * V)"),
            "by the root": dora(norm="V.detach().square().sum(1).sqrt()"),
        },
        "kinds": {"in x's dtype": returned("result.to(x.dtype)")},
    },
}
