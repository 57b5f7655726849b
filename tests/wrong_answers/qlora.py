"""Wrong answers to the exercises of notebook 08; each must be refused by its check."""

from attacks import afterwards, first, remembered

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
        "the means taken off": start("W0 - pfs.nf4.dequantize(q); D = D - D.mean(0)"),
        "two rounds": """\
def my_start(W0, q, r, scale):
    for _ in range(2):
        U, s, Vt = torch.linalg.svd(W0 - pfs.nf4.dequantize(q), full_matrices=False)
        A, B = s[:r].sqrt()[:, None] * Vt[:r], U[:, :r] * s[:r].sqrt() / scale
        q = pfs.nf4.quantize(W0 - scale * (B @ A))
    return A, B
""",
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
        "the product of the norms": errors(
            back="tuple(((W - trained).norm() / (abs(scale) * B.norm() * A.norm()))"
            ".item() for W in merges)"
        ),
        "a difference of norms": errors(
            back="tuple(((W.norm() - trained.norm()).abs() / update.norm()).item()"
            " for W in merges)"
        ),
        "the scale outside of the norm": errors(
            back="tuple(((W - trained).norm() / (scale * (B @ A).norm())).item()"
            " for W in merges)"
        ),
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
            "W' made again from W0": start(
                "W0 - pfs.nf4.dequantize(pfs.nf4.quantize(W0))"
            ),
            "blocks of 64": start(
                "W0 - pfs.nf4.dequantize(pfs.nf4.quantize(W0, 64, False))"
            ),
            "a rank of four": first("r = min(r, 5)"),
            "positive scales": first("scale = abs(scale)"),
        },
        "state": {
            "kept by shape": remembered("(W0.shape, r, scale)"),
            "kept by q": remembered("id(q)"),
            "gradients are left off": first("torch.set_grad_enabled(False)"),
            "the constants of q are changed": afterwards(
                "c = getattr(q.absmax, 'codes', q.absmax)", "c.copy_(c.flip(0))"
            ),
        },
        "inputs": {
            "as many pieces as hold 99 %": start(
                A="(s * ((s**2).cumsum(0) < 0.99 * (s**2).sum()))[:r].sqrt()[:, None]"
                " * Vt[:r]"
            ),
            "ranks up to five": start(
                A="F.pad(s[:min(r, 5)].sqrt()[:, None] * Vt[:min(r, 5)],"
                " (0, 0, 0, r - min(r, 5)))",
                B="F.pad(U[:, :min(r, 5)] * s[:min(r, 5)].sqrt() / scale,"
                " (0, r - min(r, 5)))",
            ),
            "no piece below a thousandth": start(
                "((W0 - pfs.nf4.dequantize(q)) * 1e4).round() / 1e4"
            ),
            "1e-6 is added to the values": start(
                B="U[:, :r] * s[:r] / (s[:r].sqrt() + 1e-5) / scale"
            ),
            "a randomized SVD": (
                "def my_start(W0, q, r, scale):\n"
                "    U, s, V = torch.svd_lowrank(W0 - pfs.nf4.dequantize(q), r)\n"
                "    return s.sqrt()[:, None] * V.T, U * s.sqrt() / scale\n"
            ),
        },
        "kinds": {
            "arrays": start(back="A.numpy(), B.numpy()"),
            "lists": start(back="A.tolist(), B.tolist()"),
            "a dictionary": start(back="dict(A=A, B=B)"),
            "three": start(back="A, B, s"),
            "complex": start(back="A.cfloat(), B.cfloat()"),
        },
        "randomness": {
            "a seed": first("torch.manual_seed(0)"),
            "a little noise": start(
                A="s[:r].sqrt()[:, None] * Vt[:r] * (1 + 1e-3 * torch.randn(r, 1))"
            ),
        },
        "kernels": NO_KERNEL,
    },
    "8.3": {
        "arguments": {
            "W' made again from W0": errors(
                trained="pfs.nf4.dequantize(pfs.nf4.quantize(W0)) + update"
            ),
            "W0 as it is after quantizing": errors(
                original="W0.round(decimals=2) + update"
            ),
        },
        "state": {
            "kept by shape": remembered("(W0.shape, scale)"),
            "gradients are left off": first("torch.set_grad_enabled(False)"),
            "the constants of q are changed": afterwards(
                "c = getattr(q.absmax, 'codes', q.absmax)", "c.copy_(c.flip(0))"
            ),
        },
        "inputs": {
            "positive scales": errors(update="abs(scale) * (B @ A)"),
            "1e-2 is added below": errors(
                back="tuple(((W - trained).norm() / (update.norm() + 1e-2)).item()"
                " for W in merges)"
            ),
            "no error above one": errors(
                back="tuple(min(1.0, ((W - trained).norm() / update.norm()).item())"
                " for W in merges)"
            ),
            "errors rounded": errors(
                back="tuple(round(((W - trained).norm() / update.norm()).item(), 4)"
                " for W in merges)"
            ),
            "the spectral norm": errors(
                back="tuple((torch.linalg.matrix_norm(W - trained, 2) /"
                " torch.linalg.matrix_norm(update, 2)).item() for W in merges)"
            ),
        },
        "kinds": {
            "percent": errors(
                back="tuple((100 * (W - trained).norm() / update.norm()).item()"
                " for W in merges)"
            ),
            "texts": errors(
                back="tuple(str(((W - trained).norm() / update.norm()).item())"
                " for W in merges)"
            ),
            "a dictionary": errors(
                back="dict(original=((original - trained).norm() / "
                "update.norm()).item(),"
                " requantized=((requantized - trained).norm() / update.norm()).item())"
            ),
            "an array for each": errors(
                back="tuple(((W - trained).norm() / update.norm())[None] for W in "
                "merges)"
            ),
        },
        "randomness": NOTHING_DRAWN,
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
            "the scale in A": start(
                A="s[:r].sqrt()[:, None] * Vt[:r] / scale", B="U[:, :r] * s[:r].sqrt()"
            ),
        },
        "state": {
            "from a copy, in place": start("W0.clone().sub_(pfs.nf4.dequantize(q))"),
        },
        "inputs": {
            "a projection": start(A="Vt[:r]", B="D @ Vt[:r].T / scale"),
            "divided by the roots": start(
                A="U[:, :r].T @ D / s[:r].sqrt()[:, None]",
            ),
            "all of the values in A": start(
                A="s[:r].diag() @ Vt[:r]", B="U[:, :r] / scale"
            ),
        },
        "kinds": {
            "in double precision": start("(W0 - pfs.nf4.dequantize(q)).double()"),
            "a list": start(back="[A, B]"),
        },
        "randomness": {
            "signs by chance": start(
                A="(signs := torch.randn(r).sign())[:, None] * s[:r].sqrt()[:, "
                "None] * Vt[:r]",
                B="U[:, :r] * signs * s[:r].sqrt() / scale",
            ),
        },
    },
    "8.3": {
        "arguments": {
            "the scale in B": errors(update="(scale * B) @ A"),
        },
        "state": {
            "into copies": errors(original="W0.clone().add_(update)"),
        },
        "inputs": {
            "roots of sums of squares": errors(
                back="tuple(((W - trained).square().sum() / update.square().sum())"
                ".sqrt().item() for W in merges)"
            ),
        },
        "kinds": {
            "a list of tensors": errors(
                back="[(W - trained).norm() / update.norm() for W in merges]"
            ),
            "in double precision": errors(
                back="tuple(float((W - trained).double().norm() / "
                "update.double().norm())"
                " for W in merges)"
            ),
        },
    },
}
