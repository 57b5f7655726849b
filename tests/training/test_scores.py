"""Laws of scores, intervals and the loss on general text; and planted bugs."""

import statistics
import tracemalloc
from math import sqrt
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import build, byte_tokenizer
from model_state import assert_same, snapshot
from planting import each_is_caught, law

from peft_from_scratch.common.statistics import (
    are_counts,
    of_scores,
    paired_bootstrap,
    wilson,
)
from peft_from_scratch.tasks import scorers
from peft_from_scratch.tasks.templates import TEMPLATES, encode_prompt, stop_token
from peft_from_scratch.training import evaluation as evaluate
from peft_from_scratch.training.evaluation import answer_rows, general_losses
from peft_from_scratch.training.generation import generate

TOKENIZER = byte_tokenizer()
ROWS = [{"prompt": "ab" * i, "completion": "c" * i} for i in (2, 1, 4)]
EXAMPLES = [("x", "xx"), ("y", "yy")]


def task(score):
    return SimpleNamespace(instruction="Say it.", score=score)


def counts(k, n):
    return np.array([1] * k + [0] * (n - k))


# Laws. Each is run by a test below and, with a bug planted, by the last test.


@law
def answers_are_those_to_whole_prompts_one_by_one():
    model = build("llama")
    for template in TEMPLATES:
        for examples in ((), EXAMPLES):
            alone = [
                generate(
                    model,
                    TOKENIZER,
                    [
                        encode_prompt(
                            TOKENIZER,
                            "Say it.",
                            row["prompt"],
                            template=template,
                            examples=examples,
                        )
                    ],
                    stop_id=stop_token(TOKENIZER, template),
                    max_new_tokens=4 + 4 // 4 + 8,
                )[0].strip()
                for row in ROWS
            ]
            assert len(set(alone)) > 1
            scored = answer_rows(
                model,
                TOKENIZER,
                task(lambda answer, completion: (answer, completion)),
                ROWS,
                template=template,
                examples=examples,
            )
            assert scored.answers == alone
            completions = [row["completion"] for row in ROWS]
            assert scored.correct == list(zip(alone, completions, strict=True))


@law
def an_answer_has_room_for_the_letters_of_control_tokens(monkeypatch):
    """<bos> in a completion is five letters of it, and not one token."""
    rows, asked = [{"prompt": "x", "completion": "<bos>" * 9}], {}
    monkeypatch.setattr(
        evaluate, "generate", lambda *args, **options: asked.update(options) or ["y"]
    )
    scored = task(lambda *pair: False)
    answer_rows(None, TOKENIZER, scored, rows, template="raw", unpacked_bytes=7)
    assert asked["max_new_tokens"] == 5 * 9 + 5 * 9 // 4 + 8
    assert asked["unpacked_bytes"] == 7


