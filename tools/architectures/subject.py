"""What the checks look at: a method on a model, and what can be computed with both."""

import copy
import traceback
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_from_scratch as pfs
from peft_from_scratch.methods import named

from .tiny import VOCABULARY

BASE = "itself"  # the row of the model without a method
TOLERANCE = 1e-5  # of the largest logit or gradient
N = 3  # positions of a prompt or prefix
OPTIONS = {
    "full": dict(keep_original=True),
    "lora": dict(r=4),
    "dora": dict(r=4),
    "pissa": dict(r=4),
    "qlora": dict(r=4),
    "houlsby": dict(m=4),
    "prefix": dict(n=N),
    "prompt": dict(n=N),
}


class Wrong(Exception):
    """A check ran, and what came out is not what was promised."""

    def __init__(self, message: str, apart: float | None = None):
        super().__init__(message)
        self.apart = apart


class Announced(Exception):
    """What came out differs, and the library said so in a warning."""


class Skipped(Exception):
    """There is nothing to compare with."""


@dataclass
class Subject:
    """A method on a model: what all checks look at, made when it is first asked for.

    base    the model as it was built; never changed
    method  a name in the table of methods, or BASE
    """

    base: nn.Module
    method: str

    @cached_property
    def ids(self) -> Tensor:
        """(2, 7) token ids, none of them special."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(3, VOCABULARY, (2, 7), generator=generator)

    @cached_property
    def reference(self) -> nn.Module:
        """The model that remove() shall give back: the base, or the base in 4 bits."""
        if self.method != "qlora":
            return self.base
        model = copy.deepcopy(self.base)
        pfs.nf4.quantize_model(model)
        return model

    def injected(self, **options) -> nn.Module:
        """A copy of the reference with the method in its initialization."""
        model = copy.deepcopy(self.reference)
        self.inject(model, **options)
        return model

    def inject(self, model: nn.Module, **options) -> None:
        """Put the method on a model, in the same way at every call."""
        torch.manual_seed(2)
        chosen = OPTIONS.get(self.method, {}) | options
        named(self.method).module.inject(model, **chosen)

    @cached_property
    def changed(self) -> nn.Module:
        """A copy whose trainable tensors are all moved, as training would move them.

        For the model itself, the model.
        """
        if self.method == BASE:
            return self.base
        model = self.injected()
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in pfs.trainable(model).values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    @cached_property
    def expected(self) -> Tensor:
        """The logits of the changed model."""
        return logits(self.changed, self.ids)

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What trains of a model of this subject, by name."""
        return dict(
            model.named_parameters() if self.method == BASE else pfs.trainable(model)
        )


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(b, t, vocabulary), in evaluation mode and without a cache."""
    return model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :].float()


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in the mode that the model is in."""
    predicted = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(predicted.flatten(0, 1).float(), ids[:, 1:].flatten())


def decoded(
    model: nn.Module, ids: Tensor, mask: Tensor, use_cache: bool = True
) -> Tensor:
    """(b, 3, vocabulary): the logits of three greedy decoding steps."""
    torch.manual_seed(5)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        min_new_tokens=3,
        max_new_tokens=3,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return torch.stack(out.logits, 1).float()


def gradients(subject: Subject, checkpointed: bool = False) -> Tensor:
    """The gradients of all that trains in the changed model, in one vector.

    Raises  Skipped  checkpointing is asked for, and the model has none
    """
    model = copy.deepcopy(subject.changed).train()
    if checkpointed and not model.supports_gradient_checkpointing:
        raise Skipped("the model has no gradient checkpointing")
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if subject.method == BASE:  # frozen under most methods: checkpointing minds that
        model.get_input_embeddings().requires_grad_(False)
    trainable = subject.trainable(model).values()
    torch.manual_seed(7)  # some routers draw
    loss(model, subject.ids).backward()
    grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in trainable)
    return torch.cat([grad.flatten() for grad in grads])


def state(model: nn.Module) -> dict[str, object]:
    """Every tensor, flag and class of module of a model, by name."""
    entries: dict[str, object] = {
        f"tensor {name}": tensor.clone() for name, tensor in model.state_dict().items()
    }
    for name, parameter in model.named_parameters():
        entries[f"flag {name}"] = parameter.requires_grad
    for name, module in model.named_modules():
        entries[f"module {name}"] = type(module), module.training
    return entries


def first_change(
    before: dict[str, object], after: dict[str, object], but: Collection[Tensor] = ()
) -> str | None:
    """The first entry that is not what it was; None where all are.

    Args
        but  tensors that are allowed to change
    """
    allowed = {tensor.data_ptr() for tensor in but}
    for name in before | after:
        if name not in before or name not in after:
            return name
        old, new = before[name], after[name]
        if not isinstance(old, Tensor):
            same = old == new
        else:
            same = new.data_ptr() in allowed or torch.equal(old, new)
        if not same:
            return name
    return None


def close(ours: Tensor, theirs: Tensor, allowed: float = TOLERANCE) -> float:
    """The largest difference over the largest value; Wrong above what is allowed."""
    if ours.shape != theirs.shape:
        raise Wrong(f"shapes differ: {tuple(ours.shape)}, {tuple(theirs.shape)}")
    apart = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9)).item()
    if not apart <= allowed:
        raise Wrong(f"apart by more than {allowed} of the largest value", apart)
    return apart


def described(error: Exception) -> str:
    """The error's name, its first words, and the file that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]} ({Path(last.filename).name})"
