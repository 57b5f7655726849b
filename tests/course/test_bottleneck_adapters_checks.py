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
        "an empty list": "no name was found",
        "after q_proj": "not the last of its sublayer",
        "up_proj for down_proj": "not the last of its sublayer",
        "a Llama's names alone": "no name was found",
        "the MLP alone": "Pfeiffer's placement",
        "attention alone": "behind attention only",
        "the first of each sublayer": "not the last of their sublayer",
        "every projection": "every projection: only the last",
        "every projection and the head": "the model's head too",
        "the layers": "the layers themselves",
        "the sublayers": "a projection's own name",
        "last parts": "give each name in full",
        "the head as well": "'lm_head' is no projection",
        "the first layer alone": "only the first layer",
        "the last layer alone": "only the last layer",
        "from last to first": "another order",
        "kind by kind": "another order",
        "each one twice": "there twice",
        "keys and values": "a list of names is needed, not a list of tuple",
        "the modules": "a list of names is needed, not a list of Linear",
        "their number": "not a int",
        "an injection": "model itself was changed",
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
PLACES = "def my_places(model):\n    {}\n"
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
        "by their names": PLACES.format(
            "ends = ('o_proj', 'down_proj', 'c_proj', 'out_proj', 'fc2')\n"
            "    return [n for n, _ in model.named_modules() if n.endswith(ends)]"
        ),
        "the library's": PLACES.format(
            "both = ('attention', 'mlp')\n"
            "    return pfs.houlsby.last_projections(model, both)"
        ),
        "where the kind changes": PLACES.format(
            "kinds = list(pfs.targets.kinds(model).items())\n"
            "    after = [kind for _, kind in kinds[1:]] + ['end']\n"
            "    pairs = zip(kinds, after)\n"
            "    return tuple(name for (name, kind), next in pairs if next != kind)"
        ),
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
