"""What every check of an exercise is made of: Wrong, close, judged, unchanged.

One file a notebook stands beside this one, with one function an exercise. Such a check
takes the learner's class or function, tries it on several random shapes, compares with
the library, and returns None; or it raises Wrong, whose text is all that the learner
sees: what was computed, expected, got, and the likely mistake.

    @judged
    def lora_forward(MyLoRA):
        close(MyLoRA(…)(x), expected, what="h, for …", mistakes={"no 1 / r": other})
"""

import functools
import math
import numbers
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from torch import Tensor

SHOWN = 5  # values of each tensor
WIDTH = 88  # characters of a line
LIBRARIES = (  # parts of the paths of code that is not the learner's
    str(Path(__file__).parents[1]),
    sysconfig.get_path("stdlib"),
    "site-packages",
    "dist-packages",
)


class Wrong(AssertionError):
    """A wrong answer to an exercise. In a notebook only its text is shown."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        lines = f"Not yet: {self}".splitlines()
        return ["\n  ".join(textwrap.wrap(line, WIDTH)) for line in lines]


class NotDone(NotImplementedError):
    """An exercise that nobody has begun."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def judged(check: Callable) -> Callable:
    """A check whose only errors are Wrong and NotDone, and which leaves no trace.

    What the learner's code raises becomes a Wrong that names the line; the random
    numbers are seeded, and afterwards go on as if nothing had been drawn.
    """

    @functools.wraps(check)
    def judging(*answers, **options) -> None:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            try:
                check(*answers, **options)
            except Wrong as wrong:
                raise wrong.with_traceback(None) from None
            except NotImplementedError as error:
                said = str(error) or "your code here"
                raise NotDone(f"This exercise is not done yet ({said}).") from None
            except Exception as error:
                raise Wrong(_stopped(error, check.__code__.co_filename)) from error

    return judging


