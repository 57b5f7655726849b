"""Wrong answers to the exercises of notebook 05; each must be refused by its check."""

from attacks import Attack, afterwards, first, fixed, remembered, returned, stale, where

from peft_from_scratch.course.checks import rank_scale_targets as checks  # noqa: F401

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


PISSA = """\
def my_pissa(W0, r, scale):
    U, S, Vt = torch.linalg.svd(W0, full_matrices=False)
    root = {root}
    A = {A}
    B = {B}
    W_res = {rest}
    return {back}
"""


def pissa(
    root="(S[:r] / scale).sqrt()",
    A="root[:, None] * Vt[:r]",
    B="U[:, :r] * root",
    rest="W0 - scale * (B @ A)",
    back="W_res, A, B",
):
    return PISSA.format(root=root, A=A, B=B, rest=rest, back=back)


GROUPS = """\
def my_groups(model, lr, ratio):
    fast = {fast}
    known = set(map(id, fast))
    slow = {slow}
    return {back}
"""
MODULES = "model.modules() if isinstance(m, pfs.lora.LoRA)"


def groups(
    fast=f"[m.B for m in {MODULES}]",
    slow="[p for p in model.parameters() if p.requires_grad and id(p) not in known]",
    back="[{'params': slow, 'lr': lr}, {'params': fast, 'lr': lr * ratio}]",
):
    return GROUPS.format(fast=fast, slow=slow, back=back)


