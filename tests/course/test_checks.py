"""What checks are made of: what passes, what does not, and what the learner is told."""

import linecache
import warnings

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


def test_numbers_of_python_are_compared_in_double_precision():
    assert told(0.1 * (1 + 1e-9), 0.1, tolerance=1e-10)
    assert told(numpy.float64(0.1), 0.1, tolerance=0.0) is None


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
    "one entry": (RIGHT + torch.eye(2, 3)[[1, 0]] * 1e-3, "none that this check knows"),
}


@pytest.mark.parametrize("got, likely", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_told_with_what_was_expected(got, likely):
    said = told(got)
    lines = said.splitlines()
    assert lines[0] == "h, for x of shape (2, 3)"
    assert lines[1].startswith("  expected  shape (2, 3): 1, -2, 3, 4, 5, …")
    assert lines[2].startswith("  got       ")
    assert len(lines) <= 5 and all(len(line) < 100 for line in lines)
    assert lines[-1].startswith("Likely mistake: ") and likely in lines[-1]


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


def test_a_right_answer_prints_one_short_line(capsys):
    assert judge_double(lambda x: x + x) is None
    assert capsys.readouterr().out == "Right.\n"

    @judged
    def numbered(answer):
        """4.1: answer(x) is x."""

    numbered(None)
    assert capsys.readouterr().out == "Exercise 4.1 is right.\n"


def test_a_wrong_answer_prints_nothing(capsys):
    with pytest.raises(Wrong):
        judge_double(lambda x: x)
    assert capsys.readouterr().out == ""


def test_a_check_leaves_no_trace():
    state = torch.get_rng_state()
    judge_double(lambda x: x + x)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        judge_double(lambda x: x + x)
        assert not torch.is_grad_enabled()


SETTINGS = {
    "autograd is switched off": lambda: torch.set_grad_enabled(False),
    "another default dtype": lambda: torch.set_default_dtype(torch.float64),
    "the seed of all random numbers": lambda: torch.manual_seed(0),
}


@pytest.mark.parametrize("text", SETTINGS)
def test_a_setting_that_the_learners_code_leaves_behind_is_told(text):
    def double(x):
        SETTINGS[text]()
        return 2 * x

    state = torch.get_rng_state()
    with pytest.raises(Wrong, match=rf"{text}.*\nLikely mistake|{text}.* Likely mist"):
        judge_double(double)
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


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


def test_torchs_own_not_implemented_error_is_no_blank():
    def double(x):
        return torch.linalg.qr(x.half()[:, None]).Q

    with pytest.raises(Wrong, match=r"stopped with \w*Error: .*[Hh]alf"):
        judge_double(double)

    def begun(x):
        raise NotImplementedError

    with pytest.raises(Wrong, match="still raises NotImplementedError"):
        judge_double(begun)


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
    _, where, line, likely = str(caught.value).splitlines()
    assert where == "  in line 2 of its cell, in double()"
    assert line.strip() == "return x @ torch.ones(7, 7)"
    assert likely.startswith("Likely mistake: the line above")


def test_an_error_before_the_learners_code_is_told_without_a_line():
    with pytest.raises(Wrong, match=r"TypeError: .*\nLikely mistake: another name"):
        judge_double(lambda: None)


EXITS = {
    "exit()": SystemExit,
    "a kind of its own": type("Stop", (BaseException,), {}),
    "asyncio's": type("CancelledError", (BaseException,), {}),
}


@pytest.mark.parametrize("error", EXITS.values(), ids=EXITS)
def test_code_that_ends_the_program_is_told_and_ends_nothing(error):
    def double(x):
        raise error(3)

    with pytest.raises(Wrong, match=f"stopped with {error.__name__}"):
        judge_double(double)


def test_an_interrupt_by_the_learner_goes_through():
    def double(x):
        torch.set_default_dtype(torch.float64)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge_double(double)
    assert torch.get_default_dtype() == torch.float32


def test_none_within_a_tuple_is_no_missing_return():
    text = told((None, 3), (RIGHT, 3))
    assert "value 1 of 2" in text and "`return`" not in text
    assert text.endswith("None was returned in its place: nothing was computed for it")


def test_infinity_names_no_mistake():
    named = {"divided by the wrong number": torch.full((2, 3), torch.inf)}
    for got in (torch.full((2, 3), torch.inf), torch.full((2, 3), torch.nan)):
        assert "divided by the wrong number" not in told(got, mistakes=named)


def test_no_number_is_infinite():
    infinite = torch.full((2, 3), torch.inf)
    assert told(infinite, infinite) is None
    assert told(RIGHT, infinite) is not None
    assert "by zero" not in told(2 * RIGHT, mistakes={"divided by zero": infinite})


def test_something_small_is_not_named_as_zero():
    named = {"all is lost": 0 * RIGHT}
    assert "all is lost" in told(0 * RIGHT, mistakes=named)
    assert "all is lost" not in told(1e-9 * RIGHT, mistakes=named)


def test_none_can_be_a_named_mistake():
    text = told((3, None), (3, 4), mistakes={"never, on any disk": (3, None)})
    assert text.endswith("never, on any disk")


STUMBLES = {  # what a learner writes, and a part of what is said of it
    "return x if x in [2 * x] else x": "id(a) == id(b)",
    "return torch.tensor([[1.0], [1.0, 2.0]])": "up to the longest",
    "return x[torch.zeros(7, dtype=torch.uint8)]": ".long()",
    "p = torch.nn.Parameter(x)\n    p += 1\n    return p": "torch.no_grad()",
    "class F(torch.autograd.Function):\n"
    "        forward = staticmethod(lambda ctx, x: ctx.save_for_backward('q'))\n"
    "    return F.apply(x.requires_grad_())": "on ctx itself",
    "class F(torch.autograd.Function):\n"
    "        forward = staticmethod(lambda ctx, x, q: 2 * x)\n"
    "        backward = staticmethod(lambda ctx, dy: dy)\n"
    "    F.apply(x.requires_grad_(), 3).sum().backward()": "None for what has none",
}


@pytest.mark.parametrize("line, likely", STUMBLES.items(), ids=range(len(STUMBLES)))
def test_where_many_stumble_is_told_in_plain_words(line, likely):
    double = cell(f"def double(x):\n    {line}\n")["double"]
    with pytest.raises(Wrong) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        judge_double(double)
    assert likely in str(caught.value).rpartition("Likely mistake")[2]


def test_every_refusal_names_a_likely_mistake_or_says_that_it_knows_none():
    @judged
    def refusing(answer):
        raise Wrong("the bias was changed")

    with pytest.raises(Wrong, match="changed\nLikely mistake: none that this check"):
        refusing(None)
    assert told("b", "a").endswith(checks.UNKNOWN)


@pytest.mark.parametrize(
    "right, kind, wrong",
    [
        (RIGHT, torch.float32, RIGHT.double()),
        (torch.tensor([1, 2]), torch.int64, torch.tensor([1.0, 2.0])),
        (3, int, 3.0),
        (3, int, torch.tensor(3.0)),
        (numpy.int32(3), int, numpy.float64(3)),
        (1, int, torch.tensor(True)),
        ((RIGHT, RIGHT), torch.float32, (RIGHT, RIGHT.half())),
    ],
    ids=str,
)
def test_right_numbers_of_another_kind_are_told(right, kind, wrong):
    assert told(right, right, kind=kind) is None
    assert told(wrong, right) is None
    assert "of another kind" in str(told(wrong, right, kind=kind))


def module():
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).eval()


