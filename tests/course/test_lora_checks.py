"""Notebook 04's checks: what the common mistakes are told, and what else is right.

That every mutant is refused is tested in test_exercises.py. Here stands what a refusal
should say, and answers that differ from the notebook's and are as good.
"""

import build
import pytest
from exercise_checks import checked
from try_answers import lesson

from peft_from_scratch.course.checks import lora_from_scratch as checks

LESSON = lesson(build.FOLDER / "04_lora_from_scratch.py")

TOLD = {  # exercise: {mutant: what its learner must read}
    "4.1": {
        "all zeros": "all entries are zero",
        "no 1 / r": "not divided by r",
        "no scale": "no scale: multiply",
        "no alpha": "alpha is missing",
        "alpha // r": "drops what is behind the point",
        "alpha / d_in": "divided by d_in",
        "the sign": "the wrong sign",
        "A and B swapped": "A and B are swapped",
        "x A B, no transposes": "without the transposes",
        "W0 x alone": "the update is missing",
        "the update alone": "W0 x is missing",
        "W0 x twice": "W0 x is there twice",
        "h is scaled": "the whole of h is scaled",
        "the bias is lost": "the bias of the base is lost",
        "base.weight as it is stored": "call self.base(x)",
        "x is changed": "x itself was changed",
        "A and B are cut off": "no gradient reaches A",
        "x is cut off": "the layers below learn through A too",
    },
    "4.2": {
        "freezes last": "freeze it first",
        "freezes what it wraps alone": "the base was left trainable",
        "nothing is frozen": "the base was left trainable",
        "B alone trains": "A or B was frozen",
        "misses Conv1D": "Conv1D was left out",
        "a target within the last part": "not to have one in it",
        "never put in": "setattr",
        "put into the model": "setattr is for the module's parent",
        "put in as .base": "a LoRA inside a LoRA",
        "the first layer alone": "only the first layer was walked",
        "one LoRA for all": "make a new one for each module",
        "its own LoRA": "wrap(module) makes it",
        "its own LoRA, just like it": "wrap(module) makes it",
        "a copy is wrapped": "give the module itself",
        "wrapped twice": "wrap was called",
        "the count": "a list of names is needed, not a int",
        "names from last to first": "another order",
        "nothing at all": "no module was found",
    },
    "4.3": {
        "nothing is written": "nothing was written",
        "returned, not written": "nothing was written",
        "no transpose": "the transpose is missing: Conv1D",
        "a transpose where the shapes need one": "the transpose is missing: Conv1D",
        "always a transpose": "a transpose too many: nn.Linear",
        "no 1 / r": "not divided by r",
        "subtracted": "the wrong sign",
        "merged twice": "added twice",
        "W0 is lost": "W0 is lost",
        "rounds twice": "cast back at the very end",
        "rounds A and B": "cast back at the very end",
        "another parameter": "Write into the weight that is there",
        "the bias is scaled": "the bias was changed",
    },
    "4.4": {
        "the control is not asserted": "the control fails, and was not asserted",
        "no gain is not noticed": "the updates lower no loss",
        "the control may gain nothing": "a valid measurement was taken for void",
        "the control may keep the share": "the control fails",
        "the control without its sign": "compare without abs()",
        "the gain of everything": "'everything' has trained embeddings and norms",
        "the gain from random": "counted from 'random'",
        "a share of the loss": "a share of the pretrained loss",
        "near the whole update's loss": "compared with that of the whole update",
        "one rank after the other": "one rank after the other is tried",
        "from the full rank down": "one rank after the other is tried",
        "powers of two": "between two of them",
        "the full rank": "is it the smallest?",
        "above, never at": "exactly as much is enough",
        "one too many": "one rank off",
        "from rank zero": "an end of the interval that is no rank",
        "halves that are no ranks": "/ in the place of //",
        "always 0.95": "share was ignored",
        "the share that is kept": "this is not the smallest rank",
        "zero for void": "return None",
        "a float": "a whole number is asked for",
        "a text": "an int or None, no str",
    },
}
FORWARD = """\
class MyLoRA(nn.Module):
    def __init__(self, base, A, B, alpha):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scale = alpha / B.shape[1]

    def forward(self, x):
        {}
"""
INJECT = "def my_inject(model, targets, wrap):\n    {}\n"
MERGE = "def my_merge(base, A, B, alpha):\n    {}\n"
SEARCH = """\
def my_smallest_rank(loss_at, full_rank, losses, share=0.95):
    nothing, gain = losses["nothing"], losses["nothing"] - losses["update"]
    if not gain > 0 or (nothing - losses["random"]) / gain >= 1 - share:
        return None
    {}
"""
RIGHT = {  # exercise: {name: another right answer}
    "4.1": {
        "F.linear": FORWARD.format(
            "return self.base(x) + F.linear(F.linear(x, self.A), self.B) * self.scale"
        ),
        "einsum": FORWARD.format(
            "z = torch.einsum('...i,ri->...r', x, self.A)\n"
            "        z = torch.einsum('...r,or->...o', z, self.B)\n"
            "        return torch.add(self.base(x), z, alpha=self.scale)"
        ),
        "the whole of B A": FORWARD.format(
            "return self.scale * (x @ (self.B @ self.A).T) + self.base(x)"
        ),
        "columns": FORWARD.format(
            "columns = x.reshape(-1, x.shape[-1]).T\n"
            "        update = (self.B @ (self.A @ columns)).T * self.scale\n"
            "        return self.base(x) + update.reshape(*x.shape[:-1], -1)"
        ),
        "into the base's own output": FORWARD.format(
            "h = self.base(x)\n"
            "        h += self.scale * (x @ self.A.T @ self.B.T)\n"
            "        return h"
        ),
    },
    "4.2": {
        "no list before the walk": INJECT.format(
            "for parameter in model.parameters():\n"
            "        parameter.requires_grad = False\n"
            "    names = []\n"
            "    for name, module in model.named_modules():\n"
            "        *parents, last = name.split('.')\n"
            "        if last in targets and isinstance(module, (nn.Linear, Conv1D)):\n"
            "            new = wrap(module)\n"
            "            setattr(model.get_submodule('.'.join(parents)), last, new)\n"
            "            names.append(name)\n"
            "    return names"
        ),
        "child by child": INJECT.format(
            "model.requires_grad_(False)\n"
            "    def walk(parent, before):\n"
            "        for last, child in list(parent.named_children()):\n"
            "            if last in targets and type(child) in (nn.Linear, Conv1D):\n"
            "                setattr(parent, last, wrap(child))\n"
            "                yield before + last\n"
            "            else:\n"
            "                yield from walk(child, f'{before}{last}.')\n"
            "    return list(walk(model, ''))"
        ),
        "frozen after, A and B thawed": INJECT.format(
            "chosen = [(n, m) for n, m in model.named_modules()\n"
            "        if any(n == t or n.endswith('.' + t) for t in targets)\n"
            "        and isinstance(m, (nn.Linear, Conv1D))]\n"
            "    for n, m in chosen:\n"
            "        model.set_submodule(n, wrap(m))\n"
            "    model.requires_grad_(False)\n"
            "    for n, m in chosen:\n"
            "        new = model.get_submodule(n)\n"
            "        new.A.requires_grad_(), new.B.requires_grad_()\n"
            "    return tuple(n for n, _ in chosen)"
        ),
    },
    "4.3": {
        "in float64, by .data": MERGE.format(
            "dW = B.double() @ A.double() * alpha / B.shape[1]\n"
            "    if not isinstance(base, nn.Linear):\n"
            "        dW = dW.T\n"
            "    W = base.weight.data\n"
            "    base.weight.data = (W.double() + dW).to(W.dtype)"
        ),
        "einsum, the scale on B": MERGE.format(
            "turn = 'or,ri->io' if isinstance(base, Conv1D) else 'or,ri->oi'\n"
            "    dW = torch.einsum(turn, alpha / len(A) * B, A)\n"
            "    with torch.no_grad():\n"
            "        base.weight[:] = torch.add(dW, base.weight)"
        ),
        "added in place where that is exact": MERGE.format(
            "dW = alpha / len(A) * (B @ A)\n"
            "    dW = dW.t() if type(base).__name__ == 'Conv1D' else dW\n"
            "    with torch.no_grad():\n"
            "        base.weight += dW"
        ),
    },
    "4.4": {
        "the module bisect": SEARCH.format(
            "import bisect\n"
            "    keeps = lambda k: (nothing - loss_at(k)) / gain >= share\n"
            "    ranks = range(1, full_rank + 1)\n"
            "    return ranks[bisect.bisect_left(ranks, True, key=keeps)]"
        ),
        "itself, on the half that is left": SEARCH.format(
            "def within(low, high):\n"
            "        if low == high:\n"
            "            return low\n"
            "        middle = low + (high - low) // 2\n"
            "        if loss_at(middle) <= nothing - share * gain:\n"
            "            return within(low, middle)\n"
            "        return within(middle + 1, high)\n"
            "    return within(1, full_rank)"
        ),
        "bit by bit": SEARCH.format(
            "fails = 0\n"
            "    for bit in reversed(range(full_rank.bit_length())):\n"
            "        k = fails + 2**bit\n"
            "        if k < full_rank and nothing - loss_at(k) < share * gain:\n"
            "            fails = k\n"
            "    return fails + 1"
        ),
    },
}


(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)


@pytest.mark.parametrize(
    "check, stand_in",
    [
        (checks.lora_forward, checks.LoRA),
        (checks.lora_inject, checks.inject),
        (checks.lora_merge, checks.merge),
        (checks.lora_smallest_rank, checks.smallest_rank),
    ],
)
def test_what_works_in_the_place_of_an_answer_passes_its_check(check, stand_in):
    check(stand_in)


@pytest.mark.parametrize("case", [*checks.searches()], ids=lambda case: case.name)
def test_a_search_has_one_right_answer(case):
    """Found by looking at every rank; and every rank above it keeps the share too."""
    keeps = [case.kept(loss) >= case.share for loss in case.curve]
    random = case.kept(case.losses["random"])
    gains = case.losses["nothing"] > case.losses["update"]
    if not gains or random >= 1 - case.share:
        assert case.wanted is None
    else:
        assert case.wanted == keeps.index(True) + 1
        assert keeps == sorted(keeps)
        assert len(case.curve) <= 576


def test_searches_differ_in_their_answers():
    answers = [case.wanted for case in checks.searches()]
    assert answers.count(None) >= 4
    assert {1, 2, 301} < set(answers)
    assert any(c.wanted == c.full_rank > 1 for c in checks.searches())
