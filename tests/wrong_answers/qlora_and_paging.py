"""Wrong answers to the exercises of notebook 08; each must be refused by its check."""

from peft_from_scratch.course.checks import qlora_and_paging as checks  # noqa: F401

PREAMBLE = "from collections import OrderedDict, deque"

PRODUCT = """\
class MyProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q):
        {keep}
        return {y}

    @staticmethod
    def backward(ctx, dy):
        return {dx}


def my_qlora(x, q, A, B, scale):
    {before}
    return {h}
"""
W, CTX_W = "pfs.nf4.dequantize(q)", "pfs.nf4.dequantize(ctx.q)"
CODES = "q.codes().view(q.shape).float()"
CTX_CODES = "ctx.q.codes().view(ctx.q.shape).float()"
UPDATE = "x @ A.T @ B.T"


def product(
    y=f"x @ {W}.T",
    dx=f"dy @ {CTX_W}, None",
    h=f"MyProduct.apply(x, q) + scale * ({UPDATE})",
    keep="ctx.q = q",
    before="pass",
):
    return PRODUCT.format(y=y, dx=dx, h=h, keep=keep, before=before)


START = """\
def my_start(W0, q, r, scale):
    D = {D}
    U, s, Vt = torch.linalg.svd(D, full_matrices=False)
    A = {A}
    B = {B}
    return {back}
"""


def start(
    D="W0 - pfs.nf4.dequantize(q)",
    A="s[:r].sqrt()[:, None] * Vt[:r]",
    B="U[:, :r] * s[:r].sqrt() / scale",
    back="A, B",
):
    return START.format(D=D, A=A, B=B, back=back)


ERRORS = """\
def my_errors(W0, q, A, B, scale):
    update = {update}
    trained = {trained}
    original = {original}
    requantized = {requantized}
    merges = original, requantized
    return {back}
"""
AGAIN = "pfs.nf4.dequantize(pfs.nf4.quantize({}))"


def errors(
    update="scale * (B @ A)",
    trained="pfs.nf4.dequantize(q) + update",
    original="W0 + update",
    requantized="pfs.nf4.dequantize(pfs.nf4.quantize(trained))",
    back="tuple(((W - trained).norm() / update.norm()).item() for W in merges)",
):
    return ERRORS.format(
        update=update,
        trained=trained,
        original=original,
        requantized=requantized,
        back=back,
    )


PAGES = """\
class MyPages:
    def __init__(self, slots):
        self.slots, self.resident, self.faults = slots, [], 0
        self.calls = 0

    def use(self, page):
        left = None
        if page in self.resident:
            {hit}
        else:
            {fault}
            if {full}:
                left = {leave}
            {enter}
        return {back}
"""


def pages(
    hit="self.resident.remove(page); self.resident.append(page)",
    fault="self.faults += 1",
    full="len(self.resident) == self.slots",
    leave="self.resident.pop(0)",
    enter="self.resident.append(page)",
    back="left",
):
    return PAGES.format(
        hit=hit, fault=fault, full=full, leave=leave, enter=enter, back=back
    )


PAGER = """\
class MyPager:
    def __init__(self, store):
        self.store, self.page, self.states, self.dirty = store, None, None, False
        self.t = 0
        self.seen = {{}}

    def bring(self, page):
        if {there}:
            return
        if {must}:
            {write}
        self.states = {read}
        self.page, self.dirty = page, {fresh}

    def update(self, p, g, t, lr, beta1, beta2, eps, decay):
        {first}
        m, v = {moments}
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_({beta2}).add_((1 - {beta2}) * g**2)
        {decayed}
        p -= {step}
        self.dirty = {dirty}
"""


def pager(
    there="page == self.page",
    must="self.dirty",
    write="self.store.write(self.page, self.states)",
    read="self.store.read(page)",
    fresh="False",
    first="pass",
    moments="self.states",
    beta2="beta2",
    decayed="p *= 1 - lr * decay",
    step="lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)",
    dirty="True",
):
    return PAGER.format(
        there=there,
        must=must,
        write=write,
        read=read,
        fresh=fresh,
        first=first,
        moments=moments,
        beta2=beta2,
        decayed=decayed,
        step=step,
        dirty=dirty,
    )