A_ALONE = f"[m.A for m in {MODULES}]"

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
    "5.3": {
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
    "5.4": {
        "the rows of U": pissa(B="torch.linalg.svd(W0)[0][:r].T * root"),
        "the columns of Vt": pissa(A="(torch.linalg.svd(W0)[2][:, :r] * root).T"),
        "the mean taken off": pissa().replace("svd(W0,", "svd(W0 - W0.mean(0),"),
        "a randomized SVD": pissa().replace(
            "U, S, Vt = torch.linalg.svd(W0, full_matrices=False)",
            "U, S, V = torch.svd_lowrank(W0, q=r); Vt = V.T",
        ),
        "all zeros": pissa(A="0 * Vt[:r]", B="0 * U[:, :r]"),
        "nothing is taken out": pissa(rest="W0"),
        "added": pissa(rest="W0 + scale * (B @ A)"),
        "the principal part as the rest": pissa(rest="scale * (B @ A)"),
        "no scale in the rest": pissa(rest="W0 - B @ A"),
        "no scale anywhere": pissa(root="S[:r].sqrt()", rest="W0 - B @ A"),
        "no scale in A and B": pissa(root="S[:r].sqrt()"),
        "the scale in both": pissa(root="S[:r].sqrt() / scale"),
        "the scale multiplied": pissa(root="(S[:r] * scale).sqrt()"),
        "S, no root": pissa(root="S[:r] / scale"),
        "no S": pissa(root="torch.ones(r) / scale**0.5"),
        "S in B alone": pissa(A="Vt[:r]", B="U[:, :r] * S[:r] / scale"),
        "S in A alone": pissa(A="S[:r, None] / scale * Vt[:r]", B="U[:, :r]"),
        "the root in B alone": pissa(A="Vt[:r]"),
        "the smallest": pissa(
            root="(S[-r:] / scale).sqrt()",
            A="root[:, None] * Vt[-r:]",
            B="U[:, -r:] * root",
        ),
        "all but the largest": pissa(
            root="(S[1 : r + 1] / scale).sqrt()",
            A="root[:, None] * Vt[1 : r + 1]",
            B="U[:, 1 : r + 1] * root",
        ),
        "A and B swapped": pissa(back="W_res, B, A"),
        "A and B turned": pissa(back="W_res, B.T, A.T"),
        "the rest comes last": pissa(back="A, B, W_res"),
        "no rest": pissa(back="A, B"),
        "V, not its transpose": pissa(
            A="root[:, None] * (Vt.T if Vt.shape[0] == Vt.shape[1] else Vt)[:r]"
        ),
        "U turned": pissa(B="(U.T if U.shape[0] == U.shape[1] else U)[:, :r] * root"),
        "a random A": pissa(A="torch.randn(r, W0.shape[1])"),
        "LoRA's start": pissa(
            A="torch.randn(r, W0.shape[1]) / (3 * W0.shape[1]) ** 0.5",
            B="torch.zeros(W0.shape[0], r)",
        ),
        # A matrix between A and B that cancels in B A, and so in every output.
        "A larger, B smaller": pissa(
            A="3 * root[:, None] * Vt[:r]", B="U[:, :r] * root / 3"
        ),
        "directions mixed": pissa(
            root="(S[:r] / scale).sqrt()\n    Q = torch.linalg.qr(torch.randn(r, r)).Q",
            A="Q @ (root[:, None] * Vt[:r])",
            B="(U[:, :r] * root) @ Q.T",
        ),
        "one rank too many": pissa(
            root="(S[: r + 1] / scale).sqrt()",
            A="root[:, None] * Vt[: r + 1]",
            B="U[:, : r + 1] * root",
        ),
        "W0 is changed": pissa(rest="W0.sub_(scale * (B @ A))"),
    },
    "5.5": {
        "sets": groups(
            back="[{'params': set(slow), 'lr': lr},"
            " {'params': set(fast), 'lr': lr * ratio}]"
        ),
        "compared by their entries": groups(
            slow="[p for p in model.parameters() if p.requires_grad and p not in fast]"
        ),
        "zeros are B": groups(
            "[p for p in model.parameters() if p.requires_grad and not p.any()]"
        ),
        "all zeros": groups(
            back="[{'params': slow, 'lr': 0.0}, {'params': fast, 'lr': 0.0}]"
        ),
        "one rate": groups(
            back="[{'params': slow, 'lr': lr}, {'params': fast, 'lr': lr}]"
        ),
        "one group": groups(back="[{'params': slow + fast, 'lr': lr * ratio}]"),
        "A is fast": groups(fast=A_ALONE),
        "both are fast": groups(
            back="[{'params': slow, 'lr': lr * ratio},"
            " {'params': fast, 'lr': lr * ratio}]"
        ),
        "the biases are fast": groups(
            fast="[p for n, p in model.named_parameters()"
            " if p.requires_grad and not n.endswith('.A')]"
        ),
        "divided": groups(
            back="[{'params': slow, 'lr': lr}, {'params': fast, 'lr': lr / ratio}]"
        ),
        "A is slowed down": groups(
            back="[{'params': slow, 'lr': lr / ratio}, {'params': fast, 'lr': lr}]"
        ),
        "the ratio alone": groups(
            back="[{'params': slow, 'lr': lr}, {'params': fast, 'lr': ratio}]"
        ),
        "the ratio added": groups(
            back="[{'params': slow, 'lr': lr}, {'params': fast, 'lr': lr + ratio}]"
        ),
        "the ratio squared": groups(
            back="[{'params': slow, 'lr': lr}, {'params': fast, 'lr': lr * ratio**2}]"
        ),
        "always 16": groups(
            back="[{'params': slow, 'lr': lr}, {'params': fast, 'lr': lr * 16}]"
        ),
        "A is lost": groups(back="[{'params': fast, 'lr': lr * ratio}]"),
        "B is lost": groups(back="[{'params': slow, 'lr': lr}]"),
        "the biases are lost": groups(slow=A_ALONE),
        "frozen ones too": groups(
            slow="[p for p in model.parameters() if id(p) not in known]"
        ),
        "B in both": groups(slow="[p for p in model.parameters() if p.requires_grad]"),
        "the first B alone": groups(
            back="[{'params': slow + fast[1:], 'lr': lr},"
            " {'params': fast[:1], 'lr': lr * ratio}]"
        ),
        "copies": groups(fast=f"[m.B.detach() for m in {MODULES}]"),
        "another key": groups(
            back="[{'params': slow, 'rate': lr}, {'params': fast, 'rate': lr * ratio}]"
        ),
        "lists, no dicts": groups(back="[slow, fast]"),
        "an optimizer": groups(
            back="torch.optim.AdamW([{'params': slow, 'lr': lr},"
            " {'params': fast, 'lr': lr * ratio}])"
        ),
        "names with a B": groups(
            fast="[p for n, p in model.named_parameters()"
            " if p.requires_grad and 'b' in n.rpartition('.')[2].lower()]"
        ),
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
    "5.3": {
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
    "5.4": {
        "arguments": {
            f"{name} of the first call": stale(name) for name in ("W0", "r", "scale")
        }
        | {
            "scale is one": fixed("scale", "1.0"),
            "scale is two": fixed("scale", "2.0"),
        },
        "state": {
            "kept by shape": remembered("(W0.shape, r)"),
            "kept by shape and scale": remembered("(W0.shape, r, scale)"),
            "directions kept by shape": Attack(
                before="W0 = _kept.setdefault(W0.shape, W0)", outside="_kept = {}"
            ),
            "W0 is used up": afterwards("W0.data.copy_(result[0])"),
            "W0 is thawed": afterwards("W0.requires_grad_(True)"),
            "float64 left on": afterwards("torch.set_default_dtype(torch.float64)"),
            "autograd left off": afterwards("torch.set_grad_enabled(False)"),
            "parameters fail": first("W0.numpy()"),
        },
        "inputs": {
            "never by zero": pissa(root="((S[:r] + 1e-4) / scale).sqrt()"),
            "small ones are none": pissa(
                root="(S[:r] * (S[:r] > 1e-3) / scale).sqrt()"
            ),
            "large ones are clamped": pissa(
                root="(S[:r].clamp(max=100) / scale).sqrt()"
            ),
            "not the full rank": where("r == min(W0.shape)", "(W0, *result[1:])"),
            "rank one": where("r == 1", "(W0, *result[1:])"),
            "ten at most": where("r > 10", "(W0, *result[1:])"),
            "narrow": where("1 in W0.shape", "(W0, *result[1:])"),
            "wide": where("max(W0.shape) > 20", "(W0, *result[1:])"),
            "scale below one": where("scale < 0.2", "(W0, *result[1:])"),
        },
        "kinds": {
            "float64": returned("tuple(x.double() for x in result)"),
            "float32": returned("tuple(x.float() for x in result)"),
            "the rest in half": returned("(result[0].bfloat16(), *result[1:])"),
            "arrays": returned("tuple(x.detach().numpy() for x in result)"),
            "no rest yet": returned("(None, *result[1:])"),
            "a dict": returned("dict(W_res=result[0], A=result[1], B=result[2])"),
            "by way of bfloat16": returned(
                "tuple(x.bfloat16().to(x.dtype) for x in result)"
            ),
        },
        "randomness": {
            "a little noise in A": returned(
                "(result[0], result[1] + 1e-2 * torch.randn_like(result[1]), result[2])"
            ),
            "signs of A alone": returned(
                "(result[0], result[1] * torch.randn(r, 1).sign(), result[2])"
            ),
            "a random choice": returned(
                "(result[0], result[1][torch.randperm(r)], result[2])"
            ),
        },
        "kernels": NO_KERNEL,
    },
    "5.5": {
        "arguments": {
            f"{name} of the first call": stale(name)
            for name in ("model", "lr", "ratio")
        }
        | {"ratio is 16": fixed("ratio", "16"), "lr is 1e-3": fixed("lr", "1e-3")},
        "state": {
            "kept by rates": remembered("(lr, ratio)"),
            "kept by model": remembered("id(model)"),
            "one list for all": Attack(
                after="_groups.extend(result)\nresult = _groups", outside="_groups = []"
            ),
            "one list, refilled": Attack(
                after="_groups[:] = result\nresult = _groups", outside="_groups = []"
            ),
            "the model trains": afterwards("model.train()"),
            "the model sleeps": afterwards("model.eval()"),
            "all is thawed": afterwards("model.requires_grad_(True)"),
            "B is zero no more": afterwards(
                "[m.B.data.add_(1) for m in model.modules() if hasattr(m, 'B')]"
            ),
            "a hook is left": afterwards(
                "model.register_forward_hook(lambda *_: None)"
            ),
            "autograd left off": afterwards("torch.set_grad_enabled(False)"),
        },
        "inputs": {
            "ten layers at most": groups(
                fast="[m.B for n, m in model.named_modules()"
                " if isinstance(m, pfs.lora.LoRA) and '.10.' not in n]"
            ),
            "numbers of one digit": groups(
                slow="[p for n, p in model.named_parameters() if p.requires_grad"
                " and id(p) not in known and '.10.' not in n]"
            ),
            "attention alone": groups(
                fast="[m.B for n, m in model.named_modules()"
                " if isinstance(m, pfs.lora.LoRA) and 'lm_head' not in n]"
            ),
            "a ratio of one is none": where(
                "ratio == 1", "[dict(params=result[0]['params'], lr=lr)]"
            ),
            "a ratio above one": fixed("ratio", "max(1, ratio)"),
            "no tiny rates": fixed("lr", "max(lr, 1e-5)"),
            "whole ratios": fixed("ratio", "ratio if ratio < 1 else int(ratio)"),
        },
        "kinds": {
            "names": returned(
                "[{**g, 'params': ['?' for _ in g['params']]} for g in result]"
            ),
            "rates as text": returned("[{**g, 'lr': str(g['lr'])} for g in result]"),
            "pairs": returned("[(g['params'], g['lr']) for g in result]"),
            "a dict": returned("dict(slow=result[0], fast=result[1])"),
            "another decay": returned("[{**g, 'weight_decay': 0.5} for g in result]"),
            "uphill": returned("[{**g, 'maximize': True} for g in result]"),
            "other betas": returned("[{**g, 'betas': (0.5, 0.5)} for g in result]"),
        },
        "randomness": {
            "some of the slow": groups(
                back="[{'params': [p for p in slow if torch.rand(()) < 0.9], 'lr': lr},"
                " {'params': fast, 'lr': lr * ratio}]"
            ),
            "a rate that trembles": groups(
                back="[{'params': slow, 'lr': lr},"
                " {'params': fast, 'lr': lr * ratio + lr * torch.rand(1).item() / 99}]"
            ),
        },
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
    "5.3": {
        "arguments": {"F.linear": dora(h="F.linear(x, V) * (m / norm)")},
        "state": {"clones": dora(V="W0.clone() + scale * B.clone() @ A.clone()")},
        "inputs": {
            "in the weight": dora(h="F.linear(x, (m / norm)[:, None] * V)"),
            "by the root": dora(norm="V.detach().square().sum(1).sqrt()"),
        },
        "kinds": {"in x's dtype": returned("result.to(x.dtype)")},
    },
    "5.4": {
        "arguments": {
            "the other way round": pissa(
                root="S[:r].sqrt() / math.sqrt(scale)",
                rest="U[:, r:] @ S[r:].diag() @ Vt[r:]",
            )
        },
        "state": {"of a copy": first("W0 = W0.detach().clone()")},
        "inputs": {
            "by eigenvectors": pissa().replace(
                "U, S, Vt = torch.linalg.svd(W0, full_matrices=False)",
                "L, V = torch.linalg.eigh(W0.double().T @ W0.double())\n"
                "    S, Vt = L.flip(0)[:r].sqrt(), V.flip(1).T[:r]\n"
                "    U = (W0.double() @ Vt.T / S).to(W0.dtype)\n"
                "    S, Vt = S.to(W0.dtype), Vt.to(W0.dtype)",
            ),
            "full matrices": """\
def my_pissa(W0, r, scale):
    U, S, Vt = torch.linalg.svd(W0)
    A = (S[:r, None] / scale).sqrt() * Vt[:r]
    B = U[:, :r] * (S[:r] / scale).sqrt()
    return W0 - scale * B @ A, A, B
""",
        },
        "kinds": {
            "a list": returned("[*result]"),
            "parameters": returned("tuple(map(nn.Parameter, result))"),
        },
        "randomness": {
            "the same random signs in both": returned(
                "(lambda s: (result[0], s[:, None] * result[1], result[2] * s))"
                "(torch.where(torch.rand(r) < 0.5, -1.0, 1.0).to(W0.dtype))"
            )
        },
    },
    "5.5": {
        "arguments": {
            "fast first": groups(
                back="[{'lr': lr * ratio, 'params': fast}, {'lr': lr, 'params': slow}]"
            )
        },
        "state": {
            "new lists": groups(
                back="[dict(params=[*slow], lr=lr),"
                " dict(params=[*fast], lr=ratio * lr)]"
            )
        },
        "inputs": {
            "compared by is": groups(
                slow="[p for p in model.parameters() if p.requires_grad"
                " and all(p is not b for b in fast)]"
            ),
            "a group for each": groups(
                back="[{'params': [p], 'lr': lr} for p in slow]"
                " + [{'params': [p], 'lr': lr * ratio} for p in fast]"
            ),
        },
        "kinds": {
            "a tuple": returned("tuple(result)"),
            "the usual decay": returned(
                "[{**g, 'weight_decay': 0.01} for g in result]"
            ),
        },
        "randomness": {
            "in any order": groups(
                back="[{'params': [slow[i] for i in torch.randperm(len(slow))],"
                " 'lr': lr},"
                " {'params': fast, 'lr': lr * ratio}]"
            )
        },
    },
}
