"""Checks of arguments, and the sentence that each writes when it refuses a value.

    m=33: the bottleneck needs a whole number of units from 1 to 32, the hidden size

Every sentence names the argument, shows the value and says what is allowed. A function
that takes arguments calls one of these for each of them, so that the check is one line
and the mathematics below it stays visible.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager

LONGEST = 200  # characters of a value that an error shows


def whole(
    name: str,
    value,
    least: int,
    most: int | None = None,
    *,
    must: str = "allowed is",
    of: str = "",
    why: str = "",
) -> None:
    """ValueError unless the value is a whole number from `least` to `most`.

    Args
        must  the verb of the sentence, with its subject
        of    what the number counts: "units"
        why   where the bound comes from
    """
    counted = f"a whole number of {of}" if of else "a whole number"
    end = "on" if most is None else f"to {most}"
    reason = f", {why}" if why else ""
    require(
        is_whole(value, least, most),
        name,
        value,
        f"{must} {counted} from {least} {end}{reason}",
    )


def number(
    name: str,
    value,
    words: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """ValueError unless the value is a finite number within the bounds.

    Args
        words  the bounds as the error says them: "a probability in [0, 1)"
    """
    fine = is_finite(value) and value >= least and above < value < below
    require(fine, name, value, f"allowed is {words}")


def one_of(name: str, value, allowed: Collection[str], otherwise: str = "") -> None:
    """ValueError unless the value is one of these words.

    Args
        otherwise  what the caller takes besides words: ", or a list of token ids"
    """
    fine = isinstance(value, str) and value in allowed
    require(fine, name, value, f"allowed are {', '.join(allowed)}{otherwise}")


def flag(name: str, value) -> None:
    """ValueError unless the value is True or False."""
    require(isinstance(value, bool), name, value, "allowed are True and False")


def known(
    function: str, arguments: Collection[str], allowed: Collection[str], of: str = ""
) -> None:
    """TypeError naming the first argument that the function does not have."""
    unknown = sorted(set(arguments) - set(allowed))
    if unknown:
        raise TypeError(
            f"{function} has no argument {unknown[0]!r}; it has {of}"
            f"{', '.join(allowed)}"
        )


def require(fine: bool, name: str, value, sentence: str) -> None:
    """ValueError "name=value: sentence" unless the value is fine."""
    if not fine:
        raise ValueError(f"{name}={shortened(value)}: {sentence}")


@contextmanager
def about(name: str) -> Iterator[None]:
    """Puts `name`, a module's for example, before the words of a ValueError inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def is_whole(value, least: float = -math.inf, most: float | None = None) -> bool:
    """Whether this is a whole number (no bool, no float) within the bounds."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and least <= value and (most is None or value <= most)


def is_finite(value) -> bool:
    """Whether this is a number (no text, no bool) that a float can hold."""
    try:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    except OverflowError:
        return False


def shortened(value) -> str:
    """The value as an error shows it, cut where a hostile file made it long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not spell out a number of thousands of digits
        text = "a number too long to print"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
