"""A batch says what its rows would say alone; and planted bugs that break that."""

import random

import pytest
import torch
from architectures import CONFIGS, VOCAB, build
from model_state import assert_same, snapshot
from planting import each_is_caught, law
from torch import nn
from transformers import AutoModelForCausalLM, BambaConfig, logging

from peft_from_scratch import nf4
from peft_from_scratch.methods import lora
from peft_from_scratch.training import generation
from peft_from_scratch.training.batch import left_pad
from peft_from_scratch.training.generation import generate

END = 2  # a token that these random models next to never write
NEW = 8


class Numbers:
    """In the place of a tokenizer: a text that shows every token."""

    @staticmethod
    def decode(ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def draw(rows, longest, seed=0):
    choose = random.Random(seed)
    lengths = [choose.randint(1, longest) for _ in range(rows)]
    return [choose.choices(range(3, VOCAB), k=length) for length in lengths]


PROMPTS = draw(5, 15)
PREFIX = list(range(40, 61))


@torch.no_grad()
def alone(model, ids, stop_id=END, most=NEW):
    """The reference: argmax, one row, no padding, no cache, none of generate()."""
    ids, before = list(ids), len(ids)
    for _ in range(most):
        token = (
            model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        )
        if token == stop_id:
            break
        ids.append(token)
    return Numbers.decode(ids[before:])


def together(model, prompts=PROMPTS, **options):
    options = dict(stop_id=END, max_new_tokens=NEW, batch=2) | options
    return generate(model, Numbers, prompts, **options)


# Laws. Each is run by a test below and, with a bug planted, by the last test.


@law
@pytest.mark.parametrize("prefix", [[], PREFIX], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("architecture", CONFIGS)
def a_batch_equals_its_rows(architecture="llama", prefix=PREFIX):
    model = build(architecture)
    whole = [[*prefix, *prompt] for prompt in PROMPTS]
    expected = [alone(model, ids) for ids in whole]
    assert len(set(expected)) > 3  # rows differ, or nothing could go wrong
    assert together(model, prefix=prefix) == expected
    early = int(expected[0].split()[NEW // 2])  # ends some rows, at different lengths
    expected = [alone(model, ids, stop_id=early) for ids in whole]
    assert together(model, prefix=prefix, stop_id=early) == expected


@law
def pads_do_not_push_tokens_out_of_a_sliding_window():
    model = build("gemma")
    window = model.config.sliding_window
    prefix, prompts = draw(1, 1)[0] * (window - 20), [*draw(3, 2), *draw(3, 40, seed=1)]
    expected = [alone(model, prefix + prompt) for prompt in prompts]
    assert together(model, prompts, prefix=prefix, batch=6) == expected


@law
def the_prefix_is_computed_once():
    model, widths = build("llama"), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append((args or [kwargs["input_ids"]])[0]),
        with_kwargs=True,
    )
    together(model, prefix=PREFIX)
    first, *others = [tuple(ids.shape) for ids in widths]
    assert first == (1, len(PREFIX))
    assert max(width for _, width in others) == max(map(len, PROMPTS))


@law
def the_model_is_left_as_it_was():
    """Also its dropout, which must be off inside, and its generation config."""
    model = build("llama")
    lora.inject(model, dropout=0.5)
    nn.init.normal_(next(p for n, p in model.named_parameters() if n.endswith(".B")))
    expected = [alone(model, prompt) for prompt in PROMPTS]
    model.train()
    model.model.layers[0].eval()
    before, config = snapshot(model), model.generation_config
    assert together(model) == expected
    assert_same(snapshot(model), before)
    assert model.generation_config is config


@law
def a_generation_config_does_not_interfere():
    model = build("llama")
    expected = [alone(model, prompt) for prompt in PROMPTS]
    model.generation_config.update(
        do_sample=True, temperature=3.0, repetition_penalty=5.0, min_new_tokens=3
    )
    model.generation_config.suppress_tokens = [int(t) for t in expected[0].split()]
    assert together(model) == expected


@law
def weights_in_four_bits_are_unpacked_once_for_all_tokens():
    """Within the bytes that are given, and none by default; the same answers."""
    model, seen = build("llama"), []
    nf4.quantize_model(model)
    expected = together(model, prefix=PREFIX)
    layers = [m for m in model.modules() if isinstance(m, nf4.NF4Linear)]
    all_bytes = 4 * sum(module.values for module in layers)
    nf4.NF4Linear.on_dequantize.append(seen.append)
    try:
        for bytes_, most in ((all_bytes, len(layers)), (0, None)):
            seen.clear()
            found = together(model, prefix=PREFIX, unpacked_bytes=bytes_)
            assert found == expected
            assert len(seen) == most if most else len(seen) > 4 * len(layers)
        usual = len(seen)
        seen.clear()
        together(model, prefix=PREFIX)
        assert len(seen) == usual
    finally:
        nf4.NF4Linear.on_dequantize.remove(seen.append)
    assert {module.unpacked for module in layers} == {None}


def hybrid():
    """A state-space mixer, then an attention."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    mixer = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
    config = BambaConfig(
        **sizes,
        **mixer,
        num_key_value_heads=2,
        num_hidden_layers=2,
        mamba_chunk_size=16,
        mamba_expand=2,
        attn_layer_indices=[1],
        vocab_size=VOCAB,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_model_that_remembers_by_other_means_gets_the_prefix_with_each_row():
    model = hybrid()
    expected = [alone(model, PREFIX + prompt) for prompt in PROMPTS]
    assert together(model, prefix=PREFIX) == expected


@pytest.mark.parametrize("batch", [1, 3, 5, 100])
def test_the_size_of_a_batch_changes_nothing(batch):
    model = build("gpt2")
    assert together(model, batch=batch, prefix=PREFIX) == together(model, prefix=PREFIX)


def test_no_prompts_are_no_answers():
    assert together(build("llama"), []) == []


def test_generating_warns_of_nothing(caplog):
    logging.enable_propagation()
    model = build("llama")
    model.generation_config.update(do_sample=True, temperature=0.3, top_p=0.8)
    with caplog.at_level("WARNING"):
        together(model, prefix=PREFIX)
    logging.disable_propagation()
    assert not caplog.records


def test_left_pad_spelled_out():
    ids, mask = left_pad([[5, 6], [7]], 3, 0)
    assert ids.tolist() == [[5, 6], [0, 7]]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 1]]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt is empty: leave its last token"):
        together(build("llama"), [[5], []], prefix=PREFIX)


def test_more_tokens_than_positions_are_refused_before_anything_is_computed():
    model = build("gpt2")
    prompts = [[5], [5] * (256 - len(PREFIX) - NEW)]
    assert len(together(model, prompts, prefix=PREFIX)) == 2
    with pytest.raises(ValueError, match="are 257 tokens; the model has 256 positions"):
        together(model, prompts, prefix=[*PREFIX, 5])


CONTINUE, PAD = generation._continue, left_pad
CAUGHT = (AssertionError, RuntimeError)
BUGS = {
    "every token unpacks the weights": (
        generation.generate,
        "budget_bytes=unpacked_bytes",
        "budget_bytes=0",
        weights_in_four_bits_are_unpacked_once_for_all_tokens,
    ),
    "weights stay unpacked unasked": (
        generation.generate,
        "budget_bytes=unpacked_bytes",
        "budget_bytes=1 << 40",
        weights_in_four_bits_are_unpacked_once_for_all_tokens,
    ),
    "padding on the right": (
        PAD,
        "[pad_id] * (longest - len(p)) + p",
        "p + [pad_id] * (longest - len(p))",
        a_batch_equals_its_rows,
    ),
    "padding on the right, mask as well": (
        PAD,
        "return torch.tensor(ids), torch.tensor(mask)",
        "return torch.tensor([p + [pad_id] * (longest - len(p)) for p in prompts]), "
        "torch.tensor([[1] * (cached + len(p)) + [0] * (longest - len(p)) "
        "for p in prompts])",
        a_batch_equals_its_rows,
    ),
    "pads are attended to": (
        PAD,
        "[0] * (longest - len(p)) + [1]",
        "[1] * (longest - len(p)) + [1]",
        a_batch_equals_its_rows,
    ),
    "a mask that forgets the prefix": (
        PAD,
        "[1] * cached",
        "[0] * cached",
        a_batch_equals_its_rows,
    ),
    "positions that start again after the prefix": (
        CONTINUE,
        "generation_config=model.generation_config",
        "generation_config=model.generation_config, "
        "position_ids=(mask[:, len(prefix) :].cumsum(-1) - 1).clamp(min=0)",
        a_batch_equals_its_rows,
    ),
    "positions that count pads": (
        CONTINUE,
        "generation_config=model.generation_config",
        "generation_config=model.generation_config, "
        "position_ids=torch.arange(mask.shape[1]).expand(mask.shape)",
        a_batch_equals_its_rows,
    ),
    "a prefix that the first batch has written to": (
        generation._repeat,
        "copy.deepcopy(cache)",
        "cache",
        a_batch_equals_its_rows,
    ),
    "a prefix that is read and then not used": (
        generation._repeat,
        "if cache is None:",
        "if True:",
        a_batch_equals_its_rows,
    ),
    "answers in the order of their lengths": (
        generation.generate,
        "zip(chosen, new, strict=True)",
        "zip(range(first, first + len(chosen)), new, strict=True)",
        a_batch_equals_its_rows,
    ),
    "the stop token in the answer": (
        CONTINUE,
        "row[: row.index(stop_id)]",
        "row[: row.index(stop_id) + 1]",
        a_batch_equals_its_rows,
    ),
    "no end to an answer": (
        CONTINUE,
        "row[: row.index(stop_id)] if stop_id in row else row",
        "row",
        a_batch_equals_its_rows,
    ),
    "a sliding window that counts pads": (
        generation._slides,
        "window is not None and",
        "False and",
        pads_do_not_push_tokens_out_of_a_sliding_window,
    ),
    "the prefix again for every row": (
        generation.generate,
        "None if slides else _read(model, prefix)",
        "None",
        the_prefix_is_computed_once,
    ),
    "dropout on": (
        generation.generate,
        "training=False",
        "training=True",
        the_model_is_left_as_it_was,
    ),
    "a generation config that stays": (
        generation._greedy,
        "model.generation_config = before",
        "pass",
        the_model_is_left_as_it_was,
    ),
    "penalties of the model's own": (
        generation._greedy,
        "model.generation_config = GenerationConfig(",
        "model.generation_config = GenerationConfig("
        "repetition_penalty=before.repetition_penalty, ",
        a_generation_config_does_not_interfere,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS, errors=CAUGHT)
