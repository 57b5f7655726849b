"""What becomes of a check: one of five words, and a message.

    passed    equal, as far as the check allows
    refused   an error that the library raises itself, with the model untouched; or what
              differs was announced by a warning of inject() or save()
    crashed   any other error
    wrong     it ran and the numbers differ
    skipped   nothing to compare with: the model itself, or PEFT, cannot do this

The checks of the model itself, without a method, come first. Where one is not passed,
no method is blamed.
"""

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import peft_from_scratch as pfs

from . import checks
from .subject import BASE, Announced, Skipped, Subject, Wrong, described

FAILED = ("crashed", "wrong")
LIBRARY = str(Path(pfs.__file__).parent)


@dataclass(frozen=True)
class Outcome:
    """How one check of one method on one type of model ended.

    outcome  one of passed, refused, crashed, wrong, skipped
    message  what was raised, or what inject() or save() warned of, or nothing
    apart    the largest difference over the largest value, where that was measured
    """

    check: str
    outcome: str
    message: str = ""
    apart: float | None = None


def run(
    base: nn.Module, methods: list[str], starts: Callable = lambda method, check: None
) -> Iterator[tuple[str, Outcome]]:
    """(method, outcome) of every check that applies to each method, BASE first.

    A method that does not get onto the model has no further checks.

    Args
        base     a model in evaluation mode
        methods  names of the table of methods
        starts   is called with (method, check) before each check
    """
    unable = set()  # checks that the model itself does not pass
    for method in (BASE, *methods):
        subject = Subject(base, method)
        for check in checks.CHECKS:
            if not checks.applies(check, method):
                continue
            starts(method, check.__name__)
            if check in unable:
                outcome = Outcome(check.__name__, "skipped", "the model itself cannot")
            else:
                outcome = judged(check, subject)
            yield method, outcome
            if method == BASE and outcome.outcome != "passed":
                unable.add(check)
            if check is checks.inject and outcome.outcome != "passed":
                break


def judged(check: Callable[[Subject], float | None], subject: Subject) -> Outcome:
    """Run one check, and give what it returns or raises one of the five words."""
    name = check.__name__
    try:
        return Outcome(name, "passed", apart=check(subject))
    except Skipped as reason:
        return Outcome(name, "skipped", str(reason))
    except Announced as warning:
        return Outcome(name, "refused", str(warning))
    except Wrong as error:
        return Outcome(name, "wrong", str(error), error.apart)
    except Exception as error:
        return Outcome(
            name, "refused" if is_own(error) else "crashed", described(error)
        )


def is_own(error: Exception) -> bool:
    """Whether the library raised this by a statement of its own: a refusal.

    An AttributeError counts as well: a model that reads past an adapter gets one.
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised = last.filename.startswith(LIBRARY) and last.line.startswith("raise ")
    return raised and isinstance(error, ValueError | AttributeError)
