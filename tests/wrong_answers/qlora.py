"""Wrong answers to the exercises of notebook 08; each must be refused by its check."""

from attacks import afterwards, every_time_but, first, remembered, returned, stale

from peft_from_scratch.course.checks import qlora as checks  # noqa: F401

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


KEPT = """\
def my_kept(before, after, update):
    change = {change}
    inner = {inner}
    whole = {whole}
    return {back}
"""


def share(
    change="after - before",
    inner="(change * update).sum()",
    whole="update.square().sum()",
    back="(inner / whole).item()",
):
    return KEPT.format(change=change, inner=inner, whole=whole, back=back)


THRESHOLD = """\
def my_threshold(q, A, B):
    W, BA = pfs.nf4.dequantize(q), {BA}
    direction = {direction}

    def kept(t):
        update = t * direction
        change = {after} - {less}
        return {measure}

    low, high = {ends}
    while high / low > {close}:
        t = (low * high) ** 0.5
        low, high = (t, high) if {below} else (low, t)
    t = (low * high) ** 0.5
    return {back}
"""
AGAIN = "pfs.nf4.dequantize(pfs.nf4.quantize({}))"
ROUNDED = AGAIN.format("W + update")


def threshold(
    BA="B @ A",
    direction="BA * (W.norm() / BA.norm())",
    after=ROUNDED,
    less="W",
    measure="(change * update).sum() / update.square().sum()",
    ends="1e-3, 1.0",
    close="1.02",
    below="kept(t) < 0.5",
    back="t",
):
    return THRESHOLD.format(
        BA=BA,
        direction=direction,
        after=after,
        less=less,
        measure=measure,
        ends=ends,
        close=close,
        below=below,
        back=back,
    )


BEST = {
    "phone": "separate",
    "watch": "requantized",
    "camera": "original, quantized",
    "server": "dequantized",
    "laptop": "separate",
}


def choices(**changes):
    return f"def my_choices():\n    return {BEST | changes}\n"


GRID = """\
def my_threshold(q, A, B):
    W = pfs.nf4.dequantize(q)
    direction = (B @ A) * (W.norm() / (B @ A).norm())
    shares = []
    grid = {grid}
    for t in grid:
        after = pfs.nf4.dequantize(pfs.nf4.quantize(W + t * direction))
        shares.append(((after - W) * direction).sum() / t / direction.square().sum())
    shares = torch.stack(shares)
    return {back}
"""


def grid(grid="torch.logspace(-3, 0, 150)", back="grid[(shares - 0.5).abs().argmin()]"):
    return GRID.format(grid=grid, back=back)


