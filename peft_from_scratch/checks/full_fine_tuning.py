"""What the exercises of notebook 01, full fine-tuning, are compared with.

Labels with templates.collate, the loss with loss.summed_loss, AdamW with torch's own,
the bill with the bytes that a real step was counted to take, storage with trying one
task after the other.
"""

import copy
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loss import label_tokens, summed_loss
from ..templates import IGNORED, collate
from . import Wrong, close, judged, unchanged


def _each(got, expected, names, said: str, mistakes, tolerance: float = 1e-5) -> None:
    """close() for each of several values, by its name."""
    if not isinstance(got, tuple | list) or len(got) != len(names):
        close(got, expected, what=f"({', '.join(names)}) {said}")
    for i, name in enumerate(names):
        wrong = {text: values[i] for text, values in mistakes.items()}
        what = f"{name} {said}"
        close(got[i], expected[i], what=what, mistakes=wrong, tolerance=tolerance)


# 1.1 ----------------------------------------------------------------------------------

# (rows of (prompt, answer), end token, pad token)
ROWS = (
    ([([5, 6, 7], [8, 9]), ([5], [4, 3])], 1, 0),
    ([([5, 6, 1, 7], [8]), ([9, 6], [7, 5, 3]), ([4], [6])], 1, 1),  # pad is end
    ([([3, 3], [3, 3, 3])], 2, 0),
    ([([7, 2, 7, 5, 4], [0, 6]), ([2], [])], 2, 2),
)


@judged
def labels(my_batch: Callable) -> None:
    """1.1: my_batch(rows, end, pad) is (input_ids, labels), padded on the right."""
    for rows, end, pad in ROWS:
        lent = copy.deepcopy(rows)
        got = my_batch(lent, end, pad)
        if lent != rows:
            raise Wrong(
                f"the rows themselves were changed: {rows} became {lent}. Likely "
                "mistake: += on a list that belongs to the caller; prompt + answer "
                "makes a new one"
            )
        expected = _collated(rows, end, pad)
        names = ("input_ids", "labels")
        said = f"for {rows=}, {end=}, {pad=}"
        _each(got, expected, names, said, _wrong_batches(rows, end, pad))
        for name, tensor in zip(names, got, strict=True):
            if tensor.dtype != torch.int64:
                raise Wrong(
                    f"{name} are {tensor.dtype}; tokens are whole numbers, torch.int64"
                )


def _collated(rows, end, pad) -> tuple[Tensor, Tensor]:
    encoded = [(p + a + [end], [IGNORED] * len(p) + a + [end]) for p, a in rows]
    made = collate(encoded, pad)
    return made["input_ids"], made["labels"]


def _wrong_batches(rows, end, pad) -> dict[str, tuple[Tensor, Tensor]]:
    ids, right = _collated(rows, end, pad)
    padding = torch.arange(ids.shape[1]) >= torch.tensor(
        [[len(p) + len(a) + 1] for p, a in rows]
    )
    prompt = torch.arange(ids.shape[1]) < torch.tensor([[len(p)] for p, _ in rows])
    is_end = padding.roll(-1, 1)
    is_end[:, -1] = ~padding[:, -1]
    early, late = ids.clone(), ids.clone()
    early[padding | (prompt & prompt.roll(-1, 1))] = IGNORED
    late[padding | prompt | prompt.roll(1, 1)] = IGNORED

    def but(mask, value=IGNORED, of=right):
        return ids, of.masked_fill(mask, value)

    shifted = F.pad(right[:, 1:], (0, 1), value=IGNORED)
    left = [[pad] * int(n) + row[: len(row) - int(n)] for n, row in
            zip(padding.sum(1), ids.tolist(), strict=True)]  # fmt: skip
    no_end = [(p + a, [IGNORED] * len(p) + a) for p, a in rows]
    bare = collate(no_end, pad)
    return {
        "padding was found by its token: where pad is the end token, the end loses "
        "its label too. Find it by counting": but(ids == pad),
        "the end token has no label, so the model never learns to stop": but(is_end),
        "the prompt carries labels: the loss is on the answer alone": but(
            padding, of=ids
        ),
        "padding carries labels": but(prompt, of=ids),
        "no label is hidden: labels are a copy of input_ids": (ids, ids),
        "labels are shifted: that is the loss's job, labels[t] is the token at t": (
            ids,
            shifted,
        ),
        "0 hides no label, it is a token: cross_entropy ignores -100": but(
            right == IGNORED, 0
        ),
        "padding has the pad token for a label; -100 is meant": but(padding, pad),
        "one label too many: the last token of the prompt has one": (ids, early),
        "one label too few: the first token of the answer has none": (ids, late),
        "padded on the left; here real tokens come first": (torch.tensor(left), right),
        "the end token is missing": (bare["input_ids"], bare["labels"]),
        "there is padding where the end token should be": (
            ids.masked_fill(is_end, pad),
            right.masked_fill(is_end, IGNORED),
        ),
    }


