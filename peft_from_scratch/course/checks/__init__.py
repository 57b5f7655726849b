"""What every check of an exercise is made of: Wrong, close, judged, unchanged.

One file a notebook stands beside this one, with one function an exercise. Such a check
takes the learner's class or function, tries it on several random shapes, compares with
the library, and prints one line; or it raises Wrong, whose text is all that the learner
sees: what was computed, expected, got, and the likely mistake. CHECKLIST.md, beside
this file, has the classes of input that every check tries.

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
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy
import torch
from torch import Tensor, nn

from ..time_limit import TooLong, time_limit

HERE = Path(__file__).parent
SECONDS = 60  # that a check may take, the learner's code included; most take 0.01
SEED = 20_210_617  # of the random numbers in a check; no learner's code sets this one
UNKNOWN = "none that this check knows. Compare your lines with the text, one by one"
SHOWN = 5  # values of each tensor
WIDTH = 88  # characters of a line
LIBRARIES = (  # parts of the paths of code that is not the learner's
    str(Path(__file__).parents[2]),
    sysconfig.get_path("stdlib"),
    "site-packages",
    "dist-packages",
)
# (part of an error's text, the likely mistake)
STUMBLES = (
    (
        "with more than one value is ambiguous",
        "`in`, `==` or `if` with a whole tensor; id(a) == id(b) and `is` tell whether "
        "two names mean one, .any() and .all() make one truth of many",
    ),
    (
        "expected sequence of length",
        "rows of different lengths make no tensor; fill all up to the longest",
    ),
    (
        "returned an incorrect number of gradients",
        "backward() returns one gradient for each input of forward(), in their order; "
        "None for what has none",
    ),
    (
        "save_for_backward can only save variables",
        "save_for_backward takes tensors alone; set all else on ctx itself",
    ),
    (
        "The shape of the mask",
        "numbers in uint8 are taken for a mask of true and false; index with .long()",
    ),
    (
        "a leaf Variable that requires grad is being used in an in-place operation",
        "a parameter is written to while autograd records; do it within "
        "torch.no_grad()",
    ),
)


class Hidden(nn.Module):
    """A base that has no weight and no bias to be read; it can only be called."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.inside = base

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


class Wrong(AssertionError):
    """A wrong answer to an exercise. In a notebook only its text is shown."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        lines = f"Not yet: {self}".splitlines()
        return ["\n  ".join(textwrap.wrap(line, WIDTH)) for line in lines]


class NotDone(NotImplementedError):
    """An exercise that nobody has begun."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class _State:
    """What the checks of this process remember."""

    quick = False  # a blank exercise is passed over, in place of NotDone
    passed: ClassVar[list] = []  # answers that were right


def pass_over_blanks(quick: bool) -> None:
    """Whether a blank exercise stops "run all": it does unless `quick`."""
    _State.quick = quick


def has_passed(answer) -> bool:
    """Whether a check found this very answer right, in this process."""
    return any(answer is each for each in _State.passed)


def judged(check: Callable) -> Callable:
    """A check whose only errors are Wrong and NotDone, and which leaves no trace.

    What the learner's code raises becomes a Wrong that names the line, and so does code
    that takes more than SECONDS. The random numbers are seeded, and go on afterwards as
    if nothing had been drawn; so do torch's settings. A right answer prints a line.
    """
    number, has_number, _ = (check.__doc__ or "").partition(":")
    praise = f"Exercise {number} is right." if has_number else "Right."

    @functools.wraps(check)
    def judging(*answers, **options) -> None:
        with torch.random.fork_rng(devices=[]), _settings_restored() as demand_settings:
            torch.manual_seed(SEED)
            try:
                with time_limit(SECONDS):
                    check(*answers, **options)
                demand_settings()
            except Wrong as wrong:
                wrong.args = (_with_likely_mistake(str(wrong)),)
                raise wrong.with_traceback(None) from None
            except KeyboardInterrupt:
                raise  # the learner's own, who has waited long enough
            except BaseException as error:
                if _is_blank(error) and _State.quick:
                    print(f"Passed over, since this is a quick run ({error}).")
                    return
                if _is_blank(error):
                    raise NotDone(f"This exercise is not done yet ({error}).") from None
                raise Wrong(_stopped(error, check.__code__.co_filename)) from error
        _State.passed.extend(answers)
        print(praise)

    return judging


