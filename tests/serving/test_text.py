"""Tokens to text and logits to tokens: nothing is taken back, nothing is lost."""

import math
import random

import architectures
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import Bug, each_is_caught, law
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_from_scratch import load_model
from peft_from_scratch.serving import sampling as sampling_module
from peft_from_scratch.serving.requests import Sampling
from peft_from_scratch.serving.sampling import choose
from peft_from_scratch.serving.text import BROKEN, Text

BYTES = architectures.byte_tokenizer()  # a token a byte: most characters need several


def pieces(text, stop=(), tokenizer=BYTES):
    """(pieces of a text's tokens, whether a stop text ended it)"""
    made = Text(tokenizer, stop)
    out = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        out.append(made.push(token))
        if made.stopped:
            return out, True
    return [*out, made.end()], False


@law
def pieces_make_up_the_text():
    for text in ("héllo wörld", "日本語 🙂🙃 end", "a  b\n\nc ", "e\u0301 👩‍👩‍👧"):
        given_, stopped = pieces(text)
        assert "".join(given_) == text and not stopped
        assert not any(BROKEN in piece for piece in given_)
        assert len([piece for piece in given_ if piece]) >= len(text) // 4


@law
def pieces_of_the_real_tokenizer_make_up_the_text():
    """Its tokens begin with spaces, and a decoder treats the first one apart."""
    tokenizer = load_model("tiny", device="cpu")[1]
    dice = random.Random(0)
    for _ in range(20):
        ids = [dice.randrange(3, len(tokenizer)) for _ in range(40)]
        made = Text(tokenizer)
        text = "".join(map(made.push, ids)) + made.end()
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


def words():
    """A tokenizer of whole words, whose decoder drops the first space, as Llama's."""
    vocabulary = {word: i for i, word in enumerate(("▁one", "▁two", "▁abcd", "<u>"))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<u>")


@law
def spaces_between_words_are_kept():
    given_, _ = pieces("one two one", tokenizer=words())
    assert given_ == ["one", " two", " one", ""]


@law
def the_first_stop_text_in_a_token_ends_the_answer():
    assert pieces("one abcd", ("cd", "b"), words()) == (["one", " a"], True)


@law
def a_stop_text_ends_the_answer_wherever_tokens_cut_it():
    for text, stop, left in (
        ("one\n\ntwo", ("\n\n",), "one"),
        ("abcabd", ("abd",), "abc"),
        ("aaab", ("aab",), "a"),
        ("x🙂y", ("🙂",), "x"),
        ("one two", ("two", "one t"), ""),
        ("nothing", ("nothingness", "z"), "nothing"),
    ):
        given_, stopped = pieces(text, stop)
        assert "".join(given_) == left
        assert stopped == (left != text)


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=3)))
@settings(max_examples=60, deadline=None)
def test_pieces_end_before_the_first_stop_text(text, stop):
    given_, stopped = pieces(text, stop)
    ends = [at for each in stop if (at := text.find(each)) >= 0]
    assert stopped == bool(ends)
    given_text = "".join(given_)
    assert text.startswith(given_text)
    assert not any(each in given_text for each in stop)
    if not ends:
        assert given_text == text


def test_bytes_that_are_no_character_come_out_in_the_end():
    made = Text(BYTES)
    token = BYTES("é", add_special_tokens=False).input_ids[0]
    given_ = [made.push(token) for _ in range(20)]
    assert BROKEN in "".join(given_) + made.end()
    assert made.end() == ""


def test_a_prompt_that_ends_inside_a_character_does_not_come_back():
    """The answer's text is made of the answer's tokens alone."""
    first, second = BYTES("é", add_special_tokens=False).input_ids
    made = Text(BYTES)  # `first` was the prompt's last token
    text = made.push(second) + made.push(BYTES("x").input_ids[-1]) + made.end()
    assert text.replace(BROKEN, "") == "x" and first != second


# ------------------------------------------------------------------------- Sampling


@law
def tokens_are_drawn_as_often_as_likely():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        dice = torch.Generator().manual_seed(0)
        how = Sampling(temperature, top_p)
        drawn = [choose(logits, how, dice).id for _ in range(4000)]
        p = torch.softmax(logits / temperature, -1)
        if top_p < 1:  # 0.66 + 0.24: two tokens have it together
            p = torch.where(p > 0.2, p, 0) / p[p > 0.2].sum()
        for token, share in enumerate(p.tolist()):
            sigma = math.sqrt(max(share * (1 - share), 1e-9) / 4000)
            assert abs(drawn.count(token) / 4000 - share) < 5 * sigma


@law
def log_probabilities_are_those_of_the_model():
    """Of temperature 1, whatever the temperature; the chosen one and the likeliest."""
    logits = torch.randn(50)
    expected = torch.log_softmax(logits.double(), -1)
    for how in (Sampling(logprobs=3), Sampling(0.3, seed=1, logprobs=3)):
        token = choose(logits, how, torch.Generator().manual_seed(0))
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-5)
        best = expected.topk(3)
        assert [i for i, _ in token.top] == best.indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(
            best.values.tolist(), abs=1e-5
        )
    assert choose(logits, Sampling(), None).logprob is None
    assert len(choose(logits, Sampling(logprobs=99), None).top) == 50
    assert choose(logits, Sampling(logprobs=0), None).top == ()


def test_nothing_but_the_likeliest_token_has_no_probability():
    logits = torch.tensor([0.0, 3.0, 1.0])
    dice = torch.Generator().manual_seed(0)
    for how in (Sampling(1.0, 0.0), Sampling(1e-6), Sampling()):
        assert {choose(logits, how, dice).id for _ in range(20)} == {1}


BUGS = {
    "half a character": Bug(
        Text.push, "new.endswith(BROKEN)", "False", pieces_make_up_the_text
    ),
    "tokens without those before them": Bug(
        Text._new_text,
        "max(0, self._decoded - WINDOW)",
        "self._decoded",
        spaces_between_words_are_kept,
    ),
    "a stop text that was cut apart": Bug(
        Text._certain,
        "cut = len(self._pending) - kept",
        "cut = len(self._pending)",
        a_stop_text_ends_the_answer_wherever_tokens_cut_it,
    ),
    "the first stop text of the list": Bug(
        Text._certain,
        "min(ends)",
        "ends[0]",
        the_first_stop_text_in_a_token_ends_the_answer,
    ),
    "the text that was held back is lost": Bug(
        Text.end,
        "self._pending + self._new_text()",
        "self._new_text()",
        a_stop_text_ends_the_answer_wherever_tokens_cut_it,
    ),
    "one token too few": Bug(
        sampling_module._draw,
        "p.cumsum(0) - p",
        "p.cumsum(0)",
        tokens_are_drawn_as_often_as_likely,
    ),
    "log-probabilities at the temperature": Bug(
        sampling_module.choose,
        "torch.log_softmax(logits, -1)",
        "torch.log_softmax(logits / (sampling.temperature or 1), -1)",
        log_probabilities_are_those_of_the_model,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS)
