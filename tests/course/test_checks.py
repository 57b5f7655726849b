"""What checks are made of: what passes, what does not, and what the learner is told."""

import linecache

import numpy
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from planting import assert_caught

from peft_from_scratch.course import checks
from peft_from_scratch.course.checks import NotDone, Wrong, close, judged, unchanged

RIGHT = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])


def told(got, expected=RIGHT, **options):
    """What a learner is told of `got`; None where it passes."""
    try:
        close(got, expected, what="h, for x of shape (2, 3)", **options)
    except Wrong as wrong:
        return str(wrong)
    return None


@pytest.mark.parametrize(
    "right",
    [
        RIGHT,
        RIGHT.T,
        torch.tensor(0.0),
        torch.tensor(2),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
        RIGHT.numpy(),
        numpy.float32(2.5),
        3,
        2.5,
        "text",
        True,
        None,
        (RIGHT, 3),
        [1, "a"],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_right_passes(right):
    assert told(right, right) is None


def test_a_right_value_passes_in_another_kind_and_precision():
    assert told(torch.tensor(2.5), 2.5) is None
    assert told(2.5, numpy.float64(2.5)) is None
    assert told(RIGHT.double()) is None
    assert told(RIGHT.clone().requires_grad_()) is None
    assert told([3, RIGHT], (3, RIGHT)) is None


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6])
def test_tolerance_is_relative_so_that_small_values_are_not_taken_for_zero(scale):
    expected = scale * RIGHT.double()
    assert told(expected * (1 + 0.9e-5), expected) is None
    assert told(expected * (1 + 1.1e-5), expected)
    assert told(torch.zeros(2, 3), expected).endswith(
        "Likely mistake: all entries are zero"
    )
    assert told(expected.flip(0), expected)


def test_where_zero_is_right_the_tolerance_stands_alone():
    zero = torch.zeros(3)
    assert told(torch.full((3,), 0.9e-5), zero) is None
    assert told(torch.full((3,), 1.1e-5), zero)


WRONG = {
    "None": (None, "`return` is missing"),
    "a function": (lambda x: x, "parentheses are missing"),
    "a list": (RIGHT.tolist(), "a tensor is needed, not a list"),
    "an array": (RIGHT.numpy(), "a tensor is needed, not a ndarray"),
    "a text": ("h", "a tensor is needed, not a str"),
    "two tensors": ((RIGHT, RIGHT), "2 tensors were returned in the place of one"),
    "a number": (3.0, "a tensor is needed, not a float"),
    "transposed": (RIGHT.T, "transposed"),
    "reshaped": (RIGHT.reshape(6), "another shape"),
    "a side too many": (RIGHT[None], "another shape"),
    "summed": (RIGHT.sum(), "a sum or a mean too many"),
    "summed over a side": (RIGHT.sum(0), "another side"),
    "NaN": (RIGHT * float("nan"), "NaN entries"),
    "one NaN": (RIGHT.where(RIGHT > 1, float("nan")), "NaN entries"),
    "infinite": (RIGHT / 0, "infinite entries"),
    "zeros": (0 * RIGHT, "all entries are zero"),
    "negative": (-RIGHT, "the wrong sign"),
    "a factor": (4 * RIGHT, "every entry is 4 times"),
    "a term": (RIGHT - 0.5, "every entry is off by -0.5"),
    "the same": (torch.full((2, 3), 7.0), "all entries are the same"),
    "meta": (RIGHT.to("meta"), "holds no numbers"),
    "one entry": (RIGHT + torch.eye(2, 3)[[1, 0]] * 1e-3, None),
}