@contextmanager
def _settings_restored() -> Iterator[Callable[[], None]]:
    """Autograd on; afterwards all that torch is set to as before, whatever happens.

    Gives a function that raises Wrong where the learner's code changed a setting.
    """
    dtype = torch.get_default_dtype()
    harmless = "Converting a tensor with requires_grad=True to a scalar"

    def demand_settings() -> None:
        changed = {
            "autograd is switched off": not torch.is_grad_enabled(),
            "torch has another default dtype": torch.get_default_dtype() != dtype,
            "the seed of all random numbers is set": torch.initial_seed() != SEED,
        }
        for text, is_so in changed.items():
            if is_so:
                raise Wrong(
                    f"after your code has run, {text}, for the whole notebook. Likely "
                    "mistake: a setting that is not set back. Use `with "
                    "torch.no_grad():`, a dtype= in the call, or a torch.Generator"
                )

    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", harmless)  # parameters are lent as tensors
        try:
            yield demand_settings
        finally:
            torch.set_default_dtype(dtype)


def _is_blank(error: BaseException) -> bool:
    """The blank's own NotImplementedError; torch has some of its own."""
    return isinstance(error, NotImplementedError) and "your code here" in str(error)


def _with_likely_mistake(text: str) -> str:
    return text if "Likely mistake" in text else f"{text}\nLikely mistake: {UNKNOWN}"


