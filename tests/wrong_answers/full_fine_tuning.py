"""Wrong answers to the exercises of notebook 01; each must be refused by its check."""

from attacks import (
    Attack,
    afterwards,
    fixed,
    remembered,
    returned,
    stale,
    where,
)

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


CONTROL = """\
def my_control(runs, a, b, suspect):
    def differing(one, other):
        fields = {fields}
        return {{f for f in fields if {alike}(one[f]) != {alike}(other[f])}}

    def alike(value):
        return {value}

    by_name = {{run["name"]: run for run in runs}}
    confounds = differing(by_name[a], by_name[b]){without}
    for i, one in enumerate(runs):
        for other in runs[:i]:
            if {isolates} and {interval}:
                return confounds, (one["name"], other["name"])
    return confounds, None
"""
FIELDS = ("how", "parts", "examples", "tried", "seeds")


def control(
    fields=FIELDS,
    value="set(value) if isinstance(value, tuple) else value",
    without=" - {suspect}",
    isolates="differing(one, other) == {suspect}",
    interval="len(one['seeds']) > 1",
    alike="alike",
):
    return CONTROL.format(
        fields=fields,
        value=value,
        without=without,
        isolates=isolates,
        interval=interval,
        alike=alike,
    )


def all_fields_but(*names):
    return control(tuple(field for field in FIELDS if field not in names))


MUTANTS = {
    "1.1": {
        "a multiple of eight": batch(
            after="input_ids = F.pad(input_ids, (0, -longest % 8), value=pad)\n"
            "    labels = F.pad(labels, (0, -longest % 8), value=-100)"
        ),
        "longest prompt and longest answer": batch().replace(
            "max(len(prompt) + len(answer) + 1 for prompt, answer in rows)",
            "max(len(p) for p, _ in rows) + max(len(a) for _, a in rows) + 1",
        ),
        "a mask for the labels": batch(
            labels="[0] * len(prompt) + [1] * (len(answer) + 1) + [0] * padding"
        ),
        "end behind the prompt": batch("prompt + [end] + answer + [pad] * padding"),
        "answer first": batch("answer + prompt + [end] + [pad] * padding"),
        "hidden where padding follows": batch(
            labels="[-100] * len(prompt) + answer + [-100 if padding else end]"
            " + [-100] * padding"
        ),
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
        "the mask before the shift": loss(
            SHIFT,
            "y = y.clamp(min=0).masked_fill(labels[:, :-1].flatten() == -100, -100)",
            SUM,
        ),
        "softmax first": loss(SHIFT, SUM.replace("(z,", "(z.softmax(-1),")),
        "log of softmax": loss(
            SHIFT,
            "keep = y != -100",
            "return -z.softmax(-1).log()[keep, y[keep]].sum() / tokens",
        ),
        "label smoothing": loss(
            SHIFT, SUM.replace("'sum'", "'sum', label_smoothing=.1")
        ),
        "a view, no transpose": loss(
            "b, t, v = logits.shape",
            "z = logits[:, :-1].float().reshape(b, v, t - 1)",
            "return F.cross_entropy(z, labels[:, 1:], reduction='sum') / tokens",
        ),
        "whole division": loss(SHIFT, SUM.replace("/ tokens", "// tokens")),
        "back in the logits' dtype": loss(
            SHIFT, "loss = " + SUM[7:], "return loss.to(logits.dtype)"
        ),
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
        "corrections exchanged": adamw(
            hats="m_hat, v_hat = m / (1 - betas[1] ** t), v / (1 - betas[0] ** t)"
        ),
        "beta times t": adamw(hats=HATS.replace("**", "*")),
        "t to the beta": adamw(
            hats="m_hat, v_hat = m / (1 - t ** betas[0]), v / (1 - t ** betas[1])"
        ),
        "multiplied by the correction": adamw(hats=HATS.replace(" / (1", " * (1")),
        "m and v exchanged": adamw(step=STEP.replace("m, v", "v, m")),
        "AMSGrad": adamw(
            before="old = v",
            hats="v_hat = torch.maximum(v, old) / (1 - betas[1] ** t)\n"
            "    m_hat = m / (1 - betas[0] ** t)",
        ),
        "NAdam": adamw(
            hats=HATS
            + "; m_hat = betas[0] * m_hat + (1 - betas[0]) * g / (1 - betas[0] ** t)"
        ),
        "one root for all": adamw(step=STEP.replace("v_hat.sqrt", "v_hat.mean().sqrt")),
        "a norm for the root": adamw(step=STEP.replace("sqrt", "norm")),
        "the decay in the rate": adamw(
            step="return W - lr * (1 - decay) * m_hat / (v_hat.sqrt() + eps), m, v"
        ),
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
        "all zeros": control(
            isolates="False",
            without=" - {'how', 'parts', 'examples', 'tried', 'seeds'}",
        ),
        "the rate must be equal": control((*FIELDS, "rate")),
        "the loss must be equal": control((*FIELDS, "loss")),
        "the name is a setting": control((*FIELDS, "name")),
        "the search does not count": all_fields_but("tried"),
        "the seeds do not count": all_fields_but("seeds"),
        "the examples do not count": all_fields_but("examples"),
        "what else trains does not count": all_fields_but("parts"),
        "the rank does not count": all_fields_but("how"),
        "the order counts": control(value="value"),
        "as many seeds and parts": control(
            value="len(value) if isinstance(value, tuple) else value"
        ),
        "the suspect confounds": control(without=""),
        "one seed is enough": control(interval="True"),
        "five seeds at least": control(interval="len(one['seeds']) > 4"),
        "two that differ in nothing": control(isolates="not differing(one, other)"),
        "the suspect and more": control(isolates="suspect in differing(one, other)"),
        "one difference, whichever": control(
            isolates="len(differing(one, other)) == 1"
        ),
        "at most the suspect": control(isolates="differing(one, other) <= {suspect}"),
        "a must be in it": control(
            interval="a in (one['name'], other['name']) and len(one['seeds']) > 1"
        ),
        "a and b alone": control(
            interval="{a, b} == {one['name'], other['name']} and len(one['seeds']) > 1"
        ),
        "always a and b": control().replace(
            "return confounds, (one", "return confounds, (a, b) or (one"
        ),
        "never one": control(isolates="False"),
        "always how": control(isolates="differing(one, other) == {'how'}"),
        "neighbors in the table": control().replace(
            "runs[:i]", "runs[max(0, i - 1) : i]"
        ),
        "the pair's own differences": control().replace(
            "return confounds, (one", "return differing(one, other), (one"
        ),
        "rows of one search, whatever it found": control(
            interval="one['rate'] == other['rate'] and len(one['seeds']) > 1"
        ),
        "only the confounds": control()
        .replace("return confounds, None", "return confounds")
        .replace('return confounds, (one["name"], other["name"])', "return confounds"),
    },
}