@law
def wilson_solves_the_score_equation():
    """|p - k/n| = z sqrt(p (1 - p)/n), by bisection on either side of k/n."""
    for n in (1, 2, 7, 100, 300):
        for k in {0, 1, n // 3, n - 1, n}:
            for confidence in (0.5, 0.95, 0.999):
                z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
                low, high = wilson(k, n, confidence)
                assert low == pytest.approx(solve(k / n, 0.0, n, z), abs=1e-9)
                assert high == pytest.approx(solve(k / n, 1.0, n, z), abs=1e-9)


def solve(inside, outside, n, z):
    """The p between, where p is just as far from the share as z standard errors."""
    share = inside
    for _ in range(100):
        p = (inside + outside) / 2
        if abs(p - share) <= z * sqrt(p * (1 - p) / n):
            inside = p
        else:
            outside = p
    return inside


@law
def the_interval_holds_the_truth_95_times_of_100():
    """On correlated methods whose true difference is known."""
    generator = np.random.default_rng(0)
    held, narrower = 0, 0
    for i in range(400):
        hard = generator.random(120)  # the same items for both methods
        a = (hard + 0.2 * generator.random(120) < 0.8).astype(int)
        b = (hard + 0.2 * generator.random(120) < 0.7).astype(int)
        difference, low, high = paired_bootstrap(a, b, draws=600, seed=i)
        assert low <= difference <= high
        held += low <= 0.1 <= high
        apart = sqrt(a.var() / 120 + b.var() / 120)
        narrower += high - low < 2 * 1.96 * apart
    assert 0.92 <= held / 400 <= 0.98
    assert narrower > 390


@law
def the_interval_of_many_items_is_the_normal_one():
    a, b = counts(1500, 2000), counts(1200, 2000)[::-1]
    for confidence in (0.8, 0.95):
        difference, low, high = paired_bootstrap(
            a, b, draws=4000, confidence=confidence
        )
        z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
        error = (a - b).std() / sqrt(2000)
        assert high - low == pytest.approx(2 * z * error, rel=0.05)
        assert (low + high) / 2 == pytest.approx(difference, abs=0.2 * error)


@law
def a_difference_turns_with_its_methods():
    a, b = counts(80, 100), counts(40, 100)[::-1]
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx(0.4)
    assert paired_bootstrap(b, a) == pytest.approx((-difference, -high, -low))
    assert paired_bootstrap(a, a) == (0.0, 0.0, 0.0)
    assert paired_bootstrap(a, a - 1) == (1.0, 1.0, 1.0)
    assert paired_bootstrap(a, b) == paired_bootstrap(list(map(bool, a)), list(b))
    assert paired_bootstrap(a, b, seed=1) != (difference, low, high)


@law
def the_general_loss_is_the_models_own_over_the_whole_text():
    model, ids = build("llama"), every_topic()
    spread = np.linspace(0, len(ids) - 32, 5).astype(int)
    expected = []
    for start in spread:
        window = torch.tensor([ids[start : start + 32]])
        with torch.no_grad():
            expected.append(model(window, labels=window).loss.item())
    losses = general_losses(model, TOKENIZER, windows=5, length=32)
    assert losses == pytest.approx(expected, rel=1e-6)


@law
def the_general_loss_leaves_the_model_alone():
    model = build("gpt2")
    expected = general_losses(model, TOKENIZER, windows=2, length=32)
    model.transformer.h[0].attn.attn_dropout.p = 0.9
    model.transformer.h[0].attn.train()
    before = snapshot(model)
    again = general_losses(model, TOKENIZER, windows=2, length=32)
    assert again == pytest.approx(expected, rel=1e-6)
    assert_same(snapshot(model), before)


def every_topic():
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return TOKENIZER(text, add_special_tokens=False, verbose=False).input_ids


def test_what_all_prompts_begin_with_is_computed_once():
    model, shapes = build("llama"), []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape))
    )
    answer_rows(
        model, TOKENIZER, task(str.__eq__), ROWS, template="raw", examples=EXAMPLES
    )
    shown = encode_prompt(TOKENIZER, "Say it.", "ab", template="raw", examples=EXAMPLES)
    own = len("\nOutput:")
    assert shapes[0] == (1, len(shown) - own)
    assert shapes[1] == (3, len("ababab") + own)


def test_a_single_row_keeps_a_token_of_its_own():
    model = build("llama")
    options = dict(template="chat", examples=EXAMPLES)
    one = answer_rows(model, TOKENIZER, task(str.__eq__), ROWS[:1], **options)
    assert len(one.answers) == len(one.correct) == 1
    assert one.seconds > 0
    with pytest.raises(ValueError, match="no rows to answer"):
        answer_rows(model, TOKENIZER, task(str.__eq__), [], **options)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_on_published_examples(k, n, low, high):
    """Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3."""
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_counts_that_are_none_are_refused(k, n):
    with pytest.raises(ValueError, match=rf"{k} of {n}: 0 <= k <= n and n >= 1"):
        wilson(k, n)


def test_a_wider_confidence_is_a_wider_interval():
    a, b = counts(80, 100), counts(70, 100)[::-1]
    widths = [
        high - low
        for _, low, high in (paired_bootstrap(a, b, confidence=c) for c in (0.5, 0.95))
    ]
    assert widths[0] < widths[1]


@pytest.mark.parametrize(("a", "b"), [([], []), ([1], [1, 0])])
def test_items_that_are_not_pairs_are_refused(a, b):
    with pytest.raises(
        ValueError, match=f"{len(a)} and {len(b)} items cannot be paired"
    ):
        paired_bootstrap(a, b)


