"""Notebook 08's checks: what the common mistakes are told, and what else is right."""

import build
from exercise_checks import checked
from try_answers import lesson

LESSON = lesson(build.FOLDER / "08_qlora.py")

TOLD = {  # exercise: {mutant: what its learner must read}
    "8.1": {
        "all zeros": "all entries are zero",
        "the codes as weights": "the codes are no weights",
        "the codes in backward": "in backward too they are dequantized",
        "no scale": "B A is not scaled",
        "all scaled": "the whole of h is scaled",
        "W' x scaled": "W' x is scaled, in the place of B A x",
        "the scale twice": "the scale is there twice",
        "the wrong sign": "the update is added",
        "no update": "the update is missing",
        "no W'": "W' x is missing",
        "W' not transposed": "W' was not transposed",
        "B A not transposed": "B A was not transposed",
        "transposed in backward": "W' was transposed in backward",
        "no gradient through W'": "the gradient through W' is missing",
        "x detached for A": "through A and B it must go too",
        "A detached": "no gradient reaches A",
        "B detached": "no gradient reaches B",
        "all detached": "no gradient passes through it",
        "plain autograd, which keeps W'": "W' is still in memory",
        "W' saved for backward": "dequantize again in backward()",
        "W' kept on ctx": "keep ctx.q",
        "the scale in place, on B": "B itself was changed",
    },
    "8.2": {
        "all zeros": "B A is zero",
        "the wrong sign": "W0 - W', not W' - W0",
        "the SVD of W0": "the SVD of W0, not of what quantizing took",
        "the SVD of W'": "the SVD of W', not of W0 - W'",
        "the scale forgotten": "the scale is forgotten",
        "the scale twice": "once is enough",
        "no singular values": "the singular values are missing",
        "the singular values twice": "there twice",
        "a root in one alone": "one of the two alone",
        "the smallest pieces": "the smallest pieces were kept",
        "a piece too few": "one piece too few",
        "one rank too few": "not r pieces were kept",
        "one rank too many": "not r pieces were kept",
        "A and B swapped": "`return B, A`",
        "LoRA's start": "LoRA's own start",
        "W0 changed in place": "W0 itself was changed",
        "the product": "`return A, B` is missing",
    },
    "8.3": {
        "all zeros": "the adapter was trained beside W'",
        "by the weight": "divided by the weight's norm",
        "not divided": "not divided by",
        "against W0 + the update": "the adapter was trained beside W'",
        "trained without the update": "without the update",
        "requantized W0 + the update": "requantized W0 + ΔW",
        "requantized without the update": "requantized without the update",
        "no scale": "the update is not scaled",
        "squared": "take the root",
        "absolute values": "norms are asked for",
        "swapped": "the two are swapped",
        "the first alone": "return all 2",
        "not requantized": "all entries are zero",
    },
}
QLORA = "def my_qlora(x, q, A, B, scale):\n    {}\n"
START = "def my_start(W0, q, r, scale):\n    {}\n"
ERRORS = "def my_errors(W0, q, A, B, scale):\n    {}\n"
RIGHT = {  # exercise: {name: another right answer}
    "8.1": {
        "made again by checkpointing": QLORA.format(
            "from torch.utils.checkpoint import checkpoint\n"
            "    def product(x):\n"
            "        return x @ pfs.nf4.dequantize(q).T\n"
            "    y = checkpoint(product, x, use_reentrant=False)\n"
            "    return y + x @ A.T @ (scale * B).T"
        ),
        "row by row, in one Function": (
            "class Mine(torch.autograd.Function):\n"
            "    @staticmethod\n"
            "    def forward(ctx, x, q, A, B, scale):\n"
            "        ctx.save_for_backward(x, A, B)\n"
            "        ctx.q, ctx.scale = q, scale\n"
            "        W = pfs.nf4.dequantize(q) + scale * (B @ A)\n"
            "        return F.linear(x, W)\n"
            "    @staticmethod\n"
            "    def backward(ctx, dy):\n"
            "        x, A, B = ctx.saved_tensors\n"
            "        dW = dy.flatten(0, -2).T @ x.flatten(0, -2)\n"
            "        W = pfs.nf4.dequantize(ctx.q) + ctx.scale * (B @ A)\n"
            "        dA, dB = ctx.scale * B.T @ dW, ctx.scale * dW @ A.T\n"
            "        return dy @ W, None, dA, dB, None\n"
            "def my_qlora(x, q, A, B, scale):\n"
            "    return Mine.apply(x, q, A, B, scale)\n"
        ),
    },
    "8.2": {
        "all of the values in B": START.format(
            "U, s, Vt = torch.linalg.svd(W0 - pfs.nf4.dequantize(q))\n"
            "    return Vt[:r], U[:, :r] @ s[:r].diag() / scale"
        ),
        "by eigenvectors": START.format(
            "D = (W0 - pfs.nf4.dequantize(q)).double()\n"
            "    _, V = torch.linalg.eigh(D.T @ D)\n"
            "    A = V[:, -r:].T\n"
            "    return A.float(), (D @ A.T / scale).float()"
        ),
    },
    "8.3": {
        "from the codes' own error": ERRORS.format(
            "W = pfs.nf4.dequantize(q)\n"
            "    dW = scale * B @ A\n"
            "    T = W + dW\n"
            "    back = pfs.nf4.dequantize(pfs.nf4.quantize(T))\n"
            "    return [(W0 - W).norm() / dW.norm(), (T - back).norm() / dW.norm()]"
        ),
    },
}


(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)
