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
        "one learning rate for both": "that is the confound",
        "by test loss": "choose by validation loss",
        "by the mean over all seeds": "with seed 0 alone",
        "the lower end alone": "the highest that was tried",
        "the upper end alone": "the lowest that was tried",
        "ends do not matter": "a better one may lie outside",
        "one grid for both": "that method's own grid",
        "the means alone": "compared without their interval",
        "normal, not Student's t": "Student's t",
        "not paired": "the seeds were not paired",
        "paired by the order": "pair equal seeds",
        "validation losses compared": "compare test losses",
        "the last learning rate of a seed": "compare at the own one alone",
        "the higher loss wins": "the lower test loss wins",
        "the difference": "a text is needed",
    },
    "5.3": {
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
    "5.4": {
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
}
WINNER = "def my_winner(runs):\n    {}\n"
SIZE = "def my_size(base, A, B, alpha, x, rslora):\n    {}\n"
RANK = "def my_rank(shapes, targets, layers, budget):\n    {}\n"
DORA = "def my_dora(x, W0, A, B, m, scale):\n    {}\n"
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
        "by the library's way": WINNER.format(
            "names = sorted({r['method'] for r in runs}, reverse=True)\n"
            "    tests = []\n"
            "    for name in names:\n"
            "        own = [r for r in runs if r['method'] == name]\n"
            "        searched = sorted((r['lr'], r['validation'])\n"
            "            for r in own if r['seed'] == 0)\n"
            "        losses = [loss for _, loss in searched]\n"
            "        place = losses.index(min(losses))\n"
            "        if not 0 < place < len(losses) - 1:\n"
            "            return 'search further'\n"
            "        lr = searched[place][0]\n"
            "        tests.append({r['seed']: r['test'] for r in own\n"
            "            if r['lr'] == lr})\n"
            "    both = sorted(tests[0].keys() & tests[1])\n"
            "    _, low, high = over_seeds([tests[0][s] - tests[1][s] for s in both])\n"
            "    if low > 0:\n"
            "        return names[1]\n"
            "    return names[0] if high < 0 else 'undecided'"
        ),
    },
    "5.3": {
        "a loop": RANK.format(
            "r = 0\n"
            "    most = min(side for t in targets for side in shapes[t])\n"
            "    cost = sum(o + i for o, i in (shapes[t] for t in targets)) * layers\n"
            "    while r < most and (r + 1) * cost <= budget:\n"
            "        r += 1\n"
            "    return r"
        ),
    },
    "5.4": {
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
}


(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)