def close(
    got,
    expected,
    *,
    what: str,
    mistakes: Mapping[str, object] | None = None,
    tolerance: float = 1e-5,
    kind: torch.dtype | type[int] | None = None,
    inside: bool = False,
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
        kind      a dtype that a tensor must have; int: a whole number, of any integer
                  type; None: any
        inside    `got` is one of several values that were returned together
    """
    mistakes = mistakes or {}
    if isinstance(expected, tuple | list):
        return _close_each(got, expected, what, mistakes, tolerance, kind)
    if not _numeric(expected):
        if type(got) is not type(expected) or got != expected:
            likely = _named(got, mistakes)
            raise Wrong(_refusal(what, repr(expected), repr(got), likely))
        return None
    likely = _unlike(got, expected, inside=inside)
    if likely:
        likely = (got is None and _named(got, mistakes)) or likely
        raise Wrong(_refusal(what, _shown(expected), _shown(got), likely))
    mine, theirs = _numbers(got), _numbers(expected)
    if mine.shape != theirs.shape:
        likely = _named(got, mistakes, tolerance) or _misshapen(mine, theirs)
        raise Wrong(_refusal(what, _shown(expected), _shown(got), likely))
    if _same(mine, theirs, tolerance):
        return _demand_kind(got, kind, what)
    likely = _named(got, mistakes, tolerance) or _guessed(mine, theirs, tolerance)
    worst = _worst(mine, theirs)
    raise Wrong(_refusal(what, _shown(expected), _shown(got), likely, worst))


@contextmanager
def unchanged(**lent) -> Iterator[None]:
    """Wrong where something that was lent to the learner's code is changed by it.

    Values, shapes and dtypes of tensors and whether they train; lists and dicts with
    all that is in them; of a module its children, parameters, buffers, modes and hooks.

    with unchanged(x=x): h = MyLoRA(…)(x)
    """
    before = {name: _contents(value) for name, value in lent.items()}
    yield
    for name, value in lent.items():
        if _contents(value) != before[name]:
            raise Wrong(
                f"{name} itself was changed; it belongs to the caller. Likely mistake: "
                f"{_CHANGING[_sort(value)]}"
            )


_CHANGING = {
    Tensor: "an operation in place (+=, *=, add_, …) on it; make a new tensor",
    nn.Module: "another weight, child, mode or flag, or a hook that was left in it",
    object: "an operation in place (append, insert, pop, +=, …) on it; make a new one",
}


def _sort(value) -> type:
    return next(sort for sort in _CHANGING if isinstance(value, sort))


def _contents(value):
    """All that code could change in it, to be compared with ==; tensors bit by bit."""
    if isinstance(value, Tensor):
        return _tensor_contents(value)
    if isinstance(value, nn.Module):
        tensors = [*value.named_parameters(), *value.named_buffers()]
        modules = [
            (name, id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in value.named_modules()
        ]
        return modules, [(name, id(t), _contents(t)) for name, t in tensors]
    if isinstance(value, Mapping):
        return [(key, _contents(each)) for key, each in value.items()]
    if isinstance(value, list | tuple):
        return [_contents(each) for each in value]
    return value


def _tensor_contents(tensor: Tensor) -> tuple:
    about = tuple(tensor.shape), tensor.dtype, tensor.requires_grad
    bits = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return *about, bits.view(-1).view(torch.uint8).numpy().tobytes()


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
    # By way of numpy: torch would round a number of Python to float32.
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(numpy.array(value))
    return tensor if tensor.is_complex() else tensor.double()


def _unlike(got, expected, *, inside: bool = False) -> str | None:
    """What is wrong with the kind of thing that `got` is, before any number.

    inside  `got` is one of several values that were returned together
    """
    if got is None:
        nothing = "None was returned in its place: nothing was computed for it"
        return nothing if inside else "`return` is missing"
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
    if (
        isinstance(got, Tensor)
        and got.is_complex()
        and not _numbers(expected).is_complex()
    ):
        return "real numbers are needed, not complex ones"
    if isinstance(got, Tensor) and got.is_meta:
        return "a tensor on the device meta holds no numbers"
    return None


def _demand_kind(got, kind: torch.dtype | type[int] | None, what: str) -> None:
    """Nothing, or Wrong where right numbers are of another kind than asked for."""
    if kind is None:
        return
    if kind is int:
        exact, asked = _whole(got), "a whole number"
        shown = got.dtype if isinstance(got, Tensor) else type(got).__name__
    else:
        exact, shown, asked = got.dtype == kind, got.dtype, str(kind)
    if not exact:
        raise Wrong(
            f"{what}: the right numbers, but of another kind: expected {asked}, got "
            f"{shown}. Likely mistake: {_how_so(kind)}"
        )


def _whole(got) -> bool:
    if isinstance(got, Tensor):
        floating = got.is_floating_point() or got.is_complex()
        return not floating and got.dtype != torch.bool
    if isinstance(got, numpy.ndarray):
        return numpy.issubdtype(got.dtype, numpy.integer)
    return isinstance(got, numbers.Integral) and not isinstance(got, bool)


def _how_so(kind: torch.dtype | type[int]) -> str:
    if kind is int:
        return "/ gives a float, // a whole number; or a float among what is added"
    if not kind.is_floating_point:
        return "a float among whole numbers; torch.tensor of whole numbers is int64"
    return "a dtype of your own; what is computed has the dtype of the arguments"


def _close_each(got, expected, what, mistakes, tolerance, kind) -> None:
    count = len(expected)
    if not isinstance(got, tuple | list) or len(got) != count:
        likely = _unlike(got, expected[0]) if got is None else f"return all {count}"
        raise Wrong(_refusal(what, f"{count} values", _shown(got), likely))
    for i, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        wrong = {
            text: value[i]
            for text, value in mistakes.items()
            if isinstance(value, tuple | list) and len(value) == count
        }
        which = f"{what}: value {i + 1} of {count}"
        demands = dict(tolerance=tolerance, kind=kind, inside=True)
        close(mine, theirs, what=which, mistakes=wrong, **demands)


# ------------------------------------------------------------------ the likely mistake


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether a is b, entry by entry, within tolerance · max |b|."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return a.shape == b.shape and torch.equal(a, b)
    largest = b.abs().max().item() if b.numel() else 0.0
    limit = tolerance * (largest or 1.0)
    return bool(((a - b).abs() <= limit).all())


def _named(got, mistakes: Mapping, tolerance: float = 0.0) -> str | None:
    """The first of the named mistakes that gives what we got."""
    for text, wrong in mistakes.items():
        if _numeric(wrong) and _numeric(got):
            mine, theirs = _numbers(got), _numbers(wrong)
            # Two infinities are equal, whatever has led to each of them.
            finite = torch.isfinite(mine).all() and mine.any() == theirs.any()
            if finite and _same(mine, theirs, max(tolerance, 1e-6)):
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


def _refusal(what, expected: str, got: str, likely: str | None, worst="") -> str:
    lines = [what, f"  expected  {expected}", f"  got       {got}"]
    lines += [f"  {worst}"] if worst else []
    return "\n".join([*lines, f"Likely mistake: {likely or UNKNOWN}"])


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


def _stopped(error: BaseException, check_file: str) -> str:
    """The error of the learner's code and its line; not the stack above it."""
    message = " ".join(str(error).split())
    message = message if len(message) <= 300 else message[:297] + "…"
    text = f"your code stopped with {type(error).__name__}: {message}"
    if isinstance(error, TooLong):
        text = f"your code had not come to an end after {SECONDS:g} seconds"
    others = (*LIBRARIES, check_file)
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if not any(part in f.filename for part in others)]
    if mine:
        source = f"\n  {mine[-1].line}" if mine[-1].line else ""
        text += (
            f"\n  in line {mine[-1].lineno} of its cell, in {mine[-1].name}(){source}"
        )
    return f"{text}\nLikely mistake: {_why_stopped(error, bool(mine))}"


def _why_stopped(error: BaseException, in_mine: bool) -> str:
    if isinstance(error, TooLong):
        return "a loop whose end is never reached: does each turn come nearer to it?"
    if isinstance(error, SystemExit):
        return "exit() or sys.exit() ends the whole program; `return` ends a function"
    if isinstance(error, RecursionError):
        return "a function that calls itself, and never stops"
    if isinstance(error, NotImplementedError) and not str(error):
        return "a piece that still raises NotImplementedError: it is to be written"
    for part, likely in STUMBLES:
        if part in str(error):
            return likely
    if isinstance(error, NameError):
        return "a name that nothing in your cell defines: a typing error?"
    if not in_mine and isinstance(error, TypeError | AttributeError):
        return "another name, or other arguments, than asked"
    return "the line above, with the arguments of this call; print their shapes"
