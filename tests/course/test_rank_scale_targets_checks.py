"""Notebook 05's checks: what the common mistakes are told, and what else is right.

That every mutant is refused is tested in test_exercises.py. Here stands what a refusal
should say, and answers that differ from the notebook's and are as good.
"""

import build
from exercise_checks import checked
from try_answers import lesson

LESSON = lesson(build.FOLDER / "05_rank_scale_targets.py")

TOLD = {  # exercise: {mutant: what its learner must read}
    "5.1": {
        "alpha / r always": "one serves for both",
        "the two swapped": "the two scales are swapped",
        "alpha // r": "drops what is behind the point",
        "sqrt(alpha) / r": "the root is of r alone",
        "no 1 / r": "not divided by r",
        "no scale": "the scale is missing",
        "of the matrices": "the sizes of the matrices",
        "upside down": "upside down",
        "over the whole output": "the base's alone is meant",
        "the bias left out": "the base's bias is left out",
        "no root": "the root is missing",
        "the update alone": "divide by the size of base(x)",
        "absolute values": "the mean of absolute values",
        "x is changed": "x itself was changed",
    },
    "5.2": {
        "A alone": "B is forgotten",
        "B alone": "A is forgotten",
        "one layer": "the number of layers is left out",
        "every projection": "not the targets alone",
        "rounds up": "rounded up",
        "strictly less": "spends exactly the budget",
        "no bound": "above the smallest side",
        "at least one": "return 0",
        "a fraction": "a whole number is needed",
        "nothing at all": "`return` is missing",
    },
    "5.3": {
        "all zeros": "all entries are zero",
        "LoRA": "m is missing",
        "columns": "the length of columns",
        "one length": "one a row is meant",
        "not detached": "was not detached",
        "the length of W0": "the length of W0's rows",
        "no length": "not divided by the length",
        "no m": "every row has the length one",
        "m detached": "no gradient reaches m",
        "m added": "it multiplies",
        "no scale": "the scale is missing",
        "squared": "take the root",
        "upside down": "upside down",
        "A B": "A B in the place of B A",
        "all detached": "the whole of h is detached",
    },
    "5.4": {
        "nothing is taken out": "count its largest part twice",
        "added": "the principal part is taken out",
        "no scale in the rest": "the scale is missing",
        "S, no root": "Likely mistake",
        "the smallest": "the smallest directions",
        "A and B swapped": "swapped or turned",
        "no rest": "`return W_res, A, B`",
        "V, not its transpose": "Likely mistake",
        "S in B alone": "each has its root",
        "A larger, B smaller": "how A and B share it",
        "W0 is changed": "W0 itself was changed",
    },
    "5.5": {
        "one rate": "one rate for all",
        "A is fast": "A and B are swapped",
        "both are fast": "A has the fast rate too",
        "the biases are fast": "the biases are slow",
        "divided": "divided by the ratio",
        "A is slowed down": "A was slowed down",
        "the ratio alone": "the ratio is no rate",
        "A is lost": "missing",
        "B is lost": "the group of B is missing",
        "the biases are lost": "neither A nor B was left out",
        "frozen ones too": "frozen parameters were given too",
        "B in both": "there twice",
        "copies": "none of the model's",
        "another key": "another key",
        "lists, no dicts": "expected a list of dicts",
    },
}
SIZE = "def my_size(base, A, B, alpha, x, rslora):\n    {}\n"
RANK = "def my_rank(shapes, targets, layers, budget):\n    {}\n"
DORA = "def my_dora(x, W0, A, B, m, scale):\n    {}\n"
PISSA = "def my_pissa(W0, r, scale):\n    {}\n"
GROUPS = "def my_groups(model, lr, ratio):\n    {}\n"
RIGHT = {  # exercise: {name: another right answer}
    "5.1": {
        "norms, a tensor": SIZE.format(
            "s = alpha / len(A) ** (0.5 if rslora else 1)\n"
            "    return s * F.linear(F.linear(x, A), B).norm() / base(x).norm()"
        ),
        "by the whole of B A": SIZE.format(
            "s = alpha / [len(A), math.sqrt(len(A))][rslora]\n"
            "    rms = lambda y: float(y.pow(2).mean()) ** 0.5\n"
            "    return rms(x @ (s * B @ A).T) / rms(base(x))"
        ),
    },
    "5.2": {
        "a loop": RANK.format(
            "r = 0\n"
            "    most = min(side for t in targets for side in shapes[t])\n"
            "    cost = sum(o + i for o, i in (shapes[t] for t in targets)) * layers\n"
            "    while r < most and (r + 1) * cost <= budget:\n"
            "        r += 1\n"
            "    return r"
        ),
    },
    "5.3": {
        "no_grad": DORA.format(
            "with torch.no_grad():\n"
            "        length = (W0 + scale * B @ A).square().sum(1).sqrt()\n"
            "    return (x @ W0.T + scale * (x @ A.T @ B.T)) * (m / length)"
        ),
        "the weight first": DORA.format(
            "V = W0 + scale * torch.mm(B, A)\n"
            "    return F.linear(x, (m / V.detach().norm(dim=1))[:, None] * V)"
        ),
    },
    "5.4": {
        "the other signs, a list": PISSA.format(
            "U, S, V = torch.svd(W0)\n"
            "    root = torch.diag(S[:r].sqrt())\n"
            "    A = -root @ V.T[:r] / scale**0.5\n"
            "    B = -U[:, :r] @ root / scale**0.5\n"
            "    return [W0 - U[:, :r] @ root @ root @ V.T[:r], A, B]"
        ),
        "the rest from the other directions": PISSA.format(
            "U, S, Vt = torch.linalg.svd(W0, full_matrices=False)\n"
            "    root = (S / scale) ** 0.5\n"
            "    A, B = root[:, None] * Vt, U * root\n"
            "    return scale * B[:, r:] @ A[r:], A[:r], B[:, :r]"
        ),
    },
    "5.5": {
        "by name, a generator": GROUPS.format(
            "named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]\n"
            "    for fast in (True, False):\n"
            "        held = [p for n, p in named if n.endswith('.B') == fast]\n"
            "        yield {'params': held, 'lr': lr * ratio if fast else lr}"
        ),
        "a group for each, named": GROUPS.format(
            "return [{'params': p, 'name': n,\n"
            "        'lr': lr * (ratio if n.split('.')[-1] == 'B' else 1)}\n"
            "        for n, p in pfs.trainable(model).items()]"
        ),
    },
}


(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)