NOTHING_DRAWN = "nothing is drawn: a random answer is refused by its values"
NO_KERNEL = "no kernel is written"

ATTACKS = {  # the right answer but for one class of input; see attacks.py
    "1.1": {
        "arguments": {
            "end of the first call": stale("end"),
            "pad of the first call": stale("pad"),
            "rows of the first call": stale("rows"),
            "pad is end": fixed("pad", "end"),
            "end is pad": fixed("end", "pad"),
        },
        "state": {
            "kept by lengths": remembered(
                "(*(len(part) for row in rows for part in row), end, pad)"
            ),
            "labels kept by shape": Attack(
                after="labels = _labels.setdefault(result[1].shape, result[1])\n"
                "result = result[0], labels",
                outside="_labels = {}",
            ),
            "rows are sorted": afterwards("rows.sort(key=str)"),
            "an answer gets its end": afterwards("rows[0][1].append(end)"),
            "a prompt gets its answer": afterwards("rows[-1][0].extend(rows[-1][1])"),
        },
        "inputs": {
            "equal rows once": batch().replace(
                "    longest",
                "    keys = dict.fromkeys((tuple(p), tuple(a)) for p, a in rows)\n"
                "    rows = [(list(p), list(a)) for p, a in keys]\n"
                "    longest",
                1,
            ),
            "the first end ends it": batch(
                labels="([-100] * len(prompt) + answer[: (answer + [end]).index(end)]"
                " + [end] + [-100] * longest)[:longest]",
            ),
            "the last end ends it": batch(
                labels="[-100] * len(prompt) + (answer + [end] + [pad] * padding)[::-1]"
                "[(answer + [end] + [pad] * padding)[::-1].index(end):][::-1]"
                " + [-100] * (answer + [end] + [pad] * padding)[::-1].index(end)",
            ),
            "pads in answers are padding": batch(
                labels="[-100] * len(prompt)"
                " + [-100 if t == pad else t for t in answer]"
                " + [end] + [-100] * padding"
            ),
            "without a prompt the first token is one": batch(
                labels="[-100] * max(1, len(prompt)) + (answer + [end])"
                "[1 - min(1, len(prompt)) :] + [-100] * padding"
            ),
            "small ids": returned(
                "(result[0].short().long(), result[1].short().long())"
            ),
            "half precision": returned("(result[0].half().long(), result[1])"),
            "three rows at most": where(
                "len(rows) > 3", "(result[0][:3], result[1][:3])"
            ),
            "ten tokens at most": where(
                "result[0].shape[1] > 10", "(result[0][:, :10], result[1][:, :10])"
            ),
            "an empty answer has no end": where(
                "not all(a for _, a in rows)", "(result[0], 0 * result[1] - 100)"
            ),
        },
        "kinds": {
            "floats for ids": returned("(result[0].float(), result[1])"),
            "int32 labels": returned("(result[0], result[1].int())"),
            "arrays": returned("tuple(x.numpy() for x in result)"),
            "a stack": returned("torch.stack(result)"),
            "no labels": returned("(result[0], None)"),
            "a dict": returned("dict(input_ids=result[0], labels=result[1])"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "1.2": {
        "arguments": {
            "tokens of the first call": stale("tokens"),
            "labels of the first call": stale("labels"),
            "logits of the first call": stale("logits"),
            "tokens by the shape": fixed(
                "tokens", "2 * (labels[:, 1:] != -100).sum() + 3"
            ),
        },
        "state": {
            "kept by shape": remembered("(logits.shape, tokens)"),
            "kept by labels": remembered("(str(labels), tokens)"),
            "no loss without autograd": where(
                "not torch.is_grad_enabled()", "0 * result"
            ),
            "autograd left off": afterwards("torch.set_grad_enabled(False)"),
            "float64 left on": afterwards("torch.set_default_dtype(torch.float64)"),
            "a seed is left": afterwards("torch.manual_seed(0)"),
            "logits are scaled": afterwards("logits.data.mul_(1.0001)"),
            "logits are asked for gradients": afterwards("logits.requires_grad_(True)"),
            "labels lose the first": afterwards("labels[:, 0] = -100"),
        },
        "inputs": {
            "exp overflows": loss(
                SHIFT,
                "keep = y != -100",
                "z, y = z[keep], y[keep]",
                "p = z.exp() / z.exp().sum(-1, keepdim=True)",
                "return -p[torch.arange(len(y)), y].log().sum() / tokens",
            ),
            "a small number in the logarithm": loss(
                SHIFT,
                "keep = y != -100",
                "p = z[keep].softmax(-1)[torch.arange(int(keep.sum())), y[keep]]",
                "return -(p + 1e-9).log().sum() / tokens",
            ),
            "logits are clamped": loss(
                SHIFT.replace(".float()", ".float().clamp(-20, 20)"), SUM
            ),
            "token zero is ignored": loss(
                SHIFT, "y = y.masked_fill(y == 0, -100)", SUM
            ),
            "one row alone": where("len(labels) > 4", "result / 2"),
            "ten positions at most": loss(
                "logits, labels = logits[:, :10], labels[:, :10]", SHIFT, SUM
            ),
            "nothing to predict, no loss": where("labels.shape[1] == 1", "result + 1"),
            "half precision overflows": loss(
                SHIFT.replace("float", "half"), SUM.replace("(z,", "(z.float(),")
            ),
        },
        "kinds": {
            "one entry": returned("result[None]"),
            "bfloat16": returned("result.bfloat16()"),
            "a number": returned("float(result)"),
            "an array": returned("result.detach().numpy()"),
            "a leaf": returned("result.detach().requires_grad_()"),
            "with its count": returned("(result, tokens)"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "1.3": {
        "arguments": {
            f"{name} of the first call": stale(name)
            for name in ("W", "g", "m", "v", "t", "lr", "betas", "eps", "decay")
        }
        | {
            "the usual decay": fixed("decay", "0.01"),
            "the usual betas": fixed("betas", "(0.9, 0.999)"),
            "the usual eps": fixed("eps", "1e-8"),
        },
        "state": {
            "moments of its own": Attack(
                before="global _own\nif t > 1:\n    m, v = _own",
                after="_own = result[1:]",
                outside="_own = None",
            ),
            "a clock of its own": Attack(
                before="global _t\n_t = 1 if t == 1 else _t + 1\nt = _t",
                outside="_t = 0",
            ),
            "kept by shape and t": remembered("(W.shape, t, lr)"),
            "W moves": afterwards("W.data.copy_(result[0])"),
            "g is used up": afterwards("g.zero_()"),
            "m is updated": afterwards("m.copy_(result[1])"),
            "v is updated": afterwards("v.copy_(result[2])"),
            "autograd left off": afterwards("torch.set_grad_enabled(False)"),
        },
        "inputs": {
            "t up to ten": fixed("t", "min(t, 10)"),
            "t up to three": fixed("t", "min(t, 3)"),
            "no correction late": where(
                "t > 100",
                "((1 - lr * decay) * W - lr * result[1] / (result[2].sqrt() + eps),"
                " *result[1:])",
            ),
            "gradients are clipped": fixed("g", "g.clamp(-10, 10)"),
            "tiny gradients are none": fixed("g", "g * (g.abs() > 1e-6)"),
            "no decay, no step": where("decay == 0", "(W, *result[1:])"),
            "v is never tiny": fixed("v", "v.clamp(min=1e-12)"),
            "W is never huge": fixed("W", "W.clamp(-100, 100)"),
            "numbers are no matrices": where("W.ndim == 0", "(W, *result[1:])"),
        },
        "kinds": {
            "float32": returned("tuple(x.float().double() for x in result)"),
            "float32 comes back": returned("tuple(x.float() for x in result)"),
            "float64 comes back": returned("tuple(x.double() for x in result)"),
            "W has no m": returned("(result[0], None, result[2])"),
            "arrays": returned("tuple(x.detach().numpy() for x in result)"),
            "W alone": returned("result[0]"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "1.4": {
        "arguments": {
            f"{name} of the first call": stale(name)
            for name in ("runs", "a", "b", "suspect")
        }
        | {
            "the notebook's names": Attack(
                before="a, b = (a, b) if 'full' not in {r['name'] for r in runs}"
                " else ('full', runs[-1]['name'])"
            ),
            "the rank is the suspect": fixed("suspect", "'how'"),
        },
        "state": {
            "kept by names": remembered("(a, b, suspect)"),
            "kept by the table's names": remembered(
                "(tuple(run['name'] for run in runs), a, b, suspect)"
            ),
            "kept by size": remembered("(len(runs), suspect)"),
            "the table is sorted": afterwards("runs.sort(key=lambda run: run['name'])"),
            "a row is dropped": afterwards("runs.pop()"),
            "outcomes are dropped": afterwards("[run.pop('loss') for run in runs]"),
            "tuples become sets": afterwards(
                "[run.update(seeds=set(run['seeds'])) for run in runs]"
            ),
        },
        "inputs": {
            "three rows at most": where("len(runs) > 3", "(result[0], None)"),
            "two rows need no control": where("len(runs) == 2", "(result[0], None)"),
            "two seeds are too few": control(interval="len(one['seeds']) > 2"),
            "no confound, no control": where("not result[0]", "(result[0], None)"),
            "one confound at most": returned("(set(sorted(result[0])[:1]), result[1])"),
            "the search is no suspect": where(
                "suspect == 'tried'", "(result[0], None)"
            ),
        },
        "kinds": {
            "a dictionary": returned("dict(confounds=result[0], pair=result[1])"),
            "a text of fields": returned("(', '.join(result[0]), result[1])"),
            "a text of names": returned(
                "(result[0], result[1] and ' and '.join(result[1]))"
            ),
            "rows, not names": returned(
                "(result[0], result[1] and [r for r in runs if r['name'] in result[1]])"
            ),
            "None for no confound": returned("(result[0] or None, result[1])"),
            "an empty pair": returned("(result[0], result[1] or ())"),
            "every pair": returned("(result[0], result[1] and [result[1]])"),
            "fields with True": returned("(dict.fromkeys(result[0], True), result[1])"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
}

ALSO_RIGHT = {
    "1.1": {
        "arguments": {
            "by the end": """\
def my_batch(rows, end, pad):
    whole = [[*p, *a, end] for p, a in rows]
    t = max(map(len, whole))
    ids = torch.tensor([row + [pad] * (t - len(row)) for row in whole])
    labels = ids.clone()
    for i, ((p, _), row) in enumerate(zip(rows, whole)):
        labels[i, : len(p)] = labels[i, len(row) :] = -100
    return ids, labels
"""
        },
        "state": {
            "of copies": batch(ids="[*prompt] + [*answer, end] + padding * [pad]")
        },
        "inputs": {
            "a mask": batch(
                after="""\
lengths = torch.tensor([(len(p), len(p + a) + 1) for p, a in rows])
    at = torch.arange(longest)
    hidden = (at < lengths[:, :1]) | (at >= lengths[:, 1:])
    labels = input_ids.masked_fill(hidden, -100)"""
            )
        },
        "kinds": {
            "a list": returned("[*result]"),
            "int32 ids": returned("(result[0].int(), result[1])"),
        },
    },
    "1.2": {
        "arguments": {
            "tokens in a tensor": loss(
                SHIFT, SUM.replace("tokens", "torch.tensor(tokens)")
            )
        },
        "state": {
            "a closure": loss(
                "def nats(z, y):",
                "    return F.cross_entropy(z.float(), y, reduction='sum')",
                "pairs = zip(logits[:, :-1], labels[:, 1:])",
                "return sum(nats(z, y) for z, y in pairs) / tokens",
            ),
            "nll_loss": loss(
                SHIFT,
                "return F.nll_loss(z.log_softmax(1), y, reduction='sum') / tokens",
            ),
        },
        "inputs": {
            "transposed": loss(
                "z = logits[:, :-1].float().transpose(1, 2)",
                "return F.cross_entropy(z, labels[:, 1:], reduction='sum') / tokens",
            ),
            "logsumexp": loss(
                SHIFT,
                "chosen = z.gather(1, y.clamp(min=0)[:, None])[:, 0]",
                "return ((z.logsumexp(1) - chosen) * (y >= 0)).sum() / tokens",
            ),
        },
        "kinds": {"float64": returned("result.double()")},
    },
    "1.3": {
        "arguments": {
            "by keyword": adamw(
                before="(beta1, beta2), shrink = betas, 1 - decay * lr",
                first="m = m.mul(beta1).add(g, alpha=1 - beta1)",
                step="return W * shrink - lr * m_hat / (eps + v_hat**0.5), m, v",
            )
        },
        "state": {
            "copies first": adamw(
                before="W, g, m, v = (x.detach().clone() for x in (W, g, m, v))"
            )
        },
        "inputs": {
            "torch.optim's order": adamw(
                hats="root = v.sqrt() / math.sqrt(1 - betas[1] ** t) + eps",
                step="return torch.addcdiv(W * (1 - lr * decay), m, root,"
                " value=-lr / (1 - betas[0] ** t)), m, v",
            )
        },
        "kinds": {"a list": returned("[*result]")},
    },
    "1.4": {
        "arguments": {
            "by itertools": """\
def my_control(runs, a, b, suspect):
    from itertools import combinations

    def plan(run):
        return {
            "how": run["how"],
            "parts": frozenset(run["parts"]),
            "examples": run["examples"],
            "tried": run["tried"],
            "seeds": frozenset(run["seeds"]),
        }

    plans = {run["name"]: plan(run) for run in runs}

    def fields(x, y):
        return [f for f, v in plans[x].items() if v != plans[y][f]]

    pairs = [
        pair
        for pair in combinations(plans, 2)
        if fields(*pair) == [suspect] and len(plans[pair[0]]["seeds"]) >= 2
    ]
    return {f for f in fields(a, b) if f != suspect}, pairs[0] if pairs else None
"""
        },
        "state": {
            "of copies": control().replace(
                "    by_name", "    runs = [dict(run) for run in runs]\n    by_name"
            )
        },
        "inputs": {
            "the last pair": control()
            .replace("for i, one in enumerate(runs)", "for i, one in [*ordered]")
            .replace(
                "    for i", "    ordered = list(enumerate(runs))[::-1]\n    for i", 1
            ),
            "the smaller name first": returned(
                "(result[0], result[1] and tuple(sorted(result[1])))"
            ),
        },
        "kinds": {
            "lists": returned("[sorted(result[0]), result[1] and list(result[1])]"),
            "frozen sets": returned(
                "(frozenset(result[0]), result[1] and frozenset(result[1]))"
            ),
        },
    },
}