MUTANTS = {
    "8.1": {
        "all zeros": product(h="0 * (MyProduct.apply(x, q) + x @ A.T @ B.T)"),
        "the codes as weights": product(y=f"x @ {CODES}.T"),
        "the codes in backward": product(dx=f"dy @ {CTX_CODES}, None"),
        "no scale": product(h=f"MyProduct.apply(x, q) + {UPDATE}"),
        "all scaled": product(h=f"scale * (MyProduct.apply(x, q) + {UPDATE})"),
        "W' x scaled": product(h=f"scale * MyProduct.apply(x, q) + {UPDATE}"),
        "the scale twice": product(h=f"MyProduct.apply(x, q) + scale**2 * ({UPDATE})"),
        "the wrong sign": product(h=f"MyProduct.apply(x, q) - scale * ({UPDATE})"),
        "no update": product(h="MyProduct.apply(x, q)"),
        "no W'": product(h=f"scale * ({UPDATE})"),
        "W' not transposed": product(
            y=f"x @ ({W} if q.shape[0] == q.shape[1] else {W}.T)"
        ),
        "B A not transposed": product(
            h="MyProduct.apply(x, q) + scale * (x @ (B @ A if q.shape[0] == q.shape[1]"
            " else (B @ A).T))"
        ),
        "transposed in backward": product(
            dx=f"dy @ ({CTX_W}.T if ctx.q.shape[0] == ctx.q.shape[1] else {CTX_W}),"
            " None"
        ),
        "no gradient through W'": product(dx="None, None"),
        "a zero gradient through W'": product(dx=f"0 * (dy @ {CTX_W}), None"),
        "x detached for A": product(
            h="MyProduct.apply(x, q) + scale * (x.detach() @ A.T @ B.T)"
        ),
        "x detached for W'": product(
            h=f"MyProduct.apply(x.detach(), q) + scale * ({UPDATE})"
        ),
        "A detached": product(
            h="MyProduct.apply(x, q) + scale * (x @ A.detach().T @ B.T)"
        ),
        "B detached": product(
            h="MyProduct.apply(x, q) + scale * (x @ A.T @ B.detach().T)"
        ),
        "all detached": product(
            h=f"(MyProduct.apply(x, q) + scale * ({UPDATE})).detach()"
        ),
        "dequantized without a gradient": product(
            before="with torch.no_grad(): y = MyProduct.apply(x, q)",
            h=f"y + scale * ({UPDATE})",
        ),
        "plain autograd, which keeps W'": product(h=f"x @ {W}.T + scale * ({UPDATE})"),
        "W' saved for backward": product(
            keep=f"W = {W}; ctx.save_for_backward(W)",
            y="x @ W.T",
            dx="dy @ ctx.saved_tensors[0], None",
        ),
        "W' kept on ctx": product(
            keep=f"ctx.W = {W}", y="x @ ctx.W.T", dx="dy @ ctx.W, None"
        ),
        "one weight for both": product(
            h=f"x @ ({W} + scale * (B @ A)).T",
        ),
        "half the gradient": product(dx=f"dy @ {CTX_W} / 2, None"),
        "a dead end in half precision": product(y=f"(x.half() @ {W}.half().T).float()"),
        "the gradient squared": product(dx=f"dy**2 @ {CTX_W}, None"),
        "the scale in place, on B": product(
            before="B.data.mul_(scale)", h=f"MyProduct.apply(x, q) + {UPDATE}"
        ),
    },
    "8.2": {
        "all zeros": start(A="0 * Vt[:r]", B="0 * U[:, :r]"),
        "the wrong sign": start("pfs.nf4.dequantize(q) - W0"),
        "the sign in both": start(A="-Vt[:r]", B="-U[:, :r] * s[:r] / -scale"),
        "the SVD of W0": start("W0"),
        "the SVD of W'": start("pfs.nf4.dequantize(q)"),
        "the SVD of the codes": start("q.codes().view(q.shape).float()"),
        "the scale forgotten": start(B="U[:, :r] * s[:r].sqrt()"),
        "the scale twice": start(A="s[:r].sqrt()[:, None] * Vt[:r] / scale"),
        "multiplied by the scale": start(B="U[:, :r] * s[:r].sqrt() * scale"),
        "no singular values": start(A="Vt[:r]", B="U[:, :r] / scale"),
        "the singular values twice": start(
            A="s[:r][:, None] * Vt[:r]", B="U[:, :r] * s[:r] / scale"
        ),
        "a root in one alone": start(A="Vt[:r]"),
        "the smallest pieces": start(
            A="s[-r:].sqrt()[:, None] * Vt[-r:]",
            B="U[:, -r:] * s[-r:].sqrt() / scale",
        ),
        "a piece too few": start(
            A="F.pad(s[:r - 1].sqrt()[:, None] * Vt[:r - 1], (0, 0, 0, 1))",
            B="F.pad(U[:, :r - 1] * s[:r - 1].sqrt() / scale, (0, 1))",
        ),
        "one rank too few": start(
            A="s[:r - 1].sqrt()[:, None] * Vt[:r - 1]",
            B="U[:, :r - 1] * s[:r - 1].sqrt() / scale",
        ),
        "one rank too many": start(
            A="s[:r + 1].sqrt()[:, None] * Vt[:r + 1]",
            B="U[:, :r + 1] * s[:r + 1].sqrt() / scale",
        ),
        "the full rank": start(A="s.sqrt()[:, None] * Vt", B="U * s.sqrt() / scale"),
        "the second piece first": start(
            A="s[1:r + 1].sqrt()[:, None] * Vt[1:r + 1]",
            B="U[:, 1:r + 1] * s[1:r + 1].sqrt() / scale",
        ),
        "A and B swapped": start(back="B, A"),
        "both transposed": start(back="A.T, B.T"),
        "V not transposed": start(
            A="s[:r].sqrt()[:, None] * (Vt.T[:r] if W0.shape[0] == W0.shape[1]"
            " else Vt[:r])"
        ),
        "rows of U": start(
            B="(U[:r].T if W0.shape[0] == W0.shape[1] else U[:, :r])"
            " * s[:r].sqrt() / scale"
        ),
        "LoRA's start": start(A="torch.randn(r, W0.shape[1])", B="0 * U[:, :r]"),
        "W0 changed in place": start("W0.sub_(pfs.nf4.dequantize(q))"),
        "the product": start(back="scale * (B @ A)"),
    },
    "8.3": {
        "all zeros": errors(back="(0.0, 0.0)"),
        "by the weight": errors(
            back="tuple(((W - trained).norm() / trained.norm()).item() for W in merges)"
        ),
        "by W0": errors(
            back="tuple(((W - trained).norm() / W0.norm()).item() for W in merges)"
        ),
        "not divided": errors(
            back="tuple((W - trained).norm().item() for W in merges)"
        ),
        "upside down": errors(
            back="tuple((update.norm() / (W - trained).norm()).item() for W in merges)"
        ),
        "against W0 + the update": errors(
            back="tuple(((W - original).norm() / update.norm()).item() for W in merges)"
        ),
        "trained without the update": errors(trained="pfs.nf4.dequantize(q)"),
        "trained beside W0": errors(trained="W0 + update"),
        "no scale": errors(update="B @ A"),
        "divided by the scale": errors(update="B @ A / scale"),
        "the scale twice": errors(update="scale**2 * (B @ A)"),
        "requantized W0 + the update": errors(requantized=AGAIN.format("W0 + update")),
        "requantized without the update": errors(requantized=AGAIN.format("W0")),
        "the codes plus the update": errors(requantized="pfs.nf4.dequantize(q)"),
        "the update requantized": errors(
            requantized="pfs.nf4.dequantize(q) + " + AGAIN.format("update")
        ),
        "not requantized": errors(requantized="trained"),
        "other codes": errors(
            requantized="pfs.nf4.dequantize(pfs.nf4.quantize(trained, code='fp4'))"
        ),
        "another block": errors(
            requantized="pfs.nf4.dequantize(pfs.nf4.quantize(trained, block=32))"
        ),
        "constants in full": errors(
            requantized="pfs.nf4.dequantize(pfs.nf4.quantize(trained, double=False))"
        ),
        "the original without the update": errors(original="W0"),
        "squared": errors(
            back="tuple(((W - trained).norm() / update.norm()).item() ** 2"
            " for W in merges)"
        ),
        "absolute values": errors(
            back="tuple(((W - trained).abs().sum() / update.abs().sum()).item()"
            " for W in merges)"
        ),
        "the largest entry": errors(
            back="tuple(((W - trained).abs().max() / update.abs().max()).item()"
            " for W in merges)"
        ),
        "entry by entry": errors(
            back="tuple(((W - trained) / update).norm().item() for W in merges)"
        ),
        "percent": errors(
            back="tuple((100 * (W - trained).norm() / update.norm()).item()"
            " for W in merges)"
        ),
        "swapped": errors(
            back="tuple(((W - trained).norm() / update.norm()).item()"
            " for W in merges[::-1])"
        ),
        "the first alone": errors(
            back="((original - trained).norm() / update.norm()).item()"
        ),
        "W0 changed in place": errors(original="W0.add_(update)"),
        "the merges themselves": errors(back="merges"),
    },
    "8.4": {
        "all zeros": pages(back="0"),
        "nobody ever leaves": pages(full="False"),
        "most recently used": pages(leave="self.resident.pop()"),
        "first in, first out": pages(hit="pass"),
        "a hit moves to the wrong end": pages(
            hit="self.resident.remove(page); self.resident.insert(0, page)"
        ),
        "the lowest number": pages(
            leave="self.resident.pop(self.resident.index(min(self.resident)))"
        ),
        "the highest number": pages(
            leave="self.resident.pop(self.resident.index(max(self.resident)))"
        ),
        "the second oldest": pages(leave="self.resident.pop(min(1, self.slots - 1))"),
        "one slot too few": pages(full="len(self.resident) >= max(self.slots - 1, 1)"),
        "one slot too many": pages(full="len(self.resident) > self.slots"),
        "all of them leave": pages(leave="self.resident[0]; self.resident.clear()"),
        "leaves on a hit too": pages(
            hit="left = self.resident.pop(0); self.resident.append(left)"
        ),
        "comes in twice": pages(hit="self.resident.append(page)"),
        "a hit counts": pages(
            hit="self.faults += 1; self.resident.remove(page);"
            " self.resident.append(page)"
        ),
        "faults never counted": pages(fault="pass"),
        "first uses not counted": pages(
            fault="self.faults += len(self.resident) == self.slots"
        ),
        "counts from one": pages(fault="self.faults = (self.faults or 1) + 1"),
        "the page that came": pages(back="page"),
        "the page that came, where one left": pages(
            back="None if left is None else page"
        ),
        "says not who": pages(back="None"),
        "says whether": pages(back="left is not None"),
        "the oldest, whether it left or not": pages(back="self.resident[0]"),
        "never comes in": pages(enter="pass"),
        "comes in at the front": pages(enter="self.resident.insert(0, page)"),
        "stays, though it left": pages(leave="self.resident[0]"),
        "the one that is free of charge": pages(
            leave="self.resident.pop(self.calls % self.slots)",
            fault="self.faults += 1; self.calls += 1",
        ),
        "the resident ones": pages(back="self.resident"),
    },
    "8.5": {
        "all zeros": pager(step="p"),
        "never written back": pager(must="False"),
        "always written back": pager(must="self.page is not None"),
        "written through, every time": pager(
            step="lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps);"
            " self.store.write(self.page, self.states)"
        ),
        "written even when it stays": pager(there="False"),
        "read even when it stays": pager(
            there="page == self.page and not self.store.read(page).isnan().all()"
        ),
        "always dirty": pager(fresh="True"),
        "never dirty": pager(dirty="False"),
        "dirty only where something is new": pager(dirty="t == 1"),
        "written to the new page's place": pager(
            write="self.store.write(page, self.states)"
        ),
        "m alone is written": pager(
            write="self.store.write(self.page, torch.stack([self.states[0],"
            " torch.zeros_like(self.states[1])]))"
        ),
        "v alone is written": pager(
            write="self.store.write(self.page, torch.stack([torch.zeros_like("
            "self.states[0]), self.states[1]]))"
        ),
        "m and v swapped on the way": pager(
            write="self.store.write(self.page, self.states.flip(0))"
        ),
        "a fresh page each time": pager(read="0 * self.store.read(page)"),
        "the page before": pager(read="self.store.read(self.page or 0)"),
        "t counts the pages": pager(
            first="self.t += 1; t = self.t",
        ),
        "t from zero, held at one": pager(first="t = max(t - 1, 1)"),
        "always the first step": pager(first="t = 1"),
        "no bias correction": pager(step="lr * m / (v.sqrt() + eps)"),
        "m not corrected": pager(step="lr * m / ((v / (1 - beta2**t)).sqrt() + eps)"),
        "v not corrected": pager(step="lr * (m / (1 - beta1**t)) / (v.sqrt() + eps)"),
        "corrections swapped": pager(
            step="lr * (m / (1 - beta2**t)) / ((v / (1 - beta1**t)).sqrt() + eps)"
        ),
        "no decay": pager(decayed="pass"),
        "decay in the gradient": pager(
            first="g = g + decay * p",
            decayed="pass",
        ),
        "decay without the rate": pager(decayed="p *= 1 - decay"),
        "decay after the step": pager(
            decayed="pass",
            step="lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps);"
            " p *= 1 - lr * decay",
        ),
        "eps under the root": pager(
            step="lr * (m / (1 - beta1**t)) / (v / (1 - beta2**t) + eps).sqrt()"
        ),
        "no root": pager(step="lr * (m / (1 - beta1**t)) / (v / (1 - beta2**t) + eps)"),
        "uphill": pager(
            step="-lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)"
        ),
        "one beta for both": pager(beta2="beta1"),
        "m and v from copies": pager(moments="self.states.clone()"),
        "a new p": pager(
            decayed="p = p * (1 - lr * decay)",
        ),
    },
}