CHANGES = {  # what is lent, and what changes it
    "a list": (lambda: [3, 1], lambda x: x.sort()),
    "a list in a list": (lambda: [[3], [1]], lambda x: x[0].append(1)),
    "a tensor in a list": (lambda: [torch.ones(2)], lambda x: x[0].mul_(2)),
    "a dict": (lambda: {"a": 1}, lambda x: x.pop("a")),
    "the order of a dict": (lambda: {"a": 1, "b": 2}, lambda x: x.update(a=x.pop("a"))),
    "NaN": (lambda: torch.tensor([torch.nan]), lambda x: x.zero_()),
    "whether it trains": (lambda: torch.ones(2), lambda x: x.requires_grad_()),
    "bfloat16": (lambda: torch.ones(2).bfloat16(), lambda x: x.add_(1)),
    "a number": (lambda: torch.tensor(1.0), lambda x: x.add_(1)),
    "a weight": (module, lambda x: x[0].weight.data.add_(1)),
    "another weight": (module, lambda x: setattr(x[0], "bias", None)),
    "a buffer": (module, lambda x: x[1].running_mean.add_(1)),
    "a mode": (module, lambda x: x[1].train()),
    "a flag": (module, lambda x: x[0].requires_grad_(False)),
    "a child": (module, lambda x: x.append(torch.nn.Identity())),
    "a hook": (module, lambda x: x[0].register_forward_hook(print)),
}


