"""What the exercises of notebook 01, full fine-tuning, are compared with.

Labels with batch.collate, the loss with loss.summed_loss, AdamW with torch's own, the
control with every pair of runs. our_loss, our_adamw and our_control do the lesson's
work for those who have not solved an exercise.
"""

import copy
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ledger.experiments import data_size
from ...tasks.templates import IGNORED
from ...training.batch import collate, label_tokens
from ...training.loss import summed_loss
from . import Wrong, close, judged, unchanged


def _each(
    got,
    expected: Mapping[str, object],
    where: str,
    mistakes: Mapping[str, Mapping[str, object]],
    *,
    tolerance: float = 1e-5,
    kinds: Mapping[str, torch.dtype | type[int]] | None = None,
) -> None:
    """close() for each of several values that were returned together, by its name.

    Args
        expected  {name: value}, in the order in which they are returned
        where     what follows a name: "for a model of …"
        mistakes  {name: {likely mistake: what it gives}}, in the order of looking
        kinds     {name: the dtype, or int}, as close() has it
    """
    if not isinstance(got, tuple | list) or len(got) != len(expected):
        close(got, tuple(expected.values()), what=f"{', '.join(expected)} {where}")
    values = dict(zip(expected, got, strict=True))
    for name, wrong in mistakes.items():
        close(
            values[name],
            expected[name],
            what=f"{name} {where}",
            mistakes=wrong,
            tolerance=tolerance,
            kind=(kinds or {}).get(name),
            inside=True,
        )


# 1.1 ----------------------------------------------------------------------------------

# (rows of (prompt, answer), end token, pad token)
ROWS = (
    ([([5, 6, 7], [8, 9]), ([5], [4, 3])], 1, 0),
    ([([5, 6, 1, 7], [8]), ([9, 6], [7, 5, 3]), ([4], [6])], 1, 1),  # pad is end
    ([([3, 3], [3, 3, 3])], 2, 0),
    ([([7, 2, 7, 5, 4], [0, 6]), ([2], [])], 2, 2),
    ([([5, 6], [8, 1, 9]), ([3], [0, 4, 0]), ([7], [1])], 1, 0),  # both in answers
    ([([5], [1, 1, 9]), ([1], [1, 6, 1, 1])], 1, 1),
    ([([], [5, 6]), ([7], [8])], 2, 0),  # no prompt
    ([([70_001, 151_643], [40_000]), ([128_009], [300, 9])], 128_001, 128_004),
    ([([i, 3], [*range(20, 20 + 3 * i)]) for i in range(6)], 1, 0),
    ([([7, 6, 5], [4, 3]), ([9], [8, 2])], 1, 0),  # the first, with other tokens
    ([([5, 6, 7], [8, 9]), ([5], [4, 3])], 3, 0),  # … and another end
    ([([5, 6, 7], [8, 9]), ([5], [4, 3])], 1, 2),  # … and another pad
    ([([5], [8, 9]), ([5, 6, 7], [4, 3])], 1, 0),
    ([([5, 6], [8]), ([5, 6], [8]), ([3], [4, 2]), ([5, 6], [8])], 1, 0),  # equal ones
    ([([5, 6, 7], [8, 9]), ([5], [4, 3])], 1, 0),
)
WHOLE = {"input_ids": int, "labels": torch.int64}  # cross_entropy wants int64 labels


@judged
def labels(my_batch: Callable) -> None:
    """1.1: my_batch(rows, end, pad) is (input_ids, labels), padded on the right."""
    for rows, end, pad in ROWS:
        lent = copy.deepcopy(rows)
        with unchanged(rows=lent):
            got = my_batch(lent, end, pad)
        _each(
            got,
            _collated(rows, end, pad),
            f"for {rows=}, {end=}, {pad=}",
            _batches(rows, end, pad),
            kinds=WHOLE,
        )


def _collated(rows, end: int, pad: int) -> dict[str, Tensor]:
    encoded = [(p + a + [end], [IGNORED] * len(p) + a + [end]) for p, a in rows]
    batch = collate(encoded, pad)
    return {name: batch[name] for name in ("input_ids", "labels")}