# 1.2 ----------------------------------------------------------------------------------

# (b, t, vocabulary, dtype of the logits)
SHAPES = (
    (2, 5, 7, torch.float32),
    (1, 9, 4, torch.float32),
    (4, 6, 11, torch.float32),
    (3, 8, 50, torch.bfloat16),
)


class _Says(nn.Module):
    """A model that answers with given logits."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.logits)


def _loss_cases() -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    for b, t, vocabulary, dtype in SHAPES:
        logits = 3 * torch.randn(b, t, vocabulary, generator=draw)
        given = torch.randint(vocabulary, (b, t), generator=draw)
        hidden = torch.rand(b, t, generator=draw) < 0.4
        hidden[:, 0], hidden[:, -1] = False, False  # the first has a label, for once
        yield logits.to(dtype), given.masked_fill(hidden, IGNORED)


def _summed(logits: Tensor, given: Tensor) -> Tensor:
    """By the library, whose model has these logits."""
    return summed_loss(_Says(logits), {"input_ids": given, "labels": given})


@judged
def loss(my_loss: Callable) -> None:
    """1.2: my_loss(logits, labels, tokens), so that its parts add up to the whole."""
    for logits, given in _loss_cases():
        tokens = 2 * label_tokens({"labels": given}) + 3  # of a step with other rows
        said = (
            f"loss for logits {tuple(logits.shape)} in {_short(logits.dtype)}, "
            f"{label_tokens({'labels': given})} label tokens here, tokens={tokens}"
        )
        theirs = logits.clone().requires_grad_()
        with unchanged(logits=theirs, labels=given):
            got = my_loss(theirs, given, tokens)
        ours = logits.clone().requires_grad_()
        expected = _summed(ours, given) / tokens
        close(
            got,
            expected.detach(),
            what=said,
            mistakes=_wrong_losses(logits, given, tokens),
        )
        _same_gradient(got, theirs, expected, ours)
    _adds_up(my_loss)


def _same_gradient(got, theirs, expected, ours) -> None:
    if not (isinstance(got, Tensor) and got.requires_grad):
        raise Wrong(
            "the loss has the right value, but no gradient flows through it. Likely "
            "mistake: .item(), .detach() or torch.no_grad()"
        )
    got.backward()
    expected.backward()
    close(theirs.grad, ours.grad, what="the gradient of the loss, for the same logits")


def _adds_up(my_loss: Callable) -> None:
    """One step in parts, of which one has no label at all."""
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(8, 6, 5, generator=draw)
    given = torch.randint(5, (8, 6), generator=draw)
    for row in range(8):
        given[row, : row % 6] = IGNORED
    given[3] = IGNORED
    tokens = label_tokens({"labels": given})
    parts = [
        my_loss(logits[i : i + 1].clone(), given[i : i + 1].clone(), tokens)
        for i in range(8)
    ]
    what = "the sum of the losses of eight rows, one at a time (one has no label)"
    got = sum(torch.as_tensor(part) for part in parts)
    means = [
        F.cross_entropy(logits[i, :-1], given[i, 1:]) for i in range(8) if i not in (3,)
    ]
    close(
        got,
        _summed(logits, given) / tokens,
        what=what,
        mistakes={"the mean of means: each row weighs the same": sum(means) / 8},
    )


def _wrong_losses(logits: Tensor, given: Tensor, tokens: int) -> dict[str, Tensor]:
    wide = logits.float()

    def summed(z, y):
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum")

    right = summed(wide[:, :-1], given[:, 1:])
    here = (given[:, 1:] != IGNORED).sum()
    unmasked = given[:, 1:].clamp(min=0)
    rows = [F.cross_entropy(z[:-1], y[1:]) for z, y in zip(wide, given, strict=True)]
    low = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), given[:, 1:].flatten(), reduction="sum"
    )
    return {
        "not shifted: the logits at t - 1 are about the token at t": summed(wide, given)
        / tokens,
        "shifted the wrong way: logits[:, :-1] belong to labels[:, 1:]": summed(
            wide[:, 1:], given[:, :-1]
        )
        / tokens,
        "divided by the label tokens of this part, not by `tokens`": right / here,
        "the mean over this part, divided by `tokens` once more": right / here / tokens,
        "divided by all positions": right / given[:, 1:].numel(),
        "divided by the number of rows": right / len(given),
        "shifted twice: once is enough": summed(wide[:, :-2], given[:, 2:]) / tokens,
        "not divided by `tokens`": right,
        "in bits: the logarithm is the natural one": right / tokens / math.log(2),
        "the mean of the rows' means": sum(rows) / len(rows),
        "-100 was read as a token: such positions carry no loss": summed(
            wide[:, :-1], unmasked
        )
        / tokens,
        "computed in bfloat16: take logits.float() first": low / tokens,
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# 1.3 ----------------------------------------------------------------------------------

# (shape, lr, betas, eps, decay)
STEPS = (
    ((3, 4), 0.1, (0.9, 0.999), 1e-8, 0.0),
    ((5,), 0.1, (0.8, 0.9), 1e-8, 0.5),
    ((2, 3, 2), 0.05, (0.5, 0.7), 0.1, 0.3),
    ((4, 4), 0.2, (0.9, 0.99), 0.5, 0.1),
)


@judged
def adamw(my_adamw: Callable) -> None:
    """1.3: my_adamw(W, g, m, v, t, lr, betas, eps, decay) is (W, m, v) one step on."""
    for case, (shape, lr, betas, eps, decay) in enumerate(STEPS):
        draw = torch.Generator().manual_seed(case)
        W = nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64))
        optimizer = torch.optim.AdamW(
            [W], lr=lr, betas=betas, eps=eps, weight_decay=decay
        )
        m, v = torch.zeros_like(W.data), torch.zeros_like(W.data)
        for t in (1, 2, 3):
            g = torch.randn(shape, generator=draw, dtype=torch.float64)
            before = W.detach().clone()
            W.grad = g.clone()
            optimizer.step()
            state = optimizer.state[W]
            after = W.detach(), state["exp_avg"], state["exp_avg_sq"]
            inputs = dict(W=before, g=g, m=m, v=v)
            _one_step(my_adamw, inputs, (t, lr, betas, eps, decay), after)
            m, v = (state[name].clone() for name in ("exp_avg", "exp_avg_sq"))


def _one_step(my_adamw, inputs: dict[str, Tensor], settings, after) -> None:
    t, lr, betas, eps, decay = settings
    lent = {name: tensor.clone() for name, tensor in inputs.items()}
    with unchanged(**lent):
        got = my_adamw(*lent.values(), *settings)
    shape = tuple(inputs["W"].shape)
    said = f"of shape {shape} after step {t=}, with {lr=}, {betas=}, {eps=}, {decay=}"
    if t == 1 and _is_broken(got):
        raise Wrong(
            f"W, m, v {said}\n  got       NaN or infinite entries\n"
            "Likely mistake: t is off by one. It is 1 in the first step, so that "
            "1 - beta ** t is not zero"
        )
    wrong = _wrong_steps(**inputs, settings=settings)
    _each(got, after, ("W", "m", "v"), said, wrong, tolerance=1e-6)


def _is_broken(got) -> bool:
    first = got[0] if isinstance(got, tuple | list) and got else got
    return isinstance(first, Tensor) and not first.isfinite().all()


def _adamw(W, g, m, v, t, lr, betas, eps, decay, **change) -> tuple[Tensor, ...]:
    """A step with one thing changed; the defaults are AdamW's."""
    (beta1, beta2), is_ = betas, change.get
    old_m, old_v = m, v
    if is_("coupled"):
        g = g + decay * W
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g if is_("plain") else g * g)
    used_m, used_v = (old_m, old_v) if is_("old") else (m, v)
    k = t + is_("later", 0)
    c1, c2 = (1.0, 1.0) if is_("biased") else (1 - beta1**k, 1 - beta2**k)
    c1, c2 = (1.0 if is_("only") == 2 else c1), (1.0 if is_("only") == 1 else c2)
    mean, square = used_m / c1, used_v / c2
    root = (square + eps).sqrt() if is_("inside") else square.abs().sqrt() + eps
    if is_("early"):
        root = (used_v.sqrt() + eps) / math.sqrt(c2)
    if is_("rootless"):
        root = square + eps
    shrink = {"coupled": 1.0, "whole": 1 - decay, "none": 1.0, "last": 1.0}
    kept = next((x for k, x in shrink.items() if is_(k)), 1 - lr * decay)
    moved = kept * W + is_("sign", -1) * lr * mean / root
    return (moved * (1 - lr * decay) if is_("last") else moved), m, v


