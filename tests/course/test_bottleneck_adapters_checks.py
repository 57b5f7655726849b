"""Notebook 11's checks: what the common mistakes are told, and what else is right.

That every mutant is refused is tested in test_exercises.py. Here stands what a refusal
should say, and answers that differ from the notebook's and are as good.
"""

import build
import pytest
from exercise_checks import checked
from try_answers import lesson

from peft_from_scratch.course.checks import bottleneck_adapters as checks

LESSON = lesson(build.FOLDER / "11_bottleneck_adapters.py")

TOLD = {  # exercise: {mutant: what its learner must read}
    "11.1": {
        "all zeros": "got       shape (2, 3, 4): ",
        "no residual": "the residual is missing",
        "the residual of x": "the residual is y",
        "x is added as well": "x is added as well",
        "y alone": "the bottleneck is missing",
        "y twice": "y is there twice",
        "subtracted": "the sign",
        "the activation after U": "σ comes after U",
        "no activation": "σ is missing",
        "the activation on the sum": "σ of the whole sum",
        "the activation before D": "σ comes before D",
        "the activation twice": "shape",
        "b_D lost": "b_D is missing",
        "b_U lost": "b_U is missing",
        "both biases lost": "both biases are missing",
        "b_D outside": "b_D is added behind σ",
        "b_U inside": "b_U stands inside σ",
        "D and U swapped": "D and U are swapped",
        "no transposes": "were not transposed",
        "beside, not behind": "D reads x",
        "the base is left out": "the base is left out",
        "base.weight as it is stored": "call self.base(x)",
        "y is cut off": "the layers below learn through D too",
        "D's numbers, not D": "no gradient reaches D",
        "no gradient at all": "no gradient reaches D and U",
        "x is changed": "x itself was changed",
    },
    "11.2": {
        "one bottleneck a layer": "there are two",
        "one in the count": "a layer has two",
        "no biases in the count": "the biases are missing",
        "no b_U in the count": "b_U is missing",
        "no b_D in the count": "b_D is missing",
        "D or U alone": "D or U is missing",
        "rounded down": "rounded down",
        "rounded up": "rounded up",
        "not rounded": "a whole number",
        "the budget as the count": "the budget in the place of the count",
        "m alone": "return all 2",
    },
    "11.3": {
        "everything is folded": "GELU is nearly z",
        "nothing is folded": "`return` is missing",
        "the sides are swapped": "A and B are swapped",
        "D in place of A": "LoRA's A reads x",
        "transposed": "transposed",
        "no slope": "the slope s of sigma is missing",
        "the slope twice": "the slope s is there twice",
        "the slope is sigma(1)": "sigma(1) - sigma(0)",
        "the sign": "wrong sign",
        "full rank": "rank m at most",
        "b lost": "b itself is missing",
        "D b lost": "D b is missing",
        "b_D lost": "b_D is missing",
        "b_U lost": "b_U is missing",
        "c lost": "c = sigma(0) is missing",
        "c outside U": "c passes through U too",
        "no slope in the bias": "missing in the bias",
        "LoRA has no bias": "it has no bias",
        "its own bias alone": "the bottleneck adds to it",
        "an offset is refused": "An offset is no bend",
        "positive z alone": "one sign only",
        "small z alone": "small z only",
        "up to eight": "does not reach z = 10",
        "whole numbers": "where the sine is zero",
        "half numbers": "where the sine is zero",
        "a wide tolerance": "tolerance is too wide",
        "beyond ten": "looks beyond -10 to 10",
        "A and B alone": "return all 3",
        "the weight and the bias": "return all 3",
        "A, B and a number": "a number in place of a vector",
    },
}
FORWARD = """\
class MyBottleneck(nn.Module):
    def __init__(self, base, D, b_D, U, b_U, sigma):
        super().__init__()
        self.base, self.sigma = base, sigma
        self.D, self.b_D = nn.Parameter(D), nn.Parameter(b_D)
        self.U, self.b_U = nn.Parameter(U), nn.Parameter(b_U)

    def forward(self, x):
        {}
"""
UNITS = "def my_units(d, budget):\n    {}\n"
RIGHT = {  # exercise: {name: another right answer}
    "11.1": {
        "F.linear": FORWARD.format(
            "y = self.base(x)\n"
            "        z = self.sigma(F.linear(y, self.D, self.b_D))\n"
            "        return F.linear(z, self.U, self.b_U) + y"
        ),
        "einsum": FORWARD.format(
            "y = self.base(x)\n"
            "        z = torch.einsum('...d,md->...m', y, self.D) + self.b_D\n"
            "        h = torch.einsum('...m,dm->...d', self.sigma(z), self.U)\n"
            "        return y + h + self.b_U"
        ),
        "columns": FORWARD.format(
            "y = self.base(x)\n"
            "        rows = y.reshape(-1, y.shape[-1])\n"
            "        z = self.sigma(self.D @ rows.T + self.b_D[:, None])\n"
            "        h = rows.T + self.U @ z + self.b_U[:, None]\n"
            "        return h.T.reshape(y.shape)"
        ),
    },
    "11.2": {
        "a search": UNITS.format(
            "sizes = [2 * (2 * m * d + d + m) for m in range(d + 1)]\n"
            "    m = min(range(1, d + 1), key=lambda m: abs(sizes[m] - budget))\n"
            "    return [m, sizes[m]]"
        ),
        "half a budget": UNITS.format(
            "m = int((budget / 2 - d) / (2 * d + 1) + 0.5)\n"
            "    return m, 2 * (m * (2 * d + 1) + d)"
        ),
        "up, while it comes closer": UNITS.format(
            "size = lambda m: 2 * (m * d + m) + 2 * (d * m + d)\n"
            "    m = 1\n"
            "    while abs(size(m + 1) - budget) < abs(size(m) - budget):\n"
            "        m += 1\n"
            "    return m, size(m)"
        ),
    },
    "11.3": {
        "the lesson's": "my_fold = checks.our_fold",
        "by the whole function": """\
def my_fold(W0, b, D, b_D, U, b_U, sigma):
    z = torch.arange(-1000, 1001, dtype=torch.float64) / 100
    slopes = sigma(z).diff() / 0.01
    if (slopes - slopes.mean()).abs().max() > 1e-6:
        return None
    b = b if b is not None else 0 * b_U
    h = lambda y: y + U @ sigma(D @ y + b_D) + b_U
    s = slopes.mean()
    c = sigma(z[1000])
    return s * (D @ W0), U, b + U @ (s * (D @ b + b_D) + c) + b_U
""",
    },
}


(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)


def test_every_budget_has_one_answer():
    for d, budget in checks.budgets():
        off = sorted(abs(checks._formula(d, m) - budget) for m in range(1, d + 1))
        assert len(off) == 1 or off[0] < off[1]


@pytest.mark.parametrize("d", [1, 8, 576])
def test_a_count_is_the_librarys(d):
    for m in {1, d // 2 + 1, d}:
        assert checks._formula(d, m) == 2 * checks.counted(d, m)