@pytest.mark.parametrize("got, likely", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_told_with_what_was_expected(got, likely):
    said = told(got)
    lines = said.splitlines()
    assert lines[0] == "h, for x of shape (2, 3)"
    assert lines[1].startswith("  expected  shape (2, 3): 1, -2, 3, 4, 5, …")
    assert lines[2].startswith("  got       ")
    assert len(lines) <= 5 and all(len(line) < 100 for line in lines)
    if likely:
        assert lines[-1].startswith("Likely mistake: ") and likely in lines[-1]
    else:
        assert "Likely" not in said


def test_the_entry_that_is_furthest_off_is_named():
    got = RIGHT.clone()
    got[1, 2] = 9.0
    assert "furthest  [1, 2]: expected -6, got 9" in told(got)


def test_a_named_mistake_comes_before_what_anyone_can_see():
    named = {"another one": RIGHT + 1, "no 1 / r": 2 * RIGHT, "doubled": 2 * RIGHT}
    assert told(2 * RIGHT, mistakes=named).endswith("Likely mistake: no 1 / r")
    assert told(3 * RIGHT, mistakes=named).endswith("3 times its value")
    assert told(RIGHT.sum(0), mistakes={"summed": RIGHT.sum(0)}).endswith("summed")
    assert told("b", "a", mistakes={"the next letter": "b"}).endswith("next letter")
    pair = {"swapped": (2, 1)}
    assert told((2, 1), (1, 2), mistakes=pair).endswith("Likely mistake: swapped")


def test_each_of_several_values_is_compared():
    assert "value 2 of 2" in told((RIGHT, -RIGHT), (RIGHT, RIGHT))
    assert told((RIGHT,), (RIGHT, RIGHT)).endswith("return all 2")
    assert told(None, (RIGHT, 1)).endswith("`return` is missing")


def test_words_are_not_numbers():
    assert told(1, True)
    assert told(True, 1)
    assert told(1, "1")
    assert told(0.0, None)


@judged
def judge_double(double):
    x = torch.randn(3)
    close(double(x), 2 * x, what="double(x)")


def test_a_check_is_silent_and_leaves_no_trace():
    state = torch.get_rng_state()
    assert judge_double(lambda x: x + x) is None
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        judge_double(lambda x: x + x)
    assert not torch.nn.Linear(1, 1).weight.grad_fn


def test_a_check_sees_the_same_numbers_at_every_call():
    seen = []
    for _ in range(2):
        torch.randn(5)
        judge_double(lambda x: seen.append(x) or 2 * x)
    assert torch.equal(*seen)


def test_what_nobody_began_is_no_wrong_answer():
    def double(x):
        raise NotImplementedError("exercise 1: your code here")

    with pytest.raises(NotDone, match=r"not done yet \(exercise 1: your code here\)"):
        judge_double(double)


def cell(source):
    """The names that a notebook's cell defines; IPython too keeps its lines."""
    name, names = "cell 7", {"torch": torch}
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    exec(compile(source, name, "exec"), names)
    return names


def test_an_error_in_the_learners_code_is_told_with_its_line():
    double = cell("def double(x):\n    return x @ torch.ones(7, 7)\n")["double"]
    with pytest.raises(Wrong, match="stopped with RuntimeError") as caught:
        judge_double(double)
    _, where, line = str(caught.value).splitlines()
    assert where == "  in line 2 of its cell, in double()"
    assert line.strip() == "return x @ torch.ones(7, 7)"


def test_an_error_before_the_learners_code_is_told_without_a_line():
    with pytest.raises(Wrong, match=r"TypeError: .*\nLikely mistake: another name"):
        judge_double(lambda: None)


def test_a_changed_input_is_told():
    x = torch.ones(2)
    with unchanged(x=x):
        x + 1
    with pytest.raises(Wrong, match="x itself was changed"), unchanged(x=x):
        x.mul_(2)
    with pytest.raises(Wrong, match="x itself was changed"), unchanged(x=x):
        x.resize_(3)


@pytest.mark.parametrize("error", [Wrong("a " * 100 + "\nb"), NotDone("c")])
def test_a_notebook_shows_the_message_and_no_stack(error):
    shell, shown = InteractiveShell(), []
    shell._showtraceback = lambda kind, value, lines: shown.extend(lines)
    try:
        raise error
    except (AssertionError, NotImplementedError):
        shell.showtraceback()
    assert not any("Traceback" in line or __file__ in line for line in shown)
    assert " ".join(" ".join(shown).split()).endswith(" ".join(str(error).split()))
    assert all(len(line) <= 90 for line in "\n".join(shown).splitlines())


def test_planted_a_zero_answer_for_something_small_passes():
    assert_caught(
        checks._same,
        "limit = tolerance * (largest or 1.0)",
        "limit = tolerance * max(largest, 1.0)",
        lambda: test_tolerance_is_relative_so_that_small_values_are_not_taken_for_zero(
            1e-6
        ),
    )


def test_planted_a_changed_input_goes_unseen():
    assert_caught(
        unchanged,
        "tensor.detach().clone()",
        "tensor.detach()",
        test_a_changed_input_is_told,
        errors=pytest.fail.Exception,
    )