MUTANTS = {
    "8.1": {
        "q saved for backward": product(
            keep="ctx.save_for_backward(q)",
            dx="dy @ pfs.nf4.dequantize(*ctx.saved_tensors), None",
        ),
        "a single gradient": product(dx=f"dy @ {CTX_W}"),
        "the gradient of q": product(dx=f"None, dy @ {CTX_W}"),
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
        "all zeros": share(back="0.0"),
        "before is forgotten": share(change="after"),
        "after is forgotten": share(change="before"),
        "the wrong sign": share(change="before - after"),
        "by the norm": share(whole="update.norm()"),
        "by the change": share(whole="change.square().sum()"),
        "a cosine": share(whole="change.norm() * update.norm()"),
        "a length": share(inner="change.norm()", whole="update.norm()"),
        "squared lengths": share(inner="change.square().sum()"),
        "the error": share(inner="(change - update).norm()", whole="update.norm()"),
        "not divided": share(whole="torch.tensor(1.0)"),
        "percent": share(back="(100 * inner / whole).item()"),
        "entry by entry": share(back="(change / update).mean().item()"),
        "upside down": share(back="(whole / inner).item()"),
        "absolute values": share(inner="(change * update).abs().sum()"),
        "the matrix product": share(
            inner="(change @ update.T).sum()", whole="(update @ update.T).sum()"
        ),
        "cut at zero": share(back="max(0.0, (inner / whole).item())"),
        "cut at one": share(back="min(1.0, (inner / whole).item())"),
    },
    "8.3": {
        "all zeros": threshold(back="0.0"),
        "percent": threshold(back="100 * t"),
        "the norm itself": threshold(back="(t * W.norm()).item()"),
        "the factor of B A": threshold(back="(t * W.norm() / BA.norm()).item()"),
        "the square of the ratio": threshold(back="t**2"),
        "upside down": threshold(back="1 / t"),
        "a length": threshold(measure="change.norm() / update.norm()"),
        "the error": threshold(
            measure="1 - (change - update).norm() / update.norm()",
        ),
        "half of the codes": threshold(measure="(change != 0).float().mean()"),
        "codes": threshold(
            measure="(pfs.nf4.quantize(W + update).codes() != q.codes()).float().mean()"
        ),
        "a cosine": threshold(
            measure="(change * update).sum() / (change.norm() * update.norm() + 1e-9)"
        ),
        "the root of the share": threshold(
            measure="((change * update).sum() / update.square().sum()).clamp(0).sqrt()"
        ),
        "the square of the share": threshold(
            measure="((change * update).sum() / update.square().sum()) ** 2"
        ),
        "the update alone is rounded": threshold(
            after=AGAIN.format("update"), less="0"
        ),
        "nothing is rounded": threshold(after="W + update"),
        "W' is not taken off": threshold(less="0"),
        "the wrong side": threshold(below="kept(t) > 0.5"),
        "nine tenths": threshold(below="kept(t) < 0.9"),
        "a tenth": threshold(below="kept(t) < 0.1"),
        "a coarse grid": grid("torch.logspace(-3, 0, 4)"),
        "a grid of one per decade and a third": grid("torch.logspace(-3, 0, 10)"),
        "an even grid": grid("torch.linspace(0.02, 1, 50)"),
        "the first that keeps anything": grid(
            back="grid[(shares > 0.02).nonzero()[0]]"
        ),
        "the last of the grid": grid(back="grid[-1]"),
        "its place in the grid": grid(back="int((shares - 0.5).abs().argmin())"),
        "the figure of the lesson": threshold(back="0.062"),
        "from the gaps alone": (
            "def my_threshold(q, A, B):\n"
            "    W = pfs.nf4.dequantize(q)\n"
            "    gap = torch.tensor(pfs.nf4.CODES['nf4']).sort().values.diff().mean()\n"
            "    return (gap / 2 * q.constants().mean() / W.square().mean().sqrt())"
            ".item()\n"
        ),
    },
    "8.4": {
        "all zeros": choices(**dict.fromkeys(BEST, 0)),
        "all separate": choices(**dict.fromkeys(BEST, "separate")),
        "all requantized": choices(**dict.fromkeys(BEST, "requantized")),
        "the phone requantized": choices(phone="requantized"),
        "the phone dequantized": choices(phone="dequantized"),
        "the phone from the original": choices(phone="original, quantized"),
        "the watch separate": choices(watch="separate"),
        "the watch from the original": choices(watch="original, quantized"),
        "the camera requantized": choices(camera="requantized"),
        "the camera separate": choices(camera="separate"),
        "the camera dequantized": choices(camera="dequantized"),
        "the server separate": choices(server="separate"),
        "the server requantized": choices(server="requantized"),
        "the laptop requantized": choices(laptop="requantized"),
        "the laptop from the original": choices(laptop="original, quantized"),
        "the laptop dequantized": choices(laptop="dequantized"),
        "a word misspelled": choices(watch="requantised"),
        "a device left out": (
            f"def my_choices():\n    return {dict(list(BEST.items())[:4])}\n"
        ),
    },
}


# ---------------------------------------------------------------------------- Attacks


NOTHING_DRAWN = "nothing is drawn: a random answer is refused by its values"
NO_KERNEL = "no kernel is written"