def _wrong_steps(W, g, m, v, settings) -> dict[str, tuple[Tensor, ...]]:
    changes = {
        "no bias correction: m / (1 - beta1 ** t), v / (1 - beta2 ** t)": "biased",
        "t is off by one: it is 1 in the first step": "later",
        "the decay went into the gradient: that is Adam with L2, not AdamW": "coupled",
        "the decay is not multiplied by lr": "whole",
        "the decay is missing": "none",
        "the decay comes after the step; AdamW shrinks the old W": "last",
        "eps stands inside the root: it is added after it": "inside",
        "eps is added before the bias correction": "early",
        "the root of v is missing": "rootless",
        "the old m and v were used, zero at first: they are updated before W": "old",
        "v collects g; it is the mean of g * g": "plain",
        "the wrong sign: W moves against the gradient": "sign",
    }
    wrong = {
        text: _adamw(W, g, m, v, *settings, **{name: 1})
        for text, name in changes.items()
    }
    for which, name in ((1, "v"), (2, "m")):
        wrong[f"the bias of {name} is not corrected"] = _adamw(
            W, g, m, v, *settings, only=which
        )
    t, lr, betas, eps, decay = settings
    others = {
        "beta1 and beta2 are swapped": (t, lr, betas[::-1], eps, decay),
        "eps is missing": (t, lr, betas, 0.0, decay),
        "the decay has the wrong sign: it shrinks W": (t, lr, betas, eps, -decay),
    }
    for text, other in others.items():
        wrong[text] = _adamw(W, g, m, v, *other)
    correct = W, m, v = _adamw(W, g, m, v, *settings)
    wrong["m and v are kept as they are; only W's step uses the corrected ones"] = (
        W,
        m / (1 - betas[0] ** t),
        v / (1 - betas[1] ** t),
    )
    return {
        text: tensors
        for text, tensors in wrong.items()
        if not all(torch.equal(a, b) for a, b in zip(tensors, correct, strict=True))
    }


