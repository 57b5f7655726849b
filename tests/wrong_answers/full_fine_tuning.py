"""Wrong answers to the exercises of notebook 01; each must be refused by its check."""

from peft_from_scratch.course.checks import full_fine_tuning as checks  # noqa: F401

BATCH = """\
def my_batch(rows, end, pad):
    longest = max(len(prompt) + len(answer) + 1 for prompt, answer in rows)
    input_ids, labels = [], []
    for prompt, answer in rows:
        padding = longest - len(prompt) - len(answer) - 1
        input_ids.append({ids})
        labels.append({labels})
    input_ids, labels = torch.tensor(input_ids), torch.tensor(labels)
    {after}
    return input_ids, labels
"""
IDS = "prompt + answer + [end] + [pad] * padding"
LABELS = "[-100] * len(prompt) + answer + [end] + [-100] * padding"


def batch(ids=IDS, labels=LABELS, after="pass"):
    return BATCH.format(ids=ids, labels=labels, after=after)


def loss(*lines):
    body = "\n".join(f"    {line}" for line in lines)
    return f"def my_loss(logits, labels, tokens):\n{body}\n"


SHIFT = "z, y = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()"
SUM = "return F.cross_entropy(z, y, reduction='sum') / tokens"
M, V = (
    "m = betas[0] * m + (1 - betas[0]) * g",
    "v = betas[1] * v + (1 - betas[1]) * g * g",
)
HATS = "m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)"
STEP = "return (1 - lr * decay) * W - lr * m_hat / (v_hat.sqrt() + eps), m, v"


def adamw(*lines, first=M, second=V, hats=HATS, step=STEP, before="pass"):
    lines = lines or (before, first, second, hats, step)
    body = "\n".join(f"    {line}" for line in lines)
    return f"def my_adamw(W, g, m, v, t, lr, betas, eps, decay):\n{body}\n"


def bill(fp32=(4, 4, 0, 8), bf16=(2, 2, 0, 4), mixed=(2, 2, 4, 8), unit="1e9"):
    return f"""\
def my_bill(parameters, recipe):
    sizes = {{"fp32": {fp32}, "bf16": {bf16}, "mixed": {mixed}}}[recipe]
    kinds = ("weights", "gradients", "master", "moments")
    return {{k: parameters * size / {unit} for k, size in zip(kinds, sizes)}}
"""


TOTAL = """

rows = my_bill


def my_bill(parameters, recipe):
    return sum(rows(parameters, recipe).values())
"""


def storage(
    copies="disk // model",
    adapters="max(0, disk - model) // adapter",
    level="None if adapter >= model else model // (model - adapter) + 1",
):
    return f"""\
def my_storage(disk, model, adapter):
    return {copies}, {adapters}, {level}
"""