def close(
    got,
    expected,
    *,
    what: str,
    mistakes: Mapping[str, object] | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Nothing, or Wrong where `got` is not `expected`.

    |got - expected| <= tolerance · max |expected|, entry by entry; by `tolerance` alone
    where all that is expected is zero. So zeros never pass for something that is not.

    Args
        got       what the learner's code returned: anything
        expected  a tensor, an array, a number; a text, a bool or None: equal, then; or
                  a tuple or list of such
        what      was computed, and for which input: "h, for x of shape (2, 3)"
        mistakes  {"forgot to divide by r": what that gives}: the first that `got`
                  equals is named
        tolerance relative to the largest entry that is expected
    """
    mistakes = mistakes or {}
    if isinstance(expected, tuple | list):
        return _close_each(got, expected, what, mistakes, tolerance)
    if not _numeric(expected):
        if type(got) is not type(expected) or got != expected:
            raise Wrong(_said(what, repr(expected), repr(got), _named(got, mistakes)))
        return None
    likely = _unlike(got, expected)
    if likely:
        raise Wrong(_said(what, _shown(expected), _shown(got), likely))
    found, wanted = _numbers(got), _numbers(expected)
    if found.shape != wanted.shape:
        likely = _named(got, mistakes, tolerance) or _misshapen(found, wanted)
        raise Wrong(_said(what, _shown(expected), _shown(got), likely))
    if _same(found, wanted, tolerance):
        return None
    likely = _named(got, mistakes, tolerance) or _guessed(found, wanted, tolerance)
    raise Wrong(
        _said(what, _shown(expected), _shown(got), likely, _worst(found, wanted))
    )


@contextmanager
def unchanged(**lent: Tensor) -> Iterator[None]:
    """Wrong where a tensor that was lent to the learner's code is changed by it.

    with unchanged(x=x): h = MyLoRA(…)(x)
    """
    before = {name: tensor.detach().clone() for name, tensor in lent.items()}
    yield
    for name, tensor in lent.items():
        if tensor.shape != before[name].shape or not torch.equal(tensor, before[name]):
            raise Wrong(
                f"{name} itself was changed; it belongs to the caller. Likely mistake: "
                "an operation in place (+=, *=, add_, …) on it; make a new tensor"
            )


def pulled(got: Tensor, expected: Tensor) -> Tensor:
    """Pull both backward, each entry by another weight; returns the weights.

    With equal ones, wrong gradients of two entries could cancel.
    """
    ways = torch.arange(1.0, expected.numel() + 1).view(expected.shape).cos()
    (got * ways).sum().backward()
    (expected * ways).sum().backward()
    return ways


# ------------------------------------------------------------------------- the kinds


def _numeric(value) -> bool:
    """A tensor, an array or a number; True and False are words here."""
    number = isinstance(value, numbers.Number | numpy.generic)
    return (number and not isinstance(value, bool | numpy.bool)) or isinstance(
        value, Tensor | numpy.ndarray
    )


def _numbers(value) -> Tensor:
    """In double precision, detached; a bool tensor as zeros and ones."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
    tensor = torch.as_tensor(value)
    return tensor if tensor.is_complex() else tensor.double()


def _unlike(got, expected) -> str | None:
    """What is wrong with the kind of thing that `got` is, before any number."""
    if got is None:
        return "`return` is missing"
    if callable(got) and not isinstance(got, Tensor):
        return "a function was returned, not what it computes: parentheses are missing"
    wanted = "a tensor" if isinstance(expected, Tensor) else "a number"
    if isinstance(expected, Tensor):
        if isinstance(got, tuple | list) and got and isinstance(got[0], Tensor):
            return f"{len(got)} tensors were returned in the place of one"
        fits = isinstance(got, Tensor)
    else:
        fits = _numeric(got)
    if not fits:
        return f"{wanted} is needed, not a {type(got).__name__}"
    if isinstance(got, Tensor) and got.is_meta:
        return "a tensor on the device meta holds no numbers"
    return None


def _close_each(got, expected, what, mistakes, tolerance) -> None:
    count = len(expected)
    if not isinstance(got, tuple | list) or len(got) != count:
        likely = _unlike(got, expected[0]) if got is None else f"return all {count}"
        raise Wrong(_said(what, f"{count} values", _shown(got), likely))
    for i, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        wrong = {
            text: value[i]
            for text, value in mistakes.items()
            if isinstance(value, tuple | list) and len(value) == count
        }
        which = f"{what}: value {i + 1} of {count}"
        close(mine, theirs, what=which, mistakes=wrong, tolerance=tolerance)


# ------------------------------------------------------------------ the likely mistake


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether a is b, entry by entry, within tolerance · max |b|."""
    if a.shape != b.shape or not torch.isfinite(a).all():
        return a.shape == b.shape and torch.equal(a, b)
    largest = b.abs().max().item() if b.numel() else 0.0
    limit = tolerance * (largest or 1.0)
    return bool(((a - b).abs() <= limit).all())


def _named(got, mistakes: Mapping, tolerance: float = 0.0) -> str | None:
    """The first of the named mistakes that gives what we got."""
    for text, wrong in mistakes.items():
        if _numeric(wrong) and _numeric(got):
            if _same(_numbers(got), _numbers(wrong), max(tolerance, 1e-6)):
                return text
        elif type(wrong) is type(got) and not _numeric(wrong) and wrong == got:
            return text
    return None


def _misshapen(got: Tensor, expected: Tensor) -> str | None:
    mine, theirs = tuple(got.shape), tuple(expected.shape)
    if mine == theirs[::-1] or (mine[-2:] == theirs[-2:][::-1] and len(mine) > 1):
        return "transposed"
    if got.numel() == expected.numel():
        return "the right number of entries in another shape: a reshape or a squeeze"
    if not theirs:
        return "one number is needed: a sum or a mean is missing"
    if not mine:
        return "only one number is left: a sum or a mean too many"
    return "a sum over, or a product along, another side than the one that is meant"


def _guessed(got: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """What anyone can see in wrong numbers, whatever the exercise."""
    if got.isnan().any() or got.isinf().any():
        kind = "NaN" if got.isnan().any() else "infinite"
        return f"{kind} entries: a division by zero, an overflow or an empty tensor"
    if not got.any():
        return "all entries are zero"
    if not expected.any() or got.is_complex() or expected.is_complex():
        return None
    if _same(-got, expected, tolerance):
        return "the wrong sign"
    factor = ((got * expected).sum() / expected.square().sum()).item()
    several = got.numel() > 1
    if several and factor and _same(got / factor, expected, tolerance):
        return f"right but for a factor: every entry is {factor:.4g} times its value"
    if got.ndim == 2 and got.shape[0] == got.shape[1] and _same(got.T, expected, 1e-5):
        return "transposed"
    if several and (got == got.flatten()[0]).all():
        return "all entries are the same"
    off = (got - expected).flatten()
    if several and (off - off[0]).abs().max() <= tolerance * off[0].abs():
        return f"right but for a term: every entry is off by {off[0].item():.4g}"
    return None


# ------------------------------------------------------------------------- the words


def _said(what, expected: str, got: str, likely: str | None, worst: str = "") -> str:
    lines = [what, f"  expected  {expected}", f"  got       {got}"]
    lines += [f"  {worst}"] if worst else []
    lines += [f"Likely mistake: {likely}"] if likely else []
    return "\n".join(lines)


def _shown(value) -> str:
    """Kind, shape and the first values, in one line."""
    if value is None:
        return "None"
    if not _numeric(value):
        text = " ".join(repr(value).split())
        return text if len(text) <= 60 else f"{text[:57]}…  ({type(value).__name__})"
    if isinstance(value, Tensor) and value.is_meta:
        return f"shape {tuple(value.shape)} on the device meta"
    tensor = _numbers(value)
    if not tensor.ndim:
        return _figure(tensor.item())
    first = ", ".join(map(_figure, tensor.flatten()[:SHOWN].tolist()))
    more = ", …" if tensor.numel() > SHOWN else ""
    return f"shape {tuple(tensor.shape)}: {first}{more}"


def _figure(value) -> str:
    return f"{value + 0.0:.4g}" if isinstance(value, float) else str(value)  # no -0


def _worst(got: Tensor, expected: Tensor) -> str:
    """Where the two are furthest apart."""
    if not got.ndim or got.is_complex() or not got.numel():
        return ""
    off = (got - expected).abs().nan_to_num(nan=math.inf)
    at = numpy.unravel_index(int(off.argmax()), tuple(off.shape))
    place = ", ".join(map(str, at))
    mine, theirs = got[at].item(), expected[at].item()
    return f"furthest  [{place}]: expected {theirs:.4g}, got {mine:.4g}"


def _stopped(error: Exception, check_file: str) -> str:
    """The error of the learner's code and its line; not the stack above it."""
    said = " ".join(str(error).split())
    said = said if len(said) <= 300 else said[:297] + "…"
    text = f"your code stopped with {type(error).__name__}: {said}"
    others = (*LIBRARIES, check_file)
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if not any(part in f.filename for part in others)]
    if mine:
        line = f" in line {mine[-1].lineno} of its cell"
        source = f"\n  {mine[-1].line}" if mine[-1].line else ""
        return f"{text}\n  {line.strip()}, in {mine[-1].name}(){source}"
    if isinstance(error, TypeError | AttributeError):
        return f"{text}\nLikely mistake: another name, or other arguments, than asked"
    return text
