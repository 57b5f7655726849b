"""Notebook 01's checks: right answers in other words pass, wrong ones are explained."""

import build
import pytest
from try_answers import lesson

from peft_from_scratch.course.checks import full_fine_tuning as checks
from peft_from_scratch.ledger import runs
from peft_from_scratch.ledger.experiments import data_size

LESSON = lesson(build.FOLDER / "01_full_fine_tuning.py")
EXERCISES = {exercise.id: exercise for exercise in LESSON.exercises}

RIGHT = {
    "1.1": {
        "a comprehension each": """
def my_batch(rows, end, pad):
    t = max(len(p) + len(a) for p, a in rows) + 1
    ids = [[*p, *a, end] + [pad] * (t - len(p + a) - 1) for p, a in rows]
    labels = [[-100] * len(p) + [*a, end] for p, a in rows]
    labels = [row + [-100] * (t - len(row)) for row in labels]
    return [torch.tensor(ids), torch.tensor(labels)]
""",
        "pad_sequence": """
def my_batch(rows, end, pad):
    pack = nn.utils.rnn.pad_sequence
    ids = [torch.tensor(p + a + [end]) for p, a in rows]
    labels = [row.clone() for row in ids]
    for (p, _), row in zip(rows, labels):
        row[: len(p)] = -100
    return (
        pack(ids, batch_first=True, padding_value=pad),
        pack(labels, batch_first=True, padding_value=-100),
    )
""",
        "filled in": """
def my_batch(rows, end, pad):
    shape = len(rows), max(len(p) + len(a) + 1 for p, a in rows)
    ids = torch.full(shape, pad)
    labels = torch.full(shape, -100)
    for i, (p, a) in enumerate(rows):
        whole = torch.tensor(p + a + [end])
        ids[i, : len(whole)] = whole
        labels[i, len(p) : len(whole)] = whole[len(p) :]
    return ids, labels
""",
    },
    "1.2": {
        "log_softmax and a mask": """
def my_loss(logits, labels, tokens):
    y = labels[:, 1:]
    logp = logits[:, :-1].float().log_softmax(-1)
    chosen = logp.gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return -(chosen * (y != -100)).sum() / tokens
""",
        "labelled positions alone": """
def my_loss(logits, labels, tokens):
    keep = labels[:, 1:] != -100
    z, y = logits[:, :-1][keep].float(), labels[:, 1:][keep]
    return (z.logsumexp(-1) - z[torch.arange(len(y)), y]).sum() / tokens
""",
        "in double precision": """
def my_loss(logits, labels, tokens):
    z, y = logits[:, :-1].double().transpose(1, 2), labels[:, 1:]
    return F.cross_entropy(z, y, reduction="none").sum() / tokens
""",
        "row by row, nothing where nothing is": """
def my_loss(logits, labels, tokens):
    if not (labels[:, 1:] != -100).any():
        return 0.0
    pairs = zip(logits.float(), labels)
    return sum(
        F.cross_entropy(z[:-1], y[1:], reduction="sum") / tokens for z, y in pairs
    )
""",
    },
    "1.3": {
        "lerp and addcdiv": """
def my_adamw(W, g, m, v, t, lr, betas, eps, decay):
    m, v = torch.lerp(m, g, 1 - betas[0]), torch.lerp(v, g**2, 1 - betas[1])
    root = (v / (1 - betas[1] ** t)) ** 0.5 + eps
    W = W.mul(1 - lr * decay).addcdiv(m, root, value=-lr / (1 - betas[0] ** t))
    return W, m, v
""",
        "in place on copies": """
def my_adamw(W, g, m, v, t, lr, betas, eps, decay):
    W, m, v = W.clone(), m.clone(), v.clone()
    m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    W -= lr * decay * W
    W -= lr * (m / (1 - math.pow(betas[0], t))) / (
        torch.sqrt(v / (1 - math.pow(betas[1], t))) + eps
    )
    return [W, m, v]
""",
        "the decay in one term with the step": """
def my_adamw(W, g, m, v, t, lr, betas, eps, decay):
    (b1, b2), was = betas, W
    m = m + (1 - b1) * (g - m)
    v = v - (1 - b2) * (v - g.square())
    size = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
    step = m / (v.sqrt() + eps * math.sqrt(1 - b2**t))
    return was - size * step - lr * decay * was, m, v
""",
    },
    "1.4": {
        "by sets of settings": """
def my_control(runs, a, b, suspect):
    def settings(run):
        order_free = {f: tuple(sorted(run[f])) for f in ("parts", "seeds")}
        return {f: run[f] for f in ("how", "examples", "tried")} | order_free

    def differ(x, y):
        return {f for f, _ in set(settings(x).items()) ^ set(settings(y).items())}

    rows = {run["name"]: run for run in runs}
    for x in runs:
        for y in runs:
            if differ(x, y) == {suspect} and len(x["seeds"]) >= 2:
                return differ(rows[a], rows[b]) - {suspect}, (x["name"], y["name"])
    return differ(rows[a], rows[b]) - {suspect}, None
""",
        "a list and the last pair": """
def my_control(runs, a, b, suspect):
    fields = ["how", "parts", "examples", "tried", "seeds"]

    def same(x, y, f):
        if f in ("parts", "seeds"):
            return sorted(x[f]) == sorted(y[f])
        return x[f] == y[f]

    (one,) = [run for run in runs if run["name"] == a]
    (other,) = [run for run in runs if run["name"] == b]
    confounds = [f for f in fields if f != suspect and not same(one, other, f)]
    pair = None
    for x in runs:
        for y in runs:
            others = all(same(x, y, f) for f in fields if f != suspect)
            if others and not same(x, y, suspect) and len(y["seeds"]) > 1:
                pair = [x["name"], y["name"]]
    return [confounds, pair]
""",
    },
}