# 1.4 ----------------------------------------------------------------------------------

KINDS = ("weights", "gradients", "master", "moments")
# Bytes a parameter; tests/test_full_fine_tuning.py holds them to the counts of a step.
BYTES = {"fp32": (4, 4, 0, 8), "bf16": (2, 2, 0, 4), "mixed": (2, 2, 4, 8)}
COUNTS = (7_000_000_000, 134_515_008, 1_234_567)
GB, GIB = 1e9, 2**30


@judged
def memory_bill(my_bill: Callable) -> None:
    """1.4: my_bill(parameters, recipe) is {kind: GB} of a step's four rows."""
    for parameters in COUNTS:
        for recipe, sizes in BYTES.items():
            got = my_bill(parameters, recipe)
            said = f"my_bill({parameters:,}, {recipe!r})"
            _refuse_other_rows(got, said)
            for i, kind in enumerate(KINDS):
                close(
                    got[kind],
                    parameters * sizes[i] / GB,
                    what=f"GB of {kind} in {said}",
                    mistakes=_wrong_bills(parameters, recipe, i),
                )


def _refuse_other_rows(got, said: str) -> None:
    if not isinstance(got, dict):
        shown = "None: `return` is missing" if got is None else type(got).__name__
        raise Wrong(f"{said} is a dict with four rows, {KINDS}; got {shown}")
    if set(got) != set(KINDS):
        raise Wrong(
            f"{said} has the rows {tuple(got)}; expected are {KINDS}, with 0 for a row "
            "that the recipe does not have"
        )


