"""Notebook 02's checks: what the common mistakes are told, and what else is right."""

import build
import pytest
import torch
from exercise_checks import checked
from try_answers import lesson

from peft_from_scratch.course.checks import Wrong
from peft_from_scratch.course.checks import fitting_it as checks

LESSON = lesson(build.FOLDER / "02_fitting_it.py")

TOLD = {  # exercise: {mutant: what its learner must read}
    "2.1": {
        "the name alone": "two values are needed",
        "the smallest": "the smallest moment was taken",
        "the largest part": "the largest single part was taken",
        "the parts' own maxima": "not all there at one moment",
        "all moments added": "all moments were added",
        "the last of equal ones": "of equal moments the first one counts",
        "a float": "another kind",
    },
    "2.2": {
        "keeps everything": "all that it computes on the way is kept",
        "a graph in forward": "all that it computes on the way is kept",
        "no random state": "drew other numbers the second time",
        "the state after f": "drew other numbers the second time",
        "the replay is left behind": "put the state of before back",
        "needs a gradient at x": "backward is never called, though f has parameters",
        "no gradient to x": "the gradient of x",
        "the parameters get nothing": "which ends in its parameters",
        "f runs twice in forward": "once in forward, and once more in backward",
        "the gradient twice": "every entry is 2 times",
        "x is changed": "x itself was changed",
    },
    "2.3": {
        "a sum for the mean": "divide by the number of ranks",
        "its own gradient": "reduce-scatter comes first",
        "no all-gather": "gather the others' parts",
        "whole gradients are sent": "one part in a hop",
        "the next part": "updates part",
        "rank 0 updates all": "once for each rank",
        "no update": "called for the ranks []",
        "the gradients are ignored": "nothing was updated",
        "the padding stays": "the padding was left on",
        "one rank's weights": "the new weights of every rank",
        "no wire": "a rank knows what it holds",
        "one hop too many": "hop",
        "gradients are changed": "was changed",
    },
    "2.4": {
        "the sum of all": "the peak is one moment",
        "the dearest first": "start with the cheapest",
        "never None": "no single change fits",
        "less than the room": "a peak as large as the room fits",
        "checkpointing drops the logits": "leaves the logits alone",
        "checkpointing keeps nothing": "still keeps the input of every layer",
        "no layer again": "holds all of it",
        "half the rows keep all logits": "half as many, too",
        "stage three": "leaves the weights whole",
        "stage one": "cuts the gradients, too",
        "no update": "the update is a moment, too",
        "the change alone": "three values are needed",
    },
}
RIGHT = {  # exercise: {name: another right answer}
    "2.1": {"the lesson's": "my_peak = checks.our_peak"},
    "2.2": {"the lesson's": "my_checkpoint = checks.our_checkpoint"},
    "2.3": {"the lesson's": "my_zero_step = checks.our_zero_step"},
    "2.4": {"the lesson's": "my_choice = checks.our_choice"},
}


(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)


def test_each_change_is_once_the_answer_and_once_none_fits():
    answers = [checks.our_choice(bill, room) for bill, room in checks._bills()]
    assert {answer and answer[0] for answer in answers} == {*checks.CHANGES, None}
    assert {answer[1] for answer in answers if answer} == {"loss", "backward", "update"}


@pytest.mark.parametrize("ranks, size", checks.SPLITS)
def test_the_ring_sends_what_the_formula_says(ranks, size):
    """2 (N - 1) parts a rank, whatever the values."""
    wire = checks.Wire(ranks)
    w, g = torch.randn(size), [torch.randn(size) for _ in range(ranks)]
    new = checks.our_zero_step([w] * ranks, g, wire, lambda rank, w, g: w - g)
    assert sum(wire.sent) == 2 * (ranks - 1) * -(-size // ranks)
    for each in new:
        assert torch.allclose(each, w - torch.stack(g).mean(0), atol=1e-6)


@pytest.mark.parametrize("tensors", [[torch.ones(2)], torch.ones(2), [1, 2, 3]])
def test_the_wire_takes_a_tensor_of_each_rank(tensors):
    with pytest.raises(Wrong, match="one tensor for each rank"):
        checks.Wire(3)(tensors)