EXPLAINED = {  # {exercise: {mutant: what the learner is told}}
    "1.1": {
        "padding by its id": "Find it by counting",
        "no label for the end": "never learns to stop",
        "no end token": "padding where the end token should be",
        "the prompt is learned": "the prompt has labels",
        "padding is learned": "-100 is meant",
        "a copy of the inputs": "no label is hidden",
        "shifted already": "that is the loss's job",
        "zero, not -100": "cross_entropy ignores -100",
        "one label too many": "the last token of the prompt",
        "one label too few": "the first token of the answer",
        "padded on the left": "padded on the left",
        "in place": "rows itself was changed",
        "floats": "torch.int64",
    },
    "1.2": {
        "no shift": "not shifted",
        "shifted the wrong way": "the wrong way",
        "shifted twice": "once is enough",
        "joined, then shifted": "Shift, then flatten",
        "mean of this part": "not by `tokens`",
        "mean over tokens": "once more",
        "not divided": "not divided by `tokens`",
        "divided by positions": "divided by all positions",
        "divided by rows": "divided by the number of rows",
        "mean of row means": "the mean of the rows' means",
        "a mean over nothing": "a mean over nothing",
        "-100 is read as a token": "-100 was read as a token",
        "labels changed in place": "labels itself was changed",
        "in bfloat16": "logits.float()",
        "no gradient": "no gradient flows",
        "a number": "a tensor is needed",
        "the wrong sign": "the wrong sign",
        "bits, not nats": "in bits",
    },
    "1.3": {
        "no bias correction": "no bias correction",
        "only m corrected": "the bias of v is not corrected",
        "only v corrected": "the bias of m is not corrected",
        "t from zero": "t is off by one",
        "t one too late": "t is off by one",
        "Adam with L2": "not AdamW",
        "decay without lr": "not multiplied by lr",
        "no decay": "the decay is missing",
        "decay after the step": "shrinks the old W",
        "decay of W grows it": "the decay has the wrong sign",
        "eps inside the root": "inside the root",
        "eps before the correction": "before the bias correction",
        "no eps": "eps is missing",
        "no root": "the root of v is missing",
        "g, not m": "g stands in the place of m",
        "old moments": "they are updated before W",
        "v of |g|": "not of |g|",
        "v of the new m": "not of m * m",
        "betas swapped": "beta1 and beta2 are swapped",
        "uphill": "W moves against the gradient",
        "in place": "m itself was changed",
        "corrected moments kept": "W's step alone uses that",
        "W alone": "return all 3",
        "W never moves": "W is as it was",
    },
    "1.4": {
        "the rate must be equal": "the learning rate is an outcome of the search",
        "rows of one search, whatever it found": "each method needs its own",
        "the loss must be equal": "the outcome that is compared",
        "the name is a setting": "a name is no setting",
        "the search does not count": "also differ in tried",
        "the seeds do not count": "also differ in seeds",
        "the examples do not count": "also differ in examples",
        "what else trains does not count": "parts differs",
        "the order counts": "has no meaning",
        "as many seeds and parts": "differ in seeds",
        "the suspect confounds": "the suspect itself is no confound",
        "one seed is enough": "one seed has no interval",
        "two seeds are too few": "two seeds are enough",
        "two that differ in nothing": "try every two rows",
        "the suspect and more": "they isolate nothing",
        "one difference, whichever": "they cannot show its effect",
        "a must be in it": "not only a and b",
        "a and b alone": "try every two rows",
        "always a and b": "they isolate nothing",
        "always how": "they cannot show its effect",
        "a text of names": "a pair of names or None",
        "rows, not names": "two names from the table",
        "only the confounds": "one of them is missing",
        "the table is sorted": "runs itself was changed",
    },
}


def cases(table):
    return [
        pytest.param(id, name, value, id=f"{id}-{name}")
        for id, each in table.items()
        for name, value in each.items()
    ]


@pytest.mark.parametrize("id, name, source", cases(RIGHT))
def test_a_right_answer_in_other_words_passes(id, name, source):
    said = LESSON.judge(EXERCISES[id], source)
    assert said is None, str(said)


@pytest.mark.parametrize("id, name, told", cases(EXPLAINED))
def test_a_wrong_answer_is_explained(id, name, told):
    said = LESSON.judge(EXERCISES[id], LESSON.wrong[id][name])
    assert told in str(said)


def test_the_lessons_own_answers_pass():
    checks.loss(checks.our_loss)
    checks.adamw(checks.our_adamw)
    checks.control(checks.our_control)


def test_most_designs_have_a_control_and_some_have_none():
    designs = [(runs, suspect) for runs, _, _, suspect in checks._designs()]
    isolated = [any(checks._isolating(*design)) for design in designs]
    assert 20 < sum(isolated) < len(designs) - 20


def test_two_of_the_shipped_methods_differ_in_the_rank_alone():
    stored = [runs.stored(config) for config in data_size.configs("tiny")]
    rows = checks.shipped_rows(stored)
    confounds, pair = checks.our_control(rows, "full", "LoRA", "how")
    assert confounds == {"parts", "tried"}
    assert set(pair) == {"full", "LoRA and the rest"}
    assert [row["seeds"] for row in rows] == [data_size.SEEDS] * 4