def _wrong_bills(parameters: int, recipe: str, row: int) -> dict[str, float]:
    right = parameters * BYTES[recipe][row]
    wrong = {
        "GiB, units of 2 ** 30 bytes; a GB is 1e9 bytes": right / GIB,
        "bytes; divide by 1e9": right,
        "MB; a GB is 1e9 bytes": right / 1e6,
        "bits; a byte is eight of them": 8 * right / GB,
        "`parameters` is ignored": COUNTS[0] * BYTES[recipe][row] / GB,
    }
    own = {
        "weights": {
            "the master copy has a row of its own": 6,
            "this recipe keeps the weights in two bytes": 4,
            "float32 is four bytes": 2,
        },
        "gradients": {
            "a gradient has the dtype of its weight: two bytes": 4,
            "float32 is four bytes": 2,
        },
        "master": {
            "the master copy is float32: four bytes": 2,
            "only mixed precision has a master copy": 4,
        },
        "moments": {
            "fp32": {"Adam has two moments, m and v": 4},
            "bf16": {
                "Adam has two moments, m and v": 2,
                "here m and v have the dtype of the weights: two bytes each": 8,
            },
            "mixed": {
                "Adam has two moments, and here both are float32": 4,
                "the master copy is no moment: it has a row of its own": 12,
            },
        }[recipe],
    }[KINDS[row]]
    named = {text: parameters * size / GB for text, size in own.items()}
    wrong |= {text: size for text, size in named.items() if size != right / GB}
    wrong = {text: size for text, size in wrong.items() if size != right / GB}
    if right == 0:
        wrong = named
    elif row == 2:
        wrong["mixed precision has a float32 copy of the weights, too"] = 0.0
    return wrong


# 1.5 ----------------------------------------------------------------------------------

# (bytes of the disk, of a model, of an adapter)
DISKS = (
    (1_000, 100, 3),
    (10_000, 538, 9),
    (99, 100, 3),  # no room for a single model
    (100, 100, 3),  # room for a base alone
    (1_000, 60, 30),  # copies and adapters draw level exactly at two tasks
    (700, 90, 75),
    (500, 40, 40),  # an adapter as large as its base
)


@judged
def storage(my_storage: Callable) -> None:
    """1.5: my_storage(disk, model, adapter) is (copies, adapters, break_even)."""
    for disk, model, adapter in DISKS:
        got = my_storage(disk, model, adapter)
        names = ("copies", "adapters", "break_even")
        said = f"for {disk=}, {model=}, {adapter=} bytes"
        expected = _counted(disk, model, adapter)
        mistakes = _wrong_storage(disk, model, adapter, expected)
        _each(got, expected, names, said, mistakes, tolerance=1e-12)


def _counted(disk: int, model: int, adapter: int) -> tuple:
    """By adding one task after the other, as far as that is feasible."""
    copies = adapters = 0
    while (copies + 1) * model <= disk:
        copies += 1
    while model + (adapters + 1) * adapter <= disk:
        adapters += 1
    level = next((n for n in range(1, 1000) if model + n * adapter < n * model), None)
    return copies, adapters, level


def _wrong_storage(disk, model, adapter, expected) -> dict[str, tuple]:
    copies, adapters, level = expected
    wrong = {
        "the base is missing: adapters are served on one": (disk // adapter),
        "every adapter has a base of its own here; one base is enough": disk
        // (model + adapter),
        "rounded up: a task that fits in part does not fit": -(
            (model - disk) // adapter
        ),
        "below zero: with no room for the base, no task is served": (disk - model)
        // adapter,
        "not rounded: half a task cannot be served": (disk - model) / adapter,
        "the base was counted as a task": adapters + 1,
    }
    named = {text: (copies, value, level) for text, value in wrong.items()}
    named |= {
        "rounded up: a copy that fits in part does not fit": (
            -(-disk // model),
            adapters,
            level,
        ),
        "not rounded: half a copy cannot be served": (disk / model, adapters, level),
    }
    if level is None:
        text = "an adapter as large as its base never wins: None"
        named[text] = (copies, adapters, model // max(1, model - adapter) + 1)
    else:
        named |= {
            "one task too early: adapters must take fewer bytes, not the same": (
                copies,
                adapters,
                level - 1,
            ),
            "one task too late": (copies, adapters, level + 1),
            "not rounded: tasks are whole": (
                copies,
                adapters,
                model / (model - adapter),
            ),
            "that is how many adapters weigh one model; ask when one base and n "
            "adapters are less than n models": (copies, adapters, model // adapter),
        }
    return named
