"""What a method promises on any model, as checks that need nothing but the model.

A check compares with something independent: the model without the method, the same
computation done another way, or PEFT. It returns how far the two are apart, or None
where it compares bits; it raises Wrong where they differ, and Skipped where there is
nothing to compare with.
"""

import copy
import re
import tempfile
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import peft_from_scratch as pfs
from peft_from_scratch.common import scoped
from peft_from_scratch.methods import named

from . import peft_files
from .subject import (
    BASE,
    Announced,
    N,
    Subject,
    Wrong,
    close,
    decoded,
    first_change,
    gradients,
    logits,
    loss,
    state,
)
from .tiny import VOCABULARY

ANOTHER_ORDER = 1e-4  # of the largest logit, where the sums are other ones
ELSEWHERE = re.compile("vision|audio|image")
AS_READ = ("prefix", "prompt")  # start=ids: as if the model had read these


def inject(subject: Subject) -> None:
    """The method goes onto the model, or is refused with the model untouched."""
    model = copy.deepcopy(subject.reference)
    before = state(model)
    try:
        subject.inject(model)
    except ValueError as error:
        if changed := first_change(before, state(model)):
            raise Wrong(f"refused, but {changed} changed: {error}") from error
        raise
    if not pfs.trainable(model):
        raise Wrong("nothing trains")


def identity(subject: Subject) -> float:
    """In its initialization, a method computes what the model did.

    A bottleneck's initialization is only near that: it is exact where `up` is zero.
    """
    model = subject.injected()
    if subject.method == "houlsby":
        for name, parameter in pfs.trainable(model).items():
            if ".up." in name:
                nn.init.zeros_(parameter)
    return close(logits(model, subject.ids), logits(subject.reference, subject.ids))


def as_read(subject: Subject) -> float:
    """start=ids: the model goes on as if it had read these tokens."""
    start, rest = subject.ids[:1, :N], subject.ids[:, N:]
    model = subject.injected(start=start[0].tolist())
    whole = torch.cat([start.expand(len(rest), -1), rest], 1)
    read = logits(subject.reference, whole)[:, N:]
    return close(logits(model, rest), read)


def train(subject: Subject) -> None:
    """Three steps of AdamW move every trainable tensor, and no other.

    Left out is what a text does not reach: towers for images and sounds; in full
    fine-tuning, tensors that the model itself never uses.
    """
    model = subject.injected()
    trainable = pfs.trainable(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = {name: tensor.detach().clone() for name, tensor in trainable.items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2, weight_decay=0)
    for ids in batches():
        with scoped.mode(model, training=True):
            loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, old in start.items() if torch.equal(old, trainable[name])]
    if moved := first_change(before, model.state_dict(), but=trainable.values()):
        raise Wrong(f"{moved} moved, which is frozen")
    still = [name for name in still if not ELSEWHERE.search(name)]
    if subject.method == "full":
        still = [name for name in still if name not in unused(subject.base)]
    if still:
        raise Wrong(f"{len(still)} of {len(start)} tensors never move: {still[0]}")


def batches() -> list[Tensor]:
    """Three batches (4, 12) of token ids."""
    generator = torch.Generator().manual_seed(4)
    return list(torch.randint(3, VOCABULARY, (3, 4, 12), generator=generator))


def unused(base: nn.Module) -> set[str]:
    """The parameters that get no gradient in the model itself."""
    model = copy.deepcopy(base).train()
    for ids in batches():
        loss(model, ids).backward()
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }


def merge(subject: Subject) -> float:
    """Merged weights compute the same; or CannotMerge, with the model untouched."""
    model = copy.deepcopy(subject.changed)
    try:
        pfs.merge(model)
    except pfs.CannotMerge as error:
        if not torch.equal(logits(model, subject.ids), subject.expected):
            raise Wrong(f"refused, but the model changed: {error}") from error
        raise
    return close(logits(model, subject.ids), subject.expected)


def remove(subject: Subject) -> None:
    """remove() brings every bit, flag and module of the reference back."""
    model = copy.deepcopy(subject.changed)
    pfs.remove(model)
    if changed := first_change(state(subject.reference), state(model)):
        raise Wrong(f"{changed} is not what it was")
    before = logits(subject.reference, subject.ids)
    if not torch.equal(logits(model, subject.ids), before):
        raise Wrong("the weights came back, the logits did not")


def file(subject: Subject) -> float:
    """A saved adapter computes the same on a fresh copy of the model."""
    with tempfile.TemporaryDirectory() as folder:
        pfs.save(subject.changed, folder)
        model = copy.deepcopy(subject.reference)
        pfs.load(model, folder)
    return close(logits(model, subject.ids), subject.expected)


def ours_in_peft(subject: Subject) -> float:
    """PEFT reads our file and computes the same, or save() warned that it does not."""
    changed = subject.changed
    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings(record=True, action="always") as warned:
            pfs.save(changed, folder)
        try:
            return close(peft_files.read(subject, folder), subject.expected)
        except Exception:
            if warned:
                raise Announced(f"save() warns: {warned[0].message}") from None
            peft_files.make(subject, folder)  # Skipped where PEFT fails on its own
            raise


def peft_in_ours(subject: Subject) -> float:
    """We read a file that PEFT made with the same configuration, and compute the same.

    What PEFT itself reads otherwise than it wrote is left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        pfs.save(subject.changed, folder)
        theirs = peft_files.make(subject, folder)
        model = copy.deepcopy(subject.reference)
        pfs.load(model, folder)
    return close(logits(model, subject.ids), theirs)


def cache(subject: Subject) -> float:
    """Decoding with the cache gives the logits of decoding without."""
    mask = torch.ones_like(subject.ids)
    with_cache, without = (
        decoded(subject.changed, subject.ids, mask, use_cache=use_cache)
        for use_cache in (True, False)
    )
    return close(with_cache, without, ANOTHER_ORDER)


def padding(subject: Subject) -> float:
    """A row that is padded on the left gives the logits that it gives alone."""
    mask = torch.ones_like(subject.ids)
    mask[1, :3] = 0
    ids = subject.ids * mask
    batch = decoded(subject.changed, ids, mask)[1:]
    alone = decoded(subject.changed, ids[1:, 3:], mask[1:, 3:])
    return close(batch, alone, ANOTHER_ORDER)


def checkpointing(subject: Subject) -> float:
    """Gradient checkpointing changes no gradient."""
    return close(gradients(subject, checkpointed=True), gradients(subject))


CHECKS = (
    inject,
    identity,
    as_read,
    train,
    merge,
    remove,
    file,
    ours_in_peft,
    peft_in_ours,
    cache,
    padding,
    checkpointing,
)
OF_THE_MODEL = (cache, padding, checkpointing)


def applies(check: Callable, method: str) -> bool:
    """Whether a check has a meaning for a method."""
    if method == BASE:
        return check in OF_THE_MODEL
    if check is identity:
        return method not in AS_READ
    if check is as_read:
        return method in AS_READ
    if check in (ours_in_peft, peft_in_ours):
        return named(method).peft_file != "no"
    return True
