"""Notebook 06's checks: what the common mistakes are told, and what else is right.

That every mutant is refused is tested in test_exercises.py. Here stands what a refusal
should say, and answers that differ from the notebook's and are as good.
"""

import build
import pytest
import torch
from exercise_checks import checked
from try_answers import lesson

from peft_from_scratch.course.checks import merging as checks

LESSON = lesson(build.FOLDER / "06_merging.py")

TOLD = {  # exercise: {mutant: what its learner must read}
    "6.1": {
        "always merged": "the base itself has to be a candidate",
        "always none of these": "the candidate is not rounded to W's dtype",
        "nothing is left over": "nearly none of BA",
        "the usual tolerance": "a tolerance that is wider than the update",
        "no candidate is rounded": "or it is not rounded",
        "equal bits": "may have computed in float32",
        "twice is no candidate": "2 · scale · BA is no candidate",
        "a lost scale is no candidate": "BA without the scale is no candidate",
        "a list": "one of these texts is needed",
    },
    "6.2": {
        "the factors are added": "that adds the cross terms",
        "the factors are added, nothing else": "weights and scales are missing",
        "the weights on both sides": "each weight is in A and in B",
        "the scales on both sides": "each scale is in A and in B",
        "no scales": "the scales are missing",
        "no weights": "the weights are missing",
        "no signs": "the sign of a weight is lost",
        "roots without the sign": "the sign of a weight is lost",
        "the mean": "the mean in place of the sum",
        "the first alone": "only the first adapter",
        "the sides are swapped": "A and B are swapped",
        "a dense sum": "you return a dense sum",
        "the product": "return A, B",
        "in double precision": "a dtype of your own",
    },
    "6.3": {
        "in place, still tied": "the embedding was changed too",
        "in place, untied": "which is written once",
        "nothing is saved": "the model is changed, and never saved",
        "the model is not changed": "which is written once",
        "tied, and not changed": "the update is lost",
        "no scale": "the scale is missing",
        "twice": "there twice",
        "subtracted": "the sign of the update",
        "the update alone": "without the weight that was there",
        "in the embedding": "in the embedding alone",
        "tied again before saving": "tied to the embedding again",
        "the config still ties": "the saved config says tie_word_embeddings=True",
        "untied after saving": "is not changed before it is saved",
        "the config alone": "save the whole model",
    },
}
RIGHT = {  # exercise: {name: another right answer}
    "6.1": {
        "the lesson's": "my_verdict = checks.our_verdict",
        "the distance in units of the update": """\
def my_verdict(W0, A, B, scale, W):
    update = scale * (B.double() @ A.double())
    for way, times in (("not merged", 0), ("merged", 1), ("merged twice", 2),
                       ("scale forgotten", 1 / scale)):
        made = (W0.double() + times * update).to(W0.dtype).double()
        if (W.double() - made).norm() < 0.1 * update.norm():
            return way
    return "none of these"
""",
    },
    "6.2": {
        "the lesson's": "my_sum = checks.our_sum",
        "a loop": """\
def my_sum(adapters, weights):
    rows, columns = [], []
    for w, (A, B, s) in zip(weights, adapters):
        for k in range(len(A)):
            rows.append(w * A[k])
            columns.append(s * B[:, k])
    return torch.stack(rows), torch.stack(columns, dim=1)
""",
    },
    "6.3": {
        "the lesson's": "my_export = checks.our_export",
        "set_output_embeddings": """\
def my_export(model, A, B, scale, folder):
    old = model.get_output_embeddings()
    new = nn.Linear(old.in_features, old.out_features, bias=False)
    new.weight.data = old.weight.data + scale * (B @ A)
    model.set_output_embeddings(new)
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
""",
    },
}


(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)


def test_every_checkpoint_has_one_explanation():
    """The right candidate is near, and every other one far, in units of the update."""
    seen = set()
    for case in checks.forensics():
        W0, A, B, scale, W = case.lent.values()
        BA = B.double() @ A.double()
        ways = {
            checks.NONE: 0.0,
            checks.MERGED: scale,
            checks.TWICE: 2 * scale,
            checks.NO_SCALE: 1.0,
        }
        off = {}
        for way, factor in ways.items():
            candidate = (W0.double() + factor * BA).to(W.dtype)
            distance = (W.double() - candidate.double()).norm()
            off[way] = (distance / (scale * BA.norm())).item()
        own = off.pop(case.answer, 0.0)
        assert own < 0.05, case
        assert min(off.values()) > (0.75 if case.answer == checks.OTHER else 0.15)
        seen.add((case.answer, W.dtype))
    assert len(seen) >= 13


def test_some_updates_are_below_the_rounding_and_some_senders_used_float32():
    below, single = [], []
    for case in checks.forensics():
        W0, A, B, scale, W = case.lent.values()
        if case.answer == checks.MERGED:
            below.append((W == W0).double().mean().item())
            exact = (W0.double() + scale * (B.double() @ A.double())).to(W.dtype)
            single.append(not torch.equal(exact, W))
    assert max(below) > 0.5 and min(below) < 0.01
    assert any(single) and not all(single)


@pytest.mark.parametrize("name", [name for name, *_ in checks.TIED])
def test_the_tied_models_are_tied_and_differ_where_it_matters(name):
    case = next(each for each in checks.tied_models() if each.name == name)
    model = case.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    outputs = [
        case.logits(),
        case.logits(head=0.0),
        case.logits(embedding=1.0),
        case.logits(head=0.0, embedding=1.0),
    ]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 0.1
