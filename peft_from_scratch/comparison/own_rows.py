"""Rows of your own in a comparison: checked whole, counted, and what they can tell."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from ..common.statistics import wilson
from ..methods import named
from ..tasks.jsonl import alike, in_order, refuse_bad
from ..tasks.messages import prompt_of
from ..tasks.scorers import TRIED, Scorer, label, score_all
from ..tasks.templates import IGNORED, encode_all, encode_prompt, placed
from ..training.evaluation import answer_room
from ..training.fitting import SPLITS
from . import shots
from .adapt import few_shot_examples
from .candidates import Candidate
from .estimate import Sizes
from .setup import Setup

FEW = 30  # test rows: fewer get a sentence on what they cannot tell
SAMPLED = 200  # training rows whose tokens are counted for an estimate
LISTED = 3  # places that a note names


def checked(setup: Setup) -> Setup:
    """The setup, with all rows looked at in each template that they may be written in.

    Few-shot is left out, with a sentence, where no example fits before the rows.

    Raises  ValueError  rows that are too long or no text, by place and reason
    """
    if not is_own(setup):
        return setup
    bad = {}
    for template in _templates(setup):
        for each, reason in _bad_rows(setup, template):
            bad.setdefault(each, reason)
    refuse_bad(in_order(bad.items()), setup.task.name)
    return _without_few_shot(setup)


def is_own(setup: Setup) -> bool:
    """Whether the rows are the user's: those of a generated task have no Scorer."""
    return isinstance(setup.task.score, Scorer)


def notes(setup: Setup) -> list[str]:
    """What is to be known about the rows before anything runs; [] for a generated task.

    How many there are and what they cost, who scores them, what is odd about them, and
    what so few of them cannot tell.
    """
    if not is_own(setup):
        return []
    scorer = setup.task.score
    about = [_counts(setup), f"Scored by {scorer.name}. {scorer.meaning}"]
    return [*about, *filter(None, (check(setup) for check in CHECKS))]


def data(setup: Setup, notes: Sequence[str]) -> dict:
    """{"data": …} for the result, as JSON can hold it; {} for a generated task."""
    if not is_own(setup):
        return {}
    task, scorer = setup.task, setup.task.score
    return {
        "data": {
            "file": task.name,
            "rows": {split: len(getattr(task, split)) for split in SPLITS},
            "scorer": scorer.name,
            "title": scorer.title,
            "meaning": scorer.meaning,
            "notes": list(notes),
        }
    }


def sizes(setup: Setup) -> Sizes:
    """Mean tokens of the task's rows, and of a prompt with eight examples."""
    task, template = setup.task, _templates(setup)[0]
    encoded = _encode(setup, "train", template, SAMPLED)[0]
    few = shots.fitted(setup, {"template": template, "k": 8, "order": 0})["k"]
    prompt = encode_prompt(
        setup.tokenizer,
        task.instruction,
        prompt_of(task.test[0]),
        template=template,
        examples=few_shot_examples(task, few, 0),
    )
    return Sizes(
        tokens=fmean(len(ids) for ids, _ in encoded),
        labels=fmean(_labels(labels) for _, labels in encoded),
        few_shot=len(prompt),
    )


def _templates(setup: Setup) -> tuple[str, ...]:
    return (setup.plan.template,) if setup.plan.template else setup.templates


# ------------------------------------------------------------------ what is too long


def _bad_rows(setup: Setup, template: str) -> list[tuple[str, str]]:
    """(place, reason) of the rows that cannot be encoded, trained on or answered."""
    in_front = max(map(_positions, setup.plan.chosen()), default=0)
    left = None if setup.positions is None else setup.positions - in_front
    bad = []
    for split in SPLITS:
        rows = getattr(setup.task, split)
        encoded, unfit = _encode(setup, split, template)
        bad += unfit
        if left is None:
            continue
        room = 0 if split == "train" else answer_room(setup.tokenizer, rows)
        good = [place for place, _ in placed(rows) if place not in dict(unfit)]
        for place, (ids, labels) in zip(good, encoded, strict=True):
            tokens = len(ids) if split == "train" else _prompt(labels) + room
            if tokens > left:
                what = "the row" if split == "train" else "prompt and longest answer"
                reason = (
                    f"{what}: {tokens} tokens, and the model has {left} positions "
                    "beside those of a soft prompt: shorten it, or leave it out"
                )
                bad.append((place, reason))
    return bad


