"""Notebook 01's checks: right answers in other words pass, wrong ones are explained."""

import build
import pytest
import torch
from architectures import build as small
from try_answers import lesson

from peft_from_scratch.course.checks import full_fine_tuning as checks
from peft_from_scratch.ledger.experiments import bill

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
        "one by one": """
def my_bill(parameters, recipe):
    numbers = parameters / 10**9
    size = 4 if recipe == "fp32" else 2
    return {
        "moments": 2 * numbers * (2 if recipe == "bf16" else 4),
        "master": 4 * numbers if recipe == "mixed" else 0,
        "gradients": size * numbers,
        "weights": size * numbers,
    }
""",
        "as a tensor": """
def my_bill(parameters, recipe):
    table = torch.tensor([[4, 4, 0, 8], [2, 2, 0, 4], [2, 2, 4, 8]]).double()
    row = table[["fp32", "bf16", "mixed"].index(recipe)] * parameters / 1e9
    return dict(zip(["weights", "gradients", "master", "moments"], row))
""",
    },
    "1.5": {
        "floor and ceil": """
def my_storage(disk, model, adapter):
    copies = math.floor(disk / model)
    adapters = math.floor((disk - model) / adapter) if disk >= model else 0
    level = math.floor(model / (model - adapter)) + 1 if adapter < model else None
    return copies, adapters, level
""",
        "divmod and a loop": """
def my_storage(disk, model, adapter):
    copies, _ = divmod(disk, model)
    tasks, adapters = 1, max(0, (disk - model) // adapter)
    if model <= adapter:
        return copies, adapters, None
    while model + tasks * adapter >= tasks * model:
        tasks += 1
    return [copies, adapters, tasks]
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
        "the textbook's rows": "this recipe keeps the weights in two bytes",
        "GiB": "a GB is 1e9 bytes",
        "bytes": "divide by 1e9",
        "bits": "bits",
        "no master copy": "has a float32 copy",
        "master in the weights": "a row of its own",
        "master in the moments": "has a float32 copy",
        "master in two bytes": "the master copy is float32",
        "moments in two bytes": "two moments of four bytes each",
        "float32 moments of bf16": "two bytes each",
        "a master copy everywhere": "only mixed precision has a master copy",
        "float32 gradients": "the dtype of its weight",
        "always seven billion": "`parameters` is ignored",
        "always mixed": "float32 is four bytes",
        "rows missing": "with 0 for a row",
        "the total": "a dict with four rows",
        "cut off": "drops what follows the point",
        "rounded": "leave that to whoever prints it",
    },
    "1.5": {
        "no base": "the base is missing",
        "a base for each": "one base is enough",
        "below zero": "no room for the base",
        "not rounded": "// a whole number",
        "rounded up": "a copy that fits in part",
        "adapters rounded up": "a task that fits in part",
        "draws level": "fewer bytes, not the same",
        "never None": "never wins: None",
        "None if equal alone": "never wins: None",
        "one for the base": "one task too early",
        "adapters in a model": "how many adapters weigh one model",
        "the base is a task": "counted as a task",
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


@pytest.mark.parametrize("recipe", bill.RECIPES)
def test_the_bytes_of_a_recipe_are_those_of_a_real_step(recipe):
    dtype = torch.float32 if recipe == "fp32" else torch.bfloat16
    count = bill.counted(small("llama", dtype=dtype), recipe, length=16)
    each, numbers = count["per_parameter"], count["parameters"]
    master = count["state"].get("master", 0) / numbers
    moments = sum(count["state"][name] for name in ("exp_avg", "exp_avg_sq")) / numbers
    found = each["weights"], each["gradients"], master, moments
    assert found == pytest.approx(checks.BYTES[recipe], abs=0.01)