def _batches(rows, end: int, pad: int) -> dict[str, dict[str, Tensor]]:
    """Wrong ones, made row by row."""
    longest = max(len(p + a) for p, a in rows) + 1
    wrong = {"input_ids": defaultdict(list), "labels": defaultdict(list)}
    for p, a in rows:
        padding = [pad] * (longest - len(p + a) - 1)
        for name, wrong_rows in (("input_ids", _ids), ("labels", _labels)):
            for text, row in wrong_rows(p, a, end, padding, pad).items():
                wrong[name][text].append(row)
    wrong = {
        name: {text: torch.tensor(batch) for text, batch in each.items()}
        for name, each in wrong.items()
    }
    right = _collated(rows, end, pad)
    prompts, answers = zip(*rows, strict=True)
    joined = max(map(len, prompts)) + max(map(len, answers)) + 1
    wrong["input_ids"] |= {
        "the longest prompt and the longest answer may stand in two rows: as wide as "
        "the longest row, and no wider": _widened(right, pad, joined),
        "filled up to a multiple of eight: as wide as the longest row, and no wider": (
            _widened(right, pad, -(-longest // 8) * 8)
        ),
        "16 bits are too few for the ids: no dtype is needed": (
            right["input_ids"].to(torch.int16)
        ),
    }
    wrong["labels"][
        "a mask of zeros and ones; a label is the token itself, or -100"
    ] = (right["labels"] != IGNORED).long()
    return wrong


def _widened(batch: dict[str, Tensor], pad: int, width: int) -> Tensor:
    ids = batch["input_ids"]
    return F.pad(ids, (0, width - ids.shape[1]), value=pad)


def _ids(p, a, end: int, padding: list[int], pad: int) -> dict[str, list[int]]:
    """Wrong tokens for a row of prompt p and answer a."""
    return {
        "padded on the left; here real tokens come first": [*padding, *p, *a, end],
        "the end token is missing": [*p, *a, *padding],
        "there is padding where the end token should be": [*p, *a, pad, *padding],
        "the end token stands behind the prompt: it ends the answer": (
            [*p, end, *a, *padding]
        ),
        "the answer stands before the prompt": [*a, *p, end, *padding],
        "-100 is for labels: no token has this id": [*p, *a, end, *_hidden(padding)],
    }


def _labels(p, a, end: int, padding: list[int], pad: int) -> dict[str, list[int]]:
    """Wrong labels for a row of prompt p and answer a."""
    before, after = _hidden(p), _hidden(padding)
    tokens, right = [*p, *a, end, *padding], [*before, *a, end, *after]
    pairs = zip(tokens, right, strict=True)
    return {
        "padding was found by its token: where pad is the end token, the end loses its "
        "label too. Find it by counting": (
            [IGNORED if token == pad else label for token, label in pairs]
        ),
        "the end token has no label, so the model never learns to stop": (
            [*before, *a, IGNORED, *after]
        ),
        "no label is hidden: labels are a copy of input_ids": tokens,
        "the prompt has labels: the loss is on the answer alone": [*p, *a, end, *after],
        "padding has the pad token for a label; -100 is meant": (
            [*before, *a, end, *padding]
        ),
        "labels are shifted: that is the loss's job, labels[t] is the token at t": (
            [*right[1:], IGNORED]
        ),
        "0 hides no label, it is a token: cross_entropy ignores -100": (
            [0 if label == IGNORED else label for label in right]
        ),
        "one label too many: the last token of the prompt has one": (
            [*before[1:], *p[-1:], *a, end, *after]
        ),
        "one label too few: the first token of the answer has none": (
            [*before, IGNORED, *right[len(p) + 1 :]]
        ),
    }


def _hidden(tokens: list[int]) -> list[int]:
    return [IGNORED] * len(tokens)


# 1.2 ----------------------------------------------------------------------------------

# (b, t, vocabulary, dtype of the logits, their size). Logits of 100 overflow in exp(),
# and a probability may then be too small for its logarithm.
SHAPES = (
    (2, 5, 7, torch.float32, 3),
    (1, 9, 4, torch.float32, 3),
    (4, 6, 11, torch.float32, 3),
    (3, 8, 50, torch.bfloat16, 3),
    (2, 5, 7, torch.float32, 100),
    (2, 4, 6, torch.float32, 1e5),
    (9, 30, 12, torch.float32, 3),
    (2, 5, 7, torch.float32, 1e-3),
)


class _Says(nn.Module):
    """A model that answers with given logits."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.logits)


def our_loss(logits: Tensor, labels: Tensor, tokens: int) -> Tensor:
    """The summed surprise at the labels of a part, over the label tokens of a step.

    Args
        logits  (b, t, vocabulary), of any floating dtype
        labels  (b, t) int64, -100 where none
        tokens  label tokens of the whole optimizer step
    Returns  a float32 scalar, nats per label token
    """
    return _nats(logits[:, :-1].float(), labels[:, 1:]) / tokens


@judged
def loss(my_loss: Callable) -> None:
    """1.2: my_loss(logits, labels, tokens), so that its parts add up to the whole."""
    for logits, given in _loss_cases():
        here = label_tokens({"labels": given})
        tokens = 2 * here + 3  # of a step that has other rows, too
        theirs, ours = (logits.clone().requires_grad_() for _ in range(2))
        with unchanged(logits=theirs, labels=given):
            got = my_loss(theirs, given, tokens)
        expected = _summed(ours, given) / tokens
        kind = str(logits.dtype).removeprefix("torch.")
        close(
            got,
            expected.detach(),
            what=f"loss for logits {tuple(logits.shape)} in {kind}, {here} label "
            f"tokens here, {tokens=}",
            mistakes=_losses(logits, given, tokens),
        )
        _same_gradient(got, theirs, expected, ours)
        _other_logits(my_loss, logits, given, tokens)
    _adds_up(my_loss)
    _nothing_to_predict(my_loss)


def _loss_cases() -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    for b, t, vocabulary, dtype, size in SHAPES:
        logits = size * torch.randn(b, t, vocabulary, generator=draw)
        given = torch.randint(vocabulary, (b, t), generator=draw)
        hidden = torch.rand(b, t, generator=draw) < 0.4
        hidden[:, 0], hidden[:, -1] = False, False  # the first has a label, for once
        yield logits.to(dtype), given.masked_fill(hidden, IGNORED)


def _summed(logits: Tensor, given: Tensor) -> Tensor:
    """By the library, whose model has these logits."""
    return summed_loss(_Says(logits), {"input_ids": given, "labels": given})


def _same_gradient(got, theirs, expected, ours) -> None:
    if not got.requires_grad:
        raise Wrong(
            "the loss has the right value, but no gradient flows through it. Likely "
            "mistake: .item(), .detach() or torch.no_grad()"
        )
    got.backward()
    expected.backward()
    what = "the gradient of the loss, for the same logits"
    rounding = torch.finfo(theirs.dtype).eps  # of gradients that are kept in bfloat16
    close(theirs.grad, ours.grad, what=what, tolerance=max(1e-5, rounding))


def _other_logits(my_loss: Callable, logits, given: Tensor, tokens: int) -> None:
    """The same labels, without autograd."""
    logits = logits.flip(-1)
    with torch.no_grad(), unchanged(logits=logits, labels=given):
        got = my_loss(logits, given, tokens)
    what = "the loss of other logits with the same labels, in torch.no_grad()"
    close(got, _summed(logits, given) / tokens, what=what)


def _nothing_to_predict(my_loss: Callable) -> None:
    """One token a row: no token stands before it."""
    logits, given = torch.ones(2, 1, 5), torch.tensor([[1], [2]])
    got = torch.as_tensor(my_loss(logits, given, 7))
    close(got, torch.tensor(0.0), what="the loss of rows of one token, tokens=7")


def _adds_up(my_loss: Callable) -> None:
    """One step in parts, of which one has no label at all; then one backward pass."""
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(8, 6, 5, generator=draw, requires_grad=True)
    given = torch.randint(5, (8, 6), generator=draw)
    for row in range(8):
        given[row, : row % 6] = IGNORED
    given[3] = IGNORED
    tokens = label_tokens({"labels": given})
    parts = []
    for row in range(8):
        part = my_loss(logits[row : row + 1].clone(), given[row : row + 1], tokens)
        parts.append(torch.as_tensor(part))
    if not parts[3].isfinite():
        raise Wrong(
            f"the loss of a part without any label is {parts[3]:.3g}, and should be 0. "
            "Likely mistake: a mean over nothing; take the sum"
        )
    what = "the sum of the losses of eight rows, one at a time (one has no label)"
    ours = logits.detach().clone().requires_grad_()
    expected = _summed(ours, given) / tokens
    close(sum(parts), expected, what=what)
    _same_gradient(sum(parts), logits, expected, ours)


def _losses(logits: Tensor, given: Tensor, tokens: int) -> dict[str, Tensor]:
    """Wrong ones."""
    wide, here = logits.float(), label_tokens({"labels": given})
    z, y = wide[:, :-1], given[:, 1:]
    right = _nats(z, y)
    means = [_nats(*row) / (row[1] != IGNORED).sum() for row in zip(z, y, strict=True)]
    unshifted = y.clamp(min=0).masked_fill(given[:, :-1] == IGNORED, IGNORED)
    turned = z.reshape(len(z), z.shape[2], z.shape[1]).transpose(1, 2)
    sums = {
        "-100 was looked for in labels[:, :-1], before the shift": _nats(z, unshifted),
        "a softmax too many: cross_entropy takes the logits as they are": (
            _nats(z.softmax(-1), y)
        ),
        "reshape or view turns nothing round: transpose(1, 2) does": _nats(turned, y),
        "not shifted: the logits at t - 1 are about the token at t": _nats(wide, given),
        "shifted the wrong way: logits[:, :-1] belong to labels[:, 1:]": (
            _nats(wide[:, 1:], given[:, :-1])
        ),
        "shifted twice: once is enough": _nats(wide[:, :-2], given[:, 2:]),
        "shifted after the rows were joined: now the end of a row predicts the start "
        "of the next one. Shift, then flatten": (
            _nats(wide.flatten(0, 1)[:-1], given.flatten()[1:])
        ),
        "in bits: the logarithm is the natural one": right / math.log(2),
        "-100 was read as a token: such positions have no loss": (
            _nats(z, y.clamp(min=0))
        ),
        "computed in bfloat16: take logits.float() first": _nats(logits[:, :-1], y),
        "the mean over this part, divided by `tokens` once more": right / here,
    }
    return {text: nats / tokens for text, nats in sums.items()} | {
        "divided by the label tokens of this part, not by `tokens`": right / here,
        "in the logits' dtype at the end: the loss stays in float32": (
            (right / tokens).to(logits.dtype)
        ),
        "// drops what is behind the point": right // tokens,
        "divided by all positions": right / y.numel(),
        "divided by the number of rows": right / len(given),
        "not divided by `tokens`": right,
        "the mean of the rows' means": sum(means) / len(means),
    }


def _nats(logits: Tensor, given: Tensor) -> Tensor:
    """The summed surprise at the tokens that have a label."""
    logits, given = logits.reshape(-1, logits.shape[-1]), given.reshape(-1)
    return F.cross_entropy(logits, given, reduction="sum")


# 1.3 ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Of AdamW: its settings, and the tensors of which it is made."""

    t: int = 2
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.01
    shape: tuple[int, ...] = (3, 4)
    dtype: torch.dtype = torch.float64
    W: float = 1.0  # size of the weights
    g: float = 1.0  # … and of the gradients

    @property
    def settings(self) -> tuple:
        return self.t, self.lr, self.betas, self.eps, self.decay

    def tensors(self, seed: int) -> dict[str, Tensor]:
        """Random, in no way those of the step before: nothing is to be remembered."""
        draw = torch.Generator().manual_seed(seed)
        W, g, m, v = torch.randn(4, *self.shape, generator=draw, dtype=self.dtype)
        tensors = {"W": self.W * W, "g": self.g * g, "m": self.g * m}
        first = self.t == 1
        tensors |= {"v": (self.g * v).square()}
        if first:
            tensors |= {name: torch.zeros_like(W) for name in "mv"}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def __str__(self):
        t, lr, betas, eps, decay = self.settings
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"of shape {self.shape} in {kind} after step {t=}, with {lr=}, {betas=}, "
            f"{eps=}, {decay=}"
        )


STEPS = (  # the first, then others that differ from it in one thing; the first again
    Step(),
    *(Step(t=t) for t in (1, 3, 2000, 20, 1, 2)),
    *(Step(lr=0.05), Step(betas=(0.8, 0.999)), Step(betas=(0.9, 0.95))),
    *(Step(eps=0.1), Step(eps=0.5, t=3), Step(eps=1e-3)),
    *(Step(decay=0.5), Step(decay=0.0), Step(decay=0.1, lr=0.2)),
    *(Step(shape=()), Step(shape=(5,), t=1), Step(shape=(2, 3, 2)), Step(shape=(1, 9))),
    *(Step(g=1e-8), Step(g=1e4), Step(W=1e5), Step(W=1e-5, g=1e-3, eps=1e-6)),
    *(Step(dtype=torch.float32), Step(dtype=torch.float32, t=1, shape=(6,))),
    *(Step(t=4, betas=(0.5, 0.7), eps=0.1, decay=0.3), Step()),
)


def our_adamw(
    W: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr, betas, eps, decay
) -> tuple[Tensor, Tensor, Tensor]:
    """(W, m, v) after step number t = 1, 2, … of AdamW, in their own dtypes.

    W = (1 - lr decay) W - lr m̂ / (√v̂ + eps)
    """
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    root = (v / (1 - betas[1] ** t)).sqrt() + eps
    return (1 - lr * decay) * W - lr * m / (1 - betas[0] ** t) / root, m, v


@judged
def adamw(my_adamw: Callable) -> None:
    """1.3: my_adamw(W, g, m, v, t, lr, betas, eps, decay) is (W, m, v) one step on."""
    for seed, step in enumerate(STEPS):
        _one_step(my_adamw, step, step.tensors(seed))


def _stepped(step: Step, W, g, m, v) -> dict[str, Tensor]:
    """By torch's AdamW, which is told that it has made t - 1 steps."""
    W = nn.Parameter(W.clone())
    W.grad = g.clone()
    optimizer = torch.optim.AdamW(
        [W], lr=step.lr, betas=step.betas, eps=step.eps, weight_decay=step.decay
    )
    before = {"step": torch.tensor(step.t - 1.0), "exp_avg": m, "exp_avg_sq": v}
    optimizer.state[W] = {name: tensor.clone() for name, tensor in before.items()}
    optimizer.step()
    state = optimizer.state[W]
    return {"W": W.detach(), "m": state["exp_avg"], "v": state["exp_avg_sq"]}


def _one_step(my_adamw, step: Step, tensors: dict[str, Tensor]) -> None:
    lent = {name: tensors[name].clone() for name in ("W", "g", "m", "v")}
    with unchanged(**lent):
        got = my_adamw(*lent.values(), *step.settings)
    _refuse_broken(got, step)
    _each(
        got,
        _stepped(step, **tensors),
        str(step),
        _steps(**tensors, settings=step.settings),
        tolerance=1e-6 if step.dtype == torch.float64 else 1e-5,
        kinds=dict.fromkeys(("W", "m", "v"), step.dtype),
    )


def _refuse_broken(got, step: Step) -> None:
    """A step that divided by zero, when nothing in the equations is zero there."""
    tensors = got if isinstance(got, tuple | list) else [got]
    if not all(torch.isfinite(x).all() for x in tensors if isinstance(x, Tensor)):
        likely = (
            "is eps added, after the root? Or the root of a negative number: was it "
            "1 - beta * t, or 1 - t ** beta, in the place of 1 - beta ** t?"
        )
        if step.t == 1:
            likely = (
                "is t off by one? It is 1 in the first step: 1 - beta ** t is not 0"
            )
        raise Wrong(
            f"W, m, v {step}\n  got       NaN or infinite entries\n"
            f"Likely mistake: a division by zero; {likely}"
        )


def _steps(W, g, m, v, settings) -> dict[str, dict[str, Tensor]]:
    """Wrong ones. m and v are looked at before W, which is made of the right ones."""
    t, lr, (beta1, beta2), eps, decay = settings
    old_m, old_v = m, v
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    shrunk, root = (1 - lr * decay) * W, v_hat.sqrt() + eps
    step = lr * m_hat / root
    early = max(t - 1, 1)  # at 0 there is a division by zero

    def at(t: int) -> Tensor:
        return moved(m / (1 - beta1**t), (v / (1 - beta2**t)).sqrt() + eps)

    def moved(mean: Tensor, root: Tensor) -> Tensor:
        return shrunk - lr * mean / root

    return {
        "m": {
            "m is as it was": old_m,
            "m and v are swapped: W, m, v come back, in this order": v,
            "m is divided by 1 - beta1 ** t: W's step alone uses that": m_hat,
            "beta1 and beta2 are swapped": beta2 * old_m + (1 - beta2) * g,
            "beta1 belongs to the old m, 1 - beta1 to g": (
                (1 - beta1) * old_m + beta1 * g
            ),
            "the decay went into the gradient: that is Adam with L2, not AdamW": (
                beta1 * old_m + (1 - beta1) * (g + decay * W)
            ),
            "g is not multiplied by 1 - beta1": beta1 * old_m + g,
        },
        "v": {
            "v is as it was": old_v,
            "v is divided by 1 - beta2 ** t: W's step alone uses that": v_hat,
            "v is a mean of g * g, not of g": beta2 * old_v + (1 - beta2) * g,
            "v is a mean of g * g, not of |g|": beta2 * old_v + (1 - beta2) * g.abs(),
            "v is a mean of g * g, not of m * m": beta2 * old_v + (1 - beta2) * m * m,
            "v has beta2, not beta1": beta1 * old_v + (1 - beta1) * g * g,
            "beta2 belongs to the old v, 1 - beta2 to g * g": (
                (1 - beta2) * old_v + beta2 * g * g
            ),
            "g * g is not multiplied by 1 - beta2": beta2 * old_v + g * g,
        },
        "W": {
            "W is as it was": W,
            "no bias correction: m / (1 - beta1 ** t), v / (1 - beta2 ** t)": (
                moved(m, v.sqrt() + eps)
            ),
            "the bias of m is not corrected": moved(m, root),
            "the bias of v is not corrected": moved(m_hat, v.sqrt() + eps),
            "the corrections are swapped: m has beta1 ** t, v has beta2 ** t": (
                moved(m / (1 - beta2**t), (v / (1 - beta1**t)).sqrt() + eps)
            ),
            "multiplied by 1 - beta ** t: divide by it": (
                moved(m * (1 - beta1**t), (v * (1 - beta2**t)).sqrt() + eps)
            ),
            "1 - beta * t in the place of 1 - beta ** t": (
                moved(m / (1 - beta1 * t), (v / (1 - beta2 * t)).sqrt() + eps)
            ),
            "one root for all: each number has its own": (
                moved(m_hat, v_hat.mean().sqrt() + eps)
            ),
            "a norm in the place of the root: each number has its own": (
                moved(m_hat, v_hat.norm() + eps)
            ),
            "the largest v so far is kept: that is AMSGrad": (
                moved(m_hat, (torch.maximum(v, old_v) / (1 - beta2**t)).sqrt() + eps)
            ),
            "g is mixed into m once more: that is NAdam": moved(
                beta1 * m_hat + (1 - beta1) * g / (1 - beta1**t), root
            ),
            "the decay is multiplied into the step: it shrinks W": (
                W - lr * (1 - decay) * m_hat / root
            ),
            "t is off by one: it is 1 in the first step, and comes as it is": at(t + 1),
            "t is off by one: t counts from 1, and comes as it is": at(early),
            "the old m and v were used: they are updated before W": (
                moved(old_m / (1 - beta1**t), (old_v / (1 - beta2**t)).sqrt() + eps)
            ),
            "g stands in the place of m": moved(g, root),
            "eps is missing": moved(m_hat, v_hat.sqrt()),
            "eps stands inside the root: it is added after it": (
                moved(m_hat, (v_hat + eps).sqrt())
            ),
            "eps is added before the bias correction": (
                moved(m_hat, (v.sqrt() + eps) / (1 - beta2**t) ** 0.5)
            ),
            "the root of v is missing": moved(m_hat, v_hat + eps),
            "the decay is missing": W - step,
            "the decay is not multiplied by lr": (1 - decay) * W - step,
            "the decay has the wrong sign: it shrinks W": (1 + lr * decay) * W - step,
            "the decay comes after the step; AdamW shrinks the old W": (
                (1 - lr * decay) * (W - step)
            ),
            "the wrong sign: W moves against the gradient": shrunk + step,
        },
    }


# 1.4 ----------------------------------------------------------------------------------

SETTINGS = ("how", "parts", "examples", "tried", "seeds")
OUTCOMES = {
    "rate": (
        "the learning rate is an outcome of the search: each method needs its own. "
        "What must be equal is the number of rates that were tried"
    ),
    "loss": "the loss is the outcome that is compared, and no setting",
    "name": "a name is no setting",
}
PARTS = ("matrices", "embedding", "norms", "head")
ALL, FIVE = PARTS, (0, 1, 2, 3, 4)
MATRICES = ("matrices",)
TABLES = 80  # random ones, besides those that are written here
CHOICES = {  # what a random row is drawn from
    "how": ("all", "rank 8"),
    "parts": (ALL, MATRICES, (*PARTS[::-1],), ("head",), ("norms", "embedding")),
    "examples": (1600, 400),
    "tried": (3, 4),
    "seeds": (FIVE, FIVE[::-1], (5, 6, 7, 8, 9), (0, 1), (0,)),
}


def _run(name: str, how: str, parts: tuple, **others) -> dict:
    """A row of a table of runs."""
    run = {"name": name, "how": how, "parts": parts, "examples": 1600, "tried": 3}
    run |= {"rate": 0.01, "seeds": FIVE, "loss": 0.4}
    return run | others


FULL, LORA = _run("full", "all", ALL), _run("LoRA", "rank 8", MATRICES)
NARROW, WIDE = _run("narrow", "all", MATRICES), _run("wide", "rank 8", ALL[::-1])
# (runs, a, b, suspect)
DESIGNS = (
    ([FULL, LORA, NARROW], "full", "LoRA", "how"),
    ([FULL, LORA, NARROW], "full", "LoRA", "parts"),  # the control: full and narrow
    ([FULL, LORA], "full", "LoRA", "how"),  # none
    ([FULL, LORA, NARROW | {"loss": 9.0}], "LoRA", "full", "how"),
    ([FULL, LORA, NARROW | {"rate": 0.3}], "LoRA", "full", "how"),
    ([WIDE | {"rate": 0.001}, LORA, FULL], "full", "LoRA", "how"),
    ([FULL, LORA, NARROW | {"tried": 9}], "full", "LoRA", "how"),
    ([FULL, LORA | {"tried": 2}, NARROW], "full", "LoRA", "how"),
    ([FULL, LORA, NARROW | {"seeds": (5, 6, 7, 8, 9)}], "full", "LoRA", "how"),
    ([FULL, LORA, NARROW | {"seeds": FIVE[::-1]}], "full", "LoRA", "how"),
    ([FULL, LORA, NARROW | {"examples": 400}], "full", "LoRA", "how"),
    (
        [LORA | {"seeds": (2,)}, FULL, NARROW | {"seeds": (2,)}],
        *("full", "LoRA", "how"),
    ),
    (
        [LORA | {"seeds": (0, 1)}, FULL, NARROW | {"seeds": (0, 1)}],
        *("full", "LoRA", "how"),
    ),
    ([FULL, FULL | {"name": "again"}, LORA], "full", "again", "how"),
    ([FULL, FULL | {"name": "few", "examples": 400}], "full", "few", "examples"),
    ([LORA, LORA | {"name": "more", "tried": 9}], "LoRA", "more", "tried"),
    ([FULL, LORA, NARROW | {"parts": ("head",)}], "full", "LoRA", "how"),
    ([LORA, FULL, NARROW, WIDE], "LoRA", "full", "parts"),
    ([FULL, LORA, NARROW], "full", "LoRA", "how"),
)


def our_control(
    runs: list[dict], a: str, b: str, suspect: str
) -> tuple[set[str], tuple[str, str] | None]:
    """What else differs between two runs, and two that differ in the suspect alone.

    Args
        runs     rows with name, how, parts, examples, tried, rate, seeds and loss
        a, b     names of the two that are compared
        suspect  the field whose effect is asked for
    Returns  (confounds, names of the first such pair or None)
    """
    by_name = {run["name"]: run for run in runs}
    return _differing(by_name[a], by_name[b]) - {suspect}, next(
        _isolating(runs, suspect), None
    )


def shipped_rows(stored: list) -> list[dict]:
    """The table's rows of F4's runs on the far task: four methods, five seeds each.

    Args
        stored  every run of data_size.configs("tiny")
    """
    kinds = {
        "full": (data_size.ALL, "all", PARTS),
        "full, matrices": (data_size.FULL, "all", MATRICES),
        "LoRA and the rest": (data_size.BOTH, "rank 8", PARTS),
        "LoRA": (data_size.LORA, "rank 8", MATRICES),
    }
    return [_shipped_row(stored, name, *kind) for name, kind in kinds.items()]


def _shipped_row(stored: list, name: str, method: str, how: str, parts) -> dict:
    far, many = data_size.FAR, data_size.MANY
    own = [r for r in stored if (r.config["task"], r.config["method"]) == (far, method)]
    best = data_size.tuned(stored, (far, many), method)
    best = [run for run in best if run.config["seed"] in data_size.SEEDS]
    return {
        "name": name,
        "how": how,
        "parts": parts,
        "examples": many,
        "tried": len({run.config["lr"] for run in own}),
        "rate": best[0].config["lr"],
        "seeds": tuple(run.config["seed"] for run in best),
        "loss": fmean(run.result["test_loss"] for run in best),
    }


def _isolating(runs: list[dict], suspect: str) -> Iterator[tuple[str, str]]:
    for one, other in combinations(runs, 2):
        if _differing(one, other) == {suspect} and len(set(one["seeds"])) > 1:
            yield one["name"], other["name"]


def _differing(one: dict, other: dict) -> set[str]:
    return {f for f in SETTINGS if _unordered(one[f]) != _unordered(other[f])}


def _unordered(value):
    return frozenset(value) if isinstance(value, tuple | list) else value


def _designs() -> Iterator[tuple]:
    yield from DESIGNS
    draw = random.Random(3)
    for _ in range(TABLES):
        names = draw.sample("ABCDEFGH", draw.randint(3, 7))
        first = {field: draw.choice(values) for field, values in CHOICES.items()}
        runs = [_variant(draw, name, first) for name in names]
        yield runs, *draw.sample(names, 2), draw.choice(SETTINGS[:-1])


def _variant(draw: random.Random, name: str, first: dict) -> dict:
    """The first row with up to two settings drawn anew, so that rows often pair."""
    row = dict(first)
    for field in draw.sample(SETTINGS, draw.randint(0, 2)):
        row[field] = draw.choice(CHOICES[field])
    rate, loss = draw.choice((0.001, 0.01, 0.03)), round(draw.random(), 2)
    return _run(name, row["how"], row["parts"]) | row | {"rate": rate, "loss": loss}


@judged
def control(my_control: Callable) -> None:
    """1.4: my_control(runs, a, b, suspect) is (confounds, pair)."""
    for runs, a, b, suspect in _designs():
        lent = copy.deepcopy(runs)
        with unchanged(runs=lent):
            got = my_control(lent, a, b, suspect)
        if not isinstance(got, tuple | list) or len(got) != 2:
            missing = "`return` is missing" if got is None else "one of them is missing"
            raise Wrong(
                f"two values come back, (confounds, pair); got {got!r}. Likely "
                f"mistake: {missing}"
            )
        confounds, pair = got
        _demand_confounds(confounds, runs, a, b, suspect)
        _demand_pair(pair, runs, suspect)


def _demand_confounds(got, runs: list[dict], a: str, b: str, suspect: str) -> None:
    by_name = {run["name"]: run for run in runs}
    one, other = by_name[a], by_name[b]
    right = _differing(one, other) - {suspect}
    if isinstance(got, set | frozenset | list | tuple):
        if len(got) == len(right) and set(got) == right:
            return
        likely = _wrong_confounds(set(got), right, one, other, suspect)
    else:
        likely = f"a set of names of fields is needed, not {type(got).__name__}"
    rows = "\n".join(f"  {_row_in_words(run)}" for run in (one, other))
    raise Wrong(
        f"confounds of {a!r} and {b!r}, where the suspect is {suspect!r}:\n{rows}\n"
        f"  expected  {_in_words(right)}\n  got       {got!r}\nLikely mistake: {likely}"
    )


def _wrong_confounds(got: set, right: set, one: dict, other: dict, suspect: str) -> str:
    for field, text in OUTCOMES.items():
        if field in got:
            return text
    if suspect in got:
        return "the suspect itself is no confound: the other differences are"
    too_many, too_few = got - right, right - got
    if too_many & {"parts", "seeds"}:
        return f"the order inside {_in_words(too_many)} has no meaning: compare sets"
    if "parts" in too_few and len(one["parts"]) == len(other["parts"]):
        return "as many parts, but other ones: compare the parts, not their number"
    if "seeds" in too_few and len(one["seeds"]) == len(other["seeds"]):
        return (
            "as many seeds, but other ones: paired runs have the same seeds, so that "
            "both see the same examples"
        )
    if too_few:
        return f"{_in_words(too_few)} differs, and a fair comparison keeps it equal"
    return f"{_in_words(too_many)} is equal in both, or no setting"


def _demand_pair(got, runs: list[dict], suspect: str) -> None:
    right = [set(pair) for pair in _isolating(runs, suspect)]
    if got is None and not right:
        return
    names = {run["name"] for run in runs}
    if isinstance(got, tuple | list | set | frozenset):
        is_pair = len(got) == 2 and all(isinstance(n, str) for n in got)
        if is_pair and set(got) in right:
            return
        likely = "two names from the table are needed, or None"
        if is_pair and set(got) <= names:
            likely = _wrong_pair(got, runs, suspect)
    else:
        likely = f"a pair of names or None is needed, not {type(got).__name__}"
        if got is None:
            likely = _missed(right[0], runs)
    rows = "\n".join(f"  {_row_in_words(run)}" for run in runs)
    expected = " or ".join(str(tuple(sorted(pair))) for pair in right) or "None"
    raise Wrong(
        f"pair that isolates {suspect!r} in:\n{rows}\n  expected  {expected}\n"
        f"  got       {got!r}\nLikely mistake: {likely}"
    )


def _wrong_pair(got, runs: list[dict], suspect: str) -> str:
    by_name = {run["name"]: run for run in runs}
    one, other = (by_name[name] for name in got)
    differing = _differing(one, other)
    if one is other:
        return "the two names are the same"
    if suspect not in differing:
        return f"these two do not differ in {suspect!r}, so they cannot show its effect"
    if differing - {suspect}:
        others = _in_words(differing - {suspect})
        return f"these two also differ in {others}, so they isolate nothing"
    return "one seed has no interval: at least two are needed"


def _missed(pair: set, runs: list[dict]) -> str:
    by_name = {run["name"]: run for run in runs}
    one, other = (by_name[name] for name in sorted(pair))
    reasons = {
        "the order inside parts and seeds has no meaning: compare sets": any(
            one[f] != other[f] and _unordered(one[f]) == _unordered(other[f])
            for f in ("parts", "seeds")
        ),
        OUTCOMES["rate"]: one["rate"] != other["rate"],
        OUTCOMES["loss"]: one["loss"] != other["loss"],
        "two seeds are enough for an interval": len(one["seeds"]) == 2,
    }
    likely = "try every two rows of the table, not only a and b"
    return f"there is one: {next((r for r, so in reasons.items() if so), likely)}"


def _row_in_words(run: dict) -> str:
    """ "full: all, matrices+head, 1600 examples, …" in a line."""
    parts, seeds = "+".join(run["parts"]), " ".join(map(str, run["seeds"]))
    return (
        f"{run['name']}: {run['how']}; {parts}; {run['examples']} ex.; "
        f"{run['tried']} tried; seeds {seeds}"
    )


def _in_words(fields: set) -> str:
    return ", ".join(sorted(map(str, fields))) or "nothing"