MUTANTS = {
    "1.1": {
        "all zeros": batch(after="input_ids, labels = 0 * input_ids, 0 * labels"),
        "padding by its id": batch(after="labels[input_ids == pad] = -100"),
        "padding by its id, prompt by length": batch(
            labels="[-100] * len(prompt) + answer + [end] + [pad] * padding",
            after="labels[labels == pad] = -100",
        ),
        "no label for the end": batch(
            labels="[-100] * len(prompt) + answer + [-100] + [-100] * padding"
        ),
        "no end token": batch(
            ids="prompt + answer + [pad] * (padding + 1)",
            labels="[-100] * len(prompt) + answer + [-100] * (padding + 1)",
        ),
        "the prompt is learned": batch(
            labels="prompt + answer + [end] + [-100] * padding"
        ),
        "padding is learned": batch(
            labels="[-100] * len(prompt) + answer + [end] + [pad] * padding"
        ),
        "a copy of the inputs": batch(labels=IDS),
        "shifted already": batch(
            after="labels = torch.cat([labels[:, 1:], 0 * labels[:, :1] - 100], 1)"
        ),
        "shifted round": batch(after="labels = labels.roll(-1, 1)"),
        "zero, not -100": batch(after="labels[labels == -100] = 0"),
        "one label too many": batch(
            labels="[-100] * (len(prompt) - 1) + prompt[-1:] + answer + [end]"
            " + [-100] * padding"
        ),
        "one label too few": batch(
            labels="[-100] * (len(prompt) + 1) + (answer + [end])[1:]"
            " + [-100] * padding"
        ),
        "padded on the left": batch(
            ids="[pad] * padding + prompt + answer + [end]",
            labels="[-100] * (padding + len(prompt)) + answer + [end]",
        ),
        "in place": batch(after="rows[0][0].append(end)"),
        "floats": batch(after="labels = labels.float()"),
        "all of one length": batch(
            ids="(prompt + answer + [end])[:4] + [pad] * (padding - 4)"
        ),
    },
    "1.2": {
        "all zeros": loss("return 0.0 * logits.sum()"),
        "no shift": loss("z, y = logits.float().flatten(0, 1), labels.flatten()", SUM),
        "shifted the wrong way": loss(
            "z, y = logits[:, 1:].float().flatten(0, 1), labels[:, :-1].flatten()", SUM
        ),
        "shifted twice": loss(
            "z, y = logits[:, :-2].float().flatten(0, 1), labels[:, 2:].flatten()", SUM
        ),
        "mean of this part": loss(SHIFT, "return F.cross_entropy(z, y)"),
        "mean over tokens": loss(SHIFT, "return F.cross_entropy(z, y) / tokens"),
        "not divided": loss(SHIFT, "return F.cross_entropy(z, y, reduction='sum')"),
        "divided by positions": loss(
            SHIFT, "return F.cross_entropy(z, y, reduction='sum') / y.numel()"
        ),
        "divided by rows": loss(
            SHIFT, "return F.cross_entropy(z, y, reduction='sum') / len(labels)"
        ),
        "mean of row means": loss(
            "rows = zip(logits.float(), labels)",
            "return sum(F.cross_entropy(z[:-1], y[1:]) for z, y in rows) / len(labels)",
        ),
        "joined, then shifted": loss(
            "z, y = logits.float().flatten(0, 1)[:-1], labels.flatten()[1:]", SUM
        ),
        "a mean over nothing": loss(
            SHIFT, "return F.cross_entropy(z, y) * (y != -100).sum() / tokens"
        ),
        "-100 is read as a token": loss(
            SHIFT,
            "return F.cross_entropy(z, y.clamp(min=0), reduction='sum') / tokens",
        ),
        "labels changed in place": loss(
            SHIFT,
            "found = F.cross_entropy(z, y, reduction='sum') / tokens",
            "labels[labels == -100] = 0",
            "return found",
        ),
        "in bfloat16": loss(SHIFT.replace(".float()", ""), SUM),
        "no gradient": loss(SHIFT, SUM.replace("(z,", "(z.detach(),")),
        "a number": loss(SHIFT, SUM.replace("return ", "return (") + ").item()"),
        "the wrong sign": loss(SHIFT, SUM.replace("return ", "return -")),
        "bits, not nats": loss(SHIFT, SUM + " / math.log(2)"),
    },
    "1.3": {
        "all zeros": adamw("return 0 * W, 0 * m, 0 * v"),
        "no bias correction": adamw(hats="m_hat, v_hat = m, v"),
        "only m corrected": adamw(hats="m_hat, v_hat = m / (1 - betas[0] ** t), v"),
        "only v corrected": adamw(hats="m_hat, v_hat = m, v / (1 - betas[1] ** t)"),
        "t from zero": adamw(before="t = t - 1"),
        "t one too late": adamw(before="t = t + 1"),
        "Adam with L2": adamw(
            before="g = g + decay * W", step=STEP.replace("(1 - lr * decay) * W", "W")
        ),
        "decay without lr": adamw(step=STEP.replace("lr * decay", "decay")),
        "no decay": adamw(step=STEP.replace("(1 - lr * decay) * W", "W")),
        "decay after the step": adamw(
            step="return (1 - lr * decay) * (W - lr * m_hat / (v_hat.sqrt() + eps)),"
            " m, v"
        ),
        "decay of W grows it": adamw(step=STEP.replace("(1 - lr", "(1 + lr")),
        "eps inside the root": adamw(
            step=STEP.replace("v_hat.sqrt() + eps", "(v_hat + eps).sqrt()")
        ),
        "eps before the correction": adamw(
            hats="m_hat = m / (1 - betas[0] ** t)",
            step=STEP.replace(
                "(v_hat.sqrt() + eps)",
                "((v.sqrt() + eps) / (1 - betas[1] ** t) ** 0.5)",
            ),
        ),
        "no eps": adamw(step=STEP.replace(" + eps", "")),
        "no root": adamw(step=STEP.replace("v_hat.sqrt()", "v_hat")),
        "g, not m": adamw(step=STEP.replace("m_hat /", "g /")),
        "old moments": adamw(
            "m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)",
            M,
            V,
            STEP,
        ),
        "v of |g|": adamw(second=V.replace("g * g", "g.abs()")),
        "v of the new m": adamw(second=V.replace("g * g", "m * m")),
        "betas swapped": adamw(before="betas = betas[::-1]"),
        "uphill": adamw(step=STEP.replace("W - lr", "W + lr")),
        "the sign of g": adamw(
            step="return (1 - lr * decay) * W - lr * g.sign(), m, v"
        ),
        "in place": adamw(first="m.mul_(betas[0]).add_((1 - betas[0]) * g)"),
        "corrected moments kept": adamw(step=STEP.replace(", m, v", ", m_hat, v_hat")),
        "W alone": adamw(step=STEP.replace(", m, v", "")),
        "W never moves": adamw(step="return W.clone(), m, v"),
    },
    "1.4": {
        "all zeros": bill((0,) * 4, (0,) * 4, (0,) * 4),
        "the textbook's rows": bill(bf16=(4, 4, 0, 8), mixed=(4, 4, 0, 8)),
        "GiB": bill(unit="2**30"),
        "bytes": bill(unit="1"),
        "bits": bill(unit="1e9 * 8"),
        "no master copy": bill(mixed=(2, 2, 0, 8)),
        "master in the weights": bill(mixed=(6, 2, 0, 8)),
        "master in the moments": bill(mixed=(2, 2, 0, 12)),
        "master in two bytes": bill(mixed=(2, 2, 2, 8)),
        "moments in two bytes": bill(mixed=(2, 2, 4, 4)),
        "one moment": bill((4, 4, 0, 4), (2, 2, 0, 2), (2, 2, 4, 4)),
        "float32 moments of bf16": bill(bf16=(2, 2, 0, 8)),
        "a master copy everywhere": bill((4, 4, 4, 8), (2, 2, 4, 4)),
        "float32 gradients": bill(mixed=(2, 4, 4, 8)),
        "no gradients": bill((4, 0, 0, 8), (2, 0, 0, 4), (2, 0, 4, 8)),
        "always seven billion": bill().replace("parameters * size", "7e9 * size"),
        "always mixed": bill((2, 2, 4, 8), (2, 2, 4, 8)),
        "rows missing": bill().replace("zip(kinds", "zip(kinds[:2]"),
        "the total": bill() + TOTAL,
        "cut off": bill(unit="1e9").replace("size /", "size //"),
        "rounded": bill(unit="1e9, 1)").replace("parameters *", "round(parameters *"),
    },
    "1.5": {
        "all zeros": storage("0", "0", "0"),
        "no base": storage(adapters="disk // adapter"),
        "a base for each": storage(adapters="disk // (model + adapter)"),
        "below zero": storage(adapters="(disk - model) // adapter"),
        "not rounded": storage("disk / model", "max(0, disk - model) / adapter"),
        "rounded up": storage("-(-disk // model)"),
        "rounded to the nearest": storage("round(disk / model)"),
        "adapters rounded up": storage(adapters="-(-max(0, disk - model) // adapter)"),
        "draws level": storage(
            level="None if adapter >= model else -(-model // (model - adapter))"
        ),
        "always two": storage(level="2"),
        "never None": storage(level="model // max(1, model - adapter) + 1"),
        "None if equal alone": storage(
            level="None if adapter == model else model // (model - adapter) + 1"
        ),
        "one for the base": storage(
            level="None if adapter >= model else model // (model - adapter)"
        ),
        "adapters in a model": storage(level="model // adapter"),
        "the base is a task": storage(
            adapters="max(0, disk - model) // adapter + (disk >= model)"
        ),
        "disk ignored": storage("10", "300"),
    },
}
