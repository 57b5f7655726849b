"""Wrong answers to the exercises of notebook 05; each must be refused by its check."""

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