def test_the_bootstrap_takes_sixteen_bytes_for_each_drawn_item():
    a, b = np.ones(200), np.zeros(200)
    tracemalloc.start()
    paired_bootstrap(a, b, draws=5000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak / (5000 * 200) == pytest.approx(16, abs=0.5)


def test_the_general_text_is_long_enough_and_prose():
    ids = every_topic()
    assert len(ids) > 300_000  # bytes here: 8 windows of 256 tokens do not overlap
    assert "the" in TOKENIZER.decode(ids[1000:2000]).split()


BOOTSTRAP, GENERAL = paired_bootstrap, evaluate.general_losses


@law
def scores_between_have_no_interval_of_counts():
    """Eight right of ten are not ten answers that are right to 0.8 each."""
    counts = [True] * 8 + [0.0, False]
    assert of_scores(counts) == (0.8, *wilson(8, 10))
    assert of_scores([0.8] * 10) == pytest.approx((0.8, 0.8, 0.8))
    mean, low, high = of_scores([0.25, 0.75] * 50)
    assert mean == 0.5 and low < mean < high
    half = 1.96 * 0.25 / 10  # normal, of 100 values that deviate by 0.25
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.01)


BUGS = {
    "the shared beginning is longer than shared": (
        evaluate.shared_tokens,
        "len(commonprefix(prompts))",
        "len(commonprefix(prompts)) + 1",
        answers_are_those_to_whole_prompts_one_by_one,
    ),
    "the shared beginning is dropped": (
        evaluate.answer_rows,
        "prefix=prompts[0][:shared]",
        "prefix=()",
        answers_are_those_to_whole_prompts_one_by_one,
    ),
    "examples are dropped": (
        evaluate.answer_rows,
        "examples=examples",
        "examples=()",
        answers_are_those_to_whole_prompts_one_by_one,
    ),
    "answers are cut at the longest completion": (
        evaluate.answer_room,
        "longest + longest // 4 + 8",
        "longest",
        answers_are_those_to_whole_prompts_one_by_one,
    ),
    "a control token in a completion counts as one": (
        evaluate.answer_room,
        "split_special_tokens=True",
        "split_special_tokens=False",
        an_answer_has_room_for_the_letters_of_control_tokens,
    ),
    "score(completion, answer)": (
        scorers.score_all,
        "score(answer, completion) for",
        "score(completion, answer) for",
        answers_are_those_to_whole_prompts_one_by_one,
    ),
    "scores between counted as right ones": (
        are_counts,
        "score in (0, 1)",
        "0 <= score <= 1",
        scores_between_have_no_interval_of_counts,
    ),
    "counts without Wilson's interval": (
        of_scores,
        "if are_counts(scores):",
        "if False:",
        scores_between_have_no_interval_of_counts,
    ),
    "Wald's interval": (
        wilson,
        "p + z * z / (2 * n)",
        "p * (1 + z * z / n)",
        wilson_solves_the_score_equation,
    ),
    "z of one side": (
        wilson,
        "(1 + confidence) / 2",
        "confidence",
        wilson_solves_the_score_equation,
    ),
    "the two methods drawn apart": (
        BOOTSTRAP,
        "means = difference[drawn].mean(axis=1)",
        "means = np.asarray(a)[drawn].mean(axis=1) - np.asarray(b)["
        "generator.permutation(drawn)].mean(axis=1)",
        the_interval_holds_the_truth_95_times_of_100,
    ),
    "half of the items drawn": (
        BOOTSTRAP,
        "size=(draws, len(difference))",
        "size=(draws, len(difference) // 2)",
        the_interval_holds_the_truth_95_times_of_100,
    ),
    "b - a": (
        BOOTSTRAP,
        "np.asarray(a, dtype=float) - np.asarray(b, dtype=float)",
        "np.asarray(b, dtype=float) - np.asarray(a, dtype=float)",
        a_difference_turns_with_its_methods,
    ),
    "an interval of 90 %": (
        BOOTSTRAP,
        "[(1 - confidence) / 2, (1 + confidence) / 2]",
        "[1 - confidence, confidence]",
        the_interval_of_many_items_is_the_normal_one,
    ),
    "the loss of a token given itself": (
        GENERAL,
        "window[0, 1:]",
        "window[0, :-1]",
        the_general_loss_is_the_models_own_over_the_whole_text,
    ),
    "the first window only": (
        GENERAL,
        "ids[start : start + length]",
        "ids[:length]",
        the_general_loss_is_the_models_own_over_the_whole_text,
    ),
    "a loss with dropout": (
        GENERAL,
        "training=False",
        "training=True",
        the_general_loss_leaves_the_model_alone,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