def _encode(setup: Setup, split: str, template: str, most: int | None = None):
    """encode_all of a split's first rows: the encoded ones, and (place, reason)."""
    rows = getattr(setup.task, split)
    return encode_all(
        setup.tokenizer,
        setup.task.instruction,
        rows if most is None else rows.select(range(min(most, len(rows)))),
        template=template,
        max_tokens=setup.max_tokens,
    )


def _positions(candidate: Candidate) -> int:
    """Positions that a candidate's soft prompt or prefix takes."""
    if not candidate.trains:
        return 0
    return {**named(candidate.method).hyper, **candidate.options}.get("n", 0)


def _labels(labels: Sequence[int]) -> int:
    return sum(each != IGNORED for each in labels)


def _prompt(labels: Sequence[int]) -> int:
    """Tokens before the last answer, of which all carry a label."""
    return max(i for i, each in enumerate(labels, 1) if each == IGNORED)


def _without_few_shot(setup: Setup) -> Setup:
    """The setup without few-shot where not one example fits; prints that."""
    few = [candidate.key for candidate in setup.plan.chosen() if candidate.few_shot]
    fits = any(
        shots.fitted(setup, {"template": template, "k": 1, "order": 0})["k"]
        for template in _templates(setup)
    )
    if fits or not few:
        return setup
    print("left out: few-shot, since not one example fits before these rows")
    methods = tuple(key for key in setup.plan.methods if key not in few)
    return replace(setup, plan=replace(setup.plan, methods=methods))


# ------------------------------------------------------------------------- sentences


def _counts(setup: Setup) -> str:
    task, plan, tokens = setup.task, setup.plan, sizes(setup)
    rows = {split: len(getattr(task, split)) for split in SPLITS}
    epochs = plan.steps * plan.batch / rows["train"]
    return (
        f"{task.name}: {rows['train']} rows train, {rows['validation']} validate, "
        f"{rows['test']} test. A row has {tokens.tokens:.0f} tokens, of which "
        f"{tokens.labels:.0f} are its answer. Training reads a row {epochs:.2g} times."
    )


def _without_instruction(setup: Setup) -> str | None:
    instructed = setup.task.instruction or any(map(_has_system_turn, setup.task.test))
    if instructed or "zero-shot" not in setup.plan.methods:
        return None
    return (
        "No instruction: zero-shot is not told what to do, and what it answers says "
        'little about the model. Give one with --instruction "…".'
    )


def _has_system_turn(row) -> bool:
    turns = row.get("messages") or [{}]
    return turns[0].get("role") == "system"


def _few_rows(setup: Setup) -> str | None:
    n = min(setup.plan.rows, len(setup.task.test))
    if n >= FEW:
        return None
    low, high = wilson(n // 2, n)
    return (
        f"Only {n} test row{'s' if n > 1 else ''}: with {n // 2} right, the share "
        f"among all such rows may be anything from {100 * low:.0f} to "
        f"{100 * high:.0f} %. Only large differences between methods can show; more "
        "rows tell more."
    )


def _contradictions(setup: Setup) -> str | None:
    """Prompts that a reader would call the same, with different completions."""
    groups = defaultdict(list)
    for split in SPLITS:
        for place, row in placed(getattr(setup.task, split)):
            groups[alike(row["prompt"])].append((place, row["completion"]))
    odd = [g for g in groups.values() if len({completion for _, completion in g}) > 1]
    if not odd:
        return None
    some = "; ".join(" and ".join(each for each, _ in group) for group in odd[:LISTED])
    more = " …" if len(odd) > LISTED else ""
    times = f"{len(odd)} times" if len(odd) > 1 else "Once"
    return (
        f"{times}, prompts that differ in case or spaces alone have different "
        f"completions ({some}{more}): hardly anything can learn both."
    )


def _labels_without_training(setup: Setup) -> str | None:
    task = setup.task
    if task.score.name != "label":
        return None
    seen = {label(row["completion"]) for row in task.train}
    missing = sorted({label(row["completion"]) for row in task.test} - seen)
    if not missing:
        return None
    return (
        f"Labels of test rows that no training row has: {', '.join(missing)}. Nothing "
        "can learn them."
    )


def _best_score(setup: Setup) -> str | None:
    """By a file of the user's, even the rows' completions may not be fully right."""
    task = setup.task
    rows = task.test.select(range(min(TRIED, len(task.test))))
    best = fmean(score_all(task.score, rows["completion"], rows))
    if best == 1:
        return None
    return (
        f"By {task.score.name} the rows' own completions reach {best:.2f} on average, "
        "and not 1: a model that answers just so gets no more."
    )


CHECKS = (
    _without_instruction,
    _few_rows,
    _contradictions,
    _labels_without_training,
    _best_score,
)
