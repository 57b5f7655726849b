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
        "all zeros": "all entries are zero",
        "before is forgotten": "`before` is not taken off",
        "after is forgotten": "`after` is left out",
        "the wrong sign": "the wrong sign",
        "by the norm": "by its square",
        "by the change": "divided by the norm of the change",
        "a cosine": "a cosine: both norms are in it",
        "a length": "counts rounding noise, too",
        "squared lengths": "a ratio of squared norms counts rounding noise",
        "the error": "is the error, not the share",
        "not divided": "not divided by ‖update‖²",
        "percent": "a share of 1 is all of it",
        "entry by entry": "the mean of the ratios",
        "before changed in place": "before itself was changed",
    },
    "8.3": {
        "all zeros": "expected a finite number above zero",
        "percent": "0.05, not 5 %",
        "the norm itself": "divide it by ‖W'‖",
        "the factor of B A": "the factor of B A was returned",
        "the square of the ratio": "take its root",
        "upside down": "t is the inverse",
        "a length": "It counts rounding noise, too",
        "the error": "That is the error",
        "codes": "half of the codes change there",
        "the root of the share": "the root of the share",
        "the update alone is rounded": "is W' left out of the sum",
        "nine tenths": "t is too large",
        "a tenth": "t is too small",
        "a coarse grid": "Is the grid too coarse",
        "the wrong side": "go to the wrong side",
        "the figure of the lesson": "the same t as for the weight before",
        "A changed in place": "A itself was changed",
        "a text": "return one number, t",
    },
    "8.4": {
        "all zeros": "a misspelled word",
        "all requantized": "keeps almost nothing of the update",
        "the phone dequantized": "it needs 160 MB, and there is room for 40",
        "the phone from the original": "W0 is not at hand",
        "the watch separate": "it needs 10 MB, and there is room for 1",
        "the camera requantized": "at 0.9 % requantizing keeps almost nothing",
        "the server separate": "too slow there",
        "the laptop requantized": "the adapter may stay separate",
        "the laptop from the original": "the adapter may stay separate",
        "a word misspelled": "allowed are separate, dequantized",
        "a device left out": "a device is left out",
    },
}
QLORA = "def my_qlora(x, q, A, B, scale):\n    {}\n"
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
        "by the mean": (
            "def my_kept(before, after, update):\n"
            "    change = after - before\n"
            "    return float((change * update).mean() / (update**2).mean())\n"
        ),
        "by a projection": (
            "def my_kept(before, after, update):\n"
            "    x = torch.linalg.lstsq(update.reshape(-1, 1), "
            "(after - before).reshape(-1, 1))\n"
            "    return x.solution.item()\n"
        ),
    },
    "8.3": {
        "a grid, then a finer one": (
            "def my_threshold(q, A, B):\n"
            "    W = pfs.nf4.dequantize(q)\n"
            "    D = B @ A / (B @ A).norm()\n"
            "    def kept(t):\n"
            "        dW = t * W.norm() * D\n"
            "        back = pfs.nf4.dequantize(pfs.nf4.quantize(W + dW))\n"
            "        return torch.sum((back - W) * dW) / torch.sum(dW * dW)\n"
            "    coarse = np.logspace(-3, 0, 30)\n"
            "    best = min(coarse, key=lambda t: abs(kept(float(t)) - 0.5))\n"
            "    fine = best * np.logspace(-0.15, 0.15, 30)\n"
            "    return min(fine, key=lambda t: abs(kept(float(t)) - 0.5))\n"
        ),
        "steps of a tenth": (
            "def my_threshold(q, A, B):\n"
            "    W, t = pfs.nf4.dequantize(q), 1e-3\n"
            "    while True:\n"
            "        dW = t * W.norm() * (B @ A) / (B @ A).norm()\n"
            "        back = pfs.nf4.dequantize(pfs.nf4.quantize(W + dW))\n"
            "        if ((back - W) * dW).sum() >= 0.5 * (dW * dW).sum():\n"
            "            return t\n"
            "        t *= 1.05\n"
        ),
    },
    "8.4": {
        "built by rules": (
            "def my_choices():\n"
            "    best = dict.fromkeys(['phone', 'laptop'], 'separate')\n"
            "    best.update(watch='requantized', server='dequantized')\n"
            "    return best | {'camera': 'original, quantized'}\n"
        ),
    },
}


(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)