ATTACKS = {  # exercise: {class of checks/CHECKLIST.md: {name: source}}
    "8.1": {
        "arguments": {
            "codes in blocks of 64": product(
                y="x @ (torch.tensor(pfs.nf4.CODES['nf4'])[q.codes().long()]"
                " * q.constants().repeat_interleave(64)[: q.numel]).view(q.shape).T"
            ),
            "the codes of NF4": product(
                y="x @ pfs.nf4.dequantize(type(q)(q.packed, q.absmax, q.shape, q.dtype,"
                " q.block, 'nf4')).T"
            ),
        },
        "state": {
            "a cache of weights": "from functools import lru_cache\n"
            "weight = lru_cache(pfs.nf4.dequantize)\n\n\n"
            + product(y="x @ weight(q).T", dx="dy @ weight(ctx.q), None"),
            "W' in a closure": product(
                keep=f"W = {W}; ctx.back = lambda dy: dy @ W", dx="ctx.back(dy), None"
            ),
            "q in the class": product(
                keep="MyProduct.q = q",
                dx="dy @ pfs.nf4.dequantize(MyProduct.q), None",
            ),
            "q of the first layer": product(
                keep="ctx.q = MyProduct.q = getattr(MyProduct, 'q', q)"
                " if getattr(MyProduct, 'q', q).shape == q.shape else q",
                y=f"x @ {CTX_W}.T",
            ),
            "q outside": "last = []\n\n\n"
            + product(
                keep="last.append(q)",
                dx="dy @ pfs.nf4.dequantize(last[-1]), None",
            ),
            "nothing added while B is zero": product(
                h=f"MyProduct.apply(x, q) + (scale * ({UPDATE}) if B.any() else 0)"
            ),
            "W' in half precision until backward": product(
                keep=f"ctx.W = {W}.half(); ctx.rest = ({W} - ctx.W.float()).half()",
                dx="dy @ (ctx.W.float() + ctx.rest.float()), None",
            ),
            "W' in two pieces": product(
                keep=f"ctx.parts = [part.clone() for part in {W}.chunk(8)]",
                dx="dy @ torch.cat(ctx.parts), None",
            ),
            "W' as an array": product(
                keep=f"ctx.W = {W}.numpy().copy()",
                dx="dy @ torch.from_numpy(ctx.W), None",
            ),
            "W' as a list": product(
                keep=f"ctx.W = {W}.tolist()",
                dx="dy @ torch.tensor(ctx.W), None",
            ),
            "the codes unpacked until backward": product(
                keep="ctx.q, ctx.codes = q, q.codes()",
            ),
            "W' in the codes": product(
                keep=f"ctx.q = q; q.__dict__['W'] = {W}",
                dx="dy @ ctx.q.__dict__['W'], None",
            ),
            "W' outside": "weights = {}\n\n\n"
            + product(
                keep=f"ctx.q = q; weights.setdefault(id(q), {W})",
                dx="dy @ weights[id(ctx.q)], None",
            ),
            "gradients are left off": product(
                before="h = MyProduct.apply(x, q) + scale * (x @ A.T @ B.T);"
                " torch.set_grad_enabled(False)",
                h="h",
            ),
            "dy is changed in place": product(
                dx=f"dy.mul_(2) @ {CTX_W} / 2, None",
            ),
            "the constants are changed": product(
                keep="ctx.q = q; c = getattr(q.absmax, 'codes', q.absmax);"
                " c.copy_(c.flip(0))",
            ),
            "the rank-r product of the first call": product(
                h="MyProduct.apply(x, q) + scale * (x @ my_qlora.__dict__"
                ".setdefault((A.shape, B.shape), A).T @ B.T)"
            ),
            "parameters alone train": product(
                before="A = A if isinstance(A, nn.Parameter) else A.clone();"
                " B = B if isinstance(B, nn.Parameter) else B.detach()",
            ),
            "tensors alone train": product(
                before="B = B.data if isinstance(B, nn.Parameter) else B",
            ),
            "where x does not train, nothing does": product(
                before="A, B = (A, B) if x.requires_grad else (A.detach(), B.detach())",
            ),
            "where A is frozen, x is": product(
                before="x = x if A.requires_grad else x.detach()",
            ),
        },
        "inputs": {
            "a rank of one": product(
                before="B = B if B.shape[1] > 1 else B * 0.5",
            ),
            "ranks above four": product(before="A, B = A[:4], B[:, :4]"),
            "rows up to six": product(
                before="x = torch.cat([x[:6], 0 * x[6:]]) if x.dim() == 2 else x",
            ),
            "small updates are dropped": product(
                before="scale = scale if abs(scale) > 0.1 else 0.0",
            ),
            "positive scales": product(before="scale = abs(scale)"),
            "blocks that fill the rows": product(
                y="x @ pfs.nf4.dequantize(q).T if q.shape[1] % 8 == 0 else"
                " x @ pfs.nf4.dequantize(q).T * 0.9",
            ),
        },
        "kinds": {
            "in double precision": product(
                y=f"(x.double() @ {W}.double().T)",
                dx=f"(dy @ {CTX_W}.double()).float(), None",
            ),
            "a pair": product(h=f"(MyProduct.apply(x, q) + scale * ({UPDATE}), q)"),
            "an array": product(
                h=f"(MyProduct.apply(x, q) + scale * ({UPDATE})).detach().numpy()"
            ),
        },
        "randomness": {
            "dropout on x": product(
                h="MyProduct.apply(x, q) + scale * (F.dropout(x, 0.05) @ A.T @ B.T)"
            ),
            "a seed": product(before="torch.manual_seed(0)"),
        },
        "kernels": NO_KERNEL,
    },
    "8.2": {
        "arguments": {
            "before of the first call": stale("before"),
            "update of the first call": stale("update"),
        },
        "state": {
            "kept by shape": remembered("update.shape"),
            "wrong the second time": every_time_but(2, "0.5"),
            "before changed in place": share(change="before.neg_().add_(after)"),
            "the update changed in place": afterwards("update.mul_(2)"),
            "gradients are left off": first("torch.set_grad_enabled(False)"),
        },
        "inputs": {
            "1e-6 is added below": share(whole="update.square().sum() + 1e-6"),
            "the first rows": first(
                "before, after, update = before[:5], after[:5], update[:5]"
            ),
            "rounded": share(back="round((inner / whole).item(), 2)"),
            "positive": share(back="abs((inner / whole).item())"),
        },
        "kinds": {
            "a text": returned("str(result)"),
            "a pair": returned("(result, result)"),
            "a matrix": share(back="change * update / whole"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "8.3": {
        "arguments": {
            "q of the first call": stale("q"),
            "A of the first call": threshold(
                BA="B @ my_threshold.__dict__.setdefault((A.shape, B.shape), A)"
            ),
            "B of the first call": threshold(
                BA="my_threshold.__dict__.setdefault((A.shape, B.shape), B) @ A"
            ),
            "A and B are ignored": threshold(BA="torch.randn(q.shape)"),
        },
        "state": {
            "kept by shape": remembered("(q.shape, A.shape)"),
            "kept by q": remembered("id(q)"),
            "A changed in place": afterwards("A.mul_(2)"),
            "the constants of q are changed": afterwards(
                "c = getattr(q.absmax, 'codes', q.absmax)", "c.copy_(c.flip(0))"
            ),
            "gradients are left off": first("torch.set_grad_enabled(False)"),
            "wrong from the fifth call on": every_time_but(5, "0.01"),
        },
        "inputs": {
            "the size of B A counts": threshold(direction="BA"),
            "weights of unit size": threshold(
                direction="BA / BA.norm() * W.numel() ** 0.5"
            ),
            "thresholds above 2 %": threshold(ends="0.02, 1.0"),
            "thresholds below 5 %": threshold(ends="1e-3, 0.05"),
        },
        "kinds": {
            "a text": returned("str(result)"),
            "both ends": returned("(result, result)"),
            "a complex number": returned("complex(result)"),
            "true": returned("True"),
        },
        "randomness": {
            "a guess": returned("0.05 * torch.rand(()).item()"),
            "a seed": first("torch.manual_seed(0)"),
        },
        "kernels": NO_KERNEL,
    },
    "8.4": {
        "arguments": "there is no argument",
        "state": "the answer is a constant",
        "inputs": "there is no input",
        "kinds": {
            "a list of pairs": returned("list(result.items())"),
            "the values alone": returned("list(result.values())"),
            "lists of one": returned("{k: [v] for k, v in result.items()}"),
        },
        "randomness": {
            "drawn": returned(
                "dict(zip(result, np.random.permutation(list(result.values()))))"
            ),
        },
        "kernels": NO_KERNEL,
    },
}
ALSO_RIGHT = {  # exercise: {class: {name: source of an answer}}
    "8.1": {
        "arguments": {
            "the update in another order": product(
                h="MyProduct.apply(x, q) + (scale * x) @ (B @ A).T"
            ),
        },
        "state": {
            "codes and constants on ctx": product(
                keep="ctx.parts = q.packed, q.absmax, q.shape, q.dtype, q.block, "
                "q.codebook",
                dx="dy @ pfs.nf4.dequantize(type(q)(*ctx.parts)), None",
            ).replace("type(q)", "pfs.nf4.Quantized"),
            "x is saved too": product(keep="ctx.q = q; ctx.save_for_backward(x)"),
            "checkpointed": (
                "from torch.utils.checkpoint import checkpoint\n\n\n"
                "def my_qlora(x, q, A, B, scale):\n"
                "    def layer(x, A, B):\n"
                "        y = x @ pfs.nf4.dequantize(q).T\n"
                "        return y + scale * (x @ A.T @ B.T)\n"
                "    return checkpoint(layer, x, A, B, use_reentrant=False)\n"
            ),
        },
        "inputs": {
            "the context set up apart": """\
class MyProduct(torch.autograd.Function):
    @staticmethod
    def forward(x, q):
        return F.linear(x, pfs.nf4.dequantize(q))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.q = inputs[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return dy @ pfs.nf4.dequantize(ctx.q), None


def my_qlora(x, q, A, B, scale):
    return MyProduct.apply(x, q) + F.linear(scale * x, B @ A)
""",
            "a piece of the rows at a time": product(
                y="torch.cat([part @ pfs.nf4.dequantize(q).T for part in"
                " x.reshape(-1, x.shape[-1]).split(2)]).view(*x.shape[:-1], -1)"
            ),
        },
        "kinds": {
            "in double precision, and back": product(
                y=f"(x.double() @ {W}.double().T).to(x.dtype)",
                dx=f"(dy.double() @ {CTX_W}.double()).to(dy.dtype), None",
            ),
        },
        "randomness": {
            "a dropout of zero": product(
                h="MyProduct.apply(x, q) + scale * (F.dropout(x, 0.0) @ A.T @ B.T)"
            ),
        },
    },
    "8.2": {
        "arguments": {
            "einsum": share(inner="torch.einsum('ij,ij->', change, update)"),
        },
        "state": {
            "a copy, in place": share(change="after.clone().sub_(before)"),
        },
        "inputs": {
            "as vectors": share(inner="change.flatten() @ update.flatten()"),
            "the trace of a product": share(inner="(change.T @ update).trace()"),
        },
        "kinds": {
            "a tensor": share(back="inner / whole"),
            "in double precision": share(change="after.double() - before.double()"),
        },
    },
    "8.3": {
        "arguments": {
            "the transposed product": threshold(BA="(A.T @ B.T).T"),
        },
        "state": {
            "a copy of W', in place": threshold(
                after=AGAIN.format("W.clone().add_(update)")
            ),
        },
        "inputs": {
            "a fine grid": grid(),
            "the first of a fine grid": grid(
                "torch.logspace(-3, 0, 200)", "grid[(shares > 0.5).nonzero()[0]].item()"
            ),
            "an even, fine grid": grid("torch.linspace(0.001, 0.2, 300)"),
            "interpolated": grid(
                "torch.logspace(-3, 0, 40)",
                "float(np.interp(0.5, shares.numpy()[5:30], grid.numpy()[5:30]))",
            ),
            "wider ends": threshold(ends="1e-6, 100.0"),
            "halved evenly": threshold(close="1.001").replace(
                "t = (low * high) ** 0.5", "t = (low + high) / 2"
            ),
            "55 % is close enough": threshold(below="kept(t) < 0.55"),
        },
        "kinds": {
            "a tensor": threshold(back="torch.tensor(t)"),
            "NumPy's": threshold(back="np.float32(t)"),
        },
        "randomness": {
            "a random search": (
                "def my_threshold(q, A, B):\n"
                "    W = pfs.nf4.dequantize(q)\n"
                "    D = (B @ A) * (W.norm() / (B @ A).norm())\n"
                "    def off(t):\n"
                "        after = pfs.nf4.dequantize(pfs.nf4.quantize(W + t * D))\n"
                "        share = ((after - W) * D).sum() / (t * D.square().sum())\n"
                "        return abs(share.item() - 0.5)\n"
                "    tried = (10 ** (-3 * torch.rand(250))).tolist()\n"
                "    return min(tried, key=off)\n"
            ),
        },
    },
    "8.4": {
        "kinds": {
            "in another order": returned("dict(reversed(result.items()))"),
        },
        "randomness": {
            "in an order by chance": returned(
                "{k: result[k] for k in np.random.permutation(list(result)).tolist()}"
            ),
        },
    },
}