@pytest.mark.parametrize("lend, change", CHANGES.values(), ids=CHANGES)
def test_a_change_in_place_of_anything_is_told(lend, change):
    lent = lend()
    with unchanged(lent=lent):
        pass
    with pytest.raises(Wrong, match="lent itself was changed"), unchanged(lent=lent):
        change(lent)


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
        checks._tensor_contents,
        "bits.view(-1).view(torch.uint8).numpy().tobytes()",
        "bits.numel()",
        test_a_changed_input_is_told,
        errors=pytest.fail.Exception,
    )


PLANTED = {
    "all is infinity": (
        checks._same,
        "(a.isfinite().all() and b.isfinite().all())",
        "a.isfinite().all()",
        test_no_number_is_infinite,
    ),
    "something small is named as zero": (
        checks._named,
        " and mine.any() == theirs.any()",
        "",
        test_something_small_is_not_named_as_zero,
    ),
    "None is never named": (
        checks.close,
        "(got is None and _named(got, mistakes)) or likely",
        "likely",
        test_none_can_be_a_named_mistake,
    ),
    "a stumble goes unseen": (
        checks._why_stopped,
        "if part in str(error)",
        "if not part",
        lambda: test_where_many_stumble_is_told_in_plain_words(*[*STUMBLES.items()][1]),
    ),
    "an infinity is named": (
        checks._named,
        "finite = torch.isfinite(mine).all()",
        "finite = True",
        test_infinity_names_no_mistake,
    ),
    "None within a tuple is a missing return": (
        checks._unlike,
        "return nothing if inside else",
        "return",
        test_none_within_a_tuple_is_no_missing_return,
    ),
    "torch's own error is a blank": (
        checks._is_blank,
        ' and "your code here" in str(error)',
        "",
        test_torchs_own_not_implemented_error_is_no_blank,
    ),
    "no likely mistake is added": (
        checks._with_likely_mistake,
        '"Likely mistake" in text',
        "True",
        test_every_refusal_names_a_likely_mistake_or_says_that_it_knows_none,
    ),
    "numbers of Python in float32": (
        checks._numbers,
        "torch.as_tensor(numpy.array(value))",
        "torch.as_tensor(value)",
        test_numbers_of_python_are_compared_in_double_precision,
    ),
    "the dtype is not looked at": (
        checks._demand_kind,
        "got.dtype == kind",
        "True",
        lambda: test_right_numbers_of_another_kind_are_told(
            RIGHT, torch.float32, RIGHT.double()
        ),
    ),
    "a float is whole": (
        checks._whole,
        "isinstance(got, numbers.Integral)",
        "isinstance(got, numbers.Number)",
        lambda: test_right_numbers_of_another_kind_are_told(3, int, 3.0),
    ),
    "a setting goes unseen": (
        checks._settings_restored,
        "not torch.is_grad_enabled()",
        "False",
        lambda: test_a_setting_that_the_learners_code_leaves_behind_is_told(
            "autograd is switched off"
        ),
    ),
}


@pytest.mark.parametrize("bug", PLANTED.values(), ids=PLANTED)
def test_a_planted_bug_is_caught(bug):
    refused = (AssertionError, NotDone, pytest.fail.Exception)
    assert_caught(*bug, errors=refused)
