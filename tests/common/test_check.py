"""The refusing sentences: what passes, what does not, and what the error says."""

import math

from planting import Bug, each_is_caught, law

from peft_from_scratch.common import check

BOOLS = [True, False]
NO_WHOLE = [*BOOLS, 2.0, "2", None, math.nan, [2]]
NO_FINITE = [*BOOLS, "2", None, math.nan, math.inf, -math.inf, 10**400, [2.0]]


def said(verb, *arguments, **options):
    """The words of the refusal; an empty text where nothing is refused."""
    try:
        verb(*arguments, **options)
    except ValueError as error:
        return str(error)
    return ""


@law
def whole_numbers_are_within_their_bounds():
    for value in (1, 2, 4):
        assert not said(check.whole, "r", value, 1, 4)
    assert not said(check.whole, "r", 10**400, 1)
    for value in (*NO_WHOLE, 0, -1, 5):
        words = f"r={value!r}: allowed is a whole number from 1 to 4"
        assert said(check.whole, "r", value, 1, 4) == words
    asked = dict(must="the rank must be", of="rows", why="the smaller side")
    words = "r=0: the rank must be a whole number of rows from 1 on, the smaller side"
    assert said(check.whole, "r", 0, 1, **asked) == words


@law
def numbers_are_within_their_bounds():
    half_open = dict(least=0, below=1)
    for value in (0, 0.0, 0.5, 1 - 2**-53):
        assert not said(check.number, "p", value, "a probability", **half_open)
    assert not any(check.is_finite(value) for value in NO_FINITE)
    for value in (*NO_FINITE, -1e-9, 1, 1.0):
        told = said(check.number, "p", value, "a probability", **half_open)
        assert told == f"p={check.shortened(value)}: allowed is a probability"
    assert not said(check.number, "lr", 1e-30, "above 0", above=0)
    assert said(check.number, "lr", 0, "above 0", above=0) == "lr=0: allowed is above 0"


@law
def words_and_flags_are_among_theirs():
    assert not said(check.one_of, "bias", "all", ("none", "all"))
    for value in ("every", "", None, True, ["all"], {"all"}):
        told = said(check.one_of, "bias", value, ("none", "all"), ", or ids")
        assert told == f"bias={value!r}: allowed are none, all, or ids"
    for value in BOOLS:
        assert not said(check.flag, "x", value)
    for value in (0, 1, "True", None):
        assert (
            said(check.flag, "x", value) == f"x={value!r}: allowed are True and False"
        )


@law
def what_is_long_is_cut():
    assert check.shortened("a" * 198) == repr("a" * 198)
    assert check.shortened("a" * 199) == "'" + "a" * 199 + "…"
    assert check.shortened(10**5000) == "a number too long to print"


BUGS = {
    "True is a whole number": Bug(
        check.is_whole,
        "and not isinstance(value, bool)",
        "",
        whole_numbers_are_within_their_bounds,
    ),
    "no lower bound": Bug(
        check.is_whole, "least <= value and ", "", whole_numbers_are_within_their_bounds
    ),
    "the upper bound is left out": Bug(
        check.is_whole,
        "value <= most",
        "value < most",
        whole_numbers_are_within_their_bounds,
    ),
    "True is a number": Bug(
        check.is_finite,
        "and not isinstance(value, bool)",
        "",
        numbers_are_within_their_bounds,
    ),
    "NaN is a number": Bug(
        check.is_finite,
        "math.isfinite(value)",
        "not math.isinf(value)",
        numbers_are_within_their_bounds,
    ),
    "the open end is closed": Bug(
        check.number,
        "above < value < below",
        "above <= value <= below",
        numbers_are_within_their_bounds,
    ),
    "a list of a word is a word": Bug(
        check.one_of,
        "isinstance(value, str) and value in allowed",
        "value in allowed or value == ['all']",
        words_and_flags_are_among_theirs,
    ),
    "1 is a flag": Bug(
        check.flag,
        "isinstance(value, bool)",
        "value in (0, 1)",
        words_and_flags_are_among_theirs,
    ),
    "a long value is shown in full": Bug(
        check.shortened, "len(text) <= LONGEST", "True", what_is_long_is_cut
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
